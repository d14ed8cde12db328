"""Rows from and to JSON: each row that is saved, read or imported passes one check, which says what is wrong with it.

The types of `rows` bound each field; `fault` compares the fields with each other, so that whoever reads a row may count on
lengths, layers and names.
"""

import json
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, get_args

import msgspec

from mlfusion.errors import BadOption, UnknownName
from mlfusion.results.rows import LabelMetrics, Metrics, Row, RowPrecision
from mlfusion.specs.definitions import from_words
from mlfusion.specs.identity import KINDS
from mlfusion.specs.names import parse_probes
from mlfusion.specs.options import ChooseOn, FeatureOptions, GridName


class NotARow(ValueError):
    """A value is no row; says which field is wrong and what is allowed."""


_DECODER = msgspec.json.Decoder(Row)

encode = msgspec.json.Encoder().encode
"""Row → its JSON in one line; options at their default are left out."""


def decode(text: bytes | str, classes: tuple[str, ...] | None = None) -> Row:
    """Decode a row from its JSON; `classes` are its names of classes if they are stored elsewhere.

    Raises:
        NotARow: the JSON does not describe a row.
        ValueError: the text is not JSON.
    """
    try:
        row = _DECODER.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return from_object(_parsed(text), classes)  # slower, but reads NaN, so that the error can name it
    return _checked(row, classes)


def from_object(value: Any, classes: tuple[str, ...] | None = None) -> Row:
    """Convert decoded JSON to a row; `classes` as for `decode`.

    Raises:
        NotARow: the value does not describe a row.
    """
    try:
        row = msgspec.convert(value, Row)
    except msgspec.ValidationError as err:
        raise NotARow(_sentence(str(err), value)) from None
    return _checked(row, classes)


def check(row: Row) -> None:
    """Raise `NotARow` for a row with a value that could not be read back."""
    from_object(msgspec.to_builtins(row))


def _parsed(text: bytes | str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise NotARow("row is nested too deeply") from None


def _checked(row: Row, classes: tuple[str, ...] | None) -> Row:
    if classes is not None:
        msgspec.structs.force_setattr(row, "classes", classes)  # no other reference to this row exists yet
    if problem := fault(row):
        raise NotARow(problem)
    return row


_SHARED = [
    "model",
    "dataset",
    "probe",
    "metric",
    "selected",
    "grid",
    "layers",
    "tokens",
    "features",
    "versions",
    "code",
    "created",
    "device",
    "precision",
    "sources",
    "images",
    "duplicates",
    "at_end",
    "stability",
    "validation",
]


def share_parts(row: Row, memo: dict[Any, Any]) -> None:
    """Let a row that was just read hold the parts that `memo` has from earlier rows: 200,000 rows then take a third of it."""
    for name in _SHARED:
        value = getattr(row, name)
        key = (name, tuple(value.items()) if isinstance(value, dict) else value)
        msgspec.structs.force_setattr(row, name, memo.setdefault(key, value))
    if attention := row.attention:
        for name in ("layers", "kinds"):
            value = getattr(attention, name)
            msgspec.structs.force_setattr(attention, name, memo.setdefault((name, value), value))


# --- fields that contradict each other -------------------------------------------------------------------------------

_KINDS: dict[type, str] = {Metrics: "balanced_accuracy", LabelMetrics: "mean_average_precision"}


def fault(row: Row) -> str | None:
    """What in a row contradicts the rest of it; None if nothing does."""
    return next(_faults(row), None)


def _faults(row: Row) -> Iterator[str]:
    metric = _KINDS.get(type(row.metrics), "r2")
    if row.metric != metric:
        yield f"metric is {row.metric!r}; the metrics beside it are of {metric}"
    if isinstance(row.metrics, (Metrics, LabelMetrics)):
        by_class = row.metrics.recall if isinstance(row.metrics, Metrics) else row.metrics.average_precision
        if not row.classes:
            yield "classes is empty; allowed: at least one name"
        if len(by_class) != len(row.classes):
            yield f"metrics has {len(by_class)} scores by class; there are {len(row.classes)} classes"
    if not set(row.at_end.values()) <= {"smallest", "largest"}:
        yield f"at_end is {_shortened(row.at_end)}; allowed: 'smallest' and 'largest'"
    if max(row.layers) > row.depth:
        yield f"layers has {max(row.layers)}; the model has {row.depth}"
    if attention := row.attention:
        if not len(attention.layers) == len(attention.kinds) == len(attention.mean) == len(attention.sd) > 0:
            yield "attention has lists of different lengths, or empty ones"
        elif max(attention.layers) > row.depth:
            yield f"attention.layers has {max(attention.layers)}; the model has {row.depth}"
    for problem in (
        _probe_fault(row.probe, row.depth),
        _options_fault(row.sources.options),
        _choice_fault(row),
        _fold_fault(row),
        _text_fault(row),
    ):
        if problem:
            yield problem


def _choice_fault(row: Row) -> str | None:
    chose = row.validation is not None
    if chose == (row.sources.validation is not None) == (row.choose_on == "validation"):
        return None
    return f"validation is {_shortened(row.validation)}, choose_on {row.choose_on!r}, and the sources say otherwise"


def _fold_fault(row: Row) -> str | None:
    if len(row.by_fold) != (row.folds or 0) or row.folds == 1:
        return f"by_fold has {len(row.by_fold)} folds; allowed: as many as folds says, 2 or more"
    if row.folds and (tested := sum(fold.images for fold in row.by_fold)) != row.images.test:
        return f"by_fold tests {tested} images; the row has {row.images.test}"
    return None


def _text_fault(row: Row) -> str | None:
    if "\0" in f"{row.model}{row.dataset}{row.code}{row.device}":  # SQLite ends a text there
        return "model, dataset, code or device holds a NUL, which no name has"
    try:
        encode(row)
    except UnicodeEncodeError as err:
        return f"{_shortened(err.object)} holds half a character, which is no UTF-8"
    return None


@lru_cache(maxsize=4096)
def _probe_fault(probe: str, depth: int) -> str | None:
    try:
        count = len(parse_probes([probe], depth))
    except (UnknownName, ValueError):
        count = 0
    if count == 1:
        return None
    return f"probe is {_shortened(probe)}; allowed: the name of one probe, such as cls-last/linear"


@lru_cache(maxsize=4096)
def _options_fault(words: tuple[str, ...]) -> str | None:
    """What is wrong with the options of an extraction, which become words of the commands that are printed."""
    try:
        from_words(
            FeatureOptions, [word for word in words if word != "--skip-bad"]
        )  # an option of the run, not of the key
    except (BadOption, ValueError) as err:
        return f"sources.options cannot be options of mlfusion extract ({err})"
    return None


# --- error messages about values  ----------------------------------------------------------------------------

_NOUNS = {
    "float": "a finite number",
    "int": "a whole number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
_ALLOWED = {
    "grid": get_args(GridName),
    "choose_on": get_args(ChooseOn),
    "precision": get_args(RowPrecision),
    "metrics.kind": ("class", "labels", "number"),
    "tokens": KINDS,
    "attention.kinds": KINDS,
}
_PATTERNS = {
    "validation": "is no key of a cache entry; allowed: 16 digits of 0-9a-f",
    "features": "is no key of a cache entry; allowed: 16 digits of 0-9a-f",
    "created": "is no time; allowed: such as 2026-01-31T23:59:59+00:00",
}


def _sentence(message: str, value: Any) -> str:
    """Translate `msgspec`'s message about a value ('Expected `int`, got `str` - at `$.seed`'), into plain words."""
    problem, _, location = message.partition(" - at `")
    path, part = _part_at(value, location.rpartition("$")[2].strip("`."))
    path = path or "row"
    field = re.sub(r"\[\d+\]", "", path)
    shown = f"{path} is {_shortened(part)}"
    if lacking := re.search(r"required field `(\w+)`", problem):
        return f"{path} lacks {lacking[1]}"
    if "matching regex" in problem:
        allowed = _PATTERNS.get(field, "cannot name a file; allowed: letters, digits, '_', '-' and '.'")
        return f"{path} {part!r} {allowed}"
    if field in _ALLOWED and isinstance(part, str):
        return f"{shown}; allowed: {', '.join(map(repr, _ALLOWED[field]))}"
    bound = re.match(r"Expected `(?:int|float)` (>=|<=) (\S+)", problem)
    if bound and isinstance(part, (int, float)) and math.isfinite(part):
        return f"{shown}; allowed: {'at least' if bound[1] == '>=' else 'at most'} {bound[2]}"
    expected = re.match(r"Expected `(\w+)", problem)
    noun = _NOUNS.get(expected[1]) if expected and " of length" not in problem else None
    return f"{shown}, not {noun}" if noun else f"{shown}: {problem}"


def _part_at(value: Any, path: str) -> tuple[str, Any]:
    """The path and the part of a value at 'metrics.recall[1]'; '[...]' is the first entry of an object that is no text."""
    name = ""
    for part in re.findall(r"\w+|\[\d+\]|\[\.\.\.\]", path):
        if part == "[...]":
            part = next((key for key, item in value.items() if not isinstance(item, str)), "")
            if not part:
                break
        value = value[int(part[1:-1])] if part.startswith("[") else value[part]
        name += part if part.startswith("[") or not name else f".{part}"
    return name, value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
