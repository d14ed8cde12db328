"""Finds and reads cached features by the names of a model and a data set; needs neither images nor the model."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
import numpy as np

from mlfusion.errors import BadData, NotCached
from mlfusion.specs.commands import extract_command, feature_words
from mlfusion.specs.identity import Pair, TokenKind
from mlfusion.specs.names import layer_ranges, parse_layers, parse_tokens
from mlfusion.specs.options import ChooseOn
from mlfusion.specs.splits import SPLITS, split_word
from mlfusion.store import Alias, CachePath, Check, Entry, FeatureStore, Groups, Names, TokenReader
from mlfusion.store.embeddings import write
from mlfusion.store.lookup import (
    newest_split,
    not_cached_message,
    require,
    require_last_reading,
    require_one_source,
    tell_left_out,
    unless_default,
)
from mlfusion.store.overlap import Overlap, overlap
from mlfusion.system.display import Displayed
from mlfusion.system.words import plural

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FIRST = 5  # images that a notebook shows

Tokens = TypeVar("Tokens", np.ndarray, TokenReader)


@dataclass(frozen=True, eq=False, repr=False)
class Features(Displayed, Generic[Tokens]):
    """Tokens of one split, with the labels and ids of their rows; a torch DataLoader takes it as it is.

    len(features); features[5]      # number of images; (tokens [layers, kinds x tokens, width], label) of one
    """

    tokens: Tokens  # [images, layers, kinds x tokens, width]
    labels: (
        np.ndarray
    )  # [images] int64 class indices, [images, classes] uint8, or [images] float64; [images, 0]: no labels
    ids: tuple[str, ...]  # [images]
    classes: tuple[str, ...]
    layers: tuple[int, ...]
    kinds: tuple[TokenKind, ...]
    key: str  # of the entry
    groups: tuple[str, ...] | None = None  # [images], such as patients; None: every image is its own group

    def __len__(self) -> int:
        return len(self.ids)

    def summary(self) -> str:
        return (
            f"{plural(len(self), 'image')}, {'+'.join(self.kinds)} at layers {layer_ranges(self.layers)}: tokens "
            f"{list(self.tokens.shape)} {self.tokens.dtype}; labels {list(self.labels.shape)} {self.labels.dtype}, "
            f"{plural(len(self.classes), 'class', 'classes')}; entry {self.key}"
        )

    def lines(self) -> list[dict[str, object]]:
        """The first images with their labels."""
        return [{"id": name, "label": self._label(row)} for row, name in enumerate(self.ids[:FIRST])]

    def _label(self, row: int) -> str:
        label = self.labels[row]
        if self.labels.ndim == 2:
            return ", ".join(self.classes[n] for n in np.flatnonzero(label)) if self.classes else ""
        return self.classes[label] if self.classes and self.labels.dtype.kind == "i" else f"{label:g}"

    def __getitem__(self, row: int) -> tuple[np.ndarray, Any]:
        """(tokens [layers, kinds x tokens, width], label) of one image."""
        return self.tokens[row], self.labels[row]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write one embedding an image, all its numbers in a row; errors and forms as in `embeddings.write`."""
        write(self, Path(path))

    def tensors(self: "Features[np.ndarray]") -> "tuple[torch.Tensor, torch.Tensor]":
        """Tokens and labels as torch tensors that share their memory."""
        import torch

        return torch.from_numpy(self.tokens), torch.from_numpy(self.labels)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The tokens of a split to read, in order."""

    layers: str | int | Sequence[int] = "all"  # 'all' (1..L), 'last', '1-4,12', or numbers
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
    alias = newest_split(FeatureStore(cache), model, dataset, split, selection.view)
    entry = alias.entry
    depth = entry.spec.model.depth
    asked = selection.layers
    numbers = (asked,) if isinstance(asked, int) else asked
    layers = parse_layers(numbers, depth) if isinstance(numbers, str) else tuple(numbers)
    kinds = tuple(selection.tokens.split(",")) if isinstance(selection.tokens, str) else tuple(selection.tokens)
    words = feature_words(None, selection.view, alias.names.options)
    require(entry, parse_tokens(kinds, layer_ranges(layers), depth), model, dataset, words)
    rows, samples, groups = entry.rows(), entry.samples, entry.groups(alias.names)
    tell_left_out(entry)
    return Features(
        tokens=entry.open(layers, kinds, check=check),  # type: ignore[arg-type]
        labels=samples.labels[rows],
        ids=tuple(samples.ids[row] for row in rows),
        classes=samples.classes,
        layers=layers,
        kinds=kinds,  # type: ignore[arg-type]
        key=entry.key,
        groups=None if groups is None else tuple(groups.names[row] for row in rows),
    )


@dataclass(frozen=True, eq=False)
class SplitPair:
    """Train and test features of one model, from one reading of one data set, extracted with the same options.

    The split validation of the same reading belongs to them if it chooses the configuration of a probe.
    """

    model: str  # as the user named it
    dataset: str
    train: Entry
    test: Entry
    names: tuple[Names, ...]  # of train, test, and validation if there is one
    older: int  # number of older pairs of the same names
    validation: Entry | None = None  # whose images choose; None: a fifth of train does

    @classmethod
    def of(cls, train: Alias, test: Alias, older: int = 0, validation: Alias | None = None) -> "SplitPair":
        """The pair of two aliases, with the validation split of the same reading if there is one."""
        # The user's words may be the names of one split only, if the other was extracted from a copy of the data set.
        ours = train.names
        names = ours if train.matches else msgspec.structs.replace(test.names, split=ours.split, groups=ours.groups)
        pair = cls(names.model, names.dataset, train.entry, test.entry, (names, test.names), older)
        if validation is None:
            return pair
        return replace(pair, names=(*pair.names, validation.names), validation=validation.entry)

    def choosing_on(self, choose_on: ChooseOn) -> "SplitPair":
        """The pair with the images that choose: its validation split if it has one, except for 'held-out'.

        Raises:
            NotCached: 'validation' is asked for, and there is none.
        """
        if choose_on == "held-out":
            return replace(self, names=self.names[:2], validation=None)
        if choose_on == "validation" and self.validation is None:
            names = self.names[0]
            again = extract_command(
                names.model_argument or names.model_source,
                names.dataset_argument or names.dataset_source,
                self.complete_pairs if any(kind not in ("cls", "ap") for _, kind in self.complete_pairs) else (),
                self.words(every_split=True),
            )
            raise NotCached(
                f"--choose-on validation: no split validation of {self.dataset}, from the same reading as train and other "
                "than test, is cached; allowed: held-out, which chooses on a fifth of train. If the data set has such a "
                f"split, run: {again}"
            )
        return self

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The features of train, test, and validation if its images choose."""
        return (self.train, self.test) if self.validation is None else (self.train, self.test, self.validation)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of train, test, and validation if its images choose."""
        return tuple(entry.key for entry in self.entries)

    @property
    def group_digests(self) -> tuple[str, str]:
        """Digests of the groups of train and test; both empty if every image is its own group."""
        return self.names[0].groups, self.names[1].groups

    @cached_property
    def groups(self) -> tuple[Groups | None, Groups | None]:
        """The groups of all rows of train and test; None if every image is its own group."""
        return self.train.groups(self.names[0]), self.test.groups(self.names[1])

    @cached_property
    def overlap(self) -> Overlap:
        """The images that are in train and in test; they are looked for at the first call."""
        return overlap(self.train, self.test)

    @property
    def complete_pairs(self) -> frozenset[Pair]:
        """Every (layer, kind) that is complete in every split."""
        return frozenset.intersection(*(entry.complete_pairs() for entry in self.entries))

    def require(self, pairs: frozenset[Pair], model: str, dataset: str) -> None:
        """Raise NotCached with the command that extracts the rest unless `pairs` are complete; BadModel if none can."""
        for entry in self.entries:
            require(entry, pairs, model, dataset, self.words())

    def words(self, *, every_split: bool = False) -> list[str]:
        """Options of the `mlfusion extract` that creates these entries again, or all that it reads by default; no tokens."""
        splits = tuple(names.split or split for names, split in zip(self.names, SPLITS, strict=False))
        options = list(self.names[0].options)
        if (every_split or self.validation is not None) and "--split" in options:  # it was extracted later than train
            place = options.index("--split")
            del options[place : place + 2]
        return feature_words(None if every_split else unless_default(splits), self.train.spec.model.view, options)


def split_pairs(store: FeatureStore, dataset: str, model: str | None) -> list[SplitPair]:
    """The newest train and test features of one model, or of every model, on a data set.

    Train and test are from one reading of the data set: their names record the same digest of all its splits.

    Raises:
        NotCached: there is no pair, or of the last reading only one of train and test is cached.
        BadData: the names are those of several data sets or models.
    """
    every = [alias for alias in store.aliases(model=model, dataset=dataset) if alias.entry.spec.model.view == "plain"]
    trains, tests = ([alias for alias in every if alias.entry.spec.data.split == split] for split in ("train", "test"))
    named = [alias for alias in (*trains, *tests) if alias.matches]
    require_one_source(named, model, dataset)
    pairs_of: dict[str, list[tuple[Alias, Alias]]] = {}
    for train, test in product(trains, tests):
        if (train.matches or test.matches) and belong_together(train, test):
            names = train.names if train.matches else test.names
            pairs_of.setdefault(model or names.model_source, []).append((train, test))
    if not pairs_of:
        _require_labels(store, model, dataset)
        raise NotCached(not_cached_message(store, model, dataset, named))
    pairs = [_newest_pair(candidates, named) for candidates in pairs_of.values()]
    pairs = [_with_validation(pair, every) for pair in pairs]
    for entry in (entry for pair in pairs for entry in pair.entries):
        tell_left_out(entry)
    return pairs


def _require_labels(store: FeatureStore, model: str | None, dataset: str) -> None:
    """Raise BadData if the cached images of a data set have no labels."""
    named = [alias for alias in store.aliases(model=model, dataset=dataset) if alias.matches]
    if named and not any(alias.entry.samples.labels.size for alias in named):
        raise BadData(
            f"the cached images of {dataset} have no labels, which a probe is trained and tested on; allowed: images in class "
            "folders (train/<class>/<image> and test/<class>/<image>) or a table of paths and labels, which mlfusion extract "
            "--dataset reads. Tokens without labels are for mlfusion.load_features and mlfusion cache embeddings"
        )


def _with_validation(pair: SplitPair, every: Sequence[Alias]) -> SplitPair:
    """The pair with the last validation split of its reading, made alike, whose images are neither train's nor test's."""
    known = {pair.train.spec.data.content, pair.test.spec.data.content}
    train = Alias(pair.train, pair.names[0], 0, True)
    found = [
        alias
        for alias in every
        if split_word(alias.entry.spec.data.split) == "validation"
        and belong_together(train, alias)
        and alias.entry.spec.data.content not in known
    ]
    if not found:
        return pair
    newest = max(found, key=lambda alias: alias.at_ns)
    return replace(pair, names=(*pair.names, newest.names), validation=newest.entry)


def _newest_pair(candidates: list[tuple[Alias, Alias]], named: list[Alias]) -> SplitPair:
    """The pair that was extracted last; NotCached if one of its splits was extracted later from another reading."""
    train, test = max(candidates, key=lambda pair: (max(times := [each.at_ns for each in pair]), min(times)))
    require_last_reading(train if train.matches else test, max(train.at_ns, test.at_ns), named)
    others = {(a.entry.key, b.entry.key) for a, b in candidates} - {(train.entry.key, test.entry.key)}
    return SplitPair.of(train, test, len(others))


def only_split(model: str, dataset: str, *, cache: CachePath = None) -> str:
    """The name of the only cached split of a data set.

    Raises:
        NotCached: there is none.
        BadData: there are several.
    """
    store = FeatureStore(cache)
    named = [alias for alias in store.aliases(model=model, dataset=dataset) if alias.matches]
    if not named:
        raise NotCached(not_cached_message(store, model, dataset, []))
    splits = sorted({alias.entry.spec.data.split for alias in named})
    if len(splits) > 1:
        raise BadData(f"several splits of {dataset} are cached: {', '.join(splits)}; give one of them with --split")
    return splits[0]


def belong_together(train: Alias, test: Alias) -> bool:
    """Whether train and test are of one reading of a data set, by one model with the same options."""
    a, b = train.entry.spec, test.entry.spec
    same_reading = train.names.reading == test.names.reading != ""
    return same_reading and (a.model, a.dtype, a.format) == (b.model, b.dtype, b.format)
