"""Ridge regression for a whole path of penalties from one decomposition, with leave-one-out outputs in closed form."""

import numpy as np
import torch
from torch import Tensor

from mlfusion.probing.solvers.design import F64, Design, FixedLinear, Penalty, matmul
from mlfusion.shapes import Float, Num
from mlfusion.system.threads import denormals

SCALES = tuple(np.geomspace(1e-1, 1e3, 81).tolist())  # candidate factors of ridge's scores


class Ridge:
    """Σ w ‖y − Wx − b‖² + λ‖W‖² at its minimum (Hoerl & Kennard, 1970), for any number of λ from one factorisation.

    y is the number, or 1 for a class or label and 0 for the others. The score of an image by a probe fitted without it
    needs no fit: (ŷ − h y) / (1 − h), h being the image's leverage (Allen, 1974). These scores choose λ.

    Scores of classes and labels are not logits: one half is subtracted, and they are multiplied by the factor that makes the
    left-out labels most probable, which does not change their order.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        self.mean = design.weights @ design.targets / design.weights.sum()  # [C]
        self.product = design.rotated.T @ (design.weights[:, None] * (design.targets - self.mean))  # [r, C]

    @denormals(kept=False)
    def left_out(self, setting: Penalty) -> Float[Tensor, "N C"]:
        """Outputs for every image by the probe fitted to all others."""
        outputs = self._outputs(self._left_out(setting), 1.0)
        return self._own_factor(outputs) * outputs

    @denormals(kept=False)
    def solve(self, setting: Penalty, *, factor: float | None = None) -> FixedLinear:
        """The probe fitted to all images; the factor of its outputs is by default that of the left-out ones."""
        if factor is None:
            factor = self._own_factor(self._outputs(self._left_out(setting), 1.0))
        rotated = (self.product / (self.design.eigenvalues + setting.penalty)[:, None]).T
        return self.design.unrotated(factor * rotated[None], self._outputs(self.mean, factor)[None])

    def _left_out(self, setting: Penalty) -> Float[Tensor, "N C"]:
        design = self.design
        share = 1 / (design.eigenvalues + setting.penalty)
        fitted = self.mean + matmul(design.rotated, share[:, None] * self.product)
        leverage = design.weights * (1 / design.weights.sum() + design.rotated.square() @ share)
        return (fitted - leverage[:, None] * design.targets) / (1 - leverage)[:, None]

    def _outputs(self, scores: Float[Tensor, "*N C"], factor: float) -> Float[Tensor, "*N C"]:
        return scores if self.design.target.kind == "number" else factor * (scores - 0.5)

    def _own_factor(self, outputs: Float[Tensor, "N C"]) -> float:
        return self.factor(outputs, self.design.tokens.labels[self.design.rows])

    def factor(self, outputs: Float[Tensor, "n C"], labels: Num[np.ndarray, "n ..."]) -> float:
        """The factor that makes the labels of images most probable, whose outputs with a factor of 1 are given."""
        if self.design.target.kind == "number":
            return 1.0
        loss = self.design.target.loss(labels, self.design.device, F64)
        outputs, truth = outputs.to(self.design.device, F64), torch.from_numpy(labels).to(self.design.device)

        def loss_at(index: int) -> float:
            return float(loss((SCALES[index] * outputs)[None], truth)[0])

        low, high = 0, len(SCALES) - 1
        while low < high:  # the loss is convex in the factor: it falls, then rises
            middle = (low + high) // 2
            low, high = (low, middle) if loss_at(middle) <= loss_at(middle + 1) else (middle + 1, high)
        return SCALES[low]
