"""Predicts new images with a saved probe that is loaded once, by the backbone, preprocessing and layers of its training."""

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlfusion import datasets, models
from mlfusion.errors import BadData, BadImage, BadModel, ResultsUnusable
from mlfusion.extraction import loader
from mlfusion.models import preprocessing
from mlfusion.models.backbone import Backbone
from mlfusion.models.preprocessing import Preprocessing
from mlfusion.probing import protocol, saved
from mlfusion.probing.heads import HeadModule
from mlfusion.probing.targets import Number, OneClass
from mlfusion.probing.training.batches import Tokens
from mlfusion.results import Results
from mlfusion.shapes import Float, Num
from mlfusion.specs.identity import COMPUTES, Compute, Decoding, ModelSpec, digest
from mlfusion.specs.options import PredictorOptions
from mlfusion.store.encoding import ENCODINGS
from mlfusion.system.devices import pick_device, processor_count
from mlfusion.system.display import Displayed
from mlfusion.system.references import parse_model
from mlfusion.system.words import plural

BATCH = 32
TOP = 5
FIRST = 5  # classes that a notebook shows
DIGITS = 4  # of a predicted number, counted from the deviation of the training labels
SHOWN_NAME = 200  # characters of a path in a message: what was given for a path may be a whole file's text

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""One image: a path, the bytes of an image file, a PIL image, or a uint8 array [H, W, 3] in RGB or [H, W] in grey."""

ALLOWED = "a path, the bytes of an image file, a PIL image, or a uint8 array [H, W, 3] or [H, W]"


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


class Predictor(Displayed):
    """A saved probe with its backbone, loaded once; `load_probe` makes it. Several threads may use one.

    predictor = mlfusion.load_probe("results/probes/r17b75bdf052900c")
    predictor.predict("cat.jpg")                    # 'cat'
    predictor.predict_proba([image, other])         # [2, C], columns in the order of predictor.classes_
    """

    def __init__(
        self, folder: Path, card: saved.Card, head: HeadModule, backbone: Backbone, decoder: datasets.Decoder
    ) -> None:
        """`backbone` has the preprocessing of the probe's training."""
        self.folder, self.card = folder, card
        self.classes_ = np.array(card.classes, object)  # [C] names of classes or labels; [0] for a probe of numbers
        self._head, self._backbone, self._decoder, self._target = head, backbone, decoder, card.target()
        self._lock = threading.Lock()  # one forward pass at a time: its hooks belong to the model's layers

    @property
    def _steps(self) -> Preprocessing:
        return self._backbone.preprocessing

    def summary(self) -> str:
        card = self.card
        names = ", ".join(card.classes[:FIRST]) + ", …" * (len(card.classes) > FIRST)
        kind = (
            "numbers"
            if isinstance(self._target, Number)
            else f"{plural(len(card.classes), 'class', 'classes')} ({names})"
        )
        return f"{card.probe} on {card.backbone.name}, trained on {card.dataset}: {kind}; {self.folder.absolute()}"

    def lines(self) -> list[dict[str, object]]:
        """The scores on its card."""
        metric = self.card.metric.replace("_", " ")
        return [{"split": split, metric: self.card.scores[split]} for split in ("test", "val", "train")]

    def predict(self, images: "Picture | Iterable[Picture]") -> Any:
        """The answer for one image, or a list of answers for several, in their order.

        Returns:
            The name of the most probable class; for labels, a tuple of the labels with a probability above one half; for
            numbers, a float. For several numbers an array [N] float64.

        Raises:
            BadData: an image cannot be read, or is none; names it by its path, or as `images[3]`, counted from 0.
        """
        outputs = self._outputs(images)
        if isinstance(self._target, Number):
            numbers = outputs[..., 0] + self._target.origin
            return float(numbers) if numbers.ndim == 0 else numbers
        if isinstance(self._target, OneClass):
            names = self.classes_[outputs.argmax(-1)]
            return names if isinstance(names, str) else names.tolist()
        answers = [tuple(self.classes_[each > 0.5]) for each in np.atleast_2d(outputs)]
        return answers[0] if outputs.ndim == 1 else answers

    def predict_proba(self, images: "Picture | Iterable[Picture]") -> Float[np.ndarray, "..."]:
        """Probabilities in the order of `classes_`: [C] float32 for one image, [N, C] for several.

        Raises:
            BadData: as of `predict`; or the probe predicts numbers, which have no probabilities.
        """
        if isinstance(self._target, Number):
            raise BadData(
                f"{self.card.probe} of {self.folder} predicts numbers; they have no probabilities: call predict"
            )
        return self._outputs(images)

    def stream(
        self,
        images: Iterable[Picture],
        *,
        top: int = TOP,
        batch_size: int = BATCH,
        on_bad: Callable[[BadData], None] | None = None,
    ) -> Iterator[Prediction]:
        """Predictions one after the other, so that neither images nor answers need to fit into memory.

        Args:
            images: any number of them; they are taken as they are needed, and decoded ahead by threads.
            top: number of classes in a prediction.
            batch_size: number of images in a forward pass; twice as many are in memory.
            on_bad: called for an image that cannot be read, which is then left out; None: raise its error, after the
                predictions of all images before it.

        Raises:
            BadData: an image cannot be read, and `on_bad` is None.
        """
        for name, outputs in self._each(images, batch_size):
            if isinstance(outputs, BadData):
                if on_bad is None:
                    raise outputs
                on_bad(outputs)
            else:
                yield self._prediction(name, outputs, top)

    def _outputs(self, images: "Picture | Iterable[Picture]") -> Float[np.ndarray, "..."]:
        """[C] for one image, [N, C] for several."""
        if _is_one(images):
            return self._pass([self._prepared(cast("Picture", images), _name(images, None))])[0]
        found = []
        for _, outputs in self._each(cast("Iterable[Picture]", images), BATCH):
            if isinstance(outputs, BadData):
                raise outputs
            found.append(outputs)
        return np.stack(found) if found else np.empty((0, self._target.outputs), np.float32)

    def _each(self, images: Iterable[Picture], batch_size: int) -> Iterator[tuple[str, np.ndarray | BadData]]:
        """(name, [C] or why there are none) of each image, in order; the next batch is decoded during a forward pass."""
        numbered = enumerate(images)
        with ThreadPoolExecutor(processor_count()) as pool:

            def submit() -> list[tuple[str, Future[np.ndarray]]]:
                chosen = [(_name(image, number), image) for number, image in islice(numbered, batch_size)]
                return [(name, pool.submit(self._prepared, image, name)) for name, image in chosen]

            waiting = submit()
            try:
                while waiting:
                    batch, waiting = waiting, submit()
                    yield from self._batch(batch)
            finally:
                for _, future in waiting:
                    future.cancel()

    def _batch(self, batch: "list[tuple[str, Future[np.ndarray]]]") -> Iterator[tuple[str, np.ndarray | BadData]]:
        pictures: dict[int, np.ndarray] = {}
        errors: dict[int, BadData] = {}
        for number, (_, future) in enumerate(batch):
            try:
                pictures[number] = future.result()
            except BadData as err:
                errors[number] = err
        outputs = dict(zip(pictures, self._pass(list(pictures.values())), strict=True)) if pictures else {}
        for number, (name, _) in enumerate(batch):
            yield name, errors[number] if number in errors else outputs[number]

    def _prepared(self, image: Picture, name: str) -> Num[np.ndarray, "3 height width"]:
        """One image, decoded and preprocessed; raises BadData, which names it, if that cannot be done."""
        if isinstance(image, (str, os.PathLike)):
            try:
                most = datasets.image_bytes(self._decoder.max_pixels)
                image = datasets.read_regular(Path(image).expanduser(), most)
            except (OSError, ValueError) as err:  # ValueError: a path with a null character
                reason = getattr(err, "strerror", None) or err
                raise BadData(f"{name} cannot be read: {reason}; mend that, or remove it") from err
        if isinstance(image, (bytes, bytearray, memoryview)):
            return loader.prepare(bytes(image), name, self._decoder, self._steps)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or not (image.ndim == 2 or image.shape[2:] == (3,)) or not image.size:
                raise BadData(f"{name} is an array {list(image.shape)} of {image.dtype}; allowed: {ALLOWED}")
            image = Image.fromarray(np.ascontiguousarray(image))
        if not isinstance(image, Image.Image):
            raise BadData(f"{name} is a {type(image).__name__}; allowed: {ALLOWED}")
        try:
            return self._steps.picture(self._decoder.converted(image), name)
        except BadImage as err:
            raise BadImage(f"{name} cannot be read: {err}") from err

    def _pass(self, pictures: list[np.ndarray]) -> Float[np.ndarray, "N C"]:
        """Predictions for preprocessed pictures, as `Target.predictions` gives them."""
        with self._lock:
            pixels = self._steps.finish(torch.from_numpy(np.stack(pictures)))
            values = _tokens(self._backbone, pixels, self.card)
            # The labels are unknown and not used.
            predictions, _ = protocol.predict(self._head, Tokens(values, np.zeros(len(values), np.int64)), self._target)
        return predictions

    def _prediction(self, image: str, outputs: Float[np.ndarray, " C"], top: int) -> Prediction:
        if isinstance(self._target, Number):
            number = self._target.origin + float(outputs[0])
            magnitude = math.log10(abs(number) / self._target.deviation) if number else 0
            return Prediction(image, (), number, DIGITS + max(0, math.floor(magnitude)))
        best = np.argsort(-outputs, kind="stable")[:top]
        return Prediction(image, tuple((self.card.classes[i], float(outputs[i])) for i in best), None)


def load_probe(probe: str | os.PathLike[str], options: PredictorOptions = PredictorOptions()) -> Predictor:
    """Load a saved probe and its backbone; arguments and errors as in `mlfusion.load_probe`."""
    folder = _folder(probe, Results(options.results))
    card, head = saved.load(folder)
    checkpoint = models.locate(_model_reference(options.model, card.backbone.source))
    steps, spec, decoding = _training_setup(checkpoint, card.backbone)
    current = identity(spec)
    if differing := [name for name, value in current.items() if getattr(card.backbone, name) != value]:
        raise BadModel(
            f"{checkpoint.name} is not the backbone of this probe, {card.backbone.name} from {card.backbone.source}: "
            f"{' and '.join(differing)} differ{'s' if len(differing) == 1 else ''}. Allowed: the same weights and "
            "preprocessing, so give their folder with --model, or train the probe again on this model's features"
        )
    decoder = datasets.Decoder(decoding.exif_transpose, options.max_pixels, decoding.window)
    backbone = Backbone(checkpoint, pick_device(options.device), preprocessing=steps, compute=spec.compute)
    return Predictor(folder, card, head, backbone, decoder)


def predict(
    probe: str | os.PathLike[str],
    images: Iterable[Picture],
    options: PredictorOptions = PredictorOptions(),
    *,
    top: int = TOP,
    batch_size: int = BATCH,
) -> list[Prediction]:
    """Predict images with a saved probe, once; arguments and errors as in `mlfusion.predict`."""
    return list(load_probe(probe, options).stream(datasets.expand_folders(images), top=top, batch_size=batch_size))


def identity(spec: ModelSpec) -> dict[str, str]:
    """The fields that must be equal for equal features; names and the hub's commit are not among them."""
    return {
        "weights": spec.weights,
        "config": spec.config,
        "preprocess": digest(spec.preprocess),
        "hook": spec.hook,
        "compute": spec.compute,
    }


def _is_one(images: object) -> bool:
    """Whether an argument is one image; an array of four dimensions is several, and every list is."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)) or not isinstance(
        images, Iterable
    )


def _name(image: object, number: int | None) -> str:
    """An image as messages name it: its path, or its number in the argument."""
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        name = path if isinstance(path, str) else os.fsdecode(path)
        return name if len(name) <= SHOWN_NAME else f"{name[:SHOWN_NAME]}… ({plural(len(name), 'character')})"
    return "the image" if number is None else f"images[{number}]"


def _folder(probe: str | os.PathLike[str], results: Results) -> Path:
    """The folder of a probe that is named by its folder or by the id of its result."""
    if not os.fspath(probe):
        raise ResultsUnusable(
            "the folder of the probe is an empty text; allowed: a folder that `mlfusion probe --save` wrote, which says where "
            "it is, or the id of a result"
        )
    folder = Path(probe).expanduser()
    if folder.exists() or not saved.is_id(str(probe)):
        return folder
    row = results.named(str(probe))
    if (folder := results.probe_folder(row)).exists():
        return folder
    if row.folds is not None:
        raise ResultsUnusable(f"result {row.id} has no single probe: {row.not_kept_note(str(results.root.absolute()))}")
    again = row.keep_command(str(results.root.absolute()))
    raise ResultsUnusable(
        f"the trained probe of result {row.id} was not kept: there is no {folder.absolute()}. Train it again with `{again}`"
    )


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


def _model_reference(model: str | None, source: str) -> str:
    """The model argument, or the source in the card, as a model reference with the card's hook point and settings."""
    card = parse_model(source)
    if model is None:
        name = next((row.name for row in models.CATALOGUE.values() if row.source == card.name), card.name)
        return name + card.suffix
    return model if parse_model(model).suffix else model + card.suffix
