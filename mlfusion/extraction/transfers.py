"""Copies pictures to a device and tokens back while it computes, and says when a copied memory may be used again.

A GPU of CUDA copies in both directions and computes at the same time if each has a queue (a stream) of its own. Queues are
named by device everywhere: the queue that is current belongs to the first GPU unless somebody has chosen another.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

Wait = Callable[[], None]
"""Returns when a copy is complete."""


def nothing() -> None:
    """Wait for a copy that is complete already."""


class Transfers:
    """The copies between this machine's memory and one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Any other device copies at once: a copy that MPS makes later reads memory that may be somebody else's by then.
        self._queued = device.type == "cuda"
        if self._queued:
            self._incoming, self._outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def send(self, values: Tensor) -> tuple[Tensor, Wait]:
        """The values on the device, for what is computed from now on; and when their memory here may be overwritten."""
        if not self._queued:
            return values.to(self.device), nothing
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._incoming):
            sent = values.to(self.device, non_blocking=values.is_pinned())
            copied = self._event(self._incoming)
        computing.wait_event(copied)
        sent.record_stream(computing)  # its memory is not given to another picture before it was used
        return sent, copied.synchronize

    def fetch(self, values: Sequence[Tensor]) -> tuple[list[Tensor], Wait]:
        """The values in this machine's memory, and when they are complete there. The device goes on computing meanwhile."""
        if not self._queued:
            return [each.cpu() for each in values], nothing
        self._outgoing.wait_event(self._event(torch.cuda.current_stream(self.device)))
        with torch.cuda.stream(self._outgoing):
            fetched = [self._fetch(each) for each in values]
            return fetched, self._event(self._outgoing).synchronize

    def _fetch(self, values: Tensor) -> Tensor:
        values.record_stream(self._outgoing)
        with suppress(RuntimeError):  # a system may refuse to lock so much memory
            locked = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            return locked.copy_(values, non_blocking=True)
        return values.cpu()

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """A mark behind all that this queue has now; to wait for it takes no processor's time."""
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event
