"""Builds the commands that rows, cards, errors and the page print."""

from collections.abc import Iterable, Sequence

from mlfusion.specs.definitions import command
from mlfusion.specs.identity import Pair
from mlfusion.specs.names import token_words
from mlfusion.specs.options import FeatureOptions, SearchOptions


def extract_command(model: str | None, dataset: str, pairs: Iterable[Pair] = (), options: Sequence[str] = ()) -> str:
    """The command that caches `pairs`.

    Args:
        model: source of the model; None prints a placeholder.
        dataset: source of the data set.
        pairs: (layer, kind); if empty, the command's default is used.
        options: further words, as from `feature_words`.
    """
    tokens = ["--tokens", token_words(pairs)] if pairs else []
    return command("extract", [*tokens, *options], model=model or "MODEL", dataset=dataset)


def probe_command(model: str | None, dataset: str, probes: Sequence[str], search: SearchOptions) -> str:
    """The command that trains probes on the cached features."""
    return command(
        "probe", [*(["--probe", ",".join(probes)] if probes else []), *search.words()], model=model, dataset=dataset
    )


def feature_words(splits: tuple[str, ...] | None, view: str, options: Sequence[str]) -> list[str]:
    """The words of an entry's options: its splits (None: the default), its view, and the options in its record."""
    return [*FeatureOptions(splits=splits, views=(view,)).words(), *options]
