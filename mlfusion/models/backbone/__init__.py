"""A frozen vision model, read by hooks: all requested layers and token kinds from one forward pass.

The places to read are found by recording trial passes (`anatomy`), not by a table. By default layer ℓ is the output of the
*second LayerNorm inside a block* (of block ℓ, counted from 0, for ℓ < L) and layer L the final norm: the study's choice (arXiv
2601.09322; `blocks.i.norm2` and `norm` in timm's words). Other hook points have names.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from mlfusion import models
from mlfusion.errors import BadModel
from mlfusion.models.backbone.anatomy import Anatomy, dissect
from mlfusion.models.backbone.loading import LoadedTower, forward_arguments, load
from mlfusion.models.backbone.taps import Reducer, StopForward, Tap
from mlfusion.models.preprocessing import Preprocessing, read
from mlfusion.shapes import Float
from mlfusion.specs.identity import GRID_SIDES, HOOKS, KINDS, Compute, Hook, Pair, TokenKind
from mlfusion.specs.names import layer_ranges
from mlfusion.system.devices import exact_products
from mlfusion.system.words import plural

__all__ = ["Anatomy", "Backbone", "Tap", "dissect"]

SHOWN = 3  # missing tensors that are looked for; each takes a few forward passes


class Backbone:
    """A frozen model whose tokens can be read, with the preprocessing of its pictures."""

    def __init__(
        self,
        checkpoint: models.Checkpoint,
        device: str = "cpu",
        *,
        preprocessing: Preprocessing | None = None,
        compute: Compute = "float32",
    ) -> None:
        """Load the weights and find the layers; `preprocessing` is by default the model's own.

        Raises:
            BadModel: weights that the forward pass needs are missing, no blocks are found, or they have no such hook point.
        """
        self.name = checkpoint.name
        self.device = torch.device(device)
        self.preprocessing = preprocessing or read(checkpoint.folder)
        self._dtype = torch.float32
        loaded = load(checkpoint)
        self._model = loaded.tower.to(self.device)
        shape = models.shape(checkpoint)
        self._arguments = partial(forward_arguments, self._model, shape.patch_px)
        pixels = (3, *self.preprocessing.pixels)
        self.anatomy = dissect(self._model, self._arguments, pixels, shape=shape, name=self.name, absent=loaded.missing)
        self.projects = (  # whether it has the hook point 'projected', in a space that images share with texts
            loaded.projection is not None and not loaded.missing_projection and self.anatomy.final_mode != "raw"
        )
        self._taps = self._taps_at(checkpoint.hook, loaded)
        self._reducers = {layer: Reducer(tap) for layer, tap in self._taps.items()}
        self._refuse_missing(loaded.missing)
        self._dtype = getattr(torch, compute)
        for part in (self._model, loaded.projection):
            if part is not None:
                _convert(part, self._dtype)

    @property
    def depth(self) -> int:
        """L: layers are 1..L; layer 0 is the first block's second norm."""
        return self.anatomy.depth

    @property
    def kinds(self) -> dict[TokenKind, int]:
        """The token kinds of the last layer → tokens of each kind per image."""
        return {kind: tokens for kind in KINDS if (tokens := self.count(self.depth, kind))}

    def count(self, layer: int, kind: TokenKind) -> int:
        """Tokens of this kind per image at a layer; 0 if the layer has none."""
        tap = self._taps.get(layer)
        if tap is None:
            return 0
        if kind in GRID_SIDES:
            side = GRID_SIDES[kind]
            return side * side if tap.grid is not None and min(tap.grid) >= side else 0
        if kind == "all":
            return tap.tokens
        return len(getattr(tap.special, kind)) if kind in ("cls", "dist", "registers") else 1

    def shapes(self, pairs: Iterable[Pair]) -> dict[Pair, tuple[int, int]]:
        """Return (tokens per image, width) of each (layer, kind).

        Raises:
            BadModel: the model has no such token, or no such layer at its hook point; the message says which it has.
        """
        shapes: dict[Pair, tuple[int, int]] = {}
        for layer, kind in sorted(pairs):
            tap = self._taps.get(layer)
            if tap is None:
                raise BadModel(
                    f"{self.name} has no layer {layer} at this hook point; allowed: --layers {layer_ranges(self._taps)}"
                )
            if not (tokens := self.count(layer, kind)):
                available = ", ".join(k for k in KINDS if self.count(layer, k))
                having = [other for other in self._taps if self.count(other, kind)]
                if kind == "cls" and not having:
                    raise BadModel(
                        f"{self.name} has no cls token; allowed: {available}. So take --tokens ap, and probes such as "
                        "ap-last/linear or ap-all-layers/attentive"
                    )
                elsewhere = f"; it has one at --layers {layer_ranges(having)}" if kind == "cls" else ""
                raise BadModel(
                    f"{self.name} has no {kind} token{'' if kind == 'cls' else 's'} at layer {layer}{elsewhere}; "
                    f"allowed: {available}"
                )
            shapes[layer, kind] = tokens, tap.width
        return shapes

    @torch.inference_mode()
    def __call__(
        self, pixels: Float[Tensor, "B 3 height width"], pairs: Iterable[Pair]
    ) -> dict[Pair, Float[Tensor, "B _ _"]]:
        """Run the model on preprocessed pictures up to the deepest requested layer → float32 tokens, on its device."""
        kinds_of: dict[int, list[TokenKind]] = {}
        for layer, kind in self.shapes(pairs):
            kinds_of.setdefault(layer, []).append(kind)
        tokens_of: dict[Pair, Tensor] = {}

        def read_layer(layer: int, output: Tensor) -> None:
            sequence = self._taps[layer].sequence(output)
            for kind in kinds_of[layer]:
                tokens_of[layer, kind] = self._reducers[layer](sequence, kind)
            if layer == max(kinds_of):
                raise StopForward

        # With TF32, which convolutions use by default, the patch embedding's numbers would depend on the device.
        with ExitStack() as hooks, exact_products(self.device), suppress(StopForward):
            for layer in sorted(kinds_of):
                hooks.enter_context(self._taps[layer].hook(partial(read_layer, layer), self.name))
            self._model(**self._arguments(pixels.to(self.device, self._dtype)))
        if absent := {(layer, kind) for layer in kinds_of for kind in kinds_of[layer]} - set(tokens_of):
            raise BadModel(f"{self.name}: the forward pass never came to {sorted(absent)}")
        return {pair: tokens.float() for pair, tokens in tokens_of.items()}

    def _refuse_missing(self, missing: Iterable[str]) -> None:
        """Raise BadModel if the tokens depend on a tensor that the weights lack: if NaN in it changes them.

        Only tensors that the trial pass read can do so. All keep NaN, so that no other pass reads a random number either.
        """
        absent = {name: tensor for name, tensor in self._model.state_dict().items() if name in missing}
        lacking = {name: tensor for name, tensor in absent.items() if name in self.anatomy.absent_read}
        random = {name: tensor.clone() for name, tensor in lacking.items()}
        pixels = torch.randn(1, 3, *self.preprocessing.pixels, generator=torch.Generator().manual_seed(0))
        everything: list[Pair] = [(layer, "all") for layer in self._taps]
        before = self(pixels, everything) if lacking else {}

        def needed(names: list[str]) -> Iterator[str]:
            for name in names:
                lacking[name].fill_(torch.nan)
            tokens = self(pixels, everything) if names else {}
            for name in names:
                lacking[name].copy_(random[name])
            if any(not torch.equal(part, before[pair]) for pair, part in tokens.items()):  # some kernels lose NaN
                half = len(names) // 2
                if half:
                    yield from needed(names[:half])
                    yield from needed(names[half:])
                else:
                    yield from names

        if found := list(islice(needed(sorted(lacking)), SHOWN)):
            absent_tensors = plural(len(found), "tensor", "or more tensors" if len(found) == SHOWN else "tensors")
            raise BadModel(
                f"the weights of {self.name} lack {absent_tensors} that the forward "
                f"pass needs, such as {found[0]}; the features would be random. Allowed: a checkpoint of the class its "
                "config.json names"
            )
        for tensor in absent.values():
            tensor.fill_(torch.nan)

    def _taps_at(self, hook: Hook, loaded: LoadedTower) -> dict[int, Tap]:
        """Layer → the place where it is read at this hook point."""
        taps = dict(self.anatomy.taps.get("norm2" if hook == "projected" else hook, {}))
        if hook == "projected":
            if loaded.projection is None or not self.projects:
                raise BadModel(
                    f"{self.name} has no projection to an embedding shared with texts, so no hook point 'projected'; "
                    f"allowed: {', '.join(self.anatomy.taps)}"
                )
            last, projection = taps[self.depth], loaded.projection.to(self.device)
            norm = projection if last.norm is None else nn.Sequential(last.norm, projection)
            taps[self.depth] = replace(last, norm=norm, width=next(projection.parameters()).shape[0])
        if not taps:
            raise BadModel(
                f"the blocks of {self.name} have no hook point {hook!r}; allowed: "
                f"{', '.join(name for name in HOOKS if name in self.anatomy.taps)}"
            )
        return taps


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert weights and saved statistics to another type, but not buffers that a module computes itself, such as angles.

    Where such a buffer enters a matrix product (SwinV2's coordinates), it is converted there.
    """
    for module in model.modules():
        saved = module._buffers.keys() - module._non_persistent_buffers_set
        for tensor in [*module._parameters.values(), *(module._buffers[name] for name in saved)]:
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        if dtype != torch.float32 and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            module.register_forward_pre_hook(partial(_convert_inputs, dtype))


def _convert_inputs(dtype: torch.dtype, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return tuple(tensor.to(dtype) for tensor in args) if any(tensor.dtype != dtype for tensor in args) else None
