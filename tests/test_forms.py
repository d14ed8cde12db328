"""Every form of a data set holds the same images with the same labels; what a form cannot say is asked for by name."""

import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from forms import FORMS, csv_folder, npy, plain, put, rows, tars
from PIL import Image
from tiny import save_images

import mlfusion
from mlfusion import datasets
from mlfusion.datasets import ReadOptions, remote
from mlfusion.datasets import tars as tar_reader
from mlfusion.errors import BadData, BadOption, UnknownName


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_and_labels(form, tmp_path):
    whole = plain(tmp_path)
    make, words = FORMS[form]
    data = datasets.load(str(make(whole, tmp_path)), ReadOptions(**words))
    assert set(data.splits) == {"train", "test"}
    for name, want in whole.splits.items():
        split = data.split(name)
        assert split.classes == want.classes == ("blue", "green", "red")
        np.testing.assert_array_equal(split.labels, want.labels)
        assert [split.digest(i) for i in range(len(split))] == [want.digest(i) for i in range(len(want))]
        assert (split.ids == want.ids) == (form in ("csv of each split", "one csv", "parquet"))
        assert len(set(split.ids)) == len(split)
        np.testing.assert_array_equal(np.asarray(split.image(4)), np.asarray(want.image(4)))


UNUSED = {
    "csv of each split": {"config"},
    "one csv": {"config"},
    "jsonl": {"config"},
    "tars": {"id_column", "split_column", "image_root", "config"},
    "parquet": set(),
    "class folders": {"image_column", "label_column", "id_column", "split_column", "image_root", "config"},
    "digits": {"image_column", "label_column", "id_column", "split_column", "image_root", "config"},
    "npz": {"id_column", "split_column", "image_root", "config"},
}
"""Form → the options that have no effect on how it is read."""


@pytest.mark.parametrize(("form", "option"), [(form, option) for form in UNUSED for option in sorted(UNUSED[form])])
def test_an_option_that_a_form_does_not_use_is_refused(form, option, tmp_path):
    if form == "digits":
        source, words = "digits", {}
    elif form == "npz":
        images, labels = np.arange(144, dtype=np.uint8).reshape(4, 6, 6), np.array([0, 1, 0, 1])
        np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels)
        source, words = tmp_path / "a.npz", {}
    else:
        whole = plain(tmp_path)
        make, words = FORMS.get(form, (lambda _data, root: root, {}))
        source = make(whole, tmp_path)
    assert datasets.load(str(source), ReadOptions(**words, target="class")).splits
    with pytest.raises(
        BadData, match=rf"--{option.replace('_', '-')} mine has no effect; allowed: .*[Ll]eave the option out"
    ):
        datasets.load(str(source), ReadOptions(**{**words, option: "mine"}))


def test_digits_are_classes_only():
    with pytest.raises(BadData, match="--target number has no effect"):
        datasets.load("digits", ReadOptions(target="number"))


@pytest.mark.parametrize("form", [*FORMS, "class folders", "digits", "arrays"])
def test_a_split_travels_to_other_processes(form, tmp_path):
    if form == "digits":
        split = datasets.load("digits").split("train")
    elif form == "arrays":
        split = datasets.array_dataset("a", {"train": (np.arange(72, dtype=np.uint8).reshape(2, 6, 6), [0, 1])}).split(
            "train"
        )
    else:
        whole = plain(tmp_path)
        make, words = FORMS.get(form, (lambda _data, root: root, {}))
        split = datasets.load(str(make(whole, tmp_path)), ReadOptions(**words)).split("train")
    there = pickle.loads(pickle.dumps(split.take(np.array([1, 0]), "some")))
    assert there.encoded(0) == split.encoded(1)
    np.testing.assert_array_equal(np.asarray(there.image(1)), np.asarray(split.image(0)))


def test_the_same_content_by_whatever_form_is_the_same_entry(tmp_path):
    """Where ids and labels agree: class folders, a table beside them, a Parquet file; copied elsewhere too."""
    whole = plain(tmp_path / "a")
    keys = set()
    for form in ("class folders", "one csv", "parquet"):
        make, words = FORMS.get(form, (lambda _data, root: root, {}))
        place = str(make(whole, tmp_path / "a"))
        [one] = mlfusion.extract("formula-vit", place, splits="train", layers="1", **words)
        keys.add(one.entry.key)
    assert len(keys) == 1


def test_class_folders_without_splits_are_cut(tmp_path):
    save_images(tmp_path, {"train": 10})
    folder = str(tmp_path / "train")
    with pytest.raises(BadData, match=r"has the folders blue, green, red; .*--split-ratio"):
        datasets.load(folder)
    data = datasets.load(folder, ReadOptions(split_ratio="80/20"))
    assert [len(split) for split in data.splits.values()] == [24, 6]
    assert np.bincount(data.split("test").labels).tolist() == [2, 2, 2]
    assert data.split("train").ids[0].startswith("blue/")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_with_any_separator(separator, tmp_path):
    save_images(tmp_path, {"train": 2})
    lines = [f"{c}/{i:03d}.png{separator}{c}" for c in ("blue", "red") for i in range(2)]
    (tmp_path / "train" / "t.csv").write_text("\n".join([f"image{separator}label", *lines]), encoding="utf-8-sig")
    data = datasets.load(str(tmp_path / "train" / "t.csv"))
    assert data.split("train").classes == ("blue", "red")
    assert data.split("train").ids[0] == "blue/000.png"


def table(root, text, **words):
    save_images(root, {"train": 2})
    (root / "t.csv").write_text(text)
    return datasets.load(str(root / "t.csv"), ReadOptions(**words))


ROWS = ["train/blue/000.png", "train/blue/001.png", "train/red/000.png", "train/red/001.png"]


@pytest.mark.parametrize(
    ("labels", "words", "target", "classes", "want"),
    [
        (["b", "b", "a", "a"], {}, "class", ("a", "b"), [1, 1, 0, 0]),
        (["10", "10", "9", "9"], {}, "class", ("9", "10"), [1, 1, 0, 0]),
        (["0.5", "2", "-1e3", "7"], {}, "number", (), [0.5, 2, -1000, 7]),
        (["1", "2", "3", "4"], {"target": "number"}, "number", (), [1, 2, 3, 4]),
        (["1.5", "1.5", "2.5", "2.5"], {"target": "class"}, "class", ("1.5", "2.5"), [0, 0, 1, 1]),
        (["b;a", "a", "", "b"], {}, "labels", ("a", "b"), [[1, 1], [1, 0], [0, 0], [0, 1]]),
        (["x", "x", "y", "y"], {"target": "labels"}, "labels", ("x", "y"), [[1, 0], [1, 0], [0, 1], [0, 1]]),
    ],
)
def test_labels_of_every_kind(labels, words, target, classes, want, tmp_path):
    text = "\n".join(["path,label", *(f"{path},{label}" for path, label in zip(ROWS, labels, strict=True))])
    data = table(tmp_path, text, **words)
    split = data.split("train")
    assert (data.label_kind, split.label_kind, split.classes) == (target, target, classes)
    assert split.labels.dtype == {"class": np.int64, "labels": np.uint8, "number": np.float64}[target]
    np.testing.assert_array_equal(split.labels, want)


@pytest.mark.parametrize(
    ("labels", "target", "want"),
    [
        ([["b", "a"], [], ["b"], ["a"]], "labels", [[1, 1], [0, 0], [0, 1], [1, 0]]),
        ([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]], "labels", [[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]]),
        ([[3], [0, 3], [], [1]], "labels", [[0, 0, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]]),
        ([1, 2.5, 3, 4], "number", [1, 2.5, 3, 4]),
        ([True, False, True, True], "class", [1, 0, 1, 1]),
    ],
)
def test_labels_of_json_keep_their_types(labels, target, want, tmp_path):
    save_images(tmp_path, {"train": 2})
    lines = [json.dumps({"image": path, "label": label}) for path, label in zip(ROWS, labels, strict=True)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    split = datasets.load(str(tmp_path / "t.jsonl")).split("train")
    assert split.label_kind == target
    np.testing.assert_array_equal(split.labels, want)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("path,a,b\n" + ROWS[0] + ",x,1\n", {}, r"column holds the label is not plain; give --label-column, one of: "
         r"path \(text\), a \(text\), b \(whole number\)"),
        ("path,label\n" + ROWS[0] + ",x\n", {"label_column": "age"}, r"no column 'age'; --label-column may be: path"),
        ("path,label\n" + ROWS[0] + ",x\n", {"image_column": "img"}, r"no column 'img'; --image-column may be: path"),
        ("path,label\n" + ROWS[0] + ",x\n", {"id_column": "key"}, r"no column 'key'; --id-column may be: path"),
        ("path,label\n" + ROWS[0] + ",x\n", {"target": "text"}, "--target text: allowed are class, labels, number"),
        ("path,label\ntrain/no.png,x\n" + ROWS[0] + ",y\n", {}, r"1 file that is not there, the first in row 1: train/no"),
        ("path,label\n" + f"{ROWS[0]},x\n" * 2, {}, r"has train/blue/000.png twice"),
        ("path,label\n" + ROWS[0] + "\n", {}, r"line 2: 2 columns are named and this line has another number"),
        ("path,label\n", {}, "holds no rows"),
        ("path,label\n" + ROWS[0] + ",\n" + ROWS[1] + ",x\n", {}, r"train/blue/000.png \(row 1\) has an empty label"),
        ("path,label\n" + ROWS[0] + ",x\n", {"target": "number"}, r"label 'x', which is no finite number"),
        ("path,label\n" + ROWS[0] + ",x\n", {}, "one class only"),
        ("path,label\n,x\n", {"image_column": "path"}, "row 1 names no image"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used(text, words, message, tmp_path):
    with pytest.raises((BadData, BadOption, UnknownName), match=message):
        table(tmp_path, text, **words)


@pytest.mark.parametrize("path", ["../secret.png", "train/../../secret.png", "link.png", "out/secret.png", "ABSOLUTE"])
def test_paths_stay_in_their_folder(path, tmp_path):
    root = tmp_path / "set"
    save_images(root, {"train": 2})
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "out").symlink_to(tmp_path)
    path = str(tmp_path / "secret.png") if path == "ABSOLUTE" else path
    (root / "t.csv").write_text(f"path,label\n{ROWS[0]},a\n{path},b\n")
    with pytest.raises(BadData, match=r"row 2: .* leads out of .*set.*--image-root"):
        datasets.load(str(root / "t.csv"))


def test_a_table_may_lie_apart_from_its_images(tmp_path):
    save_images(tmp_path / "images", {"train": 2})
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"{path},{path[6]}\n" for path in ROWS))
    data = datasets.load(str(tmp_path / "t.csv"), ReadOptions(image_root=str(tmp_path / "images")))
    assert data.split("train").image(0).size == (36, 40)


@pytest.mark.parametrize("link", ["train/red", "train"])
def test_a_linked_folder_is_refused(link, tmp_path):
    save_images(tmp_path / "set", {"train": 2, "test": 2})
    save_images(tmp_path / "other", {"train": 2})
    place = tmp_path / "set" / link
    place.rename(tmp_path / "away")
    place.symlink_to(tmp_path / "other" / link)
    with pytest.raises(BadData, match=r"is a link that leads out of .*set; copy what it leads to"):
        datasets.load(str(tmp_path / "set"))


# --- tars ------------------------------------------------------------------------------------------------------------


def test_tars_are_read_where_they_lie(tmp_path):
    """The bytes of image i are a piece of the tar; nothing else is written anywhere."""
    folder = tars(plain(tmp_path / "plain"), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    split = datasets.load(str(folder)).split("train")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    for row, (file, offset, size) in enumerate(split.encoded.positions):
        data = Path(split.encoded.files[file]).read_bytes()
        assert data[offset : offset + size] == split.encoded(row)
        assert data[offset - 512 : offset].startswith(f"s{row:07d}.png".encode())  # a tar's header is 512 bytes


def test_several_labels_of_tars_are_vectors(tmp_path):
    save_images(tmp_path, {"train": 1})
    png = (tmp_path / ROWS[0]).read_bytes()
    vectors = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for row, vector in enumerate(vectors):
            put(tar, f"a/{row}.jpg", png)
            put(tar, f"a/{row}.npy", npy(vector))
    split = datasets.load(str(tmp_path / "train-0.tar")).split("train")
    assert (split.label_kind, split.ids) == ("labels", ("train/a/0", "train/a/1", "train/a/2"))
    np.testing.assert_array_equal(split.labels, vectors)


def test_a_pickle_in_a_tar_is_not_loaded(tmp_path):
    touched = tmp_path / "touched"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(touched),))

    np.save(tmp_path / "bomb.npy", np.array([Bomb()], object), allow_pickle=True)
    png = (save_images(tmp_path, {"train": 1}) / ROWS[0]).read_bytes()
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        put(tar, "0.png", png)
        put(tar, "0.npy", (tmp_path / "bomb.npy").read_bytes())
    with pytest.raises(BadData, match=r"the label 0\.npy cannot be read"):
        datasets.load(str(tmp_path / "t.tar"))
    assert not touched.exists()


def test_tars_with_labels_in_json_and_names_that_begin_again(tmp_path):
    png = (save_images(tmp_path, {"train": 1}) / ROWS[0]).read_bytes()
    (tmp_path / "set").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "set" / f"train-{shard}.tar", "w") as tar:
            for row in range(2):
                put(tar, f"{row}.json", json.dumps({"age": 10 * shard + row + 0.5}).encode())
                put(tar, f"{row}.seg.png", png)
                put(tar, f"{row}.png", png)
    with pytest.raises(BadData, match=r"image is not plain; give --image-column, one of: json \(object\), seg\.png"):
        datasets.load(str(tmp_path / "set"), ReadOptions(label_column="json.age"))
    split = datasets.load(str(tmp_path / "set"), ReadOptions(label_column="json.age", image_column="png")).split(
        "train"
    )
    assert split.labels.tolist() == [0.5, 1.5, 10.5, 11.5]
    assert split.ids == tuple(f"train/train-{shard}/{row}" for shard in range(2) for row in range(2))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("t.tar", lambda body: body[:700], "cannot be read as a tar"),
        ("t.tar", lambda body: b"no tar at all" * 100, "cannot be read as a tar"),
        ("t.tar", lambda _: b"\0" * 10240, "no samples; allowed"),
    ],
)
def test_damaged_tars_are_named(name, damage, message, tmp_path):
    with tarfile.open(tmp_path / name, "w") as tar:
        put(tar, "0.cls", b"1")
        put(tar, "0.png", bytes(3000))
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(BadData, match=message):
        datasets.load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda body: body[:4608], "the two blocks that end a tar are missing"),  # cut after the last file
        (lambda body: body[:4700], "the two blocks that end a tar are missing"),
        (lambda body: body[:5120], "the two blocks that end a tar are missing"),
        (lambda body: body[:1024], "the two blocks that end a tar are missing"),
        (lambda body: body + body, "more follows behind its end"),  # two tars in one file
    ],
)
def test_a_tar_without_its_end_is_refused_on_disk_and_on_the_hub(damage, message, tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        put(tar, "0.cls", b"1")
        put(tar, "0.png", bytes(3000))
    body = path.read_bytes()
    for whole in (body, body[:5632]):  # with the padding of Python's writer, and as short as a tar may be
        path.write_bytes(whole)
        assert tar_reader.index_file(str(path), tar_reader.Columns(ReadOptions())).keys == ["0"]
    path.write_bytes(damage(body))
    for read in (tar_reader.index_file, remote._index_tar):
        with pytest.raises(BadData, match=message):
            read(str(path), tar_reader.Columns(ReadOptions()))


def test_samples_without_a_label_are_counted(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        put(tar, "0.cls", b"1")
        for row in range(3):
            put(tar, f"{row}.png", b"x")
    with pytest.raises(BadData, match=r"2 of 3 images have no label, the first train/1"):
        datasets.load(str(tmp_path / "t.tar"))


# --- arrays ----------------------------------------------------------------------------------------------------------


def pixels(count, *shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (count, *shape), dtype)


@pytest.mark.parametrize("names", ["{}_images {}_labels", "x_{} y_{}"])
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_arrays_of_files(names, kind, tmp_path):
    images, labels = pixels(6, 5, 4, 3), np.array([0, 1, 2, 0, 1, 2])
    arrays = dict(zip(names.format("train", "train").split(), (images, labels), strict=True))
    arrays |= dict(zip(names.format("test", "test").split(), (images[::-1], labels[::-1, None]), strict=True))
    if kind == "npz":
        np.savez(tmp_path / "set.npz", **arrays)
    else:
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
    data = datasets.load(str(tmp_path / "set.npz" if kind == "npz" else tmp_path))
    for split, order in (("train", 1), ("test", -1)):
        found = data.split(split)
        np.testing.assert_array_equal([np.asarray(found.image(i)) for i in range(6)], images[::order])
        assert found.labels.tolist() == labels[::order].tolist()
        assert (found.classes, found.ids[5]) == (("0", "1", "2"), f"{split}/5")


def test_arrays_of_a_program():
    grey, deep = pixels(4, 6, 5), pixels(4, 6, 5, dtype=np.uint16)
    data = datasets.array_dataset("mine", {"train": (grey, [0, 1, 1, 0]), "test": (deep, [1, 0, 1, 0])}, classes="ab")
    assert data.classes == ("a", "b")
    for i in range(4):
        np.testing.assert_array_equal(np.asarray(data.split("train").image(i))[..., 1], grey[i])
        np.testing.assert_array_equal(np.asarray(data.split("test").image(i))[..., 2], deep[i] >> 8)
    several = datasets.array_dataset("mine", {"train": (grey, np.eye(4, 3, dtype=int))})
    assert (several.label_kind, several.classes) == ("labels", ("0", "1", "2"))
    assert datasets.array_dataset("mine", {"train": (grey, np.array([0.5, 1, 2, 3]))}).label_kind == "number"


def test_the_bytes_of_an_array_say_its_shape():
    flat = np.arange(24, dtype=np.uint8)
    splits = [datasets.array_dataset("a", {"train": (flat.reshape(2, *shape), [0, 1])}) for shape in ((3, 4), (4, 3))]
    assert splits[0].split("train").digest(0) != splits[1].split("train").digest(0)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3)), [0, 1], r"\[2, 4, 4, 3\] of float64; allowed: .*scale to 0\.\.255"),
        (np.zeros((2, 3, 4, 4), np.uint8), [0, 1], "move the channels to the end"),
        (np.zeros((2, 4), np.uint8), [0, 1], "allowed"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1, 1], "2 images and 3 labels"),
        (np.zeros((2, 4, 4), np.uint8), [0, 5], r"label 5; allowed: 0 to 2, as there are 3 class names"),
    ],
)
def test_arrays_that_cannot_be_used(images, labels, message):
    with pytest.raises(BadData, match=message):
        datasets.array_dataset("mine", {"train": (images, labels)}, classes=["a", "b", "c"])


def test_a_pickle_in_an_array_file_is_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(2, 4, 4), labels=np.array(["a", None], object))
    with pytest.raises(BadData, match="allow_pickle=False"):
        datasets.load(str(tmp_path / "a.npz"))


def test_array_files_of_other_names_say_which_there_are(tmp_path):
    np.savez(tmp_path / "a.npz", pictures=pixels(4, 4, 4), kinds=np.array([0, 1, 0, 1]))
    with pytest.raises(BadData, match="has the arrays pictures, kinds; allowed: images and labels"):
        datasets.load(str(tmp_path / "a.npz"))
    found = datasets.load(str(tmp_path / "a.npz"), ReadOptions(image_column="pictures", label_column="kinds"))
    assert found.split("train").labels.tolist() == [0, 1, 0, 1]


# --- the hub's tables ------------------------------------------------------------------------------------------------


def hub_table(root, columns, features=None):
    import datasets as library

    library.Dataset.from_dict(columns, features=features).to_parquet(root / "train.parquet")
    return str(root / "train.parquet")


def test_columns_of_hub_tables_are_guessed_or_named(tmp_path):
    import datasets as library

    png = (save_images(tmp_path, {"train": 1}) / ROWS[0]).read_bytes()
    features = library.Features(
        {
            "picture": library.Image(),
            "mask": library.Image(),
            "breed": library.ClassLabel(names=["pug", "poodle"]),
            "age": library.Value("float32"),
            "tags": library.List(library.ClassLabel(names=["old", "wet", "small"])),
        }
    )
    cell = {"bytes": png, "path": None}
    columns = {"picture": [cell] * 2, "mask": [cell] * 2, "breed": [1, 0], "age": [2.5, 7], "tags": [[2, 0], []]}
    file = hub_table(tmp_path, columns, features)
    with pytest.raises(
        BadData, match=r"give --image-column, one of: picture \(image\), mask \(image\), breed \(class of 2\)"
    ):
        datasets.load(file)
    read = {
        label: datasets.load(file, ReadOptions(image_column="picture", label_column=label))
        for label in (None, "age", "tags")
    }
    assert (read[None].classes, read[None].split("train").labels.tolist()) == (("pug", "poodle"), [1, 0])
    assert (read["age"].label_kind, read["age"].split("train").labels.tolist()) == ("number", [2.5, 7])
    assert read["tags"].classes == ("old", "small")  # no image is wet
    assert read["tags"].split("train").labels.tolist() == [[1, 1], [0, 0]]
    assert read["age"].name == "train:age"
    with pytest.raises(BadData, match=r"breed holds no images; --image-column may be"):
        datasets.load(file, ReadOptions(image_column="breed"))


def test_hidden_test_labels_do_not_stand_in_the_way_of_a_carve(tmp_path):
    import datasets as library

    png = (save_images(tmp_path, {"train": 1}) / ROWS[0]).read_bytes()
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["a", "b"])})
    folder = tmp_path / "set"
    folder.mkdir()
    for name, labels in {"train": [0, 1] * 5, "test": [-1, -1]}.items():
        columns = {"image": [{"bytes": png, "path": None}] * len(labels), "label": labels}
        library.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    with pytest.raises(BadData, match=r"split test: 2 of 2 images have no label, .*--split-ratio"):
        datasets.load(str(folder))
    data = datasets.load(str(folder), ReadOptions(split_ratio="0.8/0.2"))
    assert [len(split) for split in data.splits.values()] == [8, 2]


def test_a_cell_cannot_name_a_file_outside_its_data_set(tmp_path):
    import datasets as library

    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    features = library.Features({"image": library.Image(decode=False), "label": library.Value("int64")})
    columns = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 2, "label": [0, 1]}
    (tmp_path / "set").mkdir()
    split = datasets.load(hub_table(tmp_path / "set", columns, features)).split("train")
    with pytest.raises(BadData, match=r"names a file outside the data set"):
        split.digest(0)


# --- names and splits ------------------------------------------------------------------------------------------------


def test_a_split_may_go_by_another_name(tmp_path):
    save_images(tmp_path, {"train": 2, "val": 2})
    data = datasets.load(str(tmp_path))
    split = data.split("test=val")
    assert (split.name, split.ids) == ("test", data.split("val").ids)
    with pytest.raises(
        BadData, match=r"no split 'test'; it has train, validation: give --split .*--split-ratio 0\.8/0\.2"
    ):
        data.split("test")


def test_the_order_of_samples_does_not_depend_on_the_file_system(tmp_path):
    """Files made in another order, read in another process: the same ids and labels."""
    first, other = plain(tmp_path / "a"), tmp_path / "b"
    for split in first.splits.values():
        for path, _, body in reversed(rows(split)):
            (other / path).parent.mkdir(parents=True, exist_ok=True)
            (other / path).write_bytes(body)
    code = "import sys; from mlfusion import datasets; print(datasets.load(sys.argv[1]).split('train').ids)"
    said = subprocess.run([sys.executable, "-c", code, str(other)], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(first.split("train").ids)


def test_stray_files_do_not_change_the_form(tmp_path):
    whole = plain(tmp_path)
    np.save(tmp_path / "features.npy", np.zeros(3))
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / ".ipynb_checkpoints" / "x.png").write_bytes(b"")
    again = datasets.load(str(tmp_path))
    assert again.form == "class folders"
    assert {name: split.ids for name, split in again.splits.items()} == {
        name: split.ids for name, split in whole.splits.items()
    }


def test_a_csv_folder_needs_no_class_folders(tmp_path):
    whole = plain(tmp_path / "a")
    root = csv_folder(whole, tmp_path / "a")
    for folder in ("train", "test"):
        for i, path in enumerate(sorted((root / folder).rglob("*.png"))):
            path.rename(root / f"{folder}-{i}.png")
    text = "path,label\n" + "".join(f"train-{i}.png,{i % 2}\n" for i in range(9))
    (root / "train.csv").write_text(text)
    (root / "test.csv").unlink()
    assert datasets.load(str(root)).split("train").labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
