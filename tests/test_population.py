"""Lockstep training against one configuration at a time with torch.optim, and the arithmetic of batches and rates."""

import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from time import sleep
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from fits import EVERY_HEAD
from hypothesis import given
from hypothesis import strategies as st
from literal import LiteralAttentive, LiteralLinear, copy_into, train_literally
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from mlfusion.errors import BadData
from mlfusion.probing import losses
from mlfusion.probing.heads import HEADS, Attentive, HeadShape, Linear
from mlfusion.probing.training import batches, population
from mlfusion.probing.training import precision as precision_module
from mlfusion.probing.training.batches import Schedule, Tokens
from mlfusion.probing.training.optimizer import AdamW, cosine
from mlfusion.probing.training.population import Configuration, Layout, Needs, Population, TrainingData
from mlfusion.probing.training.precision import Numerics, resolve
from mlfusion.specs.names import Head
from mlfusion.system.memory import Footprint

F64 = torch.float64
SHAPE = HeadShape(tokens=4, width=10, classes=3, heads=4)
SEVEN = [
    Configuration(lr, weight_decay, dropout)
    for lr, weight_decay, dropout in zip(
        [1e-1, 1e-2, 1e-3, 1e-2, 1e-1, 1e-2, 1e-3],
        [1e-6, 1e-1, 1e-2, 1e0, 1e-3, 1e-5, 1e-4],
        [0.0, 0.3, 0.1, 0.0, 0.3, 0.1, 0.0],
        strict=True,
    )
]


def some(images: int, *, seed: int = 0, tokens: int = 4, width: int = 10, classes: int = 3) -> Tokens:
    """Tokens with some of their class in them, at least one image of each."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, images - classes)])
    centres = rng.normal(size=(classes, tokens, width))
    return Tokens((centres[labels] + rng.normal(size=(images, tokens, width))).astype(np.float32), labels)


def on_all(tokens: Tokens, steps: int) -> TrainingData:
    """All the images, for so many steps."""
    return TrainingData(tokens, np.arange(len(tokens)), Schedule.of(len(tokens), epochs=1, least_steps=steps))


def trained(
    head: Head,
    tokens: Tokens,
    configurations: Sequence[Configuration],
    *,
    steps: int = 12,
    layout: Layout | None = None,
    dtype: torch.dtype = F64,
    width: int = 1,
) -> list[dict[str, Tensor]]:
    """The state of every configuration after training on all the images."""
    states: list[dict[str, Tensor]] = []
    for part, probe in population.train(
        Population(head, SHAPE, configurations, 3, width), on_all(tokens, steps), Numerics(dtype=dtype), layout=layout
    ):
        assert part.start == len(states)
        states += [{n: v[k] for n, v in probe.state_dict().items()} for k in range(part.stop - part.start)]
    return states


@pytest.mark.parametrize("head", EVERY_HEAD)
@pytest.mark.parametrize(
    ("width", "layout"),
    [(1, None), (1, Layout(7, 1, 3)), (1, Layout(3, 2, 1)), (3, None), (3, Layout(1, 1, 1)), (7, None)],
    ids=["default", "wide", "groups", "blocks", "blocks one by one", "one block"],
)
def test_a_configuration_ends_at_the_same_bits_whatever_it_is_trained_with(
    head: Head, width: int, layout: Layout | None
) -> None:
    """In float32, at a learning rate that amplifies rounding, first, in the middle and last of seven."""
    tokens = some(41)
    fast = [dataclasses.replace(one, lr=0.1, place=place) for place, one in enumerate(SEVEN)]
    together = trained(head, tokens, fast, layout=layout, dtype=torch.float32, width=width)
    assert len(together) == 7
    company = trained(
        head, tokens, [fast[k] for k in (6, 0, 3)], dtype=torch.float32, width=width
    )  # 0, 3 and 6: one place
    for place, in_company in zip((6, 0, 3), company, strict=True):
        [alone] = trained(head, tokens, [fast[place]], dtype=torch.float32, width=width)
        for name, value in together[place].items():
            assert torch.equal(value, alone[name]) and torch.equal(value, in_company[name]), name


@pytest.mark.parametrize("head", EVERY_HEAD)
def test_blocks_give_what_each_configuration_gives_by_itself(head: Head) -> None:
    """In float64: the products that configurations share are those of each alone, to rounding."""
    tokens, placed = some(40), [dataclasses.replace(one, place=place) for place, one in enumerate(SEVEN)]
    for alone, state in zip(trained(head, tokens, placed), trained(head, tokens, placed, width=4), strict=True):
        for name, value in state.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-9, msg=name)


@given(st.lists(st.integers(0, 62), max_size=20, unique=True), st.integers(1, 7))
def test_every_configuration_has_its_place_in_one_block(places: list[int], width: int) -> None:
    members = [Configuration(0.1, 0.1, place=place) for place in places]
    blocks = Population("linear", SHAPE, members, 0, width).blocks()
    assert sorted(k for block in blocks for k in block.values()) == list(range(len(places)))
    assert all(place == places[k] % width for block in blocks for place, k in block.items())
    most = max((sum(place % width == p for place in places) for p in range(width)), default=0)
    assert len(blocks) == most  # no more than the place that most of them have needs


def test_the_width_of_blocks_follows_from_the_sizes_of_the_grid() -> None:
    small = HeadShape(tokens=8, width=64, classes=10, heads=8)
    large = HeadShape(tokens=24, width=768, classes=47, heads=24)
    assert [population.width_of("attentive", small, 300, size) for size in (63, 21, 3, 1)] == [7, 7, 3, 1]
    assert population.width_of("attentive", large, 300, 63) == 1


@pytest.mark.parametrize("head", EVERY_HEAD)
@pytest.mark.parametrize("together", [7, 3])
def test_an_accelerator_trains_all_at_once_to_rounding(head: Head, together: int) -> None:
    """Here by the processor, as if it were one: products are shared by the configurations that are alive together."""
    tokens = some(40)
    singles = [trained(head, tokens, [configuration])[0] for configuration in SEVEN]
    with mock.patch.object(Numerics, "is_accelerated", True):
        wide = trained(head, tokens, SEVEN, layout=Layout(together, together, 1))
    for alone, state in zip(singles, wide, strict=True):
        for name, value in state.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-9, msg=name)


def test_a_twin_differs_in_the_last_places_of_its_initial_weights_alone() -> None:
    """It has the seed, and so the dropout, of its configuration."""
    loss = partial(losses.cross_entropy, weights=torch.ones(3))
    one, twin = (
        population._Block(Population("attentive", SHAPE, [member], seed=3), Numerics(), loss)
        for member in (SEVEN[1], dataclasses.replace(SEVEN[1], twin=True))
    )
    for name, value in one.probe.state_dict().items():
        other = twin.probe.state_dict()[name]
        torch.testing.assert_close(value, other, rtol=2**-21, atol=0)
        assert not value.any() or (value == 1).all() or not torch.equal(value, other), name
    tokens = torch.ones(5, 4, 10)
    assert torch.equal(one.probe.draw_mask(tokens), twin.probe.draw_mask(tokens))


@pytest.mark.parametrize("head", ["linear", "attentive"])
def test_training_follows_the_literal_loop(head: Head) -> None:
    """Every step of AdamW, cosine, clipping and weighted loss, for every configuration without dropout."""
    tokens, steps = some(40), 25
    configurations = [Configuration(c.lr, c.weight_decay) for c in SEVEN]
    schedule = Schedule.of(40, epochs=1, least_steps=steps)
    weights = torch.from_numpy(compute_class_weight("balanced", classes=np.arange(3), y=tokens.labels))
    for configuration, state in zip(configurations, trained(head, tokens, configurations, steps=steps), strict=True):
        start = HEADS[head](SHAPE, seeds=[configuration.seed(3)], dropouts=[0.0]).state_dict()
        module = LiteralAttentive(10, 4, 3).double() if head == "attentive" else LiteralLinear(4, 10, 3).double()
        copy_into(module, {name: value[0] for name, value in start.items()})
        passing = batches.batches(tokens, np.arange(40), schedule, seed=3, device="cpu", dtype=F64)
        train_literally(
            module,
            ((batch, labels, None) for batch, labels in passing),
            steps=steps,
            lr=configuration.lr,
            weight_decay=configuration.weight_decay,
            class_weights=weights,
            clip=5.0 if head == "attentive" else None,
        )
        for name, value in module.counterparts().items():
            torch.testing.assert_close(state[name], value.detach().view_as(state[name]), rtol=1e-7, atol=1e-8, msg=name)


def test_training_with_dropout_follows_the_literal_loop_given_the_same_masks() -> None:
    steps, images, k = 15, 24, 2
    lr, weight_decay = [1e-1, 1e-2], [1e-2, 1e-1]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(steps, images, 4, 10, dtype=F64, generator=generator)
    labels = torch.randint(0, 3, (steps, images), generator=generator)
    keep = (torch.rand(steps, k, images, 4, 4, dtype=F64, generator=generator) > 0.3) / 0.7
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=F64)

    probe = Attentive(SHAPE, seeds=[1, 2], dropouts=[0.3, 0.3]).double()
    modules = [LiteralAttentive(10, 4, 3).double() for _ in range(k)]
    for i, module in enumerate(modules):
        copy_into(module, {name: value[i] for name, value in probe.state_dict().items()})
    optimizer = AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        losses.cross_entropy(probe(tokens[step], keep[step]), labels[step], weights).sum().backward()
        optimizer.clip(5.0)
        optimizer.step(cosine(optimizer.lr, step, steps))
    for i, module in enumerate(modules):
        batches = zip(tokens, labels, keep[:, i], strict=True)
        train_literally(
            module, batches, steps=steps, lr=lr[i], weight_decay=weight_decay[i], class_weights=weights, clip=5.0
        )
        state = probe.state_dict()
        for name, value in module.counterparts().items():
            torch.testing.assert_close(state[name][i], value.view_as(state[name][i]), rtol=1e-7, atol=1e-8, msg=name)


def test_adamw_and_clipping_are_those_of_torch_for_each_configuration() -> None:
    k, rng = 4, torch.Generator().manual_seed(0)
    lr, weight_decay = [1e-1, 1e-2, 1e-3, 3e-2], [1e-2, 0.0, 1.0, 0.1]
    ours = [torch.randn(k, *size, dtype=F64, generator=rng).requires_grad_() for size in ((3, 50), (7,), (20_000,))]
    theirs = [[p[i].detach().clone().requires_grad_() for p in ours] for i in range(k)]
    optimizer = AdamW(ours, lr=lr, weight_decay=weight_decay)
    references = [torch.optim.AdamW(p, lr=a, weight_decay=b) for p, a, b in zip(theirs, lr, weight_decay, strict=True)]
    size = torch.tensor([1e-3, 1.0, 100.0, 1e-2], dtype=F64)  # gradient norms below and above the limit
    for _ in range(5):
        for n, p in enumerate(ours):
            noise = torch.randn(p.shape, dtype=F64, generator=rng)
            p.grad = noise * size.view(-1, *[1] * (p.ndim - 1))
            if p.ndim == 3:  # as a product's gradient may come: transposed in memory
                p.grad = p.grad.mT.contiguous().mT
            for i in range(k):
                theirs[i][n].grad = p.grad[i].clone()
        optimizer.clip(5.0)
        for i, reference in enumerate(references):
            torch.nn.utils.clip_grad_norm_(theirs[i], 5.0)
            for n, p in enumerate(ours):
                torch.testing.assert_close(p.grad[i], theirs[i][n].grad, rtol=1e-12, atol=1e-15)
            reference.step()
        optimizer.step()
        for n, p in enumerate(ours):
            assert p.grad is None
            for i in range(k):
                torch.testing.assert_close(p[i], theirs[i][n], rtol=1e-12, atol=1e-13)


def test_rates_follow_torchs_cosine_from_each_configurations_own() -> None:
    steps, own = 50, [1e-1, 1e-3]
    for i, lr in enumerate(own):
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
        for step in range(steps):
            assert cosine(own, step, steps)[i] == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
            optimizer.step()
            scheduler.step()
    assert cosine(own, steps, steps) == pytest.approx([1e-6, 1e-6])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA knows")
@pytest.mark.parametrize("head", EVERY_HEAD)
def test_a_gpu_trains_as_a_processor_does(head: Head) -> None:
    """With the same dropout and jitter; in float64, so that order of summation hardly matters."""
    ends = []
    for device in ("cpu", "cuda"):
        trained = population.train(Population(head, SHAPE, SEVEN, seed=0), on_all(some(41), 30), Numerics(device, F64))
        ends.append([{name: value.cpu() for name, value in probe.state_dict().items()} for _, probe in trained])
    for one, other in zip(*ends, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-5, msg=name)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "batch_size", "batches", "steps"),
    [
        (1504, 301, 5, 1000),  # DTD
        (240, 48, 5, 1000),
        (10_240, 2048, 5, 1000),
        (50_000, 2000, 25, 1000),  # 25 even batches rather than 24 of 2,048 and a rest
        (200_000, 2041, 98, 3920),
        (3, 3, 1, 1000),  # never a batch of one image
        (2, 2, 1, 1000),
    ],
)
def test_steps_and_batches_are_the_studys(images: int, batch_size: int, batches: int, steps: int) -> None:
    schedule = Schedule.of(images)
    assert (schedule.batch_size, schedule.batches, schedule.steps) == (batch_size, batches, steps)
    assert steps == max(1000, 40 * batches)


@given(st.integers(2, 30_000), st.integers(4, 2**22))
def test_an_epoch_reads_every_image_once_in_even_batches(images: int, shuffle_bytes: int) -> None:
    schedule = Schedule.of(images, epochs=1, least_steps=1)
    tokens = Tokens(
        np.arange(2 * images, dtype=np.float32).reshape(2 * images, 1, 1), np.zeros(2 * images, dtype=np.int64)
    )
    rows = np.arange(0, 2 * images, 2)
    with mock.patch.object(batches, "SHUFFLE_BYTES", shuffle_bytes):
        groups = list(schedule.order(tokens, rows, seed=0))
    epoch = [*tokens.iter_batches(groups)]
    sizes = [len(chosen) for chosen, _ in epoch]
    assert all(np.array_equal(values[:, 0, 0], chosen) for chosen, values in epoch)
    assert np.array_equal(np.sort(np.concatenate([chosen for chosen, _ in epoch])), rows)
    assert max(sizes) == schedule.batch_size <= 2048
    assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1
    assert len(sizes) == schedule.batches and (len(sizes) >= 5 or images < 10)
    largest = max(sum(map(len, group)) for group in groups)
    assert largest <= max(shuffle_bytes // 4, max(sizes))  # what is shuffled together, and read at once


def test_order_and_jitter_come_from_the_seed_alone() -> None:
    tokens, rows, schedule = some(40), np.arange(5, 35), Schedule.of(30, epochs=2, least_steps=1)

    def run(seed: int) -> list[tuple[Tensor, Tensor]]:
        return list(batches.batches(tokens, rows, schedule, seed=seed, device="cpu"))

    for (a, i), (b, j) in zip(run(0), run(0), strict=True):
        assert torch.equal(a, b) and torch.equal(i, j)
    assert not torch.equal(torch.cat([i for _, i in run(0)]), torch.cat([i for _, i in run(1)]))
    labels = torch.cat([i for _, i in run(0)])
    assert len(run(0)) == schedule.steps == 2 * schedule.batches
    for epoch in labels.split(30):  # rows outside the split never show up
        assert np.array_equal(np.bincount(epoch, minlength=3), np.bincount(tokens.labels[rows], minlength=3))
    assert not torch.equal(*labels.split(30))  # a new order each epoch


def test_jitter_shakes_half_of_the_images() -> None:
    tokens = Tokens(np.repeat(some(1, classes=1).values, 4000, axis=0), np.zeros(4000, dtype=np.int64))
    schedule = Schedule.of(4000, epochs=1, least_steps=1)
    [*passing] = batches.batches(tokens, np.arange(4000), schedule, seed=0, device="cpu")
    noise = torch.cat([batch for batch, _ in passing]) - tokens.normalised(np.zeros(1, dtype=int), "cpu")
    shaken = (noise != 0).flatten(1)
    assert torch.equal(shaken.any(1), shaken.all(1))  # a whole image or none of it
    assert shaken.any(1).double().mean().item() == pytest.approx(0.5, abs=0.03)
    values = noise[shaken.any(1)]
    assert values.std().item() == pytest.approx(0.05, rel=0.01)
    assert values.mean().item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("kind", ["float16", "float32", "torch", "read-only"])
def test_tokens_are_normalised_over_their_width(kind: str) -> None:
    values = some(6).values.copy()
    values[2, 1] = 0
    given_values: np.ndarray | Tensor = values.astype(np.float16) if kind == "float16" else values
    if kind == "torch":
        given_values = torch.from_numpy(values)
    if kind == "read-only":
        values.setflags(write=False)
    rows = np.array([4, 2, 2])
    found = Tokens(given_values, np.zeros(6, dtype=np.int64)).normalised(rows, "cpu")
    length = np.linalg.norm(values[rows], axis=-1, keepdims=True)
    expected = np.divide(values[rows], length, out=np.zeros_like(values[rows]), where=length > 0)
    assert found.dtype == torch.float32
    assert (found[1, 1] == 0).all()
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3 if kind == "float16" else 1e-6)


# --- loss ------------------------------------------------------------------------------------------------------------


def test_class_weights_are_scikit_learns_balanced() -> None:
    labels = np.array([0] * 10 + [1] * 3 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(losses.class_weights(labels, 3), expected)


def test_a_class_without_images_weighs_nothing() -> None:
    assert losses.class_weights(np.array([0, 0, 2]), 3).tolist() == pytest.approx([0.5, 0, 1])


def test_loss_is_torchs_weighted_cross_entropy_for_each_configuration() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 30, 3, generator=generator), torch.randint(0, 3, (30,), generator=generator)
    weights = torch.tensor([0.2, 1.0, 5.0])
    criterion = torch.nn.CrossEntropyLoss(weight=weights)
    torch.testing.assert_close(
        losses.cross_entropy(logits, labels, weights), torch.stack([criterion(k, labels) for k in logits])
    )


# --- what training is for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", EVERY_HEAD)
def test_twenty_samples_are_learned_by_heart(head: Head) -> None:
    rng = np.random.default_rng(0)
    # Wider than there are images: a mean of tokens, too, can tell all of them apart.
    shape = HeadShape(tokens=4, width=24, classes=3, heads=4)
    tokens = Tokens(rng.normal(size=(20, 4, 24)).astype(np.float16), np.arange(20) % 3)
    lr = {"linear": 1e-1, "scalar-mix": 1e-1, "v-jepa-4": 1e-3}.get(head, 1e-2)
    one = Population(head, shape, [Configuration(lr, 1e-4)], seed=0)
    [(_, probe)] = population.train(one, on_all(tokens, 300))
    [(logits, _)] = population.read(probe, tokens, np.arange(20), block=20, device="cpu")
    assert (logits[0].argmax(-1).numpy() == tokens.labels).all()


def test_linear_reaches_the_optimum_that_scikit_learn_finds() -> None:
    """Overlapping classes, so that the likelihood has its one maximum at a finite place; no decay, no jitter."""
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 3
    x = rng.normal(size=(240, 2, 2)) + rng.normal(size=(3, 2, 2))[labels]
    inputs, truth = torch.from_numpy(x), torch.from_numpy(labels)
    probe = Linear(HeadShape(tokens=2, width=2, classes=3), seeds=[0, 1]).double()
    optimizer = AdamW(probe.parameters(), lr=[0.1, 0.03], weight_decay=[0.0, 0.0])
    for step in range(800):
        losses.cross_entropy(probe(inputs), truth, torch.ones(3, dtype=F64)).sum().backward()
        optimizer.step(cosine(optimizer.lr, step, 800))
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(x.reshape(240, 4), labels)
    expected = reference.predict_proba(x.reshape(240, 4))
    for probabilities in probe(inputs).softmax(-1).detach().numpy():
        assert log_loss(labels, probabilities) == pytest.approx(log_loss(labels, expected), abs=1e-7)
        np.testing.assert_allclose(probabilities, expected, atol=1e-3)


@pytest.mark.parametrize("head", EVERY_HEAD)
def test_a_configuration_that_diverges_harms_no_other(head: Head) -> None:
    tokens, wild = some(40), Configuration(1e30, 1.0)
    states = trained(head, tokens, [SEVEN[1], wild, SEVEN[2]], dtype=torch.float32)
    finite = [all(bool(torch.isfinite(value).all()) for value in state.values()) for state in states]
    assert finite == [True, False, True]
    for state, configuration in ((states[0], SEVEN[1]), (states[2], SEVEN[2])):
        for name, value in trained(head, tokens, [configuration], dtype=torch.float32)[0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("head", EVERY_HEAD)
def test_narrow_products_change_scores_little_and_keep_parameters_wide(head: Head) -> None:
    tokens, logits = some(40), {}
    for precision in ("float32", "bfloat16"):
        [(_, probe)] = population.train(
            Population(head, SHAPE, [SEVEN[2]], seed=0), on_all(tokens, 10), Numerics(bf16=precision == "bfloat16")
        )
        assert {value.dtype for value in probe.state_dict().values()} == {torch.float32}
        [(logits[precision], _)] = population.read(probe, tokens, np.arange(40), block=40, device="cpu")
    gap = (logits["bfloat16"] - logits["float32"]).abs().mean() / logits["float32"].std()
    assert 0 < gap < 0.2  # other products, but the same training


@pytest.mark.parametrize(("seconds", "auto"), [(0.5, "bfloat16"), (0.8, "float32"), (2.0, "float32")])
def test_the_faster_precision_is_taken_where_none_is_asked_for(
    seconds: float, auto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a product takes one second in float32, and so many in bfloat16."""
    ticks = itertools.accumulate(at for each in (1.0, seconds) for _ in range(6) for at in (0.0, each))
    monkeypatch.setattr(precision_module, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(
        precision_module, "has_fast_bfloat16", precision_module.has_fast_bfloat16.__wrapped__
    )  # measured once, else
    assert resolve("float32", "cpu") == "float32" and resolve("bfloat16", "cpu") == "bfloat16"
    assert resolve("auto", "cpu") == auto


# --- groups and streams ----------------------------------------------------------------------------------------------


@given(
    st.integers(1, 70),
    st.integers(1, 2**34),
    st.builds(Needs, *[st.integers(1, 2**30)] * 3),
    st.integers(1, 64),
    st.booleans(),
)
def test_a_layout_tiles_the_population_and_fits(
    count: int, memory: int, need: Needs, threads: int, shared: bool
) -> None:
    if need.batch + need.each + need.step > memory:
        with pytest.raises(BadData, match="not even one block"):
            Layout.of(count, need, memory=memory, threads=threads, shared=shared)
        return
    layout = Layout.of(count, need, memory=memory, threads=threads, shared=shared)
    groups = layout.groups(count)
    assert [i for group in groups for i in range(group.start, group.stop)] == list(range(count))
    for group in groups:
        members = group.stop - group.start
        assert 0 < members <= layout.together
        at_work = members if shared else layout.workers
        batches = 1 if layout.workers == 1 else 2  # the next is prepared while workers step
        assert batches * need.batch + members * need.each + at_work * need.step <= memory
    assert layout.workers <= max(1, min(threads, count))


def test_all_are_trained_together_where_there_is_room() -> None:
    need = Needs(batch=10, each=4, step=2)
    assert len(Layout.of(63, need, memory=2 * 10 + 63 * 4 + 2 * 2, threads=2, shared=False).groups(63)) == 1
    assert len(Layout.of(63, need, memory=2 * 10 + 63 * 4 + 2 * 2 - 1, threads=2, shared=False).groups(63)) == 2
    assert Layout.of(63, need, memory=10 + 63 * 6, threads=8, shared=True) == Layout(63, 63, 1)


def test_small_configurations_share_a_lane_and_large_ones_do_not() -> None:
    small, large = Needs(batch=1, each=1000, step=1000), Needs(batch=1, each=2**26, step=1000)
    for count, lanes in ((1, 1), (3, 1), (5, 1), (6, 2), (63, 4)):
        assert Layout.of(count, small, memory=2**33, threads=4, shared=False).workers == lanes
    assert Layout.of(3, small, memory=2**33, threads=4, shared=False) == Layout(3, 3, 1)
    assert Layout.of(3, large, memory=2**33, threads=4, shared=False) == Layout(3, 1, 3)


@pytest.mark.slow
def test_training_loads_no_compiler() -> None:
    code = """
import sys
import numpy as np
from mlfusion.probing.training import population
from mlfusion.probing.training.batches import Schedule, Tokens
from mlfusion.probing.training.population import Configuration, Population, TrainingData
from mlfusion.probing.heads import HeadShape
tokens = Tokens(np.random.default_rng(0).random((8, 2, 4), np.float32), np.arange(8) % 2)
shape = HeadShape(tokens=2, width=4, classes=2, heads=2)
one = Population("attentive", shape, [Configuration(0.1, 0.1, 0.1)], seed=0)
[_] = population.train(one, TrainingData(tokens, np.arange(8), Schedule.of(8), until=2))
print("torch._dynamo" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"  # it would take a second of every process


@pytest.mark.parametrize("head", EVERY_HEAD)
def test_needs_are_those_of_the_tensors_there_are(head: Head) -> None:
    """Parameters with two moments, and at least the tokens and a gradient for every parameter."""
    shape = HeadShape(tokens=5, width=96, classes=3, heads=4)
    need = population.needs(head, shape, 64)
    probe = HEADS[head](shape, seeds=[0], dropouts=[0.1])
    numbers = sum(p.numel() for p in probe.parameters())
    assert 3 * 4 * numbers <= need.each <= 3.2 * 4 * numbers + 4096
    assert need.batch >= 4 * 64 * 5 * 96
    assert need.step >= 4 * numbers
    more = population.needs(head, shape, 128)
    assert more.each == need.each and more.step > need.step and more.batch >= 2 * 4 * 64 * 5 * 96


def test_a_footprint_is_what_is_alive() -> None:
    with Footprint() as seen:
        a = torch.zeros(1000)
        b = a.view(10, 100)[:5]  # the same memory
        c = a + 1
        assert seen.alive == seen.most == 8000
        del a, c
        assert seen.alive == 4000 and b.shape == (5, 100)
        del b
        d = torch.zeros(500)
        assert (seen.alive, seen.most) == (2000, 8000) and len(d)


def test_lanes_do_the_steps_of_a_block_in_turn_and_pass_on_what_fails() -> None:
    """A block's steps follow each other although no step waits for all blocks of the one before."""
    done: dict[object, list[int]] = {n: [] for n in range(5)}

    def work(block: Any, *, step: int) -> None:
        if step == 7:
            raise BadData("enough")
        sleep(0.002 * (block == 0))  # one block is slower than the others together
        done[block].append(step)

    with population._Workers(3) as workers:
        count = sum(workers.step(partial(work, step=step), cast(Any, range(5))) for step in range(6)) + workers.finish()
        assert count == 6 and all(steps == list(range(6)) for steps in done.values())
        workers.step(partial(work, step=7), cast(Any, range(5)))
        with pytest.raises(BadData, match="enough"):
            workers.finish()


def test_progress_counts_configurations() -> None:
    counts: list[int] = []
    data, layout = on_all(some(40), 3), Layout(together=3, bundle=2, workers=2)
    for _ in population.train(Population("linear", SHAPE, SEVEN, seed=0), data, layout=layout, progress=counts.append):
        pass
    assert sum(counts) == 7 * data.schedule.steps and len(counts) == 3 * data.schedule.steps


def test_configurations_have_streams_of_their_own() -> None:
    seeds = {c.seed(s) for c, s in itertools.product(SEVEN, range(3))}
    assert len(seeds) == 21
    assert SEVEN[0].seed(0) == Configuration(*(getattr(SEVEN[0], f) for f in ("lr", "weight_decay", "dropout"))).seed(0)
    assert math.log2(max(seeds)) > 60
