"""Uncertainty of results: spreads, intervals, tests, ranks, calibration and similarity, by SciPy and scikit-learn. No torch.

`measures`    metrics as functions of the images' weights, which score rows too: measure, scores
`uncertainty` over the test images of a data set: interval (bootstrap, Wilson), difference (bootstrap, permutation), mcnemar
`resampling`  how these images are drawn: one by one, counted, or in groups
`images`      calibration, confusion, and recall, specificity and AUROC by class, of the predictions for these images
`verdicts`    what is called a gain, a loss or no clear difference: verdict
`datasets`    over data sets: wilcoxon, adjust (Benjamini-Hochberg), holm, gain_tests, ranking (Friedman, critical difference)
`rows`        on rows: compare, by_dataset, over_datasets, rank, cost; Spread over seeds
`models`      two models by one probe: compare_models
`row_scores`  of one row: interval, scores by class, calibration and confusions, from its arrays
`cka`         similarity of layers: cka, cka_with, layer_cka (centred kernel alignment, linear or by an RBF)

Functions of arrays or rows, each returning a frozen value. Scores are fractions; a gain is always shown with the two
scores. The deviation over seeds is the variation over training runs; the interval over test images is the variation over
test sets.
"""

from mlfusion.statistics.cka import cka, cka_with, layer_cka
from mlfusion.statistics.datasets import GainTest, Ranking, SignedRank, adjust, gain_tests, holm, ranking, wilcoxon
from mlfusion.statistics.images import Calibration, ClassScores, by_class, calibration, confusion
from mlfusion.statistics.models import compare_models
from mlfusion.statistics.resampling import Bootstrap
from mlfusion.statistics.row_scores import certainty
from mlfusion.statistics.rows import (
    Cost,
    Setting,
    Spread,
    by_dataset,
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
from mlfusion.statistics.uncertainty import difference, interval, mcnemar
from mlfusion.statistics.verdicts import Verdict, verdict

__all__ = [
    "Bootstrap",
    "Calibration",
    "ClassScores",
    "Cost",
    "GainTest",
    "Ranking",
    "Setting",
    "SignedRank",
    "Spread",
    "Verdict",
    "adjust",
    "by_class",
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
    "verdict",
    "wilcoxon",
]
