"""Groups of images that belong together, such as the slices of a patient: read from a column or from the ids, and checked.

Images of one group are nearly alike. A group with images in train and in test makes scores too high, so what looks like a
group is reported.
"""

import logging
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mlfusion.datasets.columns import GROUPS
from mlfusion.datasets.split import DataSet, RawSplit, Split
from mlfusion.datasets.values import MISSING, plain, shown
from mlfusion.errors import BadData
from mlfusion.specs.definitions import option_words
from mlfusion.specs.options import ReadOptions
from mlfusion.system.words import plural

logger = logging.getLogger(__name__)

MIN_VALUES = 10  # of a column that may hold groups: one of fewer values is rather a property, such as the sex
NOT_GIVEN = "every image needs a group: write one into every row, or leave those rows out"


def read_groups(raw: Mapping[str, RawSplit], options: ReadOptions, name: str) -> dict[str, tuple[str, ...] | None]:
    """Split → the group of each image, by the options; None without such an option.

    Raises:
        BadData: an image has no group; both options are given; or all images are of one group.
    """
    column, pattern = options.group_column, options.group_pattern
    if column is None and pattern is None:
        return dict.fromkeys(raw)
    if column is not None and pattern is not None:
        raise BadData(
            f"{name}: --group-column {column} and --group-pattern {pattern} both name the groups; give one of them"
        )
    found = {
        split: _of_ids(one, pattern, f"{name}, split {split}")
        if pattern is not None
        else _of_cells(one, str(column), f"{name}, split {split}")
        for split, one in raw.items()
    }
    sizes = Counter(group for groups in found.values() for group in groups)
    option = f"--group-pattern {pattern}" if column is None else f"--group-column {column}"
    if len(sizes) == 1:
        raise BadData(
            f"{name}: all {sizes.total():,} images are of one group ({shown(next(iter(sizes)))}); allowed: two groups or "
            f"more. Let {option} be what tells groups apart, or leave it out"
        )
    if len(sizes) == sizes.total():
        logger.warning("%s: every image is a group of its own by %s, which changes nothing", name, option)
    return dict(found)


def _of_ids(raw: RawSplit, pattern: str, location: str) -> tuple[str, ...]:
    """What the pattern's first group matches in each id."""
    compiled, groups = re.compile(pattern), []
    for name in raw.ids:
        match = compiled.search(name)
        if not match or not match[1]:
            raise BadData(
                f"{location}: --group-pattern {pattern} finds no group in {name!r}; {NOT_GIVEN}. The pattern is a regular "
                "expression, searched in the id of every image, whose first group in brackets is the name of the group"
            )
        groups.append(match[1])
    return tuple(groups)


def _of_cells(raw: RawSplit, column: str, location: str) -> tuple[str, ...]:
    assert raw.groups is not None
    groups = []
    for row, cell in enumerate(raw.groups):
        if (text := group_text(cell)) is None:
            raise BadData(
                f"{location}: image {raw.place(row)} has no group in {column} ({shown(cell)}); allowed: text, or a whole "
                f"number; {NOT_GIVEN}"
            )
        groups.append(text)
    return tuple(groups)


def group_text(cell: Any) -> str | None:
    """The name of a group from its cell: text, or a whole number; None for anything else, such as an empty cell or `NA`."""
    cell = plain(cell)
    if isinstance(cell, str):
        return None if cell.strip().casefold() in MISSING else cell.strip()
    if isinstance(cell, float) and math.isfinite(cell) and cell.is_integer():  # a column of numbers that once had gaps
        return str(int(cell))
    return str(cell) if isinstance(cell, int) and not isinstance(cell, bool) else None


def report_shared(data: DataSet) -> None:
    """Warn of groups that have images in train and in another split, which the data set itself brings."""
    train = data.splits.get("train")
    for name, split in data.splits.items():
        if train is None or split is train or train.groups is None or split.groups is None:
            continue
        if both := set(train.groups) & set(split.groups):
            images = sum(group in both for group in split.groups)
            logger.warning(
                "%s: %s (%s) with images in train and in %s, %s of its %s images: scores on them do not hold for new groups; "
                "--split-ratio parts whole groups",
                *(data.name, plural(len(both), "group"), shown(min(both)), name, f"{images:,}", f"{len(split):,}"),
            )


def report_candidates(name: str, raw: Mapping[str, RawSplit], splits: Mapping[str, Split]) -> None:
    """Warn of columns whose values may be groups, since images of one value are in train and in test.

    Args:
        name: the data set's, for the message.
        raw: splits with the cells of the columns that are not used.
        splits: the splits as they are used, which may be parts of `raw`.
    """
    columns = dict.fromkeys(column for one in raw.values() for column in one.others)
    where = {image: (one, row) for one in raw.values() for row, image in enumerate(one.ids)} if columns else {}
    found = []
    for column in columns:
        cells = {
            split: [
                group_text(one.others[column][row])
                for one, row in map(where.__getitem__, part.ids)
                if column in one.others
            ]
            for split, part in splits.items()
        }
        if split := _shared_with(cells, len(next(iter(splits.values())).classes)):
            found.append((column, split, len(set(cells["train"]) & set(cells[split]))))
    usual = [one for one in found if any(word in one[0].casefold() for word in GROUPS)]
    for column, split, count in (usual or found)[:1]:
        others = [other for other, *_ in usual or found if other != column]
        logger.warning(
            "%s: %s of the column %s have images in train and in %s%s. If images of one value belong together, such as those "
            "of a patient, scores are too high: %s keeps them together",
            *(name, plural(count, "value"), column, split),
            f" (likewise {', '.join(others[:3])})" if others else "",
            shlex.join(option_words("group-column", column)),
        )


def _shared_with(cells: Mapping[str, Sequence[str | None]], classes: int) -> str | None:
    """The split that shares values with train in a column that may hold groups: test, or the first; None for no such column.

    Such a column has a value in every row, more values than classes and `MIN_VALUES`, and two rows of a value on average.
    """
    values = [value for part in cells.values() for value in part]
    distinct = set(values)
    if None in distinct or not max(MIN_VALUES, classes + 1) <= len(distinct) <= len(values) / 2 or "train" not in cells:
        return None
    train = set(cells["train"])
    shared = [split for split, part in cells.items() if split != "train" and train & set(part)]
    return "test" if "test" in shared else next(iter(shared), None)
