"""Every field of a configuration of timm and open_clip is read, has no effect, or is refused by name with its value."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from test_conversion import (
    BLOCKS,
    HEADS,
    INNER,
    NEAR,
    PATCH,
    PATCHES,
    PIXELS,
    WIDTH,
    attention,
    open_clip,
    open_clip_by_hand,
    pair,
    quick,
    random_tensors,
    timm,
    timm_by_hand,
    timm_clip,
    write_timm,
)
from torch import Tensor

from mlfusion import models
from mlfusion.errors import BadModel
from mlfusion.models import preprocessing
from mlfusion.models import timm as description
from mlfusion.models.backbone import Backbone
from mlfusion.models.open_clip import MODEL, PREPROCESSING, VISION
from mlfusion.models.timm import ARGUMENTS, PRETRAINED

PLAIN = "vit_base_patch16_224"


def pixels() -> Tensor:
    return torch.randn(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(3))


def timm_folder(folder, tensors, architecture=PLAIN, pretrained=None, **arguments):
    write_timm(folder, tensors, architecture)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= arguments
    config["pretrained_cfg"] |= pretrained or {}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def clip_folder(folder, tensors, model=None, preprocess=None, **vision):
    folder.mkdir()
    tower = {"image_size": PIXELS, "layers": BLOCKS, "width": WIDTH, "patch_size": PATCH, "head_width": WIDTH // HEADS}
    body = {
        "model_cfg": {"embed_dim": 20, "vision_cfg": tower | vision, "text_cfg": {}} | (model or {}),
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3} | (preprocess or {}),
    }
    (folder / "open_clip_config.json").write_text(json.dumps(body))
    torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    return str(folder)


def layers(folder: str) -> Tensor:
    """[layers, images, tokens, width]."""
    backbone = Backbone(models.locate(folder))
    return torch.stack(list(backbone(pixels(), [(n, "all") for n in range(backbone.depth + 1)]).values()))


def tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# --- read ------------------------------------------------------------------------------------------------------------

READ = {  # tensors, architecture, model_args, how the layers are computed by hand
    "gelu_tanh": (timm, PLAIN, {"act_layer": "gelu_tanh"}, {"act": tanh}),
    "quick_gelu": (timm, PLAIN, {"act_layer": "quick_gelu"}, {"act": quick}),
    "relu": (timm, PLAIN, {"act_layer": "relu"}, {"act": F.relu}),
    "gelu, against the name": (timm_clip, "vit_base_patch16_clip_quickgelu_224", {"act_layer": "gelu"}, {"eps": 1e-5}),
    "layernorm, against the name": (timm_clip, "vit_base_patch16_clip_224", {"norm_layer": "layernorm"}, {"eps": 1e-6}),
    "GELU in DINOv2": (lambda: timm(scales=True), "vit_base_patch14_dinov2", {"act_layer": "relu"}, {"act": F.relu}),
    "SigLIP's name": (lambda: timm(cls=0), "vit_base_patch16_siglip_gap_224", {}, {}),
    "SigLIP's name, tanh": (lambda: timm(cls=0), "vit_so400m_patch16_siglip_gap_256", {}, {"act": tanh}),
    "registers, with positions": (
        lambda: timm(reg=4, positions=PATCHES + 5, scales=True),
        "vit_base_patch14_reg4_dinov2",
        {},
        {},
    ),
    "registers, no class token": (
        lambda: timm(cls=0, reg=4, positions=PATCHES, scales=True),
        "vit_mediumd_patch16_reg4_gap_256",
        {"reg_tokens": 4, "class_token": False, "no_embed_class": True},
        {},
    ),
    "one register, no class token": (
        lambda: timm(cls=0, reg=1, positions=PATCHES),
        "vit_base_patch16_reg1_gap_256",
        {},
        {},
    ),
    "registers with positions, no class token": (
        lambda: timm(cls=0, reg=4, positions=PATCHES + 4),
        "vit_so150m_patch16_reg4_gap_256",
        {},
        {},
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_a_setting_of_timm_computes(name, tmp_path):
    make, architecture, arguments, words = READ[name]
    tensors = make()
    found = layers(timm_folder(tmp_path / "m", tensors, architecture, **arguments))
    torch.testing.assert_close(found, torch.stack(timm_by_hand(tensors, pixels(), **words)), atol=NEAR, rtol=NEAR)


@pytest.mark.parametrize("count", [1, 4])
def test_registers_without_a_class_token_are_registers(count, tmp_path):
    tensors = timm(cls=0, reg=count, positions=PATCHES, scales=True)
    backbone = Backbone(models.locate(timm_folder(tmp_path / "m", tensors, f"vit_medium_patch16_reg{count}_gap_256")))
    assert {kind: backbone.kinds.get(kind, 0) for kind in ("cls", "registers")} == {"cls": 0, "registers": count}
    want = timm_by_hand(tensors, pixels())[-1][:, count:].mean(1, keepdim=True)
    torch.testing.assert_close(backbone(pixels(), [(BLOCKS, "ap")])[BLOCKS, "ap"], want, atol=NEAR, rtol=NEAR)


def clipa() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in open_clip().items() if "ln_pre" not in name}


def clip_by_hand(t: dict[str, Tensor], act=F.gelu, eps: float = 1e-5) -> Tensor:
    """open_clip's tower, with or without the norm ahead of its blocks."""
    v = "visual."

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), t[f"{v}{name}.weight"], t[f"{v}{name}.bias"], eps)

    x = F.conv2d(pixels(), t[f"{v}conv1.weight"], stride=PATCH).flatten(2).mT
    x = torch.cat([t[f"{v}class_embedding"].expand(len(x), 1, -1), x], 1) + t[f"{v}positional_embedding"]
    x = norm("ln_pre", x) if f"{v}ln_pre.weight" in t else x
    layers = []
    for i in range(BLOCKS):
        b = f"transformer.resblocks.{i}."
        x = x + attention(norm(f"{b}ln_1", x), pair(t, f"{v}{b}attn.in_proj_"), pair(t, f"{v}{b}attn.out_proj."))
        layers.append(norm(f"{b}ln_2", x))
        x = x + F.linear(act(F.linear(layers[-1], *pair(t, f"{v}{b}mlp.c_fc."))), *pair(t, f"{v}{b}mlp.c_proj."))
    return torch.stack([*layers, norm("ln_post", x)])


CLIP_READ = {
    "CLIPA": (clipa, {}, {"no_ln_pre": True, "pool_type": "avg", "act_kwargs": {"approximate": "tanh"}}, {"act": tanh}),
    "CLIPA, exact GELU": (clipa, {}, {"no_ln_pre": True}, {}),
    "CLIPA, QuickGELU": (clipa, {"quick_gelu": True}, {"no_ln_pre": True}, {"act": quick}),
    "tanh": (open_clip, {}, {"act_kwargs": {"approximate": "tanh"}}, {"act": tanh}),
    "exact, as said": (open_clip, {}, {"act_kwargs": {"approximate": "none"}}, {}),
    "epsilon": (open_clip, {}, {"norm_kwargs": {"eps": 1e-3}}, {"eps": 1e-3}),
}


@pytest.mark.parametrize("name", CLIP_READ)
def test_what_a_setting_of_open_clip_computes(name, tmp_path):
    make, model, vision, words = CLIP_READ[name]
    tensors = make()
    found = layers(clip_folder(tmp_path / "m", tensors, model, **vision))
    torch.testing.assert_close(found, clip_by_hand(tensors, **words), atol=NEAR, rtol=NEAR)


def test_the_two_ways_to_write_out_a_tower_agree():
    tensors = open_clip()
    want = torch.stack(open_clip_by_hand(tensors, pixels(), F.gelu))
    torch.testing.assert_close(clip_by_hand(tensors), want)


@pytest.mark.parametrize(
    ("architecture", "width", "heads"),
    [
        ("vit_base_patch16_gap_224", 768, 16),
        ("vit_base_patch16_siglip_gap_224", 768, 12),
        ("vit_giantopt_patch16_siglip_gap_256", 1536, 16),
        ("vit_so400m_patch14_siglip_gap_224", 1152, 16),
        ("vit_betwixt_patch32_clip_224", 640, 10),
        (PLAIN, 768, 12),
    ],
)
def test_heads_that_timms_name_or_width_says(architecture, width, heads):
    shapes = {"patch_embed.proj.weight": (width, 3, 16, 16), "pos_embed": (1, 196, width)}
    if "clip" in architecture:
        shapes |= {"norm_pre.weight": (width,), "cls_token": (1, 1, width), "pos_embed": (1, 197, width)}
    linear = {"attn.qkv": (3 * width, width), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for name, shape in linear.items():
        shapes |= {f"blocks.0.{name}.weight": shape, f"blocks.0.{name}.bias": shape[:1]}
    config = {"architecture": architecture, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    assert description.configuration(config, shapes).num_attention_heads == heads


# --- without effect --------------------------------------------------------------------------------------------------

VALUES = {  # of fields without effect, those that matter most
    "global_pool": "avg",
    "dynamic_img_size": True,
    "fc_norm": False,
    "num_classes": 7,
    "weight_init": "skip",
    "pool_type": "none",
    "final_ln_after_pool": True,
    "output_tokens": True,
    "pos_embed_type": "sin_cos_2d",
    "test_input_size": [3, 64, 64],
    "fixed_input_size": True,
}


def test_fields_of_timm_without_effect_have_none(tmp_path):
    tensors = timm()
    plain = layers(timm_folder(tmp_path / "plain", tensors))
    all_of_them = {name: VALUES.get(name, 0.5) for name in (*ARGUMENTS.no_effect, "global_pool")}
    pretrained = {name: VALUES.get(name, "x") for name in PRETRAINED.no_effect}
    assert torch.equal(layers(timm_folder(tmp_path / "more", tensors, PLAIN, pretrained, **all_of_them)), plain)


def test_fields_of_open_clip_without_effect_have_none(tmp_path):
    tensors = open_clip()
    plain = layers(clip_folder(tmp_path / "plain", tensors))
    model = {name: VALUES.get(name, {}) for name in MODEL.no_effect}
    vision = {name: VALUES.get(name, 0.5) for name in VISION.no_effect}
    preprocess = dict.fromkeys(PREPROCESSING.no_effect, 1)
    assert torch.equal(layers(clip_folder(tmp_path / "more", tensors, model, preprocess, **vision)), plain)


@pytest.mark.parametrize(
    "fields", [ARGUMENTS, PRETRAINED, MODEL, VISION, PREPROCESSING], ids=lambda fields: fields.part
)
def test_a_field_is_judged_once_and_has_a_reason(fields):
    for one, other in itertools.combinations((fields.read, fields.no_effect, fields.fixed), 2):
        assert not set(one) & set(other)
    assert all(len(reason.split()) > 2 for reason in fields.no_effect.values())


# --- refused ---------------------------------------------------------------------------------------------------------

TIMM_REFUSED = {
    "qk_norm": True,
    "scale_attn_norm": True,
    "scale_mlp_norm": True,
    "proj_bias": False,
    "final_norm": False,
    "pos_embed": "none",
    "attn_layer": "diff",
    "block_fn": "ResPostBlock",
    "mlp_layer": "swiglu",
    "embed_layer": "hybrid",
    "embed_norm_layer": "rmsnorm",
    "global_pool": "map",
    "dynamic_img_pad": True,
    "norm_layer": "rmsnorm",
    "act_layer": "hard_swish",
    "rope_type": "axial",  # a field that nobody knows
    "depth": 2,
    "embed_dim": 64,
    "patch_size": 16,
    "in_chans": 1,
    "mlp_ratio": 4,
    "qkv_bias": False,
    "class_token": False,
    "reg_tokens": 4,
    "pre_norm": True,
    "no_embed_class": True,
    "img_size": 96,
}


@pytest.mark.parametrize("field", TIMM_REFUSED)
def test_a_setting_of_timm_that_is_not_known_is_refused_by_name_and_value(field, tmp_path):
    folder = timm_folder(tmp_path / "m", timm(), **{field: TIMM_REFUSED[field]})
    with pytest.raises(BadModel, match=rf"timm's model_args ha(s|ve) {field} = {TIMM_REFUSED[field]!r}.*allowed: "):
        Backbone(models.locate(folder))


@pytest.mark.parametrize(("field", "value"), [("crop_border_pixels", 4), ("in_chans", 1), ("jitter", 0.4)])
def test_a_field_of_timms_pretrained_cfg_is_refused_by_name_and_value(field, value, tmp_path):
    folder = timm_folder(tmp_path / "m", timm(), pretrained={field: value})
    with pytest.raises(BadModel, match=f"timm's pretrained_cfg has {field} = {value}"):
        Backbone(models.locate(folder))


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_rpn_224",
        "vit_base_patch16_xp_224",
        "vit_small_patch16_18x2_224",
        "vit_base_patch16_rope_224",
        "vit_relpos_base_patch16_rpn_224",
        "vit_pe_core_base_patch16_224",
        "vit_so150m_patch16_reg4_map_256",
        "vit_intern300m_patch14_448",
        "vit_pwee_patch16_reg1_gap_256",
        "samvit_base_patch16",
        "beit3_large_patch16_224",
        "vit_base_r50_s16_224",
    ],
)
def test_an_architecture_whose_name_tells_of_another_computation_is_refused(name, tmp_path):
    """Of these tensors each could be: the name alone says that the computation is another one."""
    folder = timm_folder(tmp_path / "m", timm(), name)
    with pytest.raises(BadModel, match=rf"the name of timm's {name} has the part '\w+'.*allowed: .*model_args"):
        Backbone(models.locate(folder))


OPEN_CLIP_REFUSED = {
    "attentional_pool": True,
    "timm_model_name": "convnext_base",
    "ls_init_value": 0.1,
    "block_type": "custom",
    "qk_norm": True,
    "scaled_cosine_attn": True,
    "scale_heads": True,
    "scale_attn_inner": True,
    "scale_attn": True,
    "scale_fc": True,
    "act_kwargs": {"approximate": "fast"},
    "norm_kwargs": {"elementwise_affine": False},
    "window": 7,  # a field that nobody knows
    "layers": 2,
    "width": 64,
    "patch_size": 16,
    "mlp_ratio": 4.0,
    "no_ln_pre": True,
}


@pytest.mark.parametrize("field", OPEN_CLIP_REFUSED)
def test_a_setting_of_open_clip_that_is_not_known_is_refused_by_name_and_value(field, tmp_path):
    folder = clip_folder(tmp_path / "m", open_clip(), **{field: OPEN_CLIP_REFUSED[field]})
    with pytest.raises(BadModel) as refusal:
        Backbone(models.locate(folder))
    assert f"open_clip's vision_cfg has {field} = {OPEN_CLIP_REFUSED[field]!r}" in str(refusal.value)
    assert "allowed: " in str(refusal.value)


@pytest.mark.parametrize(
    ("tensors", "architecture", "message"),
    [
        (lambda: timm(cls=0, scales=True), "vit_medium_patch16_gap_240", "LayerScale without a class token"),
        (lambda: timm(dist=1, scales=True), "deit_base_distilled_patch16_224", "a distillation token beside"),
        (lambda: timm(swiglu=True), PLAIN, "SwiGLU without"),
        (lambda: timm_clip() | random_tensors({"blocks.0.ls1.gamma": (WIDTH,)}), PLAIN, "norm_pre beside .*LayerScale"),
        (lambda: timm_clip() | random_tensors({"patch_embed.proj.bias": (WIDTH,)}), PLAIN, "norm_pre with a bias"),
        (lambda: timm() | random_tensors({"fc_norm.weight": (WIDTH,)}), PLAIN, "norm and fc_norm"),
        (lambda: timm(positions=33), PLAIN, "33 positions in its file; 32 x 32 pixels in patches of 8 need 16"),
    ],
)
def test_tensors_for_which_no_class_has_a_place_are_refused_together(tensors, architecture, message, tmp_path):
    with pytest.raises(BadModel, match=message):
        Backbone(models.locate(timm_folder(tmp_path / "m", tensors(), architecture)))


@pytest.mark.parametrize(
    ("vision", "model", "message"),
    [
        ({"image_size": [32, 64]}, {}, "as high as they are wide"),
        ({"image_size": 64}, {}, "17 positions in its file; 64 x 64 pixels in patches of 8 need 65"),
        ({"act_kwargs": {"approximate": "tanh"}}, {"quick_gelu": True}, "beside quick_gelu"),
        ({}, {"visual_only": True}, "model_cfg has visual_only = True"),
    ],
)
def test_settings_of_open_clip_that_do_not_fit_together_are_refused(vision, model, message, tmp_path):
    folder = clip_folder(tmp_path / "m", open_clip(), model, **vision)
    with pytest.raises(BadModel, match=message):
        Backbone(models.locate(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 64}, "size 64, and vision_cfg an image_size of 32"),
        ({"mode": "L"}, "mode = 'L'"),
        ({"interpolation": "lanczos"}, "allowed are bicubic, bilinear, random"),
        ({"resize_mode": "longest"}, "allowed are shortest, squash"),
        ({"sharpen": True}, "sharpen = True"),
    ],
)
def test_open_clips_preprocessing_is_read_or_refused(settings, message, tmp_path):
    folder = clip_folder(tmp_path / "m", open_clip(), preprocess=settings)
    with pytest.raises(BadModel, match=message):
        preprocessing.read(models.locate(folder).folder)
    plain = preprocessing.read(models.locate(clip_folder(tmp_path / "p", open_clip())).folder)
    random = {"interpolation": "random"}  # evaluation takes its default
    assert (
        preprocessing.read(models.locate(clip_folder(tmp_path / "r", open_clip(), preprocess=random)).folder) == plain
    )


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ({"crop_mode": "border"}, "crop_mode 'border'"),
        ({"input_size": [3, 32, 64]}, "equal sides, or squash"),
        ({"interpolation": "random"}, "random"),
    ],
)
def test_timms_preprocessing_is_read_or_refused(pretrained, message, tmp_path):
    with pytest.raises(BadModel, match=message):
        preprocessing.read(models.locate(timm_folder(tmp_path / "m", timm(), pretrained=pretrained)).folder)


def test_the_mlps_width_is_the_tensors(tmp_path):
    assert INNER == 2 * WIDTH
    assert math.isclose(layers(timm_folder(tmp_path / "m", timm(), mlp_ratio=2)).shape[-1], WIDTH)
