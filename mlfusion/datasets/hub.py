"""Reads data sets of the Hugging Face hub through the datasets library; `tars` reads the hub's tars."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlfusion.datasets.columns import GROUPS, IMAGES, LABELS, choose_column, list_columns, require_unique
from mlfusion.datasets.folder import image_bytes, read_regular
from mlfusion.datasets.places import add_part, parts, split_column
from mlfusion.datasets.split import RawSplit, decoder, read_row_of
from mlfusion.errors import BadData, Unavailable
from mlfusion.specs.options import ReadOptions
from mlfusion.system.references import is_inside

KEY = "__key__"  # column in which the datasets library stores the key of a WebDataset sample


@dataclass(frozen=True, eq=False)
class Cells:
    """A column of images in an Arrow table on disk, which pickles as its path."""

    table: Any  # datasets.Dataset of this column alone, not decoded
    column: str
    root: str  # folder of the files that cells may name instead of holding bytes
    most: int  # bytes of such a file

    def __call__(self, row: int) -> bytes:
        return cell_bytes(self.table[row][self.column], [self.root], self.most)


def cell_bytes(cell: Any, roots: Sequence[str], most: int) -> bytes:
    """An image's bytes from its cell: bytes, or the hub's {bytes, path}.

    A path begins at the first of the resolved folders `roots` below which it names a file, and may not lead out of it. The
    file is a regular one of at most `most` bytes.
    """
    if isinstance(cell, (bytes, bytearray)):
        return bytes(cell)
    if cell is None:
        return b""
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    paths = [(Path(root), Path(os.path.realpath(os.path.join(root, str(cell.get("path")))))) for root in roots]
    inside = [path for root, path in paths if is_inside(path, root)]
    if not inside:
        raise OSError(f"its cell holds no bytes, and names a file outside the data set ({cell.get('path')})")
    path = next((path for path in inside if path.is_file()), inside[0])
    return read_regular(path, most)


def load(name: str, source: str, options: ReadOptions) -> Path | dict[str, RawSplit]:
    """Download a data set → the folder of its tars, or its raw splits.

    Raises:
        Unavailable: no such data set, or no network.
        BadData: it cannot be read as images with labels.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    with translate_hub_errors(name, source):
        offline = constants.is_offline_mode()
        files = [] if offline else [f.rfilename for f in HfApi().dataset_info(source, timeout=10).siblings or ()]
        if any(file.endswith(".tar") for file in files) or (offline and "/wds_" in source):
            # The tars are not given to the datasets library, which would unpack a second copy and may read them as text.
            return Path(snapshot_download(source, repo_type="dataset", allow_patterns=["*.tar", "*classnames.txt"]))
        return _from_library(name, options, source)


@contextmanager
def translate_hub_errors(name: str, source: str | None = None) -> Iterator[None]:
    """Translate the errors of the hub and of the network to `Unavailable`, inside the with statement."""
    import datasets as library
    from huggingface_hub import errors

    # The hub's client raises the errors of its HTTP library; offline mode is an OSError.
    unreachable = (OSError, errors.HTTPError)  # type: ignore[attr-defined]
    try:
        yield
    except (errors.RepositoryNotFoundError, library.exceptions.DatasetNotFoundError) as err:
        raise Unavailable(
            f"the hub has no data set {source or name!r} that you may read (gated ones need `hf auth login`); look at "
            "`mlfusion ls datasets`"
        ) from err
    except unreachable as err:
        raise Unavailable(
            f"{name}: the hub cannot be reached ({type(err).__name__}); connect, set HF_HUB_OFFLINE=1 to use what an "
            "earlier download left, give a folder with --dataset, or try the embedded images: --dataset digits"
        ) from err


def _from_library(name: str, options: ReadOptions, source: str) -> dict[str, RawSplit]:
    """Load a data set of the hub by the datasets library → its raw splits."""
    import datasets as library

    library.disable_progress_bars()
    try:
        builder = library.load_dataset_builder(source, options.config)
        _refuse_elsewhere(builder.config.data_files, name)
        loaded: Mapping[str, Any] = library.load_dataset(source, options.config)
    except (ValueError, library.exceptions.DatasetGenerationError) as err:
        lines = str(err).splitlines() or [type(err).__name__]
        hint = "; choose one with --config" if "onfig name is missing" in lines[0] else ""
        raise BadData(f"{name} cannot be read as images: {' '.join(lines)[:300]}{hint}") from err
    splits: dict[str, RawSplit] = {}
    for split, table in loaded.items():
        for part, raw in _raw_splits(f"{name}, split {split}", split, table, options).items():
            add_part(splits, part, raw, f"{name}, split {split}")
    return splits


def _refuse_elsewhere(files: Mapping[str, Sequence[str]] | None, name: str) -> None:
    """Raise BadData if the data set's card names files that are not the hub's: on this machine, or at another address."""
    for file in (str(file) for several in (files or {}).values() for file in several):
        if not file.startswith("hf://datasets/"):
            raise BadData(
                f"{name}: its card names the file {file}, which is not on the hub; allowed: files of the data set. Download it "
                "yourself and give the folder"
            )


@dataclass(frozen=True)
class TableColumns:
    """The columns of a table that are used."""

    image: str
    label: str
    id: str | None
    group: str | None
    split: str | None
    others: tuple[str, ...]  # that may hold groups, by their names
    decoded: bool  # the image column has the library's type Image
    names: tuple[str, ...] | None  # class names that label numbers stand for


def choose_columns(
    features: Any, options: ReadOptions, location: str, distinct: Callable[[str], Iterable[Any]]
) -> TableColumns:
    """Choose a table's columns by the user's options, else by type and name; `distinct` gives the values of a column.

    Raises:
        BadData: no column fits; the message lists them.
    """
    import datasets as library

    columns = {column: _type(feature) for column, feature in features.items()}
    pictures = [column for column, kind in columns.items() if kind == "image"]
    raw = [column for column, kind in columns.items() if kind == "bytes"]
    image = choose_column("image", columns, options.image_column, pictures or raw, IMAGES, location)
    if columns[image] not in ("image", "bytes"):
        raise BadData(f"{location}: {image} holds no images; --image-column may be: {list_columns(columns)}")
    split = split_column([c for c in columns if c != image], options.split_column, distinct, location)
    class_columns = [column for column, kind in columns.items() if kind.startswith("class of") and column != split]
    usual_labels = [column for column in columns if column.casefold() in LABELS and column != split]
    likely = list(dict.fromkeys([*class_columns, *usual_labels]))
    # Of a column of classes and another of a usual name, neither is chosen.
    usual = LABELS if not class_columns or set(class_columns) & set(usual_labels) else ()
    label = choose_column("label", columns, options.label_column, likely, usual, location)
    for role, named in (("id", options.id_column), ("group", options.group_column)):
        if named is not None:
            choose_column(role, columns, named, (), (), location)
    inner = getattr(features[label], "feature", features[label])
    names = tuple(inner.names) if isinstance(inner, library.ClassLabel) else None
    used = {image, label, options.id_column, options.group_column, split}
    others = [name for name in columns if name not in used and any(word in name.casefold() for word in GROUPS)]
    return TableColumns(
        image=image,
        label=label,
        id=options.id_column,
        group=options.group_column,
        split=split,
        others=tuple(others),
        decoded=columns[image] == "image",
        names=names,
    )


def _raw_splits(location: str, split: str, table: Any, options: ReadOptions) -> dict[str, RawSplit]:
    """The table of a split, or the parts that its column of splits names."""
    import datasets as library

    columns = choose_columns(table.features, options, location, lambda name: table.unique(name))
    images = table.select_columns([columns.image])
    if columns.decoded:
        images = images.cast_column(columns.image, library.Image(decode=False))
    # The library unpacks the files of a hub data set below this folder.
    cells = Cells(
        images, columns.image, os.path.realpath(library.config.HF_CACHE_HOME), image_bytes(options.max_pixels)
    )
    labels = table.with_format(None)[columns.label][:]
    ids = table[columns.id][:] if columns.id else table[KEY][:] if KEY in table.features else range(len(table))
    groups = table[columns.group][:] if columns.group else None
    others = {name: table[name][:] for name in columns.others}
    splits = split_cells(table.features, columns.split, table[columns.split][:] if columns.split else None)
    return {
        part: RawSplit(
            ids=require_unique([str(ids[row]) if columns.id else f"{part}/{ids[row]}" for row in rows], location),
            labels=[labels[row] for row in rows],
            encoded=cells if len(rows) == len(table) else partial(read_row_of, cells, np.array(rows)),
            decode=decoder(options),
            names=columns.names,
            rows=[row + 1 for row in rows],
            groups=None if groups is None else [groups[row] for row in rows],
            others={name: [cells[row] for row in rows] for name, cells in others.items()},
        )
        for part, rows in parts(splits, len(table), None if split == "train" else split, location).items()
    }


def split_cells(features: Any, column: str | None, cells: Sequence[Any] | None) -> Sequence[Any] | None:
    """The cells of the column of splits, with the names of classes for their numbers."""
    names = getattr(features[column], "names", None) if column else None
    return [names[cell] for cell in cells] if names and cells is not None else cells


def _type(feature: Any) -> str:
    """A feature's type in words."""
    import datasets as library

    if isinstance(feature, library.Image):
        return "image"
    if isinstance(feature, library.ClassLabel):
        return f"class of {feature.num_classes}"
    if isinstance(feature, dict):
        return "bytes" if set(feature) == {"bytes", "path"} or set(feature) == {"bytes"} else "object"
    if isinstance(feature, library.Value):
        kind = str(feature.dtype)
        return "bytes" if "binary" in kind else "text" if "string" in kind else kind
    if hasattr(feature, "feature"):
        return f"list of {_type(feature.feature)}"
    return type(feature).__name__
