"""Rows that could not be saved while another program held the database: kept beside it, and taken over by the next writer.

Each is one file in `waiting/`: the row as JSON, and in a second line the digest of the first.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from mlfusion.results.records import decode, encode
from mlfusion.results.rows import Row
from mlfusion.system import disk
from mlfusion.system.regular import opened

FOLDER = "waiting"
LARGEST = 2**26  # bytes of a row; that of a thousand classes has thirty thousand


def keep(root: Path, row: Row) -> Path:
    """Keep a row in a folder of results, in place of an older one of its id; returns the path."""
    path = root / FOLDER / f"{row.id}.json"
    path.parent.mkdir(exist_ok=True)
    body = encode(row)
    with disk.atomic(path, replace=True) as draft:
        draft.write_bytes(body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n")
    return path


def ids(root: Path) -> list[str]:
    """The ids of the rows that wait, sorted."""
    try:
        names = os.listdir(root / FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json") and name[0] != ".")


def read(root: Path, row_id: str) -> Row | None:
    """A row that waits; None if there is none, or if it is damaged."""
    try:
        with opened(root, f"{FOLDER}/{row_id}.json") as file:
            text = file.read(LARGEST)
        body, digest, rest = text.split(b"\n", 2)
        row = decode(body) if digest == hashlib.sha256(body).hexdigest().encode() and not rest else None
    except (OSError, ValueError):
        return None
    return row if row and row.id == row_id else None


def waiting(root: Path) -> Iterator[Row]:
    """The rows that wait, without damaged ones."""
    for row_id in ids(root):
        if row := read(root, row_id):
            yield row


def done(root: Path, row: Row) -> None:
    """Remove a row that was taken over."""
    (root / FOLDER / f"{row.id}.json").unlink(missing_ok=True)
