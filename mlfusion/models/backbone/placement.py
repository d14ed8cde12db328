"""Gives every tensor of a checkpoint its place in the model, by the files' headers alone, or refuses the checkpoint.

Nothing is loaded: the model is built on the meta device, which holds shapes and no numbers.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from mlfusion.errors import BadModel
from mlfusion.models.backbone import leftovers
from mlfusion.models.checkpoints import Header

FLOATS = {"F64", "F32", "F16", "BF16", *(f"torch.{kind}" for kind in ("float64", "float32", "float16", "bfloat16"))}


@dataclass(frozen=True)
class Placement:
    """Where the tensors of a checkpoint belong."""

    read: frozenset[str]  # tensors that the image tower and its projection take
    unread: frozenset[str]  # tensors of the model's other parts
    missing: frozenset[str]  # places of the image tower and its projection that no tensor fills


def place(
    model: PreTrainedModel,
    parts: Iterable[str],
    tensors: dict[str, Header],
    origins: dict[str, str],
    name: str,
    with_head: Callable[[], PreTrainedModel | None] = lambda: None,
) -> Placement:
    """Place the tensors of a checkpoint in a model.

    `parts`: paths of the image tower and its projection in the model, '' for the whole of it; `tensors`: headers under the
    names that the class of transformers knows; `origins`: of renamed tensors, the names in the file; `name`: for messages;
    `with_head`: builds the model with the head that the checkpoint was saved with, on the meta device, if there is one.

    Raises:
        BadModel: a tensor has no place and no reason to be left over, two have the same one, or a shape or type differs.
    """
    held, targets = model.state_dict(), _targets(model, tensors)
    parts = tuple(f"{part}." if part else "" for part in parts)
    left = tensors.keys() - targets.keys()
    inside = {tensor for tensor in targets if tensor.startswith(f"{model.base_model_prefix}.")}
    # A head may have names of the tower, and others that no pattern knows. It is built only then, since that takes time.
    if (inside and len(inside) < len(targets)) or any(leftovers.reason(tensor, targets) is None for tensor in left):
        head = _of_head(with_head(), model, tensors)
        targets = {tensor: places for tensor, places in targets.items() if tensor not in head}
        left -= head
    read = {tensor for tensor, places in targets.items() if any(place.startswith(parts) for place in places)}
    if not read:
        raise BadModel(_misnamed(name, tensors, held))
    taken: dict[str, str] = {}
    for tensor in sorted(read):
        source, places = origins.get(tensor, tensor), targets[tensor]
        _refuse_integers(source, tensors[tensor], held[places[0]], name)
        if len(places) > 1:  # split by transformers, which compares the shapes of the pieces
            continue
        if other := taken.get(places[0]):
            raise BadModel(
                f"{other} and {source} in the weights of {name} are both {places[0]} of the model; allowed: one of them"
            )
        taken[places[0]] = source
        refuse_shapes(source, tensors[tensor].shape, held[places[0]].shape, name)
    refuse_leftovers(left, read, name)
    filled = {place for places in targets.values() for place in places}
    wanted = {place for place, tensor in held.items() if place.startswith(parts) and tensor.is_floating_point()}
    missing = wanted - filled
    for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ():
        # Some checkpoints of this class have no tensor of this kind at all; the class then computes without it.
        if (kind := {place for place in wanted if re.search(pattern, place)}) <= missing:
            missing -= kind
    return Placement(frozenset(read), frozenset(targets.keys() - read), frozenset(missing))


def refuse_shapes(source: str, found: Iterable[int], expected: Iterable[int], name: str) -> None:
    """Raise BadModel if a tensor of the file has another shape than its place."""
    if (found := tuple(found)) != (expected := tuple(expected)):
        raise BadModel(
            f"{source} in the weights of {name} has the shape {found}, and the model of its configuration has {expected}; "
            "allowed: weights and a configuration of the same model"
        )


def refuse_leftovers(names: Iterable[str], used: Iterable[str], name: str) -> None:
    """Raise BadModel if one of the tensors `names`, which have no place, has no reason to be left over either."""
    used = list(used)
    refused = [tensor for tensor in sorted(names, key=dot_natural_key) if leftovers.reason(tensor, used) is None]
    if not refused:
        return
    first = next((tensor for tensor in refused if leftovers.change(tensor)), refused[0])
    what = (
        f", {what}" if (what := leftovers.change(first)) else ", for which the model of its configuration has no place"
    )
    more = f" (and {len(refused) - 1} more tensors)" if len(refused) > 1 else ""
    raise BadModel(
        f"the weights of {name} have {first}{more}{what}; allowed: weights and a configuration of the same model, as "
        "save_pretrained writes them"
    )


def _targets(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Tensor → the names of its places in the model, by transformers' own renamings; several if it is split."""
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    held, prefix = model.state_dict(), model.base_model_prefix
    targets: dict[str, tuple[str, ...]] = {}
    for name in sorted(names, key=dot_natural_key):  # the order matters to some renamings
        place, pattern = rename_source_key(name, renamings, converters, prefix, held)
        if place not in held and name in held:
            place, pattern = rename_source_key(name, [], [], prefix, held)
        if place in held:
            converter = next((one for one in converters if pattern in one.source_patterns), None)
            pieces = converter.target_patterns if converter else [place]
            targets[name] = tuple(place.replace(pieces[0], piece) for piece in pieces)
    return targets


def _of_head(whole: PreTrainedModel | None, model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """The tensors of a model with a head that are not those of the model without it."""
    if whole is None:
        return set()
    prefix = f"{model.base_model_prefix}." if hasattr(whole, model.base_model_prefix) else None
    without = () if prefix else model.state_dict()
    held = (
        whole.state_dict()
    )  # a name as it is comes first: transformers mixes up two norms that differ by the prefix alone
    places = {tensor: tensor if tensor in held else places[0] for tensor, places in _targets(whole, names).items()}
    return {
        tensor
        for tensor, place in places.items()
        if place not in without and not (prefix and place.startswith(prefix)) and leftovers.change(tensor) is None
    }


def _misnamed(name: str, tensors: Iterable[str], held: dict[str, Tensor]) -> str:
    first, expected = min(tensors, key=dot_natural_key, default="no tensor"), min(held, key=dot_natural_key)
    return (
        f"the names in the weights of {name} are not those of the class that its config.json names: the file has {first}, "
        f"and the class has {expected}; allowed: the names that save_pretrained writes"
    )


def _refuse_integers(source: str, header: Header, place: Tensor, name: str) -> None:
    if place.is_floating_point() and header.dtype not in FLOATS:
        raise BadModel(
            f"{source} in the weights of {name} is stored as {header.dtype}, and quantised weights are not read; allowed: "
            "float32, float16 or bfloat16, such as the model before its quantisation"
        )


def submodule(model: nn.Module, part: nn.Module) -> str:
    """The path of a part in a model, '' for the model itself."""
    return next(path for path, module in model.named_modules() if module is part)
