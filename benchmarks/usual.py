"""The attentive probe as a researcher would train it: PyTorch's layers, one configuration, a DataLoader of samples."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mlfusion.probing.training.batches import Tokens
from mlfusion.system import threads

BATCH = 301  # a fifth of DTD's training images


class Samples(Dataset[tuple[Tensor, int]]):
    """One image at a time, of length 1 and jittered."""

    def __init__(self, tokens: Tokens) -> None:
        self.values, self.labels = torch.from_numpy(np.asarray(tokens.values)), tokens.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        x = F.normalize(self.values[row].float(), dim=-1)
        if torch.rand(()) < 0.5:
            x = x + 0.05 * torch.randn_like(x)
        return x, int(self.labels[row])


class Usual(nn.Module):
    """The probe with keys and values projected for every token."""

    def __init__(self, width: int, heads: int, classes: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.head_width = 2 * (width // heads)
        inner = heads * self.head_width
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width) for _ in range(3))
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out, self.norm, self.head = nn.Linear(inner, width), nn.BatchNorm1d(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, C]."""
        b, t, _ = x.shape
        q = (
            self.to_q(self.norm_q(self.query))
            .view(1, 1, self.heads, self.head_width)
            .transpose(1, 2)
            .expand(b, -1, -1, -1)
        )
        k = self.to_k(self.norm_k(x)).view(b, t, self.heads, self.head_width).transpose(1, 2)
        v = self.to_v(self.norm_v(x)).view(b, t, self.heads, self.head_width).transpose(1, 2)
        pooled = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.head(self.norm(self.out(pooled.transpose(1, 2).flatten(1))))


def wait(device: str) -> float:
    """Now, when the device has done all that it was told."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def usual(tokens: Tokens, heads: int, device: str) -> Callable[[int], list[float]]:
    """The loop; seconds of each of so many steps."""
    classes = int(tokens.labels.max()) + 1
    model = Usual(tokens.shape[2], heads, classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    counts = np.bincount(tokens.labels, minlength=classes)
    criterion = nn.CrossEntropyLoss(weight=torch.from_numpy(len(tokens) / (classes * counts)).float().to(device))

    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from DataLoader(Samples(tokens), batch_size=BATCH, shuffle=True, drop_last=True)

    loader = forever()

    def steps(count: int) -> list[float]:
        took = []
        for _ in range(count):
            start = wait(device)
            x, y = next(loader)
            optimizer.zero_grad()
            criterion(model(x.to(device)), y.to(device)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            took.append(wait(device) - start)
        return took

    return steps


def flushed(tokens: Tokens, heads: int, device: str) -> Callable[[int], list[float]]:
    """The loop as `usual`, with denormal numbers taken as 0 by all of PyTorch's threads.

    Threads that exist already keep their setting, so it runs in a thread of its own; those that it starts take over its own.
    """
    with threads.denormals(kept=False):
        alone = threads.pool(1)
        loop = alone.submit(usual, tokens, heads, device).result()
    tiny = torch.full((1 << 20,), 1e-39)
    assert not alone.submit(lambda: tiny + tiny).result().view(torch.int32).any()
    return lambda count: alone.submit(loop, count).result()
