"""Writes tokens during the forward pass: one thread fills shards, another flushes and publishes them."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from mlfusion.extraction.forward import Forward
from mlfusion.extraction.loader import LoadedBatch
from mlfusion.shapes import Bool, Float
from mlfusion.specs.identity import Dtype, Pair
from mlfusion.store import Gap, ShardDraft, Stream

MAX_QUEUED_BATCHES = 2  # largest number of batches that wait to be written

Batch = tuple[range, list[Stream]]
"""(rows of one forward pass, streams that store them)."""


@dataclass(frozen=True, eq=False)
class PendingTokens:
    """The tokens of one batch for each stream, while they are copied from the device."""

    parts: list[dict[Stream, tuple[Tensor, Tensor]]]  # of one piece after another, as from `_assemble`, in host memory
    wait: Callable[[], None]  # returns when the copies are complete


def run_batch(forward: Forward, batch: LoadedBatch[list[Stream]]) -> PendingTokens:
    """Run a batch and start copying its tokens. On a GPU the call does not wait, so the next batch can be queued."""
    streams = batch.payload
    pairs = frozenset(pair for stream in streams for pair in stream.pairs)
    pieces = forward.pieces(batch.pictures, pairs, lambda tokens: [_assemble(tokens, stream) for stream in streams])
    batch.free = forward.wait_for_copy  # the buffer is in use until the copy is complete
    copied, wait = forward.transfers.fetch([values for piece in pieces for part in piece for values in part])
    each = iter(copied)
    return PendingTokens([{stream: (next(each), next(each)) for stream in streams} for _ in pieces], wait)


class Writer:
    """Two threads: one fills shards, one flushes and publishes them. Their queues are bounded."""

    def __init__(self, gap: Gap) -> None:
        self._gap = gap
        self._drafts: dict[Stream, ShardDraft] = {}
        self._filling, self._publishing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._queue: deque[Future[None]] = deque()
        self._published: deque[Future[None]] = deque()
        self._flushed: Future[None] | None = None  # the last shard submitted for publication
        self._failed = False
        self.busy = 0.0  # seconds spent on filling and on waiting for a flush
        self.awaited = 0.0  # seconds spent on waiting for the device
        self.blocked = 0.0  # seconds that the loop waited for the writer

    def put(self, batch: LoadedBatch[list[Stream]], tokens: PendingTokens) -> None:
        """Queue a batch's tokens, in the order of rows. Raises the error of an earlier batch."""
        self._queue.append(self._filling.submit(self._fill, batch.rows, tokens, batch.unread))
        start, awaited = time.perf_counter(), self.awaited
        while len(self._queue) > MAX_QUEUED_BATCHES:
            self._queue.popleft().result()
        self.blocked += max(0.0, time.perf_counter() - start - (self.awaited - awaited))
        while self._published and self._published[0].done():
            self._published.popleft().result()

    def _fill(self, rows: range, tokens: PendingTokens, unread: dict[int, str]) -> None:
        if self._failed:
            return  # a draft lacks the rows of an earlier batch and must not be extended
        self._failed = True
        start = time.perf_counter()
        tokens.wait()
        arrived = time.perf_counter()
        self.awaited += arrived - start
        for stream in tokens.parts[0]:
            if stream not in self._drafts:
                self._drafts[stream] = self._gap.draft(stream, rows.start // stream.shard_rows)
            assert self._drafts[stream].row == rows.start
            pieces = [piece[stream] for piece in tokens.parts]
            part, lost = pieces[0] if len(pieces) == 1 else map(torch.cat, zip(*pieces, strict=True))
            self._drafts[stream].append(part.numpy(), unread, lost.numpy())
            if rows.stop % stream.shard_rows == 0 or rows.stop == stream.images:
                future = self._publishing.submit(self._gap.publish, self._drafts.pop(stream))
                if self._flushed:  # at most one shard is flushed and one filled at a time
                    self._flushed.exception()
                self._flushed = future
                self._published.append(future)
        self._failed = False
        self.busy += time.perf_counter() - arrived

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            while self._queue:
                self._queue.popleft().result()
        except BaseException:
            if kind is None:  # else the error of the loop has priority
                raise
        finally:
            self._filling.shutdown()
            self._publishing.shutdown()
        if kind is None:
            for future in self._published:
                future.result()


def _assemble(tokens: dict[Pair, torch.Tensor], stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a stream, [images, layers, kinds x tokens, width], and which of them vanish, [images, layers].

    The tokens are in float16 if stored as float16, else in float32.
    """
    layers = [torch.cat([tokens[layer, kind] for kind in stream.kinds], 1) for layer in stream.layers]
    dtype = torch.float16 if stream.dtype == "float16" else torch.float32
    return torch.stack(layers, 1).to(dtype), torch.stack([vanished(each, stream.dtype) for each in layers], 1)


def vanished(tokens: Float[Tensor, "B T D"], dtype: Dtype) -> Bool[Tensor, " B"]:
    """Whether more than half of the numbers of one of an image's tokens that are not 0 become 0 in a storage type.

    In float16 numbers up to 2⁻²⁵ become 0, in int8 those up to half a step, which is 1/127 of the token's largest number.
    bfloat16 has the exponents of float32.
    """
    if dtype in ("bfloat16", "float32"):
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    size = tokens.abs()
    limit = 2.0**-25 if dtype == "float16" else size.amax(-1, keepdim=True) / 254
    lost = ((size > 0) & (size <= limit)).sum(-1)
    return (2 * lost > (size > 0).sum(-1)).any(-1)
