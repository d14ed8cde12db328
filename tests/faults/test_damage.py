"""Whatever is done to the bytes of a cache, a read gives what was written or an error, and `verify` finds it."""

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sealed import read_json, sealed
from workers import IMAGES, PAIRS, Child, extract, files, right, samples, spec, whole

from mlfusion.errors import CacheUnusable, MlfusionError
from mlfusion.store import Entry, FeatureStore
from mlfusion.store.verify import repair_entry, verify_entry

both = pytest.mark.parametrize("format", ["zarr", "hdf5"])
SHARDS = {"zarr": "0", "hdf5": "tokens.h5"}
# Each class of bytes, and where its files lie in an entry.
CLASSES = {
    "data and index": "tokens/*/c/*/{shard}",
    "commit records": "tokens/*/c/*/commit.json",
    "manifests": "tokens/*/manifest.json",
    "descriptions": "tokens/*/stream.json",
    "Zarr's descriptions": "tokens/**/zarr.json",
    "the entry's record": "entry.json",
    "ids, labels and digests": "[ild][dai]*.[jn][sp]*",
    "names and provenance": "[nr][au][mn]*s/*.json",
}


@pytest.fixture
def cache(tmp_path) -> Callable[[str], Entry]:
    def make(format: str) -> Entry:
        extract(tmp_path / "cache", format=format)
        return whole(tmp_path / "cache")

    return make


def of_class(entry: Entry, name: str, format: str) -> list[Path]:
    pattern = CLASSES[name].format(shard="0/0/0" if format == "zarr" else "tokens.h5")
    return sorted(path for path in entry.path.glob(pattern) if path.is_file())


def reads_right_or_refuses(root: Path) -> bool:
    """Read everything that the cache says it holds, by a fresh store; whether it refused."""
    try:
        entry = FeatureStore(root).entry(spec())
        if entry is None or entry.complete_pairs() != PAIRS:
            return True
        right(entry)
        assert entry.samples.content == samples().content
    except MlfusionError:
        return True
    return False


def flip(data: bytes, random: np.random.Generator) -> bytes:
    at = int(random.integers(len(data)))
    return data[:at] + bytes([data[at] ^ 1 << int(random.integers(8))]) + data[at + 1 :]


def burst(data: bytes, random: np.random.Generator) -> bytes:
    at, length = int(random.integers(len(data))), int(random.integers(1, 65))
    return data[:at] + bytes(byte ^ 0xA5 for byte in data[at : at + length]) + data[at + length :]


def zeros(data: bytes, random: np.random.Generator) -> bytes:
    at = int(random.integers(len(data)))
    return data[:at] + bytes(len(data[at : at + 256])) + data[at + 256 :]


def short(data: bytes, random: np.random.Generator) -> bytes:
    return data[: int(random.integers(len(data)))]


def long(data: bytes, random: np.random.Generator) -> bytes:
    return data + random.bytes(int(random.integers(1, 99)))


@both
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_bytes(name, format, cache, many, trial, tmp_path):
    entry, random = cache(format), np.random.default_rng(7)
    every = of_class(entry, name, format)
    if name == "Zarr's descriptions" and format == "hdf5":
        assert len(every) == 1  # of the group; each HDF5 file describes itself
    assert every
    refused = 0
    for number in range(many(10, 150)):
        path = every[int(random.integers(len(every)))]
        sound = path.read_bytes()
        harm = (flip, flip, flip, burst, zeros, short, long)[number % 7]
        bad = harm(sound, random)
        if bad == sound:  # zeros over zeros
            continue
        with trial(f"bytes flipped, overwritten, zeroed, cut or added: {name}"):
            path.write_bytes(bad)
            assert list(verify_entry(entry.path)), (harm.__name__, path)
            refused += reads_right_or_refuses(tmp_path / "cache")
            path.write_bytes(sound)
    if name in ("data and index", "manifests", "descriptions", "the entry's record", "ids, labels and digests"):
        assert refused  # the others no read depends on
    whole(tmp_path / "cache")


@pytest.mark.long
@both
def test_every_byte_of_one_shard(format, cache, many, trial, tmp_path):
    """Not a sample: each byte of the file in turn, or in the short form each 29th."""
    entry = cache(format)
    path = of_class(entry, "data and index", format)[0]
    sound = path.read_bytes()
    for at in range(0, len(sound), many(29, 1)):
        with trial(f"each byte of one shard, one after another, {format}"):
            path.write_bytes(sound[:at] + bytes([sound[at] ^ 16]) + sound[at + 1 :])
            assert list(verify_entry(entry.path)), at
            reads_right_or_refuses(tmp_path / "cache")
    path.write_bytes(sound)


@both
def test_what_is_taken_out_is_made_again_and_no_more(format, cache, many, trial, tmp_path):
    entry, random = cache(format), np.random.default_rng(3)
    want, passes = files(entry.path), tmp_path / "passes"
    for _ in range(many(6, 60)):
        path = of_class(entry, "data and index", format)[int(random.integers(17))]
        with trial(f"a damaged shard repaired and extracted again, {format}"):
            path.write_bytes(burst(path.read_bytes(), random))
            assert repair_entry(tmp_path / "cache", entry.path, list(verify_entry(entry.path)))
            passes.unlink(missing_ok=True)
            child = Child(extract, tmp_path / "cache", format=format, passes=passes)
            assert child.wait() == 0, child.said
            shard_rows = 4 if "all.L3" in str(path) else 8
            lines = [line.split() for line in passes.read_text().splitlines()]
            assert sum(int(last) - int(first) + 1 for _, first, last in lines) <= shard_rows
            assert files(whole(tmp_path / "cache").path) == want


@both
def test_shards_that_are_sound_but_not_these(format, cache, many, trial, tmp_path):
    """Two shards exchanged with their records, or without; or chunks of one shard exchanged among themselves."""
    entry, random = cache(format), np.random.default_rng(5)
    folder = entry.path / "tokens" / "cls.ap.L1-3" / "c"
    file = "0/0/0" if format == "zarr" else "tokens.h5"
    for number in range(many(8, 80)):
        a, b = (folder / str(shard) for shard in random.choice(5, 2, replace=False))
        with trial("sound shards or chunks exchanged"):
            if number % 3 == 0:
                pairs = [(a, b)]
            elif number % 3 == 1:
                pairs = [(a / file, b / file)]
            else:
                pairs = []
            for one, other in pairs:
                exchange(one, other)
            sound = (a / file).read_bytes()
            if not pairs:
                offsets = entry.record(entry.streams()[1], int(a.name)).table("offsets").reshape(-1).astype(int)
                one, other = random.choice(len(offsets), 2, replace=False)
                data = bytearray(sound)
                length = 4 * 4 * 2 + (4 if format == "zarr" else 0)  # a chunk and, in Zarr, its checksum
                x, y = (slice(at, at + length) for at in offsets[[one, other]])
                data[x], data[y] = data[y], data[x]
                assert bytes(data) != sound
                (a / file).write_bytes(data)
            assert list(verify_entry(entry.path))
            assert reads_right_or_refuses(tmp_path / "cache")
            if not pairs:
                (a / file).write_bytes(sound)
            for one, other in pairs:
                exchange(one, other)
    whole(tmp_path / "cache")


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


HOSTILE = [0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 33, 2**64 - 1]


def test_hostile_manifests(cache, many, trial, tmp_path):
    """With a digest that fits: offsets beyond the file, negative, overlapping; sizes and shapes that lie; paths that climb."""
    entry, random = cache("zarr"), np.random.default_rng(9)
    stream = next(one for one in entry.streams() if one.name == "cls.ap.L1-3")
    path = entry.folder(stream) / "manifest.json"
    sound = read_json(path)

    def offsets(value: int) -> dict:
        table = np.frombuffer(base64.b64decode(sound["offsets"]), "<u8").copy()
        other = np.flatnonzero(table != value)  # the first chunk of a shard does begin at 0
        table.reshape(-1)[random.choice(other)] = value
        return {**sound, "offsets": base64.b64encode(table.tobytes()).decode()}

    bodies = [offsets(value) for value in HOSTILE]
    bodies += [offsets(int(random.integers(0, 2**63))) for _ in range(many(5, 200))]
    bodies += [
        {**sound, "bytes": [2**62, *sound["bytes"][1:]]},
        {**sound, "bytes": sound["bytes"][:-1]},
        {**sound, "chunks": [1, 1, 1]},
        {**sound, "chunks": [-1, 3, 2]},
        {**sound, "chunks": [10**12, 10**6, 2]},
        {**sound, "offsets": "AAAA"},
        {**sound, "crc32c": ""},
        {**sound, "xxh3_64": ""},
        {**sound, "xxh3_64": sound["offsets"]},
        {**sound, "skipped": {str(row): "x" for row in range(-5, 99)}},
        {**sound, "skipped": {"../../etc": "x"}},
        {**sound, "stream": {**sound["stream"], "layers": [1, 2, 2**40]}},
        {**sound, "stream": {**sound["stream"], "format": "../../../x"}},
        {**sound, "stream": {**sound["stream"], "width": 2**40}},
        {key: value for key, value in sound.items() if key != "offsets"},
        {**sound, "more": 1},
        {**sound, "bytes": [str(size) for size in sound["bytes"]]},
    ]
    for body in bodies:
        with trial("manifests made to harm, with a digest that fits"):
            path.write_text(sealed(body))
            assert list(verify_entry(entry.path)), body
            assert reads_right_or_refuses(tmp_path / "cache"), body
    path.write_text(sealed(sound))
    whole(tmp_path / "cache")


@pytest.mark.parametrize(
    "change", [{"layers": [1, 2, 2**40]}, {"format": "../x"}, {"width": 2**40}, {"shard_rows": 0}, {"kinds": 3}]
)
def test_hostile_descriptions(change, cache, trial, tmp_path):
    entry = cache("zarr")
    path = entry.path / "tokens" / "cls.ap.L1-3" / "stream.json"
    with trial("descriptions of streams made to harm"):
        path.write_text(sealed({**read_json(path), **change}))
        assert list(verify_entry(entry.path))
        assert reads_right_or_refuses(tmp_path / "cache")


def test_links_instead_of_shards(cache, trial, tmp_path):
    """A shard that is a link to a sound one of other rows, to itself, or to a device."""
    entry = cache("zarr")
    shard = entry.path / "tokens" / "cls.ap.L1-3" / "c" / "0" / "0" / "0" / "0"
    kept = shard.read_bytes()
    for target in (entry.path / "tokens" / "cls.ap.L1-3" / "c" / "1" / "0" / "0" / "0", shard, Path("/dev/null")):
        with trial("links in place of shards"):
            shard.unlink()
            os.symlink(target, shard)
            assert list(verify_entry(entry.path))
            assert reads_right_or_refuses(tmp_path / "cache")
    shard.unlink()
    shard.write_bytes(kept)
    whole(tmp_path / "cache")


@pytest.mark.slow
@both
def test_a_part_that_is_missing(format, cache, many, trial, tmp_path):
    """Any one file taken away: the read refuses, and extraction, if need be after a repair, makes the cache whole."""
    cache(format)
    sound, root = tmp_path / "sound", tmp_path / "cache"
    root.rename(sound)
    folder = Path("v3") / spec().key
    for name in sorted(files(sound / folder))[:: many(4, 1)]:
        if name.startswith("names"):
            continue
        with trial(f"any one file removed, {format}"):
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(sound, root)
            (root / folder / name).unlink()
            reads_right_or_refuses(root)
            if found := list(verify_entry(root / folder)):
                repair_entry(root, root / folder, found)
            child = Child(extract, root, format=format)
            assert child.wait() == 0, (name, child.said)
            assert files(whole(root).path) == files(sound / folder), name


def test_a_format_from_the_future(cache, trial, tmp_path):
    """Refused at the door, by its marker or by its entry, for reading and for extracting; nothing is changed."""
    entry = cache("zarr")
    for path in (tmp_path / "cache" / "mlfusion-cache.json", entry.path / "entry.json"):
        sound = path.read_text()
        path.write_text(sealed({**read_json(path), "format": 4}))
        before = files(tmp_path / "cache")
        with trial("a format version from the future"):
            with pytest.raises(CacheUnusable, match=r"format 4.*update mlfusion"):
                _ = FeatureStore(tmp_path / "cache").entry(spec())
            with pytest.raises(CacheUnusable, match=r"format 4.*update mlfusion"):
                extract(tmp_path / "cache")
            assert files(tmp_path / "cache") == before
        path.write_text(sound)
    assert len(whole(tmp_path / "cache").samples) == IMAGES
    with trial("a format version from the future"):  # whatever else that format may hold
        (tmp_path / "cache" / "mlfusion-cache.json").write_text(json.dumps({"format": 4, "sealed": "otherwise"}))
        with pytest.raises(CacheUnusable):
            FeatureStore(tmp_path / "cache")
