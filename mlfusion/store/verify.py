"""Finds what is damaged in the cache, byte by byte, and moves it out of the way so that an extraction makes only that again.

Every file is covered: the records and samples by their digests, a shard by the xxh3-128 of the whole file, so that bytes
which no read would touch (padding, Zarr's index, HDF5's structures) count as well, and then chunk by chunk by both of its
checksums, those that our reader compares and those of Zarr's codec. Nothing is deleted: what is taken out lies in
`quarantine/` under the cache's root.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mlfusion.errors import MlfusionError
from mlfusion.specs.names import layer_ranges
from mlfusion.store import records
from mlfusion.store.entry import TOKENS, Entry, zarr_group
from mlfusion.store.feature_store import QUARANTINE, CachePath, FeatureStore
from mlfusion.store.formats import FORMATS, crc, xxh
from mlfusion.store.manifest import CommitRecord, StreamManifest
from mlfusion.store.records import Names, RunRecord
from mlfusion.store.samples import FILES
from mlfusion.store.shard import Source
from mlfusion.store.stream import Stream
from mlfusion.system import disk
from mlfusion.system.progress import track

READ_BYTES = 1 << 24  # read at a time


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not what it should be."""

    path: Path
    why: str
    take: tuple[Path, ...]  # what a repair moves to quarantine: an extraction, or the repair itself, makes it again
    remade: bool = False  # made again by the repair, from what is sound; else by the next extraction

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache verify --json` prints."""
        return {"path": str(self.path), "why": self.why, "remade_by": "repair" if self.remade else "extract"}


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found."""

    entries: int
    damaged: tuple[Damage, ...]
    quarantined: tuple[Path, ...]  # where a repair moved damaged files to

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache verify --json` prints."""
        return {
            "entries": self.entries,
            "damaged": [one.to_json() for one in self.damaged],
            "quarantined": [str(path) for path in self.quarantined],
        }


def verify(cache: CachePath = None, *, repair: bool = False) -> Verification:
    """Read every byte of a cache, in all its layers, and compare it with its checksum.

    Args:
        cache: its root, or layers of them; default $MLFUSION_CACHE, or ./cache.
        repair: move what is damaged in the uppermost layer to quarantine; the next extraction makes it again.

    Raises:
        CacheUnusable: the cache cannot be opened, or not be written for a repair.
    """
    store = FeatureStore(cache)
    damaged: list[Damage] = []
    moved: list[Path] = []
    folders = [(layer, path) for layer in (store, *store.below) for path in _entry_folders(layer.folder)]
    with track("verifying", len(folders), "entries") as bar:
        for layer, path in folders:
            found = list(verify_entry(path))
            damaged += found
            if repair and found and layer is store:
                moved += repair_entry(store.root, path, found)
            bar.advance()
    return Verification(entries=len(folders), damaged=tuple(damaged), quarantined=tuple(moved))


def _entry_folders(folder: Path) -> list[Path]:
    """Folders of all entries, also of those with a damaged or missing record."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(disk.DRAFT))


def verify_entry(folder: Path) -> Iterator[Damage]:
    """Everything damaged in one entry's folder; what was begun and is not finished is no damage."""
    try:
        entry = Entry(folder)
    except MlfusionError as err:
        yield Damage(path=folder / "entry.json", why=str(err), take=(folder / "entry.json",))
        entry = None
    for kind, name in ((Names, "names"), (RunRecord, "runs")):
        for path in _files(folder / name):
            with suppress(FileNotFoundError):
                try:
                    records.read(path, kind)
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
        yield Damage(path=folder, why=str(err), take=tuple(folder / name for name in FILES))
        return  # what a shard's rows should be is not known without them
    group = folder / TOKENS / "zarr.json"
    if _text(group) != zarr_group(entry.key):
        yield Damage(path=group, why="it is not what describes this group", take=(group,), remade=True)
    for path in sorted((folder / TOKENS).iterdir()):
        if path.is_dir() and not path.name.startswith(disk.DRAFT):
            yield from _verify_stream(entry, path)


def _verify_stream(entry: Entry, folder: Path) -> Iterator[Damage]:
    described, sealed = folder / "stream.json", folder / "manifest.json"
    try:
        stream = records.read(described, Stream)
    except (MlfusionError, OSError) as err:
        try:
            stream = records.read(sealed, StreamManifest).stream
        except (MlfusionError, OSError):
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
    manifest: StreamManifest | None = None
    try:
        manifest = entry.manifest(stream)
    except FileNotFoundError:
        pass
    except (MlfusionError, OSError) as err:
        yield Damage(path=sealed, why=str(err), take=(sealed,), remade=True)
    commits: list[CommitRecord] = []
    yield from _verify_shards(entry, stream, manifest, commits)
    if manifest is not None and len(commits) == stream.shards and StreamManifest.join(stream, commits) != manifest:
        yield Damage(path=sealed, why="it does not match the shards' records", take=(sealed,), remade=True)


def _verify_shards(
    entry: Entry, stream: Stream, manifest: StreamManifest | None, commits: list[CommitRecord]
) -> Iterator[Damage]:
    """Damage of the shards of a stream; the records that can be read are appended to `commits`."""
    folder = entry.folder(stream)
    sealed = folder / "manifest.json"
    missing = set(entry.missing_shards(stream))
    for shard in range(stream.shards):
        place = folder / "c" / str(shard)
        if shard in missing:
            if manifest is not None:
                yield Damage(path=place, why="the shard is not there", take=(sealed,))
            continue
        try:
            record = entry.record(stream, shard)
        except (MlfusionError, OSError) as err:
            yield Damage(path=place / "commit.json", why=str(err), take=(place, sealed))
            continue
        commits.append(record)
        if why := _wrong(Source(folder, stream, record), shard):
            yield Damage(path=place, why=why, take=(place, sealed))


def _wrong(source: Source, shard: int) -> str:
    """What is wrong with a shard's file, by its own record; '' if nothing is."""
    record, stream = source.manifest, source.stream
    digest = xxhash.xxh3_128()
    rows = [range(block.start, block.stop) for block in stream.blocks(shard)]
    if record.chunks != (len(rows), len(stream.layers), len(stream.kinds)) or len(record.sizes) != 1:
        return "its record is another stream's"
    checksums = ((crc, record.crc32c), (xxh, record.xxh3))
    layers: dict[range, set[int]] = {}
    try:
        with open(source.path(shard), "rb") as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
            size = file.tell()
            if size != record.sizes[0]:
                return f"{size:,} bytes instead of {record.sizes[0]:,}"
            if len(stream.rows(shard)) * stream.row_bytes > size:
                return "it is another stream's"
            for (block, some), (layer, kind) in product(enumerate(rows), np.ndindex(record.chunks[1:])):
                file.seek(int(record.offsets[block, layer, kind]))
                data = file.read(len(some) * stream.row_bytes)
                if any(checksum(data) != table[block, layer, kind] for checksum, table in checksums):
                    layers.setdefault(some, set()).add(stream.layers[layer])
    except OSError as err:
        return f"it cannot be read ({err.strerror})"
    if layers:
        parts = (f"layers {layer_ranges(some)} of rows {rows.start}-{rows.stop - 1}" for rows, some in layers.items())
        return "wrong bytes: " + "; ".join(parts)
    return "" if digest.hexdigest() == record.digests[0] else "wrong bytes: beside the tokens (index or padding)"


def repair_entry(root: Path, folder: Path, found: list[Damage]) -> list[Path]:
    """Move what is damaged to quarantine and make again what follows from the rest; returns where things went.

    Raises:
        CacheUnusable: the cache cannot be written.
    """
    with disk.translate_os_errors(root):
        moved = []
        restored: dict[Path, str] = {}
        for damage in found:
            if damage.remade and damage.path.name == "stream.json":
                stream = records.read(damage.path.parent / "manifest.json", StreamManifest).stream
                restored[damage.path] = records.encode(stream)
        for path in dict.fromkeys(path for damage in found for path in damage.take):
            if not path.exists():
                continue
            aside = root / QUARANTINE / f"{uuid.uuid4().hex[:8]}" / path.relative_to(folder.parent)
            aside.parent.mkdir(parents=True)
            os.rename(path, aside)
            moved.append(aside)
        for path, text in restored.items():
            _restore(path, text)
        if (folder / "entry.json").exists() and all((folder / name).exists() for name in FILES):
            entry = Entry(folder)
            _restore(folder / TOKENS / "zarr.json", zarr_group(entry.key))
            for stream in entry.streams():
                for name, text in FORMATS[stream.format].describe(stream).items():
                    _restore(entry.folder(stream) / name, text)
            entry.seal()
        return moved


def _restore(path: Path, text: str) -> None:
    if not path.exists():
        disk.publish_text(path, text)


def _files(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return sorted(path for path in folder.iterdir() if not path.name.startswith(disk.DRAFT))
    return []


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
