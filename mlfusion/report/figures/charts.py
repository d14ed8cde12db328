"""Parts shared by the specifications of figures: Altair, charts of a panel's records, their scales, series and tooltips."""

from collections.abc import Sequence
from typing import Any

from mlfusion.errors import Unavailable
from mlfusion.report.theme import symbol_at

DATA = "records"  # name of the data in the specification of a panel


def require_altair() -> Any:
    """Altair, imported late: everything but the page and the figures works without it.

    Raises:
        Unavailable: Altair, or another library of the extra, is not installed.
    """
    try:
        import altair
        import itables  # noqa: F401  the page reads DataTables from it
        import vl_convert  # noqa: F401  and Vega from this
    except ImportError as err:
        raise Unavailable(
            f"a page or figures need {err.name}, which is not installed; allowed without it: the table that `mlfusion "
            "report` prints. Type: pip install 'mlfusion[report]'"
        ) from err
    return altair


def base_chart() -> tuple[Any, Any]:
    """(Altair, its chart of the panel's records)."""
    alt = require_altair()
    return alt, alt.Chart(alt.NamedData(DATA))


def of_kind(kind: str) -> Any:
    """An Altair chart of those of the panel's records whose `what` is this."""
    return base_chart()[1].transform_filter(f"datum.what == '{kind}'")


def to_spec(chart: Any, height: int) -> dict[str, Any]:
    """The chart's specification, as wide as its container."""
    spec: dict[str, Any] = chart.properties(width="container", height=height).to_dict()
    return {**spec, "data": {"name": DATA}, "layer": [_without_data(layer) for layer in spec["layer"]]}


def _without_data(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer without the name of the data, which Altair may write into every layer: the panel's data serve all of them."""
    inner = {key: value for key, value in layer.items() if key != "data"}
    return inner | ({"layer": [_without_data(one) for one in inner["layer"]]} if "layer" in inner else {})


def exact_scale(ends: Sequence[float], padding: int = 0) -> Any:
    """A scale that ends at these values, with a padding in pixels."""
    more = {"padding": padding} if padding else {}
    return require_altair().Scale(domain=list(ends), zero=False, nice=False, **more)


def pixel_scale(length: int) -> Any:
    """A scale of positions in pixels."""
    return require_altair().Scale(domain=[0, length], range=[0, length], zero=False, nice=False)


def dataset_rows(datasets: Sequence[str], padding: float | None = None) -> Any:
    """A band for each data set, from the top down; `padding` is the share of a band between two."""
    alt = require_altair()
    more = {} if padding is None else {"scale": alt.Scale(paddingInner=padding)}
    axis = alt.Axis(domain=False, ticks=False)
    return alt.Y("dataset:N", sort=list(datasets), title=None, axis=axis, **more)


def series_channels(field: str, names: Sequence[Any]) -> tuple[Any, Any]:
    """(colour, shape) of the series that a field names; a series keeps those of its position."""
    alt, domain = require_altair(), list(names)
    shapes = alt.Scale(domain=domain, range=[symbol_at(i) for i in range(len(domain))])
    colour = alt.Color(f"{field}:N", scale=alt.Scale(domain=domain), legend=None)
    return colour, alt.Shape(f"{field}:N", scale=shapes, legend=None)


def tooltip(*fields: str | tuple[str, ...]) -> list[Any]:
    """One line per field: the field alone, with a title, or with a title ('': its name) and a format."""
    alt, lines = require_altair(), []
    for one in fields:
        field, *rest = (one,) if isinstance(one, str) else one
        options = zip(("title", "format"), rest, strict=False)
        lines.append(alt.Tooltip(field, **{option: value for option, value in options if value}))
    return lines
