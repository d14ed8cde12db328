"""Finds the cached splits that a user's words name, and says what is missing and which command makes it."""

import logging
import shlex
from collections.abc import Sequence

from mlfusion.errors import BadData, BadModel, NotCached
from mlfusion.specs.commands import extract_command, feature_words
from mlfusion.specs.definitions import option_words
from mlfusion.specs.identity import KINDS, ModelSpec, Pair
from mlfusion.specs.splits import SPLITS, split_word
from mlfusion.store import Alias, Entry, FeatureStore
from mlfusion.store.entry import pair_words

logger = logging.getLogger(__name__)


def newest_split(store: FeatureStore, model: str, dataset: str, split: str, view: str = "plain") -> Alias:
    """The features of one split that were extracted last.

    Raises:
        NotCached: there are none, or another split was extracted later from another reading of the data set.
        BadData: the names are those of several data sets or models, or the split or the view is not cached.
    """
    named = [alias for alias in store.aliases(model=model, dataset=dataset) if alias.matches]
    require_one_source(named, model, dataset)
    if all(alias.entry.spec.data.split != split for alias in named):  # `--split val=…` keeps the user's word
        split = split_word(split) or split
    of_split = [alias for alias in named if alias.entry.spec.data.split == split]
    found = [alias for alias in of_split if alias.entry.spec.model.view == view]
    if of_split and not found:
        options = feature_words(None, view, of_split[0].names.options)
        raise NotCached(
            f"{split} features of {model} on {dataset} are cached of the views "
            f"{', '.join(sorted({alias.entry.spec.model.view for alias in of_split}))}, not of {view}; run: "
            + extract_command(model, dataset, options=options)
        )
    if named and not found:
        cached = ", ".join(sorted({alias.entry.spec.data.split for alias in named}))
        raise BadData(f"no {split!r} split of {dataset} is cached; cached: {cached}")
    if not found:
        raise NotCached(not_cached_message(store, model, dataset, []))
    newest = max(found, key=lambda alias: alias.at_ns)
    require_last_reading(newest, newest.at_ns, named)
    return newest


def require(entry: Entry, pairs: frozenset[Pair], model: str, dataset: str, options: Sequence[str]) -> None:
    """Raise NotCached with the command that extracts the rest unless `pairs` are complete; BadModel if none can.

    `options` are further words of that command.
    """
    if absent := pairs - entry.complete_pairs():
        if reason := impossible(entry.spec.model, absent):
            raise BadModel(f"{model} {reason}")
        by_kind = sorted(absent, key=lambda pair: pair[1])
        raise NotCached(
            f"{entry.spec.data.split} features of {model} on {dataset} lack {pair_words(by_kind)}; run: "
            + extract_command(model, dataset, absent, options)
        )


def impossible(model: ModelSpec, pairs: frozenset[Pair]) -> str | None:
    """Why no extraction can give `pairs`, and which tokens the model has; None if one can, or if that is not known."""
    lacking = sorted({kind for _, kind in pairs if kind not in model.kinds}, key=KINDS.index) if model.kinds else []
    if not lacking:
        return None
    return (
        f"has no {' and no '.join(lacking)} token; allowed: {', '.join(model.kinds)}. So take probes such as ap-last/linear "
        "or ap-all-layers/attentive"
    )


def tell_left_out(entry: Entry) -> None:
    """Warn that images of an entry were skipped, since scores of the rest are those of another data set."""
    if skipped := len(entry.skipped()):
        data = entry.spec.data
        logger.warning(
            "%s of %s %s images of %s are left out, since they could not be read when their features were extracted; "
            "which and why: mlfusion cache ls --json",
            *(f"{skipped:,}", f"{data.images:,}", data.split, data.name),
        )


def require_one_source(named: Sequence[Alias], model: str | None, dataset: str) -> None:
    """Raise BadData if a short name is that of several models or data sets; a copy of the same content is the same one."""
    data_sets, model_sources = {}, {}
    for alias in sorted(named, key=lambda alias: alias.at_ns):  # of each source the last reading counts
        spec = alias.entry.spec
        data_sets[alias.names.dataset_source] = alias.names.reading
        model_sources[alias.names.model_source] = spec.model.weights, spec.model.config
    for option, word, found in (("dataset", dataset, data_sets), ("model", model, model_sources)):
        if word is not None and len(set(found.values())) > 1 and len(found) > 1:
            raise BadData(
                f"{word} is the name of {len(found)} sources in the cache: {', '.join(sorted(found))}. Give one of them, "
                f"such as {shlex.join(option_words(option, sorted(found)[0]))}"
            )


def require_last_reading(chosen: Alias, at_ns: int, named: Sequence[Alias]) -> None:
    """Raise NotCached if a split of the same names was extracted later than `at_ns` from another reading."""
    for alias in named:
        a, b = alias.names, chosen.names
        same = (a.model_source, a.dataset, a.dataset_source) == (b.model_source, b.dataset, b.dataset_source)
        if same and alias.at_ns > at_ns and a.reading != b.reading:
            raise NotCached(
                f"the {alias.entry.spec.data.split} features of {a.model} on {a.dataset} were extracted last, from another "
                "reading of the data set than the features of its other splits: images, labels, groups or splits have changed "
                f"since then. Extract all splits again: {command_of(alias)}"
            )


def command_of(alias: Alias) -> str:
    """The command that extracts train and test as this alias was extracted."""
    spec, names = alias.entry.spec, alias.names
    splits = [names.split or spec.data.split]
    splits = [each for each in ("train", "test") if each != spec.data.split] + splits
    splits = sorted(splits, key=lambda name: [*SPLITS, split := name.partition("=")[0]].index(split))
    words = feature_words(unless_default(splits), spec.model.view, names.options)
    pairs = alias.entry.complete_pairs()
    return extract_command(
        names.model_argument or names.model_source, names.dataset_argument or names.dataset_source, pairs, words
    )


def not_cached_message(store: FeatureStore, model: str | None, dataset: str, named: Sequence[Alias]) -> str:
    """The sentence about features that are not cached; `named` are train and test features of these names."""
    splits = sorted({alias.entry.spec.data.split for alias in named})
    if splits:
        newest = max(named, key=lambda alias: alias.at_ns)
        readings = [
            {alias.names.reading for alias in named if alias.entry.spec.data.split == split} for split in splits
        ]
        why = f"only {splits[0]} is cached"
        if len(splits) == 2:
            alike = set.intersection(*readings) - {""}
            why = "train and test were made unlike" if alike else "train and test are from different readings of it"
        return (
            "a probe needs train and test features made alike, from one reading of the data set; of "
            f"{dataset}, {why}. Run: {command_of(newest)}"
        )
    pairs = sorted({(n.model, n.dataset) for entry in store.entries() for n in entry.names()})
    shown = ", ".join(f"{m} on {d}" for m, d in pairs[:8]) + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")
    holds = f"it holds {shown or 'nothing yet'}" if store.root.is_dir() else "which does not exist"
    return (
        f"no features of {dataset}{f' by {model}' if model else ''} in {store.root.absolute()} ({holds}). "
        f"Run: {extract_command(model, dataset)}"
    )


def unless_default(splits: Sequence[str]) -> tuple[str, ...] | None:
    """Splits as `extract` is told them; None if they are those that it reads by default."""
    return None if set(splits) <= set(SPLITS) else tuple(splits)
