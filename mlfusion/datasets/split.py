"""A data set in memory: splits of labelled images in a fixed order, decoded only when they are used."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from mlfusion.datasets.images import Decoder
from mlfusion.errors import BadData, BadImage
from mlfusion.specs.identity import AS_STORED, Decoding
from mlfusion.specs.kinds import parse_window
from mlfusion.specs.options import LabelKind, ReadOptions
from mlfusion.specs.splits import default_splits, split_word
from mlfusion.system import room
from mlfusion.system.progress import track

image_digest = hashlib.sha256
"""Identifies an image's bytes: a cryptographic digest, since two files of one fast digest can be made on purpose."""

DIGEST_BYTES = 32
TASK_IMAGES = 16  # images of one task of a thread: a task costs about as much as the digest of one image

IN_MEMORY = "arrays"
"""Source of a data set of arrays in memory."""

UNLABELLED = "images without labels"
"""Form of a folder of images that lie in no class folders."""

WHOLE = "all"
"""Name of the one split of images without labels."""

Encoded = Callable[[int], bytes]
"""Row → the bytes of the image's file; it can be pickled, and works in any process that sees the same files."""

Decode = Callable[[bytes], Image.Image]
"""The bytes of an image's file → the image in RGB; a function of the bytes alone."""


def decoder(options: ReadOptions) -> Decoder:
    """The decoder for images of a data set that is read with these options."""
    return Decoder(options.exif_transpose, options.max_pixels, parse_window(options.window))


def decoded(data: bytes, name: str, decode: Decode) -> Image.Image:
    """An image in RGB; raises BadImage, with its name and the reason, if it cannot be decoded."""
    try:
        return decode(data)
    except BadImage as err:
        raise BadImage(f"{name} cannot be read: {err}") from err


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split, in order; cheap to pickle, unless the images are arrays in memory."""

    name: str
    ids: tuple[str, ...]
    labels: np.ndarray  # [images] int64, an index into classes; [images, classes] uint8, 0 or 1; or [images] float64
    # Images without labels have labels [images, 0], and no classes.
    classes: tuple[str, ...]  # empty if labels are numbers
    encoded: Encoded
    decode: Decode
    digests: np.ndarray | None = None  # [images, 32] uint8, if they are known from reading the data set
    groups: tuple[str, ...] | None = (
        None  # [images], such as the patient of a slice; None: every image is its own group
    )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def target(self) -> LabelKind:
        """The same as `label_kind`, by its former name."""
        return self.label_kind

    @property
    def label_kind(self) -> LabelKind:
        """The kind of the labels."""
        return "labels" if self.labels.ndim == 2 else "class" if self.labels.dtype.kind == "i" else "number"

    def digest(self, row: int) -> bytes:
        """The digest of the image's encoded bytes, see `image_digest`; raises BadData if they cannot be read."""
        if self.digests is not None:
            return self.digests[row].tobytes()
        with self.at_work(row):
            return _hash(self.read(row))

    def read_digests(self, dataset: str) -> np.ndarray:
        """The digests of all images, [images, 32] uint8: every image's bytes are read once.

        Several threads read; or one where others would only wait for it, as for a Parquet file, and another one hashes.
        `dataset` is a name for the progress bar; raises BadData as `digest`.
        """
        if self.digests is not None:
            return self.digests
        if _in_order(self.encoded):
            return self._read_digests_in_order(dataset)
        digests = bytearray()
        tasks = [range(len(self))[first : first + TASK_IMAGES] for first in range(0, len(self), TASK_IMAGES)]
        with (
            track(f"reading {dataset}/{self.name}", len(self), "images") as bar,
            ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as pool,
        ):
            for done in pool.map(lambda rows: list(map(self.digest, rows)), tasks):
                digests += b"".join(done)
                bar.advance(len(done))
        return np.frombuffer(bytes(digests), np.uint8).reshape(len(self), DIGEST_BYTES)

    def _read_digests_in_order(self, dataset: str) -> np.ndarray:
        digests = bytearray()
        hashed: deque[Future[bytes]] = deque()
        with track(f"reading {dataset}/{self.name}", len(self), "images") as bar, ThreadPoolExecutor(1) as pool:
            for row in range(len(self)):
                hashed.append(pool.submit(_hash, self.read(row)))
                if len(hashed) > TASK_IMAGES:  # so few lie in memory
                    digests += hashed.popleft().result()
                bar.advance()
            digests += b"".join(each.result() for each in hashed)
        return np.frombuffer(bytes(digests), np.uint8).reshape(len(self), DIGEST_BYTES)

    def has_digests(self, digests: np.ndarray, dataset: str) -> bool:
        """Whether the images have these digests: [images, 32], or [images, 16] of an entry with xxh3-128."""
        if digests.shape[1] == DIGEST_BYTES:
            return np.array_equal(self.read_digests(dataset), digests)
        return all(xxhash.xxh3_128_digest(self.read(row)) == each.tobytes() for row, each in enumerate(digests))

    def read(self, row: int) -> bytes:
        """The image's bytes; raises BadData if the file cannot be read."""
        try:
            return self.encoded(row)
        except OSError as err:
            raise BadData(f"{self.ids[row]} cannot be read: {err.strerror or err}; mend that, or remove it") from err

    def image(self, row: int) -> Image.Image:
        """The image in RGB; raises BadImage, with its id and the reason, if it cannot be decoded, and BadData as `read`."""
        with self.at_work(row):
            return decoded(self.read(row), self.ids[row], self.decode)

    def at_work(self, row: int) -> AbstractContextManager[None]:
        """Work on one image, see `at_work`."""
        return at_work(self.ids[row])

    def take(self, rows: np.ndarray, name: str) -> "Split":
        """The images of these rows, in that order, as a split of another name."""
        return replace(
            self,
            name=name,
            ids=tuple(self.ids[row] for row in rows),
            labels=self.labels[rows],
            encoded=partial(read_row_of, self.encoded, rows),
            digests=None if self.digests is None else self.digests[rows],
            groups=None if self.groups is None else tuple(self.groups[row] for row in rows),
        )


@contextmanager
def at_work(name: str) -> Iterator[None]:
    """Work on one image: the memory for it is reserved until the end, see `room`.

    Raises:
        BadData: there is too little memory for it. This is no BadImage, which would be left out on this machine only.
    """
    try:
        with room.one_image():
            yield
    except MemoryError as err:
        raise BadData(
            f"{name} cannot be read: there is too little memory for it ({err or 'the system has no more'}); free some, or "
            "leave out images of that size by a smaller --max-pixels and --skip-bad"
        ) from err


def _hash(data: bytes) -> bytes:
    return image_digest(data).digest()


def _in_order(encoded: Encoded) -> bool:
    """Whether only one thread at a time can read rows of this source, or of the one that it is a part of."""
    while isinstance(encoded, partial):
        encoded = encoded.args[0]
    return getattr(encoded, "in_order", False)


def read_row_of(encoded: Encoded, rows: np.ndarray, row: int) -> bytes:
    """The bytes of image number `row` among some rows [images] int64 of another split."""
    return encoded(int(rows[row]))


@dataclass(frozen=True, eq=False)
class RawSplit:
    """A split with ids and labels as they are in its files."""

    ids: Sequence[str]
    labels: Sequence[Any]  # text, whole numbers, numbers, lists or vectors
    encoded: Encoded
    decode: Decode
    names: tuple[str, ...] | None = None  # class names that label numbers stand for, or all classes in their order
    digests: np.ndarray | None = None
    target: LabelKind | None = None  # the kind of label that the form implies: class folders are classes
    rows: Sequence[int] | None = None  # each image's row in its table, from 1
    groups: Sequence[Any] | None = None  # cells of the column of groups, as they are in the files
    # Column → its cells, of the columns that have another role or none; only where reading them costs nothing.
    others: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def place(self, row: int) -> str:
        """An image as messages name it: its id, and its row in the table."""
        return f"{self.ids[row]} (row {self.rows[row]:,})" if self.rows is not None else self.ids[row]


@dataclass(frozen=True, eq=False)
class DataSet:
    """All splits of a data set, over one list of classes."""

    name: str  # for display
    source: str  # hub id, "embedded", `IN_MEMORY`, or the absolute path of a folder or file
    form: str  # kind of folder or file, in words
    splits: Mapping[str, Split]
    resplit: str = ""  # ratio and seed if we made the splits: '0.8/0.1/0.1 seed 0', or '… seed 0 by group'
    decoding: Decoding = AS_STORED
    grouped_by: str = ""  # the column or the pattern of the groups

    @property
    def label_kind(self) -> LabelKind:
        """The kind of its labels."""
        return next(iter(self.splits.values())).label_kind

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of all splits; empty if labels are numbers."""
        return next(iter(self.splits.values())).classes

    @property
    def labelled(self) -> bool:
        """Whether its images have labels."""
        return self.form != UNLABELLED

    def requested(self, names: tuple[str, ...] | None) -> tuple[str, ...]:
        """The names of the splits to extract: unless they are named, the default, or the only one of images without labels."""
        if names is not None:
            return names
        return default_splits(self.splits) if self.labelled else tuple(self.splits)

    def split(self, name: str) -> Split:
        """Return one split; 'test=validation' returns the split validation as test, and 'val' the split validation.

        Raises:
            BadData: there is no such split.
        """
        stored = self.stored_name(name)
        if stored not in self.splits:
            if not self.labelled:
                raise BadData(
                    f"{self.name} has no split {stored!r}; its images have no labels and are the split {WHOLE!r}"
                )
            raise BadData(
                f"{self.name} has no split {stored!r}; it has {', '.join(self.splits)}: give --split (such as "
                "train,test=validation), or split train: --split-ratio 0.8/0.2"
            )
        return replace(self.splits[stored], name=name.partition("=")[0] if "=" in name else stored)

    def stored_name(self, name: str) -> str:
        """The data set's own name of the split that `split` would return: 'validation' for 'val' and 'test=val'."""
        new_name, _, stored = name.partition("=")
        stored = stored or new_name
        return stored if stored in self.splits else split_word(stored) or stored
