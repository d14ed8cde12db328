"""A new split gives every image to one part, by seed and id alone, with every class in every part."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_images, save_model

import mlfusion
from mlfusion import datasets
from mlfusion.datasets import ReadOptions, resplit
from mlfusion.datasets.split import Split
from mlfusion.errors import BadData, BadOption
from mlfusion.specs.kinds import parse_ratio
from mlfusion.store import FeatureStore
from mlfusion.store.features import split_pairs

SHARES = st.sampled_from(["0.8/0.2", "0.8/0.1/0.1", "50/50", "1/98/1", "0.34/0.33/0.33"])


def split_of(labels, classes=(), ids=None) -> Split:
    labels = np.asarray(labels)
    ids = tuple(f"i{row}" for row in range(len(labels))) if ids is None else tuple(ids)
    return Split("train", ids, labels, classes, lambda row: str(row).encode(), lambda _: None)


@given(st.lists(st.integers(3, 40), min_size=2, max_size=9), SHARES, st.integers(0, 9))
def test_every_image_goes_to_one_part_and_every_class_to_every_part(counts, words, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    split = split_of(labels, tuple(map(str, range(len(counts)))))
    shares = parse_ratio(words)
    parts = resplit.split_by_ratio(split, shares, seed)
    assert sorted(name for part in parts.values() for name in part.ids) == sorted(split.ids)
    for part in parts.values():
        rows = [split.ids.index(name) for name in part.ids]
        assert rows == sorted(rows)  # in the split's own order
        assert part.labels.tolist() == labels[rows].tolist()
        assert [part.encoded(i) for i in range(len(part))] == [str(row).encode() for row in rows]
        assert set(part.labels) == set(labels)


@given(st.integers(2, 6), st.integers(20, 60), SHARES)
def test_shares_are_met_where_classes_are_large_enough(classes, each, words):
    shares = parse_ratio(words)
    if min(shares) * each < 1:
        return
    parts = resplit.split_by_ratio(split_of(np.repeat(np.arange(classes), each), tuple("abcdef")), shares, 0)
    for share, part in zip(shares, parts.values(), strict=True):
        assert abs(len(part) - share * each * classes) <= 1 + 1e-6
        assert np.all(np.abs(np.bincount(part.labels, minlength=classes) - share * each) < 2)


@given(st.permutations(range(30)), st.integers(0, 3))
def test_the_order_of_rows_decides_nothing(order, seed):
    labels, ids = np.arange(30) % 3, [f"a/{row}" for row in range(30)]
    one = resplit.split_by_ratio(split_of(labels, ("a", "b", "c"), ids), (0.8, 0.2), seed)
    other = resplit.split_by_ratio(
        split_of(labels[order], ("a", "b", "c"), [ids[row] for row in order]), (0.8, 0.2), seed
    )
    assert {name: set(part.ids) for name, part in one.items()} == {name: set(part.ids) for name, part in other.items()}


def test_a_seed_means_the_same_images_for_ever():
    """Written down: another machine, another library, another year must give these."""
    parts = resplit.split_by_ratio(split_of(np.arange(10) % 2, ("a", "b")), (0.6, 0.4), 7)
    assert parts["test"].ids == GOLDEN


GOLDEN = ("i0", "i3", "i6", "i9")


def test_seeds_differ():
    cuts = [
        resplit.split_by_ratio(split_of(np.arange(40) % 2, ("a", "b")), (0.5, 0.5), seed)["test"].ids
        for seed in range(5)
    ]
    assert len(set(cuts)) == 5


def test_parts_of_numbers_have_the_range_of_the_whole():
    values = np.sort(np.random.default_rng(0).normal(size=400))
    parts = resplit.split_by_ratio(split_of(values), (0.8, 0.1, 0.1), 0)
    assert [len(part) for part in parts.values()] == [320, 40, 40]
    for part in parts.values():
        assert np.abs(np.quantile(part.labels, [0.1, 0.5, 0.9]) - np.quantile(values, [0.1, 0.5, 0.9])).max() < 0.25


def test_a_rare_label_is_in_every_part():
    labels = np.zeros((200, 3), np.uint8)
    labels[:, 0] = 1
    labels[::2, 1] = 1
    labels[::20, 2] = 1  # ten images
    parts = resplit.split_by_ratio(split_of(labels, ("a", "b", "c")), (0.6, 0.2, 0.2), 0)
    assert [int(part.labels[:, 2].sum()) for part in parts.values()] == [6, 2, 2]
    assert [len(part) for part in parts.values()] == [120, 40, 40]


@pytest.mark.parametrize("words", ["0.8", "0.8/0.3", "0.5/0.25/0.25/0", "a/b", "1.2/-0.2", "0/1", "", "1e1/90"])
def test_shares_that_mean_nothing(words):
    with pytest.raises(BadOption, match=r"--split-ratio .*allowed are shares of train/test or train/validation/test"):
        ReadOptions(split_ratio=words)


def test_a_class_too_small_for_its_parts_is_named():
    with pytest.raises(BadData, match="class 'b' has 1 image, too few for 2 parts"):
        resplit.split_by_ratio(split_of([0, 0, 0, 1], ("a", "b")), (0.8, 0.2), 0)


def test_a_new_split_is_of_train_alone_and_is_in_the_name(tmp_path):
    save_images(tmp_path / "set", {"train": 10, "test": 2})
    data = datasets.load(str(tmp_path / "set"), ReadOptions(split_ratio="80/10/10", split_seed=3))
    assert (data.name, data.resplit) == ("set~0.8-0.1-0.1~3", "0.8/0.1/0.1 seed 3")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 24, "validation": 3, "test": 3}
    assert all(name.startswith("train/") for split in data.splits.values() for name in split.ids)
    assert datasets.load("digits", ReadOptions(split_ratio="0.5/0.5")).split("test").classes == tuple("0123456789")


def test_features_of_two_new_splits_are_never_mixed(tmp_path):
    """Two splits of the same train, then the train of a third alone: pairs stay within their split."""
    model = str(save_model("vit", tmp_path / "m"))
    folder = str(save_images(tmp_path / "set", {"train": 10, "test": 2}))

    def extract(splits="train,test", **words):
        return mlfusion.extract(model, folder, splits=splits, layers="1", **words)

    keys = {words: [one.entry.key for one in extract(split_ratio=words)] for words in ("0.8/0.2", "0.8/0.1/0.1")}
    assert len({key for pair in keys.values() for key in pair}) == 4
    extract("train", split_ratio="0.5/0.5")
    [pair] = split_pairs(FeatureStore(), folder, model)
    assert [pair.train.key, pair.test.key] == keys["0.8/0.1/0.1"]
    assert pair.dataset == "set~0.8-0.1-0.1~0"
    assert pair.train.spec.data.resplit == pair.test.spec.data.resplit == "0.8/0.1/0.1 seed 0"
    [plain] = [split_pairs(FeatureStore(), "set~0.8-0.2~0", model)][0]
    assert [plain.train.key, plain.test.key] == keys["0.8/0.2"]
