"""One entry of the cache: the tokens of one split under one frozen model, with the labels and ids that go with its rows.

<key>/entry.json          the FeatureSpec whose digest is the folder's name
      ids.json labels.npy digests.npy      row by row: sample id, label, digest of the image's bytes
      names/<digest>.json what people have called this model and data set
      runs/<id>.json      provenance of each extraction: versions, device, rates; never part of the key
      leases/ pins/       who extracts, who reads
      tokens/<stream>/    stream.json; c/<shard>/, a folder that comes whole: the shard and its commit record; and once all
                          shards are there manifest.json, which joins the records
"""

import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from mlfusion.errors import BadData, CacheUnusable, NotCached
from mlfusion.shapes import Float, Int, Num
from mlfusion.specs.identity import FeatureSpec, Pair, TokenKind, digest
from mlfusion.specs.names import layer_ranges
from mlfusion.store import leases, records
from mlfusion.store.formats import FORMATS, ShardWriter
from mlfusion.store.reader import TokenReader
from mlfusion.store.records import Names, RunRecord, Samples, damaged, removed_message
from mlfusion.store.shard import Check, Source, spans
from mlfusion.store.stream import CRC32C, OFFSETS, XXH3, CommitRecord, Stream, StreamManifest
from mlfusion.system import disk

TOKENS = "tokens"
GROUP = f"{TOKENS}/zarr.json"
FOLDERS = (TOKENS, "names", "runs", "leases", "pins")


class ShardDraft:
    """A shard being written. `publish` gives it its name; leaving the `with` before that leaves nothing behind."""

    def __init__(self, folder: Path, samples: Samples, stream: Stream, shard: int) -> None:
        """`folder` is the stream's, `samples` are all rows of the entry."""
        self._samples, self.stream, self.shard = samples, stream, shard
        self.row = stream.rows(shard).start  # the image whose tokens come next
        self._skipped: dict[int, str] = {}
        self._final = folder / "c" / str(shard)
        self._draft = disk.draft_name(folder)
        writer = FORMATS[stream.format]
        file = self._draft / writer.file
        with disk.drafted(self._draft):
            self._draft.mkdir()  # not its parents: what a prune took away stays away
            file.parent.mkdir(parents=True, exist_ok=True)
            self._writer: ShardWriter | None = writer(file, stream, shard)

    def append(self, tokens: Float[np.ndarray, "B L T D"], unread: Mapping[int, str] = {}) -> None:
        """Add the shard's next rows; T counts kinds x tokens. `unread` is row → why its image could not be read.

        Raises:
            BadData: a value is not finite, or too large for the storage type; the image is named.
        """
        self.append_stored(self.stream.encoding.encode(tokens), unread)

    def append_stored(self, stored: Num[np.ndarray, "B L T columns"], unread: Mapping[int, str] = {}) -> None:
        """Add rows that are encoded already; see `append`."""
        assert self._writer is not None
        encoding = self.stream.encoding
        finite = np.all(encoding.finite(stored), axis=2)  # [rows, layers]
        missing = [row - self.row for row in unread]
        finite[missing] = True
        if not finite.all():
            row, layer = (int(i[0]) for i in np.nonzero(~finite))
            raise BadData(
                f"layer {self.stream.layers[layer]} of image {self._samples.ids[self.row + row]!r} is not finite "
                f"in {self.stream.dtype}; use --dtype float32, or look at that image"
            )
        if missing:
            stored = stored.copy()
            stored[missing] = encoding.blank()
            self._skipped |= unread
        self._writer.append(stored)
        self.row += len(stored)

    def publish(self) -> bool:
        """Flush the shard and give it its name, together with its record; False if another writer was first."""
        rows = self.stream.rows(self.shard)
        assert self._writer is not None and self.row == rows.stop
        written = self._writer.close()
        self._writer = None
        record = CommitRecord(
            stream=self.stream.name,
            shard=self.shard,
            sizes=(written.size,),
            digests=(written.digest,),
            samples=(self._samples.digest_of(rows),),
            skipped=self._skipped,
            chunks=written.offsets.shape,
            offset_table=written.offsets.astype(OFFSETS).tobytes(),
            crc32c_table=written.crc32c.astype(CRC32C).tobytes(),
            xxh3_table=written.xxh3.astype(XXH3).tobytes(),
        )
        disk.write(self._draft / "commit.json", records.encode(record))
        return disk.publish_folder(self._draft, self._final)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        disk.remove(self._draft)


class Entry:
    """Reads and writes one folder of the cache. Made by FeatureStore.

    In a layered cache `below` are the same entry's folders in the caches that lie below this one: they are read, and only
    this one is written.
    """

    def __init__(self, path: Path, below: Sequence["Entry"] = ()) -> None:
        """Read the record that names the entry.

        Raises:
            NotCached: the entry was removed.
            CacheUnusable: the record is damaged, belongs to another folder, or is of a newer format.
        """
        self.path, self.below = path, tuple(below)
        file = path / "entry.json"
        try:
            self.spec = records.read(file, FeatureSpec, versioned=path)
        except FileNotFoundError as err:
            raise NotCached(removed_message(path)) from err
        except OSError as err:
            raise damaged(file, str(err)) from err
        if self.spec.key != path.name:
            raise damaged(file, "it does not belong to this folder")

    @property
    def key(self) -> str:
        """The folder's name: the digest of its FeatureSpec."""
        return self.path.name

    @cached_property
    def samples(self) -> Samples:
        """All rows, read images and skipped ones alike; checked against the key."""
        try:
            found = Samples.read(self.path, self.spec.data.classes)
            sound = found.content == self.spec.data.content
        except Exception:  # noqa: BLE001 - NumPy reads a header as Python source, so a changed byte raises what Python can
            sound = False
        if not sound and not (self.path / "entry.json").exists():
            raise NotCached(removed_message(self.path))
        if not sound:
            raise damaged(self.path, "ids, labels or digests of its images do not match its key")
        return found

    def names(self) -> list[Names]:
        """All pairs of names under which this entry was extracted, the earliest first."""
        every: dict[Names, None] = {}
        for entry in (self, *self.below):
            with suppress(FileNotFoundError), os.scandir(entry.path / "names") as found:
                files = [file for file in found if file.name.endswith(".json")]
                for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name)):
                    every[records.read(Path(file.path), Names)] = None
        return list(every)

    # --- what is there, what is missing -----------------------------------------------------------------------------

    def folder(self, stream: Stream) -> Path:
        """Folder of a stream."""
        return self.path / TOKENS / stream.name

    def streams(self) -> list[Stream]:
        """All streams that were begun in this folder."""
        try:
            folders = disk.finished(self.path / TOKENS, "stream.json")
            return [records.read(folder / "stream.json", Stream) for folder in folders]
        except FileNotFoundError as err:
            raise NotCached(removed_message(self.path)) from err

    def complete_streams(self) -> list[Stream]:
        """Streams of which every shard is in this folder."""
        return [stream for stream in self.streams() if (self.folder(stream) / "manifest.json").exists()]

    def missing_shards(self, stream: Stream) -> list[int]:
        """Shards of a stream that are not there yet."""
        present: set[str] = set()
        with suppress(FileNotFoundError):
            present.update(os.listdir(self.folder(stream) / "c"))
        return [shard for shard in range(stream.shards) if str(shard) not in present]

    def missing(self, pairs: frozenset[Pair]) -> dict[Stream, set[int]]:
        """Missing shards of the streams that hold one of `pairs`; every worker gets the same streams in the same order."""
        wanted = pairs - self.held()
        streams = (stream for stream in self.streams() if stream.pairs & wanted)
        return {stream: missing for stream in streams if (missing := set(self.missing_shards(stream)))}

    def sources(self) -> dict[Pair, Source]:
        """(layer, kind) → the complete stream to read it from, in this folder or below."""
        found: dict[Pair, Source] = {}
        for stream in self.streams():
            with suppress(FileNotFoundError):
                source = Source(self.folder(stream), stream, self.manifest(stream))
                found |= dict.fromkeys(stream.pairs, source)
        for entry in self.below:
            found = entry.sources() | found
        return found

    def held(self) -> frozenset[Pair]:
        """All (layer, kind) of which every shard is there."""
        below = (entry.held() for entry in self.below)
        return frozenset().union(*(stream.pairs for stream in self.complete_streams()), *below)

    def skipped(self, sources: Mapping[Pair, Source] | None = None) -> dict[int, str]:
        """Row → why its image could not be read. Pass `sources` if they were read already."""
        found: dict[int, str] = {}
        for source in dict.fromkeys((self.sources() if sources is None else sources).values()):
            found |= source.manifest.skipped
        return dict(sorted(found.items()))

    def unreadable(self, sources: Mapping[Pair, Source] | None = None) -> dict[str, str]:
        """Sample id → why its image could not be read. Pass `sources` if they were read already."""
        skipped = self.skipped(sources)
        ids = self.samples.ids if skipped else ()
        return {ids[row]: why.removeprefix(f"{ids[row]} cannot be read: ") for row, why in skipped.items()}

    def rows(self) -> Int[np.ndarray, " N"]:
        """The rows that hold tokens, those of readable images."""
        return np.setdiff1d(np.arange(self.spec.data.images), np.fromiter(self.skipped(), np.int64))

    def extracted_at_ns(self) -> int:
        """When this was last extracted, or reused by an extraction, in nanoseconds; only ever compared."""
        return max(entry._changed("names") for entry in (self, *self.below))

    def read_at(self) -> float:
        """When this was last extracted or read, in seconds of the file system's clock."""
        return max(map(self._changed, ("names", "entry.json"))) / 1e9

    def _changed(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_mtime_ns
        except FileNotFoundError as err:
            raise NotCached(removed_message(self.path)) from err

    def nbytes(self) -> int:
        """Bytes of the complete streams in this folder, by arithmetic."""
        return sum(stream.nbytes for stream in self.complete_streams())

    def size(self) -> int:
        """Bytes on disk of this folder."""
        return folder_bytes(self.path)

    # --- writing ----------------------------------------------------------------------------------------------------

    def add_alias(self, names: Names) -> None:
        """Record one more pair of names."""
        file = self.path / "names" / f"{digest(list(msgspec.structs.astuple(names)))}.json"
        if not file.exists():
            disk.publish_text(file, records.encode(names))

    def mark_used(self, names: Names) -> None:
        """Make this the entry that these names mean now; without effect in a cache that cannot be written."""
        with suppress(OSError):
            self.add_alias(names)
            os.utime(self.path / "names")

    def record_run(self, run: RunRecord) -> None:
        """Add the provenance of an extraction."""
        disk.publish_text(self.path / "runs" / f"{uuid.uuid4().hex[:12]}.json", records.encode(run))

    def begin(self, streams: Iterable[Stream]) -> None:
        """Make the folders of new streams; of two writers with the same stream the first one's cutting stands."""
        for stream in streams:
            with disk.drafted(disk.draft_name(self.path / TOKENS)) as draft:
                draft.mkdir()  # not its parents: what a prune took away stays away
                (draft / "c").mkdir()
                for name, text in FORMATS[stream.format].describe(stream).items():
                    disk.write(draft / name, text)
                disk.write(draft / "stream.json", records.encode(stream))
            disk.publish_folder(draft, self.folder(stream))

    def draft(self, stream: Stream, shard: int) -> ShardDraft:
        """Begin a shard."""
        return ShardDraft(self.folder(stream), self.samples, stream, shard)

    def seal(self) -> None:
        """Publish the manifest of every stream whose shards are all there.

        Raises:
            CacheUnusable: a shard holds rows of other samples than this entry's.
        """
        for stream in self.streams():
            path = self.folder(stream) / "manifest.json"
            if not path.exists() and not self.missing_shards(stream):
                parts = [self.record(stream, shard) for shard in range(stream.shards)]
                disk.publish_text(path, records.encode(StreamManifest.join(stream, parts)))

    def manifest(self, stream: Stream) -> StreamManifest:
        """The manifest of a stream.

        Raises:
            CacheUnusable: it is damaged.
            FileNotFoundError: the stream is not complete.
        """
        path = self.folder(stream) / "manifest.json"
        manifest = records.read(path, StreamManifest)
        if manifest.stream != stream or not manifest.fits(stream):
            raise damaged(path, "it is another stream's")
        return manifest

    def record(self, stream: Stream, shard: int) -> CommitRecord:
        """The commit record of a shard.

        Raises:
            CacheUnusable: it is damaged.
            FileNotFoundError: the shard is not there.
        """
        path = self.folder(stream) / "c" / str(shard) / "commit.json"
        record = records.read(path, CommitRecord)
        rows = self.samples.digest_of(stream.rows(shard))
        if (record.stream, record.shard, record.samples) != (stream.name, shard, (rows,)):
            raise damaged(path, "it is another shard's")
        return record

    def sweep(self) -> None:
        """Remove what killed writers left behind."""
        for folder in (self.path, *(self.path / name for name in FOLDERS), *map(self.folder, self.streams())):
            disk.sweep(folder)
        for name in ("leases", "pins"):
            leases.sweep(self.path / name)

    # --- reading ----------------------------------------------------------------------------------------------------

    def open(self, layers: Sequence[int], kinds: Sequence[TokenKind], *, check: Check = "once") -> TokenReader:
        """A reader of these layers and kinds of the readable images.

        Its arrays are [images, layers, tokens, width]; the third axis holds the kinds one after another, and layers narrower
        than the widest are padded with zeros. `check` says when a chunk's checksum is compared: 'once', on first touch by
        this reader, 'always', or 'never'.

        Raises:
            NotCached: a (layer, kind) that is not, or not wholly, in the cache.
            CacheUnusable: a record is damaged.
        """
        with suppress(OSError):
            os.utime(self.path / "entry.json")  # for `prune`, which removes what was not used for longest
        home = self.sources()
        if absent := [(layer, kind) for layer in layers for kind in kinds if (layer, kind) not in home]:
            names = "; ".join(
                f"{kind} of layers {layer_ranges(layer for layer, k in absent if k == kind)}"
                for kind in dict.fromkeys(kind for _, kind in absent)
            )
            raise NotCached(f"not in the cache: {names}")
        counts = {tuple(home[layer, kind].stream.tokens for kind in kinds) for layer in layers}
        if len(counts) > 1:
            raise CacheUnusable(f"{self.path}: layers differ in their number of tokens; read them one at a time")
        ends = np.cumsum([0, *counts.pop()]).tolist()
        planes: dict[Source, list[tuple[int, int, int, int]]] = {}
        for li, layer in enumerate(layers):
            for ki, kind in enumerate(kinds):
                source = home[layer, kind]
                planes.setdefault(source, []).append((li, ends[ki], *source.stream.plane(layer, kind)))
        width = max(source.stream.width for source in planes)
        return TokenReader(
            [span for source, where in planes.items() for span in spans(source, where)],
            (self.spec.data.images, len(layers), ends[-1], width),
            sorted({row for source in home.values() for row in source.manifest.skipped}),
            check,
        )

    def read(self, layers: Sequence[int], kinds: Sequence[TokenKind]) -> Num[np.ndarray, "N L T D"]:
        """[readable images, layers, tokens, width]: `open` and read everything."""
        with self.open(layers, kinds) as reader:
            return reader.read()


def draft_entry(folder: Path, spec: FeatureSpec, rows: Samples) -> Path:
    """Write a new entry into a draft in `folder`, ready to be published; returns the draft's path."""
    with disk.drafted(disk.draft_name(folder)) as draft:
        draft.mkdir()
        for name in FOLDERS:
            (draft / name).mkdir()
        for name, content in _files(spec, rows).items():
            (draft / name).write_bytes(content)
            disk.flush(draft / name)
    return draft


def restore_missing_files(path: Path, spec: FeatureSpec, rows: Samples) -> None:
    """Put back what a repair took out of an entry's folder, or what a prune had begun to take."""
    for name in FOLDERS:
        if not (path / name).is_dir():
            (path / name).mkdir(exist_ok=True)
    lost = [name for name in (GROUP, *records.FILES, "entry.json") if not (path / name).exists()]
    found = _files(spec, rows) if lost else {}
    for name in lost:  # entry.json last: it makes the folder an entry again
        with disk.atomic(path / name) as draft:
            draft.write_bytes(found[name])


def _files(spec: FeatureSpec, rows: Samples) -> dict[str, bytes]:
    """Name → exact content of the files that an entry begins with."""
    return rows.files() | {GROUP: zarr_group(spec.key).encode(), "entry.json": records.encode(spec).encode()}


def zarr_group(key: str) -> str:
    """The file that makes the folder of the streams a Zarr v3 group."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"mlfusion": key}}, indent=2)


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files below a folder; 0 if it does not exist."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as found:
        for one in found:
            with suppress(FileNotFoundError):
                inner = one.is_dir(follow_symlinks=False)
                total += folder_bytes(one.path) if inner else one.stat(follow_symlinks=False).st_size
    return total
