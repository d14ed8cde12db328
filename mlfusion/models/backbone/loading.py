"""Loads a checkpoint's vision tower, float32 and frozen, and prepares the arguments of its forward pass."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mlfusion import models
from mlfusion.errors import BadModel, first_line
from mlfusion.models import checkpoints
from mlfusion.models.backbone import conversion


@dataclass(frozen=True)
class LoadedTower:
    """A vision tower in evaluation mode."""

    tower: nn.Module
    projection: nn.Module | None  # to the embedding that images share with texts, as in CLIP
    missing: frozenset[str]  # names, inside the tower, of tensors that the checkpoint did not have
    missing_projection: bool


def load(checkpoint: models.Checkpoint) -> LoadedTower:
    """Load the vision tower, which may be a part of a model of images and texts; raises BadModel if that fails."""
    config = models.configuration(checkpoint)
    model, missing = _read(checkpoint.folder, config)
    tower = _tower(model)
    path = next(path for path, module in model.named_modules() if module is tower)
    prefix = f"{path}." if path else ""
    projection = getattr(model, "visual_projection", None)
    return LoadedTower(
        tower=tower.eval().requires_grad_(False),
        projection=projection.eval().requires_grad_(False) if isinstance(projection, nn.Module) else None,
        missing=frozenset(key.removeprefix(prefix) for key in missing if key.startswith(prefix)),
        missing_projection=any(key.startswith("visual_projection.") for key in missing),
    )


def _read(folder: Path, config: Any) -> tuple[nn.Module, set[str]]:
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    transformers.utils.logging.disable_progress_bar()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # Backbone checks later whether missing tensors are used
    try:
        is_transformers = checkpoints.layout(folder) == "transformers"
        tensors = None if is_transformers else conversion.tensors(folder, tuple(models.weight_files(folder)), config)
        model, report = _class(config, is_transformers).from_pretrained(
            folder if is_transformers else None,
            state_dict=tensors,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as err:
        raise BadModel(f"{folder} does not load: {first_line(err)}") from err
    finally:
        transformers.utils.logging.set_verbosity(before)
    return model, set(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]}


def _class(config: Any, is_transformers: bool) -> Any:
    """The class of the model without a head, or with its projection if the checkpoint has one."""
    architecture = (config.architectures or [""])[0]
    unmapped = is_transformers and type(config) not in transformers.MODEL_MAPPING  # BLIP's vision model alone
    if (architecture.endswith("VisionModelWithProjection") or unmapped) and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    return transformers.AutoModel if is_transformers else transformers.MODEL_MAPPING[type(config)]


def _tower(model: nn.Module) -> nn.Module:
    """The vision tower: the first module whose configuration is the whole model's `vision_config`."""
    config = getattr(model, "config", None)
    vision_config = getattr(config, "vision_config", None)
    for module in model.modules() if vision_config is not None else ():
        if getattr(module, "config", None) is vision_config and isinstance(module, transformers.PreTrainedModel):
            return module
    inner = getattr(model, "vision_model", None)
    return inner if isinstance(inner, transformers.PreTrainedModel) else model


def forward_arguments(model: nn.Module, patch_px: int | None, pixels: Tensor) -> dict[str, Any]:
    """Prepared pictures [images, 3, height, width] → the arguments of the model's forward: most take pixels only."""
    parameters, count = inspect.signature(model.forward).parameters, len(pixels)
    config: Any = model.config
    if "pixel_values_videos" in parameters:  # a video model: the picture as a clip of one temporal patch
        clip = pixels[:, None].expand(-1, int(getattr(config, "tubelet_size", 1)), -1, -1, -1)
        return {"pixel_values_videos": clip} | ({"skip_predictor": True} if "skip_predictor" in parameters else {})
    rows, columns = (side // (patch_px or side) for side in pixels.shape[-2:])
    if "spatial_shapes" in parameters:  # NaFlex takes patches: [images, patches, patch · patch · 3]
        assert patch_px is not None
        cut = pixels.unfold(2, patch_px, patch_px).unfold(3, patch_px, patch_px)  # [images, 3, rows, columns, p, p]
        return {
            "pixel_values": cut.permute(0, 2, 3, 4, 5, 1).reshape(count, rows * columns, -1),
            "pixel_attention_mask": torch.ones(count, rows * columns, dtype=torch.int32, device=pixels.device),
            "spatial_shapes": torch.tensor([[rows, columns]] * count, device=pixels.device),
        }
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if config.model_type == "vit_mae":  # sorts patches by noise even without masking: rising noise keeps the order
        inputs["noise"] = torch.arange(rows * columns, device=pixels.device).float().expand(count, -1)
    size = getattr(config, "image_size", None) or pixels.shape[-2:]
    if "interpolate_pos_encoding" in parameters and tuple(pixels.shape[-2:]) != tuple(
        [size] * 2 if isinstance(size, int) else size
    ):
        inputs["interpolate_pos_encoding"] = True
    return inputs
