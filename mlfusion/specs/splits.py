"""The words that name a split, such as `val`: data sets and the cache take the same ones."""

from collections.abc import Iterable

SPLITS = ("train", "test", "validation")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
"""Word, in lower case → the split that it names."""


def default_splits(names: Iterable[str]) -> tuple[str, ...]:
    """The splits that are read unless others are asked for: train, test, and the one for validation if it is among `names`."""
    validation = next((name for name in names if split_word(name) == "validation"), None)
    return ("train", "test") if validation is None else ("train", "test", validation)


def split_word(text: str) -> str | None:
    """The split that a whole text names, such as a folder or a cell."""
    return SPLIT_WORDS.get(text.strip().casefold())
