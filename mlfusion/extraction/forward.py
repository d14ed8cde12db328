"""Runs a frozen model on batches that fit into memory: sized by a measured pass, halved when memory runs out."""

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from mlfusion.errors import MlfusionError, is_shortage
from mlfusion.extraction.transfers import Transfers, Wait, nothing
from mlfusion.models.backbone import Backbone
from mlfusion.models.preprocessing import Finisher, Preprocessing
from mlfusion.specs.identity import Pair
from mlfusion.system import memory

MAX_BATCH_SIZES = {"cpu": 32, "cuda": 256, "mps": 64}
"""Largest number of images in a pass by device; more are no faster (docs/measurements/speed.md)."""

MEMORY_SHARE = 0.6  # share of the free memory that one pass may use
TRIAL_IMAGES = 2  # number of images in the measured pass

Tokens = dict[Pair, Tensor]
T = TypeVar("T")


class Forward:
    """A backbone with a batch size that fits into memory."""

    def __init__(
        self, backbone: Backbone, steps: Preprocessing, pairs: Iterable[Pair], batch_size: int | None = None
    ) -> None:
        """If `batch_size` is None, it is estimated by a measured pass over two images, up to MAX_BATCH_SIZES."""
        self.backbone, self.steps = backbone, steps
        self.transfers = Transfers(backbone.device)
        self._finish = Finisher(steps, backbone.device)
        self.batch_size = batch_size or self._fitting_batch_size(frozenset(pairs))
        self.shrunk = False  # whether memory ran out and the batch size was halved
        self.passes = 0
        self.seconds = 0.0
        self.wait_for_copy: Wait = nothing  # returns when the last pictures are on the device

    def __call__(self, pictures: Tensor, pairs: frozenset[Pair]) -> Tokens:
        """Preprocessed pictures → float32 tokens on the model's device, possibly still being computed; errors as `pieces`."""
        parts = self.pieces(pictures, pairs, lambda tokens: tokens)
        return parts[0] if len(parts) == 1 else {pair: torch.cat([part[pair] for part in parts]) for pair in parts[0]}

    def pieces(self, pictures: Tensor, pairs: frozenset[Pair], then: Callable[[Tokens], T]) -> list[T]:
        """What `then` makes of the tokens of one piece of the pictures after another, each as large as memory allows.

        `then` computes on the device, and is called again for smaller pieces if memory runs out in it.

        Raises:
            MlfusionError: the memory is too small for one image.
        """
        start = time.perf_counter()
        parts: list[T] = []
        at = 0
        while at < len(pictures):
            piece = pictures[at : at + self.batch_size]
            part = self._pass(piece, pairs, then)
            if part is not None:
                parts += part
                at += len(piece)
            elif len(piece) == 1:
                raise MlfusionError(
                    f"there is no memory on {self.backbone.device} for one image in {self.backbone.name}; allowed: "
                    "--compute bfloat16, a smaller --size, --device cpu, or a smaller model. What was extracted is kept"
                )
            else:
                self.batch_size, self.shrunk = max(1, len(piece) // 2), True
        self.seconds += time.perf_counter() - start
        return parts

    def _pass(self, pictures: Tensor, pairs: frozenset[Pair], then: Callable[[Tokens], T]) -> list[T] | None:
        """Run one pass; None if memory ran out. A failed pass releases its memory, so that a smaller one may fit."""
        try:
            on_device, self.wait_for_copy = self.transfers.send(pictures)
            part = then(self.backbone(self._finish(on_device), pairs))
        except (RuntimeError, MemoryError) as err:
            if not is_shortage(err):
                raise
            self._finish.release()
        else:
            self.passes += 1
            return [part]
        memory.empty_cache(str(self.backbone.device))
        return None

    def _fitting_batch_size(self, pairs: frozenset[Pair]) -> int:
        device = self.backbone.device
        largest = MAX_BATCH_SIZES.get(device.type, MAX_BATCH_SIZES["cpu"])
        blank = torch.zeros(TRIAL_IMAGES, 3, *self.steps.pixels, dtype=self.steps.dtype)
        try:
            with memory.measured(str(device)) as peak_bytes:
                self.backbone(self._finish(blank.to(device)), pairs)
        except (RuntimeError, MemoryError) as err:
            if not is_shortage(err):
                raise
            return 1
        fits = int(MEMORY_SHARE * memory.available(str(device)) / max(peak_bytes() / TRIAL_IMAGES, 1))
        return max(1, min(largest, 1 << max(fits, 1).bit_length() - 1))
