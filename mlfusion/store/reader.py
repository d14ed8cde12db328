"""Reads tokens out of shards: all of them, a layer, a kind, random rows, or rows in a shuffled order, and nothing else.

Shards are mapped into memory, and a chunk holds one layer and one kind of a run of images, so what was not asked for
stays on the disk. A chunk's checksum is compared with the manifest's when it is first touched. A reader works in
threads, and after fork or spawn: each process maps the files for itself.
"""

import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from mlfusion.errors import CacheUnusable, NotCached
from mlfusion.store.claims import Pin
from mlfusion.store.formats import FORMATS, checksum
from mlfusion.store.manifest import Manifest
from mlfusion.store.stream import Stream

Check = Literal["once", "always", "never"]

OPEN_SHARDS = 256  # mapped at once; each takes one of the process's file descriptors
BUFFER = 8  # shards that a shuffled order mixes
THREADS = 4
SMALL = 1 << 24  # bytes below which threads are not worth starting


@dataclass(frozen=True, eq=False)
class Source:
    """A whole stream of one entry, as a reader needs it."""

    folder: Path  # of the stream
    stream: Stream
    manifest: Manifest

    def file(self, shard: int) -> str:
        """The file of a shard, inside the folder."""
        return f"c/{shard}/{FORMATS[self.stream.format].file}"

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / self.file(shard)


class Shard:
    """One file, mapped."""

    def __init__(self, source: Source, shard: int, descriptor: int) -> None:
        self._stream, self._path = source.stream, source.path(shard)
        rows = source.stream.rows(shard)
        first = shard * source.stream.shard_blocks
        blocks = slice(first, first + -(-len(rows) // source.stream.chunk_rows))
        self._offsets = source.manifest.offsets[blocks]
        self._checksums = source.manifest.checksums[blocks]
        self._rows = len(rows)
        if os.fstat(descriptor).st_size != source.manifest.sizes[shard]:
            raise damaged(self._path, "its size is not the manifest's")
        self._row_bytes = self._stream.tokens * self._stream.columns * self._stream.encoding.stored.itemsize
        held = np.minimum(self._rows - np.arange(len(self._offsets)) * self._stream.chunk_rows, self._stream.chunk_rows)
        last = source.manifest.sizes[shard] - held * self._row_bytes  # where a chunk may begin at the latest
        if (last < 0).any() or (self._offsets > last.astype(np.uint64)[:, None, None]).any():
            raise damaged(self._path, "a chunk would lie beyond its end")
        self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.touched = np.zeros(self._offsets.shape, bool)  # chunks that were asked of the disk, and checked

    def chunk(self, block: int, layer: int, kind: int, check: Check) -> np.ndarray:
        """[rows, tokens, columns] as stored, without a copy."""
        rows = min(self._stream.chunk_rows, self._rows - block * self._stream.chunk_rows)
        start = int(self._offsets[block, layer, kind])
        data = self._bytes[start : start + rows * self._row_bytes]
        if check == "always" or (check == "once" and not self.touched[block, layer, kind]):
            if len(data) != rows * self._row_bytes or checksum(data) != self._checksums[block, layer, kind]:
                raise damaged(self._path, f"the checksum of chunk {block}, layer {self._stream.layers[layer]} is wrong")
            self.touched[block, layer, kind] = True
        return data.view(self._stream.encoding.stored).reshape(rows, self._stream.tokens, self._stream.columns)

    def fetch(self, block: int, layer: int, kind: int) -> None:
        """Ask the disk for a chunk that is about to be read: page by page, on first use, it would come ten times slower."""
        if hasattr(mmap, "MADV_WILLNEED") and not self.touched[block, layer, kind]:
            start = int(self._offsets[block, layer, kind])
            page = start - start % mmap.PAGESIZE
            length = min(start + self._stream.chunk_rows * self._row_bytes, len(self._bytes)) - page
            self._map.madvise(mmap.MADV_WILLNEED, page, length)


@dataclass(frozen=True)
class Part:
    """Where the planes of one source go in the result."""

    source: Source
    planes: tuple[tuple[int, slice, int, int], ...]  # result's layer and tokens; source's layer and kind


class TokenReader:
    """Tokens of one entry: some layers, some kinds. Made by `Entry.open`; close it, or use it in a `with`.

    with entry.open([6, 12], ["cls", "ap"]) as tokens:
        tokens.shape                    # (images, 2 layers, 2 tokens, width)
        tokens[np.array([5, 3, 900])]   # these images, in this order
        for rows in np.array_split(tokens.order(seed=0), steps):
            tokens[rows]                # a shuffled batch, read from few shards
    """

    _OWN = ("_shards", "_lock", "_pins", "_folders")  # of this process

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        layers: int,
        tokens: int,
        width: int,
        images: int,
        skipped: Sequence[int],
        check: Check,
    ) -> None:
        self._parts, self._check = tuple(parts), check
        self._rows = np.setdiff1d(np.arange(images), np.asarray(skipped, np.int64)) if len(skipped) else None
        self._images = images
        self.shape = (images - len(skipped), layers, tokens, width)
        self.dtype = parts[0].source.stream.encoding.numbers
        self._begin()

    def _begin(self) -> None:
        self._shards: OrderedDict[tuple[Path, int], Shard] = OrderedDict()
        self._lock = threading.Lock()
        folders = list(dict.fromkeys(part.source.folder for part in self._parts))
        self._pins = [Pin(folder) for folder in dict.fromkeys(folder.parent.parent / "pins" for folder in folders)]
        # Files are opened from here on relative to the folder itself: a prune that moves it away takes nothing from us.
        self._folders: dict[Path, int] = {}
        for folder in folders:
            for last in (False, False, True):
                try:
                    self._folders[folder] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                    break
                except FileNotFoundError as err:
                    if last:
                        self.close()
                        raise NotCached(_gone(folder)) from err
                    time.sleep(0.1)  # a prune that sees our mark puts it back

    # --- the five ways to read --------------------------------------------------------------------------------------

    def read(self) -> np.ndarray:
        """Everything: [images, layers, tokens, width] in `dtype`."""
        out = self._empty(self._images)
        jobs = [(part, shard) for part in self._parts for shard in range(part.source.stream.shards)]

        def copy(job: int) -> None:
            for ahead in jobs[job : job + 2]:
                self._fetch_shard(*ahead)
            part, number = jobs[job]
            stream = part.source.stream
            shard = self._shard(part.source, number)
            for block in range(-(-len(stream.rows(number)) // stream.chunk_rows)):
                first = number * stream.shard_rows + block * stream.chunk_rows
                for layer, span, source_layer, kind in part.planes:
                    chunk = shard.chunk(block, source_layer, kind, self._check)
                    target = out[first : first + len(chunk), layer, span, : stream.width]
                    target[...] = chunk if stream.encoding.plain else stream.encoding.decode(chunk)

        if out.nbytes < SMALL:
            for job in range(len(jobs)):
                copy(job)
        else:
            with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
                list(pool.map(copy, range(len(jobs))))
        return out if self._rows is None else out[self._rows]

    def __len__(self) -> int:
        """How many images there are to read."""
        return self.shape[0]

    def __getitem__(self, rows: "slice | Sequence[int] | np.ndarray") -> np.ndarray:
        """Some images in the order asked for, [rows, layers, tokens, width]; an image may come twice.

        Raises:
            IndexError: there is no such image.
            CacheUnusable: a shard is damaged.
        """
        wanted = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, np.int64)
        if wanted.size and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} of {len(self)} images")
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        images = wanted if self._rows is None else self._rows[wanted]
        out = self._empty(len(images))
        for pin in self._pins:
            pin.renew()
        for part in self._parts:
            stream = part.source.stream
            blocks = images // stream.chunk_rows
            order = np.argsort(blocks, kind="stable")
            numbers, starts = np.unique(blocks[order], return_index=True)
            runs = [
                (self._shard(part.source, number // stream.shard_blocks), number % stream.shard_blocks, where)
                for number, where in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True)
            ]
            for shard, block, _ in runs:
                for _, _, layer, kind in part.planes:
                    shard.fetch(block, layer, kind)
            for shard, block, where in runs:
                inside = images[where] % stream.chunk_rows
                for layer, span, source_layer, kind in part.planes:
                    chunk = shard.chunk(block, source_layer, kind, self._check)[inside]
                    out[where, layer, span, : stream.width] = (
                        chunk if stream.encoding.plain else stream.encoding.decode(chunk)
                    )
        return out

    def order(self, seed: int, *, buffer: int = BUFFER) -> np.ndarray:
        """A permutation of the images whose consecutive ones lie in few shards: [images] int64.

        Shards are shuffled, dealt into groups of `buffer`, and the images of a group are shuffled among themselves: a
        batch reads from one group, and the next group is asked of the disk meanwhile. With no more shards than `buffer`
        it is a plain permutation. The same seed gives the same order.
        """
        random = np.random.default_rng(seed)
        size = max(part.source.stream.shard_rows for part in self._parts)
        images = np.arange(self._images) if self._rows is None else self._rows
        shard = images // size
        numbers = random.permutation(-(-self._images // size))
        group = np.empty(len(numbers), np.int64)
        group[numbers] = np.arange(len(numbers)) // buffer
        mixed = random.permutation(len(images))
        return mixed[np.argsort(group[shard[mixed]], kind="stable")]

    def batches(self, size: int, *, seed: int, buffer: int = BUFFER) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One pass in a shuffled order: (rows [b], tokens [b, layers, tokens, width]), the next ones asked of the disk."""
        order = self.order(seed, buffer=buffer)
        for start in range(0, len(order), size):
            self.fetch(order[start + size : start + 4 * size])
            yield order[start : start + size], self[order[start : start + size]]

    def fetch(self, rows: np.ndarray) -> None:
        """Ask the disk for the shards of images that will be read soon; returns at once."""
        images = rows if self._rows is None else self._rows[rows]
        for part in self._parts:
            stream = part.source.stream
            for number in np.unique(images // stream.chunk_rows).tolist():
                shard = self._shard(part.source, number // stream.shard_blocks)
                for _, _, layer, kind in part.planes:
                    shard.fetch(number % stream.shard_blocks, layer, kind)

    # --- what they stand on -----------------------------------------------------------------------------------------

    def _empty(self, images: int) -> np.ndarray:
        _, layers, tokens, width = self.shape
        narrow = any(part.source.stream.width < width for part in self._parts)
        return (np.zeros if narrow else np.empty)((images, layers, tokens, width), self.dtype)

    def _fetch_shard(self, part: Part, number: int) -> None:
        shard = self._shard(part.source, number)
        for block in range(len(shard.touched)):
            for _, _, layer, kind in part.planes:
                shard.fetch(block, layer, kind)

    def _shard(self, source: Source, number: int) -> Shard:
        key = (source.folder, number)
        with self._lock:
            shard = self._shards.get(key)
            if shard is not None:
                self._shards.move_to_end(key)
                return shard
        path = source.path(number)
        try:
            descriptor = os.open(source.file(number), os.O_RDONLY, dir_fd=self._folders[source.folder])
        except FileNotFoundError as err:
            raise NotCached(_gone(path)) from err
        except OSError as err:
            raise CacheUnusable(f"{path} cannot be read ({err.strerror}); look at its permissions") from err
        try:
            shard = Shard(source, number, descriptor)
        except ValueError as err:  # nothing can be mapped of an empty file
            raise damaged(path, str(err)) from err
        finally:
            os.close(descriptor)
        with self._lock:
            shard = self._shards.setdefault(key, shard)
            while len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)  # its map goes with the last view of it
        return shard

    def close(self) -> None:
        """Let go of the files; the reader must not be used after."""
        self._shards.clear()
        while self._folders:
            os.close(self._folders.popitem()[1])
        for pin in self._pins:
            pin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "_folders" in vars(self):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to open the same shards for itself."""
        return {name: value for name, value in vars(self).items() if name not in self._OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()


def stored(source: Source, rows: range) -> np.ndarray:
    """Rows of one shard as they are kept, [rows, layers, kinds x tokens, columns]; every chunk is checked.

    Raises:
        CacheUnusable: a chunk is damaged.
    """
    stream = source.stream
    number = rows.start // stream.shard_rows
    path = source.path(number)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as err:
        raise CacheUnusable(f"{path} cannot be read ({err.strerror}); run `mlfusion cache verify`") from err
    try:
        shard = Shard(source, number, descriptor)
    finally:
        os.close(descriptor)
    out = np.empty((len(rows), *stream.shape[1:]), stream.encoding.stored)
    first = rows.start - stream.rows(number).start
    for block in range(first // stream.chunk_rows, -(-(first + len(rows)) // stream.chunk_rows)):
        start = block * stream.chunk_rows
        for layer in range(len(stream.layers)):
            for kind in range(len(stream.kinds)):
                chunk = shard.chunk(block, layer, kind, "always")
                part = chunk[max(first - start, 0) : first + len(rows) - start]
                at = max(start - first, 0)
                out[at : at + len(part), layer, kind * stream.tokens : (kind + 1) * stream.tokens] = part
    return out


def _gone(path: Path) -> str:
    return f"{path} was removed while it was read; run the same `mlfusion extract` again"


def damaged(path: Path, why: str) -> CacheUnusable:
    """The error of a file that is not what the manifest says."""
    return CacheUnusable(
        f"{path} is damaged: {why}; run `mlfusion cache verify --repair`, then the same `mlfusion extract` again"
    )
