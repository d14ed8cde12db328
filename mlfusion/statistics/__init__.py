"""Uncertainty of results: spreads, intervals, tests, ranks, calibration and similarity, by SciPy and scikit-learn. No torch.

`measures`    metrics as functions of the images' weights, which score rows too: measure, scores
`uncertainty` over the test images of a data set: interval (bootstrap, Wilson), difference (bootstrap, permutation), mcnemar
`images`      calibration and confusion of the predictions for these images
`datasets`    over data sets: wilcoxon, adjust (Benjamini-Hochberg), holm, gain_tests, ranking (Friedman, critical difference)
`rows`        on rows: compare, by_dataset, over_datasets, rank, certainty, cost; Spread over seeds
`models`      two models by one probe: compare_models
`cka`         similarity of layers: cka, cka_with, layer_cka (centred kernel alignment, linear or by an RBF)

Functions of arrays or rows, each returning a frozen value. Scores are fractions; a gain is always shown with the two
scores. The deviation over seeds is the variation over training runs; the interval over test images is the variation over
test sets.
"""

from mlfusion.statistics.cka import cka, cka_with, layer_cka
from mlfusion.statistics.datasets import GainTest, Ranking, SignedRank, adjust, gain_tests, holm, ranking, wilcoxon
from mlfusion.statistics.images import Calibration, calibration, confusion
from mlfusion.statistics.models import compare_models
from mlfusion.statistics.rows import (
    Cost,
    Setting,
    Spread,
    by_dataset,
    certainty,
    compare,
    compare_named,
    compare_probes,
    cost,
    differences,
    fair_table,
    over_datasets,
    rank,
    setting,
)
from mlfusion.statistics.uncertainty import Bootstrap, difference, interval, mcnemar

__all__ = [
    "Bootstrap",
    "Calibration",
    "Cost",
    "GainTest",
    "Ranking",
    "Setting",
    "SignedRank",
    "Spread",
    "adjust",
    "by_dataset",
    "calibration",
    "certainty",
    "cka",
    "cka_with",
    "compare",
    "compare_models",
    "compare_named",
    "compare_probes",
    "confusion",
    "cost",
    "difference",
    "differences",
    "fair_table",
    "gain_tests",
    "holm",
    "interval",
    "layer_cka",
    "mcnemar",
    "over_datasets",
    "rank",
    "ranking",
    "setting",
    "wilcoxon",
]
