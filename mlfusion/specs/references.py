"""Tells what a user's name for a model or a data set refers to, in the same way for every command.

A name of the catalogue always means the catalogue's row. Any other name that is a path here means that folder or file.
"""

import csv
import logging
import os
from functools import cache
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

Kind = Literal["model", "data set"]

_PACKAGE = Path(__file__).parent.parent
CATALOGUES: dict[Kind, Path] = {
    "model": _PACKAGE / "models" / "catalogue.csv",
    "data set": _PACKAGE / "datasets" / "catalogue.csv",
}

SNAPSHOTS = "snapshots"  # folder of a repository's commits in the hub's cache: datasets--ORG--NAME/snapshots/COMMIT
REPOSITORIES = ("models--", "datasets--")


@cache
def catalogue_cells(kind: Kind) -> tuple[dict[str, str], ...]:
    """The rows of a catalogue: column → text; empty cells are left out."""
    with open(CATALOGUES[kind], encoding="utf-8", newline="") as file:
        return tuple({name: cell for name, cell in line.items() if cell} for line in csv.DictReader(file))


@cache
def _catalogue_names(kind: Kind) -> frozenset[str]:
    return frozenset(row["name"] for row in catalogue_cells(kind))


def find_path(kind: Kind, reference: str) -> Path | None:
    """The absolute path of the folder or file that a reference means; None if it means no path.

    A folder with a name of the catalogue is meant by ./NAME or by its absolute path. A link to a file keeps its own name.
    """
    path = Path(reference).expanduser()
    if not os.path.exists(path):
        return None
    if reference in _catalogue_names(kind):
        _report_shadowed(kind, reference)
        return None
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


@cache
def _report_shadowed(kind: Kind, name: str) -> None:
    """Report once that a name means the catalogue's row, although a path of that name exists."""
    logger.warning(
        "%s is the %s of the catalogue; type ./%s for the folder or file of that name here", name, kind, name
    )


def short_name(path: Path) -> str:
    """The name of a folder or file for display; a snapshot in the hub's cache has the name of its repository."""
    if path.parent.name == SNAPSHOTS and (repository := path.parent.parent.name).startswith(REPOSITORIES):
        return repository.rpartition("--")[2]
    return path.name if path.is_dir() else path.stem


def shared_files(path: Path) -> Path | None:
    """The folder of the repository's files to which the links of a snapshot in the hub's cache lead; None elsewhere."""
    for folder in (path, *path.parents):
        if folder.parent.name == SNAPSHOTS and folder.parent.parent.name.startswith(REPOSITORIES):
            return folder.parent.parent / "blobs"
    return None


def is_inside(target: Path, root: Path) -> bool:
    """Whether a resolved path lies in a folder, or in the files that the folder shares as a snapshot of the hub's cache."""
    shared = shared_files(root)
    return target.is_relative_to(root) or (shared is not None and target.is_relative_to(shared))
