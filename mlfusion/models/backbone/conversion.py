"""Renames the tensors of timm and open_clip to transformers' names; nothing is computed but the positions of registers.

The new names are those of checkpoints on the hub, which every version of transformers reads. The names of its modules change.
"""

import re
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mlfusion.models import checkpoints, timm

VIT = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "attn.qkv": "attention.attention.{}",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
DINOV2 = {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")} | {
    "attn.proj": "attention.output.dense",
    "attn.qkv": "attention.attention.{}",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
CLIP = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "attn.qkv": "self_attn.{}_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OPEN_CLIP = {  # to timm's names, which CLIP maps to transformers'
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def tensors(weights: dict[str, Tensor], layout: checkpoints.Layout, config: Any) -> dict[str, Tensor]:
    """The tensors of a timm or open_clip checkpoint, under the names of the class of `config`."""
    if layout == "open_clip":
        weights = _to_timm_names(weights)
    weights = {name: tensor for name, tensor in weights.items() if not timm.CLASSIFIER.match(name)}
    converters = {"clip_vision_model": _clip, "dinov2": _dinov2, "dinov2_with_registers": _dinov2}
    return converters.get(config.model_type, _vit)(weights, config)


def _to_timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's image tower → timm's names; the text tower is left out."""
    outside_blocks = {
        "visual.conv1.weight": ("patch_embed.proj.weight", lambda t: t),
        "visual.class_embedding": ("cls_token", lambda t: t[None, None]),
        "visual.positional_embedding": ("pos_embed", lambda t: t[None]),
        "visual.proj": ("projection", lambda t: t.T),
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in outside_blocks:
            new, change = outside_blocks[name]
            renamed[new] = change(tensor)
        elif name.startswith("visual.ln_"):
            renamed[name.replace("visual.ln_pre", "norm_pre").replace("visual.ln_post", "norm")] = tensor
        elif match := re.fullmatch(r"visual\.transformer\.resblocks\.(\d+)\.(.*)", name):
            part = match[2]
            for old, new in OPEN_CLIP.items():
                part = part.replace(old, new)
            renamed[f"blocks.{match[1]}.{part}"] = tensor
    if "norm_pre.weight" not in renamed:  # CLIPA, which becomes a ViT: its patch embedding has a bias
        renamed["patch_embed.proj.bias"] = torch.zeros(len(renamed["patch_embed.proj.weight"]))
    return renamed


def _blocks(
    weights: dict[str, Tensor], names: dict[str, str], prefix: str, qkv: tuple[str, str, str]
) -> dict[str, Tensor]:
    """The blocks' tensors under their new names; timm's stacked queries, keys and values are split."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not (match := re.fullmatch(r"blocks\.(\d+)\.(.*?)(\.weight|\.bias|)", name)):
            continue
        number, part, end = match.groups()
        new = f"{prefix}.{number}.{names[part]}{end}"
        if part == "attn.qkv":
            renamed |= {new.format(role): piece for role, piece in zip(qkv, tensor.chunk(3), strict=True)}
        else:
            renamed[new] = tensor
    return renamed


def _final(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The final norm; timm applies fc_norm to the mean of the patches, and here it is the norm of all tokens."""
    old = "norm" if "norm.weight" in weights else "fc_norm"
    return {f"{name}.{part}": weights[f"{old}.{part}"] for part in ("weight", "bias") if f"{old}.{part}" in weights}


def _embeddings(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Special tokens, positions and patch embedding.

    The classes give positions to the first special token (DeiT: to the first two) and the patches. Registers come after
    that, so their positions are added here. A token without a position (timm's no_embed_class) gets zeros.
    """
    there = [weights[name] for name in ("cls_token", "dist_token", "reg_token") if name in weights]
    positions, patches = weights["pos_embed"], (config.image_size // config.patch_size) ** 2
    first, of_patches = positions[:, :-patches], positions[:, -patches:]
    renamed: dict[str, Tensor] = {}
    if there:
        tokens = torch.cat(there, 1)
        first = first if first.shape[1] else torch.zeros_like(tokens)
        with_position = 2 if "dist_token" in weights else 1
        renamed["embeddings.cls_token"] = tokens[:, :1]
        if "dist_token" in weights:
            renamed["embeddings.distillation_token"] = tokens[:, 1:2]
        if tokens.shape[1] > with_position:
            renamed["embeddings.register_tokens"] = (tokens + first)[:, with_position:]
        first = first[:, :with_position]
    renamed["embeddings.position_embeddings"] = torch.cat([first, of_patches], 1)
    for part in ("weight", "bias"):
        if (name := f"patch_embed.proj.{part}") in weights:
            renamed[f"embeddings.patch_embeddings.projection.{part}"] = weights[name]
    return renamed


def _vit(weights: dict[str, Tensor], config: Any, names: dict[str, str] = VIT) -> dict[str, Tensor]:
    blocks = _blocks(weights, names, "encoder.layer", ("query", "key", "value"))
    return _embeddings(weights, config) | blocks | _final(weights, "layernorm")


def _dinov2(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    names = DINOV2 | ({"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"} if config.use_swiglu_ffn else {})
    renamed = _vit(weights, config, names)
    renamed["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # unused, but expected by the class
    if not any(name.endswith(".gamma") for name in weights):  # without LayerScale: times one
        for number, half in product(range(config.num_hidden_layers), (1, 2)):
            renamed[f"encoder.layer.{number}.layer_scale{half}.lambda1"] = torch.ones(config.hidden_size)
    return renamed


def _clip(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    renamed = _blocks(weights, CLIP, "encoder.layers", ("q", "k", "v"))
    renamed["embeddings.class_embedding"] = weights["cls_token"][0, 0]
    renamed["embeddings.patch_embedding.weight"] = weights["patch_embed.proj.weight"]
    renamed["embeddings.position_embedding.weight"] = _embeddings(weights, config)["embeddings.position_embeddings"][0]
    renamed |= {f"pre_layrnorm.{part}": weights[f"norm_pre.{part}"] for part in ("weight", "bias")}
    renamed = {f"vision_model.{name}": tensor for name, tensor in (renamed | _final(weights, "post_layernorm")).items()}
    return renamed | ({"visual_projection.weight": weights["projection"]} if "projection" in weights else {})
