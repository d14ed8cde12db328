"""What a figure is: panels of Vega-Lite without their data, a legend, and the numbers; and how it becomes files.

The page draws each panel over the full width of its place and takes colours from light or dark; a file sets the panels
side by side on white. No colour, font or size of type is written in a figure: marks name a *style* or take the next
colour of a range (see `look`). Scores are in percent, gains in points.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mlfusion.errors import Unavailable
from mlfusion.report.look import DASHES, LIGHT, Shape, config

Record = dict[str, str | float | int | None]

DATA = "records"  # the name under which a panel's specification asks for its data


@dataclass(frozen=True, eq=False)
class Panel:
    """One view: `spec` is Vega-Lite for a container's full width, whose data are `records`."""

    title: str
    spec: Mapping[str, Any]
    records: Sequence[Record]
    width: int = 460  # in a file, where there is no container


@dataclass(frozen=True)
class Key:
    """One entry of a legend; `colour` counts the series' colours from 1, 0 being the quiet one."""

    label: str
    colour: int
    shape: Shape


@dataclass(frozen=True, eq=False)
class Figure:
    """One drawing: panels that share a legend. `says` is what a reader who cannot see it is told, `note` how to read it."""

    name: str  # of its place on the page and of its files
    title: str
    note: str  # what is drawn, of how many, and what an interval means
    says: str
    panels: Sequence[Panel]
    numbers: Sequence[Record] = field(repr=False)  # what is drawn, one a mark, as its CSV holds it
    legend: Sequence[Key] = ()
    columns: int = 3  # of panels, in a file
    room: Literal["", "wide", "narrow"] = ""  # that a panel takes on the page
    more: Mapping[str, Sequence[Record]] = field(default_factory=dict, repr=False)  # other numbers: {name: records}

    def named(self, name: str) -> "Figure":
        """The same under another name."""
        return replace(self, name=name)


def needs_altair() -> Any:
    """Altair, which is imported late: everything but the page and the figures works without.

    Raises:
        Unavailable: it, or another part of the extra, is not installed.
    """
    try:
        import altair
        import itables  # noqa: F401  the page takes its tables' code from it
        import vl_convert  # noqa: F401  and the drawing code from this
    except ImportError as err:
        raise Unavailable(
            f"a page or figures need {err.name}, which is not installed; allowed without it: the table that `mlfusion "
            "report` prints. Type: pip install 'mlfusion[report]'"
        ) from err
    return altair


def charted() -> Any:
    """An Altair chart of the panel's records."""
    alt = needs_altair()
    return alt.Chart(alt.NamedData(DATA))


def finished(chart: Any, height: int) -> dict[str, Any]:
    """The chart's specification, as wide as its container."""
    spec: dict[str, Any] = chart.properties(width="container", height=height).to_dict()
    return {**spec, "data": {"name": DATA}, "layer": [_inheriting(layer) for layer in spec["layer"]]}


def _inheriting(layer: dict[str, Any]) -> dict[str, Any]:
    """Without the name of the data, which Altair may write into every layer: the panel's are those of all of them."""
    inner = {key: value for key, value in layer.items() if key != "data"}
    return inner | ({"layer": [_inheriting(one) for one in inner["layer"]]} if "layer" in inner else {})


def numbers_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV; columns in the order in which they first come, an absent value empty."""
    names = list(dict.fromkeys(name for record in records for name in record))
    held = io.StringIO()
    writer = csv.DictWriter(held, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return held.getvalue()


# --- files -----------------------------------------------------------------------------------------------------------


def whole(figure: Figure) -> dict[str, Any]:
    """All panels as one specification on white, under the title, with the legend and the note."""
    datasets = {f"{DATA}-{i}": list(panel.records) for i, panel in enumerate(figure.panels)}
    views = []
    for i, panel in enumerate(figure.panels):
        view = {key: value for key, value in panel.spec.items() if key not in ("$schema", "config")}
        views.append(view | {"width": panel.width, "data": {"name": f"{DATA}-{i}"}, "title": panel.title})
    columns = min(figure.columns, len(views))
    across = columns * (max(panel.width for panel in figure.panels) + 40)
    body = {"concat": views, "columns": columns, "spacing": 36, "resolve": {"scale": {"color": "shared"}}}
    look = config(LIGHT) | {"background": LIGHT.paper, "padding": 16, "concat": {"spacing": 36}}
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
        "config": look,
    }


def _lines(text: str, width: int) -> list[str]:
    """Text in lines of about so many pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + len(word) < width / 6.2:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _legend(keys: Sequence[Key], width: int) -> dict[str, Any]:
    """The legend as a row of marks and words, in lines where it is too long for one."""
    x, y, layers = 0.0, 6.0, []
    for key in keys:
        room = 40 + 6.8 * len(key.label)
        if x and x + room > width:
            x, y = 0.0, y + 20
        colour = LIGHT.series[key.colour - 1] if key.colour else LIGHT.quiet
        layers += _symbol(key, x, y, colour)
        layers.append(_fixed({"type": "text", "align": "left", "style": "name", "text": key.label}, x + 24, y))
        x += room
    return {"width": width, "height": y + 8, "layer": layers, "data": {"values": [{}]}}


def _fixed(mark: dict[str, Any], x: float, y: float, **more: float) -> dict[str, Any]:
    at = {"x": x, "y": y} | more
    return {"mark": mark, "encoding": {name: {"value": value} for name, value in at.items()}}


def _symbol(key: Key, x: float, y: float, colour: str) -> list[dict[str, Any]]:
    if key.shape == "line" or key.shape in DASHES:
        dash = {"strokeDash": DASHES[key.shape]} if key.shape in DASHES else {}
        return [_fixed({"type": "rule", "color": colour, "strokeWidth": 2, **dash}, x, y, x2=x + 18)]
    if key.shape == "box":
        mark = {"type": "rect", "color": colour, "fillOpacity": 0.3, "stroke": colour}
        return [_fixed(mark, x + 1, y - 5, x2=x + 17, y2=y + 5)]
    hollow = key.shape == "hollow"
    shape = "circle" if hollow else key.shape
    return [
        _fixed(
            {"type": "point", "shape": shape, "filled": not hollow, "color": colour, "size": 70, "opacity": 1}, x + 9, y
        )
    ]


def svg(figure: Figure) -> str:
    """The figure as SVG on white."""
    needs_altair()
    import vl_convert

    return vl_convert.vegalite_to_svg(whole(figure))


def png(drawn: str, scale: float = 2) -> bytes:
    """A figure's SVG as PNG, `scale` pixels a unit."""
    import vl_convert

    return vl_convert.svg_to_png(drawn, scale=scale)


def spread_of(records: Iterable[Record], low: str, high: str, least: float = 2) -> tuple[float, float]:
    """From the lowest end to the highest, `least` points at least: less would make noise look like news."""
    held = list(records)
    bottom = min(float(r[low]) for r in held if r.get(low) is not None)  # type: ignore[arg-type]
    top = max(float(r[high]) for r in held if r.get(high) is not None)  # type: ignore[arg-type]
    missing = max(0.0, least - (top - bottom)) / 2
    return bottom - missing, top + missing
