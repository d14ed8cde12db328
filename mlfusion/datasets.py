"""Which images there are: sample i of a split is the same image with the same label for ever, on every machine.

A data set is a catalogue name, an id on the Hugging Face hub, or a folder: class folders (`train/<class>/…`,
`test/<class>/…`), WebDataset shards (`train/*.tar`, `test/*.tar`), or a hub data set's own files. Images are decoded only
when asked for.
"""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image, UnidentifiedImageError

from mlfusion.errors import BadData, BadImage, Unavailable, UnknownName

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Row:
    """One line of the catalogue."""

    name: str
    source: str  # hub id, or "embedded"
    domain: str
    train_images: int
    classes: int


CATALOGUE: dict[str, Row] = {
    row.name: row
    for row in [
        Row("digits", "embedded", "Hand-written digits, 8 px (scikit-learn)", 1442, 10),
        # The study's twenty (arXiv 2601.09322, table of data sets), as exported by CLIP_benchmark.
        Row("fer2013", "clip-benchmark/wds_fer2013", "Structured", 28709, 7),
        Row("voc2007", "clip-benchmark/wds_voc2007", "Natural (multi-domain)", 7844, 20),
        Row("cars", "clip-benchmark/wds_cars", "Natural (single-domain)", 8144, 196),
        Row("fgvc-aircraft", "clip-benchmark/wds_fgvc_aircraft", "Natural (single-domain)", 3334, 100),
        Row("stl10", "clip-benchmark/wds_stl10", "Natural (multi-domain)", 5000, 10),
        Row("gtsrb", "clip-benchmark/wds_gtsrb", "Natural (single-domain)", 26640, 43),
        Row("country211", "clip-benchmark/wds_country211", "Natural (multi-domain)", 31650, 211),
        Row("caltech101", "clip-benchmark/wds_vtab-caltech101", "Natural (multi-domain)", 2753, 102),
        Row("cifar10", "clip-benchmark/wds_vtab-cifar10", "Natural (multi-domain)", 45000, 10),
        Row("cifar100", "clip-benchmark/wds_vtab-cifar100", "Natural (multi-domain)", 45000, 100),
        Row("diabetic-retinopathy", "clip-benchmark/wds_vtab-diabetic_retinopathy", "Specialized", 35126, 5),
        Row("dmlab", "clip-benchmark/wds_vtab-dmlab", "Structured", 65550, 6),
        Row("dtd", "clip-benchmark/wds_vtab-dtd", "Structured", 1880, 47),
        Row("eurosat", "clip-benchmark/wds_vtab-eurosat", "Specialized", 16200, 10),
        Row("flowers", "clip-benchmark/wds_vtab-flowers", "Natural (single-domain)", 1020, 102),
        Row("pets", "clip-benchmark/wds_vtab-pets", "Natural (single-domain)", 2944, 37),
        Row("pcam", "clip-benchmark/wds_vtab-pcam", "Specialized", 262144, 2),
        Row("resisc45", "clip-benchmark/wds_vtab-resisc45", "Specialized", 18900, 45),
        Row("svhn", "clip-benchmark/wds_vtab-svhn", "Natural (single-domain)", 65931, 10),
        Row("imagenet1k", "clip-benchmark/wds_imagenet1k", "Natural (multi-domain)", 1281167, 1000),
    ]
}


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split, in their order."""

    name: str
    ids: tuple[str, ...]
    labels: np.ndarray  # [images] int64, an index into classes
    classes: tuple[str, ...]
    encoded: Callable[[int], bytes]  # row → the image's bytes as they are kept
    decode: Callable[[bytes], Image.Image]

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self, row: int) -> bytes:
        """16 bytes that name the image's encoded bytes (xxh3-128, at memory speed)."""
        return xxhash.xxh3_128_digest(self.encoded(row))

    def image(self, row: int) -> Image.Image:
        """The picture, in RGB.

        Raises:
            BadImage: it cannot be read; says which and why.
        """
        try:
            image = self.decode(self.encoded(row))
            return image.convert("RGB")
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
            why = "not an image" if isinstance(err, UnidentifiedImageError) else str(err)
            raise BadImage(f"{self.ids[row]} cannot be read: {why}") from err


@dataclass(frozen=True, eq=False)
class DataSet:
    """All splits of a data set, over one list of classes."""

    name: str  # what people call it
    source: str  # hub id, "embedded", or the folder's absolute path
    splits: Mapping[str, Split]

    def split(self, name: str) -> Split:
        """One split by name.

        Raises:
            BadData: there is none of that name.
        """
        if name not in self.splits:
            raise BadData(f"{self.name} has no split {name!r}; it has {', '.join(self.splits)}: give --split")
        return self.splits[name]


def load(word: str) -> DataSet:
    """Find, and if need be download, what `word` means; its splits are checked against each other.

    Raises:
        UnknownName, Unavailable: there is no such data set, or it cannot be had.
        BadData: no images, one class only, or splits whose classes differ.
    """
    row = CATALOGUE.get(word)
    if row and row.source == "embedded":
        data = _digits()
    elif not row and Path(word).expanduser().is_dir():
        data = _folder(Path(word).expanduser().resolve(), word)
    elif not row and "/" not in word:
        otherwise = "Or an id on the hub, such as uoft-cs/cifar10, or a folder with train/<class>/… and test/<class>/…"
        raise UnknownName("data set", word, CATALOGUE, otherwise=otherwise)
    else:
        source = row.source if row else word
        name = row.name if row else source.rsplit("/", 1)[-1]
        # CLIP_benchmark's exports must be named as WebDataset: left to itself, `datasets` may take them for text.
        tars = _webdataset(f"hf://datasets/{source}", ("train", "test")) if "/wds_" in source else None
        data = _from_hub(name, source, tars)
    return _checked(data)


def _checked(data: DataSet) -> DataSet:
    for split in data.splits.values():
        if not len(split):
            raise BadData(f"{data.name}, split {split.name}: no images; allowed: {', '.join(sorted(SUFFIXES))}")
    present = {name: {s.classes[label] for label in np.unique(s.labels)} for name, s in data.splits.items()}
    everything = set().union(*present.values())
    if len(everything) < 2:
        raise BadData(f"{data.name} has one class only ({next(iter(everything))}); a probe needs at least two")
    for name, classes in present.items():
        if absent := sorted(everything - classes):
            shown = ", ".join(repr(c) for c in absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            raise BadData(
                f"{data.name}: the splits' classes differ: {name} has no image of {shown}; give every class images in "
                "every split, or take the class out of all of them"
            )
    return data


# --- the embedded digits ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _digits() -> DataSet:
    """scikit-learn's 1,797 hand-written digits; in every class each fifth image is for the test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pictures = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    turn = np.empty_like(labels)
    for label in range(10):
        turn[labels == label] = np.arange((labels == label).sum())
    classes = tuple(str(name) for name in bunch.target_names)

    def split(name: str, rows: np.ndarray) -> Split:
        return Split(
            name=name,
            ids=tuple(f"digits/{row:04d}" for row in rows),
            labels=labels[rows],
            classes=classes,
            encoded=lambda i: pictures[rows[i]].tobytes(),
            decode=lambda data: Image.frombytes("L", (8, 8), data),
        )

    test = turn % 5 == 4  # every fifth of a class
    return DataSet(
        "digits",
        "embedded",
        {"train": split("train", np.flatnonzero(~test)), "test": split("test", np.flatnonzero(test))},
    )


# --- folders ---------------------------------------------------------------------------------------------------------


def _folder(root: Path, word: str) -> DataSet:
    names = sorted(child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    known = [name for name in names if name in ("train", "test", "val", "validation")]
    if not known and next(root.rglob("*.parquet"), None):
        return _from_hub(root.name, str(root), None)  # a hub data set, downloaded by other means
    if not {"train", "test"} <= set(known):
        raise BadData(
            f"{word} has {'the folders ' + ', '.join(names[:5]) if names else 'no folders'}; allowed: train/<class>/… and "
            "test/<class>/… with images in them (or train/*.tar and test/*.tar)"
        )
    if list((root / "train").glob("*.tar")):
        return _from_hub(root.name, str(root), _webdataset(str(root), known))
    files = {name: _class_files(root, name) for name in known}
    classes = tuple(sorted({label for split in files.values() for label, _ in split}))
    return DataSet(
        root.name, str(root), {name: _file_split(root, name, found, classes) for name, found in files.items()}
    )


def _class_files(root: Path, split: str) -> list[tuple[str, str]]:
    """(class, path below the root) of every image, sorted by path.

    Raises:
        BadData: a link that leads out of the folder.
    """
    found = []
    for folder, _, names in os.walk(root / split, followlinks=False):
        for name in names:
            path = Path(folder, name)
            inner = path.relative_to(root / split)
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES or len(inner.parts) < 2:
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise BadData(f"{path} is a link that leads out of {root}; copy the image into the folder instead")
            found.append((inner.parts[0], path.relative_to(root).as_posix()))
    if not found:
        raise BadData(
            f"{root / split} holds no images; allowed: {split}/<class>/<image> with {', '.join(sorted(SUFFIXES))}"
        )
    return sorted(found, key=lambda item: item[1])


def _file_split(root: Path, name: str, files: list[tuple[str, str]], classes: tuple[str, ...]) -> Split:
    number = {label: i for i, label in enumerate(classes)}
    return Split(
        name=name,
        ids=tuple(path for _, path in files),
        labels=np.array([number[label] for label, _ in files], np.int64),
        classes=classes,
        encoded=lambda i: (root / files[i][1]).read_bytes(),
        decode=_decode,
    )


def pictures(files: Sequence[str]) -> Split:
    """Image files of no data set, in the order given; their labels say nothing."""
    return Split(
        name="images",
        ids=tuple(files),
        labels=np.zeros(len(files), np.int64),
        classes=(),
        encoded=lambda i: Path(files[i]).expanduser().read_bytes(),
        decode=_decode,
    )


def _decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


# --- the hub, through the datasets library ---------------------------------------------------------------------------


def _webdataset(root: str, splits: Sequence[str]) -> dict[str, str]:
    return {split: f"{root}/{split}/*.tar" for split in splits}


def _from_hub(name: str, source: str, tars: dict[str, str] | None) -> DataSet:
    """A data set of the hub, or WebDataset shards at `tars`, with its image and label columns guessed from their types."""
    import datasets as hub
    from huggingface_hub import HfApi, constants, errors

    hub.disable_progress_bars()
    # The hub's client hands on its transport's errors; offline mode is an OSError.
    unreachable = (OSError, errors.HTTPError)  # type: ignore[attr-defined]
    remote = not Path(source).is_dir()
    try:
        if remote and not constants.is_offline_mode():
            HfApi().dataset_info(source, timeout=10)  # answers at once where `datasets` would retry for half a minute
        loaded = hub.load_dataset("webdataset", data_files=tars) if tars else hub.load_dataset(source)
    except (errors.RepositoryNotFoundError, hub.exceptions.DatasetNotFoundError) as err:
        raise Unavailable(
            f"the hub has no data set {source!r} that you may read (gated ones need `hf auth login`); look at "
            "`mlfusion ls datasets`"
        ) from err
    except (ValueError, hub.exceptions.DatasetGenerationError) as err:
        raise BadData(f"{source} cannot be read as images: {str(err).splitlines()[0][:200]}") from err
    except unreachable as err:
        raise Unavailable(
            f"{name}: the hub cannot be reached ({type(err).__name__}); connect, set HF_HUB_OFFLINE=1 to use what an "
            "earlier download left, give a folder with --dataset, or try the embedded images: --dataset digits"
        ) from err
    names = _class_names(source, tars)
    splits = {split: _hub_split(name, split, table, names) for split, table in loaded.items()}
    classes = next(iter(splits.values())).classes if names else _common_classes(splits)
    return DataSet(name, source, {key: _relabelled(split, classes) for key, split in splits.items()})


def _hub_split(name: str, split: str, table: Any, names: tuple[str, ...] | None) -> Split:
    import datasets as hub

    features = table.features
    images = [column for column, feature in features.items() if isinstance(feature, hub.Image)]
    typed = [column for column, feature in features.items() if isinstance(feature, hub.ClassLabel)]
    usual = [column for column in ("label", "cls", "labels", "class", "target", "fine_label") if column in features]
    if len(images) != 1 or not (typed or usual):
        raise BadData(
            f"{name}, split {split}: needs one image column and a label column; it has "
            + ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
        )
    label = next((column for column in usual if column in typed), (typed or usual)[0])
    values = table[label][:]
    if typed:
        names = tuple(features[label].names)
        values = [names[value] for value in values]
    elif names:
        values = [names[int(value)] for value in values]
    pictures = table.select_columns(images).cast_column(images[0], hub.Image(decode=False))

    def encoded(row: int) -> bytes:
        cell = pictures[row][images[0]]
        return bytes(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    classes = names or tuple(sorted({str(value) for value in values}, key=_natural))
    number = {cls: i for i, cls in enumerate(classes)}
    keys = table["__key__"][:] if "__key__" in features else range(len(table))
    return Split(
        name=split,
        ids=tuple(f"{split}/{key}" for key in keys),
        labels=np.array([number[str(value)] for value in values], np.int64),
        classes=classes,
        encoded=encoded,
        decode=_decode,
    )


def _class_names(source: str, tars: dict[str, str] | None) -> tuple[str, ...] | None:
    """CLIP_benchmark's exports keep their class names beside the shards."""
    if not tars:
        return None
    import fsspec

    root = tars["train"].rsplit("/", 2)[0]
    try:
        with fsspec.open(f"{root}/classnames.txt", "rt", encoding="utf-8") as file:
            return tuple(line.strip() for line in file if line.strip())
    except (FileNotFoundError, OSError):
        return None


def _natural(text: str) -> tuple[int, str]:
    """Numbers by size, then words."""
    return (int(text), "") if text.isdigit() else (2**62, text)


def _common_classes(splits: Mapping[str, Split]) -> tuple[str, ...]:
    """The splits' class names as one list; a hub's own list (ClassLabel) is kept in its order."""
    lists = {split.classes for split in splits.values()}
    return lists.pop() if len(lists) == 1 else tuple(sorted({c for names in lists for c in names}, key=_natural))


def _relabelled(split: Split, classes: tuple[str, ...]) -> Split:
    if split.classes == classes:
        return split
    number = np.array([classes.index(c) for c in split.classes], np.int64)
    return Split(split.name, split.ids, number[split.labels], classes, split.encoded, split.decode)
