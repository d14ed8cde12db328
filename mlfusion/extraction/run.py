"""Stage 1: fills the gaps of the cache. Every image passes through the model at most once for all missing tokens together.

A block of rows is run if any stream lacks the shard of these rows. The pass ends at the deepest missing layer, and gives the
tokens of every incomplete stream.
"""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from typing import Any

import torch

from mlfusion import datasets, models
from mlfusion.errors import BadModel
from mlfusion.extraction import loader
from mlfusion.extraction.forward import Forward
from mlfusion.extraction.loader import Loader
from mlfusion.extraction.request import Job, Request
from mlfusion.extraction.writer import Batch, Writer, run_batch
from mlfusion.models.backbone import Backbone
from mlfusion.specs.definitions import command
from mlfusion.specs.identity import TokenKind
from mlfusion.specs.names import layer_ranges
from mlfusion.specs.options import ComputeOptions, FeatureOptions
from mlfusion.specs.splits import split_word
from mlfusion.store import CachePath, Entry, FeatureStore, Gap, Piece, RunPart, RunRecord
from mlfusion.system.devices import device_name, failures, processor_count
from mlfusion.system.display import Displayed
from mlfusion.system.progress import Bar, track
from mlfusion.system.words import plural

BOTTLENECK_SHARE = 0.1  # the forward pass waits for the bottleneck for more than this share of the time


@dataclass(frozen=True, kw_only=True, repr=False)
class ExtractionResult(Displayed):
    """The result of the extraction of one split."""

    entry: Entry
    layers: tuple[int, ...]  # requested
    tokens: tuple[TokenKind, ...]  # requested
    images_written: int
    images_reused: int
    images_skipped: int
    forward_passes: int  # number of batches that went through the model
    seconds: float
    view: str = "plain"
    rate: float = 0.0  # images per second
    bottleneck: str = ""  # the part that was waited for: 'decoding', 'the forward pass' or 'writing'

    def summary(self) -> str:
        spec = self.entry.spec
        view = "" if self.view == "plain" else f", {self.view}"
        return (
            f"{spec.model.name} on {spec.data.name}/{spec.data.split}{view}: {'+'.join(self.tokens)} at layers "
            f"{layer_ranges(self.layers)}, {plural(self.images_written, 'image')} written, {self.images_reused:,} reused, "
            f"{self.images_skipped:,} skipped; entry {self.entry.key}"
        )

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


def extract(
    model: str,
    dataset: str | datasets.DataSet,
    features: FeatureOptions = FeatureOptions(),
    compute: ComputeOptions = ComputeOptions(),
    *,
    cache: CachePath = None,
    log: Callable[[str], None] = lambda _: None,
) -> list[ExtractionResult]:
    """Cache a frozen model's tokens of a data set; arguments and errors as in `mlfusion.extract`."""
    request = Request.of(model, dataset, features, compute)
    if features.splits is None and any(split_word(job.split.name) == "validation" for job in request.jobs):
        log(
            "read are train, test and validation, on which probes choose their configuration; to leave validation out, so "
            "that a fifth of train chooses: --split train,test"
        )
    return fill(request, cache=cache, log=log)


def next_command(results: list[ExtractionResult], cache: str | None = None) -> str:
    """The command that uses what was extracted; empty if train or test is still to be extracted."""
    splits = {result.entry.spec.data.split for result in results}
    if splits >= {"train", "test"}:
        return command("probe", dataset=results[0].entry.spec.data.name, cache=cache)
    if splits == {datasets.WHOLE}:
        spec = results[0].entry.spec
        return command(
            "cache embeddings", ["embeddings.parquet"], model=spec.model.name, dataset=spec.data.name, cache=cache
        )
    return ""


def load(request: Request) -> Backbone:
    """Load the model of a request; raises BadModel if its weights have changed since the request was resolved."""
    first = request.jobs[0]
    backbone = Backbone(
        request.checkpoint, request.compute.device, preprocessing=first.steps, compute=first.spec.model.compute
    )
    if models.sha256(models.weight_files(request.checkpoint.folder)) != first.spec.model.weights:
        raise BadModel(f"the weights of {request.checkpoint.name} changed while they were read; run the command again")
    return backbone


def fill(
    request: Request,
    *,
    cache: CachePath = None,
    log: Callable[[str], None] = lambda _: None,
    model: Callable[[Request], Backbone] = load,
) -> list[ExtractionResult]:
    """The same as `extract` for a resolved request. `model` is called if, and only if, something has to be computed."""
    with failures(request.compute.device, request.names.model):
        results = _fill(request, FeatureStore(cache), log, model)
    for line in _shared_images(request.jobs):
        log(line)
    return results


def _fill(
    request: Request, store: FeatureStore, log: Callable[[str], None], model: Callable[[Request], Backbone]
) -> list[ExtractionResult]:
    results: list[ExtractionResult] = []
    backbone: Backbone | None = None
    for job in request.jobs:
        start = time.monotonic()
        work = _FillLoop(job, request.compute)
        if request.pairs <= store.complete_pairs(job.spec):
            entry = store.reuse(job.spec, job.samples, job.names)
        else:
            backbone = backbone or model(request)
            shapes = backbone.shapes(request.pairs)  # raises before anything is written if the model lacks a token
            spec = replace(job.spec, model=replace(job.spec.model, kinds=tuple(backbone.kinds)))
            filling = store.filling(spec, job.samples, job.names, shapes, format=request.compute.format, log=log)
            with filling as gap:
                work.run(gap, backbone)
                if work.written:
                    gap.entry.record_run(_provenance(gap.entry, work, time.monotonic() - start))
            entry = gap.entry
        results.append(
            ExtractionResult(
                entry=entry,
                layers=request.layers,
                tokens=request.kinds,
                images_written=work.written,
                images_reused=len(job.split) - work.written,
                images_skipped=len(entry.skipped()),
                forward_passes=work.forward.passes if work.forward else 0,
                seconds=time.monotonic() - start,
                view=job.steps.view,
                rate=work.rate,
                bottleneck=work.bottleneck,
            )
        )
    return results


def _shared_images(jobs: Sequence[Job]) -> Iterator[str]:
    """A sentence for each two splits that have images with equal bytes."""
    splits = {job.split.name: job for job in jobs}
    for (name, job), (other, other_job) in combinations(splits.items(), 2):
        digests = {row.tobytes() for row in job.samples.digests}
        count = sum(row.tobytes() in digests for row in other_job.samples.digests)
        if count:
            remedy = "mlfusion probe --drop-duplicates leaves such images out of train"
            if {name, other} != {"train", "test"}:  # that option compares train with test alone
                remedy = "remove them from one of the two: no option of mlfusion probe leaves them out"
            images = f"{count:,} of {len(other_job.split):,} {other} images of {job.names.dataset}"
            yield f"{images} are byte for byte in {name} too; {remedy}"


class _FillLoop:
    """The loop that fills the gaps of one entry, and its measurements."""

    def __init__(self, job: Job, compute: ComputeOptions) -> None:
        self.job, self.split, self.compute = job, job.split, compute
        self.written = 0  # number of images
        self.seconds = 0.0  # duration of the loop
        self.forward: Forward | None = None
        self.loaders: list[Loader] = []
        self.writers: list[Writer] = []

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.written / max(self.seconds, 1e-9)

    @property
    def waited(self) -> dict[str, float]:
        """Seconds that the loop waited for images, and for the writer."""
        return {
            "decoding": sum(loader.waited for loader in self.loaders),
            "writing": sum(writer.blocked for writer in self.writers),
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
        """Compute and publish every missing shard, or wait for another extractor that computes it."""
        with track(gap.title, len(self.split), "images") as bar:
            for pieces in gap.rounds():
                if self.forward is None:
                    self.forward = Forward(backbone, self.job.steps, gap.pairs, self.compute.batch_size)
                self._fill(gap, self.forward, pieces, bar)

    def _fill(self, gap: Gap, forward: Forward, pieces: Iterator[Piece], bar: Bar) -> None:
        start = time.monotonic() - self.seconds
        feed = loading(forward, self.split, self.compute)
        self.loaders.append(feed)
        # Decoding, computing, writing and flushing overlap. Complete shards are published however the loop ends.
        with Writer(gap) as writer:
            self.writers.append(writer)
            for batch in feed(_batches(pieces, forward.batch_size)):
                writer.put(batch, run_batch(forward, batch))
                gap.renew()
                self.written += len(batch.rows)
                self.seconds = time.monotonic() - start
                bar.note = f"limit: {self.bottleneck}"
                bar.to(batch.rows.stop)
        self.seconds = time.monotonic() - start


def _batches(pieces: Iterator[Piece], size: int) -> Iterator[Batch]:
    """Cut pieces into batches."""
    for rows, streams in pieces:
        for at in range(rows.start, rows.stop, size):
            yield range(at, min(at + size, rows.stop)), streams


def loading(forward: Forward, split: datasets.Split, compute: ComputeOptions) -> Loader:
    """The loader for a forward pass: with threads on a CPU, with processes on a GPU."""
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


def _provenance(entry: Entry, work: _FillLoop, seconds: float) -> RunRecord:
    """The record of a run: versions, device, rates. It is not part of the key."""
    forward, device = work.forward, work.compute.device
    assert forward is not None
    libraries = ["mlfusion", "torch", "transformers", "numpy", "pillow", "zarr", "h5py", "simplejpeg"]
    versions = {"python": platform.python_version()}
    for name in libraries:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    parts = {  # seconds of work of each part
        "decoding": sum(part.busy for part in work.loaders),
        "forward": forward.seconds + sum(part.awaited for part in work.writers),
        "writing": sum(part.busy for part in work.writers),
    }
    return RunRecord(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions,
        device=device,
        device_name=device_name(device),
        processors=processor_count(),
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
            name: RunPart(seconds=round(part, 3), images_per_second=round(work.written / max(part, 1e-9), 2))
            for name, part in parts.items()
        },
        streams=tuple(stream.name for stream in entry.streams()),
        layers=layer_ranges(layer for stream in entry.streams() for layer in stream.layers),
    )
