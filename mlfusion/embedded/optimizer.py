"""The optimiser of pre-training: Muon for the matrices inside the blocks, AdamW for all other weights."""

from typing import Any

import torch
from torch import Tensor

from mlfusion.embedded.network import PretrainingModel
from mlfusion.embedded.recipe import Schedule


def orthogonalise(update: Tensor) -> Tensor:
    """Matrices `[n, r, c]`, r ≤ c → nearly the closest ones with orthonormal rows (Newton-Schulz; Jordan et al. 2024)."""
    x = (update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.float()


class MuonAdamW:
    """Muon for the matrices inside the blocks, AdamW for all else, over float32 masters of the bfloat16 weights."""

    def __init__(self, model: PretrainingModel, schedule: Schedule) -> None:
        self.schedule = schedule
        self.live = dict(model.named_parameters())
        self.master = {name: p.detach().float().clone() for name, p in self.live.items()}
        inner = [n for n, p in self.live.items() if n.startswith("vit.layers.") and p.ndim == 2]
        self.matrices = [
            [n for n in inner if self.live[n].shape == s] for s in sorted({self.live[n].shape for n in inner})
        ]
        self.momentum = {n: torch.zeros_like(self.master[n]) for n in inner}
        rest = [n for n in self.live if n not in self.momentum]
        # Weight decay applies to the heads' matrices, but not to vectors, positions and the CLS token.
        decays = {True: [n for n in rest if self.live[n].ndim == 2], False: [n for n in rest if self.live[n].ndim != 2]}
        groups = [
            {"params": [self.master[n] for n in names], "weight_decay": schedule.weight_decay * decay}
            for decay, names in decays.items()
        ]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self._copy_to_model()

    def _copy_to_model(self) -> None:
        """Round the float32 masters to the model's weights."""
        with torch.no_grad():
            for name, p in self.live.items():
                p.copy_(self.master[name])

    def step(self, gradient: dict[str, Tensor], rate: float) -> None:
        """One update from the gradient of every weight; its norm is clipped at 1."""
        norm = torch.stack([g.norm() for g in gradient.values()]).norm()
        clip = (1 / norm).clamp(max=1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        for name, p in self.master.items():
            p.grad = gradient[name] * clip
        self.adam.step()
        with torch.no_grad():
            for names in self.matrices:
                grads = torch.stack([gradient[n] * clip for n in names])
                old = torch.stack([self.momentum[n] for n in names])
                old.lerp_(grads, 0.05)
                update = grads.lerp(old, 0.95)
                flat = update if update.shape[1] <= update.shape[2] else update.mT
                update = orthogonalise(flat) if flat is update else orthogonalise(flat).mT
                # Scaled to the size of Adam's updates (Liu et al. 2025), so that one rate serves both.
                step = rate * 0.2 * max(update.shape[1:]) ** 0.5
                for name, u, m in zip(names, update, old, strict=True):
                    self.master[name].mul_(1 - rate * self.schedule.weight_decay).sub_(u, alpha=step)
                    self.momentum[name] = m
        self._copy_to_model()

    def state(self) -> dict[str, Any]:
        """The state that the next step depends on."""
        return {"master": self.master, "momentum": self.momentum, "adam": self.adam.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        for name, value in state["master"].items():
            self.master[name].copy_(value)
        self.momentum = state["momentum"]
        self.adam.load_state_dict(state["adam"])
        self._copy_to_model()
