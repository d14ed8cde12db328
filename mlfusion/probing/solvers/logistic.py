"""Logistic regression along a path of penalties, many at once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mlfusion.errors import BadData, TooLittleMemory
from mlfusion.probing.solvers.design import F64, Design, FixedLinear, Penalty, matmul
from mlfusion.probing.solvers.lbfgs import HISTORY, minimise
from mlfusion.probing.targets import OneClass
from mlfusion.shapes import Float
from mlfusion.system.threads import denormals

BATCH = 8  # largest number of penalties that are solved together
BATCH_BYTES = (
    1 << 25
)  # memory of the penalties that are solved together, which is always there; one alone may need more
BLOCK_BYTES = 1 << 25  # memory of the logits of a block of images, which is always there too
VECTORS = (
    2 * HISTORY + 12
)  # vectors of a map's size that L-BFGS holds for a penalty: steps, changes, and what it computes
LOGITS = 4  # arrays of the size of the logits that a loss and its gradient hold


class Logistic:
    """Σ w · cross-entropy + ½λ‖W‖² at its minimum, the bias free: multinomial for classes, one by one for several labels.

    The linear probe of CLIP (arXiv 2103.00020, A.3). L-BFGS runs in the rotated coordinates, where the curvature at W = 0 is
    diagonal and is divided out, for up to `BATCH` penalties together, from strong to weak: each batch starts at the last
    solution of the one before. How many are together depends on the sizes of the problem alone, since their sums follow it.
    """

    def __init__(self, design: Design, memory: int | None = None) -> None:
        """`memory` is a limit in bytes; None is no limit.

        Raises:
            BadData: the target is a number.
            TooLittleMemory: one penalty alone needs more.
        """
        if design.target.kind == "number":
            raise BadData("logistic regression has no numbers; allowed: classes or labels. For numbers take ridge")
        self.design = design
        self.classes = design.target.outputs
        self.multinomial = isinstance(design.target, OneClass)
        one = 8 * VECTORS * self.classes * (design.rotated.shape[1] + 1)  # bytes of one penalty
        self.batch = max(1, min(BATCH, BATCH_BYTES // one))
        self.block = max(1, BLOCK_BYTES // (8 * LOGITS * self.batch * self.classes))
        if memory is not None and one > max(memory / 2, BATCH_BYTES):
            raise TooLittleMemory(
                f"logistic regression of {self.classes:,} classes needs {2 * one / 1e6:,.0f} MB for each penalty and "
                f"{memory / 1e6:,.0f} MB are free for it; allowed: as much --memory, or another head, such as linear"
            )

    def solve(self, path: Sequence[Penalty]) -> Iterator[tuple[slice, FixedLinear]]:
        """Slices of the path, strong penalties first, each with its probe."""
        r = self.design.rotated.shape[1]
        start = self.design.rotated.new_zeros(self.classes, r + 1)
        for first in range(0, len(path), self.batch):
            batch = slice(first, min(first + self.batch, len(path)))
            penalties = torch.tensor([each.penalty for each in path[batch]], device=self.design.device, dtype=F64)
            minima = self._minima(penalties, start)  # [K, C, r + 1]
            start = minima[-1]
            yield batch, self.design.unrotated(minima[..., :r], minima[..., r])

    @denormals(kept=False)
    def _minima(self, penalties: Float[Tensor, " K"], start: Float[Tensor, "C R"]) -> Float[Tensor, "K C R"]:
        """The minima; R is r + 1, and the bias is the last number."""
        curvature = 1 / self.classes if self.multinomial else 0.25
        ones = penalties.new_ones(len(penalties), 1) * self.design.weights.sum()
        eigenvalues = torch.cat([self.design.eigenvalues.expand(len(penalties), -1), ones], dim=1)
        penalty = torch.cat([penalties[:, None].expand(-1, eigenvalues.shape[1] - 1), 0 * ones], dim=1)
        scale = 1 / (curvature * eigenvalues + penalty).sqrt()[:, None]  # [K, 1, r + 1]
        shape = (-1, *start.shape)

        def function(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            own_scale, own_penalty = scale[which], penalty[which][:, None]
            map_ = x.view(shape) * own_scale
            loss, gradient = self._loss(map_)
            loss = loss + 0.5 * (own_penalty * map_.square()).sum((1, 2))
            return loss, ((gradient + own_penalty * map_) * own_scale).flatten(1)

        return minimise(function, (start / scale).flatten(1)).view(shape) * scale

    def _loss(self, map_: Float[Tensor, "K C R"]) -> tuple[Float[Tensor, " K"], Float[Tensor, "K C R"]]:
        """The weighted sum of losses and its gradient, summed over blocks of images."""
        total, gradient = map_.new_zeros(len(map_)), torch.zeros_like(map_)
        for first in range(0, len(self.design.rows), self.block):
            loss, slope = self._block_loss(map_, slice(first, first + self.block))
            total, gradient = total + loss, gradient + slope
        return total, gradient

    def _block_loss(
        self, map_: Float[Tensor, "K C R"], block: slice
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, "K C R"]]:
        design, (k, c, _) = self.design, map_.shape
        z, weights = design.rotated[block], design.weights[block]
        logits = matmul(z, map_[..., :-1].flatten(0, 1).T).view(-1, k, c) + map_[..., -1]  # [N, K, C]
        if self.multinomial:
            classes = torch.from_numpy(design.tokens.labels[design.rows[block]]).to(logits.device)
            index = classes[:, None, None].expand(-1, k, 1)
            losses = torch.logsumexp(logits, dim=-1) - logits.gather(-1, index)[..., 0]
            slope = torch.softmax(logits, dim=-1).scatter_add_(-1, index, logits.new_tensor(-1.0).expand(index.shape))
        else:
            targets = design.targets[block]
            losses = (F.softplus(logits) - logits * targets[:, None]).sum(-1)
            slope = torch.sigmoid(logits) - targets[:, None]
        slope *= weights[:, None, None]
        gradient = matmul(slope.flatten(1).T, z).view(k, c, -1)
        return weights @ losses, torch.cat([gradient, slope.sum(0)[..., None]], dim=-1)
