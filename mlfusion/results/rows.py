"""A row: one probe, trained with one seed and tested once, with everything needed to make it again.

Rows are frozen values that `msgspec` reads and checks: numbers are finite, the id can name a file. Unknown fields are
ignored.
"""

import json
import re
import sys
from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any, Literal, cast, get_args

import msgspec
from msgspec import Meta, Struct

from mlfusion.specs.commands import extract_command, probe_command
from mlfusion.specs.definitions import option_words
from mlfusion.specs.identity import Pair
from mlfusion.specs.names import Stability
from mlfusion.specs.options import GridName, SearchOptions
from mlfusion.system.words import plural

Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""A number that is neither infinite nor NaN."""

Id = Annotated[str, Meta(pattern=r"^\w[\w.-]*\Z")]
"""An id is a file name too: it may not lead out of the folder."""

RowPrecision = Literal["float32", "bfloat16"]


class Metrics(Struct, frozen=True, kw_only=True, tag_field="kind", tag="class"):
    """Scores on the test split, as fractions, for one class per image."""

    balanced_accuracy: Finite
    accuracy: Finite
    top5: Finite
    macro_f1: Finite
    loss: Finite  # cross-entropy, nats
    recall: tuple[Finite | None, ...]  # per class, in the order of the row's `classes`; None without test images


class LabelMetrics(Struct, frozen=True, kw_only=True, tag_field="kind", tag="labels"):
    """Scores on the test split, as fractions, for several labels per image."""

    mean_average_precision: Finite
    average_precision: tuple[Finite | None, ...]  # per label; None if no test image has it
    micro_f1: Finite
    macro_f1: Finite
    loss: Finite  # binary cross-entropy, nats


class NumberMetrics(Struct, frozen=True, kw_only=True, tag_field="kind", tag="number"):
    """Scores on the test split for one number per image."""

    r2: Finite
    mae: Finite  # in the labels' unit
    rmse: Finite


AnyMetrics = Metrics | LabelMetrics | NumberMetrics


def metrics_of(kind: str, scores: Mapping[str, Any]) -> AnyMetrics:
    """The metrics of a kind of target ('class', 'labels' or 'number') from scores by name."""
    return msgspec.convert({"kind": kind, **scores}, AnyMetrics)


class Selected(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The hyper-parameters chosen on the validation part; those that the head does not have are None."""

    lr: Finite | None = None
    weight_decay: Finite | None = None
    steps: int | None = None
    batch_size: int | None = None
    dropout: Finite | None = None
    heads: int | None = None
    penalty: Finite | None = None  # ridge and logistic
    neighbours: int | None = None
    temperature: Finite | None = None

    @classmethod
    def of(cls, values: Mapping[str, float | int]) -> "Selected":
        """The hyper-parameters of a head from a dictionary by name."""
        return msgspec.convert(values, cls)

    def given(self) -> dict[str, float | int]:
        """The hyper-parameters that the head has, by name."""
        return msgspec.to_builtins(self)


class ImageCounts(Struct, frozen=True, kw_only=True):
    """The number of images of each split."""

    train: int
    test: int


class Duplicates(Struct, frozen=True, kw_only=True):
    """The number of test images that are in train too."""

    bytes: int  # with equal bytes
    near: int | None  # other near copies, by their tokens; None: not compared

    def sentence(self, images: int) -> str:
        """The counts in words, for a test split of so many images; empty if there is nothing to tell."""
        if not self.bytes and not self.near:
            return ""
        near = "near copies were not looked for" if self.near is None else f"{self.near:,} as near copies"
        both = self.bytes + (self.near or 0)
        of, verb = plural(images, "test image"), "is" if both == 1 else "are"
        return f"{both:,} of {of} {verb} in train too: {self.bytes:,} byte for byte, {near}"


class Sources(Struct, frozen=True, kw_only=True):
    """The model and data set as given to `mlfusion extract`, which finds them again by these names."""

    model: str  # a catalogue's source, hub id, or folder
    dataset: str
    weights: str  # sha256 of the weight files
    train: str  # digest of the split's images and labels
    test: str
    options: tuple[str, ...]  # further options of the `mlfusion extract` that makes the features again


class Attention(Struct, frozen=True, kw_only=True):
    """The attention of a probe on each of T tokens, averaged over heads; four lists of length T."""

    layers: tuple[int, ...]
    kinds: tuple[str, ...]  # "cls", "ap" or "all"
    mean: tuple[Finite, ...]  # over the test images
    sd: tuple[Finite, ...]  # over the test images


class Row(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One probe, trained with one seed on one model's features of one data set, and tested once."""

    id: Id
    model: str
    dataset: str
    probe: str  # "cls+ap-all-layers/attentive"
    seed: int
    metric: str  # metric of val, test and train: balanced_accuracy, mean_average_precision or r2
    val: Finite  # score of the chosen configuration on the 20 % of train held out for the choice
    test: Finite  # computed once, after the choice
    train: Finite
    metrics: AnyMetrics
    selected: Selected
    grid: GridName
    configurations: int  # number of configurations scored on the validation part
    parameters: int  # number of parameters of one probe
    seconds: Finite
    layers: tuple[int, ...]  # layers that the probe reads
    tokens: tuple[str, ...]  # token kinds that the probe reads
    depth: int  # L, the model's blocks
    width: int  # D, channels of a token
    classes: tuple[str, ...]
    images: ImageCounts
    features: tuple[str, str]  # cache keys: train, test
    attention: Attention | None
    versions: dict[str, str]
    code: str
    created: str  # ISO 8601
    protocol: int  # `probing.jobs.PROTOCOL`; rows of different protocols are not compared
    device: str  # device of the training
    precision: RowPrecision  # precision of the matrix products in training; 'auto' is resolved
    bytes: int  # size of the tokens it reads in the cache before compression, train and test
    sources: Sources  # sources of the model and the data set
    shots: int | None = None  # training images per class; None: all
    halving: bool = False  # weak configurations were stopped early
    smoothing: Finite | None = None  # label smoothing; None: no smoothing
    streamed: bool = False  # tokens were read in shuffled batches, not loaded
    stability: Stability | None = None  # whether rounding alone changes the chosen probe's answers; None: not tried
    duplicates: Duplicates | None = None  # of the features; None: the row was made before they were counted
    drop_duplicates: bool = False  # train images that are in test too were left out of train
    at_end: dict[str, str] = {}  # hyper-parameters selected at an end of the grid: {"lr": "largest"}

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
        )

    def extract_command(self, cache: str | None = None) -> str:
        """The command that caches what the probe reads; `cache` is the root of a cache other than the default."""
        pairs = cast("set[Pair]", set(product(self.layers, self.tokens)))
        options = [*self.sources.options, *(option_words("cache", cache) if cache else [])]
        return extract_command(self.sources.model, self.sources.dataset, pairs, options)

    def probe_command(self) -> str:
        """The command that trains its probe on the cached features."""
        return probe_command(self.sources.model, self.sources.dataset, [self.probe], self.search())

    def duplicates_note(self) -> str:
        """A sentence about test images that are in train too; empty if there are none, or if they were left out."""
        told = self.duplicates.sentence(self.images.test) if self.duplicates and not self.drop_duplicates else ""
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
        ]
        return ", ".join(filter(None, parts))


class NotARow(ValueError):
    """A value is no row; says which field is wrong and what is allowed."""


_DECODER = msgspec.json.Decoder(Row)

encode = msgspec.json.Encoder().encode
"""Row → its JSON in one line; options at their default are left out."""


def decode(text: bytes | str) -> Row:
    """Decode a row from its JSON.

    Raises:
        NotARow: the JSON does not describe a row.
        ValueError: the text is not JSON.
    """
    try:
        return _DECODER.decode(text)
    except msgspec.DecodeError:
        return from_object(json.loads(text))  # slower, but reads NaN, so that the error can name it


def from_object(value: Any) -> Row:
    """Convert decoded JSON to a row.

    Raises:
        NotARow: the value does not describe a row.
    """
    try:
        return msgspec.convert(value, Row)
    except msgspec.ValidationError as err:
        raise NotARow(_sentence(str(err), value)) from None


def check(row: Row) -> None:
    """Raise `NotARow` for a row with a value that could not be read back."""
    from_object(msgspec.to_builtins(row))


# --- error messages about values  ----------------------------------------------------------------------------

_NOUNS = {
    "float": "a finite number",
    "int": "a whole number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
_ALLOWED = {
    "grid": get_args(GridName),
    "precision": get_args(RowPrecision),
    "metrics.kind": ("class", "labels", "number"),
}


def _sentence(message: str, value: Any) -> str:
    """Translate `msgspec`'s message about a value ('Expected `int`, got `str` - at `$.seed`'), into plain words."""
    problem, _, location = message.partition(" - at `$")
    path, part = _part_at(value, location.strip("`."))
    path = path or "row"
    if lacking := re.search(r"required field `(\w+)`", problem):
        return f"{path} lacks {lacking[1]}"
    if "matching regex" in problem:
        return f"{path} {part!r} cannot name a file; allowed: letters, digits, '_', '-' and '.'"
    if path in _ALLOWED and isinstance(part, str):
        return f"{path} is {_shortened(part)}; allowed: {', '.join(map(repr, _ALLOWED[path]))}"
    expected = re.match(r"Expected `(\w+)", problem)
    noun = _NOUNS.get(expected[1]) if expected and " of length" not in problem else None
    return f"{path} is {_shortened(part)}, not {noun}" if noun else f"{path} is {_shortened(part)}: {problem}"


def _part_at(value: Any, path: str) -> tuple[str, Any]:
    """The path and the part of a value at 'metrics.recall[1]'; '[...]' is the first entry of `versions` that is no text."""
    name = ""
    for part in re.findall(r"\w+|\[\d+\]|\[\.\.\.\]", path):
        if part == "[...]":
            part = next((key for key, item in value.items() if not isinstance(item, str)), "")
        value = value[int(part[1:-1])] if part.startswith("[") else value[part]
        name += part if part.startswith("[") or not name else f".{part}"
    return name, value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
