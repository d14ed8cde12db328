"""What else a study shows: cost, deviation over seeds, train against test, ranks, scores as a map (figures A4, A11, A15)."""

from collections.abc import Sequence
from functools import lru_cache
from math import log
from statistics import fmean
from typing import Any

from mlfusion.errors import BadData
from mlfusion.report.figures.drawing import Figure, Key, Panel, Record, charted, finished, needs_altair, spread_of
from mlfusion.report.figures.gains import SHOWN
from mlfusion.report.look import SHAPES
from mlfusion.report.summary import Score, Study, domain, head_of, percent, points
from mlfusion.specs import BASELINE
from mlfusion.statistics import ranking

HEADS = ("linear", "attentive")


def _cases(study: Study, probes: Sequence[str]) -> list[tuple[str, str]]:
    """The (model, data set)s on which all of these were run: like is averaged with like."""
    return [
        (block.model, block.dataset)
        for block in study.blocks
        if all(study.score(block.model, block.dataset, probe) for probe in probes)
    ]


# --- cost ------------------------------------------------------------------------------------------------------------


def cost(study: Study) -> Figure | None:
    """Score against parameters and against seconds, a dot a probe, averaged over the cases that all of them share."""
    probes = list(study.probes)
    while probes and not _cases(study, probes):  # leave out what was run least, until some case has all
        probes.remove(min(probes, key=lambda probe: len(_cases(study, [probe]))))
    cases = _cases(study, probes)
    if len(probes) < 2:
        return None
    records: list[Record] = []
    for probe in probes:
        scores = [score for model, dataset in cases if (score := study.score(model, dataset, probe))]
        gains = [score.gain.mean for score in scores if score.gain]
        gain = "" if probe == BASELINE or len(gains) < len(scores) else f", {points(fmean(gains))} points"
        head = head_of(probe)
        records.append(
            {
                "probe": probe,
                "head": head,
                "test": 100 * fmean(score.test.mean for score in scores),
                "parameters": fmean(score.parameters for score in scores),
                "seconds": fmean(score.seconds for score in scores),
                "scored": f"{percent(fmean(score.test.mean for score in scores))} %{gain}",
                "n": len(scores),
            }
        )
    reach = spread_of(records, "test", "test")
    low, high = reach
    panels = []
    for name, axis in (("parameters", "parameters of the probe"), ("seconds", "seconds of probing (grid and refit)")):
        held = [max(float(record[name] or 0), 1e-3) for record in records]
        ends = (min(held) / 1.5, max(held) * 1.5)
        across = log(ends[1] / ends[0])
        places = [
            (log(x / ends[0]) / across, (float(r["test"] or 0) - low) / (high - low))
            for x, r in zip(held, records, strict=True)
        ]
        sides = _sides([str(record["probe"]) for record in records], places)
        placed = [record | {"side": side} for record, side in zip(records, sides, strict=True)]
        panels.append(Panel(axis[0].upper() + axis[1:], _cost_spec(name, axis, study.metric, ends, reach), placed))
    heads = list(dict.fromkeys([*HEADS, *(str(record["head"]) for record in records)]))
    keys = [(head, i) for i, head in enumerate(heads) if any(record["head"] == head for record in records)]
    return Figure(
        "cost",
        "What a point costs",
        "A dot is a probe, mean over seeds"
        + (
            f", averaged over the {len(cases)} cases (a model on a data set) that have all of these"
            if len(cases) > 1
            else ""
        )
        + ". Seconds are those of the machines that the rows come from.",
        "; ".join(
            f"{r['probe']} {r['scored']}, {r['parameters']:,.0f} parameters, {r['seconds']:.1f} s" for r in records
        ),
        panels,
        [{key: value for key, value in record.items() if key != "scored"} for record in records],
        tuple(Key(head, i % 6 + 1, SHAPES[i % 6]) for head, i in keys),
        columns=2,
    )


def _sides(
    names: Sequence[str], places: Sequence[tuple[float, float]], width: int = 460, height: int = 340
) -> list[str]:
    """On which side of its dot each name stands: the first where it meets no name and no dot, and stays inside."""
    dots = [(x * width, (1 - y) * height) for x, y in places]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    sides = []
    for name, (x, y) in zip(names, dots, strict=True):
        long = 6.0 * len(name)
        boxes = {
            "right": (x + 8, y - 6, x + 8 + long, y + 6),
            "left": (x - 8 - long, y - 6, x - 8, y + 6),
            "above": (x - long / 2, y - 20, x + long / 2, y - 8),
            "below": (x - long / 2, y + 8, x + long / 2, y + 20),
        }

        def crowd(side: str, boxes: dict[str, tuple[float, float, float, float]] = boxes) -> float:
            a = boxes[side]
            outside = max(0.0, -a[0]) + max(0.0, a[2] - width) + max(0.0, -a[1]) + max(0.0, a[3] - height)
            return outside + sum(
                max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * (min(a[3], b[3]) > max(a[1], b[1])) for b in taken
            )

        side = min(boxes, key=crowd)
        taken.append(boxes[side])
        sides.append(side)
    return sides


@lru_cache(maxsize=64)
def _cost_spec(
    name: str, axis: str, metric: str, ends: tuple[float, float], reach: tuple[float, float]
) -> dict[str, Any]:
    alt = needs_altair()
    base = charted()
    x = alt.X(
        f"{name}:Q",
        title=axis,
        scale=alt.Scale(type="log", domain=list(ends), nice=False),
        axis=alt.Axis(format="~s", grid=False, tickCount=4, labelOverlap="greedy", labelSeparation=6),
    )
    y = alt.Y(
        "test:Q",
        title=f"{metric} on test, %",
        scale=alt.Scale(domain=list(reach), zero=False, padding=14, nice=False),
        axis=alt.Axis(tickCount=5),
    )
    colour = alt.Color("head:N", scale=alt.Scale(domain=list(HEADS)), legend=None)
    shape = alt.Shape("head:N", scale=alt.Scale(domain=list(HEADS), range=list(SHAPES)), legend=None)
    tip = [
        alt.Tooltip("probe:N"),
        alt.Tooltip("scored:N", title="test"),
        alt.Tooltip("parameters:Q", format=",.0f"),
        alt.Tooltip("seconds:Q", format=",.1f"),
        alt.Tooltip("n:Q", title="cases"),
    ]
    sides = {"right": ("left", 8, 0), "left": ("right", -8, 0), "above": ("center", 0, -14), "below": ("center", 0, 14)}
    names = [
        base.transform_filter(f"datum.side == '{side}'")
        .mark_text(style="name", align=align, dx=dx, dy=dy, fontSize=11)
        .encode(x=x, y=y, text="probe:N")
        for side, (align, dx, dy) in sides.items()
    ]
    dots = base.mark_point(style="dot", filled=True).encode(x=x, y=y, color=colour, shape=shape, tooltip=tip)
    return finished(alt.layer(*names, dots), 340)


# --- seeds, train against test ---------------------------------------------------------------------------------------


def _shown(study: Study) -> list[str]:
    """The baseline and the three that the study sets against each other, or else the first four."""
    named = [probe for probe in (BASELINE, *SHOWN) if probe in study.probes]
    return named if len(named) > 1 else list(study.probes[:4])


def seeds(study: Study) -> Figure | None:
    """Figure A15: the deviation over seeds of the test score, data set by data set; None where nothing has two seeds."""
    shown = _shown(study)
    records: list[Record] = []
    for dataset in study.datasets:
        for probe in shown:
            held = [score for model in study.models if (score := study.score(model, dataset, probe))]
            found = [(score.test.sd, score) for score in held if score.test.sd is not None]
            if not found:
                continue
            deviations, ns = [100 * sd for sd, _ in found], sorted({score.test.n for _, score in found})
            records.append(
                {
                    "dataset": dataset,
                    "probe": probe,
                    "sd": fmean(deviations),
                    "highest": max(deviations),
                    "test": 100 * fmean(score.test.mean for _, score in found),
                    "models": len(found),
                    "seeds": " to ".join(str(n) for n in sorted({ns[0], ns[-1]})),
                }
            )
    if not records:
        return None
    several = any(float(record["models"] or 0) > 1 for record in records)
    return Figure(
        "seeds",
        "How much a seed changes",
        "Sample standard deviation over seeds of the test score, in points"
        + (": bars are means over models, ticks the model with the largest." if several else "."),
        "; ".join(f"{r['dataset']}, {r['probe']}: {r['sd']:.2f} points over {r['seeds']} seeds" for r in records),
        [_bars("", records, shown, "sd", "highest" if several else None, "standard deviation over seeds, points")],
        records,
        tuple(Key(probe, i + 1, "box") for i, probe in enumerate(shown)),
        columns=1,
    )


def _bars(
    title: str, records: Sequence[Record], series: Sequence[str], value: str, tick: str | None, axis: str
) -> Panel:
    rows = tuple(dict.fromkeys(str(record["dataset"]) for record in records))
    return Panel(title, _bar_spec(rows, tuple(series), value, tick, axis), records, width=620)


@lru_cache(maxsize=64)
def _bar_spec(
    rows: tuple[str, ...], series: tuple[str, ...], value: str, tick: str | None, axis: str
) -> dict[str, Any]:
    alt = needs_altair()
    base = charted()
    y = alt.Y(
        "dataset:N",
        sort=list(rows),
        title=None,
        axis=alt.Axis(domain=False, ticks=False),
        scale=alt.Scale(paddingInner=0.3),
    )
    offset = alt.YOffset("probe:N", sort=list(series))
    x = alt.X(f"{value}:Q", title=axis, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=6))
    colour = alt.Color("probe:N", scale=alt.Scale(domain=list(series)), legend=None)
    tip = [
        alt.Tooltip("dataset:N", title="data set"),
        alt.Tooltip("probe:N"),
        alt.Tooltip(f"{value}:Q", title="mean deviation", format=".3f"),
        alt.Tooltip("highest:Q", title="largest", format=".3f"),
        alt.Tooltip("test:Q", title="score, %", format=".2f"),
        alt.Tooltip("models:Q"),
        alt.Tooltip("seeds:N"),
    ]
    layers = [base.mark_bar().encode(x=x, y=y, yOffset=offset, color=colour, tooltip=tip)]
    if tick:
        marks = base.mark_tick(style="median").encode(x=f"{tick}:Q", y=y, yOffset=offset, color=colour, tooltip=tip)
        layers.append(marks)
    return finished(alt.layer(*layers), max(60, len(rows) * (9 * len(series) + 8)))


def train_test(study: Study) -> Figure | None:
    """Figure A11: train and test score of each data set joined by a line, a panel a probe."""
    panels, numbers = [], []
    probes = _shown(study)
    held = {probe: _train_records(study, probe) for probe in probes}
    everything = [record for records in held.values() for record in records]
    if not everything:
        return None
    low = min(float(record["test"] or 0) for record in everything)
    for probe, records in held.items():
        rows = tuple(str(record["dataset"]) for record in records)
        panels.append(Panel(probe, _train_spec(rows, tuple(probes), study.metric, min(low, 95)), records, width=330))
        numbers += records
    return Figure(
        "train-test",
        "Train against test",
        "Hollow: score on the training images, filled: on the test images; means over models and seeds. A long line is a probe "
        "that learnt its training images by heart.",
        "; ".join(f"{r['dataset']}, {r['probe']}: train {r['train']:.1f} %, test {r['test']:.1f} %" for r in numbers),
        panels,
        numbers,
        (Key("train", 0, "hollow"), Key("test", 0, "circle")),
        columns=4,
    )


def _train_records(study: Study, probe: str) -> list[Record]:
    records: list[Record] = []
    for dataset in study.datasets:
        scores = [score for model in study.models if (score := study.score(model, dataset, probe))]
        if scores:
            train, test = (fmean(getattr(score, which).mean for score in scores) for which in ("train", "test"))
            gap = points(train - test)
            place: Record = {"dataset": dataset, "domain": domain(dataset), "probe": probe, "models": len(scores)}
            records.append(place | {"train": 100 * train, "test": 100 * test, "gap": gap})
    return records


@lru_cache(maxsize=64)
def _train_spec(rows: tuple[str, ...], series: tuple[str, ...], metric: str, low: float) -> dict[str, Any]:
    alt = needs_altair()
    base = charted()
    y = alt.Y("dataset:N", sort=list(rows), title=None, axis=alt.Axis(domain=False, ticks=False))
    scale = alt.Scale(domain=[low, 100], zero=False, nice=True, padding=8)
    x = alt.X("test:Q", title=f"{metric}, %", scale=scale, axis=alt.Axis(tickCount=5, grid=False))
    colour = alt.Color("probe:N", scale=alt.Scale(domain=list(series)), legend=None)
    tip = [
        alt.Tooltip("dataset:N", title="data set"),
        alt.Tooltip("train:Q", title="train, %", format=".2f"),
        alt.Tooltip("test:Q", title="test, %", format=".2f"),
        alt.Tooltip("gap:N", title="train over test, points"),
        alt.Tooltip("models:Q"),
    ]
    return finished(
        alt.layer(
            base.mark_rule(style="stem").encode(x=x, x2="train:Q", y=y, color=colour),
            base.mark_point(style="hollow").encode(x="train:Q", y=y, color=colour, tooltip=tip),
            base.mark_point(style="dot", filled=True).encode(x=x, y=y, color=colour, tooltip=tip),
        ),
        max(50, 24 * len(rows)),
    )


# --- ranks -----------------------------------------------------------------------------------------------------------


def ranks(study: Study) -> Figure | None:
    """A critical-difference diagram (Demšar 2006): mean ranks over data sets, those that do not differ joined by a bar.

    None for fewer than three probes or six data sets that have all of them.
    """
    probes = [p for p in study.probes if len(_cases(study, [p])) == len(study.blocks)]
    scores = {
        probe: [
            fmean(score.test.mean for model in study.models if (score := study.score(model, dataset, probe)))
            for dataset in study.datasets
        ]
        for probe in probes
    }
    try:
        found = ranking(scores)
    except BadData:
        return None
    groups = found.groups
    records: list[Record] = []
    for i, (name, rank, mean) in enumerate(zip(found.names, found.ranks, found.means, strict=True)):
        said = f"{name}   {rank:.2f}   ({100 * mean:.1f} %)"
        records.append(
            {"what": "probe", "probe": name, "rank": rank, "test": 100 * mean, "at": 34 + 22 * i, "text": said}
        )
    for i, group in enumerate(groups):
        held = [rank for name, rank in zip(found.names, found.ranks, strict=True) if name in group]
        records.append(
            {"what": "group", "rank": min(held), "end": max(held), "at": 5 + 6 * i, "text": ", ".join(group)}
        )
    height = 34 + 22 * len(found.names)
    over = f"{found.datasets} data sets" + (
        f" (means over {len(study.models)} models)" if len(study.models) > 1 else ""
    )
    top = 34 + 6 * max(0, len(groups) - 4)
    for record in records:
        if record["what"] == "probe":
            record["at"] = float(record["at"] or 0) + top - 34
    numbers: list[Record] = [
        {"probe": name, "mean_rank": rank, "test": 100 * mean, "data_sets": found.datasets}
        for name, rank, mean in zip(found.names, found.ranks, found.means, strict=True)
    ]
    pairs: list[Record] = [{"a": p.a, "b": p.b, "nemenyi_p": p.nemenyi, "wilcoxon_holm_p": p.holm} for p in found.pairs]
    return Figure(
        "ranks",
        "Mean ranks, and which of them differ",
        f"Mean rank of each probe over {over}, 1 the best, with its mean score. Bars join probes "
        f"whose ranks differ by less than "
        f"the critical difference of {found.critical_difference:.2f} (Nemenyi, "
        f"{100 * (1 - found.level):.0f} %); that all do equally "
        f"well has p = {found.friedman:.2g} (Friedman).",
        "; ".join(str(record["text"]) for record in records),
        [Panel("", _rank_spec(len(found.names), height + top - 34), records, width=560)],
        numbers,
        columns=1,
        more={"pairs": pairs},
    )


@lru_cache(maxsize=64)
def _rank_spec(probes: int, height: int) -> dict[str, Any]:
    alt = needs_altair()
    base = charted()
    y = alt.Y("at:Q", axis=None, scale=alt.Scale(domain=[0, height], range=[0, height], nice=False, zero=False))
    # Room at the right for the names of those that rank last.
    scale = alt.Scale(domain=[1, probes], nice=False, zero=False, padding=6)
    x = alt.X("rank:Q", title="mean rank", scale=scale, axis=alt.Axis(orient="top", tickMinStep=1, grid=False))
    one, group = base.transform_filter("datum.what == 'probe'"), base.transform_filter("datum.what == 'group'")
    left, right = (f"datum.rank {test} {(probes + 1) / 2}" for test in ("<=", ">"))
    tip = [
        alt.Tooltip("probe:N"),
        alt.Tooltip("rank:Q", format=".2f"),
        alt.Tooltip("test:Q", title="score, %", format=".2f"),
    ]
    return finished(
        alt.layer(
            one.mark_rule(style="track").encode(x=x, y=y, y2=alt.Y2Datum(0)),
            group.mark_rule(style="bar", strokeCap="round").encode(
                x=x, x2="end:Q", y=y, tooltip=alt.Tooltip("text:N", title="no clear difference")
            ),
            one.mark_point(style="dot", filled=True).encode(x=x, y=y, tooltip=tip),
            one.transform_filter(left).mark_text(style="name", align="left", dx=9).encode(x=x, y=y, text="text:N"),
            one.transform_filter(right).mark_text(style="name", align="right", dx=-9).encode(x=x, y=y, text="text:N"),
        ),
        height,
    )


# --- scores as a heat map --------------------------------------------------------------------------------------------


def scores_of(study: Study, model: str) -> Figure | None:
    """Figure A4: data sets × probes of one model, coloured by the gain; score and gain in every cell, mean gain below."""
    probes = [probe for probe in study.probes if any(study.score(model, d, probe) for d in study.datasets)]
    sets = [dataset for dataset in study.datasets if study.block(model, dataset)]
    records: list[Record] = []
    held: dict[str, list[Score]] = {}
    for dataset in sets:
        for probe in probes:
            if score := study.score(model, dataset, probe):
                gain = 100 * score.gain.mean if score.gain and not score.is_baseline else None
                held.setdefault(probe, []).append(score)
                records.append(
                    {
                        "dataset": dataset,
                        "probe": probe,
                        "test": 100 * score.test.mean,
                        "gain": gain,
                        "shown": percent(score.test.mean),
                        "gained": "" if gain is None else points(gain / 100),
                        "seeds": score.test.n,
                    }
                )
    if len(sets) > 1:
        for probe, scores in held.items():
            if len(scores) < len(sets):  # a mean over other data sets would not be comparable
                continue
            test = fmean(score.test.mean for score in scores)
            gains = [score.gain.mean for score in scores if score.gain and not score.is_baseline]
            gain = fmean(gains) if len(gains) == len(sets) else None
            both: Record = {"test": 100 * test, "gain": None if gain is None else 100 * gain}
            shown: Record = {"shown": percent(test), "gained": "" if gain is None else points(gain), "seeds": None}
            records.append({"dataset": f"mean of {len(sets)}", "probe": probe} | both | shown)
    if not records:
        return None
    rows = tuple(dict.fromkeys(str(record["dataset"]) for record in records))
    top = max((abs(float(record["gain"])) for record in records if record["gain"] is not None), default=1.0)
    spec = _heat_spec(rows, tuple(probes), max(top, 1.0))
    return Figure(
        f"scores-{model}",
        f"Scores and gains of {model}",
        f"{study.metric} on test in percent, below it the gain in points over {BASELINE}, which "
        f"colours the cell; means over seeds.",
        "; ".join(f"{r['dataset']}, {r['probe']}: {r['shown']} % {r['gained']}" for r in records),
        [Panel("", spec, records, width=max(300, 92 * len(probes)))],
        [{k: v for k, v in record.items() if k not in ("shown", "gained")} for record in records],
        columns=1,
    )


@lru_cache(maxsize=64)
def _heat_spec(rows: tuple[str, ...], probes: tuple[str, ...], top: float) -> dict[str, Any]:
    alt = needs_altair()
    base = charted()
    label = "[split(datum.label, '/')[0], split(datum.label, '/')[1]]"
    x = alt.X(
        "probe:N",
        sort=list(probes),
        title=None,
        scale=alt.Scale(paddingInner=0.03),
        axis=alt.Axis(
            orient="top",
            labelAngle=0,
            labelExpr=label,
            domain=False,
            ticks=False,
            labelFontSize=10,
            labelLimit=110,
            labelPadding=18,
        ),
    )
    y = alt.Y(
        "dataset:N",
        sort=list(rows),
        title=None,
        scale=alt.Scale(paddingInner=0.06),
        axis=alt.Axis(domain=False, ticks=False),
    )
    colour = alt.Color(
        "gain:Q",
        scale=alt.Scale(domain=[-top, 0, top], range="diverging", interpolate="rgb"),
        title="gain, points",
        legend=alt.Legend(orient="bottom", gradientLength=200, tickCount=5),
    )
    tip = [
        alt.Tooltip("dataset:N", title="data set"),
        alt.Tooltip("probe:N"),
        alt.Tooltip("test:Q", title="test, %", format=".2f"),
        alt.Tooltip("gain:Q", title="gain, points", format="+.2f"),
        alt.Tooltip("seeds:Q"),
    ]
    return finished(
        alt.layer(
            base.mark_rect(style="heat").encode(x=x, y=y, color=colour, tooltip=tip),
            base.mark_text(style="value", dy=-6).encode(x=x, y=y, text="shown:N"),
            base.mark_text(style="on-weak", dy=8).encode(x=x, y=y, text="gained:N"),
        ),
        34 * len(rows),
    )
