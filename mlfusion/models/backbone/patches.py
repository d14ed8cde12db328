"""Finds the patches among the tokens of the embedding, the special tokens, and the order of the patches.

The order is read from a binary code: in the k-th picture, patch number n shows one of two textures, by the k-th binary digit
of n. Tokens that are equal in all pictures are special tokens, such as CLS and registers.
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
"""Kind of special token → pattern of its parameter's name."""


@dataclass(frozen=True)
class TokenLayout:
    """Positions of special tokens and patches in the sequence that enters the first block."""

    special: Special
    order: tuple[int, ...] | None  # raster place of each patch; None: unknown
    aspect: float  # ratio of the image's height to its width
    encoder: Any = None  # Hiera's, which reorders the patches in each stage, and can restore raster order

    def locate_patches(self, tap: Tap, stage: int) -> Tap:
        """The tap with the grid of its patches and their order, if these are known."""
        patches = tap.tokens - len(self.special.all_positions)
        grid = grid_of(patches, self.aspect)
        if self.encoder is not None:
            order = self._stage_order(patches, stage)
            if order is None:
                return tap
            return replace(tap, grid=grid, order=order if order != tuple(range(patches)) else None)
        if self.order is None or self.order == tuple(range(len(self.order))):
            return replace(tap, grid=grid)  # raster order, which a convolutional stem and merged patches keep
        if len(self.order) != patches:
            return tap
        return replace(tap, grid=grid, order=tuple(sorted(range(patches), key=self.order.__getitem__)))

    def _stage_order(self, patches: int, stage: int) -> tuple[int, ...] | None:
        indices = torch.arange(patches)[None, :, None]
        try:
            return tuple(self.encoder.reroll(indices, stage_idx=stage).flatten().tolist())
        except RuntimeError:  # it can do so only for pictures of its configured size
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
        read: list[Tensor] = []

        def stop(tensor: Tensor) -> None:
            read.append(tensor)
            raise StopForward

        with entry.hook(stop, name), suppress(StopForward):
            model(**to_arguments(picture[None]))
        return entry.sequence(read[0])[0].float()

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    zero, one = (torch.randn(*pixels, generator=generator).to(device) for _ in range(2))
    zero_tokens, one_tokens = embedding(zero), embedding(one)
    is_patch = (zero_tokens != one_tokens).any(-1)
    if not is_patch.any():
        raise BadModel(f"{name}: no token depends on the image")
    special = _name_special_tokens(model, [at for at, varies in enumerate(is_patch.tolist()) if not varies])
    aspect = pixels[1] / pixels[2]
    encoder = next((module for module in model.modules() if hasattr(module, "reroll")), None)
    order = None
    if (grid := grid_of(int(is_patch.sum()), aspect)) is not None:
        numbers = _patch_numbers(grid, pixels[1:]).to(device)
        zeros, ones = zero_tokens[is_patch], one_tokens[is_patch]
        order = _decode(lambda bits: embedding(torch.where(bits, one, zero))[is_patch], numbers, zeros, ones)
    return TokenLayout(special, order, aspect, encoder)


def _patch_numbers(grid: Grid, size: tuple[int, ...]) -> Tensor:
    """[height, width] int64: the number of the patch that each pixel belongs to, in raster order."""
    rows, columns = (
        torch.div(torch.arange(side), side // count, rounding_mode="floor").clamp(max=count - 1)
        for side, count in zip(size, grid, strict=True)
    )
    return rows[:, None] * grid[1] + columns


def _decode(embed: Callable[[Tensor], Tensor], numbers: Tensor, zeros: Tensor, ones: Tensor) -> tuple[int, ...] | None:
    """The raster place of each patch, by the binary code; None if patches overlap, so that the code cannot be read.

    Args:
        embed: mask [height, width] of the pixels that show the texture of a one → patch tokens [patches, width].
        numbers: [height, width], the patch that each pixel belongs to.
        zeros: [patches, width], the patch tokens of a picture that shows only the texture of a zero.
        ones: [patches, width], those of a picture that shows only the texture of a one.
    """
    patches = len(zeros)
    distance = (zeros - ones).norm(dim=-1)
    places = torch.zeros(patches, dtype=torch.long, device=zeros.device)
    for digit in range(max(1, (patches - 1).bit_length())):
        tokens = embed((numbers >> digit & 1).bool())
        to_zero, to_one = (tokens - zeros).norm(dim=-1), (tokens - ones).norm(dim=-1)
        if (torch.minimum(to_zero, to_one) > 0.01 * distance).any():
            return None  # patches overlap, as behind a convolutional stem
        places += (to_one < to_zero).long() << digit
    return tuple(places.tolist()) if sorted(places.tolist()) == list(range(patches)) else None


def _name_special_tokens(model: nn.Module, constant: Sequence[int]) -> Special:
    """Assign the tokens at the positions `constant`, in order, to the parameters of special tokens: CLS first, then others."""
    counts: dict[str, int] = {}
    for path, parameter in model.named_parameters():
        for kind, pattern in SPECIAL_NAMES:
            if pattern.search(path) and "mask" not in path and "position" not in path:
                counts[kind] = counts.get(kind, 0) + (parameter.shape[-2] if parameter.ndim > 1 else 1)
                break
    # RADIO has CLS tokens and registers in one parameter; its configuration gives the number of CLS tokens.
    classes = getattr(getattr(model, "config", None), "num_cls_tokens", None)
    if isinstance(classes, int) and classes < counts.get("cls", 0):
        counts["registers"] = counts.get("registers", 0) + counts["cls"] - classes
        counts["cls"] = classes
    leading = [position for index, position in enumerate(constant) if position == index]
    positions_of: dict[str, tuple[int, ...]] = {}
    for kind, _ in SPECIAL_NAMES:
        positions_of[kind], leading = tuple(leading[: counts.get(kind, 0)]), leading[counts.get(kind, 0) :]
    named = {position for positions in positions_of.values() for position in positions}
    return Special(**positions_of, other=tuple(position for position in constant if position not in named))


def grid_of(patches: int, aspect: float) -> Grid | None:
    """Rows and columns of a grid of `patches` on an image of this ratio of height to width; None if they fill no grid."""
    rows = round(math.sqrt(patches * aspect))
    return (rows, patches // rows) if rows and patches % rows == 0 else None
