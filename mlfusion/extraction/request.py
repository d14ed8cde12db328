"""Resolves the names in a request to a checkpoint, images, and the keys of cache entries."""

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from mlfusion import datasets, models
from mlfusion.models import preprocessing
from mlfusion.models.preprocessing import Preprocessing
from mlfusion.specs.identity import KINDS, DataSpec, FeatureSpec, Pair, TokenKind, digest
from mlfusion.specs.names import parse_tokens
from mlfusion.specs.options import ComputeOptions, FeatureOptions
from mlfusion.specs.splits import default_splits
from mlfusion.store import Groups, Names, Samples
from mlfusion.system.devices import pick_compute, pick_device
from mlfusion.system.references import Kind, find_path, parse_model


@dataclass(frozen=True, eq=False)
class Images:
    """Requested splits of a data set and their identity. Images are read once for any number of models."""

    data: datasets.DataSet
    names: tuple[str, ...]  # of the requested splits, such as 'test=validation'
    splits: tuple[tuple[datasets.Split, Samples, DataSpec], ...]
    argument: str  # the argument that loads the data set again
    reading: str  # digest of all splits of the data set, see `Names.reading`

    @classmethod
    def of(cls, dataset: str | datasets.DataSet, features: FeatureOptions = FeatureOptions()) -> "Images":
        """Load a data set and read every image of all its splits; errors as in `datasets.load`."""
        data = datasets.load(dataset, features.read) if isinstance(dataset, str) else dataset
        names = data.requested(features.splits)
        requested = [data.split(name) for name in names]  # raises before anything is read
        stored = {
            name: Samples(
                split.ids,
                split.labels,
                split.read_digests(data.name),
                split.classes,
                None if split.groups is None else Groups(split.groups),
            )
            for name, split in data.splits.items()
        }
        splits = []
        for name, split in zip(names, requested, strict=True):
            samples = stored[data.stored_name(name)]
            if data.decoding.window is None:
                datasets.report_depth(data.name, split)
            spec = DataSpec(
                content=samples.content,
                split=split.name,
                images=len(split),
                classes=split.classes,
                resplit=data.resplit,
                name=data.name,
            )
            splits.append((split, samples, spec))
        argument = _argument("data set", dataset) if isinstance(dataset, str) else data.name
        contents = {name: samples.content for name, samples in stored.items()}
        groups = {name: samples.groups.digest for name, samples in stored.items() if samples.groups}
        reading = digest([contents, data.classes, data.label_kind, data.resplit, *([groups] if groups else [])])
        return cls(data, names, tuple(splits), argument, reading)

    @property
    def leaves_out_validation(self) -> bool:
        """Whether the default would have read a validation split beside train and test, which are all that is read."""
        return self.names == ("train", "test") != default_splits(self.data.splits)


@dataclass(frozen=True, eq=False)
class Job:
    """One entry to fill: one view of a split."""

    split: datasets.Split
    samples: Samples
    spec: FeatureSpec
    steps: Preprocessing
    names: Names


@dataclass(frozen=True, eq=False)
class Request:
    """The resolved arguments of an extraction: checkpoint, tokens, images and keys."""

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
        features: FeatureOptions = FeatureOptions(),
        compute: ComputeOptions = ComputeOptions(),
    ) -> "Request":
        """Resolve names; arguments and errors as in `extract`, except that `dataset` may also be `Images`."""
        device = pick_device(compute.device)
        precision = pick_compute(features.compute, device)
        ref = parse_model(model).with_defaults(features.hook, features.settings)
        checkpoint = models.locate(str(ref))
        images = dataset if isinstance(dataset, Images) else Images.of(dataset, features)
        data = images.data
        views = [
            preprocessing.read(
                checkpoint.folder, features.preprocess, size=features.size, view=view, seed=features.view_seed
            )
            for view in features.views
        ]
        model_specs = [models.identify(checkpoint, steps.key(data.decoding), precision, steps.view) for steps in views]
        # Options that the entry's names do not contain, for the printed command that extracts it again.
        root = features.read.image_root
        recorded = replace(
            features,
            read=replace(features.read, image_root=root and str(Path(root).expanduser().resolve())),
            # Without it, the command would add features that choose the configuration of the next probe.
            splits=images.names if images.leaves_out_validation else None,
            layers="all",
            tokens="cls,ap",
            hook=None,
            settings=(),
            views=("plain",),
        )
        names = Names(
            model=checkpoint.name,
            model_source=checkpoint.source,
            dataset=data.name,
            dataset_source=data.source,
            model_argument=_argument("model", ref.name) + ref.suffix,
            dataset_argument=images.argument,
            options=(*replace(recorded, compute=precision).words(), *(["--skip-bad"] if compute.skip_bad else [])),
            reading=images.reading,
            grouped_by=data.grouped_by,
        )
        jobs = tuple(
            Job(
                split,
                samples,
                FeatureSpec(model=model_spec, data=spec, dtype=features.dtype),
                steps,
                msgspec.structs.replace(names, split=name, groups=samples.groups.digest if samples.groups else ""),
            )
            for name, (split, samples, spec) in zip(images.names, images.splits, strict=True)
            for model_spec, steps in zip(model_specs, views, strict=True)
        )
        pairs = parse_tokens(features.tokens, features.layers, model_specs[0].depth)
        return cls(checkpoint, names, pairs, jobs, replace(compute, device=device))

    @property
    def layers(self) -> tuple[int, ...]:
        """The requested layers."""
        return tuple(sorted({layer for layer, _ in self.pairs}))

    @property
    def kinds(self) -> tuple[TokenKind, ...]:
        """The requested token kinds."""
        return tuple(kind for kind in KINDS if any(k == kind for _, k in self.pairs))


def _argument(kind: Kind, reference: str) -> str:
    """An argument that is valid in every working directory: the absolute path of a folder or file, else the name."""
    return str(find_path(kind, reference) or reference)
