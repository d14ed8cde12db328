"""Export of rows for other programs: a flat table as CSV, Parquet or pandas; or JSON lines, which can be imported again."""

import csv
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from mlfusion.errors import ResultsUnusable, UnknownName
from mlfusion.results.records import NotARow, decode, encode
from mlfusion.results.rows import Row
from mlfusion.system import disk
from mlfusion.system.text import csv_cell, json_text

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)

FORMATS = ("csv", "parquet", "jsonl")
EARLY = 1000  # rows of a CSV that are written again at once if a further column appears


def flat(part: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested objects: {"metrics": {"loss": 0.1}} → {"metrics.loss": 0.1}. Lists stay lists."""
    fields: dict[str, Any] = {}
    for name, value in part.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = list(value) if isinstance(value, tuple) else value
    return fields


def frame(rows: Iterable[Row]) -> "pandas.DataFrame":
    """A table with one line per row and one column per field; fields that a row lacks are missing values."""
    import pandas

    objects = [flat(msgspec.to_builtins(row)) for row in rows]
    columns: dict[str, Any] = {name: [item.get(name) for item in objects] for name in _columns(objects)}
    for name, values in columns.items():
        present = [value for value in values if value is not None]
        # Whole numbers with missing values need pandas' nullable integers: 2 shots are not 2.0.
        if 0 < len(present) < len(values) and all(type(value) is int for value in present):
            columns[name] = pandas.array(values, dtype="Int64")
    return pandas.DataFrame(columns)


def _columns(objects: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for item in objects for name in item))


def write(rows: Iterable[Row], path: Path) -> None:
    """Replace `path`, whole or not at all; its ending decides the format: .csv, .parquet or .jsonl.

    Lists are written as JSON in a CSV, and as lists in Parquet; JSON lines hold the exact rows, and can be imported again. In a
    CSV a text that spreadsheets take for a formula begins with an apostrophe. `rows` may be those of `Results.scan`: for a CSV
    or JSON lines they need not fit into memory.

    Raises:
        UnknownName: the ending is not one of these.
        ResultsUnusable: it cannot be written.
    """
    format = _format(path)
    if isinstance(rows, Iterator):  # a CSV may read them twice
        rows = list(rows)
    with _draft(path) as draft:
        if format == "parquet":
            frame(rows).to_parquet(draft, index=False)
        else:
            with draft.open("x", encoding="utf-8", newline="") as file:
                _write_csv(rows, file) if format == "csv" else _write_lines(rows, file)


def write_objects(objects: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Replace `path` by flat objects with the same fields, in the formats and with the errors of `write`."""
    format = _format(path)
    with _draft(path) as draft:
        if format == "parquet":
            import pandas

            pandas.DataFrame(list(objects)).to_parquet(draft, index=False)
            return
        with draft.open("x", encoding="utf-8", newline="") as file:
            if format == "jsonl":
                file.writelines(json_text(item) + "\n" for item in objects)
                return
            table = csv.DictWriter(file, list(_columns(objects)), lineterminator="\n")
            table.writeheader()
            table.writerows({name: csv_cell(value) for name, value in item.items()} for item in objects)


def _format(path: Path) -> str:
    format = path.suffix.removeprefix(".")
    if format not in FORMATS:
        hint = "The ending of the path decides, as in results.csv."
        raise UnknownName("form of export", format, FORMATS, otherwise=hint)
    return format


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A file that replaces `path` when it is complete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.atomic(path, replace=True) as draft:
            yield draft
    except OSError as err:
        raise ResultsUnusable(
            f"cannot write {str(path)!r}: {err.strerror or err}; allowed: a path in a folder that can be written"
        ) from err


def _write_lines(rows: Iterable[Row], file: TextIO) -> None:
    file.writelines(encode(row).decode() + "\n" for row in rows)


def _write_csv(rows: Iterable[Row], file: TextIO) -> None:
    """Write rows under the columns of the rows so far; a row with another one begins the file again, which few rows do."""
    columns: dict[str, None] = {}
    complete = False
    while not complete:
        file.seek(0)
        file.truncate()
        table = csv.DictWriter(file, list(columns), lineterminator="\n")
        table.writeheader()
        complete = True
        for number, row in enumerate(rows):
            fields = flat(msgspec.to_builtins(row))
            if not complete or not fields.keys() <= columns.keys():
                columns |= dict.fromkeys(fields)
                complete = False
                if number < EARLY:
                    break  # little is lost
                continue  # the rest is read for its columns alone
            lists = {k: json.dumps(v, ensure_ascii=False) for k, v in fields.items() if isinstance(v, list)}
            table.writerow({name: csv_cell(value) for name, value in (fields | lists).items()})


def read_lines(path: Path) -> list[Row]:
    """Read rows from JSON lines. A line that a kill cut off is skipped with a warning; other invalid lines are refused.

    Raises:
        ResultsUnusable: a line is no row; says which and why.
        OSError: the file cannot be read.
    """
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
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
                logger.warning("%s line %d is torn (a killed run's); it is left out", path, number)
    return rows
