"""What every command shares: its options, how errors end it, and how rows and JSON are printed."""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from mlfusion.errors import BadData, MlfusionError, UnknownName
from mlfusion.specs.names import parse_model

if TYPE_CHECKING:
    from mlfusion.specs.options import Precision

MODEL = "formula-vit"  # the embedded default: works offline, as `pipelines/default.toml` shows
DATASET = "digits"
UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


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
    from mlfusion.specs.names import ALIASES, STUDY

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
    from mlfusion.extraction.request import Making
    from mlfusion.models.preprocessing import views

    view, count = asked.pop("view"), asked.pop("views")
    if count is not None and count < 1:
        raise MlfusionError(f"--views {count}: allowed are 1 and more")
    return Making(**asked, views=views(count) if count else tuple(word.strip() for word in view.split(",")))


makes_tokens = taking("making", MAKING, _making)
"""Gives a command the options of `extraction.request.Making`, and hands them to it as its argument `making`."""

BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Images in a forward pass; by default as many as memory allows.")
]
Workers = Annotated[
    int, typer.Option("--workers", help="That decode: threads, or on a GPU processes; 0: one a processor.")
]


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
    from mlfusion.specs.options import Precision

    if word not in get_args(Precision):
        raise UnknownName("precision", word, get_args(Precision))
    return word  # type: ignore[return-value]
