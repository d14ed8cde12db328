"""A real file system that is full, of bytes or of files: it refuses where it wants to, and later gives way."""

import os
from pathlib import Path

import numpy as np
import pytest
from workers import Child, extract, files, litter, mount, published, spec, whole

from mlfusion.errors import CacheUnusable
from mlfusion.store import FeatureStore
from mlfusion.store.verify import verify_entry

both = pytest.mark.parametrize("format", ["zarr", "hdf5"])
PAGE = os.sysconf("SC_PAGESIZE")
ROOM = "size=64m,nr_inodes=9999"
FULL = r"no space left for the cache.*: (\d+\.\d{3} MB are needed.*, )?\d+\.\d{3} MB are free in at most \d[\d,]* files"


@pytest.fixture(scope="module", autouse=True)
def mounting(tmp_path_factory) -> None:
    child = Child(mount, tmp_path_factory.mktemp("any") / "place", ROOM)
    if child.wait() != 0:
        pytest.skip("needs to mount a file system in a namespace of its own (as root, or where users may)")


def used(place: Path, format: str, told: Path) -> None:
    """Pages and files that an extraction takes of an empty file system, its drafts counted."""
    mount(place, ROOM)
    extract(place / "cache", images=12, format=format)
    about = os.statvfs(place)
    told.write_text(f"{(about.f_blocks - about.f_bfree) * about.f_bsize // PAGE} {about.f_files - about.f_ffree}")


def starve(place: Path, options: str, format: str, want: dict[str, bytes]) -> None:
    """Extract where there is too little; look at what is there; extract again where there is enough."""
    mount(place, options)
    root = place / "cache"
    with pytest.raises(CacheUnusable, match=FULL):
        extract(root, images=12, format=format)
    before = {}
    if FeatureStore(root).entry(spec(12)) is not None:
        before = published(root / "v3" / spec(12).key)
        assert list(verify_entry(root / "v3" / spec(12).key)) == []  # what was published is valid
        assert litter(root) == []
    mount(place, ROOM, again=True)
    extract(root, images=12, format=format)
    folder = whole(root, 12).path
    assert before.items() <= published(folder).items()
    assert files(folder) == want


@pytest.mark.slow
@both
def test_a_file_system_that_is_full(format, many, trial, tmp_path):
    """With room for so many pages, or so many files, and no more: up to what an undisturbed extraction takes."""
    want = files(extract(tmp_path / "alone", images=12, format=format).path)
    child = Child(used, tmp_path / "enough", format, tmp_path / "told")
    assert child.wait() == 0, child.said
    pages, inodes = map(int, (tmp_path / "told").read_text().split())
    for what, most, options in (
        ("bytes", pages, f"size={{}}k,{ROOM.split(',')[1]}"),
        ("files", inodes, "size=64m,nr_inodes={}"),
    ):
        least = 3
        for count in np.unique(np.linspace(least, most - 1, min(many(6, 999), most - least)).astype(int)).tolist():
            with trial(f"a file system full of {what}, {format}"):
                limit = count * PAGE // 1024 if what == "bytes" else count
                child = Child(starve, tmp_path / f"{what} {count}", options.format(limit), format, want)
                assert child.wait() == 0, (count, child.said)
