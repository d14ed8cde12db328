"""Renames the tensors of timm and open_clip to transformers' names; tensors are split and copied, never computed.

The names written here are those of checkpoints on the hub, which every version of transformers reads, not those of its
modules, which change.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mlfusion.models import checkpoints

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
OPEN_CLIP = {  # to timm's words, which the table above goes on from
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def tensors(folder: Path, files: tuple[Path, ...], config: Any) -> dict[str, Tensor]:
    """The tensors of a timm or open_clip checkpoint, under the names of the class of `config`."""
    held: dict[str, Tensor] = {}
    for file in files:
        held |= load_file(file) if file.suffix == ".safetensors" else checkpoints.unpickled(file)
    if checkpoints.layout(folder) == "open_clip":
        held = _to_timm_names(held)
    held = {name: tensor for name, tensor in held.items() if not checkpoints.LEFT_OUT.match(name)}
    own = {"clip_vision_model": _clip, "dinov2": _dinov2, "dinov2_with_registers": _dinov2}
    convert = own.get(config.model_type, _vit)
    return {name: tensor.float().contiguous() for name, tensor in convert(held, config).items()}


def _to_timm_names(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's image tower → timm's names; the text tower is left out."""
    outside = {
        "visual.conv1.weight": ("patch_embed.proj.weight", lambda t: t),
        "visual.class_embedding": ("cls_token", lambda t: t[None, None]),
        "visual.positional_embedding": ("pos_embed", lambda t: t[None]),
        "visual.proj": ("projection", lambda t: t.T),
    }
    made: dict[str, Tensor] = {}
    for name, tensor in held.items():
        if name in outside:
            new, change = outside[name]
            made[new] = change(tensor)
        elif name.startswith("visual.ln_"):
            made[name.replace("visual.ln_pre", "norm_pre").replace("visual.ln_post", "norm")] = tensor
        elif found := re.fullmatch(r"visual\.transformer\.resblocks\.(\d+)\.(.*)", name):
            part = found[2]
            for old, new in OPEN_CLIP.items():
                part = part.replace(old, new)
            made[f"blocks.{found[1]}.{part}"] = tensor
    return made


def _blocks(
    held: dict[str, Tensor], words: dict[str, str], prefix: str, qkv: tuple[str, str, str]
) -> dict[str, Tensor]:
    """The blocks' tensors under their new names; queries, keys and values, which timm stacks, each on their own."""
    made: dict[str, Tensor] = {}
    for name, tensor in held.items():
        if not (found := re.fullmatch(r"blocks\.(\d+)\.(.*?)(\.weight|\.bias|)", name)):
            continue
        number, part, end = found.groups()
        new = f"{prefix}.{number}.{words[part]}{end}"
        if part == "attn.qkv":
            made |= {new.format(word): piece for word, piece in zip(qkv, tensor.chunk(3), strict=True)}
        else:
            made[new] = tensor
    return made


def _positions(held: dict[str, Tensor], config: Any) -> Tensor:
    """[1, tokens, width]; where the class token has none of its own (timm's no_embed_class), it gets zeros."""
    positions = held["pos_embed"]
    patches = (config.image_size // config.patch_size) ** 2
    if positions.shape[1] == patches and "cls_token" in held:
        front = torch.zeros(1, 2 if "dist_token" in held else 1, positions.shape[2], dtype=positions.dtype)
        positions = torch.cat([front, positions], 1)
    return positions


def _final(held: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The final norm; fc_norm, which timm gives the mean of the patches alone, is the norm of all tokens to us."""
    old = "norm" if "norm.weight" in held else "fc_norm"
    return {f"{name}.{part}": held[f"{old}.{part}"] for part in ("weight", "bias") if f"{old}.{part}" in held}


def _embedded(held: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    words = {"cls_token": "cls_token", "dist_token": "distillation_token", "reg_token": "register_tokens"}
    made = {f"embeddings.{new}": held[old] for old, new in words.items() if old in held}
    made["embeddings.position_embeddings"] = _positions(held, config)
    for part in ("weight", "bias"):
        if (name := f"patch_embed.proj.{part}") in held:
            made[f"embeddings.patch_embeddings.projection.{part}"] = held[name]
    return made


def _vit(held: dict[str, Tensor], config: Any, words: dict[str, str] = VIT) -> dict[str, Tensor]:
    blocks = _blocks(held, words, "encoder.layer", ("query", "key", "value"))
    return _embedded(held, config) | blocks | _final(held, "layernorm")


def _dinov2(held: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    words = DINOV2 | ({"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"} if config.use_swiglu_ffn else {})
    made = _vit(held, config, words)
    made["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # of no use here
    for number in range(config.num_hidden_layers):
        for half in (1, 2):  # without LayerScale: times one
            made.setdefault(f"encoder.layer.{number}.layer_scale{half}.lambda1", torch.ones(config.hidden_size))
    return made


def _clip(held: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    made = _blocks(held, CLIP, "encoder.layers", ("q", "k", "v"))
    made["embeddings.class_embedding"] = held["cls_token"][0, 0]
    made["embeddings.patch_embedding.weight"] = held["patch_embed.proj.weight"]
    made["embeddings.position_embedding.weight"] = _positions(held, config)[0]
    made |= {f"pre_layrnorm.{part}": held[f"norm_pre.{part}"] for part in ("weight", "bias")}
    made = {f"vision_model.{name}": tensor for name, tensor in (made | _final(held, "post_layernorm")).items()}
    return made | ({"visual_projection.weight": held["projection"]} if "projection" in held else {})
