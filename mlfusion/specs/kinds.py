"""Kinds of option values: each parses, checks and prints a value.

`kind.parse(kind.words(value)) == value` holds for every kind. `specs.options` assigns kinds to options.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlfusion.errors import MlfusionError
from mlfusion.specs.names import setting_text, setting_value

UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
TIMES = {"h": 3600, "d": 86400, "w": 7 * 86400}
LARGEST = 2**63  # whole numbers are below it, as a database holds them
VIEW_NAMES = "plain, flip, crop1, crop2, …"
SPLIT_PARTS = {2: ("train", "test"), 3: ("train", "validation", "test")}


@dataclass(frozen=True)
class Kind:
    """One kind of value.

    `parse` converts a value from the command line (of type `typed`), `read` a value from a recipe or from Python; `words` gives
    the text to type for a value. `fault` returns an error message for a converted value, or None.
    """

    typed: Any  # type on the command line: str, int, float, bool or list[str]
    fault: Callable[[Any], str | None]
    parse: Callable[[Any], Any] = lambda raw: raw
    read: Callable[[Any], Any] = lambda raw: raw
    words: Callable[[Any], str | list[str]] = str


def text() -> Kind:
    """Non-empty text."""
    return Kind(str, lambda v: None if isinstance(v, str) and v else "allowed is text in quotes")


def pattern() -> Kind:
    """A regular expression with a group in brackets."""
    allowed = "allowed is a regular expression with a group in brackets, such as (patient\\d+)"

    def fault(value: Any) -> str | None:
        try:
            return None if isinstance(value, str) and re.compile(value).groups else allowed
        except re.error as err:
            return f"{allowed} ({err})"

    return Kind(str, fault)


def path() -> Kind:
    """A path, or several paths separated as in the variable PATH; in Python also `pathlib` paths and lists of paths."""

    def read(raw: Any) -> Any:
        if isinstance(raw, (list, tuple)):
            return os.pathsep.join(map(os.fspath, raw))
        return os.fspath(raw) if isinstance(raw, os.PathLike) else raw

    return Kind(str, lambda v: None if isinstance(v, str) and v else "allowed is a path", read=read)


def flag() -> Kind:
    """Yes or no."""
    return Kind(bool, lambda v: None if isinstance(v, bool) else "allowed are true and false")


def one_of(allowed: Sequence[str]) -> Kind:
    """One of the allowed words."""
    return Kind(str, lambda v: None if v in allowed else f"allowed are {', '.join(allowed)}")


def device_name() -> Kind:
    """A device of PyTorch, such as cuda:1, or 'auto'."""
    message = "allowed are auto, cpu, cuda, cuda:1 (and so on) and mps"
    good = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
    return Kind(str, lambda v: None if isinstance(v, str) and good.fullmatch(v) else message)


def whole(minimum: int) -> Kind:
    """A whole number of at least `minimum`."""
    message = f"allowed are whole numbers from {minimum}"
    return Kind(int, lambda v: None if type(v) is int and minimum <= v < LARGEST else message)


def share() -> Kind:
    """A number from 0 to below 1."""
    return Kind(
        float,
        lambda v: None if type(v) in (int, float) and 0 <= v < 1 else "allowed is from 0 to below 1, such as 0.1",
        read=lambda v: float(v) if type(v) is int else v,
        words=repr,
    )


def amount(units: Mapping[str, int] = UNITS, *, example: str = "4GB", minimum: int = 0) -> Kind:
    """An amount with its unit: '4GB' on the command line and in recipes, 4_000_000_000 in Python."""

    def parse(raw: Any) -> Any:
        for unit, factor in units.items():
            number = raw.removesuffix(unit) if isinstance(raw, str) else raw
            if number != raw and re.fullmatch(r"\d+(\.\d+)?", number):
                return round(float(number) * factor)
        return raw

    def words(value: int) -> str:
        smallest = min(units, key=units.__getitem__)
        unit = max((u for u in units if value % units[u] == 0), key=units.__getitem__, default=smallest)
        return f"{value // units[unit]}{unit}" if value % units[unit] == 0 else f"{value / units[unit]!r}{unit}"

    message = f"allowed is a number with one of {', '.join(units)}, such as {example}"
    return Kind(str, lambda v: None if type(v) is int and v >= minimum else message, parse, parse, words)


def numbers(minimum: int, *, example: str, allow_all: bool = False) -> Kind:
    """Whole numbers, comma-separated; with `allow_all` also 'all', which is None."""
    addition = ' and "all"' if allow_all else ""
    message = f"allowed is a list of whole numbers from {minimum}{addition}, such as {example}"

    def parse_one(word: Any) -> Any:
        if not isinstance(word, str):
            return word
        word = word.strip()
        if allow_all and word == "all":
            return None
        return int(word) if re.fullmatch(r"\d+", word) else word

    def read(raw: Any) -> Any:
        parts = raw.split(",") if isinstance(raw, str) else raw
        return tuple(map(parse_one, parts)) if isinstance(parts, (list, tuple)) else raw

    def fault(value: Any) -> str | None:
        if not (isinstance(value, tuple) and value):
            return message
        if wrong := [
            n for n in value if not ((allow_all and n is None) or (type(n) is int and minimum <= n < LARGEST))
        ]:
            return f"{message}, not {wrong[0]!r}"
        return repetition_fault(["all" if n is None else n for n in value])

    return Kind(str, fault, read, read, lambda v: ",".join("all" if n is None else str(n) for n in v))


def repetition_fault(values: Sequence[Any]) -> str | None:
    """The error message for a repeated value, or None."""
    return next((f"{value!r} comes twice" for value in dict.fromkeys(values) if values.count(value) > 1), None)


def is_view(word: str) -> bool:
    """Whether this is the name of a view: 'plain', 'flip', 'crop1', 'crop2', …"""
    return re.fullmatch(r"plain|flip|crop[1-9]\d*", word) is not None


def view_names() -> Kind:
    """Views, comma-separated, or their number, counted from 'plain', 'flip', 'crop1', 'crop2', …"""

    def read(raw: Any) -> Any:
        raw = str(raw) if type(raw) is int else raw
        if isinstance(raw, str) and re.fullmatch(r"[1-9]\d*", raw):
            return ("plain", "flip", *(f"crop{n}" for n in range(1, int(raw) - 1)))[: int(raw)]
        if isinstance(raw, str):
            return tuple(word.strip() for word in raw.split(","))
        return tuple(raw) if isinstance(raw, list) else raw

    def fault(value: Any) -> str | None:
        if not (isinstance(value, tuple) and value and all(isinstance(word, str) for word in value)):
            return f"allowed are view names ({VIEW_NAMES}) or their number"
        faults = [f"no view named {word!r}; there are {VIEW_NAMES}" for word in value if not is_view(word)]
        return "; ".join([*faults, *filter(None, [repetition_fault(value)])]) or None

    return Kind(str, fault, read, read, ",".join)


def split_names() -> Kind:
    """Splits, comma-separated; 'test=validation' uses the validation split as the test split."""

    def read(raw: Any) -> Any:
        if isinstance(raw, str):
            return tuple(part.strip() for part in raw.split(","))
        return tuple(raw) if isinstance(raw, list) else raw

    def fault(value: Any) -> str | None:
        good = re.compile(r"[^=]+(=[^=]+)?")
        if not (isinstance(value, tuple) and value and all(isinstance(w, str) and good.fullmatch(w) for w in value)):
            return "allowed are names of splits, such as train,test or train,test=validation"
        return repetition_fault([word.partition("=")[0] for word in value])

    return Kind(str, fault, read, read, ",".join)


def ratio() -> Kind:
    """Shares of train/test or of train/validation/test, such as 0.8/0.2 or 80/10/10."""

    def fault(value: Any) -> str | None:
        try:
            parse_ratio(value)
        except ValueError as err:
            return str(err)
        return None

    return Kind(str, fault)


def parse_ratio(words: Any) -> tuple[float, ...]:
    """'0.8/0.1/0.1', '80/20' → shares that sum to 1.

    Raises:
        ValueError: not two or three positive numbers, or numbers whose sum is neither 1 nor 100.
    """
    parts = words.split("/") if isinstance(words, str) else []
    if len(parts) in SPLIT_PARTS and all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", part.strip()) for part in parts):
        shares = [float(part) for part in parts]
        total = math.fsum(shares)
        if min(shares) > 0 and any(math.isclose(total, expected, rel_tol=1e-6) for expected in (1, 100)):
            return tuple(number / total for number in shares)
    raise ValueError("allowed are shares of train/test or train/validation/test, such as 0.8/0.2 or 80/10/10")


def window() -> Kind:
    """Two values of 16 bits, such as 0,4095, or auto."""
    allowed = "allowed are auto, and two whole numbers from 0 to 65535, the first smaller, such as 0,4095"

    def fault(value: Any) -> str | None:
        return None if value == "auto" or parse_window(value) else allowed

    return Kind(str, fault)


def parse_window(words: Any) -> tuple[int, int] | None:
    """'0,4095' → (0, 4095); None for other text."""
    match = re.fullmatch(r"\s*(\d{1,5})\s*,\s*(\d{1,5})\s*", words) if isinstance(words, str) else None
    low, high = map(int, match.groups()) if match else (0, 0)
    return (low, high) if low < high <= 65535 else None


def settings() -> Kind:
    """Settings of a model's configuration, such as 'hidden_act=gelu'; may be repeated; a table in recipes."""
    plain = (str, int, float, bool)

    def parse_one(word: str) -> Any:
        key, equals, value = word.partition("=")
        return (key, setting_value(value)) if key and equals else word

    def read(raw: Any) -> Any:
        if isinstance(raw, Mapping):
            return tuple(sorted(raw.items(), key=str))
        if isinstance(raw, (list, tuple)):
            pairs = [parse_one(item) if isinstance(item, str) else item for item in raw]
            return tuple(sorted(pairs, key=str))
        return raw

    def fault(value: Any) -> str | None:
        if not isinstance(value, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
            return 'allowed are settings such as hidden_act=gelu (in a recipe: { hidden_act = "gelu" })'
        for name, setting in value:
            if not isinstance(name, str) or not re.fullmatch(r"[^\s=,]+", name):
                return f"{name!r} names no setting; allowed are names such as hidden_act"
            if not isinstance(setting, plain) and setting is not None:
                return f"{name} = {setting!r}: allowed are text, numbers, true and false"
            if "," in str(setting) or setting in (math.inf, -math.inf) or setting != setting:
                return f"{name} = {setting!r}: allowed are text without commas, and finite numbers"
        return repetition_fault([name for name, _ in value])

    def words(value: Any) -> list[str]:
        return [f"{name}={setting_text(setting)}" for name, setting in value]

    return Kind(list[str], fault, lambda raw: read(raw or []), read, words)


def checked(check: Callable[[str], object]) -> Kind:
    """Text that the parser `check` accepts; the message of its error is the fault."""

    def fault(value: Any) -> str | None:
        if not isinstance(value, str):
            return "allowed is text in quotes"
        try:
            check(value)
        except MlfusionError as err:
            return str(err)
        return None

    def read(raw: Any) -> Any:
        return ",".join(raw) if isinstance(raw, (list, tuple)) and all(isinstance(w, str) for w in raw) else raw

    return Kind(str, fault, read=read)
