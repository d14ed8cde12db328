"""A request resolved: which entries of the cache hold which tokens of which images."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from mlfusion import datasets, models
from mlfusion.errors import MlfusionError, UnknownName
from mlfusion.extraction import loader
from mlfusion.models import preprocessing
from mlfusion.models.preprocessing import Preprocessing
from mlfusion.specs.identity import DTYPES, KINDS, DataSpec, Dtype, FeatureSpec, Pair, TokenKind
from mlfusion.specs.names import parse_tokens
from mlfusion.store import FormatName, Names, Samples
from mlfusion.system.devices import pick_compute, pick_device
from mlfusion.system.progress import track


@dataclass(frozen=True, eq=False)
class Images:
    """Splits of a data set and their identity. Every image's bytes are read once, however many models follow."""

    data: datasets.DataSet
    splits: tuple[tuple[datasets.Split, Samples, DataSpec], ...]

    @classmethod
    def of(
        cls,
        dataset: str | datasets.DataSet,
        splits: Sequence[str] | str = ("train", "test"),
        reading: datasets.ReadOptions | None = None,
    ) -> "Images":
        """Load a data set and read every image of these splits; errors as in `datasets.load`."""
        data = datasets.load(dataset, reading) if isinstance(dataset, str) else dataset
        found = []
        for name in splits.split(",") if isinstance(splits, str) else splits:
            split = data.split(name.strip())
            samples = _samples(data.name, split)
            spec = DataSpec(
                content=samples.content,
                split=split.name,
                images=len(split),
                classes=split.classes,
                resplit=data.resplit,
                name=data.name,
            )
            found.append((split, samples, spec))
        return cls(data, tuple(found))


@dataclass(frozen=True, eq=False)
class Job:
    """One entry to fill: a split as one view shows it."""

    split: datasets.Split
    samples: Samples
    spec: FeatureSpec
    steps: Preprocessing


@dataclass(frozen=True, kw_only=True)
class Making:
    """How tokens are computed, where model and images alone do not say; all of it is part of the key."""

    preprocess: str = "exact"  # one of preprocessing.WORDS
    size: int | None = None  # height and width of the input, if not the model's own
    views: tuple[str, ...] = ("plain",)
    view_seed: int = 0  # decides the crops of the views
    compute: str = "float32"  # or 'bfloat16', 'float16', 'auto'


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Which tokens are extracted and how: part of the key, or of the names of an entry's streams."""

    layers: str = "all"  # 'all' (1..L), 'last', or a list such as '1-4,12'; L is the final norm
    tokens: str | Iterable[str] = ("cls", "ap")  # kinds, each with layers of its own if need be: 'cls,ap,all@last'
    dtype: Dtype = "float16"  # storage type
    making: Making = Making()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UnknownName("dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """How an extraction is carried out; nothing of it changes a feature or its key."""

    device: str = "auto"  # 'auto', 'cpu', 'cuda' or 'mps'
    batch_size: int | None = None  # images in a forward pass; None: as many as memory allows
    workers: int = 0  # number of decoding workers (threads; processes with a GPU); 0: one per core
    format: FormatName = "zarr"  # of new shards
    skip_bad: bool = False  # go on past images that cannot be read

    def __post_init__(self) -> None:
        if self.format not in get_args(FormatName):
            raise UnknownName("format", self.format, get_args(FormatName))
        if self.batch_size is not None and self.batch_size < 1:
            raise MlfusionError(f"--batch-size {self.batch_size}: allowed are 1 and more")


@dataclass(frozen=True, eq=False)
class Request:
    """What an extraction, or a plan of one, is about: names resolved to a checkpoint, images and keys."""

    checkpoint: models.Checkpoint
    names: Names
    pairs: frozenset[Pair]
    jobs: tuple[Job, ...]
    compute: ComputeOptions  # with the device resolved

    @classmethod
    def of(
        cls,
        model: str,
        dataset: str | datasets.DataSet | Images,
        features: FeatureOptions | None = None,
        compute: ComputeOptions | None = None,
        *,
        reading: datasets.ReadOptions | None = None,
        splits: Sequence[str] | str = ("train", "test"),
    ) -> "Request":
        """Resolve names; arguments and errors as in `extract`, and `Images` that were read already."""
        features, compute = features or FeatureOptions(), compute or ComputeOptions()
        making, device = features.making, pick_device(compute.device)
        checkpoint = models.locate(model)
        images = dataset if isinstance(dataset, Images) else Images.of(dataset, splits, reading)
        data = images.data
        precision = pick_compute(making.compute, device)
        views = [
            preprocessing.read(checkpoint.folder, making.preprocess, size=making.size, view=view, seed=making.view_seed)
            for view in making.views
        ]
        model_specs = [
            models.identify(checkpoint, steps.key(exif_transpose=data.exif_transpose), precision, steps.view)
            for steps in views
        ]
        return cls(
            checkpoint=checkpoint,
            names=Names(
                model=checkpoint.name, model_source=checkpoint.source, dataset=data.name, dataset_source=data.source
            ),
            pairs=parse_tokens(features.tokens, features.layers, model_specs[0].depth),
            jobs=tuple(
                Job(split, samples, FeatureSpec(model=model_spec, data=spec, dtype=features.dtype), steps)
                for split, samples, spec in images.splits
                for model_spec, steps in zip(model_specs, views, strict=True)
            ),
            compute=replace(compute, device=device),
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that are asked for."""
        return tuple(sorted({layer for layer, _ in self.pairs}))

    @property
    def kinds(self) -> tuple[TokenKind, ...]:
        """All token kinds that are asked for."""
        return tuple(kind for kind in KINDS if any(k == kind for _, k in self.pairs))


def _samples(name: str, split: datasets.Split) -> Samples:
    """Read every image's bytes once, for the digests that identify the split. Order never depends on the threads."""
    with (
        track(f"reading {name}/{split.name}", len(split), "images") as bar,
        ThreadPoolExecutor(min(8, loader.processor_count() + 1)) as pool,
    ):
        digests = bytearray()
        for one in pool.map(split.digest, range(len(split))):
            digests += one
            bar.advance()
    table = np.frombuffer(bytes(digests), np.uint8).reshape(len(split), 16)
    return Samples(split.ids, split.labels, table, split.classes)
