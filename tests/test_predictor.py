"""A probe that is held: every form of image, several threads, the stored test predictions, files of predictions, bad images."""

import csv
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from tiny import save_images, save_model

import mlfusion
from mlfusion import cli, datasets
from mlfusion.errors import BadData, ResultsUnusable, UnknownName
from mlfusion.results import Results


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, images of three colours, and saved probes: of the classes, and of a number."""
    root = tmp_path_factory.mktemp("predictor")
    save_model("vit", root / "vit")
    data = save_images(root / "colours", {"train": 8, "test": 4})
    files = sorted(data.rglob("*.png"))
    lines = [
        f"{file.relative_to(root)},{np.asarray(Image.open(file))[..., 0].mean()},{file.parts[-3]}" for file in files
    ]
    (root / "red.csv").write_text("\n".join(["path,redness,split", *lines]) + "\n")
    where = {"cache": root / "cache"}
    mlfusion.extract(str(root / "vit"), str(data), **where)
    mlfusion.extract(str(root / "vit"), str(root / "red.csv"), target="number", **where)
    stored = {**where, "results": root / "results", "save": True, "grid": "quick", "seeds": (0,)}
    mlfusion.probe(str(data), probes="cls+ap-last/ridge", **stored)
    mlfusion.probe(str(root / "red.csv"), probes="ap-last/ridge", **stored)
    return root


def row_of(root: Path, dataset: str) -> Any:
    rows = Results(root / "results").rows(dataset=dataset)
    [row] = [row for row in rows if (root / "results" / "probes" / row.id).exists()]
    return row


def files_of(root: Path) -> list[Path]:
    return sorted((root / "colours" / "test").rglob("*.png"))


@pytest.fixture(scope="module")
def predictor(root: Path) -> Any:
    return mlfusion.load_probe(root / "results" / "probes" / row_of(root, "colours").id)


def test_every_form_of_one_image_gives_one_answer(root: Path, predictor: Any) -> None:
    file = files_of(root)[5]
    pixels = np.asarray(Image.open(file).convert("RGB"))
    forms = [str(file), file, file.read_bytes(), Image.open(file), pixels, Image.fromarray(pixels).convert("RGBA")]
    expected = predictor.predict_proba(file)
    assert expected.shape == (3,) and expected.dtype == np.float32 and expected.sum() == pytest.approx(1)
    for form in forms:
        np.testing.assert_array_equal(predictor.predict_proba(form), expected)
        assert predictor.predict(form) == predictor.classes_[expected.argmax()]
    np.testing.assert_allclose(predictor.predict_proba(forms), np.tile(expected, (6, 1)), atol=1e-6)
    assert predictor.predict(forms) == [predictor.predict(file)] * 6
    assert predictor.predict([file]) == [predictor.predict(file)] and predictor.predict_proba([file]).shape == (1, 3)
    np.testing.assert_allclose(predictor.predict_proba(np.stack([pixels, pixels])), [expected] * 2, atol=1e-6)
    grey = np.arange(48 * 40, dtype=np.uint8).reshape(48, 40)
    np.testing.assert_array_equal(
        predictor.predict_proba(grey), predictor.predict_proba(np.repeat(grey[..., None], 3, 2))
    )
    assert predictor.predict([]) == [] and predictor.predict_proba([]).shape == (0, 3)
    assert predictor.classes_.tolist() == ["blue", "green", "red"]


def test_answers_are_the_stored_test_predictions(root: Path, predictor: Any) -> None:
    """Tokens are rounded to float16 in the cache and here; a forward pass of another batch may round one the other way."""
    row = row_of(root, "colours")
    arrays = Results(root / "results").arrays(row)
    split = datasets.load(str(root / "colours")).split("test")
    made = predictor.predict_proba([root / "colours" / one for one in split.ids])
    np.testing.assert_allclose(made, arrays["probabilities"], atol=1e-3)
    names = np.array(row.classes)[arrays["probabilities"].argmax(1)]
    assert predictor.predict([root / "colours" / one for one in split.ids]) == names.tolist()


def test_numbers_are_floats_and_the_stored_ones(root: Path) -> None:
    row = row_of(root, "red")
    predictor, arrays = mlfusion.load_probe(row.id, results=root / "results"), Results(root / "results").arrays(row)
    ids = [root / one for one in datasets.load(str(root / "red.csv"), mlfusion.ReadOptions()).split("test").ids]
    made = predictor.predict(ids)
    np.testing.assert_allclose(made, arrays["probabilities"][:, 0] + arrays["origin"], rtol=1e-3, atol=0.1)
    assert isinstance(predictor.predict(ids[0]), float) and made.dtype == np.float64
    assert predictor.classes_.shape == (0,)
    with pytest.raises(BadData, match="predicts numbers; they have no probabilities: call predict"):
        predictor.predict_proba(ids)


@pytest.mark.long
def test_a_thousand_requests_of_eight_threads(root: Path, predictor: Any) -> None:
    files = files_of(root)
    requests = [files[number % len(files)] for number in range(1000)]
    expected = {file: predictor.predict_proba(file) for file in files}
    with ThreadPoolExecutor(8) as pool:
        for file, made in zip(requests, pool.map(predictor.predict_proba, requests), strict=True):
            np.testing.assert_array_equal(made, expected[file])


@pytest.mark.slow
def test_the_embedded_models_stored_predictions(tmp_path: Path) -> None:
    digits = datasets.load("digits")
    parts = {name: digits.split(name).take(np.arange(count), name) for name, count in (("train", 120), ("test", 60))}
    pixels = {name: np.stack([np.asarray(part.image(n)) for n in range(len(part))]) for name, part in parts.items()}
    data = mlfusion.array_dataset("few", {name: (pixels[name], part.labels) for name, part in parts.items()})
    mlfusion.extract("formula-vit", data, batch_size=16)
    [row] = mlfusion.probe("few", probes="cls+ap-all-layers/ridge", seeds=(0,), save=True).rows
    made = mlfusion.load_probe(row.id).predict_proba(pixels["test"])
    stored = Results("results").arrays(row)["probabilities"]
    np.testing.assert_allclose(made, stored, atol=5e-3)
    assert (made.argmax(1) == stored.argmax(1)).mean() > 0.98


@pytest.mark.long
def test_deit_tinys_stored_predictions(shared: Path, tmp_path: Path) -> None:
    model, data = str(shared / "weights" / "deit_tiny_patch16_224"), shared / "flowers5"
    mlfusion.extract(model, str(data), layers="last")
    [row] = mlfusion.probe(str(data), probes="cls-last/linear", grid="quick", seeds=(0,), save=True).rows
    split = datasets.load(str(data)).split("test")
    made = mlfusion.load_probe(row.id).predict_proba([split.read(n) for n in range(len(split))])
    stored = Results("results").arrays(row)["probabilities"]
    np.testing.assert_allclose(made, stored, atol=5e-3)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_bad_image_is_named_and_its_bytes_are_not_printed(root: Path, predictor: Any, tmp_path: Path) -> None:
    good, broken = files_of(root)[0], tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8secret bytes")
    for images, name in (
        ([good, b"secret bytes"], r"images\[1\] cannot be read: not an image"),
        (b"secret bytes", "the image cannot be read: not an image"),
        (b"", "the image cannot be read: the file is empty"),
        (broken, f"{broken} cannot be read: "),
        ([good, "nowhere.png"], "nowhere.png cannot be read: No such file"),
        ("a\0b", "cannot be read: embedded null"),
        ("secret bytes" * 500, r"… \(6,000 characters\) cannot be read: File name too long"),
        (tmp_path, f"{tmp_path} is a folder; allowed: a regular file"),
        (np.zeros((4, 4, 4), np.uint8), r"the image is an array \[4, 4, 4\] of uint8; allowed: a path, the bytes"),
        (np.zeros((4, 4)), r"an array \[4, 4\] of float64; allowed"),
        (np.zeros((0, 4), np.uint8), r"an array \[0, 4\] of uint8; allowed"),
        (Image.new("F", (4, 4)), "the image cannot be read: 32-bit pixels"),
    ):
        with pytest.raises(BadData, match=name) as raised:
            predictor.predict(images)
        assert str(raised.value).count("secret bytes") < 20
    limited = mlfusion.load_probe(predictor.folder, max_pixels=100)
    pixels = np.asarray(Image.open(good))
    for image in (good, Image.fromarray(pixels), pixels):
        with pytest.raises(BadData, match="pixels; allowed are 100"):
            limited.predict(image)


def test_a_probe_is_found_by_the_id_of_its_result(root: Path) -> None:
    row, results = row_of(root, "colours"), root / "results"
    mlfusion.extract(str(root / "vit"), str(root / "colours"), cache=root / "cache")
    [unsaved] = mlfusion.probe(
        str(root / "colours"), probes="cls-last/ridge", cache=root / "cache", results=results, grid="quick", seeds=(0,)
    ).rows
    assert mlfusion.load_probe(row.id[:9], results=results).card.probe == "cls+ap-last/ridge"
    with pytest.raises(ResultsUnusable, match=f"result {unsaved.id} was not kept: .*results rerun {unsaved.id} --keep"):
        mlfusion.load_probe(unsaved.id, results=results)
    with pytest.raises(UnknownName, match="no result named 'r0000000'"):
        mlfusion.load_probe("r0000000", results=results)
    with pytest.raises(ResultsUnusable, match=r"no probe in '/.*/nowhere'; allowed: a folder .* or the id of a result"):
        mlfusion.load_probe("nowhere", results=results)
    with pytest.raises(ResultsUnusable, match="no results"):
        mlfusion.load_probe("r12")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], root: Path) -> Any:
    probe = ("--probe", row_of(root, "colours").id[:10], "--results", str(root / "results"))

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlfusion", "predict", *probe, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capfd.readouterr())

    return call


@pytest.fixture
def incoming(root: Path, tmp_path: Path) -> Path:
    """Two folders of images, one broken, one empty file, a text, and a hidden file."""
    (tmp_path / "incoming" / "b" / "c").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b/c/d.png", "b/x.png", "z.png")):
        (tmp_path / "incoming" / name).write_bytes(files_of(root)[3 * number].read_bytes())
    (tmp_path / "incoming" / "b" / "n.png").write_bytes(b"no image")
    (tmp_path / "incoming" / "e.jpg").touch()
    (tmp_path / "incoming" / "notes.txt").touch()
    (tmp_path / "incoming" / ".hidden.png").touch()
    return tmp_path / "incoming"


def test_folders_are_predicted_in_order_and_a_bad_image_ends_it(run: Any, incoming: Path) -> None:
    code, out, err = run(incoming)
    assert code == 1 and [line.partition(": ")[0] for line in out.splitlines()] == [
        str(incoming / name) for name in ("a.png", "b/c/d.png")
    ]
    assert err.count("error: ") == 1 and f"error: {incoming}/b/n.png cannot be read: not an image" in err
    assert "1 files are not read as images (1 .txt)" in err
    code, out, err = run(incoming, "--skip-bad", incoming / "a.png")
    assert code == 0 and [line.partition(": ")[0] for line in out.splitlines()] == [
        str(incoming / name) for name in ("a.png", "b/c/d.png", "b/x.png", "z.png", "a.png")
    ]
    assert f"skipped: {incoming}/e.jpg cannot be read: the file is empty" in err
    assert err.splitlines()[-1] == "2 images of 7 skipped, since they cannot be read"
    (incoming / "empty").mkdir()
    code, _, err = run(incoming / "empty")
    assert code == 1 and f"error: {incoming}/empty holds no images; allowed: " in err


def test_files_of_predictions_hold_what_is_printed(run: Any, incoming: Path, tmp_path: Path) -> None:
    printed = json.loads(run(incoming, "--skip-bad", "--json", "--top", "2")[1])
    assert len(printed["skipped"]) == 2
    for suffix in ("csv", "jsonl", "parquet"):
        out = tmp_path / "new" / f"out.{suffix}"
        code, said, err = run(incoming, "--skip-bad", "--top", "2", "--out", out)
        assert code == 0 and said == f"{out}: 4 predictions\n" and "2 images of 6 skipped" in err
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["out.csv", "out.jsonl", "out.parquet"]
    lines = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert lines == printed["predictions"]
    flat = [
        {"image": one["image"]}
        | {f"class_{n}": each["class"] for n, each in enumerate(one["top"], 1)}
        | {f"probability_{n}": each["probability"] for n, each in enumerate(one["top"], 1)}
        for one in lines
    ]
    assert pyarrow.parquet.read_table(tmp_path / "new" / "out.parquet").to_pylist() == flat
    with (tmp_path / "new" / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{k: float(v) if "prob" in k else v for k, v in line.items()} for line in table] == flat


def test_a_file_of_predictions_is_whole_or_not_there(run: Any, incoming: Path, tmp_path: Path) -> None:
    for suffix in ("csv", "jsonl", "parquet"):
        (tmp_path / "new").mkdir(exist_ok=True)
        out = tmp_path / "new" / f"out.{suffix}"
        out.write_text("before")
        code, said, err = run(incoming, "--out", out)
        assert (code, said, out.read_text()) == (1, "", "before") and "n.png cannot be read" in err
        assert [file.name for file in (tmp_path / "new").iterdir()] == [out.name]
        out.unlink()
    code, _, err = run(incoming, "--out", "x.xlsx")
    assert code == 1 and "no form of predictions named 'xlsx'" in err


def test_a_stream_takes_images_as_it_needs_them(root: Path, predictor: Any) -> None:
    """No more than two batches are taken before their predictions are."""
    taken = []

    def images() -> Any:
        for number in range(40):
            taken.append(number)
            yield files_of(root)[number % 12]

    stream = predictor.stream(images(), batch_size=4)
    for number, prediction in enumerate(stream):
        assert len(taken) <= number + 8 and prediction.image == str(files_of(root)[number % 12])
    assert len(taken) == 40
