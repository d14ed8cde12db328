"""Train and test of a probe come from one reading of one data set, whatever names, paths and dates say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from tiny import save_images, save_model

import mlfusion
from mlfusion import datasets
from mlfusion.analysis import attention, gallery
from mlfusion.errors import BadData, NotCached
from mlfusion.probing import grids
from mlfusion.report import Strip
from mlfusion.results import Results, Row
from mlfusion.store import FeatureStore
from mlfusion.store.features import split_pairs

MODEL = "formula-vit"


@pytest.fixture
def short_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick grid, cut shorter: these tests are about what is read, not about scores."""
    grid = grids.Grid(learning_rates=(1e-2,), weight_decays=(1e-2,), dropouts=(0.0,), epochs=2, least_steps=10)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)


def extract(dataset: object, **options: object) -> list[str]:
    """Keys of the entries of a data set's splits."""
    return [one.entry.key for one in mlfusion.extract(MODEL, dataset, layers="last", tokens="cls", **options)]


def keys(dataset: str, model: str | None = MODEL) -> list[str]:
    """Keys of the train and test features that a probe reads."""
    [pair] = split_pairs(FeatureStore(), dataset, model)
    return list(pair.keys)


def probed(dataset: str) -> float:
    """Score of a nearest-neighbour probe on the test split."""
    [row] = mlfusion.probe(dataset, probes="cls-last/knn", grid="quick", seeds=(0,)).rows
    return row.test


def save_table(path: Path, columns: tuple[str, str] = ("reader1", "reader2")) -> Path:
    """A table of a dozen images a split, whose second column of labels is the opposite of the first."""
    random = np.random.default_rng(5)
    rows = []
    for n in range(24):
        colour = np.array([210, 60, 60] if n % 2 else [60, 60, 210])
        pixels = np.clip(colour + random.normal(0, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path.parent / f"{n}.png")
        words = ["benign", "malignant"]
        labels = dict(zip(columns, (words[n % 2], words[1 - n % 2]), strict=True))
        rows.append({"path": f"{n}.png", "split": "train" if n < 12 else "test", "key": f"image {n}"} | labels)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def save_arrays(path: Path, seed: int, order: tuple[int, ...] = (0, 1)) -> Path:
    """Arrays of red and blue images; with the order (1, 0) the classes have changed their names."""
    random = np.random.default_rng(seed)
    arrays = {}
    for split in ("train", "test"):
        colours = np.array([[210, 60, 60], [60, 60, 210]])[[n % 2 for n in range(16)]]
        noisy = colours[:, None, None] + random.normal(0, 30, (16, 32, 32, 3))
        arrays[f"{split}_images"] = np.clip(noisy, 0, 255).astype(np.uint8)
        arrays[f"{split}_labels"] = np.array([order[n % 2] for n in range(16)])
    np.savez(path, **arrays)
    return path


def save_parquet(folder: Path, seed: int, order: tuple[int, ...] = (0, 1)) -> Path:
    """The same images in Parquet files."""
    made = np.load(save_arrays(folder.parent / "made.npz", seed, order))
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        files = []
        for number, pixels in enumerate(made[f"{split}_images"]):
            Image.fromarray(pixels).save(file := folder.parent / f"{number}.png")
            files.append({"bytes": file.read_bytes(), "path": f"{number}.png"})
        table = pyarrow.table({"image": files, "label": made[f"{split}_labels"].tolist()})
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    return folder


# --- two data sets of one name ----------------------------------------------------------------------------------------


def test_two_folders_of_one_name_are_two_data_sets() -> None:
    first = save_images(Path("A/birds"), {"train": 4, "test": 2}, ("finch", "owl"))
    second = save_images(Path("B/birds"), {"train": 4, "test": 2}, ("owl", "finch"), seed=1)
    asked = extract(str(first))
    extract(str(second), splits="train")
    with pytest.raises(BadData, match=r"birds is the name of 2 sources .*A/birds.*B/birds.*--dataset .*A/birds"):
        keys("birds")
    with pytest.raises(BadData, match="name of 2 sources"):
        mlfusion.load_features(MODEL, "birds", "test", layers="last", tokens="cls")
    assert keys("A/birds") == asked
    with pytest.raises(
        NotCached, match=r"only train is cached. Run: mlfusion extract --model formula-vit --dataset \S*B/birds"
    ):
        keys("B/birds")


@pytest.mark.parametrize("save", [save_arrays, save_parquet])
def test_two_files_of_one_name_are_two_data_sets(save) -> None:
    paths = []
    for place, order in (("A", (0, 1)), ("B", (1, 0))):
        Path(place).mkdir()
        paths.append(str(save(Path(place, "set.npz" if save is save_arrays else "set"), seed=len(paths), order=order)))
    extract(paths[0])
    extract(paths[1], splits="train")
    with pytest.raises(BadData, match="set is the name of 2 sources"):
        mlfusion.probe("set")
    assert probed(paths[0]) == 1.0


def test_two_models_of_one_name_are_two_models() -> None:
    data = str(save_images(Path("set"), {"train": 4, "test": 2}))
    for number in (0, 1):
        folder = save_model("vit", Path(f"run{number}/vit"), seed=number)
        mlfusion.extract(str(folder), data, layers="last", tokens="cls")
    with pytest.raises(BadData, match=r"vit is the name of 2 sources .*run0/vit.*run1/vit.*--model"):
        keys(data, "vit")
    assert len(split_pairs(FeatureStore(), data, None)) == 2
    assert len({tuple(keys(data, f"run{n}/vit")) for n in (0, 1)}) == 2


def test_a_copy_of_a_data_set_is_the_same_one() -> None:
    here = save_images(Path("here/set"), {"train": 4, "test": 2})
    copy = Path(shutil.copytree(here, "scratch/set"))
    made = extract(str(here), splits="train") + extract(str(copy), splits="test")
    assert keys("set") == keys(str(here)) == keys(str(copy)) == made


# --- two readings of one data set -------------------------------------------------------------------------------------


def test_two_columns_of_one_table_are_two_readings() -> None:
    table = str(save_table(Path("tab.jsonl")))
    first = extract(table, label_column="reader1")
    extract(table, label_column="reader2", splits="train")
    assert keys(table) == first  # the only reading that has both splits
    with pytest.raises(NotCached, match=r"only train is cached. Run: .*--label-column reader2"):
        keys("tab:reader2")
    assert probed(table) == 1.0


def test_two_id_columns_of_one_table_are_two_readings() -> None:
    """Nothing but the ids differs, and the name is the same."""
    table = str(save_table(Path("tab.jsonl"), ("label", "other")))
    extract(table)
    extract(table, splits="train", id_column="path", target="class")
    assert len(keys(table)) == 2  # paths are the ids that a table has anyway
    extract(table, splits="train", id_column="key")
    with pytest.raises(NotCached, match=r"another reading .*--id-column key"):
        keys(table)


def test_a_split_that_grew_is_not_tested_on_the_old_one() -> None:
    folder = save_images(Path("set"), {"train": 4, "test": 4})
    extract(str(folder))
    for name in ("blue", "green", "red"):
        (folder / "test" / name / "000.png").rename(folder / "train" / name / "new.png")
    extract(str(folder), splits="train")
    for attempt in (
        lambda: keys("set"),
        lambda: mlfusion.load_features(MODEL, "set", "test", layers="last", tokens="cls"),
    ):
        with pytest.raises(NotCached, match=r"train features .*another reading.* mlfusion extract .*--dataset \S*set"):
            attempt()
    grown = extract(str(folder))
    assert keys("set") == grown


@pytest.mark.parametrize("save", [save_arrays, save_parquet])
def test_a_file_that_was_written_again_is_another_reading(save) -> None:
    path = Path("set.npz" if save is save_arrays else "set")
    save(path, 0)
    extract(str(path))
    save(path, 1, (1, 0))
    extract(str(path), splits="test")
    with pytest.raises(NotCached, match=r"test features .*another reading"):
        mlfusion.probe(str(path))
    made = extract(str(path))
    assert keys(str(path)) == made and probed(str(path)) == 1.0
    save(path, 0)
    again = extract(str(path))
    assert again != made and keys(str(path)) == again  # extracted last, though nothing was computed


def test_a_test_split_that_changed_leaves_train_where_it_is() -> None:
    folder = save_images(Path("set"), {"train": 4, "test": 4})
    before = extract(str(folder))
    (folder / "test" / "red" / "000.png").unlink()
    after = extract(str(folder))
    assert before[0] == after[0] and before[1] != after[1] and keys("set") == after


def test_a_third_split_that_changed_is_another_reading() -> None:
    """Images moved from train to validation, while test=validation is what probes test on."""
    folder = save_images(Path("set"), {"train": 4, "validation": 4})
    made = extract(str(folder), splits="train,test=validation")
    assert keys("set") == made
    for name in ("blue", "green", "red"):
        (folder / "validation" / name / "000.png").rename(folder / "train" / name / "new.png")
    extract(str(folder), splits="train")
    with pytest.raises(NotCached, match="another reading"):
        keys("set")


def test_arrays_in_memory_are_read_by_their_content() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)

    def data(shift: int) -> datasets.DataSet:
        labels = [(n + shift) % 2 for n in range(24)]
        parts = {"train": (pixels[:16], labels[:16]), "test": (pixels[16:], labels[16:])}
        return mlfusion.array_dataset("mine", parts, classes=["a", "b"])

    first = extract(data(0))
    extract(data(1), splits="train")
    with pytest.raises(NotCached, match="another reading"):
        keys("mine")
    assert extract(data(0)) == first == keys("mine")


def test_a_reading_is_recorded_above_a_cache_that_is_only_read(tmp_path: Path) -> None:
    """The train split lies in the shared cache already, and the reading in which the test split changed lies in mine."""
    folder = save_images(Path("set"), {"train": 4, "test": 4})
    extract(str(folder), cache="shared")
    (folder / "test" / "red" / "000.png").unlink()
    shutil.copytree("shared", "frozen")
    for path in Path("frozen").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        made = extract(str(folder), cache="mine:frozen")
        [pair] = split_pairs(FeatureStore("mine:frozen"), "set", MODEL)
        assert list(pair.keys) == made
    finally:
        for path in Path("frozen").rglob("*"):
            path.chmod(0o755)


# --- pictures of a row ------------------------------------------------------------------------------------------------


def attending(dataset: str, **options: object) -> Row:
    """A row of an attentive probe over all tokens of the last layer."""
    mlfusion.extract(MODEL, dataset, layers="last", tokens="cls,ap,all", **options)
    [row] = mlfusion.probe(dataset, probes="aat", grid="quick", seeds=(0,)).rows
    return row


@pytest.mark.parametrize("save", [save_arrays, save_parquet])
def test_nothing_is_drawn_on_images_that_took_the_place_of_others(save, short_grid: None) -> None:
    """Ids are row numbers here, so that only the bytes tell the images apart."""
    path = Path("set.npz" if save is save_arrays else "set")
    save(path, 0)
    row = attending(str(path))
    assert attention.row_images(row).ids == [f"test/{n}" for n in range(16)]
    assert gallery.of_row(row, Results("results"))
    save(path, 1)
    for attempt in (lambda: attention.row_images(row), lambda: gallery.of_row(row, Results("results"))):
        with pytest.raises(BadData, match="other test images than row"):
            attempt()
    told: list[str] = []
    assert not gallery.of_study([row], Results("results"), log=told.append)
    assert "other test images" in told[0]


def test_one_image_that_was_edited_is_another(short_grid: None) -> None:
    folder = save_images(Path("set"), {"train": 4, "test": 2})
    row = attending(str(folder))
    shutil.copy(folder / "train/red/000.png", folder / "train/red/001.png")
    assert len(attention.row_images(row).ids) == 6  # nothing is drawn on images of train
    shutil.copy(folder / "test/red/000.png", folder / "test/red/001.png")
    with pytest.raises(BadData, match="other test images than row"):
        attention.row_images(row)


@pytest.mark.slow
def test_pictures_are_found_by_the_options_that_the_row_keeps(
    short_grid: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_images(Path("all"), {"every": 8, "validation": 3}, ("finch", "owl"))
    Path("paths").mkdir()
    table = save_table(tmp_path / "tab.jsonl").rename("paths/tab.jsonl")
    for dataset, options, first in (
        (folder / "every", {"split_ratio": "0.5/0.5", "split_seed": 3}, None),
        (table, {"label_column": "reader2", "id_column": "key", "image_root": "."}, "image 12"),
        (table, {"label_column": "reader1", "image_root": ".", "splits": "train,test=train"}, "0.png"),
    ):
        row = attending(str(dataset), **options)
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir("/")
            images = attention.row_images(row, cache=tmp_path / "cache")
            entry = FeatureStore(tmp_path / "cache").by_key(row.features[1])
        assert entry is not None and tuple(images.ids) == entry.samples.ids
        assert first is None or images.ids[0] == first
        assert strips_of(row)


def strips_of(row: Row) -> list[Strip]:
    """The strips that `mlfusion attend --out` draws."""
    return gallery.of_row(row, Results("results"))
