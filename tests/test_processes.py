"""Rows that several processes train are those that one process trains, errors and little memory included."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_images, save_model

import mlfusion
from mlfusion.errors import BadData, TooLittleMemory
from mlfusion.probing import processes
from mlfusion.probing.fitting import Resources, Trained, train
from mlfusion.probing.jobs import Job, jobs_of
from mlfusion.results import Results
from mlfusion.specs.names import parse_probes
from mlfusion.specs.options import SearchOptions
from mlfusion.store import FeatureStore
from mlfusion.store.features import SplitPair, split_pairs
from mlfusion.system import progress


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SplitPair]:
    """Features of a small model, and a machine of two threads on which other processes are started at once."""
    model, images = save_model("vit", tmp_path / "m"), save_images(tmp_path / "d", {"train": 12, "test": 6})
    mlfusion.extract(str(model), str(images), tokens="cls,ap@last", cache=tmp_path / "c")
    monkeypatch.setattr(processes, "PATIENCE", 0.0)
    monkeypatch.setattr(processes, "WORTH", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    [found] = split_pairs(FeatureStore(tmp_path / "c"), str(images), None)
    yield found
    torch.set_num_threads(before)


def jobs(*probes: str, seeds: tuple[int, ...] = (0,)) -> list[Job]:
    search = SearchOptions(grid="quick", precision="float32", seeds=seeds)
    return [job.resolved("cpu") for job in jobs_of(parse_probes(list(probes), depth=12), search)]


SCRIPT = """
import sys, torch, mlfusion
from mlfusion.probing import processes
torch.set_num_threads(2)
print("once")
processes.PATIENCE = processes.WORTH = 0.0
mlfusion.probe(sys.argv[1], probes=sys.argv[2], grid="quick", seeds=(0, 1), cache=sys.argv[3], results=sys.argv[4])
"""


def assert_same(a: Trained, b: Trained) -> None:
    """Everything that is stored, but for times and places."""
    for name in ("id", "val", "test", "train", "metrics", "selected", "stability"):
        assert getattr(a.row, name) == getattr(b.row, name)
    np.testing.assert_equal(a.arrays, b.arrays)
    np.testing.assert_equal(a.weights, b.weights)


@pytest.mark.slow
def test_rows_are_those_of_one_process_also_where_a_share_of_the_memory_is_too_small(
    pair: SplitPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = jobs("cls+ap-last/linear", "cls-last/ridge", "cls+ap-last/knn")
    memory = 1 << 12
    while True:  # the least power of two that is enough
        try:
            alone = [train(pair, job, Resources("cpu", memory, streams=False)) for job in some]
            break
        except TooLittleMemory:
            memory *= 2
    monkeypatch.setattr(processes, "LEAST_MEMORY", 1)
    monkeypatch.setattr(processes, "TOKENS_SHARE", 0)
    half, whole = (Resources("cpu", size, streams=False) for size in (memory // 2, memory))
    assert isinstance(processes._in_process(pair, some[0], half, os.getpid()), TooLittleMemory)
    assert (torch.get_num_threads(), progress._quiet) == (2, False)  # as before, if it was no other process
    for several, one in zip(processes.trained(pair, some, whole), alone, strict=True):
        assert_same(several, one)


@pytest.mark.slow
def test_an_error_of_a_process_ends_the_work_as_that_of_one_does(pair: SplitPair) -> None:
    resources = Resources("cpu", 1 << 31)
    made = processes.trained(pair, jobs("cls-last/ridge", "cls+ap-last/attentive:h999", "cls-last/knn"), resources)
    assert next(made).row.probe == "cls-last/ridge"
    with pytest.raises(BadData, match="999 attention heads do not fit"):
        next(made)


def test_there_are_as_many_processes_as_threads_jobs_and_memory_allow(pair: SplitPair) -> None:
    many = jobs("cls-last/ridge", seeds=(0, 1, 2))
    assert processes.count(pair, many, Resources("cpu", 1 << 40)) == 2
    assert processes.count(pair, many[:1], Resources("cpu", 1 << 40)) == 1
    assert processes.count(pair, many, Resources("cuda", 1 << 40)) == 1
    assert processes.count(pair, many, Resources("cpu", processes.LEAST_MEMORY * 2)) == 2
    assert processes.count(pair, many, Resources("cpu", processes.LEAST_MEMORY * 2 - 1)) == 1
    assert processes.count(pair, many, Resources("cpu", 1)) == 1
    torch.set_num_threads(3)
    assert processes.count(pair, many, Resources("cpu", 1 << 40)) == 3
    torch.set_num_threads(1)
    assert processes.count(pair, many, Resources("cpu", 1 << 40)) == 1


def test_short_work_starts_no_process(pair: SplitPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 1000.0)
    monkeypatch.setattr(processes, "_side_by_side", None)  # cannot be called
    assert len(list(processes.trained(pair, jobs("cls-last/ridge", "cls-last/knn"), Resources("cpu", 1 << 31)))) == 2


SCRIPT = """
import sys, torch, mlfusion
from mlfusion.probing import processes
torch.set_num_threads(2)
print("once")
processes.PATIENCE = processes.WORTH = 0.0
mlfusion.probe(sys.argv[1], probes="cls-last/{ridge,knn}", grid="quick", seeds=(0,), cache=sys.argv[2], results="r")
"""


@pytest.mark.long
def test_a_script_of_the_user_runs_once(pair: SplitPair, tmp_path: Path) -> None:
    """It has no `if __name__ == "__main__"`, which pools of the standard library would need."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "d"), str(tmp_path / "c")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert said.stdout == "once\n"
    assert len(Results(tmp_path / "r").rows()) == 2


WATCHED = """
import os, subprocess, sys, time
child = "import sys, time; from mlfusion.probing.processes import _end_with; _end_with(int(sys.argv[1])); time.sleep(1000)"
print(subprocess.Popen([sys.executable, "-c", child, str(os.getpid())]).pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="the test reads /proc")
def test_no_process_outlives_a_parent_that_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", WATCHED], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path(f"/proc/{int(parent.stdout.readline())}")
        assert child.exists()
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not child.exists()
