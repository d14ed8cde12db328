"""Reads images from arrays, in memory or in .npz and .npy files; each row becomes a PGM or PPM file, whose bytes say all."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlfusion.datasets.columns import SPLITS
from mlfusion.datasets.split import RawSplit, decoder
from mlfusion.errors import BadData
from mlfusion.specs.options import ReadOptions

SHAPES = "[N, height, width] or [N, height, width, 3] of uint8, or [N, height, width] of uint16"


@dataclass(frozen=True, eq=False)
class Pixels:
    """Rows of an array in memory, each as the bytes of a PGM or PPM file."""

    images: np.ndarray

    def __call__(self, row: int) -> bytes:
        return encode_netpbm(self.images[row])


@dataclass(frozen=True, eq=False)
class PixelFile:
    """Rows of a .npy file, which is memory-mapped when it is read and pickles as its path."""

    path: str

    def __call__(self, row: int) -> bytes:
        return encode_netpbm(np.load(self.path, mmap_mode="r", allow_pickle=False)[row])


def encode_netpbm(pixels: np.ndarray) -> bytes:
    """[height, width] or [height, width, 3] → a binary PGM or PPM file (netpbm.sourceforge.net/doc), lossless."""
    height, width = pixels.shape[:2]
    most = 65535 if pixels.dtype == np.uint16 else 255
    head = f"P{6 if pixels.ndim == 3 else 5}\n{width} {height}\n{most}\n".encode()
    return head + np.ascontiguousarray(pixels, ">u2" if most > 255 else "u1").tobytes()


def arrays(given: Mapping[str, tuple[Any, Any]], options: ReadOptions, where: str) -> dict[str, RawSplit]:
    """Raw splits of (images, labels); raises BadData for images of another shape or type, or other numbers of labels."""
    splits = {}
    for name, pair in given.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise BadData(f"{where}, split {name}: allowed is a pair (images, labels)")
        images, labels = np.asarray(pair[0]), pair[1]
        _check(images, len(labels), f"{where}, split {name}")
        ids = tuple(f"{name}/{row}" for row in range(len(images)))
        splits[name] = RawSplit(ids, labels, Pixels(images), decoder(options))
    return splits


def _check(images: np.ndarray, labels: int, where: str) -> None:
    gray = images.ndim == 3 and images.dtype in (np.uint8, np.uint16)
    colour = images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8
    if not (gray or colour):
        hint = "; scale to 0..255 and convert" if images.dtype.kind == "f" else ""
        hint = "; move the channels to the end" if images.ndim == 4 and images.shape[1] == 3 and not hint else hint
        raise BadData(f"{where}: images are {list(images.shape)} of {images.dtype}; allowed: {SHAPES}{hint}")
    if len(images) != labels:
        raise BadData(f"{where}: {len(images):,} images and {labels:,} labels; allowed: as many of each")


def npz(path: Path, options: ReadOptions) -> dict[str, RawSplit]:
    """Read a .npz file with images and labels, or train_images, train_labels, test_images … (or x_train, y_train, …).

    Raises BadData if it has no such arrays, or one that would need pickle.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = _array_names(list(file.files), str(path), options)
            given = {split: (file[images], file[labels]) for split, (images, labels) in names.items()}
    except (ValueError, OSError, zipfile.BadZipFile) as err:
        raise BadData(f"{path} cannot be read: {err}; allowed: arrays of numbers, written by numpy.savez") from err
    return arrays(given, options, str(path))


def npy(root: Path, options: ReadOptions) -> dict[str, RawSplit]:
    """Read a folder with train_images.npy, train_labels.npy, …, as `npz`; images are memory-mapped."""
    names = _array_names([path.stem for path in sorted(root.glob("*.npy"))], str(root), options)
    files = {split: (root / f"{images}.npy", root / f"{labels}.npy") for split, (images, labels) in names.items()}
    try:
        given = {
            split: (np.load(images, mmap_mode="r", allow_pickle=False), np.load(labels, allow_pickle=False))
            for split, (images, labels) in files.items()
        }
    except (ValueError, OSError) as err:
        raise BadData(f"{root}: {err}; allowed: arrays of numbers, written by numpy.save") from err
    found = arrays(given, options, str(root))
    return {split: replace(one, encoded=PixelFile(str(files[split][0]))) for split, one in found.items()}


def _array_names(names: list[str], where: str, options: ReadOptions) -> dict[str, tuple[str, str]]:
    """Split → the names of its arrays of images and of labels."""
    if options.image_column or options.label_column:
        pair = (options.image_column or "images", options.label_column or "labels")
        if absent := [name for name in pair if name not in names]:
            raise BadData(f"{where} has no array {absent[0]!r}; it has {', '.join(names) or 'none'}")
        return {"train": pair}
    found = {}
    for split in SPLITS:
        for images, labels in ((f"{split}_images", f"{split}_labels"), (f"x_{split}", f"y_{split}")):
            if images in names and labels in names:
                found[split] = (images, labels)
    for images, labels in (("images", "labels"), ("x", "y")):
        if not found and images in names and labels in names:
            found["train"] = (images, labels)
    if not found:
        raise BadData(
            f"{where} has the arrays {', '.join(names) or '(none)'}; allowed: images and labels, or train_images, "
            "train_labels, test_images, test_labels; or name them with --image-column and --label-column"
        )
    return found
