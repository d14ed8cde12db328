"""The cache gives back exactly what was put in, to us and to plain zarr and h5py, or refuses; it is never silently wrong."""

import base64
import errno
import os
import shutil
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sealed import read_json, sealed
from tiers import examples

from mlfusion.errors import BadData, CacheUnusable, NotCached
from mlfusion.specs.identity import DTYPES, DataSpec, FeatureSpec, ModelSpec
from mlfusion.store import Entry, FeatureStore, Names, Samples, stream, streams_for
from mlfusion.store.verify import verify_entry
from mlfusion.system import disk

MODEL = ModelSpec(
    weights="ab" * 32, revision=None, config="cd" * 8, preprocess="{}", name="m", family="vit", depth=3, width=4
)
NAMES = Names(model="m", model_source="somewhere/m", dataset="d", dataset_source="/somewhere/d")
PAIRS = frozenset((layer, kind) for layer in (1, 2, 3) for kind in ("cls", "ap"))
SHAPES = dict.fromkeys(PAIRS, (1, 4))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(stream, "SHARD_ROWS", (8, 8))
    monkeypatch.setattr(stream, "CHUNK_BYTES", 4 * 4 * 2)  # four images of one float16 token of width 4


def new_entry(root: Path, images: int = 19, dtype: str = "float16") -> Entry:
    samples = Samples(
        ids=tuple(f"train/α/{i} ½.png" for i in range(images)),
        labels=np.arange(images) % 3,
        digests=np.random.default_rng(0).integers(0, 256, (images, 16), np.uint8),
        classes=("x", "y", "z"),
    )
    data = DataSpec(content=samples.content, split="train", images=images, classes=samples.classes, name="d")
    return FeatureStore(root).create(FeatureSpec(model=MODEL, data=data, dtype=dtype), samples, NAMES)


def fill(entry: Entry, format: str, pairs=PAIRS, tokens=None, seed: int = 0, batch: int = 3) -> dict[str, np.ndarray]:
    """Write streams for `pairs` from random numbers, a batch at a time; stream name → what was written."""
    random = np.random.default_rng(seed)
    streams = streams_for(
        {(layer, kind): ((tokens or {"cls": 1, "ap": 1, "all": 5})[kind], 4) for layer, kind in pairs},
        images=entry.spec.data.images,
        dtype=entry.spec.dtype,
        format=format,
    )
    entry.begin(streams)
    written = {}
    for one in streams:
        values = random.normal(size=(*one.shape[:3], one.width)).astype(np.float32)
        written[one.name] = one.encoding.decode(one.encoding.encode(values))
        for shard in range(one.shards):
            rows = one.rows(shard)
            with entry.draft(one, shard) as draft:
                for start in range(rows.start, rows.stop, batch):
                    part = values[start : min(start + batch, rows.stop)]
                    draft.append(part)
                assert draft.publish()
    entry.seal()
    return written


def shard_files(entry: Entry, name: str) -> list[Path]:
    """The files that hold a stream's tokens, in order."""
    shards = sorted((entry.path / "tokens" / name / "c").iterdir(), key=lambda folder: int(folder.name))
    return [file for folder in shards for file in folder.rglob("*") if file.is_file() and file.name != "commit.json"]


both = pytest.mark.parametrize("format", ["zarr", "hdf5"])


@pytest.mark.slow
@both
@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    pairs=st.sets(st.tuples(st.integers(0, 3), st.sampled_from(["cls", "ap", "all"])), min_size=1),
    batch=st.integers(1, 9),
)
def test_what_is_written_is_what_is_read(format, tmp_path_factory, images, dtype, pairs, batch):
    entry = new_entry(tmp_path_factory.mktemp("cache"), images, dtype)
    written = fill(entry, format, pairs, batch=batch)
    assert entry.complete_pairs() == pairs
    for one in entry.streams():
        for layer, kind in one.pairs & pairs:
            li, ki = one.plane(layer, kind)
            want = written[one.name][:, li, ki * one.tokens : (ki + 1) * one.tokens]
            np.testing.assert_array_equal(entry.read([layer], [kind])[:, 0], want)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Callable[[str, int, str], Entry]:
    """Entries that are only read, each made once."""

    @cache
    def make(format: str, images: int, dtype: str) -> Entry:
        entry = new_entry(tmp_path_factory.mktemp("kept"), images, dtype)
        fill(entry, format, {*PAIRS, (3, "all")}, batch=images)
        return entry

    return make


@both
@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.sampled_from([1, 8, 33]),
    dtype=st.sampled_from(["float16", "int8"]),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    mixed=st.sampled_from([1, 200, 1 << 20]),
    small=st.sampled_from([0, 1 << 24]),
    data=st.data(),
)
def test_every_way_to_read_gives_the_same(format, kept, images, dtype, sizes, mixed, small, data):
    """Rows in any order and any number of times; passes in batches of any sizes, kept in hand until the pass is over."""
    entry = kept(format, images, dtype)
    with pytest.MonkeyPatch.context() as patch, entry.open([3, 1], ["ap", "cls"]) as reader:
        patch.setattr("mlfusion.store.reader.SHUFFLE_BYTES", mixed)
        patch.setattr("mlfusion.store.reader.SMALL_RESULT_BYTES", small)  # below which no threads are started
        whole = reader.read()
        rows = np.array(data.draw(st.lists(st.integers(-images, images - 1), max_size=60)), np.int64)
        twice = np.arange(images) // 2
        np.testing.assert_array_equal(reader[rows], whole[rows])
        np.testing.assert_array_equal(reader[twice], whole[twice])
        some = np.array(data.draw(st.lists(st.integers(0, images - 1), unique=True, min_size=1)))
        sizes = [*sizes, len(some) - sum(sizes)] if sum(sizes) < len(some) else len(some) // 3 or 1
        given = list(reader.batches(sizes, seed=images, rows=some))
        order = np.concatenate([rows for rows, _ in given])
        assert sorted(order) == sorted(some)
        np.testing.assert_array_equal(order, reader.order(images, some))
        for rows, batch in given:
            np.testing.assert_array_equal(batch, whole[rows])
        if isinstance(sizes, list):
            assert [len(batch) for _, batch in given] == sizes


@both
def test_layers_and_kinds_come_in_the_order_asked_for(format, tmp_path):
    entry = new_entry(tmp_path)
    [values] = fill(entry, format).values()
    np.testing.assert_array_equal(entry.read([3, 1], ["ap", "cls"]), values[:, [2, 0]][:, :, [1, 0]])


@both
def test_streams_of_different_extractions_read_as_one(format, tmp_path):
    entry = new_entry(tmp_path)
    [first] = fill(entry, format, {(1, "cls"), (1, "ap")}).values()
    [second] = fill(entry, format, {(2, "cls"), (2, "ap")}, seed=1).values()
    np.testing.assert_array_equal(entry.read([1, 2], ["cls", "ap"]), np.concatenate([first, second], 1))


def test_zarr_opens_without_us(tmp_path):
    entry = new_entry(tmp_path)
    written = fill(entry, "zarr", {*PAIRS, (3, "all")})
    group = zarr.open_group(entry.path / "tokens", mode="r")
    assert set(group.array_keys()) == set(written) == {"cls.ap.L1-3", "all.L3"}
    for name, values in written.items():
        np.testing.assert_array_equal(group[name][:], values)
        np.testing.assert_array_equal(group[name][2:11, -1], values[2:11, -1])
    assert group["cls.ap.L1-3"].attrs["kinds"] == ["cls", "ap"]
    np.testing.assert_array_equal(np.load(entry.path / "labels.npy", allow_pickle=False), entry.samples.labels)


def test_a_sound_shard_that_is_not_the_one_published_is_refused(tmp_path):
    """zarr rewrites every shard, with checksums that fit: only the manifest knows better."""
    entry = new_entry(tmp_path)
    [(name, values)] = fill(entry, "zarr").items()
    array = zarr.open_array(entry.path / "tokens" / name, mode="r+")
    array[:] = -values
    with pytest.raises(CacheUnusable, match=r"damaged.*cache verify --repair"):
        entry.read([1, 2, 3], ["cls", "ap"])


def test_memory_of_results_is_lent_again_once_nobody_holds_it(kept, monkeypatch):
    """What is in hand stays as it was, to its last view; what was let go of is written over."""
    monkeypatch.setattr("mlfusion.store.reader.SMALL_RESULT_BYTES", 1)
    monkeypatch.setattr("mlfusion.store.reader.BufferPool.idle", deque())
    with kept("zarr", 33, "float16").open([3, 1], ["ap", "cls"]) as reader:
        whole = reader.read().copy()
        first, second = reader[:16], reader[16:32]
        place, view = first.ctypes.data, second[3:]
        del first, second
        third, fourth = reader[8:24], reader[1:17]
        assert place in (third.ctypes.data, fourth.ctypes.data)
        for got, rows in ((view, slice(19, 32)), (third, slice(8, 24)), (fourth, slice(1, 17))):
            np.testing.assert_array_equal(got, whole[rows])


@both
@pytest.mark.parametrize("table", ["crc32c", "xxh3_64"])
def test_verify_compares_both_checksums(format, table, tmp_path):
    """Of a sound shard whose record, in itself sound, says otherwise of one chunk."""
    entry = new_entry(tmp_path)
    [name] = fill(entry, format)
    commit = entry.path / "tokens" / name / "c" / "0" / "commit.json"
    body = read_json(commit)
    sums = bytearray(base64.b64decode(body[table]))
    sums[-1] ^= 1
    commit.write_text(sealed({**body, table: base64.b64encode(sums).decode()}))
    assert any("wrong bytes: layers 3" in damage.why for damage in verify_entry(entry.path))


def test_hdf5_opens_without_us(tmp_path):
    entry = new_entry(tmp_path)
    [(name, values)] = fill(entry, "hdf5").items()
    files = shard_files(entry, name)
    np.testing.assert_array_equal(np.concatenate([h5py.File(file)["tokens"][:] for file in files]), values)


@both
def test_no_damaged_byte_is_ever_read_as_a_token(format, tmp_path):
    entry = new_entry(tmp_path)
    [(name, values)] = fill(entry, format).items()
    files = shard_files(entry, name)
    random, refused = np.random.default_rng(5), 0
    for _ in range(150):
        file = files[random.integers(len(files))]
        sound = file.read_bytes()
        at, bit = random.integers(len(sound)), 1 << random.integers(8)
        file.write_bytes(sound[:at] + bytes([sound[at] ^ bit]) + sound[at + 1 :])
        try:
            read = entry.read([1, 2, 3], ["cls", "ap"])
        except CacheUnusable:
            refused += 1
        else:
            np.testing.assert_array_equal(read, values)  # a byte that carries nothing
        file.write_bytes(sound)
    assert refused > (50 if format == "zarr" else 5)  # the rest fell on indexes and padding, which `verify` looks at


@both
@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_a_shard_cut_short_is_refused(format, keep, tmp_path):
    entry = new_entry(tmp_path)
    [name] = fill(entry, format)
    file = shard_files(entry, name)[0]
    sound = file.read_bytes()
    file.write_bytes(sound[: int(keep * len(sound)) if isinstance(keep, float) else keep])
    with pytest.raises(CacheUnusable, match=r"damaged.*verify --repair"):
        entry.read([1], ["cls"])


@both
def test_a_missing_shard_is_missing(format, tmp_path):
    entry = new_entry(tmp_path)
    [name] = fill(entry, format)
    shutil.rmtree(entry.path / "tokens" / name / "c" / "1")
    (entry.path / "tokens" / name / "manifest.json").unlink()
    [one] = entry.streams()
    assert entry.missing_shards(one) == [1]
    assert entry.complete_pairs() == frozenset()
    with pytest.raises(NotCached, match="cls of layers 1"):
        entry.read([1], ["cls"])


@both
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
@pytest.mark.parametrize(
    ("dtype", "advice"), [("float16", "use --dtype float32"), ("float32", "mlfusion doctor MODEL")]
)
def test_numbers_that_cannot_be_kept_are_refused_with_the_image(format, value, dtype, advice, tmp_path):
    entry = new_entry(tmp_path)
    [one] = streams_for(SHAPES, images=19, dtype=dtype, format=format)
    entry.begin([one])
    tokens = np.zeros((8, *one.shape[1:]), np.float32)
    tokens[5, 1, 0, 2] = np.inf if dtype == "float32" else value
    refused = rf"layer 2 of image 'train/α/5 ½.png' is not finite in {dtype}; .*{advice}"
    with pytest.raises(BadData, match=refused), entry.draft(one, 0) as draft:
        draft.append(tokens)
    assert entry.missing_shards(one) == [0, 1, 2]
    assert not list(entry.path.rglob(f"{disk.DRAFT}*"))


def test_the_first_of_two_writers_wins(tmp_path):
    entry = new_entry(tmp_path)
    [one] = streams_for(SHAPES, images=19, dtype="float16", format="zarr")
    entry.begin([one])
    with entry.draft(one, 0) as a, entry.draft(one, 0) as b:
        a.append(np.full((8, *one.shape[1:]), 1, np.float16))
        b.append(np.full((8, *one.shape[1:]), 2, np.float16))
        assert b.publish()
        assert not a.publish()
    assert not list(entry.path.rglob(f"{disk.DRAFT}*"))
    assert zarr.open_array(entry.path / "tokens" / one.name, mode="r")[0, 0, 0, 0] == 2


def test_two_writers_of_a_stream_cut_it_alike(tmp_path, monkeypatch):
    entry = new_entry(tmp_path)
    words = {"images": 19, "dtype": "float16", "format": "zarr"}
    entry.begin(streams_for(SHAPES, **words))
    monkeypatch.setattr(stream, "SHARD_ROWS", (4, 4))
    entry.begin(streams_for(SHAPES, **words))
    assert [one.shard_rows for one in entry.streams()] == [8]


def test_drafts_of_the_dead_are_swept_and_of_the_living_are_not(tmp_path):
    entry = new_entry(tmp_path)
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    host = disk.draft_name(tmp_path).name.split("~")[1]
    gone = entry.path / f"{disk.DRAFT}{host}~{dead}~00000000"
    mine = disk.draft_name(entry.path)
    elsewhere = entry.path / f"{disk.DRAFT}another-host~{dead}~00000000"
    for draft in (gone, mine, elsewhere):
        draft.write_text("half")
    new_entry(tmp_path)
    assert [draft.exists() for draft in (gone, mine, elsewhere)] == [False, True, True]


def test_what_another_writer_has_not_finished_is_not_seen(tmp_path):
    entry = new_entry(tmp_path)
    fill(entry, "zarr")
    shutil.copytree(entry.path, disk.draft_name(entry.path.parent))
    [one] = entry.streams()
    shutil.copytree(entry.path / "tokens" / one.name, disk.draft_name(entry.path / "tokens"))
    assert [e.key for e in FeatureStore(tmp_path).entries()] == [entry.key]
    assert entry.streams() == [one]


def test_images_that_could_not_be_read_are_left_out(tmp_path):
    entry = new_entry(tmp_path)
    [one] = streams_for(SHAPES, images=19, dtype="float16", format="zarr")
    entry.begin([one])
    values = np.random.default_rng(0).normal(size=one.shape).astype(np.float16)
    for shard in range(one.shards):
        rows = one.rows(shard)
        with entry.draft(one, shard) as draft:
            draft.append(values[rows.start : rows.stop], {9: "not an image"} if 9 in rows else {})
            draft.publish()
    entry.seal()
    np.testing.assert_array_equal(entry.read([1, 2, 3], ["cls", "ap"]), np.delete(values, 9, 0))
    assert entry.skipped() == {9: "not an image"}
    assert np.isnan(zarr.open_array(entry.path / "tokens" / one.name, mode="r")[9]).all()


@pytest.mark.parametrize("file", ["labels.npy", "digests.npy", "ids.json"])
def test_labels_and_ids_are_tied_to_the_key(file, tmp_path):
    entry = new_entry(tmp_path)
    path = entry.path / file
    data = path.read_bytes()
    changed = data.replace(b"/5 ", b"/6 ") if file == "ids.json" else data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]
    assert changed != data
    path.write_bytes(changed)
    with pytest.raises(CacheUnusable, match="ids, labels or digests"):
        _ = Entry(entry.path).samples


def test_an_entry_that_does_not_fit_its_name_is_refused(tmp_path):
    entry = new_entry(tmp_path)
    body = read_json(entry.path / "entry.json")
    body["model"]["revision"] = "another"
    (entry.path / "entry.json").write_text(sealed(body))
    with pytest.raises(CacheUnusable, match="does not belong"):
        Entry(entry.path)


def test_a_cache_of_a_newer_format_is_refused(tmp_path):
    (tmp_path / "mlfusion-cache.json").write_text(sealed({"format": 99}))
    with pytest.raises(CacheUnusable, match=r"format 99.*update mlfusion"):
        FeatureStore(tmp_path)


def test_a_moved_cache_still_opens(tmp_path):
    entry = new_entry(tmp_path / "here")
    [values] = fill(entry, "zarr").values()
    (tmp_path / "here").rename(tmp_path / "there ½ #")
    [moved] = FeatureStore(tmp_path / "there ½ #").entries()
    assert moved.key == entry.key
    np.testing.assert_array_equal(moved.read([1, 2, 3], ["cls", "ap"]), values)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot be written"), (errno.EACCES, "--cache")],
)
def test_a_disk_that_refuses_is_told_in_words(number, words, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk.os, "fsync", refuse)
    with pytest.raises(CacheUnusable, match=words):
        new_entry(tmp_path)


def test_a_file_where_the_cache_should_be(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(CacheUnusable, match="cannot be written"):
        new_entry(tmp_path / "cache")


def test_features_are_found_by_any_name_they_were_given(tmp_path):
    entry, store = new_entry(tmp_path), FeatureStore(tmp_path)
    entry.add_alias(msgspec.structs.replace(NAMES, model="alias", model_source="hub/alias"))
    for model in ("m", "somewhere/m", "alias", "hub/alias", None):
        assert [e.key for e in store.find(model=model, dataset="d")] == [entry.key]
    assert not store.find(model="m2", dataset="d")
    assert not store.find(model="m", dataset="d", split="test")


@given(
    images=st.integers(1, 3_000_000), layers=st.integers(1, 40), width=st.integers(1, 4096), tokens=st.integers(1, 600)
)
def test_shards_tile_the_images_once_and_are_cut_in_powers_of_two(images, layers, width, tokens):
    shapes = {(layer, "all"): (tokens, width) for layer in range(layers)}
    [one] = streams_for(shapes, images=images, dtype="float16", format="zarr")
    assert one.shard_rows & (one.shard_rows - 1) == 0
    assert one.shard_rows % one.chunk_rows == 0
    edges = [one.rows(0), one.rows(one.shards // 2), one.rows(one.shards - 1)]
    assert edges[0].start == 0
    assert edges[-1].stop == images
    assert all(0 < len(rows) <= one.shard_rows for rows in edges)
    assert sum(len(one.rows(s)) for s in (0, one.shards - 1)) + max(0, one.shards - 2) * one.shard_rows >= images


# --- one verb ---------------------------------------------------------------------------------------------------------


def test_a_gap_is_filled_and_left_behind_sealed(tmp_path):
    """What is missing comes in pieces, a second extractor passes over what the first has claimed, and the rest is a record."""
    store, data = FeatureStore(tmp_path), new_entry(tmp_path / "elsewhere")
    values = np.random.default_rng(3).normal(size=(19, 3, 2, 4)).astype(np.float16)
    asked = (data.spec, data.samples, NAMES, SHAPES)
    assert {len(shards) for shards in store.missing(data.spec, SHAPES, "zarr").values()} == {3}
    with store.filling(*asked) as gap:
        for pieces in gap.rounds():
            for number, (rows, [one]) in enumerate(pieces):
                if number == 0:
                    with store.filling(*asked) as other:
                        assert rows.start not in [rows.start for rows, _ in next(other.rounds())]
                draft = gap.draft(one, rows.start // one.shard_rows)
                draft.append(values[rows.start : rows.stop])
                gap.publish(draft)
                gap.renew()
        assert store.complete_pairs(data.spec) == PAIRS
    np.testing.assert_array_equal(gap.entry.read([1, 2, 3], ["cls", "ap"]), values)
    assert not store.missing(data.spec, SHAPES, "zarr")
    assert store.reuse(*asked[:3]).key == gap.entry.key
    assert not [*gap.entry.path.rglob(f"{disk.DRAFT}*"), *(gap.entry.path / "leases").iterdir()]


def test_a_gap_that_is_not_filled_leaves_nothing_behind(tmp_path):
    data = new_entry(tmp_path / "elsewhere")

    def broken() -> None:
        with FeatureStore(tmp_path).filling(data.spec, data.samples, NAMES, SHAPES) as gap:
            for pieces in gap.rounds():
                _, [one] = next(pieces)
                gap.draft(one, 0).append(np.zeros((2, *one.shape[1:]), np.float16))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CacheUnusable, match=r"no space left for the cache at .*: \d+\.\d{3} MB are needed"):
        broken()
    entry = FeatureStore(tmp_path).entry(data.spec)
    assert entry is not None and not entry.complete_pairs()
    assert not [*entry.path.rglob(f"{disk.DRAFT}*"), *(entry.path / "leases").iterdir()]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("entry.json", {"dtype": "float8"}, "entry.json is damaged: Invalid enum value 'float8'"),
        ("entry.json", {"model": 3}, "entry.json is damaged: Expected `object`, got `int`"),
        ("tokens/*/stream.json", {"width": 0}, r"stream.json is damaged: Expected `int` >= 1"),
        ("tokens/*/stream.json", {"colour": "red"}, "stream.json is damaged: Object contains unknown field `colour`"),
        (
            "tokens/*/stream.json",
            {"chunk_rows": 5},
            "stream.json is damaged: its shards and chunks are of no allowed size",
        ),
        ("tokens/*/manifest.json", {"bytes": ["1"]}, "manifest.json is damaged: Expected `int`, got `str`"),
        ("names/*.json", {"model": None}, r"json is damaged: Expected `str`, got `null`"),
    ],
)
def test_records_are_read_strictly_and_refused_in_a_sentence(file, change, words, tmp_path):
    """A record whose digest fits and whose fields do not: by whoever made it."""
    entry = new_entry(tmp_path)
    fill(entry, "zarr")
    [path] = entry.path.glob(file)
    path.write_text(sealed({**read_json(path), **change}))
    with pytest.raises(CacheUnusable, match=words):
        _ = Entry(entry.path).sources(), entry.names()
    assert any(words.split(" is ")[0].rpartition(" ")[2] in str(damage.path) for damage in verify_entry(entry.path))


# --- labels ----------------------------------------------------------------------------------------------------------

KINDS = {
    "class": (np.array([2, 0, 1, 1]), np.int32, np.int64),
    "labels": (np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]), bool, np.uint8),
    "number": (np.array([0.1, -3.0, 1e300, 5e-324]), np.float64, np.float64),
}


def samples_of(labels: np.ndarray, classes: tuple[str, ...] = ("x", "y", "z")) -> Samples:
    return Samples(tuple(f"{i}.png" for i in range(4)), labels, np.zeros((4, 16), np.uint8), classes)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_every_kind_come_back(kind: str, tmp_path: Path) -> None:
    labels, given, kept = KINDS[kind]
    samples = samples_of(labels.astype(given))
    data = DataSpec(content=samples.content, split="train", images=4, classes=samples.classes, name="d")
    entry = FeatureStore(tmp_path).create(FeatureSpec(model=MODEL, data=data), samples, NAMES)
    fill(entry, "zarr")
    back = Entry(entry.path).samples.labels
    assert back.dtype == kept and np.array_equal(back, labels)
    assert np.array_equal(np.load(entry.path / "labels.npy", allow_pickle=False), labels)
    assert not list(verify_entry(entry.path))


def test_the_same_labels_in_other_types_are_the_same_features() -> None:
    assert samples_of(np.array([2, 0, 1, 1], np.int16)).content == samples_of(np.array([2, 0, 1, 1])).content
    several = KINDS["labels"][0]
    assert samples_of(several.astype(bool)).content == samples_of(several).content
    # A class is no number.
    assert samples_of(np.array([2.0, 0.0, 1.0, 1.0])).content != samples_of(np.array([2, 0, 1, 1])).content


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 3, 0]), r"image '2.png' has the label 3; allowed: 0 to 2"),
        (np.array([0, -1, 2, 0]), r"image '1.png' has the label -1; allowed: 0 to 2"),
        (np.array([0.5, 1, 2, np.nan]), r"image '3.png' has the label nan; allowed: a finite number"),
        (np.array([[1, 0, 2]] * 4), r"image '0.png' has the label \[1, 0, 2\]; allowed: a 0 or 1 for every class"),
        (np.array([[1, 0]] * 4), r"4 images of 3 classes have labels of shape \(4, 2\) .* allowed: \[images\] whole"),
        (np.array([[0.5, 0, 1]] * 4), r"image '0.png' has the label \[0.5, 0.0, 1.0\]"),
        (np.array([0, 1, 2]), r"4 images of 3 classes have labels of shape \(3,\)"),
        (np.array(["a", "b", "c", "a"]), r"labels of shape \(4,\) and type <U1"),
    ],
)
def test_labels_that_are_none_are_refused(labels: np.ndarray, message: str) -> None:
    with pytest.raises(BadData, match=message):
        samples_of(labels)
