"""Defines options (kind, help, effect) and the base class that parses, checks and prints them.

Values are checked when an options class is created; functions that take one need not check it.
"""

import argparse
import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

from mlfusion.errors import BadOption
from mlfusion.specs.identity import OMIT_IF_DEFAULT
from mlfusion.specs.kinds import Kind

T = TypeVar("T", bound="Options")

Effect = Literal["key", "stream", "id", "bit", "rounding"]
EFFECTS: dict[Effect, str] = {
    "key": "in the key of a feature",
    "stream": "names streams inside an entry",
    "id": "in the id of a row",
    "bit": "equal to the bit",
    "rounding": "equal to rounding",
}
"""Effect of a change of an option on features and rows."""


@dataclass(frozen=True)
class Option:
    """The definition of one field of an options class."""

    kind: Kind
    help: str  # one sentence
    effect: Effect
    default: Any
    name: str = ""  # name in recipes, and with dashes on the command line; empty: the field's name
    former: tuple[str, ...] = ()  # earlier names, which are still accepted
    short: str = ""  # a letter for the command line

    @property
    def flag(self) -> str:
        """The name on the command line, without the leading dashes."""
        return self.name.replace("_", "-")

    def fault(self, value: Any) -> str | None:
        """The error message for a parsed value, or None. The value None is allowed if it is the default."""
        return None if value is None and self.default is None else self.kind.fault(value)


def option(default: Any, kind: Kind, help: str, *, effect: Effect, added: bool = False, **others: Any) -> Any:
    """A field of an options class, with its definition as metadata.

    `added` marks an option that was added later: digests omit its default, so that existing ids stay the same.
    """
    metadata = {"option": Option(kind, help, effect, default, **others), **(OMIT_IF_DEFAULT if added else {})}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """Base of the options classes: parses, checks and prints fields by their definitions."""

    def __post_init__(self) -> None:
        for field, definition in definitions(type(self)):
            raw = getattr(self, field)
            value = raw if raw is None else definition.kind.read(raw)
            object.__setattr__(self, field, value)
            if fault := definition.fault(value):
                shown = ",".join(map(str, raw)) if isinstance(raw, (list, tuple)) else raw
                raise BadOption(f"--{definition.flag} {shown}: {fault}")
        for field, cls in nested_classes(type(self)).items():
            if not isinstance(value := getattr(self, field), cls):
                raise BadOption(f"{field} is {value!r}; allowed is a value of {cls.__name__}")

    def changed(self) -> dict[str, Any]:
        """The fields that are not at their default, including those of nested options classes."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Options):
                values |= value.changed()
            elif value != field.default:
                values[field.name] = value
        return values

    def words(self) -> list[str]:
        """The command-line words of the fields that are not at their default; `Kind.parse` is the inverse."""
        known = all_definitions(type(self))
        words: list[str] = []
        for field, value in self.changed().items():
            definition = known[field]
            text = definition.kind.words(value)
            if value is True:
                words.append(f"--{definition.flag}")
                continue
            for word in [text] if isinstance(text, str) else text:
                words += option_words(definition.flag, word)
        return words


def definitions(cls: type[Options]) -> Iterator[tuple[str, Option]]:
    """The fields of an options class, without nested classes, with their definitions."""
    for field in dataclasses.fields(cls):
        if "option" in field.metadata:
            definition: Option = field.metadata["option"]
            yield field.name, definition if definition.name else dataclasses.replace(definition, name=field.name)


def nested_classes(cls: type[Options]) -> dict[str, type[Options]]:
    """The nested options classes of an options class, by field."""
    fields = dataclasses.fields(cls)
    return {field.name: type(field.default) for field in fields if isinstance(field.default, Options)}


def all_definitions(cls: type[Options]) -> dict[str, Option]:
    """The definitions of a class and of its nested options classes, by field."""
    definitions_by_field = dict(definitions(cls))
    for inner in nested_classes(cls).values():
        definitions_by_field |= all_definitions(inner)
    return definitions_by_field


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Create an options class from values of some of its fields and of the fields of nested options classes.

    Raises:
        BadOption: a value that is not allowed.
    """
    own = {name: values[name] for name, _ in definitions(cls) if name in values}
    for name, nested in nested_classes(cls).items():
        fields = [field for field in all_definitions(nested) if field in values]
        given = values.get(name) is not None
        if given and fields:
            raise BadOption(
                f"{fields[0]} is a field of {name}, which is given too; give {fields[0]} inside of it, or alone"
            )
        own[name] = values[name] if given else build(nested, values)
    return cls(**own)


def from_words(cls: type[T], words: Sequence[str]) -> T:
    """The options that these command-line words give; the inverse of `Options.words`.

    Raises:
        BadOption: a word is no option of the class, or a value is not allowed.
    """
    known = all_definitions(cls)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for field, definition in known.items():
        typed, names = definition.kind.typed, (definition.flag, *definition.former)
        how = {"action": "append"} if typed == list[str] else {"type": typed}
        parser.add_argument(
            *(f"--{name.replace('_', '-')}" for name in names),
            dest=field,
            default=argparse.SUPPRESS,
            **({"action": "store_true"} if typed is bool else how),
        )
    try:
        values, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as err:
        raise BadOption(f"{shlex.join(words)}: {err}") from err
    if unknown:
        raise BadOption(f"no option {unknown[0]!r}; allowed: {', '.join(f'--{each.flag}' for each in known.values())}")
    return build(cls, {field: known[field].kind.parse(value) for field, value in vars(values).items()})


def command(verb: str, words: Iterable[str] = (), **arguments: str | None) -> str:
    """A `mlfusion` command with these arguments and words, quoted for a shell."""
    named = [word for name, value in arguments.items() if value is not None for word in option_words(name, value)]
    return shlex.join(["mlfusion", *verb.split(), *named, *words])


def option_words(name: str, value: str) -> list[str]:
    """The words of one option; a value that begins with a dash is joined by '='."""
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def distribute(keywords: Mapping[str, Any], *classes: type[Options]) -> list[Any]:
    """Convert the keywords of a public function, by present or former names, to one value of each options class.

    Raises:
        BadOption: a keyword that none of the classes has, or a value that is not allowed.
    """
    definitions_by_field = {field: one for cls in classes for field, one in all_definitions(cls).items()}
    known = [*(name for cls in classes for name in nested_classes(cls)), *definitions_by_field]
    fields = {name: name for name in known}
    fields |= {name: field for field, one in definitions_by_field.items() for name in (one.name, *one.former)}
    if unknown := [name for name in keywords if name not in fields]:
        close = get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise BadOption(f"no option named {', '.join(map(repr, unknown))}.{hint} There are: {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, value in keywords.items():
        if fields[name] in values:
            raise BadOption(f"{fields[name]} is given twice, by another name too; give it once")
        values[fields[name]] = value
    return [build(cls, values) for cls in classes]
