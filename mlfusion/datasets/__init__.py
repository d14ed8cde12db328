"""Which images there are: sample i of a split is the same image with the same label for ever, on every machine.

A data set is a catalogue name, an id on the Hugging Face hub, a folder or a file: class folders, tables of paths (CSV, JSON
Lines), WebDataset tars, Parquet, arrays. Each form is read in a module of its own and ends as splits of rows, whose labels
are made numbers, and which are cut anew if asked, in one way for all. Images are decoded only when asked for.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlfusion.datasets import arrays as _arrays
from mlfusion.datasets import carve as _carve
from mlfusion.datasets import files as _files
from mlfusion.datasets import hub as _hub
from mlfusion.datasets import remote as _remote
from mlfusion.datasets import tars as _tars
from mlfusion.datasets.catalogue import CATALOGUE, Row
from mlfusion.datasets.columns import SPLITS
from mlfusion.datasets.images import MAX_PIXELS, SUFFIXES, Decoder
from mlfusion.datasets.labels import numbered
from mlfusion.datasets.split import TARGETS, DataSet, Found, Reading, Split, Target
from mlfusion.errors import BadData, UnknownName

__all__ = [
    "CATALOGUE",
    "MAX_PIXELS",
    "SUFFIXES",
    "TARGETS",
    "DataSet",
    "Decoder",
    "Reading",
    "Row",
    "Split",
    "Target",
    "array_dataset",
    "load",
    "pictures",
]

FORMS = (
    "train/<class>/<image> and test/<class>/<image>, or <class>/<image> to be cut with --carve 0.8/0.2; train.csv and test.csv "
    "(or .jsonl) with paths; train/*.tar and test/*.tar; Parquet files; train_images.npy and train_labels.npy"
)


def load(word: str, reading: Reading | None = None) -> DataSet:
    """Find, and if need be download, what `word` means; its splits are checked against each other.

    Raises:
        UnknownName, Unavailable: there is no such data set, or it cannot be had.
        BadData: no images, columns or labels that cannot be used, one class only, or splits whose classes differ.
    """
    reading = reading or Reading()
    row = CATALOGUE.get(word)
    path = Path(word).expanduser()
    if row and row.source == "embedded":
        return _cut(_digits(), reading)
    if not row and path.exists():
        form, found = _local(path.resolve(), word, reading)
        return _made(path.resolve().name if path.is_dir() else path.stem, str(path.resolve()), form, found, reading)
    if not row and "/" not in word:
        otherwise = f"Or an id on the hub, such as uoft-cs/cifar10, or a folder or file: {FORMS}"
        raise UnknownName("data set", word, CATALOGUE, otherwise=otherwise)
    source = row.source if row else word
    name = row.name if row else source.rsplit("/", 1)[-1]
    if reading.stream:
        form, found = _remote.streamed(source, reading)
        return _made(name, source, form, found, reading)
    there = _hub.on_hub(name, source, reading)
    if isinstance(there, Path):
        form, found = _local(there, source, reading)
        return _made(name, source, form, found, reading)
    return _made(name, source, "hub data set", there, reading)


def array_dataset(
    name: str,
    splits: Mapping[str, tuple[Any, Any]],
    *,
    classes: Sequence[str] | None = None,
    target: Target | None = None,
    carve: str | None = None,
    carve_seed: int = 0,
) -> DataSet:
    """Images and labels of one's own, as arrays.

        data = mlfusion.array_dataset("mine", {"train": (images, labels), "test": (more, their_labels)})
        mlfusion.extract("formula-vit", data)
        mlfusion.probe("mine")

    Args:
        name: what to call it; `probe` finds its features by it.
        splits: by name, images [N, height, width] or [N, height, width, 3] uint8 (or [N, height, width] uint16), and as many
            labels: [N] whole numbers or text, [N, C] of 0 and 1, lists of labels, or [N] floats.
        classes: names of the classes or labels that whole numbers stand for.
        target: 'class', 'labels' or 'number', where it is not plain from the labels.
        carve: shares to cut the only split by, such as '0.8/0.2'.
        carve_seed: decides which image goes where.

    Raises:
        BadData: arrays of another shape or type.
    """
    reading = Reading(target=target, carve=carve, carve_seed=carve_seed)
    found = _arrays.arrays(splits, reading, name)
    names = None if classes is None else tuple(classes)
    named = {key: Found(one.ids, one.labels, one.encoded, one.decode, names) for key, one in found.items()}
    return _made(name, "arrays", "arrays", named, reading)


def pictures(files: Sequence[str], decode: Decoder | None = None) -> Split:
    """Image files of no data set, in the order given; their labels say nothing."""
    paths = tuple(str(Path(file).expanduser()) for file in files)
    return Split(
        name="images",
        ids=tuple(files),
        labels=np.zeros(len(files), np.int64),
        classes=(),
        encoded=_files.Files("", paths),
        decode=decode or Decoder(),
    )


def _local(path: Path, word: str, reading: Reading) -> tuple[str, dict[str, Found]]:
    """What kind of folder or file it is, in words, and its splits."""
    if path.is_file():
        return _file(path, word, reading)
    children = sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    splits = [name for name in SPLITS if name in children]
    if tables := _files.tables_in(path):
        return "tables of paths", _files.tables(tables, reading)
    if tars := _tars.tars_in(path):
        return "WebDataset tars", _tars.webdataset(tars, _tars.names_in(path), reading)
    if reading.stream and _hub.has_parquet(path, splits):
        return _remote.in_place(path, reading)
    if _hub.has_parquet(path, splits):
        return "Parquet files", _hub.in_folder(path, reading)
    if "train" not in splits and _arrays.npy_in(path):
        return "arrays", _arrays.npy(path, reading)
    if "train" in splits or (reading.carve and children):
        return "class folders", _files.class_folders(path, splits, reading)
    raise BadData(
        f"{word} has {'the folders ' + ', '.join(children[:5]) if children else 'no folders'}; allowed: {FORMS}"
    )


def _file(path: Path, word: str, reading: Reading) -> tuple[str, dict[str, Found]]:
    if path.suffix in _files.TABLES:
        return "table of paths", _files.tables({"train": path}, reading)
    if path.suffix == ".tar":
        return "WebDataset tar", _tars.webdataset({"train": [str(path)]}, _tars.names_in(path.parent), reading)
    if path.suffix == ".parquet":
        return "Parquet file", _hub.parquet(path, reading)
    if path.suffix == ".npz":
        return "arrays", _arrays.npz(path, reading)
    raise BadData(
        f"{word} is no data set; allowed: a .csv, .tsv, .jsonl, .tar, .parquet or .npz file, or a folder: {FORMS}"
    )


def _made(name: str, source: str, form: str, found: Mapping[str, Found], reading: Reading) -> DataSet:
    """Rows as they were found, made one data set: labels as numbers, splits cut, all checked."""
    for split, one in found.items():
        if not len(one.ids):
            raise BadData(f"{name}, split {split}: no images; allowed: {', '.join(sorted(SUFFIXES))}")
    if reading.carve is not None:  # of train alone: other splits may have no labels
        found = {"train": found[_whole(found)]}
    classes, labels = numbered(found, reading.target, name)
    splits = {
        split: Split(split, tuple(one.ids), labels[split], classes, one.encoded, one.decode, one.digests)
        for split, one in found.items()
    }
    called = f"{name}:{reading.label_column}" if reading.label_column else name
    return _cut(DataSet(called, source, form, splits, upright=reading.upright), reading)


def _whole(found: Mapping[str, Any]) -> str:
    """The split that a carve cuts: train, or the only one."""
    if "train" in found:
        return "train"
    if len(found) == 1:
        return next(iter(found))
    raise BadData(f"--carve cuts the split train, or the only one; there are {', '.join(found)}")


def _cut(data: DataSet, reading: Reading) -> DataSet:
    if reading.carve is None:
        return _checked(data)
    shares = _carve.parse(reading.carve)
    parts = _carve.cut(data.splits[_whole(data.splits)], shares, reading.carve_seed)
    words = _carve.called(shares, reading.carve_seed)
    name = f"{data.name}~{words.replace('/', '-').replace(' seed ', '~')}"  # a file may be called by it
    return _checked(DataSet(name, data.source, data.form, parts, words, data.upright))


def _checked(data: DataSet) -> DataSet:
    if data.target == "number":
        for name, split in data.splits.items():
            if len(np.unique(split.labels)) < 2:
                raise BadData(
                    f"{data.name}, split {name}: every label is {split.labels[0]:g}; a probe needs two or more"
                )
        return data
    if data.target == "labels":
        if not data.classes:
            raise BadData(f"{data.name}: no image has a label")
        return data
    present = {name: {s.classes[label] for label in np.unique(s.labels)} for name, s in data.splits.items()}
    everything = set().union(*present.values())
    if len(everything) < 2:
        raise BadData(f"{data.name} has one class only ({next(iter(everything))}); a probe needs at least two")
    for name, classes in present.items():
        if absent := sorted(everything - classes):
            shown = ", ".join(repr(c) for c in absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            numeric = all(label.removeprefix("-").isdecimal() for label in everything) and len(everything) > 20
            raise BadData(
                f"{data.name}: the splits' classes differ: {name} has no image of {shown}; give every class images in "
                "every split, or take the class out of all of them"
                + (" (labels that are numbers and not classes: --target number)" if numeric else "")
            )
    return data


# --- the embedded digits ---------------------------------------------------------------------------------------------


def _eight(data: bytes) -> Image.Image:
    return Image.frombytes("L", (8, 8), data).convert("RGB")


class _Digits:
    """Rows of scikit-learn's table."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels  # [images, 8, 8] uint8

    def __call__(self, row: int) -> bytes:
        return self.pixels[row].tobytes()


@lru_cache(maxsize=1)
def _digits() -> DataSet:
    """scikit-learn's 1,797 hand-written digits; in every class each fifth image is for the test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
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
            encoded=_Digits(pixels[rows]),
            decode=_eight,
        )

    test = turn % 5 == 4  # every fifth of a class
    train, rest = split("train", np.flatnonzero(~test)), split("test", np.flatnonzero(test))
    return DataSet("digits", "embedded", "embedded", {"train": train, "test": rest})
