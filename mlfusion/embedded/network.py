"""The vision transformer that is pre-trained, the heads of its objectives, and a forward pass that suits few cores."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from mlfusion.embedded.recipe import Network, Recipe
from mlfusion.embedded.scenes import GRAIN, LAYOUT


class ObjectiveHeads(nn.Module):
    """The heads of the objectives, which are dropped after pre-training."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.formula_of_cls = nn.Linear(width, classes)
        self.formula_of_patches = nn.Linear(width, classes)
        self.fill = nn.Linear(width, classes)
        self.contrast = nn.Sequential(nn.Linear(2 * width, 512), nn.GELU(), nn.Linear(512, 128))
        self.layout = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, LAYOUT))
        self.grain = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, GRAIN))


class PretrainingModel(nn.Module):
    """The ViT and the heads of its objectives, initialised from the recipe's seed."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        net = recipe.network
        torch.manual_seed(recipe.schedule.seed)
        self.vit = ViTModel(vit_config(net), add_pooling_layer=False)
        with torch.no_grad():  # initialised here, since versions of transformers may do it differently
            self.vit.embeddings.cls_token.normal_(0, 0.02)
            self.vit.embeddings.position_embeddings.normal_(0, 0.02)
        self.heads = ObjectiveHeads(net.width, recipe.images.classes * len(recipe.images.families))


def vit_config(net: Network) -> ViTConfig:
    """The network as transformers' configuration."""
    return ViTConfig(
        image_size=net.image_px,
        patch_size=net.patch_px,
        num_hidden_layers=net.depth,
        hidden_size=net.width,
        num_attention_heads=net.heads,
        intermediate_size=4 * net.width,
        layer_norm_eps=1e-6,
    )


def embed(vit: ViTModel, pictures: Tensor, keep: int, draw: torch.Generator) -> Tensor:
    """Pictures `[b, 3, px, px]` → CLS and `keep` random patches, `[b, 1 + keep, width]`."""
    parts = vit.embeddings
    projection = parts.patch_embeddings.projection
    patch_px: Any = vit.config.patch_size
    patches = F.unfold(pictures, patch_px, stride=patch_px).transpose(1, 2).to(projection.weight.dtype)
    positions = parts.position_embeddings[:, 1:]
    if keep < patches.shape[1]:
        chosen = torch.rand(patches.shape[:2], generator=draw).topk(keep, dim=1).indices
        patches = patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2]))
        # The gradient of this product with 0 and 1 is a sum in a fixed order; that of indexing is not.
        positions = F.one_hot(chosen, positions.shape[1]).to(positions.dtype) @ positions[0]
    tokens = F.linear(patches, projection.weight.flatten(1), projection.bias) + positions
    cls = parts.cls_token + parts.position_embeddings[:, :1]
    return torch.cat([cls.expand(len(pictures), -1, -1), tokens], 1)


def encode(vit: ViTModel, tokens: Tensor) -> Tensor:
    """The blocks and the final norm of `ViTModel`, `[b, t, width]` → `[b, t, width]`.

    One product gives queries, keys and values, and plain batched products the attention. For a few dozen tokens that takes
    about half the time of the fused CPU kernel's forward and backward pass.
    """
    b, t, width = tokens.shape
    heads = vit.config.num_attention_heads
    head_width = width // heads
    block: Any
    for block in vit.layers:
        attention = block.attention
        scale = head_width**-0.5
        weight = torch.cat([attention.q_proj.weight * scale, attention.k_proj.weight, attention.v_proj.weight])
        bias = torch.cat([attention.q_proj.bias * scale, attention.k_proj.bias, attention.v_proj.bias])
        joint = F.linear(block.layernorm_before(tokens), weight, bias).view(b, t, 3, heads, head_width)
        q, k, v = joint.permute(2, 0, 3, 1, 4).reshape(3, b * heads, t, head_width).unbind(0)
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        tokens = tokens + attention.o_proj(mixed.view(b, heads, t, head_width).transpose(1, 2).reshape(b, t, width))
        tokens = tokens + block.mlp(block.layernorm_after(tokens))
    return vit.layernorm(tokens)
