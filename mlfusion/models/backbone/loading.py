"""Loads a checkpoint's vision tower, float32 and frozen, and prepares the arguments of its forward pass."""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from mlfusion import models
from mlfusion.errors import BadModel, MlfusionError, boundary
from mlfusion.models import checkpoints
from mlfusion.models.backbone import conversion
from mlfusion.models.backbone.placement import Placement, place, refuse_leftovers, refuse_shapes, submodule
from mlfusion.system.words import plural


@dataclass(frozen=True)
class LoadedTower:
    """A vision tower in evaluation mode."""

    tower: nn.Module
    projection: nn.Module | None  # to the embedding that images share with texts, as in CLIP
    missing: frozenset[str]  # names, inside the tower, of tensors that the checkpoint did not have
    missing_projection: bool


@dataclass(frozen=True)
class _Plan:
    """What is read of a checkpoint, and into which class; known from the files' headers alone."""

    config: Any
    kind: Any
    layout: checkpoints.Layout
    headers: dict[str, checkpoints.Header]
    parts: list[str]  # paths of the vision tower and its projection in the model
    placement: Placement
    read: frozenset[str]  # names, in the files, of the tensors that are read


def load(checkpoint: models.Checkpoint) -> LoadedTower:
    """Load the vision tower, which may be a part of a model of images and texts; the other parts are not read.

    Raises:
        BadModel: a tensor of the file has no place, a shape differs, a number is not finite, or transformers cannot load it.
    """
    with _loading(checkpoint):
        plan = _plan(checkpoint)
        headers, placement = plan.headers, plan.placement
        readers = {file: _reader(file) for file in {header.file for header in headers.values()}}
        stored = {name: Stored(name, headers[name].file, readers) for name in plan.read}
        if plan.layout == "transformers":
            tensors: dict[str, Any] = {name: Unread(headers[name].shape) for name in placement.unread} | stored
        else:
            weights = {name: tensor[...] for name, tensor in stored.items()}
            converted = conversion.tensors(weights, plan.layout, plan.config)
            tensors = {name: tensor.float().contiguous() for name, tensor in converted.items()}
        model, report = plan.kind.from_pretrained(
            None,
            state_dict=tensors,
            config=plan.config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    for piece, found, expected in report["mismatched_keys"]:
        refuse_shapes(piece, found, expected, checkpoint.name)
    tower = _tower(model)
    prefix = f"{plan.parts[0]}." if plan.parts[0] else ""
    projection = getattr(model, "visual_projection", None)
    return LoadedTower(
        tower=tower.eval().requires_grad_(False),
        projection=projection.eval().requires_grad_(False) if isinstance(projection, nn.Module) else None,
        missing=frozenset(key.removeprefix(prefix) for key in placement.missing if key.startswith(prefix)),
        missing_projection=any(key.startswith("visual_projection.") for key in placement.missing),
    )


def memory_of(checkpoint: models.Checkpoint) -> int:
    """Bytes that the vision tower takes in float32, by the files' headers; errors as in `load`."""
    with _loading(checkpoint):
        plan = _plan(checkpoint)
    return sum(4 * math.prod(plan.headers[name].shape) for name in plan.read)


def _plan(checkpoint: models.Checkpoint) -> _Plan:
    config, layout = models.configuration(checkpoint), checkpoints.layout(checkpoint.folder)
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    kind = _class(config)
    headers = checkpoints.headers_of(models.weight_files(checkpoint.folder))
    with torch.device("meta"):
        blank = kind(config)
    parts = [submodule(blank, _tower(blank))]
    if isinstance(getattr(blank, "visual_projection", None), nn.Module):
        parts.append("visual_projection")
    if layout == "transformers":
        placement = place(blank, parts, headers, {}, checkpoint.name, lambda: _with_head(config, kind))
        return _Plan(config, kind, layout, headers, parts, placement, placement.read)
    origins, renamed, used = _renamed(headers, layout, config, checkpoint.name)
    placement = place(blank, parts, renamed, origins, checkpoint.name)
    return _Plan(config, kind, layout, headers, parts, placement, frozenset(used))


@contextmanager
def _loading(checkpoint: models.Checkpoint) -> Iterator[None]:
    """Without the reports of transformers, and with its errors as `BadModel`."""
    if sys.flags.optimize > 1:
        raise MlfusionError(
            "transformers reads its own docstrings, which Python leaves out with -OO; allowed: python, or python -O. Run the "
            "command without -OO, and without PYTHONOPTIMIZE=2"
        )
    cannot = f"{checkpoint.folder} does not load"
    saved = "allowed: a configuration and weights that one model was saved with. Save or download the model again"
    with _quiet(), boundary(lambda reason: BadModel(f"{cannot} ({reason}); {saved}")):
        yield


def _renamed(
    headers: dict[str, checkpoints.Header], layout: checkpoints.Layout, config: Any, name: str
) -> tuple[dict[str, str], dict[str, checkpoints.Header], set[str]]:
    """For a checkpoint of timm or open_clip: new name → the file's name, new name → header with the new shape, and the used.

    A new tensor that is made of several has no name in the file.

    Raises:
        BadModel: the conversion leaves a tensor over that the model could use.
    """
    # Each tensor is replaced by one number, its own, spread over its shape: so the results say what they come from.
    numbers = {
        key: torch.tensor(float(n), requires_grad=True) for n, key in enumerate(headers, 2)
    }  # 0 and 1 are fillings
    names = {int(number): key for key, number in numbers.items()}
    spread = {key: number.expand(headers[key].shape) for key, number in numbers.items()}
    converted = conversion.tensors(spread, layout, config)
    last = {key: int(tensor[(-1,) * tensor.ndim]) for key, tensor in converted.items()}
    origins = {key: names[number] for key, number in last.items() if number in names}
    blank = checkpoints.Header(Path(), (), "F32")
    renamed = {
        key: replace(headers[origins[key]] if key in origins else blank, shape=tuple(tensor.shape))
        for key, tensor in converted.items()
    }
    used = {names[int(number)] for number in _leaves(converted.values())}
    refuse_leftovers(headers.keys() - used, used, name)
    return origins, renamed, used


def _leaves(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors from which these were computed, as autograd recorded it."""
    nodes = {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        nodes |= {before for before, _ in node.next_functions if before is not None} - seen
        seen |= nodes


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the reports of transformers: what it would say of missing tensors is checked here and by Backbone."""
    transformers.utils.logging.disable_progress_bar()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def _reader(file: Path) -> Callable[[str], Tensor]:
    """A function from a tensor's name to the tensor, memory-mapped.

    The file is not closed before the function is released: transformers' threads may still read when one of them fails.
    """
    if file.suffix == ".safetensors":
        return safe_open(file, framework="pt").get_tensor
    return checkpoints.unpickled(file).__getitem__


class Stored:
    """A tensor in a file, which transformers reads when the tensor has its place, as it reads slices of safetensors."""

    def __init__(self, name: str, file: Path, readers: Mapping[Path, Callable[[str], Tensor]]) -> None:
        self._name, self._file, self._read = name, file, readers[file]

    def __getitem__(self, _: object) -> Tensor:
        """The tensor in memory of its own, float32: a file that is written again must not change a loaded model."""
        stored = self._read(self._name)
        if not stored.is_floating_point():
            return stored.clone()
        # Converted here, since transformers would make a second copy.
        tensor = stored.to(torch.float32, copy=True)
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            wrong = plural(int((~tensor.isfinite()).sum()), "number that is", "numbers that are")
            raise BadModel(
                f"{self._name} in {self._file} has {wrong} not finite (NaN or "
                "infinity), so it holds no trained weights; allowed: finite numbers. Download or save the model again"
            )
        return tensor


class Unread:
    """A tensor of a part that is not used: transformers is given its shape, and no memory is taken."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __getitem__(self, _: object) -> "Unread":
        return self

    def to(self, **_: object) -> Tensor:
        """The shape on the meta device, for any device and type."""
        return torch.empty(self._shape, device="meta")


def _class(config: Any) -> Any:
    """The class of the model without a head, or with its projection if the checkpoint has one."""
    architecture = (config.architectures or [""])[0]
    unmapped = type(config) not in transformers.MODEL_MAPPING  # BLIP's vision model alone
    if (architecture.endswith("VisionModelWithProjection") or unmapped) and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    kind: Any = transformers.MODEL_MAPPING.get(type(config), None)
    if kind is None:
        raise BadModel(f"transformers has no model without a head for a {config.model_type}; allowed: vision models")
    if isinstance(kind, tuple):
        return next((one for one in kind if one.__name__ == architecture), kind[0])
    return kind


def _with_head(config: Any, kind: Any) -> Any:
    """The model of the class that config.json names, on the meta device, or None if it is `kind` or cannot be built."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is None or named is kind or getattr(named, "config_class", None) is not type(config):
        return None
    with suppress(Exception), torch.device("meta"):  # a head's own settings may be wrong, and the head is not used
        return named(config)
    return None


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
            "spatial_shapes": torch.tensor([[rows, columns]] * count),  # the model reads it one by one: on the host
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
