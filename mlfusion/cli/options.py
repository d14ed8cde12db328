"""Builds the options of commands from the definitions in `specs.options`, and completes names from the catalogues."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from mlfusion.errors import BadOption
from mlfusion.specs.definitions import Option, Options, all_definitions, build
from mlfusion.specs.options import ComputeOptions, StorageOptions

MODEL = "formula-vit"  # the embedded default, which works offline
DATASET = "digits"


def _completions(words: Iterable[str], incomplete: str) -> list[str]:
    """Completions of the last word of a comma-separated list."""
    before, comma, last = incomplete.rpartition(",")
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
    """The study's probes, by name and alias, and the heads alone."""
    from mlfusion.specs.names import ALIASES, HEAD_NAMES, STUDY

    return _completions(["all", *ALIASES, *HEAD_NAMES, *STUDY], incomplete)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Turn each parameter of a command whose type is an options class into one command-line option per field.

    This is the only place that creates signatures at run time. Options that are not given are not passed, so only the classes
    define defaults.
    """
    own = inspect.signature(command, eval_str=True)
    annotations = {name: parameter.annotation for name, parameter in own.parameters.items()}
    classes = {name: cls for name, cls in annotations.items() if isinstance(cls, type) and issubclass(cls, Options)}

    @wraps(command)
    def run(**arguments: Any) -> None:
        for name, cls in classes.items():
            arguments[name] = build(cls, dict(_values(cls, arguments)))
        command(**arguments)

    parameters: list[inspect.Parameter] = []
    for name, parameter in own.parameters.items():
        keyword_only = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += _parameters(classes[name]) if name in classes else [keyword_only]
    del run.__wrapped__
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters(cls: type[Options]) -> Iterator[inspect.Parameter]:
    """Yield one parameter for each field, and a hidden one for each former name of the field."""
    for field, definition in all_definitions(cls).items():
        for name, flag in _flags(field, definition).items():
            typed = bool if definition.kind.typed is bool else definition.kind.typed | None
            current = flag == definition.flag
            letters = [f"-{definition.short}"] if definition.short and current else []
            text = help_text(definition)
            option = typer.Option(f"--{flag}", *letters, help=text, hidden=not current, show_default=False)
            yield inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if typed is bool else None,
                annotation=Annotated[typed, option],
            )


def _flags(field: str, definition: Option) -> dict[str, str]:
    """Names of the parameters that set a field → names of their options."""
    return {field: definition.flag} | {f"{field}_{old}": old.replace("_", "-") for old in definition.former}


def help_text(definition: Option) -> str:
    """The help of an option, with its default."""
    default = definition.default
    is_empty = default is None or isinstance(default, bool) or default in ("", ())
    shown = "" if is_empty else definition.kind.words(default)
    return f"{definition.help} [default: {shown}]" if shown else definition.help


def _values(cls: type[Options], arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Remove the fields of a class from the arguments, under their present or former names, and yield their values."""
    for field, definition in all_definitions(cls).items():
        words = {flag: arguments.pop(name) for name, flag in _flags(field, definition).items()}
        set_words = [(flag, word) for flag, word in words.items() if not (word is None or word is False or word == [])]
        if len(set_words) > 1:
            raise BadOption(f"--{set_words[0][0]} and --{set_words[1][0]} are one option; give one of them")
        for _, word in set_words:
            yield field, definition.kind.parse(word)


def single(cls: type[Options], field: str) -> Any:
    """The annotation of a single option of a class, for a command that does not take the whole class."""
    definition = all_definitions(cls)[field]
    typed = definition.kind.typed if definition.default is not None else definition.kind.typed | None
    return Annotated[typed, typer.Option(f"--{definition.flag}", help=definition.help)]


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
