"""Mean ranks of probes over data sets as a critical-difference diagram."""

from functools import lru_cache
from statistics import fmean
from typing import Any

from mlfusion.errors import BadData
from mlfusion.report.figures import charts
from mlfusion.report.figures.drawing import Figure, Panel, Record
from mlfusion.report.numbers import enumerated
from mlfusion.report.studies import Study
from mlfusion.specs.names import BASELINE
from mlfusion.statistics import Ranking, fair_table, ranking

LINE = 22  # pixels from one probe to the next
BAR = 6  # pixels from one bar to the next


def ranks(study: Study) -> Figure | None:
    """A critical-difference diagram (Demšar 2006): mean ranks over data sets, those that do not differ joined by a bar.

    The probes and data sets are those of the largest table without a gap. It is None for fewer than three probes, or fewer
    than six data sets.
    """
    means = {
        probe: {
            name: fmean(score.test.mean for score in scores)
            for name in study.datasets
            if len(scores := study.scores(probe, dataset=name)) == len(study.select(dataset=name))
        }
        for probe in study.probes
    }
    table = fair_table(means, baseline=BASELINE)
    try:
        result = ranking(table.scores)
    except BadData:
        return None
    left_out = enumerated([*table.probes_left_out, *table.datasets_left_out])
    records, height = _records(result)
    models = f" (means over {len(study.models)} models)" if len(study.models) > 1 else ""
    return Figure(
        "ranks",
        "Mean ranks of the probes",
        f"Mean rank of each probe over {result.datasets} data sets{models}, 1 the best, with its mean score. Bars join probes "
        f"whose ranks differ by less than the critical difference of {result.critical_difference:.2f} (Nemenyi, "
        f"{100 * (1 - result.level):.0f} %). "
        + _friedman(result)
        + f" Left out for want of scores: {left_out}." * bool(left_out),
        "; ".join(str(record["text"]) for record in records),
        [Panel("", _spec(len(result.names), height), records, width=560)],
        [
            Record(probe=name, mean_rank=rank, test=100 * mean, data_sets=result.datasets)
            for name, rank, mean in zip(result.names, result.ranks, result.means, strict=True)
        ],
        columns=1,
        more_numbers={
            "pairs": [Record(a=p.a, b=p.b, nemenyi_p=p.nemenyi, wilcoxon_holm_p=p.holm) for p in result.pairs]
        },
    )


def _friedman(result: Ranking) -> str:
    if result.friedman is None:
        return "All are equal on every data set."
    return f"The hypothesis that all are equally good has p = {result.friedman:.2g} (Friedman)."


def _records(result: Ranking) -> tuple[list[Record], int]:
    """Probes and bars with their places from the top, and the height, in pixels."""
    top = 34 + BAR * max(0, len(result.groups) - 4)
    rank_of = dict(zip(result.names, result.ranks, strict=True))
    probes = []
    for i, (name, mean) in enumerate(zip(result.names, result.means, strict=True)):
        text = f"{name}   {rank_of[name]:.2f}   ({100 * mean:.1f} %)"
        at = top + LINE * i
        probes.append(Record(what="probe", probe=name, rank=rank_of[name], test=100 * mean, at=at, text=text))
    bars = []
    for i, group in enumerate(result.groups):
        group_ranks = [rank_of[name] for name in group]
        bars.append(
            Record(what="group", rank=min(group_ranks), end=max(group_ranks), at=5 + BAR * i, text=", ".join(group))
        )
    return [*probes, *bars], top + LINE * len(result.names)


@lru_cache(maxsize=64)
def _spec(probes: int, height: int) -> dict[str, Any]:
    alt = charts.require_altair()
    y = alt.Y("at:Q", axis=None, scale=charts.pixel_scale(height))
    axis = alt.Axis(orient="top", tickMinStep=1, grid=False)
    x = alt.X("rank:Q", title="mean rank", scale=charts.exact_scale((1, probes), 6), axis=axis)
    probe, group = charts.of_kind("probe"), charts.of_kind("group")
    left, right = (probe.transform_filter(f"datum.rank {test} {(probes + 1) / 2}") for test in ("<=", ">"))
    joined = alt.Tooltip("text:N", title="no significant difference")
    tooltip = charts.tooltip("probe:N", ("rank:Q", "", ".2f"), ("test:Q", "score, %", ".2f"))
    layers = [
        probe.mark_rule(style="guide").encode(x=x, y=y, y2=alt.Y2Datum(0)),
        group.mark_rule(style="bar", strokeCap="round").encode(x=x, x2="end:Q", y=y, tooltip=joined),
        probe.mark_point(style="dot", filled=True).encode(x=x, y=y, tooltip=tooltip),
        left.mark_text(style="name", align="left", dx=9).encode(x=x, y=y, text="text:N"),
        right.mark_text(style="name", align="right", dx=-9).encode(x=x, y=y, text="text:N"),
    ]
    return charts.to_spec(alt.layer(*layers), height)
