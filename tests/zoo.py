"""Every family of vision models that is tried: tiny ones with random weights, and their layers found in another way.

The other way shares no code with the package. For each block a copy of the model is run in which that block's MLP gives zero,
so that what the block gives *is* x + attention; the second norm of that, and the final norm, are then computed from their
weights. Where blocks, norms and special tokens are is written down here by hand, family by family.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

PIXELS = 32
PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": PIXELS,
    "patch_size": 8,
}
RATIO = {**{k: v for k, v in PLAIN.items() if k != "intermediate_size"}, "mlp_ratio": 2}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 60,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Truth:
    """One family, as its source code in transformers says."""

    build: Callable[[], nn.Module]
    blocks: str  # paths of the lists inside the vision tower; * for every stage
    norm2: str | None  # inside a block
    mlp: str  # inside a block: the last linear map of the MLP
    final: str | None  # inside the tower
    tower: str = ""  # inside the model
    cls: int = 0
    dist: int = 0
    registers: int = 0
    channels_first: bool = False
    convolution: str | None = None  # inside a block: what stands for attention where there is none
    arguments: Callable[[Tensor], dict[str, Any]] = field(default=lambda pixels: {"pixel_values": pixels})
    pixels: int = PIXELS
    grid: int = 4  # patches a side in the first layer
    last: str = "all"  # which tokens the model's own last_hidden_state holds normed: all, or none


def _text_pair(name: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(
            vision_config={**PLAIN, **more, "projection_dim": 24}, text_config={**TEXT}, projection_dim=24
        )
        return getattr(transformers, f"{name}Model")(config)

    return build


def _one(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config, model = f"{name}Config", f"{name}Model"
        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return build


def _projected(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{name}VisionConfig")(**PLAIN, projection_dim=24)
        return getattr(transformers, f"{name}VisionModelWithProjection")(config)

    return build


def _noise(pixels: Tensor) -> dict[str, Any]:
    patches = (pixels.shape[-1] // 8) ** 2
    return {"pixel_values": pixels, "noise": torch.linspace(0, 1, patches).expand(len(pixels), -1)}


def _clip_of_two(pixels: Tensor) -> dict[str, Any]:
    return {"pixel_values_videos": torch.stack([pixels, pixels], 1), "skip_predictor": True}


def _cut(pixels: Tensor) -> dict[str, Any]:
    """Patches as the NaFlex processor of transformers cuts them."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    cut = torch.stack([torch.from_numpy(convert_image_to_patches(one.numpy(), 8)) for one in pixels])
    shape = torch.tensor([[pixels.shape[-2] // 8, pixels.shape[-1] // 8]] * len(pixels))
    return {
        "pixel_values": cut,
        "spatial_shapes": shape,
        "pixel_attention_mask": torch.ones(cut.shape[:2], dtype=torch.int32),
    }


_VIT = {"blocks": "layers", "norm2": "layernorm_after", "mlp": "mlp.fc2", "final": "layernorm"}
_DINO = {"blocks": "encoder.layer", "norm2": "norm2", "mlp": "mlp.fc2", "final": "layernorm", "cls": 1}
_CLIP = {"blocks": "encoder.layers", "norm2": "layer_norm2", "mlp": "mlp.fc2", "final": "post_layernorm"}
_STAGES = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "image_size": PIXELS, "patch_size": 4}
_SWIN = {"grid": 8, "blocks": "encoder.layers.*.blocks", "final": "layernorm"}
_CONV = {
    "hidden_sizes": [16, 24, 32, 48],
    "depths": [1, 1, 2, 1],
    "image_size": 64,
    "layer_scale_init_value": 0.5,
}

ZOO: dict[str, Truth] = {
    "ViT": Truth(_one("ViT", **PLAIN), cls=1, **_VIT),
    "DeiT, distilled": Truth(_one("DeiT", **PLAIN), cls=1, dist=1, **_VIT),
    "MAE": Truth(_one("ViTMAE", **PLAIN, mask_ratio=0.0), cls=1, arguments=_noise, **_VIT),
    "MSN": Truth(_one("ViTMSN", **PLAIN), cls=1, **_VIT),
    "I-JEPA": Truth(_one("IJepa", **PLAIN), **_VIT),
    "DINOv2": Truth(_one("Dinov2", **RATIO), **_DINO),
    "DINOv2, SwiGLU": Truth(_one("Dinov2", **RATIO, use_swiglu_ffn=True), **{**_DINO, "mlp": "mlp.down_proj"}),
    "DINOv2, registers": Truth(_one("Dinov2WithRegisters", **RATIO, num_register_tokens=4), registers=4, **_DINO),
    "DINOv3": Truth(
        _one("DINOv3ViT", **PLAIN, num_register_tokens=4),
        blocks="model.layer",
        norm2="norm2",
        mlp="mlp.down_proj",
        final="norm",
        cls=1,
        registers=4,
    ),
    "CLIP": Truth(_text_pair("CLIP"), tower="vision_model", cls=1, last="none", **_CLIP),
    "CLIP, vision": Truth(
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**PLAIN)), cls=1, last="none", **_CLIP
    ),
    "CLIP, with projection": Truth(_projected("CLIP"), tower="vision_model", cls=1, last="none", **_CLIP),
    "MetaCLIP 2": Truth(_text_pair("MetaClip2"), tower="vision_model", cls=1, last="none", **_CLIP),
    "SigLIP": Truth(_text_pair("Siglip"), tower="vision_model", **_CLIP),
    "SigLIP 2, NaFlex": Truth(_text_pair("Siglip2", num_patches=16), tower="vision_model", arguments=_cut, **_CLIP),
    "AIMv2": Truth(
        lambda: transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**PLAIN)),
        blocks="encoder.layers",
        norm2="rms_norm2",
        mlp="ffn.down_proj",
        final="rms_norm",
    ),
    "BEiT": Truth(
        _one("Beit", **PLAIN, use_absolute_position_embeddings=True, use_mean_pooling=False),
        cls=1,
        **_VIT,
    ),
    "BEiT, mean pooling": Truth(
        _one("Beit", **PLAIN, use_relative_position_bias=True),
        cls=1,
        last="none",
        **{**_VIT, "final": "pooler.layernorm"},
    ),
    "data2vec": Truth(
        _one("Data2VecVision", **PLAIN),
        blocks="encoder.layer",
        norm2="layernorm_after",
        mlp="output.dense",
        final=None,
        cls=1,
    ),
    "Pixio": Truth(_one("Pixio", **RATIO, n_cls_tokens=8), **{**_VIT, "cls": 8}),
    "RADIO": Truth(
        _one("Radio", **{**RATIO, "mlp_ratio": 2.0}, num_cls_tokens=3, num_registers=5),
        **{**_DINO, "cls": 3, "final": None},
        registers=5,
        last="none",
    ),
    "TIPSv2": Truth(
        lambda: transformers.Tipsv2VisionModel(transformers.Tipsv2VisionConfig(**RATIO)), registers=1, **_DINO
    ),
    "MLCD": Truth(
        lambda: transformers.MLCDVisionModel(transformers.MLCDVisionConfig(**PLAIN)), cls=1, last="none", **_CLIP
    ),
    "BLIP": Truth(lambda: transformers.BlipVisionModel(transformers.BlipVisionConfig(**PLAIN)), cls=1, **_CLIP),
    "ViTDet": Truth(
        _one("VitDet", **RATIO),
        **{**_DINO, "cls": 0, "final": None},
        channels_first=True,
        last="none",
    ),
    "SAM": Truth(
        lambda: transformers.SamModel(
            transformers.SamConfig(
                vision_config={
                    **PLAIN,
                    "mlp_dim": 48,
                    "output_channels": 16,
                    "window_size": 3,
                    "global_attn_indexes": [1],
                    "num_pos_feats": 8,
                },
                prompt_encoder_config={"hidden_size": 16, "image_size": PIXELS, "patch_size": 8},
                mask_decoder_config={
                    "hidden_size": 16,
                    "mlp_dim": 16,
                    "num_attention_heads": 2,
                    "iou_head_hidden_dim": 16,
                },
            )
        ),
        tower="vision_encoder",
        blocks="layers",
        norm2="layer_norm2",
        mlp="mlp.lin2",
        final=None,
        last="none",
    ),
    "V-JEPA 2": Truth(
        _one(
            "VJEPA2",
            **{k: v for k, v in RATIO.items() if k not in ("image_size", "hidden_size")},
            hidden_size=48,
            crop_size=PIXELS,
            frames_per_clip=2,
            pred_hidden_size=48,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=2,
            num_pooler_layers=1,
        ),
        **{**_DINO, "cls": 0, "final": "encoder.layernorm"},
        arguments=_clip_of_two,
    ),
    "Hiera": Truth(
        _one(
            "Hiera",
            embed_dim=16,
            depths=[1, 2, 1],
            num_heads=[1, 2, 4],
            image_size=[64, 64],
            patch_size=[7, 7],
            patch_stride=[4, 4],
            patch_padding=[3, 3],
            masked_unit_size=[4, 4],
            masked_unit_attention=[True, True, False],
            num_query_pool=2,
        ),
        pixels=64,
        grid=16,
        blocks="encoder.stages.*.layers",
        norm2="layernorm_after",
        mlp="mlp.fc2",
        final="pooler.layernorm",
        last="none",
    ),
    "Swin": Truth(_one("Swin", **_STAGES, window_size=4), norm2="layernorm_after", mlp="mlp.fc2", **_SWIN),
    "SwinV2": Truth(_one("Swinv2", **_STAGES, window_size=4), norm2=None, mlp="", **_SWIN),
    "PVTv2": Truth(
        _one(
            "PvtV2",
            image_size=64,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 2, 1, 1],
            num_attention_heads=[1, 2, 2, 4],
            mlp_ratios=[2, 2, 2, 2],
        ),
        pixels=64,
        grid=16,
        blocks="encoder.layers.*.blocks",
        norm2="layer_norm_2",
        mlp="mlp.dense2",
        final="encoder.layers.3.layer_norm",
        last="none",
    ),
    "SegFormer": Truth(
        _one(
            "Segformer",
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 2, 1, 1],
            num_attention_heads=[1, 2, 2, 4],
            mlp_ratios=[2, 2, 2, 2],
        ),
        pixels=64,
        grid=16,
        blocks="stages.*.blocks",
        norm2="layernorm_after",
        mlp="mlp.fc2",
        final="stages.3.layer_norm",
        last="none",
    ),
    "ConvNeXt": Truth(
        _one("ConvNext", **_CONV),
        pixels=64,
        grid=16,
        blocks="encoder.stages.*.layers",
        norm2="layernorm",
        mlp="pwconv2",
        final="layernorm",
        channels_first=True,
        convolution="dwconv",
        last="none",
    ),
    "ConvNeXt V2": Truth(
        _one("ConvNextV2", **_CONV),
        pixels=64,
        grid=16,
        blocks="encoder.stages.*.layers",
        norm2="layernorm",
        mlp="pwconv2",
        final="layernorm",
        channels_first=True,
        convolution="dwconv",
        last="none",
    ),
    "DINOv3, ConvNeXt": Truth(
        _one("DINOv3ConvNext", **_CONV),
        pixels=64,
        grid=16,
        blocks="model.stages.*.layers",
        norm2="layer_norm",
        mlp="pointwise_conv2",
        final="layer_norm",
        channels_first=True,
        convolution="depthwise_conv",
        last="none",
    ),
    "ResNet": Truth(
        _one("ResNet", embedding_size=8, hidden_sizes=[16, 24, 32, 48], depths=[1, 2, 1, 1], layer_type="bottleneck"),
        pixels=64,
        grid=16,
        blocks="encoder.stages.*.layers",
        norm2=None,
        mlp="",
        final=None,
        channels_first=True,
        last="none",
    ),
}


def shaken(model: nn.Module) -> nn.Module:
    """A model whose parameters are all far from where they begin, so that none can be lost unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """A model of that family with random weights, as a folder in the hub's format."""
    truth = ZOO[name]
    torch.manual_seed(seed)
    model = truth.build()
    with torch.no_grad():  # biases and scales start as 0 and 1, which would hide a wrong norm
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": truth.pixels},
        "crop_size": {"height": truth.pixels, "width": truth.pixels},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.6, 0.7],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def tower_of(name: str, folder: Path) -> nn.Module:
    """The vision tower by transformers alone."""
    truth = ZOO[name]
    kind = type(truth.build()) if "projection" in name or name == "BLIP" else transformers.AutoModel
    config = transformers.AutoConfig.from_pretrained(folder)
    model = kind.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    return model.get_submodule(truth.tower) if truth.tower else model


def blocks_of(name: str, tower: nn.Module) -> list[nn.Module]:
    """Its blocks, by the path written down above."""
    lists = [tower]
    for part in ZOO[name].blocks.split("."):
        lists = [one for each in lists for one in (each if part == "*" else [each.get_submodule(part)])]
    return [block for one in lists for block in one]


def flat(output: Any, channels_first: bool) -> Tensor:
    """[images, tokens, width]."""
    while isinstance(output, (tuple, list)):
        output = output[0]
    if output.ndim == 4:
        output = output.flatten(2).transpose(1, 2) if channels_first else output.flatten(1, 2)
    return output


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm, or RMSNorm where there is no bias, from the weights, in double precision."""
    x = x.double()
    bias = getattr(norm, "bias", None)
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    if bias is not None:
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight.double()
    return x if bias is None else x + bias.double()


def given(tower: nn.Module, arguments: dict[str, Any], module: nn.Module, *, entering: bool) -> Tensor:
    """What goes into a module, or comes out of it, in one run."""
    held: list[Any] = []
    handle = (
        module.register_forward_pre_hook(
            lambda _, args, kwargs: held.append((*args, *kwargs.values())), with_kwargs=True
        )
        if entering
        else module.register_forward_hook(lambda _, __, output: held.append(output))
    )
    tower(**arguments)
    handle.remove()
    return held[0]


@torch.inference_mode()
def layers_by_hand(name: str, tower: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Layers 0..L, each [images, tokens, width], as the docstring above says."""
    truth, arguments = ZOO[name], ZOO[name].arguments(pixels)
    blocks = blocks_of(name, tower)
    found = []
    for number, block in enumerate(blocks):
        if truth.norm2 is None:  # nothing between attention and MLP: layers are what blocks give
            if number == 0:
                found.append(flat(given(tower, arguments, block, entering=True), truth.channels_first))
            found.append(flat(given(tower, arguments, block, entering=False), truth.channels_first))
        elif truth.convolution is not None:
            x = given(tower, arguments, block, entering=True)[0]
            kernel = block.get_submodule(truth.convolution)
            mixed = nn.functional.conv2d(x, kernel.weight, kernel.bias, padding=3, groups=x.shape[1])
            found.append(normed(block.get_submodule(truth.norm2), flat(mixed, True)))
        else:
            other = copy.deepcopy(tower)
            its = blocks_of(name, other)[number]
            for parameter in its.get_submodule(truth.mlp).parameters():
                parameter.zero_()
            x = flat(given(other, arguments, its, entering=False), truth.channels_first)
            found.append(normed(block.get_submodule(truth.norm2), x))
    last = flat(given(tower, arguments, blocks[-1], entering=False), truth.channels_first)
    end = last if truth.final is None else normed(tower.get_submodule(truth.final), last)
    return [*(found if truth.norm2 else found[:-1]), end]


def as_family(folder: Path, family: str, to: Path) -> Path:
    """The tensors of a ViT's folder as another family's: 'dinov2' (with LayerScale 1) or 'vit_mae'; 'vit' is the folder."""
    if family == "vit":
        return folder
    vit = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    sizes = {name: getattr(vit.config, name) for name in (*PLAIN, "layer_norm_eps")}
    tensors = {name: tensor for name, tensor in vit.state_dict().items() if not name.startswith("pooler")}
    if family == "vit_mae":
        model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**sizes, mask_ratio=0.0))
    else:
        ratio = sizes["intermediate_size"] // sizes["hidden_size"]
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=ratio, layerscale_value=1.0))
        words = {"layers.": "encoder.layer.", "layernorm_before": "norm1", "layernorm_after": "norm2"}
        for old, new in words.items():
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    lost, extra = model.load_state_dict(tensors, strict=False)
    assert not extra
    assert all("layer_scale" in name or "mask_token" in name for name in lost)
    model.save_pretrained(to)
    (to / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    return to
