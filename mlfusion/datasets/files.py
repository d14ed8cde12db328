"""Reads image files from folders of class folders, and from tables of paths. No path may lead out of its folder."""

import codecs
import csv
import io
import json
import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mlfusion.datasets.columns import IMAGES, LABELS, choose_column, require_different, require_unique
from mlfusion.datasets.folder import TABLE_BYTES, image_bytes, open_regular, read_regular, require_inside, walk
from mlfusion.datasets.images import HEIF_SUFFIXES, SUFFIXES
from mlfusion.datasets.places import NO_COLUMN, add_part, parts, refuse_or_report, split_column, split_in
from mlfusion.datasets.split import WHOLE, RawSplit, decoder
from mlfusion.datasets.values import NUMBER
from mlfusion.errors import BadData, boundary, first_line
from mlfusion.specs.identity import MAX_PIXELS
from mlfusion.specs.options import ReadOptions
from mlfusion.specs.splits import SPLITS, split_word
from mlfusion.system.references import is_inside
from mlfusion.system.words import plural

logger = logging.getLogger(__name__)

TABLES = (".csv", ".tsv", ".jsonl")
TABLE_NAMES = (*(f"{name}{suffix}" for suffix in TABLES for name in ("metadata", "labels")), "metadata.parquet")
"""Names of a table in the folder of its images; the hub uses the first."""


@dataclass(frozen=True, eq=False)
class Files:
    """Image files below a folder, by row."""

    root: str
    paths: tuple[str, ...]
    most: int = image_bytes(MAX_PIXELS)  # bytes of a file

    def __call__(self, row: int) -> bytes:
        return read_regular(os.path.join(self.root, self.paths[row]), self.most)


# --- folders of class folders ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folders:
    """Which folders of a data set are splits, and which are classes."""

    splits: Mapping[str, str]  # split → its folder, which holds class folders with images
    classes: tuple[str, ...]  # other folders that hold images


def folders_in(root: Path) -> Folders:
    """Tell the splits' folders from those of classes; a folder that holds no class folders is no split's.

    Raises:
        BadData: two folders are named after one split.
    """
    splits: dict[str, str] = {}
    classes = []
    for name in sorted(child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith(".")):
        split = split_word(name)
        if split and next(_images(root / name, nested=True), None):
            if split in splits:
                raise BadData(f"{root}: {splits[split]} and {name} are both named after the split {split}; rename one")
            splits[split] = name
        elif next(_images(root / name), None):
            classes.append(name)
    return Folders({split: splits[split] for split in SPLITS if split in splits}, tuple(classes))


def has_classes(root: Path, folders: Folders) -> bool:
    """Whether the folders of the splits hold two class folders or more between them."""
    inner = (child for folder in folders.splits.values() for child in (root / folder).iterdir())
    return len({child.name for child in inner if child.is_dir() and next(_images(child), None)}) > 1


def _images(folder: Path, *, nested: bool = False) -> Iterator[str]:
    """Image files below a folder, or `nested` ones, which are in folders of it; links to folders are not followed."""
    return (path for path, _ in walk(folder) if ("/" in path or not nested) and _is_image_path(path))


def class_folders(root: Path, folders: Folders, options: ReadOptions) -> dict[str, RawSplit]:
    """Read <split>/<class>/…/<image>, or <class>/…/<image>, in the order of the paths.

    Raises:
        BadData: a link leads out of the root; there are no images; or it is not plain whether a folder is a split or a class.
    """
    splits = folders.splits or {"train": ""}
    left_out: Counter[str] = Counter()
    files = {split: _class_files(root, folder, left_out) for split, folder in splits.items()}
    if folders.splits and (rest := [name for name in folders.classes if not split_word(name)]):
        same = len({frozenset(label for label, _ in images) for images in files.values()}) == 1
        named = {split: [folder] for split, folder in list(splits.items())[: None if same else 1]}
        refuse_or_report(named, rest, "folders", str(root))
    _report_loose(root, folders)
    _report_left_out(root, left_out)
    return {
        split: RawSplit(
            ids=(paths := tuple(path for _, path in images)),
            labels=[label for label, _ in images],
            encoded=Files(str(root), paths, image_bytes(options.max_pixels)),
            decode=decoder(options),
            target="class",
        )
        for split, images in files.items()
    }


def _report_loose(root: Path, folders: Folders) -> None:
    """Report images that lie in no class folder."""
    places = ["", *folders.splits.values(), *(name for name in folders.classes if folders.splits and split_word(name))]
    loose = [f"{place}/{name}".lstrip("/") for place in places for name in sorted(os.listdir(root / place))]
    if loose := [path for path in loose if _is_image_path(path) and not path.rpartition("/")[2].startswith(".")]:
        logger.warning(
            "%s: %s in no class folder and left out, the first %s; move images into class folders to read them",
            *(root, f"{len(loose):,} images are" if len(loose) > 1 else "1 image is", loose[0]),
        )


def _class_files(root: Path, split: str, left_out: Counter[str]) -> list[tuple[str, str]]:
    """(class, path below the root) of every image, sorted by path; `left_out` counts the other files by their suffix."""
    top = root / split
    require_inside(top, root)
    images = []
    for path, entry in walk(root, split, strict=True):
        _require_file(path, entry, root)
        inner = path.removeprefix(f"{split}/") if split else path
        label, rest, _ = inner.partition("/")
        if rest and _is_image_path(path):
            images.append((label, path))
        elif rest:
            left_out[os.path.splitext(path)[1].lower() or "without a suffix"] += 1
    if not images:
        shown = f"{split}/<class>/<image>" if split else "train/<class>/<image>"
        raise BadData(f"{top} holds no images; allowed: {shown} with {', '.join(sorted(SUFFIXES))}")
    return sorted(images, key=lambda item: item[1])


def has_loose_images(root: Path) -> bool:
    """Whether images lie in a folder itself, and not only in folders of it."""
    return any(_is_image_path(name) and not name.startswith(".") for name in os.listdir(root))


def unlabelled(root: Path, options: ReadOptions) -> dict[str, RawSplit]:
    """Read all images below a folder without labels, as one split in the order of the paths; errors as `images_below`."""
    paths = tuple(images_below(root))
    encoded = Files(str(root), paths, image_bytes(options.max_pixels))
    return {
        WHOLE: RawSplit(
            ids=paths,
            labels=(),
            encoded=encoded,
            decode=decoder(options),
        )
    }


def images_below(root: Path) -> list[str]:
    """The paths below a folder of all image files in it and in its folders, sorted; the other files are counted in a warning.

    Raises:
        BadData: there are none, or a link leads out of the folder.
    """
    left_out: Counter[str] = Counter()
    images = []
    for path, entry in walk(root, strict=True):
        _require_file(path, entry, root)
        if _is_image_path(path):
            images.append(path)
        else:
            left_out[os.path.splitext(path)[1].lower() or "without a suffix"] += 1
    _report_left_out(root, left_out)
    if not images:
        raise BadData(f"{root} holds no images; allowed: {', '.join(sorted(SUFFIXES))}")
    return sorted(images)


def expand_folders(images: Iterable[Any]) -> list[Any]:
    """Images, with each path of a folder replaced by the paths of the images below it, sorted; errors as `images_below`."""
    found: list[Any] = []
    for image in images:
        is_folder = isinstance(image, (str, os.PathLike)) and os.path.isdir(os.path.expanduser(image))
        found += (
            [os.path.join(image, path) for path in images_below(Path(image).expanduser())] if is_folder else [image]
        )
    return found


def _report_left_out(root: Path, left_out: "Counter[str]") -> None:
    """Report the files of a folder that are not read as images; `left_out` counts them by their suffix."""
    if left_out:
        shown = ", ".join(f"{count:,} {kind}" for kind, count in sorted(left_out.items()))
        advice = ": HEIC needs pip install 'mlfusion[heic]'" if HEIF_SUFFIXES & left_out.keys() else ""
        logger.warning("%s: %s files are not read as images (%s)%s", root, f"{left_out.total():,}", shown, advice)


def _require_file(path: str, entry: "os.DirEntry[str]", root: Path) -> None:
    """Check that what lies at a path below the root is a regular file, or a link to one inside."""
    if not entry.is_file(follow_symlinks=False):
        require_inside(root / path, root)
        if entry.is_dir():
            raise BadData(f"{root / path} is a link to a folder; put the folder itself there")


# --- tables of paths -------------------------------------------------------------------------------------------------


def tables_in(root: Path) -> dict[str, Path]:
    """Split → its table in a folder: <split>.csv, or <split>/metadata.csv, which is the hub's form.

    Without such tables, a table metadata.csv of the folder itself is that of the split "": its rows name their splits.
    """
    paths: dict[str, Path] = {}
    children = sorted(root.iterdir(), key=lambda path: (path.is_dir(), path.suffix, path.name))
    for child in children:
        if not (split := split_word(child.stem if child.suffix in TABLES else child.name)):
            continue
        for path in [child] if child.suffix in TABLES else [child / name for name in TABLE_NAMES]:
            if _is_table(path, root) and paths.setdefault(split, path) != path:
                logger.warning("%s is left out, since %s is the table of %s", path, paths[split], split)
    whole = [root / name for name in TABLE_NAMES if _is_table(root / name, root) and _names_images(root / name)]
    read = [paths[split] for split in SPLITS if split in paths] or whole[:1]
    for path in whole:
        if path not in read:
            logger.warning("%s is left out, since %s is read", path, read[0])
    return {split: paths[split] for split in SPLITS if split in paths} or dict(zip(("",), read, strict=False))


def other_tables(root: Path) -> list[str]:
    """Names of the tables that lie in a folder."""
    return sorted(path.name for path in root.iterdir() if path.suffix in TABLES and path.is_file())


def _is_table(path: Path, root: Path) -> bool:
    """Whether a file is a table of paths; a Parquet file may hold the images themselves. BadData if it lies elsewhere."""
    if path.is_dir() or not os.path.lexists(path):
        return False
    require_inside(path, root)
    return path.suffix in TABLES or _names_images(path)


def _names_images(path: Path) -> bool:
    """Whether a table's first row names an image file."""
    return any(_is_image_path(cell) for row in read_table(path)[1][:1] for cell in row.values())


def tables(paths: Mapping[str, Path], options: ReadOptions) -> dict[str, RawSplit]:
    """Read the table of each split; a row's split is that of its column, else of the table, else of the image's folder."""
    splits: dict[str, RawSplit] = {}
    for split, path in paths.items():
        columns, rows = read_table(path)
        location = str(path)
        root = Path(options.image_root or path.parent).expanduser().resolve()
        by_column = split_column(
            list(columns), options.split_column, lambda name, rows=rows: {cells.get(name) for cells in rows}, location
        )
        likely = [name for name in columns if _is_image_path(rows[0].get(name))]
        image = choose_column("image", columns, options.image_column, likely, IMAGES, location)
        others = [name for name in columns if name not in (image, options.id_column, by_column)]
        usual = [name for name in others if name.strip().casefold() in LABELS]
        label = choose_column("label", columns, options.label_column, usual or others, LABELS, location)
        for role, named in (("id", options.id_column), ("group", options.group_column)):
            if named is not None:
                choose_column(role, columns, named, (), (), location)
        unused = [name for name in others if name not in (label, options.group_column)]
        files = _resolve_paths(root, [cells.get(image) for cells in rows], location)
        named = split or split_in(path.stem)
        cells: Sequence[Any] | None = [row.get(by_column) for row in rows] if by_column else None
        if cells is None and named is None and options.split_column is None:
            cells = _splits_of_paths(files, location)
        for name, chosen in parts(cells, len(rows), named, location).items():
            ids = tuple(str(rows[row][options.id_column]) if options.id_column else files[row] for row in chosen)
            part = RawSplit(
                ids=require_unique(ids, location),
                labels=[rows[row].get(label) for row in chosen],
                encoded=Files(str(root), tuple(files[row] for row in chosen), image_bytes(options.max_pixels)),
                decode=decoder(options),
                rows=[row + 1 for row in chosen],
                groups=[rows[row].get(options.group_column) for row in chosen] if options.group_column else None,
                others={name: [rows[row].get(name) for row in chosen] for name in unused},
            )
            add_part(splits, name, part, location)
    return splits


def _splits_of_paths(files: Sequence[str], location: str) -> list[str] | None:
    """The split that the first folder of each image's path names; None if one names none."""
    words = [split_word(path.partition("/")[0]) if "/" in path else None for path in files]
    splits = [word for word in words if word]
    if len(splits) < len(files):
        return None
    if set(splits) != {"train"}:
        logger.warning(
            "%s: the first folders of the images' paths name the splits (%s); --split-column %s leaves them out of account",
            *(location, ", ".join(sorted(set(splits))), NO_COLUMN),
        )
    return splits


def read_table(path: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Read a CSV (comma, semicolon or tab), JSON Lines or Parquet file → its columns with their types in words, and its rows.

    Raises BadData, which names the line, if the file is empty or not of that form.
    """
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    try:
        with io.TextIOWrapper(open_regular(path, TABLE_BYTES), encoding="utf-8-sig", newline="") as file:
            rows = list(_json_lines(path, file) if path.suffix == ".jsonl" else _csv_lines(path, file))
    except UnicodeDecodeError as err:
        encoding = "utf-16" if err.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "cp1252"
        rewritten = path.with_name(f"{path.stem}-utf8{path.suffix}")
        raise BadData(
            f"{path} cannot be read as a table: {err}; allowed: UTF-8, with a line of column names. A table of a spreadsheet "
            f"becomes one by `iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > {shlex.quote(str(rewritten))}`"
        ) from err
    except csv.Error as err:
        raise BadData(f"{path} cannot be read as a table: {err}; allowed: UTF-8, with a line of column names") from err
    if not rows:
        raise BadData(f"{path} holds no rows; allowed: a line of column names, and a line for each image")
    columns: dict[str, str] = {}
    for cells in rows[:1000]:
        for name, value in cells.items():
            kind = _cell_type(value)
            columns[name] = kind if columns.get(name, kind) == kind else _common_type(columns[name], kind)
    return columns, rows


def _parquet_rows(path: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    import pyarrow.parquet

    with (
        boundary(lambda reason: BadData(f"{path} cannot be read as Parquet: {reason}; allowed: whole Parquet files")),
        open_regular(path, TABLE_BYTES) as file,
    ):
        table = pyarrow.parquet.read_table(file, partitioning=None)
        rows = table.to_pylist()
    require_different(table.column_names, str(path))
    return {field.name: str(field.type) for field in table.schema}, rows


def _csv_lines(path: Path, file: TextIO) -> Iterator[dict[str, Any]]:
    first = file.readline()
    excel = re.fullmatch(r"sep=([\t,;])\s*", first, re.I)  # Excel's line that names the separator
    if not excel:
        file.seek(0)
    delimiter = excel[1] if excel else max("\t,;", key=first.count)
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    names = list(reader.fieldnames or ())
    require_different(names, str(path))
    if image := next(filter(_is_image_path, names), None):
        raise BadData(
            f"{path} has no line of column names: its first line names the image {image}; put a line such as "
            f"path{delimiter}label before it"
        )
    for cells in reader:
        if None in cells or None in cells.values():
            raise BadData(
                f"{path}, line {reader.line_num + bool(excel)}: {len(names)} columns are named and this line has another "
                "number of cells; quote cells that hold the separator"
            )
        yield cells


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                cells = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as err:  # also for a number of more digits than Python reads
                raise BadData(f"{path}, line {number}: not JSON ({first_line(err)})") from err
            if not isinstance(cells, dict):
                raise BadData(f"{path}, line {number}: allowed is an object a line, such as {{'path': …, 'label': …}}")
            yield cells


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError if a name is there twice, of which Python takes the last without a word."""
    cells = dict(pairs)
    if len(cells) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return cells


def _cell_type(value: Any) -> str:
    """The type of a cell, in words; text that is a number counts as a number."""
    if isinstance(value, str):
        return "text" if not NUMBER.fullmatch(value) else "whole number" if value.strip("+-").isdecimal() else "number"
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
    folders: dict[str, bool] = {}  # folder → whether it lies below the root
    paths, missing = [], []
    for row, path in enumerate(cells):
        if not isinstance(path, str) or not path:
            raise BadData(f"{location}, row {row + 1} names no image; allowed: a path below {root}")
        full_path = os.path.normpath(os.path.join(root, path))
        if "\\" in path and not os.path.exists(full_path):  # written by Windows
            full_path = os.path.normpath(os.path.join(root, path.replace("\\", "/")))
        folder = os.path.dirname(full_path)
        if folder not in folders:
            folders[folder] = Path(os.path.realpath(folder)).is_relative_to(root)
        is_link = os.path.islink(full_path)
        if not folders[folder] or (is_link and not is_inside(Path(os.path.realpath(full_path)), root)):
            raise BadData(
                f"{location}, row {row + 1}: {path} leads out of {root}; put the image into that folder, or say with "
                "--image-root where paths begin"
            )
        if not os.path.isfile(full_path):
            missing.append((row, path))
        paths.append(os.path.relpath(full_path, root))
    if missing:
        row, path = missing[0]
        windows = " (a path with backslashes, from Windows)" if "\\" in path else ""
        lost = plural(len(missing), "file that is", "files that are")
        raise BadData(
            f"{location} names {lost} not there, the first in row {row + 1}: {path}{windows}; paths "
            f"begin at {root}, or where --image-root says"
        )
    return paths
