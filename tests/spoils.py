"""Faults of data sets, each by name: what is valid in `grammar` is drawn, and one thing of it is made wrong.

A fault of the content is put in before the data set is written, a fault of the files afterwards. Every one of them has to be
refused when the data set is opened, except damaged pictures, which are refused by name when they are read.
"""

import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet
from grammar import FORMS, Content, Label, Picture, Written, contents
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

FILES = ("class folders", "CSV of each split", "one CSV", "JSON Lines")
CSV = ("CSV of each split", "one CSV")
TABLES = (*CSV, "JSON Lines")
ARRAYS = ("npz", "npy")
ENCODED = tuple(form for form in FORMS if form not in ARRAYS)
KINDS = ("class", "labels", "number")

Change = Callable[[Content, random.Random], Content]
Damage = Callable[[Written, random.Random], Written]


@dataclass(frozen=True)
class Fault:
    """A fault, the forms and kinds of labels that can have it, and how it is made."""

    forms: Sequence[str]
    kinds: Sequence[str] = KINDS
    content: Change | None = None
    files: Damage | None = None
    of_a_picture: bool = False  # refused when the picture is read, and not when the data set is opened


# --- faults of the content -------------------------------------------------------------------------------------------


def _sample(body: Callable[[bytes], bytes]) -> Change:
    """The bytes of one picture replaced."""

    def change(content: Content, chance: random.Random) -> Content:
        split = chance.choice(sorted(content.splits))
        samples = list(content.splits[split])
        row = chance.randrange(len(samples))
        old = samples[row].picture
        samples[row] = replace(samples[row], picture=Picture(body(old.body), old.suffix, None))
        return replace(content, splits={**content.splits, split: samples})

    return change


def _label(label: Label) -> Change:
    """One label of train replaced."""

    def change(content: Content, chance: random.Random) -> Content:
        samples = list(content.splits["train"])
        row = chance.randrange(len(samples))
        samples[row] = replace(samples[row], label=label)
        return replace(content, splits={**content.splits, "train": samples})

    return change


def _every_label(content: Content, chance: random.Random) -> Content:
    """One label for all images of all splits."""
    label = content.splits["train"][0].label
    return replace(content, splits={s: [replace(x, label=label) for x in each] for s, each in content.splits.items()})


def _no_label_in_the_last_split(content: Content, chance: random.Random) -> Content:
    split = list(content.splits)[-1]
    return replace(content, splits={**content.splits, split: [replace(x, label=()) for x in content.splits[split]]})


def _class_of_no_training_image(content: Content, chance: random.Random) -> Content:
    label = chance.choice(content.splits["train"]).label
    train = [sample for sample in content.splits["train"] if sample.label != label]
    return replace(content, splits={**content.splits, "train": train})


def _one_of_each(content: Content, chance: random.Random) -> Content:
    """Train alone, with one image of every class."""
    train = {sample.label: sample for sample in content.splits["train"]}
    return replace(content, splits={"train": list(train.values())})


# --- faults of the files ---------------------------------------------------------------------------------------------


def _options(**options: object) -> Damage:
    return lambda written, chance: replace(written, options={**written.options, **options})


def _pictures(written: Written) -> list[Path]:
    root = written.path.parent if written.path.is_file() else written.path
    files = {sample.file for samples in written.content.splits.values() for sample in samples}
    return sorted(path for path in root.rglob("*") if path.name in files)


def _of(suffix: str | tuple[str, ...], damage: Callable[[Path], None]) -> Damage:
    """One of the files that end so, spoilt."""

    def spoilt(written: Written, chance: random.Random) -> Written:
        files = [written.path] if written.path.is_file() else sorted(written.path.rglob("*"))
        damage(chance.choice([file for file in files if file.name.endswith(suffix)]))
        return written

    return spoilt


def _of_a_picture(damage: Callable[[Path], None]) -> Damage:
    def spoilt(written: Written, chance: random.Random) -> Written:
        damage(chance.choice(_pictures(written)))
        return written

    return spoilt


def _cut(file: Path) -> None:
    body = file.read_bytes()
    file.write_bytes(body[: len(body) // 2])


def _cut_tar(file: Path, *, in_a_file: bool) -> None:
    """End a tar in the middle of its last file, or before the last sample."""
    with tarfile.open(file) as tar:
        members = tar.getmembers()
    body, last = file.read_bytes(), members[-1]
    file.write_bytes(body[: last.offset_data + last.size // 2] if in_a_file else body[: members[-2].offset])


def _append(text: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(file.read_bytes() + text)


def _last_line_again(file: Path) -> None:
    lines = file.read_bytes().rstrip().splitlines(keepends=True)
    end = b"\r\n" if lines[0].endswith(b"\r\n") else b"\n"
    file.write_bytes(b"".join([*lines, end, lines[-1], end]))


def _first_line_only(file: Path) -> None:
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])


def _link_out(file: Path) -> None:
    file.unlink()
    file.symlink_to(__file__)


def _bytes_in_its_name(file: Path) -> None:
    os.rename(os.fsencode(file), os.fsencode(file.parent) + b"/caf\xe9" + os.fsencode(file.suffix))


def _without(label: bool) -> Callable[[Path], None]:
    """A tar in which one sample lacks its label, or its picture."""

    def damage(file: Path) -> None:
        with tarfile.open(file) as tar:
            files = [(info, tar.extractfile(info).read()) for info in tar.getmembers()]
        key = files[-1][0].name.split(".")[0]
        with tarfile.open(file, "w") as tar:
            for info, body in files:
                stem, _, suffix = info.name.partition(".")
                if stem != key or (suffix in ("cls", "npy", "json")) != label:
                    tar.addfile(info, io.BytesIO(body))

    return damage


def _array(part: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Damage:
    """The array of train's images or labels changed, or taken out."""

    def spoilt(written: Written, chance: random.Random) -> Written:
        ends = {"images": ("train_images", "x_train"), "labels": ("train_labels", "y_train")}[part]
        if written.path.is_file():
            with np.load(written.path) as file:
                arrays = dict(file)
            [name] = [name for name in arrays if name in ends]
            value = change(arrays.pop(name))
            np.savez(written.path, **arrays, **({} if value is None else {name: value}))
        else:
            [file] = [path for path in written.path.glob("*.npy") if path.stem in ends]
            value = change(np.load(file))
            file.unlink()
            if value is not None:
                np.save(file, value)
        return written

    return spoilt


def _column(name: str, other: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        table = pyarrow.parquet.read_table(file)
        pyarrow.parquet.write_table(table.rename_columns([other if c == name else c for c in table.column_names]), file)

    return damage


def _no_label_in_json(file: Path) -> None:
    first, *others = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    file.write_text("\n".join([json.dumps({**json.loads(first), "label": None}), *others]), encoding="utf-8")


def _elsewhere(written: Written, chance: random.Random) -> Written:
    return replace(written, path=written.path / "nowhere")


def _nothing_in_it(written: Written, chance: random.Random) -> Written:
    (written.path / "empty folder").mkdir()
    return replace(written, path=written.path / "empty folder")


FAULTS: dict[str, Fault] = {
    "an empty picture": Fault(ENCODED, content=_sample(lambda body: b""), of_a_picture=True),
    "a picture cut in the middle": Fault(
        ENCODED, content=_sample(lambda body: body[: len(body) // 2]), of_a_picture=True
    ),
    "a page in place of a picture": Fault(ENCODED, content=_sample(lambda _: b"<html>404</html>"), of_a_picture=True),
    "a pointer in place of a picture": Fault(
        ENCODED, content=_sample(lambda _: b"version https://git-lfs.github.com/spec/v1\nsize 1\n"), of_a_picture=True
    ),
    "an empty label": Fault((*TABLES, "Parquet"), ("class",), content=_label("")),
    "no label in a line": Fault(("JSON Lines",), files=_of(".jsonl", _no_label_in_json)),
    "a number that is none": Fault(("JSON Lines", "Parquet", *ARRAYS, *CSV), ("number",), content=_label(float("nan"))),
    "an infinite number": Fault(("JSON Lines", "Parquet", *ARRAYS, "tars"), ("number",), content=_label(float("inf"))),
    "one class only": Fault(tuple(FORMS), ("class",), content=_every_label),
    "one number only": Fault(tuple(FORMS), ("number",), content=_every_label),
    "a class without training images": Fault(tuple(FORMS), ("class",), content=_class_of_no_training_image),
    "a split without any label": Fault(
        ("JSON Lines", *CSV, *ARRAYS, "Parquet"), ("labels",), content=_no_label_in_the_last_split
    ),
    "words where numbers are requested": Fault(
        ("class folders", *TABLES), ("class",), content=_label("cat"), files=_options(target="number")
    ),
    "a column that is not there": Fault(tuple(FORMS), files=_options(label_column="nothing")),
    "an image column that is not there": Fault(tuple(FORMS), files=_options(image_column="nothing")),
    "ids that are not there": Fault(tuple(FORMS), files=_options(id_column="nothing")),
    "splits that are not there": Fault(tuple(FORMS), files=_options(split_column="nothing")),
    "more parts than images of a class": Fault(
        tuple(FORMS),
        ("class",),
        content=_one_of_each,
        files=_options(split_ratio="0.6/0.2/0.2"),
    ),
    "no such folder": Fault(("class folders",), files=_elsewhere),
    "an empty folder": Fault(("class folders", "npy", "tars"), files=_nothing_in_it),
    "a picture that is not there": Fault(TABLES, files=_of_a_picture(Path.unlink)),
    "a link that leads out": Fault(FILES, files=_of_a_picture(_link_out)),
    "a name that is no UTF-8": Fault(("class folders",), files=_of_a_picture(_bytes_in_its_name)),
    "a row twice": Fault(TABLES, files=_of((".csv", ".jsonl"), _last_line_again)),
    "a table that is no UTF-8": Fault(CSV, files=_of(".csv", _append(b"\xff\xfe,\xff"))),
    "a table of a head alone": Fault(CSV, files=_of(".csv", _first_line_only)),
    "an empty table": Fault(CSV, files=_of(".csv", lambda file: file.write_bytes(b""))),
    "a row of too many cells": Fault(CSV, files=_of(".csv", _append(b"a,b;c\td,e;f\tg,h;i\tj,k;l\tm,n;o\tp\n"))),
    "a line that is no JSON": Fault(("JSON Lines",), files=_of(".jsonl", _append(b"{'label': 1}\n"))),
    "a line that is no object": Fault(("JSON Lines",), files=_of(".jsonl", _append(b"[1, 2]\n"))),
    "a tar cut in the middle of a file": Fault(("tars",), files=_of(".tar", partial(_cut_tar, in_a_file=True))),
    "a tar cut between two samples": Fault(("tars",), files=_of(".tar", partial(_cut_tar, in_a_file=False))),
    "a compressed tar": Fault(
        ("tars",), files=_of(".tar", lambda file: file.write_bytes(gzip.compress(file.read_bytes())))
    ),
    "a text in place of a tar": Fault(
        ("tars",), files=_of(".tar", lambda file: file.write_bytes(b"<html>404</html>" * 99))
    ),
    "a sample without a label": Fault(("tars",), files=_of(".tar", _without(label=True))),
    "a sample without a picture": Fault(("tars",), files=_of(".tar", _without(label=False))),
    "a cut Parquet file": Fault(("Parquet",), files=_of(".parquet", _cut)),
    "a text in place of a Parquet file": Fault(
        ("Parquet",), files=_of(".parquet", lambda file: file.write_bytes(b"<html>"))
    ),
    "a Parquet file without labels": Fault(
        ("Parquet",), files=_of("train-00000-of-00001.parquet", _column("label", "what"))
    ),
    "images of floats": Fault(ARRAYS, files=_array("images", lambda values: values / np.float32(255))),
    "images with their channels first": Fault(
        ARRAYS, files=_array("images", lambda v: np.zeros((len(v), 3, 5, 5), np.uint8))
    ),
    "more images than labels": Fault(ARRAYS, files=_array("labels", lambda values: values[:-1])),
    "labels of Python's objects": Fault(
        ARRAYS, files=_array("labels", lambda values: np.array([{"a": 1}] * len(values)))
    ),
    "complex labels": Fault(ARRAYS, ("class",), files=_array("labels", lambda v: np.arange(len(v)) * 1j)),
    "training images without labels": Fault(ARRAYS, files=_array("labels", lambda _: None)),
    "a cut file of arrays": Fault(("npz",), files=_of(".npz", _cut)),
    "a text in place of an array": Fault(("npy",), files=_of(".npy", lambda file: file.write_bytes(b"<html>"))),
}

EXCLUDED = {
    "training images without labels",  # a warning: the other splits are read
}
"""Faults that the readers report and do not refuse."""


@dataclass(frozen=True)
class Spoilt:
    """A data set before it is written, and the name of its fault."""

    fault: str
    content: Content

    def write(self, root: Path) -> Written:
        """Write it, with its fault."""
        chance, fault = random.Random(self.content.seed), FAULTS[self.fault]
        content = fault.content(self.content, chance) if fault.content else self.content
        written = FORMS[content.form](content, root)
        return fault.files(written, chance) if fault.files else written


@st.composite
def spoilt(draw: DrawFn) -> Spoilt:
    """A data set with one fault."""
    name = draw(st.sampled_from(sorted(set(FAULTS) - EXCLUDED)))
    fault = FAULTS[name]
    return Spoilt(name, draw(contents(fault.forms, fault.kinds)))
