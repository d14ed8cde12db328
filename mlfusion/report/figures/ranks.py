"""Mean ranks of probes over data sets as a critical-difference diagram."""

from functools import lru_cache
from statistics import fmean
from typing import Any

from mlfusion.errors import BadData
from mlfusion.report.figures.drawing import Figure, Panel, Record, of_kind, require_altair, to_spec
from mlfusion.report.studies import Study
from mlfusion.statistics import Ranking, ranking

LINE = 22  # pixels from one probe to the next
BAR = 6  # pixels from one bar to the next


def ranks(study: Study) -> Figure | None:
    """A critical-difference diagram (Demšar 2006): mean ranks over data sets, those that do not differ joined by a bar.

    None for fewer than three probes or six data sets that have all of them.
    """
    probes = [probe for probe in study.probes if len(study.scores(probe)) == len(study.groups)]
    scores = {
        probe: [fmean(score.test.mean for score in study.scores(probe, dataset=name)) for name in study.datasets]
        for probe in probes
    }
    try:
        found = ranking(scores)
    except BadData:
        return None
    records, height = _records(found)
    over = f"{found.datasets} data sets" + (
        f" (means over {len(study.models)} models)" if len(study.models) > 1 else ""
    )
    return Figure(
        "ranks",
        "Mean ranks of the probes",
        f"Mean rank of each probe over {over}, 1 the best, with its mean score. Bars join probes whose ranks differ by less "
        f"than the critical difference of {found.critical_difference:.2f} (Nemenyi, {100 * (1 - found.level):.0f} %). The "
        f"hypothesis that all are equally good has p = {found.friedman:.2g} (Friedman).",
        "; ".join(str(record["text"]) for record in records),
        [Panel("", _spec(len(found.names), height), records, width=560)],
        [
            Record(probe=name, mean_rank=rank, test=100 * mean, data_sets=found.datasets)
            for name, rank, mean in zip(found.names, found.ranks, found.means, strict=True)
        ],
        columns=1,
        more_numbers={
            "pairs": [Record(a=p.a, b=p.b, nemenyi_p=p.nemenyi, wilcoxon_holm_p=p.holm) for p in found.pairs]
        },
    )


def _records(found: Ranking) -> tuple[list[Record], int]:
    """Probes and bars with their places from the top, and the height, in pixels."""
    top = 34 + BAR * max(0, len(found.groups) - 4)
    probes = [
        Record(
            what="probe",
            probe=name,
            rank=rank,
            test=100 * mean,
            at=top + LINE * i,
            text=f"{name}   {rank:.2f}   ({100 * mean:.1f} %)",
        )
        for i, (name, rank, mean) in enumerate(zip(found.names, found.ranks, found.means, strict=True))
    ]
    rank_of = dict(zip(found.names, found.ranks, strict=True))
    bars = [
        Record(
            what="group",
            rank=min(rank_of[name] for name in group),
            end=max(rank_of[name] for name in group),
            at=5 + BAR * i,
            text=", ".join(group),
        )
        for i, group in enumerate(found.groups)
    ]
    return [*probes, *bars], top + LINE * len(found.names)


@lru_cache(maxsize=64)
def _spec(probes: int, height: int) -> dict[str, Any]:
    alt = require_altair()
    y = alt.Y("at:Q", axis=None, scale=alt.Scale(domain=[0, height], range=[0, height], nice=False, zero=False))
    # Room at the right for the names of those that rank last.
    scale = alt.Scale(domain=[1, probes], nice=False, zero=False, padding=6)
    x = alt.X("rank:Q", title="mean rank", scale=scale, axis=alt.Axis(orient="top", tickMinStep=1, grid=False))
    probe, group = of_kind("probe"), of_kind("group")
    left, right = (f"datum.rank {test} {(probes + 1) / 2}" for test in ("<=", ">"))
    tooltip = [
        alt.Tooltip("probe:N"),
        alt.Tooltip("rank:Q", format=".2f"),
        alt.Tooltip("test:Q", title="score, %", format=".2f"),
    ]
    return to_spec(
        alt.layer(
            probe.mark_rule(style="guide").encode(x=x, y=y, y2=alt.Y2Datum(0)),
            group.mark_rule(style="bar", strokeCap="round").encode(
                x=x, x2="end:Q", y=y, tooltip=alt.Tooltip("text:N", title="no significant difference")
            ),
            probe.mark_point(style="dot", filled=True).encode(x=x, y=y, tooltip=tooltip),
            probe.transform_filter(left).mark_text(style="name", align="left", dx=9).encode(x=x, y=y, text="text:N"),
            probe.transform_filter(right).mark_text(style="name", align="right", dx=-9).encode(x=x, y=y, text="text:N"),
        ),
        height,
    )
