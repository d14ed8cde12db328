"""Heads that are solved for, held to scikit-learn's solvers and to fits that are made one by one."""

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from fits import fit_options
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neighbors import KNeighborsClassifier

from mlfusion.errors import BadData
from mlfusion.probing import protocol
from mlfusion.probing.search import SOLVERS, Running
from mlfusion.probing.solvers import design as design_module
from mlfusion.probing.solvers import logistic
from mlfusion.probing.solvers.design import Design, Penalty, penalties
from mlfusion.probing.solvers.lbfgs import minimise
from mlfusion.probing.solvers.logistic import Logistic
from mlfusion.probing.solvers.neighbours import Neighbourhood, neighbours
from mlfusion.probing.solvers.ridge import Ridge
from mlfusion.probing.targets import Number, OneClass, SeveralLabels, Target
from mlfusion.probing.training.batches import Tokens
from mlfusion.specs.options import TrainingOptions

F64 = torch.float64
TALL, WIDE = (60, 2, 5), (24, 3, 16)  # more images than numbers an image, and fewer


def data(shape: tuple[int, int, int], kind: str = "class", seed: int = 0) -> tuple[Tokens, Target]:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape)
    images = shape[0]
    if kind == "class":  # of unlike numbers, so that class weights differ
        labels = rng.permutation(np.minimum(np.arange(images) % 5, 2))
        values[np.arange(images), 0, labels] += 1.5
        return Tokens(values, labels), OneClass(3)
    if kind == "labels":
        several = (rng.random((images, 4)) < 0.4).astype(np.int64)
        values[:, :, :4] += 2 * several[:, None]
        return Tokens(values, several), SeveralLabels(4)
    numbers = rng.normal(size=images)
    values[:, :, 0] += 2 * numbers[:, None]
    return Tokens(values, numbers), Number(1, float(numbers.mean()), float(numbers.std()))


def flat(tokens: Tokens) -> np.ndarray:
    values = np.asarray(tokens.values, np.float64)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).reshape(len(values), -1)


def rows(tokens: Tokens) -> np.ndarray:
    return np.arange(len(tokens))


def design(tokens: Tokens, target: Target) -> Design:
    return Design(tokens, rows(tokens), target, "cpu")


def outputs(probe: Any, tokens: Tokens) -> np.ndarray:
    x = torch.from_numpy(flat(tokens)).float().view(tuple(tokens.values.shape))
    with torch.no_grad():
        return np.asarray(probe(x))


# --- the design ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_the_rotated_images_are_orthogonal_and_lose_nothing(shape: tuple[int, int, int]) -> None:
    tokens, target = data(shape)
    made, weights = design(tokens, target), target.weights(tokens.labels)
    z = made.rotated.numpy()
    np.testing.assert_allclose(z.T @ (weights[:, None] * z), np.diag(made.eigenvalues.numpy()), atol=1e-10)
    np.testing.assert_allclose(z @ made.basis.numpy().T + made.centre.numpy(), flat(tokens), atol=1e-6)
    np.testing.assert_allclose(made.basis.T @ made.basis, np.eye(z.shape[1]), atol=1e-8)


def test_blocks_of_images_are_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, target = data(TALL)
    whole = Ridge(design(tokens, target)).left_out(Penalty(0.1))
    monkeypatch.setattr(design_module, "BLOCK", 70)  # seven images
    torch.testing.assert_close(Ridge(design(tokens, target)).left_out(Penalty(0.1)), whole)


# --- ridge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("kind", ["class", "labels", "number"])
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e3])
def test_ridge_is_scikit_learns(shape: tuple[int, int, int], kind: str, penalty: float) -> None:
    tokens, target = data(shape, kind)
    x, y = flat(tokens), target.regressand(tokens.labels)
    other = SklearnRidge(alpha=penalty).fit(x, y, sample_weight=target.weights(tokens.labels))
    expected = other.predict(x).reshape(len(x), -1)
    found = outputs(Ridge(design(tokens, target)).solve(Penalty(penalty)), tokens)[0]
    if kind != "number":  # up to the factor that makes probabilities of scores
        factor = (found * (expected - 0.5)).sum() / ((expected - 0.5) ** 2).sum()
        assert factor > 0
        expected = factor * (expected - 0.5)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("penalty", [1e-3, 10.0])
def test_an_image_is_left_out_as_if_never_seen(shape: tuple[int, int, int], penalty: float) -> None:
    tokens, target = data(shape, "number")
    x, y, weights = flat(tokens), target.regressand(tokens.labels)[:, 0], np.ones(shape[0])
    expected = []
    for row in range(len(x)):
        others = np.arange(len(x)) != row
        fitted = SklearnRidge(alpha=penalty).fit(x[others], y[others], sample_weight=weights[others])
        expected.append(fitted.predict(x[row : row + 1])[0])
    found = Ridge(design(tokens, target)).left_out(Penalty(penalty))[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_left_out_with_weights_of_classes() -> None:
    tokens, target = data(TALL)
    x, y, weights = flat(tokens), target.regressand(tokens.labels), target.weights(tokens.labels)
    found = Ridge(design(tokens, target))._left_out(Penalty(0.5))
    for row in (0, 7, 31):
        others = np.arange(len(x)) != row
        fitted = SklearnRidge(alpha=0.5).fit(x[others], y[others], sample_weight=weights[others])
        np.testing.assert_allclose(found[row], fitted.predict(x[row : row + 1])[0], atol=1e-9)


def test_the_factor_of_ridges_scores_leaves_no_better() -> None:
    tokens, target = data(TALL)
    ridge = Ridge(design(tokens, target))
    chosen = ridge.left_out(Penalty(1.0))
    loss, labels = target.loss(tokens.labels, "cpu", F64), torch.from_numpy(tokens.labels)
    best, less, more = (float(loss((scale * chosen)[None], labels)[0]) for scale in (1, 0.8, 1.25))
    assert best <= less and best <= more


# --- logistic regression ---------------------------------------------------------------------------------------------


def objective(tokens: Tokens, target: Target, weight: np.ndarray, bias: np.ndarray, penalty: float) -> float:
    """Written out, in NumPy."""
    logits, wanted = flat(tokens) @ weight.T + bias, target.regressand(tokens.labels)
    if isinstance(target, OneClass):
        each = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - (logits * wanted).sum(1)
    else:
        each = (np.logaddexp(0, logits) - logits * wanted).sum(1)
    return float(target.weights(tokens.labels) @ each + penalty / 2 * (weight**2).sum())


def sklearn_logistic(tokens: Tokens, target: Target, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    options = {"C": 1 / penalty, "tol": 1e-10, "max_iter": 20000}
    x, weights = flat(tokens), target.weights(tokens.labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(target, OneClass):
            one = LogisticRegression(**options).fit(x, tokens.labels, sample_weight=weights)
            return one.coef_, one.intercept_
        each = [LogisticRegression(**options).fit(x, column) for column in tokens.labels.T]
        return np.concatenate([e.coef_ for e in each]), np.concatenate([e.intercept_ for e in each])


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("kind", ["class", "labels"])
def test_the_whole_path_has_scikit_learns_loss_to_a_millionth(shape: tuple[int, int, int], kind: str) -> None:
    tokens, target = data(shape, kind)
    path = [Penalty(float(value)) for value in np.logspace(2, -3, 21)]  # three runs, the later ones started warm
    solved: dict[float, tuple[np.ndarray, np.ndarray]] = {}
    for run, probe in Logistic(design(tokens, target)).solve(path):
        weights, biases = (p.detach().double().numpy() for p in (probe.weight, probe.bias))
        solved |= {one.penalty: (w, b) for one, w, b in zip(path[run], weights, biases, strict=True)}
    assert len(solved) == 21
    for one in path[::5]:
        expected = objective(tokens, target, *sklearn_logistic(tokens, target, one.penalty), one.penalty)
        found = objective(tokens, target, *solved[one.penalty], one.penalty)
        assert found == pytest.approx(expected, rel=1e-6)


def test_logistic_regression_of_real_features(shared: Any) -> None:
    """Pixels of photographs: a spectrum that falls steeply, and penalties so weak that the classes part."""
    from PIL import Image

    files = sorted((shared / "flowers5" / "train").glob("*/*"))[::6]
    names = sorted({file.parent.name for file in files})
    labels = np.array([names.index(file.parent.name) for file in files])
    values = np.stack([np.asarray(Image.open(file).convert("RGB").resize((16, 16)), np.float64) for file in files])
    tokens, target = Tokens(values.reshape(len(files), 3, -1), labels), OneClass(len(names))
    for one in (Penalty(1.0), Penalty(1e-3)):
        [(_, probe)] = Logistic(design(tokens, target)).solve([one])
        expected = objective(tokens, target, *sklearn_logistic(tokens, target, one.penalty), one.penalty)
        weight, bias = probe.weight[0].detach().double().numpy(), probe.bias[0].detach().double().numpy()
        assert objective(tokens, target, weight, bias, one.penalty) <= expected * (1 + 1e-6)


def test_answers_of_the_strongest_penalty_are_those_of_float64() -> None:
    """Of noise, probabilities of 30 classes at λ = 10⁶ differ in the eighth digit, which float32 does not have."""
    random = np.random.default_rng(0)
    train, test = (Tokens(random.normal(size=(120, 1, 64)).astype(np.float32), np.arange(120) % 30) for _ in range(2))
    target = OneClass(30)
    # To the square of its tiny coefficients the minimum is the gradient at nought over λ, and the bias takes the mean away.
    mean = flat(train).mean(0)
    expected = (flat(test) - mean) @ ((np.eye(30)[train.labels] - 1 / 30).T @ (flat(train) - mean) / 1e6).T
    [(_, probe)] = Logistic(design(train, target)).solve([Penalty(1e6)])
    found = target.predictions(torch.from_numpy(outputs(probe, test)))[0].numpy()
    ties = (found == found.max(1, keepdims=True)).sum(1)
    assert (ties == 1).all()
    assert (found.argmax(1) == expected.argmax(1)).all()
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def test_equal_outputs_stay_ties() -> None:
    told = OneClass(3).predictions(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1e-9, 0.0], [0.0, -800.0, -900.0]])).numpy()
    assert told[0, 0] == told[0, 1] and told[1].argmax() == 1 and told[1, 0] == told[1, 2]
    assert (told >= 0).all() and told[2].tolist() == [1, 0, 0]


def test_logistic_regression_has_no_numbers() -> None:
    with pytest.raises(BadData, match="logistic regression has no numbers; allowed: classes or labels"):
        Logistic(design(*data(TALL, "number")))


@pytest.mark.parametrize("kind", ["class", "labels"])
def test_batches_of_penalties_and_blocks_of_images_change_a_fit_by_rounding_only(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, target = data(TALL, kind)
    path = [Penalty(float(value)) for value in np.logspace(2, -2, 9)]
    whole = Logistic(design(tokens, target))
    monkeypatch.setattr(logistic, "BATCH_BYTES", 2 * 8 * 32 * 4 * 11)
    monkeypatch.setattr(logistic, "BLOCK_BYTES", 10_000)
    parts = Logistic(design(tokens, target))
    assert whole.batch == 8 and whole.block >= 60
    assert parts.batch < 3 and parts.block < 60  # several batches of penalties, several blocks of images
    values = []
    for one in (whole, parts):
        probes = [probe for _, probe in one.solve(path)]
        assert sum(len(probe.weight) for probe in probes) == 9
        weight, bias = (each[-1].detach().double().numpy() for each in (probes[-1].weight, probes[-1].bias))
        values.append(objective(tokens, target, weight, bias, 1e-2))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_more_classes_than_memory_are_refused_before_anything_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, target = data(TALL)
    monkeypatch.setattr(logistic, "BATCH_BYTES", 1000)  # as if the problem were larger
    with pytest.raises(
        BadData, match=r"logistic regression of 3 classes needs .* MB for each penalty.*--memory.*linear"
    ):
        protocol.fit(
            "logistic",
            tokens,
            lambda: tokens,
            target=target,
            options=fit_options(),
            running=Running(training=TrainingOptions(memory=1000)),
        )


@pytest.mark.long
def test_logistic_regression_of_many_classes_keeps_to_its_memory() -> None:
    """Peak of a process: 1,000 classes of 3,000 images, with a limit and without one."""
    code = """
import re, numpy as np, torch
from mlfusion.probing.solvers import lbfgs
from mlfusion.probing.solvers import logistic
from mlfusion.probing.solvers.design import Design, Penalty
from mlfusion.probing.solvers.logistic import Logistic
from mlfusion.probing.targets import OneClass
from mlfusion.probing.training.batches import Tokens
# Not the peak of getrusage, which a process has from its parent.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
tokens = Tokens(np.random.default_rng(0).normal(size=(3000, 1, 64)), np.arange(3000) % 1000)
design = Design(tokens, np.arange(3000), OneClass(1000), "cpu")
lbfgs.MAX_ITERATIONS = 13  # all that L-BFGS holds is held after ten
before = peak()
for _ in Logistic(design, LIMIT).solve([Penalty(1.0)] * 8): pass
print(peak() - before)
"""
    grown = [
        float(subprocess.check_output([sys.executable, "-c", code.replace("LIMIT", str(limit))], text=True))
        for limit in (100_000_000, None)
    ]
    assert max(grown) < 170, grown  # MB


def test_minima_are_found_each_for_itself() -> None:
    """Quadratics with curvatures from 1 to 1e4, one of them started where it ends."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(0, 4, 12, dtype=F64)
    centres = torch.randn(4, 12, dtype=F64, generator=generator)

    def function(x: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        off = x - centres[which]
        return 1 + 0.5 * (curvature * off**2).sum(1), curvature * off

    start = torch.randn(4, 12, dtype=F64, generator=generator)
    start[2] = centres[2]
    together = minimise(function, start)
    torch.testing.assert_close(together, centres, rtol=0, atol=1e-4)
    for k in range(4):

        def one(x: torch.Tensor, _: torch.Tensor, k: int = k) -> tuple[torch.Tensor, torch.Tensor]:
            return function(x, torch.tensor([k]))

        alone = minimise(one, start[k : k + 1])
        torch.testing.assert_close(alone[0], together[k], rtol=0, atol=1e-9)


# --- nearest neighbours ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 60, 500])
def test_neighbours_are_scikit_learns(count: int) -> None:
    train, target = data(TALL)
    test, _ = data((17, 2, 5), seed=1)
    chosen = Neighbourhood(count, 0.07)
    other = KNeighborsClassifier(
        min(count, 60), metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(flat(train), train.labels)
    probe = neighbours(train, rows(train), [chosen], target, "cpu")
    found = target.predictions(torch.from_numpy(outputs(probe, test)[0]))
    np.testing.assert_allclose(found, other.predict_proba(flat(test)), atol=2e-5)


def test_neighbours_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    (train, target), (test, _) = data(TALL), data((17, 2, 5), seed=1)
    probe = neighbours(train, rows(train), [Neighbourhood(3, 0.1), Neighbourhood(9, 0.02)], target, "cpu")
    whole = outputs(probe, test)
    monkeypatch.setattr("mlfusion.probing.solvers.neighbours.BLOCK", 120)
    np.testing.assert_allclose(outputs(probe, test), whole, atol=1e-5)
    assert whole.shape == (2, 17, 3)


@pytest.mark.parametrize("kind", ["labels", "number"])
def test_neighbours_vote_for_labels_and_numbers(kind: str) -> None:
    train, target = data(TALL, kind)
    x = flat(train)
    cosine = x @ x.T / 2
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :5]
    weights = np.exp(np.take_along_axis(cosine, nearest, 1) / 0.2)
    votes = (weights[..., None] * train.labels.reshape(60, -1)[nearest]).sum(1) / weights.sum(1, keepdims=True)
    probe = neighbours(train, rows(train), [Neighbourhood(5, 0.2)], target, "cpu")
    np.testing.assert_allclose(target.predictions(torch.from_numpy(outputs(probe, train)[0])), votes, atol=1e-5)


# --- in the protocol -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "kind"),
    [(h, k) for h in SOLVERS for k in ("class", "labels", "number") if (h, k) != ("logistic", "number")],
)
def test_they_are_chosen_refitted_and_tested(head: Any, kind: str) -> None:
    train, target = data((90, 3, 8), kind)
    test, _ = data((60, 3, 8), kind, seed=1)
    seen: list[tuple[int, int]] = []
    outcome = protocol.fit(
        head,
        train,
        lambda: test,
        target=target,
        options=fit_options(),
        running=Running(progress=lambda *at: seen.append(at)),
    )
    floor = {"class": 0.5, "labels": 0.6, "number": 0.4}[kind]  # by chance: a third, two fifths, none
    assert outcome.test == outcome.metrics[outcome.metric] > floor
    assert seen[-1][0] == seen[-1][1]
    assert outcome.configurations == (3 if head == "knn" else 13)
    assert outcome.selected.keys() == ({"neighbours", "temperature"} if head == "knn" else {"penalty"})
    again = protocol.fit(head, train, lambda: test, target=target, options=fit_options())
    assert np.array_equal(again.predictions, outcome.predictions)


@pytest.mark.slow
@pytest.mark.parametrize("head", SOLVERS)
def test_the_refit_is_the_solution_on_all_of_train(head: Any) -> None:
    train, target = data(TALL)
    outcome = protocol.fit(head, train, lambda: train, target=target, options=fit_options(grid="paper"))
    if head == "knn":
        assert outcome.weights["bank"].shape == (60, 10)
        assert outcome.weights["neighbours"] == outcome.selected["neighbours"]
        return
    one = Penalty(float(outcome.selected["penalty"]))
    if head == "ridge":
        expected = outputs(Ridge(design(train, target)).solve(one), train)[0]
        found = flat(train) @ outcome.weights["weight"].T + outcome.weights["bias"]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    else:
        best = objective(train, target, *sklearn_logistic(train, target, one.penalty), one.penalty)
        weight, bias = (outcome.weights[name].astype(np.float64) for name in ("weight", "bias"))
        assert objective(train, target, weight, bias, one.penalty) == pytest.approx(best, rel=1e-6)


def test_ridge_is_chosen_by_leaving_out() -> None:
    train, target = data(WIDE)
    outcome = protocol.fit("ridge", train, lambda: train, target=target, options=fit_options())
    ridge = Ridge(design(train, target))
    scores = [target.score(train.labels, target.predictions(ridge.left_out(one)).numpy()) for one in penalties("quick")]
    assert outcome.val == max(scores)


@pytest.mark.parametrize("head", SOLVERS)
def test_shuffled_labels_leave_chance(head: Any) -> None:
    rng = np.random.default_rng(0)

    def noise(images: int) -> Tokens:
        return Tokens(rng.normal(size=(images, 2, 6)), rng.permutation(np.arange(images) % 3))

    target = OneClass(3)
    scores = [
        protocol.fit(head, noise(90), lambda: noise(300), target=target, options=fit_options(seed)).test
        for seed in range(4)
    ]
    assert np.mean(scores) == pytest.approx(1 / 3, abs=0.06)


@pytest.mark.parametrize("head", SOLVERS)
def test_twenty_images_are_learnt_by_heart(head: Any) -> None:
    rng = np.random.default_rng(0)
    train = Tokens(rng.normal(size=(20, 3, 16)), np.arange(20) % 2)
    target = OneClass(2)
    if head == "knn":
        probe: Any = neighbours(train, rows(train), [Neighbourhood(1, 0.07)], target, "cpu")
    elif head == "ridge":
        probe = Ridge(design(train, target)).solve(Penalty(1e-3))
    else:
        [(_, probe)] = Logistic(design(train, target)).solve([Penalty(1e-3)])
    assert (outputs(probe, train)[0].argmax(1) == train.labels).all()


# --- the score on train ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "labels", "number"])
def test_on_train_no_image_votes_for_itself(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score on train is that of each image by the votes of all others, which a loop without that image gives."""
    train, target = data(TALL, kind)
    outcome = protocol.fit("knn", train, lambda: train, target=target, options=fit_options())
    chosen = Neighbourhood(int(outcome.selected["neighbours"]), float(outcome.selected["temperature"]))
    others = [np.delete(np.arange(60), image) for image in range(60)]
    alone = [
        outputs(neighbours(train, rest, [chosen], target, "cpu"), train.of(np.array([image])))[0]
        for image, rest in enumerate(others)
    ]
    expected = target.predictions(torch.from_numpy(np.concatenate(alone))).numpy()
    assert outcome.train == pytest.approx(target.score(train.labels, expected), abs=1e-6)
    assert outcome.test == target.score(train.labels, outcome.predictions)  # test images are not left out
    probe = neighbours(train, rows(train), [chosen, Neighbourhood(200, 0.2)], target, "cpu")
    tokens, own = train.normalised(rows(train), "cpu"), (torch.from_numpy(rows(train)),) * 2
    whole = probe(tokens, own)
    np.testing.assert_allclose(target.predictions(whole[0]).numpy(), expected, atol=1e-5)
    assert bool(torch.isfinite(whole).all())
    monkeypatch.setattr("mlfusion.probing.solvers.neighbours.BLOCK", 120)
    in_blocks = target.predictions(probe(tokens, own))
    np.testing.assert_allclose(in_blocks.numpy(), target.predictions(whole).numpy(), atol=1e-5)


def test_random_labels_are_not_learnt_by_heart_by_one_neighbour() -> None:
    rng = np.random.default_rng(0)
    train = Tokens(rng.normal(size=(200, 2, 6)), np.arange(200) % 2)
    target = OneClass(2)
    outcome = protocol.fit("knn", train, lambda: train, target=target, options=fit_options())
    assert 0.35 < outcome.train < 0.65


def test_an_image_that_train_has_twice_votes_for_its_copy() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 2, 6))
    train = Tokens(np.concatenate([values, values]), np.tile(np.arange(20) % 2, 2))
    probe = neighbours(train, rows(train), [Neighbourhood(1, 0.07)], OneClass(2), "cpu")
    found = probe(train.normalised(rows(train), "cpu"), (torch.from_numpy(rows(train)),) * 2)
    assert np.array_equal(found[0].argmax(1).numpy(), train.labels)


def test_a_class_without_a_vote_has_no_probability_and_a_finite_loss() -> None:
    train, _ = data(TALL)
    target = OneClass(3)
    probe = neighbours(train, rows(train), [Neighbourhood(1, 0.07)], target, "cpu")
    logits = torch.from_numpy(outputs(probe, train)[0])
    assert set(target.predictions(logits).flatten().tolist()) == {0.0, 1.0}
    loss = target.loss(train.labels, "cpu", torch.float32)(logits[None], torch.from_numpy(train.labels))
    assert bool(torch.isfinite(loss).all())
