"""A row: one probe, trained with one seed and tested once, with everything needed to make it again.

Rows are frozen values. `records` reads and writes them as JSON, and checks them by the types that are given here: numbers are
finite and bounded, the id can name a file. Unknown fields are ignored.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta, Struct

from mlfusion.specs.commands import extract_command, probe_command
from mlfusion.specs.definitions import command, option_words
from mlfusion.specs.identity import Pair, TokenKind
from mlfusion.specs.names import Stability
from mlfusion.specs.options import ChooseOn, GridName, SearchOptions
from mlfusion.system.words import plural

Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""A number that is neither infinite nor NaN."""

Id = Annotated[str, Meta(pattern=r"^\w[\w.-]*\Z", max_length=200)]
"""An id is a file name too: it may not lead out of the folder."""

Key = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
"""The key of a cache entry, which is a folder's name."""

Name = Annotated[str, Meta(min_length=1, max_length=1000)]
Place = Annotated[str, Meta(min_length=1, max_length=4096)]  # a name, a hub id or a path
Count = Annotated[int, Meta(ge=0, le=2**53)]
Size = Annotated[int, Meta(ge=1, le=2**53)]
Depth = Annotated[int, Meta(ge=1, le=1000)]
Layer = Annotated[int, Meta(ge=0, le=1000)]
Share = Annotated[float, Meta(ge=0, le=1 + 1e-6)]  # a mean of shares may round to above one
Score = Annotated[float, Meta(ge=-1e100, le=1 + 1e-6)]
"""A score on images: a fraction, or an R², which has no lower bound; 100 times it is still a number."""

Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Time = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)\Z")]
"""ISO 8601 with a time zone."""

Seconds = Annotated[float, Meta(ge=0, le=1e12)]
RowPrecision = Literal["float32", "bfloat16"]


class Metrics(Struct, frozen=True, kw_only=True, tag_field="kind", tag="class"):
    """Scores on the test split, as fractions, for one class per image."""

    balanced_accuracy: Share
    accuracy: Share
    top5: Share
    macro_f1: Share
    loss: Finite  # cross-entropy, nats
    recall: tuple[Share | None, ...]  # per class, in the order of the row's `classes`; None without test images


class LabelMetrics(Struct, frozen=True, kw_only=True, tag_field="kind", tag="labels"):
    """Scores on the test split, as fractions, for several labels per image."""

    mean_average_precision: Share
    average_precision: tuple[Share | None, ...]  # per label; None if no test image has it
    micro_f1: Share
    macro_f1: Share
    loss: Finite  # binary cross-entropy, nats


class NumberMetrics(Struct, frozen=True, kw_only=True, tag_field="kind", tag="number"):
    """Scores on the test split for one number per image."""

    r2: Score
    mae: Finite  # in the labels' unit
    rmse: Finite


AnyMetrics = Metrics | LabelMetrics | NumberMetrics


def metrics_of(kind: str, scores: Mapping[str, Any]) -> AnyMetrics:
    """The metrics of a kind of target ('class', 'labels' or 'number') from scores by name."""
    return msgspec.convert({"kind": kind, **scores}, AnyMetrics)


class Selected(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The hyper-parameters that were chosen; those that the head does not have are None."""

    lr: Finite | None = None
    weight_decay: Finite | None = None
    steps: Count | None = None
    batch_size: Count | None = None
    dropout: Finite | None = None
    heads: Count | None = None
    penalty: Finite | None = None  # ridge and logistic
    neighbours: Count | None = None
    temperature: Finite | None = None

    @classmethod
    def of(cls, values: Mapping[str, float | int]) -> "Selected":
        """The hyper-parameters of a head from a dictionary by name."""
        return msgspec.convert(values, cls)

    def given(self) -> dict[str, float | int]:
        """The hyper-parameters that the head has, by name."""
        return msgspec.to_builtins(self)


class ImageCounts(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The number of images of each split, and of those that chose the configuration."""

    train: Size
    test: Size
    choosing: Size | None = (
        None  # of validation, or of the part of train; None: the row was made before they were counted
    )


class Duplicates(Struct, frozen=True, kw_only=True):
    """The number of test images that are in train too."""

    bytes: Count  # with equal bytes
    near: Count | None  # other near copies, by their tokens; None: not compared

    def sentence(self, images: int) -> str:
        """The counts in words, for a test split of so many images; empty if there is nothing to tell."""
        if not self.bytes and not self.near:
            return ""
        near = "near copies were not looked for" if self.near is None else f"{self.near:,} as near copies"
        both = self.bytes + (self.near or 0)
        of, verb = plural(images, "test image"), "is" if both == 1 else "are"
        return f"{both:,} of {of} {verb} in train too: {self.bytes:,} byte for byte, {near}"


class GroupCounts(Struct, frozen=True, kw_only=True):
    """The groups of the images, such as patients: none is in the fitted and in the held-out part of train."""

    column: Name  # column or pattern that names them
    train: Size  # number of groups of the training images
    test: Size
    digests: tuple[Key, Key]  # of the groups of all images of train and test, as the cache has them


class Fold(Struct, frozen=True, kw_only=True):
    """What one of the folds of a row gave: the probe that was trained on all images but its own."""

    images: Size  # that it tests
    val: Score
    test: Score
    train: Score
    selected: Selected


class Sources(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The model and data set as given to `mlfusion extract`, which finds them again by these names."""

    model: Place  # a catalogue's source, hub id, or folder
    dataset: Place
    weights: Name  # sha256 of the weight files
    train: Name  # digest of the split's images and labels
    test: Name
    options: tuple[Place, ...]  # further options of the `mlfusion extract` that makes the features again
    validation: Name | None = None  # as train, of the split whose images chose; None: a part of train chose


class Attention(Struct, frozen=True, kw_only=True):
    """The attention of a probe on each of T tokens, averaged over heads; four lists of length T."""

    layers: tuple[Layer, ...]
    kinds: tuple[TokenKind, ...]
    mean: tuple[Share, ...]  # over the test images
    sd: tuple[Share, ...]  # over the test images


class Row(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One probe, trained with one seed on one model's features of one data set, and tested once."""

    id: Id
    model: Name
    dataset: Name
    probe: Name  # "cls+ap-all-layers/attentive"
    seed: Seed
    metric: Name  # metric of val, test and train
    val: Score  # score of the chosen configuration on the images that chose
    test: Score  # computed once, after the choice
    train: Score
    metrics: AnyMetrics
    selected: Selected
    grid: GridName
    configurations: Count  # number of configurations scored on the images that chose
    parameters: Count  # number of parameters of one probe
    seconds: Seconds
    layers: Annotated[tuple[Layer, ...], Meta(min_length=1)]  # layers that the probe reads
    tokens: Annotated[tuple[TokenKind, ...], Meta(min_length=1)]  # token kinds that the probe reads
    depth: Depth  # L, the model's blocks
    width: Size  # D, channels of a token
    classes: tuple[str, ...]
    images: ImageCounts
    features: tuple[Key, Key]  # cache keys: train, test
    attention: Attention | None
    versions: Annotated[dict[Name, Name], Meta(max_length=100)]
    code: Name
    created: Time
    protocol: Count  # `probing.jobs.PROTOCOL`; rows of different protocols are not compared
    device: Name  # device of the training
    precision: RowPrecision  # precision of the matrix products in training; 'auto' is resolved
    bytes: Count  # size of the tokens it reads in the cache before compression, train and test
    sources: Sources  # sources of the model and the data set
    shots: Size | None = None  # training images per class; None: all
    halving: bool = False  # weak configurations were stopped early
    smoothing: Finite | None = None  # label smoothing; None: no smoothing
    streamed: bool = False  # tokens were read in shuffled batches, not loaded
    stability: Stability | None = None  # whether rounding alone changes the chosen probe's answers; None: not tried
    duplicates: Duplicates | None = None  # of the features; None: the row was made before they were counted
    drop_duplicates: bool = False  # train images that are in test too were left out of train
    at_end: dict[Name, Name] = {}  # hyper-parameters selected at an end of the grid: {"lr": "largest"}
    groups: GroupCounts | None = None  # None: every image is its own group
    validation: Key | None = None  # cache key of the split whose images chose; None: a part of train chose
    folds: Size | None = None  # number of folds of train and test together; None: trained on train and tested on test
    by_fold: tuple[Fold, ...] = ()  # in their order; scores of the row are of the pooled predictions
    choose_on: ChooseOn = "auto"  # as it was asked for; with a validation split always "validation"

    @property
    def keys(self) -> tuple[str, ...]:
        """Cache keys of train, test, and validation if its images chose."""
        return self.features if self.validation is None else (*self.features, self.validation)

    @property
    def made_from(self) -> tuple[str, ...]:
        """Its cache keys, and the digests of the groups: rows in which these differ are of other features or groups."""
        return (*self.keys, *(self.groups.digests if self.groups else ()))

    def search(self) -> SearchOptions:
        """The options that decide its numbers; its id follows from them."""
        return SearchOptions(
            grid=self.grid,
            seeds=(self.seed,),
            shots=(self.shots,),
            halving=self.halving,
            smoothing=self.smoothing or 0.0,
            precision=self.precision,
            drop_duplicates=self.drop_duplicates,
            choose_on=self.choose_on,
            folds=self.folds,
        )

    def chosen_on(self) -> str:
        """The images that chose the configuration, such as 'validation (112 images)'."""
        split = "a fifth of train" if self.validation is None else "validation"
        if self.validation is None and self.groups is None and self.probe.endswith("/ridge"):
            split = "train, each image left out in turn"
        if self.validation is None and self.folds is not None:
            split = split.replace("train", f"the other {plural(self.folds - 1, 'fold')}")
        return f"{split} ({plural(self.images.choosing, 'image')})" if self.images.choosing else split

    def renamed(self, write: Callable[[str], str]) -> "Row":
        """A copy whose names that a stranger may have chosen are written by `write`; itself if none changes."""
        names = (self.model, self.dataset, self.code, self.device, *self.versions, *self.versions.values())
        groups = self.groups and msgspec.structs.replace(self.groups, column=write(self.groups.column))
        classes = _written(write, self.classes)
        if (classes, groups) == (self.classes, self.groups) and all(write(name) == name for name in names):
            return self
        return msgspec.structs.replace(
            self,
            model=write(self.model),
            dataset=write(self.dataset),
            code=write(self.code),
            device=write(self.device),
            groups=groups,
            versions={write(name): write(version) for name, version in self.versions.items()},
            classes=classes,
        )

    def extract_command(self, cache: str | None = None) -> str:
        """The command that caches what the probe reads; `cache` is the root of a cache other than the default."""
        pairs = cast("set[Pair]", set(product(self.layers, self.tokens)))
        options = [*self.sources.options, *(option_words("cache", cache) if cache else [])]
        return extract_command(self.sources.model, self.sources.dataset, pairs, options)

    def probe_command(self) -> str:
        """The command that trains its probe on the cached features."""
        return probe_command(self.sources.model, self.sources.dataset, [self.probe], self.search())

    def keep_command(self, results: str) -> str:
        """The command that keeps its trained probe in this folder; of folds, which have none, one of all of train."""
        if self.folds is None:
            return command(f"results rerun {self.id} --keep", results=results)
        words = ["--probe", self.probe, *replace(self.search(), folds=None).words(), "--save"]
        return command("probe", words, model=self.sources.model, dataset=self.sources.dataset, results=results)

    def not_kept_note(self, results: str) -> str:
        """A sentence about a trained probe that this folder does not have, without its end."""
        again = self.keep_command(results)
        if self.folds is None:
            return f"its trained probe was not kept; to have it: {again}"
        return f"each of its {self.folds} folds has a probe of its own, and none is kept; to have one of all of train: {again}"

    def duplicates_note(self) -> str:
        """A sentence about test images that are in train too; empty if there are none, or if they were left out."""
        told = ""
        if self.duplicates and not self.drop_duplicates and self.folds is None:  # folds part no train from a test
            told = self.duplicates.sentence(self.images.test)
        return f"{told}. To leave them out of train: --drop-duplicates." if told else ""

    def at_end_note(self) -> str:
        """The hyper-parameters at an end of the grid, such as 'lr 0.1 (largest)'; empty if there are none."""
        selected = self.selected.given()
        return ", ".join(f"{name} {selected[name]:g} ({end})" for name, end in self.at_end.items() if name in selected)

    def stability_note(self) -> str:
        """A sentence about a choice that rounding alone changes; empty if it is stable, or was not tried."""
        if self.stability == "unstable":
            return (
                "the chosen configuration is unstable: rounding alone changes its answers, and no stable one is as good"
            )
        return ""

    def options(self) -> str:
        """The options that differ from the protocol's defaults, such as '4 shots, halving'; empty if none does."""
        parts = [
            f"{self.shots} shots" if self.shots is not None else "",
            "halving" if self.halving else "",
            f"labels smoothed by {self.smoothing:g}" if self.smoothing is not None else "",
            "duplicates dropped" if self.drop_duplicates else "",
            f"groups by {self.groups.column}" if self.groups else "",
            "chosen on validation" if self.validation is not None else "",
            f"{self.folds} folds" if self.folds is not None else "",
        ]
        return ", ".join(filter(None, parts))


def chosen_on(rows: Iterable[Row]) -> str:
    """The images that chose, of all these rows: 'validation (112 images)', or several of these."""
    return "; ".join(dict.fromkeys(row.chosen_on() for row in rows))


@lru_cache(maxsize=256)
def _written(write: Callable[[str], str], names: tuple[str, ...]) -> tuple[str, ...]:
    """Names as `write` writes them; rows of one data set share a list, which may have thousands."""
    return tuple(map(write, names))
