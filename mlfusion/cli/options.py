"""Builds the options of commands from the definitions in `specs.options`, and completes names from the catalogues."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from mlfusion.errors import BadOption
from mlfusion.specs.definitions import Option, Options, all_definitions, build, defaults_of
from mlfusion.specs.options import ComputeOptions, StorageOptions

MODEL = "formula-vit"  # the embedded default, which works offline
DATASET = "digits"


def _completions(words: Iterable[str], typed: str) -> list[str]:
    """Completions of the last word of a comma-separated list."""
    before, comma, last = typed.rpartition(",")
    return [f"{before}{comma}{word}" for word in words if word.startswith(last)]


def complete_models(incomplete: str) -> list[str]:
    """Names of models in the catalogue."""
    from mlfusion.models import CATALOGUE

    return _completions(CATALOGUE, incomplete)


def complete_datasets(incomplete: str) -> list[str]:
    """Names of data sets in the catalogue."""
    from mlfusion.datasets import CATALOGUE

    return _completions(CATALOGUE, incomplete)


def complete_probes(incomplete: str) -> list[str]:
    """The study's probes, by name and alias."""
    from mlfusion.specs.names import ALIASES, STUDY

    return _completions(["all", *ALIASES, *STUDY], incomplete)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Turn each parameter of a command whose type is an options class into one command-line option per field.

    This is the only place that creates signatures at run time. Options that are not given are not passed, so only the classes
    define defaults.
    """
    own = inspect.signature(command, eval_str=True)
    classes = {name: each.annotation for name, each in own.parameters.items() if _is_options(each.annotation)}

    @wraps(command)
    def run(**given: Any) -> None:
        for name, kind in classes.items():
            given[name] = build(kind, dict(_values(kind, given)))
        command(**given)

    parameters: list[inspect.Parameter] = []
    for name, each in own.parameters.items():
        parameters += _parameters(classes[name]) if name in classes else [each.replace(kind=each.KEYWORD_ONLY)]
    del run.__wrapped__
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _is_options(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Options)


def _parameters(kind: type[Options]) -> Iterator[inspect.Parameter]:
    """Yield one parameter for each field, and a hidden one for each former name of the field."""
    defaults = defaults_of(kind)
    for field, one in all_definitions(kind).items():
        for name, flag in _spellings(field, one).items():
            typed = bool if one.kind.typed is bool else one.kind.typed | None
            text = help_text(one, defaults[field])
            letters = [f"-{one.short}"] if one.short and flag == one.flag else []
            option = typer.Option(f"--{flag}", *letters, help=text, hidden=flag != one.flag, show_default=False)
            yield inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if typed is bool else None,
                annotation=Annotated[typed, option],
            )


def _spellings(field: str, one: Option) -> dict[str, str]:
    """Names of the parameters that set a field → names of their options."""
    return {field: one.flag} | {f"{field}_{old}": old.replace("_", "-") for old in one.former}


def help_text(one: Option, default: Any) -> str:
    """The help of an option, with its default."""
    shown = one.kind.words(default) if default and default is not True else ""
    return f"{one.help} [default: {shown}]" if shown else one.help


def _values(kind: type[Options], given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Remove the fields of a class from the given options, under their present or former names, and yield their values."""
    for field, one in all_definitions(kind).items():
        words = {flag: given.pop(name) for name, flag in _spellings(field, one).items()}
        set_words = [(flag, word) for flag, word in words.items() if word not in (None, False, [])]
        if len(set_words) > 1:
            raise BadOption(f"--{set_words[0][0]} and --{set_words[1][0]} are one option; give one of them")
        for _, word in set_words:
            yield field, one.kind.parse(word)


def single(kind: type[Options], field: str) -> Any:
    """The annotation of a single option of a class, for a command that does not take the whole class."""
    one = all_definitions(kind)[field]
    return Annotated[
        one.kind.typed if defaults_of(kind)[field] is not None else one.kind.typed | None,
        typer.Option(f"--{one.flag}", help=one.help),
    ]


Cache = single(StorageOptions, "cache")
ResultsPath = Annotated[Path, typer.Option("--results", help=all_definitions(StorageOptions)["results"].help)]
Device = single(ComputeOptions, "device")
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Catalogue name (mlfusion ls models), hub id, or folder.", autocompletion=complete_models
    ),
]
AnyModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Model, as given to extract; default: every model cached for the data set.",
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
