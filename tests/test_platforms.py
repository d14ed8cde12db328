"""Nothing but what every system has: the package runs where POSIX's and Linux's own functions are hidden (`tests/plain.py`)."""

import os
import subprocess
import sys
from pathlib import Path

import plain
import pytest

ROOT = Path(__file__).parent.parent
RUN = """
import sys
sys.path.insert(0, {tests!r})
import logging
import torch
import plain
plain.hide()
logging.basicConfig(level=logging.WARNING, format="%(message)s")
torch.set_num_threads(1)
from pathlib import Path
from tiny import save_images, save_model
import mlfusion
from mlfusion.system import disk, memory
model, images = (str(make) for make in (save_model("vit", Path("m")), save_images(Path("d"), {{"train": 6, "test": 3}})))
assert not disk.GUARDED
assert memory.available() == memory.UNKNOWN_BYTES
first = mlfusion.extract(model, images)
again = mlfusion.extract(model, images)
assert sum(one.images_written for one in first) == 27 and sum(one.images_written for one in again) == 0
rows = mlfusion.probe(images, probes="cls-last/linear", grid="quick", seeds=(0,)).rows
assert len(rows) == 1
print("ran")
"""


@pytest.mark.long
def test_both_stages_run_on_a_plain_system_which_says_what_is_not_guarded(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", RUN.format(tests=str(ROOT / "tests"))], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.stdout.endswith("ran\n"), run.stderr
    assert run.stderr.count("mlfusion does not guard against links") == 1


@pytest.mark.long
@pytest.mark.parametrize("file", ["test_store.py", "test_loader.py"])
def test_a_part_of_the_tests_passes_on_a_plain_system(file):
    environment = {**os.environ, "MLFUSION_PLAIN": "1", "MLFUSION_LONG": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", str(ROOT / "tests" / file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize("name", plain.ABSENT)
def test_what_is_hidden_is_what_this_system_has_and_others_lack(name):
    assert plain.PLAIN or hasattr(os, name)
