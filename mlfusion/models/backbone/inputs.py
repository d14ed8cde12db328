"""The arguments of each family's forward: most take pixels only, and this is the short list of those that take more."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class Arguments:
    """Turns prepared pictures [images, 3, height, width] into the arguments of a model's forward."""

    def __init__(self, model: nn.Module, *, patch_px: int | None) -> None:
        self._model, self._patch = model, patch_px
        self._known = inspect.signature(model.forward).parameters
        self._type = str(getattr(getattr(model, "config", None), "model_type", ""))

    def __call__(self, pixels: Tensor) -> dict[str, Any]:
        """Pictures → arguments by name."""
        if "pixel_values_videos" in self._known:  # a video model: the picture as a clip of one temporal patch
            frames = int(getattr(self._model.config, "tubelet_size", 1))
            clip = pixels[:, None].expand(-1, frames, -1, -1, -1)
            return {
                "pixel_values_videos": clip,
                **({"skip_predictor": True} if "skip_predictor" in self._known else {}),
            }
        if "spatial_shapes" in self._known:  # NaFlex: patches cut already, [images, patches, patch · patch · 3]
            return self._cut_patches(pixels)
        inputs: dict[str, Any] = {"pixel_values": pixels}
        if self._type == "vit_mae":  # shuffles by noise even when it masks none: rising noise keeps the order
            inputs["noise"] = torch.arange(self._patches(pixels), device=pixels.device).float().expand(len(pixels), -1)
        if "interpolate_pos_encoding" in self._known and self._has_other_size(pixels):
            inputs["interpolate_pos_encoding"] = True
        return inputs

    def _patches(self, pixels: Tensor) -> int:
        assert self._patch is not None
        return (pixels.shape[-2] // self._patch) * (pixels.shape[-1] // self._patch)

    def _cut_patches(self, pixels: Tensor) -> dict[str, Any]:
        assert self._patch is not None
        rows, columns = (side // self._patch for side in pixels.shape[-2:])
        patches = pixels.unfold(2, self._patch, self._patch).unfold(
            3, self._patch, self._patch
        )  # [b, 3, rows, columns, p, p]
        return {
            "pixel_values": patches.permute(0, 2, 3, 4, 5, 1).reshape(len(pixels), rows * columns, -1),
            "pixel_attention_mask": torch.ones(len(pixels), rows * columns, dtype=torch.int32, device=pixels.device),
            "spatial_shapes": torch.tensor([[rows, columns]] * len(pixels), device=pixels.device),
        }

    def _has_other_size(self, pixels: Tensor) -> bool:
        trained = getattr(self._model.config, "image_size", None)
        if trained is None:
            return False
        sides = (trained, trained) if isinstance(trained, int) else tuple(trained)
        return tuple(pixels.shape[-2:]) != sides
