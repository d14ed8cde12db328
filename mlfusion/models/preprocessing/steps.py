"""Resizes, crops, rescales and normalises images for the model, and writes these steps into the cache's key.

The reference is the model's image processor in transformers, in its PIL form. This code gives the same numbers to the bit,
needs neither torchvision nor the processor's class, and has two stages. A worker calls `Steps.picture` for one image, which
returns bytes, a quarter of the floats' memory; `Steps.finish` converts a batch of them to the model's input, on its device.

The fast path decodes JPEG by libjpeg-turbo directly, large images at a reduced scale, and resizes bytes by torch. Most of its
pixels equal the exact ones and the others differ by one level; docs/measurements/speed.md shows the effect on features.
"""

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlfusion.errors import BadImage, BadModel
from mlfusion.models.preprocessing.resampling import KERNELS, resize_part
from mlfusion.shapes import Float, Num, UInt8
from mlfusion.specs.identity import AS_STORED, MAX_PIXELS, Decoding
from mlfusion.specs.kinds import is_view
from mlfusion.system import room

Kernel = Literal["pil", "torch-uint8", "torch-float32"]
"""The resize kernel: PIL on bytes, torch on bytes (the fast path), or torch on floats (as torchvision's processors)."""

MAX_RESIZED_PIXELS = 1 << 25
"""Pixels of a resized picture, 256 x 131,072; of larger ones only the crop is computed; torch cannot do so."""

JPEG_MARGIN = 2
"""The fast path decodes a JPEG at 1/2, 1/4 or 1/8 only if that leaves this many times the target's height and width."""

Rounding = Literal["floor", "half-even"]
"""Rounding of a crop's offset when the margin is odd: transformers rounds down, torchvision to the even number."""

PILLOW_13 = "5b27cac7583b0616"
"""Digest of the known picture of `resize_mark`, resized by Pillow 13.0."""

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # PIL's numbers
LARGEST_INPUT = 1 << 24  # pixels of a picture that a model is given: 4096 squared, several times what any model takes


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Resize, crop, rescale, normalise: everything between an RGB image and the model's input."""

    size: tuple[int, int] | int | None  # (height, width), or the shortest edge
    crop_size: tuple[int, int] | None  # (height, width) of the centre crop; smaller images are padded with black
    crop_rounding: Rounding = "floor"
    resample: str = "bicubic"
    kernel: Kernel = "pil"
    rescale_factor: float | None = 1 / 255
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    view: str = "plain"  # 'plain', 'flip', 'crop1', …: which part of the image is shown, and whether mirrored
    seed: int = 0  # of the positions of random crops

    def __post_init__(self) -> None:
        if self.crop_size is None and not isinstance(self.size, tuple):
            raise BadModel(
                f"pictures of every shape would come out of a resize to {self.size} without a crop; allowed: a processor "
                "with a crop_size, or a size with height and width"
            )
        for name, edge in (("size", self.size), ("crop_size", self.crop_size)):
            if edge is not None:
                refuse_size(name, edge)
        for name, colours in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            if colours is not None and not (len(colours) == 3 and all(map(math.isfinite, colours))):
                raise BadModel(f"{name} {list(colours)}: allowed are three finite numbers, or one for all colours")
        if self.image_std is not None and 0 in self.image_std:
            raise BadModel(f"image_std {list(self.image_std)}: allowed are numbers other than 0")
        if self.rescale_factor is not None and not 0 < self.rescale_factor < math.inf:
            raise BadModel(f"rescale_factor {self.rescale_factor}: allowed are finite numbers above 0")

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        assert isinstance(self.size, tuple) or self.crop_size
        return self.crop_size or self.size  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Type of what `picture` returns."""
        return torch.float32 if self.kernel == "torch-float32" else torch.uint8

    @property
    def decodes_jpeg(self) -> bool:
        """Whether JPEG files take the fast path, `from_jpeg`."""
        return self.kernel == "torch-uint8"

    def picture(self, image: Image.Image, name: str = "") -> Num[np.ndarray, "3 height width"]:
        """Resize and crop one image → an array of `dtype`, bytes not rescaled yet; random crops depend on the id `name`."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        box, mirrored = self.region(image.height, image.width, name)
        if box:
            # Image.crop refuses images that are larger than PIL's limit.
            top, left, height, width = box
            image = Image.fromarray(np.asarray(image)[top : top + height, left : left + width])
        height, width = self.pixels if box else self._resized_shape(image.height, image.width)
        if self.kernel == "pil":
            resized = self._resize_by_pil(image, height, width, name).transpose(2, 0, 1)
        else:
            resized = self._resize_by_torch(np.array(image), height, width, name)
        return self._crop_and_mirror(resized, mirrored)

    def from_jpeg(
        self, data: bytes, name: str = "", max_pixels: int = 2**63
    ) -> UInt8[np.ndarray, "3 height width"] | None:
        """Decode, resize and crop a JPEG file by the fast path.

        Returns None for a file that is not a JPEG in grey or YCbCr, is damaged, or has more than `max_pixels` pixels: PIL
        decodes such files, or raises an error that says what is wrong.
        """
        if data[:2] != b"\xff\xd8" or (shape := _jpeg_shape(data)) is None or shape[0] * shape[1] > max_pixels:
            return None
        height, width = shape
        box, mirrored = self.region(height, width, name)
        source = box[2:] if box else shape
        target = self.pixels if box else self._resized_shape(*shape)
        scale = _jpeg_scale(source, target)
        room.take(room.PIXEL_BYTES * height * width // scale)
        pixels = _decode_jpeg(data, height, width, scale)
        if pixels is None:
            return None
        if box:
            top, left, high, wide = (round(n / scale) for n in box)
            pixels = np.ascontiguousarray(pixels[top : top + high, left : left + wide])
        return self._crop_and_mirror(self._resize_by_torch(pixels, *target, name), mirrored)

    def _resize_by_pil(self, image: Image.Image, height: int, width: int, name: str) -> UInt8[np.ndarray, "_ _ 3"]:
        """Resize; of the picture `name`, if it would become very long, compute only what the centre crop shows."""
        if self.crop_size is None or height * width <= MAX_RESIZED_PIXELS:
            return np.asarray(image.resize((width, height), FILTERS[self.resample]))
        if self.resample not in KERNELS:
            raise _too_long(name, height, width)
        parts = tuple(
            (_offset(now, to, self.crop_rounding), min(now, to))
            for now, to in zip((height, width), self.crop_size, strict=True)
        )
        return resize_part(image, (height, width), (parts[0], parts[1]), self.resample)

    def _resize_by_torch(
        self, pixels: UInt8[np.ndarray, "_ _ 3"], height: int, width: int, name: str
    ) -> Num[np.ndarray, "3 {height} {width}"]:
        """Resize with antialiasing, as PIL does it; BadImage if the picture `name` would become very long."""
        if height * width > MAX_RESIZED_PIXELS:
            raise _too_long(name, height, width)
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        if self.kernel == "torch-float32":
            batch = batch.float() * (self.rescale_factor or 1)
        return torch.nn.functional.interpolate(batch, (height, width), mode=self.resample, antialias=True)[0].numpy()

    def _crop_and_mirror(self, pixels: np.ndarray, mirrored: bool) -> np.ndarray:
        if self.crop_size and pixels.shape[1:] != self.crop_size:
            pixels = _centre_crop(pixels, self.crop_size, self.crop_rounding)
        return pixels[:, :, ::-1] if mirrored else pixels

    def region(self, height: int, width: int, name: str) -> tuple[tuple[int, int, int, int] | None, bool]:
        """The part of an image that this view shows, (top, left, height, width) or None for all; and whether it is mirrored.

        Crops have the distribution of torchvision's `RandomResizedCrop`: 0.25 to 1 of the area, aspect ratio 3/4 to 4/3,
        uniform position. They depend only on the seed, the view and the sample's id.
        """
        if not self.view.startswith("crop"):
            return None, self.view == "flip"
        digest = hashlib.sha256(f"{self.seed}:{self.view}:{name}".encode()).digest()
        area, shape, x, y = (int.from_bytes(digest[8 * n : 8 * n + 8], "big") / 2**64 for n in range(4))
        ratio = math.exp((2 * shape - 1) * math.log(4 / 3))
        square = height * width * (0.25 + 0.75 * area)
        wide = min(width, max(1, round(math.sqrt(square * ratio))))
        high = min(height, max(1, round(math.sqrt(square / ratio))))
        box = int(y * (height - high + 1)), int(x * (width - wide + 1)), high, wide
        return box, bool(hashlib.sha256(digest).digest()[0] & 1)

    def finish(
        self, pictures: Num[Tensor, "B 3 height width"], out: Float[Tensor, "_ 3 height width"] | None = None
    ) -> Float[Tensor, "B 3 height width"]:
        """Rescale and normalise pictures of `dtype` → float32, on the same device.

        `out`: a tensor to write into, of that shape or with more images; reused memory is faster than new.
        """
        floats = torch.empty(pictures.shape, device=pictures.device) if out is None else out[: len(pictures)]
        floats.copy_(pictures)
        factor = self.rescale_factor
        if factor is not None and pictures.dtype == torch.uint8:
            if self._division_is_exact:
                floats.div_(1 / factor)
            else:
                floats.copy_(floats.double().mul_(factor))
        if self.image_mean is not None and self.image_std is not None:
            mean, std = self.colours.to(floats.device)
            floats.sub_(mean).div_(std)
        return floats

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 height width"]:
        """Images → the model's input."""
        return self.finish(torch.from_numpy(np.stack([self.picture(image) for image in images])))

    @cached_property
    def colours(self) -> Float[Tensor, "2 3 1 1"]:
        """Mean and standard deviation of each colour, 0 and 1 for pictures that are not normalised."""
        normalises = self.image_mean is not None and self.image_std is not None
        return torch.tensor([self.image_mean, self.image_std] if normalises else [[0.0] * 3, [1.0] * 3])[
            ..., None, None
        ]

    @cached_property
    def _division_is_exact(self) -> bool:
        """Whether dividing in float32 gives, for every byte, transformers' product in float64 rounded to float32."""
        assert self.rescale_factor is not None
        byte = torch.arange(256)
        return torch.equal(byte.float() / (1 / self.rescale_factor), (byte.double() * self.rescale_factor).float())

    def _resized_shape(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        short, long = sorted((height, width))
        longer = int(self.size * long / short)
        return (longer, self.size) if width <= height else (self.size, longer)

    def key(self, decoding: Decoding = AS_STORED) -> str:
        """Canonical JSON for `ModelSpec.preprocess`, with transformers' names if they exist; `from_key` reads it.

        `decoding`: how the data set decodes images before these steps.
        """
        body = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        for name in body.keys() & {"size", "crop_size"}:
            edge = body[name]
            body[name] = {"height": edge[0], "width": edge[1]} if isinstance(edge, tuple) else {"shortest_edge": edge}
        if not self.view.startswith("crop"):
            del body["seed"]
        if self.view == "plain":
            del body["view"]
        if self.decodes_jpeg:
            body["spare"] = JPEG_MARGIN
        if self.kernel == "pil":
            body |= resize_mark()
        return canonical(body, decoding)


def _too_long(name: str, height: int, width: int) -> BadImage:
    return BadImage(
        f"{name} cannot be prepared: resized, it has {width:,} x {height:,} pixels; allowed are {MAX_RESIZED_PIXELS:,}: cut "
        "it before, or use --preprocess exact"
    )


def _offset(current: int, target: int, rounding: Rounding) -> int:
    """The first row or column of a centre crop."""
    margin = max(current - target, 0)
    return margin // 2 if rounding == "floor" else round(margin / 2)


def _centre_crop(
    pixels: Num[np.ndarray, "3 _ _"], size: tuple[int, int], rounding: Rounding
) -> Num[np.ndarray, "3 {size[0]} {size[1]}"]:
    """The middle of an image, padded with zeros if the image is smaller."""
    offsets, pads = [], []
    for current, target in zip(pixels.shape[1:], size, strict=True):
        padding = max(target - current, 0)
        offsets.append(_offset(current, target, rounding))
        before = -(-padding // 2) if rounding == "floor" else padding // 2
        pads.append((before, padding - before))
    if any(map(any, pads)):
        pixels = np.pad(pixels, ((0, 0), *pads))
    top, left = offsets
    return pixels[:, top : top + size[0], left : left + size[1]]


@cache
def resize_mark() -> dict[str, str]:
    """A part of the key if this Pillow resizes a known picture otherwise than Pillow 13.0, whose keys have no such part.

    Pillow before 13.0 resizes the rows of a tall picture first, which changes some pixels by one level.
    """
    pixels = (np.arange(40 * 7 * 3) * 7919 % 251).astype(np.uint8).reshape(40, 7, 3)
    pictures = [Image.fromarray(np.ascontiguousarray(each)) for each in (pixels, pixels.swapaxes(0, 1))]
    resized = [each.resize(size, FILTERS["bilinear"]).tobytes() for each in pictures for size in ((5, 9), (9, 5))]
    digest = hashlib.sha256(b"".join(resized)).hexdigest()[:16]
    return {} if digest == PILLOW_13 else {"resize": digest}


def canonical(body: Mapping[str, Any], decoding: Decoding) -> str:
    """The JSON text of a preprocessing; it has a mark for what is not at its default in the decoding of images."""
    marks: dict[str, Any] = {"exif": "upright"} if decoding.exif_transpose else {}
    if decoding.window is not None:
        marks["window"] = list(decoding.window)
    if decoding.max_pixels != MAX_PIXELS:
        marks["max_pixels"] = decoding.max_pixels
    return json.dumps({**body, **marks}, sort_keys=True)


def from_key(key: str) -> tuple[Steps | None, Decoding]:
    """The steps that have this `key`, and how images are decoded before them.

    The steps are None if a processor of transformers, or another version of this code, wrote the key.
    """
    decoding = AS_STORED
    try:
        body = json.loads(key)
        exif_transpose, window = body.pop("exif", None) == "upright", body.pop("window", None)
        max_pixels = int(body.pop("max_pixels", MAX_PIXELS))
        decoding = Decoding(exif_transpose, window and (int(window[0]), int(window[1])), max_pixels)
        unmarked = json.dumps(body, sort_keys=True)
        for mark in ("spare", "resize"):
            body.pop(mark, None)
        absent = {"size": None, "crop_size": None, "rescale_factor": None}  # the key omits steps that are not done
        sizes = {name: edges(body[name]) for name in ("size", "crop_size") if name in body}
        colours = {name: tuple(map(float, body[name])) for name in ("image_mean", "image_std") if name in body}
        steps = Steps(**{**absent, **body, **sizes, **colours})
        known = steps.resample in FILTERS and steps.kernel in get_args(Kernel) and is_view(steps.view)
        return (steps if known and steps.key() == unmarked else None), decoding
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, BadModel):
        return None, decoding


def refuse_size(name: str, edge: tuple[int, int] | int) -> None:
    """Raise BadModel for a size that no model takes, before a picture of it is made."""
    height, width = edge if isinstance(edge, tuple) else (edge, edge)
    if min(height, width) < 1 or height * width > LARGEST_INPUT:
        raise BadModel(f"{name} {edge}: allowed are 1 pixel and more, and up to {LARGEST_INPUT:,} in a picture")


def edges(value: Any) -> tuple[int, int] | int:
    """(height, width), or the shortest edge, from a size as transformers writes it; raises BadModel for other forms."""
    if isinstance(value, Mapping):
        if value.get("height") and value.get("width"):
            return _whole(value["height"]), _whole(value["width"])
        if value.get("shortest_edge") and not value.get("longest_edge"):
            return _whole(value["shortest_edge"])
        raise BadModel(f"size {dict(value)}: allowed are height and width, or shortest_edge")
    if isinstance(value, Sequence) and not isinstance(value, str):
        height, width = value
        return _whole(height), _whole(width)
    return _whole(value)


def _whole(value: Any) -> int:
    """A number of pixels."""
    if isinstance(value, (bool, str)) or int(value) != value:
        raise BadModel(f"a size of {value!r}: allowed are whole numbers of pixels")
    return int(value)


def _jpeg_scale(source: tuple[int, ...], target: tuple[int, ...]) -> int:
    """The divisor of a JPEG's height and width at which it is decoded: 8, 4, 2 or 1."""
    for scale in (8, 4, 2):
        if all(side >= scale * JPEG_MARGIN * target_side for side, target_side in zip(source, target, strict=True)):
            return scale
    return 1


def _jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """Height and width from the header of a JPEG; None if it is not one in grey or YCbCr."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return (image.height, image.width) if image.mode in ("L", "RGB") else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _decode_jpeg(data: bytes, height: int, width: int, scale: int) -> np.ndarray | None:
    """[height / scale, width / scale, 3] uint8, rounded up; None if the file is damaged.

    simplejpeg (libjpeg-turbo without PIL's copies) decodes it if it is installed, else PIL, to the same bytes.
    """
    try:
        import simplejpeg
    except ImportError:
        simplejpeg = None
    try:
        if simplejpeg is not None:
            # simplejpeg takes the smallest of the scales n/8 that gives at least this size, which is 1 / scale.
            min_size = {"min_height": -(-height // scale), "min_width": -(-width // scale)} if scale > 1 else {}
            return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, **min_size)
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if scale > 1:  # PIL takes the largest scale that leaves at least this size, before it rounds sizes up
                image.draft("RGB", (width // scale, height // scale))
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):
        return None
