"""Compares two models by one probe, where `rows` compares two probes of one model."""

from collections import defaultdict
from collections.abc import Sequence

from mlfusion.errors import BadData
from mlfusion.results import Results, Row
from mlfusion.specs.names import full_name
from mlfusion.statistics.resampling import BOOTSTRAP, Bootstrap
from mlfusion.statistics.rows import Comparison, compare


def compare_models(
    results: Results, a: str, b: str, probe: str, *, bootstrap: Bootstrap = BOOTSTRAP, **filters: str | None
) -> list[Comparison]:
    """Model `a` against model `b` by the same probe, on each data set that both have with a seed in common.

    Args:
        results: the rows and their arrays.
        a: name, hub id or folder of a model.
        b: the reference of the gains.
        probe: name of the probe.
        bootstrap: confidence level and number of resamples.
        filters: fields of `SettingFilter` but for the model.

    Raises:
        BadData: no data set has rows of both with the same seed, grid, options and protocol.
        ResultsUnusable: a model has no results.
    """
    name = full_name(probe)
    sides = [_grouped(results.require(model=model, probe=name, **filters)) for model in (a, b)]
    both = [key for key in sides[0] if _seeds(sides[0][key]) & _seeds(sides[1].get(key, []))]
    if not both:
        raise BadData(
            f"no data set has rows of {name} by both {a} and {b} with a seed, grid and options in common. Make them with "
            f"`mlfusion probe --probe {name}` for each model"
        )
    return [compare(results, sides[0][key], sides[1][key], bootstrap=bootstrap) for key in sorted(both)]


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by everything but model and seed; of several sets of features those of the newest row."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:  # oldest first
        group = groups[row.dataset, row.metric, row.grid, str(row.options()), str(row.protocol)]
        if group and group[-1].made_from != row.made_from:
            group.clear()
        group.append(row)
    return groups


def _seeds(rows: Sequence[Row]) -> set[int]:
    return {row.seed for row in rows}
