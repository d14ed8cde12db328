"""Test score by layer, with the similarity of layers beside it if asked for (figure 4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any, Literal

from mlfusion.report.figures import charts
from mlfusion.report.figures.accuracy import numbers_of, score_record
from mlfusion.report.figures.charts import of_kind
from mlfusion.report.figures.drawing import Figure, LegendEntry, Panel, Record, series_legend
from mlfusion.report.numbers import percent
from mlfusion.report.summary import ComparisonGroup, metric_name, score_word
from mlfusion.report.theme import Symbol
from mlfusion.specs.names import BASELINE

Cka = Mapping[tuple[str, str], Mapping[Literal["linear", "rbf"], Mapping[str, Mapping[int, float]]]]
"""{(model, data set): {kernel: {token kind: {layer: CKA of its tokens with the last layer's}}}}."""

KERNELS: Mapping[str, tuple[str, Symbol]] = {"linear": ("linear CKA", "dotted"), "rbf": ("RBF CKA", "dash-dot")}
"""Name and line of each kernel."""


def by_layer(groups: Sequence[ComparisonGroup], cka: Cka | None = None) -> Figure | None:
    """A panel per group: test score by layer, one line per token kind and head, dashed levels, and CKA with the last layer."""
    groups = [group for group in groups if group.by_layer]
    if not groups:
        return None
    series = tuple(dict.fromkeys(one for group in groups for one in group.by_layer))
    panels, numbers = [], []
    for group in groups:
        scores, levels, similarity = layer_records(group), level_records(group), cka_records(group, cka or {}, series)
        layers = tuple(sorted({int(record.number("layer")) for record in [*scores, *similarity]}))
        # Vega warns about a filter without results: only kinds that exist get a layer.
        present = tuple(dict.fromkeys(str(record["what"]) for record in [*levels, *similarity]))
        layout = _Layout(layers, group.first.depth, metric_name(group.metric), series, present)
        records = [*scores, *levels, *similarity]
        panels.append(Panel(group.name, _spec(layout), records, width=380))
        numbers += [numbers_of(group, record.without("what")) for record in records]
    description = " ".join(
        f"{group.name}: " + "; ".join(f"{r['series']} layer {r['layer']} {r['scored']}" for r in layer_records(group))
        for group in groups
    )
    kinds = {record["what"] for panel in panels for record in panel.records}
    lines = [KERNELS[kernel] for kernel in KERNELS if f"cka-{kernel}" in kinds]
    explanation = "with the last layer, in the colour of its tokens (right axis)"
    return Figure(
        "layers",
        f"{score_word(groups)} by layer",
        "One probe on each single layer: mean over seeds ± one standard deviation. The dashed lines are the probe over several "
        f"layers and {BASELINE}.",
        f"{score_word(groups)} by layer. {description}",
        panels,
        numbers,
        [*series_legend(series), *(LegendEntry(f"{name} {explanation}", 0, symbol) for name, symbol in lines)],
    )


def layer_records(group: ComparisonGroup) -> list[Record]:
    """One record per series and layer: test score with the ends of its bar."""
    return [
        Record(Record(what="layer", series=name, layer=layer), **score_record(score))
        for name, layers in group.by_layer.items()
        for layer, score in layers.items()
    ]


def level_records(group: ComparisonGroup) -> list[Record]:
    """The levels to compare layers with: the probe over several layers, and the baseline."""
    levels = [score for score in (group.main, group.baseline) if score is not None]
    highest = max((score.test.mean for score in levels), default=0)
    records = []
    for score in levels:
        mean = score.test.mean
        # Names of close levels would overlap: the higher one's name is above its line, the lower one's below.
        what = f"{'baseline' if score.is_baseline else 'level'}-{'above' if mean == highest else 'below'}"
        label = f"{score.probe}  {percent(mean)} %"
        records.append(Record(what=what, probe=score.probe, test=100 * mean, label=label))
    return records


def cka_records(group: ComparisonGroup, cka: Cka, series: Sequence[str]) -> list[Record]:
    """One record per kernel, token kind and layer: CKA with the last layer, in the colour of the kind's first series.

    CKA of a constant layer is not defined; such layers are left out.
    """
    by_kernel = cka.get((group.model, group.dataset), {})
    return [
        Record(
            what=f"cka-{kernel}",
            label=f"{kind}, {KERNELS[kernel][0]}",
            kernel=kernel,
            series=next((one for one in series if one.startswith(f"{kind}/")), kind),
            layer=layer,
            cka=value,
        )
        for kernel, kinds in by_kernel.items()
        for kind, layers in kinds.items()
        for layer, value in layers.items()
        if isfinite(value)
    ]


@dataclass(frozen=True)
class _Layout:
    """The parameters of the specification of a panel."""

    layers: tuple[int, ...]
    depth: int
    metric: str
    series: tuple[str, ...]
    kinds: tuple[str, ...]  # kinds of records other than scores: levels and CKA


@lru_cache(maxsize=256)
def _spec(layout: _Layout) -> dict[str, Any]:
    alt = charts.require_altair()
    first, last = layout.layers[0], layout.layers[-1]
    scale = alt.Scale(domain=[first, max(last, first + 1)], nice=False, padding=10)
    ticks = alt.Axis(values=list(layout.layers), format="d", grid=False, labelOverlap=True)
    x = alt.X("layer:Q", title=f"layer (of {layout.depth})", scale=scale, axis=ticks)
    left = alt.Axis(tickCount=5, orient="left")
    y = alt.Y("test:Q", title=f"{layout.metric}, %", scale=alt.Scale(zero=False, padding=12), axis=left)
    colour, shape = charts.series_channels("series", layout.series)
    tooltip = charts.tooltip("probe:N", "layer:Q", ("scored:N", "test"), ("gained:N", "gain"), "seeds:N")
    scores = of_kind("layer")
    chart = alt.layer(
        scores.mark_line(style="series").encode(x=x, y=y, color=colour),
        scores.mark_rule(style="bar").encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour),
        scores.mark_point(style="dot", filled=True).encode(x=x, y=y, color=colour, shape=shape, tooltip=tooltip),
        *(mark for kind in layout.kinds if not kind.startswith("cka-") for mark in _level(kind, y)),
    )
    if kernels := [kernel for kernel in KERNELS if f"cka-{kernel}" in layout.kinds]:
        chart = alt.layer(chart, _similarity(kernels, x, colour)).resolve_scale(y="independent")
    return charts.to_spec(chart, 260)


def _level(kind: str, y: Any) -> tuple[Any, Any]:
    """A horizontal line and its name above or below."""
    alt, level = charts.require_altair(), of_kind(kind)
    style, _, place = kind.partition("-")
    beside = {"baseline": "bottom", "dy": -4} if place == "above" else {"baseline": "top", "dy": 5}
    return (
        level.mark_rule(style=style).encode(y=y, tooltip=alt.Tooltip("label:N", title="level")),
        level.mark_text(style="name", align="left", **beside).encode(x=alt.value(2), y=y, text="label:N"),
    )


def _similarity(kernels: Sequence[str], x: Any, colour: Any) -> Any:
    """Lines of CKA on an axis at the right."""
    alt = charts.require_altair()
    axis = alt.Axis(orient="right", tickCount=5, grid=False)
    y = alt.Y("cka:Q", title="CKA", scale=alt.Scale(domain=[0, 1]), axis=axis)
    tooltip = charts.tooltip(("label:N", "CKA of"), "layer:Q", ("cka:Q", "CKA", ".3f"))
    lines = [of_kind(f"cka-{kernel}").mark_line(style=f"similarity-{kernel}") for kernel in kernels]
    return alt.layer(*(line.encode(x=x, y=y, color=colour, tooltip=tooltip) for line in lines))
