"""Changes one tensor of a checkpoint at a time, and says what became of the features: refused, equal, or silently wrong.

Whether the features depend on a tensor is known from transformers alone: from its own forward pass with other numbers in it.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlfusion import models
from mlfusion.errors import BadModel
from mlfusion.models.backbone import Backbone

Edit = Callable[[dict[str, Tensor], str], dict[str, Tensor]]


def dropped(held: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {other: tensor for other, tensor in held.items() if other != name}


def renamed(held: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return dropped(held, name) | {f"{name}_old": held[name]}


def added(held: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """One beside it: a bias, or if there is one, 'extra'."""
    stem = name.rpartition(".")[0]
    other = next(full for part in ("bias", "extra") if (full := f"{stem}.{part}".lstrip(".")) not in held)
    return held | {other: torch.ones(len(held[name]) if held[name].ndim else 1)}


def reshaped(held: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    tensor = held[name][None] if held[name].ndim == 0 else held[name]
    return held | {name: torch.cat([tensor, tensor])}


EDITS: dict[str, Edit] = {"dropped": dropped, "renamed": renamed, "one added": added, "reshaped": reshaped}
OUTCOMES = ("refused", "equal, not used", "silently wrong")


def _features(folder: Path, pixels: Tensor) -> list[Tensor]:
    backbone = Backbone(models.locate(str(folder)))
    return list(backbone(pixels, [(layer, "all") for layer in range(backbone.depth + 1)]).values())


@torch.inference_mode()
def _oracle(name: str, folder: Path, pixels: Tensor) -> Tensor:
    """What the last block gives, by its final norm, as transformers computes it."""
    truth, tower = zoo.ZOO[name], zoo.tower_of(name, folder)
    output = zoo.given(tower, truth.arguments(pixels), zoo.blocks_of(name, tower)[-1], entering=False)
    last = zoo.flat(output, truth.channels_first)
    return last if truth.final is None else zoo.normed(tower.get_submodule(truth.final), last)


def family(name: str, place: Path, every: int = 1) -> Counter[str]:
    """Try every such tensor of one family in every way → how many tensors, of each outcome, and of both together."""
    whole, folder = zoo.save(name, place / "whole"), place / "changed"
    shutil.copytree(whole, folder)
    held = load_file(whole / "model.safetensors")
    side = zoo.ZOO[name].pixels
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(5))
    before, expected = _features(whole, pixels), _oracle(name, whole, pixels)
    counts: Counter[str] = Counter()

    def write(tensors: dict[str, Tensor]) -> None:
        own = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
        save_file(own, folder / "model.safetensors", {"format": "pt"})

    for tensor in sorted(held)[::every]:
        counts["tensors"] += 1
        write(held | {tensor: held[tensor] + 1})
        used = not torch.equal(_oracle(name, folder, pixels), expected)
        for how, change in EDITS.items():
            write(change(held, tensor))
            try:
                after = _features(folder, pixels)
            except BadModel:
                outcome = "refused"
            else:
                equal = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
                outcome = "equal, not used" if equal and (not used or how == "one added") else "silently wrong"
            counts[outcome] += 1
            counts[f"{how}: {outcome}"] += 1
    return counts
