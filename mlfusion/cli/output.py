"""How commands print: lines for people, tables, JSON, and errors as exit codes."""

import json
import logging
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from mlfusion.errors import MlfusionError
from mlfusion.system.progress import set_quiet

if TYPE_CHECKING:
    from mlfusion.results import Row
LOG = "command line"  # its handler's name


class Commands(TyperGroup):
    """A MlfusionError is the user's to mend: one line, exit 1. Anything else is a bug: a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MlfusionError as err:
            if _volume > 0:
                traceback.print_exc()
            typer.echo("error: " + " ".join(str(err).split()), err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            say("stopped; what was finished is kept, the same command goes on from here")
            raise typer.Exit(130) from None


_volume = 0


def speak(volume: int) -> None:
    """How much is said beside results and errors: -1 nothing, 0 what a user wants to know, 1 what goes on inside too."""
    global _volume
    _volume = volume
    set_quiet(volume < 0)
    logger, handler = logging.getLogger("mlfusion"), logging.StreamHandler()
    handler.set_name(LOG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if volume > 0 else "%(message)s"))
    for old in [one for one in logger.handlers if one.get_name() == LOG]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel({-1: logging.ERROR, 0: logging.WARNING, 1: logging.DEBUG}[volume])


def say(line: str) -> None:
    """A line for people, on standard error; none with --quiet."""
    if _volume >= 0:
        typer.echo(line, err=True)


def print_json(body: Any) -> None:
    """One document, on standard output; indented for people, which takes several times as long."""
    typer.echo(json.dumps(body, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def print_rows(rows: Sequence[dict[str, Any]], nothing: str) -> None:
    """A table, or why there is none."""
    if not rows:
        say(nothing)
        return
    lines = [[name.replace("_", " ") for name in rows[0]]]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [isinstance(value, int) and not isinstance(value, bool) for value in rows[0].values()]
    text = []
    for line in lines:  # by hand: thousands of rows take a table of rich's seconds
        cells = zip(line, widths, right, strict=True)
        text.append("  ".join(cell.rjust(width) if number else cell.ljust(width) for cell, width, number in cells))
    typer.echo("\n".join(each.rstrip() for each in text))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def row_json(row: "Row") -> dict[str, Any]:
    """What `mlfusion probe --json` promises, and the row's id, by which the rest is found."""
    names = (
        "model",
        "dataset",
        "probe",
        "seed",
        "metric",
        "val",
        "test",
        "metrics",
        "selected",
        "parameters",
        "seconds",
    )
    from msgspec import to_builtins

    whole = to_builtins(row)
    return {name: whole[name] for name in (*names, "features", "id")}


SHOWN = 5  # images that were skipped, of each split


def say_extracted(one: dict[str, Any], say: Any = typer.echo) -> None:
    """What one split's extraction did."""
    skipped = f", {one['images_skipped']} skipped as unreadable" if one["images_skipped"] else ""
    view = "" if one["view"] == "plain" else f", {one['view']}"
    rate = f" at {one['images_per_second']:,.1f} images/s (limit: {one['limit']})" if one["limit"] else ""
    say(
        f"{one['model']} on {one['dataset']}/{one['split']}{view}: {one['images_written']:,} images written{rate}, "
        f"{one['images_reused']:,} reused{skipped}; {one['forward_passes']} forward passes; "
        f"{one['bytes'] / 1e6:,.1f} MB in {one['key']}"
    )
    for name, why in list(one["skipped"].items())[:SHOWN]:
        say(f"  skipped {name}: {why}")
    if (more := len(one["skipped"]) - SHOWN) > 0:
        say(f"  and {more:,} more: mlfusion cache ls --json")


def print_table(rows: Iterable[Any], *, long: bool = False) -> None:
    """The report in the terminal."""
    from rich.console import Console

    from mlfusion.report import table

    console = Console()
    console.print(table(list(rows), width=console.width, long=long))
