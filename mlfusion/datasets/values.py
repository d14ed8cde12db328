"""Reads one label as Python's text, whole number, boolean, number or list, and writes it in messages."""

import html
import math
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from mlfusion.datasets.split import RawSplit
from mlfusion.errors import BadData

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
"""Text that is a number: ASCII digits without separators."""

NUMBERED = re.compile(r"0|[1-9][0-9]{0,17}")
"""A class number as Python prints it: `03` is another text than `3`."""

MISSING = ("", "-", "?", "na", "n/a", "nan", "null", "none")
"""Texts in place of a number that other programs write if there is none."""

PLAIN = (str, int, float, bool, type(None))
SHOWN = 60  # characters of a label in a message


def values(split: RawSplit, location: str) -> list[Any]:
    """The labels of a split as Python's values; raises BadData if one is neither text, a number, nor a list of these."""
    labels: Any = split.labels
    if isinstance(labels, np.ndarray):
        if labels.dtype.kind in "cmMV":
            raise BadData(
                f"{location}: the labels are of the type {labels.dtype}; allowed: text, whole numbers or numbers"
            )
        labels = labels.astype(np.float64).tolist() if labels.dtype.kind == "f" else labels.tolist()
    found = list(map(plain, labels))
    for row, label in enumerate(found):
        if type(label) not in PLAIN and not _is_list(label):
            raise BadData(
                f"{location}: {split.place(row)} has label {shown(label)} of the type {type(label).__name__}; allowed: text, a "
                "whole number, a boolean, a number, or a list of these"
            )
    return found


def plain(label: Any) -> Any:
    """A label without the types of NumPy and Arrow: bytes in UTF-8 are text, decimals are numbers, tuples are lists."""
    if type(label) in PLAIN:
        return label
    if isinstance(label, (np.floating, Decimal)):
        return float(label)
    if hasattr(label, "tolist") and not isinstance(label, np.void):
        label = label.tolist()
    if isinstance(label, bytes):
        try:
            return label.decode()
        except UnicodeDecodeError:
            return label
    return [plain(part) for part in label] if isinstance(label, (list, tuple)) else label


def _is_list(label: Any) -> bool:
    return isinstance(label, list) and all(type(part) in PLAIN or _is_list(part) for part in label)


def is_missing(label: Any, names: Sequence[str] | None) -> bool:
    """Whether a label says that there is none: null, NaN, or the number -1 where numbers stand for names."""
    if isinstance(label, float):
        return math.isnan(label)
    return label is None or (names is not None and label == -1 and not isinstance(label, bool))


def number(label: Any) -> float:
    """The number that a label is or can be read as; NaN if there is none, or none that is finite."""
    if isinstance(label, str) and not NUMBER.fullmatch(label.strip()):
        return math.nan
    try:
        return float(label)
    except (TypeError, OverflowError):
        return math.nan


def class_name(text: str) -> str:
    """One spelling of a class name: no blanks around it, composed characters (Unicode's NFC), no HTML entities."""
    plain = re.sub(r"&#?\w+;", lambda found: html.unescape(found[0]), text) if "&" in text else text
    return plain.strip() if plain.isascii() else unicodedata.normalize("NFC", plain).strip()


def shown(label: Any) -> str:
    """A label as messages show it: quoted, cut to `SHOWN` characters, in characters that can be printed."""
    text = repr(label)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
