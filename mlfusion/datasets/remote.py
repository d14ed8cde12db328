"""Reads hub data sets in place: by byte ranges of one commit, after one pass that indexes every image.

The pass reads each file once from end to end and keeps ids, labels, where every image begins, and the digest of its bytes.
A commit never changes, so a file's index is stored on disk, made once, and found again after an interruption. With the index
the data set has the same content, and so the same entry in the cache, as when it is downloaded. The images themselves are
fetched only when a model needs them.
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
from mlfusion.datasets.columns import SPLITS, require_unique
from mlfusion.datasets.hub import TableColumns, cell_bytes, choose_columns, reaching
from mlfusion.datasets.split import RawSplit, decoder
from mlfusion.errors import BadData
from mlfusion.specs.options import ReadOptions
from mlfusion.system import disk
from mlfusion.system.progress import Bar, track

VERSION = 1  # format of an index on disk
RUN = 4  # consecutive images that are fetched at once, as many as a worker decodes at a time
RUNS = 32  # runs that stay in memory
LARGE = 16 << 20  # bytes of a run, beyond which an image is fetched alone
HUB = "datasets/"  # prefix of paths on the hub


@dataclass(frozen=True, eq=False)
class Ranges:
    """Byte ranges of the hub's files, one per image."""

    files: tuple[str, ...]
    where: np.ndarray  # [images, 3] int64: file, first byte, bytes

    def __call__(self, row: int) -> bytes:
        file, offset, size = map(int, self.where[row])
        run = self.where[row - row % RUN :][:RUN]
        run = run[run[:, 0] == file]
        start, stop = int(run[:, 1].min()), int(run[:, 1:].sum(1).max())
        if stop - start > LARGE:
            start, stop = offset, offset + size
        with _reaching(self.files[file]):
            data = _range(self.files[file], start, stop)[offset - start :][:size]
        if len(data) < size:
            raise BadData(f"{self.files[file]} ends before byte {offset + size:,}; it is not the file that was indexed")
        return data


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows of Parquet files; a row group is fetched as a whole, and the latest ones stay in memory."""

    files: tuple[str, ...]
    where: np.ndarray  # [images, 3] int64: file, group, row in the group
    column: str

    def __call__(self, row: int) -> bytes:
        file, group, inner = map(int, self.where[row])
        with _reaching(self.files[file]), _turn:
            cell = _group(self.files[file], group, self.column)[inner].as_py()
        return cell_bytes(cell, None)


_turn = threading.Lock()  # a Parquet file is read by one thread at a time


@lru_cache(maxsize=RUNS)
def _range(path: str, start: int, stop: int) -> bytes:
    with opened(path) as file:
        file.seek(start)
        return file.read(stop - start)


@lru_cache(maxsize=2)
def _group(path: str, group: int, column: str) -> Any:
    return _parquet(path).read_row_group(group, columns=[column]).column(0)


@lru_cache(maxsize=8)
def _parquet(path: str) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(opened(path))


def _reaching(path: str) -> AbstractContextManager[None]:
    return reaching(path) if path.startswith(HUB) else nullcontext()


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
    np.savez(file := io.BytesIO(), text=text, where=index.where, digests=index.digests)
    folder.mkdir(parents=True, exist_ok=True)
    disk.sweep(folder)
    with disk.atomic(stored) as draft:
        draft.write_bytes(file.getvalue())
    return index


def opened(path: str, *, whole: bool = False) -> IO[bytes]:
    """Open a file on the hub or on disk, to read all of it (`whole`) or parts."""
    if not path.startswith(HUB):
        return open(path, "rb")
    from huggingface_hub import HfFileSystem

    how: dict[str, Any] = {"block_size": 0} if whole else {"block_size": 1 << 20, "cache_type": "none"}
    return HfFileSystem().open(path, "rb", **how)


def streamed(source: str, options: ReadOptions) -> tuple[str, dict[str, RawSplit]]:
    """Index a data set of the hub, by its id → its form in words, and its raw splits.

    Raises:
        Unavailable: no such data set, or no network.
        BadData: it holds neither tars nor Parquet files, or what they hold cannot be read as images with labels.
    """
    from huggingface_hub import HfApi, constants

    with reaching(source):
        info = HfApi().dataset_info(source, timeout=10)
        base, inside = f"{HUB}{source}@{info.sha}/", f"{options.config}/" if options.config is not None else ""
        names = [file.rfilename for file in info.siblings or () if file.rfilename.startswith(inside)]
        indexes = Path(constants.HF_HOME) / "mlfusion" / "indexes" / str(info.sha)
        text = None
        if tars.CLASS_NAMES in names:
            with opened(base + tars.CLASS_NAMES, whole=True) as file:
                text = file.read().decode("utf-8")
        return _read_splits(names, base, tars.class_names(text), options, indexes, source)


def in_place(root: Path, options: ReadOptions) -> tuple[str, dict[str, RawSplit]]:
    """Index a folder's Parquet files, which are read group by group, without the datasets library's copy."""
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.parquet")]
    return _read_splits(names, f"{root}/", None, options, None, str(root))


def _read_splits(
    names: Sequence[str],
    base: str,
    classes: tuple[str, ...] | None,
    options: ReadOptions,
    indexes: Path | None,
    where: str,
) -> tuple[str, dict[str, RawSplit]]:
    found = tars.by_split([name for name in names if name.endswith(".tar")])
    form = "WebDataset tars" if found else "Parquet files"
    found = found or _parquet_splits([name for name in names if name.endswith(".parquet")])
    if not found:
        raise BadData(f"{where} holds neither tars nor Parquet files; leave --stream out, so that it is downloaded")
    with track(f"looking through {where}", sum(map(len, found.values())), "files") as bar:

        def index_tar(path: str, columns: tars.Columns) -> tars.Index:
            index = _stored_index(indexes, path, columns.key, lambda: _index_tar(path, columns))
            bar.advance()
            return index

        splits = {}
        for split, some in found.items():
            paths = [base + name for name in some]
            if form == "WebDataset tars":
                splits[split] = tars.join(split, paths, classes, options, index_tar, Ranges)
            else:
                splits[split] = _table(split, paths, options, indexes, bar)
    return f"{form}, read in place", splits


def _index_tar(path: str, columns: tars.Columns) -> tars.Index:
    try:
        with opened(path, whole=True) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            return tars.index(tars.samples(tar, hashed=True), path, columns)
    except (tarfile.TarError, EOFError) as err:
        raise BadData(f"{path} cannot be read as a tar: {err}") from err


def _parquet_splits(names: Sequence[str]) -> dict[str, list[str]]:
    """Split → its files, by the split's name in their paths: data/train-00000-of-00002.parquet, train/0000.parquet."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        words = name.replace("-", "/").replace("_", "/").replace(".", "/").split("/")
        found.setdefault(next((split for split in SPLITS if split in words), ""), []).append(name)
    if set(found) == {""}:
        return {"train": found[""]}
    return {split: found[split] for split in SPLITS if split in found}


def _table(split: str, paths: list[str], options: ReadOptions, indexes: Path | None, bar: Bar) -> RawSplit:
    import datasets as library

    schema = _parquet(paths[0]).schema_arrow
    columns = choose_columns(library.Features.from_arrow_schema(schema), options, f"{paths[0]}")
    key = json.dumps([columns.image, columns.label, columns.id])
    parts = []
    for path in paths:
        parts.append(_stored_index(indexes, path, key, partial(_index_parquet, path, columns)))
        bar.advance()
    whole = tars.Index.joined(parts)
    ids = require_unique(whole.keys, paths[0]) if columns.id else [f"{split}/{row}" for row in range(len(whole.labels))]
    return RawSplit(
        ids=ids,
        labels=whole.labels,
        encoded=Groups(tuple(paths), whole.where, columns.image),
        decode=decoder(options),
        names=columns.names,
        digests=whole.digests,
    )


def _index_parquet(path: str, columns: TableColumns) -> tars.Index:
    """Index one Parquet file."""
    file = _parquet(path)
    keys: list[str] = []
    labels: list[Any] = []
    where: list[tuple[int, int]] = []
    digests = bytearray()
    for group in range(file.num_row_groups):
        wanted = list(dict.fromkeys(name for name in (columns.image, columns.label, columns.id) if name))
        table = file.read_row_group(group, columns=wanted)
        labels += table.column(columns.label).to_pylist()
        keys += map(str, table.column(columns.id).to_pylist()) if columns.id else ()
        for row, cell in enumerate(table.column(columns.image)):
            digests += xxhash.xxh3_128_digest(cell_bytes(cell.as_py(), None))
            where.append((group, row))
    return tars.Index.of(keys, labels, where, digests)
