"""The page's tables that sort and filter, as the JSON from which its script makes DataTables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlfusion.report.numbers import count, from_to
from mlfusion.report.published import PublishedComparison
from mlfusion.report.studies import domain
from mlfusion.report.summary import ComparisonGroup, Score, head_of
from mlfusion.results import Row
from mlfusion.specs.identity import KINDS
from mlfusion.specs.names import layer_ranges
from mlfusion.statistics import Spread

MAX_ROWS = 10_000
"""More rows than this are counted and not listed, so that the page stays small."""

DataTable = dict[str, Any]
"""{"columns": [properties of each], "rows": [[cell, …], …]}."""


@dataclass(frozen=True)
class Column:
    """One column; each text is written once, numbers as they are."""

    title: str
    kind: Literal["text", "code", "percent", "points", "count", "duration", "setting"]
    cells: Sequence[Any]
    hidden: bool = False

    def to_json(self) -> tuple[dict[str, Any], list[Any]]:
        """(properties for the script, cells: a text as its position in `words`, a score as (mean, deviation))."""
        head = {"title": self.title, "kind": self.kind} | ({"hidden": True} if self.hidden else {})
        if self.kind not in ("text", "code"):
            return head, [rounded(cell) for cell in self.cells]
        position = {word: i for i, word in enumerate(dict.fromkeys(self.cells))}
        return head | {"words": list(position)}, [position[cell] for cell in self.cells]


def rounded(value: Any) -> Any:
    """A value with no more digits than a figure can show; None for a number that is not finite."""
    if isinstance(value, tuple):
        return tuple(map(rounded, value))
    if isinstance(value, float):
        return None if not math.isfinite(value) else float(f"{value:.6g}")
    return value


def scores_table(pairs: Sequence[tuple[ComparisonGroup, Score]], *, several: bool) -> DataTable:
    """One line per score; with `several` groups, columns name the model and data set."""
    groups, scores = [group for group, _ in pairs], [score for _, score in pairs]
    place = [
        Column("Model", "text", [group.model for group in groups]),
        Column("Data set", "text", [group.name.removeprefix(f"{group.model} on ") for group in groups]),
    ]
    domains = [domain(group.dataset) for group in groups]
    grouped = [Column("Domain", "text", domains, hidden=True)] * (len(set(domains)) > 1)
    gains = ["baseline" if score.is_baseline else _spread(score.gain, score.marks) for score in scores]
    return _table(
        [
            *(place if several else []),
            Column("Probe", "code", [score.probe for score in scores]),
            Column("Test, %", "percent", [_spread(score.test) for score in scores]),
            Column("Gain, points", "points", gains),
            Column("Val., %", "percent", [score.val.mean for score in scores]),
            Column("Train, %", "percent", [score.train.mean for score in scores]),
            Column("Parameters", "count", [score.parameters for score in scores]),
            Column("Time", "duration", [score.seconds for score in scores]),
            Column("Seeds", "count", [score.test.n for score in scores]),
            Column("Head", "text", [head_of(score.probe) for score in scores], hidden=True),
            *grouped,
        ]
    )


def published_table(compared: Sequence[PublishedComparison]) -> DataTable:
    """One line per score that was also published."""
    return _table(
        [
            Column("Model", "text", [one.group.model for one in compared]),
            Column("Data set", "text", [one.group.dataset for one in compared]),
            Column("Probe", "code", [one.score.probe for one in compared]),
            Column("Ours, %", "percent", [_spread(one.score.test) for one in compared]),
            Column("Published, %", "percent", [one.published for one in compared]),
            Column("Difference, points", "points", [one.difference for one in compared]),
            Column("Flagged", "text", ["yes" if one.flagged else "no" for one in compared]),
            Column("Grid", "text", [one.group.grid for one in compared], hidden=True),
        ]
    )


def listed_rows(groups: Sequence[ComparisonGroup]) -> list[Row]:
    """The rows for the page: all, or those that are not of a single layer, or none, so that at most MAX_ROWS are listed."""
    rows = [row for group in groups for row in group.rows]
    without_layers = [row for row in rows if "-layer-" not in row.probe]
    return next((listed for listed in (rows, without_layers) if len(listed) <= MAX_ROWS), [])


def rows_table(rows: Sequence[Row]) -> DataTable:
    """One line per row, with its metrics and the selected hyper-parameters; columns without a value are left out."""

    def metric(name: str) -> list[Any]:
        return [getattr(row.metrics, name, None) for row in rows]

    def selected(name: str) -> list[Any]:
        return [getattr(row.selected, name) for row in rows]

    notes = [row.at_end_note() for row in rows]
    columns = [
        Column("Model", "text", [row.model for row in rows]),
        Column("Data set", "text", [row.dataset for row in rows]),
        Column("Probe", "code", [row.probe for row in rows]),
        Column("Seed", "count", [row.seed for row in rows]),
        Column("Test", "percent", [row.test for row in rows]),
        Column("Accuracy", "percent", metric("accuracy")),
        Column("Top-5", "percent", metric("top5")),
        Column("Macro-F1", "percent", metric("macro_f1")),
        Column("Validation", "percent", [row.val for row in rows]),
        Column("Train", "percent", [row.train for row in rows]),
        Column("Learning rate", "setting", selected("lr")),
        Column("Weight decay", "setting", selected("weight_decay")),
        Column("Penalty", "setting", selected("penalty")),
        Column("Neighbours", "count", selected("neighbours")),
        Column("Dropout", "setting", selected("dropout")),
        Column("Heads", "count", selected("heads")),
        Column("Steps", "count", selected("steps")),
        Column("Batch", "count", selected("batch_size")),
        Column("At an end of the grid", "text", notes if any(notes) else [None] * len(notes)),
        Column("Time", "duration", [row.seconds for row in rows]),
        Column("Grid", "text", [row.grid for row in rows]),
        Column("Code", "text", [row.code for row in rows]),
        Column("Row", "code", [row.id for row in rows]),
    ]
    return _table([column for column in columns if any(cell is not None for cell in column.cells)])


def runs_table(groups: Sequence[ComparisonGroup]) -> DataTable:
    """One line per group: images, model size, layers, tokens, grid, probes, seeds, time and cache keys."""
    times = "\N{MULTIPLICATION SIGN}"
    kinds = [{kind for _, kind in group.tokens} for group in groups]
    return _table(
        [
            Column("Model on data set", "text", [group.name for group in groups]),
            Column("Images", "text", [f"{count(g.first.images.train)} + {count(g.first.images.test)}" for g in groups]),
            Column("Classes", "count", [len(group.first.classes) for group in groups]),
            Column(
                f"Blocks {times} width",
                "text",
                [f"{group.first.depth} {times} {group.first.width}" for group in groups],
            ),
            Column("Layers", "text", [layer_ranges({layer for layer, _ in group.tokens}) for group in groups]),
            Column("Tokens", "text", [", ".join(kind for kind in KINDS if kind in present) for present in kinds]),
            Column(
                "Grid",
                "text",
                [f"{group.grid}, {from_to(row.configurations for row in group.rows)}" for group in groups],
            ),
            Column("Probes", "count", [len(group.scores) for group in groups]),
            Column("Seeds", "text", [layer_ranges(group.seeds).replace(",", ", ") for group in groups]),
            Column("Time", "duration", [group.seconds for group in groups]),
            Column("Features", "code", [" ".join(group.features) for group in groups]),
        ]
    )


def _table(columns: Sequence[Column]) -> DataTable:
    heads, cells = zip(*(column.to_json() for column in columns), strict=True)
    return {"columns": list(heads), "rows": [list(row) for row in zip(*cells, strict=True)]}


def _spread(spread: Spread | None, marks: str = "") -> tuple[Any, ...] | None:
    return None if spread is None else (spread.mean, spread.sd, *([marks] if marks else []))
