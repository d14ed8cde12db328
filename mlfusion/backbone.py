"""A frozen vision transformer, read by hooks: every layer and token kind asked for, from one forward pass.

Where to read is found by watching one trial forward rather than from a table of module paths, which change between
versions of transformers. A layer is the output of the *second LayerNorm inside a block* (of block ℓ for layer ℓ < L) and, for
layer L, the final norm: the study's choice (arXiv 2601.09322; `blocks.i.norm2` and `norm` in timm's words).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from mlfusion import models
from mlfusion.errors import BadModel
from mlfusion.preprocessing import Preprocessing, read
from mlfusion.specs import Compute, Pair, TokenKind


class _Enough(Exception):
    """No error: the deepest layer asked for has been read, the rest of the forward pass is not needed."""


@dataclass(frozen=True)
class Anatomy:
    """Where a model's layers and tokens are, found by `dissect`."""

    blocks: nn.ModuleList
    norm2: str  # the second norm's name inside a block
    final: nn.Module  # the final norm
    final_sees_blocks: bool  # False: the model norms only a part (CLIP: its CLS); then we norm all tokens ourselves
    prefix: int  # tokens before the patches: CLS, distillation, registers
    has_cls: bool
    tokens: int  # length of the sequence
    widths: dict[int, int]  # layer → channels


class Backbone:
    """A model ready to be read, and how its pictures are prepared. Weights in `compute`, frozen, on `device`."""

    def __init__(
        self,
        checkpoint: models.Checkpoint,
        device: str = "cpu",
        *,
        preprocessing: Preprocessing | None = None,
        compute: Compute = "float32",
    ) -> None:
        """Load and dissect; `preprocessing` is the model's own unless given.

        Raises:
            BadModel: weights that the forward pass needs are missing, or no blocks with two norms are found.
        """
        self.name = checkpoint.name
        self.device = torch.device(device)
        self.preprocessing = preprocessing or read(checkpoint.folder)
        self._dtype: torch.dtype = getattr(torch, compute)
        self._model, missing = _load(checkpoint.folder)
        self._model.to(self.device)
        noise = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), np.uint8)
        trial = self.preprocessing([Image.fromarray(image) for image in noise])
        self.anatomy, used = dissect(self._model, self._inputs(trial), checkpoint.name)
        if lost := sorted(key for key in missing if key.rpartition(".")[0] in used):
            raise BadModel(
                f"the weights of {checkpoint.name} lack {len(lost)} tensors that the forward pass needs, such as "
                f"{lost[0]}; the features would be random. Allowed: a checkpoint of the class its config.json names"
            )
        _convert(self._model, self._dtype)

    @property
    def depth(self) -> int:
        """L: layers are 1..L, and 0 for the first block's second norm."""
        return len(self.anatomy.blocks)

    @property
    def kinds(self) -> dict[TokenKind, int]:
        """The token kinds this model can give → tokens of each kind per image and layer."""
        return {**({"cls": 1} if self.anatomy.has_cls else {}), "ap": 1, "all": self.anatomy.tokens}

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, pairs: Iterable[Pair]) -> dict[Pair, Tensor]:
        """Run [images, 3, height, width], as `preprocessing` finishes them, as deep as the deepest layer asked for.

        Returns:
            (layer, kind) → [images, tokens, width] float32, on the model's device.
        """
        wanted: dict[int, list[TokenKind]] = {}
        for layer, kind in sorted(pairs):
            wanted.setdefault(layer, []).append(kind)
        read: dict[Pair, Tensor] = {}

        def take(layer: int, tokens: Tensor) -> None:
            for kind in wanted[layer]:
                read[layer, kind] = self._reduce(tokens, kind)
            if layer == max(wanted):
                raise _Enough

        # A convolution may use TF32 by default, which would make the patch embedding's numbers depend on the device.
        with self._tapped(wanted, take), torch.backends.cudnn.flags(allow_tf32=False), suppress(_Enough):
            self._model(**self._inputs(pixels.to(self.device, self._dtype)))
        if absent := {(layer, kind) for layer in wanted for kind in wanted[layer]} - set(read):
            raise BadModel(f"{self.name}: the forward pass never came to {sorted(absent)}")
        return {pair: tokens.float() for pair, tokens in read.items()}

    def _reduce(self, tokens: Tensor, kind: TokenKind) -> Tensor:
        """[images, sequence, width] → [images, kept, width]; copies, so that the whole layer need not be kept."""
        if kind == "cls":
            return tokens[:, :1].clone()
        if kind == "ap":
            return tokens[:, self.anatomy.prefix :].mean(1, keepdim=True, dtype=torch.float32)
        return tokens.clone()

    def _inputs(self, pixels: Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {"pixel_values": pixels.to(self.device)}
        if isinstance(self._model, transformers.ViTMAEModel):
            # MAE shuffles its patches by random noise even when it masks none: rising noise keeps their order.
            grid = pixels.shape[-2] // _pair(self._model.config.patch_size)[0]
            patches = grid * (pixels.shape[-1] // _pair(self._model.config.patch_size)[1])
            inputs["noise"] = torch.arange(patches, device=self.device).float().expand(len(pixels), -1)
        return inputs

    @contextmanager
    def _tapped(self, wanted: Iterable[int], take: Any) -> Iterator[None]:
        """Hooks on the layers asked for, removed however the forward pass ends."""
        anatomy, depth, handles = self.anatomy, self.depth, []

        def tap(module: nn.Module, layer: int, norm: nn.Module | None = None) -> None:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                tokens = _tensor(output)
                take(layer, tokens if norm is None else norm(tokens))

            handles.append(module.register_forward_hook(hook))

        try:
            for layer in wanted:
                if layer < depth:
                    tap(anatomy.blocks[layer].get_submodule(anatomy.norm2), layer)
                elif anatomy.final_sees_blocks:
                    tap(anatomy.final, layer)
                else:
                    tap(anatomy.blocks[-1], layer, norm=anatomy.final)
            yield
        finally:
            for handle in handles:
                handle.remove()


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights and statistics in another precision; what a module computes for itself, such as angles, stays as it is."""
    for module in model.modules():
        saved = module._buffers.keys() - module._non_persistent_buffers_set
        for tensor in [*module._parameters.values(), *(module._buffers[name] for name in saved)]:
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _load(folder: Path) -> tuple[nn.Module, set[str]]:
    """The vision tower in evaluation mode, and the names of tensors that the checkpoint did not have."""
    config = models.configuration(folder)
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    transformers.utils.logging.disable_progress_bar()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # missing tensors are judged below, by whether they are used
    try:
        model, report = transformers.AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as err:
        raise BadModel(f"{folder} does not load: {models.first_line(err)}") from err
    finally:
        transformers.utils.logging.set_verbosity(before)
    missing = set(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]}
    if isinstance(tower := getattr(model, "vision_model", None), nn.Module):
        model, missing = (
            tower,
            {key.removeprefix("vision_model.") for key in missing if key.startswith("vision_model.")},
        )
    return model.eval().requires_grad_(False), missing


@torch.inference_mode()
def dissect(model: nn.Module, inputs: dict[str, Any], name: str) -> tuple[Anatomy, set[str]]:
    """Find blocks, norms and token kinds from one forward pass over two different images.

    * The blocks are the longest list of modules of one class that own attention.
    * The second norm is the one whose output goes, as the very same tensor, into the block's MLP.
    * The final norm is the first of that width to run after the last block.
    * Tokens that are the same for both images when they enter the first block are no patches.

    Returns:
        The anatomy, and the names of the modules that ran.

    Raises:
        BadModel: something of this was not found.
    """
    blocks = _blocks(model, name)
    names = {module: path for path, module in model.named_modules()}
    inside = {module for block in blocks for module in block.modules()}
    events: list[tuple[nn.Module, Tensor | None, Tensor | None]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        events.append((module, given[0] if given else None, _tensor(output, strict=False)))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        model(**inputs)
    except (ValueError, RuntimeError) as err:
        size = tuple(inputs["pixel_values"].shape[-2:])
        raise BadModel(
            f"{name} does not run on the {size} pixels that its preprocessor_config.json makes: {models.first_line(err)}"
        ) from err
    finally:
        for handle in handles:
            handle.remove()

    entering = {module: given for module, given, _ in events}
    leaving = {module: made for module, _, made in events}
    tokens, last = entering.get(blocks[0]), leaving.get(blocks[-1])
    if tokens is None or last is None or tokens.ndim != 3:
        raise BadModel(f"{name}: its blocks do not map [images, tokens, width] to the same; allowed: plain ViTs")
    first = dict(blocks[0].named_children())
    norm2 = next(
        (
            path
            for path, norm in first.items()
            if _is_norm(norm)
            for sibling in first.values()
            if sibling is not norm
            and not _attends(sibling)
            and any(p.ndim > 1 for p in sibling.parameters())
            and entering.get(sibling) is leaving.get(norm) is not None
        ),
        None,
    )
    if norm2 is None:
        raise BadModel(f"{name}: no second norm feeds an MLP in its blocks; allowed: pre-norm vision transformers")
    order = [module for module, _, _ in events]
    final = next(
        (
            module
            for module in order[order.index(blocks[-1]) + 1 :]
            if module not in inside and _is_norm(module) and _width(module) == last.shape[-1]
        ),
        None,
    )
    if final is None:
        raise BadModel(f"{name}: no final norm runs after its blocks; allowed: pre-norm vision transformers")
    same = (tokens[0] == tokens[1]).all(-1).tolist()
    prefix = same.index(False)
    if any(same[prefix:]):
        raise BadModel(f"{name}: tokens that are no patches stand behind or between the patches; allowed: in front")
    width = tokens.shape[-1]
    anatomy = Anatomy(
        blocks=blocks,
        norm2=norm2,
        final=final,
        final_sees_blocks=entering[final] is last,
        prefix=prefix,
        has_cls=any(
            path.rpartition(".")[2] in ("cls_token", "class_embedding") for path, _ in model.named_parameters()
        ),
        tokens=tokens.shape[1],
        widths=dict.fromkeys(range(len(blocks) + 1), width),
    )
    # A parameter may belong to a module that never runs itself (CLS and positions): its parent's run counts.
    return anatomy, {names[module] for module in order if "pooler" not in names[module]}


def _blocks(model: nn.Module, name: str) -> nn.ModuleList:
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len({type(block) for block in module}) == 1
        and any(_attends(part) for part in module[0].children())
    ]
    if not lists:
        raise BadModel(f"{name} has no list of transformer blocks; allowed: vision transformers")
    return max(lists, key=len)


def _attends(module: nn.Module) -> bool:
    return any("attention" in type(part).__name__.lower() for part in module.modules())


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def _width(norm: nn.Module) -> int:
    return next((parameter.numel() for parameter in norm.parameters()), 0)


def _tensor(output: Any, *, strict: bool = True) -> Any:
    """A module's main output."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor):
        return output
    if strict:
        raise BadModel(f"a block gives {type(output).__name__}, not a tensor")
    return None


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
