"""Finds which tokens are patches, which are special, and in which order the patches stand, from what the embedding gives.

A binary code tells patches from other tokens and gives their order: in the k-th picture, patch number n shows one of two
textures, as the k-th binary digit of n says. Tokens that are the same in all pictures are CLS, registers and their like.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mlfusion.errors import BadModel
from mlfusion.models.backbone.taps import Grid, Special, StopForward, Tap

ToArguments = Callable[[Tensor], dict[str, Any]]
"""Prepared pictures [images, channels, height, width] → the arguments of a model's forward."""

SPECIAL_NAMES = (
    ("cls", re.compile(r"(^|[._])(cls|class)[\w]*?(token|embedding)s?$")),
    ("dist", re.compile(r"dist\w*_?token")),
    ("registers", re.compile(r"reg\w*token|storage_token|registers?$")),
)
"""Kind of special token → what its parameter is called."""


@dataclass(frozen=True)
class TokenLayout:
    """Positions of special tokens and patches in the sequence that enters the first block."""

    special: Special
    order: tuple[int, ...] | None  # raster place of each patch; None: unknown
    aspect: float  # height by width of the image
    encoder: Any = None  # Hiera keeps its patches in an order of its own, stage by stage, and knows the way back

    def place(self, tap: Tap, stage: int) -> Tap:
        """The tap with the grid of its patches and their order, as far as they are known."""
        patches = tap.tokens - len(self.special.every)
        grid = grid_of(patches, self.aspect)
        if self.encoder is not None:
            places = self._reroll(patches, stage)
            if places is None:
                return tap
            return replace(tap, grid=grid, order=places if places != tuple(range(patches)) else None)
        if self.order is None or self.order == tuple(range(len(self.order))):
            return replace(tap, grid=grid)  # in order; a convolutional stem and merged patches keep the raster
        if len(self.order) != patches:
            return tap
        return replace(tap, grid=grid, order=tuple(sorted(range(patches), key=self.order.__getitem__)))

    def _reroll(self, patches: int, stage: int) -> tuple[int, ...] | None:
        numbers = torch.arange(patches)[None, :, None]
        try:
            return tuple(self.encoder.reroll(numbers, stage_idx=stage).flatten().tolist())
        except RuntimeError:  # it knows the way for pictures of its own size only
            return None


def find_layout(
    model: nn.Module, to_arguments: ToArguments, entry: Tap, pixels: tuple[int, ...], name: str
) -> TokenLayout:
    """Find special tokens and the order of the patches from a few embeddings, which are read at `entry`.

    Raises:
        BadModel: no token depends on the image.
    """

    def embedding(picture: Tensor) -> Tensor:
        """[channels, height, width] → [tokens, width] float32."""
        captured: list[Tensor] = []

        def stop(tensor: Tensor) -> None:
            captured.append(tensor)
            raise StopForward

        with entry.hook(stop, name), suppress(StopForward):
            model(**to_arguments(picture[None]))
        return entry.sequence(captured[0])[0].float()

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(*pixels, generator=generator).to(device) for _ in range(2))
    of_one, of_other = embedding(one), embedding(other)
    moved = (of_one != of_other).any(-1)
    if not moved.any():
        raise BadModel(f"{name}: no token depends on the image")
    special = _special(model, [at for at, moves in enumerate(moved.tolist()) if not moves])
    aspect = pixels[1] / pixels[2]
    encoder = next((module for module in model.modules() if hasattr(module, "reroll")), None)
    order = None
    if (grid := grid_of(int(moved.sum()), aspect)) is not None:
        numbers = _patch_numbers(grid, pixels[1:]).to(device)
        order = _decode(
            lambda bits: embedding(torch.where(bits, other, one))[moved], numbers, of_one[moved], of_other[moved]
        )
    return TokenLayout(special, order, aspect, encoder)


def _patch_numbers(grid: Grid, size: tuple[int, ...]) -> Tensor:
    """[height, width] int64: the number of the patch that each pixel belongs to, in raster order."""
    rows, columns = (
        torch.div(torch.arange(side), side // count, rounding_mode="floor").clamp(max=count - 1)
        for side, count in zip(size, grid, strict=True)
    )
    return rows[:, None] * grid[1] + columns


def _decode(embed: Callable[[Tensor], Tensor], numbers: Tensor, zeros: Tensor, ones: Tensor) -> tuple[int, ...] | None:
    """The raster place of each patch, read off a binary code; None: patches overlap, so that no code can be read.

    Args:
        embed: mask [height, width] of the pixels that show the texture of a one → patch tokens [patches, width].
        numbers: [height, width], the patch that each pixel belongs to.
        zeros: [patches, width], the patch tokens where all pixels show the texture of a zero.
        ones: [patches, width], where all show that of a one.
    """
    patches = len(zeros)
    apart = (zeros - ones).norm(dim=-1)
    places = torch.zeros(patches, dtype=torch.long, device=zeros.device)
    for digit in range(max(1, (patches - 1).bit_length())):
        shown = embed((numbers >> digit & 1).bool())
        to_zero, to_one = (shown - zeros).norm(dim=-1), (shown - ones).norm(dim=-1)
        if (torch.minimum(to_zero, to_one) > 0.01 * apart).any():
            return None  # patches overlap, as behind a convolutional stem
        places += (to_one < to_zero).long() << digit
    return tuple(places.tolist()) if sorted(places.tolist()) == list(range(patches)) else None


def _special(model: nn.Module, still: Sequence[int]) -> Special:
    """Name the tokens at the positions `still`, in order, by the parameters that they come from: CLS, then the others."""
    counts: dict[str, int] = {}
    for path, parameter in model.named_parameters():
        for kind, pattern in SPECIAL_NAMES:
            if pattern.search(path) and "mask" not in path and "position" not in path:
                counts[kind] = counts.get(kind, 0) + (parameter.shape[-2] if parameter.ndim > 1 else 1)
                break
    # RADIO keeps both in one parameter, and says in its configuration how many are class tokens.
    classes = getattr(getattr(model, "config", None), "num_cls_tokens", None)
    if isinstance(classes, int) and classes < counts.get("cls", 0):
        counts["registers"] = counts.get("registers", 0) + counts["cls"] - classes
        counts["cls"] = classes
    front = [at for rank, at in enumerate(still) if at == rank]
    places: dict[str, tuple[int, ...]] = {}
    for kind, _ in SPECIAL_NAMES:
        places[kind], front = tuple(front[: counts.get(kind, 0)]), front[counts.get(kind, 0) :]
    known = {at for some in places.values() for at in some}
    return Special(**places, other=tuple(at for at in still if at not in known))


def grid_of(patches: int, aspect: float) -> Grid | None:
    """Rows and columns of this many patches on an image of this height by width; None if they fill no grid."""
    rows = round(math.sqrt(patches * aspect))
    return (rows, patches // rows) if rows and patches % rows == 0 else None
