"""Runs some images of cached entries through their models again, since no checksum shows who wrote the numbers of a cache."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from mlfusion.errors import MlfusionError
from mlfusion.extraction import loader, run
from mlfusion.extraction.request import Request
from mlfusion.specs.commands import feature_words
from mlfusion.specs.definitions import from_words
from mlfusion.specs.identity import Compute, Dtype, FeatureSpec
from mlfusion.specs.options import ComputeOptions, FeatureOptions
from mlfusion.store import CachePath, Entry, FeatureStore

# Largest difference, as a share of the token's largest number: twice the rounding of the storage type, or of the forward pass.
STORED: dict[Dtype, float] = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-14, "int8": 2.0**-6}
COMPUTED: dict[Compute, float] = {"float32": 2.0**-14, "bfloat16": 2.0**-4, "float16": 2.0**-7}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the comparison of some images found."""

    images: int  # that were compared
    entries: int  # that they belong to
    different: tuple[str, ...]  # a sentence about each entry whose stored numbers are not the model's
    skipped: tuple[str, ...]  # a sentence about each entry that could not be compared

    def to_json(self) -> dict[str, Any]:
        """The object `sample` that `mlfusion cache verify --sample --json` prints."""
        return asdict(self)


def compare_sample(cache: CachePath = None, images: int = 16, *, seed: int = 0) -> Sample:
    """Run `images` images of every entry of a cache through its model, and compare all their tokens with the stored ones.

    It needs the models and the images, under the names that the entries record. An entry whose model or images cannot be
    found, or are others by now, is skipped and named.
    """
    different: list[str] = []
    skipped: list[str] = []
    compared, entries = 0, 0
    for entry in FeatureStore(cache).own_entries(skipped.append):
        try:
            rows, largest = _compare(entry, images, np.random.default_rng(seed))
        except MlfusionError as err:
            skipped.append(f"{entry.path} was not compared: {err}")
            continue
        compared, entries = compared + rows, entries + 1
        if not largest <= 1:
            different.append(
                f"{entry.path} holds other numbers than {entry.spec.model.name} gives for the same images: remove it, and "
                "extract it again"
            )
    return Sample(images=compared, entries=entries, different=tuple(different), skipped=tuple(skipped))


def _compare(entry: Entry, count: int, random: np.random.Generator) -> tuple[int, float]:
    """How many images were compared, and the largest difference in units of what rounding explains."""
    request = _request(entry)
    [job] = request.jobs
    if job.spec.key != entry.key and entry.samples.former:
        raise MlfusionError("it is of a version that identified images by xxh3-128: extract it again")
    if job.spec.key != entry.key:
        raise MlfusionError("its model, its images, or how they are prepared are others by now")
    readable = entry.rows()
    chosen = np.sort(random.permutation(len(readable))[:count])
    pictures = [loader.picture(job.split, row, job.steps) for row in readable[chosen].tolist()]
    if not pictures:
        return 0, 0.0
    pairs = entry.complete_pairs()
    tokens = run.load(request)(job.steps.finish(torch.from_numpy(np.stack(pictures))), pairs)
    return len(pictures), max(_differences(entry, chosen, tokens), default=0.0)


def _request(entry: Entry) -> Request:
    """The extraction that makes this entry, by the names under which it was extracted last."""
    if not (names := entry.names()):
        raise MlfusionError("it has no names of a model and a data set")
    last, view = names[-1], entry.spec.model.view
    words = [
        word for word in last.options if word != "--skip-bad"
    ]  # how bad images are treated is no option of features
    features = replace(
        from_words(FeatureOptions, feature_words(None, view, words)), splits=(last.split or entry.spec.data.split,)
    )
    model, dataset = last.model_argument or last.model_source, last.dataset_argument or last.dataset_source
    return Request.of(model, dataset, features, ComputeOptions())


def _differences(entry: Entry, chosen: np.ndarray, tokens: dict[Any, torch.Tensor]) -> Iterator[float]:
    """For each layer and kind, the largest difference of a token in units of what rounding explains."""
    for (layer, kind), values in tokens.items():
        with entry.open([layer], [kind]) as reader:
            stored = reader[chosen][:, 0].astype(np.float32)  # [images, tokens, width]
        made = values.cpu().float().numpy()
        if stored.shape != made.shape:
            yield np.inf
            continue
        allowed = _tolerance(entry.spec) * np.abs(made).max(-1) + np.finfo(np.float16).tiny
        yield float((np.abs(stored - made).max(-1) / allowed).max())


def _tolerance(spec: FeatureSpec) -> float:
    return 2 * (STORED[spec.dtype] + COMPUTED[spec.model.compute])
