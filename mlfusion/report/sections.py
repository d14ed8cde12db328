"""The sections of the page, in order, each built from the report's data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from mlfusion.report import page_tables, published, sentences
from mlfusion.report.catalogue import ReportData, SectionName, group_figure, group_figures, score_tables, study_figures
from mlfusion.report.commands import layerwise_command, reproduction_commands
from mlfusion.report.figures import classification
from mlfusion.report.figures.drawing import Figure
from mlfusion.report.numbers import capitalized, count, enumerated, percent
from mlfusion.report.page_tables import DataTable
from mlfusion.report.pictures import Picture, Strip, data_url
from mlfusion.report.studies import domain
from mlfusion.report.summary import (
    ComparisonGroup,
    code_versions,
    footnotes,
    library_versions,
    metric_name,
    score_word,
)
from mlfusion.report.tables import slug
from mlfusion.results import chosen_on
from mlfusion.statistics.uncertainty import FEW_TEST_IMAGES, few_test_images
from mlfusion.system.text import one_line

MAX_TOP_CASES = 4
"""Up to this number of cases (a model on a data set) are drawn at the top; more are drawn with their data set."""
NAMED_CHOICES = 3  # kinds of images that chose, which the line above the scores can name

OVER_STUDIES: Mapping[SectionName, str] = {
    "tokens": "CLS, AP, or both",
    "heads": "Number of attention heads",
    "cost": "Score against cost",
    "seeds": "Variation over seeds",
    "train-test": "Training and test scores",
}
"""Titles of the sections with one figure per study."""


@dataclass(frozen=True)
class Section:
    """One section of the page."""

    name: str  # its anchor
    title: str
    figures: Sequence[Figure] = ()
    tables: Mapping[str, DataTable] = field(default_factory=dict)  # {id of its element: table}
    body: Literal["figures", "accuracy", "attention", "layers", "datasets", "runs"] = "figures"  # macro of page.html
    content: Any = None  # the data of that macro besides figures and tables
    contents: Sequence[tuple[str, str]] = ()  # (anchor, label) of its entries in the table of contents


def sections(data: ReportData, page: str) -> list[Section]:
    """Every section that is not empty; `page` is the file name that the last command writes."""
    over = [partial(_over_studies, name=name, title=title) for name, title in OVER_STUDIES.items()]
    builders: list[Callable[[ReportData], Section | None]] = [_accuracy, _attention, _layers, *over]
    builders += [_published, _datasets]
    return [*(section for build in builders if (section := build(data))), _runs(data, page)]


def _accuracy(data: ReportData) -> Section:
    groups = data.groups
    name = score_word(groups)
    title = f"{name} per probe"
    pairs = [(group, score) for group in groups for score in group.probes]
    if not pairs:
        return Section("accuracy", title, body="accuracy")
    own = _figures_at_the_top(data, "accuracy")
    over: list[dict[str, Any]] = [
        {"name": study.name, "tables": score_tables(study), "figures": study_figures(study, "accuracy")}
        for study in data.studies
        if len(study.groups) > 1 and study.probes
    ]
    content = {
        "metric": capitalized(enumerated(list(dict.fromkeys(metric_name(group.metric) for group in groups)))),
        "chance": sentences.chance_level(groups),
        "chosen": _chosen_on(groups),
        "own": own,
        "studies": over,
        "footnote": " ".join(footnotes(score for _, score in pairs)),
    }
    figures = [*own, *(figure for one in over for figure in one["figures"])]
    tables = {"scores": page_tables.scores_table(pairs, several=len(groups) > 1)}
    entries = [("accuracy", name), ("all-scores", "All scores")]
    return Section("accuracy", title, figures, tables, "accuracy", content, entries)


def _chosen_on(groups: Sequence[ComparisonGroup]) -> str:
    """The images that chose; where they differ too much for one sentence, the place that names them."""
    named = list(dict.fromkeys(row.chosen_on() for group in groups for row in group.rows))
    return " or ".join(named) if len(named) <= NAMED_CHOICES else "the images that each data set below names"


def _figures_at_the_top(data: ReportData, section: SectionName) -> list[Figure]:
    """The figure of all cases if they are few, else none."""
    figure = group_figure(section, data.groups, data) if len(data.groups) <= MAX_TOP_CASES else None
    return [figure] if figure else []


def _attention(data: ReportData) -> Section:
    figure = group_figure("attention", [group for group, _ in data.attentions], data)
    texts = [sentences.attention(group, attention) for group, attention in data.attentions]
    entries = [("attention", "Attention")] if figure else []
    return Section("attention", "Attention over layers", [figure] if figure else [], {}, "attention", texts, entries)


def _layers(data: ReportData) -> Section:
    groups = data.groups
    title, own = f"{score_word(groups)} by layer", _figures_at_the_top(data, "layers")
    content = {
        "best": [sentences.best_layers(group) for group in groups if group.by_layer],
        "command": layerwise_command(groups[0]),  # makes the rows if there are none
    }
    pairs = [(group, score) for group in groups for score in group.scores if score.layerwise]
    tables = {"layer-scores": page_tables.scores_table(pairs, several=len(groups) > 1)} if pairs else {}
    return Section("layers", title, own, tables, "layers", content, [("layers", "By layer")] if pairs else [])


def _over_studies(data: ReportData, name: SectionName, title: str) -> Section | None:
    figures = [figure for study in data.studies for figure in study_figures(study, name)]
    return Section(name, title, figures, contents=[(name, title)]) if figures else None


def _published(data: ReportData) -> Section | None:
    figure = published.figure(data.comparisons)
    if not figure:
        return None
    tables = {"published": page_tables.published_table(data.comparisons)}
    text = published.summarize(data.comparisons)
    return Section("paper", figure.title, [figure], tables, content=text, contents=[("paper", figure.title)])


@dataclass(frozen=True)
class DatasetPart:
    """One data set: its figures if there are too many for the top, its pictures, its confusions."""

    name: str
    anchor: str
    about: str
    figures: Sequence[Figure]
    strips: Sequence[Mapping[str, Any]]
    classes: Sequence[tuple[str, int, str, str, str, str]]
    confusions: Sequence[tuple[str, str, int, str]]
    source: str  # a sentence about the probe of which these are


def _datasets(data: ReportData) -> Section | None:
    parts = list(_dataset_parts(data))
    if not parts:
        return None
    figures = [figure for part in parts for figure in part.figures]
    title = "Data set by data set"
    return Section("data-sets", title, figures, body="datasets", content=parts, contents=[("data-sets", "Data sets")])


def _dataset_parts(data: ReportData) -> Iterator[DatasetPart]:
    names = dict.fromkeys(name for study in data.studies for name in study.datasets)
    pictures = {one_line(name): strips for name, strips in (data.pictures or {}).items()}
    for i, name in enumerate(dict.fromkeys([*names, *pictures])):
        groups = [group for study in data.studies for group in study.select(dataset=name)]
        figures = group_figures(groups, data) if len(data.groups) > MAX_TOP_CASES else []
        predictions = classification.predictions(groups, data.results) if data.results else None
        if predictions:
            figures += classification.figures(predictions)
        strips = [_strip(strip) for strip in pictures.get(name, ())]
        if figures or strips:
            yield DatasetPart(
                name,
                f"dataset-{slug(name)}",
                _facts(name, groups),
                [replace(figure, name=f"{figure.name}-{i}") for figure in figures],
                strips,
                classification.class_lines(predictions) if predictions else [],
                classification.confusions(predictions) if predictions else [],
                classification.source(predictions) if predictions else "",
            )


def _facts(name: str, groups: Sequence[ComparisonGroup]) -> str:
    """The data set's domain, classes and images, and its best score, in one line."""
    if not groups:
        return ""
    best = max((group.main for group in groups if group.main), key=lambda score: score.val.mean, default=None)
    facts = [domain(name)] * (domain(name) != "Others")
    facts.append(f"{count(len(groups[0].first.classes))} classes")
    facts.append(f"{count(groups[0].first.images.train)} + {count(groups[0].first.images.test)} images")
    facts.append(f"chosen on: {chosen_on(row for group in groups for row in group.rows)}")
    if best and all(row.folds is None for group in groups for row in group.rows):
        smallest = min(group.first.images.test for group in groups)
        if smallest < FEW_TEST_IMAGES:
            facts.append(f"{few_test_images(smallest)}: mlfusion probe --folds 5")
    if best:
        facts.append(f"{best.probe} {percent(best.test.mean)} %")
    return " · ".join(facts)


def _strip(strip: Strip) -> dict[str, Any]:
    pictures = []
    for picture in strip.pictures:
        urls = [data_url(Picture(picture.image))] + ([data_url(picture)] if picture.attention is not None else [])
        pictures.append({"caption": one_line(picture.caption), "urls": urls})
    return {"title": one_line(strip.title), "description": one_line(strip.description), "pictures": pictures}


def _runs(data: ReportData, page: str) -> Section:
    groups = data.groups
    listed = page_tables.listed_rows(groups)
    rows = sum(len(group.rows) for group in groups)
    content = {
        "commands": reproduction_commands(groups, page),
        "codes": code_versions(groups),
        "libraries": library_versions(groups),
        "rows": rows,
        "listed": len(listed),  # rows in the table
        "replaced": sentences.replaced_notes(data.rows),
    }
    tables = {"runs": page_tables.runs_table(groups)} | ({"rows": page_tables.rows_table(listed)} if listed else {})
    return Section("run", "What was run", (), tables, "runs", content, [("run", "What was run")])
