"""Says where each form of data set names an image's split and label, and reads a split from the name of a file or folder."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from mlfusion.errors import BadData
from mlfusion.specs.splits import SPLIT_WORDS, SPLITS, split_word

logger = logging.getLogger(__name__)

SHARD = r"(.+)-\d{5}-of-\d{5}"
"""Stem of a file that is one of several of a split, as the hub names them."""

SPLIT_COLUMNS = ("split", "subset", "partition", "set", "fold")
"""Columns that hold splits; the names other than the first only if every value is one of `SPLIT_WORDS`."""

NO_COLUMN = "none"
"""Value of --split-column that leaves every column out of account."""

Place = Literal["column", "shard", "folder", "file", "image", "array", "only"]
PLACES: dict[Place, str] = {
    "column": f"column `{SPLIT_COLUMNS[0]}`; `{'`, `'.join(SPLIT_COLUMNS[1:])}` if all its values are split words",
    "shard": "name of the file before `-00000-of-00001`",
    "folder": "name of the folder, the nearest first",
    "file": "one word of the file's name",
    "image": "first folder of the image's path, if every row has one",
    "array": "one word of the array's name",
    "only": "none: all images are `train`",
}

FILE_PLACES: tuple[Place, ...] = ("shard", "folder", "file")
SPLIT_PLACES: dict[str, tuple[Place, ...]] = {
    "class folders": ("folder", "only"),
    "CSV, TSV or JSON Lines": ("column", "file", "folder", "image", "only"),
    "tars": (*FILE_PLACES, "only"),
    "Parquet": ("column", *FILE_PLACES, "only"),
    "arrays": ("array", "only"),
}
"""Form → the places of the split; the first that names one decides."""


def words_of(name: str) -> list[str]:
    """The words of a name: its parts between blanks, dots, hyphens, underscores and digits, in lower case."""
    return [word for word in re.split(r"[-._ \d]+", name.casefold()) if word]


def split_in(name: str) -> str | None:
    """The split that a name without its suffix holds as a word: `train-000` and `cars_train`, but not `trains-000`."""
    found = {SPLIT_WORDS[word] for word in words_of(name) if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def split_of_path(path: str, places: Iterable[Place] = FILE_PLACES) -> str | None:
    """The split that the relative path of a file names, by the first place that names one."""
    *folders, name = path.split("/")
    stem = name.rpartition(".")[0]
    shard = re.fullmatch(SHARD, stem)
    named: dict[Place, str | None] = {
        "shard": split_word(shard[1]) if shard else None,
        "folder": next((split for folder in reversed(folders) if (split := split_word(folder))), None),
        "file": split_in(stem),
    }
    return next((split for place in places if (split := named.get(place))), None)


def by_split(paths: Iterable[str], location: str) -> dict[str, list[str]]:
    """Split → its files, sorted by path; all files are train if none names a split.

    Files that name no split are left out if others name two or more, which is reported.

    Raises:
        BadData: files name one split only, and other files none.
    """
    found: dict[str | None, list[str]] = {}
    for path in sorted(paths):
        found.setdefault(split_of_path(path), []).append(path)
    rest = found.pop(None, [])
    if not found:
        return {"train": rest} if rest else {}
    for path in rest if len(found) > 1 else ():  # the hub has splits of other names, such as unsupervised
        if other := re.fullmatch(SHARD, path.rpartition("/")[2].rpartition(".")[0]):
            found.setdefault(other[1], []).append(path)
    rest = [path for path in rest if all(path not in files for files in found.values())]
    splits = {split: found[split] for split in sorted(filter(None, found), key=_rank)}
    if rest:
        refuse_or_report(splits, rest, "files", location)
    return splits


def refuse_or_report(splits: Mapping[str, Sequence[str]], rest: Sequence[str], noun: str, location: str) -> None:
    """Report files or folders beside those of two or more splits; raises BadData if there is only one split."""
    shown = ", ".join(rest[:3]) + (f" and {len(rest) - 3:,} more" if len(rest) > 3 else "")
    if len(splits) > 1:
        logger.warning(
            "%s: %s %s left out, since %s named after no split: %s; name them after %s to read them",
            *(location, f"{len(rest):,} {noun if len(rest) > 1 else noun.removesuffix('s')}"),
            *(("are", "they are") if len(rest) > 1 else ("is", "it is")),
            *(shown, ", ".join(SPLITS)),
        )
        return
    [(split, [first, *_])] = splits.items()
    raise BadData(
        f"{location}: {first} is named after the split {split}, and {shown} after none, so it is not plain which is which; "
        f"name all after {', '.join(SPLITS)}, or none, or take what does not belong to the data set out of the folder"
    )


def split_column(columns: Sequence[str], requested: str | None, distinct: Any, location: str) -> str | None:
    """The column that holds the splits: the user's, else one of a usual name.

    `distinct` gives the distinct values of a column; it is called for columns of a usual name only.

    Raises:
        BadData: there is no such column.
    """
    if requested is not None and (requested in columns or requested != NO_COLUMN):
        if requested not in columns:
            raise BadData(
                f"{location} has no column {requested!r}; --split-column may be: {', '.join(columns)}, {NO_COLUMN}"
            )
        return requested
    if requested == NO_COLUMN:
        return None
    usual = {name.strip().casefold(): name for name in reversed(columns)}
    for name in SPLIT_COLUMNS:
        if name not in usual:
            continue
        if name == SPLIT_COLUMNS[0] or all(
            isinstance(value, str) and split_word(value) for value in distinct(usual[name])
        ):
            if usual[name] != SPLIT_COLUMNS[0]:
                logger.warning(
                    "%s: the column %s names each row's split; --split-column %s leaves it out of account",
                    *(location, usual[name], NO_COLUMN),
                )
            return usual[name]
    return None


def parts(cells: Sequence[Any] | None, count: int, named: str | None, location: str) -> dict[str, list[int]]:
    """Split → its rows: from the cells of a split column, else all `count` rows, as a file `named` them.

    Raises:
        BadData: a cell is empty, or neither text nor a whole number.
    """
    if cells is None:
        return {named or "train": list(range(count))}
    found: dict[str, list[int]] = {}
    for row, cell in enumerate(cells):
        text = str(cell).strip() if isinstance(cell, (str, int)) and not isinstance(cell, bool) else ""
        if not text:
            raise BadData(
                f"{location}, row {row + 1:,} names no split ({cell!r}); write {', '.join(SPLITS)} or another name into "
                f"every row, or give --split-column {NO_COLUMN}"
            )
        found.setdefault(split_word(text) or text, []).append(row)
    if named and (others := sorted(set(found) - {named})):
        logger.warning(
            "%s: its name says %s, and its split column also %s; the column decides, unless --split-column is %s",
            *(location, named, ", ".join(others), NO_COLUMN),
        )
    return {split: found[split] for split in sorted(found, key=_rank)}


def add_part(splits: dict[str, Any], name: str, part: Any, location: str) -> None:
    """Add a raw split of a file; raises BadData if an earlier file has rows of that split too, of which one would be lost."""
    if name in splits:
        raise BadData(f"{location} has rows of the split {name}, as an earlier file has; put them into one file")
    splits[name] = part


def _rank(split: str) -> tuple[int, str]:
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS), split)
