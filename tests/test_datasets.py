"""Sample i is the same image with the same label for ever; what cannot be used is refused by name."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from tiny import save_images

from mlfusion import datasets
from mlfusion.errors import BadData, BadImage, Unavailable, UnknownName


def test_digits_are_scikit_learns_split_within_each_class():
    from sklearn.datasets import load_digits

    data, whole = datasets.load("digits"), load_digits()
    train, test = data.split("train"), data.split("test")
    assert (len(train), len(test)) == (1442, 355)
    assert not set(train.ids) & set(test.ids)
    for split in (train, test):
        for i in (0, len(split) // 2, len(split) - 1):
            row = int(split.ids[i].split("/")[1])
            assert split.labels[i] == whole.target[row]
            np.testing.assert_array_equal(
                np.asarray(split.image(i))[..., 0], np.round(whole.images[row] * 255 / 16).astype(np.uint8)
            )
    share = np.bincount(test.labels) / np.bincount(np.concatenate([train.labels, test.labels]))
    assert np.all((share > 0.18) & (share < 0.2001))


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    save_images(tmp_path, {"train": 3, "test": 2})
    (tmp_path / "train" / "red" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "red" / ".hidden.png").write_bytes(b"")
    data = datasets.load(str(tmp_path))
    train = data.split("train")
    assert train.ids == tuple(f"train/{c}/{i:03d}.png" for c in ("blue", "green", "red") for i in range(3))
    assert train.classes == ("blue", "green", "red")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert train.image(4).size == (36, 40)


def test_digests_tell_bytes_apart_and_nothing_else(tmp_path):
    import shutil

    save_images(tmp_path / "a", {"train": 2, "test": 2})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one, other = (datasets.load(str(tmp_path / name)).split("train") for name in "ab")
    assert [one.digest(i) for i in range(6)] == [other.digest(i) for i in range(6)]
    assert len({one.digest(i) for i in range(6)}) == 6
    file = tmp_path / "b" / "train" / "red" / "000.png"
    file.write_bytes(file.read_bytes() + b"\0")
    assert one.digest(4) != other.digest(4)


def test_webdataset_shards_in_the_form_of_the_studys_sets(tmp_path):
    save_images(tmp_path / "plain", {"train": 2, "test": 2})
    (tmp_path / "wds").mkdir()
    (tmp_path / "wds" / "classnames.txt").write_text("azure\nleaf\nrose\n")
    plain = datasets.load(str(tmp_path / "plain"))
    for name, split in plain.splits.items():
        (tmp_path / "wds" / name).mkdir()
        (tmp_path / "wds" / name / "nshards.txt").write_text("2")
        for shard in range(2):
            with tarfile.open(tmp_path / "wds" / name / f"{shard}.tar", "w") as tar:
                for row in range(shard, len(split), 2):
                    for suffix, body in (("png", split.encoded(row)), ("cls", str(split.labels[row]).encode())):
                        info = tarfile.TarInfo(f"s{row:07d}.{suffix}")
                        info.size = len(body)
                        tar.addfile(info, io.BytesIO(body))
    data = datasets.load(str(tmp_path / "wds"))
    train, want = data.split("train"), plain.split("train")
    assert train.classes == ("azure", "leaf", "rose")
    for row, name in enumerate(train.ids):
        source = int(name.removeprefix("train/s"))
        assert train.labels[row] == want.labels[source]
        assert train.digest(row) == want.digest(source)
    assert sorted(train.ids) == [f"train/s{row:07d}" for row in range(6)]


def test_a_hub_data_set_with_class_names(tmp_path):
    import datasets as hub

    save_images(tmp_path / "plain", {"train": 2, "test": 2})
    plain = datasets.load(str(tmp_path / "plain"))
    features = hub.Features({"img": hub.Image(), "label": hub.ClassLabel(names=["green", "red", "blue"])})
    (tmp_path / "set" / "data").mkdir(parents=True)
    for name, split in plain.splits.items():
        rows = [
            {"img": {"bytes": split.encoded(i), "path": None}, "label": split.classes[split.labels[i]]}
            for i in range(len(split))
        ]
        table = hub.Dataset.from_list(rows, features=features)
        table.to_parquet(tmp_path / "set" / "data" / f"{name}-00000-of-00001.parquet")
    data = datasets.load(str(tmp_path / "set"))
    train, want = data.split("train"), plain.split("train")
    assert train.classes == ("green", "red", "blue")
    assert [train.classes[label] for label in train.labels] == [want.classes[label] for label in want.labels]
    assert [train.digest(i) for i in range(6)] == [want.digest(i) for i in range(6)]
    assert train.image(0).mode == "RGB"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root.mkdir(), "no folders; allowed: train/<class>"),
        (lambda root: (root / "train").mkdir(parents=True), "allowed: train/<class>"),
        (lambda root: [(root / s / "a").mkdir(parents=True) for s in ("train", "test")], "holds no images"),
        (lambda root: save_images(root, {"train": 2, "test": 2}, ["only"]), "one class only"),
        (
            lambda root: (save_images(root, {"train": 2, "test": 2}), save_images(root, {"test": 1}, ["more"])),
            "train has no image of 'more'",
        ),
    ],
)
def test_folders_that_cannot_be_used(make, words, tmp_path):
    make(tmp_path / "set")
    with pytest.raises(BadData, match=words):
        datasets.load(str(tmp_path / "set"))


def test_a_test_split_without_a_class_is_told_of_once_and_used(tmp_path, caplog):
    """Two unlucky patients must not keep the other classes from being measured."""
    save_images(tmp_path / "set", {"train": 2, "test": 2})
    save_images(tmp_path / "set", {"train": 2}, ["more"])
    data = datasets.load(str(tmp_path / "set"))
    assert "more" in data.split("test").classes == data.split("train").classes
    assert caplog.text.count("test has no image of 'more'; a score on test is that of the other classes") == 1


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    save_images(tmp_path / "set", {"train": 2, "test": 2})
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "set" / "train" / "red" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadData, match=r"link\.png is a link that leads out"):
        datasets.load(str(tmp_path / "set"))


def test_an_unreadable_image_is_named(tmp_path):
    save_images(tmp_path, {"train": 2, "test": 2})
    (tmp_path / "train" / "red" / "000.png").write_bytes(b"not an image at all")
    whole = (tmp_path / "train" / "red" / "001.png").read_bytes()
    (tmp_path / "train" / "red" / "001.png").write_bytes(whole[: len(whole) // 2])
    train = datasets.load(str(tmp_path)).split("train")
    with pytest.raises(BadImage, match=r"train/red/000\.png cannot be read: not an image"):
        train.image(4)
    with pytest.raises(BadImage, match=r"train/red/001\.png cannot be read: .+"):
        train.image(5)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UnknownName, match=r"Did you mean dtd\?"):
        datasets.load("dttd")


@pytest.mark.parametrize("word", ["dtd", "someone/some-images"])
def test_no_network_is_said_at_once(word):
    with pytest.raises(Unavailable, match=r"hub cannot be reached.*--dataset digits"):
        datasets.load(word)


def test_the_catalogue_holds_the_studys_twenty(shared):
    import csv

    with open(shared.parent / "reference" / "paper_datasets.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    for row in rows:
        ours = datasets.CATALOGUE[row["name"]]
        assert (ours.source, ours.train_images, ours.classes) == (
            row["hub_id"],
            int(row["train_images"]),
            int(row["classes"]),
        )
