"""Gains over models and data sets as box plots: by probe, model, kind of token, number of heads (figures 2, 3, A10, A12)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

import numpy as np

from mlfusion.report.figures.drawing import Figure, Key, Panel, Record, charted, finished, needs_altair
from mlfusion.report.look import SHAPES
from mlfusion.report.summary import ALF, Block, Score, Study, head_of, percent, points
from mlfusion.specs import ALIASES, BASELINE
from mlfusion.statistics import FEWEST, Against, against

LEAST_FOR_A_BOX = 5
"""Quartiles of fewer values than these say less than the values do."""

SHOWN = {ALIASES["aat"]: "AAT", "cls+ap-all-layers/linear": "linear, all layers", ALF: "ALF"}
"""The three that the study sets against each other over models."""

READ = (
    f"A dot is one {{dot}}; the box holds the middle half with its median, whiskers reach to 1.5 times its length (from "
    f"{LEAST_FOR_A_BOX} values on)."
)


@dataclass(frozen=True)
class Value:
    """One dot."""

    label: str  # what it is of: a data set, or a model on one
    x: float
    scored: str  # the absolute score, and what else the pointer says


@dataclass(frozen=True)
class Line:
    """The dots of one box."""

    name: str  # above it; empty where the legend names it
    series: int  # which colour and shape, from 1
    values: Sequence[Value]
    text: str  # at its right end

    @property
    def box(self) -> dict[str, float] | None:
        """Quartiles, and the furthest values within 1.5 times their distance; None for too few values."""
        held = np.array([value.x for value in self.values])
        if len(held) < LEAST_FOR_A_BOX:
            return None
        q1, median, q3 = (float(q) for q in np.quantile(held, (0.25, 0.5, 0.75)))
        inside = held[(held >= q1 - 1.5 * (q3 - q1)) & (held <= q3 + 1.5 * (q3 - q1))]
        return {"low": float(inside.min()), "q1": q1, "median": median, "q3": q3, "high": float(inside.max())}


def lines_panel(
    title: str, groups: Sequence[tuple[str, Sequence[Line]]], axis: str, domain: tuple[float, float], zero: bool
) -> Panel:
    """Lines of dots and boxes under each other; a group's name stands above its lines."""
    records: list[Record] = []
    at = 0.0
    for name, lines in groups:
        at += 14
        if name:
            records.append({"what": "name", "at": at, "text": name})
        for i, line in enumerate(lines):
            # A line's value stands above its right end, beside a name where there is one.
            if line.name and name:
                at += 14
            if line.name or i:
                at += 0 if line.name else 9
            if line.name:
                records.append({"what": "name", "at": at, "text": line.name})
            records.append({"what": "value", "at": at, "text": line.text})
            at += 16
            records += _dots(line, at)
            at += 0 if i == len(lines) - 1 else 10 if line.name else 0
        at += 12
    height = round(at + 4)
    return Panel(title, _lines_spec(height, axis, domain, zero), records)


def _dots(line: Line, at: float) -> list[Record]:
    place: Record
    made: list[Record] = [{"what": "track", "at": at, "top": at - 9, "bottom": at + 9}]
    if box := line.box:
        said = f"{_signed(box['q1'])} to {_signed(box['q3'])}, median {_signed(box['median'])}, n = {len(line.values)}"
        made.append({"what": "box", "at": at, "series": line.series, "label": line.name, "said": said} | box)  # type: ignore[arg-type]
    elif line.values:
        made.append(
            {"what": "middle", "at": at, "series": line.series, "median": float(np.median([v.x for v in line.values]))}
        )
    for i, value in enumerate(line.values):
        jitter = 4 * ((i * 0.618034) % 1 - 0.5) if len(line.values) > 1 else 0  # spread evenly, the same every time
        place = {"what": "dot", "at": at + jitter, "x": value.x, "series": line.series}
        made.append(place | {"label": value.label, "scored": value.scored})
    return made


def _signed(value: float) -> str:
    return points(value / 100)


@lru_cache(maxsize=256)
def _lines_spec(height: int, axis: str, domain: tuple[float, float], zero: bool) -> dict[str, Any]:
    alt = needs_altair()
    base = charted()

    def of(what: str) -> Any:
        return base.transform_filter(f"datum.what == '{what}'")

    y_scale = alt.Scale(domain=[0, height], range=[0, height], nice=False, zero=False)
    y = alt.Y("at:Q", scale=y_scale, axis=None)
    scale = alt.Scale(domain=list(domain), zero=False, nice=False, padding=8)

    def x(field: str) -> Any:
        return alt.X(f"{field}:Q", title=axis, scale=scale, axis=alt.Axis(tickCount=6, grid=False))

    series = list(range(1, len(SHAPES) + 1))
    colour = alt.Color("series:N", scale=alt.Scale(domain=series), legend=None)
    shape = alt.Shape("series:N", scale=alt.Scale(domain=series, range=list(SHAPES)), legend=None)
    tip = [alt.Tooltip("label:N", title="of"), alt.Tooltip("said:N", title="middle half")]
    layers = [of("track").mark_rule(style="track").encode(x=alt.value(0), x2=alt.value("width"), y=y)]
    if zero:
        piece = alt.Y("top:Q", scale=y_scale, axis=None)  # one a line, so that it strikes through no name
        layers.append(of("track").mark_rule(style="baseline").encode(x=alt.XDatum(0), y=piece, y2="bottom:Q"))
    layers += [
        of("box").mark_rule(style="whisker").encode(x=x("low"), x2="high:Q", y=y, color=colour),
        of("box")
        .mark_bar(style="box", size=13)
        .encode(x=x("q1"), x2="q3:Q", y=y, color=colour, stroke=colour, tooltip=tip),
        of("dot")
        .mark_point(style="point", filled=True)
        .encode(
            x=x("x"),
            y=y,
            color=colour,
            shape=shape,
            tooltip=[
                alt.Tooltip("label:N", title="of"),
                alt.Tooltip("x:Q", title=axis, format="+.2f" if zero else ".2f"),
                alt.Tooltip("scored:N", title="scores"),
            ],
        ),
        *(
            of(what).mark_tick(style="median", size=15).encode(x=x("median"), y=y, color=colour)
            for what in ("box", "middle")
        ),
        of("name").mark_text(style="name", align="left", baseline="middle").encode(x=alt.value(0), y=y, text="text:N"),
        of("value")
        .mark_text(style="value", align="right", baseline="middle")
        .encode(x=alt.value("width"), y=y, text="text:N"),
    ]
    return finished(alt.layer(*layers), height)


def domain_of(groups: Iterable[tuple[str, Sequence[Line]]], zero: bool) -> tuple[float, float]:
    """From the lowest dot to the highest of all panels, with nought where gains are drawn; two points at least."""
    held = [value.x for _, lines in groups for line in lines for value in line.values] + [0.0] * zero
    missing = max(0.0, 2 - (max(held) - min(held))) / 2
    return min(held) - missing, max(held) + missing


# --- the figures -----------------------------------------------------------------------------------------------------


def _value(label: str, score: Score, base: Score | None) -> Value:
    assert score.gain is not None
    against = f" against {percent(base.test.mean, 2)} %" if base else ""
    return Value(label, 100 * score.gain.mean, f"{percent(score.test.mean, 2)} %{against}")


def _gains(study: Study, probe: str, *, model: str | None = None, dataset: str | None = None) -> list[Value]:
    """One a model and data set at hand; labelled by what is not given."""
    made = []
    for block in study.blocks:
        if model not in (None, block.model) or dataset not in (None, block.dataset):
            continue
        score = study.score(block.model, block.dataset, probe)
        if score is None or score.gain is None or score.is_baseline:
            continue
        label = block.dataset if model else block.model if dataset else f"{block.model}, {block.dataset}"
        made.append(_value(label, score, block.baseline))
    return made


def _scores(study: Study, probe: str, model: str | None = None) -> list[Value]:
    return [
        Value(block.dataset if model else f"{block.model}, {block.dataset}", 100 * score.test.mean, "")
        for block in study.blocks
        if model in (None, block.model) and (score := study.score(block.model, block.dataset, probe))
    ]


def _numbers(study: Study, probes: Sequence[str]) -> list[Record]:
    return [_number(block, score) for block in study.blocks for score in block.probes if score.probe in probes]


def _number(block: Block, score: Score) -> Record:
    gain = score.gain
    return {
        "model": block.model,
        "dataset": block.dataset,
        "probe": score.probe,
        "test": 100 * score.test.mean,
        "test_sd": None if score.test.sd is None else 100 * score.test.sd,
        "gain": None if gain is None else 100 * gain.mean,
        "gain_sd": None if gain is None or gain.sd is None else 100 * gain.sd,
        "seeds": score.test.n,
    }


def _mean_text(scores: Sequence[Value], gains: Sequence[Value], most: int) -> str:
    """'76.4 (+4.1)': mean score over the same cases, mean gain; and n where other lines are of more cases."""
    if not gains:
        return ""
    labels = {value.label for value in gains}
    held = [value.x for value in scores if value.label in labels]
    few = f"; n = {len(gains)}" if len(gains) < most else ""
    return f"{fmean(held):.1f} ({points(fmean(v.x for v in gains) / 100)}{few})"


def by_probe(study: Study) -> Figure | None:
    """Figure 2: for each model, each probe's gains over the data sets; None where nothing has a gain."""
    probes = [probe for probe in study.probes if probe != BASELINE and _gains(study, probe)]
    if not probes:
        return None
    heads = list(dict.fromkeys(["linear", "attentive", *(head_of(probe) for probe in probes)]))
    held: list[tuple[str, list[tuple[str, list[Line]]]]] = []
    tests: list[Record] = []
    for model in study.models:
        found = {probe: gains for probe in probes if (gains := _gains(study, probe, model=model))}
        tested = {
            one.name: one for one in against({probe: [v.x / 100 for v in gains] for probe, gains in found.items()})
        }
        tests += [_test(model, one) for one in tested.values()]
        lines = []
        most = max(map(len, found.values()), default=0)
        for probe, gains in found.items():
            series = heads.index(head_of(probe)) % len(SHAPES) + 1
            star = " *" if tested[probe].significant else ""
            lines.append(Line(probe, series, gains, _mean_text(_scores(study, probe, model), gains, most) + star))
        base = [value.x for value in _scores(study, BASELINE, model)]
        if lines and base:
            title = f"{model}: baseline {fmean(base):.1f} % (n = {len(base)})"
            held.append((title, [("", [line]) for line in lines]))
    domain = domain_of((group for _, groups in held for group in groups), zero=True)
    panels = [lines_panel(title, groups, "gain, points", domain, zero=True) for title, groups in held]
    cases = len(study.blocks)
    return Figure(
        "gains-by-probe",
        "Gain of each probe over the baseline",
        f"Gain on test in points over {BASELINE}, whose mean {study.metric} stands above each panel. "
        + READ.format(dot="data set (mean over seeds)")
        + " At the right: mean score (mean gain); n counts data sets. "
        + (
            "* gains at q < 0.05 (one-sided Wilcoxon signed-rank test over data sets, "
            "Benjamini-Hochberg over a model's probes)."
            if any(test["q"] is not None for test in tests)
            else f"Nothing is tested: that takes {FEWEST} data sets."
        ),
        f"Gains over {BASELINE} in {cases} cases. "
        + "; ".join(
            f"{title}: " + ", ".join(f"{line.name} {line.text}" for _, lines in groups for line in lines)
            for title, groups in held
        ),
        panels,
        _numbers(study, [BASELINE, *probes]),
        tuple(
            Key(head, i % len(SHAPES) + 1, SHAPES[i % len(SHAPES)])
            for i, head in enumerate(heads)
            if _used(head, probes)
        ),
        more={"tests": tests},
    )


def _test(model: str, one: Against) -> Record:
    return {
        "model": model,
        "probe": one.name,
        "n": one.n,
        "mean": 100 * one.mean,
        "median": 100 * one.median,
        "p": one.p,
        "q": one.q,
        "significant": "yes" if one.significant else "",
        "refused": one.refused,
    }


def _used(head: str, probes: Sequence[str]) -> bool:
    return any(head_of(probe) == head for probe in probes)


def by_model(study: Study) -> Figure | None:
    """Figure 3: absolute scores of the baseline beside gains of three probes, model by model; None for one model."""
    shown = [probe for probe in SHOWN if _gains(study, probe)]
    models = [model for model in study.models if _scores(study, BASELINE, model)]
    if not shown or len(models) < 2:
        return None
    absolute: list[tuple[str, list[Line]]] = []
    gained: list[tuple[str, list[Line]]] = []
    for model in models:
        base = _scores(study, BASELINE, model)
        most = len(base)
        absolute.append((model, [Line("", 1, base, f"{fmean(v.x for v in base):.1f}")]))
        lines = []
        for i, probe in enumerate(shown):
            if gains := _gains(study, probe, model=model):
                lines.append(Line("", i + 2, gains, _mean_text(_scores(study, probe, model), gains, most)))
        gained.append((model, lines))
    panels = [
        lines_panel(f"{BASELINE}", absolute, f"{study.metric} on test, %", domain_of(absolute, False), zero=False),
        lines_panel("Gain over it", gained, "gain, points", domain_of(gained, True), zero=True),
    ]
    said = "; ".join(f"{name} {', '.join(line.text for line in lines)}" for name, lines in [*absolute, *gained])
    return Figure(
        "gains-by-model",
        "Scores of the baseline, and what each model gains",
        f"Left {study.metric} of {BASELINE}, right gains on test in points. "
        + READ.format(dot="data set (mean over seeds)")
        + " At the right: mean score (mean gain).",
        said,
        panels,
        _numbers(study, [BASELINE, *shown]),
        (Key(BASELINE, 1, SHAPES[0]), *(Key(SHOWN[probe], i + 2, SHAPES[i + 1]) for i, probe in enumerate(shown))),
        columns=2,
    )


def by_token(study: Study) -> Figure | None:
    """Figure A10: CLS, AP or both, for every (layers, head) that AP and another were run with; over all, then a data set."""
    pooled: dict[str, dict[str, str]] = {}
    for probe in study.probes:
        for kinds in ("cls", "ap", "cls+ap"):
            if probe.startswith(f"{kinds}-"):
                pooled.setdefault(probe.removeprefix(f"{kinds}-"), {})[kinds] = probe
    pooled = {
        rest: kinds
        for rest, kinds in pooled.items()
        if "ap" in kinds and len(kinds) > 1 and any(_gains(study, p) for p in kinds.values())
    }
    if not pooled:
        return None
    words = {"cls": "CLS", "ap": "AP", "cls+ap": "CLS + AP"}
    order = list(words)

    def groups(dataset: str | None) -> list[tuple[str, list[Line]]]:
        made = []
        for rest, kinds in pooled.items():
            lines = []
            for kind in order:
                if kind not in kinds:
                    continue
                gains = _gains(study, kinds[kind], dataset=dataset)
                if kinds[kind] == BASELINE:  # nought by definition, and worth showing beside the others
                    gains = [
                        Value(
                            b.model if dataset else f"{b.model}, {b.dataset}",
                            0.0,
                            f"{percent(b.baseline.test.mean, 2)} %",
                        )
                        for b in study.blocks
                        if b.baseline and dataset in (None, b.dataset)
                    ]
                if gains:
                    mean = fmean(value.x for value in gains)
                    lines.append(Line("", order.index(kind) + 1, gains, f"{points(mean / 100)} (n = {len(gains)})"))
            if lines:
                made.append((rest, lines))
        return made

    views = [("All", groups(None))]
    if len(study.datasets) > 1:
        views += [(name, held) for name in study.datasets if (held := groups(name))]
    domain = domain_of((group for _, held in views for group in held), zero=True)
    return Figure(
        "tokens",
        "CLS, AP, or both",
        f"Gain on test in points over {BASELINE}. "
        + READ.format(dot="model on a data set (mean over seeds)")
        + " At the right: mean.",
        "; ".join(f"{rest}: " + ", ".join(line.text for line in lines) for rest, lines in views[0][1]),
        [lines_panel(title, held, "gain, points", domain, zero=True) for title, held in views],
        _numbers(study, [BASELINE, *(probe for kinds in pooled.values() for probe in kinds.values())]),
        tuple(
            Key(words[kind], i + 1, SHAPES[i])
            for i, kind in enumerate(order)
            if any(kind in k for k in pooled.values())
        ),
    )


def by_heads(study: Study) -> Figure | None:
    """Figure A12: an attentive probe's gains by its number of heads; None where no case was run with two numbers."""
    found: dict[str, dict[int, dict[str, Value]]] = {}
    numbers: list[Record] = []
    for block in study.blocks:
        for score in block.probes:
            tried = {row.selected.heads for row in score.rows}
            if len(tried) != 1 or None in tried or score.gain is None:
                continue
            heads = int(tried.pop() or 0)
            case = f"{block.model}, {block.dataset}"
            found.setdefault(score.probe.partition(":")[0], {}).setdefault(heads, {})[case] = _value(
                case, score, block.baseline
            )
            numbers.append(_number(block, score) | {"heads": heads})
    found = {probe: counts for probe, counts in found.items() if len(_same(counts)) > 1}
    if not found:
        return None
    groups: list[tuple[str, list[Line]]] = []
    for probe, counts in found.items():
        lines = []
        for i, heads in enumerate(_same(counts)):
            values = list(counts[heads].values())
            mean = fmean(value.x for value in values)
            lines.append(
                Line(f"{heads} heads", i % len(SHAPES) + 1, values, f"{points(mean / 100)} (n = {len(values)})")
            )
        groups.append((probe, lines))
    return Figure(
        "heads",
        "How many heads",
        f"Gain on test in points over {BASELINE}. "
        + READ.format(dot="model on a data set (mean over seeds)")
        + " At the right: mean gain.",
        "; ".join(f"{probe}: " + ", ".join(f"{line.name} {line.text}" for line in lines) for probe, lines in groups),
        [lines_panel("", groups, "gain, points", domain_of(groups, True), zero=True)],
        [n for n in numbers if str(n["probe"]).partition(":")[0] in found],
    )


def _same(counts: dict[int, dict[str, Value]]) -> list[int]:
    """Numbers of heads that some same case was run with: different models' own numbers are no comparison."""
    shared = {
        heads
        for heads, cases in counts.items()
        for other in counts
        if other != heads and set(cases) & set(counts[other])
    }
    return sorted(shared)
