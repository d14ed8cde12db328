"""Steps on a GPU recorded once as CUDA graphs and replayed: Python launches a step's kernels more slowly than they run.

What a record does is fixed when it is made: the same kernels on the same memory. So what changes from step to step is copied
into tensors that stay, and nothing in between may look at a tensor's value.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from mlfusion.switch import Switch

WARM = 3  # steps on inputs of a shape before it is recorded: libraries choose kernels and take memory in the first ones

_switch = Switch("MLFUSION_GRAPHS")
off = _switch.off


def absent(device: str) -> str | None:
    """Why nothing is recorded on this device, or None."""
    if torch.device(device).type != "cuda":
        return "only CUDA has graphs"
    return None if _switch.on else "switched off"


class Recorder(Protocol):
    """Makes records, all in memory that they share: one is never replayed beside another."""

    def run(self, work: Callable[[], None]) -> None:
        """Do it, where records are made."""

    def record(self, work: Callable[[], None], streams: Sequence[torch.Generator]) -> Callable[[], None]:
        """What does `work` again whenever it is called; nothing is done yet.

        Args:
            work: looks at no tensor's value.
            streams: the generators that it draws from, which go on with every replay.

        Raises:
            RuntimeError: `work` does what a graph cannot hold.
        """


def recorder(device: str) -> Recorder:
    """For one population on this device, where graphs are not `absent`."""
    return _Cuda(torch.device(device))


class _Cuda:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], None]) -> None:
        # On the stream of the records, so that what a library sets up for a stream is there before the first.
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            work()
        here.wait_stream(self._stream)

    def record(self, work: Callable[[], None], streams: Sequence[torch.Generator]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        for stream in streams:
            graph.register_generator_state(stream)
        with (
            torch.cuda.device(self._device),
            # Other threads may go on using the device: a notebook's, or whoever reads ahead.
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()
        replay: Callable[[], None] = graph.replay
        return replay


@dataclass
class _Kept:
    """What there is for inputs of one shape."""

    inputs: list[Tensor]
    warm: int = 0
    replay: Callable[[], None] | None = None


class Replayed:
    """`work` on tensors of few shapes: done the first times, then recorded, and replayed from there on."""

    def __init__(
        self, work: Callable[..., None], recorder: Recorder, streams: Callable[[], Sequence[torch.Generator]]
    ) -> None:
        """`streams` gives the generators that `work` draws from, once it has been done."""
        self._work, self._recorder, self._streams = work, recorder, streams
        self._kept: dict[tuple[tuple[torch.Size, torch.dtype], ...], _Kept] = {}

    def __call__(self, *given: Tensor) -> None:
        """Do it on these, all on the device."""
        kind = tuple((one.shape, one.dtype) for one in given)
        if kind not in self._kept:
            self._kept[kind] = _Kept([self._room(n, one) for n, one in enumerate(given)])
        kept = self._kept[kind]
        for mine, one in zip(kept.inputs, given, strict=True):
            mine.copy_(one)
        if kept.replay is None:
            work = partial(self._work, *kept.inputs)
            if kept.warm < WARM:
                kept.warm += 1
                self._recorder.run(work)
                return
            kept.replay = self._recorder.record(work, self._streams())
        kept.replay()

    def _room(self, n: int, like: Tensor) -> Tensor:
        """Where the nth input is kept: batches differ by an image, and the tokens of one may take gigabytes."""
        for mine in (kept.inputs[n] for kept in self._kept.values()):
            if mine.dtype == like.dtype and mine.shape[1:] == like.shape[1:] and len(mine) >= len(like):
                return mine[: len(like)]
        return torch.empty_like(like, memory_format=torch.contiguous_format)
