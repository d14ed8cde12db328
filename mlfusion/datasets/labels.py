"""Encodes labels as numbers, by one rule for every form: one class, several labels, or a number."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mlfusion.datasets.split import RawSplit
from mlfusion.errors import BadData
from mlfusion.specs.options import LabelKind

SEVERAL = ";"
"""Separator of the labels of one image in text."""


def encode_labels(
    found: Mapping[str, RawSplit], target: LabelKind | None, where: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The classes of all splits together, and each split's labels as numbers; without `target`, their kind is guessed.

    One class is encoded as its index, [N] int64. Several labels are encoded as rows of 0 and 1, [N, C] uint8; they may be
    written as a list of names or of class numbers, as text separated by ';', or as a vector of 0 and 1 for each image.
    Numbers are [N] float64, and have no classes.

    Raises:
        BadData: a label is not of that kind; the message names the image.
    """
    written = {name: _plain(one.labels) for name, one in found.items()}
    for name, one in found.items():
        if absent := [row for row, label in enumerate(written[name]) if _absent(label, one.names)]:
            raise BadData(
                f"{where}, split {name}: {len(absent):,} of {len(one.ids):,} images have no label, the first "
                f"{one.ids[absent[0]]}; leave them out, take other splits, or split a test part from train: "
                "--split-ratio 0.8/0.2"
            )
    kind = target or _guess([label for labels in written.values() for label in labels])
    if kind == "number":
        return (), {name: _numbers(written[name], one, where) for name, one in found.items()}
    if kind == "labels":
        return _several(found, written, where)
    return _classes(found, written, where)


def _plain(labels: Iterable[Any]) -> list[Any]:
    """Labels without NumPy's scalars; a vector of one number becomes that number."""
    plain = (
        labels.tolist() if isinstance(labels, np.ndarray) else [getattr(x, "tolist", lambda x=x: x)() for x in labels]
    )
    if all(isinstance(label, list) and len(label) == 1 for label in plain) and isinstance(labels, np.ndarray):
        return [label[0] for label in plain]
    return plain


def _absent(label: Any, names: tuple[str, ...] | None) -> bool:
    if isinstance(label, float):
        return math.isnan(label)
    return label is None or (names is not None and label == -1 and not isinstance(label, bool))


def _guess(labels: list[Any]) -> LabelKind:
    """The kind of the labels by their types; texts are numbers if all parse as numbers and at least one is not whole."""
    if any(isinstance(label, list) for label in labels):
        return "labels"
    if any(isinstance(label, float) for label in labels):
        return "number"
    texts = [label for label in labels if isinstance(label, str)]
    if any(SEVERAL in text for text in texts):
        return "labels"
    numbers = len(texts) == len(labels) and all(math.isfinite(_number(text)) for text in texts)
    return "number" if numbers and not all(text.removeprefix("-").isdecimal() for text in texts) else "class"


def _number(label: Any) -> float:
    """The number that a label is or can be parsed as; NaN if there is none."""
    try:
        return float(label)
    except (TypeError, ValueError):
        return math.nan


def _natural(text: str) -> tuple[int, str]:
    """Sort key of names: numbers by size, then words."""
    return (int(text), "") if text.isdecimal() else (2**62, text)


def _classes(
    found: Mapping[str, RawSplit], written: Mapping[str, list[Any]], where: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    named = {name: _named(written[name], one, where) for name, one in found.items()}
    classes = _list(found, {label for labels in named.values() for label in labels})
    number = {label: i for i, label in enumerate(classes)}
    return classes, {name: np.array([number[label] for label in labels], np.int64) for name, labels in named.items()}


def _named(labels: list[Any], one: RawSplit, where: str) -> list[str]:
    """Class names; a class number is replaced by its name if names are known."""
    named = []
    for row, label in enumerate(labels):
        if isinstance(label, list):
            raise BadData(f"{where}: {one.ids[row]} has several labels, {label!r}; give --target labels")
        if label == "":
            raise BadData(f"{where}: {one.ids[row]} has an empty label; give it one, or leave it out")
        named.append(_name(label, one, row, where))
    return named


def _name(label: Any, one: RawSplit, row: int, where: str) -> str:
    if one.names is None or (isinstance(label, str) and label in one.names):
        return str(label)
    text = str(label)
    if text.isdecimal() and int(text) < len(one.names):
        return one.names[int(text)]
    raise BadData(
        f"{where}: {one.ids[row]} has label {label!r}; allowed: 0 to {len(one.names) - 1}, as there are "
        f"{len(one.names)} class names, or one of them"
    )


def _agreed_names(found: Mapping[str, RawSplit]) -> tuple[str, ...] | None:
    lists = {one.names for one in found.values()}
    return lists.pop() if len(lists) == 1 else None


def _list(found: Mapping[str, RawSplit], present: set[str]) -> tuple[str, ...]:
    """All class names: the splits' list if they agree on one, else those present, in natural order."""
    return _agreed_names(found) or tuple(sorted(present, key=_natural))


def _several(
    found: Mapping[str, RawSplit], written: Mapping[str, list[Any]], where: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    vectors = [label for labels in written.values() for label in labels]
    if all(isinstance(label, list) and all(isinstance(x, (bool, int, float)) for x in label) for label in vectors):
        sizes = {len(label) for label in vectors}
        if len(sizes) == 1 and sizes != {0} and all(x in (0, 1) for label in vectors for x in label):
            size = sizes.pop()
            names = _agreed_names(found) or ()
            classes = names if len(names) == size else tuple(map(str, range(size)))
            return classes, {name: np.array(labels, np.uint8).reshape(-1, size) for name, labels in written.items()}
    named: dict[str, list[list[str]]] = {}
    for name, one in found.items():
        named[name] = []
        for row, label in enumerate(written[name]):
            parts = label.split(SEVERAL) if isinstance(label, str) else label if isinstance(label, list) else [label]
            if any(isinstance(part, (list, dict)) for part in parts):
                raise BadData(f"{where}: {one.ids[row]} has label {label!r}; allowed is a list of names or numbers")
            parts = [part.strip() if isinstance(part, str) else part for part in parts]
            named[name].append([_name(part, one, row, where) for part in parts if part != ""])
    classes = _list(found, {part for labels in named.values() for parts in labels for part in parts})
    number = {label: i for i, label in enumerate(classes)}
    tables = {}
    for name, labels in named.items():
        tables[name] = np.zeros((len(labels), len(classes)), np.uint8)
        for row, parts in enumerate(labels):
            tables[name][row, [number[part] for part in parts]] = 1
    return classes, tables


def _numbers(labels: list[Any], one: RawSplit, where: str) -> np.ndarray:
    values = np.array([_number(label) for label in labels])
    if not np.isfinite(values).all():
        row = int(np.isfinite(values).argmin())
        raise BadData(f"{where}: {one.ids[row]} has label {labels[row]!r}, which is no finite number")
    return values
