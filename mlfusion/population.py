"""Training: a whole grid of configurations in lockstep, on one pass over the tokens.

All configurations see the same images, in the same order, with the same jitter. Whatever is a configuration's own
(start, masks, learning rate, decay, clipping) is a vector over the population, so it ends where it would have alone.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlfusion.probes import PROBES, Probe, Shape
from mlfusion.specs import Head, digest

LARGEST_BATCH = 2048
FEWEST_BATCHES = 5  # an epoch
LAST_LEARNING_RATE = 1e-6
JITTER_STD = 0.05
JITTER_PROBABILITY = 0.5
MEMORY = {"cpu": 2**31, "cuda": 2**33}  # bytes of a group, by estimate
AT_ONCE = {"cpu": 21, "cuda": 1024}  # configurations of a group: on a processor more fall out of its caches

_BLOCK = 1 << 16  # elements of a parameter that AdamW works on at a time, so that they stay in a core's cache


@dataclass(frozen=True)
class Tokens:
    """What a probe is given for the images of one split; may be float16, and is converted batch by batch."""

    values: np.ndarray | Tensor  # [N, T, D], as extracted: not normalised
    labels: np.ndarray  # [N] int64 in 0..C-1; or [N, C] of 0 and 1, or [N] floating, see `targets`
    ids: tuple[str, ...] | None = None  # [N], by which an image is named in errors

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.values)

    def of(self, rows: np.ndarray) -> "Tokens":
        """Some of the images."""
        some = torch.from_numpy(rows).to(self.values.device) if isinstance(self.values, Tensor) else rows
        return Tokens(self.values[some], self.labels[rows], self.ids and tuple(self.ids[row] for row in rows))

    def normalised(self, rows: np.ndarray, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Tokens of these images, each of length 1 over its width (a zero token stays zero): [rows, T, D]."""
        if isinstance(self.values, Tensor):
            batch = self.values[torch.from_numpy(rows).to(self.values.device)]
        else:
            batch = torch.from_numpy(self.values[rows])
        return F.normalize(batch.to(device, dtype), dim=-1)


@dataclass(frozen=True)
class Configuration:
    """One point of the grid."""

    lr: float
    weight_decay: float
    dropout: float = 0.0

    def seed(self, seed: int) -> int:
        """Start of this configuration's own random streams: the same in every population that it is a part of."""
        return stream("configuration", seed, self.lr, self.weight_decay, self.dropout)


def stream(*words: str | float) -> int:
    """64 bits that name a random stream, on every machine."""
    return int(digest(words), 16)


@dataclass(frozen=True)
class Schedule:
    """How long to train on N images, and in which batches."""

    images: int  # N
    steps: int
    batch_size: int
    batches: int  # an epoch

    @classmethod
    def of(cls, images: int, *, epochs: int = 40, least_steps: int = 1000) -> "Schedule":
        """The study's: batches of 2,048, or smaller so that an epoch has five; never fewer than `least_steps`."""
        batches = max(FEWEST_BATCHES, math.ceil(images / LARGEST_BATCH))
        # BatchNorm has no statistics of one image: two at least in every batch.
        batches = max(1, min(batches, images // 2))
        return cls(images, max(epochs * batches, least_steps), math.ceil(images / batches), batches)

    def epoch(self, order: np.ndarray) -> list[np.ndarray]:
        """An order of the images [N] → batches whose sizes differ by one at most."""
        return np.array_split(order, self.batches)


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """n / (C · n_c) for every class [C], so that each class weighs the same in the loss; 0 for one without images."""
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts > 0, len(labels) / (classes * np.maximum(counts, 1)), 0.0)


def batches(
    train: Tokens, rows: np.ndarray, schedule: Schedule, *, seed: int, device: str, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """Jittered tokens [B, T, D] and labels [B] of every step; order and jitter follow from `seed` alone."""
    order = np.random.default_rng(stream("order", seed))
    jitter = torch.Generator(device).manual_seed(stream("jitter", seed))
    step = 0
    while True:
        for chosen in schedule.epoch(order.permutation(rows)):
            if step == schedule.steps:
                return
            tokens = train.normalised(chosen, device, dtype)
            shaken = torch.rand(len(chosen), generator=jitter, device=device) < JITTER_PROBABILITY
            # Noise is drawn only for the images that get it, and in float32 whatever the tokens are.
            noise = torch.randn(int(shaken.sum()), *tokens.shape[1:], generator=jitter, device=device)
            tokens[shaken] += (JITTER_STD * noise).to(dtype)
            yield tokens, torch.from_numpy(train.labels[chosen]).to(device)
            step += 1


def losses(logits: Tensor, labels: Tensor, weights: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with class weights, as `torch.nn.CrossEntropyLoss` averages it: [K, B, C], [B], [C] → [K]."""
    k, b, _ = logits.shape
    each = F.cross_entropy(
        logits.flatten(0, 1), labels.repeat(k), weight=weights, reduction="none", label_smoothing=smoothing
    )
    return each.view(k, b).sum(1) / weights[labels].sum()


class AdamW:
    """`torch.optim.AdamW` (arXiv 1711.05101) for a population: learning rate and decay are vectors over K."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: Sequence[float],
        weight_decay: Sequence[float],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Parameters [K, …]; everything is decayed, scales and biases too."""
        self.parameters = list(parameters)
        self.betas, self.eps = betas, eps
        self.lr = torch.tensor(lr, dtype=torch.float64)
        self.weight_decay = torch.tensor(weight_decay, dtype=torch.float64)
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self._steps = 0

    @torch.no_grad()
    def clip(self, largest: float) -> None:
        """Scale each configuration's gradients to a norm of `largest` at most, as `clip_grad_norm_` does for one."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        factor = (largest / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        if bool((factor != 1).any()):
            for gradient in gradients:
                gradient.mul_(_over(factor, gradient))

    @torch.no_grad()
    def step(self, rate: Tensor | None = None) -> None:
        """One update, at learning rates `rate` [K] if given; gradients are forgotten after it."""
        self._steps += 1
        b1, b2 = self.betas
        rate = self.lr if rate is None else rate
        shrink = (1 - rate * self.weight_decay).to(self.parameters[0])
        stride = (rate / (1 - b1**self._steps)).to(self.parameters[0])
        correction = math.sqrt(1 - b2**self._steps)
        for parameter, (first, second) in zip(self.parameters, self._moments, strict=True):
            if parameter.grad is None:  # a gradient of zero, which leaves decay
                parameter.mul_(_over(shrink, parameter))
                continue
            whole = [t.view(len(t), -1) for t in (parameter.detach(), parameter.grad.contiguous(), first, second)]
            width = max(1, _BLOCK // len(parameter)) if parameter.device.type == "cpu" else whole[0].shape[1]
            for p, g, m, v in zip(*(torch.split(t, width, dim=1) for t in whole), strict=True):
                m.lerp_(g, 1 - b1)
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                move = v.sqrt().div_(correction).add_(self.eps).reciprocal_().mul_(m).mul_(_over(stride, m))
                p.mul_(_over(shrink, p)).sub_(move)
            parameter.grad = None


def _over(vector: Tensor, like: Tensor) -> Tensor:
    """[K] → [K, 1, …], to broadcast over a parameter [K, …]."""
    return vector.view(-1, *[1] * (like.ndim - 1))


def cosine(lr: Tensor, step: int, steps: int) -> Tensor:
    """Learning rates [K] at `step` of a cosine decay from `lr` to 1e-6, without warm-up."""
    return LAST_LEARNING_RATE + (lr - LAST_LEARNING_RATE) * (1 + math.cos(math.pi * step / steps)) / 2


def groups(count: int, shape: Shape, head: Head, batch_size: int, *, memory: int, at_once: int) -> list[slice]:
    """Part `count` configurations into runs of about equal size, none over `at_once` or `memory` bytes by estimate."""
    shared = 16 * batch_size * shape.tokens * shape.width
    fit = max(1, min(at_once, (memory - shared) // PROBES[head].bytes_each(shape, batch_size)))
    edges = np.linspace(0, count, math.ceil(count / fit) + 1).round().astype(int)
    return [slice(a, b) for a, b in pairwise(edges.tolist())]


def train(
    head: Head,
    tokens: Tokens,
    rows: np.ndarray,
    configurations: Sequence[Configuration],
    shape: Shape,
    schedule: Schedule,
    *,
    seed: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory: int | None = None,
    progress: Callable[[int], None] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    until: int | None = None,
) -> Iterator[tuple[slice, Probe]]:
    """Train all configurations on images `rows`, as many at once as fit in `memory` bytes.

    Args:
        head: which probe.
        tokens: the split that `rows` points into.
        rows: images to train on [N].
        configurations: the population.
        shape: sizes of the probe.
        schedule: made for N images.
        seed: order of the images, jitter, and with a configuration its start and masks.
        device: where to train.
        dtype: of parameters and products.
        memory: bytes that a group may take by estimate, by default `MEMORY` of the device; results do not depend on it.
        progress: called after each step with the number of configurations that took it.
        loss: outputs [K, B, C] and labels → [K]; by default cross-entropy with class weights.
        until: stop after so many steps of the schedule.

    Yields:
        A group of the configurations and its probe, in evaluation mode. A configuration that diverged is not finite.
    """
    if loss is None:
        weights = torch.from_numpy(class_weights(tokens.labels[rows], shape.classes)).to(device, dtype)
        loss = partial(losses, weights=weights)
    kind = "cuda" if torch.device(device).type == "cuda" else "cpu"
    memory, at_once = MEMORY[kind] if memory is None else memory, AT_ONCE[kind]
    for group in groups(len(configurations), shape, head, schedule.batch_size, memory=memory, at_once=at_once):
        members = configurations[group]
        probe = PROBES[head](shape, seeds=[c.seed(seed) for c in members], dropouts=[c.dropout for c in members])
        probe.to(torch.device(device), dtype)
        probe.train()
        optimizer = AdamW(
            probe.parameters(), lr=[c.lr for c in members], weight_decay=[c.weight_decay for c in members]
        )
        passing = batches(tokens, rows, schedule, seed=seed, device=device, dtype=dtype)
        for step, (batch, labels) in enumerate(islice(passing, until)):
            # The sum over the population: no configuration's loss has a gradient for another's parameters.
            torch.autograd.backward(loss(probe(batch), labels).sum())
            if probe.clip is not None:
                optimizer.clip(probe.clip)
            optimizer.step(cosine(optimizer.lr, step, schedule.steps))
            if progress:
                progress(len(members))
        probe.eval()
        yield group, probe


@torch.no_grad()
def read(
    probe: Probe, tokens: Tokens, rows: np.ndarray, *, block: int, device: str, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """A probe's logits [K, b, C] for images `rows`, `block` at a time, each with the normalised tokens [b, T, D]."""
    for start in range(0, len(rows), block):
        batch = tokens.normalised(rows[start : start + block], device, dtype)
        yield probe(batch), batch
