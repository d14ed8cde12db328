"""What every command shares: its options, how errors end it, and how rows and JSON are printed."""

import inspect
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperGroup

from mlfusion.errors import BadData, MlfusionError, UnknownName
from mlfusion.progress import hush
from mlfusion.specs import parse_model

if TYPE_CHECKING:
    from mlfusion.options import Precision
    from mlfusion.results import Row

MODEL = "formula-vit"  # the embedded default: works offline, as `pipelines/default.toml` shows
DATASET = "digits"
LOG = "command line"  # its handler's name
UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


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
    hush(volume < 0)
    logger, handler = logging.getLogger("mlfusion"), logging.StreamHandler()
    handler.set_name(LOG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if volume > 0 else "%(message)s"))
    for old in [one for one in logger.handlers if one.get_name() == LOG]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel({-1: logging.ERROR, 0: logging.WARNING, 1: logging.DEBUG}[volume])


def _beginning(words: Iterable[str], typed: str) -> list[str]:
    """Of a list by commas, completions of its last word."""
    before, comma, last = typed.rpartition(",")
    return [f"{before}{comma}{word}" for word in words if word.startswith(last)]


def complete_models(incomplete: str) -> list[str]:
    """Names of the catalogue."""
    from mlfusion.models import CATALOGUE

    return _beginning(CATALOGUE, incomplete)


def complete_datasets(incomplete: str) -> list[str]:
    """Names of the catalogue."""
    from mlfusion.datasets import CATALOGUE

    return _beginning(CATALOGUE, incomplete)


def complete_probes(incomplete: str) -> list[str]:
    """The study's, by name and alias."""
    from mlfusion.specs import ALIASES, STUDY

    return _beginning(["all", *ALIASES, *STUDY], incomplete)


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Catalogue name (mlfusion ls models), hub id, or folder.",
        autocompletion=complete_models,
    ),
]
AnyModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="As given to extract; default: every model cached for the data set.",
        autocompletion=complete_models,
    ),
]
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset",
        "-d",
        help="Catalogue name (mlfusion ls datasets), hub id, folder, or file.",
        autocompletion=complete_datasets,
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        help="Root of the feature cache, or MINE:SHARED to read others too; default $MLFUSION_CACHE or ./cache.",
    ),
]
Split = Annotated[
    str, typer.Option("--split", help="Splits, comma-separated; test=validation takes that one for the test.")
]
Layers = Annotated[str, typer.Option("--layers", help="all (1..L), last, or a list such as 1-4,12.")]
Tokens = Annotated[
    str,
    typer.Option(
        "--tokens", help="cls, ap, max, std, registers, grid4, all, …, each with its own layers: cls,ap,all@last."
    ),
]
Hook = Annotated[
    str | None, typer.Option("--hook", help="Where blocks are read: norm2 (default), block, attn, mlp or projected.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Of the model's configuration, such as hidden_act=gelu; may be repeated."),
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="As kept: float16, bfloat16, float32, or int8 with a scale a vector.")
]
Format = Annotated[str, typer.Option("--format", help="zarr or hdf5, for shards that are new.")]
ResultsPath = Annotated[Path, typer.Option("--results", help="Folder that result rows are kept in.")]
Track = Annotated[
    str,
    typer.Option(
        "--track", help="Show new results in tensorboard:DIR, wandb:PROJECT or mlflow:URI too, comma-separated."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Grid = Annotated[str, typer.Option("--grid", help="paper: 21 configurations, 63 for attentive probes; quick: 3.")]


def asked_model(model: str, hook: str | None, settings: list[str] | None) -> str:
    """The model's name with what --hook and --set add to it: 'clip-vit-b16:block'."""
    return str(parse_model(model, hook, settings or ()))


def taking(
    argument: str, options: dict[str, tuple[Any, Any]], build: Callable[[dict[str, Any]], Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command gets these options (name → annotation and default), and one argument that is built of them."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)

        @wraps(command)
        def wrapped(**given: Any) -> None:
            built = build({name: given.pop(name) for name in options})
            command(**given, **{argument: built})

        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
        kept = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for each in own.parameters.values()
            if each.name != argument
        ]
        del wrapped.__wrapped__
        wrapped.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {each.name: each.annotation for each in [*kept, *added]}
        return wrapped

    return decorate


MAKING: dict[str, tuple[Any, Any]] = {  # of extraction.Making → the option's annotation and default
    "preprocess": (
        Annotated[
            str,
            typer.Option(
                "--preprocess", help="exact (the model's own, to the bit), fast, paper (the study's), paper+fast."
            ),
        ],
        "exact",
    ),
    "size": (Annotated[int | None, typer.Option("--size", help="Pixels of the input, if not the model's own.")], None),
    "view": (
        Annotated[
            str, typer.Option("--view", help="plain, flip, crop1, …, comma-separated; each an entry of its own.")
        ],
        "plain",
    ),
    "views": (Annotated[int | None, typer.Option("--views", help="The first so many of these views.")], None),
    "view_seed": (Annotated[int, typer.Option("--view-seed", help="Decides what the crops show.")], 0),
    "compute": (
        Annotated[str, typer.Option("--compute", help="Of the forward pass: float32, bfloat16, float16, auto.")],
        "float32",
    ),
}


def _making(asked: dict[str, Any]) -> Any:
    from mlfusion.extraction import Making
    from mlfusion.models.preprocessing import views

    view, count = asked.pop("view"), asked.pop("views")
    if count is not None and count < 1:
        raise MlfusionError(f"--views {count}: allowed are 1 and more")
    return Making(**asked, views=views(count) if count else tuple(word.strip() for word in view.split(",")))


makes_tokens = taking("making", MAKING, _making)
"""Gives a command the options of `extraction.Making`, and hands them to it as its argument `making`."""

BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Images in a forward pass; by default as many as memory allows.")
]
Workers = Annotated[
    int, typer.Option("--workers", help="That decode: threads, or on a GPU processes; 0: one a processor.")
]


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


def amount(option: str, text: str | None, units: dict[str, int]) -> int | None:
    """'20GB' → 20 · 10⁹, by the units allowed.

    Raises:
        MlfusionError: it is no number with one of them.
    """
    if text is None:
        return None
    for unit, factor in units.items():
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdecimal():
            return int(float(number) * factor)
    raise MlfusionError(f"--{option} {text!r} is no amount; allowed: a number and one of {', '.join(units)}")


def check_seeds(words: str) -> tuple[int, ...]:
    """'0,1,2' → (0, 1, 2).

    Raises:
        BadData: not whole numbers from 0, or one twice.
    """
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise BadData(f"--seeds {words!r}; allowed: different whole numbers from 0, such as 0,1,2")
    return tuple(int(part) for part in parts)


def check_shots(words: str) -> tuple[int, ...]:
    """'2,4,8' → (2, 4, 8).

    Raises:
        BadData: not whole numbers from 2, or one twice.
    """
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdecimal() and int(part) > 1 for part in parts) or len(set(parts)) != len(parts):
        raise BadData(
            f"--shots {words!r}; allowed: different whole numbers from 2, one image to fit and one to choose on, such as 2,4,8"
        )
    return tuple(int(part) for part in parts)


def check_precision(word: str) -> "Precision":
    """The word, if it names a precision.

    Raises:
        UnknownName: it does not.
    """
    from mlfusion.options import Precision

    if word not in get_args(Precision):
        raise UnknownName("precision", word, get_args(Precision))
    return word  # type: ignore[return-value]


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
    from mlfusion.results.rows import to_object

    whole = to_object(row)
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
