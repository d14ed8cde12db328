"""Studies: comparison groups of several models and data sets with the same grid, metric and options."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product

from mlfusion import datasets, models
from mlfusion.report.summary import ComparisonGroup, Score, metric_name, probe_order


@dataclass(frozen=True)
class Study:
    """Groups that one figure may compare over models or data sets: one grid, metric and protocol, the same options."""

    name: str  # the difference from other studies of the same rows, such as 'quick grid'; empty if alone
    groups: tuple[ComparisonGroup, ...]  # one for each model and data set, the one with the newest row

    @property
    def metric(self) -> str:
        """The metric in words: 'balanced accuracy'."""
        return metric_name(self.groups[0].metric)

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Models in the order of the catalogue; others follow in order of appearance."""
        names = dict.fromkeys(group.model for group in self.groups)
        return tuple(sorted(names, key=partial(_position, list(models.CATALOGUE))))

    @cached_property
    def datasets(self) -> tuple[str, ...]:
        """Data sets by domain, then in the order of the catalogue; others follow in order of appearance."""
        known, names = list(datasets.CATALOGUE), dict.fromkeys(group.dataset for group in self.groups)
        return tuple(sorted(names, key=lambda name: (DOMAINS.index(domain(name)), _position(known, name))))

    @cached_property
    def probes(self) -> tuple[str, ...]:
        """Probes that do not belong to a layer-by-layer series, in the study's order."""
        return tuple(sorted({score.probe for group in self.groups for score in group.probes}, key=probe_order))

    @cached_property
    def _by_case(self) -> dict[tuple[str, str], tuple[ComparisonGroup, dict[str, Score]]]:
        return {(g.model, g.dataset): (g, {score.probe: score for score in g.scores}) for g in self.groups}

    def select(self, *, model: str | None = None, dataset: str | None = None) -> list[ComparisonGroup]:
        """The groups of a model, of a data set or of both, by model, then by data set."""
        cases = product([model] if model else self.models, [dataset] if dataset else self.datasets)
        return [self._by_case[case][0] for case in cases if case in self._by_case]

    def score(self, group: ComparisonGroup, probe: str) -> Score | None:
        """The score of a probe in one of the groups, or None."""
        return self._by_case[group.model, group.dataset][1].get(probe)

    def scores(self, probe: str, *, model: str | None = None, dataset: str | None = None) -> list[Score]:
        """The scores of a probe, in the order of `select`."""
        groups = self.select(model=model, dataset=dataset)
        return [score for group in groups if (score := self.score(group, probe))]


def _position(known: Sequence[str], name: str) -> int:
    """The position of a name among those known; all others come last."""
    return known.index(name) if name in known else len(known)


DOMAINS = ("Natural (multi-domain)", "Natural (single-domain)", "Specialized", "Structured", "Others")
"""Domains of the study's data sets; the last is for all other data sets."""


def domain(dataset: str) -> str:
    """The domain of a data set of the study; 'Others' for any other."""
    row = datasets.CATALOGUE.get(dataset)
    return row.domain if row and row.domain in DOMAINS else DOMAINS[-1]


def studies(groups: Sequence[ComparisonGroup]) -> list[Study]:
    """Group by grid, metric, options and protocol, the largest study first: different metrics are never compared."""
    by_setting: dict[tuple[str, str, str, int], dict[tuple[str, str], ComparisonGroup]] = {}
    for group in groups:
        cases = by_setting.setdefault((group.grid, group.metric, group.options, group.protocol), {})
        previous = cases.get((group.model, group.dataset))
        if previous is None or previous.newest < group.newest:
            cases[group.model, group.dataset] = group
    keys = sorted(by_setting, key=lambda key: -sum(len(group.scores) for group in by_setting[key].values()))
    labels = [
        (f"{grid} grid", metric_name(metric), options or "no options", f"protocol {n}")
        for grid, metric, options, n in keys
    ]
    differ = [len(set(words)) > 1 for words in zip(*labels, strict=True)]
    names = [", ".join(word for word, differs in zip(words, differ, strict=True) if differs) for words in labels]
    return [Study(name, tuple(by_setting[key].values())) for name, key in zip(names, keys, strict=True)]
