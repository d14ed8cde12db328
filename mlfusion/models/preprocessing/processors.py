"""Reads a model's preprocessing from its own files, whichever library wrote them, or from the study's recipe."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlfusion.errors import BadModel, boundary
from mlfusion.models import open_clip
from mlfusion.models.checkpoints import read_json
from mlfusion.models.preprocessing.steps import FILTERS, Steps, canonical, edges, refuse_size, resize_mark
from mlfusion.specs.identity import AS_STORED, Decoding


def _both(edge: int) -> dict[str, int]:
    return {"height": edge, "width": edge}


_CLIP: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "square": False,
    "crop_size": 224,
    "do_center_crop": True,
    "resample": 3,
    "of": "clip",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    # Defaults of transformers' processors for settings that their configuration omits. `square`: whether a size of one
    # number means height and width, unless `default_to_square` says so; else it is the shortest edge. `of`: the colours.
    "CLIP": _CLIP,
    "Bit": _CLIP,
    "ViT": {"size": _both(224), "square": True, "resample": 2, "of": "half"},
    "DeiT": {"size": _both(256), "square": True, "crop_size": 224, "do_center_crop": True, "resample": 3, "of": "half"},
    "Beit": {"size": _both(224), "square": True, "crop_size": 224, "resample": 3, "of": "half"},
    "Siglip": {"size": _both(224), "square": False, "resample": 3, "of": "half"},
    "ConvNext": {"size": {"shortest_edge": 384}, "square": False, "resample": 3, "of": "half", "crop_pct": 224 / 256},
    "DINOv3ViT": {"size": _both(224), "square": True, "resample": 2, "of": "imagenet", "kernel": "torch-float32"},
    "Siglip2": {"square": True, "resample": 2, "of": "half"},
    "VJEPA2": {"crop_size": 256, "square": False, "do_center_crop": True, "resample": 2, "of": "imagenet"},
}
ALLOWED = "allowed: settings that an image processor of transformers, timm or open_clip can follow. Mend that file"
COLOURS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # mean and standard deviation
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class TransformersProcessor:
    """A processor of transformers whose steps are not `Steps`: it is called unchanged, and returns finished floats."""

    dtype, decodes_jpeg, view = torch.float32, False, "plain"

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        settings = processor.to_dict()
        for name in ("size", "crop_size", "pad_size"):
            for side in ("height", "width", "shortest_edge"):
                given = settings.get(name)
                if isinstance(given, Mapping) and isinstance(edge := given.get(side), int):
                    refuse_size(name, edge)  # before a picture of that size is made
        noise = np.random.default_rng(0).integers(0, 256, (256, 300, 3), np.uint8)
        with (
            boundary(
                lambda reason: BadModel(
                    f"{type(processor).__name__} cannot prepare a picture by the settings it was given ({reason}); "
                    "allowed: a preprocessor_config.json whose sizes fit together"
                )
            ),
            np.errstate(divide="raise", invalid="raise", over="raise"),  # such as a standard deviation of 0
        ):
            shapes = {self.picture(Image.fromarray(pixels)).shape[1:] for pixels in (noise, noise.swapaxes(0, 1))}
        if len(shapes) > 1:
            raise BadModel(
                f"pictures of every shape would come out of {type(processor).__name__} by the settings it was given; allowed: "
                "a processor with a crop_size, or a size with height and width"
            )
        self.pixels: tuple[int, int] = shapes.pop()

    def picture(self, image: Image.Image, name: str = "") -> np.ndarray:
        """One image → [3, height, width] float32."""
        pixels = self._processor(images=[image.convert("RGB")], return_tensors="np")["pixel_values"]
        return np.asarray(pixels, np.float32)[0]

    def from_jpeg(self, data: bytes, name: str = "", max_pixels: int = 2**63) -> np.ndarray | None:
        """Return None: there is no fast path."""
        return None

    def finish(self, pictures: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the pictures unchanged: the processor has rescaled and normalised them."""
        return pictures

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Images → the model's input, [images, 3, height, width] float32."""
        return self.finish(torch.from_numpy(np.stack([self.picture(image) for image in images])))

    def key(self, decoding: Decoding = AS_STORED) -> str:
        """Canonical JSON of the processor's settings; `decoding` as in `Steps.key`."""
        cosmetic = {"transformers_version", "processor_class", "_processor_class"}
        settings = self._processor.to_dict().items()
        kept = {name: value for name, value in settings if name not in cosmetic and value is not None}
        return canonical(kept | resize_mark(), decoding)


Preprocessing = Steps | TransformersProcessor


def read(
    folder: Path, variant: str = "exact", *, size: int | None = None, view: str = "plain", seed: int = 0
) -> Preprocessing:
    """Return a model's preprocessing, by its own files or by the study's recipe for its family.

    Args:
        folder: the folder with the model's files.
        variant, view: names, see `specs.options.PREPARATIONS` and `--views`.
        size: height and width of the model's input in pixels, if not its own; the centre crop keeps its share of the image.
        seed: decides where random crops lie.

    Raises:
        BadModel: neither this code nor transformers can read the folder, or the study has no recipe for the model's family.
    """
    config = read_json(folder / "config.json")
    with boundary(
        lambda reason: BadModel(f"the preprocessing settings of {folder} cannot be used ({reason}); {ALLOWED}")
    ):
        steps = _from_study(folder, config) if variant.startswith("paper") else _from_files(folder, config)
    if isinstance(steps, TransformersProcessor):
        if variant != "exact" or size is not None or view != "plain":
            raise BadModel(
                f"the processor of {folder.name} has rules of its own; allowed with it: --preprocess exact, no --size and "
                "no views"
            )
        return steps
    if size is not None:
        steps = _with_size(steps, size)
    if variant.endswith("fast") and steps.resample in ("bilinear", "bicubic"):  # the filters that torch has for bytes
        steps = dataclasses.replace(steps, kernel="torch-uint8")
    return dataclasses.replace(steps, view=view, seed=seed)


def _with_size(steps: Steps, size: int) -> Steps:
    """The same steps for a square input of another size."""
    if size < 1:
        raise BadModel(f"--size {size}: allowed are 1 and more")
    resize, crop = steps.size, steps.crop_size
    if isinstance(resize, int):
        assert crop is not None
        resize = round(resize * size / min(crop))
    elif resize is not None:
        resize = (round(resize[0] * size / crop[0]), round(resize[1] * size / crop[1])) if crop else (size, size)
    return dataclasses.replace(steps, size=resize, crop_size=crop and (size, size))


def _from_files(folder: Path, config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing that the model's own files describe."""
    settings = _settings(folder)
    if (timm := config.get("pretrained_cfg")) and not settings:
        return _from_timm(timm)
    if clip := read_json(folder / "open_clip_config.json").get("preprocess_cfg"):
        return _from_open_clip(clip, read_json(folder / "open_clip_config.json"))
    names = ("image_processor_type", "feature_extractor_type", "video_processor_type")
    name = next((str(settings[key]) for key in names if settings.get(key)), "")
    if not _are_steps(_family(name), settings):
        processor = _processor(folder)
        settings, name = processor.to_dict(), type(processor).__name__
        if not _are_steps(_family(name), settings):
            return TransformersProcessor(processor)
    return _from_transformers(_family(name), settings)


def _are_steps(family: str, settings: Mapping[str, Any]) -> bool:
    """Whether a processor of transformers with these settings does nothing but `Steps`."""
    size = settings.get("size")
    is_limited = isinstance(size, Mapping) and size.get("shortest_edge") and size.get("longest_edge")
    crops_twice = family == "ConvNext" and settings.get("do_center_crop")
    return family in DEFAULTS and not (settings.get("do_pad") or is_limited or crops_twice)


def _settings(folder: Path) -> dict[str, Any]:
    """A processor's settings, from the first file that has them, in the order of transformers: its release 5 nests them."""
    nested = read_json(folder / "processor_config.json")
    image, video = (
        settings if isinstance(settings := nested.get(f"{kind}_processor"), dict) else read_json(folder / file)
        for kind, file in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json"))
    )
    return image or video


def _family(name: str) -> str:
    """'CLIPImageProcessorFast' and 'CLIPFeatureExtractor' → 'CLIP'."""
    for suffix in ("Pil", "Fast", "ImageProcessor", "FeatureExtractor", "VideoProcessor"):
        name = name.removesuffix(suffix)
    return name


def _from_transformers(family: str, settings: Mapping[str, Any]) -> Steps:
    """The steps of a processor of transformers with this configuration, which may have an older form."""
    defaults = DEFAULTS[family]
    settings = {**defaults, **{name: value for name, value in settings.items() if value is not None}}
    size, crop = _size_and_crop(family, settings)
    mean, std = COLOURS[defaults["of"]]
    normalizes = settings.get("do_normalize", True)
    try:
        resample = {number: name for name, number in FILTERS.items()}[int(settings["resample"])]
    except (KeyError, ValueError) as err:
        raise BadModel(f"resample {settings['resample']!r}: allowed are PIL's numbers 0 to 5") from err
    return Steps(
        size=size,
        crop_size=crop,
        resample=resample,
        kernel=defaults.get("kernel", "pil"),
        rescale_factor=_number(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else None,
        image_mean=_per_channel(settings.get("image_mean", mean)) if normalizes else None,
        image_std=_per_channel(settings.get("image_std", std)) if normalizes else None,
    )


def _size_and_crop(
    family: str, settings: Mapping[str, Any]
) -> tuple[tuple[int, int] | int | None, tuple[int, int] | None]:
    """The resize and the centre crop of a processor of transformers; None if it does not resize, or does not crop."""
    crop = _square(settings["crop_size"]) if settings.get("do_center_crop") or "crop_size" in settings else None
    if not settings.get("do_center_crop"):
        crop = None
    if not settings.get("do_resize", True):
        return None, crop
    if family == "Siglip2":
        # NaFlex takes images of any shape with a limited number of patches; the cache needs one shape: a square.
        side = settings.get("patch_size", 16) * math.isqrt(settings.get("max_num_patches", 256))
        return (side, side), crop
    if family == "VJEPA2":  # the processor computes its size from the crop
        return int(_square(settings["crop_size"])[0] * 256 / 224), crop
    is_number = isinstance(settings["size"], (int, float))
    is_square = settings.get("default_to_square", DEFAULTS[family]["square"])
    size = _square(settings["size"]) if is_number and is_square else edges(settings["size"])
    if family == "ConvNext":
        if not isinstance(size, int):
            raise BadModel(f"size {settings['size']} of a ConvNext processor: allowed is shortest_edge")
        # Below 384 pixels images are resized with a margin and cropped; larger sizes squash the image.
        return (int(size / settings["crop_pct"]), (size, size)) if size < 384 else ((size, size), crop)
    return size, crop


def _square(value: Any) -> tuple[int, int]:
    """(height, width); one number stands for both."""
    return size if isinstance(size := edges(value), tuple) else (size, size)


def _number(value: Any) -> float:
    if isinstance(value, (bool, str)):
        raise BadModel(f"rescale_factor {value!r}: allowed are numbers")
    return float(value)


def _per_channel(value: Any) -> tuple[float, ...]:
    if isinstance(value, str):
        raise BadModel(f"{value!r} for colours: allowed are three numbers, or one for all")
    return tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),) * 3


def _from_timm(settings: Mapping[str, Any]) -> Steps:
    """timm's evaluation transform (timm/data/transforms_factory.py): resize by crop_pct, crop about the centre."""
    _, height, width = settings["input_size"]
    mode, share = settings.get("crop_mode", "center"), float(settings.get("crop_pct", 0.875))
    if mode not in ("center", "squash"):
        raise BadModel(f"timm's crop_mode {mode!r}: allowed are center, squash")
    if height != width and mode == "center":
        raise BadModel(
            f"timm's input_size {height} x {width} with crop_mode center: allowed are equal sides, or squash"
        )
    scaled = math.floor(height / share), math.floor(width / share)
    return _torchvision(scaled if mode == "squash" else scaled[0], (height, width), settings, "bilinear", "imagenet")


def _from_open_clip(settings: Mapping[str, Any], config: Mapping[str, Any]) -> Steps:
    """open_clip's evaluation transform (open_clip/transform.py): shortest edge and crop, or squash."""
    open_clip.PREPROCESSING.check(settings)
    image_size = config["model_cfg"]["vision_cfg"].get("image_size", 224)
    size = _square(image_size)
    if settings.get("size") and _square(settings["size"]) != size:
        raise BadModel(
            f"open_clip's preprocess_cfg has size {settings['size']}, and vision_cfg an image_size of {image_size}; allowed: "
            "the same size in both"
        )
    if size[0] != size[1]:
        raise BadModel(f"open_clip's image_size {image_size}: allowed are images as high as they are wide")
    if settings.get("interpolation") not in (None, "bicubic", "bilinear", "random"):
        raise BadModel(
            f"open_clip's interpolation {settings['interpolation']!r}: allowed are bicubic, bilinear, random"
        )
    if settings.get("interpolation") == "random":  # in training; evaluation takes its default
        settings = {**settings, "interpolation": "bicubic"}
    mode = settings.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise BadModel(f"open_clip's resize_mode {mode!r}: allowed are shortest, squash")
    return _torchvision(size if mode == "squash" else size[0], size, settings, "bicubic", "clip")


def _torchvision(
    size: tuple[int, int] | int, crop: tuple[int, int], settings: Mapping[str, Any], resample: str, colours: str
) -> Steps:
    """A resize and a crop with torchvision's rounding; `resample` and `colours` are the defaults of the settings."""
    mean, std = COLOURS[colours]
    resample = str(settings.get("interpolation", resample))
    if resample not in FILTERS:
        raise BadModel(f"interpolation {resample!r}: allowed are {', '.join(FILTERS)}")
    return Steps(
        size=size,
        crop_size=crop,
        crop_rounding="half-even",
        resample=resample,
        image_mean=_per_channel(settings.get("mean", mean)),
        image_std=_per_channel(settings.get("std", std)),
    )


STUDY_STEPS: dict[str, tuple[int, str, str]] = {  # model_type → shortest edge, filter, colours
    "clip": (224, "bicubic", "clip"),
    "clip_vision_model": (224, "bicubic", "clip"),
    "vit": (248, "bicubic", "half"),
    "dinov2": (256, "bilinear", "imagenet"),
    "vit_mae": (256, "bilinear", "imagenet"),
}
"""The transforms of the study's code (arXiv 2601.09322, commit ef86a87): those of open_clip, timm and thingsvision."""


def _from_study(folder: Path, config: Mapping[str, Any]) -> Steps:
    is_timm = str(config.get("architecture")).startswith("vit_")  # the study's supervised ViTs
    family = "vit" if is_timm else str(config.get("model_type"))
    if family not in STUDY_STEPS:
        raise BadModel(
            f"the study has no model of the family {family} of {folder.name}; allowed with --preprocess paper: "
            f"{', '.join(STUDY_STEPS)}. Leave it away for the model's own preprocessing"
        )
    edge, resample, colours = STUDY_STEPS[family]
    return _torchvision(edge, (224, 224), {}, resample, colours)


def _processor(folder: Path) -> Any:
    """The model's own image processor, in its PIL form: exact, and without torchvision."""
    from transformers import AutoImageProcessor

    with boundary(
        lambda reason: BadModel(
            f"{folder.name}: no image processor can be made ({reason}); allowed: a preprocessor_config.json of one of "
            f"{', '.join(DEFAULTS)}, or of another processor that has a PIL form in transformers"
        )
    ):
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
