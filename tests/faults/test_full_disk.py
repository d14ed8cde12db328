"""A disk that is full, at any write and before any change: nothing that was published is lost, and room mends it."""

import errno
import os
import resource
import time

import numpy as np
import pytest
from test_kills import at_change, steps
from workers import UNUSABLE, Child, extract, files, published, spec, whole

from mlfusion.store import ShardDraft

both = pytest.mark.parametrize("format", ["zarr", "hdf5"])


def full(root, step: int, format: str) -> None:
    """Before this process's change number `step` the disk is full, and then it is not."""

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_change(step, root, refuse)
    extract(root, images=12, format=format)


def small_files(root, limit: int, format: str) -> None:
    """No file grows beyond `limit` bytes: a write stops in the middle, as on a disk that fills up."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    extract(root, images=12, format=format)


def mended(root, child: Child, before: dict, format: str) -> None:
    """It ended with a word about space, or was not in need of it; with room again, the rest is made and nothing twice."""
    status = child.wait()
    assert status in (0, UNUSABLE), child.said
    assert status == 0 or "no space left for the cache" in child.said
    now = published(root / "v3" / spec(12).key)
    assert before.items() <= now.items()
    again = Child(extract, root, images=12, format=format)
    assert again.wait() == 0, again.said
    assert now.items() <= published(whole(root, 12).path).items()


@pytest.mark.slow
@both
def test_full_before_any_change(format, many, trial, tmp_path):
    child = Child(steps, tmp_path / "whole", format, tmp_path / "steps")
    assert child.wait() == 0, child.said
    count = int((tmp_path / "steps").read_text())
    picked = np.unique(np.linspace(1, count, min(many(12, count), count)).astype(int))
    for step in picked.tolist():
        with trial(f"a full disk before a change, {format}"):
            root = tmp_path / f"full {step}"
            mended(root, Child(full, root, step, format), {}, format)


@pytest.mark.slow
@both
def test_full_in_the_middle_of_a_write(format, many, trial, tmp_path):
    extract(tmp_path / "whole", images=12, format=format)
    largest = max(len(content) for content in files(tmp_path / "whole").values())
    for limit in np.unique(np.linspace(0, largest - 1, many(8, 120)).astype(int)).tolist():
        with trial(f"a write that ends in the middle, {format}"):
            root = tmp_path / f"limit {limit}"
            mended(root, Child(small_files, root, limit, format), {}, format)


def test_full_after_some_shards(trial, tmp_path):
    """What was published before the disk filled up is neither lost nor written again."""
    root = tmp_path / "cache"
    child = Child(extract, root, images=12, pause=0.02)
    child.kill_after(0.25)
    before = published(root / "v3" / spec(12).key)
    with trial("a full disk behind published shards"):
        mended(root, Child(full, root, 3, "zarr"), before, "zarr")


def full_for_a_moment(root, which: int, told) -> None:
    """The `which`th part of a batch finds no room for it, by when the batches behind it wait; there is room for those."""
    append, count = ShardDraft.append, [0]

    def fail(draft: ShardDraft, *args: object) -> None:
        count[0] += 1
        if count[0] == which:
            time.sleep(0.05)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(draft, *args)

    ShardDraft.append = fail
    try:
        extract(root, images=20)
    finally:
        told.write_text(str(count[0]))


@pytest.mark.slow
def test_full_for_a_moment(many, trial, tmp_path):
    """What waited behind the batch that failed is not put in its place: each shard has its own rows, or is not there."""
    want = files(extract(tmp_path / "alone", images=20).path)
    child = Child(full_for_a_moment, tmp_path / "undisturbed", 0, tmp_path / "count")
    assert child.wait() == 0, child.said
    parts = int((tmp_path / "count").read_text())
    assert parts == 10  # five batches, two streams
    for which in range(1, parts + 1):
        for turn in range(many(1, 20)):
            with trial("a full disk for one part of a batch, with others waiting"):
                root = tmp_path / f"{which} {turn}"
                child = Child(full_for_a_moment, root, which, tmp_path / "count")
                assert child.wait() == UNUSABLE, child.said
                found = {name: data for name, data in files(root / "v3" / spec(20).key).items() if "/c/" in name}
                assert found.items() <= want.items()
                extract(root, images=20)
                assert files(whole(root, 20).path) == want
