"""Finds where a vision transformer's layers are, by watching a trial pass rather than by a list of models.

Module paths differ from family to family and change between versions of transformers; what the modules do does not:

* **Blocks** are the modules of one class that stand in lists and ran as often as the configuration counts layers; of such
  classes the one that owns attention, and of lists inside lists the inner ones. Stages (Swin, Hiera, PVT, ConvNeXt) are so
  many lists of the same class, and a predictor or decoder that did not run is none.
* **The second norm** is the norm whose output goes, as the very same tensor, into a part of the block that owns a matrix
  and is no attention: the MLP. A block without one (post-norm: SwinV2; no norm: ResNet) is read at its output.
* **The final norm** is the first norm of the last block's width that runs after it. If the model norms a part only (CLIP
  its CLS token, ConvNeXt the mean), the same norm is applied to all tokens; if there is none, the last block's output is raw.

Which tokens are patches, and in which order, is found by `patches`.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from mlfusion.errors import BadModel, first_line
from mlfusion.models.backbone.patches import ToArguments, TokenLayout, find_layout
from mlfusion.models.backbone.taps import Special, Tap
from mlfusion.models.backbone.tracing import Call, Watch
from mlfusion.specs.identity import Hook

FinalMode = Literal["hook", "apply", "raw"]
"""Norm of the last layer: applied by the model to all tokens, by us to all tokens, or not at all."""


@dataclass(frozen=True)
class Anatomy:
    """The places of a model's layers and tokens, found by `dissect`."""

    blocks: tuple[nn.Module, ...]
    lists: str  # the paths of the lists that hold the blocks
    norm2: str | None  # the second norm's name inside a block; None: blocks are read at their output
    final: str | None  # the final norm's path; None: the last block's output stays as it is
    final_mode: FinalMode
    special: Special
    taps: dict[Hook, dict[int, Tap]]  # hook point → layer → where it is read
    used: frozenset[str]  # paths of the modules that the deepest layer needs

    @property
    def depth(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)


@dataclass(frozen=True)
class Trace:
    """One watched forward pass: the blocks in the order in which they ran, and what went through them."""

    name: str  # the model's, for messages
    watch: Watch
    blocks: tuple[nn.Module, ...]
    runs: tuple[Call, ...]  # of each block
    channels_first: tuple[bool, ...]  # whether each block's maps are [images, channels, height, width]
    stages: tuple[int, ...]  # the list that holds each block, counted from 0

    @property
    def entry(self) -> Tap:
        """The first block, read at its input."""
        return Tap(self.blocks[0], entering=True, channels_first=self.channels_first[0])

    def sized(self, tap: Tap, shape: tuple[int, ...]) -> Tap:
        """The tap with its number of tokens and their width; raises BadModel if `shape` has neither 3 nor 4 dimensions."""
        if len(shape) == 4:
            places, width = (shape[2:], shape[1]) if tap.channels_first else (shape[1:3], shape[3])
            return replace(tap, tokens=math.prod(places), width=width)
        if len(shape) == 3:
            return replace(tap, tokens=shape[1], width=shape[2])
        raise BadModel(
            f"{self.name}: its blocks give {len(shape)} dimensions; allowed: [images, tokens, width] or a map"
        )


@torch.inference_mode()
def dissect(model: nn.Module, to_arguments: ToArguments, pixels: tuple[int, ...], *, depth: int, name: str) -> Anatomy:
    """Find blocks, norms and tokens from one trial pass, and the tokens' order from a few embeddings.

    `pixels`: channels, height and width of a prepared picture; `depth`: L by the configuration; `name`: for messages.

    Raises:
        BadModel: no blocks are found, or the model does not run on pictures of that size.
    """
    trace = _trace(model, to_arguments, pixels, depth, name)
    layout = find_layout(model, to_arguments, trace.entry, pixels, name)
    norm2 = _second_norm(trace.blocks[0], trace.runs[0], trace.watch)
    blocks = _block_taps(trace, layout)
    taps: dict[Hook, dict[int, Tap]] = {
        "block": blocks,
        "norm2": dict(blocks) if norm2 is None else _norm2_taps(trace, layout, norm2),
        "attn": _part_taps(trace, layout, blocks, lambda block, _: _attention(block, trace.watch)),
        "mlp": _part_taps(trace, layout, blocks, lambda block, run: _mlp(block, run, trace.watch)),
    }
    final = _final_norm(trace)
    final_mode, taps["norm2"][depth] = _final_tap(trace, blocks[depth], final)
    if short := sorted(set(range(depth)) - set(taps["norm2"])):
        raise BadModel(f"{name}: its blocks {short} have no second norm, as the first one has; allowed: blocks alike")
    paths = {module: path for path, module in model.named_modules()}
    end = (final or trace.runs[-1]).end
    return Anatomy(
        blocks=trace.blocks,
        lists=_pattern([paths[block] for block in trace.blocks]),
        norm2=norm2,
        final=paths[final.module] if final is not None else None,
        final_mode=final_mode,
        special=layout.special,
        taps={hook: where for hook, where in taps.items() if where},
        # A parameter may belong to a module that runs only as a part of its parent: its parent's run counts.
        used=frozenset(paths[call.module] for call in trace.watch.calls if call.begin < end),
    )


def _trace(model: nn.Module, to_arguments: ToArguments, pixels: tuple[int, ...], depth: int, name: str) -> Trace:
    """Run a picture of noise through the model, and watch."""
    device = next(model.parameters()).device
    noise = torch.randn(1, *pixels, generator=torch.Generator().manual_seed(0)).to(device)
    watch = Watch()
    try:
        with watch.on(model.modules()):
            model(**to_arguments(noise))
    except (ValueError, RuntimeError, TypeError) as err:
        raise BadModel(
            f"{name} does not run on the {tuple(pixels[1:])} pixels that its preprocessor_config.json makes: "
            f"{first_line(err)}"
        ) from err
    blocks = _blocks(model, watch, depth, name)
    runs = tuple(call for block in blocks if (call := watch.first(block)))
    return Trace(
        name=name,
        watch=watch,
        blocks=tuple(blocks),
        runs=runs,
        channels_first=tuple(_channels_first(run, watch) for run in runs),
        stages=tuple(_stages(model, blocks)),
    )


# --- hook points: layer → where it is read ---------------------------------------------------------------------------


def _block_taps(trace: Trace, layout: TokenLayout) -> dict[int, Tap]:
    """Each block's output; layer 0 is what enters the first block."""
    taps = {0: layout.place(trace.sized(trace.entry, trace.runs[0].given_shape), 0)}
    for layer, (run, first) in enumerate(zip(trace.runs, trace.channels_first, strict=True), 1):
        tap = trace.sized(Tap(run.module, channels_first=first), run.made_shape)
        taps[layer] = layout.place(tap, trace.stages[layer - 1])
    return taps


def _norm2_taps(trace: Trace, layout: TokenLayout, norm2: str) -> dict[int, Tap]:
    """The second norm of block ℓ + 1 as layer ℓ; the last layer is the final norm's."""
    taps = {}
    for layer, (block, stage) in enumerate(zip(trace.blocks, trace.stages, strict=True)):
        if inner := trace.watch.first(block.get_submodule(norm2)):
            taps[layer] = layout.place(trace.sized(Tap(inner.module), inner.made_shape), stage)
    return taps


def _part_taps(
    trace: Trace, layout: TokenLayout, blocks: dict[int, Tap], find: Callable[[nn.Module, Call], Call | None]
) -> dict[int, Tap]:
    """The output of one part of each block, which `find` finds, if it has the block's tokens."""
    taps = {}
    for layer, (block, run) in enumerate(zip(trace.blocks, trace.runs, strict=True), 1):
        part = find(block, run)
        if part is None or len(part.made_shape) not in (3, 4):
            continue
        convolved = trace.channels_first[layer - 1] and isinstance(part.module, (nn.Conv2d, nn.Sequential))
        tap = trace.sized(Tap(part.module, channels_first=convolved), part.made_shape)
        if tap.tokens == blocks[layer].tokens:  # windowed attention inside: not the image's tokens
            taps[layer] = layout.place(tap, trace.stages[layer - 1])
    return taps


def _final_norm(trace: Trace) -> Call | None:
    """The first norm of the last block's width that runs after it."""
    last, inside = trace.runs[-1], {module for block in trace.blocks for module in block.modules()}
    channels_first = trace.channels_first[-1] and len(last.made_shape) == 4
    width = last.made_shape[1 if channels_first else -1]
    after = (call for call in trace.watch.calls if call.begin > last.end and _is_norm(call.module))
    return next((call for call in after if call.module not in inside and _width(call.module) == width), None)


def _final_tap(trace: Trace, last: Tap, final: Call | None) -> tuple[FinalMode, Tap]:
    """The norm of the last layer, and where the layer is read; `last` is the last block's output."""
    if final is None:
        return "raw", last
    if math.prod(final.given_shape) != math.prod(trace.runs[-1].made_shape):
        return "apply", replace(last, norm=final.module)
    channels_first = getattr(final.module, "data_format", "channels_last") == "channels_first"
    return "hook", replace(last, module=final.module, channels_first=channels_first)


# --- blocks and their parts ------------------------------------------------------------------------------------------


def _blocks(model: nn.Module, watch: Watch, depth: int, name: str) -> list[nn.Module]:
    """The blocks in the order in which they ran."""
    ran = {id(call.module): call.begin for call in reversed(watch.calls)}
    classes: dict[type[nn.Module], list[tuple[int, nn.Module]]] = {}
    nested: dict[type[nn.Module], int] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for item in module:
                if id(item) in ran and not isinstance(item, (nn.ModuleList, nn.Sequential)):
                    classes.setdefault(type(item), []).append((ran[id(item)], item))
                    nested[type(item)] = max(path.count("."), nested.get(type(item), 0))
    found = {kind: [item for _, item in sorted(items, key=lambda one: one[0])] for kind, items in classes.items()}
    fitting = {kind: items for kind, items in found.items() if len(items) == depth and _matrices(items[0])}
    if not fitting:
        counts = ", ".join(f"{len(items)} {kind.__name__}" for kind, items in found.items()) or "none"
        raise BadModel(
            f"{name} has no lists of {depth} blocks, the depth that its configuration says (found: {counts}); allowed: "
            "vision transformers and residual networks"
        )
    return max(fitting.items(), key=lambda one: (_attends(one[1][0]), nested[one[0]]))[1]


def _second_norm(block: nn.Module, run: Call, watch: Watch) -> str | None:
    """The name of the norm that feeds the MLP."""
    inner = list(watch.within(run))
    attention = {module for part in block.modules() if _is_attention(part) for module in part.modules()}
    for call in inner:
        if not _is_norm(call.module) or call.module in attention:
            continue
        fed = [later.module for later in inner if later.given == call.made and later.begin > call.end]
        if any(part not in attention and _matrices(part) and not _attends(part) for part in fed):
            return next(path for path, module in block.named_modules() if module is call.module)
    return None


def _attention(block: nn.Module, watch: Watch) -> Call | None:
    """The part of a block that attends."""
    parts = [part for part in block.children() if _attends(part)]
    return watch.first(parts[0]) if parts else None


def _mlp(block: nn.Module, run: Call, watch: Watch) -> Call | None:
    """The last part of a block that owns a matrix and does not attend: the MLP, or its second half."""
    if not any(_is_norm(part) for part in block.modules()):
        return None  # a plain residual block
    parts = {part for part in block.children() if _matrices(part) and not _attends(part)}
    calls = [call for call in watch.within(run) if call.module in parts]
    return max(calls, key=lambda call: call.end, default=None)


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _attends(module: nn.Module) -> bool:
    return any(_is_attention(part) for part in module.modules())


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def _width(norm: nn.Module) -> int:
    return next((parameter.numel() for parameter in norm.parameters()), 0)


def _matrices(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _channels_first(run: Call, watch: Watch) -> bool:
    """Whether a block's maps are [images, channels, height, width]: by the width of its norms, else by its convolutions."""
    if len(run.given_shape) != 4:
        return False
    _, first, _, last = run.given_shape
    inner = list(watch.within(run))
    widths = {_width(call.module) for call in inner if _is_norm(call.module)}
    if (first in widths) != (last in widths):
        return first in widths
    # As high as wide as there are channels, or no norm: a convolution takes its input as it is.
    convolutions = [call for call in inner if isinstance(call.module, nn.Conv2d)]
    return any(call.given == run.given or call.module.in_channels == first != last for call in convolutions)


def _pattern(paths: Sequence[str]) -> str:
    """'layers.0', 'layers.1' → 'layers'; 'stages.0.layers.0', … → 'stages.*.layers'."""
    return re.sub(r"\.\d+\.", ".*.", re.sub(r"\.?\d+$", "", paths[0]))


def _stages(model: nn.Module, blocks: Sequence[nn.Module]) -> list[int]:
    """The list that holds each block, counted from 0."""
    homes = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    of = {id(block): next(n for n, home in enumerate(homes) if any(block is item for item in home)) for block in blocks}
    number = {home: stage for stage, home in enumerate(dict.fromkeys(of[id(block)] for block in blocks))}
    return [number[of[id(block)]] for block in blocks]
