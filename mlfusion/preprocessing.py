"""What happens to a picture before the model sees it: the model's own steps, read from its files, and part of the key.

The reference is the model's image processor in transformers, in its PIL form: ours gives the same numbers to the bit, needs
neither torchvision nor a processor's class, and splits the work where it is cheap to split. `picture` is what a worker does
for one image and ends in bytes, a quarter of the floats' memory; `finish` turns a batch of them into the numbers that the
model takes, on the model's device. A processor with rules of its own (`Borrowed`) is called as it is.

The fast path decodes JPEG by libjpeg-turbo directly, large ones at a reduced scale, and resizes bytes by torch. Its pictures
differ from the exact ones, mostly by nothing and else by one level; docs/measurements/speed.md has what that does to features.
"""

import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlfusion.errors import BadModel, UnknownName

Word = Literal["exact", "fast", "paper", "paper+fast"]
WORDS: tuple[Word, ...] = get_args(Word)
"""`exact`: the model's own processor, to the bit. `paper`: as the study prepared images for models of this family. `fast`:
either by the faster kernel."""

Kernel = Literal["pil", "torch-uint8", "torch-float32"]
"""What resizes: PIL on bytes, torch on bytes (the fast path), or torch on floats (what torchvision's processors do)."""

SPARE = 2
"""The fast path decodes a JPEG at 1/2, 1/4 or 1/8 only where that leaves so many times the pixels that are wanted, each way."""

VIEWS = ("plain", "flip", "crop1, crop2, …")

Rounding = Literal["floor", "half-even"]
"""Of a crop's offset where the margin is odd: transformers' way, or torchvision's."""

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # PIL's numbers
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

KNOWN: dict[str, dict[str, Any]] = {
    # What transformers' processors do where their configuration says nothing; `square` is how they take a size that is
    # one number.
    "CLIP": {"size": 224, "square": False, "crop_size": 224, "do_center_crop": True, "resample": 3, "of": "clip"},
    "Bit": {"size": 224, "square": False, "crop_size": 224, "do_center_crop": True, "resample": 3, "of": "clip"},
    "ViT": {"size": 224, "square": True, "resample": 2, "of": "half"},
    "DeiT": {"size": 256, "square": True, "crop_size": 224, "do_center_crop": True, "resample": 3, "of": "half"},
    "Beit": {"size": 224, "square": True, "crop_size": 224, "resample": 3, "of": "half"},
    "Siglip": {"size": {"height": 224, "width": 224}, "square": False, "resample": 3, "of": "half"},
    "ConvNext": {"size": 384, "square": False, "resample": 3, "of": "half", "crop_pct": 224 / 256},
    "DINOv3ViT": {"size": 224, "square": True, "resample": 2, "of": "imagenet", "kernel": "torch-float32"},
    "Siglip2": {"square": True, "resample": 2, "of": "half"},
    "VJEPA2": {"crop_size": 256, "square": False, "do_center_crop": True, "resample": 2, "of": "imagenet"},
}
COLOURS = {"clip": (CLIP_MEAN, CLIP_STD), "half": (HALF, HALF), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Resize, crop, rescale, normalise: everything between a picture in RGB and the model's input."""

    size: tuple[int, int] | int | None  # (height, width), or the shortest edge
    crop_size: tuple[int, int] | None  # about the centre; what is too small is padded with black
    crop_rounding: Rounding = "floor"
    resample: str = "bicubic"
    kernel: Kernel = "pil"
    rescale_factor: float | None = 1 / 255
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    view: str = "plain"  # or 'flip', 'crop1', …: the same picture seen otherwise
    seed: int = 0  # of the views' crops

    def __post_init__(self) -> None:
        if self.crop_size is None and not isinstance(self.size, tuple):
            raise BadModel(
                f"pictures of every shape would come out of a resize to {self.size} without a crop; allowed: a processor "
                "with a crop_size, or a size with height and width"
            )

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of what the model is given."""
        assert isinstance(self.size, tuple) or self.crop_size
        return self.crop_size or self.size  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Of a picture before it is finished."""
        return torch.float32 if self.kernel == "torch-float32" else torch.uint8

    @property
    def quick(self) -> bool:
        """Whether JPEG files go by `of_jpeg`."""
        return self.kernel == "torch-uint8"

    def picture(self, image: Image.Image, name: str = "") -> np.ndarray:
        """[3, height, width] of `dtype`: resized and cropped; bytes are still those of the file, floats are rescaled.

        `name` is the sample's id, which decides what a view shows.
        """
        image = image if image.mode == "RGB" else image.convert("RGB")
        box, mirrored = self._look(image.height, image.width, name)
        if box:
            image = image.crop((box[1], box[0], box[1] + box[3], box[0] + box[2]))
        height, width = self.pixels if box else self._resized(image.height, image.width)
        if self.kernel == "pil":
            resized = np.asarray(image.resize((width, height), FILTERS[self.resample])).transpose(2, 0, 1)
        else:
            resized = self._by_torch(np.array(image), height, width)
        return self._framed(resized, mirrored)

    def of_jpeg(self, data: bytes, name: str = "", most: int = 2**63) -> np.ndarray | None:
        """The same from a JPEG's bytes, by the fast path; None: no JPEG that it can take, or one of more than `most` pixels.

        What is damaged, or has other colours than grey and YCbCr, is for PIL to judge.
        """
        if data[:2] != b"\xff\xd8" or (shape := _jpeg_shape(data)) is None or shape[0] * shape[1] > most:
            return None
        height, width = shape
        box, mirrored = self._look(height, width, name)
        within = box[2:] if box else shape
        goal = self.pixels if box else self._resized(*shape)
        share = next(
            (n for n in (8, 4, 2) if all(had >= n * SPARE * want for had, want in zip(within, goal, strict=True))), 1
        )
        pixels = _decode_jpeg(data, height, width, share)
        if pixels is None:
            return None
        if box:
            top, left, high, wide = (round(n / share) for n in box)
            pixels = np.ascontiguousarray(pixels[top : top + high, left : left + wide])
        return self._framed(self._by_torch(pixels, *goal), mirrored)

    def _by_torch(self, pixels: np.ndarray, height: int, width: int) -> np.ndarray:
        """[h, w, 3] bytes → [3, height, width], smoothed where it shrinks, as PIL does."""
        whole = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        if self.kernel == "torch-float32":
            whole = whole.float() * (self.rescale_factor or 1)
        return torch.nn.functional.interpolate(whole, (height, width), mode=self.resample, antialias=True)[0].numpy()

    def _framed(self, pixels: np.ndarray, mirrored: bool) -> np.ndarray:
        if self.crop_size and pixels.shape[1:] != self.crop_size:
            pixels = _cropped(pixels, self.crop_size, self.crop_rounding)
        return pixels[:, :, ::-1] if mirrored else pixels

    def _look(self, height: int, width: int, name: str) -> tuple[tuple[int, int, int, int] | None, bool]:
        """What this view shows of an image: (top, left, height, width), None for all of it; and whether it is mirrored.

        Crops are those of `RandomResizedCrop`: a share of the area, of a shape about as high as wide, anywhere. They follow
        from the seed, the view and the sample's id alone.
        """
        if not self.view.startswith("crop"):
            return None, self.view == "flip"
        dice = hashlib.sha256(f"{self.seed}:{self.view}:{name}".encode()).digest()
        area, shape, x, y = (int.from_bytes(dice[8 * n : 8 * n + 8], "big") / 2**64 for n in range(4))
        ratio = math.exp((2 * shape - 1) * math.log(4 / 3))
        square = height * width * (0.25 + 0.75 * area)
        wide = min(width, max(1, round(math.sqrt(square * ratio))))
        high = min(height, max(1, round(math.sqrt(square / ratio))))
        box = int(y * (height - high + 1)), int(x * (width - wide + 1)), high, wide
        return box, bool(hashlib.sha256(dice).digest()[0] & 1)

    def finish(self, pictures: Tensor, out: Tensor | None = None) -> Tensor:
        """[images, 3, height, width] of `dtype` → the same in float32, as the model is given it, on the same device.

        `out`: a tensor of that shape to write into; memory that is used again is faster than new.
        """
        taken = torch.empty(pictures.shape, device=pictures.device) if out is None else out[: len(pictures)]
        taken.copy_(pictures)
        factor = self.rescale_factor
        if factor is not None and pictures.dtype == torch.uint8:
            if self._divides:
                taken.div_(1 / factor)
            else:
                taken.copy_(taken.double().mul_(factor))
        if self.image_mean is not None and self.image_std is not None:
            mean, std = (
                torch.tensor(each, device=taken.device)[:, None, None] for each in (self.image_mean, self.image_std)
            )
            taken.sub_(mean).div_(std)
        return taken

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures as the model is given them: [images, 3, height, width] float32."""
        return self.finish(torch.from_numpy(np.stack([self.picture(image) for image in images])))

    @cached_property
    def _divides(self) -> bool:
        """Whether a division in float32 gives what transformers' product in float64 is rounded to, of every byte."""
        assert self.rescale_factor is not None
        byte = torch.arange(256)
        return torch.equal(byte.float() / (1 / self.rescale_factor), (byte.double() * self.rescale_factor).float())

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        short, long = sorted((height, width))
        longer = int(self.size * long / short)
        return (longer, self.size) if width <= height else (self.size, longer)

    def key(self) -> str:
        """Canonical JSON, in transformers' words where it has them: what a ModelSpec is told by."""
        body = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if not self.view.startswith("crop"):
            del body["seed"]
        if self.view == "plain":
            del body["view"]
        if self.quick:
            body["spare"] = SPARE
        if isinstance(self.size, tuple):
            body["size"] = {"height": self.size[0], "width": self.size[1]}
        elif self.size is not None:
            body["size"] = {"shortest_edge": self.size}
        if self.crop_size:
            body["crop_size"] = {"height": self.crop_size[0], "width": self.crop_size[1]}
        return json.dumps(body, sort_keys=True)


def _cropped(pixels: np.ndarray, size: tuple[int, int], rounding: Rounding) -> np.ndarray:
    """The middle of [3, height, width]."""
    offsets, pads = [], []
    for have, want in zip(pixels.shape[1:], size, strict=True):
        margin, lack = max(have - want, 0), max(want - have, 0)
        offsets.append(margin // 2 if rounding == "floor" else round(margin / 2))
        before = -(-lack // 2) if rounding == "floor" else lack // 2
        pads.append((before, lack - before))
    if any(map(any, pads)):
        pixels = np.pad(pixels, ((0, 0), *pads))
    top, left = offsets
    return pixels[:, top : top + size[0], left : left + size[1]]


def _jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """Height and width, from the header of a JPEG in grey or YCbCr."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return (image.height, image.width) if image.mode in ("L", "RGB") else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _decode_jpeg(data: bytes, height: int, width: int, share: int) -> np.ndarray | None:
    """[height / share, width / share, 3] bytes, rounded up; None where PIL should look at the file.

    By simplejpeg (libjpeg-turbo without PIL's copies) where it is installed, else by PIL: the same bytes.
    """
    try:
        import simplejpeg
    except ImportError:
        simplejpeg = None
    try:
        if simplejpeg is not None:
            # The smallest of the scales n/8 that gives at least so many pixels: 8/share of them.
            least = {"min_height": -(-height // share), "min_width": -(-width // share)} if share > 1 else {}
            return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, **least)
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if share > 1:
                image.draft("RGB", (-(-width // share), -(-height // share)))
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):
        return None


class Borrowed:
    """A processor of transformers whose rules are its own, called as it is; its pictures are finished floats."""

    dtype, quick, view = torch.float32, False, "plain"

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        noise = np.random.default_rng(0).integers(0, 256, (256, 300, 3), np.uint8)
        try:
            self.pixels: tuple[int, int] = self.picture(Image.fromarray(noise)).shape[1:]
        except (ValueError, RuntimeError, TypeError) as err:
            raise BadModel(
                f"{type(processor).__name__} cannot prepare a picture by the settings it was given ({_said(err)}); "
                "allowed: a preprocessor_config.json whose sizes fit together"
            ) from err

    def picture(self, image: Image.Image, name: str = "") -> np.ndarray:
        """[3, height, width] float32."""
        made = self._processor(images=[image.convert("RGB")], return_tensors="np")["pixel_values"]
        return np.asarray(made, np.float32)[0]

    def of_jpeg(self, data: bytes, name: str = "", most: int = 2**63) -> np.ndarray | None:
        """There is no fast path."""
        return None

    def finish(self, pictures: Tensor, out: Tensor | None = None) -> Tensor:
        """They are finished."""
        return pictures

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures as the model is given them: [images, 3, height, width] float32."""
        return self.finish(torch.from_numpy(np.stack([self.picture(image) for image in images])))

    def key(self) -> str:
        """Canonical JSON of the processor's settings."""
        cosmetic = {"transformers_version", "processor_class", "_processor_class"}
        settings = self._processor.to_dict().items()
        return json.dumps({k: v for k, v in settings if k not in cosmetic and v is not None}, sort_keys=True)


Preprocessing = Steps | Borrowed


def read(
    folder: Path, word: str = "exact", *, size: int | None = None, view: str = "plain", seed: int = 0
) -> Preprocessing:
    """How a model's pictures are prepared, by its own files or by the study's recipe for its family.

    Args:
        folder: of the model's files.
        word: one of WORDS.
        size: height and width of the model's input, if it is to be another; what is cut off keeps its share.
        view: 'plain', 'flip', or 'crop1' and so on.
        seed: of the crops.

    Raises:
        UnknownName: `word` is none of WORDS, or `view` no view.
        BadModel: the folder says nothing that we or transformers can read, or the study has no recipe for such a model.
    """
    if word not in WORDS:
        raise UnknownName("preprocessing", word, WORDS)
    if not is_view(view):
        raise UnknownName("view", view, VIEWS)
    config = _json(folder / "config.json")
    found = _of_the_study(folder, config) if word.startswith("paper") else _own(folder, config)
    if isinstance(found, Borrowed):
        if word != "exact" or size is not None or view != "plain":
            raise BadModel(
                f"the processor of {folder.name} has rules of its own; allowed with it: --preprocess exact, no --size and "
                "no views"
            )
        return found
    if size is not None:
        found = _enlarged(found, size)
    if word.endswith("fast") and found.resample in ("bilinear", "bicubic"):  # the filters that torch has for bytes
        found = dataclasses.replace(found, kernel="torch-uint8")
    return dataclasses.replace(found, view=view, seed=seed)


def rebuilt(key: str) -> tuple[Steps | None, bool]:
    """The steps that wrote this key, and whether images are turned as their EXIF says.

    None: a processor with rules of its own wrote it, or another version of ours, whose steps were others.
    """
    try:
        body = json.loads(key)
        upright = body.pop("exif", None) == "upright"
        plain = json.dumps(body, sort_keys=True)
        body.pop("spare", None)
        absent = {"size": None, "crop_size": None, "rescale_factor": None}  # what is not done is not in the key
        sizes = {name: _size(body[name], False) for name in ("size", "crop_size") if name in body}
        colours = {name: tuple(map(float, body[name])) for name in ("image_mean", "image_std") if name in body}
        made = Steps(**{**absent, **body, **sizes, **colours})
        known = made.resample in FILTERS and made.kernel in get_args(Kernel) and is_view(made.view)
        return (made if known and made.key() == plain else None), upright
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, BadModel):
        return None, False


def is_view(word: str) -> bool:
    """Whether a view is called so."""
    return re.fullmatch(r"plain|flip|crop[1-9][0-9]*", word) is not None


def views(count: int) -> tuple[str, ...]:
    """The first so many: 'plain', 'flip', 'crop1', 'crop2', …"""
    return ("plain", "flip", *(f"crop{n}" for n in range(1, count - 1)))[:count]


def _enlarged(steps: Steps, size: int) -> Steps:
    """The same for a square input of another size."""
    if size < 1:
        raise BadModel(f"--size {size}: allowed are 1 and more")
    whole = steps.size
    if steps.crop_size is None or whole is None:
        return dataclasses.replace(
            steps, size=(size, size) if whole is not None else None, crop_size=steps.crop_size and (size, size)
        )
    if isinstance(whole, int):
        whole = round(whole * size / min(steps.crop_size))
    else:
        whole = round(whole[0] * size / steps.crop_size[0]), round(whole[1] * size / steps.crop_size[1])
    return dataclasses.replace(steps, size=whole, crop_size=(size, size))


def _own(folder: Path, config: Mapping[str, Any]) -> Preprocessing:
    """As the model's own files say."""
    if (timm := config.get("pretrained_cfg")) and not (folder / "preprocessor_config.json").is_file():
        return _of_timm(timm)
    if clip := _json(folder / "open_clip_config.json").get("preprocess_cfg"):
        return _of_open_clip(clip, _json(folder / "open_clip_config.json"))
    settings = _json(folder / "preprocessor_config.json") or _json(folder / "video_preprocessor_config.json")
    names = ("image_processor_type", "feature_extractor_type", "video_processor_type")
    name = next((str(settings[one]) for one in names if settings.get(one)), "")
    processor = None
    if _family(name) not in KNOWN or settings.get("do_pad"):
        processor = _processor(folder)
        settings, name = processor.to_dict(), type(processor).__name__
    if _family(name) in KNOWN and not settings.get("do_pad"):
        return _of_transformers(_family(name), settings)
    return Borrowed(processor)


def _family(name: str) -> str:
    """'CLIPImageProcessorFast' and 'CLIPFeatureExtractor' → 'CLIP'."""
    for suffix in ("Pil", "Fast", "ImageProcessor", "FeatureExtractor", "VideoProcessor"):
        name = name.removesuffix(suffix)
    return name


def _of_transformers(family: str, settings: Mapping[str, Any]) -> Steps:
    """As the processors of transformers read their configuration, old forms too."""
    known = KNOWN[family]
    said = {**known, **{name: value for name, value in settings.items() if value is not None}}
    if (
        family == "Siglip2"
    ):  # NaFlex cuts pictures of any shape into at most so many patches; a cache wants one: the square
        side = said.get("patch_size", 16) * math.isqrt(said.get("max_num_patches", 256))
        said["size"] = {"height": side, "width": side}
    elif family == "VJEPA2":  # whose size always follows from the crop
        crop_edge = _size(said["crop_size"], True)
        said["size"] = {"shortest_edge": int((crop_edge[0] if isinstance(crop_edge, tuple) else crop_edge) * 256 / 224)}
    size = _size(said["size"], known["square"]) if said.get("do_resize", True) else None
    crop = _size(said["crop_size"], True) if said.get("do_center_crop") else None
    if family == "ConvNext" and isinstance(size, int):
        # Below 384 pixels a margin is resized and cut off, from there on pictures are squashed.
        size, crop = (int(size / said["crop_pct"]), (size, size)) if size < 384 else ((size, size), crop)
    mean, std = COLOURS[known["of"]]
    normalizes = said.get("do_normalize", True)
    try:
        resample = {number: name for name, number in FILTERS.items()}[int(said["resample"])]
    except (KeyError, ValueError) as err:
        raise BadModel(f"resample {said['resample']!r}: allowed are PIL's numbers 0 to 5") from err
    return Steps(
        size=size,
        crop_size=crop if crop is None or isinstance(crop, tuple) else (crop, crop),
        resample=resample,
        kernel=known.get("kernel", "pil"),
        rescale_factor=float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else None,
        image_mean=_three(said.get("image_mean", mean)) if normalizes else None,
        image_std=_three(said.get("image_std", std)) if normalizes else None,
    )


def _size(value: Any, square: bool) -> tuple[int, int] | int:
    """One number, two, or a dictionary of one of transformers' forms."""
    if isinstance(value, Mapping):
        if value.get("height") and value.get("width"):
            return int(value["height"]), int(value["width"])
        if value.get("shortest_edge") and not value.get("longest_edge"):
            return int(value["shortest_edge"])
        raise BadModel(f"size {dict(value)}: allowed are height and width, or shortest_edge")
    if isinstance(value, Sequence):
        return int(value[0]), int(value[1])
    return (int(value), int(value)) if square else int(value)


def _three(value: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),) * 3


def _of_timm(settings: Mapping[str, Any]) -> Steps:
    """timm's evaluation transform (timm/data/transforms_factory.py): resize by crop_pct, crop about the centre."""
    _, height, width = settings["input_size"]
    mode, share = settings.get("crop_mode", "center"), float(settings.get("crop_pct", 0.875))
    if mode not in ("center", "squash"):
        raise BadModel(f"timm's crop_mode {mode!r}: allowed are center, squash")
    scaled = math.floor(height / share), math.floor(width / share)
    return Steps(
        size=scaled if mode == "squash" or height != width else scaled[0],
        crop_size=(height, width),
        crop_rounding="half-even",
        resample=str(settings.get("interpolation", "bilinear")),
        image_mean=_three(settings.get("mean", IMAGENET_MEAN)),
        image_std=_three(settings.get("std", IMAGENET_STD)),
    )


def _of_open_clip(settings: Mapping[str, Any], config: Mapping[str, Any]) -> Steps:
    """open_clip's evaluation transform (open_clip/transform.py): shortest edge and crop, or squash."""
    said = settings.get("size") or config["model_cfg"]["vision_cfg"].get("image_size", 224)
    size = _size(said, True)
    assert isinstance(size, tuple)
    mode = settings.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise BadModel(f"open_clip's resize_mode {mode!r}: allowed are shortest, squash")
    return Steps(
        size=size if mode == "squash" else min(size),
        crop_size=size,
        crop_rounding="half-even",
        resample=str(settings.get("interpolation", "bicubic")),
        image_mean=_three(settings.get("mean", CLIP_MEAN)),
        image_std=_three(settings.get("std", CLIP_STD)),
    )


STUDY: dict[str, tuple[int, str, str]] = {  # model_type → shortest edge, filter, colours
    "clip": (224, "bicubic", "clip"),
    "clip_vision_model": (224, "bicubic", "clip"),
    "vit": (248, "bicubic", "half"),
    "dinov2": (256, "bilinear", "imagenet"),
    "vit_mae": (256, "bilinear", "imagenet"),
}
"""What the study's code (arXiv 2601.09322, commit ef86a87) does: open_clip's, timm's and thingsvision's transforms."""


def _of_the_study(folder: Path, config: Mapping[str, Any]) -> Steps:
    timms = str(config.get("architecture")).startswith("vit_")  # which is what the study loads its supervised ViTs from
    family = "vit" if timms else str(config.get("model_type"))
    if family not in STUDY:
        raise BadModel(
            f"the study has no model of the family {family} of {folder.name}; allowed with --preprocess paper: "
            f"{', '.join(STUDY)}. Leave it away for the model's own preprocessing"
        )
    edge, resample, colours = STUDY[family]
    mean, std = COLOURS[colours]
    return Steps(
        size=edge, crop_size=(224, 224), crop_rounding="half-even", resample=resample, image_mean=mean, image_std=std
    )


def _processor(folder: Path) -> Any:
    """The model's own image processor, in its PIL form: exact, and without torchvision."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
    except (OSError, ValueError, ImportError) as err:
        raise BadModel(
            f"{folder.name}: no image processor can be made ({_said(err)}); the folder needs a preprocessor_config.json of one "
            f"of {', '.join(KNOWN)}, or of another processor that has a PIL form in transformers"
        ) from err


def _said(err: BaseException) -> str:
    """What a library said, short enough to quote."""
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:200]


def _json(path: Path) -> dict[str, Any]:
    """A file's object, or an empty one where there is no such file.

    Raises:
        BadModel: it holds something else.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        raise BadModel(f"{path} cannot be read: {err}") from err
    if not isinstance(body, dict):
        raise BadModel(f"{path} holds no JSON object")
    return body
