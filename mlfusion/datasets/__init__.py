"""Data sets: sample i of a split is always the same image with the same label, on every machine.

A data set is a catalogue name, an id on the Hugging Face hub, a folder or a file: class folders, tables of paths (CSV, JSON
Lines), WebDataset tars, Parquet, arrays. Each form has a module that reads raw splits. One function encodes the labels of all
forms as numbers, and one resplits a split on request. Images are decoded only when they are used.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlfusion.datasets import arrays as _arrays
from mlfusion.datasets import files as _files
from mlfusion.datasets import hub as _hub
from mlfusion.datasets import remote as _remote
from mlfusion.datasets import tars as _tars
from mlfusion.datasets.catalogue import CATALOGUE as CATALOGUE
from mlfusion.datasets.catalogue import CatalogueRow as CatalogueRow
from mlfusion.datasets.columns import refuse_unused
from mlfusion.datasets.depth import measure_window
from mlfusion.datasets.depth import report_depth as report_depth
from mlfusion.datasets.files import expand_folders as expand_folders
from mlfusion.datasets.folder import files_below
from mlfusion.datasets.folder import image_bytes as image_bytes
from mlfusion.datasets.folder import read_regular as read_regular
from mlfusion.datasets.groups import read_groups, report_candidates, report_shared
from mlfusion.datasets.images import SUFFIXES as SUFFIXES
from mlfusion.datasets.images import Decoder as Decoder
from mlfusion.datasets.labels import encode_labels
from mlfusion.datasets.places import split_of_path
from mlfusion.datasets.resplit import ratio_text, split_by_ratio
from mlfusion.datasets.split import IN_MEMORY as IN_MEMORY
from mlfusion.datasets.split import UNLABELLED as UNLABELLED
from mlfusion.datasets.split import WHOLE as WHOLE
from mlfusion.datasets.split import DataSet as DataSet
from mlfusion.datasets.split import Decode as Decode
from mlfusion.datasets.split import RawSplit
from mlfusion.datasets.split import Split as Split
from mlfusion.datasets.split import at_work as at_work
from mlfusion.datasets.split import decoded as decoded
from mlfusion.datasets.values import shown
from mlfusion.errors import BadData, UnknownName
from mlfusion.specs.identity import Decoding
from mlfusion.specs.kinds import parse_ratio, parse_window
from mlfusion.specs.options import LabelKind, ReadOptions
from mlfusion.specs.splits import split_word
from mlfusion.system.references import find_path, missing_path, short_name

logger = logging.getLogger(__name__)

FORMS = (
    "train/<class>/<image> and test/<class>/<image>, or <class>/<image> with --split-ratio 0.8/0.2; train.csv and test.csv "
    "(or .jsonl) with paths; train/*.tar and test/*.tar; Parquet files; train_images.npy and train_labels.npy; or, "
    "for tokens without labels, images in no folder"
)


def load(reference: str, options: ReadOptions | None = None) -> DataSet:
    """Find a data set by catalogue name, hub id or path, download it if needed, and check its splits against each other.

    Raises:
        UnknownName, Unavailable: there is no such data set, or it cannot be downloaded.
        BadData: no images, columns or labels that cannot be used, one class only, or a class that train has no image of.
    """
    options = options or ReadOptions()
    row = CATALOGUE.get(reference)
    path = find_path("data set", reference)
    if row and row.source == "embedded":
        refuse_unused(options, row.source, reference)
        return _resplit(_digits(), options)
    if path is not None:
        form, splits = _read_path(path, reference, options)
        return _build(short_name(path), str(path), form, splits, options)
    if not row and (missing := missing_path(reference)):
        raise BadData(
            f"{missing}. Allowed: a folder or file that is there, a name of `mlfusion ls datasets`, or owner/name on the hub"
        )
    if not row and not _is_hub_id(reference):
        otherwise = f"Or an id on the hub, such as uoft-cs/cifar10, or a folder or file: {FORMS}"
        raise UnknownName("data set", reference, CATALOGUE, otherwise=otherwise)
    source = row.source if row else reference
    name = row.name if row else source.rsplit("/", 1)[-1]
    if options.stream:
        form, splits = _remote.read_hub(source, options)
    elif isinstance(downloaded := _hub.load(name, source, options), Path):
        form, splits = _read_path(downloaded, source, options)
    else:
        form, splits = "hub data set", downloaded
    return _build(name, source, form, splits, options)


def array_dataset(
    name: str,
    splits: Mapping[str, tuple[Any, Any]],
    *,
    classes: Sequence[str] | None = None,
    target: LabelKind | None = None,
    split_ratio: str | None = None,
    split_seed: int = 0,
) -> DataSet:
    """A data set of images and labels in memory.

        data = mlfusion.array_dataset("mine", {"train": (images, labels), "test": (more, their_labels)})
        mlfusion.extract("formula-vit", data)
        mlfusion.probe("mine")

    Args:
        name: the data set's name; `probe` finds its features by it.
        splits: split → images [N, height, width] or [N, height, width, 3] uint8 (or [N, height, width] uint16), and as many
            labels: [N] whole numbers or text, [N, C] of 0 and 1, lists of labels, or [N] floats.
        classes: names of the classes or labels that whole numbers stand for.
        target: 'class', 'labels' or 'number'; guessed from the labels if not given.
        split_ratio: shares of train/test or train/validation/test, such as '0.8/0.2', to resplit train or the only split.
        split_seed: seed that decides which image goes to which part.

    Raises:
        BadData: arrays of another shape or type.
    """
    options = ReadOptions(target=target, split_ratio=split_ratio, split_seed=split_seed)
    names = None if classes is None else tuple(classes)
    raw = {split: replace(one, names=names) for split, one in _arrays.arrays(splits, options, name).items()}
    return _build(name, IN_MEMORY, "arrays", raw, options)


def _is_hub_id(text: str) -> bool:
    """Whether a text has the form of an id on the hub, `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    with suppress(HFValidationError):
        validate_repo_id(text)
        return "/" in text
    return False


def _read_path(path: Path, reference: str, options: ReadOptions) -> tuple[str, dict[str, RawSplit]]:
    """The name of the form of a folder or file, and its raw splits; `reference` is what the user named it, for messages."""
    if path.is_file():
        return _read_file(path, reference, options)
    if tables := _files.tables_in(path):
        return "tables of paths", _files.tables(tables, options)
    folders = _files.folders_in(path)
    tars, parquet = files_below(path, ".tar"), files_below(path, ".parquet")
    arrays = [file.name for file in path.glob("*.npy")]
    has_splits = any(split_of_path(file) for file in (*tars, *parquet))
    # Images beside containers may be those that the containers' cells name: one folder of them is no class.
    has_classes = folders.splits and (not (tars or parquet) or _files.has_classes(path, folders))
    if has_classes or (len(folders.classes) > 1 and not has_splits):
        _report_left_out(path, [*tars, *parquet, *_files.other_tables(path)])
        if has_classes or options.split_ratio:
            return "class folders", _files.class_folders(path, folders, options)
    elif tars:
        return "WebDataset tars", _tars.webdataset(_tars.tars_in(path), _tars.read_class_names(path), options)
    elif parquet:
        return "Parquet files", _remote.read_folder(path, options)
    elif arrays:
        return "arrays", _arrays.npy(path, options)
    elif options.split_ratio or any(split_word(child.name) for child in path.iterdir()):
        _report_left_out(path, _files.other_tables(path))
        return "class folders", _files.class_folders(path, folders, options)
    elif len(folders.classes) < 2 and _files.has_loose_images(path):
        return UNLABELLED, _files.unlabelled(path, options)
    children = sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    raise BadData(
        f"{reference} has {'the folders ' + ', '.join(children[:5]) if children else 'no folders'}; allowed: {FORMS}"
    )


def _report_left_out(root: Path, files: Sequence[str]) -> None:
    """Report containers and tables that lie beside class folders."""
    if files:
        logger.warning(
            "%s is read as class folders, and %s %s left out; give the path of a file to read that",
            *(root, ", ".join(files[:3]) + (f" and {len(files) - 3:,} more" if len(files) > 3 else "")),
            "are" if len(files) > 1 else "is",
        )


def _read_file(path: Path, reference: str, options: ReadOptions) -> tuple[str, dict[str, RawSplit]]:
    if path.suffix in _files.TABLES:
        return "table of paths", _files.tables({"": path}, options)
    if path.suffix == ".tar":
        split = split_of_path(path.name) or "train"
        return "WebDataset tar", _tars.webdataset({split: [str(path)]}, _tars.read_class_names(path.parent), options)
    if path.suffix == ".parquet":
        return "Parquet file", _remote.read_file(path, options)
    if path.suffix == ".npz":
        return "arrays", _arrays.npz(path, options)
    raise BadData(
        f"{reference} is no data set; allowed: a .csv, .tsv, .jsonl, .tar, .parquet or .npz file, or a folder: {FORMS}"
    )


def _build(name: str, source: str, form: str, raw: Mapping[str, RawSplit], options: ReadOptions) -> DataSet:
    """Raw splits → a checked data set: encodes the labels, and resplits on request."""
    refuse_unused(options, form, name)
    for split, one in raw.items():
        if not len(one.ids):
            raise BadData(f"{name}, split {split}: no images; allowed: {', '.join(sorted(SUFFIXES))}")
        if unnamable := next((name for name in one.ids if not name.isascii() and not _is_text(name)), None):
            raise BadData(
                f"{name}, split {split}: the name {unnamable!a} is no UTF-8; allowed are names that are text. Rename the file "
                "or its folder (convmv renames many)"
            )
    if options.split_ratio is not None:  # the other splits need no labels
        raw = {"train": raw[_source_split(raw)]}
    classes: tuple[str, ...] = ()
    if form == UNLABELLED:
        labels = {split: np.empty((len(one.ids), 0), np.uint8) for split, one in raw.items()}
    else:
        classes, labels = encode_labels(raw, options.target, name)
    groups = read_groups(raw, options, name)
    splits = {
        split: Split(split, tuple(one.ids), labels[split], classes, one.encoded, one.decode, one.digests, groups[split])
        for split, one in raw.items()
        if split in labels
    }
    full_name = f"{name}:{options.label_column}" if options.label_column else name
    decoding = Decoding(options.exif_transpose, parse_window(options.window), options.max_pixels)
    grouped_by = options.group_column or options.group_pattern or ""
    data = _resplit(DataSet(full_name, source, form, splits, decoding=decoding, grouped_by=grouped_by), options)
    if grouped_by:
        report_shared(data)
    else:
        report_candidates(data.name, raw, data.splits)
    return _with_measured_window(data) if options.window == "auto" else data


def _is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8; a file name of other bytes cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _source_split(splits: Mapping[str, Any]) -> str:
    """The split to resplit: train, or the only one."""
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return next(iter(splits))
    raise BadData(f"--split-ratio splits the split train, or the only one; there are {', '.join(splits)}")


def _resplit(data: DataSet, options: ReadOptions) -> DataSet:
    if options.split_ratio is None:
        return _check(data)
    ratio = parse_ratio(options.split_ratio)
    parts = split_by_ratio(data.splits[_source_split(data.splits)], ratio, options.split_seed)
    text = ratio_text(ratio, options.split_seed, by_group=bool(data.grouped_by))
    safe = text.replace("/", "-").replace(" seed ", "~").replace(" by ", "~by-")  # safe in a file's name
    return _check(replace(data, name=f"{data.name}~{safe}", splits=parts, resplit=text))


def _with_measured_window(data: DataSet) -> DataSet:
    """The data set with the window that fits its split train; the same window for all its splits."""
    if "train" not in data.splits:
        raise BadData(f"{data.name} has no split train, on which --window auto is measured; give --window LOW,HIGH")
    window = measure_window(data.splits["train"], data.name)
    splits = {
        name: replace(
            split, decode=replace(split.decode, window=window) if isinstance(split.decode, Decoder) else split.decode
        )
        for name, split in data.splits.items()
    }
    return replace(data, splits=splits, decoding=replace(data.decoding, window=window))


def _check(data: DataSet) -> DataSet:
    """Return the data set; raises BadData if it has labels, and a probe cannot be trained on them."""
    if not data.labelled:
        return data
    for name, split in data.splits.items() if data.label_kind == "number" else ():
        if len(np.unique(split.labels)) < 2:
            raise BadData(f"{data.name}, split {name}: every label is {split.labels[0]:g}; a probe needs two or more")
    for name, split in data.splits.items() if data.label_kind == "labels" else ():
        if not split.labels.any():
            raise BadData(
                f"{data.name}, split {name}: no image has a label; a probe is measured by the labels that occur. Give its "
                "images their labels, or take another split"
            )
    if data.label_kind != "class":
        return data
    if len(data.classes) < 2:
        raise BadData(f"{data.name} has one class only ({data.classes[0]}); a probe needs at least two")
    for name, split in data.splits.items():
        counts = np.bincount(split.labels, minlength=len(data.classes))
        if missing := [data.classes[number] for number in np.flatnonzero(counts == 0)]:
            _report_missing_classes(data, name, missing)
        single = [data.classes[number] for number in np.flatnonzero(counts == 1)]
        if name == "train" and single:
            logger.warning(
                "%s: train has one image only of the %s %s; a probe needs two or more, one to fit and one to choose on",
                *(data.name, "class" if len(single) == 1 else "classes", _shown(single)),
            )
    return data


def _report_missing_classes(data: DataSet, name: str, missing: Sequence[str]) -> None:
    """Report classes that a split lacks; raises BadData if it is train, from which a probe learns every class."""
    text = f"{data.name}: the splits' classes differ: {name} has no image of {_shown(missing)}"
    if name != "train":
        logger.warning("%s; a score on %s is that of the other classes", text, name)
        return
    numeric = all(label.removeprefix("-").isdecimal() for label in data.classes) and len(data.classes) > 20
    raise BadData(
        f"{text}; give every class images in train, or take the class out of all splits"
        + (" (labels that are numbers and not classes: --target number)" if numeric else "")
    )


def _shown(classes: Sequence[str]) -> str:
    more = f" and {len(classes) - 5} more" if len(classes) > 5 else ""
    return ", ".join(map(shown, classes[:5])) + more


# --- the embedded digits ---------------------------------------------------------------------------------------------


def _decode_digit(data: bytes) -> Image.Image:
    return Image.frombytes("L", (8, 8), data).convert("RGB")


def _encoded_digit(pixels: np.ndarray, row: int) -> bytes:
    return pixels[row].tobytes()


@lru_cache(maxsize=1)
def _digits() -> DataSet:
    """scikit-learn's 1,797 hand-written digits; every fifth image of a class is in the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    rank = np.empty_like(labels)
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    classes = tuple(str(name) for name in bunch.target_names)

    def split(name: str, rows: np.ndarray) -> Split:
        return Split(
            name=name,
            ids=tuple(f"digits/{row:04d}" for row in rows),
            labels=labels[rows],
            classes=classes,
            encoded=partial(_encoded_digit, pixels[rows]),
            decode=_decode_digit,
        )

    test = rank % 5 == 4
    splits = {name: split(name, np.flatnonzero(rows)) for name, rows in (("train", ~test), ("test", test))}
    return DataSet("digits", "embedded", "embedded", splits)
