"""Finds what is damaged in the cache, byte by byte, and moves it out of the way so that an extraction makes only that again.

Every file is covered: the records and samples by their digests, a shard by the xxh3-128 of the whole file, so that bytes
which no read would touch (padding, Zarr's index, HDF5's structures) count as well, and then chunk by chunk by both of its
checksums, those that a read of ours compares and those of Zarr's codec. Nothing is deleted: what is taken out
lies in `quarantine/` under the cache's root.
"""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mlfusion import disk
from mlfusion.errors import MlfusionError
from mlfusion.specs import FORMAT, layer_ranges
from mlfusion.store.entry import SAMPLES, TOKENS, Entry
from mlfusion.store.formats import FORMATS, crc, xxh
from mlfusion.store.manifest import Manifest
from mlfusion.store.reader import Source
from mlfusion.store.stream import Stream

QUARANTINE = "quarantine"
PIECE = 1 << 24  # bytes read at once


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not what it should be."""

    path: Path
    why: str
    take: tuple[Path, ...]  # what a repair moves to quarantine: an extraction, or the repair itself, makes it again
    remade: bool = False  # by the repair, from what is sound; else by the next extraction

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache verify --json` prints."""
        return {"path": str(self.path), "why": self.why, "remade_by": "repair" if self.remade else "extract"}


def verify(root: Path, folder: Path, *, read: Callable[[int], None] = lambda _: None) -> Iterator[Damage]:
    """Everything damaged in one entry's folder; what was begun and is not finished is no damage.

    Args:
        root: of the cache.
        folder: of the entry.
        read: told of every file's bytes as they are read.
    """
    try:
        entry = Entry(folder)
    except MlfusionError as err:
        yield Damage(path=folder / "entry.json", why=str(err), take=(folder / "entry.json",))
        entry = None
    for path in (*_files(folder / "names"), *_files(folder / "runs")):
        with suppress(FileNotFoundError):
            try:
                disk.read_json(path)
            except MlfusionError as err:
                yield Damage(path=path, why=str(err), take=(path,))
    if entry is None:
        return
    try:
        for name, data in entry.samples.files().items():  # reading them compares them with the key
            if (folder / name).read_bytes() != data:
                yield Damage(path=folder / name, why="it is not as it was written", take=(folder / name,))
    except MlfusionError as err:
        # Which of the three is wrong cannot be told, and they are small.
        yield Damage(path=folder, why=str(err), take=tuple(folder / name for name in SAMPLES))
        return  # what a shard's rows should be is not known without them
    group = folder / TOKENS / "zarr.json"
    if _text(group) != Entry.group(entry.key):
        yield Damage(path=group, why="it is not what describes this group", take=(group,), remade=True)
    for path in sorted((folder / TOKENS).iterdir()):
        if path.is_dir() and not path.name.startswith(disk.DRAFT):
            yield from _verify_stream(entry, path, read)


def _verify_stream(entry: Entry, folder: Path, read: Callable[[int], None]) -> Iterator[Damage]:
    manifest: Manifest | None = None
    sealed = folder / "manifest.json"
    described = folder / "stream.json"
    try:
        stream = Stream.from_json(disk.read_json(described))
    except (MlfusionError, OSError, ValueError, TypeError) as err:
        try:
            stream = Stream.from_json(disk.read_json(sealed)["stream"])
        except (MlfusionError, OSError, ValueError, TypeError, KeyError):
            yield Damage(path=described, why=str(err), take=(folder,))
            return
        yield Damage(path=described, why=str(err), take=(described,), remade=True)
    if stream.name != folder.name:
        yield Damage(path=described, why="it is another stream's", take=(folder,))
        return
    for name, text in FORMATS[stream.format].describe(stream).items():
        if _text(folder / name) != text:
            yield Damage(
                path=folder / name, why="it is not what describes this stream", take=(folder / name,), remade=True
            )
    try:
        body = disk.read_json(sealed)
        manifest = Manifest.from_json(body)
        if Stream.from_json(body["stream"]) != stream or not manifest.fits(stream):
            raise ValueError("it is another stream's")
    except FileNotFoundError:
        pass
    except (MlfusionError, OSError, ValueError, TypeError, KeyError) as err:
        manifest = None
        yield Damage(path=sealed, why=str(err), take=(sealed,), remade=True)
    missing = set(entry.missing_shards(stream))
    records = []
    for shard in range(stream.shards):
        place = folder / "c" / str(shard)
        if shard in missing:
            if manifest is not None:
                yield Damage(path=place, why="the shard is not there", take=(sealed,))
            continue
        try:
            record = entry.record(stream, shard)
        except (MlfusionError, OSError, ValueError, TypeError, KeyError) as err:
            yield Damage(path=place / "commit.json", why=str(err), take=(place, sealed))
            continue
        records.append(record)
        if why := _wrong(Source(folder, stream, record), shard, read):
            yield Damage(path=place, why=why, take=(place, sealed))
    if manifest is not None and len(records) == stream.shards and not Manifest.join(records).matches(manifest):
        yield Damage(path=sealed, why="it does not match the shards' records", take=(sealed,), remade=True)


def _wrong(source: Source, shard: int, read: Callable[[int], None]) -> str:
    """What is wrong with a shard's file, by its own record; '' if nothing is."""
    record, stream = source.manifest, source.stream
    digest, sums = xxhash.xxh3_128(), [(crc, record.crc32c)]
    if record.xxh3 is not None:
        sums.append((xxh, record.xxh3))
    layers: dict[range, set[int]] = {}
    try:
        with open(source.path(shard), "rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                read(len(piece))
            size = file.tell()
            if size != record.sizes[0]:
                return f"{size:,} bytes instead of {record.sizes[0]:,}"
            if len(stream.rows(shard)) * stream.row_bytes > size:
                return "it is another stream's"
            for (block, rows), (layer, kind) in product(
                enumerate(stream.blocks(shard)), np.ndindex(record.offsets.shape[1:])
            ):
                file.seek(int(record.offsets[block, layer, kind]))
                data = file.read(len(rows) * stream.row_bytes)
                if any(sum(data) != table[block, layer, kind] for sum, table in sums):
                    layers.setdefault(rows, set()).add(stream.layers[layer])
    except OSError as err:
        return f"it cannot be read ({err.strerror})"
    if layers:
        parts = (f"layers {layer_ranges(some)} of rows {rows.start}-{rows.stop - 1}" for rows, some in layers.items())
        return "wrong bytes: " + "; ".join(parts)
    return "" if digest.hexdigest() == record.digests[0] else "wrong bytes: beside the tokens (index or padding)"


def repair(root: Path, folder: Path, found: list[Damage]) -> list[Path]:
    """Move what is damaged to quarantine and make again what follows from the rest; returns where things went.

    Raises:
        CacheUnusable: the cache cannot be written.
    """
    with disk.told(root):
        moved = []
        restored: dict[Path, str] = {}
        for damage in found:
            if damage.remade and damage.path.name == "stream.json":
                stream = Stream.from_json(disk.read_json(damage.path.parent / "manifest.json")["stream"])
                restored[damage.path] = disk.sealed(stream.to_json())
        for path in dict.fromkeys(path for damage in found for path in damage.take):
            if not path.exists():
                continue
            aside = root / QUARANTINE / f"{uuid.uuid4().hex[:8]}" / path.relative_to(folder.parent)
            aside.parent.mkdir(parents=True)
            os.rename(path, aside)
            moved.append(aside)
        for path, text in restored.items():
            _put(path, text)
        if (folder / "entry.json").exists() and all((folder / name).exists() for name in SAMPLES):
            entry = Entry(folder)
            _put(folder / TOKENS / "zarr.json", Entry.group(entry.key))
            for stream in entry.streams():
                for name, text in FORMATS[stream.format].describe(stream).items():
                    _put(entry.folder(stream) / name, text)
            entry.seal()
        return moved


def folders(root: Path) -> list[Path]:
    """Of all entries, those with a damaged or missing record too."""
    place = root / f"v{FORMAT}"
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith(disk.DRAFT))


def _put(path: Path, text: str) -> None:
    if not path.exists():
        draft = disk.draft_name(path.parent)
        disk.write(draft, text)
        disk.publish_file(draft, path)


def _files(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return sorted(path for path in folder.iterdir() if not path.name.startswith(disk.DRAFT))
    return []


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
