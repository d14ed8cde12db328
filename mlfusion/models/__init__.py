"""Finds frozen models and their files, and computes their identity. It loads neither weights nor torch modules.

A model is a catalogue name, an id on the Hugging Face hub, or a folder in the hub's format; each is resolved to a folder.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlfusion.errors import BadModel, UnknownName, boundary
from mlfusion.models import checkpoints as checkpoints
from mlfusion.models import hub as hub
from mlfusion.models.catalogue import CATALOGUE as CATALOGUE
from mlfusion.models.catalogue import EMBEDDED as EMBEDDED
from mlfusion.models.files import refuse_links, refuse_quantised, refuse_sizes
from mlfusion.models.files import sha256 as sha256
from mlfusion.models.files import weight_files as weight_files
from mlfusion.specs.identity import Compute, Hook, ModelSpec, digest
from mlfusion.specs.names import Setting
from mlfusion.system.references import find_path, missing_path, parse_model, short_name

COSMETIC = {"_name_or_path", "transformers_version", "architectures", "id2label", "label2id", "dtype", "torch_dtype"}
"""Fields of a configuration that cannot change a feature: paths, versions, class names."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's files on this machine, with its hook point and changed settings."""

    folder: Path
    name: str  # for display; hook point and changed settings follow a colon
    source: str  # hub id, or the folder's absolute path; hook point and changed settings follow a colon
    revision: str | None  # commit on the hub
    hook: Hook = "norm2"
    settings: tuple[tuple[str, Setting], ...] = ()  # changed settings of its configuration


@dataclass(frozen=True)
class Shape:
    """A model's dimensions, by its configuration."""

    depth: int  # L, the number of blocks
    width: int  # D, the channels of a token in the last block
    patch_px: int | None


def locate(reference: str) -> Checkpoint:
    """Find a model, and download it if needed: 'NAME', or 'NAME:HOOK,key=value' for a hook point and changed settings.

    Raises:
        UnknownName: neither a catalogue name, nor an id with a slash, nor a folder; or no such hook point.
        Unavailable: no network, no such repository, or a gated one.
        BadModel: a folder without config.json or weights.
    """
    ref = parse_model(reference)
    row = CATALOGUE.get(ref.name)
    if row and row.embedded:
        folder, name, source, revision = row.embedded, row.name, row.source, None
    elif (path := find_path("model", ref.name)) and path.is_dir():
        folder, name, source, revision = path, short_name(path), str(path), None
        if not any((folder / file).is_file() for file in ("config.json", "open_clip_config.json")):
            raise BadModel(
                f"{ref.name} has no config.json; allowed: a folder that save_pretrained wrote, with its weights, or a "
                "checkpoint of timm or open_clip with its configuration"
            )
    elif not row and (missing := missing_path(ref.name)):
        raise BadModel(
            f"{missing}. Allowed: a folder that is there, a name of `mlfusion ls models`, or owner/name on the hub"
        )
    elif not row and "/" not in ref.name:
        otherwise = "Or an id on the hub, such as facebook/dinov2-base, or a folder in the hub's format."
        raise UnknownName("model", ref.name, CATALOGUE, otherwise=otherwise)
    else:
        source = row.source if row else ref.name
        folder = hub.download(source, ref.name, row.revision if row else None)
        # The hub's cache keeps a snapshot in a folder named by its commit.
        name, revision = row.name if row else source.rsplit("/", 1)[-1], folder.name
    refuse_links(folder)
    return Checkpoint(folder, name + ref.suffix, source + ref.suffix, revision, ref.hook, ref.settings)


def identify(checkpoint: Checkpoint, preprocess: str, compute: Compute = "float32", view: str = "plain") -> ModelSpec:
    """Return the identity of this model's features: weights and architecture, by its files, and the other arguments.

    `preprocess` is the `key` of its preprocessing, and `view` the name of the view in that key, for display.
    """
    config, dimensions = configuration(checkpoint), shape(checkpoint)
    return ModelSpec(
        weights=sha256(weight_files(checkpoint.folder)),
        revision=checkpoint.revision,
        config=digest(_without_cosmetics(config.to_dict())),
        preprocess=preprocess,
        hook=checkpoint.hook,
        compute=compute,
        name=checkpoint.name,
        family=config.model_type,
        depth=dimensions.depth,
        width=dimensions.width,
        view=view,
    )


def shape(checkpoint: Checkpoint) -> Shape:
    """Depth (the sum over stages), width and patch size; raises BadModel if the configuration has no depth or width."""
    config = configuration(checkpoint)
    vision = getattr(config, "vision_config", config)
    depths, widths = getattr(vision, "depths", None), getattr(vision, "hidden_sizes", None)
    stages = isinstance(depths, (list, tuple)) and all(type(stage) is int for stage in depths)
    depth: Any = sum(depths or ()) if stages else getattr(vision, "num_hidden_layers", None)
    width: Any = getattr(vision, "hidden_size", None) or (widths[-1] if isinstance(widths, (list, tuple)) else None)
    if not all(type(size) is int and size > 0 for size in (depth, width)):
        raise BadModel(
            f"{checkpoint.name} ({config.model_type}) has no depth and width in its configuration (num_hidden_layers and "
            "hidden_size, or depths and hidden_sizes); allowed: vision transformers and residual networks"
        )
    # Where patches overlap, their number follows from the stride and not from their size.
    patch = getattr(vision, "patch_stride", None) or getattr(vision, "patch_size", None)
    if isinstance(patch, (list, tuple)):
        patch = patch[-1]
    return Shape(depth, width, patch if isinstance(patch, int) and patch > 0 else None)


def configuration(checkpoint: Checkpoint) -> Any:
    """A checkpoint's configuration as one of transformers, whichever library wrote it, with the changed settings.

    Raises:
        BadModel: transformers cannot read it, or it says that the weights are quantised.
        UnknownName: a setting that it does not have.
    """
    from transformers import AutoConfig

    refuse_quantised(checkpoint.folder)
    refuse_sizes(checkpoint.folder)
    with boundary(
        lambda reason: BadModel(
            f"{checkpoint.folder}/config.json cannot be read ({reason}); allowed: a model_type that transformers knows, with "
            "the fields that save_pretrained writes. Save or download the model again"
        )
    ):
        if checkpoints.layout(checkpoint.folder) == "transformers":
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        else:
            config = checkpoints.configuration(checkpoint.folder, tuple(weight_files(checkpoint.folder)))
    config._attn_implementation = None  # compiled code of other packages is ours to choose, never the folder's
    vision = getattr(config, "vision_config", config)
    for key, value in checkpoint.settings:
        if key not in (settings := vision.to_dict()):
            raise UnknownName("setting", key, settings)
        old = settings[key]
        allowed = (int, float) if type(old) is float else type(old)
        if old is not None and value is not None and not isinstance(value, allowed):
            raise BadModel(f"{key}={value} is a {type(value).__name__}; allowed: {type(old).__name__}, such as {old}")
        with boundary(partial(_no_setting, key, value, config.model_type)):
            setattr(vision, key, value)
    return config


def _no_setting(key: str, value: Setting, model_type: str, reason: str) -> BadModel:
    """The error where a configuration does not take a changed setting."""
    return BadModel(f"{key}={value} is no setting of a {model_type} ({reason})")


def _without_cosmetics(config: Any) -> Any:
    """The configuration without the fields that cannot change a feature."""
    if not isinstance(config, dict):
        return config
    return {str(name): _without_cosmetics(value) for name, value in config.items() if name not in COSMETIC}
