"""Prints the output of commands: messages, tables and JSON; turns errors into exit codes."""

import json
import logging
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from mlfusion.errors import MlfusionError, printable
from mlfusion.system.progress import set_quiet
from mlfusion.system.words import plural

if TYPE_CHECKING:
    from mlfusion.results import Row
HANDLER = "command line"  # name of the logging handler


class Commands(TyperGroup):
    """A group of commands that prints a MlfusionError as one line and exits 1; other errors keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MlfusionError as err:
            if _volume > 0:
                traceback.print_exc()
            typer.echo("error: " + printable(" ".join(str(err).split())), err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            notify("stopped; what was finished is kept, the same command goes on from here")
            raise typer.Exit(130) from None


_volume = 0


def set_verbosity(volume: int) -> None:
    """Set which messages are printed beside results and errors: -1 none, 0 the usual ones, 1 debug messages too."""
    global _volume
    _volume = volume
    set_quiet(volume < 0)
    logger, handler = logging.getLogger("mlfusion"), logging.StreamHandler()
    handler.set_name(HANDLER)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if volume > 0 else "%(message)s"))
    for old in [existing for existing in logger.handlers if existing.get_name() == HANDLER]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel({-1: logging.ERROR, 0: logging.WARNING, 1: logging.DEBUG}[volume])


def notify(line: str) -> None:
    """Print a message on standard error, unless --quiet is given."""
    if _volume >= 0:
        typer.echo(printable(line), err=True)


def say(line: str) -> None:
    """Print a line of a result."""
    typer.echo(printable(line))


def print_json(body: Any) -> None:
    """Print one JSON document on standard output; indented only on a terminal, since that takes several times as long."""
    typer.echo(json.dumps(body, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def print_rows(rows: Sequence[dict[str, Any]], empty: str = "") -> None:
    """Print a table of the rows, or the message `empty` if there are none."""
    if not rows:
        notify(empty)
        return
    lines = [[name.replace("_", " ") for name in rows[0]]]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [isinstance(value, int) and not isinstance(value, bool) for value in rows[0].values()]
    padded = []
    for line in lines:  # rich needs seconds for thousands of rows
        cells = zip(line, widths, right, strict=True)
        padded.append("  ".join(cell.rjust(width) if number else cell.ljust(width) for cell, width, number in cells))
    typer.echo("\n".join(line.rstrip() for line in padded))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        f"{value:,}" if isinstance(value, int) else "" if value is None else printable(str(value)).replace("\n", "\\n")
    )


def row_json(row: "Row") -> dict[str, Any]:
    """The fields of a row that `mlfusion probe --json` prints."""
    from msgspec import to_builtins

    names = "model dataset probe seed metric val test metrics selected parameters seconds features id"
    fields = to_builtins(row)
    return {name: fields[name] for name in names.split()}


SHOWN = 5  # number of skipped images to print for each split


def print_extracted(result: dict[str, Any], write: Any = typer.echo) -> None:
    """Print a summary of the extraction of one split."""
    skipped = f", {result['images_skipped']} skipped as unreadable" if result["images_skipped"] else ""
    view = "" if result["view"] == "plain" else f", {result['view']}"
    rate = f" at {result['images_per_second']:,.1f} images/s (limit: {result['limit']})" if result["limit"] else ""
    written, passes = (
        plural(result["images_written"], "image"),
        plural(result["forward_passes"], "forward pass", "forward passes"),
    )
    write(
        f"{result['model']} on {result['dataset']}/{result['split']}{view}: {written} written{rate}, "
        f"{result['images_reused']:,} reused{skipped}; {passes}; "
        f"{result['bytes'] / 1e6:,.1f} MB in {result['key']}"
    )
    for name, reason in list(result["skipped"].items())[:SHOWN]:
        write(f"  skipped {name}: {reason}")
    if (hidden := len(result["skipped"]) - SHOWN) > 0:
        write(f"  and {hidden:,} more: mlfusion cache ls --json")


def print_table(rows: Iterable[Any], *, long: bool = False) -> None:
    """Print a table of results as wide as the terminal."""
    from rich.console import Console

    from mlfusion.report import table

    console = Console()
    console.print(table(list(rows), width=console.width, long=long))
