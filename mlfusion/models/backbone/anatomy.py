"""Finds where a vision transformer's layers and tokens are, by watching trial passes rather than by a list of models.

Module paths differ from family to family and change between versions of transformers; what the modules do does not:

* **Blocks** are the modules of one class that stand in lists and ran as often as the configuration counts layers; of such
  classes the one that owns attention, and of lists inside lists the inner ones. Stages (Swin, Hiera, PVT, ConvNeXt) are so
  many lists of the same class, and a predictor or decoder that did not run is none.
* **The second norm** is the norm whose output goes, as the very same tensor, into a part of the block that owns a matrix
  and is no attention: the MLP. A block without one (post-norm: SwinV2; no norm: ResNet) is read at its output.
* **The final norm** is the first norm of the last block's width that runs after it. If the model norms a part only (CLIP
  its CLS token, ConvNeXt the mean), the same norm is applied to all tokens; if there is none, the last block's output is raw.
* **Patches** are told from other tokens, and put in order, by a code: pictures in which patch number n shows one of two
  textures as the binary digits of n say. Tokens that are the same in all of them are CLS, registers and their like.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mlfusion.errors import BadModel
from mlfusion.models.backbone.tracing import Call, Watch, main_output
from mlfusion.specs import Hook

Grid = tuple[int, int]


class Enough(Exception):
    """No error: what was asked for has been read, the rest of the forward pass is not needed."""


@dataclass(frozen=True)
class Special:
    """Where the tokens that are no patches stand in the sequence."""

    cls: tuple[int, ...] = ()
    dist: tuple[int, ...] = ()
    registers: tuple[int, ...] = ()
    other: tuple[int, ...] = ()  # of no known purpose, such as YOLOS' detection tokens

    @property
    def every(self) -> tuple[int, ...]:
        """All of them, in order."""
        return tuple(sorted((*self.cls, *self.dist, *self.registers, *self.other)))


@dataclass(frozen=True)
class Tap:
    """Where the tokens of one layer come from, and what they are."""

    module: nn.Module
    entering: bool = False  # what goes in, not what comes out
    norm: nn.Module | None = None  # applied to all tokens of what is read
    channels_first: bool = False  # of outputs [images, channels, height, width]
    tokens: int = 0  # of an image, all of them
    width: int = 0  # channels of a token
    grid: Grid | None = None  # of the patches; None where their order is not known
    order: tuple[int, ...] | None = field(default=None, repr=False)  # raster place → patch; None: they are in order

    def sequence(self, output: Tensor) -> Tensor:
        """[images, tokens, width] of what the module gave or got: 4-D outputs in raster order."""
        if output.ndim == 4:
            output = output.flatten(2).transpose(1, 2) if self.channels_first else output.flatten(1, 2)
        return output if self.norm is None else self.norm(output)


@dataclass(frozen=True)
class Anatomy:
    """Where a model's layers and tokens are, found by `dissect`."""

    blocks: tuple[nn.Module, ...]
    lists: str  # the paths of the lists that hold the blocks
    norm2: str | None  # the second norm's name inside a block; None: blocks are read at their output
    final: str | None  # the final norm's path; None: the last block's output stays as it is
    final_mode: str  # "hook": the model norms all tokens; "apply": we do; "raw": nobody does
    special: Special
    taps: dict[Hook, dict[int, Tap]]  # hook point → layer → where
    used: frozenset[str]  # paths of the modules that the deepest layer needs

    @property
    def depth(self) -> int:
        """L."""
        return len(self.blocks)


Feed = Callable[[Tensor], dict[str, Any]]


@torch.inference_mode()
def dissect(model: nn.Module, feed: Feed, pixels: tuple[int, ...], *, depth: int, name: str) -> Anatomy:
    """Find blocks, norms and tokens from one trial pass, and the tokens' order from a few embeddings.

    Args:
        model: in evaluation mode.
        feed: pictures [images, channels, height, width] → arguments of its forward.
        pixels: channels, height and width of a prepared picture.
        depth: L by the configuration.
        name: for messages.

    Raises:
        BadModel: no blocks are found, or the model does not run on pictures of that size.
    """
    device = next(model.parameters()).device
    noise = torch.randn(1, *pixels, generator=torch.Generator().manual_seed(0)).to(device)
    watch = Watch()
    try:
        with watch.on(model.modules()):
            model(**feed(noise))
    except (ValueError, RuntimeError, TypeError) as err:
        said = str(err).strip().splitlines() or [type(err).__name__]
        raise BadModel(
            f"{name} does not run on the {tuple(pixels[1:])} pixels that its preprocessor_config.json makes: {said[0][:200]}"
        ) from err
    paths = {module: path for path, module in model.named_modules()}
    blocks = _blocks(model, watch, depth, name)
    runs = [call for block in blocks if (call := watch.first(block))]
    inside = {module for block in blocks for module in block.modules()}
    last = runs[-1]
    channels_first = [_channels_first(call, watch) for call in runs]
    norm2 = _second_norm(blocks[0], runs[0], watch)
    final = _final_norm(watch, last, channels_first[-1], inside)
    final_mode = "raw" if final is None else "hook" if _size(final.given_shape) == _size(last.made_shape) else "apply"
    special, order, aspect = _tokens(model, feed, pixels, blocks[0], runs[0], channels_first[0], name)

    def shaped(tap: Tap, shape: tuple[int, ...], stage: int) -> Tap:
        if len(shape) == 4:
            tap = replace(tap, tokens=math.prod(shape[2:] if tap.channels_first else shape[1:3]))
            tap = replace(tap, width=shape[1] if tap.channels_first else shape[3])
        elif len(shape) == 3:
            tap = replace(tap, tokens=shape[1], width=shape[2])
        else:
            raise BadModel(
                f"{name}: its blocks give {len(shape)} dimensions; allowed: [images, tokens, width] or a map"
            )
        return _placed(tap, special, order, aspect, _reroll(model, stage))

    stages = _stages(model, blocks)
    taps: dict[Hook, dict[int, Tap]] = {"block": {}, "norm2": {}, "attn": {}, "mlp": {}}
    entry = Tap(blocks[0], entering=True, channels_first=channels_first[0])
    taps["block"][0] = shaped(entry, runs[0].given_shape, 0)
    for layer, (block, call, first) in enumerate(zip(blocks, runs, channels_first, strict=True), 1):
        stage = stages[layer - 1]
        taps["block"][layer] = shaped(Tap(block, channels_first=first), call.made_shape, stage)
        for hook, part in (("attn", _attention(block, watch)), ("mlp", _mlp(block, call, watch))):
            if part is not None and len(part.made_shape) in (3, 4):
                convolved = first and isinstance(part.module, (nn.Conv2d, nn.Sequential))
                tap = shaped(Tap(part.module, channels_first=convolved), part.made_shape, stage)
                if tap.tokens == taps["block"][layer].tokens:  # windowed attention inside: not the image's tokens
                    taps[hook][layer] = tap  # type: ignore[index]
        if norm2 is not None and (inner := watch.first(block.get_submodule(norm2))):
            taps["norm2"][layer - 1] = shaped(Tap(inner.module), inner.made_shape, stage)
    if norm2 is None:
        taps["norm2"] = dict(taps["block"])
    end = taps["block"][len(blocks)]
    if final is not None and final_mode == "hook":
        end = replace(end, module=final.module, channels_first=_channels_first_norm(final.module))
    elif final is not None:
        end = replace(end, norm=final.module)
    taps["norm2"][len(blocks)] = end
    if short := sorted(set(range(len(blocks))) - set(taps["norm2"])):
        raise BadModel(f"{name}: its blocks {short} have no second norm, as the first one has; allowed: blocks alike")
    stop = final.end if final is not None else last.end
    return Anatomy(
        blocks=tuple(blocks),
        lists=_pattern([paths[block] for block in blocks]),
        norm2=norm2,
        final=paths[final.module] if final is not None else None,
        final_mode=final_mode,
        special=special,
        taps={hook: where for hook, where in taps.items() if where},
        # A parameter may belong to a module that runs only as a part of its parent: its parent's run counts.
        used=frozenset(paths[call.module] for call in watch.calls if call.begin < stop),
    )


# --- blocks and norms ------------------------------------------------------------------------------------------------


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


def _final_norm(watch: Watch, last: Call, channels_first: bool, inside: set[nn.Module]) -> Call | None:
    width = last.made_shape[1] if channels_first and len(last.made_shape) == 4 else last.made_shape[-1]
    for call in watch.calls:
        if call.begin > last.end and _is_norm(call.module) and call.module not in inside:
            if isinstance(call.module, nn.modules.batchnorm._BatchNorm):
                continue
            if _width(call.module) == width:
                return call
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


def _channels_first_norm(norm: nn.Module) -> bool:
    return getattr(norm, "data_format", "channels_last") == "channels_first"


def _pattern(paths: Sequence[str]) -> str:
    """'layers.0', 'layers.1' → 'layers'; 'stages.0.layers.0', … → 'stages.*.layers'."""
    return re.sub(r"\.\d+\.", ".*.", re.sub(r"\.?\d+$", "", paths[0]))


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _stages(model: nn.Module, blocks: Sequence[nn.Module]) -> list[int]:
    """Which list each block stands in, counted from 0."""
    homes = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    of = {id(block): next(n for n, home in enumerate(homes) if any(block is item for item in home)) for block in blocks}
    number = {home: stage for stage, home in enumerate(dict.fromkeys(of[id(block)] for block in blocks))}
    return [number[of[id(block)]] for block in blocks]


# --- tokens ----------------------------------------------------------------------------------------------------------


def _tokens(
    model: nn.Module,
    feed: Feed,
    pixels: tuple[int, ...],
    first: nn.Module,
    run: Call,
    channels_first: bool,
    name: str,
) -> tuple[Special, tuple[int, ...] | None, float]:
    """Which tokens are no patches, the raster place of each patch (None: unknown), and height by width of the image."""
    _, height, width = pixels
    aspect = height / width
    entry = Tap(first, entering=True, channels_first=channels_first)
    device = next(model.parameters()).device

    def embedded(picture: Tensor) -> Tensor:
        """[tokens, width] as they enter the first block."""
        held: list[Tensor] = []

        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            held.append(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)))
            raise Enough

        handle = first.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with suppress(Enough):
                model(**feed(picture[None]))
        finally:
            handle.remove()
        return entry.sequence(held[0])[0].float()

    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(*pixels, generator=generator).to(device) for _ in range(2))
    plain, changed = embedded(one), embedded(other)
    moved = (plain != changed).any(-1)
    if not moved.any():
        raise BadModel(f"{name}: no token depends on the image")
    special = _named(model, [at for at, moves in enumerate(moved.tolist()) if not moves], len(plain))
    patches = int(moved.sum())
    grid = _grid(patches, aspect)
    if grid is None:
        return special, None, aspect
    rows, columns = grid
    cell = torch.div(torch.arange(height), height // rows, rounding_mode="floor").clamp(max=rows - 1)[:, None] * columns
    cell = (cell + torch.div(torch.arange(width), width // columns, rounding_mode="floor").clamp(max=columns - 1)).to(
        device
    )
    a, b = plain[moved], changed[moved]
    apart = (a - b).norm(dim=-1)
    places = torch.zeros(patches, dtype=torch.long, device=device)
    for digit in range(max(1, (patches - 1).bit_length())):
        shown = embedded(torch.where((cell >> digit & 1).bool(), other, one))[moved]
        to_a, to_b = (shown - a).norm(dim=-1), (shown - b).norm(dim=-1)
        if (torch.minimum(to_a, to_b) > 0.01 * apart).any():
            return special, None, aspect  # patches overlap (a convolutional stem): no code can be read
        places += (to_b < to_a).long() << digit
    if sorted(places.tolist()) != list(range(patches)):
        return special, None, aspect
    return special, tuple(places.tolist()), aspect


_NAMES = (
    ("cls", re.compile(r"(^|[._])(cls|class)[\w]*?(token|embedding)s?$")),
    ("dist", re.compile(r"dist\w*_?token")),
    ("registers", re.compile(r"reg\w*token|storage_token|registers?$")),
)


def _named(model: nn.Module, still: Sequence[int], tokens: int) -> Special:
    """Name the tokens that do not depend on the image, by the parameters that they come from: CLS, then the others."""
    counts: dict[str, int] = {}
    for path, parameter in model.named_parameters():
        for kind, pattern in _NAMES:
            if pattern.search(path) and "mask" not in path and "position" not in path:
                counts[kind] = counts.get(kind, 0) + (parameter.shape[-2] if parameter.ndim > 1 else 1)
                break
    # RADIO keeps both in one parameter, and says in its configuration how many are class tokens.
    classes = getattr(getattr(model, "config", None), "num_cls_tokens", None)
    if isinstance(classes, int) and classes < counts.get("cls", 0):
        counts["registers"] = counts.get("registers", 0) + counts["cls"] - classes
        counts["cls"] = classes
    front = [at for rank, at in enumerate(still) if at == rank]
    places: dict[str, tuple[int, ...]] = {}
    for kind, _ in _NAMES:
        places[kind], front = tuple(front[: counts.get(kind, 0)]), front[counts.get(kind, 0) :]
    known = {at for some in places.values() for at in some}
    return Special(**places, other=tuple(at for at in still if at not in known))


def _grid(patches: int, aspect: float) -> Grid | None:
    """Rows and columns of so many patches on an image of this height by width."""
    rows = round(math.sqrt(patches * aspect))
    return (rows, patches // rows) if rows and patches % rows == 0 else None


def _placed(
    tap: Tap,
    special: Special,
    order: tuple[int, ...] | None,
    aspect: float,
    reroll: Callable[[int], list[int] | None] | None,
) -> Tap:
    """With the grid of the patches, and where each stands in the sequence."""
    patches = tap.tokens - len(special.every)
    grid = _grid(patches, aspect)
    if reroll is not None:
        places = reroll(patches)
        if places is None:
            return tap
        return replace(tap, grid=grid, order=tuple(places) if places != list(range(patches)) else None)
    if order is None or order == tuple(range(len(order))):
        return replace(tap, grid=grid)  # in order; a convolutional stem and merged patches keep the raster
    if len(order) != patches:
        return tap
    return replace(tap, grid=grid, order=tuple(sorted(range(patches), key=order.__getitem__)))


def _reroll(model: nn.Module, stage: int) -> Callable[[int], list[int] | None] | None:
    """Hiera keeps its patches in an order of its own, stage by stage, and knows the way back: the one exception."""
    encoder: Any = next((module for module in model.modules() if hasattr(module, "reroll")), None)
    if encoder is None:
        return None

    def places(patches: int) -> list[int] | None:
        numbers = torch.arange(patches)[None, :, None]
        try:
            back: list[int] = encoder.reroll(numbers, stage_idx=stage).flatten().tolist()
        except RuntimeError:  # it knows the way for pictures of its own size alone
            return None
        return back

    return places


def tensor_of(output: Any, name: str) -> Tensor:
    """A module's main output.

    Raises:
        BadModel: it is no tensor.
    """
    found = main_output(output)
    if found is None:
        raise BadModel(f"{name}: a block gives {type(output).__name__}, not a tensor")
    return found
