"""Encodes labels as numbers, by one rule for every form of data set: one class, several labels, or a number."""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlfusion.datasets.split import RawSplit
from mlfusion.datasets.values import MISSING, NUMBER, NUMBERED, class_name, is_missing, number, shown, values
from mlfusion.errors import BadData
from mlfusion.specs.options import LabelKind

logger = logging.getLogger(__name__)

SEPARATOR = ";"
"""Separator of the labels of one image in text."""

WHOLE = re.compile(r"[+-]?[0-9]+")
OVERRIDE = "--target class, labels or number says what they are"


def encode_labels(
    splits: Mapping[str, RawSplit], target: LabelKind | None, location: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The classes of all splits together, and each split's labels as numbers; without `target`, their kind is guessed.

    One class is encoded as its index, [N] int64. Several labels are encoded as rows of 0 and 1, [N, C] uint8; they may be
    written as a list of names or of class numbers, as text separated by ';', or as a vector of 0 and 1 for each image.
    Numbers are [N] float64, and have no classes. A class that no image has is left out, and so is a split other than train and
    test of which no image has a label.

    Raises:
        BadData: a label is not of that kind; the message names the image.
    """
    named = {name: _unique_names(split.names, location) for name, split in splits.items()}
    found = {name: values(split, location) for name, split in splits.items()}
    for name in sorted(set(found) - {"train", "test"}):
        if all(is_missing(label, named[name]) for label in found[name]) and len(found) > 1:
            logger.warning("%s: no image of the split %s has a label; the split is left out", location, name)
            del found[name]
    splits = {name: split for name, split in splits.items() if name in found}
    named = {name: named[name] for name in splits}
    labels = _unwrapped(found, target)
    for name, split in splits.items():
        if missing := [row for row, label in enumerate(labels[name]) if is_missing(label, named[name])]:
            raise BadData(
                f"{location}, split {name}: {len(missing):,} of {len(split.ids):,} images have no label, the first "
                f"{split.place(missing[0])}; leave them out, take other splits, or split a test part from train: "
                "--split-ratio 0.8/0.2"
            )
    encoder = _Encoder(splits, labels, named, location)
    kind = target or encoder.guess()
    if kind == "number":
        return (), {name: encoder.numbers(name) for name in splits}
    classes, numbers = encoder.label_lists() if kind == "labels" else encoder.classes()
    encoder.report_spellings()
    return _without_unused(classes, numbers, location)


def _unwrapped(labels: dict[str, list[Any]], target: LabelKind | None) -> dict[str, list[Any]]:
    """The labels; if every list of every split holds one label, the labels of these lists, unless several are requested."""
    while target != "labels" and _are_lists_of_one(labels):
        labels = {
            name: [label[0] if isinstance(label, list) else label for label in each] for name, each in labels.items()
        }
    return labels


def _are_lists_of_one(labels: Mapping[str, list[Any]]) -> bool:
    lists = [label for each in labels.values() for label in each if isinstance(label, list)]
    return bool(lists) and all(len(label) == 1 for label in lists)


def _unique_names(names: Sequence[str] | None, location: str) -> tuple[str, ...] | None:
    """Class names in which equal ones are told apart by their numbers, as ImageNet's list has two names twice."""
    if names is None:
        return None
    unique = [class_name(name) for name in names]
    while repeated := {name for name, count in Counter(unique).items() if count > 1}:
        logger.warning(
            "%s: several classes are called %s; they stay apart, and their numbers are added to their names",
            location,
            ", ".join(map(shown, sorted(repeated))),
        )
        unique = [f"{name} ({number})" if name in repeated else name for number, name in enumerate(unique)]
    return tuple(unique)


def _without_unused(
    classes: tuple[str, ...], labels: dict[str, np.ndarray], location: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The classes that at least one image has, and the labels as their numbers."""
    used = np.zeros(len(classes), bool)
    for each in labels.values():
        used |= each.any(0) if each.ndim == 2 else np.bincount(each, minlength=len(classes)) > 0
    if used.all():
        return classes, labels
    unused = [name for name, is_used in zip(classes, used, strict=True) if not is_used]
    more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
    logger.warning(
        "%s: no image has the class %s%s; %s of %s classes are left",
        *(location, ", ".join(map(shown, unused[:3])), more, f"{used.sum():,}", f"{len(classes):,}"),
    )
    index = np.cumsum(used) - 1
    return (
        tuple(name for name, is_used in zip(classes, used, strict=True) if is_used),
        {name: each[:, used] if each.ndim == 2 else index[each] for name, each in labels.items()},
    )


def natural_key(text: str) -> tuple[int, int, int, str]:
    """Sort key of class names: numbers by size, then other text; no two names have the same key."""
    return (0, int(text), len(text), text) if re.fullmatch(r"-?[0-9]{1,18}", text) else (1, 0, 0, text)


class _Encoder:
    """Encodes the labels of all splits of a data set.

    Attributes:
        labels: split → its labels as Python's values.
        named: split → the names that class numbers stand for, if there are any.
    """

    def __init__(
        self,
        splits: Mapping[str, RawSplit],
        labels: Mapping[str, list[Any]],
        named: Mapping[str, tuple[str, ...] | None],
        location: str,
    ) -> None:
        self.splits, self.labels, self.named, self.location = splits, labels, named, location
        self.spellings: dict[str, set[str]] = {}  # class name → the texts that it was read from

    def guess(self) -> LabelKind:
        """The kind that the form implies, or that the labels' types show; texts are numbers if all are and one is not whole."""
        if forms := {split.target for split in self.splits.values() if split.target}:
            return forms.pop()
        labels = [label for each in self.labels.values() for label in each]
        types = {type(label) for label in labels}
        if bool in types and len(types) > 1:
            self._refuse_mixture(types)
        if list in types:
            return "labels"
        texts = [label for label in labels if isinstance(label, str)]
        names = {name for each in self.named.values() for name in each or ()}
        if several := next((text for text in texts if SEPARATOR in class_name(text) and text not in names), None):
            self._report(
                f"{shown(several)} and other labels hold '{SEPARATOR}', and are read as several labels an image"
            )
            return "labels"
        if names:
            return "class"
        if float in types:
            whole = all(isinstance(label, (int, float)) and float(label).is_integer() for label in labels)
            return self._numbers(whole)
        return self._guess_texts(texts) if texts and len(texts) == len(labels) else "class"

    def _guess_texts(self, texts: Sequence[str]) -> LabelKind:
        if all(re.fullmatch(r"[+-]?[0-9]+,[0-9]+", text.strip()) for text in texts):
            self._report(
                f"{shown(texts[0])} and all other labels are read as class names; a number has a decimal point"
            )
        numeric = [text for text in texts if NUMBER.fullmatch(text.strip())]
        fractions = [text for text in numeric if not WHOLE.fullmatch(text.strip())]
        if len(numeric) == len(texts):
            return self._numbers(all(float(text).is_integer() for text in fractions)) if fractions else "class"
        others = {text for text in texts if not NUMBER.fullmatch(text.strip())}
        if (fractions and len(numeric) > len(texts) / 2) or (
            numeric and all(t.strip().lower() in MISSING for t in others)
        ):
            name, row = next((n, i) for n, each in self.labels.items() for i, text in enumerate(each) if text in others)
            raise BadData(
                f"{self.location}: {self.splits[name].place(row)} has label {shown(self.labels[name][row])}, where "
                f"{len(numeric):,} of {len(texts):,} labels are numbers; leave the image out, or give --target class if this "
                "is a class"
            )
        return "class"

    def _numbers(self, whole: bool) -> LabelKind:
        if whole:
            self._report("all labels are whole numbers written with a fraction, and are read as numbers to predict")
        return "number"

    def _report(self, guess: str) -> None:
        logger.warning("%s: %s; %s", self.location, guess, OVERRIDE)

    def _refuse_mixture(self, types: set[type]) -> None:
        name, row = next(
            (n, i) for n, each in self.labels.items() for i, label in enumerate(each) if type(label) is bool
        )
        others = ", ".join(sorted(one.__name__ for one in types - {bool}))
        raise BadData(
            f"{self.location}: {self.splits[name].place(row)} has label {self.labels[name][row]}, and other labels are of the "
            f"type {others}; give all labels one type"
        )

    def classes(self) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
        """The classes, and every image's class number."""
        found = {name: self._class_names(name) for name in self.splits}
        classes = self._all_classes({label for labels in found.values() for label in labels})
        index = {label: i for i, label in enumerate(classes)}
        return classes, {name: np.array([index[label] for label in labels], np.int64) for name, labels in found.items()}

    def _class_names(self, name: str) -> list[str]:
        known: dict[tuple[type, Any], str] = {}
        found = []
        for row, label in enumerate(self.labels[name]):
            if isinstance(label, list):
                raise BadData(
                    f"{self.location}: {self.splits[name].place(row)} has several labels, {shown(label)}; give --target "
                    "labels"
                )
            key = (type(label), label)
            if key not in known:
                known[key] = self._class_name(label, name, row)
            found.append(known[key])
        return found

    def _class_name(self, label: Any, name: str, row: int) -> str:
        """The name of a class, from a name or a class number."""
        names, place = self.named[name], f"{self.location}: {self.splits[name].place(row)}"
        text = class_name(str(label))
        if not text:
            raise BadData(f"{place} has an empty label; give it one, or leave it out")
        try:
            text.encode()
        except UnicodeEncodeError as err:
            raise BadData(
                f"{place} has label {shown(text)}, which is no text (half a character); write it again"
            ) from err
        if names is None or (isinstance(label, str) and text in names):
            self.spellings.setdefault(text, set()).add(str(label))
            return text
        digits = text.removesuffix(".0")
        if NUMBERED.fullmatch(digits) and not isinstance(label, bool) and int(digits) < len(names):
            return names[int(digits)]
        raise BadData(
            f"{place} has label {shown(label)}; allowed: 0 to {len(names) - 1}, as there are {len(names)} class names, or one "
            "of them"
        )

    def _all_classes(self, present: set[str]) -> tuple[str, ...]:
        """All class names: the splits' list if they agree on one, else those present, in natural order."""
        return self._agreed_names() or tuple(sorted(present, key=natural_key))

    def _agreed_names(self) -> tuple[str, ...] | None:
        lists = set(self.named.values())
        return lists.pop() if len(lists) == 1 else None

    def label_lists(self) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
        """The classes, and a row of 0 and 1 for every image."""
        if (size := self._vector_size()) is not None:
            names = self._agreed_names() or ()
            classes = names if len(names) == size else tuple(map(str, range(size)))
            return classes, {name: np.array(labels, np.uint8).reshape(-1, size) for name, labels in self.labels.items()}
        found = {
            name: [self._names_of_image(label, name, row) for row, label in enumerate(labels)]
            for name, labels in self.labels.items()
        }
        classes = self._all_classes({part for labels in found.values() for parts in labels for part in parts})
        index = {label: i for i, label in enumerate(classes)}
        tables = {}
        for name, labels in found.items():
            tables[name] = np.zeros((len(labels), len(classes)), np.uint8)
            for row, parts in enumerate(labels):
                tables[name][row, [index[part] for part in parts]] = 1
        return classes, tables

    def _vector_size(self) -> int | None:
        """The length of all labels, if they are vectors of 0 and 1 of one length."""
        labels = [label for each in self.labels.values() for label in each]
        if not all(isinstance(label, list) and label for label in labels):
            return None
        sizes = {len(label) for label in labels}
        vectors = all(type(x) is not str and x in (0, 1) for label in labels for x in label)
        return sizes.pop() if vectors and len(sizes) == 1 else None

    def _names_of_image(self, label: Any, name: str, row: int) -> list[str]:
        parts = label if isinstance(label, list) else [label]
        if isinstance(label, str) and not (self.named[name] and label in (self.named[name] or ())):
            parts = class_name(label).split(SEPARATOR)
        if any(isinstance(part, (list, float)) or part is None for part in parts):
            raise BadData(
                f"{self.location}: {self.splits[name].place(row)} has label {shown(label)}; allowed is a list of names or of "
                "class numbers, or a vector of 0 and 1 of one length for all images; split several numbers into columns, "
                "and choose one with --label-column"
            )
        return [self._class_name(part, name, row) for part in parts if not isinstance(part, str) or class_name(part)]

    def report_spellings(self) -> None:
        """Report class names that were read from several texts."""
        several = {name: texts for name, texts in self.spellings.items() if len(texts) > 1}
        if several:
            name = min(several)
            logger.warning(
                "%s: %s of the class names are written in several ways (blanks, Unicode forms, HTML entities), such as %s; "
                "each is read as one class",
                *(self.location, len(several), ", ".join(map(ascii, sorted(several[name])))),
            )

    def numbers(self, name: str) -> np.ndarray:
        """The labels of a split as [N] float64."""
        labels, split = self.labels[name], self.splits[name]
        found = np.array([number(label) for label in labels], np.float64)
        if not np.isfinite(found).all():
            row = int(np.isfinite(found).argmin())
            raise BadData(
                f"{self.location}: {split.place(row)} has label {shown(labels[row])}, which is no finite number"
            )
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            squares = float(((found - found.mean()) ** 2).sum())
        if len(set(found.tolist())) > 1 and not np.finfo(np.float64).tiny <= squares < np.inf:
            row = int(np.abs(found).argmax())
            raise BadData(
                f"{self.location}, split {name}: the labels' variance is too {'large' if squares else 'small'} for a "
                f"floating-point number, such as the label {shown(labels[row])} of {split.place(row)}; give the labels "
                "another unit"
            )
        return found
