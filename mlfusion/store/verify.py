"""Finds damage in the cache, byte by byte, and moves damaged files away, so that the next extraction replaces only these.

Every file is checked: records and samples by their digests; a shard by the xxh3-128 of the whole file, which covers bytes that
no reader uses (padding, Zarr's index, HDF5's structures), and chunk by chunk by both checksums, our reader's and that of
Zarr's codec. Nothing is deleted: damaged files are moved to `quarantine/` under the cache's root.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import xxhash

from mlfusion.errors import MlfusionError
from mlfusion.specs.names import layer_ranges
from mlfusion.store import records
from mlfusion.store.entry import GROUP, TOKENS, Entry, zarr_group
from mlfusion.store.feature_store import QUARANTINE, CachePath, FeatureStore
from mlfusion.store.formats import FORMATS
from mlfusion.store.records import FILES, Names, RunRecord
from mlfusion.store.shard import Source
from mlfusion.store.stream import CommitRecord, Stream, StreamManifest
from mlfusion.system import disk
from mlfusion.system.progress import track


@dataclass(frozen=True)
class Damage:
    """One damaged file or folder."""

    path: Path
    why: str
    quarantine: tuple[Path, ...]  # paths that a repair moves to quarantine
    repairable: bool = False  # whether the repair restores it from undamaged files; else the next extraction does


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of `verify`."""

    entries: int
    damaged: tuple[Damage, ...]
    quarantined: tuple[Path, ...]  # new paths of damaged files that a repair moved

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache verify --json` prints."""
        damaged = [
            {"path": str(damage.path), "why": damage.why, "remade_by": "repair" if damage.repairable else "extract"}
            for damage in self.damaged
        ]
        return {"entries": self.entries, "damaged": damaged, "quarantined": list(map(str, self.quarantined))}


def verify(cache: CachePath = None, *, repair: bool = False) -> Verification:
    """Read every byte of a cache, in all its layers, and compare it with its checksum.

    `repair` moves damaged files of the uppermost layer to quarantine; the next extraction replaces them. CacheUnusable if the
    cache cannot be opened, or cannot be written for a repair.
    """
    store = FeatureStore(cache)
    damaged: list[Damage] = []
    moved: list[Path] = []
    layers = (store, *store.lower)
    folders = [(layer, path) for layer in layers for path in disk.published(layer.folder) if path.is_dir()]
    with track("verifying", len(folders), "entries") as bar:
        for layer, path in folders:
            found = list(verify_entry(path))
            damaged += found
            if repair and found and layer is store:
                moved += repair_entry(store.root, path, found)
            bar.advance()
    return Verification(entries=len(folders), damaged=tuple(damaged), quarantined=tuple(moved))


def verify_entry(folder: Path) -> Iterator[Damage]:
    """All damage in one entry's folder; an incomplete stream is no damage."""
    try:
        entry = Entry(folder)
    except MlfusionError as err:
        yield Damage(folder / "entry.json", str(err), (folder / "entry.json",))
        entry = None
    for kind, name in ((Names, "names"), (RunRecord, "runs")):
        for path in disk.published(folder / name):
            with suppress(FileNotFoundError):
                try:
                    records.read(path, kind)
                except MlfusionError as err:
                    yield Damage(path, str(err), (path,))
    if entry is None:
        return
    try:
        for name, data in entry.samples.files().items():  # reading them compares them with the key
            if (folder / name).read_bytes() != data:
                yield Damage(folder / name, "it is not as it was written", (folder / name,))
    except MlfusionError as err:
        # It is not known which of the three files is wrong, and they are small.
        yield Damage(folder, str(err), tuple(folder / name for name in FILES))
        return  # without them the rows of a shard cannot be checked
    group = folder / GROUP
    if not _has_text(group, zarr_group(entry.key)):
        yield Damage(group, "it is not what describes this group", (group,), repairable=True)
    for path in disk.published(folder / TOKENS):
        if path.is_dir():
            yield from _verify_stream(entry, path)


def _verify_stream(entry: Entry, folder: Path) -> Iterator[Damage]:
    stream_path, manifest_path = folder / "stream.json", folder / "manifest.json"
    try:
        stream = records.read(stream_path, Stream)
    except (MlfusionError, OSError) as err:
        try:
            stream = records.read(manifest_path, StreamManifest).stream
        except (MlfusionError, OSError):
            yield Damage(stream_path, str(err), (folder,))
            return
        yield Damage(stream_path, str(err), (stream_path,), repairable=True)
    if stream.name != folder.name:
        yield Damage(stream_path, "it is another stream's", (folder,))
        return
    for name, text in FORMATS[stream.format].describe(stream).items():
        if not _has_text(folder / name, text):
            yield Damage(folder / name, "it is not what describes this stream", (folder / name,), repairable=True)
    yield from _verify_shards(entry, stream, folder)


def _verify_shards(entry: Entry, stream: Stream, folder: Path) -> Iterator[Damage]:
    manifest_path = folder / "manifest.json"
    manifest: StreamManifest | None = None
    try:
        manifest = entry.manifest(stream)
    except FileNotFoundError:
        pass
    except (MlfusionError, OSError) as err:
        yield Damage(manifest_path, str(err), (manifest_path,), repairable=True)
    commits: list[CommitRecord] = []
    missing = set(entry.missing_shards(stream))
    for shard in range(stream.shards):
        shard_folder = folder / "c" / str(shard)
        if shard in missing:
            if manifest is not None:
                yield Damage(shard_folder, "the shard is not there", (manifest_path,))
            continue
        try:
            commits.append(entry.record(stream, shard))
        except (MlfusionError, OSError) as err:
            yield Damage(shard_folder / "commit.json", str(err), (shard_folder, manifest_path))
            continue
        if why := _shard_damage(Source(folder, stream, commits[-1]), shard):
            yield Damage(shard_folder, why, (shard_folder, manifest_path))
    if manifest is not None and len(commits) == stream.shards and StreamManifest.join(stream, commits) != manifest:
        yield Damage(manifest_path, "it does not match the shards' records", (manifest_path,), repairable=True)


def _shard_damage(source: Source, shard: int) -> str:
    """How a shard's file differs from its record, in words; '' if it does not."""
    record, stream = source.manifest, source.stream
    images = stream.rows(shard)
    rows = [images[at : at + stream.chunk_rows] for at in range(0, len(images), stream.chunk_rows)]  # chunk by chunk
    if record.chunks != (len(rows), len(stream.layers), len(stream.kinds)) or len(record.sizes) != 1:
        return "its record is another stream's"
    checksums = ((crc32c.crc32c, record.table("crc32c")), (xxhash.xxh3_64_intdigest, record.table("xxh3_64")))
    offsets = record.table("offsets")
    layers: dict[range, set[int]] = {}
    try:
        with open(source.path(shard), "rb") as file:
            digest = hashlib.file_digest(file, xxhash.xxh3_128)
            size = file.tell()
            if size != record.sizes[0]:
                return f"{size:,} bytes instead of {record.sizes[0]:,}"
            if len(images) * stream.row_bytes > size:
                return "it is another stream's"
            for (block, part), (layer, kind) in product(enumerate(rows), np.ndindex(record.chunks[1:])):
                file.seek(int(offsets[block, layer, kind]))
                data = file.read(len(part) * stream.row_bytes)
                if any(checksum(data) != table[block, layer, kind] for checksum, table in checksums):
                    layers.setdefault(part, set()).add(stream.layers[layer])
    except OSError as err:
        return f"it cannot be read ({err.strerror})"
    if layers:
        parts = (f"layers {layer_ranges(part)} of rows {rows.start}-{rows.stop - 1}" for rows, part in layers.items())
        return "wrong bytes: " + "; ".join(parts)
    return "" if digest.hexdigest() == record.digests[0] else "wrong bytes: beside the tokens (index or padding)"


def repair_entry(root: Path, folder: Path, found: list[Damage]) -> list[Path]:
    """Move damaged files to quarantine and restore the repairable ones; returns the new paths of what was moved."""
    with disk.translate_os_errors(root):
        moved = []
        restored: dict[Path, str] = {}
        for damage in found:
            if damage.repairable and damage.path.name == "stream.json":
                stream = records.read(damage.path.parent / "manifest.json", StreamManifest).stream
                restored[damage.path] = records.encode(stream)
        for path in dict.fromkeys(path for damage in found for path in damage.quarantine):
            if path.exists():
                moved.append(root / QUARANTINE / uuid.uuid4().hex[:8] / path.relative_to(folder.parent))
                moved[-1].parent.mkdir(parents=True)
                os.rename(path, moved[-1])
        for path, text in restored.items():
            disk.publish_text(path, text)
        if (folder / "entry.json").exists() and all((folder / name).exists() for name in FILES):
            entry = Entry(folder)
            disk.publish_text(folder / GROUP, zarr_group(entry.key))
            for stream in entry.streams():
                for name, text in FORMATS[stream.format].describe(stream).items():
                    disk.publish_text(entry.folder(stream) / name, text)
            entry.seal()
        return moved


def _has_text(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False
