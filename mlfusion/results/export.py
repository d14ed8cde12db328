"""Rows for other programs: a flat table as CSV, Parquet or pandas; or as JSON lines, which are read again too."""

import csv
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mlfusion.errors import ResultsUnusable, UnknownName
from mlfusion.results.rows import NotARow, Row, decode, encode
from mlfusion.system import disk

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

FORMS = ("csv", "parquet", "jsonl")


def flat(part: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row's object with no object in it: {"metrics": {"loss": 0.1}} → {"metrics.loss": 0.1}. Lists stay lists."""
    found: dict[str, Any] = {}
    for name, value in part.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def frame(rows: Iterable[Row]) -> "pandas.DataFrame":
    """One line a row, one column a field; a field that a row has not is missing there."""
    import pandas

    held = [flat(msgspec.to_builtins(row)) for row in rows]
    columns: dict[str, Any] = {name: [one.get(name) for one in held] for name in _columns(held)}
    for name, values in columns.items():
        given = [value for value in values if value is not None]
        # Of whole numbers that not every row has, pandas' own kind of integer: 2 shots are not 2.0.
        if 0 < len(given) < len(values) and all(type(value) is int for value in given):
            columns[name] = pandas.array(values, dtype="Int64")
    return pandas.DataFrame(columns)


def _columns(held: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in held for name in one))


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
            file.writelines(encode(row).decode() + "\n" for row in rows)
            return
        held = [flat(msgspec.to_builtins(row)) for row in rows]
        table = csv.DictWriter(file, _columns(held), lineterminator="\n")
        table.writeheader()
        for one in held:
            lists = {k: json.dumps(v, ensure_ascii=False) for k, v in one.items() if isinstance(v, list)}
            table.writerow(one | lists)


def read_lines(path: Path) -> list[Row]:
    """Rows of JSON lines. A line that a kill tore is left out with a warning; one that is whole and no row is refused.

    Raises:
        ResultsUnusable: a line is no row; says which and why.
        OSError: the file cannot be read.
    """
    rows: list[Row] = []
    for number, text in enumerate(path.read_bytes().split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            rows.append(decode(text))
        except NotARow as err:
            raise ResultsUnusable(
                f"{path} line {number} is no result: {err}. Rows are written by `mlfusion results export`; move that line "
                "out of the file"
            ) from err
        except ValueError:  # JSON and UTF-8 errors alike
            log.warning("%s line %d is torn (a killed run's); it is left out", path, number)
    return rows
