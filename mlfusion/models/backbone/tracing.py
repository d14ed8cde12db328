"""Records one forward pass: the order of module calls, and the shapes of their inputs and outputs. It keeps no tensor alive.

Each tensor object has a number of its own. The numbers show that a norm feeds an MLP without a table of module names, which
change between versions of transformers.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mlfusion.errors import BadModel


@dataclass
class Call:
    """One call of one module. `begin` and `end` are steps of a common clock."""

    module: nn.Module
    begin: int
    end: int = -1
    input_id: int = -1  # number of its first input tensor
    input_shape: tuple[int, ...] = ()
    output_id: int = -1  # number of its first output tensor
    output_shape: tuple[int, ...] = ()


class CallRecorder:
    """The calls of one forward pass, in the order in which they began."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.reads: dict[str, int] = {}  # name of a watched tensor → the step at which an operation first got it
        self._ids: Any = WeakIdKeyDictionary()
        self._clock, self._next_id = count(), count()
        self._running: list[Call] = []

    def first(self, module: nn.Module) -> Call | None:
        """The first call of a module."""
        return next((call for call in self.calls if call.module is module), None)

    def within(self, outer: Call) -> Iterator[Call]:
        """Calls that began and ended during another."""
        return (call for call in self.calls if outer.begin < call.begin and call.end < outer.end)

    @contextmanager
    def recording(self, modules: Iterable[nn.Module], watched: Mapping[str, Tensor]) -> Iterator[None]:
        """Record the calls of these modules, and the first reading of each watched tensor, inside the with statement."""
        with ExitStack() as hooks:
            if watched:  # a pass that is watched takes longer
                hooks.enter_context(_Watch(self, watched))
            for module in modules:
                hooks.enter_context(module.register_forward_pre_hook(self._begin, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(self._end))
            yield

    def read(self, name: str) -> None:
        """A watched tensor is the argument of an operation."""
        self.reads.setdefault(name, next(self._clock))

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(module, next(self._clock))
        if (tensor := first_tensor((*args, *kwargs.values()))) is not None:
            call.input_id, call.input_shape = self._id_of(tensor), tuple(tensor.shape)
        self._running.append(call)
        self.calls.append(call)

    def _end(self, module: nn.Module, _: Any, output: Any) -> None:
        call = self._running.pop()
        assert call.module is module
        call.end = next(self._clock)
        if (tensor := main_output(output)) is not None:
            call.output_id, call.output_shape = self._id_of(tensor), tuple(tensor.shape)

    def _id_of(self, tensor: Tensor) -> int:
        if tensor not in self._ids:
            self._ids[tensor] = next(self._next_id)
        return self._ids[tensor]


class _Watch(TorchDispatchMode):
    """Sees each operation with its tensors, however a module came by them: as a weight, a view or an alias."""

    def __init__(self, recorder: CallRecorder, watched: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._recorder = recorder
        self._names: dict[int, list[str]] = {}
        for name, tensor in watched.items():  # tied weights have one memory
            self._names.setdefault(_memory(tensor), []).append(name)

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                for name in self._names.get(_memory(value), ()):
                    self._recorder.read(name)
        return operation(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    """The same number for tensors that share their memory."""
    return tensor.untyped_storage()._cdata


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
    tensor = main_output(output)
    if tensor is None:
        raise BadModel(f"{name}: a block gives {type(output).__name__}, not a tensor")
    return tensor
