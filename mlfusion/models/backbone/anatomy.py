"""Finds a vision transformer's layers by recording a trial pass, not by a list of models.

Module paths differ between families and change between versions of transformers; the roles of the modules do not:

* **Blocks** are the modules of one class that are in lists and ran as often as the configuration counts layers. If several
  classes fit, the one with attention is taken, then one whose lists hold no other class, then the one in the innermost
  lists. Stages (Swin, Hiera, PVT, ConvNeXt) are several lists of the same class; a predictor or decoder that did not run
  does not count.
* **The second norm** is the norm whose output is, as the same tensor object, the input of a part of the block that has a
  matrix and no attention: the MLP. A block without one (post-norm: SwinV2; no norm: ResNet) is read at its output.
* **The final norm** is the first norm of the last block's width that runs after it. If the model norms a part only (CLIP
  its CLS token, ConvNeXt the mean), the same norm is applied to all tokens; if there is none, the last block's output is raw.

Which tokens are patches, and in which order, is found by `patches`.
"""

import inspect
import math
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import nn

from mlfusion.errors import BadModel, boundary
from mlfusion.models import Shape
from mlfusion.models.backbone.patches import (
    ToArguments,
    TokenLayout,
    Trials,
    find_order,
    find_special_tokens,
    grid_of,
)
from mlfusion.models.backbone.taps import Grid, Tap
from mlfusion.models.backbone.tracing import Call, CallRecorder, main_output
from mlfusion.specs.identity import Hook

FinalMode = Literal["hook", "apply", "raw"]
"""How the last layer is normed: by the model, to all tokens ('hook'); by us ('apply'); or not at all ('raw')."""


@dataclass(frozen=True)
class Anatomy:
    """The places of a model's layers and tokens, found by `dissect`."""

    blocks: tuple[nn.Module, ...]
    lists: str  # the path of the lists that hold the blocks: 'layers', 'stages.*.layers'
    norm2: str | None  # the second norm's name inside a block; None: blocks are read at their output
    final: str | None  # the final norm's path; None: the last block's output is not normed
    final_mode: FinalMode
    taps: dict[Hook, dict[int, Tap]]  # hook point → layer → where it is read
    absent_read: frozenset[str]  # of the tensors that the checkpoint lacks, those read up to the last layer

    @property
    def depth(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)


@dataclass(frozen=True)
class Trace:
    """One recorded forward pass: the blocks in the order in which they ran, and their calls."""

    name: str  # the model's, for messages
    recorder: CallRecorder
    blocks: tuple[nn.Module, ...]
    runs: tuple[Call, ...]  # the first call of each block
    channels_first: tuple[bool, ...]  # whether each block's maps are [images, channels, height, width]
    stages: tuple[int, ...]  # the list that holds each block, counted from 0

    def entry(self, block: int) -> Tap:
        """The input of a block."""
        run = self.runs[block]
        return self.sized(Tap(run.module, at_input=True, channels_first=self.channels_first[block]), run.input_shape)

    def entries(self) -> dict[int, Tap]:
        """The inputs of the first block, and of every block that gets another number of tokens than the last one gave."""
        steps = enumerate(zip(self.runs, self.runs[1:], strict=False), 1)
        return {0: self.entry(0)} | {
            number: self.entry(number)
            for number, (last, run) in steps
            if len(run.input_shape) == 3 and (len(last.output_shape) != 3 or run.input_shape[1] != last.output_shape[1])
        }

    def maps(self, block: int) -> tuple[Grid, ...]:
        """Sides of the maps that convolutions outside the blocks gave before this block, the last one first."""
        inside = {module for one in self.blocks for module in one.modules()}
        return tuple(
            (call.output_shape[-2], call.output_shape[-1])
            for call in reversed(self.recorder.calls)
            if call.begin < self.runs[block].begin
            and isinstance(call.module, (nn.Conv2d, nn.Conv3d))
            and call.module not in inside
        )

    def sized(self, tap: Tap, shape: tuple[int, ...]) -> Tap:
        """The tap with its number of tokens and their width; raises BadModel if `shape` has neither 3 nor 4 dimensions."""
        if len(shape) == 4:
            sides, width = (shape[2:], shape[1]) if tap.channels_first else (shape[1:3], shape[3])
            return replace(tap, tokens=math.prod(sides), width=width, grid=(sides[0], sides[1]))
        if len(shape) == 3:
            return replace(tap, tokens=shape[1], width=shape[2])
        raise BadModel(
            f"{self.name}: its blocks give {len(shape)} dimensions; allowed: [images, tokens, width] or a map"
        )


@torch.inference_mode()
def dissect(
    model: nn.Module,
    to_arguments: ToArguments,
    pixels: tuple[int, ...],
    *,
    shape: Shape,
    name: str,
    absent: Container[str] = (),
) -> Anatomy:
    """Find blocks, norms and tokens from one trial pass, and the tokens' order from a few embeddings.

    Args:
        model: the vision tower.
        to_arguments: prepared pictures → the arguments of its forward.
        pixels: channels, height and width of a prepared picture.
        shape: the model's dimensions, by its configuration.
        name: the model's, for messages.
        absent: names of tensors that the checkpoint does not have.

    Raises:
        BadModel: no blocks are found, or the model does not run on pictures of that size.
    """
    depth = shape.depth
    trace = _trace(model, to_arguments, pixels, depth, name, absent)
    layout = _layout(trace, Trials(model, to_arguments, pixels, name), shape.patch_px)
    norm2 = _second_norm(trace.blocks[0], trace.runs[0], trace.recorder)
    blocks = _block_taps(trace, layout)
    taps: dict[Hook, dict[int, Tap]] = {
        "block": blocks,
        "norm2": dict(blocks) if norm2 is None else _norm2_taps(trace, layout, norm2),
        "attn": _part_taps(trace, layout, blocks, lambda block, _: _attention(block, trace.recorder)),
        "mlp": _part_taps(trace, layout, blocks, lambda block, run: _mlp(block, run, trace.recorder)),
    }
    paths = {module: path for path, module in model.named_modules()}
    final = _final_norm(trace)
    if final is not None and _is_absent_pooler(paths[final.module], final.module, absent):
        final = None
    final_mode, taps["norm2"][depth] = _final_tap(trace, blocks[depth], final)
    if missing := sorted(set(range(depth)) - set(taps["norm2"])):
        raise BadModel(f"{name}: its blocks {missing} have no second norm, as the first one has; allowed: blocks alike")
    return Anatomy(
        blocks=trace.blocks,
        lists=re.sub(r"\.\d+\.", ".*.", re.sub(r"\.?\d+$", "", paths[trace.blocks[0]])),
        norm2=norm2,
        final=paths[final.module] if final is not None else None,
        final_mode=final_mode,
        taps={hook: taps_of for hook, taps_of in taps.items() if taps_of},
        absent_read=_read_by(trace, final),
    )


def _why_not(model: nn.Module, pixels: tuple[int, ...], name: str, reason: str) -> BadModel:
    """The error where a forward pass fails for this reason."""
    if "input_ids" in inspect.signature(model.forward).parameters:
        return BadModel(
            f"{name} takes a text with each image ({reason}); allowed: a model with a vision tower of its own"
        )
    return BadModel(
        f"{name} does not run on the {tuple(pixels[1:])} pixels that its preprocessor_config.json makes ({reason}); allowed: "
        "settings that fit the weights. Save or download the model again"
    )


def _not_finite(model: nn.Module, name: str) -> BadModel:
    """The error where finite weights give numbers that are not; names the largest weight, which is nearly always the cause."""
    sizes = {path: float(weight.abs().max()) for path, weight in model.named_parameters()}
    where = max(sizes, key=lambda path: sizes[path])
    return BadModel(
        f"the weights of {name} give numbers that are not finite (NaN or infinity) on a trial image: the largest weight is "
        f"{sizes[where]:.3g}, in {where}. Allowed: weights whose tokens are finite in float32. Download or save the model again"
    )


def _trace(
    model: nn.Module, to_arguments: ToArguments, pixels: tuple[int, ...], depth: int, name: str, absent: Container[str]
) -> Trace:
    """Run a picture of noise through the model, and record the calls and the readings of absent tensors."""
    device = next(model.parameters()).device
    noise = torch.randn(1, *pixels, generator=torch.Generator().manual_seed(0)).to(device)
    recorder, held = CallRecorder(), model.state_dict()
    frames = getattr(getattr(model, "config", None), "num_frames", 1)
    if frames > 1:
        raise BadModel(
            f"{name} takes videos of {frames} frames, and no single images; allowed: a model of images, or V-JEPA 2, which "
            "gets an image as a clip"
        )
    absent_held = {key: held[key] for key in held if key in absent}
    with boundary(partial(_why_not, model, pixels, name)), recorder.recording(model.modules(), absent_held):
        output = main_output(model(**to_arguments(noise)))
    blocks = _blocks(model, recorder, depth, name)
    runs = tuple(call for block in blocks if (call := recorder.first(block)))
    trace = Trace(
        name=name,
        recorder=recorder,
        blocks=tuple(blocks),
        runs=runs,
        channels_first=tuple(_channels_first(run, recorder) for run in runs),
        stages=tuple(_stages(model, blocks)),
    )
    # A tensor that the checkpoint lacks may be the cause; it is looked for later.
    if output is not None and not output.isfinite().all() and not _read_by(trace, _final_norm(trace)):
        raise _not_finite(model, name)
    return trace


def _layout(trace: Trace, trials: Trials, patch_px: int | None) -> TokenLayout:
    """Special tokens, grids and order of the tokens of every block."""
    _, height, width = trials.pixels
    by_size = ((height // patch_px, width // patch_px),) if patch_px else ()  # for patches that no convolution cuts
    maps = tuple((*trace.maps(block), *by_size) for block in range(len(trace.blocks)))
    entries = trace.entries()
    found, entry = find_special_tokens(trials, entries), entries[0]
    specials = tuple(found[max(start for start in found if start <= block)] for block in range(len(trace.blocks)))
    grid = grid_of(entry.tokens - len(found[0].all_positions), maps[0], (height, width))
    return TokenLayout(
        specials=specials,
        stages=trace.stages,
        maps=maps,
        size=(height, width),
        order=find_order(trials, entry, found[0], grid, patch_px) if grid and entry.grid is None else None,
        encoder=next((module for module in trials.model.modules() if hasattr(module, "reroll")), None),
    )


# --- hook points: layer → where it is read ---------------------------------------------------------------------------


def _block_taps(trace: Trace, layout: TokenLayout) -> dict[int, Tap]:
    """Each block's output; layer 0 is the input of the first block."""
    taps = {0: layout.locate_patches(trace.entry(0), 0)}
    for layer, (run, first) in enumerate(zip(trace.runs, trace.channels_first, strict=True), 1):
        tap = trace.sized(Tap(run.module, channels_first=first), run.output_shape)
        taps[layer] = layout.locate_patches(tap, layer - 1)
    return taps


def _norm2_taps(trace: Trace, layout: TokenLayout, norm2: str) -> dict[int, Tap]:
    """The second norm of block ℓ + 1 as layer ℓ; the last layer, the final norm, is not included."""
    taps = {}
    for layer, block in enumerate(trace.blocks):
        if inner := trace.recorder.first(block.get_submodule(norm2)):
            taps[layer] = layout.locate_patches(trace.sized(Tap(inner.module), inner.output_shape), layer)
    return taps


def _part_taps(
    trace: Trace, layout: TokenLayout, blocks: dict[int, Tap], find: Callable[[nn.Module, Call], Call | None]
) -> dict[int, Tap]:
    """The output of one part of each block, which `find` finds, if it has the block's tokens."""
    taps = {}
    for layer, (block, run) in enumerate(zip(trace.blocks, trace.runs, strict=True), 1):
        part = find(block, run)
        if part is None or len(part.output_shape) not in (3, 4):
            continue
        convolved = trace.channels_first[layer - 1] and isinstance(part.module, (nn.Conv2d, nn.Sequential))
        tap = trace.sized(Tap(part.module, channels_first=convolved), part.output_shape)
        if tap.tokens == blocks[layer].tokens:  # windowed attention inside: not the image's tokens
            taps[layer] = layout.locate_patches(tap, layer - 1)
    return taps


def _final_norm(trace: Trace) -> Call | None:
    """The first norm of the last block's width that runs after it."""
    last, inside = trace.runs[-1], {module for block in trace.blocks for module in block.modules()}
    channels_first = trace.channels_first[-1] and len(last.output_shape) == 4
    width = last.output_shape[1 if channels_first else -1]
    after = (call for call in trace.recorder.calls if call.begin > last.end and _is_norm(call.module))
    return next((call for call in after if call.module not in inside and _width(call.module) == width), None)


def _read_by(trace: Trace, final: Call | None) -> frozenset[str]:
    """The watched tensors that were read before the last block and the final norm were done."""
    ends = {*trace.blocks, *([final.module] if final is not None else [])}
    last = max(call.end for call in trace.recorder.calls if call.module in ends)
    return frozenset(name for name, step in trace.recorder.reads.items() if step < last)


def _is_absent_pooler(path: str, norm: nn.Module, absent: Container[str]) -> bool:
    """Whether this norm belongs to a pooler of which the checkpoint has nothing, as after pretraining (BEiT, Hiera).

    The tokens of such a checkpoint are not normed: the norm of its pretraining head is another one.
    """
    return "pooler" in path.split(".") and all(f"{path}.{name}" in absent for name, _ in norm.named_parameters())


def _final_tap(trace: Trace, last: Tap, final: Call | None) -> tuple[FinalMode, Tap]:
    """How the last layer is normed, and the place where it is read; `last` is the last block's output."""
    if final is None:
        return "raw", last
    partial = math.prod(final.input_shape) != math.prod(trace.runs[-1].output_shape)
    if partial or trace.recorder.first(final.module) is not final:  # EoMT norms the tokens before its last blocks too
        return "apply", replace(last, norm=final.module)
    channels_first = getattr(final.module, "data_format", "channels_last") == "channels_first"
    return "hook", replace(last, module=final.module, channels_first=channels_first)


# --- blocks and their parts ------------------------------------------------------------------------------------------


def _blocks(model: nn.Module, recorder: CallRecorder, depth: int, name: str) -> list[nn.Module]:
    """The blocks in the order in which they ran."""
    ran = {id(call.module): call.begin for call in reversed(recorder.calls)}
    classes: dict[type[nn.Module], list[tuple[int, nn.Module]]] = {}
    nesting: dict[type[nn.Module], int] = {}
    mixed: set[type[nn.Module]] = set()  # classes of which a list holds others too: parts of a block, as in RegNet
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for item in module:
                if id(item) in ran and not isinstance(item, (nn.ModuleList, nn.Sequential)):
                    classes.setdefault(type(item), []).append((ran[id(item)], item))
                    nesting[type(item)] = max(path.count("."), nesting.get(type(item), 0))
                    mixed.update(type(item) for other in module if type(other) is not type(item))
    blocks_of = {kind: [item for _, item in sorted(items, key=lambda item: item[0])] for kind, items in classes.items()}
    fitting = {kind: items for kind, items in blocks_of.items() if len(items) == depth and _has_matrix(items[0])}
    if not fitting:
        counts = ", ".join(f"{len(items)} {kind.__name__}" for kind, items in blocks_of.items()) or "none"
        raise BadModel(
            f"{name} has no lists of {depth} blocks, the depth that its configuration says (found: {counts}); allowed: "
            "vision transformers and residual networks"
        )
    return max(fitting.items(), key=lambda item: (_has_attention(item[1][0]), item[0] not in mixed, nesting[item[0]]))[
        1
    ]


def _second_norm(block: nn.Module, run: Call, recorder: CallRecorder) -> str | None:
    """The name of the norm that feeds the MLP."""
    inner = list(recorder.within(run))
    attention = {module for part in block.modules() if _is_attention(part) for module in part.modules()}
    for call in inner:
        if not _is_norm(call.module) or call.module in attention:
            continue
        fed = [later.module for later in inner if later.input_id == call.output_id and later.begin > call.end]
        if any(part not in attention and _has_matrix(part) and not _has_attention(part) for part in fed):
            return next(path for path, module in block.named_modules() if module is call.module)
    return None


def _attention(block: nn.Module, recorder: CallRecorder) -> Call | None:
    """The part of a block that has attention."""
    parts = [part for part in block.children() if _has_attention(part)]
    return recorder.first(parts[0]) if parts else None


def _mlp(block: nn.Module, run: Call, recorder: CallRecorder) -> Call | None:
    """The last part of a block that has a matrix and no attention: the MLP, or its second half."""
    if not any(_is_norm(part) for part in block.modules()):
        return None  # a plain residual block
    parts = {part for part in block.children() if _has_matrix(part) and not _has_attention(part)}
    calls = [call for call in recorder.within(run) if call.module in parts]
    return max(calls, key=lambda call: call.end, default=None)


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _has_attention(module: nn.Module) -> bool:
    return any(_is_attention(part) for part in module.modules())


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def _width(norm: nn.Module) -> int:
    return next((parameter.numel() for parameter in norm.parameters()), 0)


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _channels_first(run: Call, recorder: CallRecorder) -> bool:
    """Whether a block's maps are [images, channels, height, width]: by the width of its norms, else by its convolutions."""
    if len(run.input_shape) != 4:
        return False
    _, second, _, last = run.input_shape
    inner = list(recorder.within(run))
    widths = {_width(call.module) for call in inner if _is_norm(call.module)}
    if (second in widths) != (last in widths):
        return second in widths
    # Height or width equals the channels, or there is no norm: the convolutions' number of input channels decides.
    convolutions = [call for call in inner if isinstance(call.module, nn.Conv2d)]
    return any(call.input_id == run.input_id or call.module.in_channels == second != last for call in convolutions)


def _stages(model: nn.Module, blocks: Sequence[nn.Module]) -> list[int]:
    """The list that holds each block, counted from 0."""
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    list_of = [next(n for n, inner in enumerate(lists) if any(block is item for item in inner)) for block in blocks]
    stage_of = {number: stage for stage, number in enumerate(dict.fromkeys(list_of))}
    return [stage_of[number] for number in list_of]
