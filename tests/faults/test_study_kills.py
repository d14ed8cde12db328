"""Killed again and again, a study ends with the same rows as one that was left alone."""

import signal
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from workers import Child

from mlfusion.extraction import forward
from mlfusion.probing import grids
from mlfusion.results import Results
from mlfusion.specs.options import StorageOptions
from mlfusion.store.verify import verify_entry
from mlfusion.workflows import study
from mlfusion.workflows.recipe import Recipe

sys.path.append(str(Path(__file__).parents[1]))
from tiny import save_images, save_model

VOLATILE = {"seconds", "created"}


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    grid = grids.Grid(learning_rates=(1e-1, 1e-2), weight_decays=(1e-2,), dropouts=(0.0,), epochs=2, least_steps=20)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)
    monkeypatch.setattr(study, "TRIAL_SECONDS", 0.01)
    monkeypatch.setitem(forward.MAX_BATCH_SIZES, "cpu", 4)
    model = str(save_model("vit", tmp_path / "model"))
    data = [str(save_images(tmp_path / f"set {n}", {"train": 6 + n, "test": 4}, seed=n)) for n in range(2)]
    probes = ("cls-last/linear", "cls+ap-all-layers/{ridge,attentive}", "aat:h4")
    return Recipe.of([model], data, probes, grid="quick", seeds=[0, 1])


def do(recipe: Recipe, root: Path) -> None:
    study.run(study.plan(recipe, StorageOptions(cache=root / "cache", results=root / "results")))


def kept(root: Path) -> dict[str, dict]:
    return {
        row.id: {k: v for k, v in msgspec.structs.asdict(row).items() if k not in VOLATILE}
        for row in Results(root / "results").rows()
    }


@pytest.mark.long
def test_a_study_killed_again_and_again_ends_with_the_same_rows(recipe, tmp_path, many, trial):
    do(recipe, tmp_path / "whole")  # imports everything
    began = time.monotonic()
    child = Child(do, recipe, tmp_path / "undisturbed")
    assert child.wait() == 0, child.said
    seconds = time.monotonic() - began
    want = kept(tmp_path / "undisturbed")
    assert len(want) == 2 * 4 * 2
    assert kept(tmp_path / "whole") == want

    random, kills, root = np.random.default_rng(0), 0, tmp_path / "killed"
    rows: list[int] = []
    while kills < many(10, 100):
        with trial("kill -9 of a study at a random moment"):
            status = Child(do, recipe, root).kill_after(random.uniform(0, seconds / 2))
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
            now = kept(root)
            assert now.items() <= want.items()
            rows.append(len(now))
            if status == 0:
                root = tmp_path / f"killed {kills}"  # it came through: begin another
    child = Child(do, recipe, root)
    assert child.wait() == 0, child.said
    assert kept(root) == want
    assert rows == sorted(rows) or len(set(tmp_path.glob("killed*"))) > 1
    for entry in (root / "cache" / "v3").glob("[0-9a-f]*"):
        assert list(verify_entry(entry)) == []
    arrays = {path.name for path in (root / "results" / "arrays").glob("[!.]*.npz")}
    assert arrays >= {f"{name}.npz" for name in want}
