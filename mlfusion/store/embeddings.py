"""Writes tokens to one file for search and clustering in other programs: an embedding an image, as NumPy array or Parquet."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mlfusion.errors import CacheUnusable, UnknownName
from mlfusion.shapes import Float
from mlfusion.system import disk

FORMATS = ("npy", "parquet")
IMAGES = 1024  # that are in memory at a time


@runtime_checkable
class Split(Protocol):
    """What is written: `mlfusion.Features`, loaded or opened."""

    @property
    def tokens(self) -> Any:
        """[images, layers, kinds x tokens, width]: an array or a reader."""

    @property
    def labels(self) -> np.ndarray:
        """As of `Features`."""

    @property
    def ids(self) -> tuple[str, ...]:
        """[images]."""

    @property
    def classes(self) -> tuple[str, ...]:
        """As of `Features`."""


def write(split: Split, path: Path) -> None:
    """Replace `path`, whole or not at all, by the embeddings of all images, in float32.

    An embedding is all numbers of an image in a row: layers, then kinds and tokens, then width. `.npy` is the array [images,
    numbers], in the order of the ids; `.parquet` has the columns id, label (if there are labels) and embedding. It is written
    image by image, so that it need not fit into memory.

    Raises:
        UnknownName: the path ends in neither .npy nor .parquet.
        CacheUnusable: it cannot be written.
    """
    format = path.suffix.removeprefix(".")
    if format not in FORMATS:
        hint = "The ending of the path decides, as in embeddings.parquet."
        raise UnknownName("form of embeddings", format, FORMATS, otherwise=hint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.atomic(path, replace=True) as draft:
            (_write_npy if format == "npy" else _write_parquet)(split, draft)
    except OSError as err:
        raise CacheUnusable(
            f"cannot write {str(path)!r}: {err.strerror or err}; allowed: a path in a folder that can be written"
        ) from err


def _blocks(split: Split) -> Iterator[tuple[slice, Float[np.ndarray, "n numbers"]]]:
    for first in range(0, len(split.ids), IMAGES):
        rows = slice(first, min(first + IMAGES, len(split.ids)))
        yield rows, split.tokens[rows].reshape(rows.stop - first, -1).astype(np.float32)


def _write_npy(split: Split, draft: Path) -> None:
    shape = len(split.ids), int(np.prod(split.tokens.shape[1:]))
    with draft.open("xb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for _, numbers in _blocks(split):
            file.write(numbers.astype("<f4", copy=False).tobytes())


def _write_parquet(split: Split, draft: Path) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    labels = _labels(split)
    numbers = int(np.prod(split.tokens.shape[1:]))
    fields = [("id", pyarrow.string())] + ([("label", pyarrow.array(labels).type)] if labels else [])
    schema = pyarrow.schema([*fields, ("embedding", pyarrow.list_(pyarrow.float32(), numbers))])
    with ParquetWriter(draft, schema) as writer:
        for rows, block in _blocks(split):
            columns: list[Any] = [list(split.ids[rows]), *([labels[rows]] if labels else [])]
            columns.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(block.ravel()), numbers))
            writer.write_table(pyarrow.Table.from_arrays(list(map(pyarrow.array, columns)), schema=schema))


def _labels(split: Split) -> list[Any]:
    """Each image's class, labels or number; an empty list if the images have no labels."""
    if split.labels.ndim == 2:
        return [[split.classes[n] for n in np.flatnonzero(row)] for row in split.labels] if split.classes else []
    values = split.labels.tolist()
    return [split.classes[n] for n in values] if split.classes else values
