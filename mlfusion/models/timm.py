"""Describes a vision transformer of timm as a configuration of the class of transformers that computes the same tokens.

The facts are those of timm/models/vision_transformer.py (timm 1.0). The library itself is not needed.
"""

import re
from collections.abc import Mapping
from typing import Any

from mlfusion.errors import BadModel
from mlfusion.models.fields import Fields, misfit, refuse_wrapper, square

Shapes = Mapping[str, tuple[int, ...]]

HEADS = {192: 3, 256: 4, 320: 5, 384: 6, 512: 8, 640: 10, 768: 12, 832: 13, 896: 14, 1024: 16, 1152: 16, 1280: 16}
HEADS |= {1408: 16, 1536: 24, 1664: 16}
"""Width → attention heads of timm's vision transformers, if neither model_args nor the name says otherwise."""
SIXTEEN_HEADS = re.compile(r"vit_base_patch16_gap_224|vit_giantopt_.*")

WORDS = re.compile(
    r"vit|deit|deit3|eva|flexivit|tiny|xsmall|small|wee|little|medium|mediumd|betwixt|base|large|huge|giant|giantopt|gigantic"
    r"|so150m|so150m2|so400m|plus|patch\d+|\d{2,4}|distilled|dinov2|tipsv2|miil|gap|reg\d+|36x1|clip|quickgelu|siglip"
)
"""Words of an architecture's name that are known: sizes, what the tensors show, and those of the next two lines."""
TANH = re.compile(r"patch32_siglip|large_patch16_siglip(_gap)?_512|so400m_patch16_siglip|giantopt_patch16_siglip")
"""Names of SigLIP whose GELU is the approximation by tanh."""
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
}
"""timm's name of an activation → transformers'."""

_TRAINING = "only in training"
_HEAD = "what follows the tokens: pooling and classifier"
_INITIAL = "initial values, which the file's tensors replace"
ARGUMENTS = Fields(
    "timm's model_args",
    read=frozenset(
        {
            "act_layer",
            "norm_layer",
            "num_heads",
            "img_size",
            "patch_size",
            "embed_dim",
            "depth",
            "mlp_ratio",
            "qkv_bias",
        }
        | {"class_token", "reg_tokens", "no_embed_class", "pre_norm", "init_values", "in_chans"}
    ),
    no_effect=dict.fromkeys(
        ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
        _TRAINING,
    )
    | dict.fromkeys(("weight_init", "fix_init"), _INITIAL)
    | dict.fromkeys(("num_classes", "pool_include_prefix"), _HEAD)
    | {
        "fc_norm": "the file has the final norm, under one of two names",
        "dynamic_img_size": "allows other sizes; at its own size the model computes the same",
    },
    fixed=dict.fromkeys(("qk_norm", "scale_attn_norm", "scale_mlp_norm", "dynamic_img_pad"), (False,))
    | dict.fromkeys(("proj_bias", "final_norm"), (True,))
    | {"pos_embed": ("learn",), "attn_layer": ("", "attn"), "global_pool": ("", "token", "avg", "avgmax", "max")},
)
_RECORD = "a record of where the weights come from"
_ASKED = "timm uses it only if it is asked to"
PRETRAINED = Fields(
    "timm's pretrained_cfg",
    read=frozenset({"input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"}),
    no_effect=dict.fromkeys(
        ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag", "license"),
        _RECORD,
    )
    | dict.fromkeys(("description", "origin_url", "paper_name", "paper_ids", "notes", "custom_load"), _RECORD)
    | dict.fromkeys(("test_input_size", "test_crop_pct", "test_pool_size", "min_input_size"), _ASKED)
    | dict.fromkeys(("num_classes", "label_offset", "label_names", "label_descriptions", "classifier"), _HEAD)
    | dict.fromkeys(("pool_size", "global_pool"), _HEAD)
    | {
        "first_conv": "the name of the patch embedding",
        "fixed_input_size": "the input size is the model's own in both cases",
    },
    fixed={"crop_border_pixels": (0,), "in_chans": (3,)},
)

BLOCK = re.compile(
    r"blocks\.(\d+)\.(?:norm[12]\.(?:weight|bias)|attn\.(?:qkv|proj)\.(?:weight|bias)|mlp\.fc[12]\.(?:weight|bias)|ls[12]\.gamma)"
)
OUTSIDE = re.compile(r"(?:cls|dist|reg)_token|pos_embed|(?:patch_embed\.proj|norm|fc_norm|norm_pre)\.(?:weight|bias)")
CLASSIFIER = re.compile(r"(?:head|head_dist|pre_logits)\.")

KNOWN = re.compile(f"{BLOCK.pattern}|{OUTSIDE.pattern}")
NEEDED = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")


def configuration(config: Mapping[str, Any], tensors: Shapes) -> Any:
    """The configuration of transformers' class, by timm's config.json and the tensors' shapes.

    Raises:
        BadModel: no class computes the same; the message names the field, the part of the architecture's name or the tensor.
    """
    name, arguments = str(config["architecture"]), config.get("model_args") or {}
    pretrained = config.get("pretrained_cfg") or {}
    _check_name(name)
    ARGUMENTS.check(arguments)
    PRETRAINED.check(pretrained)
    shapes = {key: shape for key, shape in tensors.items() if not CLASSIFIER.match(key)}
    refuse_wrapper(shapes, NEEDED, f"timm's {name}")
    if wrong := misfit(shapes, KNOWN, NEEDED):
        raise BadModel(
            f"timm's {name} has {wrong}, for which transformers has no "
            "class; allowed: plain ViT, DeiT, MAE, CLIP and DINOv2 of timm (no rotary positions, no pooling by attention). "
            "Many others have a repository in transformers' own format, such as google/siglip-base-patch16-224"
        )
    width, channels, *patch = shapes["patch_embed.proj.weight"]
    size = _size(arguments, pretrained)
    patch_px = square(patch, f"timm's {name}")
    common: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(match[1]) for key in shapes if (match := BLOCK.fullmatch(key))),
        "num_attention_heads": _heads(name, arguments, width),
        "patch_size": patch_px,
        "image_size": size,
        "layer_norm_eps": _epsilon(name, arguments),
        "hidden_act": _activation(name, arguments),
    }
    facts: dict[str, Any] = {
        "embed_dim": width,
        "in_chans": channels,
        "depth": common["num_hidden_layers"],
        "patch_size": patch_px,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "class_token": "cls_token" in shapes,
        "reg_tokens": shapes["reg_token"][1] if "reg_token" in shapes else 0,
        "pre_norm": "norm_pre.weight" in shapes,
        "no_embed_class": shapes["pos_embed"][1] == (size // patch_px) ** 2,
    }
    prefix = facts["class_token"] + facts["reg_tokens"] + ("dist_token" in shapes)
    if not prefix:
        del facts["no_embed_class"]
    elif shapes["pos_embed"][1] - (size // patch_px) ** 2 not in (0, prefix):
        raise BadModel(
            f"timm's {name} has {shapes['pos_embed'][1]} positions in its file; {size} x {size} pixels in patches of "
            f"{patch_px} need {(size // patch_px) ** 2}, or {prefix} more. Allowed: positions of the size in its config.json"
        )
    ARGUMENTS.agree(arguments, facts)
    ratio = arguments.get("mlp_ratio")
    if ratio is not None and int(width * ratio) != shapes["blocks.0.mlp.fc1.weight"][0]:
        ARGUMENTS.agree(arguments, {"mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width})
    if _is_swiglu(shapes) and arguments.get("act_layer") not in (None, "silu"):
        raise BadModel(f"timm's model_args have act_layer = {arguments['act_layer']!r} beside SwiGLU; allowed: silu")
    return _of_class(name, shapes, common)


def _of_class(name: str, shapes: Shapes, common: dict[str, Any]) -> Any:
    """The class that has a place for every tensor."""
    import transformers

    class_token, distilled = "cls_token" in shapes, "dist_token" in shapes
    registers = shapes["reg_token"][1] if "reg_token" in shapes else 0
    scaled, before = any(key.endswith(".gamma") for key in shapes), "norm_pre.weight" in shapes
    inner, bias = shapes["blocks.0.mlp.fc1.weight"][0], "blocks.0.attn.qkv.bias" in shapes
    refused = {
        "norm_pre with a bias of patch_embed": before and "patch_embed.proj.bias" in shapes,
        "norm_pre without a class token": before and not class_token,
        "norm_pre beside registers, a distillation token or LayerScale": before and (registers or distilled or scaled),
        "SwiGLU without registers and LayerScale": _is_swiglu(shapes) and not registers and not scaled,
        "a distillation token without a class token": distilled and not class_token,
        "a distillation token beside registers or LayerScale": distilled and (registers or scaled),
        "LayerScale without a class token and registers": scaled and not class_token and not registers,
        "norm and fc_norm, of which it uses one": "norm.weight" in shapes and "fc_norm.weight" in shapes,
        "no biases of queries, keys and values beside norm_pre": before and not bias,
    }
    if found := next((combination for combination, there in refused.items() if there), None):
        raise BadModel(f"timm's {name} has {found}, for which transformers has no class; allowed: {_ALLOWED}")
    if before:
        return transformers.CLIPVisionConfig(**common, intermediate_size=inner)
    if registers or scaled:
        mlp = _dinov2_mlp(name, shapes, common["hidden_size"])
        # The class needs a CLS token: the first register takes its place, and its name is given back by num_cls_tokens.
        more: dict[str, Any] = {"qkv_bias": bias, **mlp} | ({} if class_token else {"num_cls_tokens": 0})
        registers -= not class_token
        if registers:
            return transformers.Dinov2WithRegistersConfig(**common, **more, num_register_tokens=registers)
        return transformers.Dinov2Config(**common, **more)
    kind = (
        transformers.IJepaConfig
        if not class_token
        else transformers.DeiTConfig
        if distilled
        else transformers.ViTConfig
    )
    return kind(**common, qkv_bias=bias, intermediate_size=inner)


_ALLOWED = "plain ViT, DeiT, MAE, CLIP and DINOv2 of timm"


def _check_name(name: str) -> None:
    """Raise BadModel if a part of the name is not known, since it may stand for another computation with the same tensors."""
    if unknown := [word for word in name.split("_") if not WORDS.fullmatch(word)]:
        raise BadModel(
            f"the name of timm's {name} has the part {unknown[0]!r}, and what it computes is not known; allowed: {_ALLOWED}. "
            "If it computes what vit_base_patch16_224 does, write that as architecture in config.json, and what differs "
            "(num_heads, act_layer) in model_args"
        )


def _size(arguments: Mapping[str, Any], pretrained: Mapping[str, Any]) -> int:
    """Height and width of the images that the positions are for."""
    if "input_size" not in pretrained:
        raise BadModel(
            "timm's config.json has no input_size in a pretrained_cfg; allowed: a config.json that timm wrote"
        )
    size = square(pretrained["input_size"][1:], "timm's pretrained_cfg")
    own = arguments.get("img_size")
    if own is not None and (other := square(own, "timm's model_args")) != size:
        raise BadModel(
            f"timm's model_args have img_size = {other}, and pretrained_cfg has an input_size of {size}; allowed: the same "
            "size in both, that of the positions in the file"
        )
    return size


def _heads(name: str, arguments: Mapping[str, Any], width: int) -> int:
    heads = arguments.get("num_heads") or (16 if SIXTEEN_HEADS.fullmatch(name) else HEADS.get(width))
    if heads is None:
        raise BadModel(
            f"timm's {name} does not say how many attention heads it has, and a width of {width} is no usual one; allowed: "
            f"model_args with num_heads in config.json, or a width of {', '.join(map(str, HEADS))}"
        )
    return int(heads)


def _activation(name: str, arguments: Mapping[str, Any]) -> str:
    by_name = "quick_gelu" if "quickgelu" in name else "gelu_tanh" if TANH.search(name) else "gelu"
    asked = arguments.get("act_layer") or by_name
    if asked not in ACTIVATIONS:
        raise BadModel(f"timm's model_args have act_layer = {asked!r}; allowed: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[asked]


def _epsilon(name: str, arguments: Mapping[str, Any]) -> float:
    """ε of the norms: 1e-6 is the default of timm's LayerNorm, and its CLIP models set 1e-5."""
    asked = arguments.get("norm_layer")
    if asked not in (None, "layernorm"):
        raise BadModel(f"timm's model_args have norm_layer = {asked!r}; allowed: layernorm")
    return 1e-5 if asked is None and "clip" in name.split("_") else 1e-6


def _is_swiglu(shapes: Shapes) -> bool:
    """Whether the first matrix of the MLP gives gates and values, stacked."""
    return shapes["blocks.0.mlp.fc1.weight"][0] == 2 * shapes["blocks.0.mlp.fc2.weight"][1]


def _dinov2_mlp(name: str, shapes: Shapes, width: int) -> dict[str, Any]:
    """The MLP of DINOv2's class: two matrices, or SwiGLU."""
    columns, swiglu = shapes["blocks.0.mlp.fc2.weight"][1], _is_swiglu(shapes)
    ratio = round(1.5 * columns / width if swiglu else columns / width)
    # The class makes a SwiGLU two thirds as wide, rounded up to a multiple of eight.
    if columns != ((int(width * ratio * 2 / 3) + 7) // 8 * 8 if swiglu else width * ratio):
        raise BadModel(
            f"timm's {name} has an MLP of {columns} channels; allowed: a whole multiple of its width, {width}"
        )
    return {"mlp_ratio": ratio, "use_swiglu_ffn": swiglu}
