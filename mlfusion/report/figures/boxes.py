"""Panels of box plots: groups of lines, each with dots and a box."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mlfusion.report.figures import charts
from mlfusion.report.figures.charts import of_kind
from mlfusion.report.figures.drawing import Panel, Record, extent
from mlfusion.report.numbers import points
from mlfusion.report.theme import LOOKS

MIN_FOR_BOX = 5
"""Minimum number of values for quartiles."""


@dataclass(frozen=True)
class Dot:
    """One value of a line."""

    label: str  # the data set, the model, or both
    x: float  # a score in percent, or a gain in points
    scored: str  # the absolute score, for the tooltip


@dataclass(frozen=True)
class Line:
    """The dots of one box."""

    name: str  # shown above it; empty if the legend names it
    position: int  # position of its series, which decides colour and symbol
    dots: Sequence[Dot]
    text: str  # shown at its right end

    @property
    def box(self) -> dict[str, float] | None:
        """Quartiles, and the furthest values within 1.5 times their distance; None for too few values."""
        values = np.array([dot.x for dot in self.dots])
        if len(values) < MIN_FOR_BOX:
            return None
        q1, median, q3 = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
        inside = values[(values >= q1 - 1.5 * (q3 - q1)) & (values <= q3 + 1.5 * (q3 - q1))]
        return {"low": float(inside.min()), "q1": q1, "median": median, "q3": q3, "high": float(inside.max())}


@dataclass(frozen=True)
class LineGroup:
    """Lines under one name."""

    name: str
    lines: Sequence[Line]


def grouped(lines: Iterable[tuple[str, Line]]) -> list[LineGroup]:
    """(name of its group, line) → groups in order of appearance; lines without dots are left out."""
    by_name: dict[str, list[Line]] = {}
    for name, line in lines:
        if line.dots:
            by_name.setdefault(name, []).append(line)
    return [LineGroup(name, members) for name, members in by_name.items()]


def describe(groups: Iterable[LineGroup]) -> str:
    """The groups in words, for readers who cannot see the figure."""
    return "; ".join(
        f"{group.name}: " + ", ".join(f"{line.name} {line.text}".strip() for line in group.lines) for group in groups
    )


def box_panels(views: Sequence[tuple[str, Sequence[LineGroup]]], axis: str, *, zero: bool) -> list[Panel]:
    """One panel for each (title, groups), all on the same scale; `zero` draws a line at 0, from which gains are counted."""
    values = [dot.x for _, groups in views for group in groups for line in group.lines for dot in line.dots]
    values += [0.0] * zero
    if not values:
        return []
    panels = [(title, *_positioned(groups)) for title, groups in views]
    return [Panel(title, _spec(height, axis, extent(values), zero), records) for title, records, height in panels]


def _positioned(groups: Sequence[LineGroup]) -> tuple[list[Record], int]:
    """Records with their positions from the top, and the height, all in pixels; a group's name stands above its lines."""
    records: list[Record] = []
    at = 0.0
    for group in groups:
        at += 14
        if group.name:
            records.append(Record(what="name", at=at, text=group.name))
        for i, line in enumerate(group.lines):
            # The value of a line is above its right end, beside its name if it has one.
            if line.name:
                at += 14 if group.name else 0
                records.append(Record(what="name", at=at, text=line.name))
            elif i:
                at += 9
            records.append(Record(what="value", at=at, text=line.text))
            at += 16
            records += _line_records(line, at)
            at += 10 if line.name and i < len(group.lines) - 1 else 0
        at += 12
    return records, round(at + 4)


def _line_records(line: Line, at: float) -> list[Record]:
    """The guide of a line, its box or median, and its dots."""
    look = line.position % LOOKS + 1
    records = [Record(what="guide", at=at, top=at - 9, bottom=at + 9)]
    if box := line.box:
        q1, q2, q3 = (points(box[name] / 100) for name in ("q1", "median", "q3"))
        quartiles = f"{q1} to {q3}, median {q2}, n = {len(line.dots)}"
        records.append(Record(box, what="box", at=at, series=look, label=line.name, quartiles=quartiles))
    elif line.dots:
        median = float(np.median([dot.x for dot in line.dots]))
        records.append(Record(what="median", at=at, series=look, median=median))
    for i, dot in enumerate(line.dots):
        jitter = 4 * ((i * 0.618034) % 1 - 0.5) if len(line.dots) > 1 else 0  # spread evenly, the same every time
        records.append(Record(what="dot", at=at + jitter, x=dot.x, series=look, label=dot.label, scored=dot.scored))
    return records


@lru_cache(maxsize=256)
def _spec(height: int, axis: str, domain: tuple[float, float], zero: bool) -> dict[str, Any]:
    alt = charts.require_altair()
    y = alt.Y("at:Q", scale=charts.pixel_scale(height), axis=None)
    scale = charts.exact_scale(domain, 8)

    def x(field: str) -> Any:
        return alt.X(f"{field}:Q", title=axis, scale=scale, axis=alt.Axis(tickCount=6, grid=False))

    colour, shape = charts.series_channels("series", range(1, LOOKS + 1))
    guide, box, dot = of_kind("guide"), of_kind("box"), of_kind("dot").mark_point(style="point", filled=True)
    of_box = charts.tooltip(("label:N", "of"), ("quartiles:N", "quartiles"))
    of_dot = charts.tooltip(("label:N", "of"), ("x:Q", axis, "+.2f" if zero else ".2f"), ("scored:N", "scores"))
    left, right = alt.value(0), alt.value("width")
    layers = [guide.mark_rule(style="guide").encode(x=left, x2=right, y=y)]
    if zero:
        # One segment per line, so that it crosses no name.
        segment = alt.Y("top:Q", scale=charts.pixel_scale(height), axis=None)
        layers.append(guide.mark_rule(style="baseline").encode(x=alt.XDatum(0), y=segment, y2="bottom:Q"))
    bar, tick = box.mark_bar(style="box", size=13), {"style": "median", "size": 15}
    name = of_kind("name").mark_text(style="name", align="left", baseline="middle")
    value = of_kind("value").mark_text(style="value", align="right", baseline="middle")
    layers += [
        box.mark_rule(style="whisker").encode(x=x("low"), x2="high:Q", y=y, color=colour),
        bar.encode(x=x("q1"), x2="q3:Q", y=y, color=colour, stroke=colour, tooltip=of_box),
        dot.encode(x=x("x"), y=y, color=colour, shape=shape, tooltip=of_dot),
        box.mark_tick(**tick).encode(x=x("median"), y=y, color=colour),
        of_kind("median").mark_tick(**tick).encode(x=x("median"), y=y, color=colour),
        name.encode(x=left, y=y, text="text:N"),
        value.encode(x=right, y=y, text="text:N"),
    ]
    return charts.to_spec(alt.layer(*layers), height)
