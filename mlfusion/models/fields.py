"""Judges the fields of another library's configuration: each one is read, has no effect, or is refused by name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlfusion.errors import BadModel


@dataclass(frozen=True)
class Fields:
    """What is known of the fields of one part of a configuration; a field that is null has its default."""

    part: str  # 'timm's model_args', for messages
    read: frozenset[str]
    no_effect: Mapping[str, str]  # field → why its value does not change the tokens
    fixed: Mapping[str, tuple[Any, ...]]  # field → the only values with which the computation is known

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise BadModel for the first field that is unknown, or whose value changes the computation."""
        for name, value in settings.items():
            if value is None or name in self.read or name in self.no_effect or value in self.fixed.get(name, ()):
                continue
            allowed = " or ".join(map(repr, self.fixed.get(name, ()))) or "leave this field away"
            raise BadModel(
                f"{self.part} has {name} = {value!r}, and what this computes is not known; allowed: {allowed}, or the same "
                "model in transformers' own format"
            )

    def agree(self, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Raise BadModel if a field says something else than the checkpoint's tensors, whose facts these are."""
        for name, fact in facts.items():
            value = settings.get(name)
            if isinstance(value, list) and len(set(value)) == 1:
                value = value[0]
            if value is not None and value != fact:
                raise BadModel(
                    f"{self.part} has {name} = {value!r}, and the tensors of its file have {fact!r}; allowed: a "
                    "configuration and weights that belong together"
                )


def misfit(names: Iterable[str], known: re.Pattern[str], needed: Iterable[str]) -> str | None:
    """The first name that is not known, or 'no NAME' for the first that is needed and not there; None if there is none."""
    there = sorted(names)
    unknown = next((name for name in there if not known.fullmatch(name)), None)
    return unknown or next((f"no {name}" for name in needed if name not in there), None)


def refuse_wrapper(names: Iterable[str], needed: Sequence[str], whose: str) -> None:
    """Raise BadModel if all needed names are there behind one prefix, such as 'module.', and not without it."""
    there = set(names)
    for name in sorted(name for name in there if name.endswith(f".{needed[0]}")):
        prefix = name.removesuffix(needed[0])
        if all(prefix + each in there and each not in there for each in needed):
            raise BadModel(
                f"the names in the weights of {whose} begin with {prefix}, as a wrapper of the model saves them; allowed: "
                f"{needed[0]} and so on. Save the state dict of the model inside the wrapper, or the names without {prefix}"
            )


def square(value: Any, part: str) -> int:
    """A size of one number, or of two equal ones; raises BadModel for any other."""
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise BadModel(f"{part} has a size of {value}; allowed: images and patches as high as they are wide")
    return int(sides.pop())
