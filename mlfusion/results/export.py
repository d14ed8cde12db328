"""Rows for other programs: a flat table as CSV, Parquet or pandas, or the rows themselves as JSON lines."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfusion import disk
from mlfusion.errors import ResultsUnusable, UnknownName
from mlfusion.results.rows import Row

if TYPE_CHECKING:
    import pandas

FORMS = ("csv", "parquet", "jsonl")


def flat(row: Row) -> dict[str, Any]:
    """A row with no object in it: {"metrics": {"loss": 0.1}} → {"metrics.loss": 0.1}. Lists stay lists."""
    found: dict[str, Any] = {}

    def lay(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                lay(item, f"{name}.{key}" if name else key)
        else:
            found[name] = value

    lay(row, "")
    return found


def frame(rows: Iterable[Row]) -> "pandas.DataFrame":
    """One line a row, one column a field; a field that a row has not is missing there."""
    import pandas

    held = [flat(row) for row in rows]
    columns = dict.fromkeys(name for one in held for name in one)
    # Of whole numbers that not every row has, pandas' own kind of integer: 2 shots are not 2.0.
    return pandas.DataFrame({name: _column([one.get(name) for one in held]) for name in columns})


def _column(values: list[Any]) -> Any:
    import pandas

    given = [value for value in values if value is not None]
    if len(given) < len(values) and given and all(type(value) is int for value in given):
        return pandas.array(values, dtype="Int64")
    return values


def write(rows: Iterable[Row], path: Path) -> None:
    """Write `path` anew, whole or not at all; its ending is the form: .csv, .parquet or .jsonl.

    Lists are JSON in a CSV, and lists in a Parquet file; JSON lines are the rows to the letter, and can be imported again.

    Raises:
        UnknownName: another ending.
        ResultsUnusable: it cannot be written.
    """
    form = path.suffix.removeprefix(".")
    if form not in FORMS:
        raise UnknownName("form of export", form, FORMS, otherwise="The ending of the path decides, as in results.csv.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.atomic(path, replace=True) as draft:
            _draft(list(rows), draft, form)
    except OSError as err:
        raise ResultsUnusable(
            f"cannot write {str(path)!r}: {err.strerror or err}; allowed: a path in a folder that can be written"
        ) from err


def _draft(rows: list[Row], path: Path, form: str) -> None:
    if form == "parquet":
        frame(rows).to_parquet(path, index=False)
        return
    with path.open("x", encoding="utf-8", newline="") as file:
        if form == "jsonl":
            file.writelines(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
            return
        table = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in flat(row)), lineterminator="\n")
        table.writeheader()
        for row in rows:
            lists = {k: json.dumps(v, ensure_ascii=False) for k, v in flat(row).items() if isinstance(v, list)}
            table.writerow(flat(row) | lists)
