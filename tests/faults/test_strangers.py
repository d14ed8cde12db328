"""What is not ours, or not of here: shards of other entries, other programs that read, roots that are written otherwise."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import workers
import zarr
from workers import IMAGES, Child, extract, files, numbers, published, right, spec, whole

from mlfusion.errors import MlfusionError
from mlfusion.store import FeatureStore
from mlfusion.store.verify import verify_entry

POOLED = "tokens/cls.ap.L1-3"


def refuses(root: Path) -> bool:
    try:
        right(FeatureStore(root).entry(spec()))
    except MlfusionError:
        return True
    return False


@pytest.mark.parametrize("record", [False, True])
def test_a_sound_shard_of_another_entry(record, trial, tmp_path, monkeypatch):
    """Of as many bytes, as good checksums and the same rows, but of another model: with its record or without."""
    root, other = tmp_path / "cache", tmp_path / "other"
    folder = extract(root).path
    with monkeypatch.context() as patch:
        patch.setattr(workers, "numbers", lambda rows, layer, kind: numbers(rows, layer, kind) + 1)
        extract(other)
    for shard in range(5):
        with trial("a sound shard of another entry put in place of one"):
            mine = folder / POOLED / "c" / str(shard)
            shutil.move(mine, tmp_path / "aside")
            shutil.copytree(other / "v3" / spec().key / POOLED / "c" / str(shard), mine)
            if not record:
                shutil.copy(tmp_path / "aside" / "commit.json", mine / "commit.json")
            assert list(verify_entry(folder))
            assert refuses(root)
            shutil.rmtree(mine)
            shutil.move(tmp_path / "aside", mine)
    whole(root)


def test_another_program_refuses_what_is_damaged(many, trial, tmp_path):
    """zarr-python reads the shards, checks the checksums we wrote, and gives NaN for a shard that is missing."""
    folder = extract(tmp_path / "cache").path
    array = zarr.open_array(folder / POOLED, mode="r")
    want = np.stack([np.concatenate([numbers(range(IMAGES), n, k) for k in ("cls", "ap")], 1) for n in (1, 2, 3)], 1)
    np.testing.assert_array_equal(array[:], want.astype(np.float16))
    random = np.random.default_rng(1)
    shard = folder / POOLED / "c/2/0/0/0"
    sound = shard.read_bytes()
    for _ in range(many(20, 400)):
        with trial("a flipped bit read by zarr-python"):
            at = int(random.integers(len(sound)))
            shard.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << int(random.integers(8))]) + sound[at + 1 :])
            with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it raises
                np.testing.assert_array_equal(array[:], want.astype(np.float16))
    shard.unlink()
    with trial("a missing shard read by zarr-python"):
        assert np.isnan(array[16:24]).all()
        np.testing.assert_array_equal(array[:16], want[:16].astype(np.float16))
    shard.write_bytes(sound)


ROOTS = {
    "relative": lambda home: Path("place/cache"),
    "with a slash behind": lambda home: f"{home}/place/cache/",
    "through a link": lambda home: home / "link" / "cache",
    "a link": lambda home: home / "linked cache",
    "from home": lambda home: "~/place/cache",
    "by way of the parent": lambda home: home / "place" / ".." / "place" / "cache",
}


@pytest.mark.parametrize("name", ROOTS)
def test_one_cache_however_it_is_written(name, trial, tmp_path, monkeypatch):
    """Nothing in a cache knows where it lies: it is found by any path, and after it was moved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "place").mkdir()
    os.symlink("place", tmp_path / "link")
    os.symlink("place/cache", tmp_path / "linked cache")
    want = files(extract(tmp_path / "place" / "cache").path)
    with trial("a root written otherwise, and moved"):
        before = published(tmp_path / "place" / "cache" / "v3" / spec().key)
        extract(ROOTS[name](tmp_path))
        assert published(tmp_path / "place" / "cache" / "v3" / spec().key) == before
        said = subprocess.run(
            [sys.executable, "-m", "mlfusion", "cache", "verify", "--json", "--cache", str(ROOTS[name](tmp_path))],
            capture_output=True,
            text=True,
            check=True,
        )
        assert '"entries": 1' in said.stdout
        (tmp_path / "place" / "cache").rename(tmp_path / "elsewhere 移動")
        assert files(whole(tmp_path / "elsewhere 移動").path) == want
        assert not any(str(tmp_path).encode() in data for data in want.values())


@pytest.mark.parametrize("name", ["e\u0301", "\u00e9", "🦆🦆", "." + "x" * 199], ids=range(4))
def test_names_that_look_alike(name, trial, tmp_path):
    """Composed and decomposed letters are two names, to us as to the file system."""
    with trial("names with spaces and of other scripts"):
        child = Child(extract, tmp_path / name)
        assert child.wait() == 0, child.said
        right(whole(tmp_path / name))
        assert [path.name for path in tmp_path.iterdir()] == [name]
