"""Writes predictions to a file as they are made, so that they need not fit into memory: CSV, JSON lines or Parquet."""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlfusion.errors import ResultsUnusable, UnknownName
from mlfusion.system import disk
from mlfusion.system.text import csv_cell, json_text
from mlfusion.workflows.prediction import Prediction

FORMATS = ("csv", "jsonl", "parquet")
GROUP = 4096  # predictions of a row group in a Parquet file

Write = Callable[[Prediction], None]


def columns(prediction: Prediction) -> dict[str, Any]:
    """A prediction as the cells of a table: image, class_1, probability_1, class_2, …; or image, number.

    A byte of an image's path that is no UTF-8 becomes an escape such as \\udcff.
    """
    image = prediction.image.encode(errors="backslashreplace").decode()
    if prediction.number is not None:
        return {"image": image, "number": prediction.number}
    cells: dict[str, Any] = {"image": image}
    for place, (name, probability) in enumerate(prediction.top, 1):
        cells |= {f"class_{place}": name, f"probability_{place}": probability}
    return cells


@contextmanager
def writing(path: Path) -> Iterator[Write]:
    """A function that writes one prediction; the file replaces `path` when the context ends without an error, else nothing.

    In a CSV a text that spreadsheets take for a formula begins with an apostrophe.

    Raises:
        UnknownName: the path ends in none of .csv, .jsonl and .parquet.
        ResultsUnusable: it cannot be written.
    """
    format = path.suffix.removeprefix(".")
    if format not in FORMATS:
        hint = "The ending of the path decides, as in predictions.csv."
        raise UnknownName("form of predictions", format, FORMATS, otherwise=hint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.atomic(path, replace=True) as draft, _WRITERS[format](draft) as write:
            yield write
    except OSError as err:
        raise ResultsUnusable(
            f"cannot write {str(path)!r}: {err.strerror or err}; allowed: a path in a folder that can be written"
        ) from err


@contextmanager
def _csv(draft: Path) -> Iterator[Write]:
    with draft.open("x", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")

        def write(prediction: Prediction) -> None:
            cells = columns(prediction)
            if not file.tell():
                table.writerow(cells)
            table.writerow(map(csv_cell, cells.values()))

        yield write


@contextmanager
def _jsonl(draft: Path) -> Iterator[Write]:
    with draft.open("x", encoding="utf-8") as file:
        yield lambda prediction: print(json_text(prediction.to_json()), file=file)


@contextmanager
def _parquet(draft: Path) -> Iterator[Write]:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    waiting: list[dict[str, Any]] = []
    writer: ParquetWriter | None = None

    def flush() -> None:
        nonlocal writer
        table = pyarrow.Table.from_pylist(waiting)
        writer = writer or ParquetWriter(draft, table.schema)
        writer.write_table(table)
        waiting.clear()

    def write(prediction: Prediction) -> None:
        waiting.append(columns(prediction))
        if len(waiting) == GROUP:
            flush()

    try:
        yield write
        if waiting or writer is None:
            flush()
    finally:
        if writer is not None:
            writer.close()


_WRITERS = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}
