"""Confusions, scores by class and calibration of a classification probe, from its saved test probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mlfusion.errors import MlfusionError
from mlfusion.report.figures import charts
from mlfusion.report.figures.drawing import Figure, Panel, Record, series_legend
from mlfusion.report.numbers import between_percent, percent
from mlfusion.report.summary import ComparisonGroup, Score
from mlfusion.results import Results
from mlfusion.statistics import Bootstrap, Calibration, ClassScores, by_class, calibration, confusion

MAX_CLASSES = 30
"""Maximum size of a readable matrix; with more classes only the most frequent confusions are listed."""

MAX_PAIRS = 10


@dataclass(frozen=True, eq=False)
class Predictions:
    """One probe's test predictions, pooled over all seeds whose probabilities are saved."""

    group: ComparisonGroup
    score: Score
    counts: np.ndarray  # [C, C] images by true class (row) and predicted class (column), summed over seeds
    calibrations: tuple[tuple[str, Calibration], ...]  # calibration of this probe and of the baseline
    by_class: tuple[ClassScores, ...]  # of this probe, means over seeds
    seeds: int


def predictions(groups: Sequence[ComparisonGroup], results: Results) -> Predictions | None:
    """The main probe with the best validation score among a data set's groups that has saved probabilities, or None."""
    candidates = [(group, group.main or group.baseline) for group in groups if group.metric == "balanced_accuracy"]
    pairs = [(group, score) for group, score in candidates if score]
    for group, score in sorted(pairs, key=lambda pair: -pair[1].val.mean):
        seeds = _saved(score, results)
        if not seeds:
            continue
        own = _pooled(seeds)
        curves = [(score.probe, calibration(*own))]
        if group.baseline and not score.is_baseline and (base := _saved(group.baseline, results)):
            curves.append((group.baseline.probe, calibration(*_pooled(base))))
        classes = by_class(
            seeds[0]["labels"],
            [arrays["probabilities"] for arrays in seeds],
            score.rows[0].classes,
            groups=seeds[0].get("groups"),
            widening=Bootstrap(folds=score.rows[0].folds).widening,
        )
        return Predictions(group, score, confusion(*own), tuple(curves), classes, len(seeds))
    return None


def _saved(score: Score, results: Results) -> list[dict[str, np.ndarray]]:
    """The arrays of the seeds whose arrays are saved, of the same test images."""
    saved: list[dict[str, np.ndarray]] = []
    for row in score.rows:
        try:
            arrays = results.arrays(row)
        except MlfusionError:
            continue
        if {"labels", "probabilities"} <= arrays.keys() and arrays["labels"].ndim == 1:
            saved.append(arrays)
    return [arrays for arrays in saved if np.array_equal(arrays["labels"], saved[0]["labels"])]


def _pooled(seeds: Sequence[Mapping[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] and probabilities [n, C], one seed after another."""
    probabilities = [arrays["probabilities"].astype(np.float32) for arrays in seeds]
    return np.concatenate([arrays["labels"] for arrays in seeds]), np.concatenate(probabilities)


def source(predictions: Predictions) -> str:
    """A sentence that names the probe, its model and the number of seeds."""
    seeds = f"{predictions.seeds} seeds, pooled" if predictions.seeds > 1 else "one seed"
    probe, model = predictions.score.probe, predictions.group.model
    return f"{probe} on {model}, which has the best validation score here: the test images of {seeds}."


def class_lines(predictions: Predictions) -> list[tuple[str, int, str, str, str, str]]:
    """(class, test images, recall, its interval, specificity, AUROC), the rarest first, if there are few enough classes."""
    if len(predictions.by_class) > MAX_CLASSES:
        return []

    def text(value: float | None) -> str:
        return "none" if value is None else percent(value)

    return [
        (
            one.name,
            one.images,
            text(one.recall),
            between_percent(one.low, one.high),
            text(one.specificity),
            text(one.auroc),
        )
        for one in sorted(predictions.by_class, key=lambda one: one.images)
    ]


def confusions(predictions: Predictions) -> list[tuple[str, str, int, str]]:
    """(class, predicted class, images, percent of the class), the most frequent first."""
    counts, classes = predictions.counts, predictions.group.first.classes
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]
    return [
        (classes[true], classes[predicted], int(n), percent(n / counts[true].sum()))
        for true, predicted in zip(*np.unravel_index(order, counts.shape), strict=True)
        if (n := wrong[true, predicted])
    ]


def figures(predictions: Predictions) -> list[Figure]:
    """The confusion matrix where there are few enough classes, and the reliability curve."""
    matrix = [_matrix(predictions)] if len(predictions.group.first.classes) <= MAX_CLASSES else []
    return [*matrix, _reliability(predictions)]


def _matrix(predictions: Predictions) -> Figure:
    classes = predictions.group.first.classes
    totals = np.maximum(predictions.counts.sum(1), 1)
    records = [
        Record(true=t, predicted=p, images=int(n), share=100 * float(n / totals[i]))
        for i, t in enumerate(classes)
        for j, p in enumerate(classes)
        if (n := predictions.counts[i, j]) or i == j
    ]
    return Figure(
        "confusion",
        "Confusions",
        f"{source(predictions)} Rows are true classes, columns are predicted classes, in percent of the row.",
        f"Confusion matrix of {len(classes)} classes.",
        [Panel("", _matrix_spec(tuple(classes)), records, width=max(240, 26 * len(classes)))],
        records,
        columns=1,
        page_width="" if len(classes) > 10 else "narrow",
    )


@lru_cache(maxsize=64)
def _matrix_spec(classes: tuple[str, ...]) -> dict[str, Any]:
    alt, base = charts.base_chart()
    axis = {"domain": False, "ticks": False, "labelLimit": 90, "labelOverlap": "greedy"}
    angle = 0 if max(map(len, classes)) <= 3 else -90
    scale, order = alt.Scale(domain=list(classes)), list(classes)
    x_axis = alt.Axis(**axis, labelAngle=angle)
    x = alt.X("predicted:N", sort=order, title="predicted class", axis=x_axis, scale=scale)
    y = alt.Y("true:N", sort=order, title="true class", axis=alt.Axis(**axis), scale=scale)
    colour = alt.Color("share:Q", scale=alt.Scale(domain=[0, 100]), legend=None)
    names = [("true:N", "true class"), ("predicted:N", "predicted class")]
    tooltip = charts.tooltip(*names, "images:Q", ("share:Q", "% of the class", ".1f"))
    cells = base.mark_rect(style="heat").encode(x=x, y=y, color=colour, tooltip=tooltip)
    values = [
        base.transform_filter(f"datum.share {test} 50 && datum.share >= 0.5")
        .mark_text(style=style, opacity=alt.expr("bandwidth('x') > 22 ? 1 : 0"))
        .encode(x=x, y=y, text=alt.Text("share:Q", format=".0f"))
        for style, test in (("on-weak", "<="), ("on-strong", ">"))
    ]
    return charts.to_spec(alt.layer(cells, *values), max(120, 26 * len(classes)))


def _reliability(predictions: Predictions) -> Figure:
    records = [
        Record(
            probe=name, confidence=one.confidence, accuracy=one.accuracy, images=one.images, low=one.low, high=one.high
        )
        for name, curve in predictions.calibrations
        for one in curve.bins
        if one.images
    ]
    names = tuple(name for name, _ in predictions.calibrations)
    errors = ", ".join(f"{percent(curve.ece)} points for {name}" for name, curve in predictions.calibrations)
    return Figure(
        "reliability",
        "Calibration",
        f"Accuracy by the confidence of the predicted class ({len(predictions.calibrations[0][1].bins)} bins); on the dashed "
        f"line they are equal. Expected calibration error: {errors}.",
        f"Expected calibration error: {errors}.",
        [Panel("", _reliability_spec(names), records, width=320)],
        records,
        series_legend(names),
        columns=1,
        page_width="narrow",
    )


@lru_cache(maxsize=64)
def _reliability_spec(names: tuple[str, ...]) -> dict[str, Any]:
    alt, base = charts.base_chart()
    scale, axis = alt.Scale(domain=[0, 1], nice=False), alt.Axis(tickCount=5)
    x = alt.X("confidence:Q", title="confidence (probability of the predicted class)", scale=scale, axis=axis)
    y = alt.Y("accuracy:Q", title="accuracy", scale=scale, axis=axis)
    colour, shape = charts.series_channels("probe", names)
    tooltip = charts.tooltip("probe:N", ("confidence:Q", "", ".3f"), ("accuracy:Q", "", ".3f"), "images:Q")
    diagonal = base.transform_aggregate(n="count()").mark_rule(style="baseline")
    start = {"x": alt.XDatum(0, scale=scale), "y": alt.YDatum(0, scale=scale)}
    dot = base.mark_point(style="dot", filled=True)
    layers = [
        diagonal.encode(**start, x2=alt.X2Datum(1), y2=alt.Y2Datum(1)),
        base.mark_line(style="series").encode(x=x, y=y, color=colour),
        dot.encode(x=x, y=y, color=colour, shape=shape, tooltip=tooltip),
    ]
    return charts.to_spec(alt.layer(*layers), 260)
