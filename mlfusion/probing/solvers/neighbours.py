"""Weighted votes of the nearest training images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product, repeat
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mlfusion.probing.heads.contract import HeadModule
from mlfusion.probing.solvers.design import BLOCK, float64_device, matmul
from mlfusion.probing.targets import Target
from mlfusion.probing.training.batches import Tokens
from mlfusion.shapes import Float, Int
from mlfusion.system.threads import denormals

NO_VOTE = -200.0  # the logit of a class without a vote: its probability is 0 in float32, and the loss is finite


@dataclass(frozen=True)
class Neighbourhood:
    """The number of neighbours that vote, each with a weight of exp(cosine / temperature)."""

    neighbours: int
    temperature: float


def neighbourhoods(name: str) -> tuple[Neighbourhood, ...]:
    """21 neighbourhoods, or 3 for grid 'quick'."""
    quick = name == "quick"
    counts, temperatures = ((1, 10, 50), (0.07,)) if quick else ((1, 5, 10, 20, 50, 100, 200), (0.02, 0.07, 0.2))
    return tuple(Neighbourhood(*point) for point in product(counts, temperatures))


class Neighbours(HeadModule):
    """K weighted votes of the nearest training images (arXiv 1805.01978, equation 7): exp(cosine / temperature) each.

    The cosine of two images is the mean over their tokens. All K share one search. A class without any vote has a
    probability of 0; of numbers the weighted mean is taken.
    """

    has_attention: ClassVar[bool] = False

    bank: Tensor  # [1, N, T·D]
    values: Tensor  # [1, N, C]
    neighbours: Tensor  # [K]
    temperature: Tensor  # [K]

    def __init__(
        self, bank: Float[Tensor, "N TD"], values: Float[Tensor, "N C"], settings: Sequence[Neighbourhood], kind: str
    ) -> None:
        """Normalised training tokens, what each image votes for, and the kind of target."""
        super().__init__()
        self.kind = kind
        self.register_buffer("bank", bank[None])
        self.register_buffer("values", values[None])
        self.register_buffer("neighbours", torch.tensor([one.neighbours for one in settings]))
        self.register_buffer("temperature", torch.tensor([one.temperature for one in settings]))

    @denormals(kept=False)
    def forward(
        self, tokens: Float[Tensor, "B T D"], own: tuple[Int[Tensor, " B"], Int[Tensor, " N"]] | None = None
    ) -> Float[Tensor, "K B C"]:
        """Normalised tokens → outputs, whose softmax or sigmoid are the votes.

        `own` is the group of each image, and of each training image, by itself or such as a patient: no training image votes
        for one of its own group.
        """
        count = min(int(self.neighbours.max()), self.bank.shape[1])
        size = max(1, BLOCK // (count * max(self.values.shape[2], 4)))
        parts = zip(tokens.split(size), own[0].split(size) if own is not None else repeat(None), strict=False)
        of_bank = own[1] if own is not None else None
        p = torch.cat([self._votes(part, count, groups, of_bank) for part, groups in parts], dim=1)
        if self.kind == "class":
            return p.log().clamp(min=NO_VOTE)
        return torch.logit(p, eps=1e-7) if self.kind == "labels" else p

    def _votes(
        self,
        tokens: Float[Tensor, "B T D"],
        nearest: int,
        own: Int[Tensor, " B"] | None,
        of_bank: Int[Tensor, " N"] | None,
    ) -> Float[Tensor, "K B C"]:
        cosine, indices = self._nearest(tokens.flatten(1) / tokens.shape[1], nearest, own, of_bank)
        values = self.values[0][indices]  # [B, nearest, C]
        votes = []
        for count, temperature in zip(self.neighbours.tolist(), self.temperature.tolist(), strict=True):
            weights = torch.softmax(cosine[:, :count] / temperature, dim=1)
            votes.append(torch.einsum("bn,bnc->bc", weights, values[:, :count]))
        return torch.stack(votes)

    def _nearest(
        self,
        queries: Float[Tensor, "B TD"],
        count: int,
        own: Int[Tensor, " B"] | None,
        of_bank: Int[Tensor, " N"] | None,
    ) -> tuple[Float[Tensor, "B {count}"], Int[Tensor, "B {count}"]]:
        """Cosines of the nearest images, in falling order, and their indices; the cosine with one of its own group is -inf."""
        step = max(count, BLOCK // max(len(queries), self.bank.shape[2]))
        cosine = queries.new_full((len(queries), 0), -math.inf)
        indices = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start in range(0, self.bank.shape[1], step):
            block = self.bank[0, start : start + step].to(queries.dtype)
            block_cosine = matmul(queries, block.T)
            rows = torch.arange(start, start + len(block), device=queries.device).expand(len(queries), -1)
            if own is not None and of_bank is not None:
                block_cosine.masked_fill_(of_bank[start : start + step] == own[:, None], -math.inf)
            cosine, rank = torch.cat([cosine, block_cosine], dim=1).topk(min(count, start + len(block)), dim=1)
            indices = torch.cat([indices, rows], dim=1).gather(1, rank)
        return cosine, indices


def neighbours(
    tokens: Tokens, rows: Int[np.ndarray, " N"], settings: Sequence[Neighbourhood], target: Target, device: str
) -> Neighbours:
    """The probe whose votes are those of images `rows`."""
    device = float64_device(device)
    bank = tokens.normalised(rows, device).flatten(1)
    values = torch.from_numpy(target.regressand(tokens.labels[rows])).to(device, torch.float32)
    return Neighbours(bank, values, settings, target.kind)
