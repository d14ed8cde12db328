"""The study's tables, as Markdown, LaTeX and numbers: scores beside gains, marked by significance or by rank (table 1, A4)."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from mlfusion.errors import BadData
from mlfusion.report.figures.drawing import Record
from mlfusion.report.summary import DAGGER, OTHER_CODE, Study, domain, percent, points
from mlfusion.specs import BASELINE
from mlfusion.statistics import FEWEST, Spread, wilcoxon

LEVEL = 0.05

Mark = Literal["", "bold", "underline"]


@dataclass(frozen=True)
class Cell:
    """A score as a fraction with its deviation, the gain with its own, and how it is set; all None where nothing was run."""

    test: float | None = None
    gain: Spread | None = None
    spread: float | None = None  # of the score, where it has no gain
    few: int | None = None  # models that it is the mean of, where others of its row are of more
    mark: Mark = ""
    other_code: bool = False  # a gain from a baseline of another version of the code
    text: str = ""  # of a cell that holds something else


@dataclass(frozen=True)
class Sheet:
    """One table: a row a data set under its domain, a column a probe."""

    name: str  # of its files
    title: str
    note: str
    columns: Sequence[str]
    groups: Sequence[tuple[str, Sequence[tuple[str, Sequence[Cell]]]]]  # (domain, [(data set, cells)])
    foot: Sequence[tuple[str, Sequence[Cell]]]
    numbers: Sequence[Record] = field(repr=False)

    @property
    def reach(self) -> float:
        """The largest gain or loss, a point at least: what colours are scaled by."""
        held = [cell.gain.mean for _, rows in self.groups for _, cells in rows for cell in cells if cell.gain]
        return max([0.01, *(abs(value) for value in held)])


def by_significance(study: Study) -> Sheet:
    """Table 1: bold is what is not significantly worse than the best of its row, by one-sided signed-rank tests over models."""
    marks: dict[tuple[str, str], Mark] = {}
    tested = False
    for dataset in study.datasets:
        held = _over_models(study, dataset)
        if not held:
            continue
        best = max(held, key=lambda probe: fmean(held[probe].values()))
        marks[dataset, best] = "bold"
        for probe, scores in held.items():
            if probe == best or len(scores) < FEWEST:
                continue
            tested = True
            try:
                worse = wilcoxon([held[best][model] - score for model, score in scores.items()]).p < LEVEL
            except BadData:  # too few differ at all
                worse = False
            if not worse:
                marks[dataset, probe] = "bold"
    how = (
        f"Bold: not significantly worse than the best of the row (one-sided Wilcoxon signed-rank test "
        f"over models, p < {LEVEL})."
        if tested
        else f"Bold: the best of the row; nothing is tested with fewer than {FEWEST} models."
    )
    return _sheet(study, "table-1-significance", how, marks, ranks=None)


def by_rank(study: Study) -> Sheet:
    """Table 1 again: bold is the best of its row, underlined the second; the last line is the mean rank."""
    marks: dict[tuple[str, str], Mark] = {}
    each: dict[str, list[float]] = {}
    for dataset in study.datasets:
        means = {probe: fmean(held.values()) for probe, held in _over_models(study, dataset).items()}
        ranked = ranks(means)
        for probe, rank in ranked.items():
            each.setdefault(probe, []).append(rank)
            if rank < 3:
                marks[dataset, probe] = "bold" if rank < 2 else "underline"
    complete = {probe: held for probe, held in each.items() if len(held) == len(study.datasets)}
    how = f"Bold: the best of the row, underlined: the second. Mean rank over {len(study.datasets)} data sets, 1 the best."
    return _sheet(study, "table-1-ranks", how, marks, ranks={probe: fmean(held) for probe, held in complete.items()})


def ranks(scores: Mapping[str, float]) -> dict[str, float]:
    """{name: score} → {name: rank}, 1 the highest; ties share the mean of their ranks."""
    rounded = {name: round(score, 12) for name, score in scores.items()}
    values = list(rounded.values())
    return {
        name: 1 + sum(other > value for other in values) + (values.count(value) - 1) / 2
        for name, value in rounded.items()
    }


def of_model(study: Study, model: str) -> Sheet:
    """Table A4: everything of one model, with ± over seeds."""
    alone = Study(study.name, tuple(block for block in study.blocks if block.model == model))
    sheet = _sheet(alone, f"scores-{slug(model)}", "", {}, ranks=None)
    return Sheet(
        sheet.name, f"Scores and gains of {model}", sheet.note, sheet.columns, sheet.groups, sheet.foot, sheet.numbers
    )


def slug(name: str) -> str:
    """A name that is safe as a file's: 'org/my model' → 'org-my-model', 'R²' → 'R2'."""
    return re.sub(r"[^\w.+-]+", "-", unicodedata.normalize("NFKC", name)).strip("-.") or "unnamed"


def _over_models(study: Study, dataset: str) -> dict[str, dict[str, float]]:
    """{probe: {model: score}} of the probes that every model of the row has: means over other models are no comparison."""
    mine = [block.model for block in study.blocks if block.dataset == dataset]
    found: dict[str, dict[str, float]] = {}
    for probe in study.probes:
        scores = {model: score.test.mean for model in mine if (score := study.score(model, dataset, probe))}
        if len(scores) == len(mine):
            found[probe] = scores
    return found


def _sheet(
    study: Study, name: str, how: str, marks: dict[tuple[str, str], Mark], ranks: dict[str, float] | None
) -> Sheet:
    probes = study.probes
    several = len(study.models) > 1
    groups: list[tuple[str, list[tuple[str, list[Cell]]]]] = []
    numbers: list[Record] = []
    held: dict[str, list[Cell]] = {}
    for dataset in study.datasets:
        cells = [_cell(study, dataset, probe, marks.get((dataset, probe), "")) for probe in probes]
        if not groups or groups[-1][0] != domain(dataset):
            groups.append((domain(dataset), []))
        groups[-1][1].append((dataset, cells))
        for probe, cell in zip(probes, cells, strict=True):
            if cell.test is None:
                continue
            held.setdefault(probe, []).append(cell)
            numbers.append(
                {
                    "dataset": dataset,
                    "domain": domain(dataset),
                    "probe": probe,
                    "test": 100 * cell.test,
                    "gain": 100 * cell.gain.mean if cell.gain else None,
                    "gain_sd": 100 * cell.gain.sd if cell.gain and cell.gain.sd is not None else None,
                    "n": cell.gain.n if cell.gain else None,
                    "mark": cell.mark,
                    "other_code": "yes" if cell.other_code else "",
                }
            )
    foot: list[tuple[str, list[Cell]]] = []
    if len(study.datasets) > 1:
        foot.append((f"Mean of {len(study.datasets)}", [_mean(held.get(p, []), len(study.datasets)) for p in probes]))
    if ranks is not None:
        best = sorted(ranks.values())[:2]
        place: dict[float, Mark] = {
            value: "bold" if i == 0 else "underline" for i, value in reversed([*enumerate(best)])
        }
        shown = [(ranks[p], place.get(ranks[p], "")) if p in ranks else None for p in probes]
        foot.append(("Mean rank", [Cell(text=f"{s[0]:.2f}", mark=s[1]) if s else Cell() for s in shown]))
        numbers += [
            {"dataset": "mean rank", "domain": "", "probe": probe, "rank": rank} for probe, rank in ranks.items()
        ]
    over = f"models (n = {len(study.models)})" if several else "seeds"
    counted = sorted({score.test.n for block in study.blocks for score in block.probes})
    seeds = " to ".join(str(n) for n in dict.fromkeys((counted[0], counted[-1])))
    note = (
        f"{study.metric[0].upper()}{study.metric[1:]} on test in percent, with the gain in points over {BASELINE} and "
        f"± one standard deviation over "
        f"{over}; {seeds} {'seed' if seeds == '1' else 'seeds'}. {how}"
    )
    missing = ""
    if any(cell.test is None or cell.few for _, rows in groups for _, cells in rows for cell in cells):
        missing = (
            " An empty cell was not run. What fewer models have (n) is not marked, and a mean is "
            "given where all have the probe on "
            "every data set."
        )
    marked = any(cell.other_code for _, rows in groups for _, cells in rows for cell in cells)
    said = " ".join(part.strip() for part in (note, missing, OTHER_CODE if marked else "") if part.strip())
    return Sheet(name, "Scores and gains", said, probes, groups, foot, numbers)


def _cell(study: Study, dataset: str, probe: str, mark: Mark) -> Cell:
    scores = [score for model in study.models if (score := study.score(model, dataset, probe))]
    if not scores:
        return Cell()
    test = fmean(score.test.mean for score in scores)
    gains = [score.gain for score in scores if score.gain and not score.is_baseline]
    other = any(score.other_code for score in scores)
    if len(study.models) == 1:
        gain = gains[0] if gains else None
        return Cell(test, gain, scores[0].test.sd, mark=mark, other_code=other)
    spread = Spread.of(score.test.mean for score in scores).sd
    everyone = sum(block.dataset == dataset for block in study.blocks)
    few = len(scores) if len(scores) < everyone else None
    return Cell(test, Spread.of(gain.mean for gain in gains) if gains else None, spread, few, mark, other)


def _mean(cells: Sequence[Cell], datasets: int) -> Cell:
    if len(cells) < datasets or any(cell.few for cell in cells):
        return Cell()
    tests = [cell.test for cell in cells if cell.test is not None]
    gains = [cell.gain.mean for cell in cells if cell.gain]
    return Cell(fmean(tests), Spread(fmean(gains), None, len(gains)) if len(gains) == datasets else None)


# --- as text ---------------------------------------------------------------------------------------------------------


def shown(cell: Cell) -> tuple[str, str]:
    """'82.3' and '+4.1 ± 2.0': what a cell says, score and gain."""
    if cell.text or cell.test is None:
        return cell.text, ""
    if cell.gain is None:
        return percent(cell.test) + (f" ± {percent(cell.spread)}" if cell.spread is not None else ""), ""
    gained = points(cell.gain.mean) + (f" ± {percent(cell.gain.sd)}" if cell.gain.sd is not None else "")
    gained += f" {DAGGER}" if cell.other_code else ""
    return percent(cell.test), gained + (f"; n = {cell.few}" if cell.few else "")


def markdown(sheet: Sheet) -> str:
    """A table for a page of text; domains stand as lines of their own."""
    lines = [f"| data set | {' | '.join(f'`{name}`' for name in sheet.columns)} |"]
    lines.append("|---|" + "---:|" * len(sheet.columns))

    def line(label: str, cells: Sequence[Cell]) -> str:
        return f"| {_escaped(label)} | " + " | ".join(_marked(cell, "**{}**", "<u>{}</u>") for cell in cells) + " |"

    for name, rows in sheet.groups:
        if len(sheet.groups) > 1:
            lines.append(f"| *{name}* |" + " |" * len(sheet.columns))
        lines += [line(label, cells) for label, cells in rows]
    lines += [line(f"{label}", cells) for label, cells in sheet.foot]
    return f"### {sheet.title}\n\n{sheet.note}\n\n" + "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _marked(cell: Cell, bold: str, underline: str) -> str:
    score, gain = shown(cell)
    text = f"{score} ({gain})" if gain else score
    return {"bold": bold, "underline": underline}.get(cell.mark, "{}").format(text) if text else ""


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


def _tex(text: str) -> str:
    """Text as LaTeX shows it."""
    escaped = "".join(_LATEX.get(c, c) for c in text)
    return escaped.replace("±", r"$\pm$").replace(DAGGER, r"$\dagger$").replace("\N{MINUS SIGN}", "$-$")


def latex(sheet: Sheet) -> str:
    r"""A `table*` that needs booktabs, and \resizebox of graphicx to fit the page."""

    def line(label: str, cells: Sequence[Cell]) -> str:
        return f"{_tex(label)} & " + " & ".join(_tex_cell(cell) for cell in cells) + r" \\"

    heads = [part.partition("/") for part in sheet.columns]
    body = [
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_tex(sheet.title)}. {_tex(sheet.note)}}}",
        rf"\label{{tab:{slug(sheet.name)}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * len(sheet.columns)}}}",
        r"\toprule",
        " & ".join(["", *(_tex(tokens) for tokens, _, _ in heads)]) + r" \\",
        " & ".join(["data set", *(_tex(head) for _, _, head in heads)]) + r" \\",
    ]
    for name, rows in sheet.groups:
        body.append(r"\midrule")
        if len(sheet.groups) > 1:
            body.append(rf"\multicolumn{{{1 + len(sheet.columns)}}}{{l}}{{\emph{{{_tex(name)}}}}} \\")
        body += [line(label, cells) for label, cells in rows]
    if sheet.foot:
        body += [r"\midrule", *(line(label, cells) for label, cells in sheet.foot)]
    return "\n".join([*body, r"\bottomrule", r"\end{tabular}}", r"\end{table*}", ""])


def _tex_cell(cell: Cell) -> str:
    score, gain = shown(cell)
    if not score:
        return ""
    set_as = {"bold": r"\textbf{{{}}}", "underline": r"\underline{{{}}}"}.get(cell.mark, "{}")
    text = set_as.format(_tex(score))
    return text + (rf" {{\scriptsize({_tex(gain)})}}" if gain else "")


def as_any(sheet: Sheet) -> dict[str, Any]:
    """What the page's template shows of it: cells as (score, gain, mark, strength of the colour from -1 to 1)."""

    def cells(held: Sequence[Cell]) -> list[tuple[str, str, str, float]]:
        return [(*shown(cell), cell.mark, cell.gain.mean / sheet.reach if cell.gain else 0.0) for cell in held]

    return {
        "name": sheet.name,
        "title": sheet.title,
        "note": sheet.note,
        "heads": [name.partition("/")[::2] for name in sheet.columns],
        "groups": [(name, [(label, cells(held)) for label, held in rows]) for name, rows in sheet.groups],
        "foot": [(label, cells(held)) for label, held in sheet.foot],
    }
