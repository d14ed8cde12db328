"""Killed at any moment, at any step, an extraction goes on where it was, and ends with the same bytes as undisturbed."""

import os
import signal
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
from workers import Child, extract, files, published, spec, whole

from mlfusion.extraction import writer
from mlfusion.system import disk

both = pytest.mark.parametrize("format", ["zarr", "hdf5"])
CHANGES = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "shutil.rmtree"}


class InTurn(Executor):
    """Does everything at once, in the thread that asks."""

    def __init__(self, _: int) -> None:
        super().__init__()

    def submit(self, work, /, *args, **words) -> Future:
        done: Future = Future()
        done.set_result(work(*args, **words))
        return done


def computed(passes: Path) -> set[range]:
    """The runs of rows that went through the model."""
    lines = passes.read_text().splitlines() if passes.exists() else []
    return {range(int(first), int(last) + 1) for _, first, last in map(str.split, lines)}


def done_rows(folder: Path) -> set[int]:
    """Rows of which every shard is published: 8 to a shard of cls and ap, 4 to one of all."""
    present = [
        {
            row
            for shard in (folder / "tokens" / name / "c").glob("[0-9]*")
            for row in range(int(shard.name) * n, int(shard.name) * n + n)
        }
        for name, n in (("cls.ap.L1-3", 8), ("all.L3", 4))
    ]
    return present[0] & present[1]


def finish(root: Path, passes: Path, format: str, want: dict[str, bytes]) -> None:
    """Run to the end after a kill: nothing that was there is computed or written again, and all bytes are as they should be."""
    folder = root / "v3" / spec().key
    before, rows = published(folder), done_rows(folder)
    passes.unlink(missing_ok=True)
    child = Child(extract, root, format=format, passes=passes)
    assert child.wait() == 0, child.said
    assert before.items() <= published(folder).items()
    assert not any(rows & set(run) for run in computed(passes))
    assert files(whole(root).path) == want


@pytest.mark.slow
@both
def test_killed_at_random_moments(format, many, trial, tmp_path):
    extract(tmp_path / "undisturbed", format=format)  # imports everything
    began = time.monotonic()
    undisturbed = Child(extract, tmp_path / "whole", format=format)
    assert undisturbed.wait() == 0, undisturbed.said
    seconds = time.monotonic() - began
    want = files(whole(tmp_path / "whole").path)
    random, kills, number = np.random.default_rng(0), 0, 0
    passes = tmp_path / "passes"
    while kills < many(12, 150):
        number += 1
        root = tmp_path / f"cache {number}"
        folder = root / "v3" / spec().key
        before: dict[str, tuple[int, int]] = {}
        for _ in range(int(random.integers(1, 5))):  # kills in a row, before it may end
            with trial(f"kill -9 at a random moment, {format}"):
                rows = done_rows(folder)
                passes.unlink(missing_ok=True)
                child = Child(extract, root, format=format, passes=passes)
                status = child.kill_after(random.uniform(0, seconds))
                assert status in (0, -signal.SIGKILL), child.said
                kills += status != 0
                assert before.items() <= (before := published(folder)).items()
                assert not any(rows & set(run) for run in computed(passes))
        finish(root, passes, format, want)


def lies_below(root: Path, event: str, args: tuple) -> bool:
    """Whether an audited change is one below `root`; a bare name is one in a folder whose descriptor is given."""
    if "/" in str(args[0]):
        return str(args[0]).startswith(str(root))
    if isinstance(args[0], int):  # an object for a descriptor that is open
        return False
    if event == "open":  # Python does not say in which folder, and only the cache opens files by bare names
        return True
    return isinstance(args[-1], int) and os.readlink(f"/proc/self/fd/{args[-1]}").startswith(str(root))


def at_change(number: int, root: Path, happens) -> list[int]:
    """Let something happen before this process's change number `number` to what lies below `root`; counts them."""
    count = [0]

    def hook(event: str, args: tuple) -> None:
        if event not in CHANGES or not lies_below(root, event, args):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        count[0] += 1
        if count[0] == number:
            happens()

    sys.addaudithook(hook)
    return count


def steps(root: Path, format: str, told: Path) -> None:
    count = at_change(0, root, lambda: None)
    extract(root, images=12, format=format)
    told.write_text(str(count[0]))


@pytest.mark.slow
@both
def test_killed_at_every_step(format, many, trial, tmp_path):
    """Before each change to the file system, one after another: the order of the steps is right, not only likely so."""

    def killed(root: Path, step: int) -> None:
        at_change(step, root, lambda: os.kill(os.getpid(), signal.SIGKILL))
        extract(root, images=12, format=format)

    child = Child(steps, tmp_path / "whole", format, tmp_path / "steps")
    assert child.wait() == 0, child.said
    want = files(whole(tmp_path / "whole", 12).path)
    every = int((tmp_path / "steps").read_text())
    assert every > 60
    for step in range(1, every + 1, many(9, 1)):
        root = tmp_path / f"step {step}"
        with trial(f"kill -9 before each change to the disk, {format}"):
            assert Child(killed, root, step).wait() == -signal.SIGKILL
            kept = published(root / "v3" / spec(12).key)
            child = Child(extract, root, images=12, format=format)
            assert child.wait() == 0, child.said
            entry = whole(root, 12)
            assert kept.items() <= published(entry.path).items()
            assert files(entry.path) == want


@pytest.mark.slow
def test_the_power_fails(many, trial, tmp_path):
    """What was not flushed is lost: every file that was never given its own name may be empty, half or zeros."""
    extract(tmp_path / "whole", images=12)
    want = files(whole(tmp_path / "whole", 12).path)
    random = np.random.default_rng(1)

    def torn(root: Path, step: int) -> None:
        def lose() -> None:
            for path in root.rglob("*"):
                inside = [part for part in path.relative_to(root).parts if part.startswith(disk.DRAFT)]
                if inside and path.is_file() and path.stat().st_nlink == 1:  # with a second name, that is its own
                    data = path.read_bytes()
                    half = int(random.integers(len(data) + 1))
                    path.write_bytes(
                        [b"", data[:half], bytes(len(data)), data[:half] + bytes(len(data) - half)][step % 4]
                    )
            os.kill(os.getpid(), signal.SIGKILL)

        at_change(step, root, lose)
        writer.ThreadPoolExecutor = InTurn  # while the power fails no other thread goes on
        extract(root, images=12)

    for number in range(many(8, 100)):
        root, step = tmp_path / f"{number}", int(random.integers(1, 80))
        with trial("power lost: what was not flushed is empty, half or zeros"):
            child = Child(torn, root, step)
            assert child.wait() == -signal.SIGKILL, child.said
            child = Child(extract, root, images=12)
            assert child.wait() == 0, child.said
            assert files(whole(root, 12).path) == want
