"""What an extraction would find and do, before it does it: which entry it means, why it misses, and what filling it costs."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlfusion import datasets
from mlfusion.extraction import Job, Making, Request, gaps, load, loading
from mlfusion.forward import BATCHES, Forward
from mlfusion.models.backbone import Backbone
from mlfusion.specs import Dtype, FeatureSpec, Pair, token_words
from mlfusion.store import Entry, FeatureStore, FormatName, Place, Samples, Stream, differences

TRIAL_SECONDS = 5.0  # measured for, after a batch that does not count
FILES = {"entry": 7, "stream": 3, "shard": 2}
NAMED = 3  # images that a difference names


@dataclass(frozen=True, kw_only=True)
class Explained:
    """Which entry the words mean, and where there is none, what sets the nearest one apart."""

    split: str
    key: str
    entry: Entry | None
    lacking: frozenset[Pair]
    nearest: Entry | None
    differences: tuple[tuple[str, str, str], ...]  # field, as asked for, as in the nearest entry

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache explain --json` prints."""
        return {
            "split": self.split,
            "key": self.key,
            "state": "absent" if self.entry is None else "partial" if self.lacking else "whole",
            "path": str(self.entry.path) if self.entry else None,
            "lacking": token_words(self.lacking),
            "nearest": self.nearest.key if self.nearest else None,
            "differences": [
                {"field": name, "asked": asked, "nearest": there} for name, asked, there in self.differences
            ],
        }


def explain(
    model: str,
    dataset: str | datasets.DataSet,
    *,
    reading: datasets.ReadOptions | None = None,
    splits: Sequence[str] | str = ("train", "test"),
    layers: str = "all",
    tokens: str = "cls,ap",
    dtype: Dtype = "float16",
    device: str = "auto",
    making: Making | None = None,
    cache: Place = None,
) -> list[Explained]:
    """Say of each split which entry `extract` with the same words would use. Arguments and errors as in `extract`."""
    asked = Request.of(
        model,
        dataset,
        reading=reading,
        splits=splits,
        layers=layers,
        tokens=tokens,
        format="zarr",
        dtype=dtype,
        device=device,
        batch_size=1,
        making=making,
    )
    store = FeatureStore(cache)
    others = list(store.entries())
    explained = []
    for job in asked.jobs:
        spec = job.spec
        entry = store.entry(spec)
        near = None if entry else _nearest(spec, others)
        explained.append(
            Explained(
                split=job.split.name,
                key=spec.key,
                entry=entry,
                lacking=asked.pairs - (entry.held() if entry else frozenset()),
                nearest=near,
                differences=tuple(_told(spec, job.samples, near)) if near else (),
            )
        )
    return explained


def _nearest(spec: FeatureSpec, entries: list[Entry]) -> Entry | None:
    """Of the same split, the entry with the fewest differing fields; of two, the one used last."""
    same = [entry for entry in entries if entry.spec.data.split == spec.data.split] or entries
    return min(same, key=lambda entry: (len(differences(spec, entry.spec)), -entry.used), default=None)


def _told(spec: FeatureSpec, samples: Samples, near: Entry) -> list[tuple[str, str, str]]:
    said = []
    for name, asked, there in differences(spec, near.spec):
        if name == "model.preprocess":
            said += _settings(str(asked), str(there))
        elif name == "data.content":
            said.append((name, _images(samples, near.samples), ""))
        elif name == "model.weights":
            said.append(
                (
                    f"{name} (sha256)",
                    f"{str(asked)[:16]}… ({spec.model.name})",
                    f"{str(there)[:16]}… ({near.spec.model.name})",
                )
            )
        else:
            said.append((name, _short(asked), _short(there)))
    return said


def _settings(asked: str, there: str) -> list[tuple[str, str, str]]:
    """Which of a processor's settings differ."""
    one, other = json.loads(asked), json.loads(there)
    return [
        (f"model.preprocess.{name}", json.dumps(one.get(name)), json.dumps(other.get(name)))
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name)
    ]


def _images(one: Samples, other: Samples) -> str:
    """What happened to the images, in words."""
    mine, its = (
        {name: (d.tobytes(), label.tolist()) for name, d, label in zip(it.ids, it.digests, it.labels, strict=True)}
        for it in (one, other)
    )
    both = [name for name in mine if name in its]
    changes = {
        "new": [name for name in mine if name not in its],
        "gone": [name for name in its if name not in mine],
        "with other bytes": [name for name in both if mine[name][0] != its[name][0]],
        "with another label": [name for name in both if mine[name][1] != its[name][1]],
    }
    said = [
        f"{len(names):,} {what} ({', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''})"
        for what, names in changes.items()
        if names
    ]
    return "; ".join(said) or "the same images in another order"


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


@dataclass(frozen=True, kw_only=True)
class PlannedSplit:
    """What one split would take."""

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
    """What an extraction would take, by arithmetic and a short measured trial."""

    model: str
    dataset: str
    splits: tuple[PlannedSplit, ...]
    free_bytes: int
    images_per_second: float | None  # None where nothing is to be run
    trial_seconds: float

    @property
    def bytes_to_write(self) -> int:
        """In all."""
        return sum(split.bytes_to_write for split in self.splits)

    @property
    def seconds(self) -> float:
        """That the forward passes would take, by the trial."""
        images = sum(split.images_to_run for split in self.splits)
        return images / self.images_per_second if self.images_per_second else 0.0

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion plan --json` prints."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "splits": [vars(split) for split in self.splits],
            "bytes_to_write": self.bytes_to_write,
            "free_bytes": self.free_bytes,
            "fits": self.bytes_to_write <= self.free_bytes,
            "images_per_second": self.images_per_second and round(self.images_per_second, 2),
            "seconds": round(self.seconds, 1),
            "trial_seconds": round(self.trial_seconds, 1),
        }


def plan(
    model: str,
    dataset: str | datasets.DataSet,
    *,
    reading: datasets.ReadOptions | None = None,
    splits: Sequence[str] | str = ("train", "test"),
    layers: str = "all",
    tokens: str = "cls,ap",
    format: FormatName = "zarr",
    dtype: Dtype = "float16",
    device: str = "auto",
    batch_size: int | None = None,
    making: Making | None = None,
    workers: int = 0,
    cache: Place = None,
    trial: float = TRIAL_SECONDS,
) -> Plan:
    """Say what `extract` with the same words would write and how long it would take. Writes nothing.

    `trial` is for how many seconds images are prepared and run through the model to find the rate; other arguments and
    errors as in `extract`.
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
    return estimate(asked, cache=cache, trial=trial, workers=workers)


def estimate(
    asked: Request,
    *,
    cache: Place = None,
    trial: float | None = TRIAL_SECONDS,
    workers: int = 0,
    model: Callable[[Request], Backbone] = load,
) -> Plan:
    """The same, of words that are resolved already; without a trial the time is not told."""
    store = FeatureStore(cache)
    planned: list[PlannedSplit] = []
    backbone: Backbone | None = None
    rate, spent = None, 0.0
    batch = asked.batch_size or BATCHES["cpu"]
    for job in asked.jobs:
        entry = store.entry(job.spec)
        todo: dict[Stream, set[int]] = {}
        if entry is None or not asked.pairs <= entry.held():
            backbone = backbone or model(asked)
            todo = gaps(entry, asked.pairs) if entry else {}
            todo |= {stream: set(range(stream.shards)) for stream in asked.fresh(entry, job.spec, backbone)}
            if rate is None and trial is not None:
                wanted = frozenset(pair for stream in todo for pair in stream.pairs)
                forward = Forward(backbone, job.steps, wanted, asked.batch_size)
                rate, spent = _trial(forward, job.split, wanted, workers, trial)
                batch = forward.batch_size
        planned.append(_planned(job, entry, todo, batch))
    return Plan(
        model=asked.names.model,
        dataset=asked.names.dataset,
        splits=tuple(planned),
        free_bytes=free_bytes(store),
        images_per_second=rate,
        trial_seconds=spent,
    )


def free_bytes(store: FeatureStore) -> int:
    """Of the disk that the cache lies on, or will."""
    root = store.root
    while not root.exists():
        root = root.absolute().parent
    return shutil.disk_usage(root).free


def _planned(job: Job, entry: Entry | None, todo: dict[Stream, set[int]], batch_size: int) -> PlannedSplit:
    spec = job.spec
    images = np.zeros(spec.data.images, bool)
    nbytes, files = 0, 0 if entry else FILES["entry"]
    for stream, shards in todo.items():
        files += FILES["shard"] * len(shards) + (FILES["stream"] if len(shards) == stream.shards else 0)
        for shard in shards:
            rows = stream.rows(shard)
            images[rows.start : rows.stop] = True
            nbytes += len(rows) * (stream.nbytes // stream.images)
    # No batch reaches over the end of a shard.
    cut = todo or (entry.streams() if entry else [])
    step = min((stream.shard_rows for stream in cut), default=spec.data.images)
    steps = [range(at, min(at + step, spec.data.images)) for at in range(0, spec.data.images, step)]
    batches = [-(-len(rows) // batch_size) for rows in steps]
    passes = sum(count for count, rows in zip(batches, steps, strict=True) if images[rows.start])
    return PlannedSplit(
        split=job.split.name,
        view=job.steps.view,
        key=spec.key,
        images=spec.data.images,
        images_to_run=int(images.sum()),
        bytes_held=entry.size() if entry else 0,
        bytes_to_write=nbytes,
        files_to_write=files,
        forward_passes=passes,
        forward_passes_saved=sum(batches) - passes,
    )


def _trial(
    forward: Forward, split: datasets.Split, wanted: frozenset[Pair], workers: int, seconds: float
) -> tuple[float, float]:
    """Images a second, decoded and run; and for how long that was measured. A data set that is short is gone through again."""

    def rounds() -> Iterator[tuple[range, None]]:
        while True:
            for at in range(0, len(split), forward.batch_size):
                yield range(at, min(at + forward.batch_size, len(split))), None

    images, start = 0, 0.0
    for one in loading(forward, split, workers, skip_bad=True)(rounds()):
        for tokens in forward(one.pictures, wanted).values():
            tokens.cpu()
        if not start:
            start = time.monotonic()
            continue
        images += len(one.rows)
        if (spent := time.monotonic() - start) >= seconds:
            break
    return images / spent, spent
