"""What a study found, as a page of text: absolute scores and gains, how sure they are, what they took, and by which command.

Every number of it is of the rows and of the arrays beside them.
"""

from collections.abc import Sequence
from statistics import fmean

from mlfusion.errors import BadData
from mlfusion.progress import duration
from mlfusion.report import blocks, tables
from mlfusion.report.summary import Study, count, percent, points, studies
from mlfusion.results import Results, Row
from mlfusion.specs import BASELINE, layer_ranges
from mlfusion.statistics.datasets import against
from mlfusion.statistics.rows import Comparison, by_dataset, compare_probes, cost

ASKED = ("cls+ap-all-layers/attentive", "cls+ap-all-layers/linear", "all-tokens-last/attentive")
"""Probes whose gain over the baseline is given case by case: ALF, all layers without attention, AAT."""


def markdown(rows: Sequence[Row], results: Results, *, title: str, about: str, command: str) -> str:
    """The page.

    Args:
        rows: of the study.
        results: whose arrays give the intervals.
        title: its heading.
        about: a sentence or two under it.
        command: that makes all of it.

    Raises:
        MlfusionError: there are no rows.
    """
    parts = [f"# {title}", about, _made(rows, command)]
    for study in studies(blocks(rows)):
        name = f" ({study.name})" if study.name else ""
        parts += [
            tables.markdown(tables.of_model(study, model)).strip().replace("### ", "## ", 1) for model in study.models
        ]
        mine = [row for block in study.blocks for row in block.rows]
        if told := _gains(mine, results):
            parts += [f"## How sure{name}", *told]
        parts += [f"## What it took{name}", _costs(study)]
    return "\n\n".join(parts) + "\n"


def _made(rows: Sequence[Row], command: str) -> str:
    """By what, from what."""
    datasets = {row.dataset: row for row in rows}
    listed = [
        f"| {name} | {count(row.images.train)} | {count(row.images.test)} | {len(row.classes)} |"
        for name, row in datasets.items()
    ]
    models = {row.model: row for row in rows}
    said = ", ".join(f"{name} ({row.depth} layers of width {row.width})" for name, row in models.items())
    seeds = layer_ranges(row.seed for row in rows)
    codes = ", ".join(dict.fromkeys(row.code for row in rows))
    dates = sorted(row.created[:10] for row in rows)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return "\n".join(
        [
            "```",
            command,
            "```",
            "",
            f"This page is written by that command. Its rows were made on {when} by mlfusion at {codes}. Models: {said}. Grid: "
            f"{', '.join(dict.fromkeys(row.grid for row in rows))}; seeds {seeds}.",
            "",
            "| data set | train images | test images | classes |",
            "|---|---:|---:|---:|",
            *listed,
        ]
    )


def _gains(rows: Sequence[Row], results: Results) -> list[str]:
    """Gains over the baseline with intervals over the test images, and over the data sets."""
    parts = []
    for probe in ASKED:
        try:
            compared = compare_probes(results, rows, probe, BASELINE)
        except BadData:  # this study does not have both
            continue
        parts.append(_cases(probe, compared))
    return parts + _over(rows)


def _cases(probe: str, compared: Sequence[Comparison]) -> str:
    lines = [
        f"`{probe}` against `{BASELINE}`: the interval of 95 % is over draws of the test images, the same for both (paired "
        "bootstrap of the mean over seeds), and so is p.",
        "",
        f"| model | data set | `{BASELINE}` | `{probe}` | gain, points | over seeds | over images | p |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in compared:
        sd = f"± {percent(one.gain.sd)}" if one.gain.sd is not None else ""
        drawn = one.images
        lines.append(
            f"| {one.model} | {one.dataset} | {percent(one.score_b.mean)} | {percent(one.score_a.mean)} | "
            f"{points(one.gain.mean)} | {sd} | "
            + (f"{points(drawn.low)} to {points(drawn.high)} | {_p(drawn.p)} |" if drawn else "| |")
        )
    sure = [one for one in compared if one.images and (one.images.low > 0 or one.images.high < 0)]
    up = sum(one.images.low > 0 for one in sure if one.images)
    mean, cases = fmean(one.gain.mean for one in compared), len(compared)
    lines += [
        "",
        f"On average {points(mean)} points over {cases} case{'s' * (cases > 1)}; the interval lies above 0 in {up} and below "
        f"it in {len(sure) - up}.",
    ]
    return "\n".join(lines)


def _over(rows: Sequence[Row]) -> list[str]:
    """One test a probe over the data sets of each model."""
    parts = []
    for model in dict.fromkeys(row.model for row in rows):
        scores = by_dataset(row for row in rows if row.model == model)
        base = scores.get(BASELINE, {})
        gains = {
            probe: [held[name] - base[name] for name in base]
            for probe, held in scores.items()
            if probe != BASELINE and held.keys() == base.keys()
        }
        if len(base) < 2 or not gains:
            continue
        tested = against(gains)
        if refused := next((one.refused for one in tested if one.refused), None):
            parts.append(f"Over the {len(base)} data sets of {model}: {refused}.")
        lines = [
            f"Over the {len(base)} data sets of {model}: mean gain over `{BASELINE}`; p of the one-sided Wilcoxon signed-rank "
            "test that it is above 0, as it is and adjusted for all of these by Benjamini and Hochberg.",
            "",
            "| probe | mean gain, points | p | adjusted |",
            "|---|---:|---:|---:|",
        ]
        lines += [
            f"| `{one.name}` | {points(one.mean)} | {_p(one.p)} | {_p(one.q)} |"
            for one in tested
            if one.p is not None and one.q is not None
        ]
        parts.append("\n".join(lines if len(lines) > 4 else []))
    return [part for part in parts if part]


def _costs(study: Study) -> str:
    lines = [
        "Of one probe, its grid and refit included; means over seeds and data sets. Times are the clock's, whatever else the "
        "machine was doing.",
        "",
        "| model | probe | parameters | time | tokens in the cache |",
        "|---|---|---:|---:|---:|",
    ]
    for model in study.models:
        for probe in study.probes:
            held = [score for name in study.datasets if (score := study.score(model, name, probe))]
            if not held:
                continue
            each = [cost(score.rows) for score in held]
            cached = [one.bytes for one in each if one.bytes is not None]
            size = f"{sum(cached) / 1e6:,.1f} MB" if len(cached) == len(each) else ""
            lines.append(
                f"| {model} | `{probe}` | {count(max(one.parameters for one in each))} | "
                f"{duration(fmean(one.seconds for one in each))} | {size} |"
            )
    rows = [row for block in study.blocks for row in block.rows]
    lines += ["", f"In all {len(rows):,} rows, {duration(sum(row.seconds for row in rows))} of probing."]
    return "\n".join(lines)


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
