"""Recorded steps against steps: by a tape that forgets what a CUDA graph forgets, and by CUDA where there is a GPU."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tape import Recorder
from torch import Tensor

from mlfusion import graphs, population
from mlfusion.batches import Schedule, Tokens
from mlfusion.graphs import WARM, Replayed
from mlfusion.optimizer import cosine
from mlfusion.population import Arithmetic, Configuration, Layout
from mlfusion.probes import HEADS, HeadShape, kernels
from mlfusion.specs import Head
from mlfusion.targets import Number, OneClass, SeveralLabels, Target

IMAGES, STEPS = 41, 30  # in batches of nine and of eight images
SHAPE = HeadShape(tokens=4, width=32, classes=3, heads=4)
GRID = [
    Configuration(1e-2, 1e-2, 0.1),
    Configuration(1e-2, 1e-2, 0.3),
    Configuration(1e-3, 1.0, 0.0),
    Configuration(3e-2, 1e-2, 0.3),
]


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorder]]:
    """Everything is recorded on tapes, here; by PyTorch alone, whose operations a tape can take down."""
    made: list[Recorder] = []

    def make(device: str) -> Recorder:
        made.append(Recorder())
        return made[-1]

    population.replays.cache_clear()
    monkeypatch.setattr(graphs, "absent", lambda device: None)
    monkeypatch.setattr(graphs, "recorder", make)
    with kernels.off():
        yield made
    population.replays.cache_clear()


def tokens(labels: np.ndarray | None = None) -> Tokens:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((IMAGES, SHAPE.tokens, SHAPE.width), np.float32)
    return Tokens(values, np.arange(IMAGES) % 3 if labels is None else labels)


def trained(head: Head, of: Tokens | None = None, **options: Any) -> list[dict[str, Tensor]]:
    """The state of every configuration."""
    of, options = of or tokens(), {"layout": Layout(4, 4, 1)} | options
    schedule = Schedule.of(IMAGES, epochs=1, least_steps=STEPS)
    states = []
    for part, probe in population.train(head, of, np.arange(IMAGES), GRID, SHAPE, schedule, seed=3, **options):
        states += [{n: v[k].clone() for n, v in probe.state_dict().items()} for k in range(part.stop - part.start)]
    return states


def launched(head: Head, of: Tokens | None = None, **options: Any) -> list[dict[str, Tensor]]:
    """As `trained`, without records, at the rates that a record is given: they are float32 there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "absent", lambda device: "not for these")
        patch.setattr(population, "cosine", lambda *about: cosine(*about).float())
        return trained(head, of, **options)


def same(mine: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], tolerance: float) -> None:
    for one, other in zip(mine, theirs, strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replayed_steps_go_where_steps_go(recorders: list[Recorder], head: Head, precision: str) -> None:
    """Rates, batches, masks and statistics are those of each step, in batches of either size."""
    dtype = torch.float64 if precision == "float32" else torch.float32
    found = trained(head, dtype=dtype, precision=precision)
    [_, recorder] = recorders  # of the trial, and of the training
    assert len(recorder.tapes) == 2 and recorder.ran == 2 * WARM and recorder.replayed == STEPS - 2 * WARM
    same(found, launched(head, dtype=dtype, precision=precision), 1e-7)


@pytest.mark.parametrize(
    ("target", "labels"),
    [
        (OneClass(3, smoothing=0.1), np.arange(IMAGES) % 3),
        (SeveralLabels(3), np.arange(3 * IMAGES).reshape(IMAGES, 3) % 2),
        (Number(1, 20.0, 12.0), np.arange(IMAGES, dtype=np.float64)),
    ],
)
def test_every_targets_loss_can_be_recorded(recorders: list[Recorder], target: Target, labels: np.ndarray) -> None:
    of, loss = tokens(labels), target.loss(labels, "cpu", torch.float64)
    found = trained("linear", of, dtype=torch.float64, loss=loss)
    assert recorders[1].replayed
    same(found, launched("linear", of, dtype=torch.float64, loss=loss), 1e-7)


def test_a_head_that_cannot_be_recorded_is_trained_all_the_same(
    recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first looks at a value; the second counts its steps in Python, where no graph sees it."""
    expected = trained("linear", dtype=torch.float64)
    forward = HEADS["linear"].forward  # type: ignore[attr-defined]
    count = 0

    def looks(probe: Any, x: Tensor) -> Tensor:
        return forward(probe, x) * (float(x.sum()) < 1e9)

    def counts(probe: Any, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return forward(probe, x) * (1 + 0.5 * (count % 7))

    for wrong, said in ((looks, "looks at a value"), (counts, "go astray")):
        caplog.clear()
        population.replays.cache_clear()
        recorders.clear()
        monkeypatch.setattr(HEADS["linear"], "forward", wrong)
        with caplog.at_level(logging.WARNING, "mlfusion"):
            assert not population.replays("linear", Arithmetic(dtype=torch.float64))
        assert said in caplog.text and "launched one by one" in caplog.text
        if wrong is looks:
            same(trained("linear", dtype=torch.float64), expected, 1e-6)
            assert len(recorders) == 1  # the trial's alone


def work_on(state: Tensor, how: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[[Tensor], None]:
    def work(x: Tensor) -> None:
        state.add_(how(x).sum())

    return work


def test_shorter_batches_lie_in_the_memory_of_longer_ones() -> None:
    state, recorder = torch.zeros(()), Recorder()
    replayed = Replayed(work_on(state), recorder, tuple)
    rows = [torch.full((n, 3), float(n)) for n in (5, 4, 5, 4, 5, 4, 5, 4, 5, 4)]
    for x in rows:
        replayed(x)
    assert float(state) == sum(float(x.sum()) for x in rows)
    assert len({kept.inputs[0].untyped_storage().data_ptr() for kept in replayed._kept.values()}) == 1
    assert recorder.replayed == 4 and len(recorder.tapes) == 2


def test_a_generator_that_nobody_named_is_refused() -> None:
    """As by CUDA: its numbers would be the same at every replay."""
    stream = torch.Generator().manual_seed(0)
    draws = work_on(torch.zeros(()), lambda x: x * torch.rand(x.shape, generator=stream))
    for streams, refused in ((tuple, True), (lambda: (stream,), False)):
        replayed = Replayed(draws, Recorder(), streams)
        for _ in range(WARM):
            replayed(torch.ones(2))
        if refused:
            with pytest.raises(RuntimeError, match="generator"):
                replayed(torch.ones(2))
        else:
            replayed(torch.ones(2))


def test_a_processor_has_none_and_they_can_be_switched_off() -> None:
    assert graphs.absent("cpu") == "only CUDA has graphs"
    assert graphs.absent("cuda") is None
    with graphs.off():
        assert graphs.absent("cuda:1") == "switched off"


def test_switched_off_in_the_middle_it_is_off_from_there(
    recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained("linear")
    assert len(recorders) == 2
    monkeypatch.setattr(graphs, "absent", lambda device: "switched off")
    trained("linear")
    assert len(recorders) == 2


# --- where there is a GPU ------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA knows")


@gpu
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_graphs_go_where_launched_kernels_go(head: Head, precision: str) -> None:
    assert population.replays(head, Arithmetic("cuda", bf16=precision == "bfloat16"))
    found = trained(head, device="cuda", dtype=torch.float32, precision=precision)
    with graphs.off():
        theirs = trained(head, device="cuda", dtype=torch.float32, precision=precision)
    same(found, theirs, 1e-2 if precision == "float32" else 1e-1)


@gpu
@pytest.mark.parametrize("head", HEADS)
def test_a_gpu_trains_as_a_processor_does(head: Head) -> None:
    """Without dropout and jitter, whose streams are a device's own; in float64, so that order of summation hardly matters."""
    grid = [Configuration(c.lr, c.weight_decay) for c in GRID]
    schedule, ends = Schedule.of(IMAGES, epochs=1, least_steps=STEPS), []
    for device in ("cpu", "cuda"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mlfusion.batches.JITTER_PROBABILITY", 0.0)
            trained = population.train(
                *(head, tokens(), np.arange(IMAGES), grid, SHAPE, schedule), seed=0, device=device, dtype=torch.float64
            )
            ends.append([{n: v.cpu() for n, v in probe.state_dict().items()} for _, probe in trained])
    same(*ends, 1e-5)
