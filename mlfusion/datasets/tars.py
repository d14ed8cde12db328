"""Reads WebDataset tars in place: one pass over the headers finds the position of every image.

A sample is the set of files with the same name up to the first dot: `s0000001.jpg` and `s0000001.cls`. Nothing is unpacked,
and no tar is loaded into memory.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from mlfusion.datasets.columns import choose_column, require_unique
from mlfusion.datasets.folder import (
    LABEL_BYTES,
    NAMES_BYTES,
    files_below,
    image_bytes,
    open_regular,
    read_regular,
    require_inside,
)
from mlfusion.datasets.images import SUFFIXES
from mlfusion.datasets.places import by_split
from mlfusion.datasets.split import DIGEST_BYTES, Encoded, RawSplit, decoder, image_digest
from mlfusion.datasets.values import NUMBERED
from mlfusion.errors import BadData, boundary
from mlfusion.specs.options import ReadOptions
from mlfusion.system import room

CLASS_NAMES = "classnames.txt"
PIECE_BYTES = 1 << 20  # of a file in a tar that are read at once
LABEL_FILES = ("cls", "npy")
"""Extensions of the files that hold a sample's label, unless --label-column names another."""

LABEL_TYPES = {"cls": "class", "npy": "vector", "json": "object", "txt": "text"}


@dataclass(frozen=True, eq=False)
class Members:
    """Byte ranges of files, one per image."""

    files: tuple[str, ...]
    positions: np.ndarray  # [images, 3] int64: file, first byte, number of bytes

    def __call__(self, row: int) -> bytes:
        file, offset, size = map(int, self.positions[row])
        room.take(size)
        with open_regular(self.files[file]) as stream:
            data = os.pread(stream.fileno(), size, offset)
            while len(data) < size and (part := os.pread(stream.fileno(), size - len(data), offset + len(data))):
                data += part
        if len(data) < size:
            raise OSError(f"{self.files[file]} has become shorter since it was looked through")
        return data


@dataclass
class Sample:
    """The files of one name in one tar."""

    key: str
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension → first byte, bytes
    contents: dict[str, bytes] = field(default_factory=dict)  # extension → contents of a file that may be a label
    digests: dict[str, bytes] = field(default_factory=dict)  # extension → digest of a file's bytes, if they were read
    repeated: str = ""  # an extension that two of its files have


@dataclass(frozen=True)
class Index:
    """The samples of one file, in order; positions and digests are arrays, since there may be millions."""

    keys: list[str]
    labels: list[Any]
    positions: np.ndarray  # [images, 2] int64: a tar's first byte and bytes, or a Parquet file's group and row
    digests: np.ndarray | None  # [images, 32] uint8
    groups: list[Any] | None = None

    @staticmethod
    def of(
        keys: list[str],
        labels: list[Any],
        positions: list[tuple[int, int]],
        digests: bytearray,
        groups: list[Any] | None = None,
    ) -> "Index":
        """The index from lists with an item per sample; if an image has no digest, the index has no digests."""
        hashes = np.frombuffer(bytes(digests), np.uint8).reshape(-1, DIGEST_BYTES)
        table = np.array(positions, np.int64).reshape(-1, 2)
        return Index(keys, labels, table, hashes if len(hashes) == len(table) else None, groups)

    @staticmethod
    def joined(parts: "Sequence[Index]") -> "Index":
        """The index of several files; each row of `where` begins with the number of its file."""
        files = np.repeat(np.arange(len(parts)), [len(part.positions) for part in parts])
        digests = [part.digests for part in parts if part.digests is not None]
        groups = [part.groups for part in parts if part.groups is not None]
        return Index(
            keys=[key for part in parts for key in part.keys],
            labels=[label for part in parts for label in part.labels],
            positions=np.column_stack([files, np.concatenate([part.positions for part in parts])]),
            digests=np.concatenate(digests) if len(digests) == len(parts) else None,
            groups=[group for part in groups for group in part] if groups else None,
        )


def tars_in(root: Path) -> dict[str, list[str]]:
    """Split → the paths of its tars, which lie below a folder."""
    splits = by_split(files_below(root, ".tar"), str(root))
    return {split: [str(root / name) for name in tars] for split, tars in splits.items()}


def class_names(data: bytes, location: str) -> tuple[str, ...] | None:
    """Class names, one per line, in the file that CLIP_benchmark's exports have beside the tars.

    Raises:
        BadData: the file is not UTF-8, or a line between others is empty, so that later lines would name other classes.
    """
    try:
        names = [line.strip() for line in data.decode("utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as err:
        raise BadData(f"{location} cannot be read: {err}; allowed: UTF-8, one class name per line") from err
    if "" in names and len(names) > 1:
        raise BadData(
            f"{location}, line {names.index('') + 1} is empty; allowed: a name on every line, since the line number says "
            "which class it names"
        )
    return tuple(names) if names != [""] else None


def read_class_names(root: Path) -> tuple[str, ...] | None:
    """The class names in a folder of tars, if it has a file of them."""
    file = root / CLASS_NAMES
    if not file.is_file():
        return None
    require_inside(file, root)
    return class_names(read_regular(file, NAMES_BYTES), str(file))


def webdataset(
    tars: Mapping[str, list[str]], names: tuple[str, ...] | None, options: ReadOptions
) -> dict[str, RawSplit]:
    """Read the tars of every split, in order; raises BadData if one is damaged, or a sample has no image or label."""
    return {split: join(split, paths, names, options, index_file, Members) for split, paths in tars.items()}


def join(
    split: str,
    paths: Sequence[str],
    names: tuple[str, ...] | None,
    options: ReadOptions,
    index_tar: Callable[[str, "Columns"], Index],
    encoded: Callable[[tuple[str, ...], np.ndarray], Encoded],
) -> RawSplit:
    """Join the indexes of a split's tars → the raw split."""
    columns, location = Columns(options), f"{os.path.dirname(paths[0])}, split {split}"
    parts = [index_tar(path, columns) for path in paths]
    index = Index.joined(parts)
    keys = index.keys
    if not keys:
        raise BadData(f"{location}: no samples; allowed: tars with s01.jpg, s01.cls, …")
    if len(set(keys)) < len(keys):  # each tar numbers its samples from 0
        stems = [os.path.basename(path).removesuffix(".tar") for path in paths]
        keys = [f"{stem}/{key}" for stem, part in zip(stems, parts, strict=True) for key in part.keys]
    labels, names = _with_names(index.labels, names, options)
    return RawSplit(
        ids=require_unique([f"{split}/{key}" for key in keys], location),
        labels=labels,
        encoded=encoded(tuple(paths), index.positions),
        decode=decoder(options),
        names=names,
        digests=index.digests,
        groups=index.groups,
    )


def _with_names(
    labels: list[Any], names: tuple[str, ...] | None, options: ReadOptions
) -> tuple[list[Any], tuple[str, ...] | None]:
    """The labels, with text that is a class number as a number if there are names; a field of fractions has no names."""
    is_field = options.label_column is not None and options.label_column != "cls"
    if names is None or (is_field and any(isinstance(x, float) and not x.is_integer() for x in labels)):
        return labels, None
    return [int(x) if isinstance(x, str) and NUMBERED.fullmatch(x) else x for x in labels], names


def index_file(path: str, columns: "Columns") -> Index:
    """Index a tar on disk; reads headers and labels, but no images."""
    with open_regular(path) as file:
        return index_samples(samples(file, path), path, columns)


def _sentence(path: str) -> Callable[[str], BadData]:
    return lambda why: BadData(f"{path} cannot be read as a tar: {why}; allowed: whole tars that are not compressed")


def _opened(file: IO[bytes], path: str, mode: Literal["r:", "r|"]) -> tarfile.TarFile:
    with boundary(_sentence(path)):
        return tarfile.open(path, mode, fileobj=file)


def _headers(tar: tarfile.TarFile, path: str) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar in order; each lies behind the one before it, so that a forged size does not lead back."""
    end = 0
    while True:
        with boundary(_sentence(path)):
            member = tar.next()
        if member is None:
            return
        if member.size < 0 or member.offset < end or tar.offset < member.offset_data:
            raise BadData(
                f"{path} cannot be read as a tar: the size of {member.name!r} leads back; allowed: whole tars"
            )
        if member.issparse():
            raise BadData(f"{path}: {member.name} is sparse; allowed: whole files. Write the tar without --sparse")
        end = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep a million headers
        yield member


def samples(file: IO[bytes], path: str, *, hashed: bool = False) -> Iterator[Sample]:
    """The samples of one tar, in its order; with `hashed`, it is read as a stream, and the digest of every file computed."""
    sample: Sample | None = None
    tar = _opened(file, path, "r|" if hashed else "r:")
    links = Links(path, seekable=not hashed)
    for member in _headers(tar, path):
        folder, name = os.path.split(member.name)
        stem, _, extension = name.partition(".")
        if not (member.isreg() or member.islnk() or member.issym()) or not stem or not extension:
            continue
        links.resolve(member)
        key, extension = os.path.join(folder, stem), extension.lower()
        if sample is None or sample.key != key:
            if sample:
                yield sample
            sample = Sample(key)
        if extension in sample.ranges:
            sample.repeated = extension
        sample.ranges[extension] = (member.offset_data, member.size)
        with boundary(_sentence(path)):
            _read_member(tar, member, extension, sample, hashed)
    with boundary(_sentence(path)):
        _require_end(tar)
    if sample:
        yield sample


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: Sample, hashed: bool) -> None:
    """Read a file that may be a label, and compute a file's digest if `hashed`; a large file is no label."""
    is_label = extension in LABEL_TYPES and member.size <= LABEL_BYTES
    if not (is_label or hashed) or (file := tar.extractfile(member)) is None:
        return
    digest, data, left = image_digest(), bytearray(), member.size
    while left and (part := file.read(min(left, PIECE_BYTES))):
        left -= len(part)
        digest.update(part)
        if is_label:
            data += part
    if left:
        raise tarfile.ReadError("unexpected end of data")
    if is_label:
        sample.contents[extension] = bytes(data)
    if hashed:
        sample.digests[extension] = digest.digest()


def _require_end(tar: tarfile.TarFile) -> None:
    """ReadError unless the last file is followed by the two empty blocks that end a tar (POSIX), and then by zeros alone."""
    assert tar.fileobj is not None
    rest = tar.fileobj.tell() - tar.offset + len(tar.fileobj.read(tarfile.BLOCKSIZE))  # the first was read as a header
    if rest < 2 * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the two blocks that end a tar are missing: it was cut, or its writer was not closed")
    while data := tar.fileobj.read(tarfile.RECORDSIZE):
        if data.strip(b"\0"):
            raise tarfile.ReadError(
                "more follows behind its end: of several tars in one file only the first would be read"
            )


class Links:
    """Finds what the links of a tar lead to: an earlier file of the same tar."""

    def __init__(self, path: str, *, seekable: bool) -> None:
        self.path, self.seekable = path, seekable
        self._files: dict[str, tuple[int, int]] | None = None  # name → first byte, bytes; made at the first link

    def resolve(self, member: tarfile.TarInfo) -> None:
        """Turn a link into a regular file with the position and size of its target; raises BadData if it has none."""
        if not member.isreg():
            folder = os.path.dirname(member.name) if member.issym() else ""
            target = os.path.normpath(os.path.join(folder, member.linkname))
            if self._files is None:
                self._files = self._before(member) if self.seekable else {}
            if target not in self._files:
                advice = "write the tar with tar --dereference --hard-dereference"
                more = "" if self.seekable else ", or leave --stream out"
                raise BadData(
                    f"{self.path}: {member.name} is a link to {member.linkname}; allowed is a link to an earlier file of "
                    f"a tar on this machine: {advice}{more}"
                )
            member.type, (member.offset_data, member.size) = tarfile.REGTYPE, self._files[target]
        if self._files is not None:
            self._files[os.path.normpath(member.name)] = (member.offset_data, member.size)

    def _before(self, link: tarfile.TarInfo) -> dict[str, tuple[int, int]]:
        """The positions of the regular files before this link."""
        with open_regular(self.path) as file:
            headers = _headers(_opened(file, self.path, "r:"), self.path)
            earlier = takewhile(lambda member: member.offset < link.offset, headers)
            return {os.path.normpath(m.name): (m.offset_data, m.size) for m in earlier if m.isreg()}


class Columns:
    """Chooses a sample's image file and label file, by the user's options or by the first sample."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options
        self.label = self.json_field = ""
        self.group, _, self.group_field = (options.group_column or "").partition(".")

    @property
    def key(self) -> str:
        """The options on which an index depends, besides the tar."""
        group = f" {self.options.group_column}" if self.group else ""
        return f"{self.options.image_column} {self.options.label_column}{group}"

    def decide(self, first: Sample, path: str) -> None:
        """Choose the label's extension; raises BadData, which lists all, if that is not clear or there are several images."""
        location = f"{path}, sample {first.key}"
        kinds = {name: LABEL_TYPES.get(name) or ("image" if _is_image(name) else "bytes") for name in first.ranges}
        requested, _, self.json_field = (self.options.label_column or "").partition(".")
        likely = [name for name in LABEL_FILES if name in kinds]
        self.label = choose_column("label", kinds, requested or None, likely, LABEL_FILES, location)
        if self.group and self.group not in LABEL_TYPES:
            choose_column(
                "group",
                {name: kind for name, kind in kinds.items() if name in LABEL_TYPES},
                self.group,
                (),
                (),
                location,
            )
        if self.options.image_column is None and len(images := [n for n in kinds if _is_image(n)]) != 1:
            choose_column("image", kinds, None, images, (), location)

    def image(self, sample: Sample, path: str) -> str:
        """The extension of the sample's image, which may differ from sample to sample."""
        requested = self.options.image_column
        images = [name for name in sample.ranges if name == requested or (requested is None and _is_image(name))]
        if len(images) != 1:
            raise BadData(
                f"{path}: sample {sample.key} has {len(images)} images ({', '.join(sample.ranges)}); allowed is one, or "
                "say which with --image-column"
            )
        return images[0]

    def read_label(self, sample: Sample, path: str) -> Any:
        """The label: a class as a number or a name, a vector, or a field of an object; None if the sample has none."""
        return self._read(sample, path, "label", self.label, self.json_field)

    def read_group(self, sample: Sample, path: str) -> Any:
        """The cell of the sample's group, such as a field of an object; None if the sample has none."""
        return self._read(sample, path, "group", self.group, self.group_field)

    @staticmethod
    def _read(sample: Sample, path: str, role: str, extension: str, field: str) -> Any:
        data = sample.contents.get(extension)
        if data is None:
            Columns._refuse_large(sample, path, role, extension)
            return None
        with boundary(lambda why: BadData(f"{path}: the {role} {sample.key}.{extension} cannot be read: {why}")):
            if extension == "npy":
                vector = np.load(io.BytesIO(data), allow_pickle=False)
                if vector.ndim > 1 or vector.dtype.kind not in "biufSU":
                    raise ValueError(f"{list(vector.shape)} of {vector.dtype}; allowed: a number or a vector")
                return vector.astype(np.float64).tolist() if vector.dtype.kind == "f" else vector.tolist()
            if extension == "json":
                return json.loads(data)[field]
            return data.decode("utf-8-sig").strip()

    @staticmethod
    def _refuse_large(sample: Sample, path: str, role: str, extension: str) -> None:
        """Raise BadData if a sample's file was not read because it is too large."""
        _, nbytes = sample.ranges.get(extension, (0, 0))
        if nbytes > LABEL_BYTES:
            raise BadData(
                f"{path}: the {role} {sample.key}.{extension} has {nbytes:,} bytes; allowed: {LABEL_BYTES:,}. Take the sample "
                f"out, or name another file with --{role}-column"
            )


def index_samples(found: Iterator[Sample], path: str, columns: Columns) -> Index:
    """The index of one tar's samples; `path` is the tar's, for messages."""
    keys: list[str] = []
    labels: list[Any] = []
    groups: list[Any] = []
    positions: list[tuple[int, int]] = []
    digests = bytearray()
    earlier: set[str] = set()
    for sample in found:
        if sample.repeated:
            raise BadData(f"{path}: the sample {sample.key} has two files {sample.repeated}; take one out")
        try:
            if not columns.label:
                columns.decide(sample, path)
            image = columns.image(sample, path)
        except BadData as err:
            if sample.key in earlier or any(later.key == sample.key for later in found):
                raise BadData(
                    f"{path}: the files of the sample {sample.key} do not stand together; write the tar in the order of "
                    "its names (tar --sort=name)"
                ) from err
            raise
        earlier.add(sample.key)
        keys.append(sample.key)
        labels.append(columns.read_label(sample, path))
        groups += [columns.read_group(sample, path)] if columns.group else []
        if (nbytes := sample.ranges[image][1]) > (most := image_bytes(columns.options.max_pixels)):
            raise BadData(
                f"{path}: {sample.key}.{image} has {nbytes:,} bytes; allowed for an image: {most:,}. Take it out"
            )
        positions.append(sample.ranges[image])
        digests += sample.digests.get(image, b"")
    return Index.of(keys, labels, positions, digests, groups if columns.group else None)


def _is_image(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in SUFFIXES
