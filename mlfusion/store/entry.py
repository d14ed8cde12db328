"""One entry of the cache: the tokens of one split by one frozen model, with the labels and ids of its rows.

<key>/entry.json          the FeatureSpec whose digest is the folder's name
      ids.json labels.npy digests.npy      row by row: sample id, label, digest of the image's bytes
      groups-<digest>.json                 the group of each row, for those names that refer to it
      names/<digest>.json the names that users gave for this model and data set
      runs/<id>.json      provenance of each extraction: versions, device, rates; never part of the key
      leases/ pins/       marks of the processes that extract or read it
      tokens/<stream>/    stream.json; c/<shard>/ with the shard and its commit record, published in one step; and, once
                          all shards exist, manifest.json, which joins the records
"""

import json
import os
import re
import stat
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np

from mlfusion.errors import BadData, CacheUnusable, NotCached
from mlfusion.shapes import Bool, Float, Int, Num
from mlfusion.specs.identity import FeatureSpec, Pair, TokenKind
from mlfusion.specs.names import layer_ranges
from mlfusion.store import leases, records
from mlfusion.store.formats import FORMATS, ShardWriter
from mlfusion.store.reader import TokenReader
from mlfusion.store.records import Groups, Names, RunRecord, Samples, damaged, names_file, removed_message
from mlfusion.store.shard import Check, Source, spans
from mlfusion.store.stream import CHUNK, TOKENS, CommitRecord, Stream, StreamManifest
from mlfusion.system.tree import Tree

GROUP = f"{TOKENS}/zarr.json"
FOLDERS = (TOKENS, "names", "runs", "leases", "pins")
KEY = re.compile("[0-9a-f]{16}")
STREAM = re.compile(r"[a-z0-9]+(\.[a-z0-9]+)*\.L\d+([-.]\d+)*")  # the name of a stream's folder


class ShardDraft:
    """A shard that is being written. `publish` gives it its name; without it, the `with` removes the draft at its end."""

    def __init__(self, tree: Tree, entry: str, samples: Samples, stream: Stream, shard: int) -> None:
        """`entry` is the path of the entry below the cache's root, `samples` are all its rows."""
        self._tree, self._samples, self.stream, self.shard = tree, samples, stream, shard
        self.row = stream.rows(shard).start  # the next image to append
        self._skipped: dict[int, str] = {}
        folder = f"{entry}/{stream.folder}"
        self._final = f"{folder}/c/{shard}"
        writer = FORMATS[stream.format]
        with tree.drafted(folder) as self._draft:
            tree.make(self._draft)  # not its parents: a pruned entry must not come back
            *folders, _ = accumulate(writer.file.split("/"), "{}/{}".format)
            for inner in folders:
                tree.make(f"{self._draft}/{inner}")
            self._writer: ShardWriter = writer(partial(tree.create, f"{self._draft}/{writer.file}"), stream, shard)

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
            other = "run mlfusion doctor MODEL" if self.stream.dtype == "float32" else "use --dtype float32"
            where = f"layer {self.stream.layers[layer]} of image {self._samples.ids[self.row + row]!r}"
            raise BadData(f"{where} is not finite in {self.stream.dtype}; {other}, or look at that image")
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
        self._tree.write(f"{self._draft}/commit.json", records.encode(record).encode())
        return self._tree.publish_folder(self._draft, self._final)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.abandon()
        self._tree.remove(self._draft)


class Entry:
    """Reads and writes one folder of the cache; `lower` are the same entry's folders in lower layers, which are only read."""

    def __init__(self, path: Path, lower: Sequence["Entry"] = (), tree: Tree | None = None) -> None:
        """Read the entry's record: NotCached if it was removed, CacheUnusable if it is damaged or of a newer format."""
        self.path, self.lower, self.key = path, tuple(lower), path.name
        self.tree, self.at = tree or records.open_tree(path.parent.parent), f"{path.parent.name}/{path.name}"
        try:
            self.spec = records.load(self.tree, f"{self.at}/entry.json", FeatureSpec)
        except FileNotFoundError as err:
            raise NotCached(removed_message(path)) from err
        if why := "it does not belong to this folder" if self.spec.key != self.key else records.spec_fault(self.spec):
            raise damaged(path / "entry.json", why)

    @cached_property
    def samples(self) -> Samples:
        """All rows, those of skipped images included; checked against the key."""
        with suppress(Exception):  # NumPy parses a header as Python source: a changed byte can raise any exception
            found = Samples.read(self.tree, self.at, self.spec.data)
            if found.content == self.spec.data.content:
                return found
        self._state("entry.json")
        for name in records.FILES:
            try:
                os.close(self.tree.open(f"{self.at}/{name}"))
            except FileNotFoundError:
                break
            except OSError as err:
                raise records.unread(self.path / name, err) from err
        raise damaged(self.path, "ids, labels or digests of its images do not match its key")

    def aliases(self) -> dict[Names, int]:
        """All names under which this entry was extracted, and the time of the last such extraction in nanoseconds.

        The name extracted last is the last one.
        """
        times: dict[Names, int] = {}
        for entry in (self, *self.lower):
            with records.reading(entry.path):
                files = entry.tree.names(f"{entry.at}/names")
            for name in files:
                if name.endswith(".json"):
                    with suppress(FileNotFoundError):
                        names, time = entry.alias(name)
                        times[names] = max(time, times.get(names, 0))
        return dict(sorted(times.items(), key=lambda item: (item[1], item[0].dataset, item[0].split)))

    def alias(self, name: str) -> tuple[Names, int]:
        """The names in one file of the folder `names`, and its time in nanoseconds; errors as of `records.load`."""
        names, time = records.load_at(self.tree, f"{self.at}/names/{name}", Names)
        if name != names_file(names):
            raise damaged(self.path / "names" / name, "it is not named after what it holds")
        return names, time

    def groups(self, names: Names) -> Groups | None:
        """The groups of all rows under one of its names; None if it has none, CacheUnusable if they are damaged."""
        for entry in (self, *self.lower) if names.groups else ():
            with suppress(FileNotFoundError):
                return Groups.read(entry.tree, entry.at, names.groups, self.spec.data.images)
        if names.groups:
            raise damaged(self.path / records.groups_file(names.groups), "it is not there")
        return None

    def names(self) -> list[Names]:
        """All names under which this entry was extracted; the name extracted last is the last one."""
        return list(self.aliases())

    def folder(self, stream: Stream) -> Path:
        """Whole path of a stream's folder, for messages."""
        return self.path / stream.folder

    def streams(self) -> list[Stream]:
        """All streams in this folder, complete or not; CacheUnusable if one cannot be this entry's."""
        found = [stream for stream, _ in self._opened()]
        if not found and self.tree.stat(f"{self.at}/entry.json") is None:
            raise NotCached(removed_message(self.path))
        return found

    def _opened(self, *, use: bool = False) -> Iterator[tuple[Stream, Tree]]:
        """Each stream and its folder, which is open until the next one; with `use`, the entry counts as read now."""
        with records.reading(self.path), suppress(FileNotFoundError), self.tree.hold(self.at) as entry:
            if use:
                with suppress(OSError):
                    entry.touch("entry.json")  # for `prune`, which removes the least recently used entries
            with entry.hold(TOKENS) as tokens:
                for name in filter(STREAM.fullmatch, tokens.names()):
                    with suppress(FileNotFoundError), tokens.hold(name) as folder:
                        yield self._stream(folder, name), folder

    def stream(self, name: str) -> Stream:
        """The stream in one folder; errors as of `records.load`."""
        with self.tree.hold(f"{self.at}/{TOKENS}/{name}") as folder:
            return self._stream(folder, name)

    def _stream(self, folder: Tree, name: str) -> Stream:
        stream = records.load(folder, "stream.json", Stream)
        if why := self.stream_fault(stream, name):
            raise damaged(folder.path("stream.json"), why)
        return stream

    def stream_fault(self, stream: Stream, name: str) -> str:
        """Why a stream cannot be that in the folder `name` of this entry, in words; '' if it can."""
        return "it is another stream's" if stream.name != name else stream.fault(self.spec)

    def complete_streams(self) -> list[Stream]:
        """Streams of which every shard is in this folder."""
        return [stream for stream, folder in self._opened() if folder.require("manifest.json", stat.S_IFREG)]

    def missing_shards(self, stream: Stream) -> list[int]:
        """Numbers of a stream's shards that are not published yet; CacheUnusable if the rows are damaged."""
        if stream.images != len(
            self.samples
        ):  # their number is that in the entry's record: no list of any length is made
            raise damaged(self.folder(stream), "it has not as many images as its entry")
        present = set(self.tree.names(f"{self.at}/{stream.folder}/c"))
        return [shard for shard in range(stream.shards) if str(shard) not in present]

    def missing(self, pairs: frozenset[Pair]) -> dict[Stream, set[int]]:
        """Missing shards of the streams that hold one of `pairs`; every worker gets the same streams in the same order."""
        incomplete = pairs - self.complete_pairs()
        streams = (stream for stream in self.streams() if stream.pairs & incomplete)
        return {stream: missing for stream in streams if (missing := set(self.missing_shards(stream)))}

    def sources(self, *, use: bool = False) -> dict[Pair, Source]:
        """(layer, kind) → the complete stream that holds it, in this folder or a lower layer; `use` as for `_opened`."""
        found: dict[Pair, Source] = {}
        for stream, folder in self._opened(use=use):
            with suppress(FileNotFoundError):
                manifest = self._manifest(folder, stream)
                found |= dict.fromkeys(stream.pairs, Source(self.tree, self.at, stream, manifest))
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
        return np.setdiff1d(np.arange(len(self.samples)), np.fromiter(self.skipped(), np.int64))

    def read_at(self) -> float:
        """Time at which this was last extracted or read, in seconds of the file system's clock.

        A reader who may not write here leaves no mark but the access time of the shards, where the system keeps it.
        """
        times = [state.st_mtime for state in map(self._state, ("names", "entry.json"))]
        for stream in self.complete_streams():
            with suppress(FileNotFoundError), self.tree.hold(f"{self.at}/{stream.folder}/c") as shards:
                files = (f"{shard}/{FORMATS[stream.format].file}" for shard in range(stream.shards))
                times += [state.st_atime for state in map(shards.stat, files) if state]
        return max(times)

    def _state(self, name: str) -> os.stat_result:
        if state := self.tree.stat(f"{self.at}/{name}"):
            return state
        raise NotCached(removed_message(self.path))

    def nbytes(self) -> int:
        """Bytes of the stored numbers of the complete streams in this folder."""
        return sum(stream.nbytes for stream in self.complete_streams())

    def size(self) -> int:
        """Bytes on disk of this folder."""
        return self.tree.size(self.at)

    def add_alias(self, names: Names, at_ns: int | None = None, *, groups: Groups | None = None) -> None:
        """Record that this was extracted under these names, with their groups, now or at a time in nanoseconds."""
        if groups and not self.tree.require(
            f"{self.at}/{groups.file}", stat.S_IFREG
        ):  # before the names that refer to it
            self.tree.publish(f"{self.at}/{groups.file}", groups.encoded())
        path = f"{self.at}/names/{names_file(names)}"
        if not self.tree.stat(path):
            self.tree.publish(path, records.encode(names).encode())
        self.tree.touch(path, at_ns)

    def mark_used(self, names: Names, groups: Groups | None = None) -> None:
        """Make these names refer to this entry from now on; a read-only cache is left as it is."""
        with suppress(OSError):
            self.add_alias(names, groups=groups)
            self.tree.touch(f"{self.at}/names")

    def record_run(self, run: RunRecord) -> None:
        """Add the provenance of an extraction."""
        self.tree.publish(f"{self.at}/runs/{uuid.uuid4().hex[:12]}.json", records.encode(run).encode())

    def begin(self, streams: Iterable[Stream]) -> None:
        """Create the folders of new streams; of two writers of the same stream the first one's shard sizes count."""
        for stream in streams:
            with self.tree.drafted(f"{self.at}/{TOKENS}") as draft:
                self.tree.make(draft)  # not its parents: a pruned entry must not come back
                self.tree.make(f"{draft}/c")
                texts = FORMATS[stream.format].describe(stream) | {"stream.json": records.encode(stream)}
                for name, text in texts.items():
                    self.tree.write(f"{draft}/{name}", text.encode())
            self.tree.publish_folder(draft, f"{self.at}/{stream.folder}")

    def draft(self, stream: Stream, shard: int) -> ShardDraft:
        """Begin a shard."""
        return ShardDraft(self.tree, self.at, self.samples, stream, shard)

    def seal(self) -> None:
        """Publish the manifest of every stream with all shards; CacheUnusable if a shard holds rows of other samples."""
        for stream in self.streams():
            path = f"{self.at}/{stream.folder}/manifest.json"
            if not self.tree.require(path, stat.S_IFREG) and not self.missing_shards(stream):
                parts = [self.record(stream, shard) for shard in range(stream.shards)]
                self.tree.publish(path, records.encode(StreamManifest.join(stream, parts)).encode())

    def manifest(self, stream: Stream) -> StreamManifest:
        """The manifest of a stream: CacheUnusable if it is damaged, FileNotFoundError if the stream is not complete."""
        with self.tree.hold(f"{self.at}/{stream.folder}") as folder:
            return self._manifest(folder, stream)

    def _manifest(self, folder: Tree, stream: Stream) -> StreamManifest:
        manifest = records.load(folder, "manifest.json", StreamManifest, most=records.MANIFEST_BYTES)
        if manifest.stream != stream or not manifest.fits(stream, range(stream.shards)):
            raise damaged(folder.path("manifest.json"), "it is another stream's")
        return manifest

    def record(self, stream: Stream, shard: int) -> CommitRecord:
        """The commit record of a shard: CacheUnusable if it is damaged, FileNotFoundError if there is no such shard."""
        path = f"{self.at}/{stream.folder}/c/{shard}/commit.json"
        record = records.load(self.tree, path, CommitRecord)
        rows = self.samples.digest_of(stream.rows(shard))
        same = (record.stream, record.shard, record.samples) == (stream.name, shard, (rows,))
        if not same or not record.fits(stream, range(shard, shard + 1)):
            raise damaged(self.tree.path(path), "it is another shard's")
        return record

    def sweep(self) -> None:
        """Remove drafts, leases and pins of dead processes."""
        for folder in ("", *(f"/{name}" for name in FOLDERS), *(f"/{stream.folder}" for stream in self.streams())):
            self.tree.sweep(f"{self.at}{folder}")
        for name in ("leases", "pins"):
            leases.sweep(self.tree, f"{self.at}/{name}")

    def open(
        self, layers: Sequence[int], kinds: Sequence[TokenKind], *, check: Check = "once", without: Collection[int] = ()
    ) -> TokenReader:
        """A reader of [readable images, layers, tokens, width], without those in the rows `without`.

        The third axis holds the kinds one after another; layers narrower than the widest are padded with zeros. NotCached if
        a (layer, kind) is not, or not completely, in the cache; CacheUnusable if a record is damaged.
        """
        sources = self.sources(use=True)
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
            (len(self.samples), len(layers), ends[-1], width),
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


def draft_entry(tree: Tree, folder: str, spec: FeatureSpec, rows: Samples) -> str:
    """Write a new entry into a draft in `folder`, ready to be published; returns the draft's path."""
    with tree.drafted(folder) as draft:
        tree.make(draft)
        for name in FOLDERS:
            tree.make(f"{draft}/{name}")
        for name, content in _files(spec, rows).items():
            tree.write(f"{draft}/{name}", content)
    return draft


def restore_missing_files(tree: Tree, at: str, spec: FeatureSpec, rows: Samples) -> None:
    """Write again the small files and folders that a repair or an interrupted prune removed from an entry."""
    for name in FOLDERS:
        if not tree.require(f"{at}/{name}", stat.S_IFDIR):
            with suppress(FileExistsError):
                tree.make(f"{at}/{name}")
    names = (GROUP, *records.FILES, "entry.json")
    absent = [name for name in names if not tree.require(f"{at}/{name}", stat.S_IFREG)]
    contents = _files(spec, rows) if absent else {}
    for name in absent:  # entry.json last: it makes the folder an entry again
        tree.publish(f"{at}/{name}", contents[name])


def _files(spec: FeatureSpec, rows: Samples) -> dict[str, bytes]:
    """Name → exact content of the files of an entry without tokens."""
    return rows.files() | {GROUP: zarr_group(spec.key).encode(), "entry.json": records.encode(spec).encode()}


def zarr_group(key: str) -> str:
    """Text of the file that makes the streams' folder a Zarr v3 group."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"mlfusion": key}}, indent=2)
