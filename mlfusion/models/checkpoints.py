"""Recognises checkpoints of timm and open_clip by their files, and describes them as configurations of transformers' classes.

Neither library is needed. timm writes `config.json` with an `architecture` and the tensors of its VisionTransformer;
open_clip writes `open_clip_config.json` and a state dict whose image tower begins with `visual.`. This module finds the class
that fits, by the tensors' names and shapes; `backbone.conversion` renames the tensors.
"""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mlfusion.errors import BadModel, first_line

Layout = Literal["transformers", "timm", "open_clip"]

_HUB = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin")
WEIGHTS: dict[Layout, tuple[str, ...]] = {
    "transformers": _HUB,
    "timm": _HUB,
    "open_clip": ("open_clip*.safetensors", "open_clip*.bin", "*.safetensors", "*.bin", "*.pt"),
}
"""Patterns of the files that hold the weights; the first one that matches a file is used."""

TIMM_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
"""Width → attention heads of timm's vision transformers (timm/models/vision_transformer.py), if no file gives the number."""

LFS_POINTER = b"version https://git-lfs"

BLOCK = re.compile(
    r"blocks\.(\d+)\.(?:norm[12]\.(?:weight|bias)|attn\.(?:qkv|proj)\.(?:weight|bias)|mlp\.fc[12]\.(?:weight|bias)|ls[12]\.gamma)"
)
OUTSIDE = re.compile(r"(?:cls|dist|reg)_token|pos_embed|(?:patch_embed\.proj|norm|fc_norm|norm_pre)\.(?:weight|bias)")
CLASSIFIER = re.compile(r"(?:head|head_dist|pre_logits)\.")
RESBLOCK = re.compile(
    r"visual\.transformer\.resblocks\.(\d+)\.(?:ln_[12]\.(?:weight|bias)|attn\.(?:in_proj_(?:weight|bias)|out_proj\.(?:weight|bias))"
    r"|mlp\.c_(?:fc|proj)\.(?:weight|bias))"
)
VISUAL = re.compile(
    r"visual\.(?:conv1\.weight|class_embedding|positional_embedding|proj|ln_(?:pre|post)\.(?:weight|bias))"
)


def layout(folder: Path) -> Layout:
    """The library whose format a folder has."""
    config = read_json(folder / "config.json")
    if "model_type" in config and config["model_type"] != "timm_wrapper":
        return "transformers"
    if "architecture" in config:
        return "timm"
    return "open_clip" if (folder / "open_clip_config.json").is_file() else "transformers"


def configuration(folder: Path, files: tuple[Path, ...]) -> Any:
    """The configuration of the class of transformers that computes the same as this checkpoint.

    Raises BadModel, which names a tensor, if no class has a place for every tensor.
    """
    return _from_timm(folder, files) if layout(folder) == "timm" else _from_open_clip(folder, files)


def _from_timm(folder: Path, files: tuple[Path, ...]) -> Any:
    import transformers

    config = read_json(folder / "config.json")
    name, arguments = str(config["architecture"]), config.get("model_args") or {}
    shapes = {key: shape for key, shape in shapes_of(files).items() if not CLASSIFIER.match(key)}
    unknown = sorted(key for key in shapes if not BLOCK.fullmatch(key) and not OUTSIDE.fullmatch(key))
    if unknown or "patch_embed.proj.weight" not in shapes or "pos_embed" not in shapes:
        raise BadModel(
            f"timm's {name} has {unknown[0] if unknown else 'no patch_embed and pos_embed'}, for which transformers has no "
            "class; allowed: plain ViT, DeiT, MAE, CLIP and DINOv2 of timm (no rotary positions, no pooling by attention). "
            "Many others have a repository in transformers' own format, such as google/siglip-base-patch16-224"
        )
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    fc1_rows, fc2_columns = shapes["blocks.0.mlp.fc1.weight"][0], shapes["blocks.0.mlp.fc2.weight"][1]
    heads = arguments.get("num_heads") or TIMM_HEADS.get(width)
    if heads is None:
        raise BadModel(
            f"timm's {name} does not say how many attention heads it has, and a width of {width} is no usual one; allowed: "
            f"model_args with num_heads in config.json, or a width of {', '.join(map(str, TIMM_HEADS))}"
        )
    _, height, _ = config["pretrained_cfg"]["input_size"]
    common: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(match[1]) for key in shapes if (match := BLOCK.fullmatch(key))),
        "num_attention_heads": int(heads),
        "patch_size": patch,
        "image_size": int(height),
        "layer_norm_eps": 1e-6,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
    }
    if "norm_pre.weight" in shapes:
        del common["qkv_bias"]
        common |= {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu" if "quickgelu" in name else "gelu"}
        return transformers.CLIPVisionConfig(**common, intermediate_size=fc1_rows)
    if "reg_token" in shapes or "blocks.0.ls1.gamma" in shapes:
        swiglu = fc1_rows == 2 * fc2_columns
        ratio = round(1.5 * fc2_columns / width if swiglu else fc1_rows / width)
        # The class makes a SwiGLU two thirds as wide, rounded up to a multiple of eight.
        if fc2_columns != ((int(width * ratio * 2 / 3) + 7) // 8 * 8 if swiglu else width * ratio):
            raise BadModel(
                f"timm's {name} has an MLP of {fc2_columns} channels; allowed: a whole multiple of its width, {width}"
            )
        common |= {"mlp_ratio": ratio, "use_swiglu_ffn": swiglu}
        if "reg_token" in shapes:
            return transformers.Dinov2WithRegistersConfig(**common, num_register_tokens=shapes["reg_token"][1])
        return transformers.Dinov2Config(**common)
    if "cls_token" not in shapes:
        return transformers.IJepaConfig(**common, intermediate_size=fc1_rows)
    kind = transformers.DeiTConfig if "dist_token" in shapes else transformers.ViTConfig
    return kind(**common, intermediate_size=fc1_rows)


def _from_open_clip(folder: Path, files: tuple[Path, ...]) -> Any:
    import transformers

    config = read_json(folder / "open_clip_config.json").get("model_cfg") or {}
    vision = config.get("vision_cfg") or {}
    shapes = {key: shape for key, shape in shapes_of(files).items() if key.startswith("visual.")}
    unknown = sorted(key for key in shapes if not RESBLOCK.fullmatch(key) and not VISUAL.fullmatch(key))
    if unknown or "visual.conv1.weight" not in shapes:
        raise BadModel(
            f"the image tower of open_clip in {folder.name} has {unknown[0] if unknown else 'no visual.conv1'}, for which "
            "transformers has no class; allowed: plain vision transformers of open_clip, with a class token"
        )
    width, _, patch, _ = shapes["visual.conv1.weight"]
    size = vision.get("image_size", 224)
    return transformers.CLIPVisionConfig(
        architectures=["CLIPVisionModelWithProjection"],
        hidden_size=width,
        num_hidden_layers=1 + max(int(match[1]) for key in shapes if (match := RESBLOCK.fullmatch(key))),
        num_attention_heads=width // int(vision.get("head_width", 64)),
        intermediate_size=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        patch_size=patch,
        image_size=size if isinstance(size, int) else size[0],
        hidden_act="quick_gelu" if config.get("quick_gelu") else "gelu",
        layer_norm_eps=1e-5,
        projection_dim=shapes["visual.proj"][1] if "visual.proj" in shapes else width,
    )


@lru_cache(maxsize=8)
def shapes_of(files: tuple[Path, ...]) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, of safetensors by the headers alone; raises BadModel if a file holds anything but tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with open(file, "rb") as stream:
                    header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
                shapes |= {key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
            else:
                shapes |= {key: tuple(tensor.shape) for key, tensor in unpickled(file).items()}
        except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as err:
            raise BadModel(
                f"{file} holds no tensors that can be read ({err}); allowed: safetensors, or plain tensors"
            ) from err
    return shapes


def unpickled(file: Path) -> dict[str, Any]:
    """The tensors of a .bin or .pt file, memory-mapped; raises BadModel, and loads nothing, if it holds anything else."""
    import pickle

    import torch

    try:
        body = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as err:
        raise BadModel(
            f"{file} holds more than plain tensors and is not loaded ({first_line(err)}); allowed: safetensors"
        ) from err
    for key in ("state_dict", "model"):
        if isinstance(body, dict) and isinstance(body.get(key), dict):
            body = body[key]
    if not isinstance(body, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in body.values()):
        raise BadModel(f"{file} holds no tensors by name; allowed: a state dict")
    return body


def verify(file: Path) -> None:
    """Check that a file of weights can be read, by its header alone where it is safetensors.

    Raises:
        BadModel: it is a Git LFS pointer, cut short, damaged, or holds more than plain tensors.
    """
    from safetensors import SafetensorError, safe_open

    with open(file, "rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise BadModel(
                f"{file} is a Git LFS pointer and holds no weights; type `git lfs pull` in {file.parent}, or download the "
                "file itself"
            )
    if file.suffix != ".safetensors":
        unpickled(file)
        return
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as err:
        raise BadModel(
            f"{file} is damaged or cut short ({first_line(err)}); allowed: a whole safetensors file. Download it again"
        ) from err


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object, or an empty one if there is no such file; raises BadModel if it holds something else."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        raise BadModel(f"{path} cannot be read: {err}") from err
    if not isinstance(body, dict):
        raise BadModel(f"{path} holds no JSON object")
    return body
