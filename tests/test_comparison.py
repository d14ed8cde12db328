"""Rows compared, shown and made again: what is alike is compared, what is not is refused or marked, and a row repeats."""

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas
import pytest
from rows import row, row_object, study
from tiny import save_images, save_model

import mlfusion
from mlfusion import cli, statistics
from mlfusion.errors import BadData, NotCached
from mlfusion.probing import fitting, grids, jobs, rerun, saved
from mlfusion.report.page_tables import rows_table
from mlfusion.results import Results, Row, export
from mlfusion.results.records import from_object
from mlfusion.results.rows import Metrics
from mlfusion.specs.names import parse_probes
from mlfusion.specs.options import SearchOptions, StorageOptions
from mlfusion.statistics import measures

PROBES = "cls-last/linear,cls+ap-2-layers/attentive"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache and results of two probes with two seeds, as they are really made, by a grid cut short."""
    root = tmp_path_factory.mktemp("made")
    model, images = save_model("vit", root / "tiny-vit"), save_images(root / "colours", {"train": 10, "test": 6})
    grid = grids.Grid(learning_rates=(1e-1, 1e-2), weight_decays=(1e-2,), dropouts=(0.1,), epochs=2, least_steps=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grids.SEARCH_GRIDS, "quick", grid)
        mlfusion.extract(str(model), str(images), cache=root / "cache")
        options: dict[str, Any] = {"grid": "quick", "cache": root / "cache", "results": root / "results"}
        mlfusion.probe(str(images), probes=PROBES, seeds=(0, 1), **options)
        mlfusion.probe(str(images), probes="cls-last/linear", seeds=(0,), shots=(4,), smoothing=0.1, **options)
        with pytest.MonkeyPatch.context() as small:  # as on a machine with less memory than these few tokens take
            small.setattr(fitting.Resources, "of", partial(fitting.Resources.of, streams=True))
            mlfusion.probe(str(images), probes="ap-last/linear", seeds=(0,), **options)
        yield root


@pytest.fixture
def at(made: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    for name in ("cache", "results"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlfusion", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def kept(root: Path, rows: list[Row], right: dict[str, float] | None = None, images: int = 40) -> Results:
    """Rows with arrays: of two classes, right on the first part of the images."""
    store = Results(root)
    labels = np.arange(images) % 2
    for one in rows:
        share = (right or {}).get(one.probe, one.test)
        taken = np.where(np.arange(images) < share * images, labels, 1 - labels)
        store.append(one, {"probabilities": np.eye(2, dtype=np.float16)[taken], "labels": labels})
    return store


# --- rows ------------------------------------------------------------------------------------------------------------


def test_probes_are_compared_seed_by_seed_and_image_by_image(tmp_path: Path) -> None:
    scores = {"cls-last/linear": [0.5, 0.6, 0.7], "ap-last/linear": [0.6, 0.8]}
    rows = study(scores, images={"train": 100, "test": 40})
    store = kept(tmp_path, rows)
    a, b = [one for one in rows if one.probe == "ap-last/linear"], rows[:3]
    found = statistics.compare(store, a, b, bootstrap=statistics.Bootstrap(resamples=300))
    assert found.seeds == (0, 1)
    assert (found.score_a.mean, found.score_b.mean) == (pytest.approx(0.7), pytest.approx(0.55))
    assert (found.gain.mean, found.gain.sd) == (pytest.approx(0.15), pytest.approx(np.std([0.1, 0.2], ddof=1)))
    [first, second] = found.mcnemar
    assert (first.only_a, first.only_b, second.only_a, second.both) == (4, 0, 8, 24)
    assert found.images and found.images.low > 0 and found.images.p < 0.05 and found.marks == ()
    turned = statistics.compare(store, b, a, bootstrap=statistics.Bootstrap(resamples=300))
    assert turned.gain.mean == -found.gain.mean and turned.images and turned.images.high < 0
    [again] = statistics.compare_probes(
        store, rows, "ap-last/linear", "cls-last/linear", bootstrap=statistics.Bootstrap(resamples=300)
    )
    assert again == found


DIFFERENT = [
    ({"metric": "r2"}, "is measured by balanced_accuracy, .* by r2"),
    ({"dataset": "other"}, "40 images of digits, .* 40 of other"),
    ({"images": {"train": 1, "test": 41}}, "41 of digits"),
    ({"protocol": 1}, "by protocol 2, .* by protocol 1, which measure differently"),
    ({"sources": row_object()["sources"] | {"test": "other"}}, "digits changed between"),
]


@pytest.mark.parametrize(("changes", "message"), DIFFERENT)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    one = row("a")
    store = kept(tmp_path, [one])
    with pytest.raises(BadData, match=rf"{message}.*allowed: rows of the same test images, metric and protocol"):
        statistics.compare(store, one, row("b", **changes))


def test_what_else_differs_is_marked(tmp_path: Path) -> None:
    one, other = row("a", code="abc"), row("b", code="def", seed=3, shots=2)
    store = kept(tmp_path, [one, other])
    marks = statistics.compare(store, one, other, bootstrap=statistics.Bootstrap(resamples=100)).marks
    assert marks[:3] == ("seed: 0 against 3", "code: abc against def", "shots: none against 2")
    assert marks[3:] == (
        "no interval of the difference: the two differ on 0 of 40 test images, and a bootstrap needs 6 or more",
    )
    slower = statistics.compare(store, one, msgspec.structs.replace(one, precision="bfloat16")).marks
    assert slower[0] == "precision: float32 against bfloat16"


def test_rows_without_arrays_or_with_other_images(tmp_path: Path) -> None:
    store = kept(tmp_path, [row("a")])
    store.append(row("b"))
    found = statistics.compare(store, row("a"), row("b"))
    assert found.images is None and found.mcnemar == () and "mlfusion results rerun b --keep" in found.marks[0]
    store.append(row("c"), {"probabilities": np.eye(2)[[0] * 40], "labels": np.zeros(40, int)})
    with pytest.raises(BadData, match="a and c were tested on other images"):
        statistics.compare(store, row("a"), row("c"))


def test_probes_without_a_common_setting_are_not_compared(tmp_path: Path) -> None:
    rows = [row("a"), row("b", probe="ap-last/linear", grid="paper")]
    with pytest.raises(
        BadData, match=r"no data set has rows of both.*there are rows of ap-last/linear, cls-last/linear"
    ):
        statistics.compare_probes(kept(tmp_path, rows), rows, "ap-last/linear", "cls-last/linear")
    with pytest.raises(BadData, match="no seed in common"):
        statistics.compare(Results(tmp_path), [row("a"), row("b", seed=1)], [row("c", seed=2), row("d", seed=3)])


def test_over_data_sets(tmp_path: Path) -> None:
    rows = [
        one
        for number in range(6)
        for one in study(
            {"cls-last/linear": [0.5], "ap-last/linear": [0.52 + number / 100]},
            dataset=f"set-{number}",
            images={"train": 9, "test": 40},
        )
    ]
    store = kept(tmp_path, rows)
    compared = statistics.compare_probes(
        store, rows, "ap-last/linear", "cls-last/linear", bootstrap=statistics.Bootstrap(resamples=100)
    )
    assert [one.dataset for one in compared] == [f"set-{number}" for number in range(6)]
    test = statistics.over_datasets(compared)["a-vit"]
    assert isinstance(test, statistics.SignedRank) and test.p == 2**-6 and test.mean == pytest.approx(0.045)
    assert "of 5 data sets is refused" in str(statistics.over_datasets(compared[:5])["a-vit"])
    table = statistics.by_dataset(rows)
    assert table["ap-last/linear"]["set-3"] == pytest.approx(0.55) and len(table["cls-last/linear"]) == 6
    with pytest.raises(BadData, match="of models a-vit, another and grids paper, quick; choose one of each"):
        statistics.by_dataset([*rows, row("x", model="another", grid="paper")])
    with pytest.raises(BadData, match="several sets of features"):
        statistics.by_dataset([row("x"), row("y", features=["other", "keys"])])


def test_settings_of_one_data_set_are_no_further_data_sets(tmp_path: Path) -> None:
    rows = [
        one
        for folds in (2, 4, 5, 8, 10, 20)
        for one in study(
            {"cls-last/linear": [0.5], "ap-last/linear": [0.6]},
            model=f"vit-{folds}",
            images={"train": 9, "test": 40},
            folds=folds,
        )
    ]
    rows = [msgspec.structs.replace(one, model="a-vit") for one in rows]
    compared = statistics.compare_probes(
        kept(tmp_path, rows), rows, "ap-last/linear", "cls-last/linear", bootstrap=statistics.Bootstrap(resamples=100)
    )
    assert sorted(one.setting for one in compared) == sorted(
        f"quick grid, {folds} folds" for folds in (2, 4, 5, 8, 10, 20)
    )
    assert "digits is compared in several settings" in str(statistics.over_datasets(compared)["a-vit"])


def grouped(column: str, digest: str) -> dict[str, Any]:
    return {"column": column, "train": 25, "test": 20, "digests": [digest * 16, digest * 16]}


def test_groups_count_even_if_one_of_two_results_was_made_without_them(tmp_path: Path) -> None:
    rows = study({"cls-last/linear": [0.5], "ap-last/linear": [0.8]}, images={"train": 100, "test": 40})
    store = kept(tmp_path, rows)
    single = statistics.compare(store, rows[1], rows[0])
    assert single.mcnemar and single.images and single.images.evidence.images == 40
    patient = from_object(msgspec.to_builtins(rows[1]) | {"groups": grouped("patient", "a")})
    store.append(patient, store.arrays(rows[1]) | {"groups": np.arange(40) // 2})
    for a, b in ((patient, rows[0]), (rows[0], patient)):
        found = statistics.compare(store, a, b)
        assert found.images and found.images.evidence.images == 20 and found.images.evidence.noun == "test group"
        assert found.mcnemar == () and any("no McNemar test" in mark for mark in found.marks)
        assert any("groups: " in mark and "patient (aaaaaa+aaaaaa)" in mark for mark in found.marks)


def test_a_column_of_groups_that_changed_makes_another_setting() -> None:
    [one] = study({"cls-last/linear": [0.5]}, groups=grouped("patient", "a"))
    [other] = study({"cls-last/linear": [0.5]}, groups=grouped("patient", "b"))
    assert statistics.setting(one) != statistics.setting(other) and one.options() == other.options()


def test_cost() -> None:
    rows = [row("a", train=0.9, test=0.7), row("b", train=1.0, test=0.6, parameters=2000, seconds=2.5, bytes=5000)]
    assert statistics.cost(rows) == statistics.Cost(2000, 2.0, 5000)


# --- made again ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_row_repeats_from_itself_alone(at: Path) -> None:
    """Plain, attentive with dropout, few-shot with smoothing, and streamed: the same scores to the last bit."""
    rows = Results("results").rows()
    assert {(one.probe, one.shots is not None, one.streamed) for one in rows} == {
        ("cls-last/linear", False, False),
        ("cls+ap-2-layers/attentive", False, False),
        ("cls-last/linear", True, False),
        ("ap-last/linear", False, True),
    }
    for one in rows:
        assert one.protocol == jobs.PROTOCOL and one.device == "cpu"
        width = 32 * np.dtype("float16").itemsize
        tokens = len(one.layers) * len(one.tokens)
        assert one.bytes == (one.images.train + one.images.test) * tokens * width
        again = rerun.rerun(one.id)
        assert again.same and again.differs == [] and again.row == one
        assert (
            again.again.id == one.id and again.again.attention == one.attention and again.again.metrics == one.metrics
        )


def test_lost_arrays_and_a_probe_are_made_again(at: Path) -> None:
    store = Results("results")
    one = store.rows(probe="cls+ap-2-layers/attentive")[0]
    before = store.arrays(one)
    (at / "results" / "arrays" / f"{one.id}.npz").unlink()
    assert rerun.rerun(one.id[:8], keep=True).same
    assert all(np.array_equal(before[name], value) for name, value in store.arrays(one).items())
    assert saved.load(at / "results" / "probes" / one.id)[0].scores["test"] == one.test


def test_a_row_whose_features_are_gone_says_how_to_make_them(at: Path, made: Path) -> None:
    one = Results("results").rows(probe="cls+ap-2-layers/attentive")[0]
    command = rf"mlfusion extract --model {made}/tiny-vit --dataset {made}/colours --tokens cls\+ap@2,4"
    with pytest.raises(NotCached, match=rf"not in .*elsewhere.*--cache.*{command}"):
        rerun.rerun(one.id, storage=StorageOptions(cache="elsewhere"))


def test_a_row_that_does_not_repeat_says_what_changed(at: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Results("results")
    one = store.rows()[0]
    store.append(msgspec.structs.replace(one, test=0.123, code="before", versions=one.versions | {"torch": "1.0"}))
    code, out, err = run("results", "rerun", one.id, "--keep")
    assert code == 1 and f"test: 0.123 then, {one.test} now" in out
    assert "code before then" in err and "torch 1.0 then" in err and "not the same" in err
    monkeypatch.setattr("mlfusion.probing.rows.PROTOCOL", 99)
    code, out, err = run("results", "rerun", one.id, "--json")
    assert (
        code == 1 and json.loads(out)["same"] is False and any("99 now" in line for line in json.loads(out)["differs"])
    )


# --- at the command line ---------------------------------------------------------------------------------------------


def test_ls_and_show(at: Path, run: Any) -> None:
    rows = Results("results").rows()
    listed = json.loads(run("results", "ls", "--json")[1])["results"]
    assert [one["id"] for one in listed] == [one.id for one in rows]
    code, out, err = run("results", "ls", "--probe", "cls-last/linear", "--limit", "2")
    assert code == 0 and len(out.splitlines()) == 3 and "the newest 2 of 3" in err
    shown = json.loads(run("results", "show", rows[0].id[:10], "--json")[1])
    assert from_object(shown["result"]) == rows[0] and shown["rerun"].startswith(f"mlfusion results rerun {rows[0].id}")
    held = Results("results").arrays(rows[0])
    assert shown["calibration"]["ece"] == statistics.calibration(held["labels"], held["probabilities"]).ece
    assert shown["interval"]["low"] <= shown["interval"]["value"] <= shown["interval"]["high"]
    # The stored arrays are the scored ones: what is computed from them is what the rows say, metric by metric.
    assert shown["interval"]["value"] == rows[0].test
    for one in rows:
        stored = Results("results").arrays(one)
        scores = measures.scores(stored["labels"], stored["probabilities"])
        assert msgspec.convert({"kind": "class", **scores}, Metrics) == one.metrics
    wrong = (held["probabilities"].argmax(1) != held["labels"]).sum()
    assert sum(pair["images"] for pair in shown["confusions"]) == wrong
    _, out, _ = run("results", "show", rows[0].id)
    assert (
        f"rerun: mlfusion results rerun {rows[0].id}" in out
        and rows[0].extract_command() in out
        and "expected calibration error" in out
    )
    assert str(rows[0].selected.lr) in out


def test_show_and_the_page_say_what_was_chosen_at_an_end_of_the_grid(tmp_path: Path, run: Any) -> None:
    selected = {"lr": 0.1, "weight_decay": 1e-6, "steps": 1000, "batch_size": 32}
    Results(tmp_path).append(row("a", selected=selected, at_end={"lr": "largest", "weight_decay": "smallest"}))
    Results(tmp_path).append(row("b", selected=selected | {"lr": 0.01}))
    _, at_an_end, _ = run("results", "show", "a", "--results", str(tmp_path))
    assert (
        "chosen at an end of the quick grid, beyond which nothing was tried: lr 0.1 (largest), weight_decay 1e-06"
        in at_an_end
    )
    _, inside, _ = run("results", "show", "b", "--results", str(tmp_path))
    assert "at an end" not in inside
    table = rows_table(Results(tmp_path).rows())
    [(place, column)] = [(i, c) for i, c in enumerate(table["columns"]) if c["title"] == "At an end of the grid"]
    cells = [column["words"][line[place]] for line in table["rows"]]
    assert cells == ["lr 0.1 (largest), weight_decay 1e-06 (smallest)", ""]
    assert "At an end of the grid" not in str(rows_table([row("b")]))


def test_compare_at_the_command_line(at: Path, run: Any) -> None:
    code, out, err = run("results", "compare", "cls+ap-2-layers/attentive", "cls-last/linear", "--resamples", "200")
    assert code == 0 and len(out.splitlines()) == 2 and "A: cls+ap-2-layers/attentive" in out
    assert "no interval from 18 test images: a bootstrap needs 20 or more" in err
    assert "cannot be told: 18 test images; 20 are needed" in err and len(err.splitlines()) == 2
    said = json.loads(run("results", "compare", "cls+ap-2-layers/attentive", "cls-last/linear", "--json")[1])
    [one] = said["comparisons"]
    assert one["seeds"] == [0, 1] and len(one["mcnemar"]) == 2
    assert "refused" in said["over_datasets"]["tiny-vit"]
    first, other = Results("results").rows()[0], Results("results").rows(probe="ap-last/linear")[0]
    code, out, _ = run("results", "compare", first.id, other.id, "--json")
    [one] = json.loads(out)["comparisons"]
    assert one["gain"]["mean"] == pytest.approx(first.test - other.test)
    code, _, err = run("results", "compare", "alf", "cls-last/linear")
    assert code == 1 and "no data set has rows of both cls+ap-all-layers/attentive and cls-last/linear" in err


def test_results_are_shown_in_a_tracker(at: Path, run: Any) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'mlfusion[tensorboard]'")
    said = run("results", "track", "tensorboard:runs", "--probe", "cls-last/linear", "--json")
    assert json.loads(said[1]) == {"where": "tensorboard:runs", "results": 3} and len(list(Path("runs").iterdir())) == 3


def test_rank_at_the_command_line(tmp_path: Path, run: Any) -> None:
    scores = {"cls-last/linear": 0.5, "ap-last/linear": 0.6, "cls+ap-last/linear": 0.7}
    store = Results("results")
    for number in range(7):
        for probe, score in scores.items():
            store.append(row(f"{number}-{score}", dataset=f"set-{number}", probe=probe, test=score + number / 100))
    store.append(row("alone", probe="ap-layer-2/linear", dataset="set 0"))
    code, out, err = run("results", "rank")
    assert code == 0 and "ap-layer-2/linear" in err
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [
        ["cls+ap-last/linear", "1.00"],
        ["ap-last/linear", "2.00"],
        ["cls-last/linear", "3.00"],
    ]
    assert "7 data sets" in out and "+20.0" in out
    said = json.loads(run("results", "rank", "--json")[1])
    assert said["left_out"] == ["ap-layer-2/linear"] and {one["q"] for one in said["against"]} == {2**-7}
    assert said["datasets_left_out"] == ["set 0"] and said["marks"] == []


def test_a_probe_with_more_data_sets_than_the_others_does_not_leave_them_out() -> None:
    probes = ("cls-last/linear", "ap-last/linear", "cls+ap-last/linear")
    rows = [
        row(f"{n}-{i}", dataset=f"set-{n}", probe=p, test=0.5 + i / 10) for n in range(7) for i, p in enumerate(probes)
    ]
    more = [row(f"more-{n}", dataset=f"set-{n}", probe="cls-last/ridge", test=0.4) for n in range(9)]
    found = statistics.rank([*rows, *more], baseline="cls-last/linear")
    assert set(found.ranking.names) == {*probes, "cls-last/ridge"} and found.ranking.datasets == 7
    assert found.left_out == () and found.datasets_left_out == ("set-7", "set-8")
    # A probe on few data sets costs the others none of theirs.
    few = [row(f"few-{n}", dataset=f"set-{n}", probe="cls-last/knn", test=0.4) for n in range(6)]
    found = statistics.rank(
        [*rows, *(one for one in more if one.dataset < "set-7"), *few[:2]], baseline="cls-last/linear"
    )
    assert found.left_out == ("cls-last/knn",) and found.ranking.datasets == 7 and found.datasets_left_out == ()


def test_the_fair_table_is_the_largest_of_all() -> None:
    random = np.random.default_rng(3)
    for _ in range(5):
        table = {f"p{k}": {f"d{n}": 0.5 for n in np.flatnonzero(random.random(8) < 0.8)} for k in range(5)}
        found = statistics.fair_table(table, baseline="none")
        best = max(  # every choice of probes, with all data sets that they share
            (len(chosen) >= 3 and len(shared) >= 6, len(chosen) * len(shared))
            for count in range(1, 6)
            for chosen in itertools.combinations(table.values(), count)
            for shared in [set.intersection(*map(set, chosen))]
        )
        size = len(found.scores) * len(found.datasets)
        assert (len(found.scores) >= 3 and len(found.datasets) >= 6, size) == best
        assert all(set(found.datasets) <= set(table[probe]) for probe in found.scores)


def test_rows_of_older_protocols_do_not_count_in_ranks_and_what_differs_is_told() -> None:
    probes = {"cls-last/linear": 0.5, "ap-last/linear": 0.6, "cls+ap-last/linear": 0.7}
    rows = [row(f"{n}-{s}", dataset=f"set-{n}", probe=p, test=s) for n in range(6) for p, s in probes.items()]
    older = [row(f"old-{n}", dataset=f"set-{n}", probe="cls-last/ridge", test=0.9, protocol=1) for n in range(6)]
    found = statistics.rank([*rows, *older], baseline="cls-last/linear")
    assert "cls-last/ridge" not in found.ranking.names
    assert found.marks == ("6 rows of protocols before 2 cannot count: protocols measure differently",)
    mixed = [
        msgspec.structs.replace(one, precision="bfloat16") if one.probe in ("ap-last/linear",) else one for one in rows
    ]
    assert statistics.rank(mixed, baseline="cls-last/linear").marks == (
        "the ranked rows differ in precision: bfloat16, float32",
    )


def test_export_and_import_at_the_command_line(at: Path, run: Any) -> None:
    rows = Results("results").rows()
    for form in ("csv", "parquet", "jsonl"):
        code, out, _ = run("results", "export", f"all.{form}", "--json")
        assert (
            code == 0
            and json.loads(out) == {"path": f"all.{form}", "results": len(rows)}
            and Path(f"all.{form}").exists()
        )
    assert json.loads(run("results", "import", "results", "--results", "other", "--json")[1]) == {
        "taken": 5 + 1,
        "there": 0,
        "differing": [],
    }
    assert Results("other").rows() == rows and Results("other").arrays(rows[0])
    assert json.loads(run("results", "import", "all.jsonl", "--results", "third", "--json")[1])["taken"] == len(rows)
    assert json.loads(run("results", "import", "all.jsonl", "--results", "third", "--json")[1]) == {
        "taken": 0,
        "there": 6,
        "differing": [],
    }
    other = msgspec.structs.replace(rows[0], created="2999-01-01T00:00:00+00:00", test=0.999)  # anybody may write an id
    export.write([other], Path("other.jsonl"))
    code, out, err = run("results", "import", "other.jsonl", "--results", "third")
    assert (
        code == 0 and "0 results taken over" in out and f"({rows[0].id}); to have those of the source: --replace" in err
    )
    assert Results("third").named(rows[0].id) == rows[0]
    code, out, _ = run("results", "import", "other.jsonl", "--replace", "--results", "third")
    assert code == 0 and "1 result taken over" in out and Results("third").named(rows[0].id) == other
    results = Results("results")
    np.savez(
        "results/arrays/" + rows[0].id,
        **{k: v[::-1] if k == "labels" else v for k, v in results.arrays(rows[0]).items()},
    )
    code, out, err = run("results", "show", rows[0].id)
    assert (
        code == 0 and "are not its own: they give balanced_accuracy" in err and "interval over test images" not in out
    )
    code, _, err = run("results", "import", "nothing.jsonl")
    assert code == 1 and "cannot read 'nothing.jsonl'" in err


EMPTY = [("ls",), ("show", "x"), ("compare", "alf", "aat"), ("rank",), ("export", "a.csv"), ("rerun", "x")]


@pytest.mark.parametrize("words", [*EMPTY, ("track", "tensorboard")])
def test_an_empty_store_says_what_to_do(run: Any, words: tuple[str, ...]) -> None:
    code, out, err = run("results", *words)
    assert code == 1 and out == "" and "Make some with `mlfusion probe --dataset digits" in err
    assert os.listdir() in ([], ["runs"])


def test_ids_stay_text_in_a_csv(tmp_path: Path) -> None:
    """An id of decimal digits alone, with leading zeros or an e, would be read as a number."""
    probe, search = (
        parse_probes("cls-last/linear", 12)[0],
        SearchOptions(seeds=(0,), shots=(None,), precision="float32"),
    )
    ids = {jobs.Job(probe, search).row_id((f"{n:016x}", "t" * 16)) for n in range(3000)}
    assert len(ids) == 3000 and any(one[1:].isdecimal() for one in ids)
    numbers = [one for one in ids if one[1:].isdecimal()]
    export.write([row(one) for one in numbers], tmp_path / "few.csv")
    assert pandas.read_csv(tmp_path / "few.csv")["id"].tolist() == numbers
    older = ["0012345678901234", "12345e6789012345"]
    export.write([row(one, code="0123456") for one in older], tmp_path / "older.csv")
    read = pandas.read_csv(tmp_path / "older.csv", dtype={"id": str, "code": str})
    assert read["id"].tolist() == older and set(read["code"]) == {"0123456"}


def test_rows_that_differ_seed_by_seed_are_marked_even_where_all_seeds_together_do_not() -> None:
    a, b = ([row(f"{name}{seed}", seed=seed) for seed in (0, 1)] for name in "ab")
    assert statistics.differences(a, b) == {}
    mixed = [msgspec.structs.replace(one, precision=p) for one, p in zip(a, ("float32", "bfloat16"), strict=True)]
    other = [msgspec.structs.replace(one, precision=p) for one, p in zip(b, ("bfloat16", "float32"), strict=True)]
    assert statistics.differences(mixed, other) == {
        "precision": "precision: bfloat16, float32 against bfloat16, float32 in other seeds"
    }
    same = [msgspec.structs.replace(one, precision=p) for one, p in zip(b, ("float32", "bfloat16"), strict=True)]
    assert statistics.differences(mixed, same) == {}


def test_ranked_probes_with_other_seeds_are_marked() -> None:
    scores = {"cls-last/linear": [0.7, 0.7], "ap-last/linear": [0.8, 0.7], "cls+ap-last/linear": [0.9, 0.8]}
    rows = [one for number in range(6) for one in study(scores, dataset=f"set{number}")]
    assert statistics.rank(rows, baseline="cls-last/linear").marks == ()
    fewer = [one for one in rows if (one.probe, one.dataset, one.seed) != ("ap-last/linear", "set3", 1)]
    marks = statistics.rank(fewer, baseline="cls-last/linear").marks
    assert marks == ("the ranked probes do not have the same seeds",)
