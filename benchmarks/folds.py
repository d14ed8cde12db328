"""Measures whether intervals over folds contain the truth, in worlds where two probes are equally good by construction.

    python benchmarks/folds.py --page

Each world draws images of Gaussian features around class means. Probe A reads one half of the features, probe B the other half,
which has the same distribution: their expected scores are equal, and only the draw of images makes one better. Both are ridge
regressions, trained and tested by folds. Three intervals of the difference are compared: the one that `results compare` gives,
the same without the widening for folds, and the corrected t-test of Nadeau & Bengio (2003) on the differences of the folds.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from mlfusion.probing.splits import folds
from mlfusion.statistics.measures import full_score, measure
from mlfusion.statistics.uncertainty import Bootstrap, difference

PAGE = Path(__file__).parent.parent / "docs" / "method.md"
MARK = "folds"


@dataclass(frozen=True)
class World:
    """A kind of data set, and how its probes are trained."""

    name: str
    images: tuple[int, ...]  # by class
    features: int  # that one probe reads
    signal: float  # length of a class's mean; the noise of a feature has deviation 1
    penalty: float


WORLDS = (
    World("60 images, 2 classes, few features", (30, 30), 4, 1.0, 1.0),
    World("60 images, 2 classes, many features", (30, 30), 60, 1.5, 1.0),
    World("150 images, 3 classes", (50, 50, 50), 30, 1.5, 1.0),
    World("300 images, 3 classes, one of 5 %", (185, 100, 15), 30, 1.5, 10.0),
    World("300 images, 5 classes, many features", (60,) * 5, 200, 2.0, 1.0),
)


def draw(world: World, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels [N], and the features [N, D] that A and B read: independent, with one distribution."""
    labels = np.repeat(np.arange(len(world.images)), world.images)
    means = np.zeros((len(world.images), world.features))
    rows = np.arange(len(world.images))
    means[rows, rows % world.features] = world.signal
    a, b = (means[labels] + random.normal(size=(len(labels), world.features)) for _ in range(2))
    return labels, a, b


def predictions(x: np.ndarray, labels: np.ndarray, fold_of: np.ndarray, world: World) -> np.ndarray:
    """Pooled scores [N, C] of ridge regressions with class weights, each image by the one that was not trained on it."""
    classes = len(world.images)
    found = np.empty((len(labels), classes))
    for fold in range(fold_of.max() + 1):
        fitted, tested = fold_of != fold, fold_of == fold
        design = np.column_stack([x, np.ones(len(x))])
        weights = 1 / np.bincount(labels[fitted], minlength=classes)[labels[fitted]]
        weights *= fitted.sum() / weights.sum()
        penalties = np.full(design.shape[1], world.penalty)
        penalties[-1] = 1e-9
        inputs = design[fitted]
        left = inputs.T @ (weights[:, None] * inputs) + np.diag(penalties)
        solution = np.linalg.solve(left, inputs.T @ (weights[:, None] * np.eye(classes)[labels[fitted]]))
        found[tested] = design[tested] @ solution
    return found


def corrected_t(labels: np.ndarray, a: np.ndarray, b: np.ndarray, fold_of: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of Nadeau & Bengio's corrected resampled t-test, of balanced accuracy."""
    count = int(fold_of.max()) + 1
    gains = []
    for fold in range(count):
        rows = fold_of == fold
        one, other = (full_score(measure(labels[rows], x[rows], "balanced_accuracy"), int(rows.sum())) for x in (a, b))
        gains.append(one - other)
    half = student.ppf(0.975, count - 1) * sqrt((1 / count + 1 / (count - 1)) * np.var(gains, ddof=1))
    return float(np.mean(gains) - half), float(np.mean(gains) + half)


def coverage(world: World, count: int, worlds: int, resamples: int) -> dict[str, float]:
    """Share of worlds whose interval contains 0, by method, and the share with p of at most 0.05."""
    hits: dict[str, list[bool]] = {"compare": [], "without the widening": [], "corrected t": [], "p": []}
    for seed in range(worlds):
        random = np.random.default_rng([seed, count, sum(world.images)])
        labels, *inputs = draw(world, random)
        fold_of = folds(labels, count, seed=seed)
        a, b = (predictions(x, labels, fold_of, world) for x in inputs)
        for name, of_folds in (("compare", count), ("without the widening", None)):
            found = difference(labels, a, b, bootstrap=Bootstrap(resamples=resamples, folds=of_folds))
            if found.low is not None and found.high is not None:
                hits[name].append(found.low <= 0 <= found.high)
            if of_folds:
                hits["p"].append(found.p <= 0.05)
        low, high = corrected_t(labels, a, b, fold_of)
        hits["corrected t"].append(low <= 0 <= high)
    return {name: float(np.mean(values)) for name, values in hits.items()}


def table(worlds: int, resamples: int, counts: Sequence[int] = (5, 10)) -> str:
    """The Markdown table of every world and number of folds, in percent."""
    lines = [
        f"Of {worlds} null worlds each, in percent (± {196 * sqrt(0.05 * 0.95 / worlds):.1f} by chance at 95).",
        "",
        "| world | folds | interval of `compare` contains 0 | without the widening | corrected t-test | p at most 0.05 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for world in WORLDS:
        for count in counts:
            found = coverage(world, count, worlds, resamples)
            cells = (found[name] for name in ("compare", "without the widening", "corrected t", "p"))
            lines.append(f"| {world.name} | {count} | " + " | ".join(f"{100 * value:.1f}" for value in cells) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Print the table, and with --page write it into docs/method.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=300)
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    made = table(asked.worlds, asked.resamples)
    if asked.page:
        before, _, rest = PAGE.read_text().partition(f"<!-- {MARK} -->")
        after = rest.partition(f"<!-- end of {MARK} -->")[2]
        PAGE.write_text(f"{before}<!-- {MARK} -->\n{made}\n<!-- end of {MARK} -->{after}")


if __name__ == "__main__":
    main()
