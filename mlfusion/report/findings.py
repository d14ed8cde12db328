"""A study's results as a page of text: absolute scores and gains, their uncertainty, their cost, and the command for them.

Every number comes from the rows and from the arrays beside them.
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from statistics import fmean

from mlfusion.errors import BadData
from mlfusion.report import tables
from mlfusion.report.files import write_whole
from mlfusion.report.numbers import between, count, enumerated, p_value, percent, plus_minus, points
from mlfusion.report.sentences import protocol_notes, rare_notes
from mlfusion.report.studies import Study, studies
from mlfusion.report.summary import ALF, ComparisonGroup, code_versions, comparison_groups, metric_name
from mlfusion.results import Results, Row, chosen_on
from mlfusion.specs.names import BASELINE, layer_ranges
from mlfusion.statistics.datasets import gain_tests
from mlfusion.statistics.rows import Comparison, by_dataset, compare_probes, cost
from mlfusion.statistics.verdicts import NOT_TOLD, WORDS
from mlfusion.system.progress import duration
from mlfusion.system.text import markdown, one_line
from mlfusion.system.words import plural

COMPARED_PROBES = (ALF, "cls+ap-all-layers/linear", "all-tokens-last/attentive")
"""Probes whose gain over the baseline is given case by case: ALF, all layers without attention, AAT."""


def write_findings(
    rows: Sequence[Row], path: Path | str, *, results: Results, title: str, about: str, command: str
) -> Path:
    """Write the page of text as Markdown, whole or not at all; returns its path.

    Args:
        rows: rows of the study.
        results: the results of the rows; their arrays give the intervals.
        title: heading of the page.
        about: a sentence or two under the heading.
        command: the command that reproduces the page.

    Raises:
        MlfusionError: there are no rows, or the file cannot be written there.
    """
    return write_whole(Path(path), page_text(rows, results, title=title, about=about, command=command))


def page_text(rows: Sequence[Row], results: Results, *, title: str, about: str, command: str) -> str:
    """The text that `write_findings` writes; names of rows are escaped, title, `about` and command are the user's own.

    Of those, too, control characters are.
    """
    rows = [row.renamed(markdown) for row in rows]
    groups = comparison_groups(rows, results)
    notes = [*rare_notes(groups), *protocol_notes(groups)]
    parts = [f"# {one_line(title)}", one_line(about), f"```\n{one_line(command)}\n```", _provenance(groups), *notes]
    for study in studies(groups):
        name = f" ({study.name})" if study.name else ""
        texts = [tables.markdown(tables.of_model(study, model)) for model in study.models if study.probes]
        parts += [text.strip().replace("### ", "## ", 1) for text in texts]
        if uncertainty := [*_cases(study, results), *_tests(study)]:
            parts += [f"## Uncertainty{name}", *uncertainty]
        parts += [f"## Cost{name}", _costs(study)]
    return "\n\n".join(parts) + "\n"


def _provenance(groups: Sequence[ComparisonGroup]) -> str:
    """The models, data sets, dates and code versions of the results."""
    datasets = {group.dataset: group.first for group in groups}
    models = {group.model: group.first for group in groups}
    architectures = ", ".join(f"{name} ({one.depth} layers of width {one.width})" for name, one in models.items())
    seeds = layer_ranges(seed for group in groups for seed in group.seeds)
    dates = sorted(row.created[:10] for group in groups for row in group.rows)
    dates_text = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    chosen = {
        name: chosen_on(row for group in groups if group.dataset == name for row in group.rows) for name in datasets
    }
    sizes = [
        (name, chosen[name], count(one.images.train), count(one.images.test), str(len(one.classes)))
        for name, one in datasets.items()
    ]
    return _with_table(
        f"This command writes this page. Its rows were computed on {dates_text} by mlfusion at "
        f"{', '.join(code_versions(groups))}. Models: {architectures}. Grid: "
        f"{', '.join(dict.fromkeys(group.grid for group in groups))}; seeds {seeds}.",
        tables.markdown_lines(["data set", "chosen on", "train images", "test images", "classes"], sizes, texts=2),
    )


def _with_table(text: str, lines: Sequence[str], *after: str) -> str:
    """A sentence, the table under it, and further paragraphs."""
    return "\n\n".join([text, "\n".join(lines), *after])


def _cases(study: Study, results: Results) -> list[str]:
    """Gains over the baseline with intervals over the test images, one table per probe."""
    rows = [row for group in study.groups for row in group.rows]
    parts = []
    for probe in COMPARED_PROBES:
        with suppress(BadData):  # this study does not have both
            parts.append(_case_table(probe, compare_probes(results, rows, probe, BASELINE)))
    return parts


def _case_table(probe: str, cases: Sequence[Comparison]) -> str:
    heads = [
        "model",
        "data set",
        f"`{BASELINE}`",
        f"`{probe}`",
        "gain, points",
        "over seeds",
        "over images",
        "p",
        "verdict",
    ]
    lines = []
    for one in cases:
        images, gain = one.images, plus_minus(one.gain.sd).strip()
        interval = f"{between(images.low, images.high)} | {_tested(one)}" if images else "|"
        scores = percent(one.score_b.mean), percent(one.score_a.mean)
        lines.append((one.model, one.dataset, *scores, points(one.gain.mean), gain, interval, one.verdict.word))
    words = [one.verdict.word for one in cases]
    counted = enumerated([f"{word} in {words.count(word)}" for word in WORDS.values() if word in words])
    reasons = [f"{one.model} on {one.dataset}: {one.verdict.reason}." for one in cases if one.verdict.reason]
    return _with_table(
        f"`{probe}` against `{BASELINE}`: 95 % interval of the mean over seeds, from a bootstrap that draws the same test "
        f"images for both, and mid-p value of the {metric_name(cases[0].metric)} from swaps of their answers. The verdict "
        "follows from p.",
        tables.markdown_lines(heads, lines, texts=2),
        f"On average {points(fmean(one.gain.mean for one in cases))} points over {plural(len(cases), 'case', 'cases')}: "
        f"{counted}.",
        *reasons,
    )


def _tested(one: Comparison) -> str:
    """The p-value that the verdict follows from; 'none' where nothing can be told."""
    return "none" if one.verdict.p is None or one.verdict.word == NOT_TOLD else p_value(one.verdict.p)


def _tests(study: Study) -> list[str]:
    """One test per probe over the data sets of each model."""
    parts = []
    for model in study.models:
        scores = by_dataset(row for group in study.select(model=model) for row in group.rows)
        base = scores.pop(BASELINE, {})
        gains = {
            probe: [means[name] - base[name] for name in base]
            for probe, means in scores.items()
            if means.keys() == base.keys()
        }
        if len(base) < 2 or not gains:
            continue
        tests = gain_tests(gains)
        place = f"Over the {len(base)} data sets of {model}"
        if refused := next((one.refused for one in tests if one.refused), None):
            parts.append(f"{place}: {refused}.")
        lines = [
            (f"`{one.name}`", points(one.mean), p_value(one.p), p_value(one.q))
            for one in tests
            if one.p is not None and one.q is not None
        ]
        text = (
            f"{place}: mean gain over `{BASELINE}`; p of the one-sided Wilcoxon signed-rank test that the gain is above 0, and "
            "p adjusted over these probes by Benjamini and Hochberg."
        )
        if lines:
            parts.append(
                _with_table(text, tables.markdown_lines(["probe", "mean gain, points", "p", "adjusted"], lines))
            )
    return parts


def _costs(study: Study) -> str:
    lines = []
    for model, probe in product(study.models, study.probes):
        if costs := [cost(score.rows) for score in study.scores(probe, model=model)]:
            parameters = count(max(one.parameters for one in costs))
            time, size = duration(fmean(one.seconds for one in costs)), sum(one.bytes for one in costs)
            lines.append((model, f"`{probe}`", parameters, time, f"{size / 1e6:,.1f} MB"))
    rows, seconds = sum(len(group.rows) for group in study.groups), sum(group.seconds for group in study.groups)
    return _with_table(
        "Cost of one probe, with its grid and refit; means over seeds and data sets. Times are wall-clock times, which include "
        "other load on the machine.",
        tables.markdown_lines(["model", "probe", "parameters", "time", "tokens in the cache"], lines, texts=2),
        f"{rows:,} rows in total, {duration(seconds)} of probing.",
    )
