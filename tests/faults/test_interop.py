"""What other programs make of our files: the same numbers to the bit, an error for what is damaged, NaN for what is not there.

Each reads in a process of its own: tensorstore and zarrs start threads of their own that no fork survives.
"""

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from workers import IMAGES, Child, extract, numbers

POOLED = "tokens/cls.ap.L1-3"
DTYPES = ["float16", "float32", "bfloat16", "int8"]


def by_tensorstore(folder: Path) -> np.ndarray:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    return tensorstore.open(spec, read=True, open=True).result().read().result()


def by_zarrs(folder: Path) -> np.ndarray:
    import zarrs

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_array(folder, mode="r")
        assert isinstance(array._async_array.codec_pipeline, zarrs.ZarrsCodecPipeline)
        return array[:]


def by_zarr(folder: Path) -> np.ndarray:
    return zarr.open_array(folder, mode="r")[:]


def by_h5py(folder: Path) -> np.ndarray:
    shards = sorted(folder.glob("c/*/tokens.h5"), key=lambda path: int(path.parent.name))
    parts = []
    for shard in shards:
        with h5py.File(shard) as file:
            parts.append(file["tokens"][:])
    return np.concatenate(parts)


PROGRAMS = {"zarr": by_zarr, "tensorstore": by_tensorstore, "zarrs": by_zarrs, "h5py": by_h5py}
ZARR = ["zarr", "tensorstore", "zarrs"]


@pytest.fixture
def installed() -> Callable[[str], None]:
    def check(program: str) -> None:
        if importlib.util.find_spec(program) is None:
            pytest.skip(f"needs {program}: pip install -e '.[dev]'")

    return check


def pooled() -> np.ndarray:
    """[images, layers, kinds, width] float16: what the formula says is in the stream of cls and ap."""
    every = range(IMAGES)
    layers = [np.concatenate([numbers(every, layer, kind) for kind in ("cls", "ap")], 1) for layer in (1, 2, 3)]
    return np.stack(layers, 1).astype(np.float16)


def reads(program: str, folder: Path, want: np.ndarray) -> None:
    got = PROGRAMS[program](folder)
    assert got.dtype == want.dtype
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_numbers_to_the_bit(dtype, program, installed, trial, tmp_path):
    """In every type that tokens are kept in: as they are stored, so that no program decodes them for us."""
    installed(program)
    entry = extract(tmp_path / "cache", format="hdf5" if program == "h5py" else "zarr", dtype=dtype)
    stream = next(stream for stream in entry.streams() if stream.name in POOLED)
    stored = stream.encoding.encode(
        np.concatenate(
            [
                np.stack(
                    [np.concatenate([numbers([row], layer, kind) for kind in ("cls", "ap")], 1) for layer in (1, 2, 3)],
                    1,
                )
                for row in range(IMAGES)
            ]
        )
    )
    with trial(f"a stream of each type read by {program}"):
        child = Child(reads, program, entry.path / POOLED, stored)
        assert child.wait() == 0, child.said


def flips(program: str, folder: Path, shard: Path, want: np.ndarray, places: list[tuple[int, int]], told: Path) -> None:
    """What a program says when one bit of a shard is another: 'refused', 'right' or 'wrong', flip by flip."""
    sound, said = shard.read_bytes(), []
    for at, bit in places:
        shard.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << bit]) + sound[at + 1 :])
        try:
            said.append("right" if PROGRAMS[program](folder).tobytes() == want.tobytes() else "wrong")
        except Exception:  # noqa: BLE001 - whatever it raises
            said.append("refused")
    shard.write_bytes(sound)
    told.write_text(json.dumps(said))


@pytest.mark.parametrize("program", PROGRAMS)
def test_flipped_bits(program, installed, many, trial, tmp_path):
    """Zarr's checksums cover every byte of a shard. HDF5's cover the chunks; elsewhere what is read is right or refused."""
    installed(program)
    hdf5 = program == "h5py"
    entry = extract(tmp_path / "cache", format="hdf5" if hdf5 else "zarr")
    folder, random = entry.path / POOLED, np.random.default_rng(1)
    shard = folder / ("c/2/tokens.h5" if hdf5 else "c/2/0/0/0")
    inside = range(shard.stat().st_size)
    places = [(int(random.choice(inside)), int(random.integers(8))) for _ in range(many(25, 400))]
    if hdf5:  # and in the chunks alone
        stream = next(stream for stream in entry.streams() if stream.name in POOLED)
        offsets = entry.record(stream, 2).table("offsets").reshape(-1)
        size = stream.chunk_rows * stream.columns * stream.tokens * stream.encoding.stored.itemsize
        chunks = [(int(random.choice(offsets)) + int(random.integers(size)), int(random.integers(8))) for _ in places]
    else:
        chunks = []
    child = Child(flips, program, folder, shard, pooled(), [*places, *chunks], tmp_path / "told")
    assert child.wait() == 0, child.said
    said = json.loads((tmp_path / "told").read_text())
    for number, ((at, _), what) in enumerate(zip([*places, *chunks], said, strict=True)):
        with trial(f"a flipped bit read by {program}"):
            assert what == "refused" or (hdf5 and number < len(places) and what == "right"), at


def missing(program: str, folder: Path, want: np.ndarray) -> None:
    got = PROGRAMS[program](folder)
    assert np.isnan(got[16:24]).all()
    assert got[:16].tobytes() == want[:16].tobytes()
    assert got[24:].tobytes() == want[24:].tobytes()


@pytest.mark.parametrize("program", ZARR)
def test_a_missing_shard_is_nan(program, installed, trial, tmp_path):
    installed(program)
    folder = extract(tmp_path / "cache").path / POOLED
    shutil.rmtree(folder / "c" / "2")
    with trial(f"a missing shard read by {program}"):
        child = Child(missing, program, folder, pooled())
        assert child.wait() == 0, child.said


@pytest.fixture
def tool() -> Callable[..., bytes]:
    """Runs one of HDF5's own programs."""

    def run(*words: object) -> bytes:
        if shutil.which(str(words[0])) is None:
            pytest.skip(f"needs {words[0]} (Debian: apt-get install hdf5-tools)")
        return subprocess.run(list(map(str, words)), check=True, capture_output=True).stdout

    return run


def test_hdf5s_own_programs(tool, many, trial, tmp_path):
    """h5ls names what is there, h5dump writes the numbers out to the bit and refuses a chunk that is damaged."""
    entry = extract(tmp_path / "cache", format="hdf5")
    shards, out, random = entry.path / POOLED / "c", tmp_path / "out", np.random.default_rng(2)
    stream = next(stream for stream in entry.streams() if stream.name in POOLED)
    for number in range(many(2, 6)):
        shard = shards / str(number) / "tokens.h5"
        rows = stream.rows(number)
        with trial("a shard read by h5ls and h5dump"):
            assert f"Dataset {{{len(rows)}, 3, 2, 4}}" in tool("h5ls", shard).decode()
            tool("h5dump", "-d", "tokens", "-b", "FILE", "-o", out, shard)
            assert out.read_bytes() == pooled()[rows.start : rows.stop].tobytes()
    sound, offsets = shard.read_bytes(), entry.record(stream, number).table("offsets").reshape(-1)
    for _ in range(many(3, 60)):
        with trial("a flipped bit read by h5dump"):
            at = int(random.choice(offsets)) + int(random.integers(stream.chunk_rows * 8))
            shard.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << int(random.integers(8))]) + sound[at + 1 :])
            with pytest.raises(subprocess.CalledProcessError):
                tool("h5dump", "-d", "tokens", "-b", "FILE", "-o", out, shard)
