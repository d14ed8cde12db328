"""The arrays of a row's test images: one .npz file, whose headers must fit the row before anything in it is read.

A folder of results may come from a stranger: nothing is allocated that the row and the file's own size do not call for.
"""

import io
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from mlfusion.results.rows import LabelMetrics, Metrics, NumberMetrics, Row

FOLDER = "arrays"
LARGE = 2**28  # bytes of unpacked arrays from which they may not be more than PACKED times the file
PACKED = 200


def path_of(root: Path, row: Row) -> Path:
    """The path of a row's arrays in a folder of results."""
    return root / FOLDER / f"{row.id}.npz"


def check(row: Row, arrays: Mapping[str, np.ndarray]) -> None:
    """Compare arrays with their row, before they are saved and after they are read.

    Raises:
        ValueError: an array has a name, a type, a shape or a value that a row like this cannot have.
    """
    for name, array in arrays.items():
        _check_header(row, name, array.shape, array.dtype)
    classes, labels = len(row.classes), arrays.get("labels")
    if labels is not None and not isinstance(row.metrics, NumberMetrics):
        highest = classes - 1 if isinstance(row.metrics, Metrics) else 1
        if labels.size and not (labels.min() >= 0 and labels.max() <= highest):
            raise ValueError(f"labels are {labels.min()} to {labels.max()}; allowed: 0 to {highest}")
    groups = arrays.get("groups")
    if groups is not None and not (groups.min() >= 0 and len(np.unique(groups)) == (row.groups and row.groups.test)):
        raise ValueError("groups are not as many as the row's; allowed: the number of each test image's group, from 0")
    folds = arrays.get("folds", np.empty(0, np.int64))
    if folds.size and np.bincount(folds).tolist() != [one.images for one in row.by_fold]:
        raise ValueError("folds are not those of the row: by_fold has other numbers of images")
    for name in ("probabilities", "attention"):
        array = arrays.get(name, np.empty(0))
        if not array.size:
            continue
        share = name == "attention" or not isinstance(row.metrics, NumberMetrics)
        if not np.isfinite(array).all() or (share and not (array.min() >= 0 and array.max() <= 1.001)):
            raise ValueError(f"{name} hold what is no {'share of one' if share else 'finite number'}")


def read(file: IO[bytes], row: Row) -> dict[str, np.ndarray]:
    """The arrays of a row; other arrays in the file are not read.

    Raises:
        Exception: of any type, by the libraries: they are damaged. ValueError: they are not those of this row.
    """
    with zipfile.ZipFile(file) as archive:
        members = _members(archive, row, os.fstat(file.fileno()).st_size)
        found = {}
        for name, member in members.items():
            with archive.open(member) as stream:
                found[name] = np.lib.format.read_array(stream, allow_pickle=False)
    check(row, found)
    return found


def write(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays; reading them needs no pickle."""
    np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]


def check_file(file: IO[bytes], row: Row) -> None:
    """Compare the headers of a file of arrays with their row, without reading the arrays.

    Raises:
        Exception: as of `read`.
    """
    with zipfile.ZipFile(file) as archive:
        _members(archive, row, os.fstat(file.fileno()).st_size)


def copy(file: IO[bytes], target: Path) -> None:
    """Copy an open file in pieces."""
    file.seek(0)
    with target.open("xb") as draft:
        shutil.copyfileobj(file, draft, 1 << 20)


def _members(archive: zipfile.ZipFile, row: Row, size: int) -> dict[str, zipfile.ZipInfo]:
    """{name of an array: its member} of the arrays that rows have, checked by their headers."""
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    members = {name: info for name, info in members.items() if name in _KNOWN}
    if sum(info.file_size for info in members.values()) > max(LARGE, PACKED * size):
        raise ValueError(f"they unpack to over {PACKED} times the file, which no arrays of images do")
    for name, info in members.items():
        with archive.open(info) as stream:
            shape, dtype = _header(io.BytesIO(stream.read(1 << 16)))
        _check_header(row, name, shape, dtype)
        if int(np.prod(shape, dtype=object)) * dtype.itemsize > info.file_size:
            raise ValueError(f"{name} declares more numbers than it holds")
    return members


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"an array is in version {version} of NumPy's format; allowed: 1.0 and 2.0")
    shape, _, dtype = read_header(stream)
    return shape, dtype


_KNOWN = {"labels", "probabilities", "attention", "origin", "groups", "folds"}


def _check_header(row: Row, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if name not in _KNOWN:
        raise ValueError(f"no array of a row is named {name!r}; allowed: {', '.join(sorted(_KNOWN))}")
    if dtype.hasobject or dtype.kind not in "fiub":
        raise ValueError(f"{name} are of type {dtype}; allowed: numbers. Arrays of Python objects cannot be read back")
    images, classes = row.images.test, len(row.classes)
    allowed: list[tuple[int, ...]]
    if name == "labels":
        allowed = [(images, classes)] if isinstance(row.metrics, LabelMetrics) else [(images,)]
    elif name == "probabilities":
        allowed = [(images, 1), (images,)] if isinstance(row.metrics, NumberMetrics) else [(images, classes)]
    elif name == "attention":
        allowed = [(images, len(row.attention.layers))] if row.attention else []
    elif name in ("groups", "folds"):
        allowed = [(images,)] if getattr(row, name) and dtype.kind == "i" else []
    else:
        allowed = [()]
    if shape not in allowed:
        wanted = " or ".join(map(str, allowed)) or "none"
        raise ValueError(f"{name} have the shape {shape}; the row's images and classes ask for {wanted}")
