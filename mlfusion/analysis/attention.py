"""Turns the stored attention of a probe into maps over the image, and finds the images that a row was tested on."""

from dataclasses import dataclass, replace
from math import isqrt

import numpy as np
from PIL import Image

from mlfusion import datasets, models
from mlfusion.errors import BadData, MlfusionError
from mlfusion.models import preprocessing
from mlfusion.report.pictures import mean_layers
from mlfusion.results import Results, Row
from mlfusion.specs.definitions import from_words
from mlfusion.specs.identity import GRID_SIDES, Decoding
from mlfusion.specs.options import FeatureOptions
from mlfusion.store import CachePath, FeatureStore

MAX_PREFIX = 8  # largest number of tokens before the patches: CLS, distillation, registers


@dataclass(frozen=True, eq=False)
class AttentionResult:
    """The attention of a row, summarised by layer and by patch."""

    row: Row
    shares: np.ndarray  # [images, tokens]
    mean_layer: np.ndarray | None  # [images], mean layer weighted by attention; None if the probe reads one layer
    maps: np.ndarray | None  # [images, side, side], see `maps`; None if the probe reads no patches


def attend(results: Results, row_id: str) -> AttentionResult:
    """The attention of a result on layers and on patches for each image; `row_id` may be the first characters of the id.

    Raises:
        BadData: the probe has no attention.
        UnknownName: no result has such an id.
    """
    row = results.named(row_id)
    layout = row.attention
    if layout is None:
        raise BadData(f"{row.probe} does not attend; allowed: results of attentive probes, such as alf and aat")
    shares = results.arrays(row)["attention"]
    return AttentionResult(
        row,
        shares,
        mean_layers(shares, layout.layers) if len(set(layout.layers)) > 1 else None,
        maps(row, shares) if any(kind not in ("cls", "ap") for kind in layout.kinds) else None,
    )


def side(tokens: int) -> int:
    """Side of the square of patches, which are the last of a model's `tokens`, after CLS, registers and such.

    Raises:
        BadData: the patches form no square.
    """
    edge = isqrt(tokens)
    if edge and tokens - edge**2 <= MAX_PREFIX:
        return edge
    raise BadData(
        f"{tokens} tokens are no square of patches behind at most {MAX_PREFIX} others; allowed: square pictures"
    )


def maps(row: Row, attention: np.ndarray) -> np.ndarray:
    """Share of each patch in the attention of a probe over all tokens: [images, side, side].

    Layers are summed; the share of a pooled patch (grid4 and such) is distributed over the patches below it. The
    remainder to 1 belongs to tokens that are no patches. `attention` is the stored array of the row, [images, tokens].

    Raises:
        BadData: the probe reads no patches, or the shapes do not fit.
    """
    layout = row.attention
    if layout is None or attention.ndim != 2 or attention.shape[1] != len(layout.layers):
        expected = "none" if layout is None else f"of {len(layout.layers)} tokens"
        raise BadData(f"row {row.id} has attention {expected}, and the array is of shape {attention.shape}")
    tokens = list(zip(layout.layers, layout.kinds, strict=True))
    parts = []
    for layer, kind in dict.fromkeys(tokens):
        if kind == "all" or kind in GRID_SIDES:
            shares = attention[:, [token == (layer, kind) for token in tokens]].astype(np.float64)
            edge = side(shares.shape[1]) if kind == "all" else GRID_SIDES[kind]
            parts.append(shares[:, shares.shape[1] - edge**2 :].reshape(-1, edge, edge))
    if not parts:
        raise BadData(
            f"{row.probe} reads no patches, so that there is no map of its attention; allowed: probes over all tokens, such "
            "as all-tokens-last/attentive, or over pooled patches"
        )
    edge = max(part.shape[1] for part in parts)
    return np.sum([_resample(part, edge) for part in parts], axis=0)


def _resample(shares: np.ndarray, edge: int) -> np.ndarray:
    """[images, a, a] → [images, edge, edge] with the same sums: each share is distributed evenly over its area."""
    a = shares.shape[1]
    # The weight of coarse row j in fine row i is their overlap.
    fine = np.arange(edge)[:, None] / edge
    begin, end = np.maximum(fine, np.arange(a) / a), np.minimum(fine + 1 / edge, (np.arange(a) + 1) / a)
    weights = np.clip(end - begin, 0, None) * a
    return np.asarray(weights @ shares @ weights.T)


@dataclass(frozen=True, eq=False)
class RowImages:
    """The test images of a row, in the order of its arrays, preprocessed as for its model."""

    split: datasets.Split
    rows: np.ndarray  # [images], rows of the split
    steps: preprocessing.Preprocessing | None  # None if the model is not available: images are then shown whole

    @property
    def ids(self) -> list[str]:
        """Ids of the images in the data set."""
        return [self.split.ids[row] for row in self.rows]

    def picture(self, number: int) -> Image.Image:
        """Image `number` of the arrays, resized and cropped as for the model.

        Raises:
            BadImage: the image cannot be read.
        """
        image = self.split.image(int(self.rows[number]))
        if self.steps is None:
            return image
        pixels = np.moveaxis(self.steps.picture(image, self.ids[number]), 0, -1)
        if pixels.dtype != np.uint8:
            low, high = float(pixels.min()), float(pixels.max())
            pixels = ((pixels - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(pixels))


def row_images(row: Row, *, cache: CachePath = None, dataset: str | None = None) -> RowImages:
    """Find the images that a row was tested on.

    `cache` holds the row's test features, which have the ids of the images; `dataset` is the data set's name or path if it
    has moved.

    Raises:
        BadData: the features are no longer cached, or the data set has other images, by the digests of their bytes.
        UnknownName, Unavailable: the data set is not available.
    """
    if row.folds is not None:
        raise BadData(
            f"row {row.id} was tested in {row.folds} folds of train and test; allowed: rows that were tested on a test split. "
            "Train the probe without --folds for pictures"
        )
    entry = FeatureStore(cache).by_key(row.features[1])
    source = dataset or row.sources.dataset
    if entry is None:
        raise BadData(
            f"the test features of row {row.id} ({row.features[1]}) are not in the cache, so that nothing says which "
            f"images it was tested on; name the cache that has them with --cache, or extract {source} again"
        )
    if dataset is None and any(names.dataset_source == datasets.IN_MEMORY for names in entry.names()):
        raise BadData(
            f"row {row.id} was tested on arrays in memory ({source}), where no command finds them; save them with "
            "numpy.savez(FILE.npz, test_images=…, test_labels=…), and its train in the same way, and give --dataset FILE.npz"
        )
    steps, decoding = _preprocessing(entry.spec.model.preprocess, row.sources.model)
    window = decoding.window and f"{decoding.window[0]},{decoding.window[1]}"
    # How bad images are treated is no option of features.
    options = from_words(FeatureOptions, [word for word in row.sources.options if word != "--skip-bad"])
    test = next((name for name in options.splits or () if name.partition("=")[0] == "test"), "test")
    reading = replace(options.read, exif_transpose=decoding.exif_transpose, window=window)
    data = datasets.load(source, reading)
    split, samples = data.split(test), entry.samples
    row_of_id = {name: number for number, name in enumerate(split.ids)}
    ids = [samples.ids[number] for number in entry.rows()]
    missing = [name for name in ids if name not in row_of_id]
    rows = np.array([row_of_id.get(name, 0) for name in ids])
    if missing or not split.take(rows, test).has_digests(samples.digests[entry.rows()], data.name):
        raise BadData(
            f"{source} has other test images than row {row.id} was tested on; give the same ones with --dataset, or extract "
            "the data set again and train the probe on it"
        )
    return RowImages(split, rows, steps)


def _preprocessing(key: str, model: str) -> tuple[preprocessing.Preprocessing | None, Decoding]:
    """The preprocessing with this key, or None if it is unknown; and how images were decoded."""
    steps, decoding = preprocessing.from_key(key)
    if steps is not None:
        return steps, decoding
    try:
        current = preprocessing.read(models.locate(model).folder)
    except MlfusionError:
        return None, decoding
    return current if current.key(decoding) == key else None, decoding
