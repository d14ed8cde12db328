"""Stage 1: fill the gaps of the cache. Every image passes through the model once, whatever layers and tokens are missing.

Work is cut by rows, storage by (stream, rows). A block of rows goes through the model when any stream lacks a shard
there, as deep as the deepest layer missing, and every lacking stream takes its part of that one pass.
"""

import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import numpy as np
import torch

from mlfusion import datasets, loader, models
from mlfusion.devices import device_name, pick_compute, pick_device
from mlfusion.errors import MlfusionError, UnknownName
from mlfusion.forward import Forward
from mlfusion.loader import LoadedBatch, Loader
from mlfusion.models import preprocessing
from mlfusion.models.backbone import Backbone
from mlfusion.models.preprocessing import Preprocessing
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
    CachePath,
    Entry,
    FeatureStore,
    FormatName,
    Gap,
    Names,
    Piece,
    RunPart,
    RunRecord,
    Samples,
    ShardDraft,
    Stream,
)

QUEUED = 2  # batches whose tokens are on their way to the cache
BOTTLENECK_SHARE = 0.1  # of the time: a part for which the forward pass waited longer is the bottleneck


@dataclass(frozen=True, kw_only=True)
class ExtractionResult:
    """What one split's extraction did."""

    entry: Entry
    layers: tuple[int, ...]  # asked for
    tokens: tuple[TokenKind, ...]  # asked for
    images_written: int
    images_reused: int
    images_skipped: int
    forward_passes: int  # number of batches that went through the model
    seconds: float
    view: str = "plain"
    rate: float = 0.0  # images per second, while there were images to run
    bottleneck: str = ""  # the part that was waited for: 'decoding', 'the forward pass' or 'writing'

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
            "view": self.view,
            "compute": spec.model.compute,
            "images_per_second": round(self.rate, 2),
            "limit": self.bottleneck,
        }


@dataclass(frozen=True, eq=False)
class Images:
    """Splits of a data set and their identity. Every image's bytes are read once, however many models follow."""

    data: datasets.DataSet
    splits: tuple[tuple[datasets.Split, Samples, DataSpec], ...]

    @classmethod
    def of(
        cls,
        dataset: str | datasets.DataSet,
        splits: Sequence[str] | str = ("train", "test"),
        reading: datasets.ReadOptions | None = None,
    ) -> "Images":
        """Load a data set and read every image of these splits; errors as in `datasets.load`."""
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
                resplit=data.resplit,
                name=data.name,
            )
            found.append((split, samples, spec))
        return cls(data, tuple(found))


@dataclass(frozen=True, eq=False)
class Job:
    """One entry to fill: a split as one view shows it."""

    split: datasets.Split
    samples: Samples
    spec: FeatureSpec
    steps: Preprocessing


@dataclass(frozen=True, kw_only=True)
class Making:
    """How tokens are computed, where model and images alone do not say; all of it is part of the key."""

    preprocess: str = "exact"  # one of preprocessing.WORDS
    size: int | None = None  # height and width of the input, if not the model's own
    views: tuple[str, ...] = ("plain",)
    view_seed: int = 0  # decides the crops of the views
    compute: str = "float32"  # or 'bfloat16', 'float16', 'auto'


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Which tokens are extracted and how: part of the key, or of the names of an entry's streams."""

    layers: str = "all"  # 'all' (1..L), 'last', or a list such as '1-4,12'; L is the final norm
    tokens: str | Iterable[str] = ("cls", "ap")  # kinds, each with layers of its own if need be: 'cls,ap,all@last'
    dtype: Dtype = "float16"  # storage type
    making: Making = Making()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UnknownName("dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """How an extraction is carried out; nothing of it changes a feature or its key."""

    device: str = "auto"  # 'auto', 'cpu', 'cuda' or 'mps'
    batch_size: int | None = None  # images in a forward pass; None: as many as memory allows
    workers: int = 0  # number of decoding workers (threads; processes with a GPU); 0: one per core
    format: FormatName = "zarr"  # of new shards
    skip_bad: bool = False  # go on past images that cannot be read

    def __post_init__(self) -> None:
        if self.format not in get_args(FormatName):
            raise UnknownName("format", self.format, get_args(FormatName))
        if self.batch_size is not None and self.batch_size < 1:
            raise MlfusionError(f"--batch-size {self.batch_size}: allowed are 1 and more")


@dataclass(frozen=True, eq=False)
class Request:
    """What an extraction, or a plan of one, is about: names resolved to a checkpoint, images and keys."""

    checkpoint: models.Checkpoint
    names: Names
    pairs: frozenset[Pair]
    jobs: tuple[Job, ...]
    compute: ComputeOptions  # with the device resolved

    @classmethod
    def of(
        cls,
        model: str,
        dataset: str | datasets.DataSet | Images,
        features: FeatureOptions | None = None,
        compute: ComputeOptions | None = None,
        *,
        reading: datasets.ReadOptions | None = None,
        splits: Sequence[str] | str = ("train", "test"),
    ) -> "Request":
        """Resolve names; arguments and errors as in `extract`, and `Images` that were read already."""
        features, compute = features or FeatureOptions(), compute or ComputeOptions()
        making, device = features.making, pick_device(compute.device)
        checkpoint = models.locate(model)
        images = dataset if isinstance(dataset, Images) else Images.of(dataset, splits, reading)
        data = images.data
        precision = pick_compute(making.compute, device)
        views = [
            preprocessing.read(checkpoint.folder, making.preprocess, size=making.size, view=view, seed=making.view_seed)
            for view in making.views
        ]
        model_specs = [
            models.identify(checkpoint, steps.key(exif_transpose=data.exif_transpose), precision, steps.view)
            for steps in views
        ]
        return cls(
            checkpoint=checkpoint,
            names=Names(
                model=checkpoint.name, model_source=checkpoint.source, dataset=data.name, dataset_source=data.source
            ),
            pairs=parse_tokens(features.tokens, features.layers, model_specs[0].depth),
            jobs=tuple(
                Job(split, samples, FeatureSpec(model=model_spec, data=spec, dtype=features.dtype), steps)
                for split, samples, spec in images.splits
                for model_spec, steps in zip(model_specs, views, strict=True)
            ),
            compute=replace(compute, device=device),
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that are asked for."""
        return tuple(sorted({layer for layer, _ in self.pairs}))

    @property
    def kinds(self) -> tuple[TokenKind, ...]:
        """All token kinds that are asked for."""
        return tuple(kind for kind in KINDS if any(k == kind for _, k in self.pairs))


def extract(
    model: str,
    dataset: str | datasets.DataSet,
    *,
    reading: datasets.ReadOptions | None = None,
    splits: Sequence[str] | str = ("train", "test"),
    layers: str = "all",
    tokens: str | Iterable[str] = ("cls", "ap"),
    format: FormatName = "zarr",
    dtype: Dtype = "float16",
    device: str = "auto",
    batch_size: int | None = None,
    making: Making | None = None,
    workers: int = 0,
    cache: CachePath = None,
    skip_bad: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> list[ExtractionResult]:
    """Cache a frozen model's tokens of a data set; what is there already is not computed again.

    Args:
        model: a catalogue name, an id on the hub, or a folder.
        dataset: a catalogue name, an id on the hub, a folder or a file; or images in memory, by `mlfusion.array_dataset`.
        reading: which columns, which kind of labels, how to split it: see `mlfusion.ReadOptions`.
        splits: names, or a comma-separated list; 'test=validation' takes the validation split for the test.
        layers: 'all' (1..L), 'last', or a list such as '1-4,12'; L is the final norm.
        tokens: kinds, each with layers of its own if need be: 'cls,ap,all@last'.
        format: format of new shards; what is cached in the other format is reused as it is.
        dtype: storage type: float16, bfloat16, float32, or int8 with a scale per token.
        device: 'auto', 'cpu', 'cuda' or 'mps'. Never part of the key.
        batch_size: images in a forward pass; None: as many as memory allows. Never part of the key.
        making: preprocessing, size of the input, views, compute type: parts of the key, each view an entry of its own.
        workers: number of decoding workers (threads; processes with a GPU); 0: one per core. Never part of the key.
        cache: its root, or layers of them; default $MLFUSION_CACHE, or ./cache.
        skip_bad: go on past images that cannot be read; readers leave their rows out.
        log: called with a message while waiting for another extractor of the same entry.

    Raises:
        MlfusionError: one of its kinds; see `mlfusion.errors`.
    """
    asked = Request.of(
        model,
        dataset,
        FeatureOptions(layers=layers, tokens=tokens, dtype=dtype, making=making or Making()),
        ComputeOptions(device=device, batch_size=batch_size, workers=workers, format=format, skip_bad=skip_bad),
        reading=reading,
        splits=splits,
    )
    return fill(asked, cache=cache, log=log)


def load(asked: Request) -> Backbone:
    """Load the model of a request."""
    first = asked.jobs[0]
    return Backbone(asked.checkpoint, asked.compute.device, preprocessing=first.steps, compute=first.spec.model.compute)


def fill(
    asked: Request,
    *,
    cache: CachePath = None,
    log: Callable[[str], None] = lambda _: None,
    model: Callable[[Request], Backbone] = load,
) -> list[ExtractionResult]:
    """The same as `extract` for a resolved request. `model` is called if, and only if, something has to be computed."""
    store = FeatureStore(cache)
    done: list[ExtractionResult] = []
    backbone: Backbone | None = None
    for job in asked.jobs:
        began = time.monotonic()
        work = _Work(job, asked.compute)
        if asked.pairs <= store.held(job.spec):
            entry = store.reuse(job.spec, job.samples, asked.names)
        else:
            backbone = backbone or model(asked)
            shapes = backbone.shapes(asked.pairs)  # a token that the model lacks is refused before anything is written
            spec = replace(job.spec, model=replace(job.spec.model, kinds=tuple(backbone.kinds)))
            filling = store.filling(spec, job.samples, asked.names, shapes, format=asked.compute.format, log=log)
            with filling as gap:
                work.run(gap, backbone)
                if work.written:
                    gap.commit(_provenance(gap.entry, work, time.monotonic() - began))
            entry = gap.entry
        done.append(
            ExtractionResult(
                entry=entry,
                layers=asked.layers,
                tokens=asked.kinds,
                images_written=work.written,
                images_reused=len(job.split) - work.written,
                images_skipped=len(entry.skipped()),
                forward_passes=work.passes,
                seconds=time.monotonic() - began,
                view=job.steps.view,
                rate=work.rate,
                bottleneck=work.bottleneck,
            )
        )
    return done


def _samples(name: str, split: datasets.Split) -> Samples:
    """Read every image's bytes once, for the digests that identify the split. Order never depends on the threads."""
    with (
        track(f"reading {name}/{split.name}", len(split), "images") as bar,
        ThreadPoolExecutor(min(8, loader.processor_count() + 1)) as pool,
    ):
        digests = bytearray()
        for one in pool.map(split.digest, range(len(split))):
            digests += one
            bar.advance()
    table = np.frombuffer(bytes(digests), np.uint8).reshape(len(split), 16)
    return Samples(split.ids, split.labels, table, split.classes)


Batch = tuple[range, list[Stream]]
"""Rows that go through the model at once, and the streams that take them."""


class _Work:
    """The loop that fills the gaps of one entry, and its figures."""

    def __init__(self, job: Job, compute: ComputeOptions) -> None:
        self.job, self.split, self.compute = job, job.split, compute
        self.written = 0  # images
        self.seconds = 0.0  # that the loop ran
        self.forward: Forward | None = None
        self.loaders: list[Loader] = []
        self.writers: list[_Writer] = []

    @property
    def passes(self) -> int:
        """Number of batches that went through the model."""
        return self.forward.passes if self.forward else 0

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.written / max(self.seconds, 1e-9)

    @property
    def waited(self) -> dict[str, float]:
        """Seconds that the loop waited for pictures, and for the writer to take tokens."""
        return {
            "decoding": sum(loader.waited for loader in self.loaders),
            "writing": sum(writer.held for writer in self.writers),
        }

    @property
    def bottleneck(self) -> str:
        """The part that the others waited for; '' if nothing was computed."""
        if not self.written:
            return ""
        waited = self.waited
        part = max(waited, key=lambda name: waited[name])
        return part if waited[part] > BOTTLENECK_SHARE * self.seconds else "the forward pass"

    def run(self, gap: Gap, backbone: Backbone) -> None:
        """Compute and publish every missing shard, or wait for the extractors that make it."""
        with track(gap.title, len(self.split), "images") as bar:
            for pieces in gap.rounds():
                if self.forward is None:
                    self.forward = Forward(backbone, self.job.steps, gap.pairs, self.compute.batch_size)
                self._fill(gap, self.forward, pieces, bar)

    def _fill(self, gap: Gap, forward: Forward, pieces: Iterator[Piece], bar: Bar) -> None:
        began = time.monotonic() - self.seconds
        feed = loading(forward, self.split, self.compute)
        self.loaders.append(feed)
        # A batch is written while the next one is computed and others are decoded, and a shard is flushed while the next
        # one is filled. Whatever ends the loop, what was complete is published.
        with _Writer(gap) as writer:
            self.writers.append(writer)
            for one in feed(_batches(pieces, forward.batch_size)):
                writer.put(one, _take(forward, one))
                gap.renew()
                self.written += len(one.rows)
                self.seconds = time.monotonic() - began
                bar.note = f"limit: {self.bottleneck}"
                bar.to(one.rows.stop)
        self.seconds = time.monotonic() - began


def _batches(pieces: Iterator[Piece], size: int) -> Iterator[Batch]:
    """Cut pieces into batches."""
    for rows, streams in pieces:
        for at in range(rows.start, rows.stop, size):
            yield range(at, min(at + size, rows.stop)), streams


def loading(forward: Forward, split: datasets.Split, compute: ComputeOptions) -> Loader:
    """The loader for a forward pass: threads beside it, or processes if it is on a GPU and leaves the processors free."""
    on_gpu = forward.backbone.device.type == "cuda"
    return Loader(
        split,
        forward.steps,
        forward.batch_size,
        skip_bad=compute.skip_bad,
        workers=compute.workers,
        processes=on_gpu and loader.can_fork(),
        pinned=on_gpu,
    )


@dataclass(frozen=True, eq=False)
class _PendingTokens:
    """The streams' parts of one pass, being copied from the device."""

    parts: dict[Stream, torch.Tensor]  # [images, layers, kinds x tokens, width] in the processor's memory
    wait: Callable[[], None]  # returns when they are there


def _take(forward: Forward, one: LoadedBatch[list[Stream]]) -> _PendingTokens:
    """Run a batch and start copying its tokens. On a GPU nothing waits for it here: the next batch can be queued at once."""
    tokens = forward(one.pictures, frozenset(pair for stream in one.payload for pair in stream.pairs))
    parts = {stream: _assemble(tokens, stream) for stream in one.payload}
    if forward.backbone.device.type != "cuda":
        return _PendingTokens({stream: part.cpu() for stream, part in parts.items()}, lambda: None)
    there = {
        stream: torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
        for stream, part in parts.items()
    }
    event = torch.cuda.Event()
    event.record()
    one.free = forward.wait_for_copy  # the buffer is read until then; the pass itself goes on
    return _PendingTokens(there, event.synchronize)


class _Writer:
    """Two threads behind the loop: one fills shards, one flushes and publishes them. The queues between them are bounded."""

    def __init__(self, gap: Gap) -> None:
        self._gap = gap
        self._drafts: dict[Stream, ShardDraft] = {}
        self._filling, self._publishing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._queue: deque[Future[None]] = deque()
        self._published: deque[Future[None]] = deque()
        self._flushed: Future[None] | None = None  # the last shard that was given to be published
        self._failed = False
        self.busy = 0.0  # seconds of filling, and waiting for a flush
        self.awaited = 0.0  # seconds that tokens were waited for, while the device worked on them
        self.held = 0.0  # seconds that the loop was held up because writing was behind

    def put(self, one: LoadedBatch[list[Stream]], tokens: _PendingTokens) -> None:
        """Queue a batch's tokens, in the order of rows. Raises the error of an earlier batch."""
        self._queue.append(self._filling.submit(self._fill, one.rows, tokens, one.unread))
        began, awaited = time.perf_counter(), self.awaited
        while len(self._queue) > QUEUED:
            self._queue.popleft().result()
        self.held += max(0.0, time.perf_counter() - began - (self.awaited - awaited))
        while self._published and self._published[0].done():
            self._published.popleft().result()

    def _fill(self, rows: range, tokens: _PendingTokens, unread: dict[int, str]) -> None:
        if self._failed:
            return  # a draft lacks rows of a batch before this one, and must not be given others in their place
        self._failed = True
        began = time.perf_counter()
        tokens.wait()
        arrived = time.perf_counter()
        self.awaited += arrived - began
        for stream, part in tokens.parts.items():
            if stream not in self._drafts:
                self._drafts[stream] = self._gap.draft(stream, rows.start // stream.shard_rows)
            assert self._drafts[stream].row == rows.start
            self._drafts[stream].append(part.numpy(), unread)
            if rows.stop % stream.shard_rows == 0 or rows.stop == stream.images:
                future = self._publishing.submit(self._gap.publish, self._drafts.pop(stream))
                if self._flushed:  # no more than one shard that is flushed and one that is filled
                    self._flushed.exception()
                self._flushed = future
                self._published.append(future)
        self._failed = False
        self.busy += time.perf_counter() - arrived

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            while self._queue:
                self._queue.popleft().result()
        except BaseException:
            if kind is None:  # else what ended the loop is what matters
                raise
        finally:
            self._filling.shutdown()
            self._publishing.shutdown()
        if kind is None:
            for future in self._published:
                future.result()


def _assemble(tokens: dict[Pair, torch.Tensor], stream: Stream) -> torch.Tensor:
    """A stream's part of a pass: [images, layers, kinds x tokens, width], in float16 if it is stored so, else in float32."""
    layers = [torch.cat([tokens[layer, kind] for kind in stream.kinds], 1) for layer in stream.layers]
    return torch.stack(layers, 1).to(torch.float16 if stream.dtype == "float16" else torch.float32)


def _provenance(entry: Entry, work: _Work, seconds: float) -> RunRecord:
    """The record of a run: versions, device, rates. Never part of the key."""
    forward, device = work.forward, work.compute.device
    assert forward is not None
    libraries = ["mlfusion", "torch", "transformers", "numpy", "pillow", "zarr", "h5py", "simplejpeg"]
    versions = {"python": platform.python_version()}
    for name in libraries:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    parts = {  # seconds of all decoding workers, of the device, of the writer
        "decoding": sum(each.busy for each in work.loaders),
        "forward": forward.seconds + sum(each.awaited for each in work.writers),
        "writing": sum(each.busy for each in work.writers),
    }
    return RunRecord(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions,
        device=device,
        device_name=device_name(device),
        processors=loader.processor_count(),
        threads=torch.get_num_threads(),
        compute=entry.spec.model.compute,
        dtype=entry.spec.dtype,
        batch_size=forward.batch_size,
        out_of_memory=forward.shrunk,
        images=work.written,
        forward_passes=forward.passes,
        seconds=round(seconds, 3),
        images_per_second=round(work.rate, 2),
        bottleneck=work.bottleneck,
        waited={name: round(value, 3) for name, value in work.waited.items()},
        parts={
            name: RunPart(seconds=round(each, 3), images_per_second=round(work.written / max(each, 1e-9), 2))
            for name, each in parts.items()
        },
        streams=tuple(stream.name for stream in entry.streams()),
        layers=layer_ranges(layer for stream in entry.streams() for layer in stream.layers),
    )
