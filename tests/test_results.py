"""Rows outlive kills, crowds and full disks: what was saved is what is read."""

import json
import logging
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas
import pytest
from rows import key, metrics, row, row_object
from tiers import examples

from mlfusion import statistics
from mlfusion.errors import MlfusionError, UnknownName
from mlfusion.results import Results, Row, export, schema
from mlfusion.results.records import decode, encode
from mlfusion.statistics import measures

SPAWN = multiprocessing.get_context("spawn")


def ids(store: Results) -> list[str]:
    return [one.id for one in store.rows()]


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    attention = {"layers": [1, 2], "kinds": ["cls", "ap"], "mean": [0.25, 0.75], "sd": [0.0, 0.125]}
    first, second = row("a1"), row("b2", seed=1, attention=attention)
    scores = np.linspace(0, 1, 80, dtype=np.float16).reshape(40, 2)
    arrays = {"probabilities": scores, "labels": np.arange(40) % 2, "attention": np.full((40, 2), 0.5, np.float16)}
    store = Results(tmp_path / "results")
    assert store.rows() == [] and store.find("a1") is None and store.listing() == [] and store.count() == 0
    assert not (tmp_path / "results").exists()
    store.append(first)
    assert store.rows() == [first]
    store.append(second, arrays)
    copies = (
        Results(tmp_path / "results"),
        Results(tmp_path / "results" / "results.sqlite"),
        pickle.loads(pickle.dumps(store)),
    )
    for reader in (store, *copies):
        assert reader.rows() == reader.require() == [first, second]
        assert reader.find("b2") == second and reader.find("c3") is None
        read = reader.arrays(second)
        assert read.keys() == arrays.keys()
        for name in arrays:
            np.testing.assert_array_equal(read[name], arrays[name])
            assert read[name].dtype == arrays[name].dtype
    assert sorted(path.name for path in (tmp_path / "results").rglob("*")) == ["arrays", "b2.npz", "results.sqlite"]


def test_of_rows_with_one_id_the_last_counts(tmp_path: Path) -> None:
    store = Results(tmp_path)
    for row_id, test in (("a", 0.1), ("b", 0.2), ("a", 0.3)):
        store.append(row(row_id, test=test))
    assert [(r.id, r.test) for r in store.rows()] == [("b", 0.2), ("a", 0.3)]


def test_rows_are_found_by_what_they_are_of(tmp_path: Path) -> None:
    store = Results(tmp_path)
    for number, (model, dataset, probe) in enumerate(
        [("a", "x", "cls-last/linear"), ("b", "x", "cls-last/linear"), ("a", "y", "alf"), ("a", "x", "alf")]
    ):
        store.append(row(f"r{number}", model=model, dataset=dataset, probe=probe, seed=number))
    assert [r.id for r in store.rows(model="a")] == ["r0", "r2", "r3"]
    assert [r.id for r in store.rows(dataset="x", probe="alf")] == ["r3"]
    assert store.count(model="a", dataset="x") == 2 and store.count() == 4
    listed = store.listing(model="a", limit=2)
    assert [one["id"] for one in listed] == ["r2", "r3"]  # the newest, oldest first
    assert listed[0] == {name: getattr(store.find("r2"), name) for name in listed[0]} and "test" in listed[0]
    with pytest.raises(MlfusionError, match=r"no results of --dataset z in .*mlfusion results ls"):
        store.require(dataset="z")


def test_an_id_may_be_cut_short(tmp_path: Path) -> None:
    store = Results(tmp_path)
    with pytest.raises(MlfusionError, match="Make some with `mlfusion probe"):
        store.named("a")
    for row_id in ("abc1", "abd2", "ab"):
        store.append(row(row_id))
    assert store.named("abc").id == "abc1"
    assert store.named("ab").id == "ab"  # whole: not one of the others
    with pytest.raises(UnknownName, match=r"Several begin so"):
        store.named("a")
    with pytest.raises(UnknownName, match=r"no result named 'x'.*the newest.*mlfusion results ls"):
        store.named("x")
    with pytest.raises(UnknownName):
        store.named("")


def test_a_list_of_classes_is_kept_once(tmp_path: Path) -> None:
    store = Results(tmp_path)
    names = [f"class number {k} of a long list of classes" for k in range(1000)]
    for number in range(20):
        store.append(
            row(f"r{number}", classes=names, metrics=metrics("balanced_accuracy", 1000) | {"recall": [None] * 1000})
        )
    assert store.path.stat().st_size < 20 * len(json.dumps(names)) / 3
    first, second = store.rows()[:2]
    assert first.classes == second.classes == tuple(names)


def test_rows_newer_than_the_last_reading_are_seen_and_deleted_ones_forgotten(tmp_path: Path) -> None:
    reader, writer = Results(tmp_path), Results(tmp_path)
    writer.append(row("a"))
    assert reader.find("a")
    writer.append(row("b"))
    assert ids(reader) == ["a", "b"]
    (tmp_path / "results.sqlite").unlink()
    assert reader.rows() == []
    writer.append(row("c"))
    assert ids(reader) == ["c"]


# --- crowds and kills ------------------------------------------------------------------------------------------------


def _append_many(root: Path, writer: int) -> None:
    store = Results(root)
    for i in range(25):
        many = 4000 if i % 5 == 0 else 4
        store.append(
            row(f"w{writer}-{i}", classes=["class"] * many), {"labels": np.full(40, writer)} if i % 10 == 0 else None
        )


@pytest.mark.slow
def test_rows_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    writers = [SPAWN.Process(target=_append_many, args=(tmp_path, w)) for w in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
        assert process.exitcode == 0
    store = Results(tmp_path)
    held = ids(store)
    assert sorted(held) == sorted(f"w{w}-{i}" for w in range(4) for i in range(25))
    for writer in range(4):  # each writer's rows in its own order
        assert [i for i in held if i.startswith(f"w{writer}-")] == [f"w{writer}-{i}" for i in range(25)]
        np.testing.assert_array_equal(store.arrays(store.named(f"w{writer}-20"))["labels"], [writer] * 40)


def _append_until_killed(root: Path, told: int) -> None:
    store = Results(root)
    for number in range(10**6):
        row_id = f"{os.getpid()}-{number}"
        one = row(row_id, metric="r2", classes=["class"] * (3000 * (number % 2)))
        store.append(one, {"labels": np.full(40, float(number))})
        os.write(told, f"{row_id} {number}\n".encode())


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    store, random = Results(tmp_path), np.random.default_rng(0)
    acknowledged: dict[str, int] = {}
    for _ in range(8):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                _append_until_killed(tmp_path, write)
            finally:
                os._exit(1)
        os.close(write)
        with open(read) as said:
            first = said.readline()
            time.sleep(random.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            text = first + said.read()
        acknowledged |= {
            one.split()[0]: int(one.split()[1]) for one in text.splitlines(keepends=True) if one.endswith("\n")
        }
        rows = {one.id: one for one in store.rows()}
        assert acknowledged.keys() <= rows.keys()
        for row_id in rows:  # a row that can be read has its arrays, also one that was not acknowledged any more
            np.testing.assert_array_equal(
                store.arrays(rows[row_id])["labels"], np.full(40, float(row_id.split("-")[1]))
            )
    assert len(acknowledged) >= 8
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def _die_in_a_commit(path: Path) -> None:
    """A process writes to the database and is killed before its transaction ends."""
    if (child := os.fork()) == 0:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA cache_size = 1")  # changed pages go to the disk before the commit
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE results SET body = json_set(body, '$.test', 0.0)")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_writer_killed_in_the_middle_of_a_commit_leaves_the_state_before(tmp_path: Path) -> None:
    """Pages written to the database and the journal not yet gone: the next one to open it rolls back."""
    store = Results(tmp_path)
    for number in range(30):
        store.append(row(f"r{number}", classes=[f"{number}"] * 500))
    want = store.rows()
    _die_in_a_commit(store.path)
    assert store.path.with_name("results.sqlite-journal").stat().st_size > 0
    torn = store.path.read_bytes()
    assert store.rows() == want
    assert store.path.read_bytes() != torn


def test_who_waits_too_long_for_another_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Results(tmp_path)
    store.append(row("a"))
    monkeypatch.setattr(schema, "TIMEOUT", 0.05)
    with sqlite3.connect(store.path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(MlfusionError, match=r"cannot read results.*locked"):
            store.rows()
        other.execute("ROLLBACK")
    assert ids(store) == ["a"]


def test_a_row_that_cannot_be_saved_now_is_kept_beside_and_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, arrays = Results(tmp_path), {"labels": np.arange(40) % 2}
    store.append(row("a"))
    monkeypatch.setattr(schema, "TIMEOUT", 0.05)
    with sqlite3.connect(store.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with caplog.at_level(logging.WARNING):
            store.append(row("b"), arrays)
            store.append(row("c"))
        assert "result b is kept in" in caplog.text and "takes it over" in caplog.text
        assert ids(store) == ["a"] and store.find("b") == row("b")  # it is not made again
        other.execute("ROLLBACK")
    waiting = tmp_path / "waiting" / "c.json"
    waiting.write_bytes(waiting.read_bytes().replace(b"0.75", b"0.95"))
    assert store.find("c") is None  # a changed byte
    store.append(row("d"))
    assert ids(store) == ["a", "b", "d"] and store.rows()[1] == row("b")
    assert store.arrays(row("b"))["labels"].tolist() == arrays["labels"].tolist()
    assert [path.name for path in (tmp_path / "waiting").iterdir()] == ["c.json"]


# --- places that do not let ------------------------------------------------------------------------------------------


def test_a_row_that_cannot_be_saved_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    place = tmp_path / "results"
    place.write_text("a file where a folder should be")
    for arrays in (None, {"labels": np.zeros(40)}):
        with pytest.raises(MlfusionError, match=r"cannot save results in '.*results'.*--results PATH"):
            Results(place).append(row(), arrays)
    with pytest.raises(MlfusionError, match=r"cannot read results in .*not a folder"):
        Results(place).rows()
    assert place.read_text() == "a file where a folder should be"


def in_a_child(work: Callable[[], str]) -> str:
    """What `work` says in a process of its own, whose limits and rights may be changed."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(write, work().encode())
        except (MlfusionError, AssertionError) as err:
            os.write(write, f"{type(err).__name__}: {err}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text


def test_a_full_disk_is_an_error_and_costs_no_row_that_was_there(tmp_path: Path) -> None:
    store = Results(tmp_path)
    store.append(row("before"))

    def work() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (store.path.stat().st_size + 4096, resource.RLIM_INFINITY))
        store.append(row("cut", classes=["class"] * 20_000))
        return "saved"

    said = in_a_child(work)
    assert "ResultsUnusable: cannot save results in" in said and "Nothing was lost but this row; make room" in said
    store.append(row("after"))
    assert ids(Results(tmp_path)) == ["before", "after"]


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that can be read by everybody and, once `chmod` is done, written by nobody but its owner."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def _as_nobody(folder: Path, work: Callable[[], str]) -> str:
    def without_rights() -> str:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        assert not os.access(folder, os.W_OK)
        return work()

    folder.chmod(0o555)
    return in_a_child(without_rights)


def test_a_folder_that_may_not_be_written_is_read(read_only: Path) -> None:
    Results(read_only).append(row("a"), labelled(1))
    Results(read_only).append(row("b"))

    def work() -> str:
        store = Results(read_only)
        assert store.find("b") == row("b") and len(store.listing()) == 2
        assert len(store.arrays(row("a"))["labels"]) == 40
        return " ".join(ids(store))

    assert _as_nobody(read_only, work) == "a b"

    def save() -> str:
        Results(read_only).append(row("c"))
        return "saved"

    assert "ResultsUnusable: cannot save results in" in _as_nobody(read_only, save)
    read_only.chmod(0o755)
    assert ids(Results(read_only)) == ["a", "b"]


def test_a_torn_commit_in_a_folder_that_may_not_be_written_says_what_to_do(read_only: Path) -> None:
    store = Results(read_only)
    for number in range(30):
        store.append(row(f"r{number}", classes=[f"{number}"] * 500))
    _die_in_a_commit(store.path)

    def work() -> str:
        return " ".join(ids(store))

    assert "must be undone first, for which this folder may not be written" in _as_nobody(read_only, work)
    read_only.chmod(0o755)
    assert len(ids(store)) == 30


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_arrays_that_would_be_pickled_are_refused_and_never_loaded(tmp_path: Path) -> None:
    store = Results(tmp_path)
    with pytest.raises(ValueError, match=r"labels are of type object.*Python objects"):
        store.append(row("a"), {"labels": np.array([{}] * 40, dtype=object)})
    assert store.rows() == [] and not list(tmp_path.rglob("*a*.npz"))
    store.append(row("b"), {"labels": np.zeros(40, int)})
    np.savez(tmp_path / "arrays" / "b.npz", labels=np.array([{}] * 40, dtype=object))
    with pytest.raises(MlfusionError, match=r"cannot be read.*type object"):
        store.arrays(store.rows()[0])


def test_arrays_that_are_gone_or_damaged_say_how_to_make_them_again(tmp_path: Path) -> None:
    store = Results(tmp_path)
    store.append(row("a"))
    again = "mlfusion results rerun a --keep"
    with pytest.raises(MlfusionError, match=f"were not kept.*{again}"):
        store.arrays(row("a"))
    (tmp_path / "arrays").mkdir()
    for bytes_ in (b"", b"PK\x03\x04 not a whole archive"):
        (tmp_path / "arrays" / "a.npz").write_bytes(bytes_)
        with pytest.raises(MlfusionError, match=f"cannot be read.*{again}"):
            store.arrays(row("a"))
    store.keep_arrays(row("a"), {"labels": np.arange(40) % 2})
    assert store.arrays(row("a"))["labels"].tolist() == [0, 1] * 20


# --- what is no row, and what is no database -------------------------------------------------------------------------

BAD = [
    ({"test": float("nan")}, "test is nan, not a finite number"),
    ({"test": "0.5"}, "test is '0.5', not a finite number"),
    ({"seed": True}, "seed is True, not a whole number"),
    ({"grid": "huge"}, "grid is 'huge'; allowed: 'paper', 'quick'"),
    ({"layers": [1, "2"]}, r"layers\[1\] is '2', not a whole number"),
    ({"images": {"train": 1}}, "images lacks test"),
    ({"metrics": 3}, "metrics is 3, not an object"),
    ({"metrics": {"kind": "colour"}}, "metrics.kind is 'colour'; allowed: 'class', 'labels', 'number'"),
    ({"metrics": {"kind": "number", "r2": float("inf")}}, "metrics.r2 is inf, not a finite number"),
    ({"attention": {"layers": [1]}}, "attention lacks kinds"),
    ({"versions": {"numpy": "2", "torch": 2}}, "versions.torch is 2, not text"),
    ({"features": [key("k"), key("t"), key("u")]}, r"features is \['"),
    ({"features": ["../../../etc", key("t")]}, r"features\[0\] '../../../etc' is no key of a cache entry"),
    ({"layers": []}, r"layers is \[\]: .*length >= 1"),
    ({"layers": [5]}, "layers has 5; the model has 4"),
    ({"depth": 10**9}, "depth is 1000000000; allowed: at most 1000"),
    ({"images": {"train": 1, "test": 0}}, "images.test is 0; allowed: at least 1"),
    ({"test": 1e308}, r"test is 1e\+308; allowed: at most 1"),
    ({"seconds": -1.0}, "seconds is -1.0; allowed: at least 0"),
    ({"classes": []}, "classes is empty"),
    ({"classes": ["a", "b", "c"]}, "metrics has 2 scores by class; there are 3 classes"),
    ({"metric": "r2"}, "metric is 'r2'; the metrics beside it are of balanced_accuracy"),
    ({"probe": "cls-last/linear; touch x #"}, "allowed: the name of one probe"),
    ({"probe": "cls-{last,all-layers}/linear"}, "allowed: the name of one probe"),
    ({"created": "yesterday"}, "created 'yesterday' is no time"),
    ({"tokens": ["cls", "sum"]}, r"tokens\[1\] is 'sum'; allowed: 'cls', 'ap'"),
    ({"model": "half a \ud83d"}, "holds half a character"),
    ({"dataset": "a\0b"}, "holds a NUL"),
    ({"model": "m" * 5000}, "model is .*length <= 1000"),
    ({"at_end": {"lr": "sideways"}}, "at_end is .*allowed: 'smallest' and 'largest'"),
    ({"sources": row_object()["sources"] | {"options": ["; touch x"]}}, "cannot be options of mlfusion extract"),
    ({"attention": {"layers": [1], "kinds": ["cls"], "mean": [0.5, 0.5], "sd": [0.1]}}, "attention has lists of diff"),
    ({"attention": {"layers": [9], "kinds": ["cls"], "mean": [1.0], "sd": [0.0]}}, "attention.layers has 9"),
    ({"halving": 1}, "halving is 1, not true or false"),
    ({"shots": 2.5}, "shots is 2.5, not a whole number"),
    ({"precision": "auto"}, "precision is 'auto'; allowed: 'float32', 'bfloat16'"),
    ({"id": "../../outside"}, "id '../../outside' cannot name a file; allowed: letters, digits"),
    ({"id": "a\n"}, "cannot name a file"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_is_no_row_is_neither_saved_nor_taken_over(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    store = Results(tmp_path)
    bad = msgspec.structs.replace(row(), **changes)  # nothing is checked before it is saved
    with pytest.raises(ValueError, match=message):
        store.append(bad)
    with pytest.raises(MlfusionError, match=rf"row 2 is no result: .*{message}"):
        store.take([row("good"), bad])
    assert store.rows() == []
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (row_object("good"), row_object(**changes))))
    with pytest.raises(MlfusionError, match=rf"rows\.jsonl line 2 is no result: .*{message}"):
        store.take_from(path)
    assert store.rows() == []


def test_a_row_that_another_program_spoilt_is_named_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Results(tmp_path)
    for name in "abc":
        store.append(row(name))
    for change in (
        "json_set(body, '$.test', 0.99)",
        "'{'",
        "json_set(body, '$.model', 'other')",
        "replace(body, '0.75', '0.95')",
    ):
        with sqlite3.connect(store.path) as other:
            if "{'" not in change:
                other.execute(f"UPDATE results SET body = {change} WHERE id = 'b'")
        for read in (lambda: ids(store), lambda: [one["id"] for one in store.listing()]):
            with caplog.at_level(logging.WARNING):
                assert read() == ["a", "c"]
            assert re.search(
                r"result b in .*results.sqlite is damaged: it does not match its digest.*mlfusion probe", caplog.text
            )
            caplog.clear()
        assert store.find("b") is None and store.count() == 3
        with pytest.raises(MlfusionError, match=r"result b in .* is damaged"):
            store.named("b")
    store.append(row("b"))  # as the same `mlfusion probe` does
    assert sorted(ids(store)) == ["a", "b", "c"] and store.named("b") == row("b")


def test_a_changed_list_of_classes_is_named_with_its_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Results(tmp_path)
    store.append(row("a"))
    store.append(row("b", classes=["x", "y"]))
    with sqlite3.connect(store.path) as other:
        other.execute("UPDATE classes SET names = replace(names, 'x', 'z')")
    assert ids(store) == ["a"] and "its list of classes does not match its digest" in caplog.text


def test_a_flipped_bit_never_changes_a_value_without_a_word(tmp_path: Path) -> None:
    """Outcomes: the same rows, fewer rows with a warning, or an error of ours; nothing else is read."""
    store, flipped, random = Results(tmp_path / "whole"), Results(tmp_path / "flipped"), np.random.default_rng(0)
    store.take([row(f"r{n}", seed=n, model=f"m{n % 3}", test=n / 100) for n in range(20)])
    true, whole = {one.id: one for one in store.rows()}, store.path.read_bytes()
    flipped.root.mkdir()
    said = Said()
    logging.getLogger("mlfusion").addHandler(said)
    outcomes = {"same": 0, "warned": 0, "refused": 0}
    for _ in range(examples(300)):
        at, bit = int(random.integers(len(whole))), int(random.integers(8))
        flipped.path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        said.lines.clear()
        try:
            read = {one.id: one for one in flipped.rows()}
            listed = {one["id"]: one["test"] for one in flipped.listing()}
        except MlfusionError:
            outcomes["refused"] += 1
            continue
        assert all(true.get(name) == one for name, one in read.items()), at
        assert all(true[name].test == test for name, test in listed.items()), at
        outcomes["warned" if said.lines else "same"] += 1
        assert said.lines or read.keys() == listed.keys() == true.keys(), at
    logging.getLogger("mlfusion").removeHandler(said)
    assert min(outcomes.values()) > 0, outcomes


class Said(logging.Handler):
    """What is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.parametrize("name", [name for name in row_object() if name != "id"])
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({k: v for k, v in row_object().items() if k != name}))
    with pytest.raises(MlfusionError, match=f"line 1 is no result: row lacks {name}"):
        Results(tmp_path).take_from(path)


def test_fields_of_a_newer_version_are_let_be(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    newer = row_object(calibration={"ece": 0.1})
    path.write_text(json.dumps(newer | {"images": newer["images"] | {"validation": 3}}))
    assert Results(tmp_path).take_from(path) == (1, 0, ())
    assert Results(tmp_path).rows() == [row()]


def test_what_is_missing_stays_none_and_is_not_written(tmp_path: Path) -> None:
    one = row()
    assert (one.shots, one.smoothing, one.attention, one.selected.dropout) == (None, None, None, None)
    assert one.halving is one.streamed is False
    assert msgspec.to_builtins(one) == row_object() | {"classes": ("null", "µ-ein")} | {
        name: msgspec.to_builtins(one)[name] for name in ("layers", "tokens", "features", "metrics", "sources")
    }
    assert decode(encode(one)) == one
    given = row(shots=2, halving=True, smoothing=0.1)
    assert msgspec.to_builtins(given).items() >= {"shots": 2, "halving": True, "smoothing": 0.1}.items()
    assert (given.options(), one.options()) == ("2 shots, halving, labels smoothed by 0.1", "")


def test_a_row_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        row().test = 1.0  # type: ignore[misc]


def test_databases_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    store = Results(tmp_path)
    store.path.write_bytes(b"not a database, but longer than a header of one hundred bytes" * 9)
    with pytest.raises(MlfusionError, match=r"results.sqlite is damaged.*\.recover"):
        store.rows()
    before = store.path.read_bytes()
    with pytest.raises(MlfusionError, match="is damaged"):
        store.append(row("a"))
    assert store.path.read_bytes() == before
    store.path.unlink()
    with sqlite3.connect(store.path) as other:
        other.execute("CREATE TABLE notes (text)")
    with pytest.raises(MlfusionError, match="not a database of mlfusion's"):
        store.append(row("a"))
    store.path.unlink()
    store.append(row("a"))
    for number, message in (
        (99, r"format 99.*pip install -U mlfusion"),
        (2, r"format 2, of a version that was never released; allowed: 3 and 4\. Name another folder"),
    ):
        with sqlite3.connect(store.path) as newer:
            newer.execute(f"PRAGMA user_version = {number}")
        with pytest.raises(MlfusionError, match=message):
            store.rows()


def test_no_results_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(MlfusionError, match=r"does not exist.*mlfusion probe --dataset"):
        Results(tmp_path / "nowhere").require()
    with pytest.raises(MlfusionError, match=r"holds no row yet.*mlfusion probe --dataset"):
        Results(tmp_path).require()
    (tmp_path / "results.sqlite").touch()  # created, and killed before the first commit
    with pytest.raises(MlfusionError, match=r"holds no row yet"):
        Results(tmp_path).require()
    Results(tmp_path).append(row("a"))
    assert ids(Results(tmp_path)) == ["a"]


# --- to others -------------------------------------------------------------------------------------------------------


def study() -> list[Row]:
    attention = {"layers": [1, 2], "kinds": ["cls", "ap"], "mean": [0.25, 0.75], "sd": [0.0, 0.125]}
    return [
        row("a", shots=2),
        row("b", probe="alf", attention=attention),
        row("c", dataset='µ, "quoted"\nline', test=1e-17),
    ]


def test_a_table_has_a_column_for_each_field(tmp_path: Path) -> None:
    store = Results(tmp_path)
    for one in study():
        store.append(one)
    table = store.to_pandas()
    assert list(table["id"]) == ["a", "b", "c"] and table["metrics.loss"].tolist() == [0.9] * 3
    assert (
        table["shots"].dtype == "Int64"
        and table["shots"][0] == 2
        and table["shots"].isna().tolist() == [False, True, True]
    )
    assert table["attention.mean"][1] == [0.25, 0.75] and list(store.to_pandas(probe="alf")["id"]) == ["b"]
    assert export.frame([]).empty


@pytest.mark.parametrize("early", [0, 2, 1000])
def test_a_csv_has_the_columns_of_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: int) -> None:
    """Wherever the first row with a further field stands, and also if rows are read one after the other."""
    monkeypatch.setattr(export, "EARLY", early)
    rows = [row("a"), row("b"), row("c", shots=2), row("d"), row("e", smoothing=0.1)]
    store = Results(tmp_path / "results")
    store.take(rows)
    with store.scan() as scanned:
        for number, given in enumerate((rows, iter(rows), scanned)):
            export.write(given, tmp_path / f"{number}.csv")
    read = pandas.read_csv(tmp_path / "0.csv")
    assert read["id"].tolist() == list("abcde") and read["shots"].tolist()[2] == 2
    assert read["smoothing"].isna().tolist() == [True] * 4 + [False]
    assert list(read.columns) == list(export.frame(rows).columns)
    assert len({(tmp_path / f"{number}.csv").read_bytes() for number in range(3)}) == 1


def test_exports_say_the_same(tmp_path: Path) -> None:
    for form in export.FORMATS:
        export.write(study(), tmp_path / "deep" / f"rows.{form}")
    comma, columns = pandas.read_csv(tmp_path / "deep/rows.csv"), pandas.read_parquet(tmp_path / "deep/rows.parquet")
    assert list(comma.columns) == list(columns.columns) == list(export.frame(study()).columns)
    for name in ("id", "dataset", "test", "seed", "metrics.loss", "created"):
        assert comma[name].tolist() == columns[name].tolist() == export.frame(study())[name].tolist()
    assert json.loads(comma["metrics.recall"][0]) == columns["metrics.recall"][0].tolist() == [0.5, 1.0]
    assert json.loads(comma["classes"][0]) == ["null", "µ-ein"]
    again = Results(tmp_path / "again")
    assert again.take_from(tmp_path / "deep" / "rows.jsonl") == (3, 0, ())
    assert again.rows() == study()
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["rows.csv", "rows.jsonl", "rows.parquet"]
    with pytest.raises(UnknownName, match="no form of export named 'xlsx'"):
        export.write(study(), tmp_path / "rows.xlsx")
    (tmp_path / "file").touch()
    with pytest.raises(MlfusionError, match="cannot write"):
        export.write(study(), tmp_path / "file" / "rows.csv")


@pytest.mark.parametrize("kept", [1, 20, 200, -1])
def test_a_torn_line_is_left_out(tmp_path: Path, kept: int, caplog: pytest.LogCaptureFixture) -> None:
    torn = encode(row("torn", dataset="µ"))[:kept]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([encode(row("a", test=0.1)), encode(row("b")), torn, b""]))
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(encode(row("a", test=0.2)) + b"\n")
    with caplog.at_level(logging.WARNING):
        assert Results(tmp_path).take_from(tmp_path / "rows.jsonl") == (2, 0, ())
    assert [(r.id, r.test) for r in Results(tmp_path).rows()] == [("b", 0.75), ("a", 0.2)]  # of one id the last counts
    assert "line 3 is torn" in caplog.text


def labelled(first: int) -> dict[str, np.ndarray]:
    """Arrays of a row that begin with this label."""
    return {"labels": np.array([first] + [0] * 39)}


def test_another_folder_is_taken_over_with_its_arrays(tmp_path: Path) -> None:
    here, there = Results(tmp_path / "here"), Results(tmp_path / "there")
    here.append(row("a", test=0.9), labelled(1))
    there.append(row("a", created="2026-02-01T00:00:00+00:00"), labelled(0))
    there.append(row("b"), labelled(1))
    there.append(row("c"))
    assert here.take(there.rows(), there.root) == (2, 0, ("a",))  # ours stays, though theirs is newer
    assert [(one.id, one.test) for one in here.rows()] == [("a", 0.9), ("b", 0.75), ("c", 0.75)]
    assert [here.arrays(row(name))["labels"][0] for name in "ab"] == [1, 1]
    assert here.take(there.rows(), there.root) == (0, 2, ("a",))
    assert here.take(there.rows(), there.root, replace=True) == (1, 2, ())
    assert here.find("a") == there.find("a") and here.arrays(row("a"))["labels"][0] == 0


@pytest.mark.parametrize("kind", ["link", "linked folder", "pipe", "bomb", "text", "other shape"])
def test_arrays_that_lead_out_or_are_no_arrays_are_not_taken_over(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = Results(tmp_path / "here"), Results(tmp_path / "there")
    there.append(row("a"), labelled(1))
    path, secret = there.root / "arrays" / "a.npz", tmp_path / "secret"
    whole = path.read_bytes()
    path.unlink()
    secret.write_text("a secret")
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "linked folder":
        path.parent.rmdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "a.npz").write_bytes(whole)
        path.parent.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "bomb":
        np.savez_compressed(path, probabilities=np.zeros((2**25, 2), np.float32))
    elif kind == "text":
        path.write_text("no archive")
    else:
        np.savez(path, labels=np.zeros(41, int))
    with pytest.raises(MlfusionError, match=r"the arrays of result a cannot be read.*results rerun a --keep"):
        there.arrays(row("a"))
    assert here.take_from(there.root) == (1, 0, ()) and not (here.root / "arrays" / "a.npz").exists()
    assert "the arrays of result a are not taken over" in caplog.text


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"probabilities": np.full((40, 2), np.nan)}, "no share of one"),
        ({"probabilities": np.full((40, 2), 2.0)}, "no share of one"),
        ({"probabilities": np.zeros((40, 10))}, r"shape \(40, 10\).*ask for \(40, 2\)"),
        ({"labels": np.full(40, 7)}, "labels are 7 to 7; allowed: 0 to 1"),
        ({"labels": np.array(["x"] * 40)}, "labels are of type <U1"),
        ({"attention": np.zeros((40, 3))}, "ask for none"),
        ({"notes": np.zeros(40)}, "no array of a row is named 'notes'"),
    ],
)
def test_arrays_that_are_not_the_rows_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    store = Results(tmp_path)
    with pytest.raises(ValueError, match=message):
        store.append(row("a"), arrays)
    assert not store.path.exists()
    store.append(row("a"))
    (tmp_path / "arrays").mkdir()
    np.savez(tmp_path / "arrays" / "a.npz", **arrays)
    if "notes" in arrays:  # of a later version: not looked at
        assert store.arrays(row("a")) == {}
    else:
        with pytest.raises(MlfusionError, match=f"cannot be read.*{message}"):
            store.arrays(row("a"))


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON results BEGIN UPDATE results SET body = replace(body, '0.75', '0.99'); END",
        "CREATE VIEW v AS SELECT 1",
        "CREATE TABLE more (x)",
        "DROP INDEX by_place",
    ],
)
def test_a_database_with_other_tables_is_refused(tmp_path: Path, statement: str) -> None:
    store = Results(tmp_path)
    store.append(row("a"))
    with sqlite3.connect(store.path) as other:
        other.execute("ANALYZE")  # harmless, and anybody may do it
    assert ids(store) == ["a"]
    with sqlite3.connect(store.path) as other:
        other.execute(statement)
    for use in (
        store.rows,
        store.listing,
        lambda: store.append(row("b")),
        lambda: Results(tmp_path / "x").take_from(tmp_path),
    ):
        with pytest.raises(MlfusionError, match=r"other tables, views or triggers.*--results PATH"):
            use()


def test_a_database_that_is_a_link_or_a_pipe_is_not_followed(tmp_path: Path) -> None:
    Results(tmp_path / "true").append(row("a"))
    for make in (lambda path: path.symlink_to(tmp_path / "true" / "results.sqlite"), os.mkfifo):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        make(folder / "results.sqlite")
        for use in (Results(folder).rows, lambda: Results(folder).append(row("b"))):  # noqa: B023
            with pytest.raises(MlfusionError, match=r"is no regular file.*a link to the whole folder"):
                use()
    (tmp_path / "linked").symlink_to(tmp_path / "true")  # the user's own choice
    assert ids(Results(tmp_path / "linked")) == ["a"]


def test_an_emptied_database_beside_arrays_is_damage(tmp_path: Path) -> None:
    store = Results(tmp_path)
    store.append(row("a"), labelled(1))
    store.path.write_bytes(b"")
    for use in (store.rows, lambda: store.append(row("b"))):
        with pytest.raises(MlfusionError, match=r"results.sqlite is empty, and .*arrays holds arrays.*rm "):
            use()
    store.path.unlink()  # as it says
    store.append(row("b"))
    assert ids(store) == ["b"]


def test_drafts_of_arrays_that_a_kill_left_are_swept(tmp_path: Path) -> None:
    store = Results(tmp_path)
    store.append(row("a"), labelled(1))
    dead = subprocess.Popen([sys.executable, "-c", "from mlfusion.system import disk; print(disk.claim())"], stdout=-1)
    claim = dead.communicate()[0].decode().strip()
    (tmp_path / "arrays" / f".draft~{claim}").write_bytes(b"half")
    store.append(row("b"), labelled(1))
    assert sorted(path.name for path in (tmp_path / "arrays").iterdir()) == ["a.npz", "b.npz"]


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("folder", sorted(path.name for path in GOLDEN.glob("results-format-*")))
def test_results_of_every_format_are_read_and_added_to(tmp_path: Path, folder: str) -> None:
    """A promise: whatever changes, rows that a released version wrote are read as they were."""
    root = tmp_path / "results"
    shutil.copytree(GOLDEN / folder, root)
    store = Results(root)
    before = (root / "results.sqlite").read_bytes()
    expected = json.loads((GOLDEN / folder / "expected.json").read_text())
    for _ in range(2):
        assert [msgspec.to_builtins(one) for one in store.rows()][: len(expected)] == [
            as_tuples(one) for one in expected
        ]
        assert [one["id"] for one in store.listing()][: len(expected)] == [one["id"] for one in expected]
        for one in store.rows()[: len(expected)]:
            arrays = store.arrays(one)
            assert arrays["probabilities"].shape == (one.images.test, len(one.classes))
            assert measures.scores(arrays["labels"], arrays["probabilities"])["balanced_accuracy"] == pytest.approx(
                one.test
            )
        if (root / "results.sqlite").read_bytes() == before:
            store.append(row("new"))  # brings a former format to today's
    assert ids(store)[-1] == "new"


def as_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: as_tuples(item) for name, item in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def test_reading_results_needs_neither_torch_nor_pandas_nor_altair() -> None:
    code = "import sys, mlfusion.results; print([m for m in ('torch', 'pandas', 'altair') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_code_in_the_page_about_results_runs(tmp_path: Path) -> None:
    store = Results(tmp_path / "results")
    store.append(row("a"), labelled(1))
    page = (Path(__file__).parent.parent / "docs" / "results.md").read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(code, held := {})
        assert held["results"].rows() == [row("a")]
    told = set(re.findall(r"`(\w+)`", page.split("## How sure")[1].split("Seeds and images")[0]))
    assert {"interval", "difference", "wilcoxon", "layer_cka"} <= told and told - {"Spread"} <= set(dir(statistics))


def test_rows_are_found_by_every_name_that_a_command_takes(tmp_path: Path) -> None:
    """A model's or data set's name, its hub id or its path; a probe's alias."""
    folder = tmp_path / "models" / "m"
    folder.mkdir(parents=True)
    store = Results(tmp_path / "results")
    sources = msgspec.structs.replace(row("a").sources, model=str(folder), dataset="org/set")
    one = msgspec.structs.replace(
        row("a"), model="m", dataset="set", probe="cls+ap-all-layers/attentive", sources=sources
    )
    store.append(one)
    store.append(msgspec.structs.replace(row("b"), model="other", dataset="another", probe="cls-last/linear"))
    for filters in (
        {"model": "m"},
        {"model": str(folder)},
        {"dataset": "set"},
        {"dataset": "org/set"},
        {"probe": "ALF"},
    ):
        assert store.rows(**filters) == [one], filters
    os.chdir(tmp_path)
    assert store.rows(model="models/m") == store.rows(model="./models/m") == [one]
    assert store.rows(model="other/m") == [] and store.count(probe="aat") == 0


def test_a_row_that_replaces_another_does_not_take_over_its_arrays(tmp_path: Path) -> None:
    store = Results(tmp_path)
    for name in ("a", "b"):
        store.append(row(name), labelled(1))
    newer = "2999-01-01T00:00:00+00:00"
    other = msgspec.structs.replace(row("a"), created=newer, test=0.125)
    same = msgspec.structs.replace(row("b"), created=newer)
    assert store.take([other, same], replace=True) == (2, 0, ())
    with pytest.raises(MlfusionError, match="were not kept"):
        store.arrays(other)
    assert store.arrays(same)["labels"][0] == 1
