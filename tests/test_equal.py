"""Equal ids give equal numbers: neither threads nor memory nor the rest of a command change a stored prediction."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import EVERY_HEAD, fit_options
from rows import row
from tiny import save_images, save_model

import mlfusion
from mlfusion.errors import BadData
from mlfusion.probing import grids, protocol
from mlfusion.probing.protocol import Outcome
from mlfusion.probing.search import Running, Training, changed
from mlfusion.probing.solvers.design import add_product, matmul
from mlfusion.probing.targets import Number, OneClass, SeveralLabels, Target
from mlfusion.probing.training.batches import Tokens
from mlfusion.results import Results
from mlfusion.specs.names import Head
from mlfusion.specs.options import TrainingOptions
from mlfusion.system import threads

# Eight configurations are a block of seven and one more.
FAST = grids.Grid(
    learning_rates=(1e-1, 3e-2, 1e-2, 3e-3), weight_decays=(1e-2, 1e-4), dropouts=(0.1,), epochs=1, least_steps=8
)
LITTLE = 8_000_000  # bytes: less than two blocks of the larger configurations take


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", FAST)


def tokens(target: Target, images: int, seed: int) -> Tokens:
    """Tokens of an odd width, so that whole vectors do not divide it."""
    rng = np.random.default_rng(seed)
    labels: Any = np.arange(images) % 3
    values = rng.normal(size=(images, 3, 35)).astype(np.float32)
    values[:, 0, :3] += np.eye(3)[labels]
    if target.kind == "labels":
        labels = (rng.random((images, 3)) < 0.5).astype(np.int64)
    if target.kind == "number":
        labels = 50 + 10 * rng.normal(size=images)
    return Tokens(values, labels)


def fitted(head: Head, count: int, memory: int | None, target: Target) -> Outcome:
    """The outcome on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return protocol.fit(
            head,
            tokens(target, 61, 0),
            lambda: tokens(target, 47, 1),
            target=target,
            options=fit_options(heads=3),
            running=Running(training=TrainingOptions(memory=memory)),
        )
    finally:
        assert torch.get_num_threads() == count  # as the caller had it
        torch.set_num_threads(before)


def assert_equal(one: Outcome, other: Outcome) -> None:
    """Everything that is stored, but for the seconds."""
    a, b = (dataclasses.asdict(outcome) for outcome in (one, other))
    for name in a.keys() - {"seconds"}:
        np.testing.assert_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("head", [*EVERY_HEAD, "ridge", "logistic", "knn"])
def test_neither_threads_nor_memory_change_an_outcome(head: Head) -> None:
    one = fitted(head, 1, None, OneClass(3))
    assert_equal(one, fitted(head, 2, LITTLE, OneClass(3)))
    assert_equal(one, fitted(head, 3, None, OneClass(3)))


@pytest.mark.parametrize("head", ["attentive", "ridge", "logistic", "knn"])
@pytest.mark.parametrize("target", [SeveralLabels(3), Number(1, 50.0, 10.0)], ids=["labels", "number"])
def test_nor_where_labels_are_of_another_kind(head: Head, target: Target) -> None:
    if head == "logistic" and target.kind == "number":
        pytest.skip("logistic regression has no numbers")
    assert_equal(fitted(head, 1, None, target), fitted(head, 2, LITTLE, target))


@pytest.mark.slow
def test_the_other_probes_of_a_command_and_their_order_change_nothing(tmp_path: Path) -> None:
    model, images = save_model("vit", tmp_path / "m"), save_images(tmp_path / "d", {"train": 12, "test": 6})
    mlfusion.extract(str(model), str(images), tokens="cls,ap@last")
    found: list[dict[str, dict[str, np.ndarray]]] = []
    names = ["cls-last/attentive", "cls+ap-last/ridge", "cls+ap-last/attentive", "cls-last/linear"]
    for n, probes in enumerate((names, names[::-1], names[2:3])):
        made = mlfusion.probe(str(images), probes=probes, grid="quick", seeds=(0,), results=tmp_path / str(n))
        found.append({one.probe: Results(tmp_path / str(n)).arrays(one) for one in made.rows})
    for other in found[1:]:
        for probe, arrays in other.items():
            np.testing.assert_equal(arrays, found[0][probe], err_msg=probe)


# --- products of the solvers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7, 3), (40, 30, 256), (33, 20, 700), (300, 100, 600)])  # the last on threads
def test_a_product_is_the_product_whatever_the_number_of_threads(shape: tuple[int, int, int]) -> None:
    n, m, p = shape
    generator = torch.Generator().manual_seed(0)
    a, b, start = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in ((n, m), (m, p), (n, p)))
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        with threads.in_order():
            assert (threads.count(), torch.get_num_threads()) == (count, 1)
            results.append((matmul(a, b), add_product(start.clone(), a, b)))
    torch.set_num_threads(before)
    for one, sum_ in results:
        assert torch.equal(one, results[0][0]) and torch.equal(sum_, results[0][1])
    torch.testing.assert_close(results[0][0], torch.from_numpy(a.numpy() @ b.numpy()))
    torch.testing.assert_close(results[0][1], start + torch.from_numpy(a.numpy() @ b.numpy()))


def test_what_a_thread_raises_is_raised() -> None:
    def work(item: int) -> None:
        if item == 3:
            raise BadData("enough")

    before = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        with pytest.raises(BadData, match="enough"):
            threads.share(work, range(5))
    torch.set_num_threads(before)


# --- unstable configurations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "moved", "share"),
    [
        (OneClass(3), 5.0, 0.5),  # a probability from ⅓ to 0.99
        (OneClass(3), 0.1, 0.0),  # from 0.33 to 0.36
        (SeveralLabels(3), 5.0, 0.5),
        (Number(1), 0.2, 0.5),  # a fifth of a deviation
        (Number(1), 0.05, 0.0),
        (OneClass(3), np.nan, 0.5),
    ],
)
def test_the_share_of_changed_answers(target: Target, moved: float, share: float) -> None:
    one = torch.zeros(10, target.outputs)
    other = one.clone()
    other[::2, 0] += moved
    assert changed(target, one, other) == pytest.approx(share)


N = 25  # images held out
NOISE = float(np.sqrt(0.04 / N))  # of a share of 0.04: 0.04


@pytest.mark.parametrize(
    ("score", "twins", "taken"),
    [
        ([0.5, 0.9, 0.7], {1: (0.01, 0.9)}, (1, "stable")),
        ([0.5, 0.9, 0.7], {1: (0.02, 0.4)}, (1, "stable")),  # at the limit
        ([0.5, 0.9, 0.7], {1: (0.5, 0.6), 2: (0.0, 0.7)}, (2, "instead of an unstable one")),
        ([0.5, 0.9, 0.7], {1: (0.5, 0.6), 2: (0.5, 0.7)}, (1, "unstable")),  # none is stable
        ([0.5, 0.9, 0.5], {1: (0.04, 0.9)}, (1, "unstable")),  # none is within the noise, √(p / n)
        ([0.5, 0.9, 0.9 - NOISE + 1e-9], {1: (0.04, 0.9), 2: (0.0, 0.8)}, (2, "instead of an unstable one")),
        ([0.89, 0.9, 0.88], {1: (0.5, 0.9), 0: (0.3, 0.8), 2: (0.0, 0.8)}, (2, "instead of an unstable one")),
        ([0.88, 0.9, 0.89], {1: (0.5, 0.9), 0: (0.0, 0.8), 2: (0.0, 0.8)}, (2, "instead of an unstable one")),
    ],
)
def test_an_unstable_configuration_gives_way_to_a_stable_one_within_its_noise(
    score: list[float],
    twins: dict[int, tuple[float, float]],
    taken: tuple[int, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`twins`: share of changed answers and score of each configuration's twin; of the others none may be tried."""
    one = Training("attentive", tokens(OneClass(3), 61, 0), OneClass(3), fit_options(heads=3))
    monkeypatch.setattr(one, "held_out", np.arange(N))
    monkeypatch.setattr(one, "_twins", lambda members: [twins[k] for k in members])
    one._outputs = {k: torch.empty(0) for k in np.argsort(-np.array(score), kind="stable").tolist()}
    assert one.settle(1, np.array(score)) == taken


def test_a_convex_head_is_not_tried() -> None:
    linear = Training("linear", tokens(OneClass(3), 61, 0), OneClass(3), fit_options())
    assert linear.settle(0, np.array([0.1])) == (0, None)
    assert fitted("ridge", 1, None, OneClass(3)).stability is None


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "stable"), [(0.1, False), (1e-4, True)])
def test_a_chaotic_training_is_found_and_a_calm_one_is_not(
    rate: float, stable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = dataclasses.replace(FAST, learning_rates=(rate,), weight_decays=(1e-2,), dropouts=(0.0,), least_steps=200)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", only)
    assert fitted("abmil", 1, None, OneClass(3)).stability == ("stable" if stable else "unstable")


def test_only_an_unstable_choice_has_a_line_on_the_page() -> None:
    made = {stability: row(stability=stability) for stability in (None, "stable", "unstable")}
    notes = {stability: one.stability_note() for stability, one in made.items()}
    assert notes[None] == notes["stable"] == "" and "rounding alone" in notes["unstable"]
