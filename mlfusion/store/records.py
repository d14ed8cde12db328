"""Stored data other than tokens: the rows of a split, and records as sealed JSON that msgspec reads strictly."""

import errno
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import xxhash

from mlfusion.errors import BadData, CacheUnread, CacheUnusable, first_line
from mlfusion.specs.identity import FORMAT, DataSpec, FeatureSpec, ModelSpec, Name, Text, digest
from mlfusion.system import disk
from mlfusion.system.tree import Tree

Digest = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{16})?\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e15)]

RECORD_BYTES = 16 << 20  # of the largest record, but for manifests
MANIFEST_BYTES = 256 << 20
ID_BYTES = 1 << 16  # of the largest sample id in ids.json

R = TypeVar("R")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every record; reading one with a missing, unknown or mistyped field is an error."""


class CacheMarker(Record, frozen=True):
    """The file that marks the root of a cache."""

    format: Count
    uuid: Name


class Names(Record, frozen=True, omit_defaults=True):
    """Names that a user gave for a model and a data set, their resolved sources, and the reading; not part of the key.

    A field at its default is not written and not in the digest that names the file, so that older files keep their names.
    """

    model: Name
    model_source: Name  # a catalogue's source, a hub id, or a folder
    dataset: Name
    dataset_source: Name
    model_argument: Name = ""  # for `mlfusion extract`: a catalogue's name, a hub id, or a path
    dataset_argument: Name = ""
    split: Name = ""  # 'test', or 'test=validation' if the validation split replaces it
    options: tuple[Text, ...] = ()  # command-line words of the other options that are not at their default
    # Digest of all splits of the data set as they were read: ids, labels, image bytes, classes. Entries of train and test
    # belong together if they have names of one reading. Empty: not known, so that the entry belongs to no other.
    reading: Name = ""
    groups: Digest = ""  # of the images' groups, which a file beside the samples holds; empty: none were asked for
    grouped_by: Name = ""  # the column or the pattern of the groups


def names_file(names: Names) -> str:
    """The name of the file that holds these names; what was added to them later counts only where it is given."""
    fields, later = Names.__struct_fields__, ("groups", "grouped_by")
    values = [getattr(names, name) for name in fields if name not in later]
    added = [[name, value] for name in later if (value := getattr(names, name))]
    return f"{digest([*values, *added])}.json"


class RunPart(Record, frozen=True):
    """Working time of one part of an extraction, and its rate in this time."""

    seconds: Seconds
    images_per_second: Seconds


class RunRecord(Record, frozen=True):
    """Provenance of one extraction; not part of the key."""

    when: Name  # ISO 8601, UTC
    versions: dict[Name, Name]  # of Python and of libraries
    device: Name
    device_name: Name
    processors: Count
    threads: Count
    compute: Name
    dtype: Name
    batch_size: Count
    out_of_memory: bool  # whether the batch size was reduced because memory ran out
    images: Count
    forward_passes: Count
    seconds: Seconds
    images_per_second: Seconds
    bottleneck: Name  # the slowest part, which the others waited for
    waited: dict[Name, Seconds]  # part → its waiting time
    parts: dict[Name, RunPart]
    streams: tuple[Name, ...]
    layers: Name


def encode(record: Any) -> str:
    """The sealed JSON text of a record."""
    plain = msgspec.to_builtins(record, str_keys=True)
    return disk.sealed(json.dumps(plain, indent=1, ensure_ascii=False))


def parse(text: bytes, kind: type[R]) -> R:
    """JSON text as an object of this kind, every field checked.

    ValueError, MsgspecError or RecursionError if it is no such text: no UTF-8, NaN, a key that occurs twice, an unknown field,
    or a value of another type or range.
    """
    return _typed(_plain(text), kind)


def _plain(text: bytes) -> Any:
    """JSON text as dictionaries and lists; errors as of `parse`."""
    body = msgspec.json.decode(text)  # strict, but for keys that occur twice: the last one counts
    if b"{" in text and ((b"\\" in text and b"\\u" in text) or _lost_colons(text, body)):
        json.loads(text, object_pairs_hook=_object)  # a key may occur twice: read key by key
    return body


def _lost_colons(text: bytes, body: Any) -> bool:
    """Whether a text without escapes may have more colons, and so more keys, than what it was read as."""
    if len(text) < 1 << 13:
        return text.count(b":") != msgspec.json.encode(body).count(b":")
    # Faster for long texts: those of manifests have few keys, and no colons in their lists.
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord(":"))) != _colons(body)


def _colons(body: Any) -> int:
    """Colons in the text of a value in which every key occurs once; fewer if it has lists with colons in them."""
    if isinstance(body, dict):
        return len(body) + sum(map(_colons, body.values()))
    return body.count(":") if isinstance(body, str) else 0


def _typed(body: Any, kind: type[R]) -> R:
    found = msgspec.convert(body, kind, str_keys=True)
    if kind is FeatureSpec:  # msgspec refuses unknown fields of its own classes alone
        for part, cls in ((body, FeatureSpec), (body["model"], ModelSpec), (body["data"], DataSpec)):
            if unknown := part.keys() - cls.__dataclass_fields__.keys():
                raise ValueError(f"no field {min(unknown)!r} is known")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def load(tree: Tree, path: str, kind: type[R], *, most: int = RECORD_BYTES) -> R:
    """The record in a file of a cache.

    CacheUnusable if it is damaged or of a newer format, CacheUnread if it may not be read, FileNotFoundError if there is none.
    """
    return load_at(tree, path, kind, most=most)[0]


def load_at(tree: Tree, path: str, kind: type[R], *, most: int = RECORD_BYTES) -> tuple[R, int]:
    """The record in a file, as for `load`, and the time of the file in nanoseconds."""
    try:
        sealed, state = tree.read_at(path, most)
        body = _plain(disk.unsealed(sealed))
        found = body.get("format") if isinstance(body, dict) and kind in (CacheMarker, FeatureSpec) else 0
        if type(found) is int and found > FORMAT:
            raise CacheUnusable(
                f"{tree.path(path).parent} has format {found}, this mlfusion reads {FORMAT}; update mlfusion"
            )
        return _typed(body, kind), state.st_mtime_ns
    except (msgspec.MsgspecError, ValueError, RecursionError) as err:
        raise tree.damaged(tree.path(path), first_line(err)) from err
    except FileNotFoundError:
        raise
    except OSError as err:
        raise unread(tree.path(path), err) from err


def spec_fault(spec: FeatureSpec) -> str:
    """Why the fields of a spec do not belong together, in words; '' if they do."""
    try:
        view = _view(spec.model.preprocess)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return "its preprocessing is no JSON object"
    return "" if view == spec.model.view else f"its view is {spec.model.view}, that of its preprocessing another"


@lru_cache(maxsize=64)  # few models have thousands of entries
def _view(preprocess: str) -> Any:
    """The view in the JSON of a preprocessing."""
    return parse(preprocess.encode(), dict[str, Any]).get("view", "plain")


def removed_message(path: Path) -> str:
    """The sentence about a path that a prune removed."""
    return f"{path} was removed while it was in use; run the same `mlfusion extract` again"


def damaged(path: Path, why: str) -> CacheUnusable:
    """The error about a file that does not match its record."""
    return CacheUnusable(
        f"{path} is damaged: {why}; run `mlfusion cache verify --repair`, then the same `mlfusion extract` again"
    )


def no_cache(path: Path, why: str) -> CacheUnusable:
    """The error about a marker that marks no cache."""
    return CacheUnusable(
        f"{path} marks no cache that this mlfusion can read: {why}; name another folder with --cache, or delete this file if "
        "the cache is yours: the next `mlfusion extract` writes it again"
    )


def unread(path: Path, err: OSError) -> CacheUnusable:
    """The error about a file that the system does not let us read: damage only if the disk fails."""
    if err.errno == errno.EIO:
        return damaged(path, f"the disk does not give it ({err.strerror})")
    return CacheUnread(f"{path} cannot be read ({err.strerror}){owned_by(path)}; ask for the permission to read it")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's refusal to read a folder into `CacheUnread`."""
    try:
        yield
    except PermissionError as err:
        raise unread(Path(err.filename or path), err) from err


def owned_by(path: Path) -> str:
    """'; it belongs to NAME' if a path is another user's, else ''; '' also where the system has no such owners."""
    try:
        import pwd

        owner = os.lstat(path).st_uid
    except (OSError, ImportError):
        return ""
    if owner == os.geteuid():
        return ""
    try:
        return f"; it belongs to {pwd.getpwuid(owner).pw_name}"
    except KeyError:
        return f"; it belongs to user {owner}"


def open_tree(root: Path) -> Tree:
    """The files and folders of a cache."""
    return Tree(root, damaged)


FILES = ("ids.json", "labels.npy", "digests.npy")
FORMER_BYTES = 16  # of a former digest


@dataclass(frozen=True, eq=False)
class Samples:
    """The rows of a split, in order."""

    ids: tuple[str, ...]
    labels: np.ndarray  # see `stored_labels`
    digests: np.ndarray  # [images, 32] uint8: SHA-256 of each image's encoded bytes; or see `former`
    classes: tuple[str, ...]  # for numbers: their name, or nothing
    groups: "Groups | None" = None  # of the images, for the names that refer to them; not part of the content

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", stored_labels(self.labels, self.ids, self.classes))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def former(self) -> bool:
        """Whether the digests are [images, 16], xxh3-128, as in entries from before images were identified by SHA-256."""
        return self.digests.shape[1:] == (FORMER_BYTES,)

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
    def read(cls, tree: Tree, folder: str, spec: DataSpec) -> "Samples":
        """Read the files in an entry's folder; damaged ones may raise any exception."""
        count, classes = spec.images, spec.classes
        limits = (count * ID_BYTES, count * 8 * max(len(classes), 1), count * 64)
        ids, labels, digests = (
            tree.read(f"{folder}/{name}", most + 4096) for name, most in zip(FILES, limits, strict=True)
        )
        found = cls(
            ids=parse(ids, tuple[str, ...]),
            labels=np.load(io.BytesIO(labels), allow_pickle=False),
            digests=np.load(io.BytesIO(digests), allow_pickle=False),
            classes=classes,
        )
        if not len(found.ids) == len(found.digests) == count:
            raise ValueError("not as many as the entry's images")
        return found

    def digest_of(self, rows: range) -> str:
        """Digest of some rows; a shard's record holds it as proof that the shard's rows are those of these samples."""
        part = slice(rows.start, rows.stop)
        text = json.dumps([rows.start, self.ids[part], self.labels[part].tolist(), self.digests[part].tobytes().hex()])
        return xxhash.xxh3_128_hexdigest(text.encode())


@dataclass(frozen=True)
class Groups:
    """The group of each image of an entry, such as the patient of a slice, in the order of its samples."""

    names: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """Identifies the groups: 16 hex digits."""
        return digest(list(self.names))

    @property
    def file(self) -> str:
        """The name of the file that holds them, beside the samples."""
        return groups_file(self.digest)

    def encoded(self) -> bytes:
        """The exact content of the file."""
        return json.dumps(self.names, ensure_ascii=False).encode()

    @classmethod
    def read(cls, tree: Tree, folder: str, digest: str, images: int) -> "Groups":
        """Read the groups with this digest in an entry's folder.

        CacheUnusable if they are damaged, CacheUnread if they may not be read, FileNotFoundError if there are none.
        """
        path = f"{folder}/{groups_file(digest)}"
        try:
            found = cls(parse(tree.read(path, images * ID_BYTES + 4096), tuple[str, ...]))
        except (msgspec.MsgspecError, ValueError, RecursionError) as err:
            raise tree.damaged(tree.path(path), first_line(err)) from err
        except FileNotFoundError:
            raise
        except OSError as err:
            raise unread(tree.path(path), err) from err
        if len(found.names) != images or found.digest != digest:
            raise tree.damaged(tree.path(path), "it holds other groups than those that it is named after")
        return found


GROUPS_FILE = re.compile(r"groups-([0-9a-f]{16})\.json")


def groups_file(digest: str) -> str:
    """The name of the file of groups with this digest."""
    return f"groups-{digest}.json"


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
