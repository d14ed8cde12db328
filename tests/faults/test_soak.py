"""Users of every kind on one cache at once, for MLFUSION_SOAK minutes: nothing read is wrong, and nothing piles up."""

import errno
import json
import os
import resource
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from test_kills import at_change
from tiers import LONG
from workers import PAIRS, UNUSABLE, Child, extract, files, litter, numbers, right, spec, whole

from mlfusion.errors import MlfusionError
from mlfusion.store import Entry, FeatureStore, feature_store, leases
from mlfusion.store.housekeeping import TRASH, empty_trash, remove_entry

SECONDS = 60 * float(os.environ.get("MLFUSION_SOAK", "1" if LONG else "0.04"))
SIZES = (20, 28, 36, 44)  # images of the entries that users ask for
SWEEPS = 8  # users who read for as long as it lasts
VISITORS = 3  # at once: users who extract and come to harm
PATIENCE = 120  # seconds that it may take longer on a busy machine, until each reader has compared one entry on average
TERM = 0.6  # seconds of a lease
GROWTH = 1.05, 8  # of memory, from the second quarter of the time to the last, that is no leak: a factor, and MiB


@dataclass
class Use:
    """What a user of long standing did, and what the process held between two of its acts."""

    did: Counter = field(default_factory=Counter)
    descriptors: list[int] = field(default_factory=list)
    mebibytes: list[float] = field(default_factory=list)

    def look(self) -> None:
        """Once a second is enough."""
        self.descriptors.append(len(os.listdir("/proc/self/fd")))
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
        self.mebibytes.append(int(line.split()[1]) / 1024)

    def grown(self) -> tuple[float, float]:
        """Memory in the second and in the last quarter of the time, medians."""
        quarter = len(self.mebibytes) // 4
        return statistics.median(self.mebibytes[quarter : 2 * quarter + 1]), statistics.median(
            self.mebibytes[-quarter - 1 :]
        )


def live(act, seed: int, stop: Path, told: Path) -> None:
    """Do something until the file `stop` is there; what the cache says in words is an answer, anything else ends the test."""
    random, use, looked = np.random.default_rng(seed), Use(), 0.0
    while not stop.exists():
        try:
            use.did[act(random)] += 1
        except MlfusionError:
            use.did["readings, extractions and prunes that ended with a sentence"] += 1
        if time.monotonic() - looked > min(1, SECONDS / 50):
            looked = time.monotonic()
            use.look()
        time.sleep(random.uniform(0, 0.2))
    told.write_text(json.dumps(vars(use)))


def sweep(root: Path, compared: Path, random: np.random.Generator) -> str:
    """Read an entry in one of the ways there are; every number is compared, and the file `compared` grows by a byte."""
    entry = FeatureStore(root).entry(spec(int(random.choice(SIZES))))
    if entry is None or entry.complete_pairs() != PAIRS:
        return "readings that found nothing whole"
    compare(entry, random)
    with open(compared, "ab") as file:
        file.write(b".")
    return "readings, every number compared"


def compare(entry: Entry, random: np.random.Generator) -> None:
    images = entry.spec.data.images
    match int(random.integers(4)):
        case 0:
            right(entry)
        case 1:
            with entry.open([3], ["all"], check="always") as tokens:
                for rows, batch in tokens.batches(7, seed=int(random.integers(99))):
                    assert np.array_equal(batch[:, 0], numbers(rows, 3, "all").astype(np.float16))
        case 2:
            with entry.open([1, 2, 3], ["cls", "ap"]) as tokens:
                for _ in range(9):
                    rows = random.integers(0, images, 5)
                    want = [[numbers(rows, layer, kind)[:, 0] for kind in ("cls", "ap")] for layer in (1, 2, 3)]
                    assert np.array_equal(tokens[rows].transpose(1, 2, 0, 3), np.array(want).astype(np.float16))
        case 3:
            with entry.open([2], ["ap"]) as tokens:
                time.sleep(random.uniform(0, 0.3))  # as one who trains meanwhile
                assert np.array_equal(tokens.read()[:, 0], numbers(range(images), 2, "ap").astype(np.float16))


def keep(root: Path, random: np.random.Generator) -> str:
    """Extract and read in one process, or prune what nobody reads."""
    if random.random() < 0.7:
        empty_trash(root)
        gone = [remove_entry(root, entry.path) == "" for entry in FeatureStore(root).own_entries()]
        return "prunes that took an entry" if any(gone) else "prunes that left all to their readers"
    right(extract(root, images=int(random.choice(SIZES))))
    return "extractions that ran to their end"


def visit(root: Path, images: int, passes: Path, step: int, limit: int) -> None:
    """Extract, on a disk that is full before some change, or in the middle of some file."""

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step:
        at_change(step, root, refuse)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    # The file that passes are told to would meet that limit too.
    extract(root, images=images, passes=None if limit else passes, pause=0.005)


class Visitor:
    """One who extracts, and what becomes of him."""

    def __init__(self, root: Path, passes: Path, random: np.random.Generator) -> None:
        self.fate = str(random.choice(["killed", "stopped", "full disk"]))
        full = self.fate == "full disk"
        step = int(random.integers(1, 90)) if full and random.random() < 0.5 else 0
        limit = int(random.integers(1, 3000)) if full and not step else 0
        self.child = Child(visit, root, int(random.choice(SIZES)), passes, step, limit)
        self._events: list[tuple[float, int]] = []
        at = time.monotonic() + random.uniform(0, 0.15)
        if self.fate == "killed":
            self._events = [(at, signal.SIGKILL)]
        elif self.fate == "stopped":
            self._events = [(at, signal.SIGSTOP), (at + random.uniform(TERM, 3 * TERM), signal.SIGCONT)]

    def ended(self, did: Counter) -> bool:
        """Let happen what is due; count what came of it."""
        while self._events and self._events[0][0] <= time.monotonic():
            self.child.send(self._events.pop(0)[1])
        if not self.child.ended():
            return False
        status = self.child.wait()
        assert status in (0, UNUSABLE, -signal.SIGKILL), self.child.said
        assert status != UNUSABLE or self.child.said
        if status == -signal.SIGKILL:
            did["extractions killed"] += 1
        elif self.fate == "full disk" and "no space left" in self.child.said:
            did["extractions that met a full disk"] += 1
        elif self.fate == "stopped" and not self._events:
            did["extractions stopped for longer than their lease"] += 1
        else:
            did["extractions that ran to their end"] += 1
        return True


@pytest.mark.slow
def test_everything_at_once(trial, figures, capfd, tmp_path, monkeypatch):
    """Eight users read, others extract and are killed, stopped, starved of space, one prunes; at the end all is as ever."""
    monkeypatch.setattr(leases, "TERM", TERM)
    monkeypatch.setattr(feature_store, "WAIT", 0.1)
    root, passes, stop, compared = (tmp_path / name for name in ("cache", "passes", "stop", "compared"))
    passes.touch()
    compared.touch()
    want = {images: files(extract(tmp_path / f"{images}", images=images).path) for images in SIZES}
    random, did, visitors = np.random.default_rng(5), Counter(), []
    with trial("a busy cache: extracting, reading, pruning, stopping, killing and a full disk at once"):
        began = said = time.monotonic()
        until, own = began + SECONDS, Use()
        residents = [
            Child(live, lambda r: sweep(root, compared, r), seed, stop, tmp_path / f"told {seed}")
            for seed in range(SWEEPS)
        ] + [Child(live, lambda r: keep(root, r), SWEEPS, stop, tmp_path / f"told {SWEEPS}")]
        try:
            while visitors or not stop.exists():
                over = time.monotonic() - until
                if over > 0 and (compared.stat().st_size > SWEEPS or over > PATIENCE):
                    stop.touch()
                if not visitors:
                    own.look()
                while len(visitors) < VISITORS and not stop.exists():
                    visitors.append(Visitor(root, passes, random))
                visitors = [visitor for visitor in visitors if not visitor.ended(did)]
                assert not any(child.ended() for child in residents) or stop.exists(), [
                    child.said for child in residents if child.ended() and child.wait()
                ]
                time.sleep(0.01)
                if SECONDS > 120 and time.monotonic() - said > 60:
                    said = time.monotonic()
                    with capfd.disabled():
                        sys.stderr.write(f"{(said - began) / 60:.0f} min: {dict(did)}\n")
        except BaseException:
            for child in (*residents, *(visitor.child for visitor in visitors)):
                with suppress(ProcessLookupError):
                    child.send(signal.SIGKILL)
            raise
        assert [child.wait() for child in residents] == [0] * len(residents), [child.said for child in residents]
        uses = [Use(**json.loads((tmp_path / f"told {n}").read_text())) for n in range(len(residents))]
        for use in uses:
            did.update(use.did)
            quarter = len(use.descriptors) // 4
            assert max(use.descriptors[quarter:]) == min(use.descriptors[quarter:]), use.descriptors
            before, after = use.grown()
            assert after <= before * GROWTH[0] + GROWTH[1], use.mebibytes
        empty_trash(root)
        for images in SIZES:
            extract(root, images=images)
        for images in SIZES:
            assert files(whole(root, images).path) == want[images]
        assert litter(root) == []
        for entry in list(FeatureStore(root).own_entries()):
            assert remove_entry(root, entry.path) == ""  # nobody is left who reads or extracts
        assert not list((root / TRASH).iterdir())
        assert did["readings, every number compared"] > SWEEPS
    worst = max((use.grown() for use in uses), key=lambda pair: pair[1] - pair[0])
    figures["soak"] = {
        "minutes": SECONDS / 60,
        "did": dict(did),
        "images": sum(int(last) - int(first) + 1 for _, first, last in map(str.split, passes.read_text().splitlines())),
        "residents": len(residents),
        "mebibytes": worst,
        "descriptors": max(max(use.descriptors) for use in uses),
    }
