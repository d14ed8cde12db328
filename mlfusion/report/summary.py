"""Results grouped for comparison: the numbers that tables, figures and sentences share, so that they agree.

Scores are fractions and gains are differences of fractions; `numbers` writes them as percent and points. The rest of the
report reads rows through the classes of this module.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean

from mlfusion.errors import BadData, MlfusionError
from mlfusion.results import Results, Row
from mlfusion.specs.names import BASELINE, HEAD_NAMES, STUDY
from mlfusion.statistics import Setting, Spread, Verdict, compare, differences, setting, verdict
from mlfusion.statistics.row_scores import rare_of
from mlfusion.statistics.verdicts import RareClass
from mlfusion.system.text import one_line

ALF = "cls+ap-all-layers/attentive"

"""Heads that keep their colour and symbol in every figure."""

MARKS = {
    "code": ("\N{DAGGER}", "made by another version of the code than the baseline that its gain is counted from"),
    "precision": ("\N{DOUBLE DAGGER}", "trained in another precision than the baseline that its gain is counted from"),
}
"""{field of rows: (mark, what it means)} of every gain whose rows differ in that field from those of the baseline."""

_LAYERWISE = re.compile(r"(?P<kinds>.+)-layer-(?P<layer>\d+)/(?P<head>[\w-]+)")
_LAST = re.compile(r"(?P<kinds>.+)-last/(?P<head>[\w-]+)")
_SEVERAL = re.compile(r".+-(?:all|\d+)-layers/[\w-]+")


@dataclass(frozen=True)
class Score:
    """The scores of one probe on one model's features of one data set, over its seeds."""

    probe: str
    rows: tuple[Row, ...]  # one per seed, sorted by seed
    test: Spread
    val: Spread
    train: Spread
    gain: Spread | None  # over the baseline, seed by seed; None without a seed in common
    other: Mapping[str, str] = field(
        default_factory=dict
    )  # differences from the baseline's rows, by field, of those of MARKS

    @property
    def is_baseline(self) -> bool:
        """Whether gains are counted from this probe."""
        return self.probe == BASELINE

    @property
    def marks(self) -> str:
        """The marks of its gain, such as a dagger; empty for rows made like those of the baseline."""
        return "".join(MARKS[name][0] for name in self.other)

    @cached_property
    def layerwise(self) -> tuple[str, int] | None:
        """(series, layer) of a probe of one layer among several such: 'cls-layer-7/linear' → ('cls/linear', 7)."""
        match = _LAYERWISE.fullmatch(self.probe)
        return (f"{match['kinds']}/{match['head']}", int(match["layer"])) if match else None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its rows."""
        return tuple(row.seed for row in self.rows)

    @property
    def seconds(self) -> float:
        """Time of probing in seconds, mean over seeds."""
        return fmean(row.seconds for row in self.rows)

    @property
    def parameters(self) -> int:
        """Parameters of one probe, the maximum over seeds: seeds may choose different numbers of attention heads."""
        return max(row.parameters for row in self.rows)

    @property
    def attention_heads(self) -> int | None:
        """Number of attention heads; None if the probe has none, or if seeds chose different numbers."""
        numbers = {row.selected.heads for row in self.rows}
        return numbers.pop() if len(numbers) == 1 else None


def metric_name(metric: str) -> str:
    """'balanced accuracy', 'R²': a metric in words."""
    return "R²" if metric == "r2" else metric.replace("_", " ")


def head_of(probe: str) -> str:
    """'attentive' of 'cls+ap-all-layers/attentive' and of 'cls+ap-all-layers/attentive:h8'."""
    return probe.rpartition("/")[2].partition(":")[0]


def heads_of(probes: Iterable[str]) -> tuple[str, ...]:
    """The heads that figures have marks for, in one order, so that a head has one colour and symbol in every figure.

    Heads of probes that this version does not know come last.
    """
    return tuple(dict.fromkeys([*HEAD_NAMES, *sorted(map(head_of, probes))]))


def mean_gain(scores: Sequence[Score]) -> float | None:
    """Mean gain over data sets or models; None if one of the scores has no gain, or is the baseline."""
    gains = [score.gain.mean for score in scores if score.gain and not score.is_baseline]
    return fmean(gains) if gains and len(gains) == len(scores) else None


def footnotes(scores: Iterable[Score]) -> list[str]:
    """The sentences under a table of these scores: what marks mean, duplicates, and unstable choices."""
    scores = list(scores)
    rows = [row for score in scores for row in score.rows]
    duplicates = dict.fromkeys(f"{row.dataset}: {note}" for row in rows if (note := row.duplicates_note()))
    unstable = dict.fromkeys(f"{row.probe} on {row.dataset}: {note}" for row in rows if (note := row.stability_note()))
    return [*meanings(scores), *duplicates, *unstable]


def all_marks(scores: Iterable[Score]) -> str:
    """The marks of a mean of these scores' gains."""
    names = {name for score in scores for name in score.other}
    return "".join(mark for name, (mark, _) in MARKS.items() if name in names)


def meanings(scores: Iterable[Score]) -> list[str]:
    """What each mark of these scores' gains means, with the differences."""
    differences: dict[str, dict[str, None]] = {}
    for score in scores:
        for name, difference in score.other.items():
            differences.setdefault(name, {})[difference] = None
    return [f"{mark} {text} ({'; '.join(differences[n])})." for n, (mark, text) in MARKS.items() if n in differences]


@dataclass(frozen=True)
class ComparisonGroup:
    """Probes that can be compared with each other: their rows have one `Setting`."""

    model: str
    dataset: str
    grid: str
    metric: str
    features: tuple[str, ...]
    options: str  # such as '4 shots'; empty for the protocol without options
    protocol: int
    name: str  # "vit on digits", and its difference from other groups of that model and data set
    scores: tuple[Score, ...]  # the study's order, then the others by name
    results: Results | None = field(default=None, compare=False, repr=False)  # its arrays tell gains from chance

    @cached_property
    def baseline(self) -> Score | None:
        """The score of `cls-last/linear`, or None."""
        return next((score for score in self.scores if score.is_baseline), None)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows of every probe and seed."""
        return tuple(row for score in self.scores for row in score.rows)

    @property
    def first(self) -> Row:
        """The first row; depth, width, numbers of images and classes are the same in all rows."""
        return self.rows[0]

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of all rows, sorted."""
        return tuple(sorted({row.seed for row in self.rows}))

    @property
    def seconds(self) -> float:
        """Time of probing in seconds, summed over all rows."""
        return sum(row.seconds for row in self.rows)

    @cached_property
    def tokens(self) -> frozenset[tuple[int, str]]:
        """(layer, token kind) of every token that its probes read."""
        return frozenset((layer, kind) for row in self.rows for layer in row.layers for kind in row.tokens)

    @property
    def newest(self) -> str:
        """The time of the newest row, in ISO 8601."""
        return max(row.created for row in self.rows)

    @cached_property
    def probes(self) -> tuple[Score, ...]:
        """Scores of the probes that do not belong to a layer-by-layer series."""
        return tuple(score for score in self.scores if score.layerwise is None)

    @cached_property
    def by_layer(self) -> dict[str, dict[int, Score]]:
        """{series: {layer: score}}; a series ends in the last-layer probe of its kind, if that was run."""
        series: dict[str, dict[int, Score]] = {}
        for score in self.scores:
            if score.layerwise:
                name, layer = score.layerwise
                series.setdefault(name, {})[layer] = score
        for score in self.scores:
            if (match := _LAST.fullmatch(score.probe)) and (name := f"{match['kinds']}/{match['head']}") in series:
                series[name].setdefault(self.first.depth, score)
        kinds = ("cls", "ap", "cls+ap", "all-tokens")
        names = sorted(series, key=lambda name: [name.startswith(f"{kind}/") for kind in kinds], reverse=True)
        return {name: dict(sorted(series[name].items())) for name in names}

    @cached_property
    def main(self) -> Score | None:
        """The probe whose gain answers the question: ALF, or else the one over several layers with the best validation.

        The choice does not use test scores, which would bias it upwards.
        """
        several = [score for score in self.scores if _SEVERAL.fullmatch(score.probe)]
        return max(several, key=lambda score: (score.probe == ALF, score.val.mean), default=None)

    @cached_property
    def verdict(self) -> Verdict:
        """What may be said about the main probe's gain over the baseline, on the same test images."""
        reason = "the folder of results, which holds the predictions for the test images, was not given"
        if self.results and self.main and self.main.gain and self.baseline:
            try:
                return compare(self.results, self.main.rows, self.baseline.rows).verdict
            except BadData as err:  # arrays that do not belong together, of a folder that somebody changed
                reason = str(err)
        return verdict(None, metric=self.metric, classes=self.first.classes, missing=reason)

    @cached_property
    def rare(self) -> tuple[RareClass, ...]:
        """Classes with too few test images for a verdict."""
        return rare_of(self.results, self.rows)

    @cached_property
    def attention(self) -> "LayerAttention | None":
        """The attention of ALF over its tokens, or else of the attentive probe over the most layers; mean over seeds."""
        candidates = [score for score in self.probes if any(_over_layers(row) for row in score.rows)]
        best = max(candidates, key=lambda score: (score.probe == ALF, len(score.rows[0].layers)), default=None)
        return LayerAttention.of(best) if best else None


@dataclass(frozen=True)
class LayerAttention:
    """Share of the attention that each (layer, kind) token gets; shares sum to one, mean over seeds."""

    probe: str
    tokens: tuple[tuple[int, str], ...]  # (layer, kind)
    mean: tuple[float, ...]  # over test images, then over seeds
    sd: tuple[float, ...]  # over test images, then averaged over seeds
    seeds: int

    @classmethod
    def of(cls, score: Score) -> "LayerAttention":
        """Average over seeds; a seed whose tokens differ from those of the first is left out."""
        attentions = [row.attention for row in score.rows if row.attention and _over_layers(row)]
        first = attentions[0]
        same = [each for each in attentions if (each.layers, each.kinds) == (first.layers, first.kinds)]
        means, deviations = (
            tuple(fmean(values) for values in zip(*seeds, strict=True))
            for seeds in ([each.mean for each in same], [each.sd for each in same])
        )
        return cls(score.probe, tuple(zip(first.layers, first.kinds, strict=True)), means, deviations, len(same))

    @cached_property
    def by_layer(self) -> dict[int, float]:
        """{layer: share of all its tokens}."""
        shares: dict[int, float] = dict.fromkeys(sorted({layer for layer, _ in self.tokens}), 0.0)
        for (layer, _), share in zip(self.tokens, self.mean, strict=True):
            shares[layer] += share
        return shares


def _over_layers(row: Row) -> bool:
    """Whether a row has attention over several layers, with one token per layer and kind."""
    attention = row.attention
    if attention is None or len(set(attention.layers)) < 2:
        return False
    return len(set(zip(attention.layers, attention.kinds, strict=True))) == len(attention.kinds)


def comparison_groups(rows: Sequence[Row], results: Results | None = None) -> list[ComparisonGroup]:
    """Group rows by the setting that `results compare` demands too, in order of appearance of models and data sets.

    `results` holds the rows' arrays, by which a gain is told from chance; without them nothing is called a gain.
    If several rows have the same probe and seed, the last counts. This is the one way into every table, figure and page: names
    are written in one line without control characters here, which a terminal would obey and XML cannot hold.

    Raises:
        MlfusionError: there are no rows.
    """
    if not rows:
        raise MlfusionError("no results to report. Make some with `mlfusion probe --dataset digits`")
    grouped: dict[Setting, dict[tuple[str, int], Row]] = {}
    for row in (row.renamed(one_line) for row in rows):
        grouped.setdefault(setting(row), {})[row.probe, row.seed] = row
    models = list(dict.fromkeys(key.model for key in grouped))
    datasets = list(dict.fromkeys(key.dataset for key in grouped))
    keys = sorted(grouped, key=lambda key: (models.index(key.model), datasets.index(key.dataset)))
    return [
        ComparisonGroup(*key, _group_name(key, keys), _scores([*grouped[key].values()]), results=results)
        for key in keys
    ]


def replaced(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """The rows that do not count, each with the later one of the same setting, probe and seed that does."""
    keyed = [((setting(row), row.probe, row.seed), row) for row in rows]
    latest = dict(keyed)
    return [(row, latest[key]) for key, row in keyed if row is not latest[key]]


def _group_name(key: Setting, keys: Sequence[Setting]) -> str:
    """'vit on digits', and the grid, metric, features or protocol that distinguish it from another group."""
    rivals = [other for other in keys if other[:2] == key[:2]]
    candidates = [
        (len({other.grid for other in rivals}), f"{key.grid} grid"),
        (len({other.metric for other in rivals}), metric_name(key.metric)),
        (len({other.features for other in rivals}), f"features {'+'.join(k[:6] for k in key.features)}"),
        (len({other.protocol for other in rivals}), f"protocol {key.protocol}"),
    ]
    words = ", ".join([key.options] * bool(key.options) + [text for ways, text in candidates if ways > 1])
    return f"{key.model} on {key.dataset}" + (f" ({words})" if words else "")


def _scores(rows: Sequence[Row]) -> tuple[Score, ...]:
    by_probe: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        by_probe.setdefault(row.probe, []).append(row)
    baseline = {row.seed: row for row in by_probe.get(BASELINE, [])}
    return tuple(_score(probe, by_probe[probe], baseline) for probe in sorted(by_probe, key=probe_order))


def _score(probe: str, rows: Sequence[Row], baseline: dict[int, Row]) -> Score:
    # Rows are paired by seed, so that effects of a seed on both probes, such as its validation split, cancel.
    pairs = [(row, baseline[row.seed]) for row in rows if row.seed in baseline]
    gains = [row.test - base.test for row, base in pairs]
    test, val, train = (Spread.of(getattr(row, part) for row in rows) for part in ("test", "val", "train"))
    found = differences(*zip(*pairs, strict=True)) if pairs else {}
    other = {name: found[name] for name in MARKS if name in found}
    return Score(probe, tuple(rows), test, val, train, Spread.of(gains) if gains else None, other)


def probe_order(probe: str) -> tuple[int, str, int]:
    """Key for sorting: the study's ten probes as in its tables, others by name, layers by number."""
    if probe in STUDY:
        return STUDY.index(probe), "", 0
    if match := _LAYERWISE.fullmatch(probe):
        return len(STUDY) + 1, f"{match['kinds']}/{match['head']}", int(match["layer"])
    return len(STUDY), probe, 0


def score_word(groups: Iterable[ComparisonGroup]) -> str:
    """'Accuracy' if every score is one, else 'Score'."""
    return "Accuracy" if all(group.metric == "balanced_accuracy" for group in groups) else "Score"


def library_versions(groups: Iterable[ComparisonGroup]) -> dict[str, str]:
    """{library: its version, or all versions if rows differ}."""
    pairs = dict.fromkeys(pair for group in groups for row in group.rows for pair in row.versions.items())
    return {
        library: ", ".join(v for name, v in pairs if name == library) for library in sorted({name for name, _ in pairs})
    }


def code_versions(groups: Iterable[ComparisonGroup]) -> list[str]:
    """Versions of mlfusion that made the rows, each once."""
    return list(dict.fromkeys(row.code for group in groups for row in group.rows))
