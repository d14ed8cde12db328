"""One entry of the cache: the tokens of one split under one frozen model, with the labels and ids that go with its rows.

<key>/entry.json          the FeatureSpec whose digest is the folder's name, and the class names
      ids.json labels.npy digests.npy      row by row: sample id, label, digest of the image's bytes
      names/<digest>.json what people have called this model and data set
      runs/<id>.json      provenance of each extraction: versions, device, rates; never part of the key
      leases/ pins/       who extracts, who reads
      tokens/<stream>/    stream.json; c/<shard>/, a folder that comes whole: the shard and its commit record; and once all
                          shards are there manifest.json, which joins the records
"""

import io
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from mlfusion import disk
from mlfusion.errors import BadData, CacheUnusable, NotCached
from mlfusion.specs import FORMAT, DataSpec, FeatureSpec, ModelSpec, Pair, TokenKind, digest, layer_ranges
from mlfusion.store import claims
from mlfusion.store.claims import Leases
from mlfusion.store.formats import FORMATS, ShardWriter
from mlfusion.store.manifest import Manifest
from mlfusion.store.reader import Check, Source, TokenReader, damaged, gone, spans
from mlfusion.store.stream import FormatName, Stream

TOKENS = "tokens"
FOLDERS = (TOKENS, "names", "runs", "leases", "pins")
SAMPLES = ("ids.json", "labels.npy", "digests.npy")


@dataclass(frozen=True, eq=False)
class Samples:
    """The rows of a split, in order."""

    ids: tuple[str, ...]
    labels: np.ndarray  # see `as_kept`
    digests: np.ndarray  # [images, 16] uint8, of each image's encoded bytes
    classes: tuple[str, ...]  # of a number: what it is called, or nothing

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", as_kept(self.labels, self.ids, self.classes))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def content(self) -> str:
        """Digest of ids, bytes and labels in their order: what a DataSpec is identified by."""
        return digest([list(self.ids), self.labels.tolist(), self.digests.tobytes().hex()], 64)

    def files(self) -> dict[str, bytes]:
        """The entry's files that hold them, by name, to the byte."""
        found = {"ids.json": json.dumps(self.ids, ensure_ascii=False).encode()}
        for name, table in {
            "labels.npy": self.labels.astype(self.labels.dtype.newbyteorder("<")),
            "digests.npy": self.digests,
        }.items():
            np.save(file := io.BytesIO(), table, allow_pickle=False)
            found[name] = file.getvalue()
        return found

    def of(self, rows: range) -> str:
        """Digest of some rows: a shard's record carries it, so that its rows are those of these samples."""
        some = slice(rows.start, rows.stop)
        text = json.dumps([rows.start, self.ids[some], self.labels[some].tolist(), self.digests[some].tobytes().hex()])
        return xxhash.xxh3_128_hexdigest(text.encode())


def as_kept(labels: np.ndarray, ids: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Labels in the type that the cache keeps their kind in.

    One class an image: [images] int64, an index into `classes`. Several labels: [images, classes] uint8 of 0 and 1. A
    number: [images] float64.

    Raises:
        BadData: they are of no kind, not as many as the images, or one of them is out of range; names the image.
    """
    allowed = (
        "allowed: [images] whole numbers, an index into the classes; [images, classes] of 0 and 1, several labels an "
        "image; or [images] floating-point numbers. Give every image its label in one of these ways"
    )
    kind, shape, several = labels.dtype.kind, labels.shape, (len(ids), len(classes))
    if shape != several[: labels.ndim] or not (
        (labels.ndim == 1 and kind in "iuf") or (labels.ndim == 2 and kind in "iufb")
    ):
        raise BadData(
            f"{several[0]:,} images of {several[1]:,} classes have labels of shape {shape} and type {labels.dtype}; {allowed}"
        )
    if labels.ndim == 2:
        sound, said, kept = ((labels == 0) | (labels == 1)).all(1), "a 0 or 1 for every class", "u1"
    elif kind == "f":
        sound, said, kept = np.isfinite(labels), "a finite number", "f8"
    else:
        sound, said, kept = (labels >= 0) & (labels < len(classes)), f"0 to {len(classes) - 1}", "i8"
    if not sound.all():
        row = int(np.flatnonzero(~sound)[0])
        raise BadData(
            f"image {ids[row]!r} has the label {labels[row].tolist()}; allowed: {said}. Mend it in the data set"
        )
    return labels.astype(kept, copy=False)


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the user called a model and a data set, and what that stood for: a hub id or a folder. Never in the key."""

    model: str
    model_source: str
    dataset: str
    dataset_source: str


class Entry:
    """Reads and fills one folder of the cache. Made by FeatureStore.

    In a layered cache `below` are the same entry's folders in the caches that lie below this one: they are read, and only
    this one is written.
    """

    def __init__(self, path: Path, below: Sequence["Entry"] = ()) -> None:
        self.path, self.below = path, tuple(below)
        try:
            body = disk.read_json(path / "entry.json")
            if body["format"] > FORMAT:
                raise CacheUnusable(
                    f"{path} has format {body['format']}, this mlfusion reads {FORMAT}; update mlfusion"
                )
            kinds = tuple(body["model"].get("kinds", ()))  # entries of earlier versions do not say
            model, data = (
                ModelSpec(**{**body["model"], "kinds": kinds}),
                DataSpec(**{**body["data"], "classes": tuple(body["classes"])}),
            )
            self.spec = FeatureSpec(model=model, data=data, dtype=body["dtype"], format=body["format"])
        except FileNotFoundError as err:
            raise NotCached(gone(path)) from err
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise damaged(path / "entry.json", str(err)) from err
        if self.spec.key != path.name:
            raise damaged(path / "entry.json", "it does not belong to this folder")

    @staticmethod
    def draft_in(folder: Path, spec: FeatureSpec, samples: Samples) -> Path:
        """A new entry's folder under a draft's name, ready to be published."""
        with disk.drafted(disk.draft_name(folder)) as draft:
            draft.mkdir()
            for name in FOLDERS:
                (draft / name).mkdir()
            for name, content in samples.files().items():
                (draft / name).write_bytes(content)
                disk.flush(draft / name)
            disk.write(draft / TOKENS / "zarr.json", Entry.group(spec.key))
            data = asdict(spec.data)
            del data["classes"]
            body = {
                "format": spec.format,
                "dtype": spec.dtype,
                "model": asdict(spec.model),
                "data": data,
                "classes": spec.data.classes,
            }
            disk.write(draft / "entry.json", disk.sealed(body))
        return draft

    @staticmethod
    def group(key: str) -> str:
        """What makes the folder of the streams a Zarr v3 group."""
        return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"mlfusion": key}}, indent=2)

    @staticmethod
    def mend(path: Path, spec: FeatureSpec, samples: Samples) -> None:
        """Put back what a repair took out of an entry's folder, or what a prune had begun to take."""
        for name in FOLDERS:
            if not (path / name).is_dir():
                (path / name).mkdir(exist_ok=True)
        group = path / TOKENS / "zarr.json"
        if not group.exists():
            disk.write(draft := disk.draft_name(group.parent), Entry.group(spec.key))
            disk.publish_file(draft, group)
        lost = [name for name in ("entry.json", *SAMPLES) if not (path / name).exists()]
        if lost:
            draft = Entry.draft_in(path.parent, spec, samples)
            for name in sorted(lost, key="entry.json".__eq__):  # which makes it an entry again, last
                disk.publish_file(draft / name, path / name)
            disk.remove(draft)

    @property
    def key(self) -> str:
        """The folder's name: the digest of its FeatureSpec."""
        return self.path.name

    @cached_property
    def samples(self) -> Samples:
        """Every row, read images and skipped ones alike; checked against the key."""
        try:
            ids = tuple(json.loads((self.path / "ids.json").read_text(encoding="utf-8")))
            labels = np.load(self.path / "labels.npy", allow_pickle=False)
            digests = np.load(self.path / "digests.npy", allow_pickle=False)
            samples = Samples(ids, labels, digests, self.spec.data.classes)
            sound = samples.content == self.spec.data.content
        except Exception:  # noqa: BLE001 - NumPy reads a header as Python source, so a changed byte raises what Python can
            sound = False
        if not sound and not (self.path / "entry.json").exists():
            raise NotCached(gone(self.path))
        if not sound:
            raise damaged(self.path, "ids, labels or digests of its images do not match its key")
        return samples

    @property
    def names(self) -> list[Names]:
        """Every pair of names under which this entry was extracted, the earliest first."""
        every: dict[Names, None] = {}
        for entry in (self, *self.below):
            with suppress(FileNotFoundError), os.scandir(entry.path / "names") as found:
                files = [file for file in found if file.name.endswith(".json")]
                for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name)):
                    every[Names(**disk.read_json(Path(file.path)))] = None
        return list(every)

    def call(self, names: Names) -> None:
        """Record one more pair of names."""
        file = self.path / "names" / f"{digest(names)}.json"
        if not file.exists():
            disk.publish_json(file, asdict(names))

    def use(self, names: Names) -> None:
        """Make this the entry that these names mean now; a cache that can only be read goes without."""
        with suppress(OSError):
            self.call(names)
            os.utime(self.path / "names")

    def record_run(self, provenance: dict[str, Any]) -> None:
        """Keep how an extraction went: versions, device, images a second."""
        disk.publish_json(self.path / "runs" / f"{uuid.uuid4().hex[:12]}.json", provenance)

    # --- what is there, what is not ---------------------------------------------------------------------------------

    def streams(self) -> list[Stream]:
        """Every stream that was begun in this folder."""
        found = []
        for folder in disk.finished(self.path / TOKENS, "stream.json"):
            try:
                found.append(Stream.from_json(disk.read_json(folder / "stream.json")))
            except FileNotFoundError as err:
                raise NotCached(gone(self.path)) from err
            except ValueError as err:
                raise damaged(folder / "stream.json", str(err)) from err
        return found

    def missing_shards(self, stream: Stream) -> list[int]:
        """Shards of a stream that are not there yet."""
        with suppress(FileNotFoundError):
            present = set(os.listdir(self.folder(stream) / "c"))
            return [shard for shard in range(stream.shards) if str(shard) not in present]
        return list(range(stream.shards))

    def sources(self) -> dict[Pair, Source]:
        """Every (layer, kind) that is wholly there, here or below, and the stream to read it from."""
        found: dict[Pair, Source] = {}
        for stream in self.streams():
            path = self.folder(stream) / "manifest.json"
            with suppress(FileNotFoundError):
                body = disk.read_json(path)
                try:
                    manifest = Manifest.from_json(body)
                    if Stream.from_json(body["stream"]) != stream or not manifest.fits(stream):
                        raise ValueError("it is another stream's")
                except (ValueError, KeyError, TypeError) as err:
                    raise damaged(path, str(err)) from err
                source = Source(path.parent, stream, manifest)
                found |= dict.fromkeys(stream.pairs, source)
        for entry in self.below:
            found = entry.sources() | found
        return found

    def held(self) -> frozenset[Pair]:
        """Every (layer, kind) of which all shards are there."""
        return frozenset().union(*(s.pairs for s in self.whole()), *(entry.held() for entry in self.below))

    def whole(self) -> list[Stream]:
        """Streams of which all shards are in this folder."""
        return [stream for stream in self.streams() if (self.folder(stream) / "manifest.json").exists()]

    def skipped(self, sources: Mapping[Pair, Source] | None = None) -> dict[int, str]:
        """Row → why its image could not be read; `sources` are these, where somebody read them already."""
        found: dict[int, str] = {}
        for source in dict.fromkeys((self.sources() if sources is None else sources).values()):
            found |= source.manifest.skipped
        return dict(sorted(found.items()))

    def unreadable(self, skipped: Mapping[int, str] | None = None) -> dict[str, str]:
        """The same by sample id."""
        skipped = self.skipped() if skipped is None else skipped
        ids = self.samples.ids if skipped else ()
        return {ids[row]: why.removeprefix(f"{ids[row]} cannot be read: ") for row, why in skipped.items()}

    @property
    def rows(self) -> np.ndarray:
        """[readable images] int64: the rows that hold tokens."""
        return np.setdiff1d(np.arange(self.spec.data.images), np.fromiter(self.skipped(), np.int64))

    @property
    def touched(self) -> int:
        """When this was last extracted or reused by an extraction, in nanoseconds; only ever compared."""
        return max(entry._changed("names") for entry in (self, *self.below))

    @property
    def used(self) -> float:
        """When this was last extracted or read, in seconds of the file system's clock."""
        return max(map(self._changed, ("names", "entry.json"))) / 1e9

    def _changed(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_mtime_ns
        except FileNotFoundError as err:
            raise NotCached(gone(self.path)) from err

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are wholly there, in this folder alone, by arithmetic."""
        return sum(stream.nbytes for stream in self.whole())

    def size(self) -> int:
        """Bytes on disk, of this folder alone."""
        return folder_bytes(self.path)

    def folder(self, stream: Stream) -> Path:
        """Where a stream lies."""
        return self.path / TOKENS / stream.name

    # --- writing ----------------------------------------------------------------------------------------------------

    def begin(self, streams: Iterable[Stream]) -> None:
        """Make the folders of new streams; of two writers with the same stream the first one's cutting stands."""
        for stream in streams:
            with disk.drafted(disk.draft_name(self.path / TOKENS)) as draft:
                draft.mkdir()  # not its parents: what a prune took away stays away
                (draft / "c").mkdir()
                for name, text in FORMATS[stream.format].describe(stream).items():
                    disk.write(draft / name, text)
                disk.write(draft / "stream.json", disk.sealed(stream.to_json()))
            disk.publish_folder(draft, self.folder(stream))

    def leases(self) -> Leases:
        """For one worker, to take shards by `lease_name`."""
        return Leases(self.path / "leases")

    @staticmethod
    def lease_name(stream: Stream, shard: int) -> str:
        """The piece of work that a shard is."""
        return f"{stream.name}~{shard}"

    def draft(self, stream: Stream, shard: int) -> "ShardDraft":
        """Begin a shard."""
        return ShardDraft(self, stream, shard)

    def seal(self) -> None:
        """Publish the manifest of every stream whose shards are all there.

        Raises:
            CacheUnusable: a shard holds rows of other samples than this entry's.
        """
        for stream in self.streams():
            path = self.folder(stream) / "manifest.json"
            if not path.exists() and not self.missing_shards(stream):
                records = [self.record(stream, shard) for shard in range(stream.shards)]
                disk.publish_json(path, {"stream": stream.to_json(), **Manifest.join(records).to_json()})

    def record(self, stream: Stream, shard: int) -> Manifest:
        """The commit record of a shard."""
        path = self.folder(stream) / "c" / str(shard) / "commit.json"
        body = disk.read_json(path)
        record = Manifest.from_json(body)
        if (body["stream"], body["shard"]) != (stream.name, shard) or record.samples[0] != self.sample_digest(
            stream, shard
        ):
            raise damaged(path, "it is another shard's")
        return record

    def sample_digest(self, stream: Stream, shard: int) -> str:
        """What a shard's record must say of its rows."""
        return self.samples.of(stream.rows(shard))

    def sweep(self) -> None:
        """Remove what killed writers left behind."""
        for folder in (self.path, *(self.path / name for name in FOLDERS), *map(self.folder, self.streams())):
            disk.sweep(folder)
        for name in ("leases", "pins"):
            claims.sweep(self.path / name)

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
            os.utime(self.path / "entry.json")  # for `prune`, which takes what was not used for longest
        home = self.sources()
        wanted = [(layer, kind) for layer in layers for kind in kinds]
        if absent := [pair for pair in wanted if pair not in home]:
            names = "; ".join(
                f"{kind} of layers {layer_ranges(layer for layer, k in absent if k == kind)}"
                for kind in dict.fromkeys(kind for _, kind in absent)
            )
            raise NotCached(f"not in the cache: {names}")
        counts = [home[layers[0], kind].stream.tokens for kind in kinds]
        if any(
            home[layer, kind].stream.tokens != count
            for layer in layers
            for kind, count in zip(kinds, counts, strict=True)
        ):
            raise CacheUnusable(f"{self.path}: layers differ in their number of tokens; read them one at a time")
        ends = np.cumsum([0, *counts]).tolist()
        planes: dict[Source, list[tuple[int, int, int, int]]] = {}
        for li, layer in enumerate(layers):
            for ki, kind in enumerate(kinds):
                source = home[layer, kind]
                place = source.stream.plane(layer, kind)
                planes.setdefault(source, []).append((li, ends[ki], *place))
        skipped = {row for source in home.values() for row in source.manifest.skipped}
        return TokenReader(
            [span for source, where in planes.items() for span in spans(source, where)],
            layers=len(layers),
            tokens=ends[-1],
            width=max(source.stream.width for source in planes),
            images=self.spec.data.images,
            skipped=sorted(skipped),
            check=check,
        )

    def read(self, layers: Sequence[int], kinds: Sequence[TokenKind]) -> np.ndarray:
        """[readable images, layers, tokens, width]: `open` and read everything."""
        with self.open(layers, kinds) as reader:
            return reader.read()


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files below a folder; 0 if it is not there."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as found:
        for one in found:
            with suppress(FileNotFoundError):
                inner = one.is_dir(follow_symlinks=False)
                total += folder_bytes(one.path) if inner else one.stat(follow_symlinks=False).st_size
    return total


class ShardDraft:
    """A shard being written. `publish` gives it its name; leaving without that leaves nothing behind."""

    def __init__(self, entry: Entry, stream: Stream, shard: int) -> None:
        self._entry, self._stream, self._shard = entry, stream, shard
        self._row = stream.rows(shard).start
        self._skipped: dict[int, str] = {}
        self._final = entry.folder(stream) / "c" / str(shard)
        self._draft = disk.draft_name(entry.folder(stream))
        file = self._draft / FORMATS[stream.format].file
        with disk.drafted(self._draft):
            self._draft.mkdir()  # likewise
            file.parent.mkdir(parents=True, exist_ok=True)
            self._writer: ShardWriter | None = FORMATS[stream.format].writer(file, stream, shard)

    @property
    def row(self) -> int:
        """The image whose tokens come next."""
        return self._row

    def append(self, tokens: np.ndarray, unread: Mapping[int, str] = {}) -> None:
        """The shard's next rows, [rows, layers, kinds x tokens, width]; `unread` says of which, and why, there is no image.

        Raises:
            BadData: a value is not finite, or too large for the cache's dtype; the image is named.
        """
        self.append_stored(self._stream.encoding.encode(tokens), unread)

    def append_stored(self, stored: np.ndarray, unread: Mapping[int, str] = {}) -> None:
        """Likewise, of rows that are encoded already."""
        assert self._writer is not None
        encoding = self._stream.encoding
        finite = np.all(encoding.finite(stored), axis=2)  # [rows, layers]
        missing = [row - self._row for row in unread]
        finite[missing] = True
        if not finite.all():
            row, layer = (int(i[0]) for i in np.nonzero(~finite))
            raise BadData(
                f"layer {self._stream.layers[layer]} of image {self._entry.samples.ids[self._row + row]!r} is not finite "
                f"in {self._stream.dtype}; use --dtype float32, or look at that image"
            )
        if missing:
            stored = stored.copy()
            stored[missing] = encoding.blank()
            self._skipped |= unread
        self._writer.append(stored)
        self._row += len(stored)

    def publish(self) -> bool:
        """Flush and name the shard with its record; False if another writer had published it meanwhile."""
        assert self._writer is not None and self._row == self._stream.rows(self._shard).stop
        written = self._writer.close()
        self._writer = None
        record = Manifest(
            sizes=(written.size,),
            digests=(written.digest,),
            samples=(self._entry.sample_digest(self._stream, self._shard),),
            skipped=self._skipped,
            offsets=written.offsets,
            crc32c=written.crc32c,
            xxh3=written.xxh3,
        )
        body = {"stream": self._stream.name, "shard": self._shard, **record.to_json()}
        disk.write(self._draft / "commit.json", disk.sealed(body))
        return disk.publish_folder(self._draft, self._final)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        disk.remove(self._draft)


def streams_for(shapes: Mapping[Pair, tuple[int, int]], *, images: int, dtype: Any, format: FormatName) -> list[Stream]:
    """Cut (layer, kind) pairs into as few streams as their shapes, (tokens, width) of an image, allow."""
    kinds_of: dict[tuple[int, int, int], list[TokenKind]] = {}
    for (layer, kind), (count, width) in sorted(shapes.items()):
        kinds_of.setdefault((layer, width, count), []).append(kind)
    groups: dict[tuple[int, int, tuple[TokenKind, ...]], list[int]] = {}
    for (layer, width, count), kinds in kinds_of.items():
        groups.setdefault((width, count, tuple(kinds)), []).append(layer)
    return [
        Stream.cut(
            [(layer, kind) for layer in layers for kind in kinds],
            tokens=count,
            width=width,
            images=images,
            dtype=dtype,
            format=format,
        )
        for (width, count, kinds), layers in groups.items()
    ]
