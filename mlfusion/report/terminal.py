"""The report as a table for the terminal, or as Markdown for a page of text, so that an answer needs no browser."""

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlfusion.progress import duration
from mlfusion.report.summary import Block, Score, blocks, count, percent, points
from mlfusion.report.words import answer
from mlfusion.results import Row
from mlfusion.statistics import Spread

HEADS = ("test", "gain, points", "val", "param.", "time", "n")


def table(rows: Sequence[Row]) -> RenderableType:
    """One table for each model and data set, with a sentence that answers the question, for `rich.Console.print`.

    Raises:
        MlfusionError: there are no rows.
    """
    parts: list[RenderableType] = []
    for block in blocks(rows):
        parts += [_table(block), Text(answer(block)), Text()]
    return Group(*parts[:-1])


def markdown(rows: Sequence[Row]) -> str:
    """The same as Markdown.

    Raises:
        MlfusionError: there are no rows.
    """
    parts = []
    for block in blocks(rows):
        lines = [_cells(score) for score in block.scores]
        metric = block.metric.replace("_", " ")
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
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _sizes(block: Block) -> str:
    images = block.rows[0]["images"]
    return f"{count(images['train'])} train, {count(images['test'])} test images, {block.grid} grid"


def _table(block: Block) -> Table:
    drawn = Table(
        title=Text.assemble((block.name, "bold"), ("   " + _sizes(block), "dim")),
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        title_style="",
    )
    drawn.add_column(block.metric.replace("_", " ") + ", %", no_wrap=True)
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
        "baseline" if score.is_baseline else _spread(score.gain, points) if score.gain else "",
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
