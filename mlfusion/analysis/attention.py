"""Where a probe looked: the attention kept beside a row, as maps over the image, and the images that it belongs to.

The numbers need neither model nor images; these are opened only to be drawn.
"""

from dataclasses import dataclass
from math import isqrt

import numpy as np
from PIL import Image

from mlfusion import datasets, models
from mlfusion.errors import BadData, MlfusionError
from mlfusion.models import preprocessing
from mlfusion.report.pictures import mean_layers
from mlfusion.results import Results, Row
from mlfusion.specs.identity import GRID_SIDES
from mlfusion.specs.options import ReadOptions
from mlfusion.store import CachePath, FeatureStore

MOST_PREFIX = 8  # tokens before the patches: CLS, distillation, registers


@dataclass(frozen=True, eq=False)
class Attended:
    """What the attention of a row shows."""

    row: Row
    shares: np.ndarray  # [images, tokens]
    mean_layer: np.ndarray | None  # [images], the mean of layers by attention; None if one layer is read
    maps: np.ndarray | None  # [images, side, side], as from `maps`; None if no patches are read


def attend(results: Results, row_id: str) -> Attended:
    """The attention of a result (its id, or the beginning of it) on layers and on patches, image by image.

    Raises:
        BadData: its probe has no attention.
        UnknownName: no result has such an id.
    """
    row = results.named(row_id)
    held = row.attention
    if held is None:
        raise BadData(f"{row.probe} does not attend; allowed: results of attentive probes, such as alf and aat")
    shares = results.arrays(row)["attention"]
    return Attended(
        row,
        shares,
        mean_layers(shares, held.layers) if len(set(held.layers)) > 1 else None,
        maps(row, shares) if any(kind not in ("cls", "ap") for kind in held.kinds) else None,
    )


def side(tokens: int) -> int:
    """Of `tokens` in a model's own order the last side × side are patches, and those before them CLS, registers and such.

    Raises:
        BadData: the patches are in no square.
    """
    found = isqrt(tokens)
    if found and tokens - found**2 <= MOST_PREFIX:
        return found
    raise BadData(
        f"{tokens} tokens are no square of patches behind at most {MOST_PREFIX} others; allowed: square pictures"
    )


def maps(row: Row, attention: np.ndarray) -> np.ndarray:
    """Share of each patch in the attention of a probe over all tokens: [images, side, side].

    Layers are summed, as are patches that were pooled (grid4 and such) with the patches that they lie on. What is missing to
    1 went to tokens that are no patch. `attention` is that kept beside the row, [images, tokens].

    Raises:
        BadData: the probe reads no patches, or the shapes do not fit.
    """
    held = row.attention
    if held is None or attention.ndim != 2 or attention.shape[1] != len(held.layers):
        have = "none" if held is None else f"of {len(held.layers)} tokens"
        raise BadData(f"row {row.id} has attention {have}, and the array is of shape {attention.shape}")
    tokens = list(zip(held.layers, held.kinds, strict=True))
    parts = []
    for layer, kind in dict.fromkeys(tokens):
        if kind == "all" or kind in GRID_SIDES:
            shares = attention[:, [token == (layer, kind) for token in tokens]].astype(np.float64)
            edge = side(shares.shape[1]) if kind == "all" else GRID_SIDES[kind]  # type: ignore[index]
            parts.append(shares[:, shares.shape[1] - edge**2 :].reshape(-1, edge, edge))
    if not parts:
        raise BadData(
            f"{row.probe} reads no patches, so that there is no map of its attention; allowed: probes over all tokens, such "
            "as all-tokens-last/attentive, or over pooled patches"
        )
    edge = max(part.shape[1] for part in parts)
    return np.sum([_spread(part, edge) for part in parts], axis=0)


def _spread(shares: np.ndarray, edge: int) -> np.ndarray:
    """[images, a, a] → [images, edge, edge] of the same sums: each share evenly over the part of the picture that it is of."""
    a = shares.shape[1]
    # Row i of the finer grid takes from row j of the coarser one what they overlap by.
    at = np.arange(edge)[:, None] / edge
    begin, end = np.maximum(at, np.arange(a) / a), np.minimum(at + 1 / edge, (np.arange(a) + 1) / a)
    weights = np.clip(end - begin, 0, None) * a
    return np.asarray(weights @ shares @ weights.T)


@dataclass(frozen=True, eq=False)
class Seen:
    """The test images of a row, in the order of its arrays, as its model saw them."""

    split: datasets.Split
    rows: np.ndarray  # [images] of the split
    steps: preprocessing.Preprocessing | None  # None where the model is not at hand: pictures are then shown whole

    @property
    def ids(self) -> list[str]:
        """By which the data set names them."""
        return [self.split.ids[row] for row in self.rows]

    def picture(self, number: int) -> Image.Image:
        """Image `number` of the arrays, resized and cropped as for the model.

        Raises:
            BadImage: it cannot be read.
        """
        image = self.split.image(int(self.rows[number]))
        if self.steps is None:
            return image
        pixels = np.moveaxis(self.steps.picture(image, self.ids[number]), 0, -1)
        if pixels.dtype != np.uint8:
            low, high = float(pixels.min()), float(pixels.max())
            pixels = ((pixels - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(pixels))


def seen(row: Row, *, cache: CachePath = None, dataset: str | None = None) -> Seen:
    """Find the images that a row was tested on.

    `cache` holds the row's test features, which say which images those are; `dataset` says where the data set is now.

    Raises:
        BadData: the features are gone, or the images are others than those tested on.
        UnknownName, Unavailable: the data set is not to be had.
    """
    entry = FeatureStore(cache).by_key(row.features[1])
    word = dataset or row.sources.dataset
    if entry is None:
        raise BadData(
            f"the test features of row {row.id} ({row.features[1]}) are not in the cache, so that nothing says which "
            f"images it was tested on; name the cache that has them with --cache, or extract {word} again"
        )
    steps, exif_transpose = _prepared(entry.spec.model.preprocess, row.sources.model)
    split = datasets.load(word, ReadOptions(exif_transpose=exif_transpose)).split("test")
    place = {name: number for number, name in enumerate(split.ids)}
    kept, rows = entry.samples, entry.rows()
    if any(kept.ids[number] not in place for number in rows):
        raise BadData(
            f"{word} has other test images than row {row.id} was tested on; give the same ones with --dataset"
        )
    return Seen(split, np.array([place[kept.ids[number]] for number in rows]), steps)


def _prepared(key: str, model: str) -> tuple[preprocessing.Preprocessing | None, bool]:
    """How the model's pictures were made, and whether images were turned first; None: nothing here says how."""
    steps, exif_transpose = preprocessing.from_key(key)
    if steps is not None:
        return steps, exif_transpose
    try:
        own = preprocessing.read(models.locate(model).folder)
    except MlfusionError:
        return None, exif_transpose
    return own if own.key(exif_transpose=exif_transpose) == key else None, exif_transpose
