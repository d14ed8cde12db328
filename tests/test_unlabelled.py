"""Images without labels: one split that is extracted, loaded, copied and written as embeddings; and what refuses them."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from tiny import noise_images, save_model
from torch.utils.data import DataLoader

import mlfusion
from mlfusion import cli, datasets
from mlfusion.datasets.describe import describe
from mlfusion.errors import BadData, BadOption, NotCached, UnknownName
from mlfusion.store.housekeeping import copy_entries
from mlfusion.store.verify import verify


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, and nine images, two of them in a folder, beside a text and a hidden image."""
    root = tmp_path_factory.mktemp("unlabelled")
    save_model("vit", root / "vit")
    (root / "incoming" / "later").mkdir(parents=True)
    for number, image in enumerate(noise_images(9)):
        image.save(root / "incoming" / ("later" if number > 6 else "") / f"{number}.png")
    (root / "incoming" / "notes.txt").touch()
    (root / "incoming" / ".hidden.png").touch()
    mlfusion.extract(str(root / "vit"), str(root / "incoming"), cache=root / "cache")
    return root


IDS = (*(f"{number}.png" for number in range(7)), "later/7.png", "later/8.png")


def test_a_folder_without_class_folders_is_one_split_without_labels(root: Path) -> None:
    data = datasets.load(str(root / "incoming"))
    assert (data.form, list(data.splits), data.classes, data.labelled) == ("images without labels", ["all"], (), False)
    split = data.split("all")
    assert split.ids == IDS and split.labels.shape == (9, 0)
    np.testing.assert_array_equal(split.image(8), np.asarray(noise_images(9)[8]))
    [summary] = describe(data)
    assert (summary.images, summary.labels) == (9, {})
    with pytest.raises(BadData, match="no split 'train'; its images have no labels and are the split 'all'"):
        data.split("train")
    with pytest.raises(BadData, match="read as images without labels, where --label-column x has no effect"):
        datasets.load(str(root / "incoming"), mlfusion.ReadOptions(label_column="x"))


def test_folders_of_classes_are_no_images_without_labels(root: Path, tmp_path: Path) -> None:
    """Two folders of images may be classes: the user says so by --split-ratio, and nothing is guessed."""
    for name in ("cats", "dogs"):
        (tmp_path / "set" / name).mkdir(parents=True)
        shutil.copy(root / "incoming" / "0.png", tmp_path / "set" / name / f"{name}.png")
    with pytest.raises(BadData, match="has the folders cats, dogs; allowed: "):
        datasets.load(str(tmp_path / "set"))
    shutil.copy(root / "incoming" / "0.png", tmp_path / "set" / "loose.png")
    with pytest.raises(BadData, match="has the folders cats, dogs; allowed: "):
        datasets.load(str(tmp_path / "set"))


def test_tokens_are_cached_once_and_are_those_of_a_labelled_set(root: Path, tmp_path: Path) -> None:
    model, data = str(root / "vit"), str(root / "incoming")
    features = mlfusion.load_features(model, data, "all", cache=root / "cache")
    assert features.ids == IDS and features.labels.shape == (9, 0) and features.classes == ()
    assert features.tokens.shape == (9, 4, 2, 32)
    [again] = mlfusion.extract(model, data, cache=root / "cache")
    assert (again.images_written, again.images_reused, again.entry.key) == (0, 9, features.key)
    assert verify(root / "cache").damaged == ()
    copy_entries(root / "cache", [tmp_path / "copy"])
    np.testing.assert_array_equal(
        mlfusion.load_features(model, data, "all", cache=tmp_path / "copy").tokens, features.tokens
    )
    for number in range(9):  # the same images as two classes, whose tokens have other ids and labels
        for split in ("train", "test"):
            (tmp_path / "set" / split / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "incoming" / IDS[number], tmp_path / "set" / split / f"c{number % 2}" / f"{number}.png")
    mlfusion.extract(model, str(tmp_path / "set"), batch_size=9)
    labelled = mlfusion.load_features(model, str(tmp_path / "set"), "train")
    order = [int(Path(name).stem) for name in labelled.ids]
    np.testing.assert_allclose(labelled.tokens, features.tokens[order], atol=2e-3, rtol=2e-3)


def test_the_key_is_that_of_ids_and_bytes(root: Path, tmp_path: Path) -> None:
    """A copy elsewhere has the same content; another image, or another name, has not."""

    def key(folder: Path) -> str:
        [explained] = mlfusion.explain(str(root / "vit"), str(folder))
        return explained.key

    shutil.copytree(root / "incoming", tmp_path / "copy" / "incoming")
    first = key(root / "incoming")
    assert key(tmp_path / "copy" / "incoming") == first
    (tmp_path / "copy" / "incoming" / "0.png").rename(tmp_path / "copy" / "incoming" / "00.png")
    assert key(tmp_path / "copy" / "incoming") != first


def test_a_probe_says_what_is_missing(root: Path) -> None:
    for model in (None, str(root / "vit")):
        with pytest.raises(
            BadData, match=r"of .*incoming have no labels, which a probe is trained and tested on; allowed"
        ):
            mlfusion.probe(str(root / "incoming"), model=model, cache=root / "cache")
    with pytest.raises(NotCached):
        mlfusion.probe("digits", cache=root / "cache")


# --- embeddings and readers ------------------------------------------------------------------------------------------


def opened(root: Path, **options: Any) -> Any:
    return mlfusion.open_features(str(root / "vit"), str(root / "incoming"), "all", cache=root / "cache", **options)


def test_embeddings_are_the_tokens_in_a_row(root: Path, tmp_path: Path) -> None:
    features = mlfusion.load_features(
        str(root / "vit"), str(root / "incoming"), "all", layers=(2, 4), cache=root / "cache"
    )
    expected = features.tokens.reshape(9, -1).astype(np.float32)
    for source in (features, opened(root, layers=(2, 4))):
        for suffix in ("npy", "parquet"):
            source.write(tmp_path / f"new/e.{suffix}")
        np.testing.assert_array_equal(np.load(tmp_path / "new" / "e.npy", allow_pickle=False), expected)
        table = pyarrow.parquet.read_table(tmp_path / "new" / "e.parquet")
        assert table.column_names == ["id", "embedding"] and table["id"].to_pylist() == list(IDS)
        np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), expected)
    with pytest.raises(UnknownName, match="no form of embeddings named 'txt'"):
        features.write("e.txt")


def test_embeddings_of_labelled_images_have_their_labels(root: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    for kind, labels, expected in (
        ("class", ["b", "a"] * 3, ["b", "a"] * 3),
        ("labels", [["a"], ["a", "b"], ["b"]] * 2, [["a"], ["a", "b"], ["b"]] * 2),
        ("number", np.arange(6) / 2, (np.arange(6) / 2).tolist()),
    ):
        data = mlfusion.array_dataset(kind, {"train": (images, labels), "test": (images, labels)}, target=kind)
        mlfusion.extract(str(root / "vit"), data, layers="last")
        mlfusion.load_features(str(root / "vit"), kind, "train", layers="last").write(tmp_path / "e.parquet")
        assert pyarrow.parquet.read_table(tmp_path / "e.parquet")["label"].to_pylist() == expected


def test_one_row_one_layer_and_lengths(root: Path) -> None:
    features = opened(root, layers=3)
    whole = mlfusion.load_features(str(root / "vit"), str(root / "incoming"), "all", cache=root / "cache").tokens[
        :, 2:3
    ]
    assert features.layers == (3,) and len(features) == len(features.tokens) == 9
    for row in (0, 5, -1, np.int64(8)):
        np.testing.assert_array_equal(features.tokens[row], whole[row])
        np.testing.assert_array_equal(features[int(row)][0], whole[row])
    for row in (9, -10):
        with pytest.raises(IndexError, match="of 9 images"):
            features.tokens[row]
    assert [len(tokens) for tokens, _ in features] == [1] * 9  # a sequence ends


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_takes_features(root: Path, workers: int) -> None:
    features = opened(root)
    batches = list(DataLoader(features, batch_size=4, num_workers=workers))
    assert [len(tokens) for tokens, _ in batches] == [4, 4, 1]
    np.testing.assert_array_equal(torch.cat([tokens for tokens, _ in batches]).numpy(), features.tokens.read())


def test_the_commands(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlfusion", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capfd.readouterr()

    words = ("-m", root / "vit", "-d", root / "incoming", "--cache", root / "cache")
    code, out, _ = run("cache", "embeddings", "e.npy", *words, "--tokens", "cls,ap", "--layers", "1-2")
    assert code == 0 and out == f"{tmp_path}/e.npy: 9 images of all, 128 numbers each\n"
    assert np.load("e.npy").shape == (9, 128)
    assert run("cache", "embeddings", "e.csv", *words)[0] == 1
    code, out, _ = run("data", root / "incoming")
    assert code == 0 and "no labels" in out.splitlines()[1]
    code, _, err = run("probe", "-d", root / "incoming", "--cache", root / "cache")
    assert code == 1 and "have no labels" in err
    with pytest.raises(BadOption):
        mlfusion.EmbeddingOptions(layers="x")
