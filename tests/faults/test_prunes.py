"""Prunes against everything else: other prunes, kills, extractors, and a training that reads on unharmed."""

import errno
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_company import read_on
from workers import IMAGES, Child, extract, files, right, spec, whole

from mlfusion.errors import NotCached
from mlfusion.probing.heads import HeadShape
from mlfusion.probing.training import population
from mlfusion.probing.training.batches import Schedule, Tokens
from mlfusion.store import FeatureStore, feature_store
from mlfusion.store.housekeeping import TRASH, empty_trash, remove_entry
from mlfusion.system import disk


def prune(root: Path) -> None:
    """As `mlfusion cache prune` with nothing that keeps an entry."""
    empty_trash(root)
    for entry in list(FeatureStore(root).own_entries()):
        remove_entry(root, entry.path)


def prune_on(root: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        prune(root)
        time.sleep(0.003)


def test_two_prunes_at_once(many, trial, tmp_path):
    root = tmp_path / "cache"
    for _ in range(many(3, 25)):
        with trial("two prunes at once"):
            extract(root)
            children = [Child(prune, root) for _ in range(2)]
            assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
            assert FeatureStore(root).entry(spec()) is None
            assert not list((root / TRASH).iterdir())
    extract(root)
    whole(root)


@pytest.mark.slow
def test_a_prune_killed_before_each_change(many, trial, tmp_path):
    """What was to go is there whole or not at all, and the next prune takes the rest."""
    root = tmp_path / "cache"
    want = files(extract(root).path)

    def killed(step: int) -> None:
        count = [0]

        def counted(change):
            def changed(*args, **words):
                count[0] += 1
                if count[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **words)

            return changed

        for name in ("rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        prune(root)

    step = 0
    while True:
        step += many(17, 1)
        child = Child(killed, step)
        if child.wait() == 0:
            break  # it had no more changes to make
        with trial("a prune killed before each change"):
            if (entry := FeatureStore(root).entry(spec())) is not None:
                right(entry)
            assert Child(prune, root).wait() == 0
            assert FeatureStore(root).entry(spec()) is None
            assert not list((root / TRASH).iterdir())
            assert Child(extract, root).wait() == 0
            assert files(whole(root).path) == want
    assert step > 50


@pytest.mark.slow
def test_prunes_against_extractors(many, trial, tmp_path):
    """An extractor is left alone while it holds a lease; taken away between two, it says so and the next run mends it."""
    for number in range(many(3, 25)):
        with trial("prunes against an extractor"):
            root = tmp_path / f"cache {number}"
            root.mkdir()
            pruner, child = Child(prune_on, root, 0.4), Child(extract, root, pause=0.01)
            assert child.wait() in (0, 3), child.said
            assert pruner.wait() == 0, pruner.said
            extract(root)
            whole(root)


def test_a_prune_between_two_extractors(trial, tmp_path, monkeypatch):
    """It takes away what the first published, in the instant in which the second finds the name taken."""
    root, rename = tmp_path / "cache", os.rename
    want = files(extract(root).path)
    prune(root)

    def late(old: str, new: str, **folders: int) -> None:
        if new == spec().key and old.startswith(disk.DRAFT):
            monkeypatch.setattr(os, "rename", rename)
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))  # and by now it is gone
        rename(old, new, **folders)

    monkeypatch.setattr(os, "rename", late)
    with trial("a prune between the publishing of one extractor and another's"):
        extract(root)
        assert os.rename is rename
        assert files(whole(root).path) == want


def test_a_prune_of_an_entry_that_was_just_made(trial, tmp_path, monkeypatch):
    """Before its extractor opens it: a sentence, and the next run makes it."""
    root, restore = tmp_path / "cache", feature_store.restore_missing_files
    with trial("a prune of an entry that was just made"), monkeypatch.context() as patch:
        patch.setattr(feature_store, "restore_missing_files", lambda *args: (restore(*args), prune(root)))
        with pytest.raises(NotCached, match="run the same `mlfusion extract` again"):
            extract(root)
    extract(root)
    whole(root)


def test_a_reader_that_is_stopped(many, trial, tmp_path):
    """For as long as its process lives, what it reads stays."""
    for number in range(many(1, 8)):
        with trial("a prune under a reader that is stopped"):
            root, told = tmp_path / f"cache {number}", tmp_path / f"told {number}"
            extract(root)
            child = Child(read_on, root, told)
            while not told.exists():
                time.sleep(0.01)
            child.send(signal.SIGSTOP)
            prune(root)
            right(FeatureStore(root).entry(spec()))
            child.send(signal.SIGCONT)
            time.sleep(0.05)
            child.send(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, child.said
            prune(root)
            assert FeatureStore(root).entry(spec()) is None


def trained(root: Path, pause: float) -> list[np.ndarray]:
    """A probe trained on tokens that are streamed from the cache, as stage two does where they do not fit into memory."""
    entry = FeatureStore(root).entry(spec())
    with entry.open([3], ["all"]) as reader:
        shape = HeadShape(tokens=17, width=4, classes=3, heads=2)
        schedule = Schedule(images=IMAGES, steps=60, batch_size=11, batches=4)
        outcome = population.train(
            population.Population("attentive", shape, [population.Configuration(1e-2, 0.1)], seed=0),
            population.TrainingData(Tokens(reader, entry.samples.labels), np.arange(IMAGES), schedule),
            progress=lambda _: time.sleep(pause),
        )
        return [weight.numpy() for _, probe in outcome for weight in probe.state_dict().values()]


def train_and_compare(root: Path, want: list[np.ndarray]) -> None:
    torch.set_num_threads(1)
    for got, expected in zip(trained(root, 0.004), want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_a_training_goes_on_unharmed(many, trial, tmp_path):
    """To the bit, while prune after prune would take its features away; when it has ended they go."""
    root = tmp_path / "cache"
    for _ in range(many(1, 8)):
        extract(root)
        want = trained(root, 0)
        with trial("prunes during training"):
            child = Child(train_and_compare, root, want)
            while not list(root.glob("v*/*/pins/*")):
                time.sleep(0.002)
            pruner = Child(prune_on, root, 0.2)
            assert child.wait() == 0, child.said
            assert pruner.wait() == 0
            prune(root)
            assert FeatureStore(root).entry(spec()) is None
