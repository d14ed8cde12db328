"""The figures of a report, in one list that both the page and the files use."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from mlfusion.report import published
from mlfusion.report.figures.accuracy import accuracy
from mlfusion.report.figures.attention import GroupAttention, attention, group_attentions, top_share
from mlfusion.report.figures.cost import cost
from mlfusion.report.figures.drawing import Figure
from mlfusion.report.figures.gains import by_heads, by_model, by_probe, by_token
from mlfusion.report.figures.layers import Cka, by_layer
from mlfusion.report.figures.ranks import ranks
from mlfusion.report.figures.score_map import score_map
from mlfusion.report.figures.seeds import seeds, train_test
from mlfusion.report.figures.strips import strip_figure
from mlfusion.report.pictures import Strip
from mlfusion.report.studies import Study, studies
from mlfusion.report.summary import ComparisonGroup, comparison_groups
from mlfusion.report.tables import ScoreTable, by_rank, by_significance, of_model, slug
from mlfusion.results import Results, Row

SectionName = Literal["accuracy", "attention", "layers", "tokens", "heads", "cost", "seeds", "train-test"]


@dataclass(frozen=True)
class ReportData:
    """The data of a report: rows, and optionally what rows do not hold."""

    rows: Sequence[Row]
    results: Results | None = None  # its arrays give verdicts, confusions and calibration
    cka: Cka | None = None
    pictures: Mapping[str, Sequence[Strip]] | None = None  # {data set: its strips}

    @cached_property
    def groups(self) -> list[ComparisonGroup]:
        """The rows grouped for comparison."""
        return comparison_groups(self.rows, self.results)

    @cached_property
    def studies(self) -> list[Study]:
        """The groups as studies, which figures over models and data sets compare."""
        return studies(self.groups)

    @cached_property
    def attentions(self) -> list[GroupAttention]:
        """The groups of all studies that have attention over layers, each with its attention."""
        return [pair for study in self.studies for pair in group_attentions(study.select())]

    @cached_property
    def comparisons(self) -> list[published.PublishedComparison]:
        """Our scores compared with the published ones."""
        return published.compare(self.groups)


@dataclass(frozen=True)
class GroupFigure:
    """A figure of several models on data sets: each group is a panel, or rows of a panel."""

    section: SectionName | None  # section of the page; None if the page has a table instead
    one_per: Literal["model", "data set"]  # one file for each
    draw: Callable[[Sequence[ComparisonGroup], ReportData, float | None], Figure | None]  # None: nothing to draw


GROUP_FIGURES = (
    GroupFigure("accuracy", "data set", lambda groups, data, top: accuracy(groups)),
    GroupFigure("attention", "model", lambda groups, data, top: attention(groups, top)),
    GroupFigure("layers", "data set", lambda groups, data, top: by_layer(groups, data.cka)),
    GroupFigure(None, "model", lambda groups, data, top: score_map(groups)),
)
"""Figures of groups; `top` is the end of the colour scale that figures of attention have in common."""


@dataclass(frozen=True)
class StudyFigure:
    """A figure over the models and data sets of a study."""

    section: SectionName
    draw: Callable[[Study], Figure | None]  # None: nothing to draw


STUDY_FIGURES = (
    StudyFigure("accuracy", by_probe),
    StudyFigure("accuracy", by_model),
    StudyFigure("accuracy", ranks),
    StudyFigure("tokens", by_token),
    StudyFigure("heads", by_heads),
    StudyFigure("cost", cost),
    StudyFigure("seeds", seeds),
    StudyFigure("train-test", train_test),
)


def group_figure(section: SectionName, groups: Sequence[ComparisonGroup], data: ReportData) -> Figure | None:
    """The groups' figure of one section, on the colour scale of the whole report; None if there is nothing to draw."""
    [draw] = [one.draw for one in GROUP_FIGURES if one.section == section]
    return draw(groups, data, top_share(data.attentions))


def group_figures(groups: Sequence[ComparisonGroup], data: ReportData) -> list[Figure]:
    """The groups' figures of all sections."""
    sections = [one.section for one in GROUP_FIGURES if one.section]
    return [figure for section in sections if (figure := group_figure(section, groups, data))]


def study_figures(study: Study, section: SectionName) -> list[Figure]:
    """A study's figures of one section of the page, with names that differ from those of other studies."""
    figures = [figure for one in STUDY_FIGURES if one.section == section and (figure := one.draw(study))]
    return [replace(one, name=slug(f"{one.name}-{study.name}")) if study.name else one for one in figures]


def score_tables(study: Study) -> list[ScoreTable]:
    """Table 1 in its two styles, and one table per model."""
    if not study.probes:
        return []
    alone = [of_model(study, model) for model in study.models] if len(study.models) > 1 else []
    return [by_significance(study), by_rank(study), *alone]


def figure_files(data: ReportData, *, paper: bool) -> Iterator[tuple[str, Figure]]:
    """(name of its files, figure) of every figure; `paper` adds the comparison with the published scores."""
    for study in data.studies:
        for one in STUDY_FIGURES:
            if figure := one.draw(study):
                yield _file_name(figure.name, study), figure
        yield from _group_files(study, data)
    for dataset, strips in (data.pictures or {}).items():
        for strip in strips:
            yield slug(f"{dataset}-{strip.name}"), strip_figure(strip)
    if paper and (figure := published.figure(data.comparisons)):
        yield figure.name, figure


def _group_files(study: Study, data: ReportData) -> Iterator[tuple[str, Figure]]:
    top = top_share(group_attentions(study.select()))
    for one in GROUP_FIGURES:
        for name in study.models if one.one_per == "model" else study.datasets:
            groups = study.select(model=name) if one.one_per == "model" else study.select(dataset=name)
            if figure := one.draw(groups, data, top):
                yield _file_name(f"{figure.name}-{name}", study), figure


def table_files(data: ReportData) -> list[tuple[str, ScoreTable]]:
    """(name of its files, table) of every table."""
    return [(_file_name(table.name, study), table) for study in data.studies for table in score_tables(study)]


def _file_name(name: str, study: Study) -> str:
    """'gains-by-probe'; 'gains-by-probe.quick-grid' if the rows have several studies."""
    return slug(name) + (f".{slug(study.name)}" if study.name else "")
