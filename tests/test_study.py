"""A study does what is missing and nothing else, tells beforehand what that is, and loses nothing to one case that fails."""

import dataclasses
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from tiny import save_images, save_model
from typer.testing import CliRunner

from mlfusion import cli, load_features
from mlfusion.extraction import run
from mlfusion.probing import fitting, grids
from mlfusion.results import ImageCounts, Results
from mlfusion.specs.options import StorageOptions
from mlfusion.workflows import study
from mlfusion.workflows.recipe import Recipe, load

PROBES = ("cls-last/linear", "alf:h2", "aat")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_model("vit", tmp_path_factory.mktemp("model") / "tiny-vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("data")
    sizes = {"colours": 8, "shades": 5}
    return [str(save_images(root / name, {"train": n, "test": 4}, seed=n)) for name, n in sizes.items()]


@pytest.fixture(autouse=True)
def short_grid(monkeypatch):
    grid = grids.Grid(learning_rates=(1e-1, 1e-2), weight_decays=(1e-2,), dropouts=(0.0,), epochs=2, least_steps=10)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)
    monkeypatch.setattr(study, "TRIAL_SECONDS", 0.01)


@pytest.fixture
def recipe(model, data) -> Recipe:
    return Recipe.of((model,), tuple(data), PROBES, grid="quick", seeds=(0, 1))


def changed(recipe: Recipe, **fields) -> Recipe:
    """The same recipe with other values of some options."""
    parts: dict[str, Any] = {"features": recipe.features, "compute": recipe.compute, "search": recipe.search}
    for name, value in fields.items():
        for part, options in parts.items():
            if name in {field.name for field in dataclasses.fields(options)}:
                parts[part] = replace(options, **{name: value})
            elif part == "features" and name in {field.name for field in dataclasses.fields(options.read)}:
                parts[part] = replace(options, read=replace(options.read, **{name: value}))
    return replace(recipe, **parts)


def names(rows) -> list[tuple[str, str, int]]:
    return [(row.dataset, row.probe, row.seed) for row in rows]


@pytest.mark.slow
def test_the_plan_says_what_is_missing_and_the_study_does_just_that(recipe, tmp_path):
    planned = study.plan(recipe)
    assert not Path("cache").exists()
    assert not Path("results").exists()
    [first, second] = planned.cases
    assert (first.images_to_run, second.images_to_run) == (24 + 12, 15 + 12)
    assert (first.forward_passes, second.forward_passes) == (2, 2)
    # 4 layers of CLS and AP and 17 tokens of the last one, 32 wide, two bytes each
    assert planned.bytes_to_write == (36 + 27) * (2 * 4 + 17) * 32 * 2
    assert [len(case.missing) for case in planned.cases] == [6, 6]
    assert all(case.extract_seconds > 0 and case.probe_seconds > 0 for case in planned.cases)
    assert planned.seconds == pytest.approx(sum(c.extract_seconds + c.probe_seconds for c in planned.cases))

    done = study.run(planned)
    assert (done.trained, done.failures) == (12, ())
    assert sum(one.images_written for one in done.extracted) == 63
    written = sum(entry.stat().st_size for entry in Path("cache").rglob("*") if entry.is_file())
    assert written > planned.bytes_to_write
    wanted = ["cls-last/linear", "cls+ap-all-layers/attentive:h2", "all-tokens-last/attentive"]
    assert names(done.rows) == [(d, p, s) for d in ("colours", "shades") for p in wanted for s in (0, 1)]
    assert {row.selected.heads for row in done.rows} == {None, 2, 8}


@pytest.mark.slow
def test_what_is_there_is_not_done_again(recipe, monkeypatch):
    first = study.run(study.plan(recipe)).rows

    def never(*_, **__):
        raise AssertionError("work that was done already")

    monkeypatch.setattr(fitting, "train", never)
    monkeypatch.setattr(run, "load", never)
    monkeypatch.setattr(study.costs, "seconds", never)
    planned = study.plan(recipe)
    assert planned.is_done
    assert "nothing is missing" in str(planned)
    again = study.run(planned)
    assert (again.trained, again.extracted, again.rows) == (0, [], first)
    shutil.rmtree("cache")  # rows are enough
    assert study.plan(recipe).is_done


@pytest.mark.slow
def test_probes_that_were_not_kept_are_missing_where_they_are_wanted(recipe):
    first = study.run(study.plan(recipe)).rows
    storage = StorageOptions(save=True)
    planned = study.plan(recipe, storage)
    assert not planned.is_done and [len(case.missing) for case in planned.cases] == [6, 6]
    done = study.run(planned)
    assert (done.trained, done.rows) == (0, first)
    assert {path.name for path in Path("results/probes").iterdir()} == {row.id for row in first}
    assert study.plan(recipe, storage).is_done


@pytest.mark.slow
def test_a_seed_or_a_data_set_more_is_all_that_is_done(recipe, data, model):
    small = Recipe.of((model,), (data[0],), PROBES[:2], grid="quick", seeds=(0,))
    study.run(study.plan(small))
    planned = study.plan(recipe)
    assert [len(case.missing) for case in planned.cases] == [4, 6]
    # of the first data set all tokens of the last layer are new; what is cached already runs no forward pass for itself
    assert planned.cases[0].bytes_to_write == 36 * 17 * 32 * 2
    done = study.run(planned)
    assert done.trained == 10
    assert len(Results("results").rows()) == 12

    more = study.plan(changed(recipe, seeds=(0, 1, 2)))
    assert [len(case.missing) for case in more.cases] == [3, 3]
    assert more.bytes_to_write == more.cases[0].images_to_run == 0


def test_tokens_that_are_named_are_cached_though_no_probe_reads_them(recipe, model, data):
    asked = Recipe.of((model,), (data[0],), PROBES[:1], grid="quick", seeds=(0,), tokens="cls,ap@0")
    study.run(study.plan(asked))
    planned = study.plan(asked)
    assert planned.is_done
    [train, _] = planned.cases[0].stage_one.splits
    assert train.bytes_held > 0
    assert train.images_to_run == 0


def test_tokens_that_duplicates_are_found_by_are_cached_too(model, data, tmp_path):
    """CLS of the last layer; the mean of the patches in a model without CLS."""
    without = str(zoo.save("SigLIP", tmp_path / "siglip"))
    asked = Recipe.of((model, without), (data[0],), ("ap-last/ridge",), seeds=(0,), drop_duplicates=True)
    planned = study.plan(asked)
    assert [str(failure) for failure in planned.failures] == []
    assert [case.request.pairs for case in planned.cases] == [{(4, "ap"), (4, "cls")}, {(3, "ap")}]


def test_a_case_that_has_no_image_without_a_copy_fails_in_a_sentence(model, data):
    """Images of one colour are near copies of each other for this model."""
    done = study.run(study.plan(Recipe.of((model,), (data[0],), ("ap-last/ridge",), seeds=(0,), drop_duplicates=True)))
    [failure] = done.failures
    assert failure.error.startswith("every image of colours/train is in test too")


CHANGED = {
    "hook": "block",
    "settings": (("hidden_act", "relu"),),
    "preprocess": "fast",
    "size": 48,
    "compute": "bfloat16",
    "dtype": "float32",
    "split_ratio": "0.5/0.5",
    "exif_transpose": True,
}
OPTIONS = [
    ("--hook", "block"),
    ("--set", "hidden_act=relu"),
    ("--preprocess", "fast"),
    ("--size", "48"),
    ("--compute", "bfloat16"),
    ("--dtype", "float32"),
    ("--split-ratio", "0.5/0.5"),
    ("--upright",),  # its former name
]


@pytest.mark.slow
def test_how_features_are_made_is_part_of_the_study(model, data):
    """A key that is changed misses the cache and the rows, and means what the option of `extract` does; the same one hits."""
    folders = {"split_ratio": str(Path(data[0]) / "train")}  # one split, so that it can be carved
    keys = set()
    for (name, value), option in zip(CHANGED.items(), OPTIONS, strict=True):
        ratio = {"split_ratio": "0.8/0.2"} if name == "split_ratio" else {}
        plain = Recipe.of([model], [folders.get(name, data[0])], PROBES[:1], grid="quick", seeds=[0], **ratio)
        if name not in folders:
            study.run(study.plan(plain))
            assert study.plan(plain).is_done
        other = changed(plain, **{name: value})
        [case] = study.plan(other).cases
        assert case.images_to_run == (24 if name == "split_ratio" else 36), name
        assert len(case.missing) == 1, name
        done = CliRunner().invoke(
            cli.app, ["extract", "-m", model, "-d", plain.datasets[0], *option, "--layers", "last", "--tokens", "cls"]
        )
        assert done.exit_code == 0, done.output
        [case] = study.plan(other).cases
        assert (case.images_to_run, len(case.missing)) == (0, 1), name
        keys.add(case.features)
    assert len(keys) == len(CHANGED)
    assert study.run(study.plan(other)).trained == 1
    assert study.plan(other).is_done


@pytest.mark.slow
def test_views_are_cached_beside_the_plain_one_which_probes_read(model, data):
    plain = Recipe.of((model,), (data[0],), PROBES[:1], grid="quick", seeds=(0,))
    [first] = study.run(study.plan(plain)).rows
    asked = changed(plain, views=("flip", "plain", "crop1"), view_seed=3)
    [case] = study.plan(asked).cases
    assert (case.images_to_run, case.missing) == (2 * 36, ())
    done = study.run(study.plan(asked))
    assert (done.rows, done.trained, done.failures) == ([first], 0, ())
    assert study.plan(asked).is_done
    flipped, straight = (
        load_features(model, data[0], "train", layers="last", tokens="cls", view=view) for view in ("flip", "plain")
    )
    assert flipped.ids == straight.ids
    assert not np.allclose(flipped.tokens, straight.tokens)
    [case] = study.plan(changed(asked, view_seed=4)).cases
    assert case.images_to_run == 36  # the crops alone


@pytest.mark.slow
def test_columns_splits_and_bad_images_are_as_the_recipe_says(model, data, tmp_path):
    folder = tmp_path / "table"
    folder.mkdir()
    pictures = Path(data[0])
    for split in ("train", "validation"):
        files = sorted((pictures / {"validation": "test"}.get(split, split)).rglob("*.png"))
        lines = [f"{n},{path.relative_to(pictures)},{path.parent.name},{n % 2}" for n, path in enumerate(files)]
        (folder / f"{split}.csv").write_text("\n".join(["number,where,colour,odd", *lines]) + "\n")
    text = f"""
models = ["{model}"]
datasets = ["{folder}"]
probes = ["cls-last/linear"]
grid = "quick"
seeds = [0]
image_column = "where"
label_column = "colour"
id_column = "number"
image_root = "$DATA/colours"
split = "train,test=validation"
"""
    (tmp_path / "x.toml").write_text(text)
    asked = load(tmp_path / "x.toml", data=pictures.parent)
    done = study.run(study.plan(asked))
    assert (done.failures, done.rows[0].images) == ((), ImageCounts(train=24, test=12, choosing=6))
    assert done.rows[0].classes == ("blue", "green", "red")
    [case] = study.plan(changed(asked, label_column="odd")).cases
    assert len(case.missing) == 1

    damaged = tmp_path / "damaged"
    shutil.copytree(data[1], damaged)
    (damaged / "train" / "red" / "000.png").write_bytes(b"no image")
    plain = Recipe.of((model,), (str(damaged),), PROBES[:1], grid="quick", seeds=(0,))
    assert len(study.run(study.plan(plain)).failures) == 1
    done = study.run(study.plan(changed(plain, skip_bad=True)))
    assert (done.failures, done.trained) == ((), 1)
    assert sum(one.images_skipped for one in done.extracted) == 1


def test_images_that_changed_are_another_study(recipe, model, data, tmp_path):
    copy = tmp_path / "changing"
    shutil.copytree(data[0], copy)
    asked = Recipe.of((model,), (str(copy),), PROBES[:1], grid="quick", seeds=(0,))
    study.run(study.plan(asked))
    [one] = (copy / "test" / "red").glob("000.png")
    shutil.copy(copy / "test" / "blue" / "000.png", one)
    planned = study.plan(asked)
    assert [len(case.missing) for case in planned.cases] == [1]
    assert [split.images_to_run for split in planned.cases[0].stage_one.splits] == [0, 12]
    assert study.run(planned).trained == 1


def test_a_case_that_fails_costs_the_others_nothing(recipe, model, data, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(data[1], damaged)
    (damaged / "train" / "red" / "000.png").write_bytes(b"no image")
    asked = Recipe.of(
        [str(tmp_path / "no" / "model"), model],
        [data[0], "nobody/nothing", str(damaged)],
        PROBES[:1],
        grid="quick",
        seeds=[0],
    )
    planned = study.plan(asked)
    assert [(Path(f.model).name, Path(f.dataset).name) for f in planned.failures] == [
        ("model", "colours"),
        ("model", "nothing"),
        ("model", "damaged"),
        ("tiny-vit", "nothing"),
    ]
    assert not planned.is_done
    done = study.run(planned)
    assert names(done.rows) == [("colours", "cls-last/linear", 0)]
    assert "train/red/000.png cannot be read" in str(done.failures[-1])
    assert len(done.failures) == 5
    again = study.plan(asked)  # the failures are tried again, what was done is not
    assert [len(case.missing) for case in again.cases] == [0, 1]


@pytest.fixture
def command(monkeypatch, capfd):
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlfusion", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capfd.readouterr())

    return call


@pytest.mark.slow
def test_the_command_plans_runs_reports_and_says_what_failed(command, model, data, tmp_path):
    folder = Path(data[0]).parent
    (tmp_path / "small.toml").write_text(
        f'# A small study: one model and two names.\n#\n# Run: x\n\nmodels = ["{model}"]\n'
        'datasets = ["$DATA/colours", "nobody/nothing"]\n'
        'probes = ["cls-last/linear", "alf"]\ngrid = "quick"\nseeds = [0, 1]\n'
    )
    code, _, err = command("run", "small.toml")
    assert code == 1
    assert "line 6: '$DATA/colours' lies in a folder of yours; say which: --data DIR" in err
    words = ("run", "small.toml", "--data", str(folder), "--seeds", "4")
    code, out, err = command(*words, "--dry-run")
    assert code == 1  # one of the two cannot be had
    assert "tiny-vit  colours" in out
    assert "2 of 2 rows" in err
    assert not Path("cache").exists()
    planned = json.loads(command(*words, "--dry-run", "--json")[1])
    assert (planned["rows"], planned["fits"], len(planned["failures"])) == (2, True, 1)
    code, out, err = command(*words, "--markdown", "found.md")
    assert code == 1
    assert "error:" in err.splitlines()[-1]
    assert "nobody/nothing" in err.splitlines()[-1]
    text = Path("found.md").read_text()
    assert text.startswith("# A small study\n\nOne model and two names.")
    assert "mlfusion run small.toml --data DIR --seeds 4 --markdown found.md" in text
    assert str(folder) not in text
    page = Path("results/small.html").read_text()
    assert str(folder) not in page.split("<script")[0]
    assert "nothing" not in command(*words)[1]
    (tmp_path / "small.toml").write_text((tmp_path / "small.toml").read_text().replace(', "nobody/nothing"', ""))
    code, _, err = command(*words)
    assert code == 0
    assert "nothing is missing: every row is there already" in err
