"""A row's id is complete: another precision is another row, and a lost probe is put beside no row whose scores it lacks."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny import save_images, save_model

import mlfusion
from mlfusion.probing import evaluation, fitting, grids, saved
from mlfusion.probing.jobs import Job
from mlfusion.probing.training import precision as precision_module
from mlfusion.results import Results, Row
from mlfusion.specs.definitions import option
from mlfusion.specs.kinds import share
from mlfusion.specs.names import HEAD_NAMES, parse_probes
from mlfusion.specs.options import SearchOptions, StorageOptions
from mlfusion.workflows import study
from mlfusion.workflows.recipe import Recipe

KEYS = ("k" * 16, "t" * 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a data set, and the features of one on the other."""
    root = tmp_path_factory.mktemp("identity")
    model, images = save_model("vit", root / "tiny-vit"), save_images(root / "colours", {"train": 6, "test": 4})
    mlfusion.extract(str(model), str(images), cache=root / "cache")
    return root


@pytest.fixture(autouse=True)
def short_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grids.Grid(learning_rates=(1e-1, 1e-2), weight_decays=(1e-2,), dropouts=(0.0,), epochs=2, least_steps=10)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)


def machine(monkeypatch: pytest.MonkeyPatch, *, fast: bool) -> None:
    """As if 'auto' were bfloat16 on this machine, or float32."""
    monkeypatch.setattr(precision_module, "has_fast_bfloat16", lambda _: fast)


def probed(root: Path, precision: Any = "auto", probe: str = "cls-last/linear", **options: Any) -> tuple[Row, int]:
    """The one row that was asked for, and how many were trained for it."""
    done = mlfusion.probe(
        str(root / "colours"),
        probes=probe,
        grid="quick",
        seeds=(0,),
        cache=root / "cache",
        precision=precision,
        **options,
    )
    [row] = done.rows
    return row, done.trained


def job(**changes: Any) -> Job:
    """A job of one seed on all images; `changes` are its probe and fields of its search."""
    [probe] = parse_probes("cls-last/linear", 4)
    probe = changes.pop("probe", probe)
    return Job(probe, SearchOptions(**{"grid": "quick", "seeds": (0,), "precision": "float32", **changes}))


def test_every_part_of_a_job_is_in_the_id() -> None:
    [other] = parse_probes("ap-last/linear", 4)
    changes: dict[str, Any] = {
        "seeds": (1,),
        "grid": "paper",
        "precision": "bfloat16",
        "shots": (4,),
        "halving": True,
        "smoothing": 0.1,
        "drop_duplicates": True,
        "folds": 5,
    }
    # A field that is added is to be added here; `choose_on` is in the id by the key of the split that chooses.
    assert {*changes, "choose_on"} == vars(job().search).keys()
    changes["probe"] = other
    ids = {name: job(**{name: value}).row_id(KEYS) for name, value in changes.items()}
    ids["choose_on"] = job().row_id((*KEYS, "a key of validation"))
    assert len({*ids.values(), job().row_id(KEYS), job().row_id(KEYS[::-1])}) == len(ids) + 2


def test_a_new_option_at_its_default_changes_no_id() -> None:
    """A field that is added later and marked so: its default is as if it were not there, any other value is another id."""

    @dataclass(frozen=True, kw_only=True)
    class Later(SearchOptions):
        mixup: float = option(0.0, share(), "Mixup.", effect="id", added=True)

    Later.__name__ = "SearchOptions"
    for changes in ({}, {"shots": (4,)}, {"halving": True}):
        now = job(**changes)
        assert Job(now.probe, Later(**vars(now.search))).row_id(KEYS) == now.row_id(KEYS)
        assert Job(now.probe, Later(**vars(now.search), mixup=0.2)).row_id(KEYS) != now.row_id(KEYS)


def test_auto_names_no_row() -> None:
    with pytest.raises(ValueError, match="resolve the job first"):
        job(precision="auto").row_id(KEYS)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_auto_is_resolved_and_either_precision_answers(head: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, fast=fast)
    [probe] = parse_probes(f"cls-last/{head}", 4)
    asked = job(probe=probe, precision="auto")
    answers = [one.search.precision for one in asked.equivalents("cpu")]
    solved = head in ("ridge", "logistic", "knn")  # no matrix product of theirs is ever narrowed
    assert answers == (["float32"] if solved else ["bfloat16", "float32"] if fast else ["float32", "bfloat16"])
    assert asked.resolved("cpu").search.precision == answers[0]
    for precision in ("float32", "bfloat16"):
        explicit = job(probe=probe, precision=precision).equivalents("cpu")
        assert [one.search.precision for one in explicit] == ["float32" if solved else precision]


def test_a_precision_that_is_asked_for_is_the_precision_of_the_row(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, fast=False)
    narrow, made = probed(root, "bfloat16")
    assert (narrow.precision, made) == ("bfloat16", 1)
    wide, made = probed(root, "float32")
    assert (wide.precision, made) == ("float32", 1)
    assert wide.id != narrow.id and len(Results("results").rows()) == 2
    assert [probed(root, "float32"), probed(root, "bfloat16")] == [(wide, 0), (narrow, 0)]


def test_by_default_a_row_of_either_precision_is_done(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, fast=True)
    narrow, made = probed(root)
    assert (narrow.precision, made) == ("bfloat16", 1)
    machine(monkeypatch, fast=False)
    assert probed(root) == (narrow, 0)
    wide, made = probed(root, "float32")
    assert made == 1
    assert probed(root) == (wide, 0)  # of two, that of this machine's own precision
    machine(monkeypatch, fast=True)
    assert probed(root) == (narrow, 0)


def test_a_study_counts_rows_of_either_precision(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "TRIAL_SECONDS", 0.01)
    machine(monkeypatch, fast=True)
    recipe = Recipe.of([str(root / "tiny-vit")], [str(root / "colours")], ["cls-last/linear"], grid="quick", seeds=[0])
    narrow, _ = probed(root)
    machine(monkeypatch, fast=False)
    planned = study.plan(recipe, StorageOptions(cache=root / "cache"))
    assert planned.is_done
    assert study.run(planned).rows == [narrow]


def test_memory_is_not_in_the_id(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [pair] = evaluation.split_pairs(evaluation.FeatureStore(root / "cache"), str(root / "colours"), None)
    resources = fitting.Resources("cpu", 10**9)
    held, streamed = (fitting.train(pair, job(), replace(resources, streams=streams)).row for streams in (False, True))
    assert (held.streamed, streamed.streamed) == (False, True) and held.id == streamed.id


@pytest.mark.parametrize("fast", [True, False])
def test_a_lost_probe_is_trained_again_at_its_rows_precision(
    root: Path, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, fast=fast)
    row, _ = probed(root)
    machine(monkeypatch, fast=not fast)
    said: list[str] = []
    again, made = probed(root, save=True, log=said.append)
    assert (again, made) == (row, 0) and len(Results("results").rows()) == 1
    assert any("1 of them are trained again" in line for line in said)
    card, _ = saved.load(Path("results/probes") / row.id)
    assert card.scores == {"val": row.val, "test": row.test, "train": row.train} and card.selected == row.selected


@pytest.mark.parametrize("changed", [{"test": 0.123}, {"val": 0.123}, {"train": 0.123}, {"parameters": 1}])
def test_a_lost_probe_that_is_another_is_not_put_beside_the_row(root: Path, changed: dict[str, Any]) -> None:
    row, _ = probed(root)
    results = Results("results")
    results.append(msgspec.structs.replace(row, **changed))  # as if the row had been made in another way
    said: list[str] = []
    again, made = probed(root, save=True, log=said.append)
    assert (again, made) == (msgspec.structs.replace(row, **changed), 0)
    folder = Path("results/probes") / row.id
    if "parameters" in changed:  # no score
        assert folder.is_dir()
        return
    assert not folder.exists()
    assert any(f"mlfusion results rerun {row.id}" in line and "does not give the scores" in line for line in said)
