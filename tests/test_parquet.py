"""Parquet on this machine is read where it lies: what the file holds now, in batches, with paths below the data set."""

import hashlib
import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from forms import rows
from test_pictures import encoded

import mlfusion
from mlfusion import datasets
from mlfusion.datasets import ReadOptions, remote
from mlfusion.datasets import split as split_module
from mlfusion.errors import BadData

DATE = 315532800  # of every file here, so that a copy by date would not notice that it was replaced


def write(path: Path, cells: list, labels: list[str], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": labels}), path, **options)
    os.utime(path, (DATE, DATE))
    return path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["set", "set/train.parquet"])
def test_a_file_that_was_replaced_is_read_as_it_is_now(stream, place, tmp_path):
    """In one process, with the same size and date: labels, images and keys are those of the new file; the old set stays."""
    keys = set()
    for turn in range(2):
        bodies = [encoded(n % 2, 10 * turn + n, "BMP") for n in range(6)]  # all of one size
        labels = [["cat", "dog"][(n + turn) % 2] for n in range(6)]
        file = write(tmp_path / "set/train.parquet", bodies, labels, compression="none", use_dictionary=False)
        sizes = {file.stat().st_size}
        split = datasets.load(place, ReadOptions(stream=stream)).split("train")
        assert [(label, body) for _, label, body in rows(split)] == list(zip(labels, bodies, strict=True))
        [one] = mlfusion.extract("formula-vit", place, splits="train", layers="last", stream=stream)
        keys.add(one.entry.key)
        os.replace(file, tmp_path / "old")  # as a file is replaced by tar or rsync; its reader keeps it open
        shutil.copy(tmp_path / "old", file)
        assert [body for _, _, body in rows(split)] == bodies
    assert len(sizes) == 1 and len(keys) == 2


def test_no_copy_is_made(tmp_path, monkeypatch):
    import datasets as library

    monkeypatch.setattr(library, "load_dataset", lambda *_, **__: pytest.fail("the datasets library was asked"))
    write(tmp_path / "set/train.parquet", [encoded(n % 2, n) for n in range(4)], ["a", "b"] * 2)
    before = set(tmp_path.rglob("*"))
    assert len(rows(datasets.load("set").split("train"))) == 4
    assert set(tmp_path.rglob("*")) == before


def test_a_large_row_group_is_read_in_batches_in_any_order(tmp_path, monkeypatch):
    """One group of 40 rows in batches of few rows; forwards, backwards and at random, against the bytes that were written."""
    random = np.random.default_rng(0)
    bodies = [random.bytes(int(random.integers(1, 4000))) for _ in range(40)]
    write(tmp_path / "set/train.parquet", bodies, ["a", "b"] * 20)
    monkeypatch.setattr(remote, "BATCH_BYTES", 8000)
    split = datasets.load("set").split("train")
    for order in (range(40), range(39, -1, -1), random.permutation(40)):
        assert [split.encoded(int(row)) for row in order] == [bodies[row] for row in order]
    held = split.encoded.rows._read
    assert len(held) == remote.CACHED_BATCHES and all(len(cells) < 10 for _, _, cells in held)


def test_rows_travel_to_processes_that_open_their_own_file(tmp_path):
    bodies = [encoded(n % 2, n) for n in range(30)]
    write(tmp_path / "set/train.parquet", bodies, ["a", "b"] * 15, row_group_size=5)
    split = datasets.load("set").split("train")
    assert split.encoded(3) == bodies[3]  # the file is open in this process
    assert pickle.loads(pickle.dumps(split)).encoded(3) == bodies[3]
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(split.encoded, range(30))) == bodies


@pytest.mark.parametrize("inner", ["train.parquet", "train/0000.parquet", "data/train-00000-of-00001.parquet"])
@pytest.mark.parametrize("started", [".", "set", "elsewhere"])
def test_paths_in_cells_are_below_the_data_set_wherever_the_command_is_started(inner, started, tmp_path, monkeypatch):
    bodies = [encoded(n % 2, n) for n in range(4)]
    for n, body in enumerate(bodies):
        at = tmp_path / f"set/img/{n}.png" if n % 2 else (tmp_path / "set" / inner).parent / f"img/{n}.png"
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(body)
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "set" / inner, [{"bytes": None, "path": f"img/{n}.png"} for n in range(4)], ["a", "b"] * 2)
    monkeypatch.chdir(tmp_path / started)
    split = datasets.load(str(tmp_path / "set")).split("train")
    assert [split.read(row) for row in range(4)] == bodies


def test_paths_in_cells_may_begin_at_image_root_and_lead_out_of_nothing(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(encoded(0, 0))
    (tmp_path / "secret.png").write_bytes(encoded(0, 1))
    paths = ["0.png", "../secret.png", str(tmp_path / "secret.png"), "gone.png"]
    write(tmp_path / "set/train.parquet", [{"bytes": None, "path": path} for path in paths], ["a", "b"] * 2)
    split = datasets.load("set", ReadOptions(image_root=str(tmp_path / "images"))).split("train")
    assert split.read(0) == encoded(0, 0)
    for row, message in ((1, "outside the data set"), (2, "outside the data set"), (3, "No such file")):
        with pytest.raises(BadData, match=message):
            split.read(row)
    with pytest.raises(BadData, match="No such file"):
        datasets.load("set").split("train").read(0)


def test_configurations_are_chosen_and_never_joined(tmp_path):
    for n, config in enumerate(("small", "large")):
        write(tmp_path / f"set/{config}/train-0.parquet", [encoded(n, k) for k in range(2)], ["a", "b"])
    with pytest.raises(BadData, match=r"several configurations, in large, small; choose one with --config"):
        datasets.load("set")
    split = datasets.load("set", ReadOptions(config="small")).split("train")
    assert [body for _, _, body in rows(split)] == [encoded(0, k) for k in range(2)]


def test_one_thread_reads_the_digests_of_a_table_and_several_those_of_files(tmp_path, monkeypatch):
    """Rows come in order from one open file, so that other threads would only wait; a part of a split is no exception."""
    pools = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, threads: int) -> None:
            pools.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(split_module, "ThreadPoolExecutor", Pool)
    bodies = [encoded(n % 2, n) for n in range(40)]
    write(tmp_path / "set/train.parquet", bodies, ["a", "b"] * 20, row_group_size=7)
    table = datasets.load("set").split("train")
    found = [one.read_digests("set") for one in (table, table.take(np.arange(30, 3, -2), "part"))]
    assert pools == [1, 1]
    assert [bytes(one) for one in found[0]] == [hashlib.sha256(body).digest() for body in bodies]
    assert np.array_equal(found[1], found[0][30:3:-2])
    for n, body in enumerate(bodies):
        (tmp_path / f"files/train/{'ab'[n % 2]}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"files/train/{'ab'[n % 2]}/{n}.png").write_bytes(body)
    datasets.load("files").split("train").read_digests("files")
    assert pools[2] > 1
