"""What goes wrong with the database of results, in sentences that say what to do."""

import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlfusion.errors import ResultsUnusable
from mlfusion.results import schema


@contextmanager
def translated(path: Path, action: str) -> Iterator[None]:
    """Raise errors of the disk and of the database at `path` as `ResultsUnusable`; `action` is "read" or "save"."""
    try:
        yield
    except (OSError, sqlite3.Error, UnicodeError) as err:
        name = getattr(err, "sqlite_errorname", "")
        reason = getattr(err, "strerror", None) or str(err)
        cannot = f"cannot {action} results in {str(path.parent)!r}: {reason}"
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or type(err) in (
            sqlite3.DatabaseError,
            UnicodeDecodeError,
            UnicodeEncodeError,
        ):
            message = (
                f"{path} is damaged ({reason}). Keep a copy, and save what can be read with SQLite's own tool: "
                f"sqlite3 {shlex.quote(str(path))} .recover | sqlite3 recovered.sqlite; or name another folder with "
                "--results PATH"
            )
        elif name.startswith(("SQLITE_BUSY", "SQLITE_PROTOCOL", "SQLITE_IOERR_LOCK", "SQLITE_IOERR_UNLOCK")):
            message = (
                f"{cannot}. Another process holds them for over {schema.TIMEOUT:.0f} s, or this file system has no locks: keep "
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


def held_by_another(err: sqlite3.Error) -> bool:
    """Whether another program holds the database."""
    return str(getattr(err, "sqlite_errorname", "")).startswith("SQLITE_BUSY")
