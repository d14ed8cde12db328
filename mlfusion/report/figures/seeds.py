"""Variation over seeds, and training against test scores, data set by data set (figures A11, A15)."""

from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean
from typing import Any

from mlfusion.report.figures import charts
from mlfusion.report.figures.drawing import Figure, LegendEntry, Panel, Record
from mlfusion.report.figures.gains import COMPARED
from mlfusion.report.numbers import from_to, points
from mlfusion.report.studies import Study, domain
from mlfusion.report.summary import Score
from mlfusion.specs.names import BASELINE


def _shown(study: Study) -> list[str]:
    """The baseline and the three probes that the study compares with each other, else the first four probes."""
    named = [probe for probe in (BASELINE, *COMPARED) if probe in study.probes]
    return named if len(named) > 1 else list(study.probes[:4])


def seeds(study: Study) -> Figure | None:
    """Figure A15: the deviation over seeds of the test score, data set by data set; None without two seeds."""
    probes = _shown(study)
    records = [
        _deviation(dataset, probe, scores)
        for dataset in study.datasets
        for probe in probes
        if (scores := [score for score in study.scores(probe, dataset=dataset) if score.test.sd is not None])
    ]
    if not records:
        return None
    several = any(record.number("models") > 1 for record in records)
    datasets = tuple(dict.fromkeys(str(record["dataset"]) for record in records))
    return Figure(
        "seeds",
        "Variation over seeds",
        "Sample standard deviation over seeds of the test score, in points"
        + (": bars are means over models, ticks the model with the largest." if several else "."),
        "; ".join(f"{r['dataset']}, {r['probe']}: {r['sd']:.2f} points over {r['seeds']} seeds" for r in records),
        [Panel("", _bars(datasets, tuple(probes), several), records, width=620)],
        records,
        tuple(LegendEntry(probe, i, "box") for i, probe in enumerate(probes, 1)),
        columns=1,
        page_width="wide",
    )


def _deviation(dataset: str, probe: str, scores: Sequence[Score]) -> Record:
    deviations = [100 * score.test.sd for score in scores if score.test.sd is not None]
    return Record(
        dataset=dataset,
        probe=probe,
        sd=fmean(deviations),
        highest=max(deviations),
        test=100 * fmean(score.test.mean for score in scores),
        models=len(scores),
        seeds=from_to(score.test.n for score in scores),
    )


@lru_cache(maxsize=64)
def _bars(datasets: tuple[str, ...], probes: tuple[str, ...], ticks: bool) -> dict[str, Any]:
    alt, base = charts.base_chart()
    y, offset = charts.dataset_rows(datasets, 0.3), alt.YOffset("probe:N", sort=list(probes))
    title = "standard deviation over seeds, points"
    x = alt.X("sd:Q", title=title, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=6))
    colour, _ = charts.series_channels("probe", probes)
    deviations = [("sd:Q", "mean deviation", ".3f"), ("highest:Q", "largest", ".3f")]
    score = ("test:Q", "score, %", ".2f")
    tooltip = charts.tooltip(("dataset:N", "data set"), "probe:N", *deviations, score, "models:Q", "seeds:N")
    layers = [base.mark_bar().encode(x=x, y=y, yOffset=offset, color=colour, tooltip=tooltip)]
    if ticks:
        tick = base.mark_tick(style="median")
        layers.append(tick.encode(x="highest:Q", y=y, yOffset=offset, color=colour, tooltip=tooltip))
    return charts.to_spec(alt.layer(*layers), max(60, len(datasets) * (9 * len(probes) + 8)))


def train_test(study: Study) -> Figure | None:
    """Figure A11: train and test score of each data set joined by a line, one panel per probe."""
    probes = _shown(study)
    by_probe = {probe: _train_records(study, probe) for probe in probes}
    records = [record for probe_records in by_probe.values() for record in probe_records]
    if not records:
        return None
    low = min(95, *(record.number("test") for record in records))
    panels = []
    for probe, probe_records in by_probe.items():
        datasets = tuple(str(record["dataset"]) for record in probe_records)
        panels.append(Panel(probe, _lines(datasets, tuple(probes), study.metric, low), probe_records, width=330))
    return Figure(
        "train-test",
        "Training and test scores",
        "Hollow: score on the training images, filled: on the test images; means over models and seeds. A long line shows "
        "overfitting.",
        "; ".join(f"{r['dataset']}, {r['probe']}: train {r['train']:.1f} %, test {r['test']:.1f} %" for r in records),
        panels,
        records,
        (LegendEntry("train", 0, "hollow"), LegendEntry("test", 0, "circle")),
        columns=4,
        page_width="narrow",
    )


def _train_records(study: Study, probe: str) -> list[Record]:
    records = []
    for dataset in study.datasets:
        if scores := study.scores(probe, dataset=dataset):
            train, test = fmean(score.train.mean for score in scores), fmean(score.test.mean for score in scores)
            place = Record(dataset=dataset, domain=domain(dataset), probe=probe, models=len(scores))
            records.append(place.extended(train=100 * train, test=100 * test, gap=points(train - test)))
    return records


@lru_cache(maxsize=64)
def _lines(datasets: tuple[str, ...], probes: tuple[str, ...], metric: str, low: float) -> dict[str, Any]:
    alt, base = charts.base_chart()
    y = charts.dataset_rows(datasets)
    scale = alt.Scale(domain=[low, 100], zero=False, nice=True, padding=8)
    x = alt.X("test:Q", title=f"{metric}, %", scale=scale, axis=alt.Axis(tickCount=5, grid=False))
    colour, _ = charts.series_channels("probe", probes)
    scores = [("train:Q", "train, %", ".2f"), ("test:Q", "test, %", ".2f"), ("gap:N", "train over test, points")]
    tooltip = charts.tooltip(("dataset:N", "data set"), *scores, "models:Q")
    layers = [
        base.mark_rule(style="stem").encode(x=x, x2="train:Q", y=y, color=colour),
        base.mark_point(style="hollow").encode(x="train:Q", y=y, color=colour, tooltip=tooltip),
        base.mark_point(style="dot", filled=True).encode(x=x, y=y, color=colour, tooltip=tooltip),
    ]
    return charts.to_spec(alt.layer(*layers), max(50, 24 * len(datasets)))
