"""What every data set becomes: splits of images in a fixed order, each with its label, decoded only when asked for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import xxhash
from PIL import Image

from mlfusion.datasets.images import MAX_PIXELS, Decoder
from mlfusion.errors import BadData, BadImage

Target = Literal["class", "labels", "number"]
TARGETS: tuple[Target, ...] = get_args(Target)
"""What an image's label may be: one class, any number of labels, or a number."""

Encoded = Callable[[int], bytes]
"""Row → the image's bytes as they are kept. Pickles, and works in any process that sees the same files."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read a data set, where that is not plain from the set itself."""

    image_column: str | None = None  # guessed from types and usual names
    label_column: str | None = None  # likewise
    id_column: str | None = None  # of sample ids; without one, a path or the row's number
    image_root: str | None = None  # folder that paths in a table begin at; the table's own
    target: Target | None = None  # guessed from the labels' type
    carve: str | None = None  # shares of train, (validation,) test, such as '0.8/0.1/0.1'
    carve_seed: int = 0
    upright: bool = False  # turn images as their EXIF says
    max_pixels: int = MAX_PIXELS
    config: str | None = None  # of a hub data set that has several
    stream: bool = False  # read a hub data set from where it lies, without keeping it

    @property
    def decoder(self) -> Decoder:
        """By which images are read."""
        return Decoder(self.upright, self.max_pixels)


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split, in their order. Pickles, but for large arrays in memory at no great cost."""

    name: str
    ids: tuple[str, ...]
    labels: np.ndarray  # [images] int64, an index into classes; [images, classes] uint8, 0 or 1; or [images] float64
    classes: tuple[str, ...]  # none where labels are numbers
    encoded: Encoded
    decode: Callable[[bytes], Image.Image]  # → RGB; a function of the bytes alone
    digests: np.ndarray | None = None  # [images, 16] uint8, where reading the set has found them already

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def target(self) -> Target:
        """What the labels are."""
        return "labels" if self.labels.ndim == 2 else "class" if self.labels.dtype.kind == "i" else "number"

    def digest(self, row: int) -> bytes:
        """16 bytes that name the image's encoded bytes (xxh3-128, at memory speed).

        Raises:
            BadData: the bytes cannot be had.
        """
        return xxhash.xxh3_128_digest(self.read(row)) if self.digests is None else self.digests[row].tobytes()

    def read(self, row: int) -> bytes:
        """The image's bytes.

        Raises:
            BadData: they cannot be had, which says nothing of the image.
        """
        try:
            return self.encoded(row)
        except OSError as err:
            raise BadData(f"{self.ids[row]} cannot be read: {err.strerror or err}; mend that, or remove it") from err

    def image(self, row: int) -> Image.Image:
        """The picture, in RGB.

        Raises:
            BadImage: its bytes are no image that can be read; says which and why.
            BadData: see `read`.
        """
        data = self.read(row)
        try:
            return self.decode(data)
        except BadImage as err:
            raise BadImage(f"{self.ids[row]} cannot be read: {err}") from err

    def take(self, rows: np.ndarray, name: str) -> "Split":
        """Some of its images, in that order, as a split of another name."""
        return Split(
            name,
            tuple(self.ids[row] for row in rows),
            self.labels[rows],
            self.classes,
            Taken(self.encoded, rows),
            self.decode,
            None if self.digests is None else self.digests[rows],
        )


@dataclass(frozen=True, eq=False)
class Taken:
    """Some rows of another split's images."""

    whole: Encoded
    rows: np.ndarray  # [images] int64

    def __call__(self, row: int) -> bytes:
        return self.whole(int(self.rows[row]))


@dataclass(frozen=True, eq=False)
class Found:
    """A split as its form holds it: ids and labels are what is written there."""

    ids: Sequence[str]
    labels: Sequence[Any]  # text, whole numbers, numbers, lists or vectors
    encoded: Encoded
    decode: Callable[[bytes], Image.Image]
    names: tuple[str, ...] | None = None  # of classes, where labels are their numbers; or all classes in their order
    digests: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class DataSet:
    """All splits of a data set, over one list of classes."""

    name: str  # what people call it
    source: str  # hub id, "embedded", "arrays", or the absolute path of a folder or file
    form: str  # what kind of folder or file, in words
    splits: Mapping[str, Split]
    carve: str = ""  # how the splits were cut, where we cut them: '0.8/0.1/0.1 seed 0'
    upright: bool = False  # images are turned as their EXIF says

    @property
    def target(self) -> Target:
        """What its labels are."""
        return next(iter(self.splits.values())).target

    @property
    def classes(self) -> tuple[str, ...]:
        """Of all splits; none where labels are numbers."""
        return next(iter(self.splits.values())).classes

    def split(self, name: str) -> Split:
        """One split by name; 'test=validation' is that of the second name, called by the first.

        Raises:
            BadData: there is none of that name.
        """
        called, _, kept = name.partition("=")
        if (kept or called) not in self.splits:
            raise BadData(
                f"{self.name} has no split {kept or called!r}; it has {', '.join(self.splits)}: give --split (such as "
                "train,test=validation), or cut one from train: --carve 0.8/0.2"
            )
        return replace(self.splits[kept or called], name=called)
