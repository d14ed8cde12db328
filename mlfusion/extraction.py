"""Stage 1: fill the gaps of the cache. Every image passes through the model once, whatever layers and tokens are missing.

Work is cut by rows, storage by (stream, rows). A block of rows goes through the model when any stream lacks a shard
there, as deep as the deepest layer missing, and every lacking stream takes its part of that one pass. Any number of
extractors may fill one entry: each takes leases on the shards it is about to make, and passes over those that others hold.
"""

import os
import platform
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, get_args

import numpy as np
import torch

from mlfusion import datasets, disk, models, preprocessing
from mlfusion.backbone import Backbone
from mlfusion.devices import pick_device
from mlfusion.errors import BadData, BadImage, CacheUnusable, MlfusionError, UnknownName
from mlfusion.progress import Bar, track
from mlfusion.specs import (
    DTYPES,
    KINDS,
    DataSpec,
    Dtype,
    FeatureSpec,
    Pair,
    TokenKind,
    layer_ranges,
    parse_tokens,
)
from mlfusion.store import (
    Entry,
    FeatureStore,
    FormatName,
    Leases,
    Names,
    Place,
    Samples,
    ShardDraft,
    Stream,
    streams_for,
)

BATCH = 32
WAIT = 0.5  # seconds between looks at what other extractors still hold


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
            "skipped": self.entry.unreadable(),
            "forward_passes": self.forward_passes,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, eq=False)
class Images:
    """Splits of a data set and what identifies them. Every image's bytes are read once for it, however many models follow."""

    data: datasets.DataSet
    splits: tuple[tuple[datasets.Split, Samples, DataSpec], ...]

    @classmethod
    def of(
        cls,
        dataset: str | datasets.DataSet,
        splits: Sequence[str] | str = ("train", "test"),
        reading: datasets.Reading | None = None,
    ) -> "Images":
        """Raises the errors of `datasets.load`."""
        data = datasets.load(dataset, reading) if isinstance(dataset, str) else dataset
        found = []
        for name in splits.split(",") if isinstance(splits, str) else splits:
            split = data.split(name.strip())
            samples = _samples(data.name, split)
            spec = DataSpec(
                content=samples.content,
                split=split.name,
                images=len(split),
                classes=split.classes,
                carve=data.carve,
                name=data.name,
            )
            found.append((split, samples, spec))
        return cls(data, tuple(found))


@dataclass(frozen=True, eq=False)
class Request:
    """Words resolved: what an extraction, or a plan of one, is about."""

    checkpoint: models.Checkpoint
    preprocessing: preprocessing.Preprocessing
    names: Names
    pairs: frozenset[Pair]
    splits: tuple[tuple[datasets.Split, Samples, FeatureSpec], ...]
    format: FormatName
    device: str
    batch_size: int

    @classmethod
    def of(
        cls,
        model: str,
        dataset: str | datasets.DataSet | Images,
        *,
        reading: datasets.Reading | None = None,
        splits: Sequence[str] | str = ("train", "test"),
        layers: str,
        tokens: str | Iterable[str],
        format: FormatName,
        dtype: Dtype,
        device: str,
        batch_size: int,
    ) -> "Request":
        if dtype not in DTYPES:
            raise UnknownName("dtype", dtype, DTYPES)
        if format not in get_args(FormatName):
            raise UnknownName("format", format, get_args(FormatName))
        if batch_size < 1:
            raise MlfusionError(f"--batch-size {batch_size}: allowed are 1 and more")
        device = pick_device(device)
        checkpoint = models.locate(model)
        images = dataset if isinstance(dataset, Images) else Images.of(dataset, splits, reading)
        data = images.data
        steps = preprocessing.read(checkpoint.folder)
        model_spec = models.identify(checkpoint, steps.key())
        if data.upright:
            model_spec = model_spec.upright()
        pairs = parse_tokens(tokens, layers, model_spec.depth)
        jobs = tuple(
            (split, samples, FeatureSpec(model=model_spec, data=spec, dtype=dtype))
            for split, samples, spec in images.splits
        )
        names = Names(
            model=checkpoint.name, model_source=checkpoint.source, dataset=data.name, dataset_source=data.source
        )
        return cls(checkpoint, steps, names, pairs, jobs, format, device, batch_size)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layer, _ in self.pairs}))

    @property
    def kinds(self) -> tuple[TokenKind, ...]:
        return tuple(kind for kind in KINDS if any(k == kind for _, k in self.pairs))

    def fresh(self, entry: Entry | None, spec: FeatureSpec, backbone: Backbone) -> list[Stream]:
        """Streams for every pair that none holds, or has begun to."""
        begun = {pair for stream in entry.streams() for pair in stream.pairs} | entry.held() if entry else frozenset()
        return streams_for(
            backbone.shapes(self.pairs - begun),
            images=spec.data.images,
            dtype=spec.dtype,
            format=self.format,
        )


def extract(
    model: str,
    dataset: str | datasets.DataSet,
    *,
    reading: datasets.Reading | None = None,
    splits: Sequence[str] | str = ("train", "test"),
    layers: str = "all",
    tokens: str | Iterable[str] = ("cls", "ap"),
    format: FormatName = "zarr",
    dtype: Dtype = "float16",
    device: str = "auto",
    batch_size: int = BATCH,
    cache: Place = None,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Extracted]:
    """Cache a frozen model's tokens of a data set; what is there already is not computed again.

    Args:
        model: a catalogue name, an id on the hub, or a folder.
        dataset: likewise, or a file; or images of one's own, by `mlfusion.array_dataset`.
        reading: which columns, which kind of labels, how to cut it: see `mlfusion.Reading`.
        splits: names, or a comma-separated list; 'test=validation' takes the validation split for the test.
        layers: 'all' (1..L), 'last', or a list such as '1-4,12'; L is the final norm.
        tokens: kinds, each with layers of its own if need be: 'cls,ap,all@last'.
        format: of shards that are new; what is cached in the other format is reused as it is.
        dtype: in which tokens are kept: float16, bfloat16, float32, or int8 with a scale per token vector.
        device: 'auto', 'cpu', 'cuda', 'mps'. Never part of the key.
        batch_size: images in a forward pass. Never part of the key.
        cache: its root, or layers of them; default $MLFUSION_CACHE, or ./cache.
        skip_bad: go on past images that cannot be read; their rows are left out by readers.
        say: told whom this waits for, if other extractors are at work on the same entry.

    Raises:
        MlfusionError: one of its kinds; see `mlfusion.errors`.
    """
    asked = Request.of(
        model,
        dataset,
        reading=reading,
        splits=splits,
        layers=layers,
        tokens=tokens,
        format=format,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
    )
    return fill(asked, cache=cache, skip_bad=skip_bad, say=say)


def load(asked: Request) -> Backbone:
    """The model of a request, ready to be read."""
    return Backbone(asked.checkpoint, asked.device, preprocessing=asked.preprocessing)


def fill(
    asked: Request,
    *,
    cache: Place = None,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda _: None,
    model: Callable[[Request], Backbone] = load,
) -> list[Extracted]:
    """The same, of words that are resolved already. `model` is called if, and only if, something is to be computed."""
    store = FeatureStore(cache)
    done: list[Extracted] = []
    backbone: Backbone | None = None
    for split, samples, spec in asked.splits:
        began = time.monotonic()
        entry = store.entry(spec)
        work = _Work(split, asked.batch_size, skip_bad, say)
        if entry is None or not asked.pairs <= entry.held():
            backbone = backbone or model(asked)
            backbone.shapes(asked.pairs)  # a token that the model does not have is refused before anything is written
            spec = replace(spec, model=replace(spec.model, kinds=tuple(backbone.kinds)))
            entry = store.create(spec, samples, asked.names)
            with disk.told(store.root):
                fresh = asked.fresh(entry, spec, backbone)
                _check_space(entry, fresh)
                entry.begin(fresh)
                work.run(entry, backbone, asked.pairs)
                if work.written:
                    entry.record_run(_provenance(entry, work, asked.device, time.monotonic() - began))
        elif entry.path.parent == store.folder:
            with suppress(OSError):  # a cache may be read-only
                Entry.mend(entry.path, spec, samples)  # what a repair took out
                entry.sweep()  # of one that was killed after its last shard
        entry.use(asked.names)
        done.append(
            Extracted(
                entry=entry,
                layers=asked.layers,
                tokens=asked.kinds,
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


def _check_space(entry: Entry, fresh: Iterable[Stream]) -> None:
    """Refuse early what the disk cannot hold."""
    needed = sum(stream.nbytes for stream in fresh)
    free = shutil.disk_usage(entry.path).free
    if needed > free:
        raise CacheUnusable(
            f"{needed / 1e9:,.1f} GB are needed under {entry.path} and {free / 1e9:,.1f} GB are free; free some space "
            "(mlfusion cache prune), choose another place with --cache, or ask for fewer --layers or --tokens"
        )


Batch = tuple[range, list[Stream]]
"""Rows that go through the model at once, and the streams that take of them."""


class _Work:
    """The gaps of one entry, and the loop that fills them."""

    def __init__(self, split: datasets.Split, batch_size: int, skip_bad: bool, say: Callable[[str], None]) -> None:
        self.split, self.batch_size, self.skip_bad, self.say = split, batch_size, skip_bad, say
        self.written = 0
        self.forward_passes = 0

    def run(self, entry: Entry, backbone: Backbone, pairs: frozenset[Pair]) -> None:
        """Compute and publish every missing shard that holds one of `pairs`, or wait for those who do."""
        leases = entry.leases()
        title = f"{backbone.name} on {entry.spec.data.name}/{self.split.name}"
        waiting = ""
        # ExitStack: whatever ends the loop, drafts that were not published and leases go away.
        with track(title, len(self.split), "images") as bar, ExitStack() as undo:
            undo.callback(leases.release)
            while True:
                entry.seal()
                lacking = gaps(entry, pairs)
                if not lacking:
                    return
                before = self.forward_passes
                self._fill(entry, backbone, self._batches(entry, lacking, leases), leases, undo, bar)
                if self.forward_passes == before:  # all that is missing is being made by others
                    stream, shards = next(iter(lacking.items()))
                    if waiting != (waiting := leases.holder(entry.lease_name(stream, min(shards)))):
                        self.say(f"the rest of {title} is being extracted by {waiting}; waiting for it")
                    time.sleep(min(WAIT, leases.term / 4))

    def _batches(self, entry: Entry, missing: dict[Stream, set[int]], leases: Leases) -> Iterator[Batch]:
        """The rows to compute, claimed as they are asked for, in order; rows that others are at work on are left out."""
        # Shard sizes are powers of two: a unit holds whole shards of every stream, and each is a multiple of a step.
        unit, step = (pick(stream.shard_rows for stream in missing) for pick in (max, min))
        for first in range(0, len(self.split), unit):
            rows = range(first, min(first + unit, len(self.split)))
            wanted = {
                stream: shards & set(range(rows.start // stream.shard_rows, -(-rows.stop // stream.shard_rows)))
                for stream, shards in missing.items()
            }
            names = [entry.lease_name(stream, shard) for stream, shards in wanted.items() for shard in sorted(shards)]
            if not names or not leases.take(names):
                continue
            # Another may have published a shard between our look and our lease.
            lacking = {stream: shards & set(entry.missing_shards(stream)) for stream, shards in wanted.items()}
            leases.release(
                entry.lease_name(stream, shard)
                for stream, shards in wanted.items()
                for shard in shards - lacking[stream]
            )
            for start in range(rows.start, rows.stop, step):
                takers = [stream for stream, shards in lacking.items() if start // stream.shard_rows in shards]
                stop = min(start + step, rows.stop)
                for at in range(start, stop if takers else start, self.batch_size):
                    yield range(at, min(at + self.batch_size, stop)), takers

    def _fill(
        self, entry: Entry, backbone: Backbone, batches: Iterator[Batch], leases: Leases, undo: ExitStack, bar: Bar
    ) -> None:
        drafts: dict[Stream, ShardDraft] = {}
        publishing: deque[tuple[str, Future[bool]]] = deque()

        def settle(most: int) -> None:
            """Wait until no more than so many shards are on their way to the disk."""
            while len(publishing) > most:
                name, done = publishing.popleft()
                done.result()
                leases.release([name])

        # A shard is flushed while the next one is computed. Whatever ends the loop, what was complete is published.
        with ThreadPoolExecutor(1) as writer:
            for rows, takers, pictures, unread in prepared(backbone, self.split, batches, self.skip_bad):
                wanted = frozenset(pair for stream in takers for pair in stream.pairs)
                made = backbone(backbone.preprocessing.finish(pictures.to(backbone.device)), wanted)
                tokens = {pair: one.cpu().numpy() for pair, one in made.items()}
                self.forward_passes += 1
                leases.renew()
                for stream in takers:
                    shard = rows.start // stream.shard_rows
                    if stream not in drafts:
                        drafts[stream] = undo.enter_context(entry.draft(stream, shard))
                    drafts[stream].append(_assemble(tokens, stream), unread)
                    if rows.stop % stream.shard_rows == 0 or rows.stop == len(self.split):
                        publishing.append((entry.lease_name(stream, shard), writer.submit(drafts.pop(stream).publish)))
                        settle(1)
                self.written += len(rows)
                bar.to(rows.stop)
            settle(0)


def gaps(entry: Entry, pairs: frozenset[Pair]) -> dict[Stream, set[int]]:
    """Missing shards of the streams that hold a wanted pair; the same streams in the same order for every worker."""
    wanted = pairs - entry.held()
    return {
        stream: missing
        for stream in entry.streams()
        if stream.pairs & wanted and (missing := set(entry.missing_shards(stream)))
    }


def prepared(
    backbone: Backbone, split: datasets.Split, batches: Iterable[Batch], skip_bad: bool
) -> Iterator[tuple[range, list[Stream], torch.Tensor, dict[int, str]]]:
    """Each batch with its pictures and, by row, why an image was unread; two are prepared ahead of the forward pass."""

    steps = backbone.preprocessing

    def prepare(rows: range) -> tuple[torch.Tensor, dict[int, str]]:
        whole = torch.zeros(len(rows), *steps.pixels, 3, dtype=steps.dtype)
        unread: dict[int, str] = {}
        for place, row in zip(whole, rows, strict=True):
            try:
                place.numpy()[:] = steps.picture(split.image(row))
            except BadImage as err:
                if not skip_bad:
                    raise BadData(
                        f"{err}; mend or remove it, or go on without such images by --skip-bad. What was extracted "
                        "is kept"
                    ) from err
                unread[row] = str(err)
        return whole, unread

    with ThreadPoolExecutor(2) as pool:
        ahead: deque[tuple[range, list[Stream], Future[tuple[torch.Tensor, dict[int, str]]]]] = deque()
        try:
            for rows, takers in batches:
                ahead.append((rows, takers, pool.submit(prepare, rows)))
                if len(ahead) > 2:
                    first, its, future = ahead.popleft()
                    yield first, its, *future.result()
            while ahead:
                first, its, future = ahead.popleft()
                yield first, its, *future.result()
        finally:
            for *_, future in ahead:
                future.cancel()


def _assemble(tokens: dict[Pair, np.ndarray], stream: Stream) -> np.ndarray:
    """A stream's part of a pass: [images, layers, kinds x tokens, width]."""
    layers = [np.concatenate([tokens[layer, kind] for kind in stream.kinds], 1) for layer in stream.layers]
    return np.stack(layers, 1)


def _workers() -> int:
    return min(8, (os.cpu_count() or 1) + 1)


def _provenance(entry: Entry, work: _Work, device: str, seconds: float) -> dict[str, Any]:
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
        "streams": [stream.name for stream in entry.streams()],
        "layers": layer_ranges(layer for stream in entry.streams() for layer in stream.layers),
    }
