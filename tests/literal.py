"""What a researcher would write for one configuration: keys and values projected per token, torch.nn and torch.optim.

Slow and obvious on purpose. It shares no code with the package; the folded, lockstep probes are held against it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn


class LiteralAttentive(nn.Module):
    """Cross-attention of a learned query over the tokens of an image, BatchNorm, Linear."""

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, 2 * (width // heads)
        inner = heads * self.head_width
        self.query = nn.Parameter(torch.zeros(width))
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(width) for _ in range(3))
        self.to_query, self.to_key, self.to_value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.to_output = nn.Linear(inner, width)
        self.norm = nn.BatchNorm1d(width)
        self.classifier = nn.Linear(width, classes)

    def attention(self, tokens: Tensor) -> Tensor:
        """[B, T, D] → [B, H, T]."""
        b, t, _ = tokens.shape
        query = self.to_query(self.query_norm(self.query)).view(self.heads, self.head_width)
        key = self.to_key(self.key_norm(tokens)).view(b, t, self.heads, self.head_width)
        return torch.einsum("he,bthe->bht", query, key).div(math.sqrt(self.head_width)).softmax(-1)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, T, D], and dropout factors [B, H, T] → [B, C]."""
        b, t, _ = tokens.shape
        weights = self.attention(tokens)
        if keep is not None:
            weights = weights * keep
        value = self.to_value(self.value_norm(tokens)).view(b, t, self.heads, self.head_width)
        return self.classifier(self.norm(self.to_output(torch.einsum("bht,bthe->bhe", weights, value).flatten(1))))

    def counterparts(self) -> dict[str, Tensor]:
        """Name in the folded probe → the same parameter or statistic here, which may be shaped otherwise."""
        return {
            "query": self.query,
            "query_scale": self.query_norm.weight,
            "query_shift": self.query_norm.bias,
            "key_scale": self.key_norm.weight,
            "value_scale": self.value_norm.weight,
            "value_shift": self.value_norm.bias,
            "to_query": self.to_query.weight,
            "to_key": self.to_key.weight,
            "to_value": self.to_value.weight,
            "to_output": self.to_output.weight,
            "output_bias": self.to_output.bias,
            "norm_scale": self.norm.weight,
            "norm_shift": self.norm.bias,
            "running_mean": self.norm.running_mean,
            "running_var": self.norm.running_var,
            "classifier": self.classifier.weight,
            "classifier_bias": self.classifier.bias,
        }


class LiteralLinear(nn.Module):
    """One Linear on the concatenated tokens."""

    def __init__(self, tokens: int, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(tokens * width, classes)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, T, D] → [B, C]."""
        return self.classifier(tokens.reshape(len(tokens), -1))

    def counterparts(self) -> dict[str, Tensor]:
        """Name in the population's probe → the same parameter here."""
        return {"weight": self.classifier.weight, "bias": self.classifier.bias}


Literal = TypeVar("Literal", bound=LiteralAttentive | LiteralLinear)


@torch.no_grad()
def copy_into(module: Literal, state: Mapping[str, Tensor | np.ndarray]) -> Literal:
    """Load one configuration's numbers, every one of which must have its place."""
    there = module.counterparts()
    assert there.keys() == state.keys()
    for name, value in state.items():
        there[name].copy_(torch.as_tensor(value).reshape(there[name].shape))
    return module


def train_literally(
    module: LiteralAttentive | LiteralLinear,
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    class_weights: Tensor,
    clip: float | None,
) -> None:
    """The loop: AdamW, cosine decay of the rate to 1e-6, clipped gradients, weighted cross-entropy."""
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    criterion = nn.CrossEntropyLoss(weight=class_weights)
    for step, (tokens, labels, keep) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-6 + 0.5 * (lr - 1e-6) * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        criterion(module(tokens, keep), labels).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    module.eval()
