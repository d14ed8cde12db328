"""Axes of tensors and arrays in signatures, checked by the tests and free of cost for users, who need no jaxtyping.

`Float[Tensor, "B T D"]` is jaxtyping's notation. Where jaxtyping is loaded already, as `tests/conftest.py` does, it is
jaxtyping's own type, and every call of an annotated function is checked by beartype; everywhere else it is plain `Tensor`.
An axis of one name has a space before it, `" K"`, so that ruff does not take it for the name of a type. Letters mean the
same everywhere: K configurations (of a population), B images (of a batch), T tokens (of an image), D width (of a token),
H attention heads, E width of a head, C classes, N rows (of a data set), L layers, KH or KHE those axes flattened into one.
"""

import sys
from typing import TYPE_CHECKING, Any

__all__ = ["Bool", "Float", "Int", "Num", "Shaped", "UInt8"]

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int, Num, Shaped, UInt8
else:

    class Unchecked:
        """Stand-in for jaxtyping's types."""

        def __class_getitem__(cls, array_and_axes: tuple[Any, str]) -> Any:
            """`Float[Tensor, "B T D"]` → `Tensor`."""
            return array_and_axes[0]

    Bool = Float = Int = Num = Shaped = UInt8 = Unchecked
