"""Pictures for a report: test images with what a probe attended to drawn on them, and those that it reads early or late.

Which images and where on them follows from the arrays kept beside rows; the images are opened only to be drawn.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mlfusion.analysis.attention import maps, seen
from mlfusion.errors import BadData, MlfusionError
from mlfusion.report import Picture, Strip, early_and_late
from mlfusion.results import Results, Row
from mlfusion.store import CachePath

COUNT = 6  # pictures of a strip


def of_row(
    row: Row, results: Results, *, cache: CachePath = None, dataset: str | None = None, count: int = COUNT
) -> list[Strip]:
    """What a row's attention shows: a map on each of some images, if it reads patches; the images that lean to early and to
    late layers, if it reads several.

    Args:
        row: of a probe that attends.
        results: they hold its arrays.
        cache: holds its test features, which say which images they are.
        dataset: where the data set is, if it has moved.
        count: pictures of a strip.

    Raises:
        BadData: the probe does not attend to patches or layers, or the images are others.
        ResultsUnusable: its arrays are gone.
        MlfusionError: the data set is not to be had.
    """
    held = row.attention
    spatial = held is not None and any(kind not in ("cls", "ap") for kind in held.kinds)
    layered = held is not None and len(set(held.layers)) > 1
    if held is None or not (spatial or layered):
        raise BadData(
            f"{row.probe} attends to neither patches nor layers; allowed: attentive probes over all tokens or over several "
            "layers, such as aat and alf"
        )
    arrays = results.arrays(row)
    shares, labels = arrays["attention"], arrays["labels"]
    images = seen(row, cache=cache, dataset=dataset)
    if len(images.rows) != len(shares):
        raise BadData(f"row {row.id} was tested on {len(shares)} images, and its features have {len(images.rows)}")
    captions = _captions(row, arrays)
    strips = []
    if spatial:
        drawn = maps(row, shares)
        pictures = tuple(Picture(images.picture(n), captions[n], drawn[n]) for n in examples(labels, count))
        description = (
            f"{row.probe} of {row.model}, seed {row.seed}: brighter patches get more of its attention. On average "
            f"{100 * float(drawn.sum((1, 2)).mean()):.0f} % of it goes to patches, the rest to other tokens."
        )
        strips.append(Strip("Attention on patches", description, pictures, name=f"map-{row.model}"))
    if layered:
        strips += early_and_late(shares, held.layers, lambda n: Picture(images.picture(n), captions[n]), count)
    return strips


def of_study(
    rows: Sequence[Row], results: Results, *, cache: CachePath = None, say: Callable[[str], None] = lambda _: None
) -> dict[str, list[Strip]]:
    """The strips of each data set: of the first model there that has them, all tokens' maps and ALF's early and late images.

    What cannot be drawn, since images or features are not at hand, is said and left out.
    """
    found: dict[str, list[Strip]] = {}
    for dataset in dict.fromkeys(row.dataset for row in rows):
        mine = [row for row in rows if row.dataset == dataset and row.attention is not None]
        for probe in ("all-tokens-last/attentive", "cls+ap-all-layers/attentive"):
            one = next((row for row in mine if row.probe == probe and row.model == mine[0].model), None)
            if one is None:
                continue
            try:
                found.setdefault(dataset, []).extend(of_row(one, results, cache=cache))
            except MlfusionError as err:
                say(f"no pictures of {dataset} by {probe}: {' '.join(str(err).split())}")
    return {dataset: strips for dataset, strips in found.items() if strips}


def examples(labels: np.ndarray, count: int) -> list[int]:
    """So many images, of as many classes as there are that many: the first of each, then the second."""
    if labels.ndim != 1 or labels.dtype.kind == "f":
        return list(range(min(count, len(labels))))
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        turn[rows] = np.arange(len(rows))
    return sorted(int(row) for row in np.lexsort((labels, turn))[:count])


def _captions(row: Row, arrays: dict[str, np.ndarray]) -> list[str]:
    """What each image is, and what it was taken for where that is something else."""
    labels, predicted, names = arrays["labels"], arrays["probabilities"], row.classes
    if labels.ndim != 1 or labels.dtype.kind == "f" or not names:
        return [""] * len(labels)
    return [
        names[true] if true == taken else f"{names[true]}, taken for {names[taken]}"
        for true, taken in zip(labels, predicted.argmax(1), strict=True)
    ]
