"""Figures of test images for a report: attention maps on images, and images that a probe reads in early or late layers."""

from collections.abc import Callable, Sequence

import numpy as np

from mlfusion.analysis.attention import maps, row_images
from mlfusion.errors import BadData, MlfusionError
from mlfusion.report import Picture, Strip, early_and_late
from mlfusion.report.pictures import mean_layers
from mlfusion.results import Results, Row
from mlfusion.store import CachePath

COUNT = 6  # number of images in a strip


def of_row(
    row: Row, results: Results, *, cache: CachePath = None, dataset: str | None = None, count: int = COUNT
) -> list[Strip]:
    """Strips of a row's attention: maps on some images, if the probe reads patches; the images with the earliest and the
    latest mean layer, if it reads several layers.

    Args:
        row: a row of an attentive probe.
        results: the results that hold the arrays of the row.
        cache: root of the cache that holds the test features of the row.
        dataset: name or path of the data set, if it has moved.
        count: number of images in a strip.

    Raises:
        BadData: the probe does not attend to patches or layers, or alike for every image; or the data set has other images.
        ResultsUnusable: the arrays of the row are missing.
        MlfusionError: the data set is not available.
    """
    layout = row.attention
    spatial = layout is not None and any(kind not in ("cls", "ap") for kind in layout.kinds)
    layered = layout is not None and len(set(layout.layers)) > 1
    if layout is None or not (spatial or layered):
        raise BadData(
            f"{row.probe} attends to neither patches nor layers; allowed: attentive probes over all tokens or over several "
            "layers, such as aat and alf"
        )
    arrays = results.arrays(row)
    shares, labels = arrays["attention"], arrays["labels"]
    images = row_images(row, cache=cache, dataset=dataset)
    if len(images.rows) != len(shares):
        raise BadData(f"row {row.id} was tested on {len(shares)} images, and its features have {len(images.rows)}")
    captions = _captions(row, arrays)
    strips = []
    if spatial:
        shares_on_patches = maps(row, shares)
        pictures = tuple(Picture(images.picture(n), captions[n], shares_on_patches[n]) for n in examples(labels, count))
        description = (
            f"{row.probe} of {row.model}, seed {row.seed}: brighter patches get more of its attention. On average "
            f"{100 * float(shares_on_patches.sum((1, 2)).mean()):.0f} % of it goes to patches, the rest to other tokens."
        )
        strips.append(Strip("Attention on patches", description, pictures, name=f"map-{row.model}"))
    if layered:
        strips += early_and_late(shares, layout.layers, lambda n: Picture(images.picture(n), captions[n]), count)
    if not strips:
        mean = float(mean_layers(shares, layout.layers).mean())
        raise BadData(
            f"the attention of result {row.id} ({row.probe}) over layers does not depend on the image (mean layer {mean:.1f} "
            "for all), so none is read early or late and nothing is drawn; allowed: another seed, or a probe that attends to "
            "patches, such as aat"
        )
    return strips


def of_study(
    rows: Sequence[Row], results: Results, *, cache: CachePath = None, log: Callable[[str], None] = lambda _: None
) -> dict[str, list[Strip]]:
    """The strips of the first attentive model of each data set: AAT's attention maps, and ALF's early and late images.

    Strips whose images or features are not available are left out with a message to `log`.
    """
    strips: dict[str, list[Strip]] = {}
    for dataset in dict.fromkeys(row.dataset for row in rows):
        candidates = [row for row in rows if row.dataset == dataset and row.attention is not None]
        for probe in ("all-tokens-last/attentive", "cls+ap-all-layers/attentive"):
            row = next((row for row in candidates if row.probe == probe and row.model == candidates[0].model), None)
            if row is None:
                continue
            try:
                strips.setdefault(dataset, []).extend(of_row(row, results, cache=cache))
            except MlfusionError as err:
                log(f"no pictures of {dataset} by {probe}: {' '.join(str(err).split())}")
    return {dataset: dataset_strips for dataset, dataset_strips in strips.items() if dataset_strips}


def examples(labels: np.ndarray, count: int) -> list[int]:
    """Select `count` images of as many classes as possible: the first of each class, then the second."""
    if labels.ndim != 1 or labels.dtype.kind == "f":
        return list(range(min(count, len(labels))))
    rank = np.empty(len(labels), np.int64)  # the position of each image in its class
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rank[rows] = np.arange(len(rows))
    return sorted(int(row) for row in np.lexsort((labels, rank))[:count])


def _captions(row: Row, arrays: dict[str, np.ndarray]) -> list[str]:
    """The class of each image, and the predicted class if it is wrong."""
    labels, predicted, names = arrays["labels"], arrays["probabilities"], row.classes
    if labels.ndim != 1 or labels.dtype.kind == "f" or not names:
        return [""] * len(labels)
    return [
        names[true] if true == guess else f"{names[true]}, taken for {names[guess]}"
        for true, guess in zip(labels, predicted.argmax(1), strict=True)
    ]
