"""WebDataset: images in tar files, read where they lie. One pass over the headers says where every image begins.

A sample is the files of one name, told apart by what follows its first dot: `s0000001.jpg` and `s0000001.cls`. Nothing is
unpacked, and a tar is never in memory.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from mlfusion.datasets.columns import SPLITS, choose
from mlfusion.datasets.images import SUFFIXES
from mlfusion.datasets.split import Found, Reading
from mlfusion.errors import BadData

CLASS_NAMES = "classnames.txt"
WORDS = {"cls": "class", "npy": "vector", "json": "object", "txt": "text"}


@dataclass(frozen=True, eq=False)
class Members:
    """Pieces of files, by where they begin and how long they are."""

    files: tuple[str, ...]
    where: np.ndarray  # [images, 3] int64: file, first byte, bytes

    def __call__(self, row: int) -> bytes:
        file, offset, size = map(int, self.where[row])
        with open(self.files[file], "rb") as opened:
            opened.seek(offset)
            data = opened.read(size)
        if len(data) < size:
            raise OSError(f"{self.files[file]} has become shorter since it was looked through")
        return data


@dataclass
class Sample:
    """The files of one name in one tar."""

    key: str
    where: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension → first byte, bytes
    small: dict[str, bytes] = field(default_factory=dict)  # extension → what a file holds that may be a label


def tars_in(root: Path) -> dict[str, list[str]]:
    """A folder's tars by split, in the order of their paths: <split>/*.tar, or <split>*.tar, or else all are one."""
    found = {split: sorted(map(str, (root / split).glob("*.tar"))) for split in SPLITS}
    if not any(found.values()):
        beside = sorted(map(str, root.glob("*.tar")))
        found = {split: [path for path in beside if os.path.basename(path).startswith(split)] for split in SPLITS}
        found["val"] = [path for path in found["val"] if path not in found["validation"]]
        if beside and not any(found.values()):
            found = {"train": beside}
    return {split: paths for split, paths in found.items() if paths}


def class_names(root: Path) -> tuple[str, ...] | None:
    """CLIP_benchmark's exports keep their class names beside the shards."""
    try:
        lines = (root / CLASS_NAMES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return tuple(line.strip() for line in lines if line.strip()) or None


def webdataset(found: Mapping[str, list[str]], names: tuple[str, ...] | None, reading: Reading) -> dict[str, Found]:
    """Every split's tars, in their order.

    Raises:
        BadData: a tar that cannot be read, or samples without an image or a label.
    """
    splits = {}
    for split, paths in found.items():
        samples = [(number, sample) for number, path in enumerate(paths) for sample in _samples_of(path)]
        encoded = lambda where, paths=paths: Members(tuple(paths), where)  # noqa: E731
        splits[split] = assembled(split, paths, samples, names, reading, encoded)
    return splits


def _samples_of(path: str) -> list[Sample]:
    try:
        with tarfile.open(path, "r:") as tar:
            return list(samples(tar))
    except (tarfile.TarError, OSError, EOFError) as err:
        raise BadData(f"{path} cannot be read as a tar: {err}; allowed: whole tars that are not compressed") from err


def samples(tar: tarfile.TarFile) -> Iterator[Sample]:
    """The samples of one tar, in its order."""
    open_: Sample | None = None
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep a million headers
        folder, name = os.path.split(member.name)
        stem, _, extension = name.partition(".")
        if not member.isreg() or not stem or not extension:
            continue
        key, extension = os.path.join(folder, stem), extension.lower()
        if open_ is None or open_.key != key:
            if open_:
                yield open_
            open_ = Sample(key)
        open_.where[extension] = (member.offset_data, member.size)
        if extension in WORDS:
            file: IO[bytes] | None = tar.extractfile(member)
            open_.small[extension] = file.read() if file else b""
    if open_:
        yield open_


def assembled(
    split: str,
    paths: list[str],
    samples: Iterable[tuple[int, Sample]],
    names: tuple[str, ...] | None,
    reading: Reading,
    encoded: Any,
) -> Found:
    """One split of its samples: which files are images and which labels follows from the first."""
    every = list(samples)
    where = f"{os.path.dirname(paths[0])}, split {split}"
    if not every:
        raise BadData(f"{where}: no samples; allowed: tars with files such as s01.jpg and s01.cls")
    first = every[0][1]
    # Of images the extension may change from sample to sample (jpg here, png there); it is asked for by name or by being one.
    kinds = {name: WORDS.get(name) or ("image" if _is_image(name) else "bytes") for name in first.where}
    label = reading.label_column
    member, _, inner = (label or "").partition(".")
    likely = [name for name in ("cls", "npy") if name in kinds]
    column = choose(
        "label", kinds, member or None, likely[:1] or [n for n in ("json",) if inner], ("cls", "npy"), where
    )
    if reading.image_column is None and len(images := [n for n in kinds if _is_image(n)]) != 1:
        choose("image", kinds, None, images, (), where)
    table = np.empty((len(every), 3), np.int64)
    labels, keys = [], []
    for row, (file, sample) in enumerate(every):
        images = [
            n for n in sample.where if n == reading.image_column or (reading.image_column is None and _is_image(n))
        ]
        if len(images) != 1:
            raise BadData(
                f"{paths[file]}: sample {sample.key} has {len(images)} images ({', '.join(sample.where)}); allowed is one, "
                "or say which with --image-column"
            )
        table[row] = (file, *sample.where[images[0]])
        labels.append(_label(sample, column, inner, paths[file]))
        keys.append(sample.key)
    if len(set(keys)) < len(keys):  # names begin again in every tar
        keys = [f"{Path(paths[file]).stem}/{sample.key}" for file, sample in every]
    return Found(
        ids=tuple(f"{split}/{key}" for key in keys),
        labels=labels,
        encoded=encoded(table),
        decode=reading.decoder,
        names=names,
    )


def _is_image(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in SUFFIXES


def _label(sample: Sample, column: str, inner: str, path: str) -> Any:
    """A class as a number or a name, a vector, or a field of an object."""
    data = sample.small.get(column)
    if data is None:
        return None
    try:
        if column == "npy":
            vector = np.load(io.BytesIO(data), allow_pickle=False)
            return vector.tolist() if vector.ndim == 1 else vector.reshape(-1).tolist()[0]
        if column == "json":
            return json.loads(data)[inner]
        text = data.decode("utf-8").strip()
        return int(text) if text.isdecimal() else text
    except (ValueError, KeyError, EOFError, TypeError, IndexError) as err:
        raise BadData(f"{path}: the label {sample.key}.{column} cannot be read: {err}") from err
