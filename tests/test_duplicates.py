"""Images that are in train and in test are counted, told of, and left out of train on request."""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sklearn.datasets
from PIL import Image, ImageEnhance
from tiny import save_features

import mlfusion
from mlfusion import cli
from mlfusion.errors import NotCached
from mlfusion.report import write_page
from mlfusion.results import Results, Row
from mlfusion.store import FeatureStore, overlap
from mlfusion.store.features import split_pairs

MODEL = "formula-vit"
TILE = 64


def photographs() -> list[Image.Image]:
    """Tiles of the two photographs that scikit-learn ships: the first half is of one, the second of the other."""
    tiles = []
    for photo in sklearn.datasets.load_sample_images().images:
        places = [(top, left) for top in range(150, 400, TILE) for left in range(0, 600, TILE)][:24]
        tiles += [Image.fromarray(photo[top : top + TILE, left : left + TILE]) for top, left in places]
    return tiles


def png(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def jpeg(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "JPEG", quality=90)
    return file.getvalue()


Files = dict[str, list[tuple[int, bytes]]]
"""Split → (class, bytes) of every image."""


def files(copied: list[bytes] | None = None) -> Files:
    """Sixteen images of each class in train and eight in test; then `copied`, of class 0, at the end of train."""
    tiles, made = photographs(), {"train": [], "test": []}
    for n, tile in enumerate(tiles):
        made["train" if n % 3 else "test"].append((n // 24, png(tile)))
    made["train"] += [(0, body) for body in copied or []]
    return made


def as_folders(made: Files, root: Path) -> Path:
    for split, images in made.items():
        for n, (label, body) in enumerate(images):
            path = root / split / "ab"[label] / f"{n:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
    return root


def as_parquet(made: Files, root: Path) -> Path:
    root.mkdir()
    for split, images in made.items():
        cells = [{"bytes": body, "path": None} for _, body in images]
        table = pyarrow.table({"image": cells, "label": [label for label, _ in images]})
        pyarrow.parquet.write_table(table, root / f"{split}.parquet")
    return root


def as_arrays(made: Files, root: Path) -> Path:
    body = {}
    for split, images in made.items():
        body[f"{split}_images"] = np.stack([np.asarray(Image.open(io.BytesIO(file))) for _, file in images])
        body[f"{split}_labels"] = np.array([label for label, _ in images])
    np.savez(root.with_suffix(".npz"), **body)
    return root.with_suffix(".npz")


def probed(dataset: Path, **options: object) -> tuple[Row, list[str]]:
    """A row of ridge regression, and what was said."""
    told: list[str] = []
    mlfusion.extract(MODEL, str(dataset), layers="last", tokens="cls", log=told.append)
    done = mlfusion.probe(str(dataset), probes="cls-last/ridge", seeds=(0,), log=told.append, **options)
    return done.rows[0], told


@pytest.mark.slow
@pytest.mark.parametrize("write", [as_folders, as_parquet, as_arrays])
def test_images_with_equal_bytes_are_counted_and_told_of_by_both_stages(write) -> None:
    tests = files()["test"]
    row, told = probed(write(files([body for label, body in tests[:5] if label == 0]), Path("set")))
    assert row.duplicates is not None and (row.duplicates.bytes, row.duplicates.near) == (5, 0)
    assert sum("5 of 16 test images of set are byte for byte in train too" in line for line in told) == 1
    assert sum("5 of 16 test images are in train too: 5 byte for byte, 0 as near copies" in line for line in told) == 1
    assert row.images.train == 32 + 5


def test_without_copies_nothing_is_said() -> None:
    row, told = probed(as_folders(files(), Path("set")))
    assert row.duplicates is not None and (row.duplicates.bytes, row.duplicates.near) == (0, 0)
    assert not any("train too" in line for line in told)


@pytest.mark.slow
def test_near_copies_are_found_and_told_apart() -> None:
    """Equal pixels in another file, a JPEG, a smaller and a brighter one: each of another test image."""
    a, b, c, d = (Image.open(io.BytesIO(body)) for _, body in files()["test"][:4])
    a.save(other := io.BytesIO(), "BMP")
    copied = [other.getvalue(), jpeg(b), png(c.resize((58, 58))), png(ImageEnhance.Brightness(d).enhance(1.1))]
    row, told = probed(as_folders(files(copied), Path("set")))
    assert row.duplicates is not None and (row.duplicates.bytes, row.duplicates.near) == (0, 4)
    assert any("4 of 16 test images are in train too: 0 byte for byte, 4 as near copies" in line for line in told)


@pytest.mark.slow
@pytest.mark.parametrize("write", [as_folders, as_parquet])
def test_a_probe_without_copies_is_that_of_a_data_set_without_them(write) -> None:
    tests = files()["test"]
    copied = [tests[0][1], jpeg(Image.open(io.BytesIO(tests[1][1])))]
    data = write(files(copied), Path("set"))
    all_of_it, _ = probed(data)
    row, told = probed(data, drop_duplicates=True)
    by_hand, _ = probed(write(files(), Path("clean")))
    assert all_of_it.images.train == 34 and row.images.train == by_hand.images.train == 32
    assert (row.val, row.test, row.train, row.selected) == (by_hand.val, by_hand.test, by_hand.train, by_hand.selected)
    assert row.id != all_of_it.id and row.options() == "duplicates dropped" and row.search().drop_duplicates
    assert not any("are in train too:" in line for line in told)
    again = mlfusion.rerun(row.id)
    assert again.same and again.again.images == row.images


def test_what_is_left_out_does_not_depend_on_what_happens_to_be_cached(tmp_path: Path) -> None:
    data = str(as_folders(files([files()["test"][0][1]]), Path("set")))
    mlfusion.extract(MODEL, data, layers="last", tokens="ap")
    [row] = mlfusion.probe(data, probes="ap-last/ridge", seeds=(0,)).rows
    assert row.duplicates is not None and (row.duplicates.bytes, row.duplicates.near) == (1, None)
    assert "near copies were not looked for" in row.duplicates_note()
    with pytest.raises(NotCached, match=r"lack cls of layers \d+; run: mlfusion extract .*--tokens cls@"):
        mlfusion.probe(data, probes="ap-last/ridge", seeds=(0,), drop_duplicates=True)


def test_a_comparison_that_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MAX_PRODUCTS", 100)
    row, _ = probed(as_folders(files(), Path("set")))
    assert row.duplicates is not None and row.duplicates.near is None


def test_near_copies_by_hand(tmp_path: Path) -> None:
    """Vectors at known angles, several steps long."""
    random = np.random.default_rng(0)
    train = random.normal(size=(300, 1, 48))
    test = random.normal(size=(40, 1, 48))
    test[7] = 2e-3 * train[120] + 1e-5  # the length does not count
    test[9] = -train[5]
    for name, tokens in (("train", train), ("test", test)):
        save_features(tmp_path, name, 1e3 * tokens, np.arange(len(tokens)) % 3)
    [pair] = split_pairs(FeatureStore(tmp_path), "d", "m")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(overlap, "STEP", 64)
        patch.setattr(overlap, "compared_pair", lambda model: (2, "all"))
        found = pair.overlap
    assert (found.bytes, found.near, found.train_rows.tolist()) == (0, 1, [120])


def test_duplicates_stand_under_the_scores_and_on_the_page(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    row, _ = probed(as_folders(files([files()["test"][0][1]]), Path("set")))
    sentence = "1 of 16 test images is in train too: 1 byte for byte, 0 as near copies"

    def said(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mlfusion", *words])
        with pytest.raises(SystemExit):
            cli.main()
        return " ".join(capfd.readouterr().out.split())

    assert sentence in said("report")
    assert "duplicates" in said("results", "show", row.id)
    said("report", "--markdown", "r.md")
    assert sentence in Path("r.md").read_text()
    write_page([row], Path("r.html"), results=Results("results"))
    assert sentence in Path("r.html").read_text()
