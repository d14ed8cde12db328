"""A grammar of data sets: what each one holds is drawn first, and then written in one of the forms that mlfusion reads.

What is drawn is the oracle. Ids, labels, classes and pixels of a data set follow from it without any reader of mlfusion.
A fault is put into a written data set that is otherwise valid; its name says what has to become of it.
"""

import csv
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets as library
import numpy as np
import pyarrow
import pyarrow.parquet
from forms import npy, put
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from PIL import Image

# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """The bytes of an image file, the suffix of its name, and the pixels [height, width, 3] that it shows; None if damaged."""

    body: bytes = field(repr=False)
    suffix: str
    pixels: np.ndarray | None = field(repr=False)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, -1)


def by_pillow(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))


def _rgb(form: str, suffix: str, **options: Any) -> Callable[[np.ndarray], Picture]:
    return lambda colours: Picture(saved(Image.fromarray(colours), form, **options), suffix, colours)


def _one(form: str, suffix: str, **options: Any) -> Callable[[np.ndarray], Picture]:
    return lambda colours: Picture(
        saved(Image.fromarray(colours[..., 0]), form, **options), suffix, _grey(colours[..., 0])
    )


def _lossy(mode: str, form: str, suffix: str, **options: Any) -> Callable[[np.ndarray], Picture]:
    def made(colours: np.ndarray) -> Picture:
        body = saved(Image.fromarray(colours).convert(mode), form, **options)
        return Picture(body, suffix, by_pillow(body))

    return made


def _with_alpha(colours: np.ndarray) -> Picture:
    alpha = colours[..., ::-1][..., :1]
    return Picture(saved(Image.fromarray(np.concatenate([colours, alpha], -1), "RGBA"), "PNG"), ".png", colours)


def _grey_with_alpha(colours: np.ndarray) -> Picture:
    return Picture(saved(Image.fromarray(colours[..., :2].copy(), "LA"), "PNG"), ".png", _grey(colours[..., 0]))


def _palette(colours: np.ndarray) -> Picture:
    index = colours[..., 0] % 4
    table = np.array([[9, 8, 7], [200, 0, 3], [0, 255, 1], [17, 17, 250]], np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(table.tobytes())
    return Picture(saved(image, "PNG"), ".png", table[index])


def _one_bit(colours: np.ndarray) -> Picture:
    ink = colours[..., 0] > 127
    return Picture(saved(Image.fromarray(ink), "PNG"), ".png", _grey(np.where(ink, 255, 0).astype(np.uint8)))


def _sixteen_bits(colours: np.ndarray) -> Picture:
    deep = colours[..., 0].astype(np.uint16) * 256 + colours[..., 1]
    return Picture(saved(Image.fromarray(deep), "PNG"), ".png", _grey(colours[..., 0]))


def _animation(colours: np.ndarray) -> Picture:
    first, other = Image.fromarray(colours[..., 0]), Image.fromarray(255 - colours[..., 0])
    return Picture(saved(first, "PNG", save_all=True, append_images=[other]), ".png", _grey(colours[..., 0]))


def _turned(colours: np.ndarray) -> Picture:
    exif = Image.Exif()
    exif[0x0112] = 6
    return Picture(saved(Image.fromarray(colours), "PNG", exif=exif), ".png", colours)


PICTURES: dict[str, Callable[[np.ndarray], Picture]] = {
    "PNG": _rgb("PNG", ".png"),
    "grey PNG": _one("PNG", ".png"),
    "BMP": _rgb("BMP", ".bmp"),
    "TIFF": _rgb("TIFF", ".tif"),
    "PPM": _rgb("PPM", ".ppm"),
    "PGM": _one("PPM", ".pgm"),
    "GIF": _one("GIF", ".gif"),
    "lossless WebP": _rgb("WEBP", ".webp", lossless=True),
    "JPEG": _lossy("RGB", "JPEG", ".jpg"),
    "grey JPEG": _lossy("L", "JPEG", ".jpeg"),
    "CMYK JPEG": _lossy("CMYK", "JPEG", ".jpg"),
    "CMYK TIFF": _lossy("CMYK", "TIFF", ".tiff"),
    "lossy WebP": _lossy("RGB", "WEBP", ".webp"),
    "PNG named JPG": _rgb("PNG", ".JPG"),
    "PNG in capitals": _rgb("PNG", ".PNG"),
    "transparent PNG": _with_alpha,
    "transparent grey PNG": _grey_with_alpha,
    "PNG of a palette": _palette,
    "PNG of one bit": _one_bit,
    "PNG of 16 bits": _sixteen_bits,
    "animated PNG": _animation,
    "PNG with an orientation": _turned,
}


def picture(kind: str, height: int, width: int, seed: int) -> Picture:
    """A picture of random pixels; no two of one data set are equal."""
    return PICTURES[kind](np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# --- what a data set holds -------------------------------------------------------------------------------------------

KINDS = ("class", "labels", "number")
SPLITS = (("train", "test"), ("train", "validation", "test"), ("train", "validation"))
Label = str | tuple[str, ...] | float


@dataclass(frozen=True)
class Sample:
    """One image: its name without a suffix, its label, its picture."""

    name: str
    label: Label
    picture: Picture

    @property
    def file(self) -> str:
        return self.name + self.picture.suffix


@dataclass(frozen=True)
class Content:
    """What a data set holds, whatever its form: samples by split, the kind of their labels, and a seed for the form."""

    form: str
    kind: str
    splits: dict[str, list[Sample]]
    seed: int


def word(content: Content, split: str) -> str:
    """The word by which the files of a data set name a split."""
    words = ("validation", "val", "valid", "dev", "Val") if split == "validation" else (split,)
    return words[content.seed % len(words)]


@dataclass(frozen=True)
class Written:
    """A data set on disk, the options that it is read with, and what reading it has to give."""

    path: Path
    content: Content
    ids: dict[str, list[str]]  # in order; the samples of `content` have the same order
    options: dict[str, Any] = field(default_factory=dict)
    listed: tuple[str, ...] = ()  # its own list of classes

    def classes(self) -> tuple[str, ...]:
        """All classes: in the order of its list, or whole numbers by their size before words by their text."""
        if self.content.kind == "number":
            return ()
        if self.listed:
            return self.listed
        every = [sample.label for samples in self.content.splits.values() for sample in samples]
        names = {name for label in every for name in ((label,) if isinstance(label, str) else label)}
        return tuple(
            sorted(
                names,
                key=lambda name: (0, int(name), len(name), name) if name.lstrip("-").isdigit() else (1, 0, 0, name),
            )
        )

    def label(self, sample: Sample) -> Any:
        """The encoded label: an index, a row of 0 and 1, or a number."""
        if self.content.kind == "number":
            return sample.label
        if self.content.kind == "class":
            return self.classes().index(sample.label)
        return [int(name in sample.label) for name in self.classes()]


WORDS = (
    "cat",
    "Dog",
    "trained",
    "testbed",
    "salt & pepper",
    "größe",
    "鳥",
    "a b",
    "it's",
    "x-y_z",
    "100%",
    "None",
    "f(x)",
    "#1",
)
LETTERS = "aZ0 é図&'%#+-_=()[]@!~,"

ODD_WORDS = {
    "classes that are called like splits": ("train", "test", "val"),
    "numbers with zeros before them": ("01", "1", "001"),
    "negative numbers": ("-3", "-12"),
    "a semicolon in the name of a class folder": ("x;y", ";"),
}
"""Names of classes that some form, or all, read wrongly at some time."""


def names(count: int) -> st.SearchStrategy[list[str]]:
    """Names of files without a suffix, all different, also in a file system that does not see capitals."""
    text = st.text(LETTERS, min_size=1, max_size=6).map(lambda name: f"n{name}n")
    return st.lists(text, min_size=count, max_size=count, unique_by=str.casefold)


def _vocabulary(draw: DrawFn, form: str) -> list[str]:
    count = draw(st.integers(2, 4))
    odd = [word for _, each in sorted(ODD_WORDS.items()) for word in each]
    if not form.startswith("class folders"):
        odd = [word for word in odd if ";" not in word]
    words = st.lists(st.sampled_from([*WORDS, *odd]), min_size=count, max_size=count, unique=True).filter(
        lambda drawn: (
            "None" not in drawn or any(name.isalpha() for name in set(drawn) - {"None"})
        )  # else a missing number
    )
    numbers = st.lists(st.integers(0, 120).map(str), min_size=count, max_size=count, unique=True)
    return draw(words if draw(st.booleans()) else numbers)


def _labels(draw: DrawFn, kind: str, form: str, splits: Sequence[str], least: int) -> dict[str, list[Label]]:
    """Labels of every split, so that a probe could be trained on them."""
    if kind == "number":
        numbers = st.lists(st.integers(-40, 40), min_size=2, max_size=5, unique=True)
        return {split: [number + 0.5 for number in draw(numbers)] for split in splits}
    vocabulary = _vocabulary(draw, form)
    if kind == "class":
        counts = st.lists(st.integers(least, least + 2), min_size=len(vocabulary), max_size=len(vocabulary))
        return {
            split: draw(st.permutations([w for w, n in zip(vocabulary, draw(counts), strict=True) for _ in range(n)]))
            for split in splits
        }
    one = st.lists(st.sampled_from(vocabulary), max_size=3, unique=True).map(tuple)
    # The first image of each split has every label, so that none is unused, and one has two labels.
    return {split: [tuple(vocabulary), *draw(st.lists(one, min_size=1, max_size=4))] for split in splits}


@st.composite
def contents(
    draw: DrawFn,
    forms: Sequence[str],
    kinds: Sequence[str] = KINDS,
    splits: Sequence[tuple[str, ...]] = SPLITS,
    least: int = 1,
) -> Content:
    """What some data set of one of these forms, kinds of labels and splits holds; of each class at least so many images."""
    form, kind = draw(
        st.tuples(st.sampled_from(sorted(forms)), st.sampled_from(sorted(kinds))).filter(
            lambda pair: not pair[0].startswith("class folders") or pair[1] == "class"
        )
    )
    names_of_splits = draw(st.sampled_from(splits))
    labels = _labels(draw, kind, form, names_of_splits, least)
    found = iter(draw(names(sum(map(len, labels.values())))))
    seed = draw(st.integers(0, 2**32 - 1))
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))  # arrays need one shape
    formats = [draw(st.sampled_from(["PNG", "grey PNG"]))] if form in ("npz", "npy") else sorted(PICTURES)
    rows: dict[str, list[Sample]] = {}
    for split in names_of_splits:
        rows[split] = []
        for label in labels[split]:
            picked = draw(st.sampled_from(formats))
            size = shape if form in ("npz", "npy") else draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
            rows[split].append(Sample(next(found), label, picture(picked, *size, seed=draw(st.integers(0, 999)))))
    return Content(form, kind, rows, seed)


# --- forms -----------------------------------------------------------------------------------------------------------


def _texts(label: Label) -> str:
    """A label as the cell of a text table."""
    return label if isinstance(label, str) else repr(label) if isinstance(label, float) else ";".join(label)


def _is_whole(label: Any) -> bool:
    """Whether a label is the text of a whole number, and of no other text: 001 is none."""
    return isinstance(label, str) and label.isdigit() and str(int(label)) == label


def _json(label: Label) -> Any:
    return list(label) if isinstance(label, tuple) else label


def class_folders(content: Content, root: Path) -> Written:
    """<split>/<class>/…/<image>; some images lie a folder deeper."""
    chance = random.Random(content.seed)
    ids, splits = {}, {}
    for split, samples in content.splits.items():
        paths = {}
        for sample in samples:
            deeper = chance.choice(["", "", "more/"])
            paths[f"{word(content, split)}/{sample.label}/{deeper}{sample.file}"] = sample
        for path, sample in paths.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(sample.picture.body)
        ids[split] = sorted(paths)
        splits[split] = [paths[path] for path in ids[split]]
    (root / "notes.txt").write_text("not a picture")
    return Written(root, replace(content, splits=splits), ids)


def class_folders_alone(content: Content, root: Path) -> Written:
    """<class>/<image>, without folders of splits."""
    paths = {f"{sample.label}/{sample.file}": sample for sample in content.splits["train"]}
    for path, sample in paths.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(sample.picture.body)
    ids = sorted(paths)
    return Written(root, replace(content, splits={"train": [paths[path] for path in ids]}), {"train": ids})


def _pictures_in(folder: Path, samples: Sequence[Sample]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        (folder / sample.file).write_bytes(sample.picture.body)


def csv_of_each_split(content: Content, root: Path) -> Written:
    """train.csv, test.csv beside the images; the separator, the columns' names and a column of remarks vary."""
    chance = random.Random(content.seed)
    separator = chance.choice(",;\t")
    image, label = chance.choice([("path", "label"), ("file_name", "class"), ("filename", "target"), ("p i c", "spéc")])
    for split, samples in content.splits.items():
        _pictures_in(root / "img", samples)
        with open(
            root / f"{word(content, split)}.csv", "w", newline="", encoding=chance.choice(["utf-8", "utf-8-sig"])
        ) as file:
            writer = csv.writer(file, delimiter=separator, lineterminator=chance.choice(["\n", "\r\n"]))
            writer.writerow([label, "remark", image])
            for sample in samples:
                writer.writerow([_texts(sample.label), chance.choice(["", "1", "a, b; c"]), f"img/{sample.file}"])
    asked = {"image_column": image, "label_column": label} if label == "spéc" else {}
    return Written(root, content, {s: [f"img/{x.file}" for x in each] for s, each in content.splits.items()}, asked)


def one_csv(content: Content, root: Path) -> Written:
    """One table with a column of splits, whose rows are mixed."""
    chance = random.Random(content.seed)
    rows = [(split, sample) for split, samples in content.splits.items() for sample in samples]
    chance.shuffle(rows)
    _pictures_in(root, [sample for _, sample in rows])
    with open(root / "all.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "image", "label", "sample"])
        writer.writerows(
            (word(content, split), sample.file, _texts(sample.label), f"id {number}")
            for number, (split, sample) in enumerate(rows)
        )
    by_id = chance.choice([True, False])
    names_of = [f"id {number}" if by_id else sample.file for number, (_, sample) in enumerate(rows)]
    ids: dict[str, list[str]] = {}
    splits: dict[str, list[Sample]] = {}
    for name, (split, sample) in zip(names_of, rows, strict=True):
        ids.setdefault(split, []).append(name)
        splits.setdefault(split, []).append(sample)
    asked = {"label_column": "label", "image_column": "image"} | ({"id_column": "sample"} if by_id else {})
    return Written(root / "all.csv", replace(content, splits=splits), ids, asked)


def json_lines(content: Content, root: Path) -> Written:
    """<split>/metadata.jsonl as on the hub, or <split>.jsonl; whole numbers are sometimes numbers of JSON."""
    chance = random.Random(content.seed)
    beside, as_number = chance.choice([True, False]), chance.choice([True, False])
    ids = {}
    for split, samples in content.splits.items():
        named = word(content, split)
        _pictures_in(root / named, samples)
        start = "" if beside else f"{named}/"
        lines = []
        for sample in samples:
            label = _json(sample.label)
            if as_number and _is_whole(label):
                label = int(label)
            lines.append(
                json.dumps(
                    {"file_name": start + sample.file, "label": label}, ensure_ascii=chance.choice([True, False])
                )
            )
        place = root / named / "metadata.jsonl" if beside else root / f"{named}.jsonl"
        place.write_text(chance.choice(["\n", "\n\n"]).join(lines) + "\n", encoding="utf-8")
        ids[split] = [start + sample.file for sample in samples]
    return Written(root, content, ids)


def tars(content: Content, root: Path) -> Written:
    """<split>/NNN.tar or <split>-NNN.tar; labels as .cls (a name, or a number of classnames.txt), .npy or .json."""
    chance = random.Random(content.seed)
    in_folder, restart = chance.choice([True, False]), chance.choice([True, False])
    classes = Written(root, content, {}).classes()
    form = {
        "class": chance.choice(["name", "number", "json"]),
        "labels": chance.choice(["npy", "json"]),
        "number": "json",
    }[content.kind]
    if form in ("number", "npy"):
        (root / "classnames.txt").write_text("\n".join(classes), encoding="utf-8")
    ids: dict[str, list[str]] = {}
    for split, samples in content.splits.items():
        size = chance.randint(1, 3)
        parts = [samples[start : start + size] for start in range(0, len(samples), size)]
        keys = [[f"s{n if restart else n + i * size:04d}" for n in range(len(part))] for i, part in enumerate(parts)]
        named = word(content, split)
        stems = [f"{i:03d}" if in_folder else f"{named}-{i:03d}" for i in range(len(parts))]
        twice = restart and len(parts) > 1
        ids[split] = [
            f"{split}/{stem}/{key}" if twice else f"{split}/{key}"
            for stem, each in zip(stems, keys, strict=True)
            for key in each
        ]
        for stem, part, numbered in zip(stems, parts, keys, strict=True):
            place = root / named / f"{stem}.tar" if in_folder else root / f"{stem}.tar"
            place.parent.mkdir(exist_ok=True)
            with tarfile.open(place, "w") as tar:
                for key, sample in zip(numbered, part, strict=True):
                    files = [
                        (f"{key}{sample.picture.suffix}", sample.picture.body),
                        _tar_label(form, key, sample, classes),
                    ]
                    for name, body in chance.sample(files, 2):
                        put(tar, name, body)
    return Written(root, content, ids, {"label_column": "json.what"} if form == "json" else {})


def _tar_label(form: str, key: str, sample: Sample, classes: Sequence[str]) -> tuple[str, bytes]:
    if form == "json":
        return f"{key}.json", json.dumps({"what": _json(sample.label), "more": 3}).encode()
    if form == "npy":
        return f"{key}.npy", npy(np.array([name in sample.label for name in classes], np.int64))
    return f"{key}.cls", (str(classes.index(str(sample.label))) if form == "number" else str(sample.label)).encode()


def parquet(content: Content, root: Path) -> Written:
    """<split>-00000-of-00001.parquet, images as bytes or in the hub's form, ids in a column or not, classes listed or not."""
    chance = random.Random(content.seed)
    classes = list(Written(root, content, {}).classes())
    chance.shuffle(classes)
    listed = tuple(classes) if content.kind == "class" and "" not in classes and chance.choice([True, False]) else ()
    as_struct, by_id, in_place = (chance.choice([True, False]) for _ in range(3))
    ids = {}
    for split, samples in content.splits.items():
        bodies = [sample.picture.body for sample in samples]
        labels = [_json(sample.label) for sample in samples]
        if listed:
            labels = [listed.index(label) for label in labels]
        elif all(map(_is_whole, labels)):
            labels = [int(label) for label in labels]
        cells: list[Any] = [{"bytes": body, "path": None} for body in bodies] if as_struct else bodies
        kind = (
            pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]) if as_struct else pyarrow.binary()
        )
        columns = {
            "image": pyarrow.array(cells, kind),
            "label": pyarrow.array(labels),
            "id": pyarrow.array([s.name for s in samples]),
        }
        table = pyarrow.table(columns)
        if listed:
            image = library.Image() if as_struct else library.Value("binary")
            hub = {"image": image, "label": library.ClassLabel(names=listed), "id": library.Value("string")}
            table = table.replace_schema_metadata(library.Features(hub).arrow_schema.metadata)
        place = root / f"{word(content, split)}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(table, place, row_group_size=2)
        ids[split] = [sample.name if by_id else f"{split}/{row}" for row, sample in enumerate(samples)]
    options = ({"id_column": "id"} if by_id else {}) | ({"stream": True} if in_place else {})
    return Written(root, content, ids, options, listed)


def _arrays(content: Content) -> tuple[Content, dict[str, np.ndarray]]:
    """The arrays of a data set; several labels are vectors, whose classes are the numbers of its columns."""
    chance = random.Random(content.seed)
    images, labels = chance.choice([("{}_images", "{}_labels"), ("x_{}", "y_{}")])
    if content.kind == "labels":
        classes = Written(Path(), content, {}).classes()
        content = replace(
            content,
            splits={
                split: [
                    replace(x, label=tuple(str(i) for i, name in enumerate(classes) if name in x.label)) for x in each
                ]
                for split, each in content.splits.items()
            },
        )
    made = {}
    grey = all((x.picture.pixels == x.picture.pixels[..., :1]).all() for each in content.splits.values() for x in each)
    count = len(Written(Path(), content, {}).classes())
    column = chance.choice([True, False])
    for split, samples in content.splits.items():
        pixels = np.stack([pixels for sample in samples if (pixels := sample.picture.pixels) is not None])
        made[images.format(word(content, split))] = pixels[..., 0] if grey else pixels
        plain: list[Any] = [sample.label for sample in samples]
        if content.kind == "labels":
            plain = [[int(str(i) in label) for i in range(count)] for label in plain]
        elif all(map(_is_whole, plain)):
            plain = [int(label) for label in plain]
        values = np.array(plain)
        made[labels.format(word(content, split))] = values[:, None] if column and values.ndim == 1 else values
    return content, made


def npz(content: Content, root: Path) -> Written:
    content, made = _arrays(content)
    np.savez(root / "set.npz", **made)
    return Written(
        root / "set.npz", content, {s: [f"{s}/{row}" for row in range(len(each))] for s, each in content.splits.items()}
    )


def npy_files(content: Content, root: Path) -> Written:
    content, made = _arrays(content)
    for name, values in made.items():
        np.save(root / f"{name}.npy", values)
    return Written(root, content, {s: [f"{s}/{row}" for row in range(len(each))] for s, each in content.splits.items()})


FORMS: dict[str, Callable[[Content, Path], Written]] = {
    "class folders": class_folders,
    "CSV of each split": csv_of_each_split,
    "one CSV": one_csv,
    "JSON Lines": json_lines,
    "tars": tars,
    "Parquet": parquet,
    "npz": npz,
    "npy": npy_files,
}

ALONE: dict[str, Callable[[Content, Path], Written]] = {"class folders without splits": class_folders_alone}
"""Forms that have no splits of their own: they are read with --split-ratio."""

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def snapshot(written: Written, root: Path) -> Written:
    """The files below `root` as the hub's client keeps them: each one in blobs, and a link to it below the commit."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    repository = root / "datasets--org--set"
    (repository / "blobs").mkdir(parents=True)
    commit = repository / "snapshots" / COMMIT
    for number, file in enumerate(files):
        link = commit / file.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = file.rename(repository / "blobs" / f"{number:040x}")
        link.symlink_to(os.path.relpath(blob, link.parent))
    return replace(written, path=commit / written.path.relative_to(root))
