"""Finds and reads cached features by the names of a model and a data set; needs neither images nor the model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from mlfusion.errors import BadData, BadModel, NotCached
from mlfusion.specs.commands import extract_command, feature_words
from mlfusion.specs.identity import KINDS, FeatureSpec, ModelSpec, Pair, TokenKind
from mlfusion.specs.names import layer_ranges, parse_layers, parse_tokens
from mlfusion.store import CachePath, Check, Entry, FeatureStore, Names, TokenReader
from mlfusion.store.entry import pair_words

if TYPE_CHECKING:
    import torch

Tokens = TypeVar("Tokens", np.ndarray, TokenReader)


@dataclass(frozen=True, eq=False)
class Features(Generic[Tokens]):
    """Tokens of one split, with the labels and ids of their rows."""

    tokens: Tokens  # [images, layers, kinds x tokens, width]
    labels: np.ndarray  # [images] int64 class indices, [images, classes] uint8, or [images] float64
    ids: tuple[str, ...]  # [images]
    classes: tuple[str, ...]
    layers: tuple[int, ...]
    kinds: tuple[TokenKind, ...]
    key: str  # of the entry

    def tensors(self: "Features[np.ndarray]") -> "tuple[torch.Tensor, torch.Tensor]":
        """Tokens and labels as torch tensors that share their memory."""
        import torch

        return torch.from_numpy(self.tokens), torch.from_numpy(self.labels)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The tokens of a split to read, in order."""

    layers: str | Sequence[int] = "all"  # 'all' (1..L), 'last', '1-4,12', or numbers
    tokens: str | Sequence[TokenKind] = ("cls", "ap")
    view: str = "plain"


def load_features(
    model: str, dataset: str, split: str, selection: Selection = Selection(), *, cache: CachePath = None
) -> Features[np.ndarray]:
    """Cached tokens as NumPy arrays; arguments and errors as in `mlfusion.load_features`."""
    opened = open_features(model, dataset, split, selection, cache=cache)
    with opened.tokens as reader:
        return Features(reader.read(), *(getattr(opened, each.name) for each in fields(Features)[1:]))


def open_features(
    model: str,
    dataset: str,
    split: str,
    selection: Selection = Selection(),
    *,
    cache: CachePath = None,
    check: Check = "once",
) -> Features[TokenReader]:
    """Cached tokens that are read on demand; arguments and errors as in `mlfusion.open_features`."""
    # Entries of the same names differ in content, preprocessing or storage type.
    entry = max(_find_split(FeatureStore(cache), model, dataset, split, selection.view), key=Entry.extracted_at_ns)
    depth = entry.spec.model.depth
    layers = parse_layers(selection.layers, depth) if isinstance(selection.layers, str) else tuple(selection.layers)
    kinds = tuple(selection.tokens.split(",")) if isinstance(selection.tokens, str) else tuple(selection.tokens)
    require(entry, parse_tokens(kinds, layer_ranges(layers), depth), model, dataset)
    rows, samples = entry.rows(), entry.samples
    return Features(
        tokens=entry.open(layers, kinds, check=check),  # type: ignore[arg-type]
        labels=samples.labels[rows],
        ids=tuple(samples.ids[row] for row in rows),
        classes=samples.classes,
        layers=layers,
        kinds=kinds,  # type: ignore[arg-type]
        key=entry.key,
    )


@dataclass(frozen=True, eq=False)
class SplitPair:
    """Train and test features of one model on one data set, extracted with the same options."""

    model: str  # as the user named it
    dataset: str
    train: Entry
    test: Entry
    older: int  # number of older pairs of the same names

    @property
    def keys(self) -> tuple[str, str]:
        """Keys of train and test."""
        return self.train.key, self.test.key

    @property
    def complete_pairs(self) -> frozenset[Pair]:
        """Every (layer, kind) that is complete in both splits."""
        return self.train.complete_pairs() & self.test.complete_pairs()


def split_pairs(store: FeatureStore, dataset: str, model: str | None) -> list[SplitPair]:
    """The newest train and test features of one model, or of every model, on a data set; NotCached if there is no pair."""
    pairs_of: dict[str, list[tuple[Names, Entry, Entry]]] = {}
    trains, tests = (
        [entry for entry in store.find(model=model, dataset=dataset, split=split) if entry.spec.model.view == "plain"]
        for split in ("train", "test")
    )
    for train in trains:
        for test in tests:
            if _shared_options(train.spec) == _shared_options(test.spec):
                name = train.names()[0]
                pairs_of.setdefault(model or name.model_source, []).append((name, train, test))
    if not pairs_of:
        raise NotCached(_not_cached(store, model, dataset, [e.spec.data.split for e in (*trains, *tests)]))
    pairs = []
    for candidates in pairs_of.values():
        # The newest train decides, then the newest test: after a change of the data set old splits pair with new ones.
        name, train, test = max(candidates, key=lambda pair: (pair[1].extracted_at_ns(), pair[2].extracted_at_ns()))
        pairs.append(SplitPair(name.model, name.dataset, train, test, older=len(candidates) - 1))
    return pairs


def require(entry: Entry, pairs: frozenset[Pair], model: str, dataset: str) -> None:
    """Raise NotCached with the command that extracts the rest unless `pairs` are complete; BadModel if none can."""
    if absent := pairs - entry.complete_pairs():
        if reason := impossible(entry.spec.model, absent):
            raise BadModel(f"{model} {reason}")
        by_kind = sorted(absent, key=lambda pair: pair[1])
        raise NotCached(
            f"{entry.spec.data.split} features of {model} on {dataset} lack {pair_words(by_kind)}; run: "
            + extract_command(model, dataset, absent, words_of(entry))
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


def words_of(train: Entry, test: Entry | None = None) -> list[str]:
    """Options of the `mlfusion extract` that creates these entries again, without those of tokens."""
    splits = ("train", "test")
    if test:
        splits = (train.names()[0].split or "train", test.names()[0].split or "test")
    return feature_words(splits, train.spec.model.view, train.names()[0].options)


def _shared_options(spec: FeatureSpec) -> tuple[object, ...]:
    """Fields that are equal in the train and test features of a pair."""
    return spec.model, spec.dtype, spec.format, spec.data.classes, spec.data.resplit


def _find_split(store: FeatureStore, model: str, dataset: str, split: str, view: str) -> list[Entry]:
    all_views = store.find(model=model, dataset=dataset, split=split)
    entries = [entry for entry in all_views if entry.spec.model.view == view]
    if all_views and not entries:
        options = feature_words(("train", "test"), view, all_views[0].names()[0].options)
        raise NotCached(
            f"{split} features of {model} on {dataset} are cached of the views "
            f"{', '.join(sorted({e.spec.model.view for e in all_views}))}, not of {view}; run: "
            + extract_command(model, dataset, options=options)
        )
    if not entries:
        others = [e.spec.data.split for e in store.find(model=model, dataset=dataset)]
        if others:
            raise BadData(f"no {split!r} split of {dataset} is cached; cached: {', '.join(sorted(set(others)))}")
        raise NotCached(_not_cached(store, model, dataset, []))
    return entries


def _not_cached(store: FeatureStore, model: str | None, dataset: str, splits: list[str]) -> str:
    command = extract_command(model, dataset)
    if splits:
        absent = "test" if "test" not in splits else "train" if "train" not in splits else None
        why = f"only {', '.join(sorted(set(splits)))} is cached" if absent else "train and test were made unlike"
        return f"a probe needs train and test features made alike; of {dataset}, {why}. Run: {command}"
    pairs = sorted({(n.model, n.dataset) for entry in store.entries() for n in entry.names()})
    shown = ", ".join(f"{m} on {d}" for m, d in pairs[:8]) + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")
    return (
        f"no features of {dataset}{f' by {model}' if model else ''} in {store.root} (it holds {shown or 'nothing yet'}). "
        f"Run: {command}"
    )
