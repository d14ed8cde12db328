"""Figures: panels of Vega-Lite without their data, a legend and the numbers; and their export to files.

The page draws each panel as wide as its place, in the light or the dark palette; a file sets the panels side by side on white.
No colour, font or font size is written in a figure: marks name a *style* or take the next colour of a range (see `theme`).
Scores are in percent, gains in points.
"""

import csv
import io
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import ceil
from textwrap import wrap
from types import MappingProxyType
from typing import Any, Literal

from mlfusion.report.figures.charts import DATA
from mlfusion.report.theme import DASHES, LIGHT, Symbol, config, symbol_at
from mlfusion.system.text import csv_cell

Value = str | float | int | None


class Record(Mapping[str, Value]):
    """The data of one mark: named values that cannot be changed; a value that is absent is None."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Value] = MappingProxyType({}), /, **more: Value) -> None:
        self._values = {**values, **more}

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def number(self, name: str) -> float:
        """The value as a number.

        Raises:
            TypeError: it is absent or a text.
        """
        value = self._values[name]
        if value is None or isinstance(value, str):
            raise TypeError(f"{name} of a record is {value!r}, not a number")
        return float(value)

    def extended(self, **more: Value) -> "Record":
        """A copy of the record with added or replaced values."""
        return Record(self._values, **more)

    def without(self, *names: str) -> "Record":
        """A copy of the record without some values."""
        return Record({name: value for name, value in self._values.items() if name not in names})


@dataclass(frozen=True, eq=False)
class Panel:
    """One view: `spec` is Vega-Lite for a container's full width, whose data are `records`."""

    title: str
    spec: Mapping[str, Any]
    records: Sequence[Record]
    width: int = 460  # width in a file, which has no container


@dataclass(frozen=True)
class LegendEntry:
    """One entry of a legend; `colour` counts the series' colours from 1, and 0 is the palette's quiet colour."""

    label: str
    colour: int
    symbol: Symbol


@dataclass(frozen=True, eq=False)
class Figure:
    """Panels that share a legend."""

    name: str  # anchor on the page and file name
    title: str
    note: str  # the caption: what is drawn, the number of cases, the meaning of an interval
    description: str  # the text for readers who cannot see the figure
    panels: Sequence[Panel]
    numbers: Sequence[Record] = field(repr=False)  # records of the CSV, one per mark
    legend: Sequence[LegendEntry] = ()
    columns: int = 3  # panels beside each other in a file
    page_width: Literal["", "wide", "narrow"] = ""  # width of a panel on the page
    more_numbers: Mapping[str, Sequence[Record]] = field(default_factory=dict, repr=False)  # {name: records of a CSV}


def series(position: int) -> tuple[int, Symbol]:
    """(colour counted from 1, symbol) of the series at a position, as `theme.symbol_at` goes on."""
    return position % len(LIGHT.series) + 1, symbol_at(position)


def series_legend(names: Sequence[str], shown: Container[str] | None = None) -> tuple[LegendEntry, ...]:
    """One entry for each series, or for those shown; a series keeps the colour and symbol of its position."""
    return tuple(LegendEntry(name, *series(i)) for i, name in enumerate(names) if shown is None or name in shown)


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV; columns in order of appearance, an absent value empty, texts as `csv_cell` writes them."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(chain.from_iterable(records))), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in record.items()} for record in records)
    return buffer.getvalue()


def combined_spec(figure: Figure) -> dict[str, Any]:
    """All panels as one specification on white, under the title, with the legend and the note."""
    datasets = {f"{DATA}-{i}": [dict(record) for record in panel.records] for i, panel in enumerate(figure.panels)}
    views = []
    for i, panel in enumerate(figure.panels):
        view = {key: value for key, value in panel.spec.items() if key not in ("$schema", "config")}
        views.append(view | {"width": panel.width, "data": {"name": f"{DATA}-{i}"}, "title": panel.title})
    columns = min(figure.columns, len(views))
    total_width = columns * (max(panel.width for panel in figure.panels) + 40)
    body = {"concat": views, "columns": columns, "spacing": 36, "resolve": {"scale": {"color": "shared"}}}
    note = wrap(figure.note, ceil(total_width / 6.2), break_long_words=False, break_on_hyphens=False)
    title_style = {
        "fontSize": 16,
        "subtitleFontSize": 12,
        "subtitleColor": LIGHT.quiet,
        "subtitlePadding": 6,
        "offset": 18,
    }
    theme = config(LIGHT) | {"background": LIGHT.paper, "padding": 16, "concat": {"spacing": 36}}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": title_style | {"text": figure.title, "subtitle": note},
        "datasets": datasets,
        "vconcat": [*([_legend(figure.legend, total_width)] if figure.legend else []), body],
        "config": theme,
    }


def _legend(entries: Sequence[LegendEntry], width: int) -> dict[str, Any]:
    """The legend as a row of symbols and labels, broken into lines of `width` pixels."""
    x, y, layers = 0.0, 6.0, []
    for entry in entries:
        entry_width = 40 + 6.8 * len(entry.label)
        if x and x + entry_width > width:
            x, y = 0.0, y + 20
        colour = LIGHT.series[entry.colour - 1] if entry.colour else LIGHT.quiet
        layers += _symbol(entry.symbol, x, y, colour)
        layers.append(_fixed({"type": "text", "align": "left", "style": "name", "text": entry.label}, x + 24, y))
        x += entry_width
    return {"width": width, "height": y + 8, "layer": layers, "data": {"values": [{}]}}


def _fixed(mark: dict[str, Any], x: float, y: float, **more: float) -> dict[str, Any]:
    at = {"x": x, "y": y} | more
    return {"mark": mark, "encoding": {name: {"value": value} for name, value in at.items()}}


def _symbol(symbol: Symbol, x: float, y: float, colour: str) -> list[dict[str, Any]]:
    if symbol == "line" or symbol in DASHES:
        dash = {"strokeDash": DASHES[symbol]} if symbol in DASHES else {}
        return [_fixed({"type": "rule", "color": colour, "strokeWidth": 2, **dash}, x, y, x2=x + 18)]
    if symbol == "box":
        mark = {"type": "rect", "color": colour, "fillOpacity": 0.3, "stroke": colour}
        return [_fixed(mark, x + 1, y - 5, x2=x + 17, y2=y + 5)]
    hollow = symbol == "hollow"
    point = {"type": "point", "shape": "circle" if hollow else symbol, "filled": not hollow}
    return [_fixed(point | {"color": colour, "size": 70, "opacity": 1}, x + 9, y)]


def svg(figure: Figure) -> str:
    """The figure as SVG on white."""
    import vl_convert

    return vl_convert.vegalite_to_svg(combined_spec(figure))


def png(drawing: str, scale: float = 2) -> bytes:
    """A figure's SVG as PNG, `scale` pixels a unit."""
    import vl_convert

    return vl_convert.svg_to_png(drawing, scale=scale)


def extent(values: Iterable[float]) -> tuple[float, float]:
    """The lowest and the highest value, moved apart to at least two points: a narrower axis would magnify noise."""
    numbers = list(values)
    missing = max(0.0, 2 - (max(numbers) - min(numbers))) / 2
    return min(numbers) - missing, max(numbers) + missing
