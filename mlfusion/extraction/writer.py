"""Writing beside the forward pass: one thread fills shards, one flushes and names them."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from mlfusion.extraction.forward import Forward
from mlfusion.extraction.loader import LoadedBatch
from mlfusion.specs.identity import Pair
from mlfusion.store import Gap, ShardDraft, Stream

QUEUED = 2  # batches whose tokens are on their way to the cache


Batch = tuple[range, list[Stream]]
"""Rows that go through the model at once, and the streams that take them."""


@dataclass(frozen=True, eq=False)
class _PendingTokens:
    """The streams' parts of one pass, being copied from the device."""

    parts: dict[Stream, torch.Tensor]  # [images, layers, kinds x tokens, width] in the processor's memory
    wait: Callable[[], None]  # returns when they are there


def _take(forward: Forward, one: LoadedBatch[list[Stream]]) -> _PendingTokens:
    """Run a batch and start copying its tokens. On a GPU nothing waits for it here: the next batch can be queued at once."""
    tokens = forward(one.pictures, frozenset(pair for stream in one.payload for pair in stream.pairs))
    parts = {stream: _assemble(tokens, stream) for stream in one.payload}
    if forward.backbone.device.type != "cuda":
        return _PendingTokens({stream: part.cpu() for stream, part in parts.items()}, lambda: None)
    there = {
        stream: torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
        for stream, part in parts.items()
    }
    event = torch.cuda.Event()
    event.record()
    one.free = forward.wait_for_copy  # the buffer is read until then; the pass itself goes on
    return _PendingTokens(there, event.synchronize)


class _Writer:
    """Two threads behind the loop: one fills shards, one flushes and publishes them. The queues between them are bounded."""

    def __init__(self, gap: Gap) -> None:
        self._gap = gap
        self._drafts: dict[Stream, ShardDraft] = {}
        self._filling, self._publishing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._queue: deque[Future[None]] = deque()
        self._published: deque[Future[None]] = deque()
        self._flushed: Future[None] | None = None  # the last shard that was given to be published
        self._failed = False
        self.busy = 0.0  # seconds of filling, and waiting for a flush
        self.awaited = 0.0  # seconds that tokens were waited for, while the device worked on them
        self.held = 0.0  # seconds that the loop was held up because writing was behind

    def put(self, one: LoadedBatch[list[Stream]], tokens: _PendingTokens) -> None:
        """Queue a batch's tokens, in the order of rows. Raises the error of an earlier batch."""
        self._queue.append(self._filling.submit(self._fill, one.rows, tokens, one.unread))
        began, awaited = time.perf_counter(), self.awaited
        while len(self._queue) > QUEUED:
            self._queue.popleft().result()
        self.held += max(0.0, time.perf_counter() - began - (self.awaited - awaited))
        while self._published and self._published[0].done():
            self._published.popleft().result()

    def _fill(self, rows: range, tokens: _PendingTokens, unread: dict[int, str]) -> None:
        if self._failed:
            return  # a draft lacks rows of a batch before this one, and must not be given others in their place
        self._failed = True
        began = time.perf_counter()
        tokens.wait()
        arrived = time.perf_counter()
        self.awaited += arrived - began
        for stream, part in tokens.parts.items():
            if stream not in self._drafts:
                self._drafts[stream] = self._gap.draft(stream, rows.start // stream.shard_rows)
            assert self._drafts[stream].row == rows.start
            self._drafts[stream].append(part.numpy(), unread)
            if rows.stop % stream.shard_rows == 0 or rows.stop == stream.images:
                future = self._publishing.submit(self._gap.publish, self._drafts.pop(stream))
                if self._flushed:  # no more than one shard that is flushed and one that is filled
                    self._flushed.exception()
                self._flushed = future
                self._published.append(future)
        self._failed = False
        self.busy += time.perf_counter() - arrived

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            while self._queue:
                self._queue.popleft().result()
        except BaseException:
            if kind is None:  # else what ended the loop is what matters
                raise
        finally:
            self._filling.shutdown()
            self._publishing.shutdown()
        if kind is None:
            for future in self._published:
                future.result()


def _assemble(tokens: dict[Pair, torch.Tensor], stream: Stream) -> torch.Tensor:
    """A stream's part of a pass: [images, layers, kinds x tokens, width], in float16 if it is stored so, else in float32."""
    layers = [torch.cat([tokens[layer, kind] for kind in stream.kinds], 1) for layer in stream.layers]
    return torch.stack(layers, 1).to(torch.float16 if stream.dtype == "float16" else torch.float32)
