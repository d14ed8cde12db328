"""How often the tests are wrong where there is nothing to find, and how often the intervals contain the true value.

Worlds are simulated here, by NumPy alone: images whose difficulty two probes share, and scores of probes on data sets. In a
null world the probes are equally good. `--page` writes the tables into docs/method.md; `--worlds` sets their number.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import page

from mlfusion import statistics
from mlfusion.errors import BadData
from mlfusion.statistics import Bootstrap, uncertainty

IMAGES = (8, 20, 100, 1000)
DATASETS = (5, 6, 8, 12, 20)
LEVEL = 0.05
LARGE = 400_000  # images that give the true value of a score


@dataclass(frozen=True)
class World:
    """Images of one kind of label, and how good two probes are on them."""

    metric: str
    skills: tuple[float, float]  # of A and of B; equal in a null world
    classes: int = 3
    seeds: int = 1
    shares: tuple[float, ...] = ()  # of the classes among the images; empty: equal shares

    def draw(self, random: np.random.Generator, images: int) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """Labels, and the predictions of A and of B, one array per seed."""
        if self.metric in ("r2", "mae", "rmse"):
            labels = random.normal(size=images)
            signal, shape = labels[:, None], (images, 1)
        elif self.metric == "mean_average_precision":
            labels = (random.random((images, self.classes)) < 0.4).astype(np.int64)
            signal, shape = labels.astype(float), labels.shape
        else:
            classes = len(self.shares) or self.classes
            labels = random.choice(classes, images, p=self.shares or None)
            signal, shape = np.eye(classes)[labels], (images, classes)
        shared = random.normal(size=shape)  # what both find difficult
        made = []
        for skill in self.skills:
            noises = [0.7 * shared + 0.7 * random.normal(size=shape) for _ in range(self.seeds)]
            made.append([self._answers(skill, signal, noise) for noise in noises])
        return labels, *made

    def _answers(self, skill: float, signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
        if self.metric in ("r2", "mae", "rmse"):
            return signal + noise / skill
        if self.metric == "mean_average_precision":
            return 1 / (1 + np.exp(-(skill * signal + noise)))
        powers = np.exp(skill * signal + noise)
        return powers / powers.sum(1, keepdims=True)

    def truth(self) -> tuple[float, float]:
        """The scores of A and B on ever so many images, by formulas of our own."""
        labels, a, b = self.draw(np.random.default_rng(99), LARGE)
        return SCORES[self.metric](labels, a[0]), SCORES[self.metric](labels, b[0])


def _balanced(labels: np.ndarray, answers: np.ndarray) -> float:
    right = answers.argmax(1) == labels
    return float(np.mean([right[labels == c].mean() for c in range(answers.shape[1])]))


def _macro_f1(labels: np.ndarray, answers: np.ndarray) -> float:
    taken, classes = answers.argmax(1), range(answers.shape[1])
    hits = [2 * np.sum((labels == c) & (taken == c)) / (np.sum(labels == c) + np.sum(taken == c)) for c in classes]
    return float(np.mean(hits))


def _average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    order = np.argsort(-scores)
    hits = labels[order].cumsum()
    return float((hits / np.arange(1, len(hits) + 1))[labels[order] == 1].mean())


SCORES: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda y, p: float((p.argmax(1) == y).mean()),
    "balanced_accuracy": _balanced,
    "macro_f1": _macro_f1,
    "loss": lambda y, p: float(-np.log(p[np.arange(len(y)), y]).mean()),
    "mean_average_precision": lambda y, p: float(
        np.mean([_average_precision(*pair) for pair in zip(y.T, p.T, strict=True)])
    ),
    "r2": lambda y, p: float(1 - ((y - p[:, 0]) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
    "mae": lambda y, p: float(np.abs(y - p[:, 0]).mean()),
    "rmse": lambda y, p: float(np.sqrt(((y - p[:, 0]) ** 2).mean())),
}

NULLS = {
    "balanced accuracy": World("balanced_accuracy", (1.5, 1.5)),
    "the same, 3 seeds": World("balanced_accuracy", (1.5, 1.5), seeds=3),
    "balanced accuracy, 10 classes": World("balanced_accuracy", (3.0, 3.0), classes=10),
    "macro-F1": World("macro_f1", (1.5, 1.5)),
    "log loss": World("loss", (1.5, 1.5)),
    "mean average precision": World("mean_average_precision", (1.5, 1.5)),
    "R²": World("r2", (2.0, 2.0)),
}
COVERED = {
    "balanced accuracy of about 70 %": World("balanced_accuracy", (1.5, 2.2)),
    "balanced accuracy of about 97 %": World("balanced_accuracy", (4.0, 3.5)),
    "balanced accuracy of about 80 %, 10 classes": World("balanced_accuracy", (3.0, 3.5), classes=10),
    "macro-F1": World("macro_f1", (1.5, 2.2)),
    "log loss": World("loss", (1.5, 2.2)),
    "mean average precision": World("mean_average_precision", (1.5, 2.2)),
    "R²": World("r2", (2.0, 3.0)),
}


CALLED = {
    f"{name}, {shares_name}, {skill_name}": World(metric, (skill, skill), shares=shares)
    for metric, name, classes in (
        ("balanced_accuracy", "balanced accuracy", 3),
        ("accuracy", "accuracy", 3),
        ("auroc", "AUROC", 2),
    )
    for shares_name, shares in (
        ("equal classes", (1 / classes,) * classes),
        ("a class of 2 %", (0.98 / (classes - 1),) * (classes - 1) + (0.02,)),
    )
    for skill_name, skill in (("lower", 1.5), ("higher", 2.5))
}
CALLED_IMAGES = (60, 120, 250, 500, 1000, 2000)
TRADES = (3, 5, 7, 10, 15, 20, 30, 50)  # images of the rare class
FREQUENT = 400


def called(world: World, images: int, worlds: int, resamples: int, first: int = 0) -> tuple[int, int]:
    """Of null worlds, the number that is called a gain or a loss, and the number of those that can be told."""
    told: list[bool] = []
    for number in range(first, first + worlds):
        labels, a, b = world.draw(np.random.default_rng([images, number]), images)
        sizes = np.bincount(labels).tolist() if world.metric in uncertainty.BY_CLASS_MEANS else []
        if uncertainty.effective_images(sizes, images) < uncertainty.MIN_EFFECTIVE:
            continue  # whatever the answers are
        if world.metric == "auroc" and np.count_nonzero(sizes) < 2:
            continue
        bootstrap = Bootstrap(resamples=resamples, seed=number)
        found = statistics.difference(labels, a, b, metric=world.metric, bootstrap=bootstrap)
        names = [str(c) for c in range(a[0].shape[1])]
        verdict = statistics.verdict(found, metric=world.metric, classes=names)
        if verdict.direction is not None:
            told.append(verdict.direction != 0)
    return sum(told), len(told)


def traded(rare: int, worlds: int, resamples: int) -> float:
    """The share of comparisons with p at most 0.05 where A is better on a rare class, B on the frequent one, by as much.

    Both have a balanced accuracy of 77.5 %: A 85 % of the frequent and 70 % of the rare class, B 75 and 80 %.
    """
    sizes, recalls, alarms = (FREQUENT, rare), ((0.85, 0.70), (0.75, 0.80)), []
    labels = np.repeat([0, 1], sizes)
    normal = NormalDist()
    for number in range(worlds):
        random = np.random.default_rng([rare, number])
        shared, answers = random.normal(size=len(labels)), []
        for recall in recalls:
            ease = 0.7 * shared + 0.51**0.5 * random.normal(size=len(labels))
            right = ease < np.array([normal.inv_cdf(one) for one in recall])[labels]
            answers.append(np.eye(2)[np.where(right, labels, 1 - labels)])
        bootstrap = Bootstrap(resamples=resamples, seed=number)
        alarms.append(statistics.difference(labels, *answers, bootstrap=bootstrap).mid_p <= LEVEL)
    return float(np.mean(alarms))


def false_alarms(world: World, images: int, worlds: int, resamples: int, first: int = 0) -> dict[str, float]:
    """{test: share of null worlds in which its p-value is at most the level}."""
    found: dict[str, list[bool]] = {"swaps": []}
    for number in range(first, first + worlds):
        random = np.random.default_rng([images, number])
        labels, a, b = world.draw(random, images)
        bootstrap = Bootstrap(resamples=resamples, seed=number)
        found["swaps"].append(statistics.difference(labels, a, b, metric=world.metric, bootstrap=bootstrap).p <= LEVEL)
        if world.metric == "balanced_accuracy" and world.seeds == 1:
            found.setdefault("McNemar", []).append(statistics.mcnemar(labels, a[0], b[0]).p <= LEVEL)
    return {name: float(np.mean(alarms)) for name, alarms in found.items()}


def coverage(world: World, images: int, worlds: int, resamples: int, first: int = 0) -> dict[str, float | None]:
    """{'score', 'difference': share of the worlds with an interval in which it contains the true value; None without any}."""
    true_a, true_b = world.truth()
    held: dict[str, list[bool]] = {"score": [], "difference": []}
    for number in range(first, first + worlds):
        labels, a, b = world.draw(np.random.default_rng([images, number]), images)
        bootstrap = Bootstrap(resamples=resamples, seed=number)
        one = statistics.interval(labels, a, metric=world.metric, bootstrap=bootstrap)
        both = statistics.difference(labels, a, b, metric=world.metric, bootstrap=bootstrap)
        for name, found, true in (("score", one, true_a), ("difference", both, true_a - true_b)):
            if found.low is not None and found.high is not None:
                held[name].append(found.low <= true <= found.high)
    # A share of worlds that a few lucky ones decide says nothing.
    return {name: float(np.mean(inside)) if len(inside) >= worlds / 10 else None for name, inside in held.items()}


def dataset_alarms(datasets: int, probes: int, step: float, worlds: int, first: int = 0) -> dict[str, float | None]:
    """{test: share of null worlds in which it finds something}; scores are rounded to `step`, so that there are ties."""
    alarms: dict[str, list[bool]] = {}
    for number in range(first, first + worlds):
        random = np.random.default_rng([datasets, probes, number])
        scores = 0.7 + random.normal(0, 0.1, datasets) + random.normal(0, 0.02, (probes, datasets))
        if step:
            scores = np.round(scores / step) * step
        table = {str(k): line.tolist() for k, line in enumerate(scores)}
        tests = statistics.gain_tests(
            {name: np.subtract(line, table["0"]).tolist() for name, line in table.items() if name != "0"}
        )
        found = {"Wilcoxon": [tests[0].p], "gains, q": [test.q for test in tests]}
        try:
            ranked = statistics.ranking(table)
        except BadData:
            pass
        else:
            found["Friedman"] = [ranked.friedman]
            found["Nemenyi, any pair"] = [pair.nemenyi for pair in ranked.pairs]
            found["Wilcoxon and Holm, any pair"] = [pair.holm for pair in ranked.pairs]
        for name, p_values in found.items():
            tested = [p for p in p_values if p is not None]
            alarms.setdefault(name, []).append(any(p <= LEVEL for p in tested))
    refused = datasets < statistics.datasets.MIN_DATASETS
    return {name: None if refused else float(np.mean(each)) for name, each in alarms.items()}


def noise(worlds: int, share: float = LEVEL) -> float:
    """The half width of the interval that contains 95 % of the shares measured in so many worlds."""
    return NormalDist().inv_cdf(0.975) * (share * (1 - share) / worlds) ** 0.5


def _cell(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f}"


def tables(worlds: int, resamples: int) -> str:
    """The three tables in Markdown."""
    heads = [f"{n:,} images" for n in IMAGES]
    alarms: list[Sequence[str]] = []
    for name, world in NULLS.items():
        by_images = [false_alarms(world, images, worlds, resamples) for images in IMAGES]
        alarms += [(f"{name}, {test}", *(_cell(one[test]) for one in by_images)) for test in by_images[0]]
        print(*alarms[-1], sep="\t", flush=True)
    covered: list[Sequence[str]] = []
    for name, world in COVERED.items():
        by_size = [coverage(world, images, worlds, resamples) for images in IMAGES]
        covered += [(f"{name}, {of}", *(_cell(one[of]) for one in by_size)) for of in ("score", "difference")]
        print(*covered[-2:], sep="\n", flush=True)
    over: list[Sequence[str]] = []
    for probes in (3, 10):
        for step, ties in ((0.0, "no ties"), (0.01, "whole points")):
            by_datasets = [dataset_alarms(datasets, probes, step, 2 * worlds) for datasets in DATASETS]
            names = by_datasets[-1]
            over += [
                (f"{probes} probes, {ties}", test, *(_cell(one.get(test)) for one in by_datasets))
                for test in names
                if test != "Wilcoxon" or probes == 3
            ]
            print(*over[-len(names) :], sep="\n", flush=True)
    return "\n\n".join(
        [
            f"False alarms over images: in how many of {worlds:,} null worlds, in percent, p is at most 0.05 "
            f"(± {100 * noise(worlds):.1f} by chance).",
            page.table(["metric, test", *heads], alarms),
            "Coverage: how many of the 95 % intervals, in percent, contain the true value "
            f"(± {100 * noise(worlds, 0.95):.1f} by chance); none: there are too few images, or too few on which the probes "
            "differ.",
            page.table(["metric, interval", *heads], covered),
            f"False alarms over data sets: in how many of {2 * worlds:,} null worlds, in percent, the test finds something at "
            f"0.05 (± {100 * noise(2 * worlds):.1f} by chance); none: nothing is tested.",
            page.table(["probes", "test", *(f"{n} data sets" for n in DATASETS)], over, left=2),
        ]
    )


def _called_share(wrong: int, told: int, least: float = 1) -> str:
    return _cell(wrong / told if told >= least else None)


def verdict_table(worlds: int, resamples: int, *, ranked: bool = False) -> str:
    """How many null worlds are called a gain or a loss, in Markdown; of AUROC if `ranked`, else of the accuracies."""
    lines: list[Sequence[str]] = []
    for name, world in CALLED.items():
        if (world.metric == "auroc") == ranked:
            counts = [called(world, images, worlds, resamples) for images in CALLED_IMAGES]
            cells = [f"{_called_share(*one, worlds / 10)} ({100 * one[1] / worlds:.0f})" for one in counts]
            wrong, told = map(sum, zip(*counts, strict=True))
            lines.append((name, *cells, f"{_called_share(wrong, told)} of {told:,}"))
            print(*lines[-1], sep="\t", flush=True)
    text = (
        f"Of {worlds:,} null worlds, how many in percent are called a gain or a loss among those that can be told "
        f"(± {100 * noise(worlds):.1f} by chance, more where few can be told); in brackets how many in percent can be told; "
        "none: fewer than a tenth."
    )
    return (
        f"{text}\n\n{page.table(['metric, classes, scores', *(f'{n:,} images' for n in CALLED_IMAGES), 'all'], lines)}"
    )


def trade_table(worlds: int, resamples: int) -> str:
    """Why a rare class is not told, in Markdown."""
    shares = [_cell(traded(rare, worlds, resamples)) for rare in TRADES]
    text = (
        "Two probes have a balanced accuracy of 77.5 %, one of them better by ten points on a rare class, the other on a class "
        f"of {FREQUENT} images: in how many of {worlds:,} worlds, in percent, p is at most 0.05, by the number of test images "
        f"of the rare class (± {100 * noise(worlds):.1f} by chance)."
    )
    return f"{text}\n\n{page.table(['images of the rare class', *map(str, TRADES)], [('p at most 0.05', *shares)])}"


PARTS: Mapping[str, Callable[[int, int], str]] = {
    "level": tables,
    "verdicts": lambda worlds, resamples: verdict_table(5 * worlds, resamples),
    "verdicts of AUROC": lambda worlds, resamples: verdict_table(worlds, resamples, ranked=True),
    "rare classes": lambda worlds, resamples: trade_table(5 * worlds, resamples),
}
"""{part of docs/method.md: its text, from the numbers of worlds and of resamples}; an AUROC takes fifty times as long."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--part", choices=PARTS, help="one of the parts of the page; default: all")
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    for name in [asked.part] if asked.part else PARTS:
        text = PARTS[name](asked.worlds, asked.resamples)
        print(text, flush=True)
        if asked.page:
            page.put("method.md", name, text)


if __name__ == "__main__":
    main()
