"""Reads image files from folders of class folders, and from tables of paths. No path may lead out of its folder."""

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
TABLE_NAMES = ("metadata", "labels")
"""Names of a table in the folder of its split's images; the hub uses the first."""


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
    """Read <split>/<class>/…/<image>, or <class>/…/<image>, in the order of the paths; BadData if a link leads out."""
    files = {name: _class_files(root, name) for name in splits or ("",)}
    return {
        name or "train": RawSplit(
            ids=(paths := tuple(path for _, path in images)),
            labels=[label for label, _ in images],
            encoded=Files(str(root), paths),
            decode=decoder(options),
            target="class",
        )
        for name, images in files.items()
    }


def _class_files(root: Path, split: str) -> list[tuple[str, str]]:
    """(class, path below the root) of every image, sorted by path."""
    top = root / split
    _refuse_outside(top, root)
    images = []
    for path in _walk(top, root):
        inner = path.removeprefix(f"{split}/") if split else path
        label, rest, _ = inner.partition("/")
        if rest:
            images.append((label, path))
    if not images:
        shown = f"{split}/<class>/<image>" if split else "train/<class>/<image>"
        raise BadData(f"{top} holds no images; allowed: {shown} with {', '.join(sorted(SUFFIXES))}")
    return sorted(images, key=lambda item: item[1])


def _walk(folder: Path, root: Path) -> Iterator[str]:
    with os.scandir(folder) as items:
        for item in items:
            if item.name.startswith("."):
                continue
            if item.is_symlink():
                _refuse_outside(Path(item.path), root)
                if item.is_dir():
                    raise BadData(f"{item.path} is a link to a folder; put the folder itself there")
            if item.is_dir(follow_symlinks=False):
                yield from _walk(Path(item.path), root)
            elif _is_image_path(item.name):
                yield Path(item.path).relative_to(root).as_posix()


def _refuse_outside(path: Path, root: Path) -> None:
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise BadData(f"{path} is a link that leads out of {root}; copy what it leads to into the folder instead")


# --- tables of paths -------------------------------------------------------------------------------------------------


def tables_in(root: Path) -> dict[str, Path]:
    """Split → its table in a folder: <split>.csv, or <split>/metadata.csv, which is the hub's form."""
    paths: dict[str, Path] = {}
    for split in SPLITS:
        for suffix in TABLES:
            for path in (root / f"{split}{suffix}", *(root / split / f"{name}{suffix}" for name in TABLE_NAMES)):
                if path.is_file():
                    paths.setdefault(split, path)
    return paths


def tables(paths: dict[str, Path], options: ReadOptions) -> dict[str, RawSplit]:
    """Read one table per split, or one table for all, whose column `split`, if it has one, names each row's split."""
    splits = {}
    for split, path in paths.items():
        columns, rows = read_table(path)
        location = str(path)
        parts: dict[str, list[int]] = {}
        has_split_column = len(paths) == 1 and "split" in columns
        for row, cells in enumerate(rows):
            parts.setdefault(str(cells.get("split")) if has_split_column else split, []).append(row)
        root = Path(options.image_root or path.parent).expanduser().resolve()
        likely = [name for name in columns if _is_image_path(rows[0].get(name))]
        image = choose_column("image", columns, options.image_column, likely, IMAGES, location)
        others = [name for name in columns if name not in (image, options.id_column, "split")]
        usual = [name for name in LABELS if name in others]
        label = choose_column("label", columns, options.label_column, usual or others, LABELS, location)
        if options.id_column is not None:
            choose_column("id", columns, options.id_column, (), (), location)
        files = _resolve_paths(root, [cells.get(image) for cells in rows], location)
        for name, chosen in parts.items():
            ids = tuple(str(rows[row][options.id_column]) if options.id_column else files[row] for row in chosen)
            splits[name] = RawSplit(
                ids=require_unique(ids, location),
                labels=[rows[row].get(label) for row in chosen],
                encoded=Files(str(root), tuple(files[row] for row in chosen)),
                decode=decoder(options),
                rows=[row + 1 for row in chosen],
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
            except ValueError as err:  # also for a number of more digits than Python reads
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


def _is_image_path(value: Any) -> bool:
    return isinstance(value, str) and os.path.splitext(value)[1].lower() in SUFFIXES


def _resolve_paths(root: Path, cells: Sequence[Any], location: str) -> list[str]:
    """The paths relative to the root, checked: each names a file that exists below the root."""
    is_inside: dict[str, bool] = {}
    paths, missing = [], []
    for row, path in enumerate(cells):
        if not isinstance(path, str) or not path:
            raise BadData(f"{location}, row {row + 1} names no image; allowed: a path below {root}")
        full_path = os.path.normpath(os.path.join(root, path))
        folder = os.path.dirname(full_path)
        if folder not in is_inside:
            is_inside[folder] = Path(os.path.realpath(folder)).is_relative_to(root)
        is_link = os.path.islink(full_path)
        if not is_inside[folder] or (is_link and not Path(os.path.realpath(full_path)).is_relative_to(root)):
            raise BadData(
                f"{location}, row {row + 1}: {path} leads out of {root}; put the image into that folder, or say with "
                "--image-root where paths begin"
            )
        if not os.path.isfile(full_path):
            missing.append((row, path))
        paths.append(os.path.relpath(full_path, root))
    if missing:
        row, path = missing[0]
        raise BadData(
            f"{location} names {len(missing):,} files that are not there, the first in row {row + 1}: {path}; paths begin at "
            f"{root}, or where --image-root says"
        )
    return paths
