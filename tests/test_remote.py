"""Data sets on the hub, downloaded or read where they lie: the same entry of the cache, and nothing kept that was streamed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub
import numpy as np
import pytest
from forms import parquet, plain, rows, tars

from mlfusion import datasets
from mlfusion.datasets import ReadOptions, remote
from mlfusion.errors import BadData, Unavailable


def at_hub(endpoint: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in a process that takes `endpoint` for the hub and has an empty home."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    del env["HF_HUB_OFFLINE"]
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)


DATA = ("-m", "mlfusion", "data")

READ = """
import json, sys
from mlfusion import datasets
for stream in (True, True, False):
    reading = datasets.ReadOptions(stream=stream, id_column=sys.argv[2] or None)
    data = datasets.load(sys.argv[1], reading)
    print(json.dumps({
        name: [split.ids, split.labels.tolist(), split.classes]
        + [[split.digest(i).hex() for i in range(len(split))], [split.encoded(i).hex() for i in range(len(split))]]
        for name, split in data.splits.items()
    }), data.form, sep="|")
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", [tars, parquet])
def test_streamed_has_the_content_that_it_has_downloaded(form, tmp_path):
    whole = plain(tmp_path / "plain")
    folder = form(whole, tmp_path)
    with hub.serving({}, datasets={"someone/colours": folder}) as (endpoint, asked):
        said = at_hub(endpoint, tmp_path / "home", "-c", READ, "someone/colours", "id" if form is parquet else "")
    assert said.returncode == 0, said.stderr
    streamed, again, downloaded = (line.split("|") for line in said.stdout.splitlines())
    assert json.loads(streamed[0]) == json.loads(again[0]) == json.loads(downloaded[0])
    assert "read in place" in streamed[1] and "read in place" not in downloaded[1]
    train = json.loads(streamed[0])["train"]
    assert train[1] == whole.split("train").labels.tolist()
    assert [bytes.fromhex(one) for one in train[4]] == [body for _, _, body in rows(whole.split("train"))]
    assert [one for one in asked if "bytes=" in one]  # of files, not files
    assert (tmp_path / "home" / "mlfusion" / "indexes" / hub.COMMIT).is_dir()


@pytest.mark.slow
def test_an_index_is_made_once_and_goes_on_after_a_stop(tmp_path):
    """Of three tars the hub loses the last; what was indexed before is not read again."""
    folder = tars(plain(tmp_path / "plain", {"train": 2, "test": 1}), tmp_path)
    lost = (folder / "train" / "002.tar").read_bytes()
    with hub.serving({}, datasets={"someone/colours": folder}) as (endpoint, asked):
        (folder / "train" / "002.tar").write_bytes(lost[:700])
        first = at_hub(endpoint, tmp_path / "home", *DATA, "someone/colours", "--stream")
        assert first.returncode == 1
        assert "train/002.tar cannot be read as a tar" in first.stderr
        (folder / "train" / "002.tar").write_bytes(lost)
        asked.clear()
        second = at_hub(endpoint, tmp_path / "home", *DATA, "someone/colours", "--stream", "--json")
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["splits"][0]["images"] == 6
    fetched = [path.rsplit("/", 1)[-1] for path in asked if "/resolve/" in path and "train/" in path]
    assert set(fetched) == {"002.tar"}


def test_a_hub_that_falls_silent_is_no_bad_image(monkeypatch):
    """--skip-bad must not write down for ever that an image is bad which merely could not be fetched."""

    def silent(*_args, **_kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(remote, "open_file", silent)
    remote._range.cache_clear()
    ranges = remote.Ranges(("datasets/someone/colours@main/0.tar",), np.array([[0, 0, 9]]))
    split = datasets.Split("train", ("a",), np.zeros(1, np.int64), ("x",), ranges, datasets.Decoder())
    with pytest.raises(Unavailable, match="cannot be reached"):
        split.image(0)


@pytest.mark.slow
def test_what_cannot_be_streamed_says_so(tmp_path):
    plain(tmp_path / "plain", {"train": 1, "test": 1})
    with hub.serving({}, datasets={"someone/colours": tmp_path / "plain"}) as (endpoint, _):
        said = at_hub(endpoint, tmp_path / "home", *DATA, "someone/colours", "--stream")
        none = at_hub(endpoint, tmp_path / "home", *DATA, "someone/nothing", "--stream")
    assert "holds neither tars nor Parquet files; leave --stream out" in said.stderr
    assert "the hub has no data set 'someone/nothing' that you may read" in none.stderr
    assert said.returncode == none.returncode == 1


def test_parquet_in_a_folder_is_read_by_groups_of_rows(tmp_path, monkeypatch):
    import pyarrow.parquet

    whole = plain(tmp_path / "plain")
    folder = parquet(whole, tmp_path)
    for file in folder.glob("*.parquet"):
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(file), file, row_group_size=2)
    data = datasets.load(str(folder), ReadOptions(id_column="id"))
    fetched: list[int] = []
    read = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "read_row_group", lambda self, i, **kw: fetched.append(i) or read(self, i, **kw)
    )
    for name, want in whole.splits.items():
        split = data.split(name)
        assert rows(split) == rows(want)
    assert fetched == [0, 1, 2, 3, 4, 0, 1, 2]  # each once, in order
    np.testing.assert_array_equal(data.split("train").labels, whole.split("train").labels)


def test_images_of_the_hubs_files_are_fetched_by_runs(monkeypatch, tmp_path):
    """Four at a time, never over the end of a file, a large one alone; against slices of the files."""
    random = np.random.default_rng(0)
    bodies = [random.bytes(1000), random.bytes(700)]
    where = np.array(
        [(0, 10, 90), (0, 200, 100), (0, 320, 0), (0, 400, 77), (0, 500, 500), (1, 0, 100), (1, 100, 9), (1, 690, 10)]
    )
    paths = tuple(str(tmp_path / name) for name in "ab")
    for path, body in zip(paths, bodies, strict=True):
        Path(path).write_bytes(body)
    monkeypatch.setattr(remote, "MAX_RUN_BYTES", 600)
    remote._range.cache_clear()
    ranges = remote.Ranges(paths, where)
    assert [ranges(row) for row in range(8)] == [bodies[file][at : at + size] for file, at, size in where]
    # 0 to 3 at once; 4 alone in its file; 5 to 7 span 700 bytes, which is too much, so each alone.
    assert remote._range.cache_info().misses == 1 + 1 + 3
    Path(paths[0]).write_bytes(bodies[0][:450])
    remote._range.cache_clear()
    with pytest.raises(BadData, match=r"ends before byte 477|ends before byte 1,000"):
        ranges(4)
