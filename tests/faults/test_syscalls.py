"""The operating system's own record of what the cache does to the disk, and a kill or an error at any one of those calls.

strace attaches to a process of ours: unlike Python's audit hooks it sees what libraries do, between any two calls.
"""

import ctypes
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from test_prunes import prune
from workers import UNUSABLE, Child, extract, files, published, read_every_way, right, spec, whole

from mlfusion.store import FeatureStore
from mlfusion.store.housekeeping import copy_entry
from mlfusion.store.verify import repair_entry, verify_entry
from mlfusion.system import disk

both = pytest.mark.parametrize("format", ["zarr", "hdf5"])
CALLS = (
    "open,openat,creat,write,writev,pwrite64,pwritev,pwritev2,truncate,ftruncate,fallocate,mmap,"
    "link,linkat,rename,renameat,renameat2,fsync,unlink,unlinkat,mkdir,mkdirat,rmdir,utimensat"
)
ALLOWS_ANY = 0x59616D61  # PR_SET_PTRACER


def gate(way: Path, work: Callable[..., object], *args: object, **words: object) -> None:
    """Work once `way` is free: until then nothing is done that is of interest."""
    ctypes.CDLL(None).prctl(ALLOWS_ANY, ctypes.c_ulong(-1), 0, 0, 0)
    way.with_suffix(".ready").touch()
    while not way.exists():
        time.sleep(0.005)
    work(*args, **words)


def traced(way: Path, options: list[str], work: Callable[..., object], *args: object, **words: object) -> Child:
    """A process whose calls strace writes to `way`.trace; it has ended when this returns, `wait` says how."""
    child = Child(gate, way, work, *args, **words)
    while not way.with_suffix(".ready").exists():
        time.sleep(0.002)
    said = way.with_suffix(".said")
    with said.open("wb") as told:
        command = ["strace", "-f", "-y", "-s", "0", "-o", way.with_suffix(".trace"), "-p", str(child.pid), *options]
        tracer = subprocess.Popen(command, stderr=told)
    while b"attached" not in said.read_bytes():
        if tracer.poll() is not None:
            child.send(signal.SIGKILL)
            child.wait()
            pytest.skip(f"strace may not look at a process here: {said.read_text().strip()}")
        time.sleep(0.002)
    way.touch()
    tracer.wait()
    return child


@pytest.fixture(autouse=True)
def strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace (Debian: apt-get install strace)")


@dataclass(frozen=True)
class Call:
    """One line of a trace."""

    thread: str
    name: str
    text: str

    def paths(self, root: Path) -> list[Path]:
        """Those below `root` that it names, or whose descriptors it is given."""
        named = re.findall(rf'<({re.escape(str(root))}[^">]*)>(?:, "([^"/]*)")?', self.text)
        whole = re.findall(rf'"({re.escape(str(root))}/[^"]*)"', self.text)
        return [Path(*each) for each in named if each != (str(root), "")] + [Path(each) for each in whole]


def calls(way: Path) -> list[Call]:
    lines = way.with_suffix(".trace").read_text().splitlines()
    return [Call(*found.groups()) for line in lines if (found := re.match(r"(\d+) +(\w+)\((.*)", line))]


def everything(root: Path, format: str) -> None:
    """What users do: extract, read in each way, find damage, repair it, extract again, convert, prune."""
    folder = extract(root, format=format).path
    read_every_way(root)
    shutil.rmtree(folder / "tokens" / "cls.ap.L1-3" / "c" / "1")
    found = list(verify_entry(folder))
    assert found
    repair_entry(root, folder, found)
    extract(root, format=format)
    entry = whole(root)
    other = FeatureStore(root / "other")
    copy_entry(
        entry, other.create(spec(), entry.samples, entry.names()[0]), format="hdf5" if format == "zarr" else "zarr"
    )
    right(other.entry(spec()))
    prune(root)
    assert FeatureStore(root).entry(spec()) is None


@pytest.mark.slow
@both
def test_published_files_are_never_written_to(format, trial, tmp_path):
    """No call opens one for writing, cuts or allocates it, maps it to be written, or names another file as it."""
    root, way = tmp_path / "cache", tmp_path / "way"
    with trial("every system call on a cache's files looked at"):
        child = traced(way, [f"--trace={CALLS}"], everything, root, format)
        assert child.wait() == 0, child.said
        named: Counter[Path] = Counter()
        seen: Counter[str] = Counter()
        for call in calls(way):
            paths = call.paths(root)
            if not paths or " = -1 " in call.text:
                continue
            seen[call.name] += 1
            own = all(
                any(part.startswith(disk.DRAFT) or part in ("pins", "leases") for part in path.relative_to(root).parts)
                for path in paths
            )
            match call.name:
                case "open" | "openat" | "creat":
                    assert own or not re.search(r"O_WRONLY|O_RDWR|O_TRUNC|O_APPEND", call.text), call
                case "mmap":
                    assert own or not ("PROT_WRITE" in call.text and "MAP_SHARED" in call.text), call
                case "link" | "linkat" | "rename" | "renameat" | "renameat2":
                    named[paths[-1]] += paths[-1].parent.name not in ("leases", "pins")
                case "fsync" | "unlink" | "unlinkat" | "mkdir" | "mkdirat" | "rmdir" | "utimensat":
                    pass
                case _:
                    assert own, call
        again = {path for path, count in named.items() if count > 1}
        # Made again after the repair, and after that the manifest: both were moved to quarantine before.
        assert {path.name for path in again} <= {"1", "manifest.json"}, again
        assert (
            min(
                seen[name] for name in ("write", "fsync", "renameat", "linkat", "unlinkat", "mkdirat", "openat", "mmap")
            )
            > 0
        )


ERRORS = {
    "write": ("ENOSPC", "EIO"),
    "fsync": ("EIO", "ENOSPC"),
    "linkat": ("ENOSPC", "EIO", "EMLINK", "EPERM"),
    "renameat": ("EIO", "ENOSPC"),
    "mkdir": ("ENOSPC", "EIO"),
    "mkdirat": ("ENOSPC", "EIO"),
    "openat": (),
    "unlinkat": ("EIO",),
    "utimensat": ("EIO", "EPERM"),
}


@pytest.mark.slow
@both
def test_a_kill_or_an_error_at_any_call(format, many, trial, tmp_path):
    """The first call of a kind in a thread, the second, and so on; the next extraction ends with the same bytes as ever."""
    way = tmp_path / "way"
    child = traced(way, [f"--trace={','.join(ERRORS)}"], extract, tmp_path / "whole", images=12, format=format)
    assert child.wait() == 0, child.said
    want = files(whole(tmp_path / "whole", 12).path)
    most: dict[str, int] = {}  # of one kind of calls in one thread: strace counts each thread's for themselves
    for (name, _), count in Counter((call.name, call.thread) for call in calls(way)).items():
        most[name] = max(most.get(name, 0), count)
    assert most.keys() == ERRORS.keys()
    cases = [
        (name, what, number)
        for name, errors in ERRORS.items()
        for what in ("signal=KILL", *(f"error={error}" for error in errors))
        for number in range(1, most[name] + 1)
    ]
    random = np.random.default_rng(4)
    picked = random.permutation(len(cases))[: many(6, 9999)]
    for turn, (name, what, number) in enumerate(cases[case] for case in picked):
        with trial(f"{'kill -9' if 'KILL' in what else 'an error'} at a system call, {format}"):
            root = tmp_path / f"{turn}"
            options = [f"--trace={name}", f"--inject={name}:{what}:when={number}"]
            child = traced(tmp_path / f"way {turn}", options, extract, root, images=12, format=format)
            status = child.wait()
            assert status in (0, UNUSABLE, -signal.SIGKILL), (name, what, number, child.said)
            assert status != -signal.SIGKILL or "KILL" in what
            before = published(root / "v3" / spec(12).key)
            child = Child(extract, root, images=12, format=format)
            assert child.wait() == 0, (name, what, number, child.said)
            folder = whole(root, 12).path
            assert before.items() <= published(folder).items()
            assert files(folder) == want, (name, what, number)
            shutil.rmtree(root)
