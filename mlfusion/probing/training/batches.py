"""Training batches: tokens scaled to length 1 and jittered, in a shuffled order, from memory or streamed from the cache.

The order of an epoch depends only on the seed, the rows and the size of an image: loaded and streamed tokens come in the same
batches.
"""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from mlfusion.shapes import Float, Int, Num, Shaped
from mlfusion.specs.identity import digest
from mlfusion.store import TokenReader
from mlfusion.system.threads import denormals

LARGEST_BATCH = 2048
FEWEST_BATCHES = 5  # per epoch
JITTER_STD = 0.05
JITTER_PROBABILITY = 0.5
SHUFFLE_BYTES = 1 << 28  # size of the images that are shuffled together; streaming needs twice as much
RUN_NUMBERS = 1 << 19  # size of the neighbouring images that are read together: at least one chunk of the cache
MIN_RUNS = 8  # minimum number of runs that are shuffled together

SHORTEST, LONGEST = 1e-12, 1e18  # lengths whose squares float32 holds with all digits

_PIECE = 1 << 18  # numbers that are converted, normalised and jittered at a time, so that they stay in a core's cache


@dataclass(frozen=True)
class Tokens:
    """Tokens and labels of one split; tokens may be float16, and are converted batch by batch."""

    values: np.ndarray | Tensor | TokenReader  # [N, T, D], as extracted: not normalised
    labels: np.ndarray  # [N] int64 in 0..C-1; or [N, C] of 0 and 1, or [N] floating, see `targets`
    ids: tuple[str, ...] | None = None  # [N], the images' names in error messages
    groups: np.ndarray | None = None  # [N] int64, the number of each image's group; None: every image is its own

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, T, D)."""
        shape = tuple(self.values.shape)
        return (shape[0], math.prod(shape[1:-1]), shape[-1]) if self.is_streamed else shape

    @property
    def is_streamed(self) -> bool:
        """Whether tokens are read on request instead of from memory."""
        return isinstance(self.values, TokenReader)

    @property
    def nbytes(self) -> int:
        """Size of all tokens in their own type, in bytes."""
        return math.prod(self.values.shape) * self.values.dtype.itemsize

    def __getitem__(self, rows: slice | Int[np.ndarray, " b"]) -> Num[Tensor, "b T D"]:
        """Tokens of these images, in their own type."""
        if isinstance(self.values, Tensor):
            if isinstance(rows, slice):
                return self.values[rows]
            return self.values[to_device(torch.from_numpy(rows), self.values.device)]
        values = self.values[rows]
        return torch.from_numpy(values if values.flags.writeable else values.copy()).view(-1, *self.shape[1:])

    def of(self, rows: Int[np.ndarray, " b"]) -> "Tokens":
        """The tokens of images `rows`, in memory."""
        groups = None if self.groups is None else self.groups[rows]
        return Tokens(self[rows], self.labels[rows], self.ids and tuple(self.ids[row] for row in rows), groups)

    def normalised(
        self, rows: Int[np.ndarray, " b"], device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "b T D"]:
        """Tokens of these images, each scaled to length 1 over its width (a zero token stays zero)."""
        return _normalise_and_jitter(self[rows], device, dtype, None)

    def iter_batches(
        self, groups: Iterable[list[Int[np.ndarray, " _b"]]]
    ) -> Iterator[tuple[Int[np.ndarray, " _b"], Num[Tensor, "_b T D"]]]:
        """Rows and tokens, in their own type, of every batch of `Schedule.order`'s groups.

        Tokens from the cache are read a group at a time, the next one in a thread. Callers should release each
        batch before the next, so that the memory of two groups is enough.
        """
        if not self.is_streamed:
            yield from ((rows, self[rows]) for group in groups for rows in group)
            return
        with ThreadPoolExecutor(1) as pool:
            previous: tuple[list[np.ndarray], Future[Tensor]] | None = None
            for group in chain(groups, [None]):
                submitted = (group, pool.submit(self.__getitem__, np.concatenate(group))) if group else None
                if previous:
                    rows, tokens = previous
                    yield from zip(rows, tokens.result().split([len(batch) for batch in rows]), strict=True)
                    del tokens
                previous = submitted


def stream(*words: str | float) -> int:
    """The seed of a random stream: 64 bits of a digest of its name, the same on every machine."""
    return int(digest(words), 16)


@dataclass(frozen=True)
class Schedule:
    """The number of training steps on N images, and their batches."""

    images: int  # N
    steps: int
    batch_size: int
    batches: int  # per epoch

    @classmethod
    def of(cls, images: int, *, epochs: int = 40, least_steps: int = 1000) -> "Schedule":
        """The study's schedule: batches of at most 2,048, at least five per epoch, and at least `least_steps` steps."""
        batches = max(FEWEST_BATCHES, math.ceil(images / LARGEST_BATCH))
        # BatchNorm has no statistics of one image: every batch has at least two.
        batches = max(1, min(batches, images // 2))
        return cls(images, max(epochs * batches, least_steps), math.ceil(images / batches), batches)

    @property
    def sizes(self) -> list[int]:
        """Images of each batch of an epoch; they differ by one at most."""
        size, remainder = divmod(self.images, self.batches)
        return [size + 1] * remainder + [size] * (self.batches - remainder)

    def order(self, tokens: Tokens, rows: Int[np.ndarray, " N"], seed: int) -> Iterator[list[Int[np.ndarray, " b"]]]:
        """The rows of every batch of all steps, in groups of whole batches that are shuffled among themselves.

        If an epoch is one group, all its orders are equally likely. If it has several, runs of neighbouring rows are
        dealt to the groups at random: every group has images from the whole split, and streaming reads whole runs.
        The size of the tokens decides how many images a group has; `rows` are ascending.
        """
        generator = np.random.default_rng(stream("order", seed))
        _, t, d = tokens.shape
        group_images = max(1, SHUFFLE_BYTES * len(tokens) // tokens.nbytes)
        run = min(1 << (RUN_NUMBERS // (t * d)).bit_length(), max(1, group_images // MIN_RUNS))
        groups = math.ceil(self.batches / max(1, group_images // self.batch_size))
        remaining = self.steps
        while remaining > 0:
            for group in _epoch(rows, self.sizes, groups, run, generator):
                yield group[:remaining]
                remaining -= len(group)
                if remaining <= 0:
                    return


def _epoch(
    rows: Int[np.ndarray, " N"], sizes: list[int], groups: int, run: int, order: np.random.Generator
) -> Iterator[list[Int[np.ndarray, " b"]]]:
    """Rows of every batch of an epoch, in `groups` groups; `run` neighbouring rows stay together in a group."""
    if groups > 1:
        runs = np.split(rows, np.flatnonzero(np.diff(rows // run)) + 1)
        rows = np.concatenate([runs[n] for n in order.permutation(len(runs))])
    start = 0
    for part in np.array_split(np.array(sizes), groups):
        stop = start + int(part.sum())
        yield np.split(order.permutation(rows[start:stop]), np.cumsum(part)[:-1])
        start = stop


def batches(
    train: Tokens,
    rows: Int[np.ndarray, " N"],
    schedule: Schedule,
    *,
    seed: int,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Float[Tensor, "B T D"], Shaped[Tensor, "B ..."]]]:
    """Jittered tokens and labels of every step; order and jitter follow from `seed` alone, whatever the device."""
    jitter = np.random.Generator(np.random.SFC64(stream("jitter", seed)))
    for batch_rows, values in train.iter_batches(schedule.order(train, rows, seed)):
        batch = _normalise_and_jitter(values, device, dtype, jitter)
        del values
        yield batch, to_device(torch.from_numpy(train.labels[batch_rows]), device)


def to_device(values: Shaped[Tensor, "..."], device: torch.device | str) -> Shaped[Tensor, "..."]:
    """Copy to a device; a copy to a GPU is asynchronous."""
    if values.device.type == "cpu" and torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@denormals(kept=True)  # a token of such numbers has a direction
def _normalise_and_jitter(
    values: Num[Tensor, "b T D"], device: torch.device | str, dtype: torch.dtype, jitter: np.random.Generator | None
) -> Float[Tensor, "b T D"]:
    """Tokens in their own type → scaled to length 1 on the device, with noise from N(0, 0.05²) added to about half of them."""
    device, shape, jittered = torch.device(device), values.shape[1:], np.empty(0, np.int64)
    if jitter is not None:
        jittered = np.flatnonzero(jitter.random(len(values)) < JITTER_PROBABILITY)
    step = max(1, _PIECE // math.prod(shape))
    pieces = [slice(start, start + step) for start in range(0, len(values), step)]
    rows_by_piece = [jittered[(piece.start <= jittered) & (jittered < piece.stop)] for piece in pieces]
    if device.type == "cpu":
        out = torch.empty(values.shape, dtype=dtype)
        for piece, rows in zip(pieces, rows_by_piece, strict=True):
            _scale(values[piece], dtype, out[piece])
            if jitter is not None and len(rows):
                out.index_add_(0, torch.from_numpy(rows), _noise(jitter, [rows], shape, device).to(dtype))
        return out
    out = _scale(to_device(values, device), dtype)
    if jitter is not None and len(jittered):
        out[to_device(torch.from_numpy(jittered), device)] += _noise(jitter, rows_by_piece, shape, device).to(dtype)
    return out


def _scale(
    values: Num[Tensor, "b T D"], dtype: torch.dtype, out: Float[Tensor, "b T D"] | None = None
) -> Float[Tensor, "b T D"]:
    """Tokens in their own type → scaled to length 1; a zero token stays zero.

    Where a square would overflow or vanish, a token is first multiplied by a power of two, which changes no digit.
    """
    tokens = values.to(dtype)
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    # Numbers of float16 have lengths far inside of these bounds.
    if values.dtype != torch.float16 and not ((length > SHORTEST) & (length < LONGEST)).all():
        exponent = torch.frexp(tokens.abs().amax(-1, keepdim=True).float()).exponent.clamp(min=-126)
        tokens = torch.ldexp(tokens, -exponent)
        length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return torch.div(tokens, length.clamp_min(SHORTEST), out=out)


def _noise(
    jitter: np.random.Generator, parts: list[Int[np.ndarray, " _"]], shape: tuple[int, ...], device: torch.device
) -> Float[Tensor, "b T D"]:
    """Noise for the images of all parts, in float32, by a table of quantiles: faster than exact normals and as good for jitter.

    The processor draws the indices into the table, 16 bits each, so that every device gets the same noise.
    """
    numbers = math.prod(shape)
    # By whole words of 64 bits, which is faster and gives the same as long as no call has left half of a word.
    draw = jitter.bytes if numbers % 4 else partial(_words, jitter.bit_generator)
    random_bytes = b"".join(draw(2 * len(rows) * numbers) for rows in parts)
    indices = to_device(torch.frombuffer(bytearray(random_bytes), dtype=torch.uint16), device)
    return _quantiles(device).index_select(0, indices.int()).view(-1, *shape)


def _words(bits: np.random.BitGenerator, count: int) -> bytes:
    """The next bytes of a stream, a multiple of eight: those that `Generator.bytes` gives."""
    return bits.random_raw(count // 8).astype("<u8", copy=False).tobytes()


@cache
def _quantiles(device: torch.device) -> Float[Tensor, " 65536"]:
    """Medians of 65,536 equally likely parts of N(0, 0.05²), scaled to that variance; the largest is 4.3 deviations."""
    medians = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    return (JITTER_STD * medians / medians.std(correction=0)).float().to(device)
