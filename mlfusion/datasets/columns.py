"""Chooses the columns of images and labels by the user's option, else by type and usual name; one rule for all forms."""

import logging
from collections.abc import Mapping, Sequence

from mlfusion.errors import BadData
from mlfusion.specs.options import ReadOptions

logger = logging.getLogger(__name__)

IMAGES = ("image", "img", "images", "file_name", "filename", "file", "path", "image_path", "filepath", "image_file")
LABELS = ("label", "cls", "labels", "class", "target", "fine_label")

GROUPS = (
    "patient",
    "subject",
    "person",
    "case",
    "individual",
    "participant",
    "animal",
    "group",
    "video",
    "scene",
    "study",
)
"""Words in the names of columns that hold groups of images, such as those of a patient."""

COLUMNS = ("image_column", "label_column", "id_column", "split_column", "target", "group_column", "group_pattern")
USED_OPTIONS: dict[str, tuple[str, ...]] = {
    "class folders": ("target", "group_pattern"),
    "table": (*COLUMNS, "image_root"),
    "WebDataset": ("image_column", "label_column", "target", "group_column", "group_pattern"),
    "Parquet files": (*COLUMNS, "image_root", "config"),
    "Parquet file": (*COLUMNS, "image_root"),
    "hub data set": (*COLUMNS, "config"),
    "arrays": ("image_column", "label_column", "target"),
    "images without labels": (),
    "embedded": (),
}
"""Beginning of a form's name → which of `OPTIONS` it uses."""

OPTIONS = (*COLUMNS, "image_root", "config")
NEUTRAL = {"split_column": "none", "target": "class"}
"""Values that every form takes: the first asks for what a form without columns does, the second for what digits are."""


def refuse_unused(options: ReadOptions, form: str, name: str) -> None:
    """Refuse an option that this form of data set does not use, so that its labels are never other than those asked for.

    Raises:
        BadData: names the option, and what the form uses.
    """
    used = next(each for start, each in USED_OPTIONS.items() if form.startswith(start))
    if form.endswith("read in place"):
        used = (*used, "config")
    for option in OPTIONS:
        value = getattr(options, option)
        if option not in used and value is not None and value != NEUTRAL.get(option):
            flags = ", ".join(f"--{each.replace('_', '-')}" for each in used) or "none of these options"
            raise BadData(
                f"{name} is read as {form}, where --{option.replace('_', '-')} {value} has no effect; allowed: {flags}. Leave "
                "the option out, or give the path of the table or file that it is about"
            )


def choose_column(
    role: str,
    columns: Mapping[str, str],
    requested: str | None,
    likely: Sequence[str],
    usual: Sequence[str],
    location: str,
) -> str:
    """Return the column that the user names, or choose one by type and name.

    Args:
        role: 'image', 'label' or 'id', for the message.
        columns: name → type in words.
        likely: columns whose type fits.
        usual: usual names in lower case, the best first. The first that is likely is chosen, or the only likely column; if
            none is likely, the first usual name that is a column. A choice between several likely columns is reported.
        location: the file or data set, for the message.

    Raises:
        BadData: lists the columns and their types.
    """
    option = f"--{role}-column"
    if requested is not None:
        if requested in columns:
            return requested
        raise BadData(f"{location} has no column {requested!r}; {option} may be: {list_columns(columns)}")
    candidates = list(likely) or list(columns)
    by_name = {name.strip().casefold(): name for name in reversed(candidates)}
    fitting = [by_name[name] for name in usual if name in by_name] or (list(likely) if len(likely) == 1 else [])
    if fitting:
        if len(likely) > 1:
            others = ", ".join(name for name in likely if name != fitting[0])
            logger.warning(
                "%s: the column %s is read as the %s, and not %s; %s chooses another",
                location,
                fitting[0],
                role,
                others,
                option,
            )
        return fitting[0]
    raise BadData(
        f"{location}: which column holds the {role} is not plain; give {option}, one of: {list_columns(columns)}"
    )


def require_different(columns: Sequence[str], location: str) -> None:
    """Check that no two columns have one name, of which a reader takes the first or the last without a word."""
    if repeated := next((name for name in columns if list(columns).count(name) > 1), None):
        raise BadData(f"{location} has two columns {repeated!r}; rename one, or take it out")


def list_columns(columns: Mapping[str, str]) -> str:
    """'label (whole number), path (text)'."""
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def require_unique(ids: Sequence[str], location: str) -> tuple[str, ...]:
    """Return the ids; raises BadData if two of them are equal."""
    if len(set(ids)) < len(ids):
        earlier: set[str] = set()
        repeated = next(name for name in ids if name in earlier or earlier.add(name))  # type: ignore[func-returns-value]
        raise BadData(
            f"{location} has {repeated} twice; take one out, or give a column of different ids with --id-column"
        )
    return tuple(ids)
