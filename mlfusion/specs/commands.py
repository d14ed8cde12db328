"""The commands that rows, cards, errors and the page print: one function for each stage, from the options themselves."""

from collections.abc import Iterable, Sequence

from mlfusion.specs.definitions import command
from mlfusion.specs.identity import Pair
from mlfusion.specs.names import token_words
from mlfusion.specs.options import FeatureOptions, SearchOptions


def extract_command(model: str | None, dataset: str, pairs: Iterable[Pair] = (), options: Sequence[str] = ()) -> str:
    """The command that caches `pairs`.

    Args:
        model: its source; None where the user must say.
        dataset: its source.
        pairs: (layer, kind); those of the command's default where there are none.
        options: further words, as `feature_words` gives them.
    """
    tokens = ["--tokens", token_words(pairs)] if pairs else []
    return command("extract", [*tokens, *options], model=model or "MODEL", dataset=dataset)


def probe_command(model: str | None, dataset: str, probes: Sequence[str], search: SearchOptions) -> str:
    """The command that trains probes on the cached features."""
    return command("probe", [*_words("--probe", ",".join(probes)), *search.words()], model=model, dataset=dataset)


def feature_words(splits: tuple[str, ...], view: str, options: Sequence[str]) -> list[str]:
    """The words of an entry's options: its splits and its view, and those that its record keeps."""
    return [*FeatureOptions(splits=splits, views=(view,)).words(), *options]


def _words(name: str, value: str) -> list[str]:
    return [name, value] if value else []
