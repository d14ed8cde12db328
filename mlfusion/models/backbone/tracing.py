"""Records one forward pass: the order of module calls, and the shapes of their inputs and outputs. It keeps no tensor alive.

Serial numbers identify tensors: the same number is the same tensor object. So the code sees that a norm feeds an MLP without
a table of module names, which change between versions of transformers.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mlfusion.errors import BadModel


@dataclass
class Call:
    """One run of one module. Times are steps of a common clock."""

    module: nn.Module
    begin: int
    end: int = -1
    given: int = -1  # serial number of its first tensor
    given_shape: tuple[int, ...] = ()
    made: int = -1  # of its first output
    made_shape: tuple[int, ...] = ()


class Watch:
    """The calls of one forward pass, in the order in which they began."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._serials: Any = WeakIdKeyDictionary()
        self._clock, self._numbers = count(), count()
        self._open: list[Call] = []

    def first(self, module: nn.Module) -> Call | None:
        """The first run of a module."""
        return next((call for call in self.calls if call.module is module), None)

    def within(self, outer: Call) -> Iterator[Call]:
        """Calls that began and ended during another."""
        return (call for call in self.calls if outer.begin < call.begin and call.end < outer.end)

    @contextmanager
    def on(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Watch these modules inside the with statement."""
        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_pre_hook(self._begin, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(self._end))
            yield

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(module, next(self._clock))
        if (given := first_tensor((*args, *kwargs.values()))) is not None:
            call.given, call.given_shape = self._serial(given), tuple(given.shape)
        self._open.append(call)
        self.calls.append(call)

    def _end(self, module: nn.Module, _: Any, output: Any) -> None:
        call = self._open.pop()
        assert call.module is module
        call.end = next(self._clock)
        if (made := main_output(output)) is not None:
            call.made, call.made_shape = self._serial(made), tuple(made.shape)

    def _serial(self, tensor: Tensor) -> int:
        if tensor not in self._serials:
            self._serials[tensor] = next(self._numbers)
        return self._serials[tensor]


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """The first of a call's arguments that is a tensor."""
    return next((value for value in values if isinstance(value, Tensor)), None)


def main_output(output: Any) -> Tensor | None:
    """A module's main output: a tensor, or the first of several."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, torch.Tensor):
        return output
    return getattr(output, "last_hidden_state", None)


def tensor_of(output: Any, name: str) -> Tensor:
    """A module's main output; raises BadModel, with the model's name, if it is not a tensor."""
    found = main_output(output)
    if found is None:
        raise BadModel(f"{name}: a block gives {type(output).__name__}, not a tensor")
    return found
