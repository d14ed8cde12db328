"""Explains why an extraction would not reuse what the cache holds."""

import json
from dataclasses import dataclass
from typing import Any

from mlfusion import datasets
from mlfusion.extraction.request import Request
from mlfusion.specs.identity import FeatureSpec, Pair
from mlfusion.specs.names import token_words
from mlfusion.specs.options import ComputeOptions, FeatureOptions
from mlfusion.store import CachePath, Entry, FeatureStore, Samples, differences

NAMED = 3  # number of images named in a difference


@dataclass(frozen=True, kw_only=True)
class Explained:
    """The entry of one split; if there is none, the nearest entry and its differences."""

    split: str
    key: str
    entry: Entry | None
    lacking: frozenset[Pair]
    nearest: Entry | None
    differences: tuple[tuple[str, str, str], ...]  # (field, requested value, value in the nearest entry)

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
                {"field": name, "asked": requested, "nearest": cached} for name, requested, cached in self.differences
            ],
        }


def explain(
    model: str,
    dataset: str | datasets.DataSet,
    features: FeatureOptions = FeatureOptions(),
    compute: ComputeOptions = ComputeOptions(),
    *,
    cache: CachePath = None,
) -> list[Explained]:
    """For each split, find the entry that `extract` with the same arguments would use; errors as in `extract`."""
    request = Request.of(model, dataset, features, compute)
    store = FeatureStore(cache)
    others = list(store.entries())
    explained = []
    for job in request.jobs:
        entry = store.entry(job.spec)
        nearest = None if entry else _nearest(job.spec, others)
        explained.append(
            Explained(
                split=job.split.name,
                key=job.spec.key,
                entry=entry,
                lacking=request.pairs - (entry.complete_pairs() if entry else frozenset()),
                nearest=nearest,
                differences=tuple(_difference_texts(job.spec, job.samples, nearest)) if nearest else (),
            )
        )
    return explained


def _nearest(spec: FeatureSpec, entries: list[Entry]) -> Entry | None:
    """The entry of the same split with the fewest differing fields; the last used one of several."""
    same = [entry for entry in entries if entry.spec.data.split == spec.data.split] or entries
    return min(same, key=lambda entry: (len(differences(spec, entry.spec)), -entry.read_at()), default=None)


def _difference_texts(spec: FeatureSpec, samples: Samples, nearest: Entry) -> list[tuple[str, str, str]]:
    texts = []
    for name, requested, cached in differences(spec, nearest.spec):
        if name == "model.preprocess":
            texts += _settings(str(requested), str(cached))
        elif name == "data.content":
            texts.append((name, _images(samples, nearest.samples), ""))
        elif name == "model.weights":
            ours = f"{str(requested)[:16]}… ({spec.model.name})"
            theirs = f"{str(cached)[:16]}… ({nearest.spec.model.name})"
            texts.append((f"{name} (sha256)", ours, theirs))
        else:
            texts.append((name, _short(requested), _short(cached)))
    return texts


def _settings(requested: str, cached: str) -> list[tuple[str, str, str]]:
    """Settings of the image processor that differ."""
    one, other = json.loads(requested), json.loads(cached)
    return [
        (f"model.preprocess.{name}", json.dumps(one.get(name)), json.dumps(other.get(name)))
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name)
    ]


def _images(requested: Samples, cached: Samples) -> str:
    """The differences between the images, as text."""
    if cached.former:
        return "its images are identified by xxh3-128, as in earlier versions; they are extracted again"
    ours, theirs = (
        {name: (d.tobytes(), label.tolist()) for name, d, label in zip(s.ids, s.digests, s.labels, strict=True)}
        for s in (requested, cached)
    )
    both = [name for name in ours if name in theirs]
    changes = {
        "new": [name for name in ours if name not in theirs],
        "gone": [name for name in theirs if name not in ours],
        "with other bytes": [name for name in both if ours[name][0] != theirs[name][0]],
        "with another label": [name for name in both if ours[name][1] != theirs[name][1]],
    }
    texts = [
        f"{len(names):,} {what} ({', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''})"
        for what, names in changes.items()
        if names
    ]
    return "; ".join(texts) or "the same images in another order"


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
