"""What the saved test probabilities show on a data set: confusions between classes, and calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mlfusion.errors import MlfusionError
from mlfusion.report.figures.drawing import Figure, Key, Panel, Record, charted, finished, needs_altair
from mlfusion.report.look import SHAPES
from mlfusion.report.summary import Block, Score, percent
from mlfusion.results import Results
from mlfusion.statistics import Calibration, calibration, confusion

MOST_CLASSES = 30
"""More than these make a matrix that nobody can read; the pairs confused most are listed then."""

MOST_PAIRS = 10


@dataclass(frozen=True, eq=False)
class Seen:
    """One probe's test probabilities put together: all of its seeds that kept them."""

    block: Block
    score: Score
    counts: np.ndarray  # [C, C] images of a true class (row) by the class they were taken for; over seeds
    calibrations: tuple[tuple[str, Calibration], ...]  # of this probe and of the baseline
    seeds: int


def seen(held: Sequence[Block], results: Results) -> Seen | None:
    """Of a data set's blocks the answer with the best validation whose probabilities were kept; None where none were."""
    ranked = [(block, block.answer or block.baseline) for block in held]
    pairs = [(block, score) for block, score in ranked if score and score.rows[0].metric == "balanced_accuracy"]
    for block, score in sorted(pairs, key=lambda pair: -pair[1].val.mean):
        own = _kept(score, results)
        if own is None:
            continue
        curves = [(score.probe, calibration(*own))]
        if block.baseline and not score.is_baseline and (base := _kept(block.baseline, results)):
            curves.append((block.baseline.probe, calibration(*base)))
        return Seen(block, score, confusion(*own), tuple(curves), len(own[0]) // block.rows[0].images.test)
    return None


def _kept(score: Score, results: Results) -> tuple[np.ndarray, np.ndarray] | None:
    """Labels [n] and probabilities [n, C] of the seeds one after another, those that were kept."""
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


def note(held: Seen) -> str:
    """Which probe, of which model, over how many seeds."""
    of = f"the test images of {held.seeds} seeds put together" if held.seeds > 1 else "the test images of one seed"
    return f"{held.score.probe} on {held.block.model}, which has the best validation here: {of}."


def confused(held: Seen) -> list[tuple[str, str, int, str]]:
    """(class, what it was taken for, images, percent of the class), the most first."""
    counts, classes = held.counts, held.block.rows[0].classes
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    made = []
    for true, taken in zip(*np.unravel_index(order, counts.shape), strict=True):
        if wrong[true, taken]:
            share = wrong[true, taken] / counts[true].sum()
            made.append((classes[true], classes[taken], int(wrong[true, taken]), percent(share)))
    return made


def figures(held: Seen) -> list[Figure]:
    """The confusion matrix where there are few enough classes, and the reliability curve."""
    made = [_reliability(held)]
    classes = held.block.rows[0].classes
    if len(classes) <= MOST_CLASSES:
        made.insert(0, _matrix(held, classes))
    return made


def _matrix(held: Seen, classes: Sequence[str]) -> Figure:
    whole = np.maximum(held.counts.sum(1, keepdims=True), 1)
    records: list[Record] = [
        {"true": t, "taken": p, "images": int(n), "share": 100 * float(n / whole[i, 0])}
        for i, t in enumerate(classes)
        for j, p in enumerate(classes)
        if (n := held.counts[i, j]) or i == j
    ]
    return Figure(
        "confusion",
        "Confusions",
        f"{note(held)} Rows are true classes, columns what they were taken for, in percent of the row.",
        f"Confusion matrix of {len(classes)} classes.",
        [Panel("", _matrix_spec(tuple(classes)), records, width=max(240, 26 * len(classes)))],
        records,
        columns=1,
        room="" if len(classes) > 10 else "narrow",
    )


@lru_cache(maxsize=64)
def _matrix_spec(classes: tuple[str, ...]) -> dict[str, Any]:
    alt = needs_altair()
    base = charted()
    axis = alt.Axis(domain=False, ticks=False, labelLimit=90, labelOverlap="greedy")
    angle = 0 if max(map(len, classes)) <= 3 else -90
    x = alt.X(
        "taken:N",
        sort=list(classes),
        title="taken for",
        axis=alt.Axis(**axis.to_dict(), labelAngle=angle),
        scale=alt.Scale(domain=list(classes)),
    )
    y = alt.Y("true:N", sort=list(classes), title="true class", axis=axis, scale=alt.Scale(domain=list(classes)))
    colour = alt.Color("share:Q", scale=alt.Scale(domain=[0, 100]), legend=None)
    tip = [
        alt.Tooltip("true:N", title="true class"),
        alt.Tooltip("taken:N", title="taken for"),
        alt.Tooltip("images:Q"),
        alt.Tooltip("share:Q", title="% of the class", format=".1f"),
    ]
    cells = base.mark_rect(style="heat").encode(x=x, y=y, color=colour, tooltip=tip)
    said = [
        base.transform_filter(f"datum.share {test} 50 && datum.share >= 0.5")
        .mark_text(style=style, opacity=alt.expr("bandwidth('x') > 22 ? 1 : 0"))
        .encode(x=x, y=y, text=alt.Text("share:Q", format=".0f"))
        for style, test in (("on-weak", "<="), ("on-strong", ">"))
    ]
    return finished(alt.layer(cells, *said), max(120, 26 * len(classes)))


def _reliability(held: Seen) -> Figure:
    records: list[Record] = [
        {
            "probe": name,
            "confidence": one.confidence,
            "accuracy": one.accuracy,
            "images": one.images,
            "low": one.low,
            "high": one.high,
        }
        for name, curve in held.calibrations
        for one in curve.bins
        if one.images
    ]
    names = tuple(name for name, _ in held.calibrations)
    errors = ", ".join(f"{percent(curve.ece)} points for {name}" for name, curve in held.calibrations)
    keys = tuple(Key(name, i + 1, SHAPES[i]) for i, name in enumerate(names))
    return Figure(
        "reliability",
        "Calibration",
        f"How often the surest class is right, by how sure the probe is "
        f"({len(held.calibrations[0][1].bins)} bins; dashed: as often as it "
        f"says). Expected calibration error: {errors}.",
        f"Expected calibration error: {errors}.",
        [Panel("", _reliability_spec(names), records, width=320)],
        records,
        keys,
        columns=1,
        room="narrow",
    )


@lru_cache(maxsize=64)
def _reliability_spec(names: tuple[str, ...]) -> dict[str, Any]:
    alt = needs_altair()
    base = charted()
    scale = alt.Scale(domain=[0, 1], nice=False)
    x = alt.X("confidence:Q", title="probability of the surest class", scale=scale, axis=alt.Axis(tickCount=5))
    y = alt.Y("accuracy:Q", title="how often it is right", scale=scale, axis=alt.Axis(tickCount=5))
    colour = alt.Color("probe:N", scale=alt.Scale(domain=list(names)), legend=None)
    shape = alt.Shape("probe:N", scale=alt.Scale(domain=list(names)), legend=None)
    tip = [
        alt.Tooltip("probe:N"),
        alt.Tooltip("confidence:Q", format=".3f"),
        alt.Tooltip("accuracy:Q", format=".3f"),
        alt.Tooltip("images:Q"),
    ]
    even = base.transform_aggregate(n="count()").mark_rule(style="baseline")
    return finished(
        alt.layer(
            even.encode(
                x=alt.XDatum(0, scale=scale), x2=alt.X2Datum(1), y=alt.YDatum(0, scale=scale), y2=alt.Y2Datum(1)
            ),
            base.mark_line(style="series").encode(x=x, y=y, color=colour),
            base.mark_point(style="dot", filled=True).encode(x=x, y=y, color=colour, shape=shape, tooltip=tip),
        ),
        260,
    )
