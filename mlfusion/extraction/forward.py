"""Runs a frozen model on batches that fit into memory: sized by a measured pass, halved when memory runs out."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mlfusion.errors import MlfusionError
from mlfusion.models.backbone import Backbone
from mlfusion.models.preprocessing import Preprocessing
from mlfusion.specs.identity import Pair
from mlfusion.system import memory

MAX_BATCH_SIZES = {"cpu": 32, "cuda": 256, "mps": 64}
"""Largest number of images in a pass by device; more are no faster (docs/measurements/speed.md)."""

MEMORY_SHARE = 0.6  # share of the free memory that one pass may use
TRIAL_IMAGES = 2  # number of images in the measured pass


class Forward:
    """A backbone with a batch size that fits into memory."""

    def __init__(
        self, backbone: Backbone, steps: Preprocessing, pairs: Iterable[Pair], batch_size: int | None = None
    ) -> None:
        """If `batch_size` is None, it is estimated by a measured pass over two images, up to MAX_BATCH_SIZES."""
        self.backbone, self.steps = backbone, steps
        self.batch_size = batch_size or self._fitting_batch_size(frozenset(pairs))
        self.shrunk = False  # whether memory ran out and the batch size was halved
        self.passes = 0
        self.seconds = 0.0
        self.wait_for_copy: Callable[[], None] = lambda: None  # returns when the last pictures are on the device
        self._buffer: Tensor | None = None  # normalised pictures; reused, since new memory would be cleared each time

    def __call__(self, pictures: Tensor, pairs: frozenset[Pair]) -> dict[Pair, Tensor]:
        """Preprocessed pictures → float32 tokens on the model's device, possibly still being computed.

        Raises:
            MlfusionError: the memory is too small for one image.
        """
        start = time.perf_counter()
        parts: list[dict[Pair, Tensor]] = []
        at = 0
        while at < len(pictures):
            piece = pictures[at : at + self.batch_size]
            tokens = self._pass(piece, pairs)
            if tokens is not None:
                parts.append(tokens)
                at += len(piece)
            elif len(piece) == 1:
                raise MlfusionError(
                    f"there is no memory on {self.backbone.device} for one image in {self.backbone.name}; allowed: "
                    "--compute bfloat16, a smaller --size, --device cpu, or a smaller model. What was extracted is kept"
                )
            else:
                self.batch_size, self.shrunk = max(1, len(piece) // 2), True
        self.seconds += time.perf_counter() - start
        return parts[0] if len(parts) == 1 else {pair: torch.cat([part[pair] for part in parts]) for pair in parts[0]}

    def _pass(self, pictures: Tensor, pairs: frozenset[Pair]) -> dict[Pair, Tensor] | None:
        """Run one pass; None if memory ran out. A failed pass releases its memory, so that a smaller one may fit."""
        try:
            tokens = self.backbone(self._to_device(pictures), pairs)
        except (RuntimeError, MemoryError) as err:
            if not memory.is_shortage(err):
                raise
            self._buffer = None
        else:
            self.passes += 1
            return tokens
        memory.empty_cache(self.backbone.device.type)
        return None

    def _to_device(self, pictures: Tensor) -> Tensor:
        on_device = pictures.to(self.backbone.device, non_blocking=True)
        if on_device.is_cuda:
            event = torch.cuda.Event()
            event.record()
            self.wait_for_copy = event.synchronize
        if self._buffer is None or len(self._buffer) < len(on_device):
            self._buffer = torch.empty(on_device.shape, device=on_device.device)
        return self.steps.finish(on_device, self._buffer)

    def _fitting_batch_size(self, pairs: frozenset[Pair]) -> int:
        kind = self.backbone.device.type
        largest = MAX_BATCH_SIZES.get(kind, MAX_BATCH_SIZES["cpu"])
        blank = torch.zeros(TRIAL_IMAGES, 3, *self.steps.pixels, dtype=self.steps.dtype)
        try:
            with memory.measured(kind) as peak_bytes:
                self.backbone(self.steps.finish(blank.to(self.backbone.device)), pairs)
        except (RuntimeError, MemoryError) as err:
            if not memory.is_shortage(err):
                raise
            return 1
        fits = int(MEMORY_SHARE * memory.available(str(self.backbone.device)) / max(peak_bytes() / TRIAL_IMAGES, 1))
        return max(1, min(largest, 1 << max(fits, 1).bit_length() - 1))
