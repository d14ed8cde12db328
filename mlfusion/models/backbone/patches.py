"""Finds the patches among the tokens that enter each block, the special tokens, and the order of the patches.

Special tokens, such as CLS and registers, are equal in two pictures where they enter the sequence: before the first block,
and before every block that gets another number of tokens than the block before it gave (PVT adds its CLS token in the last
stage, EoMT its queries before the last blocks). Maps of four dimensions have none.

The order of the patches is read from a binary code: in the k-th picture, patch number n shows one of two textures, by the k-th
binary digit of n.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
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
    """Special tokens and patches of every block, by the block's number from 0."""

    specials: tuple[Special, ...]  # in the sequence that enters each block
    stages: tuple[int, ...]  # the list that holds each block
    maps: tuple[tuple[Grid, ...], ...]  # sides of the maps before each block, as `grid_of` takes them
    size: tuple[int, int]  # height and width of the image
    order: tuple[int, ...] | None  # raster place of each patch of the first block; None: unknown
    encoder: Any = None  # Hiera's, which reorders the patches in each stage, and can restore raster order

    def locate_patches(self, tap: Tap, block: int) -> Tap:
        """The tap with its special tokens, and the grid of its patches and their order, if these are known."""
        if tap.grid is not None:
            return tap  # a map in raster order, without special tokens
        tap = replace(tap, special=self.specials[block])
        patches = tap.tokens - len(tap.special.all_positions)
        grid = grid_of(patches, self.maps[block], self.size)
        if self.encoder is not None:
            order = self._stage_order(patches, self.stages[block])
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


@dataclass(frozen=True)
class Trials:
    """Runs pictures through a model, and reads what enters its blocks."""

    model: nn.Module
    to_arguments: ToArguments
    pixels: tuple[int, ...]  # channels, height and width of a picture
    name: str  # the model's, for messages

    def textures(self) -> tuple[Tensor, Tensor]:
        """Two pictures of noise, [channels, height, width]."""
        generator, device = torch.Generator().manual_seed(1), next(self.model.parameters()).device
        zero, one = (torch.randn(*self.pixels, generator=generator).to(device) for _ in range(2))
        return zero, one

    def read(self, picture: Tensor, taps: Sequence[Tap]) -> list[Tensor]:
        """[channels, height, width] → the tokens at each place, [tokens, width] float32; the last one ends the pass."""
        tokens: dict[int, Tensor] = {}

        def keep(number: int, tensor: Tensor) -> None:
            tokens.setdefault(number, taps[number].sequence(tensor)[0].float())
            if len(tokens) == len(taps):
                raise StopForward

        with ExitStack() as hooks, suppress(StopForward):
            for number, tap in enumerate(taps):
                hooks.enter_context(tap.hook(partial(keep, number), self.name))
            self.model(**self.to_arguments(picture[None]))
        return [tokens[number] for number in range(len(taps))]


def find_special_tokens(trials: Trials, entries: Mapping[int, Tap]) -> dict[int, Special]:
    """Block → the special tokens from this block on, up to the next block that is given.

    `entries`: the inputs of the first block and of every block that gets another number of tokens than the block before gave.

    Raises:
        BadModel: no token depends on the image.
    """
    found: dict[int, Special] = {}
    special, before = Special(), 0
    names = _names_of_special_tokens(trials.model)
    sequences = [trials.read(texture, list(entries.values())) for texture in trials.textures()]
    for (block, tap), zero, one in zip(entries.items(), *sequences, strict=True):
        varies = (zero != one).any(-1).tolist()
        if not found and not any(varies):
            raise BadModel(f"{trials.name}: no token depends on the image")
        if tap.grid is None:  # of a map no place is a special token, even if a ReLU leaves it at zero
            kept = [at for at, changed in enumerate(varies) if changed]
            if len(kept) == before:  # the tokens of the block before, and new ones between them
                special = special.moved(kept)
            special = special.joined(_assign(names, [at for at, changed in enumerate(varies) if not changed]))
        found[block], before = special, len(varies)
    return found


def find_order(
    trials: Trials, entry: Tap, special: Special, grid: Grid, patch_px: int | None
) -> tuple[int, ...] | None:
    """The raster place of each patch that enters the first block; None if it cannot be read."""
    zero, one = trials.textures()
    patches = sorted(set(range(entry.tokens)) - set(special.all_positions))

    def embedding(picture: Tensor) -> Tensor:
        return trials.read(picture, [entry])[0][patches]

    numbers = _patch_numbers(grid, trials.pixels[1:], patch_px).to(zero.device)
    return _decode(lambda bits: embedding(torch.where(bits, one, zero)), numbers, embedding(zero), embedding(one))


def _patch_numbers(grid: Grid, size: tuple[int, ...], patch_px: int | None) -> Tensor:
    """[height, width] int64: the number of the patch that each pixel belongs to, in raster order."""
    steps = (
        patch_px if patch_px and side // patch_px == count else side // count
        for side, count in zip(size, grid, strict=True)
    )
    rows, columns = (
        torch.div(torch.arange(side), max(step, 1), rounding_mode="floor").clamp(max=count - 1)
        for side, count, step in zip(size, grid, steps, strict=True)
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


def _names_of_special_tokens(model: nn.Module) -> dict[str, int]:
    """Kind of special token → how many of them the model's parameters hold."""
    counts = dict.fromkeys((kind for kind, _ in SPECIAL_NAMES), 0)
    for path, parameter in model.named_parameters():
        for kind, pattern in SPECIAL_NAMES:
            if pattern.search(path) and "mask" not in path and "position" not in path:
                counts[kind] += parameter.shape[-2] if parameter.ndim > 1 else 1
                break
    # RADIO has CLS tokens and registers in one parameter; its configuration gives the number of CLS tokens.
    classes = getattr(getattr(model, "config", None), "num_cls_tokens", None)
    if isinstance(classes, int) and classes < counts["cls"]:
        counts["registers"] += counts["cls"] - classes
        counts["cls"] = classes
    return counts


def _assign(names: dict[str, int], constant: Sequence[int]) -> Special:
    """Give the leading ones of these positions, in order, to the kinds that `names` counts, and count these down."""
    leading = [position for index, position in enumerate(constant) if position == index]
    positions_of: dict[str, tuple[int, ...]] = {}
    for kind, count in names.items():
        positions_of[kind], leading = tuple(leading[:count]), leading[count:]
        names[kind] -= len(positions_of[kind])
    named = {position for positions in positions_of.values() for position in positions}
    return Special(**positions_of, other=tuple(position for position in constant if position not in named))


def grid_of(patches: int, maps: Sequence[Grid], size: tuple[int, int]) -> Grid | None:
    """Rows and columns of the patches of an image of this height and width; None if they fill no grid, or several.

    Args:
        maps: sides of the maps from which the tokens may come, the most likely first. Stages merge two by two: half of the
            sides, rounded up where the model pads (Swin), else down.
        size: height and width in pixels. If no map fits, any patch size counts of which so many patches fill the image.
    """
    for rows, columns in maps:
        for halvings in range(max(rows, columns).bit_length()):
            up, down = (-(-rows >> halvings), -(-columns >> halvings)), (rows >> halvings, columns >> halvings)
            for grid in (up, down):
                if math.prod(grid) == patches:
                    return grid
    height, width = size
    fitting = {
        grid
        for patch in range(1, max(size) + 1)
        for grid in ((height // patch, width // patch), (-(-height // patch), -(-width // patch)))
        if math.prod(grid) == patches
    }
    return fitting.pop() if len(fitting) == 1 else None
