"""The protocol: what is chosen on what, when the test set is read, and what is refused."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fits import EVERY_HEAD, fit_options
from hypothesis import given
from hypothesis import strategies as st
from literal import LiteralAttentive, LiteralLinear, copy_into

from mlfusion.errors import BadData, BadOption
from mlfusion.probing import grids, protocol
from mlfusion.probing.grids import SEARCH_GRIDS, Grid
from mlfusion.probing.protocol import Outcome, choose, fit
from mlfusion.probing.search import Running, Training
from mlfusion.probing.solvers.design import penalties
from mlfusion.probing.solvers.neighbours import neighbourhoods
from mlfusion.probing.splits import draw, split
from mlfusion.probing.targets import OneClass
from mlfusion.probing.training.batches import Tokens
from mlfusion.probing.training.population import Configuration, Population, TrainingData
from mlfusion.specs.names import Head
from mlfusion.statistics import measures

SMALL = Grid(learning_rates=(1e-1, 1e-2), weight_decays=(1e-4, 1e-1), dropouts=(0.0, 0.1), epochs=1, least_steps=40)
QUICK = SEARCH_GRIDS["quick"]
CLASSES = 3


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEARCH_GRIDS, "quick", SMALL)


def tokens(images: int = 90, *, seed: int = 0, signal: float = 1.0, width: int = 12) -> Tokens:
    """Six tokens an image, of which one tells the class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(images) % CLASSES)
    values = rng.normal(size=(images, 6, width))
    values[:, 2, :CLASSES] += signal * 4 * np.eye(CLASSES)[labels]
    return Tokens(values.astype(np.float16), labels)


def fitted(head: Head, train: Tokens, test: Tokens | Callable[[], Tokens], **options: Any) -> Outcome:
    target, progress = options.pop("target", OneClass(CLASSES)), options.pop("progress", None)
    reading = test if callable(test) else lambda: test
    return fit(head, train, reading, target=target, options=fit_options(**options), running=Running(progress=progress))


# --- the grid --------------------------------------------------------------------------------------------------------


def test_the_papers_grid_has_21_linear_and_63_attentive_configurations() -> None:
    linear, attentive = (SEARCH_GRIDS["paper"].configurations(head) for head in ("linear", "attentive"))
    assert len(set(linear)) == len(linear) == 21
    assert len(set(attentive)) == len(attentive) == 63
    assert {c.dropout for c in linear} == {0.0}
    assert {c.dropout for c in attentive} == {0, 0.1, 0.3}
    assert {c.lr for c in attentive} == {0.1, 0.01, 0.001}
    assert {c.weight_decay for c in attentive} == {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1}
    assert (SEARCH_GRIDS["paper"].epochs, SEARCH_GRIDS["paper"].least_steps) == (40, 1000)


@pytest.mark.parametrize(("head", "times"), [("linear", 17), ("attentive", 50)])
@pytest.mark.parametrize("images", [240, 1504, 100_000])
def test_the_quick_grid_is_many_times_cheaper(images: int, head: str, times: int) -> None:
    def cost(grid: Grid) -> int:
        return len(grid.configurations(head)) * grid.schedule(images * 4 // 5).steps + grid.schedule(images).steps

    assert cost(SEARCH_GRIDS["paper"]) / cost(QUICK) > times


def test_an_unknown_grid_is_told_with_those_there_are() -> None:
    with pytest.raises(BadOption, match="--grid papr: allowed are paper, quick"):
        fitted("linear", tokens(), tokens(), grid="papr")


# --- the split -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 40), min_size=2, max_size=12), st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_fifth_of_every_class_is_held_out(counts: list[int], seed: int, random: Any) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    random.shuffle(labels)
    kept, held_out = split(labels, seed=seed)
    assert np.array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(len(labels)))
    for label, count in enumerate(counts):
        out = int((labels[held_out] == label).sum())
        assert 1 <= out < count
        assert abs(out - 0.2 * count) < 1


def test_the_split_follows_from_the_seed() -> None:
    labels = np.arange(100) % 4
    assert np.array_equal(split(labels, seed=1)[1], split(labels, seed=1)[1])
    assert not np.array_equal(split(labels, seed=1)[1], split(labels, seed=2)[1])


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "loss", "best"),
    [
        ([0.2, 0.9, 0.5], [1, 9, 1], 1),
        ([0.9, 0.9, 0.5], [2, 1, 0], 1),  # a tie goes to the lower loss
        ([0.5, 0.9, 0.9], [0, 1, 1], 1),  # and then to the first
        ([0.9, 0.5, 0.4], [np.nan, 1, 1], 1),  # a configuration that diverged loses
        ([0.9, 0.4, 0.5], [np.inf, 1, 1], 2),
        ([np.nan, 0.0, np.nan], [0.1, 5, np.nan], 1),
    ],
)
def test_the_best_on_validation_is_chosen(accuracy: list[float], loss: list[float], best: int) -> None:
    assert choose(np.array(accuracy), np.array(loss)) == best


def test_a_grid_of_which_nothing_is_left_is_an_error() -> None:
    with pytest.raises(BadData, match="every configuration of the grid diverged"):
        choose(np.array([0.5, 0.5]), np.array([np.nan, np.inf]))


@pytest.mark.slow
@pytest.mark.parametrize("head", EVERY_HEAD)
def test_a_configuration_that_diverges_loses_and_harms_no_other(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    wild = dataclasses.replace(SMALL, learning_rates=(1e30, 1e-2), weight_decays=(0.1,), least_steps=150)
    monkeypatch.setitem(SEARCH_GRIDS, "quick", wild)
    outcome = fitted(head, tokens(), tokens(seed=1))
    assert outcome.selected["lr"] == 1e-2
    assert outcome.test > 0.45  # of three classes; some probes learn slowly


def test_the_choice_is_given_accuracy_and_loss_of_every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def choosing(accuracy: np.ndarray, loss: np.ndarray) -> int:
        seen.extend((accuracy, loss))
        return choose(accuracy, loss)

    monkeypatch.setattr(protocol, "choose", choosing)
    still = Grid(learning_rates=(1e-6, 1e-1), weight_decays=(0.0,), dropouts=(0.0,), epochs=1, least_steps=60)
    monkeypatch.setitem(SEARCH_GRIDS, "quick", still)
    outcome = fitted("linear", tokens(), tokens(seed=1))
    accuracy, loss = seen
    assert loss[0] == pytest.approx(np.log(CLASSES), abs=0.1)  # it has not moved from its start
    assert loss[1] < loss[0] - 0.3
    assert outcome.val == accuracy[1] > accuracy[0]


def test_the_test_set_is_read_once_after_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def choosing(accuracy: np.ndarray, loss: np.ndarray) -> int:
        events.append("choice")
        return choose(accuracy, loss)

    def reading() -> Tokens:
        events.append("test")
        return tokens(seed=1)

    def training(done: int, steps: int) -> None:
        events.append("training" if done < steps else "trained")

    monkeypatch.setattr(protocol, "choose", choosing)
    fitted("attentive", tokens(), reading, progress=training)
    order = [event for i, event in enumerate(events) if i == 0 or event != events[i - 1]]
    assert order == ["training", "choice", "training", "trained", "test"]
    assert events.count("test") == 1


@pytest.mark.slow
def test_nothing_but_the_score_depends_on_the_test_set() -> None:
    train = tokens()
    one, other = fitted("attentive", train, tokens(seed=1)), fitted("attentive", train, tokens(30, seed=2, signal=0))
    assert one.selected == other.selected and one.val == other.val and one.train == other.train
    for name, value in one.weights.items():
        assert np.array_equal(value, other.weights[name]), name
    assert one.test != other.test


# --- the outcome -----------------------------------------------------------------------------------------------------


def test_the_outcome_of_an_attentive_probe() -> None:
    seen: list[tuple[int, int]] = []
    test = tokens(50, seed=1)
    outcome = fitted("attentive", tokens(), test, seed=7, progress=lambda *at: seen.append(at))
    assert outcome.seed == 7
    assert outcome.selected.keys() == {"lr", "weight_decay", "dropout", "heads", "steps", "batch_size"}
    assert outcome.selected["heads"] == 6  # a head for each token
    assert (outcome.selected["steps"], outcome.selected["batch_size"]) == (40, 18)
    assert outcome.configurations == 8
    d, inner = 12, 6 * 2 * 2
    assert outcome.parameters == (9 * d + 4 * d * inner) + (d + 1) * CLASSES
    assert outcome.predictions.shape == (50, CLASSES) and outcome.predictions.dtype == np.float32
    assert outcome.attention is not None and outcome.attention.dtype == np.float32
    np.testing.assert_allclose(outcome.predictions.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(outcome.attention.sum(1), np.ones(50), atol=1e-5)
    assert outcome.test == outcome.metrics["balanced_accuracy"] > 0.7
    assert outcome.train > 0.7 and outcome.val > 0.7
    assert outcome.metrics == measures.scores(test.labels, outcome.predictions)
    assert outcome.seconds > 0
    assert outcome.stability is not None
    assert seen[-1][0] == seen[-1][1] >= 8 * 40 + 40 + 40  # the grid, a twin of the choice or more, and the refit
    assert [at for at, _ in seen] == sorted({at for at, _ in seen})


def test_the_outcome_of_a_linear_probe() -> None:
    outcome = fitted("linear", tokens(), tokens(seed=1), heads=8)
    assert outcome.selected.keys() == {"lr", "weight_decay", "steps", "batch_size"}
    assert outcome.attention is None
    assert outcome.configurations == 4
    assert outcome.parameters == (6 * 12 + 1) * CLASSES


@pytest.mark.parametrize("head", ["linear", "attentive"])
def test_the_weights_are_the_probe_that_was_tested(head: Head) -> None:
    """Written down, and read into the literal probe, they give the same probabilities and the same attention."""
    test = tokens(40, seed=1)
    outcome = fitted(head, tokens(), test, heads=4)
    module = copy_into(
        LiteralAttentive(12, 4, CLASSES) if head == "attentive" else LiteralLinear(6, 12, CLASSES), outcome.weights
    ).eval()
    values = torch.from_numpy(test.values).float()
    values = values / values.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(module(values).softmax(-1).detach().numpy(), outcome.predictions, atol=1e-5)
    if isinstance(module, LiteralAttentive):
        expected = module.attention(values).mean(1).detach().numpy()
        np.testing.assert_allclose(expected, outcome.attention, atol=1e-6)


def test_the_refit_sees_all_of_train(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[np.ndarray] = []
    original = protocol.population.train

    def train(members: Population, data: TrainingData, *args: Any, **kwargs: Any) -> Any:
        rows.append(data.rows)
        return original(members, data, *args, **kwargs)

    monkeypatch.setattr(protocol.population, "train", train)
    data = tokens()
    fitted("linear", data, tokens(seed=1), seed=4)
    assert np.array_equal(rows[0], split(data.labels, seed=4)[0])
    assert np.array_equal(rows[1], np.arange(90))
    assert len(rows) == 2


@pytest.mark.slow
@pytest.mark.parametrize("head", EVERY_HEAD)
def test_shuffled_labels_leave_chance(head: Head) -> None:
    def shuffled(images: int, seed: int) -> Tokens:
        data = tokens(images, seed=seed)
        return Tokens(data.values, np.random.default_rng(seed + 50).permutation(data.labels))

    scores = [fitted(head, shuffled(90, s), shuffled(300, s + 9), seed=s).test for s in range(3)]
    assert np.mean(scores) == pytest.approx(1 / CLASSES, abs=0.06)  # its standard error is 0.016


@pytest.mark.slow
@pytest.mark.parametrize("head", EVERY_HEAD)
def test_the_seed_decides_everything(head: Head) -> None:
    a, b, c = (fitted(head, tokens(), tokens(seed=1), seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(a.predictions, b.predictions)
    assert not np.array_equal(a.predictions, c.predictions)


@pytest.mark.parametrize("kind", ["torch", "read-only", "float32"])
def test_tokens_may_come_in_any_of_these(kind: str) -> None:
    data = tokens()
    values: Any = data.values.astype(np.float32) if kind == "float32" else data.values.copy()
    if kind == "read-only":  # such as a memory map
        values.setflags(write=False)
        data.labels.setflags(write=False)
    given_tokens = Tokens(torch.from_numpy(values) if kind == "torch" else values, data.labels)
    expected = fitted("linear", data, tokens(seed=1))
    assert np.array_equal(fitted("linear", given_tokens, tokens(seed=1)).predictions, expected.predictions)


def test_two_images_of_a_class_are_enough() -> None:
    outcome = fitted("attentive", tokens(6), tokens(seed=1))
    assert np.isfinite(outcome.predictions).all()


# --- what is refused -------------------------------------------------------------------------------------------------


def spoiled(what: str) -> Tokens:
    data = tokens(30)
    values, labels = data.values.copy(), np.sort(data.labels)
    if what == "nan":
        values[17, 3, 2] = np.nan
    if what == "infinite":
        values[4, 0, 0] = np.inf
    if what == "high":
        labels[8] = 3
    if what == "negative":
        labels[8] = -1
    if what == "scarce":
        labels = np.where(labels == 1, 2, labels)
        labels[0] = 1
    if what == "absent":
        labels = np.where(labels == 1, 2, labels)
    if what == "short":
        labels = labels[:-1]
    if what == "flat":
        values = values[:, 0]
    return Tokens(values, labels)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "train row 17 has a token that is NaN or infinite; allowed: finite"),
        ("infinite", "train row 4 has a token that is NaN or infinite.*--dtype float32"),
        ("high", "train row 8 has label 3; allowed: 0 to 2"),
        ("negative", "train row 8 has label -1; allowed: 0 to 2"),
        ("scarce", "class 1 has 1 training image; allowed: 2 or more"),
        ("absent", "class 1 has 0 training images; allowed: 2 or more"),
        ("short", r"labels of shape \(29,\); allowed: \[N, T, D\] and a label for each"),
        ("flat", r"tokens of shape \(30, 12\).*allowed: \[N, T, D\]"),
    ],
)
@pytest.mark.parametrize("as_torch", [False, True], ids=["numpy", "torch"])
def test_data_that_cannot_be_trained_on_are_refused(what: str, message: str, as_torch: bool) -> None:
    train = spoiled(what)
    if as_torch:
        train = Tokens(torch.from_numpy(train.values), train.labels)

    def never() -> Tokens:
        raise AssertionError("the test set was read")

    with pytest.raises(BadData, match=message):
        fitted("linear", train, never)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (spoiled("nan"), "test row 17"),
        (spoiled("high"), "test row 8 has label 3"),
        (tokens(width=13), r"test has tokens of shape \(6, 13\) and train \(6, 12\); allowed: the same"),
    ],
)
def test_a_test_split_that_does_not_match_is_refused(test: Tokens, message: str) -> None:
    with pytest.raises(BadData, match=message):
        fitted("linear", tokens(), test)


def test_one_class_is_no_question() -> None:
    data = tokens(30)
    with pytest.raises(BadData, match="1 class in train; allowed: 2 or more"):
        fitted("linear", Tokens(data.values, np.zeros(30, dtype=np.int64)), tokens(), target=OneClass(1))


@pytest.mark.parametrize("heads", [13, 0])
def test_heads_that_do_not_fit_the_width_are_refused(heads: int) -> None:
    with pytest.raises(BadData, match=f"{heads} attention heads do not fit tokens of width 12; allowed: 1 to 12"):
        fitted("attentive", tokens(), tokens(), heads=heads)


# --- random streams --------------------------------------------------------------------------------------------------


def test_a_configurations_streams_follow_from_its_numbers_and_the_seed() -> None:
    seeds = [
        Configuration(*numbers).seed(seed) for numbers in ((0.1, 0.2), (0.1, 0.2, 0.3), (0.2, 0.1)) for seed in (0, 1)
    ]
    assert len(set(seeds)) == 6 and Configuration(0.1, 0.2, 0.0).seed(1) == seeds[1]


# --- successive halving ----------------------------------------------------------------------------------------------


WIDE = Grid(
    learning_rates=(1e-1, 1e-2, 1e-3, 1e-5), weight_decays=(1e-4, 1e-1, 1.0), dropouts=(0.0,), epochs=1, least_steps=45
)


def test_a_third_goes_on_three_times_as_far() -> None:
    assert grids.rungs(63, 1000, halving=True) == [(63, 112), (21, 334), (7, 1000)]
    assert grids.rungs(63, 1000, halving=False) == [(63, 1000)]
    assert grids.rungs(1, 5, halving=True)[-1] == (1, 5)
    for configurations in range(1, 80):
        members = [count for count, _ in grids.rungs(configurations, 90, halving=True)]
        assert members == sorted(members, reverse=True) and members[0] == configurations and members[-1] >= 1


@pytest.mark.parametrize("head", ["linear", "attentive", "v-jepa"])
def test_who_gets_to_the_end_has_the_score_of_a_whole_search(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEARCH_GRIDS, "quick", WIDE)
    if head == "attentive":  # with dropout, whose masks are a configuration's own
        monkeypatch.setitem(SEARCH_GRIDS, "quick", dataclasses.replace(WIDE, dropouts=(0.2,)))
    whole = Training(head, tokens(), OneClass(CLASSES), fit_options(heads=3))
    halved = Training(head, tokens(), OneClass(CLASSES), fit_options(heads=3, halving=True))
    score, loss = whole.scores()
    kept, kept_loss = halved.scores()
    alive = np.isfinite(kept_loss)
    assert alive.sum() == 2  # of twelve, four, two
    assert np.array_equal(kept[alive], score[alive]) and np.array_equal(kept_loss[alive], loss[alive])
    assert np.isneginf(kept[~alive]).all() and np.isinf(kept_loss[~alive]).all()
    assert {WIDE.configurations("linear")[k].lr for k in np.flatnonzero(alive)} <= {1e-1, 1e-2}
    remaining = (1 if head == "linear" else 2) * halved.refitting.steps  # the refit, and a twin
    assert halved.done + remaining == halved.steps < 0.6 * whole.steps


def test_halving_tells_how_far_it_is_and_ends_in_the_same_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEARCH_GRIDS, "quick", WIDE)
    seen: list[tuple[int, int]] = []
    halved = fitted("linear", tokens(), tokens(seed=1), halving=True, progress=lambda *at: seen.append(at))
    whole = fitted("linear", tokens(), tokens(seed=1))
    assert seen[-1] == (12 * 5 + 4 * 15 + 2 * 45 + 45,) * 2
    assert halved.configurations == whole.configurations == 12
    assert halved.val <= whole.val  # it chooses among fewer
    chosen = (halved.selected["lr"],), (halved.selected["weight_decay"],)
    alone = dataclasses.replace(WIDE, learning_rates=chosen[0], weight_decays=chosen[1])
    monkeypatch.setitem(SEARCH_GRIDS, "quick", alone)
    assert np.array_equal(halved.predictions, fitted("linear", tokens(), tokens(seed=1)).predictions)


# --- few-shot --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(3, 20), min_size=2, max_size=8), st.integers(1, 3), st.integers(0, 5))
def test_so_many_of_each_class_are_drawn(counts: list[int], shots: int, seed: int) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    rows = draw(labels, shots, target=OneClass(len(counts)), seed=seed)
    assert np.array_equal(rows, np.unique(rows))
    assert np.bincount(labels[rows]).tolist() == [shots] * len(counts)
    fewer = draw(labels, max(1, shots - 1), target=OneClass(len(counts)), seed=seed)
    assert set(fewer) <= set(rows)


def test_every_image_is_drawn_by_some_seed_and_a_seed_draws_the_same() -> None:
    labels = np.arange(30) % 3
    draws = [draw(labels, 2, target=OneClass(3), seed=seed) for seed in range(40)]
    assert set(np.concatenate(draws)) == set(range(30))
    assert np.array_equal(draws[3], draw(labels, 2, target=OneClass(3), seed=3))


def test_more_than_there_are_cannot_be_drawn() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    with pytest.raises(BadData, match=r"class 1 has 2 training images; .*--shots 3 asks for.*Ask for at most 2"):
        draw(labels, 3, target=OneClass(2), seed=0)
    with pytest.raises(BadData, match="few-shot training needs one class an image"):
        draw(labels.astype(float), 2, target=OneClass(2), seed=0)


@pytest.mark.parametrize("as_torch", [False, True], ids=["numpy", "torch"])
def test_some_of_the_images(as_torch: bool) -> None:
    data = tokens(12)
    named = Tokens(torch.from_numpy(data.values) if as_torch else data.values, data.labels, tuple("abcdefghijkl"))
    some = named.of(np.array([2, 7]))
    assert np.array_equal(np.asarray(some.values), data.values[[2, 7]])
    assert some.labels.tolist() == data.labels[[2, 7]].tolist() and some.ids == ("c", "h")
    assert data.of(np.array([0])).ids is None


# --- the ends of a grid ----------------------------------------------------------------------------------------------


def test_what_is_chosen_at_an_end_of_its_grid() -> None:
    grid = SEARCH_GRIDS["paper"]
    trained = grid.configurations("attentive")

    def ends(lr: float, decay: float, dropout: float) -> dict[str, str]:
        return grids.at_end(trained, trained.index(Configuration(lr, decay, dropout)))

    assert ends(0.01, 1e-3, 0.1) == ends(0.01, 1e-3, 0.0) == {}  # no dropout is less than none
    assert ends(0.1, 1e-6, 0.3) == {"lr": "largest", "weight_decay": "smallest", "dropout": "largest"}
    plain = grid.configurations("linear")
    assert grids.at_end(plain, plain.index(Configuration(0.001, 1e-3))) == {"lr": "smallest"}
    quick = QUICK.configurations("attentive")  # one weight decay and one dropout: nothing was chosen
    assert grids.at_end(quick, 0) == {"lr": "largest"}
    for name, settings in (("penalty", penalties("paper")), ("neighbours", neighbourhoods("paper"))):
        [first, last] = (grids.at_end(settings, k).get(name) for k in (0, len(settings) - 1))
        assert (first, last) == {"penalty": ("largest", "smallest"), "neighbours": (None, "largest")}[name]


def test_an_outcome_says_what_it_chose_at_an_end() -> None:
    outcome = fitted("linear", tokens(), tokens(seed=1))
    assert outcome.at_end.keys() == {"lr", "weight_decay"}  # two of each: each is an end
    assert outcome.at_end["lr"] == ("largest" if outcome.selected["lr"] == 0.1 else "smallest")
