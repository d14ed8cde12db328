"""Images by formula: the training data of the embedded model, instead of photographs.

Formula-driven supervised learning (Kataoka et al., arXiv 2101.08515 and 2206.09132; Takashima et al., arXiv 2303.01112)
computes images and labels from formulas. A *class* is a set of formula parameters; an *instance* is one rendering of them,
with new phases, noise and small deformations. It needs no photographs, licence or download, and the size of the data set is
free. `pattern` draws one picture, `draw_into` many into one array; `scenes` adds colour, background and viewpoint.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlfusion.embedded.plane import stream
from mlfusion.embedded.shapes import SHAPES
from mlfusion.embedded.textures import TEXTURES

FAMILIES = SHAPES | TEXTURES


def pattern(family: str, klass: int, instance: int, px: int = 96, seed: int = 0) -> np.ndarray:
    """One gray picture, uint8 `[px, px]`: 0 is the empty ground, 255 full ink. A pure function of the arguments."""
    draw = FAMILIES[family]
    gray = draw(stream("class", seed, family, klass), stream("instance", seed, family, klass, instance), px)
    return (gray * 255 + 0.5).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Many patterns in one array, with their labels."""

    ink: np.ndarray  # uint8 [patterns, px, px]
    labels: np.ndarray  # int64 [patterns]: class, counted over all families
    shapes: np.ndarray  # int64: the rows that are shapes
    textures: np.ndarray  # int64: the rows that are textures
    classes: int


def draw_into(
    ink: np.ndarray,
    families: Sequence[str],
    classes: int,
    instances: int,
    seed: int,
    progress: Callable[[dict[str, Any]], None],
) -> None:
    """Draw `instances` of every class of every family into an array `[patterns, px, px]`, such as a memory map."""
    rows = [(f, k, i) for f in families for k in range(classes) for i in range(instances)]
    start = time.perf_counter()
    for row, (family, klass, instance) in enumerate(rows):
        ink[row] = pattern(family, klass, instance, ink.shape[1], seed)
        if (row + 1) % 256 == 0 or row + 1 == len(rows):
            progress({"stage": "draw", "done": row + 1, "of": len(rows), "seconds": time.perf_counter() - start})


def label_bank(ink: np.ndarray, families: Sequence[str], classes: int, instances: int) -> Bank:
    """The patterns that `draw_into` drew, with their labels."""
    is_shape = np.repeat([f in SHAPES for f in families], classes * instances)
    return Bank(
        ink=ink,
        labels=np.repeat(np.arange(len(families) * classes), instances),
        shapes=np.flatnonzero(is_shape),
        textures=np.flatnonzero(~is_shape),
        classes=len(families) * classes,
    )
