"""The design matrix of heads that are solved for: ridge and logistic regression, and nearest neighbours.

All three take the concatenation of an image's tokens, each of length 1, as the linear probe does, and give probes with the
interface of the trained heads. They compute in float64: float32 loses a penalty of 1e-6 beside an eigenvalue of 1e4.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from mlfusion.probing.heads.linear import LinearMap
from mlfusion.probing.targets import Target
from mlfusion.probing.training.batches import Tokens
from mlfusion.shapes import Float, Int
from mlfusion.system.threads import denormals, share

F64 = torch.float64
BLOCK = 1 << 24  # size of a block of images, neighbours or votes, in numbers
COLUMNS = 256  # columns of a product that one thread computes
LARGE = 1 << 24  # multiplications of a product for which starting threads takes little of the time


@dataclass(frozen=True)
class Penalty:
    """λ of λ‖W‖² (ridge) or ½λ‖W‖² (logistic), added to the sum of the losses over images: scikit-learn's alpha, and 1/C."""

    penalty: float


def penalties(name: str) -> tuple[Penalty, ...]:
    """λ from 1e6 to 1e-6: eight a decade, or one a decade for grid 'quick'.

    The eight are the values among which CLIP's protocol (arXiv 2103.00020, A.3) searches by halves, looking at fifteen.
    Here all are solved for, which a path makes cheap.
    """
    return tuple(Penalty(float(value)) for value in np.logspace(6, -6, 13 if name == "quick" else 97))


class FixedLinear(LinearMap):
    """K linear maps whose weights are given."""

    def __init__(self, weight: Float[Tensor, "K C TD"], bias: Float[Tensor, "K C"]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def last(self) -> "FixedLinear":
        """The last of the K maps, as a population of one."""
        return FixedLinear(self.weight.detach()[-1:], self.bias.detach()[-1:])


class Design:
    """Images as rows x of width F = T·D, rotated so that their columns are orthogonal under the images' weights w.

    With Σ w = N, centre μ = Σ w x / N and (x − μ) = z Vᵀ, Σ w z zᵀ is diagonal: the `eigenvalues`. A penalty on ‖W‖² is the
    same penalty in these coordinates, so that no penalty needs a factorisation of its own. V comes from the smaller of the
    two products, F × F or N × N.
    """

    @denormals(kept=False)
    def __init__(self, tokens: Tokens, rows: Int[np.ndarray, " N"], target: Target, device: str) -> None:
        self.tokens, self.rows, self.target, self.device = tokens, rows, target, float64_device(device)
        labels = tokens.labels[rows]
        self.weights = torch.from_numpy(target.weights(labels)).to(self.device, F64)  # [N]
        width = int(np.prod(tokens.shape[1:]))
        total = self.weights.sum()
        self.centre = torch.zeros(width, device=self.device, dtype=F64)
        for block, x in self.blocks():
            self.centre += self.weights[block] @ x / total
        if width <= len(rows):
            gram = torch.zeros(width, width, device=self.device, dtype=F64)
            for block, x in self.blocks():
                centred = (x - self.centre) * self.weights[block].sqrt()[:, None]
                add_product(gram, centred.T, centred)
            eigenvalues, basis = torch.linalg.eigh(gram)
        else:
            centred = torch.cat([x - self.centre for _, x in self.blocks()]) * self.weights.sqrt()[:, None]
            eigenvalues, left = torch.linalg.eigh(matmul(centred, centred.T))
            basis = matmul(centred.T, left) / eigenvalues.clamp(min=1e-300).sqrt()
        nonzero = eigenvalues > eigenvalues.max() * 1e-14  # smaller ones are rounding; the images span no more
        self.eigenvalues, self.basis = eigenvalues[nonzero], basis[:, nonzero]  # [r], [F, r]
        self.rotated = torch.cat([matmul(x - self.centre, self.basis) for _, x in self.blocks()])  # z [N, r]

    @cached_property
    def targets(self) -> Float[Tensor, "N C"]:
        """The numbers that a least-squares probe fits: 1 for a class or label and 0 for the others, or the number."""
        return torch.from_numpy(self.target.regressand(self.tokens.labels[self.rows])).to(self.device, F64)

    def blocks(self) -> Iterator[tuple[slice, Float[Tensor, "b F"]]]:
        """Images in float64, a block at a time, with their positions in `rows`."""
        width = int(np.prod(self.tokens.shape[1:]))
        step = max(1, BLOCK // width)
        for start in range(0, len(self.rows), step):
            block = slice(start, min(start + step, len(self.rows)))
            yield block, self.tokens.normalised(self.rows[block], self.device, F64).flatten(1)

    def unrotated(self, rotated: Float[Tensor, "K C r"], bias: Float[Tensor, "K C"]) -> FixedLinear:
        """Maps of z and their biases → the same maps of x, in float32."""
        weight = rotated @ self.basis.T
        return FixedLinear(weight.float(), (bias - weight @ self.centre).float())


def matmul(a: Float[Tensor, "n m"], b: Float[Tensor, "m p"]) -> Float[Tensor, "n p"]:
    """The product, each part of b's columns by one thread, so that its bits do not depend on the number of threads."""
    return add_product(a.new_zeros(len(a), b.shape[1]), a, b)


def add_product(total: Float[Tensor, "n p"], a: Float[Tensor, "n m"], b: Float[Tensor, "m p"]) -> Float[Tensor, "n p"]:
    """`matmul`, added to a matrix in place."""
    columns = COLUMNS if total.device.type == "cpu" else b.shape[1]
    parts = list(zip(total.split(columns, 1), b.split(columns, 1), strict=True))
    share(lambda part: part[0].addmm_(a, part[1]), parts, worth=a.numel() * b.shape[1] >= LARGE)
    return total


def float64_device(device: str) -> str:
    """The device itself, or the processor instead of one without float64."""
    return "cpu" if device == "mps" else device
