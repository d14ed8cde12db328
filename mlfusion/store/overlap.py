"""Finds the images that are in train and in test: by the digests of their bytes, and near copies by their cached tokens.

Near copies (encoded again, resized, a little brighter) have nearly the same tokens. Two images count as near copies if the
cosine of their tokens of the last layer, less the mean of train, is at least `NEAR`. docs/method.md gives the measured rates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlfusion.errors import CacheUnusable
from mlfusion.shapes import Bool, Float, Int
from mlfusion.specs.identity import ModelSpec, Pair
from mlfusion.store.entry import Entry

NEAR = 0.98
MAX_PRODUCTS = 2e12  # multiplications of the comparison of all test with all train images: half a minute on two cores
STEP = 4096  # images of train that are compared at once


@dataclass(frozen=True, eq=False)
class Overlap:
    """Images that are in train and in test. An image with equal bytes is not counted among the near copies."""

    bytes: int  # number of test images
    near: int | None  # number of test images; None: not compared
    train_rows: Int[np.ndarray, " n"]  # rows of train that are in test too, in either way
    reason: str = ""  # why near copies were not looked for


def compared_pair(model: ModelSpec) -> Pair:
    """The tokens that are compared: the class token of the last layer, or the mean of the patches if there is none."""
    return model.depth, "ap" if model.kinds and "cls" not in model.kinds else "cls"


def overlap(train: Entry, test: Entry) -> Overlap:
    """The images of train that are in test too; CacheUnusable if tokens are damaged, or digests of two sorts."""
    train_rows, test_rows = train.rows(), test.rows()
    a, b = (_digests(entry)[rows] for entry, rows in ((train, train_rows), (test, test_rows)))
    if a.dtype != b.dtype:
        raise CacheUnusable(
            f"{train.path} and {test.path} identify images by different digests, of different versions of mlfusion; extract "
            "both again by one command"
        )
    equal_train, equal_test = np.isin(a, b), np.isin(b, a)
    reason = _reason(train, test, len(a), len(b))
    if reason:
        return Overlap(int(equal_test.sum()), None, train_rows[equal_train], reason)
    near_train, near_test = _near(train, test)
    return Overlap(int(equal_test.sum()), int((near_test & ~equal_test).sum()), train_rows[equal_train | near_train])


def _reason(train: Entry, test: Entry, train_images: int, test_images: int) -> str:
    layer, kind = pair = compared_pair(train.spec.model)
    if pair not in train.complete_pairs() & test.complete_pairs():
        return f"the {kind} tokens of layer {layer} are not cached"
    if train_images * test_images * train.spec.model.width > MAX_PRODUCTS:
        return f"{train_images:,} by {test_images:,} images would take too long"
    return ""


def _digests(entry: Entry) -> np.ndarray:
    """The digests of all images as one value each, [images]."""
    digests = np.ascontiguousarray(entry.samples.digests)
    return digests.view(f"V{digests.shape[1]}")[:, 0]


def _near(train: Entry, test: Entry) -> tuple[Bool[np.ndarray, " N"], Bool[np.ndarray, " M"]]:
    """Which images of train are near one of test, and which of test are near one of train."""
    mean = np.mean([part.mean(0, dtype=np.float64) for part in _parts(train)], 0).astype(np.float32)
    tests = np.concatenate([_scaled(part - mean) for part in _parts(test)])
    near_train, near_test = [], np.zeros(len(tests), bool)
    for part in _parts(train):
        near = _scaled(part - mean) @ tests.T >= NEAR
        near_train.append(near.any(1))
        near_test |= near.any(0)
    return np.concatenate(near_train), near_test


def _parts(entry: Entry) -> Iterator[Float[np.ndarray, "b D"]]:
    """The compared tokens of all readable images, each scaled to length 1, some images at a time."""
    layer, kind = compared_pair(entry.spec.model)
    with entry.open([layer], [kind]) as reader:
        for start in range(0, len(reader), STEP):
            yield _scaled(reader[start : start + STEP].reshape(-1, reader.shape[-1]).astype(np.float32))


def _scaled(tokens: Float[np.ndarray, "b D"]) -> Float[np.ndarray, "b D"]:
    """Tokens scaled to length 1; their largest number is scaled to 1 first, so that no square overflows."""
    tokens = tokens / np.maximum(np.abs(tokens).max(-1, keepdims=True), np.finfo(np.float32).tiny)
    return tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
