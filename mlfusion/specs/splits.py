"""The words that name a split, such as `val`: data sets and the cache take the same ones."""

SPLITS = ("train", "test", "validation")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
"""Word, in lower case → the split that it names."""


def split_word(text: str) -> str | None:
    """The split that a whole text names, such as a folder or a cell."""
    return SPLIT_WORDS.get(text.strip().casefold())
