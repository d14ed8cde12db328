"""Our numbers beside the published ones: the same model, data set and probe, with the difference and whether it is large."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import sqrt
from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlfusion.report.figures.drawing import Figure, Panel, Record, charted, finished, needs_altair
from mlfusion.report.summary import Block, Score, count, percent, points

SOURCE = "Ciernik et al., arXiv 2601.09322"
METRIC = "balanced_accuracy"  # what was published

LARGE = 0.01
"""A difference is flagged from a point on, if it is also more than twice what seeds make of it (theirs is one seed)."""


@dataclass(frozen=True)
class Beside:
    """One of our scores and the published one, as fractions."""

    block: Block
    score: Score
    published: float

    @property
    def difference(self) -> float:
        """Ours less theirs."""
        return self.score.test.mean - self.published

    @property
    def noise(self) -> float | None:
        """Deviation of the difference by seeds alone, one of ours taken for theirs; None for one seed."""
        sd, n = self.score.test.sd, self.score.test.n
        return None if sd is None else sd * sqrt(1 + 1 / n)

    @property
    def flagged(self) -> bool:
        """Is it large?"""
        return abs(self.difference) > max(LARGE, 2 * (self.noise or 0))

    def record(self) -> Record:
        """As its CSV holds it."""
        return {
            "model": self.block.model,
            "dataset": self.block.dataset,
            "probe": self.score.probe,
            "grid": self.block.grid,
            "ours": 100 * self.score.test.mean,
            "ours_sd": None if self.score.test.sd is None else 100 * self.score.test.sd,
            "seeds": self.score.test.n,
            "published": 100 * self.published,
            "difference": 100 * self.difference,
            "flagged": "yes" if self.flagged else "",
        }


@cache
def published() -> dict[tuple[str, str, str], float]:
    """{(model, data set, probe): balanced accuracy on test, as a fraction}."""
    text = resources.files(__package__).joinpath("paper_balanced_accuracy.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {(r["model"], r["dataset"], r["probe"]): float(r["balanced_accuracy"]) / 100 for r in rows}


def beside(held: Sequence[Block]) -> list[Beside]:
    """Every score of ours that was also published, made by the protocol as it is, in the order of the blocks."""
    known = published()
    return [
        Beside(block, score, known[key])
        for block in held
        if block.metric == METRIC and not block.options
        for score in block.scores
        if (key := (block.model, block.dataset, score.probe)) in known
    ]


def summed_up(found: Sequence[Beside]) -> str:
    """The comparison in a sentence or two; says plainly when there is nothing in common."""
    known = published()
    if not found:
        models, sets = (", ".join(dict.fromkeys(key[i] for key in known)) for i in (0, 1))
        return (
            f"No score is in common with the published ones ({SOURCE}): they are balanced accuracies "
            f"of {models} on {sets}, by the "
            "study's ten probes without options."
        )
    flagged = sum(one.flagged for one in found)
    mean, size = fmean(one.difference for one in found), fmean(abs(one.difference) for one in found)
    quick = any(one.block.grid != "paper" for one in found)
    of = [len({getattr(one.block, which) for one in found}) for which in ("model", "dataset")]
    return (
        f"{count(len(found))} {'score is' if len(found) == 1 else 'scores are'} in common with the "
        f"published ones ({SOURCE}; one "
        f"seed): {of[0]} {'model' if of[0] == 1 else 'models'}, {of[1]} data "
        f"{'set' if of[1] == 1 else 'sets'}. Ours are {points(mean)} points above theirs on "
        f"average, {percent(size)} apart; "
        f"{flagged or 'none'} {'is' if flagged == 1 else 'are'} flagged as apart by more than "
        f"{LARGE * 100:g} point and by more than "
        "twice what seeds make of it." + (" Rows of the quick grid are no fair comparison." if quick else "")
    )


def table(found: Sequence[Beside], most: int) -> RenderableType:
    """For the terminal: all where they are few, else those that are flagged, the largest differences first."""
    said = Text(summed_up(found))
    shown = list(found) if len(found) <= most else sorted((one for one in found if one.flagged), key=_size)[:most]
    if not shown:
        return said
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for head in ("model", "data set", "probe"):
        drawn.add_column(head, no_wrap=True)
    for head in ("ours, %", "published", "difference, points", ""):
        drawn.add_column(head, justify="right", no_wrap=True)
    for one in shown:
        ours = percent(one.score.test.mean) + (
            f" ± {percent(one.score.test.sd)}" if one.score.test.sd is not None else ""
        )
        flag = "flagged" if one.flagged else ""
        place = (one.block.model, one.block.dataset, one.score.probe)
        drawn.add_row(*place, ours, percent(one.published), points(one.difference), flag, style="bold" if flag else "")
    left = len(found) - len(shown)
    rest = [Text(f"{count(left)} more are in the page (--html) and in the CSV of --figures")] if left else []
    return Group(drawn, *rest, Text(), said)


def _size(one: Beside) -> float:
    return -abs(one.difference)


def figure(found: Sequence[Beside]) -> Figure | None:
    """Ours against theirs, a dot a score, one panel a model; None where there is nothing in common."""
    if not found:
        return None
    panels = []
    records = [one.record() for one in found]
    ends = [float(r[which] or 0) for r in records for which in ("ours", "published")]
    spec = _spec(min(ends), max(max(ends), min(ends) + 1))
    for model in dict.fromkeys(str(record["model"]) for record in records):
        panels.append(Panel(model, spec, [record for record in records if record["model"] == model], width=300))
    return Figure(
        "against-paper",
        "Ours beside the published scores",
        f"Balanced accuracy on test in percent; on the dashed line they are equal. Filled: flagged. "
        f"Published: {SOURCE}, one seed.",
        summed_up(found),
        panels,
        records,
    )


def _spec(low: float, high: float) -> dict[str, object]:
    alt = needs_altair()
    base = charted()
    scale = alt.Scale(domain=[low, high], zero=False, nice=False, padding=8)
    x = alt.X("published:Q", title="published, %", scale=scale, axis=alt.Axis(tickCount=5))
    y = alt.Y("ours:Q", title="ours, %", scale=scale, axis=alt.Axis(tickCount=5))
    tip = [
        alt.Tooltip("dataset:N", title="data set"),
        alt.Tooltip("probe:N"),
        alt.Tooltip("ours:Q", format=".2f"),
        alt.Tooltip("published:Q", format=".2f"),
        alt.Tooltip("difference:Q", title="difference, points", format="+.2f"),
        alt.Tooltip("seeds:Q"),
    ]
    even = base.transform_aggregate(n="count()").mark_rule(style="baseline")
    layers = [even.encode(x=alt.XDatum(low), x2=alt.X2Datum(high), y=alt.YDatum(low), y2=alt.Y2Datum(high))]
    for flagged, style in (("datum.flagged == ''", "hollow"), ("datum.flagged != ''", "dot")):
        dots = base.transform_filter(flagged).mark_point(style=style, filled=style == "dot")
        layers.append(dots.encode(x=x, y=y, tooltip=tip))
    return finished(alt.layer(*layers), 280)
