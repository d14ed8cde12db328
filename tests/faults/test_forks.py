"""Readers in other processes, however these begin: a DataLoader's workers, by fork, spawn or a server, get what was written."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiers import LONG
from workers import IMAGES, extract, numbers, spec, whole

import mlfusion
from mlfusion.store import FeatureStore, TokenReader

PACKAGE = Path(mlfusion.__file__).parent
FOREIGN = ("zarr", "zarrs", "tensorstore", "icechunk")  # of these none survives a fork, or none is needed
HANGS = 60  # seconds without a batch after which a DataLoader gives up


class Opened(torch.utils.data.Dataset):
    """An entry's tokens of one stream: of a reader that is handed over, or of one that each worker opens for itself."""

    def __init__(self, root: Path, reader: TokenReader | None) -> None:
        self.root, self.reader = root, reader

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, rows: list[int]) -> tuple[list[int], np.ndarray, int, list[str]]:
        if self.reader is None:
            self.reader = FeatureStore(self.root).entry(spec()).open([3], ["all"])
        return rows, self.reader[rows], os.getpid(), [name for name in FOREIGN if name in sys.modules]


# (way, workers, opened in the parent, the parent has read): all in the long form, of which `make test` has these.
SHORT = [
    ("fork", 2, True, True),
    ("fork", 2, False, True),
    ("fork", 4, True, False),
    ("forkserver", 1, True, True),
    ("fork", 0, True, True),
]
EVERY = [
    (way, workers, opened, read)
    for way in ("fork", "spawn", "forkserver")
    for workers in (0, 1, 2, 4)
    for opened in (True, False)
    for read in (True, False)
    if workers or way == "fork"  # without workers no way is gone
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than processors
@pytest.mark.parametrize(("way", "workers", "opened", "read"), EVERY if LONG else SHORT)
def test_a_dataloader(way, workers, opened, read, trial, tmp_path):
    entry = extract(tmp_path / "cache")
    want = numbers(range(IMAGES), 3, "all").astype(np.float16)
    sampler = [[row, (row * 7 + 3) % IMAGES] for row in range(IMAGES)]
    with trial(f"a reader in a DataLoader's workers, by {way}"), entry.open([3], ["all"]) as reader:
        if read:
            np.testing.assert_array_equal(reader.read()[:, 0], want)
            np.testing.assert_array_equal(reader[[5, 1]][:, 0], want[[5, 1]])  # shards are mapped
        words = {"multiprocessing_context": way, "timeout": HANGS} if workers else {}
        dataset = Opened(tmp_path / "cache", reader if opened else None)
        processes = set()
        for rows, tokens, process, foreign in torch.utils.data.DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=workers, **words
        ):
            np.testing.assert_array_equal(np.asarray(tokens)[:, 0], want[rows])
            processes.add(process)
            assert way == "fork" or not workers or foreign == []
        assert len(processes) == max(workers, 1)
        assert (os.getpid() in processes) == (workers == 0)
        np.testing.assert_array_equal(reader.read()[:, 0], want)  # the parent's outlives its children's
        if dataset.reader:
            dataset.reader.close()
    extract(tmp_path / "cache")  # workers end without a word; the next extraction takes their marks away
    whole(tmp_path / "cache")


@pytest.mark.long  # a worker above looks as well, and test_house.py at every import
def test_no_library_that_a_fork_would_hang(trial):
    """Importing every room, extracting, verifying and reading bring in none of them."""
    rooms = [
        f"mlfusion.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}".removesuffix(".__init__")
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__main__.py"
    ]
    assert len(rooms) > 50
    code = """
import importlib, sys, tempfile
from pathlib import Path
for room in sys.argv.pop(1).split():
    importlib.import_module(room)
from workers import extract, whole
for format in ("zarr", "hdf5"):
    with tempfile.TemporaryDirectory() as root:
        extract(Path(root) / "cache", format=format)
        whole(Path(root) / "cache")
print(*sorted(name for name in sys.argv[1:] if name in sys.modules))
"""
    with trial("an import of everything, and no library that a fork would hang"):
        said = subprocess.run(
            [sys.executable, "-c", code, " ".join(rooms), *FOREIGN],
            capture_output=True,
            text=True,
            check=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),
            },
        )
        assert said.stdout.split() == []
