"""Defines every option of the two stages once, as fields of frozen classes.

The options of commands, the keys of recipes, their checks, the printed commands, and docs/reference.md are generated from
these definitions.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from mlfusion.errors import BadOption
from mlfusion.specs.definitions import Options, option
from mlfusion.specs.identity import COMPUTES, DTYPES, HOOKS, MAX_PIXELS, Dtype, Hook
from mlfusion.specs.kinds import (
    Kind,
    amount,
    checked,
    device_name,
    flag,
    numbers,
    one_of,
    path,
    pattern,
    ratio,
    settings,
    share,
    split_names,
    text,
    view_names,
    whole,
    window,
)
from mlfusion.specs.names import Setting, parse_layers, parse_tokens

MAX_DEPTH = 64  # deeper than any model: bounds layers before the model's depth is known

Preparation = Literal["exact", "fast", "paper", "paper+fast"]
PREPARATIONS: tuple[Preparation, ...] = get_args(Preparation)
"""`exact`: the model's own processor, to the bit. `paper`: the study's preprocessing. `fast`: a faster kernel for either."""

LabelKind = Literal["class", "labels", "number"]
LABEL_KINDS: tuple[LabelKind, ...] = get_args(LabelKind)
"""The label of an image: one class, any number of labels, or a number."""

FormatName = Literal["zarr", "hdf5"]
FORMATS: tuple[FormatName, ...] = get_args(FormatName)

Precision = Literal["float32", "bfloat16", "auto"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

ChooseOn = Literal["auto", "validation", "held-out"]
CHOOSE_ON: tuple[ChooseOn, ...] = get_args(ChooseOn)
"""The images that choose a configuration: the split validation, a fifth of train, or (auto) validation where there is one."""

GridName = Literal["paper", "quick"]
GRID_NAMES: tuple[GridName, ...] = get_args(GridName)


@dataclass(frozen=True, kw_only=True)
class ReadOptions(Options):
    """Options for reading a data set. They change keys only through the images and labels that are read; groups change ids."""

    image_column: str | None = option(
        None, text(), "Column of a table or hub data set that holds the images; guessed if not given.", effect="key"
    )
    label_column: str | None = option(None, text(), "Column that holds the labels; guessed if not given.", effect="key")
    id_column: str | None = option(
        None, text(), "Column that holds sample ids; default: paths or row numbers.", effect="key"
    )
    split_column: str | None = option(
        None,
        text(),
        "Column of a table that names each row's split; default: split. 'none' leaves it out of account.",
        effect="key",
        added=True,
    )
    image_root: str | None = option(
        None, path(), "Folder that the paths in a table start from; default: the table's own folder.", effect="key"
    )
    target: LabelKind | None = option(
        None, one_of(LABEL_KINDS), "Kind of the labels: class, labels or number; guessed if not given.", effect="key"
    )
    split_ratio: str | None = option(
        None,
        ratio(),
        "Split train again, by shares of train/test or train/validation/test, such as 0.8/0.2.",
        effect="key",
        former=("carve",),
    )
    split_seed: int = option(
        0, whole(0), "Seed of the split that --split-ratio makes.", effect="key", former=("carve_seed",)
    )
    group_column: str | None = option(
        None,
        text(),
        "Column of the groups, such as patient (tars: json.patient): no group is in train and in test.",
        effect="id",
        added=True,
    )
    group_pattern: str | None = option(
        None,
        pattern(),
        "Regular expression, searched in each id (path), whose first group in brackets names the image's group.",
        effect="id",
        added=True,
    )
    exif_transpose: bool = option(
        False, flag(), "Rotate images as their EXIF orientation says.", effect="key", former=("upright",)
    )
    window: str | None = option(
        None,
        window(),
        "Values of 16-bit grey images that become black and white: LOW,HIGH, or auto (measured on train).",
        effect="key",
        added=True,
    )
    max_pixels: int = option(
        MAX_PIXELS, whole(1), "Largest number of pixels of an image; larger images are rejected.", effect="key"
    )
    config: str | None = option(None, text(), "Configuration of a hub data set that has several.", effect="key")
    stream: bool = option(
        False, flag(), "Read a hub data set from where it is stored, without a local copy.", effect="bit"
    )


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(Options):
    """Options that decide the key or the streams of a cache entry."""

    read: ReadOptions = ReadOptions()
    splits: tuple[str, ...] | None = option(
        None,
        split_names(),
        "Splits, comma-separated; test=validation tests on the validation split; default: train, test, and validation "
        "where there is one.",
        effect="key",
        name="split",
    )
    layers: str = option(
        "all",
        checked(lambda words: parse_layers(words, MAX_DEPTH)),
        "Layers: all (1..L), last, or a list such as 1-4,12.",
        effect="stream",
    )
    tokens: str = option(
        "cls,ap",
        checked(lambda words: parse_tokens(words, "all", MAX_DEPTH)),
        "Token kinds (mlfusion ls tokens), each with layers of its own if needed: cls,ap,all@last.",
        effect="stream",
    )
    hook: Hook | None = option(
        None, one_of(HOOKS), "Hook point in each block (mlfusion ls hooks); default: norm2.", effect="key"
    )
    settings: tuple[tuple[str, Setting], ...] = option(
        (),
        settings(),
        "Setting of the model's configuration, such as hidden_act=gelu; may be repeated.",
        effect="key",
        name="set",
    )
    preprocess: Preparation = option(
        "exact",
        one_of(PREPARATIONS),
        "Preprocessing: exact (the model's own, to the bit), fast, paper (the study's) or paper+fast.",
        effect="key",
    )
    size: int | None = option(
        None, whole(1), "Height and width of the model's input in pixels; default: the model's own.", effect="key"
    )
    views: tuple[str, ...] = option(
        ("plain",),
        view_names(),
        "Views of each image: plain, flip, crop1, …, comma-separated, or their number. Each is an entry of its own.",
        effect="key",
        former=("view",),
    )
    view_seed: int = option(0, whole(0), "Seed of the crops.", effect="key")
    compute: str = option(
        "float32",
        one_of((*COMPUTES, "auto")),
        "Type of the forward pass: float32, bfloat16, float16, or auto (bfloat16 where the device is fast at it).",
        effect="key",
    )
    dtype: Dtype = option(
        "float16",
        one_of(DTYPES),
        "Storage type in the cache: float16, bfloat16, float32 or int8 (one scale per token).",
        effect="key",
    )


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(Options):
    """Options for running stage 1. They are in no key."""

    device: str = option("auto", device_name(), "Device: auto, cpu, cuda or mps.", effect="rounding")
    batch_size: int | None = option(
        None, whole(1), "Number of images in one forward pass; default: as many as memory allows.", effect="rounding"
    )
    workers: int = option(
        0,
        whole(0),
        "Number of decoding workers (threads; processes with a GPU); 0: one per core.",
        effect="bit",
    )
    format: FormatName = option("zarr", one_of(FORMATS), "File format of new shards: zarr or hdf5.", effect="bit")
    skip_bad: bool = option(False, flag(), "Skip images that cannot be read; readers omit their rows.", effect="bit")


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    """Options that decide the scores of a row, beside its features and its probe."""

    grid: GridName = option(
        "paper",
        one_of(GRID_NAMES),
        "Grid of hyper-parameters: paper (21 configurations, 63 for attentive probes) or quick (3).",
        effect="id",
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2), numbers(0, example="0,1,2"), "Seeds, comma-separated; each gives a row.", effect="id"
    )
    shots: tuple[int | None, ...] = option(
        (None,),
        numbers(2, example="4,16", allow_all=True),
        "Few-shot training: numbers of training images per class, such as 2,4,8,all.",
        effect="id",
    )
    halving: bool = option(
        False,
        flag(),
        "Successive halving: stop weak configurations early (about a third of the compute).",
        effect="id",
    )
    smoothing: float = option(0.0, share(), "Label smoothing, from 0 to below 1.", effect="id")
    drop_duplicates: bool = option(
        False,
        flag(),
        "Leave out of train the images that are in test too, and near copies of them.",
        effect="id",
        added=True,
    )
    choose_on: ChooseOn = option(
        "auto",
        one_of(CHOOSE_ON),
        "Images that choose the configuration: validation (the split), held-out (a fifth of train), or auto (validation if "
        "it is cached).",
        effect="id",
        added=True,
    )
    folds: int | None = option(
        None,
        whole(2),
        "Number of folds of train and test together: each image is tested once, by a probe that was not trained on it.",
        effect="id",
        added=True,
    )
    precision: Precision = option(
        "auto",
        one_of(PRECISIONS),
        "Precision of matrix products in training: float32, bfloat16, or auto (the faster one on this machine).",
        effect="id",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds is None:
            return
        if self.shots != (None,):
            raise BadOption(
                "--folds and --shots exclude each other: few shots are drawn from train, so that test is large enough already; "
                "leave --folds out, and repeat the draw by --seeds"
            )
        if self.drop_duplicates:
            raise BadOption(
                "--folds and --drop-duplicates exclude each other: folds pool train and test, whose copies would have to stay "
                "in one fold; leave --folds out, or remove the copies from the data set"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """Options for running stage 2. They are not in the id of a row."""

    device: str = option("cpu", device_name(), "Device: auto, cpu, cuda or mps.", effect="rounding")
    memory: int | None = option(
        None,
        amount(minimum=1),
        "Memory limit for training, such as 4GB; default: most of the free memory.",
        effect="bit",
    )


@dataclass(frozen=True, kw_only=True)
class StorageOptions(Options):
    """Options for the storage of features and rows. They change no number."""

    cache: str | None = option(
        None,
        path(),
        "Root of the feature cache, or MINE:SHARED to read others too; default: $MLFUSION_CACHE or ./cache.",
        effect="bit",
    )
    results: str = option("results", path(), "Folder of the results.", effect="bit")
    save: bool = option(False, flag(), "Keep the trained probes, for mlfusion predict.", effect="bit")
    track: str = option(
        "",
        Kind(str, lambda v: None if isinstance(v, str) else "allowed is text in quotes"),
        "Trackers for new rows: tensorboard:DIR, wandb:PROJECT or mlflow:URI, comma-separated.",
        effect="bit",
    )


@dataclass(frozen=True, kw_only=True)
class PredictorOptions(Options):
    """Options for loading a saved probe with its backbone."""

    results: str = option(
        "results", path(), "Folder of the results in which the id of a probe is looked up.", effect="bit"
    )
    model: str | None = option(
        None, text(), "Folder or hub id of the same backbone, if it has moved.", effect="bit", short="m"
    )
    device: str = option("cpu", device_name(), "Device: auto, cpu, cuda or mps.", effect="rounding")
    max_pixels: int = option(
        MAX_PIXELS, whole(1), "Largest number of pixels of an image; larger images are rejected.", effect="bit"
    )


@dataclass(frozen=True, kw_only=True)
class PilotOptions(Options):
    """Options that decide the scores of a pilot (`mlfusion advise`)."""

    images: int = option(300, whole(1), "Number of training images in the pilot, balanced over classes.", effect="id")
    seed: int = option(0, whole(0), "Seed that selects the images.", effect="id")


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Options for running a recipe."""

    data: str | None = option(None, path(), "Folder that replaces $DATA in the recipe.", effect="key")
    seeds: tuple[int, ...] | None = option(
        None, numbers(0, example="0,1,2"), "Seeds, comma-separated; they replace the recipe's.", effect="id"
    )
    device: str = option(
        "auto", device_name(), "Device of the forward pass; probes train on the CPU.", effect="rounding"
    )
