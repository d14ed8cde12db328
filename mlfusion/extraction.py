"""Stage 1: fill the gaps of the cache. Every image passes through the model once, whatever layers and tokens are missing.

Work is cut by rows, storage by (stream, rows). A block of rows goes through the model when any stream lacks a shard
there, as deep as the deepest layer missing, and every lacking stream takes its part of that one pass.
"""

import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from mlfusion import datasets, disk, models
from mlfusion.backbone import Backbone
from mlfusion.devices import pick_device
from mlfusion.errors import BadData, BadImage, CacheUnusable, MlfusionError, UnknownName
from mlfusion.progress import Bar, track
from mlfusion.specs import (
    DTYPES,
    DataSpec,
    Dtype,
    FeatureSpec,
    Pair,
    TokenKind,
    layer_ranges,
    parse_tokens,
)
from mlfusion.store import Entry, FeatureStore, FormatName, Names, Samples, ShardDraft, Stream, streams_for

BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What one split's extraction did."""

    entry: Entry
    layers: tuple[int, ...]  # asked for
    tokens: tuple[TokenKind, ...]  # asked for
    images_written: int
    images_reused: int
    images_skipped: int
    forward_passes: int  # batches that went through the model
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion extract --json` prints."""
        spec = self.entry.spec
        return {
            "model": spec.model.name,
            "dataset": spec.data.name,
            "split": spec.data.split,
            "images": spec.data.images,
            "layers": list(self.layers),
            "tokens": list(self.tokens),
            "dtype": spec.dtype,
            "key": self.entry.key,
            "path": str(self.entry.path),
            "bytes": self.entry.size(),
            "images_written": self.images_written,
            "images_reused": self.images_reused,
            "images_skipped": self.images_skipped,
            "forward_passes": self.forward_passes,
            "seconds": round(self.seconds, 3),
        }


def extract(
    model: str,
    dataset: str,
    *,
    splits: Sequence[str] | str = ("train", "test"),
    layers: str = "all",
    tokens: str | Iterable[str] = ("cls", "ap"),
    format: FormatName = "zarr",
    dtype: Dtype = "float16",
    device: str = "auto",
    batch_size: int = BATCH,
    cache: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
) -> list[Extracted]:
    """Cache a frozen model's tokens of a data set; what is there already is not computed again.

    Args:
        model: a catalogue name, an id on the hub, or a folder.
        dataset: likewise.
        splits: names, or a comma-separated list.
        layers: 'all' (1..L), 'last', or a list such as '1-4,12'; L is the final norm.
        tokens: kinds, each with layers of its own if need be: 'cls,ap,all@last'.
        format: of shards that are new; what is cached in the other format is reused as it is.
        dtype: in which tokens are kept.
        device: 'auto', 'cpu', 'cuda', 'mps'. Never part of the key.
        batch_size: images in a forward pass. Never part of the key.
        cache: its root; default $MLFUSION_CACHE, or ./cache.
        skip_bad: go on past images that cannot be read; their rows are left out by readers.

    Raises:
        MlfusionError: one of its kinds; see `mlfusion.errors`.
    """
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    if batch_size < 1:
        raise MlfusionError(f"--batch-size {batch_size}: allowed are 1 and more")
    device = pick_device(device)
    checkpoint = models.locate(model)
    data = datasets.load(dataset)
    chosen = [data.split(name.strip()) for name in (splits.split(",") if isinstance(splits, str) else splits)]
    model_spec = models.identify(checkpoint)
    pairs = parse_tokens(tokens, layers, model_spec.depth)
    names = Names(model=checkpoint.name, model_source=checkpoint.source, dataset=data.name, dataset_source=data.source)
    store = FeatureStore(cache)
    done: list[Extracted] = []
    backbone: Backbone | None = None
    for split in chosen:
        began = time.monotonic()
        samples = _samples(data.name, split)
        spec = FeatureSpec(
            model=model_spec,
            data=DataSpec(
                content=samples.content, split=split.name, images=len(split), classes=split.classes, name=data.name
            ),
            dtype=dtype,
        )
        entry = store.entry(spec) or store.create(spec, samples, names)
        entry.use(names)
        work = _Work(entry, split, batch_size, skip_bad)
        if not pairs <= entry.held():
            backbone = backbone or Backbone(checkpoint, device)
            with disk.told(store.root):
                entry.sweep()
                _begin_streams(entry, pairs, backbone, format)
                work.run(backbone, pairs)
                entry.record_run(_provenance(work, device, time.monotonic() - began))
        done.append(
            Extracted(
                entry=entry,
                layers=tuple(sorted({layer for layer, _ in pairs})),
                tokens=tuple(kind for kind in ("cls", "ap", "all") if any(k == kind for _, k in pairs)),
                images_written=work.written,
                images_reused=len(split) - work.written,
                images_skipped=len(entry.skipped()),
                forward_passes=work.forward_passes,
                seconds=time.monotonic() - began,
            )
        )
    return done


def _samples(name: str, split: datasets.Split) -> Samples:
    """Read every image's bytes once, for the digests that identify the split. Order never depends on the threads."""
    with track(f"reading {name}/{split.name}", len(split), "images") as bar, ThreadPoolExecutor(_workers()) as pool:
        digests = bytearray()
        for one in pool.map(split.digest, range(len(split))):
            digests += one
            bar.advance()
    table = np.frombuffer(bytes(digests), np.uint8).reshape(len(split), 16)
    return Samples(split.ids, split.labels, table, split.classes)


def _begin_streams(entry: Entry, pairs: frozenset[Pair], backbone: Backbone, format: FormatName) -> None:
    """Give every pair that no stream holds or has begun a stream; refuse early what the disk cannot hold."""
    for _, kind in pairs:
        if kind not in backbone.kinds:
            raise BadData(f"{backbone.name} has no {kind} token; allowed: {', '.join(backbone.kinds)}")
    begun = {pair for stream in entry.streams() for pair in stream.pairs}
    fresh = streams_for(
        pairs - begun,
        tokens=backbone.kinds,
        widths=backbone.anatomy.widths,
        images=entry.spec.data.images,
        dtype=entry.spec.dtype,
        format=format,
    )
    needed = sum(int(np.prod(stream.shape)) * np.dtype(stream.dtype).itemsize for stream in fresh)
    free = shutil.disk_usage(entry.path).free
    if needed > free:
        raise CacheUnusable(
            f"{needed / 1e9:,.1f} GB are needed under {entry.path} and {free / 1e9:,.1f} GB are free; free some space, "
            "choose another place with --cache, or ask for fewer --layers or --tokens"
        )
    entry.begin(fresh)


class _Work:
    """The gaps of one entry, and the loop that fills them."""

    def __init__(self, entry: Entry, split: datasets.Split, batch_size: int, skip_bad: bool) -> None:
        self.entry, self.split, self.batch_size, self.skip_bad = entry, split, batch_size, skip_bad
        self.written = 0
        self.forward_passes = 0

    def run(self, backbone: Backbone, pairs: frozenset[Pair]) -> None:
        """Compute and publish every missing shard that holds one of `pairs`."""
        wanted = pairs - self.entry.held()
        gaps = {
            stream: missing
            for stream in self.entry.streams()
            if stream.pairs & wanted and (missing := set(self.entry.missing_shards(stream)))
        }
        if not gaps:
            return
        step = min(stream.shard_rows for stream in gaps)  # shard sizes are powers of two: each is a multiple of this
        blocks = []
        for start in range(0, len(self.split), step):
            if lacking := [stream for stream, missing in gaps.items() if start // stream.shard_rows in missing]:
                blocks.append((range(start, min(start + step, len(self.split))), lacking))
        batches = [
            (range(at, min(at + self.batch_size, rows.stop)), lacking)
            for rows, lacking in blocks
            for at in range(rows.start, rows.stop, self.batch_size)
        ]
        title = f"{backbone.name} on {self.entry.spec.data.name}/{self.split.name}"
        total = sum(len(rows) for rows, _ in batches)
        # ExitStack: whatever ends the loop, drafts that were not published go away.
        with track(title, total, "images") as bar, ExitStack() as drafts:
            self._fill(backbone, batches, drafts, bar)

    def _fill(self, backbone: Backbone, batches: list[tuple[range, list[Stream]]], drafts: ExitStack, bar: Bar) -> None:
        open_drafts: dict[Stream, ShardDraft] = {}
        for (rows, lacking), (pixels, unread) in zip(batches, self._prepared(backbone, batches), strict=True):
            wanted = frozenset(pair for stream in lacking for pair in stream.pairs)
            tokens = backbone(pixels, wanted)
            self.forward_passes += 1
            for stream in lacking:
                if stream not in open_drafts:
                    shard = rows.start // stream.shard_rows
                    open_drafts[stream] = drafts.enter_context(self.entry.draft(stream, shard))
                open_drafts[stream].append(_assemble(tokens, stream), unread)
                if rows.stop % stream.shard_rows == 0 or rows.stop == len(self.split):
                    open_drafts.pop(stream).publish()
            self.written += len(rows)
            bar.advance(len(rows))

    def _prepared(
        self, backbone: Backbone, batches: Iterable[tuple[range, list[Stream]]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pixels of each batch and which images were unread; two batches are prepared ahead of the forward pass."""

        def prepare(rows: range) -> tuple[np.ndarray, np.ndarray]:
            images, unread = [], np.zeros(len(rows), bool)
            for i, row in enumerate(rows):
                try:
                    images.append(self.split.image(row))
                except BadImage as err:
                    if not self.skip_bad:
                        raise BadData(
                            f"{err}; mend or remove it, or go on without such images by --skip-bad. What was extracted "
                            "is kept"
                        ) from err
                    self.entry.skip(row, str(err))
                    unread[i] = True
            pixels = backbone.prepare(images) if images else np.zeros((0, *backbone.pixels), np.float32)
            whole = np.zeros((len(rows), *backbone.pixels), np.float32)
            whole[~unread] = pixels
            return whole, unread

        with ThreadPoolExecutor(2) as pool:
            ahead: list[Future[tuple[np.ndarray, np.ndarray]]] = []
            try:
                for rows, _ in batches:
                    ahead.append(pool.submit(prepare, rows))
                    if len(ahead) > 2:
                        yield ahead.pop(0).result()
                while ahead:
                    yield ahead.pop(0).result()
            finally:
                for future in ahead:
                    future.cancel()


def _assemble(tokens: dict[Pair, np.ndarray], stream: Stream) -> np.ndarray:
    """A stream's part of a pass: [images, layers, kinds x tokens, width]."""
    layers = [np.concatenate([tokens[layer, kind] for kind in stream.kinds], 1) for layer in stream.layers]
    return np.stack(layers, 1)


def _workers() -> int:
    return min(8, (os.cpu_count() or 1) + 1)


def _provenance(work: _Work, device: str, seconds: float) -> dict[str, Any]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("mlfusion", "torch", "transformers", "numpy", "pillow", "zarr", "h5py")},
        "device": device,
        "batch_size": work.batch_size,
        "images": work.written,
        "forward_passes": work.forward_passes,
        "seconds": round(seconds, 3),
        "images_per_second": round(work.written / max(seconds, 1e-9), 2),
        "streams": [stream.name for stream in work.entry.streams()],
        "layers": layer_ranges(layer for stream in work.entry.streams() for layer in stream.layers),
    }
