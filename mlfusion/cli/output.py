"""Prints the output of commands: messages, tables and JSON; turns errors into exit codes.

Nothing else prints. Names come from data sets, models and rows of strangers, so every line passes `one_line`, which leaves no
control character to the terminal; and a stream that cannot be written ends the command with a sentence.
"""

import codecs
import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from mlfusion.errors import MlfusionError, first_line, is_device_failure, is_shortage
from mlfusion.system.progress import set_quiet
from mlfusion.system.text import json_text, one_line
from mlfusion.system.words import plural

if TYPE_CHECKING:
    from mlfusion.results import Results, Row
HANDLER = "command line"  # name of the logging handler


class Commands(TyperGroup):
    """A group of commands that prints a MlfusionError as one line and exits 1; other errors keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MlfusionError as err:
            _print_error(str(err))
            raise typer.Exit(1) from None
        except (MemoryError, RuntimeError, ImportError) as err:
            if is_shortage(err):
                _print_error(
                    f"not enough memory ({first_line(err)}); allowed: 2 GB or more. Close other programs, raise the limit "
                    "(ulimit -v unlimited), or give less to do: --batch-size 1, --memory 1GB"
                )
            elif is_device_failure(err):
                _print_error(
                    f"the device failed ({first_line(err)}); what was finished is kept. Run the same command again, which "
                    "goes on from there; if it fails again, look at the GPU (nvidia-smi), or take --device cpu"
                )
            else:
                raise
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            notify("stopped; what was finished is kept, the same command goes on from here")
            raise typer.Exit(130) from None


def _print_error(message: str) -> None:
    if _volume > 0:
        traceback.print_exc()
    _write("error: " + one_line(" ".join(message.split())), err=True)


@contextmanager
def one_sentence_ends() -> Iterator[None]:
    """What happens outside of a command, such as in `--help`, ends with one line and a status, too."""
    try:
        with _writing(sys.stdout):
            yield
    except MlfusionError as err:
        _print_error(str(err))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


_volume = 0


def set_verbosity(volume: int) -> None:
    """Set which messages are printed beside results and errors: -1 none, 0 the usual ones, 1 debug messages too."""
    global _volume
    _volume = volume
    set_quiet(volume < 0)
    # Of an image within --max-pixels, which is the limit that holds; the warning names none.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit", RuntimeWarning)
    logger, handler = logging.getLogger("mlfusion"), logging.StreamHandler()
    handler.set_name(HANDLER)
    handler.setFormatter(_OneLine("%(asctime)s %(name)s: %(message)s" if volume > 0 else "%(message)s"))
    for old in [existing for existing in logger.handlers if existing.get_name() == HANDLER]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel({-1: logging.ERROR, 0: logging.WARNING, 1: logging.DEBUG}[volume])


class _OneLine(logging.Formatter):
    """Formats a message as one line; the traceback of a debug message keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


def notify(line: str) -> None:
    """Print a message on standard error, unless --quiet is given."""
    if _volume >= 0:
        _write(one_line(line), err=True)


def confirmed(question: str) -> bool:
    """Ask on standard error, so that standard output holds results alone; no answer is a no."""
    with _writing(sys.stderr):
        typer.echo(f"{one_line(question)} [y/N] ", err=True, nl=False)
    return sys.stdin.readline().strip().casefold() in ("y", "yes")


def say(line: str = "") -> None:
    """Print a line of a result on standard output."""
    _write(one_line(line))


def print_json(body: Any) -> None:
    """Print one JSON document on standard output; indented only on a terminal, since that takes several times as long."""
    text = json_text(body, indent=2 if sys.stdout.isatty() else None)
    if "utf" not in (sys.stdout.encoding or "").lower():  # JSON has an escape for every character
        text = "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in text)
    _write(text)


def _write(text: str, *, err: bool = False) -> None:
    with _writing(sys.stderr if err else sys.stdout):
        typer.echo(text, err=err)


@contextmanager
def _writing(stream: Any) -> Iterator[None]:
    """End the command with a sentence if a stream cannot be written, such as one to a full disk."""
    try:
        yield
    except BrokenPipeError:
        raise  # a reader such as head, which has seen enough
    except OSError as err:
        if err.filename is not None:
            raise  # of a file, not of a stream
        _drop(stream)
        if stream is sys.stderr:
            raise SystemExit(1) from None  # there is no place to say it
        raise MlfusionError(
            f"cannot write to standard output: {err.strerror}; allowed: a terminal, a pipe or a file on a disk with room. "
            "Results that were finished are kept"
        ) from None


def _drop(stream: Any) -> None:
    """Send what a stream still holds, and what follows, nowhere: it would fail again when Python ends."""
    with suppress(OSError, ValueError, io.UnsupportedOperation):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


_PLAIN = {
    "\N{NO-BREAK SPACE}": " ",
    "\N{NARROW NO-BREAK SPACE}": " ",
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{PLUS-MINUS SIGN}": "+-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{SUPERSCRIPT TWO}": "2",
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{DAGGER}": "+",
    "\N{DOUBLE DAGGER}": "++",
}
"""Our own signs in ASCII."""


def _plain(err: UnicodeError) -> tuple[str, int]:
    """Our own signs in ASCII, and escapes of other characters, for a terminal whose encoding lacks them."""
    assert isinstance(err, UnicodeEncodeError)
    found = err.object[err.start : err.end]
    return "".join(_PLAIN.get(c, c.encode("ascii", "backslashreplace").decode()) for c in found), err.end


def adapt_streams() -> None:
    """Let standard output and error write every text, whatever their encoding has."""
    codecs.register_error("mlfusion", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="mlfusion")


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
    _write("\n".join(line.rstrip() for line in padded))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else one_line(str(value))


def row_json(row: "Row") -> dict[str, Any]:
    """The fields of a row that `mlfusion probe --json` prints."""
    from msgspec import to_builtins

    names = "model dataset probe seed metric val test metrics selected parameters seconds features id"
    fields = to_builtins(row)
    return {name: fields[name] for name in names.split()}


SHOWN = 5  # number of skipped images to print for each split


def print_extracted(result: dict[str, Any], write: Callable[[str], None] = say) -> None:
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


def print_table(rows: Iterable[Any], results: "Results", *, long: bool = False) -> None:
    """Print a table of results as wide as the terminal; by the arrays of `results` a gain is told from chance."""
    from mlfusion.report import table

    rows = list(rows)
    print_renderable(lambda width: table(rows, results=results, width=width, long=long))


def print_renderable(make: Callable[[int], Any]) -> None:
    """Print what `make` gives for the terminal's width; a text in it is no markup."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    with _writing(sys.stdout):
        console.print(make(console.width))
        sys.stdout.flush()
