"""Which frozen models there are, where their files lie, and what identifies them. Loads no weights and no torch module.

A model is a catalogue name, an id on the Hugging Face hub, or a folder in the hub's format; all three end as a folder.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlfusion.errors import BadModel, Unavailable, UnknownName
from mlfusion.specs import Compute, ModelSpec, digest


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the catalogue."""

    name: str
    source: str  # hub id, or "embedded:<folder>" for what ships with the package
    family: str
    depth: int  # transformer blocks, L
    width: int  # channels per token, D
    image_px: int
    patch_px: int
    about: str


def _row(name: str, source: str, family: str, depth: int, width: int, patch_px: int, about: str) -> Row:
    return Row(
        name=name, source=source, family=family, depth=depth, width=width, image_px=224, patch_px=patch_px, about=about
    )


EMBEDDED = "formula-vit"

CATALOGUE: dict[str, Row] = {
    row.name: row
    for row in [
        Row(
            name=EMBEDDED,
            source="embedded:formula-vit",
            family="ViT",
            depth=8,
            width=128,
            image_px=48,
            patch_px=8,
            about="ships with mlfusion; pre-trained on images made by formula",
        ),
        # The study's eleven. Its ViT-B is the augreg2 checkpoint of timm; the hub's `google/` ones are augreg.
        _row("clip-vit-b32", "openai/clip-vit-base-patch32", "CLIP", 12, 768, 32, "study"),
        _row("clip-vit-b16", "openai/clip-vit-base-patch16", "CLIP", 12, 768, 16, "study"),
        _row("clip-vit-l14", "openai/clip-vit-large-patch14", "CLIP", 24, 1024, 14, "study"),
        _row("dinov2-vit-s14", "facebook/dinov2-small", "DINOv2", 12, 384, 14, "study"),
        _row("dinov2-vit-b14", "facebook/dinov2-base", "DINOv2", 12, 768, 14, "study"),
        _row("dinov2-vit-l14", "facebook/dinov2-large", "DINOv2", 24, 1024, 14, "study"),
        _row("vit-s16", "WinKawaks/vit-small-patch16-224", "ViT", 12, 384, 16, "study; supervised"),
        _row("vit-b16", "google/vit-base-patch16-224", "ViT", 12, 768, 16, "study; supervised"),
        _row("vit-l16", "google/vit-large-patch16-224", "ViT", 24, 1024, 16, "study; supervised"),
        _row("mae-vit-b16", "facebook/vit-mae-base", "MAE", 12, 768, 16, "study; masked autoencoder"),
        _row("mae-vit-l16", "facebook/vit-mae-large", "MAE", 24, 1024, 16, "study; masked autoencoder"),
        _row(
            "deit-ti16", "facebook/deit-tiny-patch16-224", "ViT", 12, 192, 16, "DeiT-Ti, supervised, 5.7 M parameters"
        ),
        _row("deit-s16", "facebook/deit-small-patch16-224", "ViT", 12, 384, 16, "DeiT-S, supervised, 22 M parameters"),
    ]
}


@dataclass(frozen=True)
class Checkpoint:
    """A model's files on this machine."""

    folder: Path
    name: str  # what people call it
    source: str  # hub id, or the folder's absolute path
    revision: str | None  # commit on the hub


def locate(word: str) -> Checkpoint:
    """Find, and if need be download, what `word` means.

    Raises:
        UnknownName: neither a catalogue name, nor an id with a slash, nor a folder.
        Unavailable: no network, no such repository, or a gated one.
        BadModel: a folder without config.json or weights.
    """
    row = CATALOGUE.get(word)
    if row and row.source.startswith("embedded:"):
        folder = Path(__file__).parent / "embedded" / row.source.removeprefix("embedded:")
        return Checkpoint(folder, row.name, row.source, None)
    if not row and Path(word).expanduser().is_dir():
        folder = Path(word).expanduser().resolve()
        if not (folder / "config.json").is_file():
            raise BadModel(f"{word} has no config.json; allowed: a folder that save_pretrained wrote, with its weights")
        return Checkpoint(folder, folder.name, str(folder), None)
    if not row and "/" not in word:
        otherwise = "Or an id on the hub, such as facebook/dinov2-base, or a folder in the hub's format."
        raise UnknownName("model", word, CATALOGUE, otherwise=otherwise)
    source = row.source if row else word
    folder = _download(source, word)
    # The hub's cache keeps a snapshot in a folder named by its commit.
    return Checkpoint(folder, row.name if row else source.rsplit("/", 1)[-1], source, folder.name)


def _download(hub_id: str, word: str) -> Path:
    """A snapshot of the configuration and the weights, safetensors if the repository has them."""
    from huggingface_hub import errors, snapshot_download

    wanted = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*wanted, "pytorch_model*.bin*"]))
        return folder
    except errors.GatedRepoError as err:
        raise Unavailable(
            f"{hub_id} is gated: ask for access at https://huggingface.co/{hub_id}, then run `hf auth login`"
        ) from err
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as err:
        raise Unavailable(
            f"the hub has no model {hub_id!r} that you may read; look at `mlfusion ls models`, or log in with "
            "`hf auth login`"
        ) from err
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError, TimeoutError, OSError) as err:
        raise Unavailable(
            f"{word} is not on this machine and the hub cannot be reached ({type(err).__name__}); connect, or give a "
            f"folder with --model, or try the embedded model: --model {EMBEDDED}"
        ) from err


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors where there are any."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise BadModel(f"{folder} holds no weights; allowed: *.safetensors (or pytorch_model*.bin)")


def identify(checkpoint: Checkpoint, preprocess: str, compute: Compute = "float32") -> ModelSpec:
    """What decides this model's numbers: weights and architecture, from its files, and the other two words as they are.

    Raises:
        BadModel: a configuration that transformers cannot read.
    """
    config = configuration(checkpoint.folder)
    vision = getattr(config, "vision_config", config)
    try:
        depth, width = int(vision.num_hidden_layers), int(vision.hidden_size)
    except AttributeError as err:
        raise BadModel(
            f"{checkpoint.name} ({config.model_type}) has no num_hidden_layers and hidden_size; allowed: vision "
            "transformers such as ViT, DeiT, CLIP, DINOv2, MAE"
        ) from err
    return ModelSpec(
        weights=_sha256(tuple(weight_files(checkpoint.folder))),
        revision=checkpoint.revision,
        config=digest(_architecture(config)),
        preprocess=preprocess,
        compute=compute,
        name=checkpoint.name,
        family=config.model_type,
        depth=depth,
        width=width,
    )


def configuration(folder: Path) -> Any:
    """The transformers configuration in a folder."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as err:
        raise BadModel(
            f"{folder}/config.json cannot be read ({first_line(err)}); allowed: a model_type that transformers knows"
        ) from err


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


def first_line(err: BaseException) -> str:
    """What a library said, short enough to quote."""
    return str(err).strip().splitlines()[0][:200] if str(err).strip() else type(err).__name__
