"""The report as tables for the terminal, or as Markdown for a page of text, so that an answer needs no browser."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlfusion.report.numbers import count, mean_sd, percent, points, short_count
from mlfusion.report.sentences import answer, opening, protocol_notes, rare_notes, replaced_notes
from mlfusion.report.studies import Study, studies
from mlfusion.report.summary import (
    ComparisonGroup,
    Score,
    all_marks,
    comparison_groups,
    footnotes,
    mean_gain,
    metric_name,
)
from mlfusion.report.tables import markdown_lines, seed_counts
from mlfusion.results import Results, Row, chosen_on
from mlfusion.system import text
from mlfusion.system.progress import duration
from mlfusion.system.words import plural

COLUMNS = ("test", "gain, points", "val", "param.", "time", "n")

MAX_DATASETS = 2
"""With more data sets than this, each model gets one table with a column per data set."""


def table(
    rows: Sequence[Row], *, results: Results | None = None, width: int = 100, long: bool = False
) -> RenderableType:
    """A table for each model and data set, with a sentence that answers the question, for `rich.Console.print`.

    With more than two data sets, each model has one table instead: a line per probe, a column per data set. Several models on
    one data set are the columns of one table.

    Args:
        rows: rows of any models and data sets.
        results: the results of the rows; by their arrays a gain is told from chance.
        width: characters per line.
        long: one table for each model and data set, whatever their number.

    Raises:
        MlfusionError: there are no rows.
    """
    groups = comparison_groups(rows, results)
    all_studies = studies(groups)
    parts: list[RenderableType] = []
    by_model = all(len(study.datasets) == 1 and len(study.models) > 1 for study in all_studies)
    if long or (not by_model and all(len(study.datasets) <= MAX_DATASETS for study in all_studies)):
        for group in groups:
            parts += [_table(group), *_footnote(group.scores), Text(answer(group)), Text()]
        notes = [*rare_notes(groups), *protocol_notes(groups), *replaced_notes(rows)]
        return Group(*parts[:-1], *(Text(note) for note in notes))
    for study in all_studies:
        if len(study.datasets) == 1 and len(study.models) > 1:
            parts += [*_side_by_side(study, study.datasets[0], {g.model: g for g in study.groups}, width), Text()]
            continue
        for model in study.models:
            parts += [*_side_by_side(study, model, {g.dataset: g for g in study.select(model=model)}, width), Text()]
    older = len(groups) - sum(len(study.groups) for study in all_studies)
    singles = sum(score.layerwise is not None for group in groups for score in group.scores)
    notes = [opening(groups)]
    notes += [f"{count(singles)} scores of single layers are not in these tables."] if singles else []
    notes += [*rare_notes(groups), *protocol_notes(groups), *replaced_notes(rows)]
    notes += [f"{plural(older, 'older set of features is', 'older sets of features are')} not shown."] if older else []
    notes.append("For validation scores, parameters and times type: mlfusion report --long.")
    return Group(*parts, Text(" ".join(notes)))


def _footnote(scores: Sequence[Score]) -> list[RenderableType]:
    return [Text(note, style="dim") for note in footnotes(scores)]


def _side_by_side(
    study: Study, name: str, by_head: Mapping[str, ComparisonGroup], width: int
) -> Iterator[RenderableType]:
    """The probes of one model on all of its data sets, or of all models on one, in several tables if the width requires it.

    Args:
        name: the model, or the data set.
        by_head: {head of a column: its scores}.
        width: characters per line.
    """
    by_head = {head: group for head, group in by_head.items() if group.probes}
    groups = list(by_head.values())
    probes = [probe for probe in study.probes if any(study.score(group, probe) for group in groups)]
    if not probes:
        return
    columns = [_Column(study, head, [group], probes) for head, group in by_head.items()]
    if len({group.dataset for group in groups}) > 1:
        columns.append(_Column(study, "mean", groups, probes))
    name_width = max(map(len, probes))
    about = f"   {study.metric}, %, and gain in points, {seed_counts(groups)}" + f", {study.name}" * bool(study.name)
    yield Text.assemble((name, "bold"), (about, "dim"))  # above the table, which may be narrower
    while columns:
        fitting = _fitting(columns, width - name_width - 2)
        table = bare_table(None, [""], [column.head for column in columns[:fitting]])
        for number, probe in enumerate(probes):
            add_line(table, [probe, *(column.cells[number] for column in columns[:fitting])])
        yield table
        columns = columns[fitting:]
        if columns:
            yield Text()
    yield from _footnote([score for group in groups for score in group.probes])


def _fitting(columns: "Sequence[_Column]", width: int) -> int:
    """Number of columns that fit into `width` characters, at least one."""
    count = 0
    while count < len(columns) and (width := width - columns[count].width - 2) >= -2:
        count += 1
    return max(count, 1)


class _Column:
    """A data set, or the mean over several: a cell per probe that all groups have, with aligned numbers; the best is bold."""

    def __init__(self, study: Study, head: str, groups: Sequence[ComparisonGroup], probes: Sequence[str]) -> None:
        by_probe = [[score for group in groups if (score := study.score(group, probe))] for probe in probes]
        complete = [scores if len(scores) == len(groups) else [] for scores in by_probe]
        means = [fmean(score.test.mean for score in scores) if scores else None for scores in complete]
        scores = ["" if mean is None else percent(mean) for mean in means]
        gains = [_gain_text(scores) if scores else "" for scores in complete]
        score_width, gain_width = max(map(len, scores)), max(map(len, gains))
        best = max((mean for mean in means if mean is not None), default=None)
        self.head = head
        self.width = max(len(head), score_width + (gain_width + 1 if gain_width else 0))
        self.cells = [
            Text.assemble(
                (score.rjust(score_width), "bold" if score and mean == best else ""),
                (f" {gain.ljust(gain_width)}" if gain_width else "", "dim"),
            )
            for mean, score, gain in zip(means, scores, gains, strict=True)
        ]


def _gain_text(scores: Sequence[Score]) -> str:
    gain = mean_gain(scores)
    return "" if gain is None else points(gain) + all_marks(scores)


def bare_table(title: Text | None, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table without rules: columns of text, then right-aligned columns of numbers."""
    bare = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", title_style="")
    bare.title, bare.title_justify = title, "left"
    for head in texts:
        bare.add_column(Text(head), no_wrap=True)
    for head in numbers:
        bare.add_column(Text(head), justify="right", no_wrap=True)
    return bare


def add_line(table: Table, cells: Iterable[str | Text], style: str = "") -> None:
    """Add a line to a table; a text in it is never markup: 'plants [g]' keeps its brackets."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)


def markdown(rows: Sequence[Row], *, results: Results | None = None) -> str:
    """The tables as Markdown; `results` as in `table`.

    Raises:
        MlfusionError: there are no rows.
    """
    parts = []
    groups = comparison_groups([row.renamed(text.markdown) for row in rows], results)
    for group in groups:
        lines = [(f"`{score.probe}`", *_cells(score)) for score in group.scores]
        part = [
            f"### {group.name}",
            "",
            f"{_sizes(group)}. {answer(group)}",
            "",
            *markdown_lines([f"{metric_name(group.metric)}, %", *COLUMNS], lines),
            *(line for note in footnotes(group.scores) for line in ("", note)),
        ]
        parts.append("\n".join(part))
    return "\n\n".join([*parts, *rare_notes(groups), *protocol_notes(groups), *replaced_notes(rows)]) + "\n"


def _sizes(group: ComparisonGroup) -> str:
    images = group.first.images
    return (
        f"{count(images.train)} train, {count(images.test)} test images, {group.grid} grid, chosen on: "
        f"{chosen_on(group.rows)}"
    )


def _table(group: ComparisonGroup) -> Table:
    title = Text.assemble((group.name, "bold"), ("   " + _sizes(group), "dim"))
    table = bare_table(title, [f"{metric_name(group.metric)}, %"], COLUMNS)
    best = max((score for score in group.scores if score.gain), key=lambda score: score.test.mean, default=None)
    for score in group.scores:
        style = "bold" if score is best and not score.is_baseline else ""
        add_line(table, [score.probe, *_cells(score)], style)
    return table


def _cells(score: Score) -> tuple[str, ...]:
    gain = mean_sd(score.gain, points) + f" {score.marks}" * bool(score.marks) if score.gain else ""
    return (
        mean_sd(score.test),
        "baseline" if score.is_baseline else gain,
        percent(score.val.mean),
        short_count(score.parameters),
        duration(score.seconds),
        str(score.test.n),
    )
