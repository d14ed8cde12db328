"""The tables of `results.sqlite`, their formats, and the digests that show a changed bit.

A row is its JSON with a digest; its list of classes is named by a digest too. Only a database that has exactly our tables is
opened: a view, a trigger or another definition in it could run for ever, or change rows that others save.
"""

import hashlib
import json
import logging
import os
import shlex
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

import msgspec

from mlfusion.errors import ResultsUnusable
from mlfusion.results.arrays import FOLDER
from mlfusion.results.records import decode, encode
from mlfusion.results.rows import Row
from mlfusion.specs.definitions import distribute
from mlfusion.specs.names import full_name
from mlfusion.specs.selection import RowFilter
from mlfusion.system import disk

logger = logging.getLogger(__name__)

FORMAT = 4
READ = (3, 4)  # 3 has no digests
APPLICATION_ID = 0x6D6C6678  # 'mlfx': distinguishes our files from other SQLite databases
MIN_SQLITE = (3, 38, 0)  # from here on SQLite always has its JSON functions
TIMEOUT = 60.0  # seconds to wait for other writers; each holds the lock for milliseconds

COLUMNS = {
    "id": "TEXT",
    "model": "TEXT",
    "dataset": "TEXT",
    "probe": "TEXT",
    "seed": "INTEGER",
    "grid": "TEXT",
    "metric": "TEXT",
    "val": "REAL",
    "test": "REAL",
    "train": "REAL",
    "parameters": "INTEGER",
    "seconds": "REAL",
    "code": "TEXT",
    "created": "TEXT",
}
"""The fields of a listing: columns that the database generates from the stored row, by which rows are found."""

_GENERATED = "\n    ".join(
    f"{name} {kind} GENERATED ALWAYS AS (json_extract(body, '$.{name}')) STORED," for name, kind in COLUMNS.items()
)
_DIGEST = ",\n    digest TEXT NOT NULL"
_TABLES = (
    "CREATE TABLE classes (digest TEXT PRIMARY KEY, names TEXT NOT NULL) WITHOUT ROWID",
    f"""CREATE TABLE results (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    {_GENERATED}
    classes TEXT NOT NULL REFERENCES classes (digest),
    body TEXT NOT NULL{_DIGEST}
)""",
    "CREATE UNIQUE INDEX by_id ON results (id)",
    "CREATE INDEX by_place ON results (dataset, model, probe, seed)",
)
"""`body` is the row as JSON, without its classes: a list of a thousand names is stored once, not in every row."""


class Listed(msgspec.Struct):
    """The fields of a listing, which are read without the rest of a row."""

    id: str
    model: str
    dataset: str
    probe: str
    seed: int
    grid: str
    metric: str
    val: float
    test: float
    train: float
    parameters: int
    seconds: float
    code: str
    created: str


Lists = dict[str, tuple[str, ...] | None]
"""{digest: the list of classes, or None if it does not match}."""


@dataclass(frozen=True)
class Stored:
    """A row as it lies in the database, with the columns by which it is found."""

    id: str
    model: str
    dataset: str
    probe: str
    classes: str  # digest of the list of names
    body: str
    digest: str | None  # None in format 3

    def checked(self) -> str:
        """The JSON.

        Raises:
            ValueError: a byte of it was changed.
        """
        if not isinstance(self.body, str) or self.digest not in (None, row_digest(self.classes, self.body)):
            raise ValueError("it does not match its digest")
        return self.body

    def row(self, lists: Lists) -> Row:
        """The row.

        Raises:
            ValueError: a byte of it was changed, or it is no row; says what is wrong.
        """
        if (names := lists.get(self.classes)) is None:
            raise ValueError("its list of classes does not match its digest")
        row = decode(self.checked(), names)
        if (row.id, row.model, row.dataset, row.probe) != (self.id, self.model, self.dataset, self.probe):
            raise ValueError("its columns do not match it")
        return row


def row_digest(classes: str, body: str) -> str:
    """The digest of a row: of the digest of its classes, and of its JSON."""
    return hashlib.sha256(f"{classes}\n{body}".encode(errors="surrogatepass")).hexdigest()


def names_digest(names: str) -> str:
    """The digest of a list of classes as JSON."""
    return hashlib.sha256(str(names).encode(errors="surrogatepass")).hexdigest()[:32]


def require_file(path: Path) -> bool:
    """Whether the database exists; raises ResultsUnusable if it is a link or a pipe, which is not followed."""
    try:
        state = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISREG(state.st_mode):
        raise ResultsUnusable(
            f"{path} is no regular file; allowed: a database that `mlfusion probe` wrote, or a link to the whole "
            "folder. Name another folder with --results PATH"
        )
    return True


def require_fresh(path: Path) -> None:
    """Raise ResultsUnusable if an empty database lies beside arrays: it had rows once."""
    folder = path.parent / FOLDER
    if folder.is_dir() and any(not name.startswith(disk.DRAFT) for name in os.listdir(folder)):
        raise ResultsUnusable(
            f"{path} is empty, and {path.parent / FOLDER} holds arrays of results: it was emptied. Put a copy of "
            f"the database in its place; or, to begin anew, delete it: rm {shlex.quote(str(path))}"
        )


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open a database; `mode` 'rwc' creates it, 'rw' does not. One without write permission is opened read-only."""
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=TIMEOUT, isolation_level=None)
    # A flipped bit may make text that is no UTF-8: it is read as it is, so that the digest can tell.
    connection.text_factory = lambda data: data.decode(errors="surrogateescape")
    return connection


def create(connection: sqlite3.Connection) -> None:
    """Create the tables in an empty database."""
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        raise ResultsUnusable(
            f"this Python has SQLite {sqlite3.sqlite_version}; results need {'.'.join(map(str, MIN_SQLITE))} or newer (2022): "
            "use another Python"
        )
    for statement in (*_TABLES, f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {FORMAT}"):
        connection.execute(statement)


def format_of(connection: sqlite3.Connection, path: Path) -> int:
    """The format of the database, 0 if it is empty.

    Raises:
        ResultsUnusable: it belongs to another program, has other tables, or a format that this version does not read.
    """
    [number] = connection.execute("PRAGMA user_version").fetchone()
    [owner] = connection.execute("PRAGMA application_id").fetchone()
    found = _definitions(connection)
    if found and owner != APPLICATION_ID:
        raise ResultsUnusable(f"{path} is not a database of mlfusion's; name another folder with --results PATH")
    if number > FORMAT:
        raise ResultsUnusable(
            f"{path} has format {number}, this mlfusion reads up to {FORMAT}. Update it: pip install -U mlfusion"
        )
    if 0 < number < READ[0]:
        raise ResultsUnusable(
            f"{path} has format {number}, of a version that was never released; allowed: {READ[0]} and {FORMAT}. Name "
            "another folder with --results PATH and make the rows again"
        )
    if found != (_expected(number) if number else frozenset()):
        raise ResultsUnusable(
            f"{path} has other tables, views or triggers than mlfusion makes, which could change what is read; allowed: a "
            "database that `mlfusion probe` wrote. Name another folder with --results PATH"
        )
    return int(number)


def _definitions(connection: sqlite3.Connection) -> frozenset[tuple[str, ...]]:
    """(type, name, table, text) of everything that is defined, but for the statistics of ANALYZE, which only speed it up."""
    listed = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master")
    return frozenset(one for one in listed if one[0] != "table" or not one[1].startswith("sqlite_stat"))


@cache
def _expected(number: int) -> frozenset[tuple[str, ...]]:
    with sqlite3.connect(":memory:") as connection:
        for statement in _TABLES:
            connection.execute(statement if number == FORMAT else statement.replace(_DIGEST, ""))
        return _definitions(connection)


def upgrade(connection: sqlite3.Connection) -> None:
    """Give every row of a database of format 3 its digest, inside the transaction of a writer."""
    for name in ("by_id", "by_place"):
        connection.execute(f"DROP INDEX {name}")
    connection.execute("ALTER TABLE results RENAME TO former")
    for statement in _TABLES[1:]:
        connection.execute(statement)
    for number, classes, body in connection.execute("SELECT number, classes, body FROM former ORDER BY number"):
        values = (number, classes, body, row_digest(classes, body))
        try:
            connection.execute("INSERT INTO results (number, classes, body, digest) VALUES (?, ?, ?, ?)", values)
        except sqlite3.DatabaseError:  # no JSON, or twice the same id: nothing that could be read
            logger.warning("row %d of results in the former format is damaged and is left out", number)
    connection.execute("DROP TABLE former")
    connection.execute(f"PRAGMA user_version = {FORMAT}")


def insert(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Save rows, each in place of one of the same id."""
    for row in rows:
        names = json.dumps(row.classes, separators=(",", ":"), ensure_ascii=False)
        classes = names_digest(names)
        body = encode(msgspec.structs.replace(row, classes=())).decode()
        connection.execute("INSERT OR IGNORE INTO classes VALUES (?, ?)", (classes, names))
        values = (classes, body, row_digest(classes, body))
        connection.execute("INSERT OR REPLACE INTO results (classes, body, digest) VALUES (?, ?, ?)", values)


def select(connection: sqlite3.Connection, number: int, rest: str, values: Iterable[object] = ()) -> Iterator[Stored]:
    """The stored rows that the rest of a SELECT names, in a database of this format, one after the other."""
    digest = "NULL" if number < FORMAT else "ifnull(digest, '')"  # a digest that a damaged page lost fits no row
    columns = f"id, model, dataset, probe, classes, body, {digest}"
    return (Stored(*one) for one in connection.execute(f"SELECT {columns} FROM results {rest}", tuple(values)))


def require_whole(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError if a page does not account for all of its bytes: it may hide rows."""
    [found] = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(str(found).splitlines()[-1])


def class_lists(connection: sqlite3.Connection, digest: str | None = None) -> Lists:
    """The lists of classes, or the one of this digest, each compared with its digest."""
    rest, values = ("", ()) if digest is None else ("WHERE digest = ?", (digest,))
    listed = connection.execute(f"SELECT digest, names FROM classes {rest}", values)
    return {name: _names(text) if name == names_digest(text) else None for name, text in listed}


def _names(text: str) -> tuple[str, ...] | None:
    try:
        return msgspec.json.decode(text, type=tuple[str, ...])
    except msgspec.DecodeError:
        return None


def where(filters: Mapping[str, str | None]) -> tuple[str, list[str]]:
    """The SQL clause of fields of `RowFilter`, and its values. Models and data sets have a name, and a hub id or a path."""
    [row_filter] = distribute(filters, RowFilter)
    conditions: list[str] = []
    values: list[str] = []
    for name, value in row_filter.changed().items():
        conditions.append(f"{name} = ?")
        values.append(value)
        exists = Path(value).exists()
        if name == "probe":
            conditions[-1] = "probe IN (?, ?)"
            values.append(full_name(value))
        if name in ("model", "dataset") and (exists or "/" in value):
            # A body that is no JSON is selected too, so that it is named as damaged.
            source = f"CASE WHEN json_valid(body) THEN json_extract(body, '$.sources.{name}') = ? ELSE 1 END"
            conditions[-1] = f"({name} = ? OR {source})"
            values.append(str(Path(value).resolve()) if exists else value)
    return ("WHERE " + " AND ".join(conditions) if conditions else ""), values
