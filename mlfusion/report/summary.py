"""What rows say once they are set side by side: the numbers that table, figures and words share, so that they agree.

Scores are fractions here, gains differences of fractions; only what shows them turns them into percent and points.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from statistics import fmean
from typing import NamedTuple

from mlfusion import datasets, models
from mlfusion.errors import MlfusionError
from mlfusion.results import Row
from mlfusion.specs import BASELINE, STUDY
from mlfusion.statistics import Spread

ALF = "cls+ap-all-layers/attentive"

DAGGER = "\N{DAGGER}"
OTHER_CODE = f"{DAGGER} made by another version of the code than the baseline that its gain is counted from."
"""What the mark says, wherever a gain stands."""

_LAYERWISE = re.compile(r"(?P<kinds>.+)-layer-(?P<layer>\d+)/(?P<head>[\w-]+)")
_LAST = re.compile(r"(?P<kinds>.+)-last/(?P<head>[\w-]+)")
_SEVERAL = re.compile(r".+-(?:all|\d+)-layers/[\w-]+")


@dataclass(frozen=True)
class Score:
    """One probe on one model's features of one data set, over its seeds."""

    probe: str
    rows: tuple[Row, ...]  # one a seed, by seed
    test: Spread
    val: Spread
    train: Spread
    gain: Spread | None  # over the baseline, seed by seed; None without a seed in common
    other_code: bool = False  # were it and the baseline made by different versions of the code?

    @property
    def is_baseline(self) -> bool:
        """Is it the probe that gains are counted from?"""
        return self.probe == BASELINE

    @property
    def head(self) -> str:
        """'attentive' of 'cls+ap-all-layers/attentive' and of 'cls+ap-all-layers/attentive:h8'."""
        return head_of(self.probe)

    @property
    def reads_several_layers(self) -> bool:
        """Is it a probe whose gain answers whether intermediate layers help?"""
        return bool(_SEVERAL.fullmatch(self.probe))

    @cached_property
    def layerwise(self) -> tuple[str, int] | None:
        """(series, layer) of a probe of one layer among several such: 'cls-layer-7/linear' → ('cls/linear', 7)."""
        match = _LAYERWISE.fullmatch(self.probe)
        return (f"{match['kinds']}/{match['head']}", int(match["layer"])) if match else None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds it was trained with."""
        return tuple(row.seed for row in self.rows)

    @property
    def seconds(self) -> float:
        """Mean over seeds."""
        return fmean(row.seconds for row in self.rows)

    @property
    def parameters(self) -> int:
        """Of one probe; the most of any seed's, as seeds may choose another number of heads."""
        return max(row.parameters for row in self.rows)


def metric_name(metric: str) -> str:
    """'balanced accuracy', 'R²': a metric in words."""
    return "R²" if metric == "r2" else metric.replace("_", " ")


def head_of(probe: str) -> str:
    """'attentive' of 'cls+ap-all-layers/attentive' and of 'cls+ap-all-layers/attentive:h8'."""
    return probe.rpartition("/")[2].partition(":")[0]


@dataclass(frozen=True)
class Block:
    """The probes that can be compared with each other: one model's features of one data set, one grid, one metric."""

    model: str
    dataset: str
    grid: str
    metric: str
    features: tuple[str, ...]
    options: str  # such as '4 shots'; empty for the protocol as it is
    name: str  # "vit on digits", with what tells it from another block of that model and data set where there is one
    scores: tuple[Score, ...]  # the study's order, then the others by name

    @cached_property
    def baseline(self) -> Score | None:
        """`cls-last/linear`, where it was run."""
        return next((score for score in self.scores if score.is_baseline), None)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Of every probe and seed."""
        return tuple(row for score in self.scores for row in score.rows)

    @property
    def depth(self) -> int:
        """L, the model's blocks."""
        return self.rows[0].depth

    @cached_property
    def probes(self) -> tuple[Score, ...]:
        """Those that are not of the layer-by-layer series."""
        return tuple(score for score in self.scores if score.layerwise is None)

    @cached_property
    def by_layer(self) -> dict[str, dict[int, Score]]:
        """{series: {layer: score}}; a series ends in the last-layer probe of its kind, if that was run."""
        series: dict[str, dict[int, Score]] = {}
        for score in self.scores:
            if found := score.layerwise:
                series.setdefault(found[0], {})[found[1]] = score
        for score in self.scores:
            if (match := _LAST.fullmatch(score.probe)) and (name := f"{match['kinds']}/{match['head']}") in series:
                series[name].setdefault(self.depth, score)
        kinds = ("cls", "ap", "cls+ap", "all-tokens")
        names = sorted(series, key=lambda name: [name.startswith(f"{kind}/") for kind in kinds], reverse=True)
        return {name: dict(sorted(series[name].items())) for name in names}

    @cached_property
    def answer(self) -> Score | None:
        """The probe whose gain answers the question: ALF, or else the one over several layers with the best validation.

        Not the best on test: a choice by the test scores would flatter itself.
        """
        several = [score for score in self.scores if score.reads_several_layers]
        named = [score for score in several if score.probe == ALF]
        return max(named or several, key=lambda score: score.val.mean, default=None)

    @property
    def chance(self) -> float | None:
        """Standard error of the answer's gain from the number of test images, as if the two probes had drawn their own.

        They share their images, so the true one is smaller; rows alone cannot say by how much. Of an accuracy that of a
        binomial share; of R² that of a squared correlation, 2 R (1 - R²) / √n (Olkin and Finn 1995); an average precision
        has none that rows could tell: None.
        """
        held = [min(1.0, max(0.0, score.test.mean)) for score in (self.answer, self.baseline) if score]
        if self.metric == "balanced_accuracy":
            variances = [mean * (1 - mean) for mean in held]
        elif self.metric == "r2":
            variances = [4 * mean * (1 - mean) ** 2 for mean in held]
        else:
            return None
        return sqrt(sum(variances) / self.rows[0].images.test)

    @cached_property
    def attention(self) -> "LayerAttention | None":
        """The attention of ALF over its tokens, or else of the attentive probe over the most layers; seeds averaged."""
        held = [score for score in self.probes if any(_over_layers(row) for row in score.rows)]
        best = max(held, key=lambda score: (score.probe == ALF, len(score.rows[0].layers)), default=None)
        return LayerAttention.of(best) if best else None


@dataclass(frozen=True)
class LayerAttention:
    """Share of the attention that each (layer, kind) token gets; shares sum to one, seeds are averaged."""

    probe: str
    tokens: tuple[tuple[int, str], ...]  # (layer, kind)
    mean: tuple[float, ...]  # over test images, then over seeds
    sd: tuple[float, ...]  # over test images, its mean over seeds
    seeds: int

    @classmethod
    def of(cls, score: Score) -> "LayerAttention":
        """Means over seeds; a seed whose tokens differ from the first one's is left out."""
        kept = [row.attention for row in score.rows if row.attention and _over_layers(row)]
        tokens = tuple(zip(kept[0].layers, kept[0].kinds, strict=True))
        alike = [held for held in kept if tuple(zip(held.layers, held.kinds, strict=True)) == tokens]
        means = tuple(fmean(values) for values in zip(*(held.mean for held in alike), strict=True))
        deviations = tuple(fmean(values) for values in zip(*(held.sd for held in alike), strict=True))
        return cls(score.probe, tokens, means, deviations, len(alike))

    @cached_property
    def by_layer(self) -> dict[int, float]:
        """{layer: share of all its tokens}."""
        layers = sorted({layer for layer, _ in self.tokens})
        held = list(zip(self.tokens, self.mean, strict=True))
        return {layer: sum(share for (at, _), share in held if at == layer) for layer in layers}

    @property
    def peak(self) -> int:
        """The layer that gets the largest share."""
        return max(self.by_layer, key=lambda layer: self.by_layer[layer])

    @property
    def before_last(self) -> float:
        """Share of all layers but the deepest."""
        return sum(self.mean) - self.by_layer[max(self.by_layer)]


def _over_layers(row: Row) -> bool:
    held = row.attention
    if held is None or len(set(held.layers)) < 2:
        return False
    return len(set(zip(held.layers, held.kinds, strict=True))) == len(held.kinds)  # one token a layer and kind


class _Comparable(NamedTuple):
    """What rows must have in common for their scores to be compared."""

    model: str
    dataset: str
    grid: str
    metric: str
    features: tuple[str, ...]
    options: str  # such as '4 shots'; empty for the protocol as it is


def blocks(rows: Sequence[Row]) -> list[Block]:
    """Rows side by side, in the order in which models and data sets first came; of the same probe and seed, the last.

    Raises:
        MlfusionError: there are no rows.
    """
    if not rows:
        raise MlfusionError("no results to report. Make some with `mlfusion probe --dataset digits`")
    grouped: dict[_Comparable, dict[tuple[str, int], Row]] = {}
    for row in rows:
        key = _Comparable(row.model, row.dataset, row.grid, row.metric, tuple(row.features), _options(row))
        grouped.setdefault(key, {})[row.probe, row.seed] = row
    models = list(dict.fromkeys(key.model for key in grouped))
    datasets = list(dict.fromkeys(key.dataset for key in grouped))
    keys = sorted(grouped, key=lambda key: (models.index(key.model), datasets.index(key.dataset)))
    return [_block(key, list(grouped[key].values()), _told_apart(key, keys)) for key in keys]


def _options(row: Row) -> str:
    said = [
        f"{row.shots} shots" if row.shots is not None else "",
        "halving" if row.halving else "",
        f"labels smoothed by {row.smoothing:g}" if row.smoothing is not None else "",
    ]
    return ", ".join(text for text in said if text)


def _told_apart(key: _Comparable, keys: Sequence[_Comparable]) -> str:
    """'vit on digits', and the grid, metric or features where another block differs in just these."""
    rivals = [other for other in keys if other[:2] == key[:2]]
    said = [
        (len({other.grid for other in rivals}), f"{key.grid} grid"),
        (len({other.metric for other in rivals}), metric_name(key.metric)),
        (len({other.features for other in rivals}), f"features {'+'.join(k[:6] for k in key.features)}"),
    ]
    words = ", ".join([key.options] * bool(key.options) + [text for ways, text in said if ways > 1])
    return f"{key.model} on {key.dataset}" + (f" ({words})" if words else "")


def _block(key: _Comparable, rows: Sequence[Row], name: str) -> Block:
    by_probe: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        by_probe.setdefault(row.probe, []).append(row)
    baseline = {row.seed: row for row in by_probe.get(BASELINE, [])}
    scores = tuple(_score(probe, by_probe[probe], baseline) for probe in sorted(by_probe, key=_order))
    return Block(*key, name=name, scores=scores)


def _score(probe: str, rows: Sequence[Row], baseline: dict[int, Row]) -> Score:
    # Paired by seed: what a seed does to both probes alike, such as the split for validation, cancels.
    pairs = [(row, baseline[row.seed]) for row in rows if row.seed in baseline]
    gains = [row.test - base.test for row, base in pairs]
    return Score(
        probe,
        tuple(rows),
        test=Spread.of(row.test for row in rows),
        val=Spread.of(row.val for row in rows),
        train=Spread.of(row.train for row in rows),
        gain=Spread.of(gains) if gains else None,
        other_code=any(row.code != base.code for row, base in pairs),
    )


def _order(probe: str) -> tuple[int, str, int]:
    """The study's ten as in its tables, others by name, layers by number."""
    if probe in STUDY:
        return STUDY.index(probe), "", 0
    if match := _LAYERWISE.fullmatch(probe):
        return len(STUDY) + 1, f"{match['kinds']}/{match['head']}", int(match["layer"])
    return len(STUDY), probe, 0


# --- over models and data sets ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Blocks that figures over models or data sets may set side by side: one grid, one metric, the same options."""

    name: str  # what tells it from the other studies of the same rows, such as 'quick grid'; empty for the only one
    blocks: tuple[Block, ...]  # one for each model and data set, the one with the newest row

    @property
    def metric(self) -> str:
        """In words: 'balanced accuracy'."""
        return metric_name(self.blocks[0].metric)

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Families together and from small to large, as the catalogue has them; others as they first came."""
        known = list(models.CATALOGUE)
        names = dict.fromkeys(block.model for block in self.blocks)
        return tuple(sorted(names, key=lambda name: known.index(name) if name in known else len(known)))

    @cached_property
    def datasets(self) -> tuple[str, ...]:
        """By domain, then as the catalogue has them; others as they first came."""
        known = list(datasets.CATALOGUE)
        names = dict.fromkeys(block.dataset for block in self.blocks)

        def order(name: str) -> tuple[int, int]:
            return DOMAINS.index(domain(name)), known.index(name) if name in known else len(known)

        return tuple(sorted(names, key=order))

    @cached_property
    def probes(self) -> tuple[str, ...]:
        """Those that are not of a layer-by-layer series, in the study's order."""
        return tuple(sorted({score.probe for block in self.blocks for score in block.probes}, key=_order))

    @cached_property
    def _held(self) -> dict[tuple[str, str], tuple[Block, dict[str, Score]]]:
        return {(b.model, b.dataset): (b, {score.probe: score for score in b.scores}) for b in self.blocks}

    def block(self, model: str, dataset: str) -> Block | None:
        """That of a model on a data set, where there is one."""
        found = self._held.get((model, dataset))
        return found[0] if found else None

    def score(self, model: str, dataset: str, probe: str) -> Score | None:
        """That of a probe, where it was run."""
        found = self._held.get((model, dataset))
        return found[1].get(probe) if found else None


DOMAINS = ("Natural (multi-domain)", "Natural (single-domain)", "Specialized", "Structured", "Others")
"""The study's, and what is in none of them."""


def domain(dataset: str) -> str:
    """That of a data set of the study; 'Others' of any other."""
    row = datasets.CATALOGUE.get(dataset)
    return row.domain if row and row.domain in DOMAINS else DOMAINS[-1]


def studies(held: Sequence[Block]) -> list[Study]:
    """Blocks by what they may be compared over, the largest study first: unlike metrics are never set side by side."""
    grouped: dict[tuple[str, str, str], dict[tuple[str, str], Block]] = {}
    for block in held:
        place = grouped.setdefault((block.grid, block.metric, block.options), {})
        there = place.get((block.model, block.dataset))
        if there is None or _newest(there) < _newest(block):
            place[block.model, block.dataset] = block
    keys = sorted(grouped, key=lambda key: -sum(len(block.scores) for block in grouped[key].values()))
    said = [(f"{grid} grid", metric_name(metric), options or "as usual") for grid, metric, options in keys]
    differ = [len(set(words)) > 1 for words in zip(*said, strict=True)]
    names = [", ".join(word for word, which in zip(words, differ, strict=True) if which) for words in said]
    return [Study(name, tuple(grouped[key].values())) for name, key in zip(names, keys, strict=True)]


def _newest(block: Block) -> str:
    return max(row.created for row in block.rows)


# --- numbers as they are shown ---------------------------------------------------------------------------------------


def percent(value: float, digits: int = 1) -> str:
    """0.9712 → '97.1'."""
    return f"{100 * value:.{digits}f}"


def points(value: float, digits: int = 1) -> str:
    """A gain in points with its sign, a true minus for losses; what rounds to nothing has none."""
    text = f"{100 * value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "\N{MINUS SIGN}")


def count(value: int) -> str:
    """18447 → '18 447', thin spaces between."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def listed(words: Sequence[str]) -> str:
    """['a', 'b', 'c'] → 'a, b and c'."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
