"""Reads hub data sets in place: by byte ranges of one commit, after one pass that indexes every image.

The pass reads each file once from end to end and keeps each image's id, label, position and digest. A commit never changes,
so a file's index is stored on disk and used again, also after an interruption. The indexed data set has the same content, and
so the same entry in the cache, as the downloaded one. The images themselves are fetched only when a model needs them.
"""

import io
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from mlfusion.datasets import tars
from mlfusion.datasets.columns import require_different, require_unique
from mlfusion.datasets.folder import NAMES_BYTES, files_below, image_bytes, open_regular, require_inside
from mlfusion.datasets.hub import TableColumns, cell_bytes, choose_columns, split_cells, translate_hub_errors
from mlfusion.datasets.places import add_part, by_split, parts, split_of_path
from mlfusion.datasets.split import DIGEST_BYTES, RawSplit, decoder, image_digest
from mlfusion.datasets.values import plain
from mlfusion.errors import BadData, boundary
from mlfusion.specs.options import ReadOptions
from mlfusion.specs.splits import split_word
from mlfusion.system import disk
from mlfusion.system.progress import Bar, track

VERSION = 3  # format of an index on disk
RUN_IMAGES = 4  # consecutive images that are fetched at once, as many as a worker decodes at a time
CACHED_RUNS = 32  # runs that stay in memory
MAX_RUN_BYTES = 16 << 20  # images of a larger run are fetched one by one
CACHED_BATCHES = 4  # batches of a Parquet file that stay in memory
BATCH_BYTES = 32 << 20  # size of a batch of a Parquet file's rows
READ_BYTES = 1 << 20  # bytes that are read at once from a Parquet file on disk
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


class Rows:
    """The rows of one column of Parquet files that were read last; it pickles as an empty one.

    A large row group is read from its beginning, in batches of limited size. Files stay open no longer than this object
    lives, so that a file which was replaced is never mixed with the one before it.
    """

    def __init__(self, column: str) -> None:
        self.column = column
        self._lock = threading.Lock()  # a Parquet file is read by one thread at a time
        self._clear()

    def __reduce__(self) -> tuple[type["Rows"], tuple[str]]:
        return type(self), (self.column,)

    def _clear(self) -> None:
        self._process = os.getpid()  # a forked process opens its own files
        self._files: dict[str, Any] = {}
        self._group: tuple[str, int] | None = None  # the file and the row group that `_batches` reads
        self._batches: Iterator[Any] = iter(())
        self._next = 0  # first row of the next batch
        self._read: deque[tuple[tuple[str, int], int, Any]] = deque(maxlen=CACHED_BATCHES)  # group, first row, cells

    def cell(self, path: str, group: int, row: int) -> Any:
        """One cell, as a value of pyarrow; OSError if the file has become shorter."""
        with self._lock:
            if self._process != os.getpid():
                self._clear()
            for read, first, cells in self._read:
                if read == (path, group) and first <= row < first + len(cells):
                    return cells[row - first]
            if self._group != (path, group) or row < self._next:
                self._group, self._next, self._batches = (path, group), 0, self._open(path, group)
            for batch in self._batches:
                self._read.append(((path, group), self._next, cells := batch.column(0)))
                self._next += len(cells)
                if row < self._next:
                    return cells[row - self._next + len(cells)]
        raise OSError(f"{path} has become shorter since it was looked through")

    def _open(self, path: str, group: int) -> Iterator[Any]:
        file = self._files[path] = self._files.get(path) or open_parquet(path)
        rows, nbytes = file.metadata.row_group(group).num_rows, file.metadata.row_group(group).total_byte_size
        if nbytes <= BATCH_BYTES:
            return iter([file.read_row_group(group, columns=[self.column], use_threads=False)])
        batches: Iterator[Any] = file.iter_batches(
            max(1, rows * BATCH_BYTES // nbytes), row_groups=[group], columns=[self.column], use_threads=False
        )
        return batches


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows of Parquet files, which are read in order and by groups."""

    in_order = True  # so more threads than one only wait for each other
    files: tuple[str, ...]
    positions: np.ndarray  # [images, 3] int64: file, group, row in the group
    rows: Rows
    roots: Mapping[str, tuple[str, ...]]  # file → folders in which the paths of its cells may begin
    most: int  # bytes of a file that a cell names

    def __call__(self, row: int) -> bytes:
        file, group, inner = map(int, self.positions[row])
        path = self.files[file]
        with _parquet_errors(path):
            cell = self.rows.cell(path, group, inner).as_py()
        return cell_bytes(cell, self.roots.get(path, ()), self.most)


@contextmanager
def _parquet_errors(path: str) -> Iterator[None]:
    """Translate pyarrow's errors about a file to `BadData`, inside the with statement."""
    with (
        boundary(lambda why: BadData(f"{path} cannot be read as Parquet: {why}; allowed: whole Parquet files")),
        _translate_errors(path),
    ):
        yield


def open_parquet(path: str) -> Any:
    """Open a Parquet file on the hub, where a column of a row group is one request, or on disk."""
    import pyarrow.parquet

    if path.startswith(HUB):
        return pyarrow.parquet.ParquetFile(open_file(path))
    open_regular(path).close()  # pyarrow opens it again by its path, and reads it without Python's lock
    return pyarrow.parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False)


@lru_cache(maxsize=CACHED_RUNS)
def _range(path: str, start: int, stop: int) -> bytes:
    with open_file(path) as file:
        file.seek(start)
        return file.read(stop - start)


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
        with suppress(Exception):  # whatever NumPy and zipfile raise on a damaged file: it is made again
            return _read_index(stored)
    index = make()
    assert index.digests is not None
    texts = [index.keys, index.labels, *([] if index.groups is None else [index.groups])]
    text = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    np.savez(file := io.BytesIO(), text=text, where=index.positions, digests=index.digests)
    folder.mkdir(parents=True, exist_ok=True)
    disk.sweep(folder)
    with disk.atomic(stored, replace=True) as draft:  # in place of a damaged one
        draft.write_bytes(file.getvalue())
    return index


def _read_index(stored: Path) -> tars.Index:
    """The index in a file; a damaged one raises any exception."""
    with open_regular(stored) as file, np.load(file, allow_pickle=False) as arrays:
        keys, labels, *groups = json.loads(arrays["text"].tobytes())
        index = tars.Index(keys, labels, arrays["where"], arrays["digests"], groups[0] if groups else None)
    images, positions = len(labels), index.positions
    if groups and len(groups[0]) != images:
        raise ValueError("not as many groups as images")
    if positions.shape != (images, 2) or positions.dtype != np.int64 or len(keys) not in (0, images):
        raise ValueError("not as many positions as images")
    if index.digests is None or index.digests.shape != (images, DIGEST_BYTES) or index.digests.dtype != np.uint8:
        raise ValueError("not as many digests as images")
    return index


def open_file(path: str, *, whole: bool = False) -> IO[bytes]:
    """Open a file on the hub or on disk, to read all of it (`whole`) or parts."""
    if not path.startswith(HUB):
        return open_regular(path)
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
                classes = tars.class_names(file.read(NAMES_BYTES), base + tars.CLASS_NAMES)
        return _read_splits(names, base, classes, options, indexes, source)


def read_folder(root: Path, options: ReadOptions) -> dict[str, RawSplit]:
    """Read a folder's Parquet files in place, such as a hub data set that was downloaded by other means.

    Folders that are not named by a split, or `data`, are configurations: several of them are never joined.
    """
    top = root / options.config if options.config is not None else root
    require_inside(top, root)
    names = [f"{top.relative_to(root).as_posix()}/{name}".removeprefix("./") for name in files_below(top, ".parquet")]
    inner = ([part for part in name.split("/")[:-1] if part != "data" and not split_word(part)] for name in names)
    if len(configs := {"/".join(folders) or "." for folders in inner}) > 1:
        raise BadData(
            f"{top} holds Parquet files of several configurations, in {', '.join(sorted(configs))}; choose one with --config"
        )
    return _read_splits(names, f"{root}/", None, options, None, str(top))[1]


def read_file(path: Path, options: ReadOptions) -> dict[str, RawSplit]:
    """Read one Parquet file in place, as the split that its column of splits or its name gives, else as train."""
    with track(f"looking through {path}", 1, "files") as bar:
        return _table(split_of_path(path.name) or "train", f"{path.parent}/", [path.name], options, None, bar)


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
            if form == "WebDataset tars":
                paths = [base + name for name in inner]
                splits[split] = tars.join(split, paths, classes, options, index_tar, Ranges)
                continue
            for part, raw in _table(split, base, inner, options, indexes, bar).items():
                add_part(splits, part, raw, f"{location}, split {split}")
    return f"{form}, read in place", splits


def _index_tar(path: str, columns: tars.Columns) -> tars.Index:
    with open_file(path, whole=True) as file:
        return tars.index_samples(tars.samples(file, path, hashed=True), path, columns)


def _table(
    split: str, base: str, names: Sequence[str], options: ReadOptions, indexes: Path | None, bar: Bar
) -> dict[str, RawSplit]:
    """The files of a split, or the parts that their column of splits names."""
    import datasets as library

    paths = [base + name for name in names]
    with _parquet_errors(paths[0]):
        schema = open_parquet(paths[0]).schema_arrow
    require_different(schema.names, paths[0])
    with boundary(
        lambda why: BadData(f"{paths[0]} cannot be read as images: {why}; allowed: the hub's types of columns")
    ):
        features = library.Features.from_arrow_schema(schema)
    columns = choose_columns(features, options, paths[0], partial(_distinct, paths))
    key = json.dumps([columns.image, columns.label, columns.id])
    indexed = []
    for path in paths:
        with _parquet_errors(path):
            indexed.append(
                _stored_index(indexes, path, key, partial(_index_parquet, path, columns, indexes is not None))
            )
        bar.advance()
    index = tars.Index.joined(indexed)
    cells = [cell for path in paths for cell in _column(path, columns.split)] if columns.split else None
    splits = split_cells(features, columns.split, cells)
    groups = [cell for path in paths for cell in _column(path, columns.group)] if columns.group else None
    unused = () if base.startswith(HUB) else columns.others  # a streamed column would be fetched for a warning alone
    others = {name: [cell for path in paths for cell in _column(path, name)] for name in unused}
    rows_read, roots = Rows(columns.image), _roots(base, paths, options)
    return {
        part: RawSplit(
            ids=require_unique([index.keys[row] if columns.id else f"{part}/{row}" for row in rows], paths[0]),
            labels=[index.labels[row] for row in rows],
            encoded=Groups(tuple(paths), index.positions[rows], rows_read, roots, image_bytes(options.max_pixels)),
            decode=decoder(options),
            names=columns.names,
            digests=None if index.digests is None else index.digests[rows],
            rows=[row + 1 for row in rows],
            groups=None if groups is None else [groups[row] for row in rows],
            others={name: [cells[row] for row in rows] for name, cells in others.items()},
        )
        for part, rows in parts(splits, len(index.labels), None if split == "train" else split, paths[0]).items()
    }


def _column(path: str, name: str) -> list[Any]:
    with _parquet_errors(path):
        return list(open_parquet(path).read(columns=[name]).column(0).to_pylist())


def _distinct(paths: Sequence[str], name: str) -> set[Any]:
    return {cell for path in paths for cell in _column(path, name) if isinstance(cell, (str, int, type(None)))}


def _roots(base: str, paths: Sequence[str], options: ReadOptions) -> dict[str, tuple[str, ...]]:
    """File → the folders in which the paths of its cells may begin: --image-root, or the data set's and the file's own."""
    if base.startswith(HUB):
        return {}
    if options.image_root is not None:
        return dict.fromkeys(paths, (os.path.realpath(os.path.expanduser(options.image_root)),))
    return {path: (os.path.dirname(base), os.path.dirname(path)) for path in paths}


def _index_parquet(path: str, columns: TableColumns, hashed: bool) -> tars.Index:
    """The index of one file; with `hashed`, every image is read and its digest computed."""
    file = open_parquet(path)
    keys: list[str] = []
    labels: list[Any] = []
    positions: list[tuple[int, int]] = []
    digests = bytearray()
    for group in range(file.num_row_groups):
        names = list(dict.fromkeys(name for name in (columns.label, columns.id, columns.image * hashed) if name))
        table = file.read_row_group(group, columns=names)
        labels += [plain(label) for label in table.column(columns.label).to_pylist()]
        keys += map(str, table.column(columns.id).to_pylist()) if columns.id else ()
        positions += [(group, row) for row in range(table.num_rows)]
        for cell in table.column(columns.image) if hashed else ():
            digests += image_digest(cell_bytes(cell.as_py(), (), 0)).digest()
    return tars.Index.of(keys, labels, positions, digests)
