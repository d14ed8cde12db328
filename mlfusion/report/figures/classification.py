"""Confusions between classes and calibration of a classification probe, from its saved test probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mlfusion.errors import MlfusionError
from mlfusion.report.figures.drawing import Figure, Panel, Record, base_chart, require_altair, series_legend, to_spec
from mlfusion.report.numbers import percent
from mlfusion.report.summary import ComparisonGroup, Score
from mlfusion.report.theme import SYMBOLS
from mlfusion.results import Results
from mlfusion.statistics import Calibration, calibration, confusion

MOST_CLASSES = 30
"""A matrix of more classes cannot be read; the most frequent confusions are listed then."""

MOST_PAIRS = 10


@dataclass(frozen=True, eq=False)
class Predictions:
    """One probe's test predictions, pooled over all seeds whose probabilities were kept."""

    group: ComparisonGroup
    score: Score
    counts: np.ndarray  # [C, C] images by true class (row) and predicted class (column), summed over seeds
    calibrations: tuple[tuple[str, Calibration], ...]  # of this probe and of the baseline
    seeds: int


def predictions(groups: Sequence[ComparisonGroup], results: Results) -> Predictions | None:
    """Of a data set's groups the main probe with the best validation whose probabilities were kept; None without any."""
    candidates = [(group, group.main or group.baseline) for group in groups if group.metric == "balanced_accuracy"]
    pairs = [(group, score) for group, score in candidates if score]
    for group, score in sorted(pairs, key=lambda pair: -pair[1].val.mean):
        own = _pooled(score, results)
        if own is None:
            continue
        curves = [(score.probe, calibration(*own))]
        if group.baseline and not score.is_baseline and (base := _pooled(group.baseline, results)):
            curves.append((group.baseline.probe, calibration(*base)))
        return Predictions(group, score, confusion(*own), tuple(curves), len(own[0]) // group.test_images)
    return None


def _pooled(score: Score, results: Results) -> tuple[np.ndarray, np.ndarray] | None:
    """Labels [n] and probabilities [n, C] of the seeds whose arrays were kept, one seed after another."""
    labels, probabilities = [], []
    for row in score.rows:
        try:
            arrays = results.arrays(row)
        except MlfusionError:
            continue
        if {"labels", "probabilities"} <= arrays.keys() and arrays["labels"].ndim == 1:
            labels.append(arrays["labels"])
            probabilities.append(arrays["probabilities"].astype(np.float32))
    return (np.concatenate(labels), np.concatenate(probabilities)) if labels else None


def source(held: Predictions) -> str:
    """Which probe, of which model, over how many seeds."""
    images = f"the test images of {held.seeds} seeds, pooled" if held.seeds > 1 else "the test images of one seed"
    return f"{held.score.probe} on {held.group.model}, which has the best validation score here: {images}."


def confusions(held: Predictions) -> list[tuple[str, str, int, str]]:
    """(class, predicted class, images, percent of the class), the most frequent first."""
    counts, classes = held.counts, held.group.classes
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    made = []
    for true, predicted in zip(*np.unravel_index(order, counts.shape), strict=True):
        if wrong[true, predicted]:
            share = wrong[true, predicted] / counts[true].sum()
            made.append((classes[true], classes[predicted], int(wrong[true, predicted]), percent(share)))
    return made


def figures(held: Predictions) -> list[Figure]:
    """The confusion matrix where there are few enough classes, and the reliability curve."""
    made = [_reliability(held)]
    classes = held.group.classes
    if len(classes) <= MOST_CLASSES:
        made.insert(0, _matrix(held, classes))
    return made


def _matrix(held: Predictions, classes: Sequence[str]) -> Figure:
    totals = np.maximum(held.counts.sum(1), 1)
    records = [
        Record(true=t, predicted=p, images=int(n), share=100 * float(n / totals[i]))
        for i, t in enumerate(classes)
        for j, p in enumerate(classes)
        if (n := held.counts[i, j]) or i == j
    ]
    return Figure(
        "confusion",
        "Confusions",
        f"{source(held)} Rows are true classes, columns are predicted classes, in percent of the row.",
        f"Confusion matrix of {len(classes)} classes.",
        [Panel("", _matrix_spec(tuple(classes)), records, width=max(240, 26 * len(classes)))],
        records,
        columns=1,
        page_width="" if len(classes) > 10 else "narrow",
    )


@lru_cache(maxsize=64)
def _matrix_spec(classes: tuple[str, ...]) -> dict[str, Any]:
    alt = require_altair()
    base = base_chart()
    axis = alt.Axis(domain=False, ticks=False, labelLimit=90, labelOverlap="greedy")
    angle = 0 if max(map(len, classes)) <= 3 else -90
    x = alt.X(
        "predicted:N",
        sort=list(classes),
        title="predicted class",
        axis=alt.Axis(**axis.to_dict(), labelAngle=angle),
        scale=alt.Scale(domain=list(classes)),
    )
    y = alt.Y("true:N", sort=list(classes), title="true class", axis=axis, scale=alt.Scale(domain=list(classes)))
    colour = alt.Color("share:Q", scale=alt.Scale(domain=[0, 100]), legend=None)
    tooltip = [
        alt.Tooltip("true:N", title="true class"),
        alt.Tooltip("predicted:N", title="predicted class"),
        alt.Tooltip("images:Q"),
        alt.Tooltip("share:Q", title="% of the class", format=".1f"),
    ]
    cells = base.mark_rect(style="heat").encode(x=x, y=y, color=colour, tooltip=tooltip)
    values = [
        base.transform_filter(f"datum.share {test} 50 && datum.share >= 0.5")
        .mark_text(style=style, opacity=alt.expr("bandwidth('x') > 22 ? 1 : 0"))
        .encode(x=x, y=y, text=alt.Text("share:Q", format=".0f"))
        for style, test in (("on-weak", "<="), ("on-strong", ">"))
    ]
    return to_spec(alt.layer(cells, *values), max(120, 26 * len(classes)))


def _reliability(held: Predictions) -> Figure:
    records = [
        Record(
            probe=name,
            confidence=one.confidence,
            accuracy=one.accuracy,
            images=one.images,
            low=one.low,
            high=one.high,
        )
        for name, curve in held.calibrations
        for one in curve.bins
        if one.images
    ]
    names = tuple(name for name, _ in held.calibrations)
    errors = ", ".join(f"{percent(curve.ece)} points for {name}" for name, curve in held.calibrations)
    return Figure(
        "reliability",
        "Calibration",
        f"Accuracy by the confidence of the predicted class ({len(held.calibrations[0][1].bins)} bins); on the dashed line "
        f"they are equal. Expected calibration error: {errors}.",
        f"Expected calibration error: {errors}.",
        [Panel("", _reliability_spec(names), records, width=320)],
        records,
        series_legend(names),
        columns=1,
        page_width="narrow",
    )


@lru_cache(maxsize=64)
def _reliability_spec(names: tuple[str, ...]) -> dict[str, Any]:
    alt = require_altair()
    base = base_chart()
    scale = alt.Scale(domain=[0, 1], nice=False)
    x = alt.X(
        "confidence:Q", title="confidence (probability of the predicted class)", scale=scale, axis=alt.Axis(tickCount=5)
    )
    y = alt.Y("accuracy:Q", title="accuracy", scale=scale, axis=alt.Axis(tickCount=5))
    colour = alt.Color("probe:N", scale=alt.Scale(domain=list(names)), legend=None)
    shape = alt.Shape("probe:N", scale=alt.Scale(domain=list(names), range=list(SYMBOLS)), legend=None)
    tooltip = [
        alt.Tooltip("probe:N"),
        alt.Tooltip("confidence:Q", format=".3f"),
        alt.Tooltip("accuracy:Q", format=".3f"),
        alt.Tooltip("images:Q"),
    ]
    even = base.transform_aggregate(n="count()").mark_rule(style="baseline")
    return to_spec(
        alt.layer(
            even.encode(
                x=alt.XDatum(0, scale=scale), x2=alt.X2Datum(1), y=alt.YDatum(0, scale=scale), y2=alt.Y2Datum(1)
            ),
            base.mark_line(style="series").encode(x=x, y=y, color=colour),
            base.mark_point(style="dot", filled=True).encode(x=x, y=y, color=colour, shape=shape, tooltip=tooltip),
        ),
        260,
    )
