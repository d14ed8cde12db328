"""A disk that is full, at any write and before any change: nothing that was published is lost, and room mends it."""

import errno
import os
import resource

import numpy as np
import pytest
from test_kills import at_change, steps
from workers import UNUSABLE, Child, extract, files, published, spec, whole

both = pytest.mark.parametrize("format", ["zarr", "hdf5"])


def full(root, step: int, format: str) -> None:
    """Before this process's change number `step`, and before every later one that makes something, the disk is full."""

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
    now = published(root / "v2" / spec(12).key)
    assert before.items() <= now.items()
    again = Child(extract, root, images=12, format=format)
    assert again.wait() == 0, again.said
    assert now.items() <= published(whole(root, 12).path).items()


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
    before = published(root / "v2" / spec(12).key)
    with trial("a full disk behind published shards"):
        mended(root, Child(full, root, 3, "zarr"), before, "zarr")
