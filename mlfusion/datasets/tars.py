"""Reads WebDataset tars in place: one pass over the headers finds where every image begins.

A sample is the set of files of one name, which differ in what follows its first dot: `s0000001.jpg` and `s0000001.cls`.
Nothing is unpacked, and no tar is loaded into memory.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mlfusion.datasets.columns import SPLITS, choose_column, require_unique
from mlfusion.datasets.images import SUFFIXES
from mlfusion.datasets.split import Encoded, RawSplit, decoder
from mlfusion.errors import BadData
from mlfusion.specs.options import ReadOptions

CLASS_NAMES = "classnames.txt"
WORDS = {"cls": "class", "npy": "vector", "json": "object", "txt": "text"}


@dataclass(frozen=True, eq=False)
class Members:
    """Byte ranges of files, one per image."""

    files: tuple[str, ...]
    where: np.ndarray  # [images, 3] int64: file, first byte, number of bytes

    def __call__(self, row: int) -> bytes:
        file, offset, size = map(int, self.where[row])
        with open(self.files[file], "rb") as opened:
            opened.seek(offset)
            data = opened.read(size)
        if len(data) < size:
            raise OSError(f"{self.files[file]} has become shorter since it was index_tar through")
        return data


@dataclass
class Sample:
    """The files of one name in one tar."""

    key: str
    where: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension → first byte, bytes
    small: dict[str, bytes] = field(default_factory=dict)  # extension → contents of a file that may be a label
    digests: dict[str, bytes] = field(default_factory=dict)  # extension → digest of a file's bytes, if they were read


@dataclass(frozen=True)
class Index:
    """The samples of one file, in its order, in compact arrays, since there may be millions."""

    keys: list[str]
    labels: list[Any]
    where: np.ndarray  # [images, 2] int64: a tar's first byte and bytes, or a Parquet file's group and row
    digests: np.ndarray | None  # [images, 16] uint8

    @staticmethod
    def of(keys: list[str], labels: list[Any], where: list[tuple[int, int]], digests: bytearray) -> "Index":
        """The index of samples that were seen one after another; an image without a digest leaves them all out."""
        hashes = np.frombuffer(bytes(digests), np.uint8).reshape(-1, 16)
        table = np.array(where, np.int64).reshape(-1, 2)
        return Index(keys, labels, table, hashes if len(hashes) == len(table) else None)

    @staticmethod
    def joined(parts: "Sequence[Index]") -> "Index":
        """The index of several files; each row of `where` begins with the number of its file."""
        files = np.repeat(np.arange(len(parts)), [len(part.where) for part in parts])
        digests = [part.digests for part in parts if part.digests is not None]
        return Index(
            keys=[key for part in parts for key in part.keys],
            labels=[label for part in parts for label in part.labels],
            where=np.column_stack([files, np.concatenate([part.where for part in parts])]),
            digests=np.concatenate(digests) if len(digests) == len(parts) else None,
        )


def by_split(names: Sequence[str]) -> dict[str, list[str]]:
    """Split → its tars, sorted: those in a folder of that name, or whose name begins with it; else all are train."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        inner = folder.rpartition("/")[2]
        split = inner if inner in SPLITS else next((s for s in SPLITS if not inner and file.startswith(s)), "")
        if split or not inner:
            found.setdefault(split, []).append(name)
    if set(found) == {""}:
        return {"train": found[""]}
    found.pop("", None)
    return {split: found[split] for split in SPLITS if split in found}


def tars_in(root: Path) -> dict[str, list[str]]:
    """Split → the paths of its tars in a folder."""
    names = [path.name for path in root.glob("*.tar")]
    names += [f"{split}/{path.name}" for split in SPLITS for path in (root / split).glob("*.tar")]
    return {split: [str(root / name) for name in some] for split, some in by_split(names).items()}


def class_names(text: str | None) -> tuple[str, ...] | None:
    """Class names, one per line, from the file that CLIP_benchmark's exports keep beside the shards."""
    return tuple(line.strip() for line in (text or "").splitlines() if line.strip()) or None


def names_in(root: Path) -> tuple[str, ...] | None:
    """The class names of a folder of tars, if it has that file."""
    file = root / CLASS_NAMES
    return class_names(file.read_text(encoding="utf-8")) if file.is_file() else None


def webdataset(
    found: Mapping[str, list[str]], names: tuple[str, ...] | None, options: ReadOptions
) -> dict[str, RawSplit]:
    """Read the tars of every split, in their order; raises BadData if one is damaged, or a sample has no image or label."""
    return {split: join(split, paths, names, options, index_file, Members) for split, paths in found.items()}


def join(
    split: str,
    paths: Sequence[str],
    names: tuple[str, ...] | None,
    options: ReadOptions,
    index_tar: Callable[[str, "Columns"], Index],
    encoded: Callable[[tuple[str, ...], np.ndarray], Encoded],
) -> RawSplit:
    """Join the indexes of a split's tars → the raw split."""
    columns, where = Columns(options, split), f"{os.path.dirname(paths[0])}, split {split}"
    parts = [index_tar(path, columns) for path in paths]
    whole = Index.joined(parts)
    keys = whole.keys
    if not keys:
        raise BadData(f"{where}: no samples; allowed: tars with s01.jpg, s01.cls, …")
    if len(set(keys)) < len(keys):  # names begin again in every tar
        stems = [os.path.basename(path).removesuffix(".tar") for path in paths]
        keys = [f"{stem}/{key}" for stem, part in zip(stems, parts, strict=True) for key in part.keys]
    return RawSplit(
        ids=require_unique([f"{split}/{key}" for key in keys], where),
        labels=whole.labels,
        encoded=encoded(tuple(paths), whole.where),
        decode=decoder(options),
        names=names,
        digests=whole.digests,
    )


def index_file(path: str, columns: "Columns") -> Index:
    """Index a tar on disk: headers and labels are read, images are skipped."""
    try:
        with tarfile.open(path, "r:") as tar:
            return index(samples(tar), path, columns)
    except (tarfile.TarError, OSError, EOFError) as err:
        raise BadData(f"{path} cannot be read as a tar: {err}; allowed: whole tars that are not compressed") from err


def samples(tar: tarfile.TarFile, *, hashed: bool = False) -> Iterator[Sample]:
    """The samples of one tar, in its order; with `hashed`, every file is read and its digest computed."""
    one: Sample | None = None
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep a million headers
        folder, name = os.path.split(member.name)
        stem, _, extension = name.partition(".")
        if not member.isreg() or not stem or not extension:
            continue
        key, extension = os.path.join(folder, stem), extension.lower()
        if one is None or one.key != key:
            if one:
                yield one
            one = Sample(key)
        one.where[extension] = (member.offset_data, member.size)
        if (extension in WORDS or hashed) and (file := tar.extractfile(member)):
            data = file.read()
            if len(data) < member.size:
                raise tarfile.ReadError("unexpected end of data")
            if extension in WORDS:
                one.small[extension] = data
            if hashed:
                one.digests[extension] = xxhash.xxh3_128_digest(data)
    if one:
        yield one


class Columns:
    """Chooses which of a sample's files is the image and which the label, by the first sample or as the user says."""

    def __init__(self, options: ReadOptions, split: str) -> None:
        self.options, self.split = options, split
        self.label = self.inner = ""

    @property
    def key(self) -> str:
        """The options on which an index depends, besides the tar."""
        return f"{self.options.image_column} {self.options.label_column}"

    def decide(self, first: Sample, path: str) -> None:
        """Choose the label's extension; raises BadData, which lists them, if that is not clear or images are several."""
        where = f"{path}, sample {first.key}"
        kinds = {name: WORDS.get(name) or ("image" if _is_image(name) else "bytes") for name in first.where}
        requested, _, self.inner = (self.options.label_column or "").partition(".")
        likely = [name for name in ("cls", "npy") if name in kinds]
        self.label = choose_column("label", kinds, requested or None, likely[:1], ("cls", "npy"), where)
        if self.options.image_column is None and len(images := [n for n in kinds if _is_image(n)]) != 1:
            choose_column("image", kinds, None, images, (), where)

    def image(self, sample: Sample, path: str) -> str:
        """The extension of the sample's image, which may differ from sample to sample."""
        requested = self.options.image_column
        images = [name for name in sample.where if name == requested or (requested is None and _is_image(name))]
        if len(images) != 1:
            raise BadData(
                f"{path}: sample {sample.key} has {len(images)} images ({', '.join(sample.where)}); allowed is one, or "
                "say which with --image-column"
            )
        return images[0]

    def read_label(self, sample: Sample, path: str) -> Any:
        """The label: a class as a number or a name, a vector, or a field of an object; None if the sample has none."""
        data = sample.small.get(self.label)
        if data is None:
            return None
        try:
            if self.label == "npy":
                vector = np.load(io.BytesIO(data), allow_pickle=False)
                return vector.tolist() if vector.ndim == 1 else vector.reshape(-1).tolist()[0]
            if self.label == "json":
                return json.loads(data)[self.inner]
            text = data.decode("utf-8").strip()
            return int(text) if text.isdecimal() else text
        except (ValueError, KeyError, EOFError, TypeError, IndexError) as err:
            raise BadData(f"{path}: the label {sample.key}.{self.label} cannot be read: {err}") from err


def index(every: Iterator[Sample], path: str, columns: Columns) -> Index:
    """The index of one tar's samples."""
    keys: list[str] = []
    labels: list[Any] = []
    where: list[tuple[int, int]] = []
    digests = bytearray()
    for sample in every:
        if not columns.label:
            columns.decide(sample, path)
        image = columns.image(sample, path)
        keys.append(sample.key)
        labels.append(columns.read_label(sample, path))
        where.append(sample.where[image])
        digests += sample.digests.get(image, b"")
    return Index.of(keys, labels, where, digests)


def _is_image(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in SUFFIXES
