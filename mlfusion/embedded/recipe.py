"""The recipe of pre-training: all that determines the embedded model's weights, read strictly from a TOML file."""

import hashlib
import json
import tomllib
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlfusion.embedded.formula import FAMILIES
from mlfusion.embedded.textures import TEXTURES
from mlfusion.errors import BadRecipe


@dataclass(frozen=True, kw_only=True)
class Network:
    """A plain ViT: one CLS token, learned positions, LayerNorm before attention and MLP."""

    image_px: int
    patch_px: int
    depth: int
    width: int
    heads: int


@dataclass(frozen=True, kw_only=True)
class Images:
    """The patterns that are drawn once, before training."""

    families: tuple[str, ...]
    classes: int  # per family
    instances: int  # per class
    pattern_px: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of the training, batch size, learning rate."""

    seed: int
    steps: int
    crews: int  # parts of a batch, one thread each; the contrastive loss is within a part
    scenes: int  # per crew and step; each gives two pictures
    kept_patches: int  # patches of a picture that the network sees, until the last steps
    whole_last: int  # steps at the end that see every patch
    learning_rate: float
    weight_decay: float
    warmup: int  # steps with a rising rate
    cooldown: int  # steps with a falling rate, at the end; until then a longer run's weights are the same
    checkpoint_every: int  # steps between checkpoints


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weight of each objective in the loss."""

    formula: float
    fill: float
    contrast: float
    layout: float
    grain: float
    temperature: float  # of the contrastive loss


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that determines the weights."""

    network: Network
    images: Images
    schedule: Schedule
    weights: Weights

    @property
    def digest(self) -> str:
        """Twelve hex digits naming this recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; raises BadRecipe unless every field is there and right, and nothing else is."""
    try:
        body = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as err:
        raise BadRecipe(
            f"cannot read the recipe {path}: {err.strerror}; the one that ships: mlfusion pretrain pipelines/formula-vit.toml"
        ) from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise BadRecipe(f"{path} is not TOML: {err}") from err
    sections = {f.name: f.type for f in fields(Recipe)}
    check_keys(path, "sections", body, sections)
    recipe = Recipe(**{name: parse_section(path, name, kind, body[name]) for name, kind in sections.items()})
    check_values(path, recipe)
    return recipe


def check_keys(path: Path, what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse unknown and missing keys."""
    found = {"unknown": sorted(set(given) - set(allowed)), "missing": sorted(set(allowed) - set(given))}
    if wrong := [f"{word}: {', '.join(names)}" for word, names in found.items() if names]:
        raise BadRecipe(
            f"{path}: {what} {'; '.join(wrong)}. Exactly these are allowed and needed: {', '.join(sorted(allowed))}."
        )


def parse_section(path: Path, name: str, kind: Any, body: Any) -> Any:
    """One table of the recipe → its dataclass, types checked."""
    if not isinstance(body, dict):
        raise BadRecipe(f"{path}: {name} must be a table; write [{name}] above its keys.")
    types = typing.get_type_hints(kind)
    check_keys(path, f"keys of [{name}]", body, types)
    values = {}
    for key, wanted in types.items():
        value = body[key]
        if wanted is float and type(value) is int:
            value = float(value)
        if wanted == tuple[str, ...] and isinstance(value, list) and all(isinstance(v, str) for v in value):
            value = tuple(value)
        elif type(value) is not wanted:
            expected = {int: "a whole number", float: "a number"}.get(wanted, "a list of names")
            raise BadRecipe(f"{path}: {key} in [{name}] is {body[key]!r}; it must be {expected}.")
        values[key] = value
    return kind(**values)


def check_values(path: Path, recipe: Recipe) -> None:
    """Refuse values that the types allow and training does not."""
    net, images, plan = recipe.network, recipe.images, recipe.schedule
    strange = sorted(set(images.families) - set(FAMILIES))
    patches = (net.image_px // max(net.patch_px, 1)) ** 2
    for wrong, message in (
        (strange, f"families has no {', '.join(strange)}; it may name {', '.join(FAMILIES)}"),
        (not set(images.families) & set(TEXTURES), f"families needs a texture: one of {', '.join(TEXTURES)}"),
        (net.patch_px < 1 or net.image_px % net.patch_px, "image_px must be a multiple of patch_px"),
        (net.heads < 1 or net.width % net.heads, "width must be a multiple of heads"),
        (
            min(net.depth, images.classes, images.instances, plan.steps, plan.crews, plan.checkpoint_every) < 1,
            "depth, classes, instances, steps, crews and checkpoint_every start at 1",
        ),
        (plan.scenes < 2, "scenes must be at least 2: contrast needs another scene"),
        (not 1 <= plan.kept_patches <= patches, f"kept_patches must lie in 1 … {patches}, the patches of a picture"),
        (
            not all(0 <= part <= plan.steps for part in (plan.whole_last, plan.warmup, plan.cooldown)),
            f"whole_last, warmup and cooldown are steps, 0 … {plan.steps}",
        ),
    ):  # fmt: skip
        if wrong:
            raise BadRecipe(f"{path}: {message}.")
