"""Reads the tokens of a layer, finds the patches among them, and reduces them to the stored kinds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlfusion.models.backbone.tracing import first_tensor, tensor_of
from mlfusion.shapes import Float, Int
from mlfusion.specs.identity import GRID_SIDES, TokenKind

Grid = tuple[int, int]
"""Rows and columns of an image's patches."""


class StopForward(Exception):
    """Ends a forward pass, from inside a hook, after the deepest requested layer was read; it is not an error."""


@dataclass(frozen=True)
class Special:
    """Positions in the sequence of the tokens that are not patches."""

    cls: tuple[int, ...] = ()
    dist: tuple[int, ...] = ()
    registers: tuple[int, ...] = ()
    other: tuple[int, ...] = ()  # of unknown purpose, such as YOLOS' detection tokens

    @property
    def all_positions(self) -> tuple[int, ...]:
        """All positions, sorted."""
        return tuple(sorted((*self.cls, *self.dist, *self.registers, *self.other)))

    def moved(self, positions: Sequence[int]) -> "Special":
        """The same tokens where position p is now positions[p]."""
        return Special(*(tuple(positions[p] for p in getattr(self, kind.name)) for kind in fields(self)))

    def joined(self, other: "Special") -> "Special":
        """The tokens of both."""
        return Special(*(getattr(self, kind.name) + getattr(other, kind.name) for kind in fields(self)))


@dataclass(frozen=True)
class Tap:
    """The place where one layer's tokens are read, and what they are."""

    module: nn.Module
    at_input: bool = False  # read the module's input, not its output
    norm: nn.Module | None = None  # applied to all tokens that are read
    channels_first: bool = False  # 4-D maps are [images, channels, height, width]
    tokens: int = 0  # per image, special tokens included
    width: int = 0  # channels of a token
    special: Special = field(default=Special(), repr=False)
    grid: Grid | None = None  # of the patches; None if their order is unknown
    # Raster place → patch; None: patches are in raster order.
    order: tuple[int, ...] | None = field(default=None, repr=False)

    def hook(self, read: Callable[[Tensor], None], name: str) -> RemovableHandle:
        """Give `read` the tensor of this place in every pass, until the handle is removed; `name` is the model's."""
        if not self.at_input:
            return self.module.register_forward_hook(lambda _, __, output: read(tensor_of(output, name)))
        return self.module.register_forward_pre_hook(
            lambda _, args, kwargs: read(tensor_of(first_tensor((*args, *kwargs.values())), name)), with_kwargs=True
        )

    def sequence(self, output: Float[Tensor, "B ..."]) -> Float[Tensor, "B T D"]:
        """The module's output or input as a sequence of tokens; 4-D maps are flattened in raster order."""
        if output.ndim == 4:
            output = output.flatten(2).transpose(1, 2) if self.channels_first else output.flatten(1, 2)
        return output if self.norm is None else self.norm(output)


class Reducer:
    """Reduces the sequences of one layer to token kinds."""

    def __init__(self, tap: Tap) -> None:
        special, self._grid = tap.special, tap.grid
        self._order = torch.tensor(tap.order) if tap.order is not None else None
        self._positions = {kind: _positions(getattr(special, kind)) for kind in ("cls", "dist", "registers")}
        self._positions["patches"] = _positions(sorted(set(range(tap.tokens)) - set(special.all_positions)))

    def __call__(self, sequence: Float[Tensor, "B T D"], kind: TokenKind) -> Float[Tensor, "B tokens D"]:
        """The tokens of a kind; a copy, so that the whole layer can be freed."""
        if kind == "all":
            return sequence.clone()
        if kind in self._positions:
            return self._select(sequence, kind).clone()
        patches = self._select(sequence, "patches")
        if kind in GRID_SIDES:
            return self._pool(patches, GRID_SIDES[kind])
        return _STATISTICS[kind](patches)

    def _select(self, sequence: Float[Tensor, "B T D"], kind: str) -> Float[Tensor, "B _ D"]:
        positions = self._positions[kind]
        if isinstance(positions, Tensor):  # copied to the device once: each copy would wait until it has computed
            positions = self._positions[kind] = positions.to(sequence.device)
        return sequence[:, positions]

    def _pool(self, patches: Float[Tensor, "B patches D"], side: int) -> Float[Tensor, "B {side*side} D"]:
        """Means over a grid of side × side cells, in raster order; a patch at the border of two cells counts in both."""
        assert self._grid is not None
        if self._order is not None:
            self._order = self._order.to(patches.device)
            patches = patches[:, self._order]
        maps = patches.float().transpose(1, 2).unflatten(2, self._grid)
        if maps.device.type == "mps" and any(edge % side for edge in self._grid):  # which pools equal cells only
            return F.adaptive_avg_pool2d(maps.cpu(), side).flatten(2).transpose(1, 2).to(maps.device)
        return F.adaptive_avg_pool2d(maps, side).flatten(2).transpose(1, 2)


def _positions(positions: Sequence[int]) -> slice | Int[Tensor, " _"]:
    """The positions as a slice if they are contiguous, as in most models: a slice needs no index on the device."""
    contiguous = list(positions) == list(range(positions[0], positions[-1] + 1)) if positions else False
    return slice(positions[0], positions[-1] + 1) if contiguous else torch.tensor(positions, dtype=torch.int64)


# Means are computed in float32: a mean of hundreds of bfloat16 numbers is wrong in its third digit.
_STATISTICS: dict[TokenKind, Callable[[Tensor], Tensor]] = {
    "ap": lambda patches: patches.mean(1, keepdim=True, dtype=torch.float32),
    "max": lambda patches: patches.amax(1, keepdim=True),
    "std": lambda patches: patches.float().std(1, keepdim=True, correction=0),
}
