"""Our scores compared with the published ones: same model, data set and probe, with the difference and whether it is large."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import sqrt
from statistics import fmean

from rich.console import Group, RenderableType
from rich.text import Text

from mlfusion.report.figures import charts
from mlfusion.report.figures.drawing import Figure, Panel, Record
from mlfusion.report.numbers import count, mean_sd, percent, points
from mlfusion.report.summary import ComparisonGroup, Score, comparison_groups
from mlfusion.report.terminal import add_line, bare_table
from mlfusion.results import Row
from mlfusion.system.words import plural

SOURCE = "Ciernik et al., arXiv 2601.09322"
METRIC = "balanced_accuracy"  # the published metric

LARGE = 0.01
"""A difference is flagged from one point on, if it also exceeds twice its deviation over seeds (theirs is one seed)."""


@dataclass(frozen=True)
class PublishedComparison:
    """One of our scores and the published one, as fractions."""

    group: ComparisonGroup
    score: Score
    published: float

    @property
    def difference(self) -> float:
        """Our score minus the published one."""
        return self.score.test.mean - self.published

    @property
    def flagged(self) -> bool:
        """Whether the difference is large; its deviation assumes that theirs varies over seeds as ours does."""
        test = self.score.test
        return abs(self.difference) > max(LARGE, 2 * (test.sd or 0) * sqrt(1 + 1 / test.n))

    def record(self) -> Record:
        """The comparison in percent, as its CSV holds it."""
        group, test, difference = self.group, self.score.test, 100 * self.difference
        sd = None if test.sd is None else 100 * test.sd
        place = Record(model=group.model, dataset=group.dataset, probe=self.score.probe, grid=group.grid)
        ours = place.extended(ours=100 * test.mean, ours_sd=sd, seeds=test.n, published=100 * self.published)
        return ours.extended(difference=difference, flagged="yes" if self.flagged else "")


@cache
def published_scores() -> dict[tuple[str, str, str], float]:
    """{(model, data set, probe): balanced accuracy on test, as a fraction}."""
    text = resources.files(__package__).joinpath("paper_balanced_accuracy.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {(r["model"], r["dataset"], r["probe"]): float(r["balanced_accuracy"]) / 100 for r in rows}


def compare_with_published(rows: Sequence[Row]) -> list[PublishedComparison]:
    """Every score of the rows that was also published.

    Raises:
        MlfusionError: there are no rows.
    """
    return compare(comparison_groups(rows))


def compare(groups: Sequence[ComparisonGroup]) -> list[PublishedComparison]:
    """Every score of ours that was also published and was made without options, in the order of the groups."""
    known = published_scores()
    return [
        PublishedComparison(group, score, known[key])
        for group in groups
        if group.metric == METRIC and not group.options
        for score in group.scores
        if (key := (group.model, group.dataset, score.probe)) in known
    ]


def summarize(compared: Sequence[PublishedComparison]) -> str:
    """The comparison in a few sentences; says so if no score is in common."""
    if not compared:
        known = published_scores()
        models, sets = (", ".join(dict.fromkeys(key[i] for key in known)) for i in (0, 1))
        return (
            f"No score is in common with the published ones ({SOURCE}): they are balanced accuracies of {models} on {sets}, by "
            "the study's ten probes without options."
        )
    flagged = sum(one.flagged for one in compared)
    mean, size = fmean(one.difference for one in compared), fmean(abs(one.difference) for one in compared)
    models_count = plural(len({one.group.model for one in compared}), "model", "models")
    sets_count = plural(len({one.group.dataset for one in compared}), "data set", "data sets")
    quick = any(one.group.grid != "paper" for one in compared)
    return (
        f"{count(len(compared))} {'score is' if len(compared) == 1 else 'scores are'} in common with the published ones "
        f"({SOURCE}; one seed): {models_count}, {sets_count}. Ours are {points(mean)} points above theirs on average; the mean "
        f"absolute difference is {percent(size)} points. {flagged or 'None'} {'is' if flagged == 1 else 'are'} flagged: the "
        f"difference exceeds {LARGE * 100:g} point and twice its standard deviation over seeds."
        + (" Rows of the quick grid are not a fair comparison." if quick else "")
    )


def table(compared: Sequence[PublishedComparison], max_lines: int) -> RenderableType:
    """A table for the terminal: all comparisons if they are few, else the flagged ones, the largest differences first."""
    flagged = sorted((one for one in compared if one.flagged), key=lambda one: -abs(one.difference))
    shown = list(compared) if len(compared) <= max_lines else flagged[:max_lines]
    summary = Text(summarize(compared))
    if not shown:
        return summary
    lines = bare_table(None, ["model", "data set", "probe"], ["ours, %", "published", "difference, points", ""])
    for one in shown:
        place = one.group.model, one.group.dataset, one.score.probe
        scores = mean_sd(one.score.test), percent(one.published), points(one.difference)
        flag, style = ("flagged", "bold") if one.flagged else ("", "")
        add_line(lines, [*place, *scores, flag], style)
    hidden = len(compared) - len(shown)
    note = [Text(f"{count(hidden)} more are in the page (--html) and in the CSV of --figures")] if hidden else []
    return Group(lines, *note, Text(), summary)


def figure(compared: Sequence[PublishedComparison]) -> Figure | None:
    """Our scores against the published ones, one panel per model; None if no score is in common."""
    if not compared:
        return None
    records = [one.record() for one in compared]
    ends = [100 * value for one in compared for value in (one.score.test.mean, one.published)]
    spec = _spec(min(ends), max(max(ends), min(ends) + 1))
    return Figure(
        "against-paper",
        "Comparison with the published scores",
        f"Balanced accuracy on test in percent; on the dashed line both are equal. Filled: flagged. Published: {SOURCE}, one "
        "seed.",
        summarize(compared),
        [
            Panel(model, spec, [record for record in records if record["model"] == model], width=300)
            for model in dict.fromkeys(one.group.model for one in compared)
        ],
        records,
        page_width="narrow",
    )


def _spec(low: float, high: float) -> dict[str, object]:
    alt, base = charts.base_chart()
    scale, axis = charts.exact_scale((low, high), 8), alt.Axis(tickCount=5)
    x = alt.X("published:Q", title="published, %", scale=scale, axis=axis)
    y = alt.Y("ours:Q", title="ours, %", scale=scale, axis=axis)
    numbers = [("ours:Q", "", ".2f"), ("published:Q", "", ".2f"), ("difference:Q", "difference, points", "+.2f")]
    tooltip = charts.tooltip(("dataset:N", "data set"), "probe:N", *numbers, "seeds:Q")
    equal = base.transform_aggregate(n="count()").mark_rule(style="baseline")
    layers = [equal.encode(x=alt.XDatum(low), x2=alt.X2Datum(high), y=alt.YDatum(low), y2=alt.Y2Datum(high))]
    for flagged, style in (("datum.flagged == ''", "hollow"), ("datum.flagged != ''", "dot")):
        dots = base.transform_filter(flagged).mark_point(style=style, filled=style == "dot")
        layers.append(dots.encode(x=x, y=y, tooltip=tooltip))
    return charts.to_spec(alt.layer(*layers), 280)
