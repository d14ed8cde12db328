"""Several at once: extractors on one entry, one that sleeps longer than its lease, readers under a prune, clocks that lie."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from workers import IMAGES, PAIRS, Child, extract, files, litter, numbers, published, right, spec, whole

from mlfusion.store import FeatureStore, feature_store, leases
from mlfusion.store.feature_store import lease_name
from mlfusion.store.housekeeping import remove_entry
from mlfusion.system import disk


def computed_rows(passes) -> list[int]:
    """Every row as often as it went through the model."""
    lines = passes.read_text().splitlines()
    return [row for _, first, last in map(str.split, lines) for row in range(int(first), int(last) + 1)]


@pytest.mark.parametrize("workers", [2, 8])
def test_many_extractors_of_one_entry(workers, many, trial, tmp_path):
    extract(tmp_path / "alone")
    want = files(whole(tmp_path / "alone").path)
    for number in range(many(2, 25)):
        with trial(f"{workers} extractors at once"):
            root, passes = tmp_path / f"cache {number}", tmp_path / f"passes {number}"
            children = [Child(extract, root, passes=passes, pause=0.005) for _ in range(workers)]
            assert [child.wait() for child in children] == [0] * workers, [child.said for child in children]
            assert files(whole(root).path) == want
            assert sorted(computed_rows(passes)) == list(range(IMAGES))  # no image went through the model twice


@pytest.mark.slow
def test_one_sleeps_longer_than_its_lease(many, trial, tmp_path, monkeypatch):
    """The other takes the work over, the sleeper wakes, and neither harms the other: the first to publish wins."""
    monkeypatch.setattr(leases, "TERM", 0.6)
    monkeypatch.setattr(feature_store, "WAIT", 0.1)
    random = np.random.default_rng(3)
    for number in range(many(3, 40)):
        with trial("an extractor stopped for longer than its lease"):
            root = tmp_path / f"cache {number}"
            sleeper = Child(extract, root, pause=0.02)
            time.sleep(random.uniform(0.02, 0.3))
            sleeper.send(signal.SIGSTOP)
            other = Child(extract, root, pause=0.001)
            assert other.wait() == 0, other.said
            right(FeatureStore(root).entry(spec()))
            before = published(root / "v3" / spec().key)
            sleeper.send(signal.SIGCONT)
            assert sleeper.wait() == 0, sleeper.said
            assert before == published(whole(root).path)


def read_on(root, told) -> None:
    """Read shuffled passes, and say so, until killed; every number is looked at."""
    entry = FeatureStore(root).entry(spec())
    with entry.open([3], ["all"]) as tokens:
        told.touch()
        for turn in range(10**9):
            for rows, batch in tokens.batches(7, seed=turn):
                assert np.array_equal(batch[:, 0], numbers(rows, 3, "all").astype(np.float16))


def test_prune_against_a_reader(many, trial, tmp_path):
    for number in range(many(2, 25)):
        with trial("a prune under a reader"):
            root, told = tmp_path / f"cache {number}", tmp_path / f"told {number}"
            folder = extract(root).path
            child = Child(read_on, root, told)
            while not told.exists():
                time.sleep(0.01)
            for _ in range(5):
                assert "read" in remove_entry(root, folder)  # why it stays
                time.sleep(0.02)
            right(FeatureStore(root).entry(spec()))
            child.send(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, child.said
            assert remove_entry(root, folder) == ""  # of a dead reader nothing holds it
            assert FeatureStore(root).entry(spec()) is None
            extract(root)
            whole(root)


def test_prune_that_takes_the_folder_away_all_the_same(trial, tmp_path):
    """A cache on another host's advice: who has the entry open reads on to the end of what it began."""
    entry = extract(tmp_path / "cache")
    with trial("an entry removed by force under a reader"), entry.open([3], ["all"]) as tokens:
        first = tokens.read()
        os.rename(entry.path, tmp_path / "elsewhere")
        np.testing.assert_array_equal(tokens.read(), first)


@pytest.mark.parametrize("years", [-30, 30])
def test_clocks_that_lie(years, trial, tmp_path, monkeypatch):
    """Times of files by a clock that is decades off: nothing living is taken over, nothing whole is made again."""
    monkeypatch.setattr(leases, "TERM", 0.5)
    monkeypatch.setattr(feature_store, "WAIT", 0.1)
    root, then = tmp_path / "cache", time.time() + years * 365 * 86400
    with trial("clock skew"):
        child = Child(extract, root, pause=0.03)
        deadline = time.monotonic() + 20
        while not list(root.glob("v*/*/leases/*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        for path in [*root.rglob("*")]:
            if path.exists():
                os.utime(path, (then, then))
        other = Child(extract, root)
        assert (child.wait(), other.wait()) == (0, 0), (child.said, other.said)
        folder = whole(root).path
        for path in [*folder.rglob("*")]:
            os.utime(path, (then, then))
        before = published(folder)
        extract(root)
        assert published(whole(root).path) == before


@pytest.mark.slow
def test_a_lease_of_a_host_that_never_comes_back(trial, tmp_path, monkeypatch):
    """It is waited for as long as a term on our own clock, whatever the time of the file says, and then taken over."""
    monkeypatch.setattr(leases, "TERM", 0.5)
    monkeypatch.setattr(feature_store, "WAIT", 0.1)
    root = tmp_path / "cache"
    Child(extract, root, pause=0.05).kill_after(0.3)
    [entry] = FeatureStore(root).entries()
    for stream in entry.streams():
        for shard in entry.missing_shards(stream):
            lease = entry.path / "leases" / lease_name(stream, shard)
            lease.write_text("elsewhere.0~17~0123456789")
            os.utime(lease, (4e9, 4e9))  # in the year 2096
    with trial("a lease of a host that never comes back"):
        began = time.monotonic()
        extract(root)
        assert time.monotonic() - began >= 0.5
        whole(root)


def test_a_process_number_that_is_another_process_now(trial, tmp_path):
    """As in a container that begins again: what the dead left is theirs, though somebody lives who bears their number."""
    root = tmp_path / "cache"
    folder = extract(root).path
    host, process, _ = disk.claim().split("~")
    number, begun = process.split(".")
    for dead in (f"{host}~{number}.{int(begun) - 1}~01234567", f"{host}~1.{10**15}~01234567"):
        with trial("a process number that is another process's now"):
            assert disk.alive(dead) is False
            (folder / "leases" / "all.L3~0").write_text(dead)
            (folder / "pins" / dead).touch()
            (folder / f"{disk.DRAFT}{dead}").mkdir()
            extract(root)
            whole(root)
    (folder / "pins" / dead).touch()
    assert remove_entry(root, folder) == ""
    assert disk.alive(disk.claim())
    assert disk.alive(f"{host}~{number}~01234567")  # of a system that does not say when a process began


def test_threads_and_forks_share_one_reader(many, trial, tmp_path):
    entry = extract(tmp_path / "cache")
    wrong: list[str] = []

    def look(tokens, seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(many(20, 400)):
            rows = random.integers(0, IMAGES, 9)
            if not np.array_equal(tokens[rows][:, 0], numbers(rows, 3, "all").astype(np.float16)):
                wrong.append(f"{seed}")

    def fail_if_wrong(tokens, seed: int) -> None:
        look(tokens, seed)
        assert not wrong

    with entry.open([3], ["all"], check="always") as tokens, trial("threads and forks of one reader"):
        threads = [threading.Thread(target=look, args=(tokens, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        children = [Child(fail_if_wrong, tokens, seed) for seed in range(3)]
        assert [child.wait() for child in children] == [0, 0, 0], [child.said for child in children]
        look(tokens, 99)  # the parent's reader outlives its children's
        assert not wrong
    assert litter(tmp_path / "cache") == []
    assert {layer for layer, _ in PAIRS} == {1, 2, 3}
    assert disk.alive(disk.claim())
