"""Which frozen models there are, where their files lie, and what identifies them. Loads no weights and no torch module.

A model is a catalogue name, an id on the Hugging Face hub, or a folder in the hub's format; all three end as a folder.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlfusion.errors import BadModel, UnknownName, first_line
from mlfusion.models import checkpoints, hub
from mlfusion.models.catalogue import CATALOGUE, EMBEDDED, Row
from mlfusion.specs import Compute, Hook, ModelSpec, Setting, digest, parse_model

__all__ = [
    "CATALOGUE",
    "EMBEDDED",
    "Checkpoint",
    "Row",
    "Shape",
    "checkpoints",
    "configuration",
    "hub",
    "identify",
    "locate",
    "shape",
    "weight_files",
]


@dataclass(frozen=True)
class Checkpoint:
    """A model's files on this machine, and what of it was asked for to be otherwise."""

    folder: Path
    name: str  # what people call it, with what was asked for behind a colon
    source: str  # hub id, or the folder's absolute path, likewise
    revision: str | None  # commit on the hub
    hook: Hook = "norm2"
    settings: tuple[tuple[str, Setting], ...] = ()  # of its configuration, in place of its own


@dataclass(frozen=True)
class Shape:
    """A model's dimensions by its configuration."""

    depth: int  # L, the number of blocks
    width: int  # D, channels of a token in the last of them
    patch_px: int | None


def locate(word: str) -> Checkpoint:
    """Find, and if need be download, what `word` means: 'NAME', or 'NAME:HOOK,key=value' for a hook point and settings.

    Raises:
        UnknownName: neither a catalogue name, nor an id with a slash, nor a folder; or no such hook point.
        Unavailable: no network, no such repository, or a gated one.
        BadModel: a folder without config.json or weights.
    """
    asked = parse_model(word)
    row = CATALOGUE.get(asked.name)
    if row and row.embedded:
        folder, name, source, revision = row.embedded, row.name, row.source, None
    elif not row and Path(asked.name).expanduser().is_dir():
        folder = Path(asked.name).expanduser().resolve()
        name, source, revision = folder.name, str(folder), None
        if not any((folder / name).is_file() for name in ("config.json", "open_clip_config.json")):
            raise BadModel(
                f"{asked.name} has no config.json; allowed: a folder that save_pretrained wrote, with its weights, or a "
                "checkpoint of timm or open_clip with its configuration"
            )
    elif not row and "/" not in asked.name:
        otherwise = "Or an id on the hub, such as facebook/dinov2-base, or a folder in the hub's format."
        raise UnknownName("model", asked.name, CATALOGUE, otherwise=otherwise)
    else:
        source = row.source if row else asked.name
        folder = hub.download(source, asked.name, row.revision if row else None)
        # The hub's cache keeps a snapshot in a folder named by its commit.
        name, revision = row.name if row else source.rsplit("/", 1)[-1], folder.name
    return Checkpoint(folder, name + asked.suffix, source + asked.suffix, revision, asked.hook, asked.settings)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors where there are any."""
    patterns = checkpoints.WEIGHTS[checkpoints.layout(folder)]
    for pattern in patterns:
        if files := sorted(folder.glob(pattern)):
            return files
    raise BadModel(f"{folder} holds no weights; allowed: {', '.join(patterns)}")


def identify(checkpoint: Checkpoint, preprocess: str, compute: Compute = "float32", view: str = "plain") -> ModelSpec:
    """Return the identity of this model's features: weights and architecture, from its files, and the other words as given.

    Args:
        checkpoint: the model's files.
        preprocess: the `key` of its preprocessing.
        compute: type of the forward pass.
        view: name of the view that `preprocess` says, for people.

    Raises:
        BadModel: a configuration that transformers cannot read.
    """
    config, dimensions = configuration(checkpoint), shape(checkpoint)
    return ModelSpec(
        weights=_sha256(tuple(weight_files(checkpoint.folder))),
        revision=checkpoint.revision,
        config=digest(_architecture(config)),
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
    """Depth, width and patch size, as the configuration says; a model of stages is as deep as they are together.

    Raises:
        BadModel: it says none.
    """
    config = configuration(checkpoint)
    vision = getattr(config, "vision_config", config)
    depths, widths, patch, stride = (
        getattr(vision, name, None) for name in ("depths", "hidden_sizes", "patch_size", "patch_stride")
    )
    depth = sum(depths) if isinstance(depths, (list, tuple)) else getattr(vision, "num_hidden_layers", None)
    width = getattr(vision, "hidden_size", None) or (widths[-1] if widths else None)
    if not depth or not width:
        raise BadModel(
            f"{checkpoint.name} ({config.model_type}) has no depth and width in its configuration (num_hidden_layers and "
            "hidden_size, or depths and hidden_sizes); allowed: vision transformers and residual networks"
        )
    if stride:  # patches that overlap are as many as they are apart
        patch = stride
    if isinstance(patch, (list, tuple)):
        patch = patch[-1]
    return Shape(int(depth), int(width), int(patch) if isinstance(patch, int) else None)


def configuration(checkpoint: Checkpoint) -> Any:
    """A folder's configuration in transformers' terms, whoever wrote it, with the settings that were asked for.

    Raises:
        BadModel: transformers cannot read it.
        UnknownName: a setting that it does not have.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        if checkpoints.layout(checkpoint.folder) == "transformers":
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        else:
            config = checkpoints.configuration(checkpoint.folder, tuple(weight_files(checkpoint.folder)))
    except (OSError, ValueError, KeyError) as err:
        raise BadModel(
            f"{checkpoint.folder}/config.json cannot be read ({first_line(err)}); allowed: a model_type that "
            "transformers knows"
        ) from err
    vision = getattr(config, "vision_config", config)
    for key, value in checkpoint.settings:
        if key not in (known := vision.to_dict()):
            raise UnknownName("setting", key, known)
        old = known[key]
        if (
            old is not None
            and value is not None
            and not isinstance(value, (type(old), int if type(old) is float else type(old)))
        ):
            raise BadModel(f"{key}={value} is a {type(value).__name__}; allowed: {type(old).__name__}, such as {old}")
        try:
            setattr(vision, key, value)
        except StrictDataclassError as err:
            raise BadModel(f"{key}={value} is no setting of a {config.model_type} ({first_line(err)})") from err
    return config


def _architecture(config: Any) -> dict[str, Any]:
    """The configuration without what cannot change a feature: paths, versions, class names."""
    cosmetic = {
        "_name_or_path",
        "transformers_version",
        "architectures",
        "id2label",
        "label2id",
        "dtype",
        "torch_dtype",
    }

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): clean(v) for k, v in value.items() if k not in cosmetic}
        return value

    cleaned: dict[str, Any] = clean(config.to_dict())
    return cleaned


@lru_cache(maxsize=8)
def _sha256(files: tuple[Path, ...]) -> str:
    """Of the files' bytes: a name and a date can lie, content cannot. About a second per gigabyte."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
