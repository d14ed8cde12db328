"""Describes an image tower of open_clip as a configuration of the class of transformers that computes the same tokens.

The facts are those of open_clip/model.py and open_clip/transformer.py (open_clip 3). The library itself is not needed.
"""

import re
from collections.abc import Mapping
from typing import Any

from mlfusion.errors import BadModel
from mlfusion.models.fields import Fields, misfit, refuse_wrapper, square

Shapes = Mapping[str, tuple[int, ...]]

_TEXT = "of the text tower or of the loss"
_POOL = "pools the tokens after they were read"
_TIMM = "only with timm_model_name, which is refused"
MODEL = Fields(
    "open_clip's model_cfg",
    read=frozenset({"vision_cfg", "quick_gelu"}),
    no_effect=dict.fromkeys(
        ("text_cfg", "multimodal_cfg", "custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
        _TEXT,
    )
    | {
        "embed_dim": "the projection has it in its shape",
        "cast_dtype": "the type of the weights in the file",
        "output_dict": "the form of the output",
    },
    fixed={},
)
VISION = Fields(
    "open_clip's vision_cfg",
    read=frozenset(
        {
            "width",
            "layers",
            "head_width",
            "patch_size",
            "image_size",
            "mlp_ratio",
            "no_ln_pre",
            "act_kwargs",
            "norm_kwargs",
        }
    ),
    no_effect=dict.fromkeys(("pool_type", "final_ln_after_pool", "attn_pooler_queries", "attn_pooler_heads"), _POOL)
    | dict.fromkeys(
        ("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"), _TIMM
    )
    | {
        "patch_dropout": "only in training",
        "output_tokens": "the form of the output",
        "pos_embed_type": "the file has the positions, learned or not",
    },
    fixed=dict.fromkeys(
        (
            "attentional_pool",
            "qk_norm",
            "scaled_cosine_attn",
            "scale_heads",
            "scale_attn_inner",
            "scale_attn",
            "scale_fc",
        ),
        (False,),
    )
    | {"timm_model_name": ("",), "ls_init_value": (), "block_type": ()},
)
PREPROCESSING = Fields(
    "open_clip's preprocess_cfg",
    read=frozenset({"size", "mean", "std", "interpolation", "resize_mode"}),
    no_effect={"fill_color": "only with a resize_mode that pads, which is refused"},
    fixed={"mode": ("RGB",)},
)

RESBLOCK = re.compile(
    r"visual\.transformer\.resblocks\.(\d+)\.(?:ln_[12]\.(?:weight|bias)|attn\.(?:in_proj_(?:weight|bias)|out_proj\.(?:weight|bias))"
    r"|mlp\.c_(?:fc|proj)\.(?:weight|bias))"
)
VISUAL = re.compile(
    r"visual\.(?:conv1\.weight|class_embedding|positional_embedding|proj|ln_(?:pre|post)\.(?:weight|bias))"
)

KNOWN = re.compile(f"{RESBLOCK.pattern}|{VISUAL.pattern}")
NEEDED = ("visual.conv1.weight", "visual.positional_embedding", "visual.transformer.resblocks.0.mlp.c_fc.weight")


def configuration(config: Mapping[str, Any], tensors: Shapes, name: str) -> Any:
    """The configuration of transformers' class, by open_clip_config.json and the tensors' shapes.

    A tower without its first norm (CLIPA: no_ln_pre) is a ViT, whose class has no projection to the texts' space.

    Raises:
        BadModel: no class computes the same; the message names the field or the tensor.
    """
    import transformers

    model = config.get("model_cfg") or {}
    vision = model.get("vision_cfg") or {}
    MODEL.check(model)
    VISION.check(vision)
    refuse_wrapper(tensors, NEEDED, name)
    shapes = {key: shape for key, shape in tensors.items() if key.startswith("visual.")}
    if wrong := misfit(shapes, KNOWN, NEEDED):
        raise BadModel(
            f"the image tower of open_clip in {name} has {wrong}, for which "
            "transformers has no class; allowed: plain vision transformers of open_clip, with a class token"
        )
    width, _, *patch = shapes["visual.conv1.weight"]
    inner = shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0]
    size = square(vision.get("image_size") or 224, VISION.part)
    common: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(match[1]) for key in shapes if (match := RESBLOCK.fullmatch(key))),
        "num_attention_heads": width // int(vision.get("head_width") or 64),
        "intermediate_size": inner,
        "patch_size": square(patch, VISION.part),
        "image_size": size,
        "hidden_act": _activation(model, vision),
        "layer_norm_eps": _epsilon(vision),
    }
    facts: dict[str, Any] = {
        "width": width,
        "layers": common["num_hidden_layers"],
        "patch_size": common["patch_size"],
        "no_ln_pre": "visual.ln_pre.weight" not in shapes,
    }
    VISION.agree({"no_ln_pre": False, **vision}, facts)
    positions, needed = shapes["visual.positional_embedding"][0], (size // common["patch_size"]) ** 2 + 1
    if positions != needed:
        raise BadModel(
            f"the image tower of open_clip in {name} has {positions} positions in its file; {size} x {size} pixels in patches "
            f"of {common['patch_size']} need {needed}. Allowed: positions of the size in vision_cfg"
        )
    ratio = vision.get("mlp_ratio")
    if ratio is not None and int(width * ratio) != inner:
        VISION.agree(vision, {"mlp_ratio": inner / width})
    if facts["no_ln_pre"]:
        return transformers.ViTConfig(**common, qkv_bias=True)
    return transformers.CLIPVisionConfig(
        **common,
        architectures=["CLIPVisionModelWithProjection"],
        projection_dim=shapes["visual.proj"][1] if "visual.proj" in shapes else width,
    )


def _activation(model: Mapping[str, Any], vision: Mapping[str, Any]) -> str:
    """GELU, its approximation by tanh (act_kwargs), or OpenAI's QuickGELU, which takes no settings."""
    settings = vision.get("act_kwargs") or {}
    names = {(): "gelu", (("approximate", "none"),): "gelu", (("approximate", "tanh"),): "gelu_pytorch_tanh"}
    activation = names.get(tuple(settings.items()))
    if activation is None or (settings and model.get("quick_gelu")):
        raise BadModel(
            f"{VISION.part} has act_kwargs = {settings!r}{' beside quick_gelu' if model.get('quick_gelu') else ''}; allowed: "
            "{'approximate': 'tanh'} without quick_gelu, or none"
        )
    return "quick_gelu" if model.get("quick_gelu") else activation


def _epsilon(vision: Mapping[str, Any]) -> float:
    settings = vision.get("norm_kwargs") or {}
    if settings.keys() - {"eps"}:
        raise BadModel(f"{VISION.part} has norm_kwargs = {settings!r}; allowed: eps")
    return float(settings.get("eps", 1e-5))
