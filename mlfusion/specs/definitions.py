"""Defines options (kind, help, effect) and the base class that parses, checks and prints them.

Values are checked when an options class is created; functions that take one need not check it.
"""

import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Mapping
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
    name: str = ""  # in recipes, and with dashes on the command line; empty: the field's name
    former: tuple[str, ...] = ()  # earlier names, which are still accepted
    short: str = ""  # a letter for the command line

    @property
    def flag(self) -> str:
        """The name on the command line, without the leading dashes."""
        return self.name.replace("_", "-")


def option(default: Any, kind: Kind, help: str, *, effect: Effect, added: bool = False, **others: Any) -> Any:
    """A field of an options class, with its definition as metadata.

    `added` marks an option that was added later: digests omit its default, so that existing ids stay the same.
    """
    metadata = {"option": Option(kind, help, effect, **others), **(OMIT_IF_DEFAULT if added else {})}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """Base of the options classes: parses, checks and prints fields by their definitions."""

    def __post_init__(self) -> None:
        for field, one in definitions(type(self)):
            given = getattr(self, field)
            value = given if given is None else one.kind.read(given)
            object.__setattr__(self, field, value)
            if fault := fault_of(type(self), field, value):
                shown = ",".join(map(str, given)) if isinstance(given, (list, tuple)) else given
                raise BadOption(f"--{one.flag} {shown}: {fault}")

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
            one = known[field]
            text = one.kind.words(value)
            if value is True:
                words.append(f"--{one.flag}")
                continue
            for word in [text] if isinstance(text, str) else text:
                words += spelled(one.flag, word)
        return words


def definitions(kind: type[Options]) -> Iterator[tuple[str, Option]]:
    """The fields of an options class, without nested classes, with their definitions."""
    for field in dataclasses.fields(kind):
        if "option" in field.metadata:
            one: Option = field.metadata["option"]
            yield field.name, one if one.name else dataclasses.replace(one, name=field.name)


def parts(kind: type[Options]) -> dict[str, type[Options]]:
    """The nested options classes of an options class, by field."""
    return {each.name: type(each.default) for each in dataclasses.fields(kind) if isinstance(each.default, Options)}


def all_definitions(kind: type[Options]) -> dict[str, Option]:
    """The definitions of a class and of its nested options classes, by field."""
    definitions_by_field = dict(definitions(kind))
    for inner in parts(kind).values():
        definitions_by_field |= all_definitions(inner)
    return definitions_by_field


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Create an options class from values of some of its fields and of the fields of nested options classes.

    Raises:
        BadOption: a value that is not allowed.
    """
    own = {name: values[name] for name, _ in definitions(kind) if name in values}
    inner = {name: values.get(name) or build(part, values) for name, part in parts(kind).items()}
    return kind(**own, **inner)


def fault_of(kind: type[Options], field: str, value: Any) -> str | None:
    """The error message for a parsed value, or None. The value None is allowed if it is the default."""
    default = next(each.default for each in dataclasses.fields(kind) if each.name == field)
    if value is None and default is None:
        return None
    return all_definitions(kind)[field].kind.fault(value)


def command(verb: str, words: Iterable[str] = (), **arguments: str | None) -> str:
    """A `mlfusion` command with these arguments and words, quoted for a shell."""
    named = [word for name, value in arguments.items() if value is not None for word in spelled(name, value)]
    return shlex.join(["mlfusion", *verb.split(), *named, *words])


def spelled(name: str, value: str) -> list[str]:
    """The words of one option; a value that begins with a dash is joined by '='."""
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def distribute(given: Mapping[str, Any], *kinds: type[Options]) -> list[Any]:
    """Convert the keywords of a public function to one value of each options class.

    Raises:
        BadOption: a keyword that none of the classes has, or a value that is not allowed.
    """
    known = [name for kind in kinds for name in (*parts(kind), *all_definitions(kind))]
    if unknown := [name for name in given if name not in known]:
        near = get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise BadOption(f"no option named {unknown[0]!r}.{hint} There are: {', '.join(known)}")
    return [build(kind, given) for kind in kinds]


def defaults_of(kind: type[Options]) -> dict[str, Any]:
    """The defaults of a class and of its nested options classes, by field."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind) if "option" in field.metadata}
    for inner in parts(kind).values():
        defaults |= defaults_of(inner)
    return defaults
