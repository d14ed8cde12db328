"""Labels mean the same in every form of data set; what has no meaning as a label is refused by the image's name."""

import datetime
import json
import os
import subprocess
import sys
import tarfile
import unicodedata
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forms import labelled, npy, picture, put
from tiny import save_images

from mlfusion import datasets
from mlfusion.datasets import ReadOptions
from mlfusion.errors import BadData

TEXT = ("csv", "jsonl", "tar", "parquet", "npz")  # forms that hold labels as text
TYPED = ("jsonl", "parquet", "npz")  # forms whose labels have types


def read(path: Path, **words: Any) -> datasets.Split:
    return datasets.load(str(path), ReadOptions(**words)).split("train")


def names(split: datasets.Split) -> list[str]:
    return [split.classes[label] for label in split.labels]


# --- kinds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", TEXT)
@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["0.5", "1", "1.5"], "number"),  # a tar's whole ones are no classes between numbers
        (["-.5", "1e3", "+2."], "number"),
        (["1", "2", "3"], "class"),
        (["1_000", "2", "0.5"], "refused"),  # a number to Python alone, among numbers
        (["١", "٢", "1"], "class"),  # digits of another script
        (["1", "NA", "2"], "refused"),
    ],
)
def test_text_is_read_by_one_strict_pattern_in_every_form(form, labels, kind, tmp_path):
    file = labelled(form, tmp_path, labels)
    if kind == "refused":
        with pytest.raises(BadData, match=r"label '(1_000|NA)', where 2 of 3 labels are numbers; .*--target class"):
            read(file)
        assert sorted(names(read(file, target="class"))) == sorted(labels)
        return
    split = read(file)
    assert split.label_kind == kind
    if kind == "number":
        assert split.labels.tolist() == [float(Fraction(label.rstrip("."))) for label in labels]
    else:
        assert names(split) == labels


@pytest.mark.parametrize("form", TEXT)
def test_one_value_that_is_no_number_is_named_with_its_row(form, tmp_path):
    labels = [f"{10 + n / 3:.2f}" for n in range(11)] + ["NA"]
    with pytest.raises(BadData, match=r"11.* has label 'NA', where 11 of 12 labels are numbers"):
        read(labelled(form, tmp_path, labels))
    if form in ("csv", "jsonl"):
        with pytest.raises(BadData, match=r"11\.png \(row 12\)"):
            read(tmp_path / f"set.{form}")


@pytest.mark.parametrize("folders", [("0.5", "1", "2"), ("0", "1e5"), ("2", "1_000"), ("10", "9", "١")])
def test_class_folders_are_classes_whatever_they_are_called(folders, tmp_path):
    save_images(tmp_path, {"train": 2, "test": 2}, folders)
    split = read(tmp_path)
    assert split.label_kind == "class"
    assert names(split) == [name.split("/")[1] for name in split.ids]
    save_images(tmp_path / "more", {"all": 4}, folders)
    assert read(tmp_path / "more" / "all", split_ratio="0.5/0.5").label_kind == "class"


def test_folders_and_tables_have_one_order_of_classes(tmp_path):
    save_images(tmp_path, {"train": 2}, ["10", "9", "b", "a"])
    folders = datasets.load(str(tmp_path)).split("train")
    rows = [f"{name},{name.split('/')[1]}" for name in folders.ids]
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *rows]))
    table = read(tmp_path / "all.csv")
    assert folders.classes == table.classes == ("9", "10", "a", "b")
    assert folders.labels.tolist() == table.labels.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_the_order_of_classes_is_one_in_every_process(form, tmp_path):
    file = labelled(form, tmp_path, ["1", "01", "001", "2"] * 2)
    code = "import sys; from mlfusion import datasets; print(datasets.load(sys.argv[1]).split('train').classes)"
    orders = {
        subprocess.run(
            [sys.executable, "-c", code, str(file)],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert orders == {"('1', '01', '001', '2')\n"}


@pytest.mark.parametrize("form", TEXT)
def test_two_spellings_of_a_number_are_two_classes(form, tmp_path):
    assert names(read(labelled(form, tmp_path, ["3", "03", "3", "03"]))) == ["3", "03", "3", "03"]


# --- class names and numbers -----------------------------------------------------------------------------------------


def tar_set(root: Path, classes: str, labels: dict[str, list[str]]) -> Path:
    """A folder of tars with class names; `labels` by split."""
    for at, (split, each) in enumerate(labels.items()):
        (root / split).mkdir(parents=True)
        with tarfile.open(root / split / "0.tar", "w") as tar:
            for row, label in enumerate(each):
                put(tar, f"{row}.png", picture(100 * at + row))
                put(tar, f"{row}.cls", label.encode())
    (root / "classnames.txt").write_bytes(classes.encode())
    return root


def class_table(root: Path, classes: list[str], labels: dict[str, list[int]]) -> Path:
    """A folder of Parquet files whose labels are the library's ClassLabel."""
    import datasets as library

    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=classes)})
    root.mkdir(parents=True)
    for at, (split, each) in enumerate(labels.items()):
        cells = [{"bytes": picture(100 * at + row), "path": None} for row in range(len(each))]
        table = library.Dataset.from_dict({"image": cells, "label": each}, features=features)
        table.to_parquet(root / f"{split}.parquet")
    return root


def test_two_classes_of_one_name_stay_two(tmp_path, caplog):
    numbers = ["0", "1", "2", "3"] * 2
    root = tar_set(tmp_path / "set", "tench\nsunglasses\nmissile\nsunglasses\n", {"train": numbers, "test": numbers})
    split = datasets.load(str(root)).split("train")
    assert split.labels.tolist() == [0, 1, 2, 3] * 2
    assert split.classes == ("tench", "sunglasses (1)", "missile", "sunglasses (3)")
    assert "several classes are called 'sunglasses'" in caplog.text
    pixels = np.zeros((4, 3, 3), np.uint8)
    mine = datasets.array_dataset("mine", {"train": (pixels, [0, 1, 1, 2])}, classes=["a", "a", "a (0)"])
    assert mine.split("train").labels.tolist() == [0, 1, 1, 2]
    assert len(set(mine.classes)) == 3
    with pytest.raises(BadData, match=r"label 'a'; allowed: 0 to 1"):
        datasets.array_dataset("mine", {"train": (pixels, ["a", "b", "b", "a"])}, classes=["a", "a"])


@pytest.mark.parametrize("number", ["{}.0", "{}"])
def test_numbers_with_names_are_classes(number, tmp_path):
    labels = [number.format(n % 3) for n in range(6)]
    split = datasets.load(str(tar_set(tmp_path / "set", "cat\ndog\nowl", {"train": labels}))).split("train")
    assert names(split) == ["cat", "dog", "owl"] * 2
    pixels = np.zeros((6, 3, 3), np.uint8)
    mine = datasets.array_dataset("mine", {"train": (pixels, np.array(labels, float))}, classes=["cat", "dog", "owl"])
    assert names(mine.split("train")) == ["cat", "dog", "owl"] * 2


@pytest.mark.parametrize("label", ["03", "٣", "1.5", "4", "1e0"])
def test_other_texts_are_no_class_number(label, tmp_path):
    root = tar_set(tmp_path / "set", "a\nb\nc\nd", {"train": ["0", "1", label]})
    with pytest.raises(BadData, match=r"train/2 has label .*; allowed: 0 to 3"):
        datasets.load(str(root))


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "npz"])
def test_whole_numbers_written_as_fractions_are_told_of(form, tmp_path, caplog):
    labels = [0.0, 1.0, 2.0]
    assert read(labelled(form, tmp_path, labels)).label_kind == "number"
    assert "all labels are whole numbers written with a fraction" in caplog.text
    assert "--target class" in caplog.text
    assert read(tmp_path / f"set.{form}", target="class").labels.tolist() == [0, 1, 2]


def test_an_empty_line_among_class_names_is_refused(tmp_path):
    root = tar_set(tmp_path / "set", "cat\r\n\r\ndog\r\n\r\n", {"train": ["0", "1"]})
    with pytest.raises(BadData, match=r"classnames\.txt, line 2 is empty; allowed: a name on every line"):
        datasets.load(str(root))
    (root / "classnames.txt").write_bytes("﻿cat\r\nüber\x85dog\r\n\r\n".encode())
    assert datasets.load(str(root)).classes == ("cat", "über\x85dog")
    (root / "classnames.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(BadData, match=r"classnames\.txt cannot be read: .*allowed: UTF-8"):
        datasets.load(str(root))


def test_a_class_that_no_image_has_counts_nowhere(tmp_path, caplog):
    root = class_table(tmp_path / "set", ["cat", "unknown", "dog"], {"train": [0, 2] * 2, "test": [2, 0]})
    data = datasets.load(str(root))
    assert data.classes == ("cat", "dog")
    assert names(data.split("train")) == ["cat", "dog"] * 2
    assert "no image has the class 'unknown'; 2 of 3 classes are left" in caplog.text
    tars = datasets.load(
        str(tar_set(tmp_path / "tars", "cat\nunknown\ndog", {"train": ["0", "2"], "test": ["2", "0"]}))
    )
    assert (tars.classes, names(tars.split("test"))) == (("cat", "dog"), ["dog", "cat"])
    vectors = np.array([[1, 0, 0], [0, 0, 1], [1, 0, 1]])
    several = datasets.array_dataset("mine", {"train": (np.zeros((3, 4, 4), np.uint8), vectors)}, classes="abc")
    assert several.classes == ("a", "c")
    np.testing.assert_array_equal(several.split("train").labels, vectors[:, [0, 2]])


def test_a_split_without_labels_is_left_out_and_told_of(tmp_path, caplog):
    counts = {"train": [0, 1] * 2, "test": [1, 0], "unsupervised": [-1] * 3}
    root = class_table(tmp_path / "set", ["cat", "dog"], counts)
    for name in counts:
        (root / f"{name}.parquet").rename(root / f"{name}-00000-of-00001.parquet")
    for stream in (False, True):
        data = datasets.load(str(root), ReadOptions(stream=stream))
        assert {name: len(split) for name, split in data.splits.items()} == {"train": 4, "test": 2}
        assert "no image of the split unsupervised has a label; the split is left out" in caplog.text
        caplog.clear()
    lines = [
        json.dumps({"path": f"{n}.png", "label": x, "split": s})
        for n, (x, s) in enumerate([("a", "train"), ("b", "train"), ("a", "test"), ("b", "test"), (None, "extra")])
    ]
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert list(datasets.load(str(tmp_path / "t.jsonl")).splits) == ["train", "test"]


# --- spellings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", TEXT)
def test_blanks_and_unicode_forms_do_not_double_a_class(form, tmp_path, caplog):
    spelt = [unicodedata.normalize(one, "café") for one in ("NFC", "NFD")]
    labels = ["cat ", " cat", "cat", "dog", *spelt]
    split = read(labelled(form, tmp_path, labels))
    assert split.classes == ("café", "cat", "dog")
    assert np.bincount(split.labels).tolist() == [2, 3, 1]
    assert "of the class names are written in several ways" in caplog.text


def test_one_folder_name_in_two_unicode_forms_is_one_class(tmp_path):
    save_images(tmp_path, {"train": 2, "test": 2}, ["owl", *(unicodedata.normalize(f, "café") for f in ("NFC", "NFD"))])
    assert np.bincount(datasets.load(str(tmp_path)).split("train").labels).tolist() == [4, 2]


@pytest.mark.parametrize("form", TEXT)
def test_entities_of_html_do_not_separate_labels(form, tmp_path):
    labels = ["salt &amp; pepper", "AT&T", "caf&#233;", "AT&T"]
    split = read(labelled(form, tmp_path, labels))
    assert (split.label_kind, set(split.classes)) == ("class", {"salt & pepper", "AT&T", "café"})


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_several_labels_in_text_are_told_of_and_can_be_one_class(form, tmp_path, caplog):
    file = labelled(form, tmp_path, ["tench; Tinca", "R&D;x", "tench; Tinca", "R&D;x"])
    assert set(read(file).classes) == {"tench", "Tinca", "R&D", "x"}
    assert "read as several labels an image" in caplog.text
    assert set(read(file, target="class").classes) == {"tench; Tinca", "R&D;x"}


# --- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", TYPED)
@pytest.mark.parametrize("shape", [(6, 1), (6, 1, 1)])
def test_lists_of_one_label_are_that_label(form, shape, tmp_path):
    labels = np.arange(6) % 3
    split = read(labelled(form, tmp_path, labels.reshape(shape).tolist()))
    assert (split.label_kind, split.labels.tolist()) == ("class", labels.tolist())


def test_lists_of_one_label_in_one_split_alone_are_lists(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint8)
    data = datasets.array_dataset("a", {"train": (pixels, [["x"], ["y"]]), "test": (pixels, [["x", "y"], ["y"]])})
    assert data.label_kind == "labels"
    assert data.split("train").labels.tolist() == [[1, 0], [0, 1]]
    one = datasets.array_dataset("a", {"train": (pixels, [[0], [1]])}, target="labels")
    assert (one.split("train").labels.tolist(), one.classes) == ([[0], [1]], ("0",))


@pytest.mark.parametrize("form", TYPED)
@pytest.mark.parametrize("labels", [[[0.1, 0.9], [0.5, 0.5]], [[0.0, 2.0], [1.0, 1.0]], [[[1, 2], [3, 4]]] * 2])
def test_vectors_of_numbers_are_refused(form, labels, tmp_path):
    with pytest.raises(
        BadData, match=r"has label \[.*; allowed is a list of names or of class numbers, or a vector of 0 and 1"
    ):
        read(labelled(form, tmp_path, labels))


# --- what is no label ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label",
    [{"a": 0}, Decimal, datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1), b"\xff\xfe", 1j, np.void(b"x")],
)
def test_labels_of_other_types_are_refused(label, tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint8)
    with pytest.raises(BadData, match=r"allowed: text, "):
        datasets.array_dataset("mine", {"train": (pixels, [label, label])})
    if isinstance(label, (dict, datetime.date, bytes)):
        with pytest.raises(BadData, match=r"train/0.* of the type .*; allowed: text, "):
            read(labelled("parquet", tmp_path, [label, label]))


@pytest.mark.parametrize(
    "dtype", ["complex64", "datetime64[D]", "timedelta64[s]", "V3", [("a", "i4"), ("b", "i4")]], ids=str
)
def test_arrays_of_other_types_are_refused(dtype, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 3), np.uint8), labels=np.zeros(2, dtype))
    with pytest.raises(BadData, match=r"the labels are of the type .*; allowed: text, "):
        datasets.load(str(tmp_path / "a.npz"))


def test_labels_that_are_one_value_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 3), np.uint8), labels=np.array(5))
    with pytest.raises(BadData, match="the labels are one value; allowed: one for each image"):
        datasets.load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("form", TEXT)
def test_a_decimal_comma_is_told_of(form, tmp_path, caplog):
    assert read(labelled(form, tmp_path, ["0,5", "1,5", "0,5", "1,5"])).classes == ("0,5", "1,5")
    assert "all other labels are read as class names; a number has a decimal point" in caplog.text


def test_bytes_are_text_and_long_floats_are_numbers(tmp_path):
    binary = read(labelled("parquet", tmp_path, [b"cat", "é".encode(), b"cat"]))
    assert names(binary) == ["cat", "é", "cat"]
    pixels = np.zeros((3, 3, 3), np.uint8)
    for labels, want in (
        (np.array([b"cat", b"dog", b"cat"]), [0, 1, 0]),
        (np.array([0.5, 1, 2], np.longdouble), [0.5, 1, 2]),
    ):
        split = datasets.array_dataset("mine", {"train": (pixels, labels)}).split("train")
        assert split.labels.tolist() == want
    money = read(labelled("parquet", tmp_path / "b", [Decimal("1.25"), Decimal("2.50")]))
    assert money.labels.tolist() == [1.25, 2.5]


@pytest.mark.parametrize("labels", [[True, 1, 0, False], [True, "true"]])
def test_booleans_among_other_labels_are_refused(labels, tmp_path):
    with pytest.raises(BadData, match=r"0\.png \(row 1\) has label True, and other labels are of the type (int|str)"):
        read(labelled("jsonl", tmp_path, labels))


@pytest.mark.parametrize("scale", ["1e300", "1e-300"])
@pytest.mark.parametrize("form", ["csv", "tar", "npz"])
def test_numbers_without_a_finite_variance_are_refused(scale, form, tmp_path):
    labels: list[Any] = [f"{n}.5e{scale[2:]}" for n in (1, 2, 3)]
    labels = [float(label) for label in labels] if form == "npz" else labels
    with pytest.raises(
        BadData, match=r"the labels' variance is too (large|small) for .*; give the labels another unit"
    ):
        read(labelled(form, tmp_path, labels))


def test_half_a_character_is_refused_by_name(tmp_path):
    file = labelled("jsonl", tmp_path, ["a", "\ud83d"])
    with pytest.raises(BadData, match=r"1\.png \(row 2\) has label '\\ud83d', which is no text"):
        read(file)
    with pytest.raises(BadData, match="which is no text"):
        datasets.array_dataset("mine", {"train": (np.zeros((2, 3, 3), np.uint8), ["a", "\udce9"])})


def test_digits_without_end(tmp_path):
    long = "1" * 5000
    for form in ("csv", "tar", "jsonl"):
        assert names(read(labelled(form, tmp_path / form, [long, "2"]))) == [long, "2"]
    (tmp_path / "n.jsonl").write_text('{"path": "jsonl/0.png", "label": ' + long + "}\n")
    with pytest.raises(BadData, match=r"n\.jsonl, line 1: not JSON"):
        datasets.load(str(tmp_path / "n.jsonl"))
    file = labelled("jsonl", tmp_path / "big", [10**400, 2])
    with pytest.raises(BadData, match=r"has label 1000.*…, which is no finite number"):
        read(file, target="number")
    assert json.loads(file.read_text().splitlines()[0])["label"] == 10**400


def test_a_field_of_a_tar_is_no_class_number(tmp_path):
    """Class names belong to .cls files; a field of fractions stays a number beside them."""
    root = tar_set(tmp_path / "set", "cat\ndog", {"train": ["0", "1"]})
    with tarfile.open(root / "train" / "0.tar", "w") as tar:
        for row, age in enumerate((0.5, 2.0)):
            put(tar, f"{row}.png", picture(row))
            put(tar, f"{row}.cls", str(row).encode())
            put(tar, f"{row}.json", json.dumps({"age": age}).encode())
            put(tar, f"{row}.npy", npy(np.zeros((2, 2))))
    assert names(read(root)) == ["cat", "dog"]
    assert read(root, label_column="json.age").labels.tolist() == [0.5, 2.0]
    with pytest.raises(BadData, match=r"0\.npy cannot be read: \[2, 2\] of float64; allowed: a number or a vector"):
        read(root, label_column="npy")
