"""One folder of results: `results.sqlite` for the rows, `arrays/<id>.npz` for the arrays of the test images.

SQLite with a rollback journal and full flushes: a commit is whole or not at all through a kill and a power loss, writers
wait for each other, and finding one row among a hundred thousand takes as long as among ten. docs/results.md gives reasons.
"""

import hashlib
import json
import shutil
import sqlite3
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
import numpy as np

from mlfusion.errors import MlfusionError, ResultsUnusable, UnknownName
from mlfusion.results.export import frame, read_lines
from mlfusion.results.rows import NotARow, Row, check, decode, encode
from mlfusion.specs.definitions import command, distribute
from mlfusion.specs.names import ALIASES
from mlfusion.specs.options import RowFilter
from mlfusion.system import disk

if TYPE_CHECKING:
    import pandas

DATABASE = "results.sqlite"
ARRAYS = "arrays"
FORMAT = 3
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
"""The fields of a listing: columns that the database generates from the stored row."""

_GENERATED = "\n    ".join(
    f"{name} {kind} GENERATED ALWAYS AS (json_extract(body, '$.{name}')) STORED," for name, kind in COLUMNS.items()
)
_SCHEMA = (
    "CREATE TABLE classes (digest TEXT PRIMARY KEY, names TEXT NOT NULL) WITHOUT ROWID",
    f"""CREATE TABLE results (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    {_GENERATED}
    classes TEXT NOT NULL REFERENCES classes (digest),
    body TEXT NOT NULL
)""",
    "CREATE UNIQUE INDEX by_id ON results (id)",
    "CREATE INDEX by_place ON results (dataset, model, probe, seed)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT}",
)
"""`body` is the row as JSON, without its classes: a list of a thousand names is stored once, not in every row."""


class Results:
    """Every row of one folder, safe under several threads, processes and kills.

    Each call opens the database anew, so an object may be shared, forked and pickled. Every method raises `ResultsUnusable`
    if the folder cannot be read or written; no partial write is left.
    """

    def __init__(self, root: Path | str) -> None:
        """`root` is the folder, or the database in it. Nothing is created before the first row is saved."""
        root = Path(root)
        self.root = root.parent if root.name == DATABASE else root
        self.path = self.root / DATABASE

    def append(self, row: Row, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Save a row for good, its arrays first: a row that can be read has its arrays.

        A row whose id was saved before is replaced. Arrays are such as `arrays` returns.

        Raises:
            ValueError: the row or an array is not one that can be read back.
        """
        check(row)
        if arrays is not None:
            self.keep_arrays(row, arrays)
        with self._errors("save"):
            self.root.mkdir(parents=True, exist_ok=True)
            with self._writing() as connection:
                _insert(connection, [row])

    def rows(self, **filters: str | None) -> list[Row]:
        """The rows, oldest first; none where nothing was saved yet."""
        clause, values = _where(filters)
        with self._reading() as connection:
            digests = connection.execute("SELECT digest, names FROM classes")
            lists = {digest: tuple(json.loads(names)) for digest, names in digests}
            records = connection.execute(f"SELECT classes, body FROM results {clause} ORDER BY number", values)
            return [self._row(body, lists[classes]) for classes, body in records]

    def require(self, **filters: str | None) -> list[Row]:
        """Like `rows`, for a reader that has nothing to say without any.

        Raises:
            ResultsUnusable: there are none; says how to make some.
        """
        if rows := self.rows(**filters):
            return rows
        raise self._no_rows(filters)

    def find(self, row_id: str) -> Row | None:
        """The row with this id, or None."""
        with self._reading() as connection:
            record = connection.execute(
                "SELECT c.names, r.body FROM results r JOIN classes c ON c.digest = r.classes WHERE r.id = ?", (row_id,)
            ).fetchone()
        return self._row(record[1], tuple(json.loads(record[0]))) if record else None

    def named(self, beginning: str) -> Row:
        """The one row whose id begins with these characters.

        Raises:
            UnknownName: none or several do.
            ResultsUnusable: there are no rows at all.
        """
        with self._reading() as connection:
            matches = connection.execute(
                "SELECT id FROM results WHERE ? AND id >= ? AND id < ? ORDER BY id LIMIT 9",
                (bool(beginning), beginning, beginning + "\U0010ffff"),
            )
            ids = [row_id for (row_id,) in matches]
        if beginning in ids:
            ids = [beginning]
        if len(ids) == 1 and (row := self.find(ids[0])):
            return row
        if ids:
            raise UnknownName("result", beginning, ids, otherwise="Several begin so: give more of the id.")
        if newest := [record["id"] for record in self.listing(limit=5)]:
            raise UnknownName("result", beginning, newest, otherwise="These are the newest; all: mlfusion results ls")
        raise self._no_rows({})

    def listing(self, *, limit: int | None = None, **filters: str | None) -> list[dict[str, Any]]:
        """`COLUMNS` of rows, oldest first; only of the newest `limit` if given. No row is decoded."""
        clause, values = _where(filters)
        with self._reading() as connection:
            records = connection.execute(
                f"SELECT {', '.join(COLUMNS)} FROM results {clause} ORDER BY number DESC LIMIT ?",
                [*values, -1 if limit is None else limit],
            ).fetchall()
        return [dict(zip(COLUMNS, record, strict=True)) for record in reversed(records)]

    def count(self, **filters: str | None) -> int:
        """The number of rows."""
        clause, values = _where(filters)
        with self._reading() as connection:
            return int(connection.execute(f"SELECT count(*) FROM results {clause}", values).fetchone()[0])

    def arrays(self, row: Row) -> dict[str, np.ndarray]:
        """The arrays saved beside the row, as its scores were computed from them.

        `labels` [n_test] or [n_test, C], `probabilities` [n_test, C] float32, `attention` [n_test, T] float16. For numbers,
        labels and `probabilities` [n_test, 1], which are the predictions, are float64 and counted from `origin` []: add it for
        the numbers themselves.

        Raises:
            ResultsUnusable: there are none; says how to make them again.
        """
        path = self._arrays_path(row)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as err:
            state = "were not kept" if isinstance(err, FileNotFoundError) else f"cannot be read ({err})"
            raise ResultsUnusable(
                f"the arrays of result {row.id} {state}: {path}. Make them again with `"
                + command(f"results rerun {row.id} --keep", results=str(self.root.absolute()))
                + "`"
            ) from err

    def keep_arrays(self, row: Row, arrays: Mapping[str, np.ndarray]) -> None:
        """Save the arrays of a row, in place of existing, lost or damaged ones.

        Raises:
            ValueError: an array holds Python objects.
        """
        if pickled := [name for name, array in arrays.items() if np.asarray(array).dtype.hasobject]:
            raise ValueError(f"arrays of Python objects cannot be read back: {', '.join(pickled)}")
        with self._errors("save"), self._draft(row) as draft, draft.open("xb") as file:
            np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]

    def take(self, rows: Iterable[Row], arrays: Path | None = None) -> int:
        """Import rows that are missing here, or newer than the stored ones, in one commit; return their number.

        `arrays` is the results folder that has their arrays, which are copied first.

        Raises:
            ResultsUnusable: one of them is no row.
        """
        imported = list(rows)
        for number, row in enumerate(imported, 1):
            try:
                check(row)
            except NotARow as err:
                raise ResultsUnusable(f"row {number} is no result: {err}. Nothing was taken over") from err
        with self._reading() as connection:
            candidates = _newer(connection, imported)
        with self._errors("save"):
            self.root.mkdir(parents=True, exist_ok=True)
            for row in candidates:
                if arrays is not None and (source := Results(arrays)._arrays_path(row)).is_file():
                    with self._draft(row) as draft:
                        shutil.copyfile(source, draft)
                elif (old := self.find(row.id)) and (old.val, old.test, old.train) != (row.val, row.test, row.train):
                    self._arrays_path(row).unlink(missing_ok=True)  # they are those of the row that is replaced
            with self._writing() as connection:
                newer = _newer(connection, candidates)
                _insert(connection, newer)
        return len(newer)

    def take_from(self, source: Path) -> tuple[int, int]:
        """Import results from another folder, with their arrays, or from a file of JSON lines.

        Returns the number of rows imported, and the number of those that exist here and are not older.

        Raises:
            MlfusionError: the source holds no results, or cannot be read.
        """
        folder: Path | None = None
        if source.suffix == ".jsonl":
            try:
                rows = read_lines(source)
            except OSError as err:
                raise MlfusionError(
                    f"cannot read {str(source)!r}: {err.strerror}; allowed: a folder or a .jsonl file"
                ) from err
        else:
            other = Results(source)
            rows, folder = other.require(), other.root
        imported = self.take(rows, folder)
        return imported, len(rows) - imported

    def to_pandas(self, **filters: str | None) -> "pandas.DataFrame":
        """Rows as a table, one column a field: 'metrics.loss', 'selected.lr'."""
        return frame(self.rows(**filters))

    # --- the database ------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction, which is committed as a whole or not at all."""
        with closing(_connect(self.path, "rwc")) as connection:
            connection.execute("PRAGMA synchronous = EXTRA")  # the folder too: a commit outlives a power loss
            connection.execute("BEGIN IMMEDIATE")  # wait here, not in the middle
            try:
                if _format(connection, self.path) == 0:
                    _create(connection)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one state of the database while others write; an empty database if there is no file."""
        with self._errors("read"):
            if self.root.exists() and not self.root.is_dir():
                raise NotADirectoryError(f"{self.root} is not a folder")
            if self.path.exists():
                with closing(_connect(self.path, "rw")) as connection:
                    connection.execute("BEGIN")
                    if _format(connection, self.path):
                        yield connection
                        return
            with closing(sqlite3.connect(":memory:")) as connection:
                _create(connection)
                yield connection

    def _arrays_path(self, row: Row) -> Path:
        return self.root / ARRAYS / f"{row.id}.npz"

    def _draft(self, row: Row) -> AbstractContextManager[Path]:
        """A path to write the arrays of a row to; the file gets its name once it is whole."""
        path = self._arrays_path(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        return disk.atomic(path, replace=True)

    def _row(self, body: str, classes: tuple[str, ...]) -> Row:
        """A stored row with its classes, which are stored in their own table."""
        try:
            row = decode(body)
        except ValueError as err:
            raise ResultsUnusable(
                f"{self.path} holds what is no result: {err}. Rows are written by `mlfusion probe`; name another folder "
                "with --results PATH"
            ) from err
        msgspec.structs.force_setattr(row, "classes", classes)  # no other reference to this row exists yet
        return row

    # --- errors ------------------------------------------------------------------------------------------------------

    def _no_rows(self, filters: Mapping[str, object]) -> ResultsUnusable:
        options = " and ".join(f"--{name} {value}" for name, value in filters.items() if value is not None)
        if options and self.count():
            return ResultsUnusable(
                f"no results of {options} in {str(self.root)!r}; what there is: "
                + command("results ls", results=str(self.root))
            )
        state = "holds no row yet" if self.root.is_dir() else "does not exist"
        return ResultsUnusable(
            f"no results: {str(self.root)!r} {state}. Make some with `"
            + command("probe", dataset="digits", results=str(self.root))
            + "`, or name a folder that has them: `mlfusion report RESULTS`"
        )

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """Raise errors of the disk and the database as `ResultsUnusable`, with a sentence."""
        try:
            yield
        except (OSError, sqlite3.Error) as err:
            name = getattr(err, "sqlite_errorname", "")
            reason = getattr(err, "strerror", None) or str(err)
            cannot = f"cannot {action} results in {str(self.root)!r}: {reason}"
            if name in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
                message = (
                    f"{self.path} is damaged ({reason}). Keep a copy, and save what can be read with SQLite's own tool: "
                    f"sqlite3 {self.path} .recover | sqlite3 recovered.sqlite; or name another folder with --results PATH"
                )
            elif name.startswith(("SQLITE_BUSY", "SQLITE_PROTOCOL", "SQLITE_IOERR_LOCK", "SQLITE_IOERR_UNLOCK")):
                message = (
                    f"{cannot}. Another process holds them for over {TIMEOUT:.0f} s, or this file system has no locks: keep "
                    "results on a local disk with --results PATH, and bring them together with `mlfusion results import PATH`"
                )
            elif action == "read" and name in (
                "SQLITE_READONLY_ROLLBACK",
                "SQLITE_READONLY_RECOVERY",
                "SQLITE_CANTOPEN",
            ):
                message = (
                    f"{cannot}. A writer was stopped in the middle and what it began must be undone first, for which this "
                    "folder may not be written: open it once with `mlfusion results ls` where it may, or copy it"
                )
            elif action == "save":
                message = (
                    f"{cannot}. Nothing was lost but this row; make room there or allow writing, or name another folder with "
                    "--results PATH, and run it again"
                )
            else:
                message = f"{cannot}; allowed: a folder that `mlfusion probe` wrote (results by default)"
            raise ResultsUnusable(message) from err


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open the database; `mode` 'rwc' creates it, 'rw' does not. A database without write permission is opened read-only."""
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=TIMEOUT, isolation_level=None)


def _create(connection: sqlite3.Connection) -> None:
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        raise ResultsUnusable(
            f"this Python has SQLite {sqlite3.sqlite_version}; results need {'.'.join(map(str, MIN_SQLITE))} or newer (2022): "
            "use another Python"
        )
    for statement in _SCHEMA:
        connection.execute(statement)


def _format(connection: sqlite3.Connection, path: Path) -> int:
    """The format of the database, 0 if it is empty.

    Raises:
        ResultsUnusable: it belongs to another program, or has a format that this version does not read.
    """
    [number] = connection.execute("PRAGMA user_version").fetchone()
    [owner] = connection.execute("PRAGMA application_id").fetchone()
    [tables] = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and owner != APPLICATION_ID:
        raise ResultsUnusable(f"{path} is not a database of mlfusion's; name another folder with --results PATH")
    if number > FORMAT:
        raise ResultsUnusable(
            f"{path} has format {number}, this mlfusion reads up to {FORMAT}. Update it: pip install -U mlfusion"
        )
    if 0 < number < FORMAT:
        raise ResultsUnusable(
            f"{path} has format {number}, of a version that was never released; allowed: {FORMAT}. Name another folder with "
            "--results PATH and make the rows again"
        )
    return int(number)


def _insert(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    for row in rows:
        names = json.dumps(row.classes, separators=(",", ":"), ensure_ascii=False)
        digest = hashlib.sha256(names.encode()).hexdigest()[:32]
        body = encode(msgspec.structs.replace(row, classes=())).decode()
        connection.execute("INSERT OR IGNORE INTO classes VALUES (?, ?)", (digest, names))
        connection.execute("INSERT OR REPLACE INTO results (classes, body) VALUES (?, ?)", (digest, body))


def _newer(connection: sqlite3.Connection, rows: Iterable[Row]) -> list[Row]:
    """The rows that are missing in the database or newer than its own; the last of several with one id."""
    last: dict[str, Row] = {}
    for row in rows:
        last.pop(row.id, None)
        last[row.id] = row
    newest = "SELECT coalesce(max(created), '') FROM results WHERE id = ?"
    return [row for row in last.values() if row.created > connection.execute(newest, (row.id,)).fetchone()[0]]


def _where(filters: Mapping[str, str | None]) -> tuple[str, list[str]]:
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
            values.append(ALIASES.get(value.lower(), value))
        if name in ("model", "dataset") and (exists or "/" in value):
            conditions[-1] = f"({name} = ? OR json_extract(body, '$.sources.{name}') = ?)"
            values.append(str(Path(value).resolve()) if exists else value)
    return ("WHERE " + " AND ".join(conditions) if conditions else ""), values
