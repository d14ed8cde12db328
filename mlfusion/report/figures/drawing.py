"""What a figure is: panels of Vega-Lite without their data, a legend, and its numbers; and how it becomes files.

The page draws each panel over the full width of its place and takes colours from the light or the dark palette; a file sets
the panels side by side on white. No colour, font or font size is written in a figure: marks name a *style* or take the next
colour of a range (see `theme`). Scores are in percent, gains in points.
"""

import csv
import io
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from mlfusion.errors import Unavailable
from mlfusion.report.theme import DASHES, LIGHT, SYMBOLS, Symbol, config

DATA = "records"  # the name under which a panel's specification asks for its data

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
        """A value that must be a number.

        Raises:
            TypeError: it is absent or a text.
        """
        value = self._values[name]
        if value is None or isinstance(value, str):
            raise TypeError(f"{name} of a record is {value!r}, not a number")
        return float(value)

    def extended(self, **more: Value) -> "Record":
        """The same with more values, or other ones."""
        return Record(self._values, **more)

    def without(self, *names: str) -> "Record":
        """The same without some values."""
        return Record({name: value for name, value in self._values.items() if name not in names})


@dataclass(frozen=True, eq=False)
class Panel:
    """One view: `spec` is Vega-Lite for a container's full width, whose data are `records`."""

    title: str
    spec: Mapping[str, Any]
    records: Sequence[Record]
    width: int = 460  # in a file, where there is no container


@dataclass(frozen=True)
class LegendEntry:
    """One entry of a legend; `colour` counts the series' colours from 1, and 0 is the palette's quiet colour."""

    label: str
    colour: int
    symbol: Symbol


@dataclass(frozen=True, eq=False)
class Figure:
    """Panels that share a legend."""

    name: str  # its place on the page and its files
    title: str
    note: str  # the caption: what is drawn, of how many, and what an interval means
    description: str  # the text for readers who cannot see the figure
    panels: Sequence[Panel]
    numbers: Sequence[Record] = field(repr=False)  # what is drawn, one a mark, as its CSV holds it
    legend: Sequence[LegendEntry] = ()
    columns: int = 3  # panels beside each other in a file
    page_width: Literal["", "wide", "narrow"] = ""  # width of a panel on the page
    more_numbers: Mapping[str, Sequence[Record]] = field(default_factory=dict, repr=False)  # {name: records of a CSV}

    def named(self, name: str) -> "Figure":
        """The same under another name."""
        return replace(self, name=name)


def series(position: int) -> tuple[int, Symbol]:
    """(colour counted from 1, symbol) of the series at a position; after the last they begin again."""
    turn = position % len(SYMBOLS)
    return turn + 1, SYMBOLS[turn]


def series_legend(names: Sequence[str], shown: Container[str] | None = None) -> tuple[LegendEntry, ...]:
    """One entry for each series, or for those shown; a series keeps the colour and symbol of its position."""
    return tuple(LegendEntry(name, *series(i)) for i, name in enumerate(names) if shown is None or name in shown)


def require_altair() -> Any:
    """Altair, imported late: everything but the page and the figures works without it.

    Raises:
        Unavailable: Altair, or another library of the extra, is not installed.
    """
    try:
        import altair
        import itables  # noqa: F401  the page reads DataTables from it
        import vl_convert  # noqa: F401  and Vega from this
    except ImportError as err:
        raise Unavailable(
            f"a page or figures need {err.name}, which is not installed; allowed without it: the table that `mlfusion "
            "report` prints. Type: pip install 'mlfusion[report]'"
        ) from err
    return altair


def base_chart() -> Any:
    """An Altair chart of the panel's records."""
    alt = require_altair()
    return alt.Chart(alt.NamedData(DATA))


def of_kind(kind: str) -> Any:
    """An Altair chart of those of the panel's records whose `what` is this."""
    return base_chart().transform_filter(f"datum.what == '{kind}'")


def to_spec(chart: Any, height: int) -> dict[str, Any]:
    """The chart's specification, as wide as its container."""
    spec: dict[str, Any] = chart.properties(width="container", height=height).to_dict()
    return {**spec, "data": {"name": DATA}, "layer": [_without_data(layer) for layer in spec["layer"]]}


def _without_data(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer without the name of the data, which Altair may write into every layer: the panel's data serve all of them."""
    inner = {key: value for key, value in layer.items() if key != "data"}
    return inner | ({"layer": [_without_data(one) for one in inner["layer"]]} if "layer" in inner else {})


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV; columns in the order in which they first come, an absent value empty."""
    names = list(dict.fromkeys(name for record in records for name in record))
    held = io.StringIO()
    writer = csv.DictWriter(held, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return held.getvalue()


# --- files -----------------------------------------------------------------------------------------------------------


def combined_spec(figure: Figure) -> dict[str, Any]:
    """All panels as one specification on white, under the title, with the legend and the note."""
    datasets = {f"{DATA}-{i}": [dict(record) for record in panel.records] for i, panel in enumerate(figure.panels)}
    views = []
    for i, panel in enumerate(figure.panels):
        view = {key: value for key, value in panel.spec.items() if key not in ("$schema", "config")}
        views.append(view | {"width": panel.width, "data": {"name": f"{DATA}-{i}"}, "title": panel.title})
    columns = min(figure.columns, len(views))
    across = columns * (max(panel.width for panel in figure.panels) + 40)
    body = {"concat": views, "columns": columns, "spacing": 36, "resolve": {"scale": {"color": "shared"}}}
    theme = config(LIGHT) | {"background": LIGHT.paper, "padding": 16, "concat": {"spacing": 36}}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": {
            "text": figure.title,
            "subtitle": _lines(figure.note, across),
            "fontSize": 16,
            "subtitleFontSize": 12,
            "subtitleColor": LIGHT.quiet,
            "subtitlePadding": 6,
            "offset": 18,
        },
        "datasets": datasets,
        "vconcat": [*([_legend(figure.legend, across)] if figure.legend else []), body],
        "config": theme,
    }


def _lines(text: str, width: int) -> list[str]:
    """Text broken into lines of about `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + len(word) < width / 6.2:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _legend(entries: Sequence[LegendEntry], width: int) -> dict[str, Any]:
    """The legend as a row of symbols and labels, broken into lines of `width` pixels."""
    x, y, layers = 0.0, 6.0, []
    for entry in entries:
        room = 40 + 6.8 * len(entry.label)
        if x and x + room > width:
            x, y = 0.0, y + 20
        colour = LIGHT.series[entry.colour - 1] if entry.colour else LIGHT.quiet
        layers += _symbol(entry.symbol, x, y, colour)
        layers.append(_fixed({"type": "text", "align": "left", "style": "name", "text": entry.label}, x + 24, y))
        x += room
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
    shape = "circle" if hollow else symbol
    return [
        _fixed(
            {"type": "point", "shape": shape, "filled": not hollow, "color": colour, "size": 70, "opacity": 1}, x + 9, y
        )
    ]


def svg(figure: Figure) -> str:
    """The figure as SVG on white."""
    require_altair()
    import vl_convert

    return vl_convert.vegalite_to_svg(combined_spec(figure))


def png(drawn: str, scale: float = 2) -> bytes:
    """A figure's SVG as PNG, `scale` pixels a unit."""
    import vl_convert

    return vl_convert.svg_to_png(drawn, scale=scale)


def extent(records: Iterable[Record], low: str, high: str, least: float = 2) -> tuple[float, float]:
    """From the lowest to the highest value, at least `least` points wide: a narrower axis would magnify noise."""
    held = list(records)
    bottom, top = min(record.number(low) for record in held), max(record.number(high) for record in held)
    missing = max(0.0, least - (top - bottom)) / 2
    return bottom - missing, top + missing
