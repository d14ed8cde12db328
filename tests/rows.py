"""Rows for the tests of results and report: whole, small, and never shipped."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlfusion.results import Results, Row
from mlfusion.results.records import from_object
from mlfusion.specs.names import parse_probes


def row(row_id: str = "a1", **changes: object) -> Row:
    """A whole row; `changes` replaces fields, by what stands for them in JSON. Any words may name its features."""
    whole = row_object(row_id, **changes)
    whole["features"] = [one if re.fullmatch("[0-9a-f]{16}", one) else key(one) for one in whole["features"]]
    if "metrics" not in changes:
        whole["metrics"] = metrics(whole["metric"], len(whole["classes"]))
    if folds := whole.get("folds"):
        one = {name: whole[name] for name in ("val", "test", "train", "selected")}
        whole.setdefault("by_fold", [{"images": whole["images"]["test"] // folds, **one}] * folds)
    return from_object(whole)


def row_object(row_id: str = "a1", **changes: object) -> dict[str, Any]:
    """What stands for a row in JSON; `changes` replaces fields, by others that may be wrong."""
    fields: dict[str, object] = {
        "id": row_id,
        "model": "a-vit",
        "dataset": "digits",
        "probe": "cls-last/linear",
        "seed": 0,
        "metric": "balanced_accuracy",
        "val": 0.8,
        "test": 0.75,
        "train": 1,  # JSON knows no difference between 1 and 1.0
        "metrics": {
            "kind": "class",
            "balanced_accuracy": 0.75,
            "accuracy": 0.75,
            "top5": 1.0,
            "macro_f1": 0.7,
            "loss": 0.9,
            "recall": [0.5, 1.0],
        },
        "selected": {"lr": 0.01, "weight_decay": 1e-6, "steps": 1000, "batch_size": 32},
        "grid": "quick",
        "configurations": 6,
        "parameters": 1000,
        "seconds": 1.5,
        "layers": [4],
        "tokens": ["cls"],
        "depth": 4,
        "width": 8,
        "classes": ["null", "µ-ein"],
        "images": {"train": 100, "test": 40},
        "features": [key("train"), key("test")],
        "attention": None,
        "versions": {"numpy": "2"},
        "code": "abc",
        "created": "2026-01-01T00:00:00+00:00",
        "protocol": 2,
        "device": "cpu",
        "precision": "float32",
        "bytes": 4480,
        "sources": {
            "model": "org/a-vit",
            "dataset": "digits",
            "weights": "w" * 64,
            "train": "d" * 32,
            "test": "e" * 32,
            "options": [],
        },
    }
    return fields | changes


def key(word: str) -> str:
    """What looks like the key of a cache entry."""
    return hashlib.sha256(word.encode()).hexdigest()[:16]


def metrics(metric: str, classes: int) -> dict[str, object]:
    """The metrics that go with a metric, for so many classes."""
    by_class = [0.5 + k / max(classes - 1, 1) / 2 for k in range(classes)]
    if metric == "r2":
        return {"kind": "number", "r2": 0.5, "mae": 1.0, "rmse": 2.0}
    if metric == "mean_average_precision":
        scores = {"mean_average_precision": 0.7, "micro_f1": 0.7, "macro_f1": 0.7, "loss": 0.9}
        return {"kind": "labels", **scores, "average_precision": by_class}
    scores = {"balanced_accuracy": 0.75, "accuracy": 0.75, "top5": 1.0, "macro_f1": 0.7, "loss": 0.9}
    return {"kind": "class", **scores, "recall": by_class}


def study(
    scores: dict[str, list[float]], *, depth: int = 4, model: str = "a-vit", dataset: str = "digits", **changes: object
) -> list[Row]:
    """Rows of {probe: [test score by seed]}; the attentive ones get attention that differs by seed."""
    made = []
    for probe, tests in scores.items():
        representation = parse_probes(probe, depth)[0].representation
        layers = representation.layers(depth)
        tokens = [(layer, kind) for kind in representation.kinds for layer in layers]
        for seed, test in enumerate(tests):
            attention = None
            if probe.endswith("attentive"):
                weights = [1 + (7 * i + 3 * seed) % 5 for i in range(len(tokens))]
                attention = {
                    "layers": [layer for layer, _ in tokens],
                    "kinds": [kind for _, kind in tokens],
                    "mean": [weight / sum(weights) for weight in weights],
                    "sd": [0.01 * (1 + seed)] * len(tokens),
                }
            own: dict[str, object] = {
                "model": model,
                "dataset": dataset,
                "probe": probe,
                "seed": seed,
                "test": test,
                "val": test - 0.01,
                "layers": list(layers),
                "tokens": list(representation.kinds),
                "depth": depth,
                "attention": attention,
                "images": {"train": 100, "test": 4000},
                "features": [f"{model}-{dataset}-train", f"{model}-{dataset}-test"],
            }
            name = re.sub(r"\W", "_", f"{model}-{dataset}-{len(made)}")
            made.append(row(name, **(own | changes)))
    return made


def stored(root: Path, rows: list[Row], *, shares: Sequence[float] = (0.5, 0.5)) -> Results:
    """Rows with arrays: each probe is right on the first of each class's images, as many as its test score says.

    `shares` are those of the classes among the test images.
    """
    results = Results(root)
    for one in rows:
        images = one.images.test
        sizes = np.floor(np.array(shares) * images).astype(int)
        sizes[0] += images - sizes.sum()
        labels = np.repeat(np.arange(len(sizes)), sizes)
        place = np.concatenate([np.arange(size) for size in sizes])
        right = place < np.round(one.test * sizes)[labels]
        taken = np.where(right, labels, (labels + 1) % len(sizes))
        results.append(one, {"labels": labels, "probabilities": np.eye(len(sizes), dtype=np.float32)[taken]})
    return results
