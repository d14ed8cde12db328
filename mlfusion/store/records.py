"""Stored data other than tokens: the rows of a split, and records as sealed JSON that msgspec reads strictly."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import xxhash

from mlfusion.errors import BadData, CacheUnusable
from mlfusion.specs.identity import FORMAT, digest
from mlfusion.system import disk

Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]

R = TypeVar("R")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every record; reading one with a missing, unknown or mistyped field is an error."""


class _Versioned(msgspec.Struct):
    """The field that a record of any format has."""

    format: int


class CacheMarker(Record, frozen=True):
    """The file that marks the root of a cache."""

    format: int
    uuid: str


class Names(Record, frozen=True):
    """Names that a user gave for a model and a data set, their resolved sources, and the reading; not part of the key."""

    model: str
    model_source: str  # a catalogue's source, a hub id, or a folder
    dataset: str
    dataset_source: str
    model_argument: str = ""  # for `mlfusion extract`: a catalogue's name, a hub id, or a path
    dataset_argument: str = ""
    split: str = ""  # 'test', or 'test=validation' if the validation split replaces it
    options: tuple[str, ...] = ()  # command-line words of the other options that are not at their default
    # Digest of all splits of the data set as they were read: ids, labels, image bytes, classes. Entries of train and test
    # belong together if they have names of one reading. Empty: not known, so that the entry belongs to no other.
    reading: str = ""


class RunPart(Record, frozen=True):
    """Working time of one part of an extraction, and its rate in this time."""

    seconds: Seconds
    images_per_second: Seconds


class RunRecord(Record, frozen=True):
    """Provenance of one extraction; not part of the key."""

    when: str  # ISO 8601, UTC
    versions: dict[str, str]  # of Python and of libraries
    device: str
    device_name: str
    processors: Count
    threads: Count
    compute: str
    dtype: str
    batch_size: Count
    out_of_memory: bool  # whether the batch size was reduced because memory ran out
    images: Count
    forward_passes: Count
    seconds: Seconds
    images_per_second: Seconds
    bottleneck: str  # the slowest part, which the others waited for
    waited: dict[str, Seconds]  # part → its waiting time
    parts: dict[str, RunPart]
    streams: tuple[str, ...]
    layers: str


def encode(record: Any) -> str:
    """The sealed JSON text of a record."""
    plain = msgspec.to_builtins(record, str_keys=True)
    return disk.sealed(json.dumps(plain, indent=1, ensure_ascii=False))


def read(path: Path, kind: type[R], *, versioned: Path | None = None) -> R:
    """The record in a file; `versioned` is the folder to name if the record's `format` is newer than this mlfusion's.

    CacheUnusable if it is damaged, not of this kind, or of a newer format; FileNotFoundError if there is no such file.
    """
    text = disk.read_sealed(path)
    try:
        if versioned and (found := msgspec.json.decode(text, type=_Versioned).format) > FORMAT:
            raise CacheUnusable(f"{versioned} has format {found}, this mlfusion reads {FORMAT}; update mlfusion")
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as err:
        raise damaged(path, str(err)) from err


def removed_message(path: Path) -> str:
    """The sentence about a path that a prune removed."""
    return f"{path} was removed while it was in use; run the same `mlfusion extract` again"


def damaged(path: Path, why: str) -> CacheUnusable:
    """The error about a file that does not match its record."""
    return CacheUnusable(
        f"{path} is damaged: {why}; run `mlfusion cache verify --repair`, then the same `mlfusion extract` again"
    )


FILES = ("ids.json", "labels.npy", "digests.npy")


@dataclass(frozen=True, eq=False)
class Samples:
    """The rows of a split, in order."""

    ids: tuple[str, ...]
    labels: np.ndarray  # see `stored_labels`
    digests: np.ndarray  # [images, 16] uint8: xxh3-128 of each image's encoded bytes
    classes: tuple[str, ...]  # for numbers: their name, or nothing

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", stored_labels(self.labels, self.ids, self.classes))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def content(self) -> str:
        """Digest of ids, image bytes and labels in order; it identifies a DataSpec."""
        return digest([list(self.ids), self.labels.tolist(), self.digests.tobytes().hex()], 64)

    def files(self) -> dict[str, bytes]:
        """Name → exact content of the files that hold the samples."""
        contents = {"ids.json": json.dumps(self.ids, ensure_ascii=False).encode()}
        labels = self.labels.astype(self.labels.dtype.newbyteorder("<"))
        for name, table in (("labels.npy", labels), ("digests.npy", self.digests)):
            np.save(file := io.BytesIO(), table, allow_pickle=False)
            contents[name] = file.getvalue()
        return contents

    @classmethod
    def read(cls, folder: Path, classes: tuple[str, ...]) -> "Samples":
        """Read the files in an entry's folder; damaged ones may raise any exception."""
        return cls(
            ids=tuple(json.loads((folder / "ids.json").read_text(encoding="utf-8"))),
            labels=np.load(folder / "labels.npy", allow_pickle=False),
            digests=np.load(folder / "digests.npy", allow_pickle=False),
            classes=classes,
        )

    def digest_of(self, rows: range) -> str:
        """Digest of some rows; a shard's record holds it as proof that the shard's rows are those of these samples."""
        part = slice(rows.start, rows.stop)
        text = json.dumps([rows.start, self.ids[part], self.labels[part].tolist(), self.digests[part].tobytes().hex()])
        return xxhash.xxh3_128_hexdigest(text.encode())


def stored_labels(labels: np.ndarray, ids: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Labels in their storage type: [images] int64 class indices, [images, classes] uint8 of 0 and 1, or [images] float64.

    BadData if they are of no such kind, not as many as the images, or one is out of range; it names the image.
    """
    allowed = (
        "allowed: [images] whole numbers, an index into the classes; [images, classes] of 0 and 1, several labels an "
        "image; or [images] floating-point numbers. Give every image its label in one of these ways"
    )
    kind, shape, several = labels.dtype.kind, labels.shape, (len(ids), len(classes))
    if shape != several[: labels.ndim] or kind not in {1: "iuf", 2: "iufb"}.get(labels.ndim, ""):
        raise BadData(
            f"{several[0]:,} images of {several[1]:,} classes have labels of shape {shape} and type {labels.dtype}; {allowed}"
        )
    if labels.ndim == 2:
        valid, allowed_values, stored = ((labels == 0) | (labels == 1)).all(1), "a 0 or 1 for every class", "u1"
    elif kind == "f":
        valid, allowed_values, stored = np.isfinite(labels), "a finite number", "f8"
    else:
        valid, allowed_values, stored = (labels >= 0) & (labels < len(classes)), f"0 to {len(classes) - 1}", "i8"
    if not valid.all():
        row = int(np.flatnonzero(~valid)[0])
        raise BadData(
            f"image {ids[row]!r} has the label {labels[row].tolist()}; allowed: {allowed_values}. Mend it in the data set"
        )
    return labels.astype(stored, copy=False)
