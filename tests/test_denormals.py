"""Denormal numbers are 0 in every thread that trains, solves or predicts, and as before in all threads afterwards."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from fits import fit_options

from mlfusion.errors import BadData
from mlfusion.probing import grids, protocol
from mlfusion.probing.heads import HeadShape, attentive, linear
from mlfusion.probing.solvers import logistic, ridge
from mlfusion.probing.solvers.design import matmul
from mlfusion.probing.solvers.neighbours import Neighbours
from mlfusion.probing.targets import OneClass
from mlfusion.probing.training import population
from mlfusion.probing.training.batches import Schedule, Tokens
from mlfusion.probing.training.population import Configuration, Layout, Needs, Population, TrainingData
from mlfusion.specs.names import Head
from mlfusion.system import threads

DENORMAL = 1e-39
FLUSHING = torch.set_flush_denormal(True)
torch.set_flush_denormal(False)

pytestmark = pytest.mark.skipif(not FLUSHING, reason="this processor has no such setting")


def survive(count: int = 8) -> bool:
    """Whether a sum of denormal numbers, formed by torch in this thread, is one; its bits are read, as == may take it for 0."""
    total = torch.full((count,), DENORMAL) + torch.full((count,), DENORMAL)
    return bool(total.view(torch.int32).bool().all())


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    assert survive()


def tokens(images: int = 24) -> Tokens:
    labels = np.arange(images) % 3
    return Tokens(
        np.random.default_rng(0).normal(size=(images, 3, 8)).astype(np.float32) + labels[:, None, None], labels
    )


# --- the setting -----------------------------------------------------------------------------------------------------


def test_the_setting_is_of_the_context_and_ends_with_it() -> None:
    assert survive() and threads.are_denormals_kept()
    with threads.denormals(kept=False):
        assert not survive() and not threads.are_denormals_kept()
        with threads.denormals(kept=True):
            assert survive()
        assert not survive()
        with threads.denormals(kept=False):
            pass
        assert not survive()  # as it was, not as it is elsewhere
    assert survive()


def test_it_ends_by_an_error_too() -> None:
    with pytest.raises(BadData), threads.denormals(kept=False):
        raise BadData("enough")
    assert survive()


@pytest.mark.parametrize("kept", [True, False])
def test_threads_take_it_over_and_no_other_thread_has_it(kept: bool) -> None:
    with ThreadPoolExecutor(1) as other:
        assert other.submit(survive).result()  # a thread that was there before
        with threads.denormals(kept=kept), threads.pool(2) as workers:
            assert [workers.submit(survive).result() for _ in range(4)] == [kept] * 4
            found: list[bool] = []
            threads.share(lambda _: found.append(survive()), range(4))
            assert found == [kept] * 4
            assert other.submit(survive).result()


def test_torchs_own_threads_have_no_part_in_it() -> None:
    """They would keep theirs, whatever the caller's: so one thread computes everything."""
    many = 1 << 20
    assert survive(many)  # starts them
    with threads.in_order(), threads.denormals(kept=False):
        total = torch.full((many,), DENORMAL) + torch.full((many,), DENORMAL)
        assert not total.view(torch.int32).any()


# --- who has it ------------------------------------------------------------------------------------------------------


def witness(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[bool]:
    """Whether denormal numbers survive in each call of a function, which does what it did."""
    found: list[bool] = []
    real = getattr(where, name)

    def witnessed(*args: Any, **kwargs: Any) -> Any:
        found.append(survive())
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, witnessed)
    return found


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_no_thread_that_trains_keeps_them(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [Configuration(1e-3, 10.0**-k, place=0) for k in range(6)]
    data = TrainingData(tokens(), np.arange(24), Schedule(24, steps=4, batch_size=12, batches=2))
    layout, shape = Layout(together=6, bundle=1, workers=workers), HeadShape(tokens=3, width=8, classes=3)
    trained = Population("linear", shape, members, seed=0)
    monkeypatch.setattr(population, "needs", lambda *_: Needs(1, 1, 1))  # its trial is no part of the training
    forward, backward = witness(monkeypatch, linear.Linear, "forward"), witness(monkeypatch, torch.autograd, "backward")
    for _ in population.train(trained, data, layout=layout):
        assert survive()  # while the caller has its turn
    assert forward == backward == [False] * (6 * 4)


@pytest.mark.parametrize(
    ("head", "where", "name"),
    [
        ("linear", linear.Linear, "forward"),
        ("attentive", attentive.Pool, "forward"),
        ("attentive", attentive.Pool, "backward"),
        ("ridge", torch.linalg, "eigh"),
        ("ridge", ridge, "matmul"),
        ("logistic", logistic, "minimise"),
        ("knn", Neighbours, "_votes"),
    ],
)
def test_nothing_that_is_computed_for_a_fit_keeps_them_but_its_answers_do(
    head: Head, where: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a stored probability of 1e-40 is stored and scored as that."""
    target = OneClass(3)
    short = grids.Grid(learning_rates=(1e-2,), weight_decays=(1e-2,), dropouts=(0.1,), epochs=1, least_steps=2)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", short)
    monkeypatch.setattr(population, "needs", lambda *_: Needs(1, 1, 1))  # its trial is no part of the fit
    seen = witness(monkeypatch, where, name)
    answers = [witness(monkeypatch, OneClass, method) for method in ("predictions", "scores", "score")]
    protocol.fit(head, tokens(), tokens, target=target, options=fit_options(heads=2))
    assert seen and not any(seen)
    assert all(one and all(one) for one in answers)


def test_so_does_the_prediction_of_a_saved_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = linear.Linear(HeadShape(tokens=3, width=8, classes=3), seeds=[0])
    seen, answers = witness(monkeypatch, linear.Linear, "forward"), witness(monkeypatch, OneClass, "predictions")
    protocol.predict(probe, tokens(), OneClass(3))
    assert (seen, answers) == ([False], [True])


def test_a_solvers_products_have_it_in_every_thread() -> None:
    a = torch.full((600, 600), 2.0**-1000, dtype=torch.float64)
    b = a * 2.0**-60  # products below the smallest normal number of float64
    assert matmul(a * 2.0**500, b * 2.0**500).bool().all()
    with threads.in_order(), threads.denormals(kept=False):
        made = matmul(a * 2.0**500, b * 2.0**500)
    assert not made.view(torch.int64).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_denormal_numbers_keeps_its_direction(dtype: torch.dtype) -> None:
    """In a context that takes them as 0: each number of the token is one, and its length is 1 afterwards."""
    small = (np.random.default_rng(0).normal(size=(5, 2, 32)) * 1e-40).astype(np.float32)
    wide = small.astype(np.float64)
    expected = wide / np.linalg.norm(wide, axis=-1, keepdims=True)
    with threads.denormals(kept=False):
        made = Tokens(small, np.zeros(5, np.int64)).normalised(np.arange(5), "cpu", dtype)
    np.testing.assert_allclose(made.numpy(), expected, atol=2e-7)
