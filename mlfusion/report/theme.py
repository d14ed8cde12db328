"""Colours, symbols and styles of every figure and the page: a light and a dark palette, both safe for colour-blind readers."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

PointShape = Literal["square", "circle", "diamond", "triangle-up", "cross", "triangle-down"]
Symbol = PointShape | Literal["line", "dashed", "dotted", "dash-dot", "box", "hollow"]

DASHES: dict[Symbol, list[float]] = {"dashed": [4, 3], "dotted": [2, 3], "dash-dot": [7, 3, 2, 3]}
"""Dash patterns of lines: lengths of dash and gap in turn."""

FONT = "system-ui, -apple-system, Segoe UI, Roboto, Noto Sans, DejaVu Sans, sans-serif"
SYMBOLS: tuple[PointShape, ...] = get_args(PointShape)
"""Symbols of the series of a figure, in order of use."""


LOOKS = len(SYMBOLS) ** 2
"""Number of series that differ in colour or symbol; there are as many colours as symbols."""


def symbol_at(position: int) -> PointShape:
    """The symbol of the series at a position: where colours begin again, symbols are moved on by one."""
    return SYMBOLS[(position + position // len(SYMBOLS)) % len(SYMBOLS)]


@dataclass(frozen=True)
class Palette:
    """Colours by their purpose."""

    paper: str
    panel: str
    ink: str
    quiet: str
    line: str
    accent: str
    series: tuple[str, ...]  # after Okabe and Ito, in order of use
    heat: tuple[str, ...]  # from low to high; one hue, so that only lightness carries the value
    gain: str
    loss: str


LIGHT = Palette(
    paper="#ffffff",
    panel="#f7f8fa",
    ink="#1b2027",
    quiet="#5b6573",
    line="#dfe3e8",
    accent="#0b5fa5",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9"),
    heat=("#eef3f9", "#a9c9e6", "#3f86c0", "#0b3c71"),
    gain="#5ba4dc",
    loss="#e89a55",
)
DARK = Palette(
    paper="#12161b",
    panel="#191f26",
    ink="#e7eaee",
    quiet="#9aa5b2",
    line="#2d353f",
    accent="#7cb8f0",
    series=("#56b4e9", "#f0a13a", "#35c79a", "#e29cc4", "#e8dc5a", "#a7b6ff"),
    heat=("#1d2732", "#20507f", "#5aa2d8", "#e0f0ff"),
    gain="#1f6aa8",
    loss="#a0601c",
)


def css(palette: Palette) -> str:
    """The palette as custom properties: --paper, …, --series-1, …, --heat-4."""
    properties = []
    for name, value in asdict(palette).items():
        colours = enumerate(value, 1) if isinstance(value, tuple) else ()
        properties += [f"--{name}-{i}: {colour};" for i, colour in colours] or [f"--{name}: {value};"]
    return " ".join(properties)


def config(palette: Palette) -> dict[str, Any]:
    """Vega-Lite's `config`, which defines the styles and colour ranges that figures name."""
    ink, quiet, line = palette.ink, palette.quiet, palette.line
    words = {"labelColor": quiet, "titleColor": quiet, "titleFontWeight": "normal", "titleFontSize": 12}
    heat = list(palette.heat)
    return {
        "background": None,
        "font": FONT,
        "padding": {"left": 1, "right": 1, "top": 2, "bottom": 5},
        "view": {"stroke": None},
        "mark": {"color": palette.series[0]},
        "rule": {"color": ink},
        "title": {"color": ink, "fontSize": 13, "anchor": "start", "offset": 12},
        "axis": words
        | {"labelFontSize": 12, "gridColor": line, "domainColor": line, "tickColor": line, "titlePadding": 8},
        "legend": words | {"labelFontSize": 12, "titleOrient": "left", "offset": 26, "titlePadding": 8},
        "range": {
            "category": list(palette.series),
            "heatmap": heat,
            "ramp": heat,
            "diverging": [palette.loss, palette.paper, palette.gain],
            "symbol": list(SYMBOLS),
        },
        "style": {
            "dot": {"size": 75, "opacity": 1},
            "hollow": {"size": 75, "opacity": 1, "filled": False, "strokeWidth": 2},
            "point": {"size": 26, "opacity": 0.55},
            "bar": {"strokeWidth": 2.5},
            "whisker": {"strokeWidth": 1.5},
            "box": {"fillOpacity": 0.22, "strokeWidth": 1.25},
            "median": {"thickness": 2.5},
            "stem": {"strokeWidth": 1.25, "opacity": 0.6},
            "series": {"strokeWidth": 2},
            "similarity-linear": {"strokeWidth": 2, "strokeDash": DASHES["dotted"]},
            "similarity-rbf": {"strokeWidth": 1.5, "strokeDash": DASHES["dash-dot"]},
            "guide": {"color": line, "strokeWidth": 1},
            "baseline": {"color": quiet, "strokeWidth": 1.5, "strokeDash": [4, 3]},
            "level": {"color": ink, "strokeWidth": 1.5, "strokeDash": [8, 4]},
            "name": {"color": ink, "fontSize": 12},
            "value": {"color": ink, "fontSize": 12, "fontWeight": 600},
            "head": {"color": quiet, "fontSize": 12, "fontWeight": 600},
            "on-weak": {"color": ink, "fontSize": 11},
            "on-strong": {"color": palette.paper, "fontSize": 11},
        },
    }
