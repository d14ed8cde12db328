"""How sure one row's score is, from its arrays: its interval, calibration, confusions, and its scores class by class."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mlfusion.errors import ResultsUnusable
from mlfusion.results import Results, Row, export
from mlfusion.statistics import images, uncertainty
from mlfusion.statistics.images import Calibration, ClassScores
from mlfusion.statistics.resampling import Bootstrap, Units
from mlfusion.statistics.uncertainty import Interval
from mlfusion.statistics.verdicts import RareClass, rare_classes

ROUNDING = 1e-6
"""The score that a row's arrays give may differ from the row's by so much: sums depend on the order of the images."""


class Confusion(msgspec.Struct, frozen=True):
    """Test images of one class that were classified as another."""

    name: str = msgspec.field(name="class")
    taken_for: str
    images: int
    of: int  # images of the class


@dataclass(frozen=True)
class Certainty:
    """The certainty of a row's score, from its arrays; None if the target does not have it or the arrays are missing."""

    interval: Interval | None = None
    auroc: float | None = None  # mean over the classes or labels, each against the rest
    by_class: tuple[ClassScores, ...] = ()  # one per class or label, in their order
    rare: tuple[RareClass, ...] = ()  # classes too rare for a verdict
    calibration: Calibration | None = None
    confusions: tuple[Confusion, ...] | None = None  # the most frequent
    missing: str | None = None  # why the arrays are missing, and what to do


def certainty(results: Results, row: Row, *, confusions: int = 5) -> Certainty:
    """The interval of a row's score over test images, its scores by class, calibration, and most frequent confusions."""
    try:
        arrays = results.arrays(row)
    except ResultsUnusable as err:
        return Certainty(missing=str(err))
    labels, predictions, groups = arrays["labels"], arrays["probabilities"], arrays.get("groups")
    bootstrap = Bootstrap(folds=row.folds)
    interval = uncertainty.interval(labels, predictions, metric=row.metric, bootstrap=bootstrap, groups=groups)
    if abs(interval.value - row.test) > ROUNDING:
        return Certainty(missing=str(results.reject_arrays(row, interval.value)))
    if labels.dtype.kind == "f":
        return Certainty(interval)
    by_class = images.by_class(labels, [predictions], row.classes, groups=groups, widening=bootstrap.widening)
    areas = [one.auroc for one in by_class if one.auroc is not None]
    auroc, rare = float(np.mean(areas)) if areas else None, rare_in(row, labels, groups)
    if labels.ndim != 1:
        return Certainty(interval, auroc, by_class, rare)
    counts = images.confusion(labels, predictions)
    wrong = [(int(counts[i, j]), i, j) for i, j in zip(*counts.nonzero(), strict=True) if i != j]
    most_frequent = tuple(
        Confusion(row.classes[i], row.classes[j], count, int(counts[i].sum()))
        for count, i, j in sorted(wrong, reverse=True)[:confusions]
    )
    return Certainty(interval, auroc, by_class, rare, images.calibration(labels, predictions), most_frequent)


def write_by_class(results: Results, rows: Sequence[Row], path: Path) -> tuple[int, list[str]]:
    """Write a line per row and class, as CSV, Parquet or JSON lines; returns their number, and why rows are left out.

    Raises:
        UnknownName: the ending of the path is not one of these.
        ResultsUnusable: it cannot be written.
    """
    lines: list[dict[str, Any]] = []
    missing: dict[str, None] = {}
    for row in rows:
        found = certainty(results, row)
        if not found.by_class:
            missing[found.missing or f"{row.id} predicts numbers, which have no classes"] = None
        named = {name: getattr(row, name) for name in ("id", "model", "dataset", "probe", "seed")}
        lines += [named | msgspec.to_builtins(one) for one in found.by_class]
    export.write_objects(lines, path)
    return len(lines), list(missing)


def rare_in(row: Row, labels: np.ndarray, groups: np.ndarray | None) -> tuple[RareClass, ...]:
    """The classes that have too few test images, or groups of them, for a verdict about the row's metric."""
    units = Units.of_groups(groups, labels)
    counts = uncertainty.units_by_class(labels, row.metric, units)
    return rare_classes(counts, row.classes, uncertainty.effective_images(counts, units.count), units.noun)


def rare_of(results: Results | None, rows: Sequence[Row]) -> tuple[RareClass, ...]:
    """The classes that are too rare in the test split that these rows share, by the first arrays that can be read."""
    for row in rows:
        if results is None:
            break
        try:
            arrays = results.arrays(row)
        except ResultsUnusable:
            continue
        return rare_in(row, arrays["labels"], arrays.get("groups"))
    return ()
