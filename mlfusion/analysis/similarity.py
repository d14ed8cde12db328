"""How like the last layer's tokens those of each layer are, from cached features: what stands beside accuracy by layer."""

from collections.abc import Callable, Iterable

import numpy as np

from mlfusion.results import Row
from mlfusion.specs.identity import STUDY_KINDS, TokenKind
from mlfusion.statistics.cka import Kernel, cka_with
from mlfusion.store import CachePath, Entry, FeatureStore

MOST_IMAGES = 2_000
"""Of the test images, evenly spread: the unbiased estimate needs no more, and many would take minutes."""

Similar = dict[tuple[str, str], dict[Kernel, dict[str, dict[int, float]]]]
"""{(model, data set): {kernel: {token kind: {layer: CKA with the last layer}}}}."""


def to_the_last(
    rows: Iterable[Row], *, cache: CachePath = None, say: Callable[[str], None] = lambda _: None
) -> Similar:
    """CKA (unbiased), linear and by an RBF, of every cached layer's CLS and AP tokens with the last one's, on the test images.

    The features of `rows` are read by their keys; `say` is told of those that are no longer cached.

    Raises:
        CacheUnusable: a checksum is wrong.
    """
    store = FeatureStore(cache)
    found: Similar = {}
    wanted = {(row.model, row.dataset): row.features[1] for row in rows if "-layer-" in row.probe}
    for (model, dataset), key in wanted.items():
        entry = store.by_key(key)
        if entry is None:
            say(f"no similarity for {model} on {dataset}: its test features ({key}) are not in {store.root} any more")
            continue
        both: dict[Kernel, dict[str, dict[int, float]]] = {"linear": {}, "rbf": {}}
        for kind in STUDY_KINDS:
            layers = sorted(layer for layer, held in entry.complete_pairs() if held == kind)
            if len(layers) < 2 or layers[-1] != entry.spec.model.depth:
                continue
            last = _tokens(entry, kind, layers[-1])
            like = {kernel: cka_with(last, kernel=kernel) for kernel in both}
            for layer in layers:
                tokens = _tokens(entry, kind, layer)
                for kernel, of in like.items():
                    both[kernel].setdefault(kind, {})[layer] = of(tokens)
        if both["linear"]:
            found[model, dataset] = both
    return found


def _tokens(entry: Entry, kind: TokenKind, layer: int) -> np.ndarray:
    """[images, width] float32 of one layer, of at most MOST_IMAGES images."""
    with entry.open((layer,), (kind,)) as reader:
        rows = np.linspace(0, len(reader) - 1, min(len(reader), MOST_IMAGES)).astype(np.int64)
        return np.asarray(reader[rows], np.float32)[:, 0, 0]
