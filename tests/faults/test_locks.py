"""Locks that do not lock, and a disk that says no: a lease is advice, what is published is right without it."""

import errno
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import workers
from test_kills import at_change, lies_below
from workers import IMAGES, PAIRS, UNUSABLE, Child, extract, files, litter, published, spec, whole

from mlfusion.store import FeatureStore, leases, records
from mlfusion.store.verify import verify_entry
from mlfusion.system import disk

both = pytest.mark.parametrize("format", ["zarr", "hdf5"])


def test_leases_removed_under_the_extractors(many, trial, tmp_path):
    """By a broken file system or a tidy person: work may be done twice, and nothing is lost or mixed."""
    want = files(extract(tmp_path / "alone").path)
    for number in range(many(2, 20)):
        with trial("leases removed under the extractors"):
            root = tmp_path / f"cache {number}"
            children = [Child(extract, root, pause=0.005) for _ in range(3)]
            over = threading.Event()

            def tidy(root: Path = root, over: threading.Event = over) -> None:
                while not over.is_set():
                    with suppress(FileNotFoundError):  # a draft's folder went while it was looked through
                        for lease in root.glob("v*/*/leases/*"):
                            lease.unlink(missing_ok=True)

            thread = threading.Thread(target=tidy)
            thread.start()
            codes = [child.wait() for child in children]
            over.set()
            thread.join()
            assert codes == [0, 0, 0], [child.said for child in children]
            assert files(whole(root).path) == want


def without_locks(root: Path) -> None:
    """Every lease is granted, whoever else holds it."""

    def take(held: leases.Leases, name: str) -> bool:
        held._owned[name] = disk.claim()
        return True

    leases.Leases._take = take
    extract(root, pause=0.002)


def test_locks_that_everybody_gets(many, trial, tmp_path):
    want = files(extract(tmp_path / "alone").path)
    for number in range(many(2, 20)):
        with trial("a lock that everybody gets"):
            root = tmp_path / f"cache {number}"
            children = [Child(without_locks, root) for _ in range(3)]
            assert [child.wait() for child in children] == [0, 0, 0], [child.said for child in children]
            assert files(whole(root).path) == want


def other_numbers(root: Path, which: int) -> None:
    """As on another device: the same model gives slightly other numbers; and locks do not lock."""
    numbers = workers.numbers
    workers.numbers = lambda rows, layer, kind: numbers(rows, layer, kind) + which
    without_locks(root)


def test_extractors_that_do_not_agree(many, trial, tmp_path):
    """Of each shard the first published stands, whole: its rows are all of one extractor, and its checksums are its own."""
    for number in range(many(2, 20)):
        with trial("extractors whose numbers differ"):
            root = tmp_path / f"cache {number}"
            children = [Child(other_numbers, root, which) for which in (0, 1, 2)]
            assert [child.wait() for child in children] == [0, 0, 0], [child.said for child in children]
            entry = FeatureStore(root).entry(spec())
            assert entry.complete_pairs() == PAIRS
            assert list(verify_entry(entry.path)) == []
            assert litter(root) == []
            for layer, kind in sorted(PAIRS):
                shift = entry.read([layer], [kind])[:, 0].astype(float) - workers.numbers(range(IMAGES), layer, kind)
                of_row = np.rint(shift).mean((1, 2))
                np.testing.assert_allclose(shift, np.broadcast_to(of_row[:, None, None], shift.shape), atol=2e-3)
                rows = 4 if kind == "all" else 8
                assert all(len(set(of_row[at : at + rows])) == 1 for at in range(0, IMAGES, rows))


def test_drafts_swept_under_an_extractor(many, trial, tmp_path):
    """As after a sleep of days: it says so, or finishes; the next one finishes."""
    random = np.random.default_rng(2)
    for number in range(many(3, 25)):
        with trial("drafts removed under an extractor"):
            root = tmp_path / f"cache {number}"
            child = Child(extract, root, pause=0.01)
            time.sleep(random.uniform(0.02, 0.2))
            with suppress(FileNotFoundError):  # a draft's folder went while it was looked through
                for draft in root.rglob(f"{disk.DRAFT}*"):
                    disk.remove(draft)
            status = child.wait()
            assert status in (0, UNUSABLE), child.said
            before = published(root / "v3" / spec().key)
            extract(root)
            assert before.items() <= published(whole(root).path).items()


def failing_flush(root: Path, which: int, format: str, told: Path | None = None) -> None:
    """The `which`th fsync of this process fails, as on a disk with a bad block."""
    fsync, count = os.fsync, [0]

    def fail(descriptor: int) -> None:
        count[0] += 1
        if count[0] == which:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    os.fsync = fail
    extract(root, images=12, format=format)
    if told:
        told.write_text(str(count[0]))


@pytest.mark.slow
@both
def test_each_flush_fails_once(format, many, trial, tmp_path):
    """What could not be flushed is not published; nothing is flushed a second time and then believed."""
    child = Child(failing_flush, tmp_path / "whole", 0, format, tmp_path / "count")
    assert child.wait() == 0, child.said
    want, count = files(whole(tmp_path / "whole", 12).path), int((tmp_path / "count").read_text())
    assert count > 20
    for which in range(1, count + 1, many(7, 1)):
        root = tmp_path / f"flush {which}"
        with trial(f"a flush that fails, {format}"):
            child = Child(failing_flush, root, which, format)
            assert child.wait() == UNUSABLE, child.said
            assert "fails (Input/output error)" in child.said
            before = published(root / "v3" / spec(12).key)
            child = Child(extract, root, images=12, format=format)
            assert child.wait() == 0, child.said
            assert before.items() <= published(whole(root, 12).path).items()
            assert files(whole(root, 12).path) == want


def without_links(root: Path, pause: float) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.link = refuse
    extract(root, pause=pause)


def test_a_file_system_without_links(many, trial, tmp_path):
    want = files(extract(tmp_path / "alone").path)
    for number in range(many(1, 10)):
        with trial("a file system without hard links"):
            root = tmp_path / f"cache {number}"
            children = [Child(without_links, root, 0.003) for _ in range(2)]
            assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
            assert files(whole(root).path) == want


def test_a_lease_whose_draft_was_removed_is_taken_all_the_same(monkeypatch, tmp_path):
    """Else who tidies the folder makes extractors wait for leases that nobody holds."""
    (tmp_path / "leases").mkdir()
    link = os.link

    def tidied(draft: str, *names: object, src_dir_fd: int, **more: object) -> None:
        os.unlink(draft, dir_fd=src_dir_fd)
        link(draft, *names, src_dir_fd=src_dir_fd, **more)

    monkeypatch.setattr(os, "link", tidied)
    mine, other = (leases.Leases(records.open_tree(tmp_path), "leases") for _ in range(2))
    assert mine.take(["shard"])
    assert not other.take(["shard"])
    assert (tmp_path / "leases" / "shard").read_text().startswith(disk.process_scope())


def only_new_files(root: Path, format: str) -> None:
    """Nothing is opened for writing, or cut short, that was there before: every file is wholly new."""

    def hook(event: str, args: tuple) -> None:
        if event == "os.truncate" and str(args[0]).startswith(str(root)):
            raise AssertionError(f"truncated: {args[0]}")
        if event != "open" or not isinstance(args[2], int) or not lies_below(root, event, args):
            return
        if args[2] & (os.O_WRONLY | os.O_RDWR) and not args[2] & os.O_EXCL:
            raise AssertionError(f"opened for writing: {args[0]}")

    sys.addaudithook(hook)
    extract(root, format=format)
    whole(root)


@both
def test_nothing_published_is_opened_for_writing(format, trial, tmp_path):
    """So that a map of it never loses its pages: a reader cannot be killed by a writer."""
    with trial("every file that is opened for writing looked at"):
        child = Child(only_new_files, tmp_path / "cache", format)
        assert child.wait() == 0, child.said


def test_nothing_is_left_of_a_flush_that_failed_for_good(trial, tmp_path):
    """Every flush fails from some point on: one clean error, and a cache that the next run completes."""

    def dying(root: Path) -> None:
        def never(_: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def dies() -> None:
            os.fsync = never

        at_change(30, root, dies)
        extract(root, images=12)

    with trial("a disk that dies in the middle"):
        child = Child(dying, tmp_path / "cache")
        assert child.wait() == UNUSABLE, child.said
        assert litter(tmp_path / "cache") == []
        extract(tmp_path / "cache", images=12)
        whole(tmp_path / "cache", 12)
