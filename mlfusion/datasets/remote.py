"""Hub data sets read from where they lie: of one commit, by ranges of bytes, after one pass that names every image.

The pass reads each file once from end to end and keeps what is small of it: ids, labels, where every image begins and the
digest of its bytes. A commit never changes, so a file's index is kept on disk, made once, and found again after a kill. By it
the set has the same content, and so the same entry in the cache, as when it is downloaded; and the images themselves are
fetched only when they are run through a model.
"""

import io
import json
import tarfile
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from mlfusion import disk
from mlfusion.datasets import tars
from mlfusion.datasets.columns import SPLITS, unique
from mlfusion.datasets.hub import Chosen, cell_bytes, chosen, reaching
from mlfusion.datasets.split import Found, Reading
from mlfusion.errors import BadData
from mlfusion.progress import Bar, track

VERSION = 1  # of an index on disk
RUN = 4  # images that lie one after another and are fetched at once, as many as a worker decodes at a time
RUNS = 32  # of them that are kept at hand
LARGE = 16 << 20  # bytes of a run, beyond which an image is fetched alone
HUB = "datasets/"  # what paths on the hub begin with


@dataclass(frozen=True, eq=False)
class Ranges:
    """Pieces of the hub's files."""

    files: tuple[str, ...]
    where: np.ndarray  # [images, 3] int64: file, first byte, bytes

    def __call__(self, row: int) -> bytes:
        file, offset, size = map(int, self.where[row])
        run = self.where[row - row % RUN :][:RUN]
        run = run[run[:, 0] == file]
        start, stop = int(run[:, 1].min()), int(run[:, 1:].sum(1).max())
        if stop - start > LARGE:
            start, stop = offset, offset + size
        with _reach(self.files[file]):
            data = _range(self.files[file], start, stop)[offset - start :][:size]
        if len(data) < size:
            raise BadData(f"{self.files[file]} ends before byte {offset + size:,}; it is not the file that was indexed")
        return data


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows of Parquet files; a group of rows is fetched as a whole, and the last ones are kept at hand."""

    files: tuple[str, ...]
    where: np.ndarray  # [images, 3] int64: file, group, row in the group
    column: str

    def __call__(self, row: int) -> bytes:
        file, group, inner = map(int, self.where[row])
        with _reach(self.files[file]), _turn:
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


def _reach(path: str) -> AbstractContextManager[None]:
    return reaching(path) if path.startswith(HUB) else nullcontext()


def opened(path: str, *, whole: bool = False) -> IO[bytes]:
    """A file on the hub or on disk, for reading: from end to end, or here and there."""
    if not path.startswith(HUB):
        return open(path, "rb")
    from huggingface_hub import HfFileSystem

    files = HfFileSystem()
    return (
        files.open(path, "rb", block_size=0) if whole else files.open(path, "rb", block_size=1 << 20, cache_type="none")
    )


def streamed(source: str, reading: Reading) -> tuple[str, dict[str, Found]]:
    """A data set of the hub, by its id: what form it has, and its splits.

    Raises:
        Unavailable: no such data set, or no network.
        BadData: it holds neither tars nor Parquet files, or what they hold cannot be read as images with labels.
    """
    from huggingface_hub import HfApi, constants

    with reaching(source):
        info = HfApi().dataset_info(source, timeout=10)
        base = f"{HUB}{source}@{info.sha}/"
        names = [file.rfilename for file in info.siblings or ()]
        if reading.config is not None:
            names = [name for name in names if name.startswith(f"{reading.config}/")]
        kept = Path(constants.HF_HOME) / "mlfusion" / "indexes" / str(info.sha)
        text = None
        if tars.CLASS_NAMES in names:
            with opened(base + tars.CLASS_NAMES, whole=True) as file:
                text = file.read().decode("utf-8")
        return _of(names, base, tars.class_names(text), reading, kept, source)


def in_place(root: Path, reading: Reading) -> tuple[str, dict[str, Found]]:
    """The same of a folder: Parquet files are read group by group, without the datasets library's copy."""
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.parquet")]
    return _of(names, f"{root}/", None, reading, None, str(root))


def _of(
    names: Sequence[str], base: str, classes: tuple[str, ...] | None, reading: Reading, kept: Path | None, where: str
) -> tuple[str, dict[str, Found]]:
    if found := tars.split_of([name for name in names if name.endswith(".tar")]):
        with track(f"looking through {where}", sum(map(len, found.values())), "files") as bar:

            def looked(path: str, columns: tars.Columns) -> tars.Index:
                return _kept(kept, path, columns.key, bar) or _keep(kept, path, columns.key, _tar(path, columns), bar)

            return "WebDataset tars, read in place", {
                split: tars.joined(split, [base + name for name in some], classes, reading, looked, Ranges)
                for split, some in found.items()
            }
    if found := _parquet_splits([name for name in names if name.endswith(".parquet")]):
        with track(f"looking through {where}", sum(map(len, found.values())), "files") as bar:
            return "Parquet files, read in place", {
                split: _table(split, [base + name for name in some], reading, kept, bar)
                for split, some in found.items()
            }
    raise BadData(f"{where} holds neither tars nor Parquet files; leave --stream out, so that it is downloaded")


def _tar(path: str, columns: tars.Columns) -> tars.Index:
    try:
        with opened(path, whole=True) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            return tars.index(tars.samples(tar, hashed=True), path, columns)
    except (tarfile.TarError, EOFError) as err:
        raise BadData(f"{path} cannot be read as a tar: {err}") from err


def _parquet_splits(names: Sequence[str]) -> dict[str, list[str]]:
    """By the word of a split in a path, as the hub has it: data/train-00000-of-00002.parquet, train/0000.parquet."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        words = name.replace("-", "/").replace("_", "/").replace(".", "/").split("/")
        found.setdefault(next((split for split in SPLITS if split in words), ""), []).append(name)
    if set(found) == {""}:
        return {"train": found[""]}
    return {split: found[split] for split in SPLITS if split in found}


def _table(split: str, paths: list[str], reading: Reading, kept: Path | None, bar: Bar) -> Found:
    import datasets as library

    schema = _parquet(paths[0]).schema_arrow
    columns = chosen(library.Features.from_arrow_schema(schema), reading, f"{paths[0]}")
    key = json.dumps([columns.image, columns.label, columns.id])
    parts = [_kept(kept, path, key, bar) or _keep(kept, path, key, _rows(path, columns), bar) for path in paths]
    count = sum(len(part.labels) for part in parts)
    files = np.repeat(np.arange(len(parts)), [len(part.labels) for part in parts])
    keys = [key for part in parts for key in part.keys]
    return Found(
        ids=unique(keys, paths[0]) if columns.id else tuple(f"{split}/{row}" for row in range(count)),
        labels=[label for part in parts for label in part.labels],
        encoded=Groups(
            tuple(paths), np.column_stack([files, np.concatenate([part.where for part in parts])]), columns.image
        ),
        decode=reading.decoder,
        names=columns.names,
        digests=np.concatenate([part.digests for part in parts if part.digests is not None]),
    )


def _rows(path: str, columns: Chosen) -> tars.Index:
    """What one Parquet file holds."""
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
    hashes = np.frombuffer(bytes(digests), np.uint8).reshape(-1, 16)
    return tars.Index(keys, labels, np.array(where, np.int64).reshape(-1, 2), hashes)


# --- indexes on disk -------------------------------------------------------------------------------------------------


def _place(folder: Path, path: str, key: str) -> Path:
    return folder / f"{xxhash.xxh3_128_hexdigest(json.dumps([VERSION, path, key]).encode())}.npz"


def _kept(folder: Path | None, path: str, key: str, bar: Bar) -> tars.Index | None:
    """A file's index from an earlier pass."""
    if folder is None or not (place := _place(folder, path, key)).is_file():
        return None
    with np.load(place, allow_pickle=False) as held:
        keys, labels = json.loads(held["text"].tobytes())
        found = tars.Index(keys, labels, held["where"], held["digests"])
    bar.advance()
    return found


def _keep(folder: Path | None, path: str, key: str, index: tars.Index, bar: Bar) -> tars.Index:
    """Keep it for later ones."""
    bar.advance()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        disk.sweep(folder)
        text = np.frombuffer(json.dumps([index.keys, index.labels]).encode(), np.uint8)
        assert index.digests is not None
        np.savez(file := io.BytesIO(), text=text, where=index.where, digests=index.digests)
        with disk.atomic(_place(folder, path, key)) as draft:
            draft.write_bytes(file.getvalue())
    return index
