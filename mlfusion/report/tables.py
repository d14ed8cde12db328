"""The study's tables, as Markdown, LaTeX and numbers: scores beside gains, marked by significance or by rank (table 1, A4)."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from statistics import fmean
from typing import Literal

from mlfusion.errors import BadData
from mlfusion.report.figures.drawing import Record
from mlfusion.report.numbers import capitalized, from_to, percent, plus_minus, points
from mlfusion.report.studies import Study, domain
from mlfusion.report.summary import MARKS, ComparisonGroup, all_marks, meanings
from mlfusion.specs.names import BASELINE
from mlfusion.statistics import Spread, wilcoxon
from mlfusion.statistics.datasets import MIN_DATASETS, merge_last_bits

LEVEL = 0.05

LONGEST_NAME = 120
"""Bytes of a name as a part of a file's name; file systems allow 255 in all."""

Mark = Literal["", "bold", "underline"]


@dataclass(frozen=True)
class Cell:
    """A score as a fraction with its deviation, its gain, and its mark; empty if nothing was run."""

    test: float | None = None
    gain: Spread | None = None
    spread: float | None = None  # deviation of the score, shown if it has no gain
    few: int | None = None  # number of models averaged, if others in its row have more
    mark: Mark = ""
    marks: str = ""  # what the baseline differs in, such as a dagger for the code
    text: str = ""  # shown instead of a score

    @property
    def shown(self) -> tuple[str, str]:
        """'82.3' and '+4.1 ± 2.0': score and gain as text."""
        if self.text or self.test is None:
            return self.text, ""
        if self.gain is None:
            return percent(self.test) + plus_minus(self.spread), ""
        gain = points(self.gain.mean) + plus_minus(self.gain.sd)
        gain += f" {self.marks}" if self.marks else ""
        return percent(self.test), gain + (f"; n = {self.few}" if self.few else "")


Line = tuple[str, Sequence[Cell]]
"""(data set, or name of a summary line; its cells)."""


@dataclass(frozen=True)
class ScoreTable:
    """One table: a line per data set under its domain, a column per probe."""

    name: str  # name of its files
    title: str
    note: str
    columns: Sequence[str]
    domains: Sequence[tuple[str, Sequence[Line]]]
    foot: Sequence[Line]
    numbers: Sequence[Record] = field(repr=False)

    @cached_property
    def largest_gain(self) -> float:
        """The largest gain or loss of a cell, at least one point: the end of the colour scale."""
        gains = [abs(cell.gain.mean) for _, lines in self.domains for _, cells in lines for cell in cells if cell.gain]
        return max([0.01, *gains])


def by_significance(study: Study) -> ScoreTable:
    """Table 1: bold marks scores not significantly worse than the best of the row (one-sided signed-rank tests)."""
    marks: dict[tuple[str, str], Mark] = {}
    tested = False
    for dataset in study.datasets:
        scores = _over_models(study, dataset)
        if not scores:
            continue
        best = max(scores, key=lambda probe: fmean(scores[probe].values()))
        tested |= len(scores) > 1 and len(scores[best]) >= MIN_DATASETS
        marks |= {(dataset, p): "bold" for p in scores if p == best or _no_worse(scores[p], scores[best])}
    marking = f"Bold: the best of the row; nothing is tested with fewer than {MIN_DATASETS} models."
    if tested:
        test = f"(one-sided Wilcoxon signed-rank test over models, p < {LEVEL})"
        marking = f"Bold: not significantly worse than the best of the row {test}."
    return _table(study, "table-1-significance", marking, marks)


def _no_worse(scores: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether a signed-rank test over models does not find scores worse than the best; False where nothing is tested."""
    if len(scores) < MIN_DATASETS:
        return False
    try:
        return wilcoxon([best[model] - score for model, score in scores.items()]).p >= LEVEL
    except BadData:  # too few differences are not 0
        return True


def by_rank(study: Study) -> ScoreTable:
    """Table 1 by rank: the best of each row is bold, the second underlined; the last line is the mean rank."""
    marks: dict[tuple[str, str], Mark] = {}
    ranks_of: dict[str, list[float]] = {}
    for dataset in study.datasets:
        means = {probe: fmean(scores.values()) for probe, scores in _over_models(study, dataset).items()}
        for probe, rank in ranks(means).items():
            ranks_of.setdefault(probe, []).append(rank)
            if rank < 3:
                marks[dataset, probe] = "bold" if rank < 2 else "underline"
    mean_ranks = {probe: fmean(values) for probe, values in ranks_of.items() if len(values) == len(study.datasets)}
    marking = f"Bold: the best of the row, underlined: the second. Mean rank over {len(study.datasets)} data sets, 1 the best."
    table = _table(study, "table-1-ranks", marking, marks)
    foot = [*table.foot, ("Mean rank", _rank_cells(study.probes, mean_ranks))]
    added = [Record(dataset="mean rank", domain="", probe=p, rank=rank) for p, rank in mean_ranks.items()]
    return replace(table, foot=foot, numbers=[*table.numbers, *added])


def ranks(scores: Mapping[str, float]) -> dict[str, float]:
    """{name: score} → {name: rank}, 1 the highest; ties share the mean of their ranks."""
    values = merge_last_bits(list(scores.values())).tolist()
    return {
        name: 1 + sum(other > value for other in values) + (values.count(value) - 1) / 2
        for name, value in zip(scores, values, strict=True)
    }


def _rank_cells(probes: Sequence[str], mean_ranks: Mapping[str, float]) -> list[Cell]:
    first, second, *_ = [*sorted(mean_ranks.values()), 0.0, 0.0]
    marks: dict[float, Mark] = {second: "underline", first: "bold"}
    return [
        Cell(text=f"{mean_ranks[probe]:.2f}", mark=marks.get(mean_ranks[probe], "")) if probe in mean_ranks else Cell()
        for probe in probes
    ]


def of_model(study: Study, model: str) -> ScoreTable:
    """Table A4: all scores of one model, with ± over seeds."""
    alone = Study(study.name, tuple(group for group in study.groups if group.model == model))
    return replace(_table(alone, f"scores-{slug(model)}", "", {}), title=f"Scores and gains of {model}")


def slug(name: str) -> str:
    """A name that is safe as a file name: 'org/my model' → 'org-my-model', 'R²' → 'R2'."""
    slugged = re.sub(r"[^\w.+-]+", "-", unicodedata.normalize("NFKC", name)).strip("-.") or "unnamed"
    if len(slugged.encode()) <= LONGEST_NAME:
        return slugged
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]  # so that two long names are two files
    return slugged.encode()[: LONGEST_NAME - 9].decode(errors="ignore") + f"-{digest}"


def _over_models(study: Study, dataset: str) -> dict[str, dict[str, float]]:
    """{probe: {model: score}} for probes that every model of the data set has: other means are not comparable."""
    groups = [group for group in study.groups if group.dataset == dataset]
    by_probe = {p: {g.model: score.test.mean for g in groups if (score := study.score(g, p))} for p in study.probes}
    return {probe: scores for probe, scores in by_probe.items() if len(scores) == len(groups)}


def _table(study: Study, name: str, marking: str, marks: Mapping[tuple[str, str], Mark]) -> ScoreTable:
    """The table of a study; `marking` explains its marks in the note."""
    places = list(product(study.datasets, study.probes))
    cells = {place: _cell(study, *place, marks.get(place, "")) for place in places}
    domains: dict[str, list[Line]] = {}
    for dataset in study.datasets:
        domains.setdefault(domain(dataset), []).append((dataset, [cells[dataset, probe] for probe in study.probes]))
    foot, sets = [], study.datasets
    if len(sets) > 1:
        means = [_mean([cells[dataset, probe] for dataset in sets]) for probe in study.probes]
        foot.append((f"Mean of {len(sets)}", means))
    numbers = [_number(*place, cell) for place, cell in cells.items() if cell.test is not None]
    note = _note(study, marking, list(cells.values()))
    return ScoreTable(name, "Scores and gains", note, study.probes, list(domains.items()), foot, numbers)


def _cell(study: Study, dataset: str, probe: str, mark: Mark) -> Cell:
    scores = study.scores(probe, dataset=dataset)
    if not scores:
        return Cell()
    test = Spread.of(score.test.mean for score in scores)
    gains = [score.gain for score in scores if score.gain and not score.is_baseline]
    marks = all_marks(scores)
    if len(study.models) == 1:
        gain = gains[0] if gains else None
        return Cell(test.mean, gain, scores[0].test.sd, mark=mark, marks=marks)
    models = len(study.select(dataset=dataset))
    few = len(scores) if len(scores) < models else None
    gain = Spread.of(gain.mean for gain in gains) if gains else None
    return Cell(test.mean, gain, test.sd, few, mark, marks)


def _mean(cells: Sequence[Cell]) -> Cell:
    """The means over data sets, if all models have the probe on each of them."""
    tests = [cell.test for cell in cells if cell.test is not None and not cell.few]
    if len(tests) < len(cells):
        return Cell()
    gains = [cell.gain.mean for cell in cells if cell.gain]
    return Cell(fmean(tests), Spread(fmean(gains), None, len(gains)) if len(gains) == len(cells) else None)


def _number(dataset: str, probe: str, cell: Cell) -> Record:
    gain, test = cell.gain, None if cell.test is None else 100 * cell.test
    sd = 100 * gain.sd if gain and gain.sd is not None else None
    record = Record(
        dataset=dataset, domain=domain(dataset), probe=probe, test=test, gain=100 * gain.mean if gain else None
    )
    other = {f"other_{field}": "yes" if sign in cell.marks else "" for field, (sign, _) in MARKS.items()}
    return record.extended(gain_sd=sd, n=gain.n if gain else None, mark=cell.mark, **other)


def _note(study: Study, marking: str, cells: Sequence[Cell]) -> str:
    over = f"models (n = {len(study.models)})" if len(study.models) > 1 else "seeds"
    parts = [
        f"{capitalized(study.metric)} on test in percent, with the gain in points over {BASELINE} and ± one standard deviation "
        f"over {over}; {seed_counts(study.groups)}.",
        marking,
    ]
    if any(cell.test is None or cell.few for cell in cells):
        parts.append(
            "An empty cell was not run. Scores of fewer models (n) are not marked, and a mean is given where all models have "
            "the probe on every data set."
        )
    parts += meanings(score for group in study.groups for score in group.probes)
    return " ".join(filter(None, parts))


def seed_counts(groups: Iterable[ComparisonGroup]) -> str:
    """'1 seed', '3 seeds' or '1 to 5 seeds': the numbers of seeds of the groups' scores."""
    counts = {score.test.n for group in groups for score in group.probes}
    return from_to(counts) + (" seed" if counts == {1} else " seeds")


def markdown(table: ScoreTable) -> str:
    """The table as Markdown under its title and note; each domain has a line of its own.

    Names stand as they are: the rows of the table are `Row.renamed` by `text.markdown`.
    """
    lines: list[Sequence[str]] = []
    for name, domain_lines in table.domains:
        if len(table.domains) > 1:
            lines.append([f"*{name}* |" + " |" * (len(table.columns) - 1)])
        lines += [(label, *map(_marked, cells)) for label, cells in domain_lines]
    lines += [(label, *map(_marked, cells)) for label, cells in table.foot]
    heads = ["data set", *(f"`{name}`" for name in table.columns)]
    return f"### {table.title}\n\n{table.note}\n\n" + "\n".join(markdown_lines(heads, lines)) + "\n"


def markdown_lines(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> list[str]:
    """The lines of a Markdown table: `texts` columns of text, then columns of numbers."""
    rule = "|" + "---|" * texts + "---:|" * (len(heads) - texts)
    return [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def _marked(cell: Cell) -> str:
    score, gain = cell.shown
    text = f"{score} ({gain})" if gain else score
    return {"bold": "**{}**", "underline": "<u>{}</u>"}.get(cell.mark, "{}").format(text) if text else ""


_LATEX: dict[str, str | int | None] = {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
_LATEX |= {"±": r"$\pm$", "\N{DAGGER}": r"$\dagger$", "\N{DOUBLE DAGGER}": r"$\ddagger$", "\N{MINUS SIGN}": "$-$"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}


def _tex(text: str) -> str:
    """The text with LaTeX's special characters escaped."""
    return text.translate(str.maketrans(_LATEX))


def latex(table: ScoreTable) -> str:
    r"""A `table*` that needs booktabs, and \resizebox of graphicx to fit the page."""

    def line(label: str, cells: Sequence[Cell]) -> str:
        return f"{_tex(label)} & " + " & ".join(_tex_cell(cell) for cell in cells) + r" \\"

    heads = [part.partition("/") for part in table.columns]
    body = [
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_tex(table.title)}. {_tex(table.note)}}}",
        rf"\label{{tab:{slug(table.name)}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(["", *(_tex(tokens) for tokens, _, _ in heads)]) + r" \\",
        " & ".join(["data set", *(_tex(head) for _, _, head in heads)]) + r" \\",
    ]
    for name, lines in table.domains:
        body.append(r"\midrule")
        if len(table.domains) > 1:
            body.append(rf"\multicolumn{{{1 + len(table.columns)}}}{{l}}{{\emph{{{_tex(name)}}}}} \\")
        body += [line(label, cells) for label, cells in lines]
    if table.foot:
        body += [r"\midrule", *(line(label, cells) for label, cells in table.foot)]
    return "\n".join([*body, r"\bottomrule", r"\end{tabular}}", r"\end{table*}", ""])


def _tex_cell(cell: Cell) -> str:
    score, gain = cell.shown
    if not score:
        return ""
    set_as = {"bold": r"\textbf{{{}}}", "underline": r"\underline{{{}}}"}.get(cell.mark, "{}")
    text = set_as.format(_tex(score))
    return text + (rf" {{\scriptsize({_tex(gain)})}}" if gain else "")
