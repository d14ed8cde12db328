"""Every example of docs/datasets.md, run on data sets as the page describes them."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forms import parquet, rows, tars
from tiny import noise_images, save_images

from mlfusion import cli, datasets
from mlfusion.datasets.places import SPLIT_PLACES
from mlfusion.specs.definitions import all_definitions
from mlfusion.specs.identity import MAX_PIXELS
from mlfusion.specs.options import ReadOptions

PAGE = Path(__file__).parent.parent / "docs" / "datasets.md"


def blocks(language: str) -> list[str]:
    return [part.split("\n```")[0] for part in PAGE.read_text().split(f"```{language}\n")[1:]]


def commands(language: str) -> list[str]:
    return [line for block in blocks(language) for line in block.splitlines() if line.startswith("mlfusion ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folders and files that the page speaks of."""
    root = tmp_path_factory.mktemp("page")
    birds = datasets.load(str(save_images(root / "birds", {"train": 6, "test": 2}, ["finch", "owl"])))
    lines = ["split,path,species,grams"]
    for name, split in birds.splits.items():
        lines += [f"{name},birds/{path},{label},{20.5 + i}" for i, (path, label, _) in enumerate(rows(split))]
    (root / "weights.csv").write_text("\n".join(lines))
    slices = [f"birds/{path},{label},{i // 2}" for i, (path, label, _) in enumerate(rows(birds.split("train")))]
    (root / "slices.csv").write_text("\n".join(["path,label,patient", *slices]))
    tars(birds, root).rename(root / "shards")
    parquet(birds, root).rename(root / "photos")
    (root / "incoming" / "later").mkdir(parents=True)
    for number, image in enumerate(noise_images(3)):
        image.save(root / "incoming" / ("later" if number > 1 else "") / f"{number:03}.png")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 9), np.uint8)
    labels = np.arange(12) % 2
    np.savez(
        root / "scans.npz",
        train_images=pixels[:8],
        train_labels=labels[:8],
        test_images=pixels[8:],
        test_labels=labels[8:],
    )
    deep = np.random.default_rng(0).integers(0, 4096, (12, 9, 9)).astype(np.uint16)
    np.savez(
        root / "xrays.npz",
        train_images=deep[:8],
        train_labels=labels[:8],
        test_images=deep[8:],
        test_labels=labels[8:],
    )
    return root


def run(line: str, monkeypatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize("line", commands("sh"))
def test_commands_of_the_page_run(line, place, monkeypatch):
    monkeypatch.chdir(place)
    assert not run(line, monkeypatch)


@pytest.mark.parametrize("line", commands("sh hub"))
def test_commands_that_need_the_hub_say_so(line, monkeypatch, capfd):
    assert run(line, monkeypatch) == 1
    assert "the hub cannot be reached" in capfd.readouterr().err


@pytest.mark.parametrize("code", blocks("python"))
def test_code_of_the_page_runs(code, place, monkeypatch):
    monkeypatch.chdir(place)
    exec(code, {})


def test_the_page_names_every_option_and_every_form_of_file():
    text = PAGE.read_text()
    for one in all_definitions(ReadOptions).values():
        assert f"--{one.flag}" in text, one.flag
    for suffix in datasets.SUFFIXES:
        assert suffix in text
    assert f"{MAX_PIXELS:,}" in text


def test_the_table_of_places_is_that_of_the_code():
    script = PAGE.parent.parent / "benchmarks" / "places.py"
    text = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert f"<!-- places -->\n{text}<!-- end of places -->" in PAGE.read_text()
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines()[2:7]] == list(SPLIT_PLACES)
