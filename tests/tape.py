"""A stand-in for CUDA graphs on a processor: what a step does to tensors is taken down, and done again on the same memory.

Like a graph it knows operations and addresses and nothing of Python, so whatever a step finds anywhere else (a number, a
cached tensor, a choice) is as it was when it was recorded; and like a graph it refuses to look at a value.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOOKS = {  # what a device would be waited for
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.unique2.default if hasattr(torch.ops.aten, "unique2") else torch.ops.aten._unique2.default,
}


def tensors(what: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(what) if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    """Takes down operations; when it is left everything is as it was before: a graph does nothing while it is recorded."""

    def __init__(self, streams: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.streams = streams
        self.done: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._made: set[int] = set()  # memory that the work makes for itself
        self._before: list[tuple[Tensor, Tensor]] = []
        self._states = [one.get_state() for one in streams]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOOKS:
            raise RuntimeError(f"{func} looks at a value")
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, torch.Generator) and not any(one._cdata == known._cdata for known in self.streams):
                raise RuntimeError(f"{func} draws from a generator that the record does not know")
        given = {one.untyped_storage().data_ptr() for one in tensors((args, kwargs))}
        for n, slot in enumerate(func._schema.arguments):
            # The schema of batch normalisation does not say that it changes its statistics.
            if (slot.alias_info is not None and slot.alias_info.is_write) or slot.name.startswith("running_"):
                for one in tensors(args[n] if n < len(args) else kwargs.get(slot.name)):
                    if one.untyped_storage().data_ptr() not in self._made:
                        self._before.append((one.detach(), one.detach().clone()))
        out = func(*args, **kwargs)
        self._made |= {one.untyped_storage().data_ptr() for one in tensors(out)} - given
        self.done.append((func, args, kwargs, out))
        return out

    def __exit__(self, *about: Any) -> None:
        super().__exit__(*about)
        with torch.no_grad():
            for one, before in reversed(self._before):
                one.copy_(before)
        for one, state in zip(self.streams, self._states, strict=True):
            one.set_state(state)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.done:
            given = {one.untyped_storage().data_ptr() for one in tensors((args, kwargs))}
            for mine, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if mine.untyped_storage().data_ptr() not in given:
                    mine.copy_(new)


class Recorder:
    """Makes tapes, and counts."""

    def __init__(self) -> None:
        self.ran, self.tapes, self.replayed = 0, list[Tape](), 0

    def run(self, work: Callable[[], None]) -> None:
        self.ran += 1
        work()

    def record(self, work: Callable[[], None], streams: Sequence[torch.Generator]) -> Callable[[], None]:
        tape = Tape(streams)
        with tape:
            work()
        self.tapes.append(tape)

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay
