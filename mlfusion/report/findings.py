"""A study's results as a page of text: absolute scores and gains, their uncertainty, their cost, and the command for them.

Every number comes from the rows and from the arrays beside them.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from mlfusion.errors import BadData
from mlfusion.report import tables
from mlfusion.report.files import write_whole
from mlfusion.report.numbers import count, p_value, percent, plural, plus_minus, points
from mlfusion.report.studies import Study, studies
from mlfusion.report.summary import ALF, ComparisonGroup, code_versions, comparison_groups
from mlfusion.results import Results, Row
from mlfusion.specs.names import BASELINE, layer_ranges
from mlfusion.statistics.datasets import Against, against
from mlfusion.statistics.rows import Comparison, by_dataset, compare_probes, cost
from mlfusion.system.progress import duration

PROBES = (ALF, "cls+ap-all-layers/linear", "all-tokens-last/attentive")
"""Probes whose gain over the baseline is given case by case: ALF, all layers without attention, AAT."""


def write_findings(
    rows: Sequence[Row], path: Path | str, *, results: Results, title: str, about: str, command: str
) -> Path:
    """Write the page of text as Markdown, whole or not at all; returns its path.

    Args:
        rows: rows of the study.
        path: the file.
        results: where the rows come from; their arrays give the intervals.
        title: heading of the page.
        about: a sentence or two under the heading.
        command: the command that makes all of it.

    Raises:
        MlfusionError: there are no rows, or the file cannot be written there.
    """
    return write_whole(Path(path), page_text(rows, results, title=title, about=about, command=command))


def page_text(rows: Sequence[Row], results: Results, *, title: str, about: str, command: str) -> str:
    """What `write_findings` writes."""
    groups = comparison_groups(rows)
    parts = [f"# {title}", about, _made(groups, command)]
    for study in studies(groups):
        name = f" ({study.name})" if study.name else ""
        parts += [
            tables.markdown(tables.of_model(study, model)).strip().replace("### ", "## ", 1) for model in study.models
        ]
        if uncertainty := [*_cases(study, results), *_tests(study)]:
            parts += [f"## Uncertainty of the gains{name}", *uncertainty]
        parts += [f"## Cost{name}", _costs(study)]
    return "\n\n".join(parts) + "\n"


def _made(groups: Sequence[ComparisonGroup], command: str) -> str:
    """The command, the models and the data sets that the results come from."""
    datasets = {group.dataset: group for group in groups}
    models = {group.model: group for group in groups}
    architectures = ", ".join(
        f"{name} ({one.first.depth} layers of width {one.first.width})" for name, one in models.items()
    )
    seeds = layer_ranges(seed for group in groups for seed in group.seeds)
    dates = sorted(row.created[:10] for group in groups for row in group.rows)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    lines = [
        "```",
        command,
        "```",
        "",
        f"This page is written by that command. Its rows were made on {when} by mlfusion at "
        f"{', '.join(code_versions(groups))}. Models: {architectures}. Grid: "
        f"{', '.join(dict.fromkeys(group.grid for group in groups))}; seeds {seeds}.",
        "",
        "| data set | train images | test images | classes |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {count(one.first.images.train)} | {count(one.first.images.test)} | {len(one.first.classes)} |"
        for name, one in datasets.items()
    ]
    return "\n".join(lines)


# --- uncertainty -----------------------------------------------------------------------------------------------------


def _cases(study: Study, results: Results) -> list[str]:
    """Gains over the baseline with intervals over the test images, a table a probe."""
    rows = [row for group in study.groups for row in group.rows]
    parts = []
    for probe in PROBES:
        try:
            compared = compare_probes(results, rows, probe, BASELINE)
        except BadData:  # this study does not have both
            continue
        parts.append(_case_table(probe, compared))
    return parts


def _case_table(probe: str, compared: Sequence[Comparison]) -> str:
    lines = [
        f"`{probe}` against `{BASELINE}`: the 95 % interval and p are over draws of the test images, the same for both (paired "
        "bootstrap of the mean over seeds).",
        "",
        f"| model | data set | `{BASELINE}` | `{probe}` | gain, points | over seeds | over images | p |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in compared:
        images = one.images
        interval = f"{points(images.low)} to {points(images.high)} | {p_value(images.p)} |" if images else "| |"
        lines.append(
            f"| {one.model} | {one.dataset} | {percent(one.score_b.mean)} | {percent(one.score_a.mean)} | "
            f"{points(one.gain.mean)} | {plus_minus(one.gain.sd).strip()} | {interval}"
        )
    above = sum(one.images.low > 0 for one in compared if one.images)
    below = sum(one.images.high < 0 for one in compared if one.images)
    lines += [
        "",
        f"On average {points(fmean(one.gain.mean for one in compared))} points over {plural(len(compared), 'case', 'cases')}; "
        f"the interval lies above 0 in {above} and below it in {below}.",
    ]
    return "\n".join(lines)


def _tests(study: Study) -> list[str]:
    """One test a probe over the data sets of each model."""
    parts = []
    for model in study.models:
        scores = by_dataset(row for group in study.select(model=model) for row in group.rows)
        base = scores.get(BASELINE, {})
        gains = {
            probe: [held[name] - base[name] for name in base]
            for probe, held in scores.items()
            if probe != BASELINE and held.keys() == base.keys()
        }
        if len(base) < 2 or not gains:
            continue
        tested = against(gains)
        place = f"Over the {len(base)} data sets of {model}"
        if refused := next((one.refused for one in tested if one.refused), None):
            parts.append(f"{place}: {refused}.")
        if lines := [_test_line(one) for one in tested if one.p is not None and one.q is not None]:
            parts.append("\n".join([_tests_head(place), *lines]))
    return parts


def _tests_head(place: str) -> str:
    return "\n".join(
        [
            f"{place}: mean gain over `{BASELINE}`; p of the one-sided Wilcoxon signed-rank test that it is above 0, "
            "unadjusted and adjusted for all of these by Benjamini and Hochberg.",
            "",
            "| probe | mean gain, points | p | adjusted |",
            "|---|---:|---:|---:|",
        ]
    )


def _test_line(one: Against) -> str:
    p, q = (p_value(value) if value is not None else "" for value in (one.p, one.q))
    return f"| `{one.name}` | {points(one.mean)} | {p} | {q} |"


# --- cost ------------------------------------------------------------------------------------------------------------


def _costs(study: Study) -> str:
    lines = [
        "Cost of one probe with its grid and refit, mean over seeds and data sets. Times are wall-clock times, whatever else "
        "the machine was doing.",
        "",
        "| model | probe | parameters | time | tokens in the cache |",
        "|---|---|---:|---:|---:|",
    ]
    for model in study.models:
        for probe in study.probes:
            each = [cost(score.rows) for score in study.scores(probe, model=model)]
            if not each:
                continue
            lines.append(
                f"| {model} | `{probe}` | {count(max(one.parameters for one in each))} | "
                f"{duration(fmean(one.seconds for one in each))} | {sum(one.bytes for one in each) / 1e6:,.1f} MB |"
            )
    rows, seconds = sum(len(group.rows) for group in study.groups), sum(group.seconds for group in study.groups)
    lines += ["", f"In all {rows:,} rows, {duration(seconds)} of probing."]
    return "\n".join(lines)
