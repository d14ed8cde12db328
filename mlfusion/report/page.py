"""The report as one HTML file that loads nothing: what a researcher opens, reads top down, and can hand on."""

import re
import shlex
import uuid
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from mlfusion.errors import MlfusionError
from mlfusion.progress import duration
from mlfusion.report import figures, words
from mlfusion.report.summary import Block, Score, blocks, count, listed, percent, points
from mlfusion.results import Row
from mlfusion.specs import KINDS, STUDY, layer_ranges, token_words
from mlfusion.statistics import Spread

TITLE = "Do the intermediate layers help?"

MOST_ROWS = 1500
"""More rows than these are counted, not listed: the page stays small, and the rows lie in the results anyway."""


def write_page(rows: Sequence[Row], path: Path | str, *, title: str = TITLE) -> Path:
    """Write the page, whole or not at all; the same rows give the same bytes. Returns its path.

    Raises:
        MlfusionError: there are no rows, or the page cannot be written there.
        Unavailable: Altair is not installed; says what to install.
    """
    path = Path(path)
    html = page(rows, title=title, name=path.name)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(html, encoding="utf-8")
        draft.replace(path)
    except OSError as err:
        raise MlfusionError(
            f"cannot write the report to {str(path)!r}: {err.strerror or err}; allowed: a file in a folder that can be "
            "written to. Type: mlfusion report --html report.html"
        ) from err
    finally:
        if draft.exists():
            draft.unlink()
    return path


def page(rows: Sequence[Row], *, title: str = TITLE, name: str = "report.html") -> str:
    """The page's HTML; `name` is the file that its last command writes."""
    held = blocks(rows)
    figures.needs_altair()
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    names = "|".join(sorted({re.escape(row["probe"]) for row in rows}, key=len, reverse=True))

    def whole(sentence: str) -> markupsafe.Markup:
        """Probes' names are not broken at their hyphens. The parts are escaped one by one."""
        span = markupsafe.Markup('<span class="whole">{}</span>')
        parts = enumerate(re.split(f"({names})", sentence))
        return markupsafe.Markup("").join(span.format(part) if i % 2 else part for i, part in parts)

    environment.filters |= {"percent": percent, "count": count, "duration": duration, "whole": whole}
    environment.filters["setting"] = lambda value: f"{value:g}"
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(title=title, drawing=_drawing(), **_content(held, rows, name))


@cache
def _drawing() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, once for all figures; putting it together takes seconds."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # The one thing autoescape cannot do for a script; the libraries hold none, and a later one must not either.
    assert not re.search(r"</script|<!--", script, re.IGNORECASE), "the drawing code would end its own script element"
    return script


def _content(held: Sequence[Block], rows: Sequence[Row], name: str) -> dict[str, Any]:
    several = [block for block in held if block.probes]
    drawn = {"accuracy": [figures.accuracy(block, f"accuracy-{i}") for i, block in enumerate(several)]}
    attended = [(block, found) for block in held if (found := block.attention)]
    drawn["attention"] = [figures.attention(attended, "attention")] if attended else []
    series = list(dict.fromkeys(name for block in held for name in block.by_layer))
    layered = [block for block in held if block.by_layer]
    drawn["layers"] = [figures.by_layer(block, series, f"layers-{i}") for i, block in enumerate(layered)]
    counted = [row for block in held for row in block.rows]
    return {
        "opening": words.opening(held),
        "answers": [words.brief(block) for block in held] if len(held) > 1 else [],
        "facts": facts(held),
        "blocks": held,
        "metric": listed(list(dict.fromkeys(block.metric.replace("_", " ") for block in held))),
        "drawn": drawn,
        "figures": {figure.name: figure.spec for group in drawn.values() for figure in group},
        "probes": [(block, score) for block in held for score in block.probes],
        "singles": [(block, score) for block in held for score in block.scores if score.layerwise],
        "series": series,
        "attended": [words.attention(found, block) for block, found in attended],
        "best_layers": [words.best_layers(block) for block in layered],
        "layerwise_command": _layerwise_command(held[0]),
        "rows": counted if len(counted) <= MOST_ROWS else [],
        "row_count": len(counted),
        "superseded": len(rows) - len(counted),
        "runs": [_run(block) for block in held],
        "versions": _versions(counted),
        "codes": list(dict.fromkeys(row["code"] for row in counted)),
        "commands": [
            *dict.fromkeys(c for block in held for c in commands(block)),
            f"mlfusion report --html {shlex.quote(name)}",
        ],
        "made": max(row["created"] for row in counted)[:10],
        "spread": _spread,
    }


def _spread(spread: Spread | None, unit: Literal["percent", "points"]) -> str:
    """'97.1 ± 0.3', without the deviation for one seed."""
    if spread is None:
        return ""
    shown = percent if unit == "percent" else points
    return shown(spread.mean) + (f" ± {percent(spread.sd)}" if spread.sd is not None else "")


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
        many({row["seed"] for row in rows}, "seed", "seeds"),
    ]
    return f"{', '.join(said)}; {duration(sum(row['seconds'] for row in rows))} of probing."


def _run(block: Block) -> dict[str, str]:
    """One line of "what was run"."""
    rows = block.rows
    tried = sorted({row["configurations"] for row in rows})
    ends = [str(configurations) for configurations in (tried[0], tried[-1])[: len(tried)]]
    layers = layer_ranges(layer for row in rows for layer in row["layers"])
    return {
        "name": block.name,
        "train": count(rows[0]["images"]["train"]),
        "test": count(rows[0]["images"]["test"]),
        "classes": count(len(rows[0]["classes"])),
        "model": f"{block.depth} \N{MULTIPLICATION SIGN} {rows[0]['width']}",
        "layers": layers,
        "tokens": ", ".join(kind for kind in KINDS if any(kind in row["tokens"] for row in rows)),
        "grid": f"{block.grid}, {' to '.join(ends)}",
        "probes": str(len(block.scores)),
        "seeds": layer_ranges(row["seed"] for row in rows).replace(",", ", "),
        "time": duration(sum(row["seconds"] for row in rows)),
        "features": " ".join(block.features),
    }


def _versions(rows: Sequence[Row]) -> dict[str, str]:
    """{library: its version, or all of them where rows differ}."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for library, version in row["versions"].items():
            found.setdefault(library, {})[version] = None
    return {library: ", ".join(versions) for library, versions in sorted(found.items())}


# --- commands that make it again -------------------------------------------------------------------------------------


def commands(block: Block) -> list[str]:
    """The `extract` and the `probe`s, one for each set of seeds, that give this block's rows."""
    place = f"--model {shlex.quote(block.model)} --dataset {shlex.quote(block.dataset)}"
    kinds = {kind for row in block.rows for kind in row["tokens"]}
    pairs: set[Any] = {(layer, kind) for row in block.rows for layer in row["layers"] for kind in row["tokens"]}
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
    seeds = sorted({row["seed"] for row in block.rows})
    return _probe(block, "cls-each-layer/linear,ap-each-layer/linear", seeds)


def _probe(block: Block, names: str, seeds: Sequence[int]) -> str:
    place = f"--model {shlex.quote(block.model)} --dataset {shlex.quote(block.dataset)}"
    numbers = ",".join(str(seed) for seed in seeds)
    return f"mlfusion probe {place} --probe {names} --grid {block.grid} --seeds {numbers}"
