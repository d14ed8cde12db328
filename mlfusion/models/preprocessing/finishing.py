"""Rescales and normalises pictures on the device that the model is on, with the bits that a processor computes.

A processor computes `Steps.finish`. On any other device a division may be a product with the reciprocal, which differs in the
last bit, and float64 may be absent. There are only 256 bytes a colour, so the processor computes them all once, and the device
looks the numbers up.
"""

import torch
from torch import Tensor

from mlfusion.models.preprocessing.processors import Preprocessing, TransformersProcessor
from mlfusion.shapes import Float, Num


class Finisher:
    """`finish` of a preprocessing for pictures that are on `device`."""

    def __init__(self, steps: Preprocessing, device: torch.device) -> None:
        self._steps = steps
        self._buffer: Tensor | None = None  # normalised pictures; reused, since new memory would be cleared each time
        self._table: Tensor | None = None  # [768]: the numbers of all bytes of the first colour, the second, the third
        self._colours: Tensor | None = None
        if device.type == "cpu" or isinstance(steps, TransformersProcessor):
            return
        if steps.dtype == torch.uint8:
            every_byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
            self._table = steps.finish(every_byte).flatten().to(device)
            self._offsets = torch.tensor([0, 256, 512], dtype=torch.int32).view(3, 1, 1).to(device)
        else:
            self._colours = steps.colours.to(device)

    def __call__(self, pictures: Num[Tensor, "B 3 height width"]) -> Float[Tensor, "B 3 height width"]:
        """Pictures as from `picture` → the model's input, float32, valid until the next call."""
        if self._table is not None:
            places = pictures.int().add_(self._offsets)
            return self._table.index_select(0, places.flatten()).view(pictures.shape)
        if self._colours is not None:
            return pictures.sub(self._colours[0]).div_(self._colours[1])
        if self._buffer is None or len(self._buffer) < len(pictures):
            self._buffer = torch.empty(pictures.shape, device=pictures.device)
        return self._steps.finish(pictures, self._buffer)

    def release(self) -> None:
        """Give the reused memory back."""
        self._buffer = None
