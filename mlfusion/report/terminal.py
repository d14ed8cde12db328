"""The report as tables for the terminal, or as Markdown for a page of text, so that an answer needs no browser."""

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlfusion.progress import duration
from mlfusion.report.summary import (
    DAGGER,
    OTHER_CODE,
    Block,
    Score,
    Study,
    blocks,
    count,
    metric_name,
    percent,
    points,
    studies,
)
from mlfusion.report.words import answer, opening
from mlfusion.results import Row
from mlfusion.statistics import Spread

HEADS = ("test", "gain, points", "val", "param.", "time", "n")

MANY = 2
"""More data sets than these stand beside each other, one table a model."""


def table(rows: Sequence[Row], *, width: int = 100, long: bool = False) -> RenderableType:
    """For `rich.Console.print`: a table for each model and data set, with a sentence that answers the question.

    Of more data sets a table for each model instead: a line a probe, a column a data set.

    Args:
        rows: of any models and data sets.
        width: characters of a line, into which columns are fitted.
        long: a table for each model and data set however many there are.

    Raises:
        MlfusionError: there are no rows.
    """
    held = blocks(rows)
    parts: list[RenderableType] = []
    if long or all(len(study.datasets) <= MANY for study in studies(held)):
        for block in held:
            parts += [_table(block), *_marked(block.scores), Text(answer(block)), Text()]
        return Group(*parts[:-1])
    every = studies(held)
    for study in every:
        for model in study.models:
            parts += [*_beside(study, model, width), Text()]
    left = len(held) - sum(len(study.blocks) for study in every)
    singles = sum(score.layerwise is not None for block in held for score in block.scores)
    said = [opening(held)]
    said += [f"{count(singles)} scores of single layers are not in these tables."] if singles else []
    said += [f"Of {count(left)} older sets of features nothing is shown."] if left else []
    said.append("Validation, parameters and times of each: mlfusion report --long.")
    return Group(*parts, Text(" ".join(said)))


def _marked(scores: Sequence[Score]) -> list[RenderableType]:
    return [Text(OTHER_CODE, style="dim")] if any(score.other_code for score in scores) else []


# --- data sets beside each other -------------------------------------------------------------------------------------


def _beside(study: Study, model: str, width: int) -> Iterator[RenderableType]:
    """One model's probes on all of its data sets, in as many tables as the width asks for."""
    mine = [block for dataset in study.datasets if (block := study.block(model, dataset)) and block.probes]
    probes = [p for p in study.probes if any(study.score(model, block.dataset, p) for block in mine)]
    if not probes:
        return
    columns = [_column(study, block, probes) for block in mine]
    if len(mine) > 1:
        columns.append(_mean(study, mine, probes))
    first = max(map(len, probes))
    said = f"   {study.metric}, %, and gain in points, {_seeds(mine)}" + f", {study.name}" * bool(study.name)
    title: Text | None = Text.assemble((model, "bold"), (said, "dim"))
    while columns:
        room, taken = width - first - 2, 0
        while taken < len(columns) and (room := room - columns[taken].width - 2) >= -2:
            taken += 1
        taken = max(taken, 1)
        drawn = _bare(title)
        drawn.add_column("", no_wrap=True)
        for column in columns[:taken]:
            drawn.add_column(column.head, justify="right", no_wrap=True)
        for number, probe in enumerate(probes):
            drawn.add_row(probe, *(column.cells[number] for column in columns[:taken]))
        yield drawn
        columns, title = columns[taken:], None
        if columns:
            yield Text()
    yield from _marked([score for block in mine for score in block.probes])


class _Column:
    """A data set, or their mean: a cell a probe, its numbers one below the other; the best score is bold."""

    def __init__(self, head: str, cells: Sequence[tuple[float, str] | None]) -> None:
        scores = [percent(cell[0]) if cell else "" for cell in cells]
        gains = [cell[1] if cell else "" for cell in cells]
        wide, far = max(map(len, scores)), max(map(len, gains))
        best = max((cell[0] for cell in cells if cell), default=None)
        self.head = head
        self.width = max(len(head), wide + (far + 1 if far else 0))
        self.cells = [
            Text.assemble(
                (score.rjust(wide), "bold" if cell and cell[0] == best else ""),
                (f" {gain.ljust(far)}" if far else "", "dim"),
            )
            for cell, score, gain in zip(cells, scores, gains, strict=True)
        ]


def _column(study: Study, block: Block, probes: Sequence[str]) -> _Column:
    scores = [study.score(block.model, block.dataset, probe) for probe in probes]
    return _Column(block.dataset, [(score.test.mean, _gain(score)) if score else None for score in scores])


def _gain(score: Score) -> str:
    if score.is_baseline or score.gain is None:
        return ""
    return points(score.gain.mean) + DAGGER * score.other_code


def _mean(study: Study, mine: Sequence[Block], probes: Sequence[str]) -> _Column:
    """Over the data sets, of the probes that all of them have."""
    cells: list[tuple[float, str] | None] = []
    for probe in probes:
        scores = [score for block in mine if (score := study.score(block.model, block.dataset, probe))]
        if len(scores) < len(mine):
            cells.append(None)
            continue
        gains = [score.gain.mean for score in scores if score.gain and not score.is_baseline]
        whole = len(gains) == len(mine)
        gain = points(fmean(gains)) + DAGGER * any(score.other_code for score in scores) if whole else ""
        cells.append((fmean(score.test.mean for score in scores), gain))
    return _Column("mean", cells)


def _seeds(mine: Sequence[Block]) -> str:
    counted = sorted({score.test.n for block in mine for score in block.probes})
    return " to ".join(str(n) for n in dict.fromkeys((counted[0], counted[-1]))) + (
        " seed" if counted == [1] else " seeds"
    )


def _bare(title: Text | None) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        title_style="",
    )


# --- one at a time ---------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """The same as Markdown.

    Raises:
        MlfusionError: there are no rows.
    """
    parts = []
    for block in blocks(rows):
        lines = [_cells(score) for score in block.scores]
        metric = metric_name(block.metric)
        parts.append(
            "\n".join(
                [
                    f"### {block.name}",
                    "",
                    f"{_sizes(block)}. {answer(block)}",
                    "",
                    f"| {metric}, % | " + " | ".join(HEADS) + " |",
                    "|---|" + "---:|" * len(HEADS),
                    *("| " + " | ".join([f"`{name}`", *cells]) + " |" for name, *cells in lines),
                    *(["", OTHER_CODE] if any(score.other_code for score in block.scores) else []),
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _sizes(block: Block) -> str:
    images = block.rows[0].images
    return f"{count(images.train)} train, {count(images.test)} test images, {block.grid} grid"


def _table(block: Block) -> Table:
    drawn = _bare(Text.assemble((block.name, "bold"), ("   " + _sizes(block), "dim")))
    drawn.add_column(metric_name(block.metric) + ", %", no_wrap=True)
    for head in HEADS:
        drawn.add_column(head, justify="right", no_wrap=True)
    best = max((score for score in block.scores if score.gain), key=lambda score: score.test.mean, default=None)
    for score in block.scores:
        style = "bold" if score is best and not score.is_baseline else ""
        drawn.add_row(*_cells(score), style=style)
    return drawn


def _cells(score: Score) -> tuple[str, ...]:
    return (
        score.probe,
        _spread(score.test, percent),
        "baseline"
        if score.is_baseline
        else _spread(score.gain, points) + f" {DAGGER}" * score.other_code
        if score.gain
        else "",
        percent(score.val.mean),
        _short(score.parameters),
        duration(score.seconds),
        str(score.test.n),
    )


def _spread(spread: Spread, shown: Callable[[float], str]) -> str:
    return shown(spread.mean) + (f" ± {percent(spread.sd)}" if spread.sd is not None else "")


def _short(number: int) -> str:
    """18447 → '18.4 k'."""
    for scale, unit in ((1e6, " M"), (1e3, " k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return str(number)
