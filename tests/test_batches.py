"""Batches streamed from the cache: the same images, labels and scores as from memory, in memory that does not grow."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from tiny import save_features

import mlfusion
from mlfusion.errors import BadData
from mlfusion.probing.heads import HeadShape
from mlfusion.probing.training import batches, population
from mlfusion.probing.training.batches import Schedule, Tokens
from mlfusion.probing.training.population import Configuration, Population, TrainingData
from mlfusion.results import Results
from mlfusion.store import Entry

WIDTH, TOKENS = 24, 5


def cached(root: Path, split: str, images: int, *, tokens: int = TOKENS, width: int = WIDTH, seed: int = 0) -> Entry:
    """An entry of all tokens of the last of two layers, sorted by class, which they tell a little of."""
    random = np.random.default_rng(seed)
    labels = np.arange(images) * 3 // images
    centres = np.random.default_rng(7).normal(size=(3, tokens, width))
    values = np.empty((images, tokens, width), np.float16)
    for start in range(0, images, 1024):
        some = labels[start : start + 1024]
        values[start : start + 1024] = centres[some] + 2 * random.normal(size=(len(some), tokens, width))
    return save_features(root, split, values, labels)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups of several blocks in a few hundred images."""
    monkeypatch.setattr(batches, "SHUFFLE_BYTES", 1 << 14)


@pytest.mark.usefixtures("small_groups")
def test_a_streamed_pass_has_every_image_once_with_its_own_tokens_and_label(tmp_path: Path) -> None:
    entry = cached(tmp_path, "train", 600)
    rows = np.setdiff1d(np.arange(600), np.arange(0, 600, 7))
    schedule = Schedule.of(len(rows), epochs=2, least_steps=1)
    with entry.open([2], ["all"]) as values:
        tokens = Tokens(values, entry.samples.labels)
        assert tokens.is_streamed and tokens.shape == (600, TOKENS, WIDTH)
        whole = values.read().reshape(600, TOKENS, WIDTH)

        def passed(seed: int) -> list[np.ndarray]:
            found = []
            for chosen, given in tokens.iter_batches(schedule.order(tokens, rows, seed)):
                assert np.array_equal(given.numpy(), whole[chosen])
                found.append(chosen)
            return found

        once, again, other = passed(0), passed(0), passed(1)
        assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
        assert not np.array_equal(np.concatenate(once), np.concatenate(other))
        epochs = [np.concatenate(once[: schedule.batches]), np.concatenate(once[schedule.batches :])]
        assert [len(batch) for batch in once] == schedule.sizes * 2
        assert all(np.array_equal(np.sort(epoch), rows) for epoch in epochs)
        assert not np.array_equal(*epochs)
        # Sorted by class as they lie, and yet every batch has of every class.
        assert all(len(np.unique(entry.samples.labels[batch])) == 3 for batch in once)
        # What a step is given: of length 1 but for the jitter on some.
        [*steps] = batches.batches(tokens, rows, schedule, seed=3, device="cpu")
        lengths = torch.cat([batch for batch, _ in steps]).norm(dim=-1)
        assert torch.isclose(lengths, torch.ones(()), atol=1e-3).double().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("part", [1.0, 0.8])
def test_held_and_streamed_tokens_come_in_the_same_batches_and_give_the_same_weights(
    tmp_path: Path, part: float
) -> None:
    entry, steps = cached(tmp_path, "train", 300), 22
    rows = np.sort(np.random.default_rng(1).permutation(300)[: int(300 * part)])
    schedule = Schedule.of(len(rows), epochs=1, least_steps=steps)
    with entry.open([2], ["all"]) as values:
        streamed = Tokens(values, entry.samples.labels)
        held = Tokens(values.read().reshape(300, TOKENS, WIDTH), streamed.labels)
        assert streamed.is_streamed and not held.is_streamed
        assert len(list(schedule.order(held, rows, 0))) > 3 * steps / schedule.batches  # an epoch has several groups
        passes = [list(tokens.iter_batches(schedule.order(tokens, rows, 0))) for tokens in (held, streamed)]
        for (a, x), (b, y) in zip(*passes, strict=True):
            assert np.array_equal(a, b) and torch.equal(x, y)
        ends = []
        for tokens in (held, streamed):
            shape = HeadShape(tokens=TOKENS, width=WIDTH, classes=3, heads=4)
            one = Population("attentive", shape, [Configuration(1e-2, 1e-2, 0.1)], seed=0)
            [(_, probe)] = population.train(one, TrainingData(tokens, rows, schedule))
            ends.append(probe.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], msg=name)


def test_sizes_must_add_up(tmp_path: Path) -> None:
    with cached(tmp_path, "train", 30).open([2], ["all"]) as values, pytest.raises(ValueError, match="29 images"):
        next(values.batches([10, 19], seed=0))


@pytest.mark.long
def test_a_probe_streams_what_it_may_not_load(tmp_path: Path) -> None:
    """The same protocol and the same scores but for rounding; the row tells."""
    for split, images in (("train", 1200), ("test", 300)):
        cached(tmp_path, split, images, tokens=44, width=64, seed=len(split))
    rows = {}
    little = 13 * 10**6  # bytes: less than twice the tokens, and enough for a block
    for memory in (little, 10**9):
        done = mlfusion.probe(
            "d",
            model="m",
            probes="all-tokens-last/attentive",
            grid="quick",
            seeds=(0,),
            cache=tmp_path,
            results=tmp_path / f"{memory}",
            memory=memory,
        )
        [rows[memory]] = done.rows
        assert Results(tmp_path / f"{memory}").require() == done.rows
    streamed, loaded = rows[little], rows[10**9]
    assert streamed.streamed and not loaded.streamed
    assert loaded.test > 0.6 and streamed.test == pytest.approx(loaded.test, abs=0.01)
    assert streamed.id == loaded.id
    with pytest.raises(
        BadData, match=r"not even one block of configurations can be trained: it needs .* for a batch .* --memory"
    ):
        mlfusion.probe(
            "d",
            probes="all-tokens-last/attentive",
            grid="quick",
            seeds=(0,),
            cache=tmp_path,
            results=tmp_path / "none",
            memory=10**6,
        )


GROWS = """
import sys
import numpy as np, torch
from mlfusion.probing.training import batches, population
from mlfusion.probing.training.batches import Schedule, Tokens
from mlfusion.probing.heads import HeadShape
from mlfusion.store import FeatureStore
torch.set_num_threads(1)
batches.SHUFFLE_BYTES = 1 << 23
[entry] = FeatureStore(sys.argv[1]).entries()
with entry.open([2], ["all"]) as values:
    tokens = Tokens(values, entry.samples.labels)
    if sys.argv[2] == "load":
        tokens = Tokens(tokens[:], tokens.labels)
    n, t, d = tokens.shape
    schedule = Schedule(images=n, steps=n // 200, batch_size=200, batches=n // 200)
    shape = HeadShape(tokens=t, width=d, classes=3, heads=4)
    one = population.Population("attentive", shape, [population.Configuration(1e-3, 0.1)], seed=0)
    for _ in population.train(one, population.TrainingData(tokens, np.arange(n), schedule)):
        pass
[peak] = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]
print(int(peak.split()[1]) * 1024 // 10**6)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is told by Linux's /proc")
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    few, many, tokens, width = 2000, 16000, 64, 128
    peaks = {}
    for images, ways in ((few, ["stream"]), (many, ["stream", "load"])):
        cached(tmp_path / str(images), "train", images, tokens=tokens, width=width)
        for way in ways:
            command = [sys.executable, "-c", GROWS, str(tmp_path / str(images)), way]
            peaks[images, way] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # 230 MB; what an allocator keeps back of blocks that come and go differs by some 40 MB from run to run.
    growth = (many - few) * tokens * width * 2 / 1e6
    assert peaks[many, "stream"] < peaks[few, "stream"] + growth / 2
    assert peaks[many, "load"] > peaks[many, "stream"] + growth / 2


@pytest.mark.parametrize("shape", [(3, 8), (2, 4), (1, 6), (3, 3), (1, 1)])
def test_jitter_is_by_the_bytes_of_numpys_generator(shape: tuple[int, int]) -> None:
    """Two bytes a number, whatever the sizes of the draws, between which other numbers are drawn."""
    ours, numpys = (np.random.Generator(np.random.SFC64(7)) for _ in range(2))
    table = np.sort(scipy.stats.norm.ppf((np.arange(2**16) + 0.5) / 2**16))
    table *= batches.JITTER_STD / table.std()
    for images in (4, 1, 3, 2, 5):
        noise = batches._noise(ours, [np.arange(images)], shape, torch.device("cpu"))
        drawn = np.frombuffer(numpys.bytes(2 * images * shape[0] * shape[1]), "<u2")
        np.testing.assert_allclose(noise.numpy(), table[drawn].reshape(-1, *shape), rtol=1e-5, atol=1e-9)
        assert ours.random() == numpys.random()
