"""Small things to test with: real transformers classes with random weights, folders of small pictures, cached features."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from mlfusion.specs.identity import DataSpec, FeatureSpec, ModelSpec
from mlfusion.store import Entry, FeatureStore, Names, Samples, streams_for

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
SQUASH = {"size": {"height": 32, "width": 32}, "resample": 2, "do_resize": True}
CROP = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 3}


def _clip() -> transformers.CLIPModel:
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 60,
        "max_position_embeddings": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=SMALL, text_config=text))


FAMILIES = {
    "vit": (lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)), "ViTImageProcessor", SQUASH),
    "deit": (lambda: transformers.DeiTModel(transformers.DeiTConfig(**SMALL)), "DeiTImageProcessor", CROP),
    "dinov2": (
        lambda: transformers.Dinov2Model(
            transformers.Dinov2Config(**{k: v for k, v in SMALL.items() if k != "intermediate_size"})
        ),
        "BitImageProcessor",
        CROP,
    ),
    "clip": (_clip, "CLIPImageProcessor", CROP),
    "clip-vision": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL)),
        "CLIPImageProcessor",
        CROP,
    ),
    "mae": (lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**SMALL)), "ViTImageProcessor", SQUASH),
}


def save_model(family: str, folder: Path, seed: int = 0) -> Path:
    """A model of that family with random weights, as a folder in the hub's format."""
    build, processor, settings = FAMILIES[family]
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():  # biases and scales start as 0 and 1, which would hide a wrong norm
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    mean = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7], "do_normalize": True, "do_rescale": True}
    body = {"image_processor_type": processor, **mean, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(body))
    return folder


def noise_images(count: int, seed: int = 1) -> list[Image.Image]:
    """Pictures of noise, a little higher than wide."""
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (50, 44, 3), np.uint8)) for _ in range(count)]


def save_images(
    root: Path,
    counts: dict[str, int],
    classes: Iterable[str] = ("blue", "green", "red"),
    *,
    size: tuple[int, int] = (40, 36),
    seed: int = 0,
) -> Path:
    """<root>/<split>/<class>/<i>.png: noise around a colour of the class; `counts` gives images a class and split."""
    random = np.random.default_rng(seed)
    for split, count in counts.items():
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            colour = np.array([200 if number % 3 == c else 60 for c in range(3)]) + 10 * (number // 3)
            for i in range(count):
                pixels = np.clip(colour + random.normal(0, 40, (*size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


def save_features(
    root: Path, split: str, tokens: np.ndarray, labels: np.ndarray, classes: tuple[str, ...] = ("a", "b", "c")
) -> Entry:
    """An entry of model 'm' on data set 'd' that holds tokens [N, T, D] as all tokens of the last of two layers."""
    images, count, width = tokens.shape
    samples = Samples(
        ids=tuple(f"{split}/{i:05d}" for i in range(images)),
        labels=labels,
        digests=np.random.default_rng(len(split)).integers(0, 256, (images, 16), np.uint8),
        classes=classes,
    )
    model = ModelSpec(
        weights="0" * 64, revision=None, config="none", preprocess="{}", name="m", family="none", depth=2, width=width
    )
    data = DataSpec(content=samples.content, split=split, images=images, classes=samples.classes, name="d")
    names = Names(model="m", model_source="m", dataset="d", dataset_source="d", reading="made")
    entry = FeatureStore(root).create(FeatureSpec(model=model, data=data, dtype="float16"), samples, names)
    [stream] = streams_for({(2, "all"): (count, width)}, images=images, dtype="float16", format="zarr")
    entry.begin([stream])
    for shard in range(stream.shards):
        rows = stream.rows(shard)
        with entry.draft(stream, shard) as draft:
            for start in range(rows.start, rows.stop, 1024):
                draft.append(tokens[start : min(start + 1024, rows.stop), None].astype(np.float32))
            assert draft.publish()
    entry.seal()
    return entry
