"""The report as one HTML file that loads nothing: what a researcher opens, reads top down, explores, and can hand on."""

import base64
import gzip
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mlfusion.progress import duration
from mlfusion.report import library, look, published, tables, words
from mlfusion.report.figures import block as of_block
from mlfusion.report.figures import gains, images, study
from mlfusion.report.figures.drawing import Figure, Panel, needs_altair
from mlfusion.report.files import sheets, write_whole
from mlfusion.report.pictures import Picture, Strip, data_url
from mlfusion.report.summary import (
    OTHER_CODE,
    Block,
    Score,
    Study,
    blocks,
    count,
    domain,
    listed,
    metric_name,
    percent,
    studies,
)
from mlfusion.results import Results, Row
from mlfusion.specs import KINDS, STUDY, layer_ranges, token_words
from mlfusion.statistics import Spread

TITLE = "Do the intermediate layers help?"

MOST_ROWS = 10_000
"""More rows than these are counted, not listed: the page stays small, and the rows lie in the results anyway."""

FEW = 4
"""Up to so many cases (a model on a data set) have their own figures at the top; more have them with their data set."""

SHAPES = {
    "square": "M8 2H16V10H8Z",
    "circle": "M7.5 6A4.5 4.5 0 1 0 16.5 6A4.5 4.5 0 1 0 7.5 6Z",
    "diamond": "M12 .5L17.5 6L12 11.5L6.5 6Z",
    "triangle-up": "M12 1L17.5 10.5H6.5Z",
    "cross": "M10 1H14V4H17V8H14V11H10V8H7V4H10Z",
    "triangle-down": "M6.5 1.5H17.5L12 11Z",
}


@dataclass(frozen=True)
class More:
    """What rows alone do not hold, all of it optional."""

    results: Results | None = None  # whose arrays give confusions and calibration
    cka: of_block.Cka | None = None
    pictures: Mapping[str, Sequence[Strip]] | None = None  # {data set: its strips}


def write_page(
    rows: Sequence[Row],
    path: Path | str,
    *,
    title: str = TITLE,
    results: Results | None = None,
    cka: of_block.Cka | None = None,
    pictures: Mapping[str, Sequence[Strip]] | None = None,
) -> Path:
    """Write the page, whole or not at all; the same rows give the same bytes. Returns its path.

    Args:
        rows: of any models and data sets.
        path: of the file.
        title: its heading.
        results: where the rows come from; its arrays give confusions and calibration.
        cka: likeness of layers to the last, drawn beside accuracy by layer.
        pictures: {data set: its strips}, such as examples and maps of attention.

    Raises:
        MlfusionError: there are no rows, or the page cannot be written there.
        Unavailable: Altair is not installed; says what to install.
    """
    path = Path(path)
    return write_whole(path, page(rows, title=title, name=path.name, more=More(results, cka, pictures)))


def page(rows: Sequence[Row], *, title: str = TITLE, name: str = "report.html", more: More = More()) -> str:
    """The page's HTML; `name` is the file that its last command writes."""
    held = blocks(rows)
    needs_altair()
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    names = "|".join(sorted({re.escape(probe) for probe in {row.probe for row in rows}}, key=len, reverse=True))

    def whole(sentence: str) -> markupsafe.Markup:
        """Probes' names are not broken at their hyphens. The parts are escaped one by one."""
        span = markupsafe.Markup('<span class="whole">{}</span>')
        parts = enumerate(re.split(f"({names})", sentence))
        return markupsafe.Markup("").join(span.format(part) if i % 2 else part for i, part in parts)

    environment.filters |= {"count": count, "whole": whole, "packed": _packed}
    template = environment.from_string(_own("page.html"))
    return template.render(
        title=title,
        drawing=library.drawing(),
        library=library.tables(),
        script=_own("page.js"),
        style=_own("page.css"),
        light=look.css(look.LIGHT),
        dark=look.css(look.DARK),
        shapes=SHAPES,
        dashes=look.DASHES,
        **_content(held, rows, name, more),
    )


def _packed(value: Any) -> str:
    """JSON, compressed by gzip (the same bytes every time), in base64."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _own(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _content(held: Sequence[Block], rows: Sequence[Row], name: str, more: More) -> dict[str, Any]:
    counted = [row for block in held for row in block.rows]
    each = studies(held)
    several = [block for block in held if block.probes]
    layered = [block for block in held if block.by_layer]
    few = len(held) <= FEW
    attended = [pair for one in each for pair in of_block.attended(one)]
    drawn = {
        "accuracy": [of_block.accuracy(several)] if few and several else [],
        "attention": [of_block.attention(attended)] if attended else [],
        "layers": [of_block.by_layer(layered, more.cka)] if few and layered else [],
    }
    over = [_over(one) for one in each if len(one.blocks) > 1 and one.probes]
    sections = _sections(each, held)
    datasets = _datasets(each, more, few, of_block.top_share(attended) if attended else None)
    own = {one["name"]: one["id"] for one in datasets}
    grids = {"scores": _scores_grid([(b, s) for b in held for s in b.probes], len(held) > 1), "runs": _runs_grid(held)}
    singles = [(block, score) for block in held for score in block.scores if score.layerwise]
    if singles:
        grids["layer-scores"] = _scores_grid(singles, len(held) > 1)
    listed_rows = _listed(counted)
    if listed_rows:
        grids["rows"] = _rows_grid(listed_rows)
    for section in sections:
        if "table" in section:
            grids[section["grid"]] = section.pop("table")
    all_figures = [figure for group in drawn.values() for figure in group]
    all_figures += [figure for _, figures, _ in over for figure in figures]
    all_figures += [figure for section in sections for figure in section["figures"]]
    all_figures += [figure for one in datasets for figure in one["figures"]]
    return {
        "opening": words.opening(held),
        "answers": [words.brief(block) for block in held] if len(held) > 1 else [],
        "facts": facts(held),
        "warnings": words.warnings(held),
        "scored_by": of_block.what(held),
        "guessing": words.guessing(held),
        "metric": listed(list(dict.fromkeys(metric_name(block.metric) for block in held))),
        "contents": _contents(several, attended, layered, sections, datasets, of_block.what(held)),
        "drawn": drawn,
        "over": over,
        "sections": sections,
        "datasets": datasets,
        "parts": own,
        "figures": _figures_json(all_figures),
        "tables": grids,
        "scored": bool(several),
        "singles": bool(singles),
        "other_code": OTHER_CODE if any(score.other_code for block in held for score in block.probes) else "",
        "attended": [words.attention(found, block) for block, found in attended],
        "best_layers": [words.best_layers(block) for block in layered],
        "layerwise_command": _layerwise_command(held[0]),
        "listed": len(listed_rows),
        "row_count": len(counted),
        "superseded": len(rows) - len(counted),
        "versions": _versions(counted),
        "codes": list(dict.fromkeys(row.code for row in counted)),
        "commands": [
            *dict.fromkeys(c for block in held for c in commands(block)),
            f"mlfusion report --html {shlex.quote(name)}",
        ],
        "made": max(row.created for row in counted)[:10],
    }


def _over(one: Study) -> tuple[str, list[Figure], list[dict[str, Any]]]:
    """What stands over the models and data sets of a study: its name, figures and tables."""
    figures = [figure for figure in (gains.by_probe(one), gains.by_model(one), study.ranks(one)) if figure]
    return one.name, [_renamed(figure, one) for figure in figures], [tables.as_any(s) for _, s in sheets(one.blocks)]


def _renamed(figure: Figure, one: Study) -> Figure:
    """With the study's name in its own, so that figures of several studies can stand on one page."""
    return figure.named(tables.slug(f"{figure.name}-{one.name}")) if one.name else figure


def _sections(each: Sequence[Study], held: Sequence[Block]) -> list[dict[str, Any]]:
    """Sections that come after the layers: those that the rows have something for."""

    def figures(draw: Callable[[Study], Figure | None]) -> list[Figure]:
        return [_renamed(figure, one) for one in each if (figure := draw(one))]

    plain: list[tuple[str, str, list[Figure], str, bool]] = [
        ("tokens", "CLS, AP, or both", figures(gains.by_token), "", True),
        ("heads", "How many heads", figures(gains.by_heads), "", False),
        ("cost", "What a point costs", figures(study.cost), "", False),
        ("seeds", "How much a seed changes", figures(study.seeds), "wide", False),
        ("train-test", "Train against test", figures(study.train_test), "narrow", False),
    ]
    made: list[dict[str, Any]] = [
        {"name": name, "title": title, "text": "", "figures": found, "wide": wide, "first_only": first, "grid": ""}
        for name, title, found, wide, first in plain
        if found
    ]
    if found := published.beside(held):
        figure = published.figure(found)
        made.append(
            {
                "name": "paper",
                "title": "Beside the published scores",
                "text": published.summed_up(found),
                "figures": [figure] if figure else [],
                "wide": "narrow",
                "first_only": False,
                "grid": "beside",
                "table": _beside_grid(found),
            }
        )
    return made


def _contents(
    several: Sequence[Any],
    attended: Sequence[Any],
    layered: Sequence[Any],
    sections: Sequence[dict[str, Any]],
    datasets: Sequence[Any],
    scored_by: str,
) -> list[tuple[str, str]]:
    made = [("accuracy", scored_by), ("all-scores", "All scores")] if several else []
    made += [("attention", "Attention")] * bool(attended) + [("layers", "By layer")] * bool(layered)
    made += [(section["name"], section["title"]) for section in sections]
    return [*made, *([("data-sets", "Data sets")] if datasets else []), ("run", "What was run")]


# --- data set by data set --------------------------------------------------------------------------------------------


def _datasets(each: Sequence[Study], more: More, few: bool, top: float | None) -> list[dict[str, Any]]:
    """One part a data set: its figures where there are too many for the top, its pictures, its confusions.

    `top` is the share of attention at the end of the scale of colours.
    """
    names = list(dict.fromkeys(name for one in each for name in one.datasets))
    names += [name for name in more.pictures or {} if name not in names]
    made = []
    for i, name in enumerate(names):
        mine = [b for one in each for model in one.models if (b := one.block(model, name))]
        figures: list[Figure] = []
        if not few:
            if probed := [block for block in mine if block.probes]:
                figures.append(of_block.accuracy(probed, f"accuracy-{i}"))
            if attended := [(block, found) for block in mine if (found := block.attention)]:
                figures.append(of_block.attention(attended, f"attention-{i}", top))
            if layered := [block for block in mine if block.by_layer]:
                figures.append(of_block.by_layer(layered, more.cka, f"layers-{i}"))
        seen = images.seen(mine, more.results) if more.results else None
        if seen:
            figures += [figure.named(f"{figure.name}-{i}") for figure in images.figures(seen)]
        strips = [_strip(strip) for strip in (more.pictures or {}).get(name, ())]
        if not figures and not strips and not seen:
            continue
        made.append(
            {
                "name": name,
                "id": f"dataset-{tables.slug(name)}",
                "about": _about(name, mine),
                "figures": figures,
                "strips": strips,
                "confused": images.confused(seen) if seen else [],
                "confused_note": images.note(seen) if seen else "",
            }
        )
    return made


def _about(name: str, mine: Sequence[Block]) -> str:
    if not mine:
        return ""
    best = max((block.answer for block in mine if block.answer), key=lambda score: score.val.mean, default=None)
    sizes = mine[0].rows[0].images
    said = [domain(name)] * (domain(name) != "Others")
    said.append(f"{count(len(mine[0].rows[0].classes))} classes")
    said.append(f"{count(sizes.train)} + {count(sizes.test)} images")
    if best:
        said.append(f"{best.probe} {percent(best.test.mean)} %")
    return " · ".join(said)


def _strip(strip: Strip) -> dict[str, Any]:
    pictures = []
    for picture in strip.pictures:
        urls = [data_url(Picture(picture.image))] + ([data_url(picture)] if picture.attention is not None else [])
        pictures.append({"caption": picture.caption, "urls": urls})
    return {"title": strip.title, "says": strip.says, "pictures": pictures}


# --- what the page's script reads ------------------------------------------------------------------------------------


def _figures_json(figures: Sequence[Figure]) -> dict[str, Any]:
    """Specifications once each, and of every panel which one it has and its records as rows of a table."""
    specs: list[Any] = []
    place: dict[int, int] = {}
    panels: dict[str, Any] = {}
    for figure in figures:
        for i, panel in enumerate(figure.panels):
            if id(panel.spec) not in place:
                place[id(panel.spec)] = len(specs)
                specs.append(panel.spec)
            panels[f"{figure.name}-{i}"] = {"spec": place[id(panel.spec)], **_columns(panel)}
    looks = {"light": look.config(look.LIGHT), "dark": look.config(look.DARK)}
    return {"looks": looks, "specs": specs, "panels": panels}


def _columns(panel: Panel) -> dict[str, Any]:
    keys = list(dict.fromkeys(key for record in panel.records for key in record))
    rows = [[_short(record.get(key)) for key in keys] for record in panel.records]
    return {"keys": keys, "rows": rows}


def _short(value: Any) -> Any:
    """No more digits than a figure can show; what is no number is absent."""
    if isinstance(value, float):
        return None if not math.isfinite(value) else float(f"{value:.6g}")
    return value


@dataclass(frozen=True)
class Column:
    """One column of a table to explore; text is sent once each, numbers as they are."""

    title: str
    kind: str  # text, code, percent, points, count, duration or setting
    cells: Sequence[Any]
    hidden: bool = False

    def head(self) -> dict[str, Any]:
        """What the script needs to know of it."""
        made: dict[str, Any] = {"title": self.title, "kind": self.kind}
        if self.kind in ("text", "code"):
            made["words"] = list(dict.fromkeys(self.cells))
        return made | ({"hidden": True} if self.hidden else {})

    def sent(self) -> list[Any]:
        """Its cells, text as a place among the words."""
        if self.kind not in ("text", "code"):
            return [tuple(map(_short, cell)) if isinstance(cell, tuple) else _short(cell) for cell in self.cells]
        place = {word: i for i, word in enumerate(dict.fromkeys(self.cells))}
        return [place[cell] for cell in self.cells]


def _grid(columns: Sequence[Column], order: list[list[Any]] | None = None) -> dict[str, Any]:
    made = {
        "columns": [c.head() for c in columns],
        "rows": [list(r) for r in zip(*(c.sent() for c in columns), strict=True)],
    }
    return made | ({"order": order} if order else {})


def _spread(spread: Spread | None, marked: bool = False) -> tuple[Any, ...] | None:
    return None if spread is None else (spread.mean, spread.sd, *([1] if marked else []))


def _scores_grid(pairs: Sequence[tuple[Block, Score]], several: bool) -> dict[str, Any]:
    place = [
        Column("Model", "text", [block.model for block, _ in pairs]),
        Column("Data set", "text", [block.name.removeprefix(f"{block.model} on ") for block, _ in pairs]),
    ]
    domains = [domain(block.dataset) for block, _ in pairs]
    grouped = [Column("Domain", "text", domains, hidden=True)] * (len(set(domains)) > 1)
    return _grid(
        [
            *(place if several else []),
            Column("Probe", "code", [score.probe for _, score in pairs]),
            Column("Test, %", "percent", [_spread(score.test) for _, score in pairs]),
            Column(
                "Gain, points",
                "points",
                ["baseline" if s.is_baseline else _spread(s.gain, s.other_code) for _, s in pairs],
            ),
            Column("Val., %", "percent", [score.val.mean for _, score in pairs]),
            Column("Train, %", "percent", [score.train.mean for _, score in pairs]),
            Column("Parameters", "count", [score.parameters for _, score in pairs]),
            Column("Time", "duration", [score.seconds for _, score in pairs]),
            Column("Seeds", "count", [score.test.n for _, score in pairs]),
            Column("Head", "text", [score.head for _, score in pairs], hidden=True),
            *grouped,
        ]
    )


def _beside_grid(found: Sequence[published.Beside]) -> dict[str, Any]:
    ours = [(one.score.test.mean, one.score.test.sd) for one in found]
    columns = [
        Column("Model", "text", [one.block.model for one in found]),
        Column("Data set", "text", [one.block.dataset for one in found]),
        Column("Probe", "code", [one.score.probe for one in found]),
        Column("Ours, %", "percent", ours),
        Column("Published, %", "percent", [one.published for one in found]),
        Column("Difference, points", "points", [one.difference for one in found]),
        Column("Flagged", "text", ["yes" if one.flagged else "no" for one in found]),
        Column("Grid", "text", [one.block.grid for one in found], hidden=True),
    ]
    return _grid(columns)


def _listed(rows: Sequence[Row]) -> list[Row]:
    """All rows, or those over more than a single layer, or none, whichever the page has room for."""
    if len(rows) <= MOST_ROWS:
        return list(rows)
    some = [row for row in rows if "-layer-" not in row.probe]
    return some if len(some) <= MOST_ROWS else []


def _rows_grid(rows: Sequence[Row]) -> dict[str, Any]:
    def metric(name: str) -> list[Any]:
        return [getattr(row.metrics, name, None) for row in rows]

    def chosen(name: str) -> list[Any]:
        return [getattr(row.selected, name, None) for row in rows]

    columns = [
        Column("Model", "text", [row.model for row in rows]),
        Column("Data set", "text", [row.dataset for row in rows]),
        Column("Probe", "code", [row.probe for row in rows]),
        Column("Seed", "count", [row.seed for row in rows]),
        Column("Test", "percent", [row.test for row in rows]),
        Column("Accuracy", "percent", metric("accuracy")),
        Column("Top-5", "percent", metric("top5")),
        Column("Macro-F1", "percent", metric("macro_f1")),
        Column("Validation", "percent", [row.val for row in rows]),
        Column("Train", "percent", [row.train for row in rows]),
        Column("Learning rate", "setting", chosen("lr")),
        Column("Weight decay", "setting", chosen("weight_decay")),
        Column("Penalty", "setting", chosen("penalty")),
        Column("Neighbours", "count", chosen("neighbours")),
        Column("Dropout", "setting", chosen("dropout")),
        Column("Heads", "count", chosen("heads")),
        Column("Steps", "count", chosen("steps")),
        Column("Batch", "count", chosen("batch_size")),
        Column("Time", "duration", [row.seconds for row in rows]),
        Column("Grid", "text", [row.grid for row in rows]),
        Column("Code", "text", [row.code for row in rows]),
        Column("Row", "code", [row.id for row in rows]),
    ]
    return _grid([column for column in columns if any(cell is not None for cell in column.cells)])


def _runs_grid(held: Sequence[Block]) -> dict[str, Any]:
    def tried(block: Block) -> str:
        found = sorted({row.configurations for row in block.rows})
        return f"{block.grid}, {' to '.join(str(n) for n in dict.fromkeys((found[0], found[-1])))}"

    def tokens(block: Block) -> str:
        return ", ".join(kind for kind in KINDS if any(kind in row.tokens for row in block.rows))

    first = [block.rows[0] for block in held]
    images = [f"{count(row.images.train)} + {count(row.images.test)}" for row in first]
    return _grid(
        [
            Column("Model on data set", "text", [block.name for block in held]),
            Column("Images", "text", images),
            Column("Classes", "count", [len(row.classes) for row in first]),
            Column("Blocks \N{MULTIPLICATION SIGN} width", "text", [_size(block) for block in held]),
            Column("Layers", "text", [layer_ranges({n for row in b.rows for n in row.layers}) for b in held]),
            Column("Tokens", "text", [tokens(block) for block in held]),
            Column("Grid", "text", [tried(block) for block in held]),
            Column("Probes", "count", [len(block.scores) for block in held]),
            Column("Seeds", "text", [layer_ranges(r.seed for r in b.rows).replace(",", ", ") for b in held]),
            Column("Time", "duration", [sum(row.seconds for row in block.rows) for block in held]),
            Column("Features", "code", [" ".join(block.features) for block in held]),
        ]
    )


def _size(block: Block) -> str:
    return f"{block.depth} \N{MULTIPLICATION SIGN} {block.rows[0].width}"


def facts(held: Sequence[Block]) -> str:
    """One line under the answer: how much stands behind it."""
    scores = [score for block in held for score in block.scores]
    rows = [row for score in scores for row in score.rows]

    def many(values: set[Any], one: str, more: str) -> str:
        return f"{len(values)} {one if len(values) == 1 else more}"

    said = [
        many({block.model for block in held}, "model", "models"),
        many({block.dataset for block in held}, "data set", "data sets"),
        many({score.probe for score in scores}, "probe", "probes"),
        many({row.seed for row in rows}, "seed", "seeds"),
    ]
    return f"{', '.join(said)}; {duration(sum(row.seconds for row in rows))} of probing."


def _versions(rows: Sequence[Row]) -> dict[str, str]:
    """{library: its version, or all of them where rows differ}."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for library_name, version in row.versions.items():
            found.setdefault(library_name, {})[version] = None
    return {library_name: ", ".join(versions) for library_name, versions in sorted(found.items())}


# --- commands that make it again -------------------------------------------------------------------------------------


def commands(block: Block) -> list[str]:
    """The `extract` and the `probe`s, one for each set of seeds, that give this block's rows."""
    place = f"--model {shlex.quote(block.model)} --dataset {shlex.quote(block.dataset)}"
    kinds = {kind for row in block.rows for kind in row.tokens}
    pairs: set[Any] = {(layer, kind) for row in block.rows for layer in row.layers for kind in row.tokens}
    usual = {(layer, kind) for layer in range(1, block.depth + 1) for kind in ("cls", "ap")}
    if kinds & {"cls", "ap"}:  # as the command does without being told; what is cached is one stream
        pairs |= {(layer, kind) for layer, kind in usual if kind in kinds}
    made = [f"mlfusion extract {place}" + (f" --tokens {token_words(pairs)}" if pairs - usual else "")]
    by_seeds: dict[tuple[int, ...], list[Score]] = {}
    for score in block.scores:
        by_seeds.setdefault(score.seeds, []).append(score)
    for seeds, scores in by_seeds.items():
        made.append(_probe(block, ",".join(_names(scores, block.depth)), seeds))
    return made


def _names(scores: Sequence[Score], depth: int) -> list[str]:
    """As short as the probes can be named: 'all' for the study's, '…-each-layer/…' for a whole series."""
    names = [score.probe for score in scores]
    if set(STUDY) <= set(names):
        names = ["all", *(name for name in names if name not in STUDY)]
    for series in dict.fromkeys(found[0] for score in scores if (found := score.layerwise)):
        kinds, _, head = series.partition("/")
        whole = [f"{kinds}-layer-{layer}/{head}" for layer in range(1, depth + 1)]
        if set(whole) <= set(names):
            names = [*(name for name in names if name not in whole), f"{kinds}-each-layer/{head}"]
    return names


def _layerwise_command(block: Block) -> str:
    seeds = sorted({row.seed for row in block.rows})
    return _probe(block, "cls-each-layer/linear,ap-each-layer/linear", seeds)


def _probe(block: Block, names: str, seeds: Sequence[int]) -> str:
    place = f"--model {shlex.quote(block.model)} --dataset {shlex.quote(block.dataset)}"
    numbers = ",".join(str(seed) for seed in seeds)
    return f"mlfusion probe {place} --probe {names} --grid {block.grid} --seeds {numbers}"
