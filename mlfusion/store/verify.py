"""Finds damage in the cache, byte by byte, and moves damaged files away, so that the next extraction replaces only these.

Every file is checked: records and samples by their digests; a shard by the xxh3-128 of the whole file, which covers bytes that
no reader uses (padding, Zarr's index, HDF5's structures), and chunk by chunk by both checksums, our reader's and that of
Zarr's codec. Nothing is deleted: damaged files are moved to `quarantine/` under the cache's root.
"""

import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import xxhash

from mlfusion.errors import CacheUnread, MlfusionError, NotCached
from mlfusion.specs.names import layer_ranges
from mlfusion.store import records
from mlfusion.store.entry import FOLDERS, GROUP, STREAM, Entry, zarr_group
from mlfusion.store.feature_store import QUARANTINE, TRASH, CachePath, FeatureStore
from mlfusion.store.formats import FORMATS
from mlfusion.store.records import (
    FILES,
    GROUPS_FILE,
    MANIFEST_BYTES,
    Groups,
    Names,
    RunRecord,
    groups_file,
    names_file,
    open_tree,
    unread,
)
from mlfusion.store.shard import Source
from mlfusion.store.stream import TOKENS, CommitRecord, Stream, StreamManifest
from mlfusion.system import disk
from mlfusion.system.progress import track
from mlfusion.system.tree import Tree


@dataclass(frozen=True)
class Damage:
    """One damaged file, folder or link."""

    path: Path
    why: str
    quarantine: tuple[str, ...]  # paths below the cache's root that a repair moves to quarantine
    repairable: bool = False  # whether the repair restores it from undamaged files; else the next extraction does
    unread: bool = False  # it may not be read, so that it is not known whether it is damaged; a repair leaves it


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of `verify`."""

    entries: int
    damaged: tuple[Damage, ...]
    unread: tuple[Damage, ...]  # what may not be read, which is not counted as damaged
    quarantined: tuple[Path, ...]  # new paths of damaged files that a repair moved

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache verify --json` prints."""
        damaged = [
            {"path": str(damage.path), "why": damage.why, "remade_by": "repair" if damage.repairable else "extract"}
            for damage in self.damaged
        ]
        unread = [{"path": str(damage.path), "why": damage.why} for damage in self.unread]
        quarantined = list(map(str, self.quarantined))
        return {"entries": self.entries, "damaged": damaged, "unread": unread, "quarantined": quarantined}


def verify(cache: CachePath = None, *, repair: bool = False) -> Verification:
    """Read every byte of a cache, in all its layers, and compare it with its checksum.

    `repair` moves damaged files of the uppermost layer to quarantine; the next extraction replaces them. CacheUnusable if the
    cache cannot be opened, or cannot be written for a repair.
    """
    store = FeatureStore(cache)
    found: list[Damage] = []
    moved: list[Path] = []
    folders: list[tuple[FeatureStore, str]] = []
    for layer in (store, *store.lower):
        beside = [damage for name in (TRASH, layer.version) for damage in _found(layer.tree, name, stat.S_IFDIR)]
        found += beside
        if repair and layer is store:
            moved += repair_paths(layer.tree, beside)
        if not any(damage.path.name == layer.version for damage in beside):
            folders += [(layer, key) for key in layer.entry_names()]
    with track("verifying", len(folders), "entries") as bar:
        for layer, key in folders:
            damages = list(verify_entry(layer.folder / key))
            found += damages
            if repair and layer is store and (damaged := [damage for damage in damages if not damage.unread]):
                moved += repair_entry(store.root, layer.folder / key, damaged)
            bar.advance()
    return Verification(
        entries=len(folders),
        damaged=tuple(damage for damage in found if not damage.unread),
        unread=tuple(damage for damage in found if damage.unread),
        quarantined=tuple(moved),
    )


def _found(tree: Tree, path: str, sort: int) -> Iterator[Damage]:
    """The damage of a path that is of another sort, such as a link; nothing if it does not exist."""
    try:
        tree.require(path, sort)
    except MlfusionError as err:
        yield Damage(tree.path(path), str(err), (path,))
    except OSError as err:
        yield Damage(tree.path(path), str(unread(tree.path(path), err)), (), unread=True)


def _damage(path: Path, err: Exception, quarantine: tuple[str, ...], *, repairable: bool = False) -> Damage:
    """The damage that an error is about; what may not be read is none."""
    if isinstance(err, FileNotFoundError):
        return Damage(path, "it is not there", quarantine, repairable)
    if isinstance(err, OSError):
        err = unread(path, err)
    if isinstance(err, CacheUnread):
        return Damage(path, str(err), (), unread=True)
    return Damage(path, str(err), quarantine, repairable)


def verify_entry(folder: Path) -> Iterator[Damage]:
    """All damage in one entry's folder; an incomplete stream is no damage."""
    try:
        yield from _verify(folder)
    except PermissionError as err:  # a folder of the entry may not be read
        yield Damage(Path(err.filename), str(unread(Path(err.filename), err)), (), unread=True)


def _verify(folder: Path) -> Iterator[Damage]:
    tree, at = open_tree(folder.parent.parent), f"{folder.parent.name}/{folder.name}"
    beside = list(_found(tree, at, stat.S_IFDIR)) or [
        damage for name in FOLDERS for damage in _found(tree, f"{at}/{name}", stat.S_IFDIR)
    ]
    yield from beside
    if beside:  # what is behind it is not looked at, and without it the rest cannot be checked
        return
    try:
        entry = Entry(folder)
    except NotCached:
        entry = None
        if not tree.names(at):  # a prune removed it
            return
        yield Damage(folder / "entry.json", "it is not there", (), repairable=False)
    except MlfusionError as err:
        yield _damage(folder / "entry.json", err, (f"{at}/entry.json",))
        entry = None
    yield from _verify_small(tree, at, entry)
    if entry is None:
        return
    try:
        files = entry.samples.files()  # reading them compares them with the key
    except MlfusionError as err:
        # It is not known which of the three files is wrong, and they are small.
        yield _damage(folder, err, tuple(f"{at}/{name}" for name in FILES))
        return  # without them the rows of a shard cannot be checked
    for name, data in {**files, GROUP: zarr_group(entry.key).encode()}.items():
        if why := _differs(tree, f"{at}/{name}", data):
            yield Damage(folder / name, why, (f"{at}/{name}",), repairable=name == GROUP)
    yield from _verify_groups(entry)
    for name in tree.names(f"{at}/{TOKENS}"):
        if STREAM.fullmatch(name):
            yield from _verify_stream(entry, name)


def _verify_small(tree: Tree, at: str, entry: Entry | None) -> Iterator[Damage]:
    """Damage of an entry's names and provenance, and of its leases and pins."""
    for kind, folder in ((Names, "names"), (RunRecord, "runs")):
        for name in tree.names(f"{at}/{folder}"):
            path = f"{at}/{folder}/{name}"
            with suppress(FileNotFoundError):
                try:
                    if name.endswith(".json"):
                        found = records.load(tree, path, kind)
                        if isinstance(found, Names) and names_file(found) != name:
                            yield Damage(tree.path(path), "it is not named after what it holds", (path,))
                except (MlfusionError, OSError) as err:
                    yield _damage(tree.path(path), err, (path,))
    for folder in ("leases", "pins"):
        for name in tree.names(f"{at}/{folder}"):
            yield from _found(tree, f"{at}/{folder}/{name}", stat.S_IFREG)


def _verify_groups(entry: Entry) -> Iterator[Damage]:
    """Damage of the groups of an entry's images: files of groups, and names that refer to a file that is not there."""
    tree, at = entry.tree, entry.at
    files = {name: match[1] for name in tree.names(at) if (match := GROUPS_FILE.fullmatch(name))}
    for name, digest in files.items():
        with suppress(FileNotFoundError):
            try:
                Groups.read(tree, at, digest, entry.spec.data.images)
            except MlfusionError as err:
                yield _damage(tree.path(f"{at}/{name}"), err, (f"{at}/{name}",))
    needed = set()
    for name in tree.names(f"{at}/names"):
        with suppress(MlfusionError, OSError):  # damaged names are reported as such
            if name.endswith(".json") and (groups := entry.alias(name)[0].groups):
                needed.add(groups_file(groups))
    for name in sorted(needed.difference(files)):
        yield Damage(tree.path(f"{at}/{name}"), "it is not there", ())


def _verify_stream(entry: Entry, name: str) -> Iterator[Damage]:
    tree, at = entry.tree, f"{entry.at}/{TOKENS}/{name}"
    beside = list(_found(tree, at, stat.S_IFDIR)) or list(_found(tree, f"{at}/c", stat.S_IFDIR))
    yield from beside
    if beside:
        return
    path = tree.path(at) / "stream.json"
    try:
        stream = entry.stream(name)
    except (MlfusionError, OSError) as err:
        try:
            stream = records.load(tree, f"{at}/manifest.json", StreamManifest, most=MANIFEST_BYTES).stream
            if entry.stream_fault(stream, name):
                raise err
        except (MlfusionError, OSError):
            yield _damage(path, err, (at,))
            return
        yield _damage(path, err, (f"{at}/stream.json",), repairable=True)
    for file, text in FORMATS[stream.format].describe(stream).items():
        if why := _differs(tree, f"{at}/{file}", text.encode()):
            yield Damage(tree.path(at) / file, why, (f"{at}/{file}",), repairable=True)
    yield from _verify_shards(entry, stream, at)


def _verify_shards(entry: Entry, stream: Stream, at: str) -> Iterator[Damage]:
    path, manifest = entry.tree.path(at), None
    try:
        manifest = entry.manifest(stream)
    except FileNotFoundError:
        pass
    except (MlfusionError, OSError) as err:
        yield _damage(path / "manifest.json", err, (f"{at}/manifest.json",), repairable=True)
    commits: list[CommitRecord] = []
    missing = set(entry.missing_shards(stream))
    for shard in range(stream.shards):
        folder, both = path / "c" / str(shard), (f"{at}/c/{shard}", f"{at}/manifest.json")
        if shard in missing:
            if manifest is not None:
                yield Damage(folder, "the shard is not there", both[1:])
            continue
        try:
            commits.append(entry.record(stream, shard))
        except (MlfusionError, OSError) as err:
            yield _damage(folder / "commit.json", err, both)
            continue
        if found := _shard_damage(Source(entry.tree, entry.at, stream, commits[-1]), shard):
            yield _damage(folder, found, both) if isinstance(found, Exception) else Damage(folder, found, both)
    if manifest is not None and len(commits) == stream.shards and StreamManifest.join(stream, commits) != manifest:
        yield Damage(path / "manifest.json", "it does not match the shards' records", both[1:], repairable=True)


def _shard_damage(source: Source, shard: int) -> str | Exception:
    """How a shard's file differs from its record, in words or as the error of opening it; '' if it does not."""
    record, stream = source.manifest, source.stream
    images = stream.rows(shard)
    rows = [images[at : at + stream.chunk_rows] for at in range(0, len(images), stream.chunk_rows)]  # chunk by chunk
    checksums = ((crc32c.crc32c, record.table("crc32c")), (xxhash.xxh3_64_intdigest, record.table("xxh3_64")))
    offsets = record.table("offsets")
    layers: dict[range, set[int]] = {}
    try:
        with open(source.tree.open(source.file(shard)), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.sizes[0]:
                return f"{size:,} bytes instead of {record.sizes[0]:,}"
            digest = hashlib.file_digest(file, xxhash.xxh3_128)
            for (block, part), (layer, kind) in product(enumerate(rows), np.ndindex(record.chunks[1:])):
                file.seek(int(offsets[block, layer, kind]))
                data = file.read(len(part) * stream.row_bytes)
                if any(checksum(data) != table[block, layer, kind] for checksum, table in checksums):
                    layers.setdefault(part, set()).add(stream.layers[layer])
    except (MlfusionError, OSError) as err:
        return "its file is not there" if isinstance(err, FileNotFoundError) else err
    if layers:
        parts = (f"layers {layer_ranges(part)} of rows {rows.start}-{rows.stop - 1}" for rows, part in layers.items())
        return "wrong bytes: " + "; ".join(parts)
    return "" if digest.hexdigest() == record.digests[0] else "wrong bytes: beside the tokens (index or padding)"


def repair_entry(root: Path, folder: Path, found: list[Damage]) -> list[Path]:
    """Move damaged files to quarantine and restore the repairable ones; returns the new paths of what was moved."""
    with disk.translate_os_errors(root):
        tree = open_tree(root)
        restored: dict[str, str] = {}
        for damage in found:
            if damage.repairable and damage.path.name == "stream.json":
                at = damage.quarantine[0].removesuffix("/stream.json")
                stream = records.load(tree, f"{at}/manifest.json", StreamManifest, most=MANIFEST_BYTES).stream
                restored[damage.quarantine[0]] = records.encode(stream)
        moved = repair_paths(tree, found)
        for path, text in restored.items():
            tree.publish(path, text.encode())
        if not list(_whole(tree, folder)):
            entry = Entry(folder)
            tree.publish(f"{entry.at}/{GROUP}", zarr_group(entry.key).encode())
            for stream in entry.streams():
                for name, text in FORMATS[stream.format].describe(stream).items():
                    tree.publish(f"{entry.at}/{stream.folder}/{name}", text.encode())
            entry.seal()
        return moved


def _whole(tree: Tree, folder: Path) -> Iterator[str]:
    """Small files and folders of an entry that are not there, or not what they should be."""
    at = f"{folder.parent.name}/{folder.name}"
    for names, sort in ((("entry.json", *FILES), stat.S_IFREG), ((TOKENS,), stat.S_IFDIR)):
        for name in names:
            state = tree.stat(f"{at}/{name}")
            if state is None or stat.S_IFMT(state.st_mode) != sort:
                yield name


def repair_paths(tree: Tree, found: list[Damage]) -> list[Path]:
    """Move damaged files, folders and links to quarantine; returns their new paths."""
    moved = []
    with disk.translate_os_errors(tree.path("")):
        for path in dict.fromkeys(path for damage in found for path in damage.quarantine):
            if tree.stat(path):
                *folders, name = f"{uuid.uuid4().hex[:8]}/{path.partition('/')[2] or path}".split("/")
                for at in accumulate([QUARANTINE, *folders], "{}/{}".format):
                    if not tree.require(at, stat.S_IFDIR):
                        tree.make(at)
                tree.move(path, f"{at}/{name}")
                moved.append(tree.path(f"{at}/{name}"))
    return moved


def _differs(tree: Tree, path: str, data: bytes) -> str:
    """Why a file does not hold these bytes, in words; '' if it does."""
    try:
        return "" if tree.read(path, len(data)) == data else "it is not as it was written"
    except FileNotFoundError:
        return "it is not there"
    except MlfusionError as err:
        return str(err)
