"""Test score per probe, one panel for each model on a data set."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mlfusion.report.figures import charts
from mlfusion.report.figures.drawing import Figure, LegendEntry, Panel, Record, extent, series_legend
from mlfusion.report.numbers import enumerated, mean_sd, percent, points
from mlfusion.report.summary import MARKS, ComparisonGroup, Score, head_of, heads_of, metric_name, score_word
from mlfusion.specs.names import BASELINE


def accuracy(groups: Sequence[ComparisonGroup]) -> Figure | None:
    """Each probe's test score as a dot on a line of its own, with its gain from the baseline and ± one deviation."""
    pairs = [(group, accuracy_records(group)) for group in groups if group.probes]
    if not pairs:
        return None
    # Models on the same images share a scale.
    shared = len({(group.dataset, group.metric) for group, _ in pairs}) == 1
    all_records = [record for _, records in pairs for record in records]
    present = {str(record["head"]) for record in all_records}
    heads = heads_of(str(record["probe"]) for record in all_records)
    panels = []
    for group, records in pairs:
        scaled = all_records if shared else records
        limits = extent(record.number(end) for record in scaled for end in ("low", "high"))
        probes, axis = tuple(score.probe for score in group.probes), f"{metric_name(group.metric)} on test, %"
        panels.append(Panel(group.name, _spec(probes, heads, axis, limits, group.baseline is not None), records))
    described = [
        f"{group.name}: " + "; ".join(f"{r['probe']} {r['scored']}, {r['gained']}" for r in records)
        for group, records in pairs
    ]
    return Figure(
        "accuracy",
        f"{score_word(group for group, _ in pairs)} per probe",
        f"A dot is the mean over seeds; its bar is ± one standard deviation. The dashed line is {BASELINE}. At the right: "
        "score (gain in points).",
        f"{metric_name(pairs[0][0].metric)} per probe. {' '.join(described)}",
        panels,
        [numbers_of(group, record) for group, records in pairs for record in records],
        [*series_legend(heads, present), LegendEntry(BASELINE, 0, "dashed"), LegendEntry("± over seeds", 1, "line")],
        columns=2,
    )


def accuracy_records(group: ComparisonGroup) -> list[Record]:
    """One record per probe: test score with the ends of its bar, gain, and the texts of label and tooltip."""
    return [
        score_record(score).extended(
            head=head_of(score.probe),
            baseline=100 * group.baseline.test.mean if group.baseline else None,
            gain=100 * score.gain.mean if score.gain else None,
            label=_label(score),
            validated=mean_sd(score.val) + " %",
            parameters=score.parameters,
            **{f"other_{field}": "yes" if field in score.other else "" for field in MARKS},
        )
        for score in group.probes
    ]


def score_record(score: Score) -> Record:
    """A test score in percent with the ends of its bar, and the texts of its tooltip."""
    deviation = score.test.sd or 0
    return Record(
        probe=score.probe,
        test=100 * score.test.mean,
        low=100 * (score.test.mean - deviation),
        high=100 * (score.test.mean + deviation),
        scored=mean_sd(score.test) + " %",
        gained=_gain_text(score),
        seeds=enumerated([str(seed) for seed in score.seeds]),
    )


def numbers_of(group: ComparisonGroup, record: Record) -> Record:
    """A record for the CSV: with model and data set, without the texts made from its numbers."""
    return Record(Record(model=group.model, dataset=group.dataset), **record.without("scored", "gained", "validated"))


def _gain_text(score: Score) -> str:
    if score.is_baseline:
        return "the baseline"
    return mean_sd(score.gain, points) + " points" if score.gain else "no baseline to compare with"


def _label(score: Score) -> str:
    if score.is_baseline or score.gain is None:
        return percent(score.test.mean)
    return f"{percent(score.test.mean)}  ({points(score.gain.mean)})"


@lru_cache(maxsize=1024)
def _spec(
    probes: tuple[str, ...], heads: tuple[str, ...], axis: str, limits: tuple[float, float], baseline: bool
) -> dict[str, Any]:
    alt, base = charts.base_chart()

    def row(at: float) -> Any:
        return alt.Y("probe:N", sort=list(probes), axis=None, bandPosition=at, scale=alt.Scale(paddingInner=0.1))

    score = alt.X("test:Q", title=axis, scale=charts.exact_scale(limits, 14), axis=alt.Axis(tickCount=5, grid=False))
    colour, shape = charts.series_channels("head", heads)
    texts = [("scored:N", "test"), ("gained:N", "gain"), ("validated:N", "validation")]
    tooltip = charts.tooltip("probe:N", *texts, "seeds:N", ("parameters:Q", "", ","))
    layers = [base.mark_rule(style="guide").encode(x=alt.value(0), x2=alt.value("width"), y=row(0.68))]
    if baseline:
        # One segment per row, so that the line does not cross the names above.
        segment = alt.Y2("probe:N", bandPosition=0.86)
        layers.append(base.mark_rule(style="baseline").encode(x="baseline:Q", y=row(0.52), y2=segment))
        layers.append(base.mark_rule(style="stem").encode(x=score, x2="baseline:Q", y=row(0.68), color=colour))
    dot = base.mark_point(style="dot", filled=True)
    layers += [
        base.mark_rule(style="bar").encode(x=alt.X("low:Q"), x2="high:Q", y=row(0.68), color=colour),
        dot.encode(x=score, y=row(0.68), color=colour, shape=shape, tooltip=tooltip),
        base.mark_text(style="name", align="left").encode(x=alt.value(0), y=row(0.25), text="probe:N"),
        base.mark_text(style="value", align="right").encode(x=alt.value("width"), y=row(0.25), text="label:N"),
    ]
    return charts.to_spec(alt.layer(*layers), 42 * len(probes))
