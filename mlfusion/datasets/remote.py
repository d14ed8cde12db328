"""Reads hub data sets in place: by byte ranges of one commit, after one pass that indexes every image.

The pass reads each file once from end to end and keeps each image's id, label, position and digest. A commit never changes,
so a file's index is stored on disk and used again, also after an interruption. The indexed data set has the same content, and
so the same entry in the cache, as the downloaded one. The images themselves are fetched only when a model needs them.
"""

import io
import json
import tarfile
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from mlfusion.datasets import tars
from mlfusion.datasets.columns import require_different, require_unique
from mlfusion.datasets.hub import TableColumns, cell_bytes, choose_columns, split_cells, translate_hub_errors
from mlfusion.datasets.places import add_part, by_split, parts
from mlfusion.datasets.split import RawSplit, decoder
from mlfusion.datasets.values import plain
from mlfusion.errors import BadData
from mlfusion.specs.options import ReadOptions
from mlfusion.system import disk
from mlfusion.system.progress import Bar, track

VERSION = 2  # format of an index on disk
RUN_IMAGES = 4  # consecutive images that are fetched at once, as many as a worker decodes at a time
CACHED_RUNS = 32  # runs that stay in memory
MAX_RUN_BYTES = 16 << 20  # images of a larger run are fetched one by one
HUB = "datasets/"  # prefix of paths on the hub


@dataclass(frozen=True, eq=False)
class Ranges:
    """Byte ranges of the hub's files, one per image."""

    files: tuple[str, ...]
    positions: np.ndarray  # [images, 3] int64: file, first byte, bytes

    def __call__(self, row: int) -> bytes:
        file, offset, size = map(int, self.positions[row])
        run = self.positions[row - row % RUN_IMAGES :][:RUN_IMAGES]
        run = run[run[:, 0] == file]
        start, stop = int(run[:, 1].min()), int(run[:, 1:].sum(1).max())
        if stop - start > MAX_RUN_BYTES:
            start, stop = offset, offset + size
        with _translate_errors(self.files[file]):
            data = _range(self.files[file], start, stop)[offset - start :][:size]
        if len(data) < size:
            raise BadData(f"{self.files[file]} ends before byte {offset + size:,}; it is not the file that was indexed")
        return data


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows of Parquet files; a row group is fetched as a whole, and the latest ones stay in memory."""

    files: tuple[str, ...]
    positions: np.ndarray  # [images, 3] int64: file, group, row in the group
    column: str

    def __call__(self, row: int) -> bytes:
        file, group, inner = map(int, self.positions[row])
        with _translate_errors(self.files[file]), _parquet_lock:
            cell = _group(self.files[file], group, self.column)[inner].as_py()
        return cell_bytes(cell, None)


_parquet_lock = threading.Lock()  # a Parquet file is read by one thread at a time


@lru_cache(maxsize=CACHED_RUNS)
def _range(path: str, start: int, stop: int) -> bytes:
    with open_file(path) as file:
        file.seek(start)
        return file.read(stop - start)


@lru_cache(maxsize=2)
def _group(path: str, group: int, column: str) -> Any:
    return _parquet(path).read_row_group(group, columns=[column]).column(0)


@lru_cache(maxsize=8)
def _parquet(path: str) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(open_file(path) if path.startswith(HUB) else path)


def _translate_errors(path: str) -> AbstractContextManager[None]:
    return translate_hub_errors(path) if path.startswith(HUB) else nullcontext()


def _stored_index(folder: Path | None, path: str, key: str, make: Callable[[], tars.Index]) -> tars.Index:
    """A file's index from an earlier pass, or from `make`; without a folder none is stored.

    `key` is the text of the options that it depends on besides the file.
    """
    if folder is None:
        return make()
    name = xxhash.xxh3_128_hexdigest(json.dumps([VERSION, path, key]).encode())
    stored = folder / f"{name}.npz"
    if stored.is_file():
        with np.load(stored, allow_pickle=False) as arrays:
            keys, labels = json.loads(arrays["text"].tobytes())
            return tars.Index(keys, labels, arrays["where"], arrays["digests"])
    index = make()
    assert index.digests is not None
    text = np.frombuffer(json.dumps([index.keys, index.labels]).encode(), np.uint8)
    np.savez(file := io.BytesIO(), text=text, where=index.positions, digests=index.digests)
    folder.mkdir(parents=True, exist_ok=True)
    disk.sweep(folder)
    with disk.atomic(stored) as draft:
        draft.write_bytes(file.getvalue())
    return index


def open_file(path: str, *, whole: bool = False) -> IO[bytes]:
    """Open a file on the hub or on disk, to read all of it (`whole`) or parts."""
    if not path.startswith(HUB):
        return open(path, "rb")
    from huggingface_hub import HfFileSystem

    arguments: dict[str, Any] = {"block_size": 0} if whole else {"block_size": 1 << 20, "cache_type": "none"}
    return HfFileSystem().open(path, "rb", **arguments)


def read_hub(source: str, options: ReadOptions) -> tuple[str, dict[str, RawSplit]]:
    """Index a data set of the hub, by its id → its form in words, and its raw splits.

    Raises:
        Unavailable: no such data set, or no network.
        BadData: it holds neither tars nor Parquet files, or what they hold cannot be read as images with labels.
    """
    from huggingface_hub import HfApi, constants

    with translate_hub_errors(source):
        info = HfApi().dataset_info(source, timeout=10)
        base, prefix = f"{HUB}{source}@{info.sha}/", f"{options.config}/" if options.config is not None else ""
        names = [file.rfilename for file in info.siblings or () if file.rfilename.startswith(prefix)]
        indexes = Path(constants.HF_HOME) / "mlfusion" / "indexes" / str(info.sha)
        classes = None
        if tars.CLASS_NAMES in names:
            with open_file(base + tars.CLASS_NAMES, whole=True) as file:
                classes = tars.class_names(file.read(), base + tars.CLASS_NAMES)
        return _read_splits(names, base, classes, options, indexes, source)


def read_folder(root: Path, options: ReadOptions) -> tuple[str, dict[str, RawSplit]]:
    """Index a folder's Parquet files, which are read group by group, without the datasets library's copy."""
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.parquet")]
    return _read_splits(names, f"{root}/", None, options, None, str(root))


def _read_splits(
    names: Sequence[str],
    base: str,
    classes: tuple[str, ...] | None,
    options: ReadOptions,
    indexes: Path | None,
    location: str,
) -> tuple[str, dict[str, RawSplit]]:
    files = by_split([name for name in names if name.endswith(".tar")], location)
    form = "WebDataset tars" if files else "Parquet files"
    files = files or by_split([name for name in names if name.endswith(".parquet")], location)
    if not files:
        raise BadData(f"{location} holds neither tars nor Parquet files; leave --stream out, so that it is downloaded")
    with track(f"looking through {location}", sum(map(len, files.values())), "files") as bar:

        def index_tar(path: str, columns: tars.Columns) -> tars.Index:
            index = _stored_index(indexes, path, columns.key, lambda: _index_tar(path, columns))
            bar.advance()
            return index

        splits: dict[str, RawSplit] = {}
        for split, inner in files.items():
            paths = [base + name for name in inner]
            if form == "WebDataset tars":
                splits[split] = tars.join(split, paths, classes, options, index_tar, Ranges)
                continue
            for part, raw in _table(split, paths, options, indexes, bar).items():
                add_part(splits, part, raw, f"{location}, split {split}")
    return f"{form}, read in place", splits


def _index_tar(path: str, columns: tars.Columns) -> tars.Index:
    try:
        with open_file(path, whole=True) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            return tars.index_samples(tars.samples(tar, hashed=True), path, columns)
    except (tarfile.TarError, EOFError) as err:
        raise BadData(f"{path} cannot be read as a tar: {err}") from err


def _table(split: str, paths: list[str], options: ReadOptions, indexes: Path | None, bar: Bar) -> dict[str, RawSplit]:
    """The files of a split, or the parts that their column of splits names."""
    import datasets as library

    schema = _parquet(paths[0]).schema_arrow
    require_different(schema.names, paths[0])
    try:
        features = library.Features.from_arrow_schema(schema)
    except ValueError as err:
        raise BadData(f"{paths[0]} cannot be read as images: {err}") from err
    columns = choose_columns(features, options, paths[0], partial(_distinct, paths))
    key = json.dumps([columns.image, columns.label, columns.id])
    indexed = []
    for path in paths:
        indexed.append(_stored_index(indexes, path, key, partial(_index_parquet, path, columns)))
        bar.advance()
    index = tars.Index.joined(indexed)
    cells = [cell for path in paths for cell in _column(path, columns.split)] if columns.split else None
    splits = split_cells(features, columns.split, cells)
    return {
        part: RawSplit(
            ids=require_unique([index.keys[row] if columns.id else f"{part}/{row}" for row in rows], paths[0]),
            labels=[index.labels[row] for row in rows],
            encoded=Groups(tuple(paths), index.positions[rows], columns.image),
            decode=decoder(options),
            names=columns.names,
            digests=None if index.digests is None else index.digests[rows],
            rows=[row + 1 for row in rows],
        )
        for part, rows in parts(splits, len(index.labels), None if split == "train" else split, paths[0]).items()
    }


def _column(path: str, name: str) -> list[Any]:
    with _translate_errors(path):
        return list(_parquet(path).read(columns=[name]).column(0).to_pylist())


def _distinct(paths: Sequence[str], name: str) -> set[Any]:
    return {cell for path in paths for cell in _column(path, name) if isinstance(cell, (str, int, type(None)))}


def _index_parquet(path: str, columns: TableColumns) -> tars.Index:
    file = _parquet(path)
    keys: list[str] = []
    labels: list[Any] = []
    positions: list[tuple[int, int]] = []
    digests = bytearray()
    for group in range(file.num_row_groups):
        names = list(dict.fromkeys(name for name in (columns.image, columns.label, columns.id) if name))
        table = file.read_row_group(group, columns=names)
        labels += [plain(label) for label in table.column(columns.label).to_pylist()]
        keys += map(str, table.column(columns.id).to_pylist()) if columns.id else ()
        for row, cell in enumerate(table.column(columns.image)):
            digests += xxhash.xxh3_128_digest(cell_bytes(cell.as_py(), None))
            positions.append((group, row))
    return tars.Index.of(keys, labels, positions, digests)
