"""Computes the similarity (CKA) of each layer's tokens with the last layer's from cached features."""

from collections.abc import Callable, Iterable

import numpy as np

from mlfusion.report.figures.layers import Cka
from mlfusion.results import Row
from mlfusion.specs.identity import STUDY_KINDS, TokenKind
from mlfusion.statistics.cka import Kernel, cka_with
from mlfusion.store import CachePath, Entry, FeatureStore

MAX_IMAGES = 2_000  # evenly spaced test images: enough for the unbiased estimate; more would take minutes


def similarity_to_last(
    rows: Iterable[Row], *, cache: CachePath = None, log: Callable[[str], None] = lambda _: None
) -> Cka:
    """Unbiased CKA, linear and RBF, of the CLS and AP tokens of every cached layer with the last layer's, on test images.

    `log` is called with a message for each row whose features are no longer cached.

    Raises:
        CacheUnusable: a checksum is wrong.
    """
    store = FeatureStore(cache)
    similarity: dict[tuple[str, str], dict[Kernel, dict[str, dict[int, float]]]] = {}
    keys = {(row.model, row.dataset): row.features[1] for row in rows if "-layer-" in row.probe}
    for (model, dataset), key in keys.items():
        entry = store.by_key(key)
        if entry is None:
            log(f"no similarity for {model} on {dataset}: its test features ({key}) are not in {store.root} any more")
            continue
        by_kernel: dict[Kernel, dict[str, dict[int, float]]] = {"linear": {}, "rbf": {}}
        for kind in STUDY_KINDS:
            layers = sorted(layer for layer, cached_kind in entry.complete_pairs() if cached_kind == kind)
            if len(layers) < 2 or layers[-1] != entry.spec.model.depth:
                continue
            last = _tokens(entry, kind, layers[-1])
            compare = {kernel: cka_with(last, kernel=kernel) for kernel in by_kernel}
            for layer in layers:
                tokens = _tokens(entry, kind, layer)
                for kernel, cka in compare.items():
                    by_kernel[kernel].setdefault(kind, {})[layer] = cka(tokens)
        if by_kernel["linear"]:
            similarity[model, dataset] = by_kernel
    return similarity


def _tokens(entry: Entry, kind: TokenKind, layer: int) -> np.ndarray:
    """[images, width] float32 of one layer, of at most MAX_IMAGES images."""
    with entry.open((layer,), (kind,)) as reader:
        rows = np.linspace(0, len(reader) - 1, min(len(reader), MAX_IMAGES)).astype(np.int64)
        return np.asarray(reader[rows], np.float32)[:, 0, 0]
