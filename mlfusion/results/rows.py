"""A row: one probe, trained with one seed and tested once, with all that leads home to how it was made."""

import math
import re
import types
from functools import cache as once
from typing import Any, Literal, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

_ID = re.compile(r"\w[\w.-]*")  # an id is a file name too: it may not lead out of the folder


class Metrics(TypedDict):
    """Scores on the test split, as fractions, of one class an image."""

    balanced_accuracy: float
    accuracy: float
    top5: float
    macro_f1: float
    loss: float  # cross-entropy, nats
    recall: list[float | None]  # one a class, in the order of the row's `classes`; None for one without test images


class LabelMetrics(TypedDict):
    """The same, of several labels an image."""

    mean_average_precision: float
    average_precision: list[float | None]  # one a label; None for one that no test image has
    micro_f1: float
    macro_f1: float
    loss: float  # binary cross-entropy, nats


class NumberMetrics(TypedDict):
    """The same, of a number an image."""

    r2: float
    mae: float  # in the labels' unit
    rmse: float


class Selected(TypedDict, total=False):
    """The hyper-parameters chosen on the validation part; which there are depends on the head."""

    lr: float
    weight_decay: float
    steps: int
    batch_size: int
    dropout: float
    heads: int
    penalty: float  # ridge and logistic
    neighbours: int
    temperature: float


class Images(TypedDict):
    """How many images each split has."""

    train: int
    test: int


class Sources(TypedDict):
    """What model and data set were called when they were extracted, such that `mlfusion extract` finds them again."""

    model: str  # a catalogue's source, hub id, or folder
    dataset: str
    weights: str  # sha256 of the weight files
    train: str  # digest of the split's images and labels
    test: str
    extract: NotRequired[str]  # the command that caches what the probe reads


class Attention(TypedDict):
    """How attentive probes share their attention among T tokens, averaged over heads; four lists of length T."""

    layers: list[int]
    kinds: list[str]  # "cls", "ap" or "all"
    mean: list[float]  # over the test images
    sd: list[float]  # over the test images


class Row(TypedDict):
    """One probe, trained with one seed on one model's features of one data set, and tested once."""

    id: str
    model: str
    dataset: str
    probe: str  # "cls+ap-all-layers/attentive"
    seed: int
    metric: str  # what val, test and train are: balanced_accuracy, mean_average_precision or r2
    val: float  # of the chosen configuration, on the 20 % of train held out for the choice
    test: float  # looked at once
    train: float
    metrics: Metrics | LabelMetrics | NumberMetrics
    selected: Selected
    grid: Literal["paper", "quick"]
    configurations: int  # tried on the validation part
    parameters: int  # of one probe
    seconds: float
    layers: list[int]  # that the probe reads
    tokens: list[str]  # kinds that the probe reads
    depth: int  # L, the model's blocks
    width: int  # D, channels of a token
    classes: list[str]
    images: Images
    features: list[str]  # cache keys: train, test
    attention: Attention | None
    versions: dict[str, str]
    code: str
    created: str  # ISO 8601
    shots: NotRequired[int]  # images of each class trained on, where not all
    halving: NotRequired[Literal[True]]
    smoothing: NotRequired[float]
    streamed: NotRequired[Literal[True]]  # read in shuffled batches, not loaded
    precision: NotRequired[Literal["bfloat16"]]  # of the matrix products of training, where not float32
    protocol: NotRequired[int]  # `evaluation.PROTOCOL`: rows of two of them were measured in two ways
    device: NotRequired[str]  # that the probe was trained on
    bytes: NotRequired[int]  # that the tokens the probe reads take in the cache before compression, train and test
    sources: NotRequired[Sources]  # what the names stand for


def fault(value: Any) -> str | None:
    """What keeps a JSON value from being a row; None where nothing does. Fields that no row has today are let be."""
    return _fault(value, Row)


def _fault(value: Any, hint: Any, where: str = "row") -> str | None:
    """What keeps a JSON value from being of the hinted type; None where nothing does. Unknown fields are let be."""
    origin, args = get_origin(hint), get_args(hint)
    if is_typeddict(hint):
        if not isinstance(value, dict):
            return f"{where} is {_shown(value)}, not an object"
        if missing := sorted(hint.__required_keys__ - value.keys()):
            return f"{where} lacks {', '.join(missing)}"
        hints = _hints(hint)
        inside = "" if hint is Row else f"{where}."
        faults = (_fault(value[key], hints[key], inside + key) for key in hints if key in value)
        if hint is Row and isinstance(value["id"], str) and not _ID.fullmatch(value["id"]):
            return f"id {value['id']!r} cannot name a file; allowed: letters, digits, '_', '-' and '.'"
        return next((fault for fault in faults if fault), None)
    if origin in (Union, types.UnionType):
        return None if any(_fault(value, arg, where) is None for arg in args) else _fault(value, args[0], where)
    if origin is Literal:
        return None if value in args else f"{where} is {_shown(value)}; allowed: {', '.join(map(repr, args))}"
    if origin is list:
        if not isinstance(value, list):
            return f"{where} is {_shown(value)}, not a list"
        if _plain(value, args[0]):
            return None
        return next((fault for i, item in enumerate(value) if (fault := _fault(item, args[0], f"{where}[{i}]"))), None)
    if origin is dict:
        if not isinstance(value, dict):
            return f"{where} is {_shown(value)}, not an object"
        return next((fault for key, item in value.items() if (fault := _fault(item, args[1], f"{where}.{key}"))), None)
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return None if number else f"{where} is {_shown(value)}, not a finite number"
    exact = isinstance(value, hint) and not isinstance(value, bool)
    return None if exact else f"{where} is {_shown(value)}, not {'text' if hint is str else 'a whole number'}"


@once
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


_PLAIN: dict[Any, set[type]] = {
    str: {str},
    int: {int},
    float: {float, int},
    float | None: {float, int, type(None)},
}


def _plain(values: list[Any], hint: Any) -> bool:
    """Whether all are plainly of the hinted type; a thousand of them are not worth a thousand calls."""
    kinds = _PLAIN.get(hint)
    return (
        kinds is not None
        and {type(v) for v in values} <= kinds
        and (hint in (str, int) or all(math.isfinite(v) for v in values if v is not None))
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
