"""Caches in odd places: names with spaces and other scripts, few file descriptors, folders that cannot be written."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from workers import Child, extract, numbers, right, spec, whole

from mlfusion.errors import CacheUnusable
from mlfusion.store import FeatureStore

NAMES = ["with spaces", "Überraschung ½", "特徴量", "a'b\"c$d;e", "new\nline", "-rf", "%41 & #1", "é" * 100]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_any_kind(name, trial, tmp_path):
    with trial("names with spaces and of other scripts"):
        root = tmp_path / name / name
        extract(root)
        right(whole(root))
        said = subprocess.run(
            [sys.executable, "-m", "mlfusion", "cache", "verify", "--cache", str(root)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path.cwd(),
        )
        assert said.returncode == 0, said.stderr


def read_with_few(root: Path, images: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    entry = FeatureStore(root).entry(spec(images))
    with entry.open([3], ["all"]) as tokens:
        for turn in range(2):
            for rows, batch in tokens.batches(50, seed=turn):
                assert (batch[:, 0] == numbers(rows, 3, "all").astype("float16")).all()
            some = list(range(turn, images, 3))  # from every shard
            assert (tokens[some][:, 0] == numbers(some, 3, "all").astype("float16")).all()


@pytest.mark.slow
def test_more_shards_than_descriptors(many, trial, tmp_path):
    """Hundreds of shards, sixty-four descriptors."""
    images = many(400, 2000)
    extract(tmp_path / "cache", images=images)
    with trial("more shards than file descriptors"):
        child = Child(read_with_few, tmp_path / "cache", images)
        assert child.wait() == 0, child.said


def as_nobody(work, *args: object) -> None:
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    work(*args)


def read_only(root: Path) -> None:
    right(FeatureStore(root).entry(spec()))
    extract(root)  # nothing is missing, so nothing need be written
    with pytest.raises(CacheUnusable, match="cannot be written"):
        extract(root, images=12)


def test_a_cache_that_cannot_be_written(trial, tmp_path):
    root = tmp_path / "cache"
    extract(root)
    above = tmp_path
    while above != above.parent and above.stat().st_uid == os.geteuid():  # so that nobody else may pass
        above.chmod(above.stat().st_mode | 0o055)
        above = above.parent
    for path in [root, *root.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222 | 0o444)
    with trial("a cache that can only be read"):
        child = Child(as_nobody, read_only, root)
        assert child.wait() == 0, child.said
    for path in [root, *root.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)
    whole(root)
