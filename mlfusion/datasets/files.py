"""Reads images that are files: folders of class folders, and tables of paths. No path may lead out of its folder."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfusion.datasets.columns import IMAGES, LABELS, SPLITS, choose_column, require_unique
from mlfusion.datasets.images import SUFFIXES
from mlfusion.datasets.split import RawSplit, decoder
from mlfusion.errors import BadData
from mlfusion.specs.options import ReadOptions

TABLES = (".csv", ".tsv", ".jsonl")
BESIDE = ("metadata", "labels")
"""Names of a table in the folder of its split's images; the first is the hub's."""


@dataclass(frozen=True, eq=False)
class Files:
    """Image files below a folder, by row."""

    root: str
    paths: tuple[str, ...]

    def __call__(self, row: int) -> bytes:
        with open(os.path.join(self.root, self.paths[row]), "rb") as file:
            return file.read()


# --- folders of class folders ----------------------------------------------------------------------------------------


def class_folders(root: Path, splits: Sequence[str], options: ReadOptions) -> dict[str, RawSplit]:
    """<split>/<class>/…/<image>, or with no splits <class>/…/<image>, in the order of the paths; no link may lead out."""
    files = {name: _class_files(root, name) for name in splits or ("",)}
    classes = tuple(sorted({label for found in files.values() for label, _ in found}))
    return {
        name or "train": RawSplit(
            ids=(paths := tuple(path for _, path in found)),
            labels=[label for label, _ in found],
            encoded=Files(str(root), paths),
            decode=decoder(options),
            names=classes,
        )
        for name, found in files.items()
    }


def _class_files(root: Path, split: str) -> list[tuple[str, str]]:
    """(class, path below the root) of every image, sorted by path."""
    top = root / split
    _refuse_outside(top, root)
    found = []
    for path in _walk(top, root):
        inner = path.removeprefix(f"{split}/") if split else path
        label, part, _ = inner.partition("/")
        if part:
            found.append((label, path))
    if not found:
        shown = f"{split}/<class>/<image>" if split else "train/<class>/<image>"
        raise BadData(f"{top} holds no images; allowed: {shown} with {', '.join(sorted(SUFFIXES))}")
    return sorted(found, key=lambda item: item[1])


def _walk(folder: Path, root: Path) -> Iterator[str]:
    with os.scandir(folder) as found:
        for one in found:
            if one.name.startswith("."):
                continue
            if one.is_symlink():
                _refuse_outside(Path(one.path), root)
                if one.is_dir():
                    raise BadData(f"{one.path} is a link to a folder; put the folder itself there")
            if one.is_dir(follow_symlinks=False):
                yield from _walk(Path(one.path), root)
            elif os.path.splitext(one.name)[1].lower() in SUFFIXES:
                yield Path(one.path).relative_to(root).as_posix()


def _refuse_outside(path: Path, root: Path) -> None:
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise BadData(f"{path} is a link that leads out of {root}; copy what it leads to into the folder instead")


# --- tables of paths -------------------------------------------------------------------------------------------------


def tables_in(root: Path) -> dict[str, Path]:
    """A folder's tables by split: <split>.csv, or <split>/metadata.csv as the hub has them."""
    found: dict[str, Path] = {}
    for split in SPLITS:
        for suffix in TABLES:
            for path in (root / f"{split}{suffix}", *(root / split / f"{name}{suffix}" for name in BESIDE)):
                if path.is_file():
                    found.setdefault(split, path)
    return found


def tables(found: dict[str, Path], options: ReadOptions) -> dict[str, RawSplit]:
    """Read one table per split, or one table for all, whose column `split`, if it has one, names each row's split."""
    splits = {}
    for split, path in found.items():
        columns, rows = read_table(path)
        where = str(path)
        parts: dict[str, list[int]] = {}
        named = len(found) == 1 and "split" in columns
        for row, cells in enumerate(rows):
            parts.setdefault(str(cells.get("split")) if named else split, []).append(row)
        root = Path(options.image_root or path.parent).expanduser().resolve()
        likely = [name for name in columns if _names_an_image(rows[0].get(name))]
        image = choose_column("image", columns, options.image_column, likely, IMAGES, where)
        others = [name for name in columns if name not in (image, options.id_column, "split")]
        usual = [name for name in LABELS if name in others]
        label = choose_column("label", columns, options.label_column, usual or others, LABELS, where)
        if options.id_column is not None:
            choose_column("id", columns, options.id_column, (), (), where)
        paths = _paths(root, [cells.get(image) for cells in rows], where)
        for name, chosen in parts.items():
            ids = tuple(str(rows[row][options.id_column]) if options.id_column else paths[row] for row in chosen)
            splits[name] = RawSplit(
                ids=require_unique(ids, where),
                labels=[rows[row].get(label) for row in chosen],
                encoded=Files(str(root), tuple(paths[row] for row in chosen)),
                decode=decoder(options),
            )
    return splits


def read_table(path: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Read a CSV (comma, semicolon or tab) or JSON Lines file → its columns with their types in words, and its rows.

    Raises BadData, which names the line, if the file is empty or not of that form.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".jsonl":
                rows = list(_json_lines(path, file))
            else:
                first = file.readline()
                file.seek(0)
                delimiter = max("\t,;", key=first.count)
                rows = []
                reader = csv.DictReader(file, delimiter=delimiter, strict=True)
                for cells in reader:
                    if None in cells or None in cells.values():
                        raise BadData(
                            f"{path}, line {reader.line_num}: {len(reader.fieldnames or ())} columns are named and this "
                            "line has another number of cells; quote cells that hold the separator"
                        )
                    rows.append(cells)
    except (UnicodeDecodeError, csv.Error) as err:
        raise BadData(f"{path} cannot be read as a table: {err}; allowed: UTF-8, with a line of column names") from err
    if not rows:
        raise BadData(f"{path} holds no rows; allowed: a line of column names, and a line for each image")
    columns: dict[str, str] = {}
    for cells in rows[:1000]:
        for name, value in cells.items():
            kind = _cell_type(value)
            columns[name] = kind if columns.get(name, kind) == kind else _common_type(columns[name], kind)
    return columns, rows


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                cells = json.loads(line)
            except json.JSONDecodeError as err:
                raise BadData(f"{path}, line {number}: not JSON ({err})") from err
            if not isinstance(cells, dict):
                raise BadData(f"{path}, line {number}: allowed is an object a line, such as {{'path': …, 'label': …}}")
            yield cells


def _cell_type(value: Any) -> str:
    """The type of a cell, in words; text that reads as a number counts as a number."""
    if isinstance(value, str):
        for kind, read in (("whole number", int), ("number", float)):
            with suppress(ValueError):
                read(value)
                return kind
        return "text"
    names = {bool: "true or false", int: "whole number", float: "number", list: "list", dict: "object"}
    return names.get(type(value), "nothing")


def _common_type(one: str, other: str) -> str:
    if "nothing" in (one, other):
        return other if one == "nothing" else one
    return "number" if {one, other} == {"number", "whole number"} else "text" if "text" in (one, other) else "mixed"


def _names_an_image(value: Any) -> bool:
    return isinstance(value, str) and os.path.splitext(value)[1].lower() in SUFFIXES


def _paths(root: Path, written: Sequence[Any], where: str) -> list[str]:
    """The paths relative to the root, checked: each names a file that exists below the root."""
    real: dict[str, bool] = {}
    paths, absent = [], []
    for row, path in enumerate(written):
        if not isinstance(path, str) or not path:
            raise BadData(f"{where}, row {row + 1} names no image; allowed: a path below {root}")
        whole = os.path.normpath(os.path.join(root, path))
        folder = os.path.dirname(whole)
        if folder not in real:
            real[folder] = Path(os.path.realpath(folder)).is_relative_to(root)
        if not real[folder] or (os.path.islink(whole) and not Path(os.path.realpath(whole)).is_relative_to(root)):
            raise BadData(
                f"{where}, row {row + 1}: {path} leads out of {root}; put the image into that folder, or say with "
                "--image-root where paths begin"
            )
        if not os.path.isfile(whole):
            absent.append((row, path))
        paths.append(os.path.relpath(whole, root))
    if absent:
        row, path = absent[0]
        raise BadData(
            f"{where} names {len(absent):,} files that are not there, the first in row {row + 1}: {path}; paths begin at "
            f"{root}, or where --image-root says"
        )
    return paths
