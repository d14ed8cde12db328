"""Scores and gains of one model as a heat map of data sets and probes (figure A4)."""

from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean
from typing import Any

from mlfusion.report.figures import charts
from mlfusion.report.figures.drawing import Figure, Panel, Record
from mlfusion.report.numbers import capitalized, percent, points
from mlfusion.report.studies import Study
from mlfusion.report.summary import ComparisonGroup, Score, mean_gain
from mlfusion.specs.names import BASELINE


def score_map(groups: Sequence[ComparisonGroup]) -> Figure | None:
    """Data sets × probes of one model, coloured by the gain; score and gain in every cell, their means below."""
    study = Study("", tuple(groups))
    records = [
        _cell(group.dataset, probe, [score], score.test.n)
        for group in groups
        for probe in study.probes
        if (score := study.score(group, probe))
    ]
    if not records:
        return None
    model, metric = groups[0].model, study.metric
    if len(study.datasets) > 1:
        for probe in study.probes:
            scores = study.scores(probe)
            if len(scores) == len(groups):  # means over different data sets are not comparable
                records.append(_cell(f"mean of {len(groups)}", probe, scores, None))
    datasets = tuple(dict.fromkeys(str(record["dataset"]) for record in records))
    top = max([1.0, *(abs(record.number("gain")) for record in records if record["gain"] is not None)])
    return Figure(
        "scores",
        f"Scores and gains of {model}",
        f"{capitalized(metric)} on test in percent; below it the gain in points over {BASELINE}, which colours the "
        "cell; means over seeds.",
        "; ".join(f"{r['dataset']}, {r['probe']}: {r['shown']} % {r['gained']}" for r in records),
        [Panel("", _spec(datasets, study.probes, top), records, width=max(300, 92 * len(study.probes)))],
        [record.without("shown", "gained") for record in records],
        columns=1,
    )


def _cell(dataset: str, probe: str, scores: Sequence[Score], seeds: int | None) -> Record:
    test, gain = fmean(score.test.mean for score in scores), mean_gain(scores)
    shown, gained = percent(test), "" if gain is None else points(gain)
    place = Record(dataset=dataset, probe=probe, test=100 * test, gain=None if gain is None else 100 * gain)
    return place.extended(shown=shown, gained=gained, seeds=seeds)


@lru_cache(maxsize=64)
def _spec(datasets: tuple[str, ...], probes: tuple[str, ...], top: float) -> dict[str, Any]:
    alt, base = charts.base_chart()
    above = {"orient": "top", "labelAngle": 0, "labelFontSize": 10, "labelLimit": 110, "labelPadding": 18}
    lines = "[split(datum.label, '/')[0], split(datum.label, '/')[1]]"
    axis = alt.Axis(**above, labelExpr=lines, domain=False, ticks=False)
    x = alt.X("probe:N", sort=list(probes), title=None, scale=alt.Scale(paddingInner=0.03), axis=axis)
    y = charts.dataset_rows(datasets, 0.06)
    scale = alt.Scale(domain=[-top, 0, top], range="diverging", interpolate="rgb")
    legend = alt.Legend(orient="bottom", gradientLength=200, tickCount=5)
    colour = alt.Color("gain:Q", scale=scale, title="gain, points", legend=legend)
    numbers = [("test:Q", "test, %", ".2f"), ("gain:Q", "gain, points", "+.2f")]
    tooltip = charts.tooltip(("dataset:N", "data set"), "probe:N", *numbers, "seeds:Q")
    layers = [
        base.mark_rect(style="heat").encode(x=x, y=y, color=colour, tooltip=tooltip),
        base.mark_text(style="value", dy=-6).encode(x=x, y=y, text="shown:N"),
        base.mark_text(style="on-weak", dy=8).encode(x=x, y=y, text="gained:N"),
    ]
    return charts.to_spec(alt.layer(*layers), 34 * len(datasets))
