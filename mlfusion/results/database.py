"""One folder of results: `results.sqlite` for the rows, `arrays/<id>.npz` for the arrays of the test images.

SQLite with a rollback journal and full flushes: a commit is whole or not at all through a kill and a power loss, writers
wait for each other, and finding one row among a hundred thousand takes as long as among ten. docs/results.md gives reasons.
"""

import logging
import os
import shlex
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from mlfusion.errors import MlfusionError, ResultsUnusable, UnknownName, boundary, printable
from mlfusion.results import arrays as files
from mlfusion.results import failures, pending, schema
from mlfusion.results.export import frame, read_lines
from mlfusion.results.records import NotARow, check, share_parts
from mlfusion.results.rows import Row
from mlfusion.results.schema import Stored
from mlfusion.specs.definitions import command, option_words
from mlfusion.system import disk
from mlfusion.system.display import Displayed
from mlfusion.system.regular import opened
from mlfusion.system.words import plural

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)

DATABASE = "results.sqlite"
NEWEST = 10  # rows that a notebook shows
PROBES = "probes"
"""Folder of the trained probes, each in a folder named by the id of its row."""


class Imported(NamedTuple):
    """What `Results.take` did with rows."""

    taken: int
    present: int  # rows that are here, the same in every field
    differing: tuple[str, ...]  # ids of rows that are here with other values, and were left as they are


class Source(NamedTuple):
    """An open database."""

    connection: sqlite3.Connection
    format: int


class Results(Displayed):
    """Every row of one folder, safe under several threads, processes and kills.

    Each call opens the database anew, so an object may be shared, forked and pickled. Every method raises `ResultsUnusable`
    if the folder cannot be read or written; no partial write is left.
    """

    def __init__(self, root: Path | str) -> None:
        """`root` is the folder, or the database in it. Nothing is created before the first row is saved."""
        root = Path(root)
        self.root = root.parent if root.name == DATABASE else root
        self.path = self.root / DATABASE

    def summary(self) -> str:
        return f"{plural(self.count(), 'row')} in {self.root.absolute()}" + (
            "" if self.root.is_dir() else ", which does not exist"
        )

    def lines(self) -> list[dict[str, Any]]:
        """The newest rows, the newest first."""
        names = ("id", "model", "dataset", "probe", "seed", "val", "test")
        return [{name: row[name] for name in names} for row in self.listing(limit=NEWEST)[::-1]]

    def append(self, row: Row, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Save a row for good, its arrays first: a row that can be read has its arrays.

        A row whose id was saved before is replaced. Arrays are such as `arrays` returns. While another program holds the
        database, the row is kept beside it with a warning, and the next writer takes it over.

        Raises:
            ValueError: the row or an array is not one that can be read back.
        """
        check(row)
        if arrays is not None:
            files.check(row, arrays)
        with failures.translated(self.path, "save"):
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                if arrays is not None:
                    self._prepare()
                    self.keep_arrays(row, arrays)
                with self._writing() as connection:
                    schema.insert(connection, [row])
            except sqlite3.OperationalError as err:
                if not failures.held_by_another(err):
                    raise
                logger.warning(
                    "another program holds %s for over %.0f s; result %s is kept in %s, and the next `mlfusion probe` or "
                    "`mlfusion results import` takes it over",
                    *(self.path, schema.TIMEOUT, row.id, pending.keep(self.root, row)),
                )

    def rows(self, **filters: str | None) -> list[Row]:
        """The rows, oldest first; none where nothing was saved yet. Damaged rows are left out with a warning."""
        with self.scan(**filters) as rows:
            return list(rows)

    @contextmanager
    def scan(self, **filters: str | None) -> Iterator[Iterable[Row]]:
        """The rows as `rows` returns them, read one after the other, so that they need not fit into memory.

        They may be read several times inside the context, always from the same state of the database.
        """
        with self._reading() as source:
            yield _Scan(self, source, filters)

    def require(self, **filters: str | None) -> list[Row]:
        """Like `rows`, for a reader that has nothing to say without any.

        Raises:
            ResultsUnusable: there are none; says how to make some.
        """
        if rows := self.rows(**filters):
            return rows
        raise self._no_rows(filters)

    def find(self, row_id: str) -> Row | None:
        """The row with this id, or None; a damaged one counts as none, with a warning."""
        with failures.translated(self.path, "read"), self._reading() as source:
            found = self._stored(source, row_id)
        if found is None:
            return pending.read(self.root, row_id)
        if isinstance(found, str):
            logger.warning(found)
            return None
        return found

    def named(self, beginning: str) -> Row:
        """The one row whose id begins with these characters.

        Raises:
            UnknownName: none or several do.
            ResultsUnusable: there are no rows at all, or the row is damaged.
        """
        with failures.translated(self.path, "read"), self._reading() as source:
            matches = source.connection.execute(
                "SELECT id FROM results WHERE ? AND id >= ? AND id < ? ORDER BY id LIMIT 9",
                (bool(beginning), beginning, beginning + "\U0010ffff"),
            )
            ids = [row_id for (row_id,) in matches]
            if beginning in ids:
                ids = [beginning]
            if len(ids) == 1 and (row := self._stored(source, ids[0])):
                if isinstance(row, str):
                    raise ResultsUnusable(row)
                return row
        if ids:
            raise UnknownName("result", beginning, ids, otherwise="Several begin so: give more of the id.")
        if newest := [record["id"] for record in self.listing(limit=5)]:
            raise UnknownName("result", beginning, newest, otherwise="These are the newest; all: mlfusion results ls")
        raise self._no_rows({})

    def listing(self, *, limit: int | None = None, **filters: str | None) -> list[dict[str, Any]]:
        """`COLUMNS` of rows, oldest first; only of the newest `limit` if given. No row is decoded as a whole."""
        clause, values = schema.where(filters)
        listed = []
        with failures.translated(self.path, "read"), self._reading() as source:
            rest = f"{clause} ORDER BY number DESC LIMIT ?"
            for stored in schema.select(*source, rest, [*values, -1 if limit is None else limit]):
                try:
                    listed.append(msgspec.structs.asdict(msgspec.json.decode(stored.checked(), type=schema.Listed)))
                except ValueError as err:
                    logger.warning(self._damaged(stored, err))
            if not clause and limit is None:
                schema.require_whole(source.connection)
        return listed[::-1]

    def count(self, **filters: str | None) -> int:
        """The number of rows."""
        clause, values = schema.where(filters)
        with failures.translated(self.path, "read"), self._reading() as source:
            return int(source.connection.execute(f"SELECT count(*) FROM results {clause}", values).fetchone()[0])

    def arrays(self, row: Row) -> dict[str, np.ndarray]:
        """The arrays saved beside the row, as its scores were computed from them.

        `labels` [n_test] or [n_test, C], `probabilities` [n_test, C] float32, `attention` [n_test, T] float16. For numbers,
        labels and `probabilities` [n_test, 1], which are the predictions, are float64 and counted from `origin` []: add it for
        the numbers themselves.

        Raises:
            ResultsUnusable: there are none, or they are damaged or not the row's; says how to make them again.
        """
        path = files.path_of(self.root, row)
        arrays, where = f"the arrays of result {row.id}", f"{path}. {self._again(row)}"
        if not os.path.lexists(path):
            raise ResultsUnusable(f"{arrays} were not kept: {where}")
        with (
            boundary(lambda reason: ResultsUnusable(f"{arrays} cannot be read ({reason}): {where}")),
            opened(self.root, f"{files.FOLDER}/{path.name}") as file,
        ):
            return files.read(file, row)

    def reject_arrays(self, row: Row, score: float) -> ResultsUnusable:
        """The error about arrays that give another score than the row has."""
        return ResultsUnusable(
            f"the arrays of result {row.id} are not its own: they give {row.metric} {score:.4f}, and it has {row.test:.4f}: "
            f"{files.path_of(self.root, row)}. {self._again(row)}"
        )

    def keep_arrays(self, row: Row, arrays: Mapping[str, np.ndarray]) -> None:
        """Save the arrays of a row, in place of existing, lost or damaged ones.

        Raises:
            ValueError: an array is not one that a row like this has.
        """
        files.check(row, arrays)
        with (
            failures.translated(self.path, "save"),
            disk.atomic(self._arrays_target(row), replace=True) as draft,
            draft.open("xb") as file,
        ):
            files.write(file, arrays)

    def take(self, rows: Iterable[Row], arrays: Path | None = None, *, replace: bool = False) -> Imported:
        """Import rows that are missing here, in one commit.

        A row that is here with other values is left as it is, unless `replace`. `arrays` is the results folder that has the
        arrays of the rows, which are copied first.

        Raises:
            ResultsUnusable: one of them is no row.
        """
        last: dict[str, Row] = {}
        for number, row in enumerate(rows, 1):
            try:
                check(row)
            except NotARow as err:
                raise ResultsUnusable(f"row {number} is no result: {err}. Nothing was taken over") from err
            last.pop(row.id, None)
            last[row.id] = row
        here = {row_id: self.find(row_id) for row_id in last}
        differing = [row_id for row_id, old in here.items() if old is not None and old != last[row_id]]
        wanted = [row for row_id, row in last.items() if here[row_id] is None or (replace and row_id in differing)]
        with failures.translated(self.path, "save"):
            self.root.mkdir(parents=True, exist_ok=True)
            self._prepare()
            for row in wanted:
                old = here[row.id]
                copied = arrays is not None and self._copy_arrays(Results(arrays), row)
                if not copied and old and (old.val, old.test, old.train) != (row.val, row.test, row.train):
                    self._arrays_target(row).unlink(missing_ok=True)  # they are those of the row that is replaced
            with self._writing() as connection:
                schema.insert(connection, wanted)
        left = () if replace else tuple(differing)
        return Imported(len(wanted), len(last) - len(wanted) - len(left), left)

    def take_from(self, source: Path, *, replace: bool = False) -> Imported:
        """Import results from another folder, with their arrays, or from a file of JSON lines.

        Raises:
            MlfusionError: the source holds no results, or cannot be read.
        """
        if source.suffix != ".jsonl":
            other = Results(source)
            return self.take(other.require(), other.root, replace=replace)
        try:
            return self.take(read_lines(source), replace=replace)
        except OSError as err:
            raise MlfusionError(
                f"cannot read {str(source)!r}: {err.strerror}; allowed: a folder or a .jsonl file"
            ) from err

    def probe_folder(self, row: Row) -> Path:
        """The folder of a row's trained probe, whether it was kept or not."""
        return self.root / PROBES / row.id

    def remove(self, rows: Sequence[Row]) -> None:
        """Remove rows for good, in one commit, and then their arrays and trained probes."""
        with failures.translated(self.path, "save"):
            with self._writing() as connection:
                connection.executemany("DELETE FROM results WHERE id = ?", [(row.id,) for row in rows])
            for path in (path for row in rows for path in (files.path_of(self.root, row), self.probe_folder(row))):
                if not path.parent.is_symlink():
                    disk.remove(path)

    def to_pandas(self, **filters: str | None) -> "pandas.DataFrame":
        """Rows as a table, one column a field: 'metrics.loss', 'selected.lr'."""
        return frame(self.rows(**filters))

    # --- the database ------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction, which is committed as a whole or not at all; rows that wait are taken over."""
        existed = schema.require_file(self.path)
        waiting: list[Row] = []
        with closing(schema.connect(self.path, "rwc")) as connection:
            connection.execute("PRAGMA synchronous = EXTRA")  # the folder too: a commit outlives a power loss
            connection.execute("BEGIN IMMEDIATE")  # wait here, not in the middle
            try:
                match schema.format_of(connection, self.path):
                    case 0:
                        if existed:
                            schema.require_fresh(self.path)
                        schema.create(connection)
                    case number if number < schema.FORMAT:
                        schema.upgrade(connection)
                for row in pending.waiting(self.root):
                    waiting.append(row)
                    schema.insert(connection, [row])
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        for row in waiting:
            pending.done(self.root, row)

    def _prepare(self) -> None:
        """Create the database before the first arrays, so that arrays beside an empty one show that it was emptied."""
        if not self.path.exists() or not self.path.stat().st_size:
            with self._writing():
                pass
        disk.sweep(self.root / files.FOLDER)  # drafts that a kill left

    @contextmanager
    def _reading(self) -> Iterator[Source]:
        """A connection that sees one state of the database while others write; an empty database if there is no file."""
        with failures.translated(self.path, "read"):
            source = self._open()
        with closing(source.connection):
            yield source

    def _open(self) -> Source:
        if self.root.exists() and not self.root.is_dir():
            raise NotADirectoryError(f"{self.root} is not a folder")
        if schema.require_file(self.path):
            connection = schema.connect(self.path, "rw")
            try:
                connection.execute("BEGIN")
                if number := schema.format_of(connection, self.path):
                    return Source(connection, number)
                schema.require_fresh(self.path)
            except BaseException:
                connection.close()
                raise
            connection.close()
        empty = sqlite3.connect(":memory:")
        schema.create(empty)
        return Source(empty, schema.FORMAT)

    def _stored(self, source: Source, row_id: str) -> Row | str | None:
        """The row with this id; a sentence if it is damaged; None if there is none."""
        stored = next(schema.select(*source, "WHERE id = ?", (row_id,)), None)
        if stored is None:
            return None
        try:
            return stored.row(schema.class_lists(source.connection, stored.classes))
        except ValueError as err:
            return self._damaged(stored, err)

    def _arrays_target(self, row: Row) -> Path:
        """The path to save the arrays of a row at; its folder is made, and may be no link."""
        path = files.path_of(self.root, row)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.is_symlink():
            raise NotADirectoryError(f"{path.parent} is a link; allowed: a folder")
        return path

    def _copy_arrays(self, source: "Results", row: Row) -> bool:
        """Copy the arrays of a row from another folder; False if it has none, or, with a warning, none that can be read."""
        path = files.path_of(source.root, row)
        if not os.path.lexists(path):
            return False
        with ExitStack() as stack:
            try:
                with boundary(ResultsUnusable):
                    file = stack.enter_context(opened(source.root, f"{files.FOLDER}/{path.name}"))
                    files.check_file(file, row)
            except ResultsUnusable as err:
                logger.warning("the arrays of result %s are not taken over: %s: %s", row.id, path, err)
                return False
            with failures.translated(self.path, "save"), disk.atomic(self._arrays_target(row), replace=True) as draft:
                files.copy(file, draft)
        return True

    # --- errors ------------------------------------------------------------------------------------------------------

    def _damaged(self, stored: Stored, err: ValueError) -> str:
        return (
            f"result {printable(str(stored.id))} in {self.path} is damaged: {printable(str(err))}. It is left out; the same "
            "`mlfusion probe` makes it again and replaces it"
        )

    def _again(self, row: Row) -> str:
        rerun = command(f"results rerun {row.id} --keep", results=str(self.root.absolute()))
        return f"Make them again with `{rerun}`"

    def _no_rows(self, filters: Mapping[str, object]) -> ResultsUnusable:
        given = [option_words(name, str(value)) for name, value in filters.items() if value is not None]
        options = " and ".join(map(shlex.join, given))
        if options and self.count():
            return ResultsUnusable(
                f"no results of {options} in {str(self.root.absolute())!r}; what there is: "
                + command("results ls", results=str(self.root))
            )
        state = "holds no row yet" if self.root.is_dir() else "does not exist"
        return ResultsUnusable(
            f"no results: {str(self.root.absolute())!r} {state}. Make some with `"
            + command("probe", dataset="digits", results=str(self.root))
            + "`, or name a folder that has them: `mlfusion report RESULTS`"
        )


class _Scan:
    """The rows that a filter selects, read each time that they are iterated."""

    def __init__(self, results: Results, source: Source, filters: Mapping[str, str | None]) -> None:
        self._results, self._source, self._filters = results, source, filters

    def __iter__(self) -> Iterator[Row]:
        clause, values = schema.where(self._filters)
        memo = dict[Any, Any]()
        with failures.translated(self._results.path, "read"):
            lists = schema.class_lists(self._source.connection)
            for stored in schema.select(*self._source, f"{clause} ORDER BY number", values):
                try:
                    row = stored.row(lists)
                except ValueError as err:
                    logger.warning(self._results._damaged(stored, err))
                    continue
                share_parts(row, memo)
                yield row
            if not clause:
                schema.require_whole(self._source.connection)
