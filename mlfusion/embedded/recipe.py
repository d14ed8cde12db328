"""The recipe of pre-training, read strictly from a TOML file: it determines the embedded model's weights."""

import hashlib
import json
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from mlfusion.embedded.formula import FAMILIES
from mlfusion.embedded.textures import TEXTURES
from mlfusion.errors import BadRecipe

Positive = Annotated[int, Meta(ge=1)]


class Network(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plain ViT: one CLS token, learned positions, LayerNorm before attention and MLP."""

    image_px: Positive
    patch_px: Positive
    depth: Positive
    width: int
    heads: Positive


class Images(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The patterns that are drawn once, before training."""

    families: tuple[str, ...]
    classes: Positive  # per family
    instances: Positive  # per class
    pattern_px: int


class Schedule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Length of the training, batch size, learning rate."""

    seed: int
    steps: Positive
    crews: Positive  # parts of a batch, one thread each; the contrastive loss is within a part
    scenes: Annotated[int, Meta(ge=2)]  # per crew and step, each in two pictures; contrast needs two
    kept_patches: int  # patches of a picture that the network gets, until the last steps
    whole_last: int  # steps at the end in which the network gets every patch
    learning_rate: float
    weight_decay: float
    warmup: int  # steps with a rising rate
    cooldown: int  # steps with a falling rate, at the end; until then a longer run's weights are the same
    checkpoint_every: Positive  # steps between checkpoints


class Weights(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The weight of each objective in the loss."""

    formula: float
    fill: float
    contrast: float
    layout: float
    grain: float
    temperature: float  # of the contrastive loss


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole recipe, which determines the weights."""

    network: Network
    images: Images
    schedule: Schedule
    weights: Weights

    @property
    def digest(self) -> str:
        """Twelve hex digits naming this recipe."""
        return hashlib.sha256(json.dumps(msgspec.to_builtins(self), sort_keys=True).encode()).hexdigest()[:12]


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; raises BadRecipe if a field is missing, unknown or wrong."""
    try:
        recipe = msgspec.toml.decode(Path(path).read_bytes(), type=Recipe)
    except OSError as err:
        raise BadRecipe(
            f"cannot read the recipe {path}: {err.strerror}; the one that ships: mlfusion pretrain pipelines/formula-vit.toml"
        ) from err
    except msgspec.ValidationError as err:
        sections = {section.name: section.type.__struct_fields__ for section in msgspec.structs.fields(Recipe)}
        needed = "; ".join(f"[{name}] {', '.join(keys)}" for name, keys in sections.items())
        raise BadRecipe(f"{path}: {err}. Exactly these keys are allowed and needed: {needed}.") from err
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise BadRecipe(f"{path} is not TOML: {err}") from err
    check_values(path, recipe)
    return recipe


def check_values(path: Path, recipe: Recipe) -> None:
    """Raise BadRecipe for values that have the right type but cannot be used in training."""
    net, images, schedule = recipe.network, recipe.images, recipe.schedule
    unknown = sorted(set(images.families) - set(FAMILIES))
    patches = (net.image_px // net.patch_px) ** 2
    for wrong, message in (
        (unknown, f"families has no {', '.join(unknown)}; it may name {', '.join(FAMILIES)}"),
        (not set(images.families) & set(TEXTURES), f"families needs a texture: one of {', '.join(TEXTURES)}"),
        (net.image_px % net.patch_px, "image_px must be a multiple of patch_px"),
        (net.width % net.heads, "width must be a multiple of heads"),
        (not 1 <= schedule.kept_patches <= patches, f"kept_patches must lie in 1 … {patches}, the patches of a picture"),
        (
            not all(0 <= part <= schedule.steps for part in (schedule.whole_last, schedule.warmup, schedule.cooldown)),
            f"whole_last, warmup and cooldown are steps, 0 … {schedule.steps}",
        ),
    ):  # fmt: skip
        if wrong:
            raise BadRecipe(f"{path}: {message}.")
