"""Reads images from arrays, in memory or in .npz and .npy files; each row is encoded as the bytes of a PGM or PPM file."""

import logging
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlfusion.datasets.folder import open_regular, require_inside
from mlfusion.datasets.places import words_of
from mlfusion.datasets.split import RawSplit, decoder
from mlfusion.errors import BadData, boundary
from mlfusion.specs.options import ReadOptions
from mlfusion.specs.splits import SPLIT_WORDS, SPLITS
from mlfusion.system import room

logger = logging.getLogger(__name__)

ROLES = {
    **dict.fromkeys(("images", "image", "x"), "images"),
    **dict.fromkeys(("labels", "label", "y"), "labels"),
}
"""Word in the name of an array, in lower case → what it holds."""

PACKED_BYTES = 256 << 20  # a .npz file that unpacks to less is not compared with the free memory
SHAPES = "[N, height, width] or [N, height, width, 3] of uint8, or [N, height, width] of uint16"


def _encode_row(images: np.ndarray, row: int) -> bytes:
    return encode_netpbm(images[row])


def _encode_file_row(path: str, row: int) -> bytes:
    """The row of a .npy file, which is opened at each call, so that only its path is sent to other processes."""
    return encode_netpbm(np.load(path, mmap_mode="r", allow_pickle=False)[row])


def encode_netpbm(pixels: np.ndarray) -> bytes:
    """[height, width] or [height, width, 3] → a binary PGM or PPM file (netpbm.sourceforge.net/doc), lossless."""
    height, width = pixels.shape[:2]
    max_value = 65535 if pixels.dtype == np.uint16 else 255
    header = f"P{6 if pixels.ndim == 3 else 5}\n{width} {height}\n{max_value}\n".encode()
    return header + np.ascontiguousarray(pixels, ">u2" if max_value > 255 else "u1").tobytes()


def arrays(pairs: Mapping[str, tuple[Any, Any]], options: ReadOptions, location: str) -> dict[str, RawSplit]:
    """Raw splits of (images, labels); raises BadData for images of another shape or type, or other numbers of labels."""
    splits = {}
    for name, pair in pairs.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise BadData(f"{location}, split {name}: allowed is a pair (images, labels)")
        images, labels = np.asarray(pair[0]), pair[1]
        if getattr(labels, "ndim", 1) == 0:
            raise BadData(f"{location}, split {name}: the labels are one value; allowed: one for each image")
        _check(images, len(labels), f"{location}, split {name}")
        ids = tuple(f"{name}/{row}" for row in range(len(images)))
        rows = range(1, len(images) + 1)
        splits[name] = RawSplit(ids, labels, partial(_encode_row, images), decoder(options), rows=rows)
    return splits


def _check(images: np.ndarray, labels: int, location: str) -> None:
    gray = images.ndim == 3 and images.dtype in (np.uint8, np.uint16)
    colour = images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8
    if not (gray or colour):
        hint = "; scale to 0..255 and convert" if images.dtype.kind == "f" else ""
        hint = "; move the channels to the end" if images.ndim == 4 and images.shape[1] == 3 and not hint else hint
        raise BadData(f"{location}: images are {list(images.shape)} of {images.dtype}; allowed: {SHAPES}{hint}")
    if len(images) != labels:
        raise BadData(f"{location}: {len(images):,} images and {labels:,} labels; allowed: as many of each")


def npz(path: Path, options: ReadOptions) -> dict[str, RawSplit]:
    """Read a .npz file with images and labels, or train_images, train_labels, test_images … (or x_train, y_train, …).

    Raises BadData if it has no such arrays, or one that would need pickle.
    """
    with (
        boundary(_sentence(path, "numpy.savez")),
        open_regular(path) as stream,
        np.load(stream, allow_pickle=False) as file,
    ):
        names = _array_names(list(file.files), str(path), options)
        _require_room(path, file.zip, {f"{name}.npy" for pair in names.values() for name in pair})
        pairs = {split: (file[images], file[labels]) for split, (images, labels) in names.items()}
    return arrays(pairs, options, str(path))


def _require_room(path: Path, archive: zipfile.ZipFile, members: set[str]) -> None:
    """Raise BadData if arrays of a .npz file, whose bytes may be packed a thousandfold, need more memory than is free."""
    unpacked = sum(member.file_size for member in archive.infolist() if member.filename in members)
    if unpacked > PACKED_BYTES and unpacked > (free := room.free_bytes()):
        raise BadData(
            f"{path} unpacks to {unpacked / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free; write the arrays with "
            "numpy.save into a folder, which is read in place"
        )


def _sentence(path: Path, writer: str) -> Callable[[str], BadData]:
    return lambda reason: BadData(f"{path} cannot be read: {reason}; allowed: arrays of numbers, written by {writer}")


def npy(root: Path, options: ReadOptions) -> dict[str, RawSplit]:
    """Read a folder with train_images.npy, train_labels.npy, …, as `npz`; images are memory-mapped."""
    names = _array_names([path.stem for path in sorted(root.glob("*.npy"))], str(root), options)
    files = {split: (root / f"{images}.npy", root / f"{labels}.npy") for split, (images, labels) in names.items()}
    pairs = {
        split: (_mapped(images, root), np.array(_mapped(labels, root))) for split, (images, labels) in files.items()
    }
    splits = arrays(pairs, options, str(root))
    return {
        split: replace(raw, encoded=partial(_encode_file_row, str(files[split][0]))) for split, raw in splits.items()
    }


def _mapped(path: Path, root: Path) -> np.ndarray:
    """The array of a .npy file in memory that is mapped to it, so that none is larger than its file; errors as of `npy`."""
    require_inside(path, root)
    with boundary(_sentence(path, "numpy.save")):
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return array


def _array_names(names: list[str], location: str, options: ReadOptions) -> dict[str, tuple[str, str]]:
    """Split → the names of its arrays of images and of labels."""
    if options.image_column or options.label_column:
        pair = (options.image_column or "images", options.label_column or "labels")
        if missing := [name for name in pair if name not in names]:
            raise BadData(f"{location} has no array {missing[0]!r}; it has {', '.join(names) or 'none'}")
        return {"train": pair}
    found: dict[tuple[str, str], str] = {}
    for name in names:
        words = words_of(name)
        splits = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS] or [""]
        roles = [ROLES[word] for word in words if word in ROLES]
        if len(roles) == len(splits) == 1 and len(words) == 1 + bool(splits[0]):
            if (place := (splits[0], roles[0])) in found:
                raise BadData(f"{location} has the arrays {found[place]} and {name}, which mean the same; rename one")
            found[place] = name
    array_names = {
        split or "train": (found[split, "images"], found[split, "labels"])
        for split in (*SPLITS, "")
        if {(split, "images"), (split, "labels")} <= set(found)
        and (split or not any((one, "images") in found for one in SPLITS))
    }
    if not array_names:
        raise BadData(
            f"{location} has the arrays {', '.join(names) or '(none)'}; allowed: images and labels, or train_images, "
            "train_labels, test_images, test_labels; or name them with --image-column and --label-column"
        )
    if rest := sorted(set(found.values()) - {name for pair in array_names.values() for name in pair}):
        logger.warning(
            "%s: the array%s %s %s left out, since images and labels of one split come in pairs",
            *(location, "s"[: len(rest) > 1], ", ".join(rest), "are" if len(rest) > 1 else "is"),
        )
    return array_names
