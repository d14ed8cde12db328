"""One model on one data set: accuracy per probe, attention over layers, accuracy by layer (figures 4, 5, A6 to A8)."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import isfinite
from typing import Any, Literal

from mlfusion.report.figures.drawing import Figure, Key, Panel, Record, charted, finished, needs_altair, spread_of
from mlfusion.report.look import SHAPES, Shape
from mlfusion.report.summary import (
    ALF,
    Block,
    LayerAttention,
    Score,
    Study,
    domain,
    listed,
    metric_name,
    percent,
    points,
)
from mlfusion.specs import BASELINE
from mlfusion.statistics import Spread

HEADS = ("linear", "attentive")
KIND_WORDS = {"cls": "CLS", "ap": "AP"}

Cka = Mapping[tuple[str, str], Mapping[Literal["linear", "rbf"], Mapping[str, Mapping[int, float]]]]
"""{(model, data set): {kernel: {token kind: {layer: CKA of its tokens with the last layer's}}}}."""

KERNELS: Mapping[str, tuple[str, Shape]] = {"linear": ("linear CKA", "dotted"), "rbf": ("CKA by an RBF", "dash-dot")}
"""How each is called and drawn."""


def spread_text(spread: Spread, *, gain: bool = False) -> str:
    """'97.1 ± 0.3', without the deviation for one seed."""
    shown = points(spread.mean) if gain else percent(spread.mean)
    return shown + (f" ± {percent(spread.sd)}" if spread.sd is not None else "")


def _gained(score: Score) -> str:
    if score.is_baseline:
        return "the baseline"
    return spread_text(score.gain, gain=True) + " points" if score.gain else "no baseline to count from"


# --- accuracy per probe ----------------------------------------------------------------------------------------------


def accuracy_records(block: Block) -> list[Record]:
    """One a probe: test score with the ends of its bar, gain, and what the label and the pointer say."""
    return [
        {
            "probe": score.probe,
            "head": score.head,
            "test": 100 * score.test.mean,
            "low": 100 * (score.test.mean - (score.test.sd or 0)),
            "high": 100 * (score.test.mean + (score.test.sd or 0)),
            "baseline": 100 * block.baseline.test.mean if block.baseline else None,
            "gain": 100 * score.gain.mean if score.gain else None,
            "label": _label(score),
            "scored": spread_text(score.test) + " %",
            "gained": _gained(score),
            "validated": spread_text(score.val) + " %",
            "seeds": listed([str(seed) for seed in score.seeds]),
            "parameters": score.parameters,
            "other_code": "yes" if score.other_code else "",
        }
        for score in block.probes
    ]


def _label(score: Score) -> str:
    if score.is_baseline or score.gain is None:
        return percent(score.test.mean)
    return f"{percent(score.test.mean)}  ({points(score.gain.mean)})"


def accuracy(held: Sequence[Block], name: str = "accuracy") -> Figure:
    """Each probe's test score as a dot on a line of its own, with its gain from the baseline and ± one deviation."""
    panels, said, numbers = [], [], []
    each = [accuracy_records(block) for block in held]
    # Models on the same images stand on the same scale.
    shared = len({(block.dataset, block.metric) for block in held}) == 1
    common = spread_of([record for records in each for record in records], "low", "high")
    for block, records in zip(held, each, strict=True):
        spec = _accuracy_spec(
            tuple(str(record["probe"]) for record in records),
            f"{_metric(block)} on test, %",
            common if shared else spread_of(records, "low", "high"),
            block.baseline is not None,
        )
        panels.append(Panel(block.name, spec, records))
        said.append(f"{block.name}: " + "; ".join(f"{r['probe']} {r['scored']}, {r['gained']}" for r in records))
        place: Record = {"model": block.model, "dataset": block.dataset}
        numbers += [place | _plain(r) for r in records]
    return Figure(
        name,
        f"{what(held)} per probe",
        f"A dot is the mean over seeds, with one standard deviation to either side; dashed: {BASELINE}. At the right: score "
        "(gain in points).",
        f"{_metric(held[0])} per probe. {' '.join(said)}",
        panels,
        numbers,
        (
            *(Key(head, i + 1, SHAPES[i]) for i, head in enumerate(_heads(held))),
            Key(BASELINE, 0, "dashed"),
            Key("± over seeds", 1, "line"),
        ),
        columns=2,
    )


def _heads(held: Sequence[Block]) -> list[str]:
    used = {score.head for block in held for score in block.probes}
    return [head for head in HEADS if head in used or not used - set(HEADS)] + sorted(used - set(HEADS))


def _plain(record: Record) -> Record:
    """The numbers of a record, without the words made of them."""
    return {key: value for key, value in record.items() if key not in ("scored", "gained", "validated", "said")}


@lru_cache(maxsize=1024)
def _accuracy_spec(probes: tuple[str, ...], axis: str, reach: tuple[float, float], baseline: bool) -> dict[str, Any]:
    alt = needs_altair()
    base = charted()

    def row(at: float) -> Any:
        return alt.Y("probe:N", sort=list(probes), axis=None, bandPosition=at, scale=alt.Scale(paddingInner=0.1))

    score = alt.X(
        "test:Q",
        title=axis,
        scale=alt.Scale(domain=list(reach), zero=False, padding=14, nice=False),
        axis=alt.Axis(tickCount=5, grid=False),
    )
    colour = alt.Color("head:N", scale=alt.Scale(domain=list(HEADS)), legend=None)
    tip = [
        alt.Tooltip("probe:N"),
        alt.Tooltip("scored:N", title="test"),
        alt.Tooltip("gained:N", title="gain"),
        alt.Tooltip("validated:N", title="validation"),
        alt.Tooltip("seeds:N"),
        alt.Tooltip("parameters:Q", format=","),
    ]
    layers = [base.mark_rule(style="track").encode(x=alt.value(0), x2=alt.value("width"), y=row(0.68))]
    if baseline:
        # One piece a row, so that it does not strike through the names above.
        piece = alt.Y2("probe:N", bandPosition=0.86)
        layers.append(base.mark_rule(style="baseline").encode(x="baseline:Q", y=row(0.52), y2=piece))
        layers.append(base.mark_rule(style="stem").encode(x=score, x2="baseline:Q", y=row(0.68), color=colour))
    shapes = alt.Scale(domain=list(HEADS), range=list(SHAPES))
    layers += [
        base.mark_rule(style="bar").encode(x=alt.X("low:Q"), x2="high:Q", y=row(0.68), color=colour),
        base.mark_point(style="dot", filled=True).encode(
            x=score, y=row(0.68), color=colour, shape=alt.Shape("head:N", scale=shapes, legend=None), tooltip=tip
        ),
        base.mark_text(style="name", align="left").encode(x=alt.value(0), y=row(0.25), text="probe:N"),
        base.mark_text(style="value", align="right").encode(x=alt.value("width"), y=row(0.25), text="label:N"),
    ]
    return finished(alt.layer(*layers), 42 * len(probes))


def what(held: Sequence[Block]) -> str:
    """'Accuracy', where that is what every score is."""
    return "Accuracy" if all(block.metric == "balanced_accuracy" for block in held) else "Score"


def _metric(block: Block) -> str:
    return metric_name(block.metric)


# --- attention -------------------------------------------------------------------------------------------------------


def attention_records(named: str, block: Block, attention: LayerAttention) -> list[Record]:
    """One a token: the share of the attention in percent, its spread over images, and an even one."""
    return [
        {
            "row": named,
            "probe": attention.probe,
            "layer": layer,
            "kind": KIND_WORDS.get(kind, kind),
            "token": f"{KIND_WORDS.get(kind, kind)} {layer}",
            "share": 100 * mean,
            "shown": percent(mean, 0) if mean >= 0.095 else percent(mean),
            "spread": f"{percent(mean, 2)} % ± {percent(sd, 2)} over the test images",
            "even": f"{percent(1 / len(attention.tokens), 2)} %",
            "seeds": attention.seeds,
        }
        for (layer, kind), mean, sd in zip(attention.tokens, attention.mean, attention.sd, strict=True)
    ]


def top_share(held: Sequence[tuple[Block, LayerAttention]]) -> float:
    """The largest share in percent: the end of a colour scale that several figures have in common."""
    return max(100 * mean for _, found in held for mean in found.mean)


def attention(
    held: Sequence[tuple[Block, LayerAttention]], name: str = "attention", top: float | None = None
) -> Figure:
    """A panel a model; rows are data sets grouped by domain, columns CLS layers | AP layers; one colour scale for all."""
    top = top or top_share(held)
    panels, numbers = [], []
    for model in dict.fromkeys(block.model for block, _ in held):
        mine = [(block, found) for block, found in held if block.model == model]
        domains = [domain(block.dataset) for block, _ in mine]
        usual = mine[0][1].probe if len(mine) == 1 else ALF
        grouped = len(set(domains)) > 1
        records: list[Record] = []
        before = None
        for (block, found), group in zip(mine, domains, strict=True):
            named = block.name if len(held) == 1 else block.name.removeprefix(f"{model} on ")
            if found.probe != usual:
                named += f", {found.probe}"
            head = group if grouped and group != before else ""
            before = group
            own = attention_records(named, block, found)
            own[0] |= {"name": named, "group": head}  # written once a row
            records += own
            for (layer, kind), mean, sd in zip(found.tokens, found.mean, found.sd, strict=True):
                place: Record = {"model": model, "dataset": block.dataset, "domain": group, "probe": found.probe}
                share: Record = {"kind": kind, "layer": layer, "share": 100 * mean, "sd_over_images": 100 * sd}
                numbers.append(place | share | {"seeds": found.seeds})
        layers = tuple(sorted({layer for _, found in mine for layer, _ in found.tokens}))
        tops = {str(r["kind"]): r for r in reversed(records) if r["layer"] == layers[0]}  # the first of each kind
        for kind, record in tops.items():
            record["top"] = f"{kind} tokens"
        kinds = tuple(dict.fromkeys(str(record["kind"]) for record in records))
        dense = len(mine) > 3
        spec = _attention_spec(len(mine), layers, kinds, top, dense, grouped)
        panels.append(Panel(model if len(held) > 1 else "", spec, records, width=760))
    says = "; ".join(
        f"{block.name}: " + ", ".join(f"layer {layer} {percent(share)} %" for layer, share in found.by_layer.items())
        for block, found in held
    )
    return Figure(
        name,
        "Attention over layers",
        "Share of the attention in percent, averaged over heads, test images and seeds; one colour scale for all. CLS is the "
        "class token, AP the mean of the patch tokens.",
        f"Share of the attention each layer gets. {says}",
        panels,
        numbers,
        columns=1,
    )


@lru_cache(maxsize=256)
def _attention_spec(
    rows: int, layers: tuple[int, ...], kinds: tuple[str, ...], top: float, dense: bool, grouped: bool
) -> dict[str, Any]:
    alt = needs_altair()
    columns: list[str] = []
    for kind in kinds:
        columns += ([" "] if columns else []) + [f"{kind} {layer}" for layer in layers]
    x = alt.X(
        "token:N",
        sort=None,
        scale=alt.Scale(domain=columns, paddingInner=0.06, paddingOuter=0),
        axis=alt.Axis(
            labelExpr="split(datum.value, ' ')[1]",
            labelAngle=0,
            labelOverlap="greedy",
            labelSeparation=3,
            domain=False,
            ticks=False,
        ),
        title="layer",
    )
    # The row's name stands above its cells, not beside them: on a narrow screen the cells need the whole width.
    padding = 0.55 if dense else 0.45
    y = alt.Y("row:N", sort=None, axis=None, scale=alt.Scale(paddingInner=padding, paddingOuter=padding))
    colour = alt.Color(
        "share:Q",
        scale=alt.Scale(domain=[0, top]),
        title="share of the attention, %",
        legend=alt.Legend(orient="top", gradientLength=160, tickCount=4),
    )
    tip = [
        alt.Tooltip("row:N", title="on"),
        alt.Tooltip("token:N", title="token"),
        alt.Tooltip("spread:N", title="attention"),
        alt.Tooltip("even:N", title="an even spread"),
        alt.Tooltip("seeds:Q"),
        alt.Tooltip("probe:N"),
    ]
    base = charted()
    drawn = [base.mark_rect(style="heat").encode(x=x, y=y, color=colour, tooltip=tip)]
    wide = "bandwidth('x') > 24 ? 1 : 0"
    if not dense:
        drawn += [
            base.mark_text(style=style, opacity=alt.expr(wide), tooltip=None)
            .transform_filter(f"datum.share {test} {top / 2}")
            .encode(x=x, y=y, text="shown:N")
            for style, test in (("on-weak", "<="), ("on-strong", ">"))
        ]
    names = base.transform_filter("isValid(datum.name)")
    above = alt.Y("row:N", sort=None, bandPosition=0)
    drawn.append(
        names.mark_text(style="name", align="left", baseline="bottom", dy=-3 if dense else -7).encode(
            x=alt.value(0), y=above, text="name:N"
        )
    )
    if grouped:
        right = names.mark_text(style="head", align="right", baseline="bottom", dy=-3 if dense else -7)
        drawn.append(right.encode(x=alt.value("width"), y=above, text="group:N"))
    tops = base.transform_filter("isValid(datum.top)").mark_text(style="head", align="left", baseline="bottom", dy=-8)
    drawn.append(tops.encode(x=alt.X("token:N", bandPosition=0), y=alt.value(0), text="top:N"))
    each = 34 if dense else 58
    return finished(alt.layer(*drawn), round(each * (rows + padding)))


def attended(study: Study) -> list[tuple[Block, LayerAttention]]:
    """The study's blocks that have attention over layers, by model, then by domain."""
    places = [(model, dataset) for model in study.models for dataset in study.datasets]
    held = [block for model, dataset in places if (block := study.block(model, dataset))]
    return [(block, found) for block in held if (found := block.attention)]


# --- accuracy by layer -----------------------------------------------------------------------------------------------


def layer_records(block: Block) -> list[Record]:
    """One a series and layer: test score with the ends of its bar."""
    return [
        {
            "what": "layer",
            "series": name,
            "layer": layer,
            "probe": score.probe,
            "test": 100 * score.test.mean,
            "low": 100 * (score.test.mean - (score.test.sd or 0)),
            "high": 100 * (score.test.mean + (score.test.sd or 0)),
            "scored": spread_text(score.test) + " %",
            "gained": _gained(score),
            "seeds": listed([str(seed) for seed in score.seeds]),
        }
        for name, layers in block.by_layer.items()
        for layer, score in layers.items()
    ]


def reference_records(block: Block) -> list[Record]:
    """The levels to set the layers against: the probe over all layers, and the baseline."""
    held = [score for score in (block.answer, block.baseline) if score is not None]
    highest = max((score.test.mean for score in held), default=0)
    return [
        {
            # Close levels would write over each other: the higher one's name stands above its line, the lower one's below.
            "what": f"{'baseline' if score.is_baseline else 'level'}-{'above' if score.test.mean == highest else 'below'}",
            "probe": score.probe,
            "test": 100 * score.test.mean,
            "label": f"{score.probe}  {percent(score.test.mean)} %",
        }
        for score in held
    ]


def cka_records(block: Block, cka: Cka, series: Sequence[str]) -> list[Record]:
    """One a kernel, token kind and layer: how like the last layer's tokens they are, in the colour of the kind's first series.

    A constant layer is like nothing, and is left out.
    """
    found = cka.get((block.model, block.dataset), {})
    return [
        {
            "what": f"cka-{kernel}",
            "label": f"{kind}, {KERNELS[kernel][0]}",
            "kernel": kernel,
            "series": next((one for one in series if one.startswith(f"{kind}/")), kind),
            "layer": layer,
            "cka": value,
        }
        for kernel, kinds in found.items()
        for kind, layers in kinds.items()
        for layer, value in layers.items()
        if isfinite(value)
    ]


def by_layer(held: Sequence[Block], cka: Cka | None = None, name: str = "layers") -> Figure:
    """A panel a block: lines of test score by layer, one a token kind and head, dashed levels; CKA to the last layer."""
    cka = cka or {}
    series = list(dict.fromkeys(one for block in held for one in block.by_layer))
    panels, said, numbers = [], [], []
    for block in held:
        records, levels, like = layer_records(block), reference_records(block), cka_records(block, cka, series)
        layers = tuple(sorted({int(record["layer"] or 0) for record in [*records, *like]}))
        # What a filter leaves empty has no extent, of which Vega warns: only what there is gets a layer.
        marks = tuple(dict.fromkeys(str(record["what"]) for record in [*levels, *like]))
        spec = _layer_spec(layers, block.depth, _metric(block), tuple(series), marks)
        panels.append(Panel(block.name, spec, [*records, *levels, *like], width=380))
        said.append(f"{block.name}: " + "; ".join(f"{r['series']} layer {r['layer']} {r['scored']}" for r in records))
        place: Record = {"model": block.model, "dataset": block.dataset}
        numbers += [place | {k: v for k, v in _plain(r).items() if k != "what"} for r in [*records, *levels, *like]]
    keys = [Key(one, i % len(SHAPES) + 1, SHAPES[i % len(SHAPES)]) for i, one in enumerate(series)]
    for kernel, (called, shape) in KERNELS.items():
        if any(r["what"] == f"cka-{kernel}" for panel in panels for r in panel.records):
            keys.append(Key(f"{called} to the last layer, in its tokens' colour (right axis)", 0, shape))
    return Figure(
        name,
        f"{what(held)} by layer",
        "A probe of its own on each single layer: mean over seeds, one standard deviation to either "
        "side. Dashed: the probe over "
        f"several layers, and {BASELINE}.",
        f"{what(held)} by layer. {' '.join(said)}",
        panels,
        numbers,
        tuple(keys),
    )


@lru_cache(maxsize=256)
def _layer_spec(
    layers: tuple[int, ...], depth: int, metric: str, series: tuple[str, ...], marks: tuple[str, ...]
) -> dict[str, Any]:
    alt = needs_altair()
    base = charted()

    def of(what: str) -> Any:
        return base.transform_filter(f"datum.what == '{what}'")

    x = alt.X(
        "layer:Q",
        title=f"layer (of {depth})",
        scale=alt.Scale(domain=[layers[0], max(layers[-1], layers[0] + 1)], nice=False, padding=10),
        axis=alt.Axis(values=list(layers), format="d", grid=False, labelOverlap=True),
    )
    y = alt.Y(
        "test:Q",
        title=f"{metric}, %",
        scale=alt.Scale(zero=False, padding=12),
        axis=alt.Axis(tickCount=5, orient="left"),
    )
    colour = alt.Color("series:N", scale=alt.Scale(domain=list(series)), legend=None)
    shape = alt.Shape("series:N", scale=alt.Scale(domain=list(series), range=list(SHAPES)), legend=None)
    tip = [
        alt.Tooltip("probe:N"),
        alt.Tooltip("layer:Q"),
        alt.Tooltip("scored:N", title="test"),
        alt.Tooltip("gained:N", title="gain"),
        alt.Tooltip("seeds:N"),
    ]
    one = of("layer")
    drawn = [
        one.mark_line(style="series").encode(x=x, y=y, color=colour),
        one.mark_rule(style="bar").encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour),
        one.mark_point(style="dot", filled=True).encode(x=x, y=y, color=colour, shape=shape, tooltip=tip),
    ]
    for mark in (mark for mark in marks if not mark.startswith("cka-")):
        style, _, place = mark.partition("-")
        level, above = of(mark), place == "above"
        text = level.mark_text(style="name", align="left", baseline="bottom" if above else "top", dy=-4 if above else 5)
        drawn.append(level.mark_rule(style=style).encode(y=y, tooltip=alt.Tooltip("label:N", title="level")))
        drawn.append(text.encode(x=alt.value(2), y=y, text="label:N"))
    chart = alt.layer(*drawn)
    kernels = [kernel for kernel in KERNELS if f"cka-{kernel}" in marks]
    if kernels:
        like = alt.Y(
            "cka:Q", title="CKA", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(orient="right", tickCount=5, grid=False)
        )
        close = [
            alt.Tooltip("label:N", title="CKA of"),
            alt.Tooltip("layer:Q"),
            alt.Tooltip("cka:Q", title="CKA", format=".3f"),
        ]
        lines = [
            of(f"cka-{kernel}").mark_line(style=f"like-{kernel}").encode(x=x, y=like, color=colour, tooltip=close)
            for kernel in kernels
        ]
        chart = alt.layer(chart, alt.layer(*lines)).resolve_scale(y="independent")
    return finished(chart, 260)
