"""The page's figures as Vega-Lite, so that one specification serves the page today and other formats later.

No colour, font or size of type is written here: marks name a *style* or take the next colour of a range, and the page
gives both for light and for dark. Scores are in percent, gains in points.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlfusion.errors import Unavailable
from mlfusion.report.summary import Block, LayerAttention, Score, listed, percent, points
from mlfusion.specs import BASELINE
from mlfusion.statistics import Spread

Record = dict[str, str | float | int | None]

HEADS = ("linear", "attentive")
KIND_WORDS = {"cls": "CLS", "ap": "AP"}


@dataclass(frozen=True)
class Figure:
    """One drawing: `spec` is Vega-Lite for a container's full width, `says` what a reader who cannot see it is told."""

    name: str  # of its place on the page
    title: str
    says: str
    spec: dict[str, Any]


def needs_altair() -> Any:
    """Altair, which is imported late: everything but the page works without.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        import altair
        import vl_convert  # noqa: F401  the page takes the drawing code from it
    except ImportError as err:
        raise Unavailable(
            f"an HTML report needs {err.name}, which is not installed; allowed without it: the table that `mlfusion "
            "report` prints. Type: pip install 'mlfusion[report]'"
        ) from err
    return altair


def _spread(spread: Spread, *, gain: bool = False) -> str:
    shown = points(spread.mean) if gain else percent(spread.mean)
    return shown + (f" ± {percent(spread.sd)}" if spread.sd is not None else "")


# --- accuracy per probe ----------------------------------------------------------------------------------------------


def accuracy_records(block: Block) -> list[Record]:
    """One a probe: test score with the ends of its bar, gain, and what the label and the pointer say."""
    return [
        {
            "probe": score.probe,
            "head": score.probe.rpartition("/")[2],
            "test": 100 * score.test.mean,
            "low": 100 * (score.test.mean - (score.test.sd or 0)),
            "high": 100 * (score.test.mean + (score.test.sd or 0)),
            "baseline": 100 * block.baseline.test.mean if block.baseline else None,
            "gain": 100 * score.gain.mean if score.gain else None,
            "label": _label(score),
            "scored": _spread(score.test) + " %",
            "gained": "the baseline" if score.is_baseline else _gained(score),
            "validated": _spread(score.val) + " %",
            "seeds": listed([str(seed) for seed in score.seeds]),
            "parameters": score.parameters,
        }
        for score in block.probes
    ]


def _reach(records: Sequence[Record]) -> list[float]:
    """From the lowest bar's end to the highest one's, two points at least: less would make noise look like news."""
    low, high = min(float(r["low"] or 0) for r in records), max(float(r["high"] or 0) for r in records)
    missing = max(0.0, 2 - (high - low)) / 2
    return [low - missing, high + missing]


def _label(score: Score) -> str:
    if score.is_baseline or score.gain is None:
        return percent(score.test.mean)
    return f"{percent(score.test.mean)}  ({points(score.gain.mean)})"


def _gained(score: Score) -> str:
    return _spread(score.gain, gain=True) + " points" if score.gain else "no baseline to count from"


def accuracy(block: Block, name: str) -> Figure:
    """Each probe's test score as a dot on a line of its own, with its gain from the baseline and ± one deviation."""
    alt = needs_altair()
    records = accuracy_records(block)
    base = alt.Chart(alt.InlineData(values=records))
    order = [record["probe"] for record in records]

    def row(at: float) -> Any:
        return alt.Y("probe:N", sort=order, axis=None, bandPosition=at, scale=alt.Scale(paddingInner=0.1))

    score = alt.X(
        "test:Q",
        title=f"{_metric(block)} on test, %",
        scale=alt.Scale(domain=_reach(records), zero=False, padding=14, nice=False),
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
    if block.baseline:
        # One piece a row, so that it does not strike through the names above.
        piece = alt.Y2("probe:N", bandPosition=0.86)
        layers.append(base.mark_rule(style="baseline").encode(x="baseline:Q", y=row(0.52), y2=piece))
        layers.append(base.mark_rule(style="stem").encode(x=score, x2="baseline:Q", y=row(0.68), color=colour))
    layers += [
        base.mark_rule(style="bar").encode(x=alt.X("low:Q"), x2="high:Q", y=row(0.68), color=colour),
        base.mark_point(style="dot", filled=True).encode(
            x=score,
            y=row(0.68),
            color=colour,
            shape=alt.Shape("head:N", scale=alt.Scale(domain=list(HEADS), range=["square", "circle"]), legend=None),
            tooltip=tip,
        ),
        base.mark_text(style="name", align="left").encode(x=alt.value(0), y=row(0.25), text="probe:N"),
        base.mark_text(style="value", align="right").encode(x=alt.value("width"), y=row(0.25), text="label:N"),
    ]
    chart = alt.layer(*layers).properties(width="container", height=42 * len(records))
    says = "; ".join(f"{r['probe']} {r['scored']}, {r['gained']}" for r in records)
    return Figure(name, block.name, f"{_metric(block)} per probe. {says}", chart.to_dict())


def _metric(block: Block) -> str:
    return block.metric.replace("_", " ")


# --- attention -------------------------------------------------------------------------------------------------------


def attention_records(held: Sequence[tuple[Block, LayerAttention]]) -> list[Record]:
    """One a block and token: the share of the attention in percent, its spread over images, and an even one."""
    return [
        {
            "block": block.name,
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
        for block, attention in held
        for (layer, kind), mean, sd in zip(attention.tokens, attention.mean, attention.sd, strict=True)
    ]


def attention(held: Sequence[tuple[Block, LayerAttention]], name: str) -> Figure:
    """Rows are blocks, columns CLS layers | AP layers, one colour scale for all."""
    alt = needs_altair()
    records = attention_records(held)
    layers = sorted({layer for _, attention in held for layer, _ in attention.tokens})
    used = list(dict.fromkeys(str(r["kind"]) for r in records))
    columns: list[str] = []
    for kind in used:
        columns += ([" "] if columns else []) + [f"{kind} {layer}" for layer in layers]
    x = alt.X(
        "token:N",
        sort=None,
        scale=alt.Scale(domain=columns, paddingInner=0.06, paddingOuter=0),
        axis=alt.Axis(
            labelExpr="split(datum.value, ' ')[1]", labelAngle=0, labelOverlap=True, domain=False, ticks=False
        ),
        title="layer",
    )
    # The row's name stands above its cells, not beside them: on a narrow screen the cells need the whole width.
    y = alt.Y("block:N", sort=None, axis=None, scale=alt.Scale(paddingInner=0.45, paddingOuter=0.45))
    top = max(float(r["share"] or 0) for r in records)
    colour = alt.Color(
        "share:Q",
        scale=alt.Scale(domain=[0, top]),
        title="share of the attention, %",
        legend=alt.Legend(orient="top", gradientLength=160, tickCount=4),
    )
    tip = [
        alt.Tooltip("block:N", title="on"),
        alt.Tooltip("token:N", title="token"),
        alt.Tooltip("spread:N", title="attention"),
        alt.Tooltip("even:N", title="an even spread"),
        alt.Tooltip("seeds:Q"),
        alt.Tooltip("probe:N"),
    ]
    base = alt.Chart(alt.InlineData(values=records))
    wide = "bandwidth('x') > 24 ? 1 : 0"
    cells = base.mark_rect(style="heat").encode(x=x, y=y, color=colour, tooltip=tip)
    on_weak, on_strong = (
        base.mark_text(style=style, opacity=alt.expr(wide), tooltip=None)
        .transform_filter(f"datum.share {test} {top / 2}")
        .encode(x=x, y=y, text="shown:N")
        for style, test in (("on-weak", "<="), ("on-strong", ">"))
    )
    heads = [
        alt.Chart(alt.InlineData(values=[{"token": f"{kind} {layers[0]}"}]))
        .mark_text(style="head", text=f"{kind} tokens", align="left", baseline="bottom", dy=-8)
        .encode(x=alt.X("token:N", bandPosition=0), y=alt.value(0))
        for kind in used
    ]
    names = (
        alt.Chart(alt.InlineData(values=[{"block": block.name} for block, _ in held]))
        .mark_text(style="name", align="left", baseline="bottom", dy=-7)
        .encode(x=alt.value(0), y=alt.Y("block:N", sort=None, bandPosition=0), text="block:N")
    )
    chart = alt.layer(cells, on_weak, on_strong, names, *heads).properties(
        width="container", height=58 * (len(held) + 0.45)
    )
    says = "; ".join(
        f"{block.name}: " + ", ".join(f"layer {layer} {percent(share)} %" for layer, share in found.by_layer.items())
        for block, found in held
    )
    return Figure(name, "Attention over layers", f"Share of the attention each layer gets. {says}", chart.to_dict())


# --- accuracy by layer -----------------------------------------------------------------------------------------------


def layer_records(block: Block) -> list[Record]:
    """One a series and layer: test score with the ends of its bar."""
    return [
        {
            "series": name,
            "layer": layer,
            "probe": score.probe,
            "test": 100 * score.test.mean,
            "low": 100 * (score.test.mean - (score.test.sd or 0)),
            "high": 100 * (score.test.mean + (score.test.sd or 0)),
            "scored": _spread(score.test) + " %",
            "gained": "the baseline" if score.is_baseline else _gained(score),
            "seeds": listed([str(seed) for seed in score.seeds]),
        }
        for name, layers in block.by_layer.items()
        for layer, score in layers.items()
    ]


def reference_records(block: Block) -> list[Record]:
    """The levels to set the layers against: the probe over all layers, and the baseline."""
    held = [score for score in (block.answer, block.baseline) if score is not None]
    return [
        {"probe": score.probe, "test": 100 * score.test.mean, "label": f"{score.probe}  {percent(score.test.mean)} %"}
        for score in held
    ]


def by_layer(block: Block, series: Sequence[str], name: str) -> Figure:
    """Lines of test score by layer, one a token kind and head, and dashed levels; `series` fixes the colours."""
    alt = needs_altair()
    records, levels = layer_records(block), reference_records(block)
    base = alt.Chart(alt.InlineData(values=records))
    layers = sorted({int(r["layer"] or 0) for r in records})
    x = alt.X(
        "layer:Q",
        title=f"layer (of {block.depth})",
        scale=alt.Scale(domain=[layers[0], max(layers[-1], layers[0] + 1)], nice=False, padding=10),
        axis=alt.Axis(values=layers, format="d", grid=False, labelOverlap=True),
    )
    scale = alt.Scale(zero=False, padding=12)
    y = alt.Y("test:Q", title=f"{_metric(block)}, %", scale=scale, axis=alt.Axis(tickCount=5))
    colour = alt.Color("series:N", scale=alt.Scale(domain=list(series)), legend=None)
    shape = alt.Shape("series:N", scale=alt.Scale(domain=list(series)), legend=None)
    tip = [
        alt.Tooltip("probe:N"),
        alt.Tooltip("layer:Q"),
        alt.Tooltip("scored:N", title="test"),
        alt.Tooltip("gained:N", title="gain"),
        alt.Tooltip("seeds:N"),
    ]
    drawn = [
        base.mark_line(style="series").encode(x=x, y=y, color=colour),
        base.mark_rule(style="bar").encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour),
        base.mark_point(style="dot", filled=True).encode(x=x, y=y, color=colour, shape=shape, tooltip=tip),
    ]
    for record in levels:
        style = "baseline" if record["probe"] == BASELINE else "level"
        # Close levels would write over each other: the higher one's name stands above its line, the lower one's below.
        above = record["test"] == max(float(r["test"] or 0) for r in levels)
        level = alt.Chart(alt.InlineData(values=[record]))
        text = level.mark_text(style="name", align="left", baseline="bottom" if above else "top", dy=-4 if above else 5)
        drawn.append(level.mark_rule(style=style).encode(y=y, tooltip=alt.Tooltip("label:N", title="level")))
        drawn.append(text.encode(x=alt.value(2), y=y, text="label:N"))
    chart = alt.layer(*drawn).properties(width="container", height=260)
    says = "; ".join(f"{r['series']} layer {r['layer']} {r['scored']}" for r in records)
    return Figure(name, block.name, f"{_metric(block)} by layer. {says}", chart.to_dict())
