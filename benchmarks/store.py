"""How fast the cache reads and writes, as ratios to plain memory-mapped NumPy files that hold the same bytes.

    python benchmarks/store.py [--images 20000] [--repeats 7] [--folder DIR] [--page] [--json]

Tokens of 13 layers x (cls, ap) x 768 channels in float16, 800 MB at 20,000 images, and each repetition does the same work
ours and theirs in turn, so that what else the machine does falls on both; a ratio is theirs / ours in seconds, medians of
the repetitions, with the quartiles of the paired ratios. Ours opens the entry anew each time and compares every checksum
(the default); the rows `unchecked` do not. NumPy's results land in fresh arrays; ours in memory that the process keeps from
results nobody holds any more, and in the rows `in fresh memory` likewise in fresh arrays. `cold` drops the files from the
operating system's cache before each repetition. What was written is removed outside of the time of `write`.

    whole      reader.read()                       numpy.array(map)
    layer      reader.read(), of one layer         the same, of a file that holds that layer alone
    random     reader[2,048 random images]         map[the same images]
    shuffled   reader.batches(2,048), one pass     map[the same images], batch by batch
    shuffled against in order                      consecutive batches of the map: no shuffle at all
    write      draft, checksum, fsync, publish     tofile and fsync

Beside them, at `--rival-images`, what is common elsewhere: one `torch.save` file an image, and one HDF5 data set an image.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import crc32c
import h5py
import msgspec
import numpy as np
import page
import torch
import xxhash

from mlfusion.specs.identity import DataSpec, FeatureSpec, ModelSpec
from mlfusion.store import Check, Entry, FeatureStore, Names, Samples, streams_for
from mlfusion.store import reader as readers

LAYERS, KINDS, WIDTH = tuple(range(1, 14)), ("cls", "ap"), 768
MODEL = ModelSpec(
    weights="0" * 64,
    revision=None,
    config="none",
    preprocess="{}",
    name="none",
    family="none",
    depth=13,
    width=WIDTH,
)
BATCH = 2048
BARS = {
    "whole": 0.9,
    "layer": 0.8,
    "random": 0.5,
    "shuffled": 0.8,
    "write": 0.7,
    "one layer against all cold": 6.0,
}
MOST = {"open 1,000 shards": 60, "mlfusion cache ls, 3,000 entries": 1000}  # ms


def new_entry(root: Path, images: int) -> Entry:
    """An entry with nothing in it."""
    samples = Samples(
        ids=tuple(f"train/{i:06d}" for i in range(images)),
        labels=np.arange(images) % 47,
        digests=np.random.default_rng(0).integers(0, 256, (images, 16), np.uint8),
        classes=tuple(f"class {i}" for i in range(47)),
    )
    data = DataSpec(content=samples.content, split="train", images=images, classes=samples.classes, name="benchmark")
    names = Names(model="none", model_source="none", dataset="benchmark", dataset_source="benchmark")
    return FeatureStore(root).create(FeatureSpec(model=MODEL, data=data, dtype="float16"), samples, names)


def fill(entry: Entry, tokens: np.ndarray, format: str = "zarr") -> None:
    """Write `tokens` [images, layers, kinds, width] as an extraction does: by batches, each shard flushed behind the next."""
    [stream] = streams_for(
        {(layer, kind): (1, WIDTH) for layer in LAYERS for kind in KINDS},
        images=len(tokens),
        dtype="float16",
        format=format,
    )
    entry.begin([stream])
    with ExitStack() as undo, ThreadPoolExecutor(1) as writer:
        published = writer.submit(bool)
        for shard in range(stream.shards):
            draft = undo.enter_context(entry.draft(stream, shard))
            rows = stream.rows(shard)
            for start in range(rows.start, rows.stop, 256):
                draft.append(tokens[start : min(start + 256, rows.stop)])
            published.result()
            published = writer.submit(draft.publish)
        published.result()
    entry.seal()


def put(path: Path, tokens: np.ndarray) -> None:
    """The same bytes, flat."""
    with open(path, "wb") as file:
        tokens.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def mapped(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """As a plain script would open it."""
    return np.memmap(path, np.float16, "r", shape=shape)


def drop(*places: Path) -> None:
    """Take files out of the operating system's cache; only pages that are on the disk already go."""
    for place in places:
        for path in (p for p in (place.rglob("*") if place.is_dir() else [place]) if p.is_file()):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def seconds(work: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Table:
    """The rows as they come."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, value: float, unit: str, **more: Any) -> None:
        row = {"row": name, "value": value, "unit": unit, **more}
        self.rows.append(row)
        spread = f"  ({row['low']:.3g} to {row['high']:.3g})" if "low" in row else ""
        print(f"{name:<34}{value:>9.3g} {unit:<6}{spread:<20} {row.get('note', '')}", flush=True)

    def pair(
        self,
        name: str,
        ours: Callable[[], Any],
        theirs: Callable[[], Any],
        nbytes: int,
        before: Callable[[], None] = lambda: None,
        repeats: int | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Ours and theirs in turn, each going first every other time; the first pair warms up and is not counted."""
        a, b = [], []
        for repeat in range((repeats or self.repeats) + 1):
            for work, times in ((ours, a), (theirs, b)) if repeat % 2 else ((theirs, b), (ours, a)):
                before()
                times.append(seconds(work))
                after()
        a, b = a[1:], b[1:]
        low, _, high = statistics.quantiles([y / x for x, y in zip(a, b, strict=True)], n=4)
        gbs = [nbytes / statistics.median(times) / 1e9 for times in (a, b)]
        note = f"ours {gbs[0]:.2f}, theirs {gbs[1]:.2f} GB/s" if nbytes else ""
        ratio = statistics.median(b) / statistics.median(a)
        self.add(name, ratio, "ratio", low=low, high=high, note=note, gb_per_s=gbs)


def measure(folder: Path, images: int, repeats: int, rival_images: int) -> list[dict[str, Any]]:
    """All rows."""
    table = Table(repeats)
    shape = (images, len(LAYERS), len(KINDS), WIDTH)
    tokens = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)
    flat, one = folder / "tokens.f16", folder / "layer.f16"
    put(flat, tokens)
    put(one, tokens[:, 6])

    turn = iter(range(10**6))

    written = folder / "written"

    def write(format: str) -> None:
        fill(new_entry(written / str(next(turn)), images), tokens, format)

    def write_flat() -> None:
        put(written / f"{next(turn)}.f16", tokens)

    def clean() -> None:
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir()

    clean()
    table.pair("write", lambda: write("zarr"), write_flat, tokens.nbytes, after=clean)
    table.pair("write hdf5", lambda: write("hdf5"), write_flat, tokens.nbytes, repeats=3, after=clean)

    entry = new_entry(folder / "cache", images)
    fill(entry, tokens)
    rows = np.random.default_rng(1).permutation(images)
    picks = [rows[start : start + BATCH] for start in range(0, images - BATCH + 1, BATCH)]

    def read(layers: tuple[int, ...], check: Check = "once") -> np.ndarray:
        with entry.open(layers, KINDS, check=check) as reader:
            return reader.read()

    def shuffled(check: Check = "once") -> None:
        with entry.open(LAYERS, KINDS, check=check) as reader:
            for _ in reader.batches(BATCH, seed=0):
                pass

    with entry.open(LAYERS, KINDS) as reader:
        order = reader.order(seed=0)

    def shuffled_flat() -> None:
        whole = mapped(flat, shape)
        for start in range(0, images, BATCH):
            whole[order[start : start + BATCH]]

    def in_order() -> None:
        whole = mapped(flat, shape)
        for start in range(0, images, BATCH):
            np.array(whole[start : start + BATCH])

    def random_flat(times: int) -> None:
        whole = mapped(flat, shape)
        for pick in picks[:times]:
            whole[pick]

    def random(times: int, check: Check = "once") -> None:
        with entry.open(LAYERS, KINDS, check=check) as reader:
            for pick in picks[:times]:
                reader[pick]

    assert np.array_equal(read(LAYERS), tokens)
    layer_bytes, every = tokens[:, 6].nbytes, len(picks)
    random_bytes = every * BATCH * tokens[0].nbytes
    table.pair("whole", lambda: read(LAYERS), lambda: np.array(mapped(flat, shape)), tokens.nbytes)
    table.pair("whole unchecked", lambda: read(LAYERS, "never"), lambda: np.array(mapped(flat, shape)), tokens.nbytes)
    table.pair("layer", lambda: read((7,)), lambda: np.array(mapped(one, (images, 2, WIDTH))), layer_bytes)
    table.pair("random", lambda: random(every), lambda: random_flat(every), random_bytes)
    table.pair("random unchecked", lambda: random(every, "never"), lambda: random_flat(every), random_bytes)
    table.pair("shuffled", shuffled, shuffled_flat, tokens.nbytes)
    table.pair("shuffled unchecked", lambda: shuffled("never"), shuffled_flat, tokens.nbytes)
    table.pair("shuffled against in order", shuffled, in_order, tokens.nbytes)
    idle = readers.IDLE_BYTES

    def forget() -> None:
        readers.IDLE_BYTES = 0
        readers.BufferPool.idle.clear()

    def keep() -> None:
        readers.IDLE_BYTES = idle

    for name, ours, theirs, nbytes in (
        ("whole", lambda: read(LAYERS), lambda: np.array(mapped(flat, shape)), tokens.nbytes),
        ("random", lambda: random(every), lambda: random_flat(every), random_bytes),
        ("shuffled", shuffled, shuffled_flat, tokens.nbytes),
    ):
        table.pair(f"{name} in fresh memory", ours, theirs, nbytes, before=forget, after=keep)

    def cold() -> None:
        drop(flat, one, entry.path)

    few = max(3, repeats // 2)
    table.pair("whole cold", lambda: read(LAYERS), lambda: np.array(mapped(flat, shape)), tokens.nbytes, cold, few)
    table.pair(
        "layer cold", lambda: read((7,)), lambda: np.array(mapped(one, (images, 2, WIDTH))), layer_bytes, cold, few
    )
    table.pair("random cold", lambda: random(1), lambda: random_flat(1), BATCH * tokens[0].nbytes, cold, few)
    table.pair("shuffled cold", shuffled, shuffled_flat, tokens.nbytes, cold, few)
    table.pair("one layer against all cold", lambda: read((7,)), lambda: read(LAYERS), 0, cold, few)

    many = new_entry(folder / "many", 256_000)
    fill_thousand(many)
    times = []
    for _ in range(repeats):
        fresh = FeatureStore(folder / "many").by_key(many.key)
        assert fresh is not None
        fresh.samples  # noqa: B018 - the names of 256,000 images are read once an entry, and are not the shards'
        times.append(seconds(lambda fresh=fresh: fresh.open((1,), ("cls",)).close()) * 1e3)
    table.add("open 1,000 shards", statistics.median(times), "ms", low=min(times), high=max(times))

    listing(table, folder / "listing")
    rivals(table, folder, tokens[:rival_images], entry)
    checksums(table)
    return table.rows


def fill_thousand(entry: Entry) -> None:
    """1,000 shards of one small layer."""
    [stream] = streams_for(
        {(1, "cls"): (1, 2)},
        images=entry.spec.data.images,
        dtype="float16",
        format="zarr",
    )
    stream = msgspec.structs.replace(stream, shard_rows=256, chunk_rows=256)
    entry.begin([stream])
    for shard in range(stream.shards):
        with entry.draft(stream, shard) as draft:
            draft.append(np.ones((len(stream.rows(shard)), 1, 1, 2), np.float16))
            draft.publish()
    entry.seal()


def listing(table: Table, root: Path, count: int = 3000) -> None:
    """`mlfusion cache ls` of many entries, each of one stream, as the user waits for it: from start to end of the process."""
    fsync, os.fsync = os.fsync, lambda _: None  # to fill them is not what is measured
    for i in range(count):
        samples = Samples(("a",), np.zeros(1, np.int64), np.full((1, 16), i % 256, np.uint8), (f"class {i}",))
        data = DataSpec(content=samples.content, split="train", images=1, classes=samples.classes, name=f"set {i}")
        names = Names(model="none", model_source="none", dataset=f"set {i}", dataset_source=f"set {i}")
        entry = FeatureStore(root).create(FeatureSpec(model=MODEL, data=data, dtype="float16"), samples, names)
        [stream] = streams_for({(1, "cls"): (1, 2)}, images=1, dtype="float16", format="zarr")
        entry.begin([stream])
        with entry.draft(stream, 0) as draft:
            draft.append(np.ones((1, 1, 1, 2), np.float16))
            draft.publish()
        entry.seal()
    os.fsync = fsync
    command = [sys.executable, "-m", "mlfusion", "cache", "ls", "--json", "--cache", str(root)]
    took, said = [], ""
    for _ in range(5):
        start = time.perf_counter()
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        took.append((time.perf_counter() - start) * 1e3)
    assert len(json.loads(said)["entries"]) == count
    table.add(f"mlfusion cache ls, {count:,} entries", statistics.median(took), "ms", low=min(took), high=max(took))


def rivals(table: Table, folder: Path, tokens: np.ndarray, entry: Entry) -> None:
    """Seconds that other ways of keeping features take, over ours, for the same images."""
    files, bundle = folder / "files", folder / "bundle.h5"
    files.mkdir()

    def save() -> None:
        for i, each in enumerate(tokens):
            torch.save(torch.from_numpy(each), files / f"{i}.pt")

    def save_sets() -> None:
        with h5py.File(bundle, "w") as file:
            for i, each in enumerate(tokens):
                file.create_dataset(str(i), data=each)

    def load() -> Iterator[np.ndarray]:
        for i in range(len(tokens)):
            yield torch.load(files / f"{i}.pt", weights_only=True).numpy()

    def load_sets() -> Iterator[np.ndarray]:
        with h5py.File(bundle) as file:
            for i in range(len(tokens)):
                yield file[str(i)][()]

    def load_layer_of_sets() -> np.ndarray:
        with h5py.File(bundle) as file:
            return np.stack([file[str(i)][6] for i in range(len(tokens))])

    written = seconds(save), seconds(save_sets)
    small = new_entry(folder / "small", len(tokens))
    ours = seconds(lambda: fill(small, tokens))

    def read(layers: tuple[int, ...]) -> np.ndarray:
        with small.open(layers, KINDS) as reader:
            return reader.read()

    ours_read = statistics.median(seconds(lambda: read(LAYERS)) for _ in range(3))
    ours_layer = statistics.median(seconds(lambda: read((7,))) for _ in range(3))
    for name, wrote, everything, layer in (
        ("torch.save file an image", written[0], load, lambda: np.stack([each[6] for each in load()])),
        ("HDF5 data set an image", written[1], load_sets, load_layer_of_sets),
    ):
        table.add(
            f"{name}: write", wrote / ours, "times", note="multiple of our time, although without a flush to the disk"
        )
        table.add(f"{name}: whole", seconds(lambda load=everything: np.stack(list(load()))) / ours_read, "times")
        table.add(f"{name}: layer", seconds(layer) / ours_layer, "times")


def checksums(table: Table) -> None:
    """Bytes per second of a chunk's checksum and of a file's digest."""
    chunk = np.random.default_rng(0).integers(0, 256, 768 * 1024, np.uint8)
    for name, work in (
        ("crc32c", crc32c.crc32c),
        ("xxh3-64", xxhash.xxh3_64_digest),
        ("xxh3-128", xxhash.xxh3_128_digest),
    ):
        took = [seconds(lambda work=work: [work(chunk) for _ in range(64)]) for _ in range(9)]
        speeds = [64 * chunk.nbytes / each / 1e9 for each in took]
        table.add(name, statistics.median(speeds), "GB/s", low=min(speeds), high=max(speeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rival-images", type=int, default=4_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the system's temporary one")
    parser.add_argument("--page", action="store_true", help="put the table into docs/measurements/speed.md")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(Path(folder), args.images, args.repeats, min(args.rival_images, args.images))
    missed = [
        f"{row['row']}: {row['value']:.3g} {row['unit']}, wanted {BARS.get(row['row'], MOST.get(row['row'])):g}"
        for row in rows
        if row["value"] < BARS.get(row["row"], 0) or row["value"] > MOST.get(row["row"], math.inf)
    ]
    print("\n" + ("missed: " + "; ".join(missed) if missed else "every bar is met") + f"\n{page.machine()}")
    if args.page:
        cells = [
            (
                row["row"],
                f"{row['value']:.3g} {row['unit']}",
                f"{row['low']:.3g} to {row['high']:.3g}" if "low" in row else "",
                f"≥ {BARS[row['row']]:g}"
                if row["row"] in BARS
                else f"≤ {MOST[row['row']]}"
                if row["row"] in MOST
                else "",
                row.get("note", ""),
            )
            for row in rows
        ]
        heads = ["", "median", "spread", "bar", ""]
        text = f"{page.machine()}, load {os.getloadavg()[1]:.0f}, {args.images:,} images.\n\n{page.table(heads, cells)}"
        page.put("measurements/speed.md", "store", text)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
