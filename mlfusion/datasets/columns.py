"""Which column holds the images and which the labels: as the user says, else by type and usual name, in every table alike."""

from collections.abc import Mapping, Sequence

from mlfusion.errors import BadData

IMAGES = ("image", "img", "images", "file_name", "filename", "file", "path", "image_path", "filepath", "image_file")
LABELS = ("label", "cls", "labels", "class", "target", "fine_label")
SPLITS = ("train", "test", "validation", "val")


def choose(
    what: str, columns: Mapping[str, str], asked: str | None, likely: Sequence[str], usual: Sequence[str], where: str
) -> str:
    """One column of `columns` (name → type in words): the one asked for; of those likely by type the first of a usual name, or
    the only one; else the first of a usual name.

    Raises:
        BadData: lists the columns and their types.
    """
    option = f"--{what}-column"
    if asked is not None:
        if asked in columns:
            return asked
        raise BadData(f"{where} has no column {asked!r}; {option} may be: {described(columns)}")
    fitting = [name for name in usual if name in likely] or (list(likely) if len(likely) == 1 else [])
    fitting = fitting or ([name for name in usual if name in columns] if not likely else [])
    if fitting:
        return fitting[0]
    raise BadData(f"{where}: which column holds the {what} is not plain; give {option}, one of: {described(columns)}")


def described(columns: Mapping[str, str]) -> str:
    """'label (whole number), path (text)'."""
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def unique(ids: Sequence[str], where: str) -> tuple[str, ...]:
    """The ids, if no two are the same.

    Raises:
        BadData: two are.
    """
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        again = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BadData(f"{where} has {again} twice; take one out, or give a column of different ids with --id-column")
    return tuple(ids)
