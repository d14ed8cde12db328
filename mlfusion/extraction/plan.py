"""Plans an extraction: the entries it would use, and the estimated size and duration of filling them."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mlfusion import datasets
from mlfusion.errors import BadOption
from mlfusion.extraction.forward import MAX_BATCH_SIZES, Forward
from mlfusion.extraction.request import Job, Request
from mlfusion.extraction.run import BOTTLENECK_SHARE, load, loading
from mlfusion.extraction.transfers import nothing
from mlfusion.models.backbone import Backbone
from mlfusion.specs.identity import Pair
from mlfusion.specs.options import ComputeOptions, FeatureOptions
from mlfusion.store import CachePath, Entry, FeatureStore, Missing, missing_bytes
from mlfusion.system import disk
from mlfusion.system.devices import failures

TRIAL_SECONDS = 5.0  # duration of the measurement, after a first batch that does not count
FILES = {"entry": 7, "stream": 2, "shard": 2}  # number of files in each; Zarr adds one that describes the stream


@dataclass(frozen=True, kw_only=True)
class PlannedSplit:
    """The estimated cost of the extraction of one split."""

    split: str
    view: str
    key: str
    images: int
    images_to_run: int
    bytes_held: int
    bytes_to_write: int
    files_to_write: int
    forward_passes: int
    forward_passes_saved: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The estimated cost of an extraction, by arithmetic and a short measured trial."""

    model: str
    dataset: str
    splits: tuple[PlannedSplit, ...]
    free_bytes: int
    images_per_second: float | None  # None if there are no images to run
    trial_seconds: float
    limit: str = ""  # the part that the others waited for in the trial: 'decoding' or 'the forward pass'

    @property
    def bytes_to_write(self) -> int:
        """Bytes to write for all splits."""
        return sum(split.bytes_to_write for split in self.splits)

    @property
    def seconds(self) -> float:
        """Estimated duration of the forward passes."""
        images = sum(split.images_to_run for split in self.splits)
        return images / self.images_per_second if self.images_per_second else 0.0

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion plan --json` prints."""
        return asdict(self) | {
            "bytes_to_write": self.bytes_to_write,
            "fits": self.bytes_to_write <= self.free_bytes,
            "images_per_second": self.images_per_second and round(self.images_per_second, 2),
            "seconds": round(self.seconds, 1),
            "trial_seconds": round(self.trial_seconds, 1),
        }


def plan(
    model: str,
    dataset: str | datasets.DataSet,
    features: FeatureOptions = FeatureOptions(),
    compute: ComputeOptions = ComputeOptions(),
    *,
    cache: CachePath = None,
    trial: float = TRIAL_SECONDS,
) -> Plan:
    """Estimate what `extract` with the same options would write and how long it would take. Writes nothing.

    `trial` is the duration in seconds of the measurement of the rate; other arguments and errors are those of `extract`.
    """
    if not 0 <= trial < math.inf:
        raise BadOption(f"--trial {trial}: allowed is a number of seconds from 0, such as 5")
    request = Request.of(model, dataset, features, compute)
    with failures(request.compute.device, request.names.model):
        return estimate(request, cache=cache, trial=trial)


def estimate(
    request: Request,
    *,
    cache: CachePath = None,
    trial: float | None = TRIAL_SECONDS,
    model: Callable[[Request], Backbone] = load,
) -> Plan:
    """The same as `plan` for a resolved request; without a trial the time is not estimated."""
    store = FeatureStore(cache)
    planned: list[PlannedSplit] = []
    backbone: Backbone | None = None
    trial_run: _Trial | None = None
    batch = request.compute.batch_size or MAX_BATCH_SIZES["cpu"]
    for job in request.jobs:
        entry = store.entry(job.spec)
        missing: Missing = {}
        if entry is None or not request.pairs <= entry.complete_pairs():
            backbone = backbone or model(request)
            missing = store.missing(job.spec, backbone.shapes(request.pairs), request.compute.format)
            if trial_run is None and trial is not None:
                pairs = frozenset(pair for stream in missing for pair in stream.pairs)
                forward = Forward(backbone, job.steps, pairs, request.compute.batch_size)
                trial_run = _try(forward, job.split, pairs, request.compute, trial)
                batch = forward.batch_size
        planned.append(_planned(job, entry, missing, batch))
    return Plan(
        model=request.names.model,
        dataset=request.names.dataset,
        splits=tuple(planned),
        free_bytes=disk.free_bytes(store.root),
        images_per_second=trial_run.rate if trial_run else None,
        trial_seconds=trial_run.seconds if trial_run else 0.0,
        limit=trial_run.limit if trial_run else "",
    )


def _planned(job: Job, entry: Entry | None, missing: Missing, batch_size: int) -> PlannedSplit:
    count = job.spec.data.images
    images = np.zeros(count, bool)
    files = 0 if entry else FILES["entry"]
    for stream, shards in missing.items():
        files += FILES["shard"] * len(shards)
        if len(shards) == stream.shards:  # the whole stream is missing
            files += FILES["stream"] + (stream.format == "zarr")
        for shard in shards:
            rows = stream.rows(shard)
            images[rows.start : rows.stop] = True
    # A batch never crosses the end of a shard.
    streams = missing or (entry.streams() if entry else [])
    step = min((stream.shard_rows for stream in streams), default=count)
    steps = [range(at, min(at + step, count)) for at in range(0, count, step)]
    batches = [-(-len(rows) // batch_size) for rows in steps]
    passes = sum(count for count, rows in zip(batches, steps, strict=True) if images[rows.start])
    return PlannedSplit(
        split=job.split.name,
        view=job.steps.view,
        key=job.spec.key,
        images=count,
        images_to_run=int(images.sum()),
        bytes_held=entry.size() if entry else 0,
        bytes_to_write=missing_bytes(missing),
        files_to_write=files,
        forward_passes=passes,
        forward_passes_saved=sum(batches) - passes,
    )


@dataclass(frozen=True)
class _Trial:
    """A measurement of the rate of an extraction."""

    rate: float  # images per second
    seconds: float  # duration of the measurement
    limit: str


def _try(
    forward: Forward, split: datasets.Split, pairs: frozenset[Pair], compute: ComputeOptions, seconds: float
) -> _Trial:
    """Measure: decode, compute and copy back as an extraction does, but write nothing. A short data set is repeated."""

    def rounds() -> Iterator[tuple[range, None]]:
        while True:
            for at in range(0, len(split), forward.batch_size):
                yield range(at, min(at + forward.batch_size, len(split))), None

    images, start, waited = 0, 0.0, 0.0
    feed, before = loading(forward, split, replace(compute, skip_bad=True)), nothing
    for batch in feed(rounds()):
        pieces = forward.pieces(batch.pictures, pairs, lambda tokens: list(tokens.values()))
        batch.free = forward.wait_for_copy
        _copied, arrived = forward.transfers.fetch([values for piece in pieces for values in piece])
        before()  # the next batch is computed while this one is copied back
        before = arrived
        if not start:
            arrived()
            start, waited = time.monotonic(), feed.waited
            continue
        images += len(batch.rows)
        if time.monotonic() - start >= seconds:
            break
    before()  # a device computes on after the call has returned
    elapsed = time.monotonic() - start
    decoding = feed.waited - waited > BOTTLENECK_SHARE * elapsed
    return _Trial(images / elapsed, elapsed, "decoding" if decoding else "the forward pass")
