"""Test score against the cost of a probe: its parameters, and the time that it takes to train."""

from collections.abc import Sequence
from functools import lru_cache
from math import log
from statistics import fmean
from typing import Any, NamedTuple

from mlfusion.report.figures import charts
from mlfusion.report.figures.drawing import Figure, Panel, Record, extent, series_legend
from mlfusion.report.numbers import capitalized, percent, points
from mlfusion.report.studies import Study
from mlfusion.report.summary import Score, head_of, heads_of, mean_gain

WIDTH, HEIGHT = 460, 340  # size of a panel in a file, in pixels
LETTER = 6.0  # width of a letter of a name in pixels
MIN_COST = 1e-3  # the lowest cost that a logarithmic axis shows

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


def cost(study: Study) -> Figure | None:
    """Score against parameters and against seconds, a dot per probe, averaged over the cases that all of them share."""
    scores = _shared(study)
    if len(scores) < 2:
        return None
    cases = len(next(iter(scores.values())))
    records = [_record(probe, probe_scores) for probe, probe_scores in scores.items()]
    heads = heads_of(scores)
    limits = extent(record.number("test") for record in records)
    axes = {"parameters": "parameters of the probe", "seconds": "seconds of probing (grid and refit)"}
    panels = []
    for name, title in axes.items():
        costs = [max(record.number(name), MIN_COST) for record in records]
        axis = _Axis(name, title, (min(costs) / 1.5, max(costs) * 1.5))
        spec = _spec(axis, f"{study.metric} on test, %", limits, heads)
        panels.append(Panel(capitalized(title), spec, _with_label_sides(records, axis, limits)))
    over = f", averaged over the {cases} cases (a model on a data set) that have all of these" if cases > 1 else ""
    return Figure(
        "cost",
        "Score against cost",
        f"A dot is a probe, mean over seeds{over}. Seconds were measured on the machines that made the rows.",
        "; ".join(
            f"{r['probe']} {r['scored']}, {r['parameters']:,.0f} parameters, {r['seconds']:.1f} s" for r in records
        ),
        panels,
        [record.without("scored") for record in records],
        series_legend(heads, shown={head_of(probe) for probe in scores}),
        columns=2,
    )


def _shared(study: Study) -> dict[str, list[Score]]:
    """{probe: its scores in the cases that have all of these probes}; probes run in the fewest cases are left out first."""
    groups = study.groups
    cases_of = {p: {i for i, group in enumerate(groups) if study.score(group, p)} for p in study.probes}
    while cases_of and not (cases := set.intersection(*cases_of.values())):
        del cases_of[min(cases_of, key=lambda probe: len(cases_of[probe]))]
    return {p: [score for i in sorted(cases) if (score := study.score(groups[i], p))] for p in cases_of}


def _record(probe: str, scores: Sequence[Score]) -> Record:
    test, gain = fmean(score.test.mean for score in scores), mean_gain(scores)
    return Record(
        probe=probe,
        head=head_of(probe),
        test=100 * test,
        parameters=fmean(score.parameters for score in scores),
        seconds=fmean(score.seconds for score in scores),
        scored=f"{percent(test)} %" + ("" if gain is None else f", {points(gain)} points"),
        n=len(scores),
    )


class _Axis(NamedTuple):
    """A logarithmic axis of costs."""

    name: str
    title: str
    ends: tuple[float, float]


def _with_label_sides(records: Sequence[Record], axis: _Axis, limits: tuple[float, float]) -> list[Record]:
    """Each record with the side of its dot on which its name stands."""
    (first, last), (low, high) = axis.ends, limits
    across = [WIDTH * log(max(record.number(axis.name), MIN_COST) / first) / log(last / first) for record in records]
    down = [HEIGHT * (high - record.number("test")) / (high - low) for record in records]
    dots = list(zip(across, down, strict=True))
    sides = label_sides([str(record["probe"]) for record in records], dots)
    return [record.extended(side=side) for record, side in zip(records, sides, strict=True)]


def label_sides(names: Sequence[str], dots: Sequence[tuple[float, float]]) -> list[str]:
    """The side of its dot on which each name stands: the first that overlaps no name and no dot, and stays in the panel."""
    occupied: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    sides = []
    for name, (x, y) in zip(names, dots, strict=True):
        length = LETTER * len(name)
        boxes: dict[str, Box] = {
            "right": (x + 8, y - 6, x + 8 + length, y + 6),
            "left": (x - 8 - length, y - 6, x - 8, y + 6),
            "above": (x - length / 2, y - 20, x + length / 2, y - 8),
            "below": (x - length / 2, y + 8, x + length / 2, y + 20),
        }
        overlaps = {side: _overlap(box, occupied) for side, box in boxes.items()}
        side = min(overlaps, key=lambda side: overlaps[side])
        occupied.append(boxes[side])
        sides.append(side)
    return sides


def _overlap(box: Box, occupied: Sequence[Box]) -> float:
    """Pixels of a box that lie outside the panel or, across, on boxes that are occupied."""
    left, top, right, bottom = box
    outside = sum(max(0.0, beyond) for beyond in (-left, right - WIDTH, -top, bottom - HEIGHT))
    return outside + sum(
        max(0.0, min(right, other[2]) - max(left, other[0])) * (min(bottom, other[3]) > max(top, other[1]))
        for other in occupied
    )


@lru_cache(maxsize=64)
def _spec(axis: _Axis, score: str, limits: tuple[float, float], heads: tuple[str, ...]) -> dict[str, Any]:
    alt, base = charts.base_chart()
    costs = alt.Axis(format="~s", grid=False, tickCount=4, labelOverlap="greedy", labelSeparation=6)
    scale = alt.Scale(type="log", domain=list(axis.ends), nice=False)
    x = alt.X(f"{axis.name}:Q", title=axis.title, scale=scale, axis=costs)
    y = alt.Y("test:Q", title=score, scale=charts.exact_scale(limits, 14), axis=alt.Axis(tickCount=5))
    colour, shape = charts.series_channels("head", heads)
    numbers = [("parameters:Q", "", ",.0f"), ("seconds:Q", "", ",.1f")]
    tooltip = charts.tooltip("probe:N", ("scored:N", "test"), *numbers, ("n:Q", "cases"))
    sides = {"right": ("left", 8, 0), "left": ("right", -8, 0), "above": ("center", 0, -14), "below": ("center", 0, 14)}
    names = [
        base.transform_filter(f"datum.side == '{side}'")
        .mark_text(style="name", align=align, dx=dx, dy=dy, fontSize=11)
        .encode(x=x, y=y, text="probe:N")
        for side, (align, dx, dy) in sides.items()
    ]
    dots = base.mark_point(style="dot", filled=True).encode(x=x, y=y, color=colour, shape=shape, tooltip=tooltip)
    return charts.to_spec(alt.layer(*names, dots), HEIGHT)
