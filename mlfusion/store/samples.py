"""The rows of a split: ids, labels and image digests, as an entry of the cache keeps them."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from mlfusion.errors import BadData
from mlfusion.specs.identity import digest

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
        """Name → exact content of the entry's files that hold them."""
        found = {"ids.json": json.dumps(self.ids, ensure_ascii=False).encode()}
        for name, table in {
            "labels.npy": self.labels.astype(self.labels.dtype.newbyteorder("<")),
            "digests.npy": self.digests,
        }.items():
            np.save(file := io.BytesIO(), table, allow_pickle=False)
            found[name] = file.getvalue()
        return found

    @classmethod
    def read(cls, folder: Path, classes: tuple[str, ...]) -> "Samples":
        """Read the files of an entry's folder; any exception of NumPy or Python where they are damaged."""
        return cls(
            ids=tuple(json.loads((folder / "ids.json").read_text(encoding="utf-8"))),
            labels=np.load(folder / "labels.npy", allow_pickle=False),
            digests=np.load(folder / "digests.npy", allow_pickle=False),
            classes=classes,
        )

    def digest_of(self, rows: range) -> str:
        """Digest of some rows; a shard's record carries it, so that its rows are those of these samples."""
        some = slice(rows.start, rows.stop)
        text = json.dumps([rows.start, self.ids[some], self.labels[some].tolist(), self.digests[some].tobytes().hex()])
        return xxhash.xxh3_128_hexdigest(text.encode())


def stored_labels(labels: np.ndarray, ids: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Labels in the storage type of their kind.

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
        sound, allowed_values, kept = ((labels == 0) | (labels == 1)).all(1), "a 0 or 1 for every class", "u1"
    elif kind == "f":
        sound, allowed_values, kept = np.isfinite(labels), "a finite number", "f8"
    else:
        sound, allowed_values, kept = (labels >= 0) & (labels < len(classes)), f"0 to {len(classes) - 1}", "i8"
    if not sound.all():
        row = int(np.flatnonzero(~sound)[0])
        raise BadData(
            f"image {ids[row]!r} has the label {labels[row].tolist()}; allowed: {allowed_values}. Mend it in the data set"
        )
    return labels.astype(kept, copy=False)
