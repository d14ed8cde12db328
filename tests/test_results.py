"""Rows outlive kills, crowds and full disks: what was saved is what is read."""

import json
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rows import row

from mlfusion.errors import MlfusionError
from mlfusion.results import Results


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    attention = {"layers": [1, 2], "kinds": ["cls", "ap"], "mean": [0.25, 0.75], "sd": [0.0, 0.125]}
    first, second = row("a1"), row("b2", seed=1, attention=attention)
    arrays = {"probabilities": np.linspace(0, 1, 6, dtype=np.float16).reshape(3, 2), "labels": np.array([0, 1, 1])}
    store = Results(tmp_path / "results")
    assert store.rows() == [] and store.find("a1") is None
    store.append(first)
    assert store.rows() == [first]
    store.append(second, arrays)
    for reader in (store, Results(tmp_path / "results"), Results(tmp_path / "results" / "rows.jsonl")):
        assert reader.rows() == reader.require() == [first, second]
        assert reader.find("b2") == second and reader.find("c3") is None
        read = reader.arrays(second)
        assert read.keys() == arrays.keys()
        for name in arrays:
            np.testing.assert_array_equal(read[name], arrays[name])
            assert read[name].dtype == arrays[name].dtype
    assert [p.name for p in (tmp_path / "results" / "arrays").iterdir()] == ["b2.npz"]


def test_of_rows_with_one_id_the_last_counts(tmp_path: Path) -> None:
    store = Results(tmp_path)
    for row_id, test in (("a", 0.1), ("b", 0.2), ("a", 0.3)):
        store.append(row(row_id, test=test))
    assert [(r["id"], r["test"]) for r in store.rows()] == [("b", 0.2), ("a", 0.3)]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("kept", [1, 20, 200, -1])
def test_a_torn_line_is_left_out_kept_and_does_no_harm_to_later_ones(
    tmp_path: Path, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    Results(tmp_path).append(row("whole"))
    torn = json.dumps(row("torn", dataset="µ"), ensure_ascii=False).encode()[:kept]
    path.write_bytes(path.read_bytes() + torn)
    reader = Results(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [r["id"] for r in reader.rows()] == ["whole"]
    assert "torn" in caplog.text and str(path) in caplog.text
    Results(tmp_path).append(row("after"))
    for again in (reader, Results(tmp_path)):  # the one that saw the tail torn, and a fresh one
        assert [r["id"] for r in again.rows()] == ["whole", "after"]
        assert again.damaged == [2]
    assert torn in path.read_bytes().split(b"\n")


def test_rows_newer_than_the_last_reading_are_seen_and_deleted_ones_forgotten(tmp_path: Path) -> None:
    reader, writer = Results(tmp_path), Results(tmp_path)
    writer.append(row("a"))
    assert reader.find("a")
    writer.append(row("b"))
    assert [r["id"] for r in reader.rows()] == ["a", "b"]
    (tmp_path / "rows.jsonl").unlink()
    assert reader.rows() == []
    writer.append(row("c"))
    assert [r["id"] for r in reader.rows()] == ["c"]


def _append_many(root: Path, writer: int) -> None:
    store = Results(root)
    for i in range(25):
        # Some rows are longer than a pipe's or a page's atomic write, as a thousand classes make them.
        many = 4000 if i % 5 == 0 else 2
        store.append(
            row(f"w{writer}-{i}", classes=["class"] * many), {"labels": np.full(3, writer)} if i % 10 == 0 else None
        )


def test_rows_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(tmp_path, w)) for w in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
        assert process.exitcode == 0
    store = Results(tmp_path)
    assert {r["id"] for r in store.rows()} == {f"w{w}-{i}" for w in range(4) for i in range(25)}
    assert store.damaged == []
    ids = [r["id"] for r in store.rows()]
    for writer in range(4):  # each writer's rows in its own order
        assert [i for i in ids if i.startswith(f"w{writer}-")] == [f"w{writer}-{i}" for i in range(25)]


def test_a_row_that_cannot_be_saved_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    place = tmp_path / "results"
    place.write_text("a file where a folder should be")
    for arrays in (None, {"labels": np.zeros(2)}):
        with pytest.raises(MlfusionError, match=r"cannot save results in '.*results'.*--results PATH"):
            Results(place).append(row(), arrays)
    assert place.read_text() == "a file where a folder should be"


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Results(tmp_path)
    store.append(row("before"))
    with monkeypatch.context() as patch:
        write = os.write
        patch.setattr("os.write", lambda descriptor, data: write(descriptor, data[:100]))
        with pytest.raises(MlfusionError, match="no space left"):
            store.append(row("cut"))
    store.append(row("after"))
    assert [r["id"] for r in Results(tmp_path).rows()] == ["before", "after"]


def test_arrays_that_would_be_pickled_are_refused_and_never_loaded(tmp_path: Path) -> None:
    store = Results(tmp_path)
    with pytest.raises(ValueError, match=r"Python objects.*names"):
        store.append(row("a"), {"names": np.array([{}], dtype=object)})
    assert store.rows() == [] and not list(tmp_path.rglob("*a*.npz"))
    store.append(row("b"), {"labels": np.zeros(2)})
    np.savez(tmp_path / "arrays" / "b.npz", labels=np.array([{}], dtype=object))
    with pytest.raises(MlfusionError, match=r"cannot be read.*allow_pickle"):
        store.arrays(store.rows()[0])


def test_arrays_that_are_gone_or_damaged_say_how_to_make_them_again(tmp_path: Path) -> None:
    store = Results(tmp_path)
    store.append(row("a"))
    again = "mlfusion probe --model a-vit --dataset digits --probe cls-last/linear --seeds 0"
    with pytest.raises(MlfusionError, match=f"were not kept.*{again}"):
        store.arrays(row("a"))
    (tmp_path / "arrays").mkdir()
    for bytes_ in (b"", b"PK\x03\x04 not a whole archive"):
        (tmp_path / "arrays" / "a.npz").write_bytes(bytes_)
        with pytest.raises(MlfusionError, match="cannot be read"):
            store.arrays(row("a"))


BAD = [
    ({"test": float("nan")}, "test is nan, not a finite number"),
    ({"test": "0.5"}, "test is '0.5', not a finite number"),
    ({"seed": True}, "seed is True, not a whole number"),
    ({"grid": "huge"}, "grid is 'huge'; allowed: 'paper', 'quick'"),
    ({"layers": [1, "2"]}, r"layers\[1\] is '2', not a whole number"),
    ({"images": {"train": 1}}, "images lacks test"),
    ({"metrics": 3}, "metrics is 3, not an object"),
    ({"attention": {"layers": [1]}}, "attention lacks kinds, mean, sd"),
    ({"versions": {"torch": 2}}, "versions.torch is 2, not text"),
    ({"id": "../../outside"}, "cannot name a file"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_is_no_row_is_neither_saved_nor_read(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    store = Results(tmp_path)
    with pytest.raises(ValueError, match=message):
        store.append(row(**changes))
    store.append(row("good"))
    with store.path.open("a") as file:
        file.write(json.dumps(row(**changes)) + "\n")
    with pytest.raises(MlfusionError, match=rf"rows\.jsonl line 2 is no result: .*{message}"):
        store.rows()
    with pytest.raises(MlfusionError, match="line 2"):  # the same line again, not the one after it
        store.rows()


def test_a_missing_field_is_named_and_a_newer_one_let_be(tmp_path: Path) -> None:
    store = Results(tmp_path)
    newer = row("a", calibration={"ece": 0.1})
    store.append(newer)
    assert store.rows() == [newer]
    lacking = {k: v for k, v in row("b").items() if k not in ("val", "code")}
    with pytest.raises(ValueError, match="row lacks code, val"):
        store.append(lacking)  # type: ignore[arg-type]


def test_no_results_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(MlfusionError, match=r"does not exist.*mlfusion probe --dataset"):
        Results(tmp_path / "nowhere").require()
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(MlfusionError, match=r"holds no row yet.*mlfusion probe --dataset"):
        Results(tmp_path).require()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(MlfusionError, match=r"cannot read results in .*directory"):
        Results(tmp_path / "folder.jsonl").require()


def test_reading_results_needs_neither_torch_nor_pandas_nor_altair() -> None:
    code = "import sys, mlfusion.results; print([m for m in ('torch', 'pandas', 'altair') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
