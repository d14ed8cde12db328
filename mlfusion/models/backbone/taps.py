"""Values that say where the tokens of a layer come from, which of them are patches, and in which order the patches stand."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from mlfusion.shapes import Float

Grid = tuple[int, int]
"""Rows and columns of an image's patches."""


class StopForward(Exception):
    """Ends a forward pass early, from inside a hook, once the deepest layer asked for has been read. It is not an error."""


@dataclass(frozen=True)
class Special:
    """Positions in the sequence of the tokens that are not patches."""

    cls: tuple[int, ...] = ()
    dist: tuple[int, ...] = ()
    registers: tuple[int, ...] = ()
    other: tuple[int, ...] = ()  # of unknown purpose, such as YOLOS' detection tokens

    @property
    def every(self) -> tuple[int, ...]:
        """All positions, sorted."""
        return tuple(sorted((*self.cls, *self.dist, *self.registers, *self.other)))


@dataclass(frozen=True)
class Tap:
    """The place where one layer's tokens are read, and what they are."""

    module: nn.Module
    entering: bool = False  # read the module's input, not its output
    norm: nn.Module | None = None  # applied to all tokens that are read
    channels_first: bool = False  # 4-D maps are [images, channels, height, width]
    tokens: int = 0  # per image, special tokens included
    width: int = 0  # channels of a token
    grid: Grid | None = None  # of the patches; None if their order is unknown
    order: tuple[int, ...] | None = field(
        default=None, repr=False
    )  # raster place → patch; None: patches are in raster order

    def sequence(self, output: Float[Tensor, "B ..."]) -> Float[Tensor, "B T D"]:
        """The module's output or input as a sequence of tokens; 4-D maps are flattened in raster order."""
        if output.ndim == 4:
            output = output.flatten(2).transpose(1, 2) if self.channels_first else output.flatten(1, 2)
        return output if self.norm is None else self.norm(output)
