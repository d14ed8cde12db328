"""Stage 1: fill the gaps of the cache. Every image passes through the model once, whatever layers and tokens are missing.

Work is cut by rows, storage by (stream, rows). A block of rows goes through the model when any stream lacks a shard
there, as deep as the deepest layer missing, and every lacking stream takes its part of that one pass. Any number of
extractors may fill one entry: each takes leases on the shards it is about to make, and passes over those that others hold.
"""

import platform
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import numpy as np
import torch

from mlfusion import datasets, disk, loader, models
from mlfusion.devices import device_name, pick_compute, pick_device
from mlfusion.errors import CacheUnusable, MlfusionError, UnknownName
from mlfusion.forward import Forward
from mlfusion.loader import Loaded, Loader
from mlfusion.memory import pages_kept
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

QUEUED = 2  # batches whose tokens are on their way to the cache
SLOW = 0.1  # of the time, waited for by the forward pass, that makes another part the limit
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
    view: str = "plain"
    rate: float = 0.0  # images a second, while there were images to run
    limit: str = ""  # the part that was waited for: 'decoding', 'the forward pass', 'writing'

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
            "limit": self.limit,
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
        reading: datasets.ReadOptions | None = None,
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
    """How tokens are made, where that is not plain from model and images."""

    preprocess: str = "exact"  # of preprocessing.WORDS
    size: int | None = None  # height and width of the input, if not the model's own
    views: tuple[str, ...] = ("plain",)
    view_seed: int = 0  # of the views' crops
    compute: str = "float32"  # or 'bfloat16', 'float16', 'auto'


@dataclass(frozen=True, eq=False)
class Request:
    """Words resolved: what an extraction, or a plan of one, is about."""

    checkpoint: models.Checkpoint
    names: Names
    pairs: frozenset[Pair]
    jobs: tuple[Job, ...]
    format: FormatName
    device: str
    batch_size: int | None

    @classmethod
    def of(
        cls,
        model: str,
        dataset: str | datasets.DataSet | Images,
        *,
        reading: datasets.ReadOptions | None = None,
        splits: Sequence[str] | str = ("train", "test"),
        layers: str,
        tokens: str | Iterable[str],
        format: FormatName,
        dtype: Dtype,
        device: str,
        batch_size: int | None = None,
        making: Making | None = None,
    ) -> "Request":
        making = making or Making()
        if dtype not in DTYPES:
            raise UnknownName("dtype", dtype, DTYPES)
        if format not in get_args(FormatName):
            raise UnknownName("format", format, get_args(FormatName))
        if batch_size is not None and batch_size < 1:
            raise MlfusionError(f"--batch-size {batch_size}: allowed are 1 and more")
        device = pick_device(device)
        checkpoint = models.locate(model)
        images = dataset if isinstance(dataset, Images) else Images.of(dataset, splits, reading)
        data = images.data
        compute = pick_compute(making.compute, device)
        views = [
            preprocessing.read(checkpoint.folder, making.preprocess, size=making.size, view=view, seed=making.view_seed)
            for view in making.views
        ]
        models_of = [
            models.identify(checkpoint, steps.key(exif_transpose=data.exif_transpose), compute, steps.view)
            for steps in views
        ]
        pairs = parse_tokens(tokens, layers, models_of[0].depth)
        jobs = tuple(
            Job(split, samples, FeatureSpec(model=model_spec, data=spec, dtype=dtype), steps)
            for split, samples, spec in images.splits
            for model_spec, steps in zip(models_of, views, strict=True)
        )
        names = Names(
            model=checkpoint.name, model_source=checkpoint.source, dataset=data.name, dataset_source=data.source
        )
        return cls(checkpoint, names, pairs, jobs, format, device, batch_size)

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
    cache: Place = None,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Extracted]:
    """Cache a frozen model's tokens of a data set; what is there already is not computed again.

    Args:
        model: a catalogue name, an id on the hub, or a folder.
        dataset: likewise, or a file; or images of one's own, by `mlfusion.array_dataset`.
        reading: which columns, which kind of labels, how to cut it: see `mlfusion.ReadOptions`.
        splits: names, or a comma-separated list; 'test=validation' takes the validation split for the test.
        layers: 'all' (1..L), 'last', or a list such as '1-4,12'; L is the final norm.
        tokens: kinds, each with layers of its own if need be: 'cls,ap,all@last'.
        format: of shards that are new; what is cached in the other format is reused as it is.
        dtype: in which tokens are kept: float16, bfloat16, float32, or int8 with a scale per token vector.
        device: 'auto', 'cpu', 'cuda', 'mps'. Never part of the key.
        batch_size: images in a forward pass; None: as many as memory allows. Never part of the key.
        making: preprocessing, size of the input, views, type to compute in: parts of the key, each view an entry of its own.
        workers: threads or, on a GPU, processes that decode; 0: as many as there are processors. Never part of the key.
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
        making=making,
    )
    return fill(asked, workers=workers, cache=cache, skip_bad=skip_bad, say=say)


def load(asked: Request) -> Backbone:
    """The model of a request, ready to be read."""
    first = asked.jobs[0]
    return Backbone(asked.checkpoint, asked.device, preprocessing=first.steps, compute=first.spec.model.compute)


def fill(
    asked: Request,
    *,
    workers: int = 0,
    cache: Place = None,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda _: None,
    model: Callable[[Request], Backbone] = load,
) -> list[Extracted]:
    """The same, of words that are resolved already. `model` is called if, and only if, something is to be computed."""
    store = FeatureStore(cache)
    done: list[Extracted] = []
    backbone: Backbone | None = None
    for job in asked.jobs:
        began = time.monotonic()
        entry = store.entry(job.spec)
        work = _Work(job, asked.batch_size, workers, skip_bad, say)
        if entry is None or not asked.pairs <= entry.held():
            backbone = backbone or model(asked)
            backbone.shapes(asked.pairs)  # a token that the model does not have is refused before anything is written
            spec = replace(job.spec, model=replace(job.spec.model, kinds=tuple(backbone.kinds)))
            entry = store.create(spec, job.samples, asked.names)
            with disk.told(store.root, partial(_needed, entry, asked.pairs)):
                fresh = asked.fresh(entry, job.spec, backbone)
                _check_space(entry, _needed(entry, asked.pairs) + sum(stream.nbytes for stream in fresh))
                entry.begin(fresh)
                work.run(entry, backbone, asked.pairs)
                if work.written:
                    entry.record_run(_provenance(entry, work, asked.device, time.monotonic() - began))
        elif entry.path.parent == store.folder:
            with suppress(OSError):  # a cache may be read-only
                Entry.mend(entry.path, job.spec, job.samples)  # what a repair took out
                entry.sweep()  # of one that was killed after its last shard
        entry.use(asked.names)
        done.append(
            Extracted(
                entry=entry,
                layers=asked.layers,
                tokens=asked.kinds,
                images_written=work.written,
                images_reused=len(job.split) - work.written,
                images_skipped=len(entry.skipped()),
                forward_passes=work.passes,
                seconds=time.monotonic() - began,
                view=job.steps.view,
                rate=work.written / max(work.seconds, 1e-9),
                limit=work.limit,
            )
        )
    return done


def _samples(name: str, split: datasets.Split) -> Samples:
    """Read every image's bytes once, for the digests that identify the split. Order never depends on the threads."""
    with (
        track(f"reading {name}/{split.name}", len(split), "images") as bar,
        ThreadPoolExecutor(min(8, loader.processors() + 1)) as pool,
    ):
        digests = bytearray()
        for one in pool.map(split.digest, range(len(split))):
            digests += one
            bar.advance()
    table = np.frombuffer(bytes(digests), np.uint8).reshape(len(split), 16)
    return Samples(split.ids, split.labels, table, split.classes)


def _needed(entry: Entry, pairs: frozenset[Pair]) -> int:
    """Bytes of the shards that are missing of streams that were begun."""
    lacking = gaps(entry, pairs).items()
    return sum(len(stream.rows(n)) * stream.nbytes // stream.images for stream, shards in lacking for n in shards)


def _check_space(entry: Entry, needed: int) -> None:
    """Refuse early what the disk cannot hold."""
    if needed > shutil.disk_usage(entry.path).free:
        raise CacheUnusable(
            f"no space left for the cache: {needed / 1e6:,.3f} MB are needed under {entry.path}, {disk.room(entry.path)}; "
            "free some space (mlfusion cache prune), choose another place with --cache, or ask for fewer --layers or --tokens"
        )


Batch = tuple[range, list[Stream]]
"""Rows that go through the model at once, and the streams that take of them."""


class _Work:
    """The gaps of one entry, and the loop that fills them."""

    def __init__(
        self, job: Job, batch_size: int | None, workers: int, skip_bad: bool, say: Callable[[str], None]
    ) -> None:
        self.job, self.split, self.skip_bad, self.say = job, job.split, skip_bad, say
        self.batch_size, self.workers = batch_size, workers
        self.written = 0
        self.seconds = 0.0  # that the loop ran
        self.forward: Forward | None = None
        self.loaders: list[Loader] = []
        self.writers: list[_Writer] = []

    @property
    def passes(self) -> int:
        """Batches that went through the model."""
        return self.forward.passes if self.forward else 0

    @property
    def waited(self) -> dict[str, float]:
        """Seconds that the loop waited: for pictures, and for tokens to be taken off its hands."""
        return {
            "decoding": sum(loader.waited for loader in self.loaders),
            "writing": sum(writer.held for writer in self.writers),
        }

    @property
    def limit(self) -> str:
        """The part that the others waited for."""
        if not self.written:
            return ""
        waited = self.waited
        part = max(waited, key=lambda name: waited[name])
        return part if waited[part] > SLOW * self.seconds else "the forward pass"

    def run(self, entry: Entry, backbone: Backbone, pairs: frozenset[Pair]) -> None:
        """Compute and publish every missing shard that holds one of `pairs`, or wait for those who do."""
        leases = entry.leases()
        view = "" if self.job.steps.view == "plain" else f", {self.job.steps.view}"
        title = f"{backbone.name} on {entry.spec.data.name}/{self.split.name}{view}"
        waiting = ""
        # ExitStack: whatever ends the loop, drafts that were not published and leases go away.
        with track(title, len(self.split), "images") as bar, ExitStack() as undo:
            undo.callback(leases.release)
            undo.enter_context(pages_kept())
            while True:
                entry.seal()
                lacking = gaps(entry, pairs)
                if not lacking:
                    return
                if self.forward is None:
                    wanted = frozenset(pair for stream in lacking for pair in stream.pairs)
                    self.forward = Forward(backbone, self.job.steps, wanted, self.batch_size)
                before = self.passes
                began = time.monotonic() - self.seconds
                self._fill(entry, self.forward, self._batches(entry, lacking, leases), leases, undo, bar, began)
                if self.passes == before:  # all that is missing is being made by others
                    stream, shards = next(iter(lacking.items()))
                    if waiting != (waiting := leases.holder(entry.lease_name(stream, min(shards)))):
                        self.say(f"the rest of {title} is being extracted by {waiting}; waiting for it")
                    time.sleep(min(WAIT, leases.term / 4))

    def _batches(self, entry: Entry, missing: dict[Stream, set[int]], leases: Leases) -> Iterator[Batch]:
        """The rows to compute, claimed as they are asked for, in order; rows that others are at work on are left out."""
        assert self.forward is not None
        batch = self.forward.batch_size
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
                for at in range(start, stop if takers else start, batch):
                    yield range(at, min(at + batch, stop)), takers

    def _fill(
        self,
        entry: Entry,
        forward: Forward,
        batches: Iterator[Batch],
        leases: Leases,
        undo: ExitStack,
        bar: Bar,
        began: float,
    ) -> None:
        feed = loading(forward, self.split, self.workers, self.skip_bad)
        self.loaders.append(feed)
        # A batch is written while the next one is computed and others are decoded, and a shard is flushed while the next
        # one is filled. Whatever ends the loop, what was complete is published.
        with _Writer(entry, undo) as writer:
            self.writers.append(writer)
            for one in feed(batches):
                writer.put(one, _taken(forward, one))
                leases.renew()
                leases.release(writer.published())
                self.written += len(one.rows)
                self.seconds = time.monotonic() - began
                bar.note = f"limit: {self.limit}"
                bar.to(one.rows.stop)
        leases.release(writer.published())
        self.seconds = time.monotonic() - began


def loading(forward: Forward, split: datasets.Split, workers: int, skip_bad: bool) -> Loader:
    """What decodes for a forward pass: threads beside it, or processes where it is on a GPU and leaves the processors free."""
    on_gpu = forward.backbone.device.type == "cuda"
    return Loader(
        split,
        forward.steps,
        forward.batch_size,
        skip_bad=skip_bad,
        workers=workers,
        processes=on_gpu and loader.forks(),
        pinned=on_gpu,
    )


@dataclass(frozen=True, eq=False)
class _Taken:
    """The streams' parts of one pass, on their way from the device."""

    parts: dict[Stream, torch.Tensor]  # [images, layers, kinds x tokens, width] in the processor's memory
    arrived: Callable[[], None]  # waits until they are there


def _taken(forward: Forward, one: Loaded[list[Stream]]) -> _Taken:
    """Run a batch and set its tokens under way. On a GPU nothing waits for it here: the next batch can be queued at once."""
    tokens = forward(one.pictures, frozenset(pair for stream in one.what for pair in stream.pairs))
    parts = {stream: _assemble(tokens, stream) for stream in one.what}
    if forward.backbone.device.type != "cuda":
        return _Taken({stream: part.cpu() for stream, part in parts.items()}, lambda: None)
    there = {
        stream: torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
        for stream, part in parts.items()
    }
    event = torch.cuda.Event()
    event.record()
    one.free = forward.copied  # the buffer is read until then; the pass itself goes on
    return _Taken(there, event.synchronize)


class _Writer:
    """Two threads behind the loop: one fills shards, one flushes and names them. What waits for them is bounded."""

    def __init__(self, entry: Entry, undo: ExitStack) -> None:
        self._entry, self._undo = entry, undo
        self._drafts: dict[Stream, ShardDraft] = {}
        self._filling, self._publishing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._queue: deque[Future[None]] = deque()
        self._published: deque[tuple[str, Future[bool]]] = deque()
        self._failed = False
        self.busy = 0.0  # seconds of filling, and waiting for a flush
        self.awaited = 0.0  # seconds that tokens were waited for, which the device was at work on
        self.held = 0.0  # seconds that the loop was held up because writing was behind

    def put(self, one: Loaded[list[Stream]], taken: _Taken) -> None:
        """A batch's tokens, in the order of rows. Raises what went wrong with an earlier one."""
        self._queue.append(self._filling.submit(self._fill, one.rows, taken, one.unread))
        began, awaited = time.perf_counter(), self.awaited
        self._settle(QUEUED)
        self.held += max(0.0, time.perf_counter() - began - (self.awaited - awaited))

    def published(self) -> list[str]:
        """The leases of shards that are there now."""
        names = []
        while self._published and self._published[0][1].done():
            name, future = self._published.popleft()
            future.result()
            names.append(name)
        return names

    def _settle(self, most: int) -> None:
        while len(self._queue) > most:
            self._queue.popleft().result()

    def _fill(self, rows: range, taken: _Taken, unread: dict[int, str]) -> None:
        if self._failed:
            return  # a draft lacks rows of a batch before this one, and must not be given others in their place
        self._failed = True
        began = time.perf_counter()
        taken.arrived()
        arrived = time.perf_counter()
        self.awaited += arrived - began
        for stream, part in taken.parts.items():
            shard = rows.start // stream.shard_rows
            if stream not in self._drafts:
                self._drafts[stream] = self._undo.enter_context(self._entry.draft(stream, shard))
            assert self._drafts[stream].row == rows.start
            self._drafts[stream].append(part.numpy(), unread)
            if rows.stop % stream.shard_rows == 0 or rows.stop == stream.images:
                future = self._publishing.submit(self._drafts.pop(stream).publish)
                if self._published:  # no more than one shard that is flushed and one that is filled
                    self._published[-1][1].exception()
                self._published.append((self._entry.lease_name(stream, shard), future))
        self._failed = False
        self.busy += time.perf_counter() - arrived

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self._settle(0)
        except BaseException:
            if kind is None:  # else what ended the loop is what matters
                raise
        finally:
            self._filling.shutdown()
            self._publishing.shutdown()
        if kind is None:
            for _, future in self._published:
                future.result()


def gaps(entry: Entry, pairs: frozenset[Pair]) -> dict[Stream, set[int]]:
    """Missing shards of the streams that hold a wanted pair; the same streams in the same order for every worker."""
    wanted = pairs - entry.held()
    return {
        stream: missing
        for stream in entry.streams()
        if stream.pairs & wanted and (missing := set(entry.missing_shards(stream)))
    }


def _assemble(tokens: dict[Pair, torch.Tensor], stream: Stream) -> torch.Tensor:
    """A stream's part of a pass: [images, layers, kinds x tokens, width], in float32, or in float16 if it is kept so."""
    layers = [torch.cat([tokens[layer, kind] for kind in stream.kinds], 1) for layer in stream.layers]
    return torch.stack(layers, 1).to(torch.float16 if stream.dtype == "float16" else torch.float32)


def _provenance(entry: Entry, work: _Work, device: str, seconds: float) -> dict[str, Any]:
    """What a run was: versions, device, rates. Never part of the key."""
    forward = work.forward
    assert forward is not None
    libraries = ["mlfusion", "torch", "transformers", "numpy", "pillow", "zarr", "h5py", "simplejpeg"]
    versions = {"python": platform.python_version()}
    for name in libraries:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    decoding = sum(each.busy for each in work.loaders)
    filling = sum(each.busy for each in work.writers)
    running = forward.seconds + sum(each.awaited for each in work.writers)
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "device": device,
        "device_name": device_name(device),
        "processors": loader.processors(),
        "threads": torch.get_num_threads(),
        "compute": entry.spec.model.compute,
        "dtype": entry.spec.dtype,
        "batch_size": forward.batch_size,
        "out_of_memory": forward.shrunk,
        "images": work.written,
        "forward_passes": forward.passes,
        "seconds": round(seconds, 3),
        "images_per_second": round(work.written / max(work.seconds, 1e-9), 2),
        "limit": work.limit,
        "waited": {name: round(value, 3) for name, value in work.waited.items()},
        "parts": {  # seconds of work, and images a second of one worker, of the device, of the writer
            name: {"seconds": round(each, 3), "images_per_second": round(work.written / max(each, 1e-9), 2)}
            for name, each in (("decoding", decoding), ("forward", running), ("writing", filling))
        },
        "streams": [stream.name for stream in entry.streams()],
        "layers": layer_ranges(layer for stream in entry.streams() for layer in stream.layers),
    }
