"""One entry of the cache: the tokens of one split under one frozen model, with the labels and ids that go with its rows.

<key>/entry.json          the FeatureSpec whose digest is the folder's name, and the class names
      ids.json labels.npy digests.npy      row by row: sample id, label, digest of the image's bytes
      zarr.json           so that the folder opens as a Zarr group
      names/<digest>.json what people have called this model and data set
      skipped/<row>.json  images that could not be read; their rows are NaN on disk and left out by readers
      runs/<id>.json      provenance of each extraction: versions, device, rates; never part of the key
      <stream>/           stream.json, and one file a shard: absent or complete
"""

import json
import os
import uuid
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from mlfusion import disk
from mlfusion.errors import BadData, CacheUnusable, NotCached
from mlfusion.specs import DataSpec, FeatureSpec, ModelSpec, Pair, TokenKind, digest, layer_ranges
from mlfusion.store.formats import FORMATS, OpenShard, ShardWriter
from mlfusion.store.stream import FormatName, Stream

TOKENS = "tokens"


@dataclass(frozen=True, eq=False)
class Samples:
    """The rows of a split, in order."""

    ids: tuple[str, ...]
    labels: np.ndarray  # [images] int64, an index into classes
    digests: np.ndarray  # [images, 16] uint8, of each image's encoded bytes
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def content(self) -> str:
        """Digest of ids, bytes and labels in their order: what a DataSpec is identified by."""
        return digest([list(self.ids), self.labels.tolist(), self.digests.tobytes().hex()], 64)


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the user called a model and a data set, and what that stood for: a hub id or a folder. Never in the key."""

    model: str
    model_source: str
    dataset: str
    dataset_source: str


class Entry:
    """Reads and fills one folder of the cache. Made by FeatureStore."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            body = json.loads((path / "entry.json").read_text(encoding="utf-8"))
            model, data = ModelSpec(**body["model"]), DataSpec(**{**body["data"], "classes": tuple(body["classes"])})
            self.spec = FeatureSpec(model=model, data=data, dtype=body["dtype"], format=body["format"])
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise CacheUnusable(f"{path} is not an entry of the cache ({err}); delete it and extract again") from err
        if self.spec.key != path.name:
            raise CacheUnusable(f"{path}/entry.json does not belong to this folder; delete the folder, extract again")

    @property
    def key(self) -> str:
        """The folder's name: the digest of its FeatureSpec."""
        return self.path.name

    @cached_property
    def samples(self) -> Samples:
        """Every row, read images and skipped ones alike; checked against the key."""
        ids = tuple(json.loads((self.path / "ids.json").read_text(encoding="utf-8")))
        labels = np.load(self.path / "labels.npy", allow_pickle=False)
        digests = np.load(self.path / "digests.npy", allow_pickle=False)
        samples = Samples(ids, labels, digests, self.spec.data.classes)
        if samples.content != self.spec.data.content:
            raise CacheUnusable(f"{self.path}: ids, labels or digests are damaged; delete the folder, extract again")
        return samples

    @property
    def names(self) -> list[Names]:
        """Every pair of names under which this entry was extracted, the earliest first."""
        files = sorted((self.path / "names").glob("*.json"), key=lambda file: (file.stat().st_mtime_ns, file.name))
        return [Names(**json.loads(file.read_text(encoding="utf-8"))) for file in files]

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
        """Every stream that was begun."""
        folders = disk.finished(self.path / TOKENS, "stream.json")
        return [Stream.from_json(json.loads((folder / "stream.json").read_text())) for folder in folders]

    def missing_shards(self, stream: Stream) -> list[int]:
        """Shards of a stream that are not there yet."""
        folder = self.path / TOKENS / stream.name
        present = {file.name for file in folder.iterdir()}
        name = FORMATS[stream.format].file
        return [shard for shard in range(stream.shards) if name(shard) not in present]

    def held(self) -> frozenset[Pair]:
        """Every (layer, kind) of which all shards are there."""
        return frozenset(p for stream in self.streams() if not self.missing_shards(stream) for p in stream.pairs)

    @property
    def touched(self) -> int:
        """When this was last extracted or reused by an extraction, in nanoseconds; only ever compared."""
        return (self.path / "names").stat().st_mtime_ns

    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    # --- writing ----------------------------------------------------------------------------------------------------

    def begin(self, streams: Iterable[Stream]) -> None:
        """Make the folders of new streams; of two writers with the same stream the first one's cutting stands."""
        for stream in streams:
            draft = disk.draft_name(self.path / TOKENS)
            draft.mkdir()
            for name, text in FORMATS[stream.format].describe(stream).items():
                (draft / name).write_text(text)
            (draft / "stream.json").write_text(json.dumps(stream.to_json(), indent=2))
            disk.publish_folder(draft, self.path / TOKENS / stream.name)

    def draft(self, stream: Stream, shard: int) -> "ShardDraft":
        """Begin a shard."""
        return ShardDraft(self, stream, shard)

    def skip(self, row: int, why: str) -> None:
        """Record that a row's image cannot be read."""
        file = self.path / "skipped" / f"{row:09d}.json"
        if not file.exists():
            disk.publish_json(file, {"row": row, "id": self.samples.ids[row], "why": why})

    def skipped(self) -> dict[int, str]:
        """Row → why its image could not be read."""
        bodies = (json.loads(file.read_text(encoding="utf-8")) for file in (self.path / "skipped").glob("*.json"))
        return {body["row"]: body["why"] for body in sorted(bodies, key=lambda body: body["row"])}

    def sweep(self) -> None:
        """Remove what killed writers left behind."""
        for folder in (self.path, *(folder for folder in self.path.rglob("*") if folder.is_dir())):
            disk.sweep(folder)

    # --- reading ----------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> np.ndarray:
        """[readable images] int64: the rows that hold tokens."""
        return np.setdiff1d(np.arange(self.spec.data.images), np.fromiter(self.skipped(), np.int64))

    def read(self, layers: Sequence[int], kinds: Sequence[TokenKind]) -> np.ndarray:
        """[readable images, layers, tokens, width] in the entry's dtype; the third axis holds the kinds one after another.

        Layers narrower than the widest are padded with zeros. Every checksum on the way is checked.

        Raises:
            NotCached: a (layer, kind) that is not, or not wholly, in the cache.
            CacheUnusable: a shard is damaged.
        """
        home = {p: stream for stream in self.streams() if not self.missing_shards(stream) for p in stream.pairs}
        wanted = [(layer, kind) for layer in layers for kind in kinds]
        absent = [pair for pair in wanted if pair not in home]
        if absent:
            names = "; ".join(
                f"{kind} of layers {layer_ranges(layer for layer, k in absent if k == kind)}"
                for kind in dict.fromkeys(kind for _, kind in absent)
            )
            raise NotCached(f"not in the cache: {names}")
        if len({kind: home[layer, kind].tokens for layer, kind in wanted}) != len(kinds) or any(
            home[layer, kind].tokens != home[layers[0], kind].tokens for layer, kind in wanted
        ):
            raise CacheUnusable(f"{self.path}: layers differ in their number of tokens; read them one at a time")
        counts = [home[layers[0], kind].tokens for kind in kinds]
        ends = np.cumsum([0, *counts])
        width = max(stream.width for stream in home.values() if stream.pairs & set(wanted))
        out = np.zeros((self.spec.data.images, len(layers), int(ends[-1]), width), self.spec.dtype)
        for stream in {home[pair].name: home[pair] for pair in wanted}.values():
            planes = [
                (li, ki)
                for li, layer in enumerate(layers)
                for ki, kind in enumerate(kinds)
                if home[layer, kind] == stream
            ]
            for shard in range(stream.shards):
                rows = stream.rows(shard)
                with closing(self._open(stream, shard)) as file:
                    for li, ki in planes:
                        layer, kind = stream.plane(layers[li], kinds[ki])
                        target = out[rows.start : rows.stop, li, ends[ki] : ends[ki + 1], : stream.width]
                        file.into(layer, kind, target)
        return out if not self.skipped() else out[self.rows]

    def _open(self, stream: Stream, shard: int) -> OpenShard:
        form = FORMATS[stream.format]
        file = self.path / TOKENS / stream.name / form.file(shard)
        try:
            return form.open(file, stream, shard)
        except FileNotFoundError as err:
            raise NotCached(f"{file} was removed while it was read; run the same `mlfusion extract` again") from err


class ShardDraft:
    """A shard being written. `publish` gives it its name; leaving without that leaves nothing behind."""

    def __init__(self, entry: Entry, stream: Stream, shard: int) -> None:
        self._entry, self._stream, self._shard = entry, stream, shard
        self._row = stream.rows(shard).start
        form = FORMATS[stream.format]
        self._final = entry.path / TOKENS / stream.name / form.file(shard)
        self._draft = disk.draft_name(self._final.parent)
        self._writer: ShardWriter | None = form.writer(self._draft, stream, shard)

    def append(self, tokens: np.ndarray, unread: np.ndarray) -> None:
        """The shard's next rows, [rows, layers, kinds x tokens, width]; `unread` [rows] marks images that were skipped.

        Raises:
            BadData: a value is not finite, or too large for the cache's dtype; the image is named.
        """
        assert self._writer is not None
        if tokens.dtype != self._stream.dtype:
            with np.errstate(over="ignore"):  # overflow becomes infinite and is refused below, by name
                tokens = tokens.astype(self._stream.dtype)
        finite = np.isfinite(tokens).all(axis=(2, 3))  # [rows, layers]
        finite[unread] = True
        if not finite.all():
            row, layer = (int(i[0]) for i in np.nonzero(~finite))
            raise BadData(
                f"layer {self._stream.layers[layer]} of image {self._entry.samples.ids[self._row + row]!r} is not finite "
                f"in {self._stream.dtype}; use --dtype float32, or look at that image"
            )
        tokens[unread] = np.nan
        self._writer.append(tokens)
        self._row += len(tokens)

    def publish(self) -> bool:
        """Flush and name the shard; False if another writer had published it meanwhile."""
        assert self._writer is not None and self._row == self._stream.rows(self._shard).stop
        self._writer.close()
        self._writer = None
        return disk.publish_file(self._draft, self._final)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.abandon()
            self._draft.unlink(missing_ok=True)


def streams_for(
    pairs: Iterable[Pair],
    *,
    tokens: dict[TokenKind, int],
    widths: dict[int, int],
    images: int,
    dtype: Any,
    format: FormatName,
) -> list[Stream]:
    """Cut (layer, kind) pairs into as few streams as their shapes allow.

    `tokens` gives the number of tokens of each kind, `widths` the channels of each layer.
    """
    kinds_of: dict[tuple[int, int, int], list[TokenKind]] = {}
    for layer, kind in sorted(pairs):
        kinds_of.setdefault((layer, widths[layer], tokens[kind]), []).append(kind)
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
