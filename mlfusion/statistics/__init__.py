"""How sure a number is: spreads, intervals, tests, ranks, calibration and similarity, by SciPy and scikit-learn. No torch.

`seeds`       Spread: mean ± deviation over seeds
`images`      over the test images of one data set: interval, difference (paired bootstrap), mcnemar, calibration, confusion
`datasets`    over data sets: wilcoxon, adjust (Benjamini-Hochberg), holm, against, ranking (Friedman, critical difference)
`rows`        of rows: compare, compare_probes, over_datasets, by_dataset, rank, certainty, fit (train and test), cost, setting
`similarity`  of layers: cka, cka_with, layer_cka (centred kernel alignment, linear or by an RBF)

Functions of arrays or rows, each returning a frozen value. Scores are fractions; a gain always stands beside the scores it
is the difference of. Deviation over seeds and interval over test images are two uncertainties: one says how much another
training run would differ, the other how much another test set would.
"""

from mlfusion.statistics.cka import cka, cka_with, layer_cka
from mlfusion.statistics.datasets import (
    FEWEST,
    Against,
    Pair,
    Ranking,
    Signed,
    adjust,
    against,
    holm,
    ranking,
    wilcoxon,
)
from mlfusion.statistics.images import (
    Bin,
    Calibration,
    Difference,
    Interval,
    McNemar,
    calibration,
    confusion,
    difference,
    interval,
    mcnemar,
)
from mlfusion.statistics.rows import (
    Certainty,
    Comparison,
    Confused,
    Cost,
    Fit,
    Rank,
    Setting,
    by_dataset,
    certainty,
    compare,
    compare_probes,
    cost,
    fit,
    over_datasets,
    rank,
    setting,
)
from mlfusion.statistics.seeds import Spread

__all__ = [
    "FEWEST",
    "Against",
    "Bin",
    "Calibration",
    "Certainty",
    "Comparison",
    "Confused",
    "Cost",
    "Difference",
    "Fit",
    "Interval",
    "McNemar",
    "Pair",
    "Rank",
    "Ranking",
    "Setting",
    "Signed",
    "Spread",
    "adjust",
    "against",
    "by_dataset",
    "calibration",
    "certainty",
    "cka",
    "cka_with",
    "compare",
    "compare_probes",
    "confusion",
    "cost",
    "difference",
    "fit",
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
