"""The report as one self-contained HTML file."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mlfusion.report import assets, sentences, theme
from mlfusion.report.catalogue import ReportData
from mlfusion.report.figures.charts import require_altair
from mlfusion.report.figures.drawing import Figure
from mlfusion.report.figures.layers import Cka
from mlfusion.report.files import write_whole
from mlfusion.report.numbers import count
from mlfusion.report.page_tables import rounded
from mlfusion.report.pictures import Strip
from mlfusion.report.sections import sections
from mlfusion.results import Results, Row

TITLE = "Do the intermediate layers help?"

SYMBOL_PATHS = {
    "square": "M8 2H16V10H8Z",
    "circle": "M7.5 6A4.5 4.5 0 1 0 16.5 6A4.5 4.5 0 1 0 7.5 6Z",
    "diamond": "M12 .5L17.5 6L12 11.5L6.5 6Z",
    "triangle-up": "M12 1L17.5 10.5H6.5Z",
    "cross": "M10 1H14V4H17V8H14V11H10V8H7V4H10Z",
    "triangle-down": "M6.5 1.5H17.5L12 11Z",
}


def write_page(
    rows: Sequence[Row] | Path | str,
    path: Path | str,
    *,
    title: str = TITLE,
    results: Results | None = None,
    cka: Cka | None = None,
    pictures: Mapping[str, Sequence[Strip]] | None = None,
) -> Path:
    """Write the page, whole or not at all; the same rows give the same bytes. Returns its path.

    Args:
        rows: rows of any models and data sets, or the folder of results that holds them.
        title: heading of the page.
        results: the results of the rows; their arrays give confusions and calibration.
        cka: similarity of layers with the last, drawn beside accuracy by layer.
        pictures: {data set: its strips}, such as examples and attention maps.

    Raises:
        MlfusionError: there are no rows, or the page cannot be written there.
        Unavailable: Altair is not installed; says what to install.
    """
    path = Path(path)
    if isinstance(rows, (str, Path)):
        results = results or Results(rows)
        rows = results.require()
    return write_whole(path, page(ReportData(rows, results, cka, pictures), title=title, name=path.name))


def page(data: ReportData, *, title: str = TITLE, name: str = "report.html") -> str:
    """The page's HTML; `name` is the file that its last command writes."""
    groups = data.groups
    require_altair()
    import jinja2

    parts = sections(data, name)
    scripts = [_file("failures.js"), assets.vega(), assets.data_tables().script, _file("page.js")]
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"count": count, "whole": _keep_together({row.probe for row in data.rows}), "packed": _packed}
    return env.from_string(_file("page.html")).render(
        title=title,
        opening=sentences.opening(groups),
        answers=[sentences.short_answer(group) for group in groups] if len(groups) > 1 else [],
        basis=sentences.basis(groups),
        newest=max(group.newest for group in groups)[:10],
        warnings=sentences.warnings(groups),
        sections=parts,
        anchors={part.name: part.anchor for section in parts if section.body == "datasets" for part in section.content},
        figures=_figures_json([figure for section in parts for figure in section.figures]),
        tables={name: table for section in parts for name, table in section.tables.items()},
        scripts=scripts,
        hashes=" ".join(map(_script_hash, scripts)),
        data_tables_style=assets.data_tables().style,
        style=_file("page.css"),
        light=theme.css(theme.LIGHT),
        dark=theme.css(theme.DARK),
        symbols=SYMBOL_PATHS,
        dashes=theme.DASHES,
    )


def _script_hash(script: str) -> str:
    """The source by which a Content-Security-Policy allows one script (w3.org/TR/CSP3): of its text with \\n as line ends."""
    digest = hashlib.sha256(script.replace("\r\n", "\n").replace("\r", "\n").encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _keep_together(probes: set[str]) -> Any:
    """A template filter that keeps names of probes in one line; each part is escaped."""
    import markupsafe

    names = "|".join(sorted(map(re.escape, probes), key=len, reverse=True))
    span = markupsafe.Markup('<span class="whole">{}</span>')

    def whole(sentence: str) -> markupsafe.Markup:
        parts = enumerate(re.split(f"({names})", sentence))
        return markupsafe.Markup("").join(span.format(part) if i % 2 else part for i, part in parts)

    return whole


def _packed(value: Any) -> str:
    """JSON, compressed by gzip (the same bytes every time), in base64."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _figures_json(figures: Sequence[Figure]) -> dict[str, Any]:
    """Each specification once; for every panel the index of its specification, and its records as rows."""
    every = {id(panel.spec): panel.spec for figure in figures for panel in figure.panels}
    position = {key: i for i, key in enumerate(every)}
    panels: dict[str, Any] = {}
    for figure in figures:
        for i, panel in enumerate(figure.panels):
            keys = list(dict.fromkeys(key for record in panel.records for key in record))
            rows = [[rounded(record.get(key)) for key in keys] for record in panel.records]
            panels[f"{figure.name}-{i}"] = {"spec": position[id(panel.spec)], "keys": keys, "rows": rows}
    themes = {"light": theme.config(theme.LIGHT), "dark": theme.config(theme.DARK)}
    return {"themes": themes, "specs": list(every.values()), "panels": panels}
