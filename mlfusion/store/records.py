"""The records of the cache as frozen classes: sealed JSON, read strictly by msgspec, damage reported in one sentence."""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from mlfusion.errors import CacheUnusable, NotCached
from mlfusion.specs.identity import FORMAT, FeatureSpec
from mlfusion.system import disk

Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every record: a missing, unknown or mistyped field is an error when it is read."""


class CacheMarker(Record, frozen=True):
    """The file that marks the root of a cache."""

    format: int
    uuid: str


class Names(Record, frozen=True):
    """What the user called a model and a data set, what each resolved to, and how they were asked for. Never in the key."""

    model: str
    model_source: str  # a catalogue's source, a hub id, or a folder
    dataset: str
    dataset_source: str
    split: str = ""  # 'test', or 'test=validation' where the validation split stands for it
    options: tuple[str, ...] = ()  # command-line words of the other options that are not at their default


class RunPart(Record, frozen=True):
    """How long one part of an extraction worked, and its rate while it did."""

    seconds: Seconds
    images_per_second: Seconds


class RunRecord(Record, frozen=True):
    """Provenance of one extraction. Never part of the key."""

    when: str  # ISO 8601, UTC
    versions: dict[str, str]  # of Python and of libraries
    device: str
    device_name: str
    processors: Count
    threads: Count
    compute: str
    dtype: str
    batch_size: Count
    out_of_memory: bool  # whether the batch was made smaller for want of memory
    images: Count
    forward_passes: Count
    seconds: Seconds
    images_per_second: Seconds
    bottleneck: str  # the part that the others waited for
    waited: dict[str, Seconds]  # by part
    parts: dict[str, RunPart]
    streams: tuple[str, ...]
    layers: str


R = TypeVar("R")


class _Versioned(msgspec.Struct):
    """The one field that every format has."""

    format: int


def encode(record: Any) -> str:
    """The sealed JSON text of a record."""
    plain = msgspec.to_builtins(record, str_keys=True)
    return disk.sealed(json.dumps(plain, indent=1, ensure_ascii=False))


def read(path: Path, kind: type[R]) -> R:
    """The record in a file.

    Raises:
        CacheUnusable: it is damaged, or not of this kind.
        FileNotFoundError: there is no such file.
    """
    return _decode(path, disk.read_sealed(path), kind)


def read_versioned(path: Path, kind: type[R], *, about: Path) -> R:
    """The same for a record that names its format; one of a newer format is refused with a message about the path `about`."""
    text = disk.read_sealed(path)
    if (found := _decode(path, text, _Versioned).format) > FORMAT:
        raise CacheUnusable(f"{about} has format {found}, this mlfusion reads {FORMAT}; update mlfusion")
    return _decode(path, text, kind)


def read_spec(folder: Path) -> FeatureSpec:
    """The specification that an entry's folder is named after.

    Raises:
        NotCached: the entry was removed.
        CacheUnusable: the record is damaged, belongs to another folder, or is of a newer format.
    """
    path = folder / "entry.json"
    try:
        spec = read_versioned(path, FeatureSpec, about=folder)
    except FileNotFoundError as err:
        raise NotCached(removed_message(folder)) from err
    except OSError as err:
        raise damaged(path, str(err)) from err
    if spec.key != folder.name:
        raise damaged(path, "it does not belong to this folder")
    return spec


def _decode(path: Path, text: bytes, kind: type[R]) -> R:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as err:
        raise damaged(path, str(err)) from err


def removed_message(path: Path) -> str:
    """What to say of a path that a prune took away."""
    return f"{path} was removed while it was in use; run the same `mlfusion extract` again"


def damaged(path: Path, why: str) -> CacheUnusable:
    """The error of a file that is not what its record says."""
    return CacheUnusable(
        f"{path} is damaged: {why}; run `mlfusion cache verify --repair`, then the same `mlfusion extract` again"
    )
