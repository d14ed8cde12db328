"""A name means the same in every command: the catalogue's row, a folder, a snapshot of the hub's cache, a path with colons."""

import csv
import json
import logging
import os
from pathlib import Path

import hub
import pytest
from forms import rows
from test_models import at_hub
from test_pictures import run
from tiny import save_images, save_model

import mlfusion
from mlfusion import datasets, models
from mlfusion.errors import BadData, BadModel, UnknownName
from mlfusion.models import preprocessing
from mlfusion.system import references
from mlfusion.system.references import parse_model
from mlfusion.workflows import recipe
from mlfusion.workflows.doctor import doctor

COMMIT = hub.COMMIT


@pytest.fixture(autouse=True)
def told_anew():
    references._report_shadowed.cache_clear()


# --- names of the catalogue ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_data_set_of_the_catalogue_stays_so_beside_a_folder_of_its_name(tmp_path, capfd):
    save_images(tmp_path / "digits", {"train": 4, "test": 2})
    for words in (
        ["data"],
        ["extract", "--layers", "last", "--dataset"],
        ["probe", "--probe", "cls-last/knn", "--dataset"],
    ):
        references._report_shadowed.cache_clear()
        assert run(*words, "digits") == 0
        assert "digits is the data set of the catalogue; type ./digits" in capfd.readouterr().err
    assert len(mlfusion.load_features("formula-vit", "digits", "test", layers="last").labels) == 355  # a fifth of 1,797
    assert run("extract", "--layers", "last", "--dataset", "./digits") == 0
    assert "catalogue" not in capfd.readouterr().err
    assert len(mlfusion.load_features("formula-vit", "./digits", "test", layers="last").labels) == 6
    assert len(mlfusion.load_features("formula-vit", str(tmp_path / "digits"), "test", layers="last").labels) == 6


def test_a_model_of_the_catalogue_stays_so_beside_a_folder_of_its_name(tmp_path, caplog):
    save_model("vit", tmp_path / "formula-vit")
    save_images(tmp_path / "birds", {"train": 2, "test": 1})
    with caplog.at_level(logging.WARNING):
        mlfusion.extract("formula-vit", "birds", layers="last")
    assert [record.message for record in caplog.records if "catalogue" in record.message] == [
        "formula-vit is the model of the catalogue; type ./formula-vit for the folder or file of that name here"
    ]
    assert mlfusion.load_features("formula-vit", "birds", "train", layers="last").tokens.shape[-1] == 128
    mlfusion.extract("./formula-vit", "birds", layers="last")
    assert mlfusion.load_features("./formula-vit", "birds", "train", layers="last").tokens.shape[-1] == 32


# --- colons ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "name", "suffix"),
    [
        ("run 12:30/model", "run 12:30/model", ""),
        ("run 12:30/model:block", "run 12:30/model", ":block"),
        ("run 12:30", "run 12:30", ""),
        ("run 12:30:block,hidden_act=gelu", "run 12:30", ":block,hidden_act=gelu"),
        ("gone 12:30/model:attn", "gone 12:30/model", ":attn"),  # no such folder
        ("someone/model:hidden_act=a/b", "someone/model", ":hidden_act=a/b"),
        ("embedded:formula-vit:mlp", "embedded:formula-vit", ":mlp"),
        ("clip-vit-b16:block", "clip-vit-b16", ":block"),
    ],
)
def test_colons_in_a_path_are_of_the_path(word, name, suffix, tmp_path):
    (tmp_path / "run 12:30/model").mkdir(parents=True)
    ref = parse_model(word)
    assert (ref.name, ref.suffix) == (name, suffix)
    assert parse_model(str(ref)) == ref
    with pytest.raises(UnknownName, match="no hook point named 'blok'"):
        parse_model(f"{name}:blok")


def test_a_model_whose_path_has_a_colon_goes_through_every_command(tmp_path):
    save_model("vit", tmp_path / "run 12:30/model")
    save_images(tmp_path / "day 1:2/birds", {"train": 10, "test": 4})
    model, birds = "run 12:30/model", "day 1:2/birds"
    assert run("extract", "--model", f"{model}:block", "--dataset", birds, "--layers", "last") == 0
    words = ("--probe", "cls-last/knn", "--seeds", "0", "--save")
    assert run("probe", "--model", f"{model}:block", "--dataset", birds, *words) == 0
    [saved] = Path("results").rglob("card.json")
    assert run("predict", "--probe", str(saved.parent), f"{birds}/test/red/000.png") == 0
    Path("r.toml").write_text(
        '[[study]]\nmodels = ["$DATA/run 12:30/model:block"]\ndatasets = ["$DATA/day 1:2/birds"]\nprobes = ["cls-last/knn"]\n'
    )
    assert run("doctor", model) == 0
    assert recipe._resolve_data("$DATA/run 12:30/model:block", tmp_path)[1] == []
    assert recipe._resolve_data("$DATA/run 12:31/model:block", tmp_path)[1]


# --- snapshots of the hub's cache ------------------------------------------------------------------------------------


def snapshot(folder: Path, repository: Path) -> Path:
    """A folder as the hub's client keeps it: each file in blobs, and a link to it below the commit."""
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        link = repository / "snapshots" / COMMIT / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repository / "snapshots" / COMMIT


def birds(root: Path) -> Path:
    """Class folders, and a table over them."""
    save_images(root, {"train": 2, "test": 1})
    with open(root / "all.csv", "w", newline="") as file:
        lines = [(p.parts[-3], p.relative_to(root).as_posix(), p.parts[-2]) for p in sorted(root.rglob("*.png"))]
        csv.writer(file).writerows([("split", "path", "label"), *lines])
    return root


def test_a_snapshot_is_the_data_set_that_was_downloaded(tmp_path):
    plain = birds(tmp_path / "plain")
    place = snapshot(plain, tmp_path / "hub/datasets--org--birds")
    for inner, name in (("", "birds"), ("all.csv", "all")):
        data, want = datasets.load(str(place / inner)), datasets.load(str(plain / inner))
        assert data.name == name
        assert {name: rows(split) for name, split in data.splits.items()} == {
            name: rows(split) for name, split in want.splits.items()
        }


def test_links_of_a_snapshot_lead_to_its_own_repository_only(tmp_path):
    place = snapshot(birds(tmp_path / "plain"), tmp_path / "hub/datasets--org--birds")
    other = snapshot(birds(tmp_path / "plain2"), tmp_path / "hub/datasets--org--other")
    for target in (next((other.parent.parent / "blobs").iterdir()), tmp_path / "plain/train/red/000.png"):
        link = place / "train/red/stranger.png"
        link.symlink_to(target)
        with pytest.raises(BadData, match=r"stranger\.png is a link that leads out of"):
            datasets.load(str(place))
        (place / "out.csv").write_text("path,label\ntrain/red/stranger.png,a\ntrain/red/000.png,b\n")
        with pytest.raises(BadData, match=r"stranger\.png leads out of"):
            datasets.load(str(place / "out.csv"))
        link.unlink()


def test_a_model_of_a_snapshot_is_called_by_its_repository(tmp_path):
    plain = save_model("vit", tmp_path / "plain")
    place = snapshot(plain, tmp_path / "hub/models--org--tiny")
    found = models.locate(f"{place}:block")
    assert (found.name, found.source) == ("tiny:block", f"{place}:block")
    steps = preprocessing.read(found.folder).key()
    assert models.identify(models.locate(str(place)), steps) == models.identify(models.locate(str(plain)), steps)
    assert models.locate(str(plain)).name == "plain"


# --- settings of a processor in the files of transformers 5 ----------------------------------------------------------


@pytest.mark.slow
def test_settings_nested_by_transformers_5_are_fetched_and_used(tmp_path):
    folder = save_model("clip", tmp_path / "m")
    want = preprocessing.read(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    nested = {"processor_class": "CLIPProcessor", "image_processor": settings}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert preprocessing.read(folder) == want
    # As in transformers, nested settings come before those of the older file, and a file without them does not count.
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 2}))
    assert preprocessing.read(folder) == want
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert preprocessing.read(folder).resample == "bilinear"
    (folder / "processor_config.json").write_text(json.dumps(nested))
    (folder / "preprocessor_config.json").unlink()
    images = save_images(tmp_path / "d", {"train": 2, "test": 2})
    with hub.serving({"someone/tiny": folder}) as (endpoint, asked):
        words = ("extract", "-m", "someone/tiny", "-d", str(images), "--split", "train", "--layers", "last", "--json")
        said = at_hub(endpoint, tmp_path / "home", *words)
    assert said.returncode == 0, said.stderr
    assert any(path.endswith("/processor_config.json") for path in asked)
    [one] = json.loads(said.stdout)["features"]
    entry = json.loads((Path(one["path"]) / "entry.json").read_text())
    assert (entry["model"]["preprocess"], entry["model"]["name"]) == (want.key(), "tiny")


# --- paths that are not there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["/not/there", "./nope", "../nope", "~/nope/x", "a/b/c", "photos/mine"])
def test_a_path_that_is_not_there_is_never_an_id_of_the_hub(reference, tmp_path, monkeypatch):
    (tmp_path / "photos" / "mien").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = os.path.abspath(os.path.expanduser(reference))
    near = "mien" if reference == "photos/mine" else ""
    with pytest.raises(
        BadData, match=f"there is no folder or file {path}.*{near}.*Allowed: a folder or file that is there"
    ):
        datasets.load(reference)
    with pytest.raises(BadModel, match=f"there is no folder or file {path}.*{near}.*Allowed: a folder that is there"):
        models.locate(reference)
    [finding] = [finding for finding in doctor(reference, device="cpu") if finding.check == "name"]
    assert finding.state == "problem" and path in finding.description


@pytest.mark.parametrize("reference", ["owner/name", "uoft-cs/cifar10", "name"])
def test_an_id_of_the_hub_is_no_path(reference):
    assert references.missing_path(reference) == ""
