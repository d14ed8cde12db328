"""Labels and splits come from the place that docs/datasets.md names, in every form; nothing is left out without a word."""

import csv
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forms import labelled, picture, put
from tiny import save_images

from mlfusion import datasets
from mlfusion.datasets import ReadOptions
from mlfusion.datasets.places import PLACES, SPLIT_PLACES, split_in, split_of_path
from mlfusion.errors import BadData
from mlfusion.specs.splits import split_word

COUNT = {"train": 4, "validation": 2, "test": 2}
LABELS = ["cat", "dog"]


def load(path: Path, **words: Any) -> datasets.DataSet:
    return datasets.load(str(path), ReadOptions(**words))


def write(path: Path, body: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)


def sizes(data: datasets.DataSet) -> dict[str, int]:
    return {name: len(split) for name, split in data.splits.items()}


def rows() -> list[tuple[str, int, str]]:
    """(split, number, class) of every image, in the order of splits."""
    return [(split, 10 * at + n, LABELS[n % 2]) for at, split in enumerate(COUNT) for n in range(COUNT[split])]


def pixels(numbers: list[int]) -> np.ndarray:
    return np.stack([np.asarray(datasets.Decoder()(picture(number))) for number in numbers])


# --- form × place ----------------------------------------------------------------------------------------------------


def folders(root: Path, place: str, words: dict[str, str]) -> Path:
    for split, number, label in rows():
        write(root / (words[split] if place == "folder" else ".") / label / f"{number}.png", picture(number))
    return root


def table(root: Path, place: str, words: dict[str, str], suffix: str = ".csv") -> Path:
    tables: dict[Path, list[dict[str, Any]]] = {}
    for split, number, label in rows():
        word = words[split]
        image = Path(word if place in ("image", "folder") else ".") / f"{number}.png"
        write(root / image, picture(number))
        file = {"file": root / f"{word}{suffix}", "folder": root / word / f"metadata{suffix}"}.get(
            place, root / f"t{suffix}"
        )
        cells = {"path": f"{number}.png" if place == "folder" else str(image), "label": label}
        tables.setdefault(file, []).append(cells | ({"split": word} if place == "column" else {}))
    for file, lines in tables.items():
        text = io.StringIO()
        if suffix == ".jsonl":
            text.writelines(json.dumps(line) + "\n" for line in lines)
        else:
            writer = csv.DictWriter(text, list(lines[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(lines)
        file.write_text(text.getvalue())
    return root if len(tables) > 1 else next(iter(tables))


NAMES: dict[str, Callable[[str, int], str]] = {
    "shard": lambda word, part: f"data/{word}-{part:05d}-of-00002",
    "folder": lambda word, part: f"{word}/{part}",
    "file": lambda word, part: f"animals_{word}-{part:03d}",
    "only": lambda word, part: f"{word and 'all'}-{part:03d}",
}


def tars(root: Path, place: str, words: dict[str, str]) -> Path:
    for at, (split, number, label) in enumerate(rows()):
        path = root / f"{NAMES[place](words[split], number % 2)}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "a") as tar:
            put(tar, f"{at}.png", picture(number))
            put(tar, f"{at}.cls", label.encode())
    return root


def parquet(root: Path, place: str, words: dict[str, str]) -> Path:
    import pyarrow
    import pyarrow.parquet

    files: dict[Path, list[dict[str, Any]]] = {}
    for split, number, label in rows():
        name = NAMES["only" if place == "column" else place](words[split], number % 2)
        cells = {"image": picture(number), "label": label} | ({"split": words[split]} if place == "column" else {})
        files.setdefault(root / f"{name}.parquet", []).append(cells)
    for path, lines in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    return root


def arrays(root: Path, place: str, words: dict[str, str]) -> Path:
    found: dict[str, Any] = {}
    for split in COUNT if place == "array" else ("train",):
        chosen = [(number, label) for name, number, label in rows() if name == split or place == "only"]
        names = (f"X_{words[split]}", f"y_{words[split]}") if place == "array" else ("images", "labels")
        found |= dict(zip(names, (pixels([n for n, _ in chosen]), np.array([c for _, c in chosen])), strict=True))
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / "a.npz", **found)
    return root / "a.npz"


MAKERS: dict[str, Callable[[Path, str, dict[str, str]], Path]] = {
    "class folders": folders,
    "CSV, TSV or JSON Lines": table,
    "tars": tars,
    "Parquet": parquet,
    "arrays": arrays,
}
SPELLINGS = [("train", "validation", "test"), ("Training", "val", "TEST"), ("TRAIN", "valid", "testing")]


@pytest.mark.parametrize("words", SPELLINGS, ids=lambda words: words[0])
@pytest.mark.parametrize(("form", "place"), [(form, place) for form, each in SPLIT_PLACES.items() for place in each])
def test_every_form_honours_every_place_of_a_split(form, place, words, tmp_path, caplog):
    path = MAKERS[form](tmp_path / "set", place, dict(zip(COUNT, words, strict=True)))
    data = load(path, split_ratio="0.5/0.5" if form == "class folders" and place == "only" else None)
    assert sizes(data) == ({"train": 8} if place == "only" else COUNT) or data.resplit
    assert sum(sizes(data).values()) == 8
    wanted = {pixels([number]).tobytes(): (split, label) for split, number, label in rows()}
    for name, split in data.splits.items():
        for row in range(len(split)):
            stored, label = wanted[np.asarray(split.image(row)).tobytes()]
            assert split.classes[split.labels[row]] == label
            assert place == "only" or stored == name
    assert "left out" not in caplog.text


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl"])
@pytest.mark.parametrize("place", SPLIT_PLACES["CSV, TSV or JSON Lines"])
def test_other_tables_have_the_same_places(suffix, place, tmp_path):
    path = table(tmp_path / "set", place, dict(zip(COUNT, COUNT, strict=True)), suffix)
    assert sizes(load(path)) == ({"train": 8} if place == "only" else COUNT)


@pytest.mark.parametrize("place", SPLIT_PLACES["Parquet"])
def test_parquet_has_one_meaning_in_place_and_through_arrow(place, tmp_path):
    path = parquet(tmp_path / "set", place, dict(zip(COUNT, ("train", "val", "test"), strict=True)))
    found = [
        {
            name: (split.ids, split.labels.tolist(), [split.read(row) for row in range(len(split))])
            for name, split in load(path, stream=stream).splits.items()
        }
        for stream in (False, True)
    ]
    assert found[0] == found[1]
    assert list(found[0]) == (["train"] if place == "only" else ["train", "test", "validation"])


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("test/train-00000-of-00002.tar", "train"),  # the name of a shard goes before the folder
        ("test/train-000.tar", "test"),  # the folder before a word
        ("train/old/val/x.tar", "validation"),  # the nearest folder first
        ("data/cars/x-test.tar", "test"),
        ("data/cars-00000-of-00002.tar", None),
    ],
)
def test_the_order_of_places_of_files(path, split):
    assert split_of_path(path) == split


def test_the_order_of_places_of_tables(tmp_path):
    """The column goes before the name of the table, and that before the folder of the image."""
    for number in range(8):
        write(tmp_path / "val" / f"{number}.png", picture(number))
    lines = [f"val/{number}.png,{LABELS[number % 2]},{'train' if number < 4 else 'test'}" for number in range(8)]
    for name in ("t.csv", "animals-test.csv"):
        (tmp_path / name).write_text("\n".join(["path,label,split", *lines]))
        assert sizes(load(tmp_path / name)) == {"train": 4, "test": 4}
    assert sizes(load(tmp_path / "animals-test.csv", split_column="none")) == {"test": 8}
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *(line.rpartition(",")[0] for line in lines)]))
    assert sizes(load(tmp_path / "t.csv")) == {"validation": 8}


def test_every_place_is_described():
    assert {place for places in SPLIT_PLACES.values() for place in places} == set(PLACES)
    assert set(MAKERS) == set(SPLIT_PLACES)


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, "train") for name in ("train", "train-000", "TRAIN_1", "cars_train", "train2017", "a.train.b")),
        *((name, "validation") for name in ("val", "cars-val-3", "dev", "valid.0")),
        *(
            (name, None)
            for name in ("trains-000", "valley", "tests", "contest", "trainset", "train-test", "retrain", "")
        ),
    ],
)
def test_a_word_ends_at_a_separator(name, split):
    assert split_in(name) == split
    assert split_of_path(f"{name}.tar") == split


def test_a_cell_or_a_folder_is_one_word():
    assert [split_word(text) for text in (" Val ", "train-1", "trainset", "")] == ["validation", None, None, None]


def test_val_is_another_word_for_validation(tmp_path):
    save_images(tmp_path, {"train": 2, "test": 2, "val": 2})
    data = load(tmp_path)
    assert data.split("val").name == data.split("validation").name == "validation"
    assert data.split("test=val").ids == data.split("validation").ids


# --- names that are not plain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("cars", "planes", "trains"), ("hill", "valley"), ("tests", "contests")])
def test_files_that_are_called_like_splits_are_all_read(names, tmp_path):
    for at, name in enumerate(names):
        labelled("tar", tmp_path / "t", ["a", "b"] * 2, 10 * at).rename(tmp_path / f"{name}-000.tar")
        labelled("parquet", tmp_path / "t", ["a", "b"] * 2, 10 * at).rename(tmp_path / f"{name}-000.parquet")
    (tmp_path / "pq").mkdir()
    for file in tmp_path.glob("*.parquet"):
        file.rename(tmp_path / "pq" / file.name)
    (tmp_path / "tars").mkdir()
    for file in tmp_path.glob("*.tar"):
        file.rename(tmp_path / "tars" / file.name)
    for form in ("tars", "pq"):
        assert sizes(load(tmp_path / form)) == {"train": 4 * len(names)}
    assert sizes(load(tmp_path / "pq", stream=True)) == {"train": 4 * len(names)}


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_one_file_of_a_split_beside_others_is_refused(form, tmp_path):
    for at, name in enumerate(("cars", "train")):
        labelled(form, tmp_path / "t", ["a", "b"], 10 * at).rename(tmp_path / f"{name}-000.{form}")
    with pytest.raises(BadData, match=r"train-000\.\w+ is named after the split train, and cars-000\.\w+ after none"):
        load(tmp_path)


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_files_beside_those_of_the_splits_are_told_of(form, tmp_path, caplog):
    for at, name in enumerate(("train", "test", "embeddings")):
        labelled(form, tmp_path / "t", ["a", "b"], 10 * at).rename(tmp_path / f"{name}-000.{form}")
    assert sizes(load(tmp_path)) == {"train": 2, "test": 2}
    assert f"1 file is left out, since it is named after no split: embeddings-000.{form}" in caplog.text


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_a_class_that_is_called_like_a_split(name, tmp_path):
    for at, place in enumerate(("car/red", "car/blue", f"{name}/steam", f"{name}/diesel")):
        for n in range(4):
            write(tmp_path / "nested" / place / f"{n}.png", picture(10 * at + n))
            write(tmp_path / "flat" / place.split("/")[0] / f"{at}-{n}.png", picture(10 * at + n))
    with pytest.raises(BadData, match=rf"{name} is named after the split .*, and car after none, so it is not plain"):
        load(tmp_path / "nested", split_ratio="0.5/0.5")
    data = load(tmp_path / "flat", split_ratio="0.5/0.5")
    assert (set(data.classes), sum(sizes(data).values())) == ({"car", name}, 16)


def test_classes_that_are_called_like_two_splits_are_refused(tmp_path):
    for at, place in enumerate(("car/red", "train/steam", "train/diesel", "test/pit", "test/dyno")):
        write(tmp_path / place / "0.png", picture(at))
    with pytest.raises(BadData, match="car after none, so it is not plain"):
        load(tmp_path, split_ratio="0.5/0.5")


def test_images_and_folders_that_are_left_out_are_counted(tmp_path, caplog):
    save_images(tmp_path, {"train": 2, "test": 2, "unlabeled": 2}, ["a", "b"])
    write(tmp_path / "loose.png", picture(1))
    write(tmp_path / "train" / "loose.png", picture(2))
    assert sizes(load(tmp_path)) == {"train": 4, "test": 4}
    assert "1 folder is left out, since it is named after no split: unlabeled" in caplog.text
    assert "2 images are in no class folder and left out, the first loose.png" in caplog.text


def test_hidden_test_images_beside_class_folders_are_counted(tmp_path, caplog):
    save_images(tmp_path, {"train": 4}, ["a", "b"])
    write(tmp_path / "test" / "0.png", picture(0))
    assert sizes(load(tmp_path, split_ratio="0.5/0.5")) == {"train": 4, "test": 4}
    assert "1 image is in no class folder and left out, the first test/0.png" in caplog.text


@pytest.mark.parametrize("options", [{}, {"split_ratio": "0.5/0.5"}])
def test_a_table_of_another_name_beside_class_folders_is_told(options, tmp_path, caplog):
    save_images(tmp_path, {"all": 4} if options else {"train": 2, "test": 2})
    root = tmp_path / "all" if options else tmp_path
    (root / "diagnoses.csv").write_text("path,label\n")
    assert datasets.load(str(root), ReadOptions(**options)).form == "class folders"
    assert "diagnoses.csv is left out; give the path of a file to read that" in caplog.text


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_the_command_for_a_table_in_another_encoding_makes_it_readable(encoding, tmp_path):
    save_images(tmp_path, {"train": 4})
    images = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    names = ("bar", "café")
    lines = [f"{path},{names[n % 2]},{'train' if n > 3 else 'test'}" for n, path in enumerate(images)]
    file = tmp_path / "a table.csv"
    file.write_bytes("\n".join(["path,label,split", *lines]).encode(encoding))
    with pytest.raises(BadData, match="allowed: UTF-8") as refused:
        datasets.load(str(file))
    subprocess.run(re.search("`(iconv .*)`", str(refused.value))[1], shell=True, check=True)
    assert datasets.load(str(tmp_path / "a table-utf8.csv")).classes == names


def test_two_folders_of_one_split_are_refused(tmp_path):
    save_images(tmp_path, {"train": 2, "val": 2, "validation": 2})
    with pytest.raises(BadData, match="val and validation are both named after the split validation; rename one"):
        load(tmp_path)


# --- the form --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["birds.tar", "train.tar", "train/all.tar", "embeddings.parquet", "train.parquet"])
def test_a_container_beside_class_folders_does_not_change_the_form(name, tmp_path, caplog):
    save_images(tmp_path, {"train": 2, "test": 2})
    labelled(name.rpartition(".")[2], tmp_path.parent / f"{tmp_path.name}-t", ["a", "b"]).rename(tmp_path / name)
    data = load(tmp_path)
    assert (data.form, sizes(data)) == ("class folders", {"train": 6, "test": 6})
    assert f"{name} is left out; give the path of a file to read that" in caplog.text
    save_images(tmp_path / "whole", {"all": 2})
    (tmp_path / name).rename(tmp_path / "whole" / "all" / "x.tar")
    assert load(tmp_path / "whole" / "all", split_ratio="0.5/0.5").form == "class folders"


@pytest.mark.parametrize(
    ("name", "suffix"),
    [(n, s) for n in ("metadata", "labels") for s in (".csv", ".jsonl")] + [("metadata", ".parquet")],
)
def test_a_table_at_the_root_says_the_labels(name, suffix, tmp_path):
    """The numbered folders below the splits are no classes."""
    lines = []
    for split, number, label in rows():
        write(tmp_path / split / f"{number % 2:04d}" / f"{number}.png", picture(number))
        lines.append((f"{split}/{number % 2:04d}/{number}.png", label))
    text = io.StringIO()
    if suffix == ".csv":
        csv.writer(text).writerows([("file_name", "label"), *lines])
    else:
        text.writelines(json.dumps({"file_name": path, "label": label}) + "\n" for path, label in lines)
    (tmp_path / f"{name}{suffix}").write_text(text.getvalue())
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        paths, labels = zip(*lines, strict=True)
        pyarrow.parquet.write_table(pyarrow.table({"file_name": paths, "label": labels}), tmp_path / "metadata.parquet")
    data = load(tmp_path)
    assert sizes(data) == COUNT
    assert [data.classes[x] for x in data.split("train").labels] == ["cat", "dog"] * 2
    assert sizes(load(tmp_path, split_column="none")) == {"train": 8}


# --- the columns -----------------------------------------------------------------------------------------------------


def one_table(form: str, root: Path, columns: dict[str, list[Any]]) -> Path:
    """Images 0, 1, … with these columns, in one CSV, JSON Lines or Parquet file."""
    count = len(next(iter(columns.values())))
    lines = [{name: cells[row] for name, cells in columns.items()} for row in range(count)]
    root.mkdir(parents=True, exist_ok=True)
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        body = [{"image": picture(row)} | line for row, line in enumerate(lines)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(body), root / "t.parquet")
        return root / "t.parquet"
    for row in range(count):
        write(root / f"{row}.png", picture(row))
    body = [{"path": f"{row}.png"} | line for row, line in enumerate(lines)]
    with open(root / f"t.{form}", "w", newline="") as file:
        if form == "jsonl":
            file.writelines(json.dumps(line) + "\n" for line in body)
        else:
            writer = csv.DictWriter(file, list(body[0]))
            writer.writeheader()
            writer.writerows(body)
    return root / f"t.{form}"


TABLES = ["csv", "jsonl", "parquet"]


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("column", ["split", "Split", "fold", "subset"])
def test_the_column_of_splits(form, column, tmp_path, caplog):
    cells = ["train"] * 4 + ["test"] * 4
    path = one_table(form, tmp_path, {"label": LABELS * 4, column: cells})
    data = load(path)
    assert sizes(data) == {"train": 4, "test": 4}
    assert data.split("test").read(0) == picture(4)
    assert (f"the column {column} names each row's split" in caplog.text) == (column != "split")
    train = load(path, split_ratio="0.5/0.5")
    assert {train.split(name).read(row) for name in ("train", "test") for row in range(2)} == {
        picture(number) for number in range(4)
    }
    assert sizes(load(path, split_column="none")) == {"train": 8}
    if form == "parquet":
        assert sizes(load(path, stream=False)) == sizes(data)


@pytest.mark.parametrize("form", TABLES)
def test_a_column_of_folds_and_a_requested_column(form, tmp_path):
    columns = {"label": LABELS * 4, "fold": list("01230123"), "phase": ["train"] * 4 + ["test"] * 4}
    path = one_table(form, tmp_path, columns)
    assert sizes(load(path)) == {"train": 8}
    assert sizes(load(path, split_column="phase")) == {"train": 4, "test": 4}
    with pytest.raises(BadData, match="no column 'stage'; --split-column may be: "):
        load(path, split_column="stage")


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("cell", ["", " ", None])
def test_an_empty_cell_of_the_column_of_splits_is_refused(form, cell, tmp_path):
    path = one_table(form, tmp_path, {"label": LABELS * 2, "split": ["train", "train", cell, "test"]})
    with pytest.raises(BadData, match=r"row 3 names no split \(.*\); write train, test, validation or another name"):
        load(path)


def test_the_column_goes_before_the_name_of_the_file(tmp_path, caplog):
    path = one_table("csv", tmp_path, {"label": LABELS * 4, "split": ["train"] * 4 + ["test"] * 4})
    path.rename(tmp_path / "train.csv")
    assert sizes(load(tmp_path / "train.csv")) == sizes(load(tmp_path)) == {"train": 4, "test": 4}
    assert "its name says train, and its split column also test; the column decides" in caplog.text


def two_classes(root: Path, names: tuple[str, str]) -> Path:
    import datasets as library

    kinds = {name: library.ClassLabel(names=[f"{name}-a", f"{name}-b"]) for name in names}
    features = library.Features({"picture": library.Image(), **kinds})
    root.mkdir(parents=True)
    cells = [{"bytes": picture(n), "path": None} for n in range(8)]
    body = {"picture": cells, names[0]: [n // 4 for n in range(8)], names[1]: [n % 2 for n in range(8)]}
    library.Dataset.from_dict(body, features=features).to_parquet(root / "train.parquet")
    return root


@pytest.mark.parametrize("stream", [False, True])
def test_two_columns_of_classes_are_listed(stream, tmp_path, caplog):
    root = two_classes(tmp_path / "set", ("light", "kind"))
    with pytest.raises(BadData, match=r"label is not plain; give --label-column, one of: .*light \(class of 2\), kind"):
        load(root, stream=stream)
    assert load(root, stream=stream, label_column="kind").classes == ("kind-a", "kind-b")
    usual = two_classes(tmp_path / "usual", ("coarse_label", "fine_label"))
    assert load(usual, stream=stream).classes == ("fine_label-a", "fine_label-b")
    assert "the column fine_label is read as the label, and not coarse_label; --label-column chooses" in caplog.text


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_several_usual_columns_of_a_table_are_told_of(form, tmp_path, caplog):
    path = one_table(form, tmp_path, {"class": LABELS * 2, "Label": ["x", "y"] * 2})
    assert load(path).classes == ("x", "y")
    assert "the column Label is read as the label, and not class; --label-column chooses another" in caplog.text


def test_a_column_twice_is_refused(tmp_path):
    for row in range(2):
        write(tmp_path / f"{row}.png", picture(row))
    (tmp_path / "t.csv").write_text("path,label,label\n0.png,a,x\n1.png,b,y\n")
    (tmp_path / "t.jsonl").write_text('{"path": "0.png", "label": "a", "label": "b"}\n')
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in ("0.png", "0.cls", "0.cls"):
            put(tar, name, picture(0))
    import pyarrow
    import pyarrow.parquet

    cells = [pyarrow.array(column) for column in ([picture(0)], ["a"], ["b"])]
    (tmp_path / "pq").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(cells, ["image", "label", "label"]), tmp_path / "pq" / "t.parquet")
    for path, stream in (("t.csv", False), ("pq", False), ("pq", True), ("pq/t.parquet", False)):
        with pytest.raises(BadData, match=r"t\.\w+ has two columns 'label'; rename one"):
            load(tmp_path / path, stream=stream)
    with pytest.raises(BadData, match=r"t\.jsonl, line 1: not JSON \('label' is there twice\)"):
        load(tmp_path / "t.jsonl")
    with pytest.raises(BadData, match=r"t\.tar: the sample 0 has two files cls"):
        load(tmp_path / "t.tar")


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
def test_a_table_without_column_names_is_refused(suffix, separator, tmp_path):
    for row in range(4):
        write(tmp_path / f"{row}.png", picture(row))
    (tmp_path / f"t{suffix}").write_text("".join(f"{row}.png{separator}{LABELS[row % 2]}\n" for row in range(4)))
    with pytest.raises(BadData, match=r"no line of column names: its first line names the image 0\.png"):
        load(tmp_path / f"t{suffix}")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_line_in_which_excel_names_the_separator(separator, tmp_path):
    for row in range(4):
        write(tmp_path / f"{row}.png", picture(row))
    lines = ["path,label", *(f"{row}.png,{LABELS[row % 2]}" for row in range(4))]
    text = f"sep={separator}\r\n" + "\r\n".join(lines).replace(",", separator)
    (tmp_path / "t.csv").write_bytes(text.encode("utf-8-sig"))
    assert load(tmp_path / "t.csv").split("train").labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_paths_of_windows_are_found(form, tmp_path):
    labelled(form, tmp_path / "img", LABELS * 2)
    text = (tmp_path / "img" / f"set.{form}").read_text()
    back = "\\" if form == "csv" else "\\\\"
    for row in range(4):
        text = text.replace(f"{row}.png", f"img{back}{row}.png")
    (tmp_path / f"t.{form}").write_text(text)
    split = load(tmp_path / f"t.{form}").split("train")
    assert split.ids == tuple(f"img/{row}.png" for row in range(4))
    assert split.read(3) == picture(3)
    (tmp_path / "img" / "3.png").unlink()
    with pytest.raises(BadData, match=r"img\\3\.png \(a path with backslashes, from Windows\)"):
        load(tmp_path / f"t.{form}")
    (tmp_path / "t.csv").write_text("path,label\n..\\secret.png,a\n")
    write(tmp_path.parent / "secret.png", picture(0))
    with pytest.raises(BadData, match="leads out of"):
        load(tmp_path / "t.csv")


# --- tars and arrays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["pictures first", "labels first", "one apart"])
def test_samples_whose_files_stand_apart_are_told_of(order, tmp_path):
    pictures, labels = [f"{n}.png" for n in range(4)], [f"{n}.cls" for n in range(4)]
    names = {
        "pictures first": pictures + labels,
        "labels first": labels + pictures,
        "one apart": ["0.png", "0.cls", "1.png", "2.png", "2.cls", "1.cls"],
    }[order]
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in names:
            put(tar, name, picture(int(name[0])) if name.endswith("png") else name[:1].encode())
    with pytest.raises(BadData, match=r"the files of the sample \d do not stand together; .*tar --sort=name"):
        load(tmp_path / "t.tar")


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_names_of_arrays(kind, tmp_path, caplog):
    images, labels = pixels([0, 1, 2, 3]), np.array([0, 1, 0, 1])

    def save(root: Path, **named: np.ndarray) -> Path:
        root.mkdir()
        if kind == "npz":
            np.savez(root / "a.npz", **named)
            return root / "a.npz"
        for name, array in named.items():
            np.save(root / f"{name}.npy", array)
        return root

    capital = save(tmp_path / "a", X_train=images, Y_train=labels, X_test=images[:2], y_test=labels[:2])
    assert sizes(load(capital)) == {"train": 4, "test": 2}
    hidden = save(tmp_path / "b", train_images=images, train_labels=labels, test_images=images)
    assert sizes(load(hidden)) == {"train": 4}
    assert "the array test_images is left out, since images and labels of one split come in pairs" in caplog.text
    twice = save(tmp_path / "c", x_train=images, y_train=labels, train_images=images)
    with pytest.raises(BadData, match=r"has the arrays .* and .*, which mean the same; rename one"):
        load(twice)


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_validation_split_without_a_class_does_not_bar_the_others(form, tmp_path, caplog):
    cells = ["train"] * 4 + ["test"] * 2 + ["val"] * 2
    path = one_table(form, tmp_path, {"label": ["cat", "dog"] * 3 + ["cat"] * 2, "split": cells})
    assert sizes(load(path)) == {"train": 4, "test": 2, "validation": 2}
    assert "validation has no image of 'dog'" in caplog.text


@pytest.mark.parametrize("form", ["csv", "tar", "parquet"])
def test_a_class_of_one_training_image_is_told_of_by_name(form, tmp_path, caplog):
    load(labelled(form, tmp_path, ["finch", "finch", "owl", "owl", "wren"]))
    assert "train has one image only of the class 'wren'; a probe needs two or more" in caplog.text
