"""One entry of the cache: the tokens of one split by one frozen model, with the labels and ids of its rows.

<key>/entry.json          the FeatureSpec whose digest is the folder's name
      ids.json labels.npy digests.npy      row by row: sample id, label, digest of the image's bytes
      names/<digest>.json the names that users gave for this model and data set
      runs/<id>.json      provenance of each extraction: versions, device, rates; never part of the key
      leases/ pins/       marks of the processes that extract or read it
      tokens/<stream>/    stream.json; c/<shard>/ with the shard and its commit record, published in one step; and, once
                          all shards exist, manifest.json, which joins the records
"""

import json
import os
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from mlfusion.errors import BadData, CacheUnusable, NotCached
from mlfusion.shapes import Bool, Float, Int, Num
from mlfusion.specs.identity import FeatureSpec, Pair, TokenKind, digest
from mlfusion.specs.names import layer_ranges
from mlfusion.store import leases, records
from mlfusion.store.formats import FORMATS, ShardWriter
from mlfusion.store.reader import TokenReader
from mlfusion.store.records import Names, RunRecord, Samples, damaged, removed_message
from mlfusion.store.shard import Check, Source, spans
from mlfusion.store.stream import CHUNK, CommitRecord, Stream, StreamManifest
from mlfusion.system import disk

TOKENS = "tokens"
GROUP = f"{TOKENS}/zarr.json"
FOLDERS = (TOKENS, "names", "runs", "leases", "pins")


class ShardDraft:
    """A shard that is being written. `publish` gives it its name; without it, the `with` removes the draft at its end."""

    def __init__(self, folder: Path, samples: Samples, stream: Stream, shard: int) -> None:
        """`folder` is the stream's folder, `samples` are all rows of the entry."""
        self._samples, self.stream, self.shard = samples, stream, shard
        self.row = stream.rows(shard).start  # the next image to append
        self._skipped: dict[int, str] = {}
        self._final = folder / "c" / str(shard)
        self._draft = disk.draft_name(folder)
        writer = FORMATS[stream.format]
        file = self._draft / writer.file
        with disk.drafted(self._draft):
            self._draft.mkdir()  # not its parents: a pruned entry must not come back
            file.parent.mkdir(parents=True, exist_ok=True)
            self._writer: ShardWriter = writer(file, stream, shard)

    def append(
        self,
        tokens: Float[np.ndarray, "B L T D"],
        unread: Mapping[int, str] = {},
        vanished: Bool[np.ndarray, "B L"] | None = None,
    ) -> None:
        """Add the next rows; `unread` is row → why its image could not be read.

        BadData if a number is not finite, or if an image's layer is `vanished`: its numbers become 0 in the storage type.
        """
        for row, layer in np.argwhere(vanished) if vanished is not None else ():
            if self.row + row not in unread:
                raise BadData(
                    f"layer {self.stream.layers[layer]} of image {self._samples.ids[self.row + row]!r} would become zeros in "
                    f"{self.stream.dtype}, which has no numbers as small as most of a token's; use --dtype float32"
                )
        self.append_stored(self.stream.encoding.encode(tokens), unread)

    def append_stored(self, stored: Num[np.ndarray, "B L T columns"], unread: Mapping[int, str] = {}) -> None:
        """Add encoded rows, [rows, layers, kinds x tokens, columns]; see `append`."""
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
        """Flush the shard and publish it together with its record; False if another writer was first."""
        rows = self.stream.rows(self.shard)
        assert self.row == rows.stop
        written = self._writer.close()
        record = CommitRecord(
            stream=self.stream.name,
            shard=self.shard,
            sizes=(written.size,),
            digests=(written.digest,),
            samples=(self._samples.digest_of(rows),),
            skipped=self._skipped,
            chunks=written.chunks.shape,
            **{name: written.chunks[name].tobytes() for name in CHUNK.names or ()},
        )
        disk.write(self._draft / "commit.json", records.encode(record))
        return disk.publish_folder(self._draft, self._final)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.abandon()
        disk.remove(self._draft)


class Entry:
    """Reads and writes one folder of the cache; `lower` are the same entry's folders in lower layers, which are only read."""

    def __init__(self, path: Path, lower: Sequence["Entry"] = ()) -> None:
        """Read the entry's record: NotCached if it was removed, CacheUnusable if it is damaged or of a newer format."""
        self.path, self.lower, self.key = path, tuple(lower), path.name
        file = path / "entry.json"
        try:
            self.spec = records.read(file, FeatureSpec, versioned=path)
        except FileNotFoundError as err:
            raise NotCached(removed_message(path)) from err
        except OSError as err:
            raise damaged(file, str(err)) from err
        if self.spec.key != self.key:
            raise damaged(file, "it does not belong to this folder")

    @cached_property
    def samples(self) -> Samples:
        """All rows, those of skipped images included; checked against the key."""
        with suppress(Exception):  # NumPy parses a header as Python source: a changed byte can raise any exception
            found = Samples.read(self.path, self.spec.data.classes)
            if found.content == self.spec.data.content:
                return found
        if not (self.path / "entry.json").exists():
            raise NotCached(removed_message(self.path))
        raise damaged(self.path, "ids, labels or digests of its images do not match its key")

    def aliases(self) -> dict[Names, int]:
        """All names under which this entry was extracted, and the time of the last such extraction in nanoseconds.

        The name extracted last is the last one.
        """
        times: dict[Names, int] = {}
        for entry in (self, *self.lower):
            with suppress(FileNotFoundError), os.scandir(entry.path / "names") as items:
                for file in items:
                    if file.name.endswith(".json"):
                        names, time = records.read(Path(file.path), Names), file.stat().st_mtime_ns
                        times[names] = max(time, times.get(names, 0))
        return dict(sorted(times.items(), key=lambda item: (item[1], item[0].dataset, item[0].split)))

    def names(self) -> list[Names]:
        """All names under which this entry was extracted; the name extracted last is the last one."""
        return list(self.aliases())

    def folder(self, stream: Stream) -> Path:
        """Folder of a stream."""
        return self.path / TOKENS / stream.name

    def streams(self) -> list[Stream]:
        """All streams in this folder, complete or not."""
        try:
            folders = disk.published(self.path / TOKENS, "stream.json")
            return [records.read(folder / "stream.json", Stream) for folder in folders]
        except FileNotFoundError as err:
            raise NotCached(removed_message(self.path)) from err

    def complete_streams(self) -> list[Stream]:
        """Streams of which every shard is in this folder."""
        return [stream for stream in self.streams() if (self.folder(stream) / "manifest.json").exists()]

    def missing_shards(self, stream: Stream) -> list[int]:
        """Numbers of a stream's shards that are not published yet."""
        present = {path.name for path in disk.published(self.folder(stream) / "c")}
        return [shard for shard in range(stream.shards) if str(shard) not in present]

    def missing(self, pairs: frozenset[Pair]) -> dict[Stream, set[int]]:
        """Missing shards of the streams that hold one of `pairs`; every worker gets the same streams in the same order."""
        incomplete = pairs - self.complete_pairs()
        streams = (stream for stream in self.streams() if stream.pairs & incomplete)
        return {stream: missing for stream in streams if (missing := set(self.missing_shards(stream)))}

    def sources(self) -> dict[Pair, Source]:
        """(layer, kind) → the complete stream that holds it, in this folder or in a lower layer."""
        found: dict[Pair, Source] = {}
        for stream in self.streams():
            with suppress(FileNotFoundError):
                found |= dict.fromkeys(stream.pairs, Source(self.folder(stream), stream, self.manifest(stream)))
        for entry in self.lower:
            found = entry.sources() | found
        return found

    def complete_pairs(self) -> frozenset[Pair]:
        """Every (layer, kind) of which all shards are published, in any layer of the cache."""
        lower = (entry.complete_pairs() for entry in self.lower)
        return frozenset().union(*(stream.pairs for stream in self.complete_streams()), *lower)

    def skipped(self, sources: Mapping[Pair, Source] | None = None) -> dict[int, str]:
        """Row → why its image could not be read; `sources` saves reading the manifests again."""
        found: dict[int, str] = {}
        for source in dict.fromkeys((self.sources() if sources is None else sources).values()):
            found |= source.manifest.skipped
        return dict(sorted(found.items()))

    def unreadable(self, sources: Mapping[Pair, Source] | None = None) -> dict[str, str]:
        """Sample id → why its image could not be read; `sources` saves reading the manifests again."""
        skipped = self.skipped(sources)
        ids = self.samples.ids if skipped else ()
        return {ids[row]: why.removeprefix(f"{ids[row]} cannot be read: ") for row, why in skipped.items()}

    def rows(self) -> Int[np.ndarray, " N"]:
        """Rows of the readable images, which hold tokens."""
        return np.setdiff1d(np.arange(self.spec.data.images), np.fromiter(self.skipped(), np.int64))

    def read_at(self) -> float:
        """Time at which this was last extracted or read, in seconds of the file system's clock."""
        return max(map(self._modified, ("names", "entry.json"))) / 1e9

    def _modified(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_mtime_ns
        except FileNotFoundError as err:
            raise NotCached(removed_message(self.path)) from err

    def nbytes(self) -> int:
        """Bytes of the stored numbers of the complete streams in this folder."""
        return sum(stream.nbytes for stream in self.complete_streams())

    def size(self) -> int:
        """Bytes on disk of this folder."""
        return folder_bytes(self.path)

    def add_alias(self, names: Names, at_ns: int | None = None) -> None:
        """Record that this entry was extracted under these names, now or at a time in nanoseconds."""
        file = self.path / "names" / f"{digest(list(msgspec.structs.astuple(names)))}.json"
        if not file.exists():
            disk.publish_text(file, records.encode(names))
        if at_ns is None:
            os.utime(file)
        else:
            os.utime(file, ns=(at_ns, at_ns))

    def mark_used(self, names: Names) -> None:
        """Make these names refer to this entry from now on; a read-only cache is left as it is."""
        with suppress(OSError):
            self.add_alias(names)
            os.utime(self.path / "names")

    def record_run(self, run: RunRecord) -> None:
        """Add the provenance of an extraction."""
        disk.publish_text(self.path / "runs" / f"{uuid.uuid4().hex[:12]}.json", records.encode(run))

    def begin(self, streams: Iterable[Stream]) -> None:
        """Create the folders of new streams; of two writers of the same stream the first one's shard sizes count."""
        for stream in streams:
            with disk.drafted(disk.draft_name(self.path / TOKENS)) as draft:
                draft.mkdir()  # not its parents: a pruned entry must not come back
                (draft / "c").mkdir()
                for name, text in FORMATS[stream.format].describe(stream).items():
                    disk.write(draft / name, text)
                disk.write(draft / "stream.json", records.encode(stream))
            disk.publish_folder(draft, self.folder(stream))

    def draft(self, stream: Stream, shard: int) -> ShardDraft:
        """Begin a shard."""
        return ShardDraft(self.folder(stream), self.samples, stream, shard)

    def seal(self) -> None:
        """Publish the manifest of every stream with all shards; CacheUnusable if a shard holds rows of other samples."""
        for stream in self.streams():
            path = self.folder(stream) / "manifest.json"
            if not path.exists() and not self.missing_shards(stream):
                parts = [self.record(stream, shard) for shard in range(stream.shards)]
                disk.publish_text(path, records.encode(StreamManifest.join(stream, parts)))

    def manifest(self, stream: Stream) -> StreamManifest:
        """The manifest of a stream: CacheUnusable if it is damaged, FileNotFoundError if the stream is not complete."""
        path = self.folder(stream) / "manifest.json"
        manifest = records.read(path, StreamManifest)
        if manifest.stream != stream or not manifest.fits(stream):
            raise damaged(path, "it is another stream's")
        return manifest

    def record(self, stream: Stream, shard: int) -> CommitRecord:
        """The commit record of a shard: CacheUnusable if it is damaged, FileNotFoundError if there is no such shard."""
        path = self.folder(stream) / "c" / str(shard) / "commit.json"
        record = records.read(path, CommitRecord)
        rows = self.samples.digest_of(stream.rows(shard))
        if (record.stream, record.shard, record.samples) != (stream.name, shard, (rows,)):
            raise damaged(path, "it is another shard's")
        return record

    def sweep(self) -> None:
        """Remove drafts, leases and pins of dead processes."""
        for folder in (self.path, *(self.path / name for name in FOLDERS), *map(self.folder, self.streams())):
            disk.sweep(folder)
        for name in ("leases", "pins"):
            leases.sweep(self.path / name)

    def open(
        self, layers: Sequence[int], kinds: Sequence[TokenKind], *, check: Check = "once", without: Collection[int] = ()
    ) -> TokenReader:
        """A reader of [readable images, layers, tokens, width], without those in the rows `without`.

        The third axis holds the kinds one after another; layers narrower than the widest are padded with zeros. NotCached if
        a (layer, kind) is not, or not completely, in the cache; CacheUnusable if a record is damaged.
        """
        with suppress(OSError):
            os.utime(self.path / "entry.json")  # for `prune`, which removes the least recently used entries
        sources = self.sources()
        if absent := [(layer, kind) for layer in layers for kind in kinds if (layer, kind) not in sources]:
            raise NotCached(f"not in the cache: {pair_words(absent)}")
        counts = {tuple(sources[layer, kind].stream.tokens for kind in kinds) for layer in layers}
        if len(counts) > 1:
            raise CacheUnusable(f"{self.path}: layers differ in their number of tokens; read them one at a time")
        ends = np.cumsum([0, *counts.pop()]).tolist()
        planes: dict[Source, list[tuple[int, int, int, int]]] = {}
        for li, layer in enumerate(layers):
            for ki, kind in enumerate(kinds):
                source = sources[layer, kind]
                planes.setdefault(source, []).append((li, ends[ki], *source.stream.plane(layer, kind)))
        width = max(source.stream.width for source in planes)
        return TokenReader(
            [span for source, positions in planes.items() for span in spans(source, positions)],
            (self.spec.data.images, len(layers), ends[-1], width),
            sorted({*self.skipped(sources), *without}),
            check,
        )

    def read(self, layers: Sequence[int], kinds: Sequence[TokenKind]) -> Num[np.ndarray, "N L T D"]:
        """All tokens of the readable images; see `open`."""
        with self.open(layers, kinds) as reader:
            return reader.read()


def pair_words(pairs: Collection[Pair]) -> str:
    """Pairs in words: 'ap of layers 1-4; cls of layers 12'."""
    kinds = dict.fromkeys(kind for _, kind in pairs)
    return "; ".join(f"{kind} of layers {layer_ranges(layer for layer, k in pairs if k == kind)}" for kind in kinds)


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
    """Write again the small files and folders that a repair or an interrupted prune removed from an entry."""
    for name in FOLDERS:
        if not (path / name).is_dir():
            (path / name).mkdir(exist_ok=True)
    absent = [name for name in (GROUP, *records.FILES, "entry.json") if not (path / name).exists()]
    contents = _files(spec, rows) if absent else {}
    for name in absent:  # entry.json last: it makes the folder an entry again
        with disk.atomic(path / name) as draft:
            draft.write_bytes(contents[name])


def _files(spec: FeatureSpec, rows: Samples) -> dict[str, bytes]:
    """Name → exact content of the files of an entry without tokens."""
    return rows.files() | {GROUP: zarr_group(spec.key).encode(), "entry.json": records.encode(spec).encode()}


def zarr_group(key: str) -> str:
    """Text of the file that makes the streams' folder a Zarr v3 group."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"mlfusion": key}}, indent=2)


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files below a folder; 0 if it does not exist."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as items:
        for item in items:
            with suppress(FileNotFoundError):
                is_folder = item.is_dir(follow_symlinks=False)
                total += folder_bytes(item.path) if is_folder else item.stat(follow_symlinks=False).st_size
    return total
