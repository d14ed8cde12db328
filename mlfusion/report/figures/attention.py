"""Attention over layers and token kinds as a heat map, one panel per model (figures 5, A6 to A8)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mlfusion.report.figures import charts
from mlfusion.report.figures.drawing import Figure, Panel, Record
from mlfusion.report.figures.gains import KIND_NAMES
from mlfusion.report.numbers import percent
from mlfusion.report.studies import domain
from mlfusion.report.summary import ALF, ComparisonGroup, LayerAttention

GroupAttention = tuple[ComparisonGroup, LayerAttention]


def group_attentions(groups: Sequence[ComparisonGroup]) -> list[GroupAttention]:
    """The groups that have attention over layers, each with its attention."""
    return [(group, layers) for group in groups if (layers := group.attention)]


def top_share(pairs: Sequence[GroupAttention]) -> float | None:
    """The largest share in percent, which ends the colour scale that several figures share; None without pairs."""
    return max((100 * mean for _, layers in pairs for mean in layers.mean), default=None)


def attention(groups: Sequence[ComparisonGroup], top: float | None = None) -> Figure | None:
    """A panel per model; rows are data sets grouped by domain, columns CLS layers | AP layers; one colour scale for all.

    `top` is the end of the colour scale in percent, by default the largest share.
    """
    attentions = group_attentions(groups)
    top = top or top_share(attentions)
    if not attentions or top is None:
        return None
    by_model: dict[str, list[GroupAttention]] = {}
    for pair in attentions:
        by_model.setdefault(pair[0].model, []).append(pair)
    panels = [_panel(pairs, top, alone=len(attentions) == 1) for pairs in by_model.values()]
    description = "; ".join(
        f"{group.name}: " + ", ".join(f"layer {layer} {percent(share)} %" for layer, share in layers.by_layer.items())
        for group, layers in attentions
    )
    return Figure(
        "attention",
        "Attention over layers",
        "Share of the attention in percent, averaged over heads, test images and seeds; one colour scale for all. CLS is the "
        "class token, AP the mean of the patch tokens.",
        f"Share of the attention of each layer. {description}",
        panels,
        [number for pairs in by_model.values() for pair in pairs for number in _numbers(*pair)],
        columns=1,
        page_width="wide" if len(panels) == 1 else "",
    )


def attention_records(row: str, attention: LayerAttention) -> list[Record]:
    """One record per token: its share of the attention in percent, the spread over images, and an even share."""
    return [
        Record(
            row=row,
            probe=attention.probe,
            layer=layer,
            kind=KIND_NAMES.get(kind, kind),
            token=f"{KIND_NAMES.get(kind, kind)} {layer}",
            share=100 * mean,
            shown=percent(mean, 0) if mean >= 0.095 else percent(mean),
            spread=f"{percent(mean, 2)} % ± {percent(sd, 2)} over the test images",
            even=f"{percent(1 / len(attention.tokens), 2)} %",
            seeds=attention.seeds,
        )
        for (layer, kind), mean, sd in zip(attention.tokens, attention.mean, attention.sd, strict=True)
    ]


def _numbers(group: ComparisonGroup, attention: LayerAttention) -> Iterator[Record]:
    for (layer, kind), mean, sd in zip(attention.tokens, attention.mean, attention.sd, strict=True):
        yield Record(
            model=group.model,
            dataset=group.dataset,
            domain=domain(group.dataset),
            probe=attention.probe,
            kind=kind,
            layer=layer,
            share=100 * mean,
            sd_over_images=100 * sd,
            seeds=attention.seeds,
        )


@dataclass(frozen=True)
class _Layout:
    """The parameters of the specification of a panel."""

    rows: int
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    top: float
    grouped: bool  # whether rows are grouped by domain

    @property
    def dense(self) -> bool:
        """Whether cells are too low for a number in each."""
        return self.rows > 3

    @property
    def padding(self) -> float:
        """Share of a row's height above its cells, where its name stands: on a narrow screen cells need the whole width."""
        return 0.55 if self.dense else 0.45


def _panel(pairs: Sequence[GroupAttention], top: float, *, alone: bool) -> Panel:
    """The panel of one model, with a row per data set."""
    model = pairs[0][0].model
    usual = pairs[0][1].probe if len(pairs) == 1 else ALF
    domains = [domain(group.dataset) for group, _ in pairs]
    grouped = len(set(domains)) > 1
    records: list[Record] = []
    for i, (group, attention) in enumerate(pairs):
        name = group.name if alone else group.name.removeprefix(f"{model} on ")
        if attention.probe != usual:
            name += f", {attention.probe}"
        is_first = i == 0 or domains[i] != domains[i - 1]
        heading = domains[i] if grouped and is_first else ""
        first, *others = attention_records(name, attention)
        records += [first.extended(name=name, group=heading), *others]  # written once per row
    layers = tuple(sorted({layer for _, attention in pairs for layer, _ in attention.tokens}))
    kinds = tuple(dict.fromkeys(str(record["kind"]) for record in records))
    for kind in kinds:  # written once, above the first cell of the kind
        i = next(i for i, record in enumerate(records) if record["kind"] == kind and record["layer"] == layers[0])
        records[i] = records[i].extended(top=f"{kind} tokens")
    return Panel("" if alone else model, _spec(_Layout(len(pairs), layers, kinds, top, grouped)), records, width=760)


@lru_cache(maxsize=256)
def _spec(layout: _Layout) -> dict[str, Any]:
    alt, base = charts.base_chart()
    columns: list[str] = []
    for kind in layout.kinds:
        columns += ([" "] if columns else []) + [f"{kind} {layer}" for layer in layout.layers]
    axis = {"labelAngle": 0, "labelOverlap": "greedy", "labelSeparation": 3, "domain": False, "ticks": False}
    layer = alt.Axis(**axis, labelExpr="split(datum.value, ' ')[1]")
    scale = alt.Scale(domain=columns, paddingInner=0.06, paddingOuter=0)
    x = alt.X("token:N", sort=None, scale=scale, axis=layer, title="layer")
    scale = alt.Scale(paddingInner=layout.padding, paddingOuter=layout.padding)
    y = alt.Y("row:N", sort=None, axis=None, scale=scale)
    legend = alt.Legend(orient="top", gradientLength=160, tickCount=4)
    scale = alt.Scale(domain=[0, layout.top])
    colour = alt.Color("share:Q", scale=scale, title="share of the attention, %", legend=legend)
    shares = [("spread:N", "attention"), ("even:N", "an even share")]
    tooltip = charts.tooltip(("row:N", "on"), ("token:N", "token"), *shares, "seeds:Q", "probe:N")
    cells = base.mark_rect(style="heat").encode(x=x, y=y, color=colour, tooltip=tooltip)
    wide = alt.expr("bandwidth('x') > 24 ? 1 : 0")
    values = [  # shown if cells are wide enough
        base.mark_text(style=style, opacity=wide, tooltip=None)
        .transform_filter(f"datum.share {test} {layout.top / 2}")
        .encode(x=x, y=y, text="shown:N")
        for style, test in (("on-weak", "<="), ("on-strong", ">"))
        if not layout.dense
    ]
    height = 34 if layout.dense else 58
    return charts.to_spec(alt.layer(cells, *values, *_names(layout)), round(height * (layout.rows + layout.padding)))


def _names(layout: _Layout) -> list[Any]:
    """Names of data sets and domains above their rows, and of token kinds above their columns."""
    alt, base = charts.base_chart()
    names = base.transform_filter("isValid(datum.name)")
    above = alt.Y("row:N", sort=None, bandPosition=0)
    dy = -3 if layout.dense else -7
    left = names.mark_text(style="name", align="left", baseline="bottom", dy=dy)
    right = names.mark_text(style="head", align="right", baseline="bottom", dy=dy)
    top = base.transform_filter("isValid(datum.top)").mark_text(style="head", align="left", baseline="bottom", dy=-8)
    return [
        left.encode(x=alt.value(0), y=above, text="name:N"),
        *([right.encode(x=alt.value("width"), y=above, text="group:N")] if layout.grouped else []),
        top.encode(x=alt.X("token:N", bandPosition=0), y=alt.value(0), text="top:N"),
    ]
