"""Tells what a user's name for a model or a data set refers to, in the same way for every command.

A name of the catalogue always means the catalogue's row. Any other name that is a path here means that folder or file.
"""

import csv
import logging
import os
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal

from mlfusion.errors import UnknownName
from mlfusion.specs.identity import HOOKS, Hook
from mlfusion.specs.names import ModelRef, Setting, setting_value

SHOWN = 3  # names in a folder that has none of the wanted name

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


def missing_path(reference: str) -> str:
    """A sentence about a path that is not there; empty for what may be an id on the hub, `owner/name`.

    A reference is a path if it begins as one (/, ., ~), has two slashes or more, or names something in a folder that is here.
    """
    owner, slash, rest = reference.partition("/")
    is_path = reference.startswith(("/", ".", "~")) or "/" in rest or (bool(slash) and os.path.isdir(owner))
    if not is_path:
        return ""
    path = Path(os.path.abspath(os.path.expanduser(reference)))
    there = next(parent for parent in path.parents if parent.is_dir())
    names: list[str] = []
    with suppress(OSError):  # it may not be read
        names = sorted(name for name in os.listdir(there) if not name.startswith("."))
    near = get_close_matches(path.relative_to(there).parts[0], names, n=SHOWN) or names[:SHOWN]
    holds = f"; {there} has {', '.join(near)}{', …' if len(near) < len(names) else ''}" if near else ""
    return f"there is no folder or file {path}{holds}"


@cache
def _report_shadowed(kind: Kind, name: str) -> None:
    """Report once that a name means the catalogue's row, although a path of that name exists."""
    logger.warning(
        "%s is the %s of the catalogue; type ./%s for the folder or file of that name here", name, kind, name
    )


def parse_model(word: str) -> ModelRef:
    """Parse 'NAME', 'NAME:HOOK' or 'NAME:key=value,…'; the name may be a path with colons.

    Raises:
        UnknownName: a part is neither a hook point nor a setting.
    """
    scheme = "embedded:" if word.startswith("embedded:") else ""
    name, rest = _split_name(word.removeprefix(scheme))
    parts = [part.strip() for part in rest.split(",") if part.strip()]
    hook: Hook = "norm2"
    changed: dict[str, Setting] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if equals and key:
            changed[key] = setting_value(value)
        elif part in HOOKS:
            hook = part
        else:
            raise UnknownName("hook point", part, HOOKS, otherwise="Or a setting of the model's, as hidden_act=gelu.")
    return ModelRef(scheme + name, hook, tuple(sorted(changed.items())))


def _split_name(word: str) -> tuple[str, str]:
    """Split a model's name from what follows its colon; a folder that exists is a folder, whatever colons its path has."""
    for name, _, rest in ((word, "", ""), word.rpartition(":")):
        if ":" in name and (path := find_path("model", name)) and path.is_dir():
            return name, rest
    # Hook points and names of settings have no slash, so that a colon before a slash belongs to the path.
    start = word.partition("=")[0].rfind("/") + 1
    name, _, rest = word[start:].partition(":")
    return word[:start] + name, rest


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
