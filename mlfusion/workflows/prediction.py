"""Classifies new images with a saved probe, its backbone, and the preprocessing and layers of its training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlfusion import datasets, models
from mlfusion.errors import BadModel, ResultsUnusable
from mlfusion.extraction import loader
from mlfusion.models import preprocessing
from mlfusion.models.backbone import Backbone
from mlfusion.models.preprocessing import Preprocessing
from mlfusion.probing import protocol, saved
from mlfusion.probing.targets import Number
from mlfusion.probing.training.batches import Tokens
from mlfusion.specs.identity import COMPUTES, MAX_PIXELS, Compute, Decoding, ModelSpec, digest
from mlfusion.store.encoding import ENCODINGS
from mlfusion.system.devices import pick_device
from mlfusion.system.references import parse_model

BATCH = 32
TOP = 5
DIGITS = 4  # of a predicted number, counted from the deviation of the training labels


@dataclass(frozen=True)
class Prediction:
    """The prediction of a probe for one image."""

    image: str
    top: tuple[tuple[str, float], ...]  # classes or labels with their probabilities, the most probable first
    number: float | None  # prediction of a regression probe, else None
    digits: int = DIGITS  # significant digits of the number, more the farther it is from zero

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `mlfusion predict --json` prints."""
        if self.number is not None:
            return {"image": self.image, "number": self.number}
        return {"image": self.image, "top": [{"class": name, "probability": p} for name, p in self.top]}


def identity(spec: ModelSpec) -> dict[str, str]:
    """The fields that must be equal for equal features; names and the hub's commit are not among them."""
    return {
        "weights": spec.weights,
        "config": spec.config,
        "preprocess": digest(spec.preprocess),
        "hook": spec.hook,
        "compute": spec.compute,
    }


def predict(
    probe: str | Path,
    images: Sequence[str | Path],
    *,
    model: str | None = None,
    top: int = TOP,
    device: str = "cpu",
    batch_size: int = BATCH,
    max_pixels: int | None = None,
) -> list[Prediction]:
    """Classify images with a saved probe.

    Args:
        probe: the folder that `mlfusion probe --save` wrote.
        images: files.
        model: folder or hub id of the backbone, if it has moved; its weights must be the same. Images are preprocessed as the
            card says, not as the files of that folder say.
        top: number of classes in a prediction.
        device: device of the forward pass.
        batch_size: number of images in a forward pass.
        max_pixels: larger images are rejected; None: 178,956,970.

    Raises:
        ResultsUnusable: no probe in that folder, or a damaged one.
        BadModel: the backbone is another than the probe's.
        BadData: an image cannot be read.
    """
    if not str(probe):
        raise ResultsUnusable(
            "the folder of the probe is an empty text; allowed: a folder that `mlfusion probe --save` wrote, which says where "
            "it is"
        )
    card, head = saved.load(Path(probe))
    checkpoint = models.locate(_model_reference(model, card.backbone.source))
    steps, spec, decoding = _training_setup(checkpoint, card.backbone)
    current = identity(spec)
    if differing := [name for name, value in current.items() if getattr(card.backbone, name) != value]:
        raise BadModel(
            f"{checkpoint.name} is not the backbone of this probe, {card.backbone.name} from {card.backbone.source}: "
            f"{' and '.join(differing)} differ{'s' if len(differing) == 1 else ''}. Allowed: the same weights and "
            "preprocessing, so give their folder with --model, or train the probe again on this model's features"
        )
    decoder = datasets.Decoder(decoding.exif_transpose, max_pixels or MAX_PIXELS, decoding.window)
    pictures = datasets.pictures([str(image) for image in images], decoder)
    backbone = Backbone(checkpoint, pick_device(device), preprocessing=steps, compute=spec.compute)
    results: list[Prediction] = []
    for start in range(0, len(pictures), batch_size):
        rows = range(start, min(start + batch_size, len(pictures)))
        pixels = steps.finish(torch.from_numpy(np.stack([loader.picture(pictures, row, steps) for row in rows])))
        values = _tokens(backbone, pixels, card)
        # The labels are unknown and not used.
        tokens = Tokens(values, np.zeros(len(values), np.int64))
        predictions, _ = protocol.predict(head, tokens, card.target())
        for row, prediction in zip(rows, predictions, strict=True):
            results.append(_prediction(card, pictures.ids[row], prediction, top))
    return results


def _training_setup(checkpoint: models.Checkpoint, card: saved.Backbone) -> tuple[Preprocessing, ModelSpec, Decoding]:
    """The preprocessing of the probe's training, the model with it, and how images are decoded."""
    compute: Compute = card.compute if card.compute in COMPUTES else "float32"
    rebuilt, decoding = preprocessing.from_key(card.preparation)
    steps = rebuilt or preprocessing.read(checkpoint.folder)  # a custom processor: the model's own
    spec = models.identify(checkpoint, steps.key(decoding), compute, steps.view)
    return steps, spec, decoding


def _tokens(backbone: Backbone, pixels: Tensor, card: saved.Card) -> np.ndarray:
    """Tokens [images, tokens, width] in the order and the precision of the cache."""
    pairs = [(layer, kind) for layer in card.layers for kind in card.kinds]
    tokens = backbone(pixels, pairs)
    encoding = ENCODINGS[card.dtype]
    parts = [encoding.decode(encoding.encode(tokens[pair].cpu().numpy())) for pair in pairs]
    width = max(part.shape[-1] for part in parts)
    padded = [np.pad(part, ((0, 0), (0, 0), (0, width - part.shape[-1]))) for part in parts]
    return np.concatenate(padded, axis=1)


def _prediction(card: saved.Card, image: str, prediction: np.ndarray, top: int) -> Prediction:
    target = card.target()
    if isinstance(target, Number):
        number = target.origin + float(prediction[0])
        magnitude = math.log10(abs(number) / target.deviation) if number else 0
        return Prediction(image, (), number, DIGITS + max(0, math.floor(magnitude)))
    best = np.argsort(-prediction, kind="stable")[:top]
    return Prediction(image, tuple((card.classes[i], float(prediction[i])) for i in best), None)


def _model_reference(model: str | None, source: str) -> str:
    """The model argument, or the source in the card, as a model reference with the card's hook point and settings."""
    card = parse_model(source)
    if model is None:
        name = next((row.name for row in models.CATALOGUE.values() if row.source == card.name), card.name)
        return name + card.suffix
    return model if parse_model(model).suffix else model + card.suffix
