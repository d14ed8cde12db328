"""Too little memory, too few maps, very many shards: the right numbers, or an error that says what there is too little of."""

import mmap
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiers import LONG
from workers import MODEL, NAMES, Child, extract, samples

from mlfusion.errors import MlfusionError
from mlfusion.specs.identity import DataSpec, FeatureSpec
from mlfusion.store import Entry, FeatureStore, reader, stream, streams_for
from mlfusion.store.verify import verify_entry

WIDE, ROWS, SHARD = 4096, 256, 64  # numbers of a token, images, images of a shard: 4 MB in shards of 1 MB
HANGS = 60  # seconds that no trial takes


def wide(rows) -> np.ndarray:
    """[rows, 2 layers, 1, WIDE] float16."""
    at = np.asarray(rows)[:, None, None, None] + np.arange(2)[:, None, None] * 1000
    return (at + np.arange(WIDE) % 7 / 8).astype(np.float16)


def filled(root: Path, images: int, width: int, values: Callable[[range], np.ndarray]) -> Entry:
    """An entry of two layers of `ap`, written without a model."""
    rows = samples(images)
    data = DataSpec(content=rows.content, split="train", images=images, classes=rows.classes, name="numbers")
    entry = FeatureStore(root).create(FeatureSpec(model=MODEL, data=data, dtype="float16"), rows, NAMES)
    [cut] = streams_for({(layer, "ap"): (1, width) for layer in (1, 2)}, images=images, dtype="float16", format="zarr")
    entry.begin([cut])
    for shard in range(cut.shards):
        with entry.draft(cut, shard) as draft:
            draft.append(values(cut.rows(shard)))
            draft.publish()
    entry.seal()
    return entry


@pytest.fixture
def entry(tmp_path, monkeypatch) -> Entry:
    """4 MB in shards of 1 MB, chunks of 128 kB."""
    monkeypatch.setattr(stream, "SHARD_ROWS", (SHARD, SHARD))
    monkeypatch.setattr(stream, "SHARD_BYTES", 1 << 24)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1 << 17)
    return filled(tmp_path / "cache", ROWS, WIDE, wide)


def read_whole(entry: Entry) -> None:
    got = entry.read([1, 2], ["ap"])
    assert all(np.array_equal(got[[row]], wide([row])) for row in range(ROWS))


def read_layer(entry: Entry) -> None:
    got = entry.read([2], ["ap"])
    assert all(np.array_equal(got[[row]], wide([row])[:, 1:]) for row in range(ROWS))


def read_shuffled(entry: Entry) -> None:
    with entry.open([1, 2], ["ap"]) as tokens:
        for rows, batch in tokens.batches(16, seed=3):
            assert all(np.array_equal(batch[[at]], wide([row])) for at, row in enumerate(rows))


def read_some(entry: Entry) -> None:
    with entry.open([1, 2], ["ap"]) as tokens:
        for first in range(3):
            rows = np.arange(first, ROWS, 31)
            assert np.array_equal(tokens[rows], wide(rows))


def extracting(entry: Entry) -> None:
    extract(entry.path.parent / "another", images=20)


ACTS = {
    "everything": read_whole,
    "one layer": read_layer,
    "a shuffled pass": read_shuffled,
    "some images": read_some,
    "an extraction": extracting,
}


def short_of(limit: Callable[[], None], act: Callable[[Entry], None], entry: Entry, told: int) -> None:
    """Do it where there is too little; says 'right', or which error it was, for want of what."""
    limit()
    try:
        act(entry)
    except AssertionError:
        os.write(told, b"wrong")
        raise
    except (MemoryError, MlfusionError) as err:
        os.write(told, f"{type(err).__name__}: {err}"[:2000].encode(errors="replace"))
    except RuntimeError as err:
        if "can't start new thread" not in str(err):
            raise
        os.write(told, b"no thread")
    else:
        os.write(told, b"right")


def outcome(limit: Callable[[], None], act: Callable[[Entry], None], entry: Entry) -> str:
    """'right', or an error in words; anything else, a crash or a wait without end fails."""
    ours, theirs = os.pipe()
    child = Child(short_of, limit, act, entry, theirs)
    os.close(theirs)
    end = time.monotonic() + HANGS
    while not child.ended() and time.monotonic() < end:
        time.sleep(0.002)
    if not child.ended():
        child.send(signal.SIGKILL)
    status = child.wait()
    with open(ours, "rb") as pipe:
        said = pipe.read().decode()
    assert (status, bool(said)) == (0, True), (status, said, child.said)
    return said


def address_space(more: int) -> Callable[[], None]:
    def limit() -> None:
        [now] = re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
        resource.setrlimit(resource.RLIMIT_AS, (int(now) * 1024 + more,) * 2)

    return limit


@pytest.mark.parametrize("act", ACTS)
def test_little_address_space(act, many, entry, trial):
    """From next to nothing beyond what the process has to more than is asked for."""
    said = []
    for more in np.unique(np.geomspace(1 << 19, 1 << 26, many(5, 60)).astype(int) // 4096 * 4096).tolist():
        with trial(f"too little address space for {act}"):
            said.append(outcome(address_space(more), ACTS[act], entry))
    assert said[-1] == "right"
    if act == "some images":
        assert any(one.startswith("MemoryError: there is no room in the process's memory to map ") for one in said)


def maps(left: int) -> Callable[[], None]:
    """So many maps may still be made: the others are taken."""

    def limit() -> None:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        if most > 1 << 17:
            raise MlfusionError(f"{most:,} maps are too many to make")
        taken = []
        try:
            while True:  # neighbours of like protection would be one map
                taken.append(
                    mmap.mmap(-1, 4096, prot=mmap.PROT_READ if len(taken) % 2 else mmap.PROT_READ | mmap.PROT_WRITE)
                )
        except OSError:
            del taken[:left]
        limit.taken = taken

    return limit


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS if LONG else ["some images"])
def test_few_maps(act, many, entry, trial):
    """The kernel's own limit, vm.max_map_count, reached by others in the process."""
    said = []
    for left in np.unique(np.geomspace(40, 4000, many(2, 12)).astype(int)).tolist():
        with trial(f"too few maps for {act}"):
            said.append(outcome(maps(left), ACTS[act], entry))
    assert said[-1] == "right" or "too many to make" in said[-1]


def mapped_shards() -> int:
    return sum("/c/" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_maps_are_bounded(many, trial, tmp_path):
    """However many shards an entry has, no more than OPEN_SHARDS of them are mapped."""
    most = many(16, reader.OPEN_SHARDS)
    images = most * 3 * 8  # a shard holds eight
    entry = filled(tmp_path / "cache", images, 4, lambda rows: wide(rows)[..., :4])
    with trial("more shards than maps"), entry.open([1, 2], ["ap"]) as tokens:
        tokens._max_open = most  # whatever this process's limit of descriptors
        for row in range(0, images, 8):
            np.testing.assert_array_equal(tokens[[row]], wide([row])[..., :4])
            assert mapped_shards() <= most
        assert mapped_shards() == most
    del tokens
    assert mapped_shards() == 0


@pytest.mark.slow
def test_very_many_shards(many, trial, figures, tmp_path, monkeypatch):
    """A hundred thousand shards of one image: listed, joined, opened, read and verified, each in seconds."""
    monkeypatch.setattr(stream, "SHARD_ROWS", (1, 1))
    images, seconds = many(500, 100_000), {}

    def values(rows) -> np.ndarray:
        return wide(np.asarray(rows) % 2000)[..., :4]

    def timed(what: str, act: Callable[[], object]) -> object:
        began = time.monotonic()
        done = act()
        seconds[what] = time.monotonic() - began
        return done

    def opened() -> None:
        store = FeatureStore(tmp_path / "cache")
        [found] = store.entries()
        with found.open([1, 2], ["ap"]) as tokens:
            assert len(tokens) == images

    with trial("very many shards in one entry"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)  # of nearly a million files, no test of the disk
            entry = filled(tmp_path / "cache", images, 4, values)
        [cut] = entry.streams()
        assert cut.shards == images
        assert timed("what is missing is listed", lambda: entry.missing_shards(cut)) == []
        (entry.folder(cut) / "manifest.json").unlink()
        timed("records are joined into a manifest", entry.seal)
        timed("the cache is opened, and the entry in it", opened)
        got = timed("everything is read", lambda: entry.read([1, 2], ["ap"]))
        np.testing.assert_array_equal(got, values(range(images)))
        rows = np.random.default_rng(0).integers(0, images, 300)
        with entry.open([2], ["ap"]) as tokens:
            np.testing.assert_array_equal(
                timed("300 random images are read", lambda: tokens[rows]), values(rows)[:, 1:]
            )
        assert timed("every byte is verified", lambda: list(verify_entry(entry.path))) == []
        shard = entry.folder(cut) / "c" / str(images // 2)
        shutil.rmtree(shard)
        assert [damage.path for damage in verify_entry(entry.path)] == [shard]
        assert entry.missing_shards(cut) == [images // 2]
    figures["shards"] = {"shards": images, "seconds": seconds}
    shutil.rmtree(tmp_path / "cache")
