"""Groups of images are never parted: read from every form of data set, split, and reported where a data set parts them."""

import csv
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forms import picture, put
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold
from test_resplit import split_of

from mlfusion import datasets
from mlfusion.datasets import ReadOptions, resplit
from mlfusion.datasets.split import Split
from mlfusion.errors import BadData, BadOption
from mlfusion.specs import grouping

PATIENTS = [f"p{number}" for number in range(10)]
LABELS = ["benign", "malignant"]


def cases(each: int = 3) -> list[tuple[str, str, str]]:
    """(name of the image, label, patient): patients of one label each, whose images do not stand together."""
    return [(f"{who}_{number}", LABELS[int(who[1:]) % 2], who) for number in range(each) for who in PATIENTS]


def table(root: Path, rows: list[dict[str, Any]], name: str = "scans.csv") -> str:
    root.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        (root / row["path"]).write_bytes(picture(number))
    with open(root / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(root / name)


def rows_of(each: int = 3, **more: Any) -> list[dict[str, Any]]:
    return [{"path": f"{name}.png", "label": label, "patient": who, **more} for name, label, who in cases(each)]


def jsonl(root: Path) -> str:
    table(root, rows_of())
    (root / "scans.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of()))
    return str(root / "scans.jsonl")


def tar(root: Path) -> str:
    root.mkdir()
    with tarfile.open(root / "scans.tar", "w") as file:
        for number, (name, label, who) in enumerate(cases()):
            put(file, f"{name}.png", picture(number))
            put(file, f"{name}.cls", label.encode())
            put(file, f"{name}.json", json.dumps({"patient": who}).encode())
    return str(root / "scans.tar")


def parquet(root: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    root.mkdir()
    columns: dict[str, list[Any]] = {
        "image": [picture(number) for number in range(30)],
        "label": [label for _, label, _ in cases()],
        "patient": [who for *_, who in cases()],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "scans.parquet", row_group_size=7)
    return str(root / "scans.parquet")


def folders(root: Path) -> str:
    for number, (name, label, _) in enumerate(cases()):
        (root / "train" / label).mkdir(parents=True, exist_ok=True)
        (root / "train" / label / f"{name}.png").write_bytes(picture(number))
    return str(root)


FORMS: dict[str, tuple[Any, dict[str, str]]] = {
    "csv": (lambda root: table(root, rows_of()), {"group_column": "patient"}),
    "jsonl": (jsonl, {"group_column": "patient"}),
    "tar": (tar, {"group_column": "json.patient"}),
    "tar by its keys": (tar, {"group_pattern": r"(p\d+)_"}),
    "parquet": (parquet, {"group_column": "patient"}),
    "folders": (folders, {"group_pattern": r"/(p\d+)_"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_each_image_its_group_and_a_ratio_parts_whole_groups(form: str, tmp_path: Path) -> None:
    make, options = FORMS[form]
    place = make(tmp_path / "set")
    extra = {"label_column": "cls"} if "tar" in form else {}
    whole = datasets.load(place, ReadOptions(**options, **extra)).split("train")
    expected = {picture(number): who for number, (*_, who) in enumerate(cases())}
    assert [expected[whole.read(row)] for row in range(len(whole))] == list(whole.groups or ())
    data = datasets.load(place, ReadOptions(**options, **extra, split_ratio="0.6/0.4"))
    train, test = data.split("train"), data.split("test")
    assert not set(train.groups or ()) & set(test.groups or ())
    assert (len(set(train.groups or ())), len(set(test.groups or ()))) == (6, 4)
    assert set(train.labels) == set(test.labels) == {0, 1}
    assert data.resplit == "0.6/0.4 seed 0 by group" and data.name.endswith("~0.6-0.4~0~by-group")


def test_a_column_of_the_hub_gives_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets as library

    from mlfusion.datasets import hub

    columns = {"image": [{"bytes": picture(n), "path": None} for n in range(30)], "label": [x for _, x, _ in cases()]}
    made = library.Dataset.from_dict(columns | {"patient": [int(who[1:]) for *_, who in cases()]})
    found = hub._raw_splits("set", "train", made, ReadOptions(group_column="patient"))
    assert found["train"].groups == [int(who[1:]) for *_, who in cases()]


@pytest.mark.parametrize("gap", ["", " ", "NA", "nan", "-"])
def test_an_image_without_a_group_is_refused_with_its_row(gap: str, tmp_path: Path) -> None:
    rows = rows_of()
    rows[6]["patient"] = gap
    with pytest.raises(
        BadData, match=r"p6_0\.png \(row 7\) has no group in patient .*; allowed: text, or a whole number"
    ):
        datasets.load(table(tmp_path, rows), ReadOptions(group_column="patient"))


def test_what_names_no_groups_is_refused(tmp_path: Path) -> None:
    place = table(tmp_path, rows_of(site="A"))
    with pytest.raises(BadData, match=r"all 30 images are of one group \('A'\); allowed: two groups or more"):
        datasets.load(place, ReadOptions(group_column="site"))
    with pytest.raises(BadData, match=r"has no column 'patients'; --group-column may be: path \(text\), label"):
        datasets.load(place, ReadOptions(group_column="patients"))
    with pytest.raises(BadData, match=r"finds no group in 'p0_0\.png'; every image needs a group"):
        datasets.load(place, ReadOptions(group_pattern=r"(q\d)"))
    with pytest.raises(BadData, match="both name the groups; give one of them"):
        datasets.load(place, ReadOptions(group_pattern=r"(p\d)", group_column="patient"))
    with pytest.raises(BadData, match="digits is read as embedded, where --group-column patient has no effect"):
        datasets.load("digits", ReadOptions(group_column="patient"))
    for wrong in ("p\\d", "(p", ""):
        with pytest.raises(
            BadOption, match=r"--group-pattern .*allowed is a regular expression with a group in brackets"
        ):
            ReadOptions(group_pattern=wrong)


def test_a_cell_that_is_no_name_is_a_gap(tmp_path: Path) -> None:
    assert [datasets.groups.group_text(cell) for cell in ("a ", 7, 7.0, np.int64(7), b"x")] == ["a", "7", "7", "7", "x"]
    for cell in (None, float("nan"), 7.5, True, [], {}, float("inf")):
        assert datasets.groups.group_text(cell) is None


# --- warnings --------------------------------------------------------------------------------------------------------


def splits_by_image(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"split": "test" if number % 3 == 0 else "train"} for number, row in enumerate(rows)]


def test_a_column_that_repeats_over_splits_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = splits_by_image(rows_of(sex="f", age=1))
    for number, row in enumerate(rows):
        row |= {"sex": "fm"[number % 2], "age": number % 11, "id": number}
    datasets.load(table(tmp_path / "a", rows), ReadOptions(label_column="label"))
    [line] = [record.getMessage() for record in caplog.records if "--group-column" in record.getMessage()]
    assert line.startswith("scans:label: 10 values of the column patient have images in train and in test. If images")
    assert line.endswith("--group-column patient keeps them together")
    caplog.clear()
    hostile = [{name.replace("patient", "-patient; $(x)"): row[name] for name in row} for row in rows]
    datasets.load(table(tmp_path / "c", hostile), ReadOptions(label_column="label"))
    assert "'--group-column=-patient; $(x)' keeps them together" in caplog.text  # what may be pasted is quoted
    caplog.clear()
    grouped = [row | {"split": "test" if row["patient"] in ("p0", "p1") else "train"} for row in rows_of()]
    datasets.load(table(tmp_path / "b", grouped), ReadOptions(label_column="label"))
    assert not [record for record in caplog.records if "--group-column" in record.getMessage()]


def test_tables_of_splits_may_have_other_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of()
    table(tmp_path, rows[:15], "train.csv")
    table(tmp_path, [{"path": f"t{row['path']}", "label": row["label"]} for row in rows[15:]], "test.csv")
    datasets.load(str(tmp_path), ReadOptions(label_column="label"))
    assert "--group-column" not in caplog.text
    with pytest.raises(BadData, match="has no column 'patient'"):
        datasets.load(str(tmp_path), ReadOptions(label_column="label", group_column="patient"))


def test_a_ratio_by_image_is_reported_with_the_column_that_it_parts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for place in (table(tmp_path / "csv", rows_of()), parquet(tmp_path / "parquet")):
        datasets.load(place, ReadOptions(label_column="label", split_ratio="0.7/0.3"))
        assert "of the column patient have images in train and in test" in caplog.text
        caplog.clear()
        datasets.load(place, ReadOptions(label_column="label", split_ratio="0.7/0.3", group_column="patient"))
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_groups_that_a_data_set_itself_parts_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = table(tmp_path, splits_by_image(rows_of()))
    datasets.load(place, ReadOptions(group_column="patient"))
    assert "10 groups ('p0') with images in train and in test, 10 of its 10 images" in caplog.text


def test_a_column_without_repeats_is_reported_to_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datasets.load(table(tmp_path, rows_of()), ReadOptions(group_column="path"))
    assert "every image is a group of its own by --group-column path, which changes nothing" in caplog.text


# --- parts -----------------------------------------------------------------------------------------------------------

GROUPED = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=8, max_size=30)
"""The class and the number of images of each group."""

SHARES = st.sampled_from([(0.8, 0.2), (0.6, 0.2, 0.2), (0.5, 0.5)])


def grouped(sizes: list[tuple[int, int]]) -> Split:
    labels = np.repeat([label for label, _ in sizes], [count for _, count in sizes])
    split = split_of(labels, ("a", "b", "c"))
    object.__setattr__(split, "groups", tuple(f"g{g}" for g, (_, count) in enumerate(sizes) for _ in range(count)))
    return split


@given(GROUPED, SHARES, st.integers(0, 9), st.randoms())
def test_no_group_is_in_two_parts_and_every_class_in_all(
    sizes: list[tuple[int, int]], shares: tuple[float, ...], seed: int, random: Any
) -> None:
    split = grouped(sizes)
    counts = np.bincount([label for label, _ in sizes], minlength=3)
    present = counts[counts > 0]
    if present.min() < len(shares):
        with pytest.raises(BadData, match=r"has images of \d groups? \(of \d+ in all\), too few to part"):
            resplit.split_by_ratio(split, shares, seed)
        return
    parts = resplit.split_by_ratio(split, shares, seed)
    held = [set(part.groups or ()) for part in parts.values()]
    assert sum(map(len, held)) == len(set.union(*held)) == len(sizes)
    assert all(set(part.labels) == set(split.labels) for part in parts.values())
    assert sorted(name for part in parts.values() for name in part.ids) == sorted(split.ids)
    order = list(range(len(split)))
    random.shuffle(order)
    again = resplit.split_by_ratio(split.take(np.array(order), "train"), shares, seed)
    assert {name: set(part.ids) for name, part in again.items()} == {n: set(part.ids) for n, part in parts.items()}


def spread(labels: np.ndarray, folds: np.ndarray, shares: np.ndarray) -> float:
    """The largest deviation of a part's share of a class from the part's share of all images."""
    table = np.array([np.bincount(labels[folds == part], minlength=3) for part in range(len(shares))])
    return float(np.abs(table / np.bincount(labels, minlength=3) - shares[:, None]).max())


def test_parts_are_as_even_as_those_of_scikit_learn() -> None:
    """Held to StratifiedGroupKFold, whose folds have equal shares, and to GroupShuffleSplit, which has no strata."""
    ours, theirs, shuffled, differ = [], [], [], set()
    for seed in range(20):
        random = np.random.default_rng(seed)
        sizes = random.integers(1, 30, 60)
        labels = np.repeat(random.choice(3, 60, p=[0.6, 0.3, 0.1]), sizes)
        labels = np.where(random.random(len(labels)) < 0.2, random.integers(0, 3, len(labels)), labels)
        groups, rank = np.repeat(np.arange(60), sizes), random.permutation(60)
        part = grouping.assign(labels, groups, [0.2] * 5, rank)
        ours.append(spread(labels, part, np.full(5, 0.2)))
        folds = np.empty(len(labels), int)
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for fold, (_, rows) in enumerate(splitter.split(labels, labels, groups)):
            folds[rows] = fold
        theirs.append(spread(labels, folds, np.full(5, 0.2)))
        [(_, test)] = GroupShuffleSplit(1, test_size=0.2, random_state=seed).split(labels, labels, groups)
        shuffled.append(spread(labels, np.isin(np.arange(len(labels)), test).astype(int), np.array([0.8, 0.2])))
        held = grouping.assign(labels, groups, [0.8, 0.2], rank)
        assert spread(labels, held, np.array([0.8, 0.2])) < 0.1
        differ.add(tuple(np.unique(groups[held == 1])))
    assert np.mean(ours) < 1.5 * np.mean(theirs) and np.mean(ours) < np.mean(shuffled)
    assert len(differ) == 20


def test_groups_that_share_their_classes_may_have_no_parts() -> None:
    """Classes 0, 1 and 2 in two of three groups each: whatever is held out, a class is missing on a side."""
    labels, groups = np.array([0, 1, 1, 2, 2, 0]), np.array([0, 0, 1, 1, 2, 2])
    with pytest.raises(grouping.NoPartition) as found:
        grouping.assign(labels, groups, [0.8, 0.2], np.arange(3))
    assert (found.value.groups, found.value.parts) == (2, 2)


def test_a_seed_means_the_same_groups_for_ever() -> None:
    """Written down: another machine, another library, another year must give these."""
    split = grouped([(number % 2, 1 + number % 4) for number in range(12)])
    part = resplit.split_by_ratio(split, (0.7, 0.3), 7)["test"]
    assert tuple(sorted(set(part.groups or ()))) == GOLDEN


GOLDEN = ("g10", "g11", "g4", "g9")
