"""Encodes labels as numbers, by one rule for every form of data set: one class, several labels, or a number."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mlfusion.datasets.split import RawSplit
from mlfusion.errors import BadData
from mlfusion.specs.options import LabelKind

SEPARATOR = ";"
"""Separator of the labels of one image in text."""


def encode_labels(
    splits: Mapping[str, RawSplit], target: LabelKind | None, location: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The classes of all splits together, and each split's labels as numbers; without `target`, their kind is guessed.

    One class is encoded as its index, [N] int64. Several labels are encoded as rows of 0 and 1, [N, C] uint8; they may be
    written as a list of names or of class numbers, as text separated by ';', or as a vector of 0 and 1 for each image.
    Numbers are [N] float64, and have no classes.

    Raises:
        BadData: a label is not of that kind; the message names the image.
    """
    raw_labels = {name: _to_python(split.labels) for name, split in splits.items()}
    for name, split in splits.items():
        if missing := [row for row, label in enumerate(raw_labels[name]) if _is_missing(label, split.names)]:
            raise BadData(
                f"{location}, split {name}: {len(missing):,} of {len(split.ids):,} images have no label, the first "
                f"{split.ids[missing[0]]}; leave them out, take other splits, or split a test part from train: "
                "--split-ratio 0.8/0.2"
            )
    kind = target or _guess_kind([label for labels in raw_labels.values() for label in labels])
    if kind == "number":
        return (), {name: _encode_numbers(raw_labels[name], split, location) for name, split in splits.items()}
    if kind == "labels":
        return _encode_label_lists(splits, raw_labels, location)
    return _encode_classes(splits, raw_labels, location)


def _to_python(labels: Iterable[Any]) -> list[Any]:
    """Labels without NumPy's scalars; a vector of one number becomes that number."""
    plain = (
        labels.tolist() if isinstance(labels, np.ndarray) else [getattr(x, "tolist", lambda x=x: x)() for x in labels]
    )
    if all(isinstance(label, list) and len(label) == 1 for label in plain) and isinstance(labels, np.ndarray):
        return [label[0] for label in plain]
    return plain


def _is_missing(label: Any, names: tuple[str, ...] | None) -> bool:
    if isinstance(label, float):
        return math.isnan(label)
    return label is None or (names is not None and label == -1 and not isinstance(label, bool))


def _guess_kind(labels: list[Any]) -> LabelKind:
    """The kind of the labels by their types; texts are numbers if all parse as numbers and at least one is not whole."""
    if any(isinstance(label, list) for label in labels):
        return "labels"
    if any(isinstance(label, float) for label in labels):
        return "number"
    texts = [label for label in labels if isinstance(label, str)]
    if any(SEPARATOR in text for text in texts):
        return "labels"
    all_numbers = len(texts) == len(labels) and all(math.isfinite(_number(text)) for text in texts)
    return "number" if all_numbers and not all(text.removeprefix("-").isdecimal() for text in texts) else "class"


def _number(label: Any) -> float:
    """The number that a label is or can be parsed as; NaN if there is none."""
    try:
        return float(label)
    except (TypeError, ValueError):
        return math.nan


def _natural_key(text: str) -> tuple[int, str]:
    """Sort key of names: numbers by size, then words."""
    return (int(text), "") if text.isdecimal() else (2**62, text)


def _encode_classes(
    splits: Mapping[str, RawSplit], raw_labels: Mapping[str, list[Any]], location: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    named = {name: _class_names(raw_labels[name], split, location) for name, split in splits.items()}
    classes = _all_class_names(splits, {label for labels in named.values() for label in labels})
    index = {label: i for i, label in enumerate(classes)}
    return classes, {name: np.array([index[label] for label in labels], np.int64) for name, labels in named.items()}


def _class_names(labels: list[Any], split: RawSplit, location: str) -> list[str]:
    """Class names of labels; a class number is replaced by its name if names are known."""
    named = []
    for row, label in enumerate(labels):
        if isinstance(label, list):
            raise BadData(f"{location}: {split.ids[row]} has several labels, {label!r}; give --target labels")
        if label == "":
            raise BadData(f"{location}: {split.ids[row]} has an empty label; give it one, or leave it out")
        named.append(_class_name(label, split, row, location))
    return named


def _class_name(label: Any, split: RawSplit, row: int, location: str) -> str:
    if split.names is None or (isinstance(label, str) and label in split.names):
        return str(label)
    text = str(label)
    if text.isdecimal() and int(text) < len(split.names):
        return split.names[int(text)]
    raise BadData(
        f"{location}: {split.ids[row]} has label {label!r}; allowed: 0 to {len(split.names) - 1}, as there are "
        f"{len(split.names)} class names, or one of them"
    )


def _agreed_names(splits: Mapping[str, RawSplit]) -> tuple[str, ...] | None:
    lists = {split.names for split in splits.values()}
    return lists.pop() if len(lists) == 1 else None


def _all_class_names(splits: Mapping[str, RawSplit], present: set[str]) -> tuple[str, ...]:
    """All class names: the splits' list if they agree on one, else those present, in natural order."""
    return _agreed_names(splits) or tuple(sorted(present, key=_natural_key))


def _encode_label_lists(
    splits: Mapping[str, RawSplit], raw_labels: Mapping[str, list[Any]], location: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    vectors = [label for labels in raw_labels.values() for label in labels]
    if all(isinstance(label, list) and all(isinstance(x, (bool, int, float)) for x in label) for label in vectors):
        sizes = {len(label) for label in vectors}
        if len(sizes) == 1 and sizes != {0} and all(x in (0, 1) for label in vectors for x in label):
            size = sizes.pop()
            names = _agreed_names(splits) or ()
            classes = names if len(names) == size else tuple(map(str, range(size)))
            return classes, {name: np.array(labels, np.uint8).reshape(-1, size) for name, labels in raw_labels.items()}
    named: dict[str, list[list[str]]] = {}
    for name, split in splits.items():
        named[name] = []
        for row, label in enumerate(raw_labels[name]):
            parts = label.split(SEPARATOR) if isinstance(label, str) else label if isinstance(label, list) else [label]
            if any(isinstance(part, (list, dict)) for part in parts):
                raise BadData(
                    f"{location}: {split.ids[row]} has label {label!r}; allowed is a list of names or numbers"
                )
            parts = [part.strip() if isinstance(part, str) else part for part in parts]
            named[name].append([_class_name(part, split, row, location) for part in parts if part != ""])
    classes = _all_class_names(splits, {part for labels in named.values() for parts in labels for part in parts})
    index = {label: i for i, label in enumerate(classes)}
    tables = {}
    for name, labels in named.items():
        tables[name] = np.zeros((len(labels), len(classes)), np.uint8)
        for row, parts in enumerate(labels):
            tables[name][row, [index[part] for part in parts]] = 1
    return classes, tables


def _encode_numbers(labels: list[Any], split: RawSplit, location: str) -> np.ndarray:
    values = np.array([_number(label) for label in labels])
    if not np.isfinite(values).all():
        row = int(np.isfinite(values).argmin())
        raise BadData(f"{location}: {split.ids[row]} has label {labels[row]!r}, which is no finite number")
    return values
