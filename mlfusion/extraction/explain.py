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

NAMED = 3  # images that a difference names


@dataclass(frozen=True, kw_only=True)
class Explained:
    """The entry of one split; or, where there is none, how the nearest entry differs."""

    split: str
    key: str
    entry: Entry | None
    lacking: frozenset[Pair]
    nearest: Entry | None
    differences: tuple[tuple[str, str, str], ...]  # (field, value asked for, value in the nearest entry)

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
    features: FeatureOptions = FeatureOptions(),
    compute: ComputeOptions = ComputeOptions(),
    *,
    cache: CachePath = None,
) -> list[Explained]:
    """Say for each split which entry `extract` with the same arguments would use; errors as in `extract`."""
    asked = Request.of(model, dataset, features, compute)
    store = FeatureStore(cache)
    others = list(store.entries())
    explained = []
    for job in asked.jobs:
        entry = store.entry(job.spec)
        near = None if entry else _nearest(job.spec, others)
        explained.append(
            Explained(
                split=job.split.name,
                key=job.spec.key,
                entry=entry,
                lacking=asked.pairs - (entry.complete_pairs() if entry else frozenset()),
                nearest=near,
                differences=tuple(_difference_texts(job.spec, job.samples, near)) if near else (),
            )
        )
    return explained


def _nearest(spec: FeatureSpec, entries: list[Entry]) -> Entry | None:
    """The entry of the same split with the fewest differing fields; of two, the one used last."""
    same = [entry for entry in entries if entry.spec.data.split == spec.data.split] or entries
    return min(same, key=lambda entry: (len(differences(spec, entry.spec)), -entry.read_at()), default=None)


def _difference_texts(spec: FeatureSpec, samples: Samples, near: Entry) -> list[tuple[str, str, str]]:
    texts = []
    for name, asked, there in differences(spec, near.spec):
        if name == "model.preprocess":
            texts += _settings(str(asked), str(there))
        elif name == "data.content":
            texts.append((name, _images(samples, near.samples), ""))
        elif name == "model.weights":
            ours, theirs = f"{str(asked)[:16]}… ({spec.model.name})", f"{str(there)[:16]}… ({near.spec.model.name})"
            texts.append((f"{name} (sha256)", ours, theirs))
        else:
            texts.append((name, _short(asked), _short(there)))
    return texts


def _settings(asked: str, there: str) -> list[tuple[str, str, str]]:
    """Settings of the image processor that differ."""
    one, other = json.loads(asked), json.loads(there)
    return [
        (f"model.preprocess.{name}", json.dumps(one.get(name)), json.dumps(other.get(name)))
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name)
    ]


def _images(one: Samples, other: Samples) -> str:
    """How the images differ, in words."""
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
    texts = [
        f"{len(names):,} {what} ({', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''})"
        for what, names in changes.items()
        if names
    ]
    return "; ".join(texts) or "the same images in another order"


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
