"""Pictures for a report: an attention map drawn on its image, and the images that a probe reads in early or late layers."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mlfusion.errors import BadData

THUMBNAIL_PX = 112

# Dark to bright through violet and orange: lightness increases all the way, so that the hue is not needed.
_RAMP = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Picture:
    """One image with a caption; an attention map is drawn on it if given."""

    image: Image.Image
    caption: str = ""
    attention: np.ndarray | None = None  # [rows, columns] of patches, any scale, not negative


@dataclass(frozen=True, eq=False)
class Strip:
    """Pictures in a row under a title, such as a data set's examples."""

    title: str
    description: str  # a sentence about what the pictures show
    pictures: tuple[Picture, ...]
    name: str  # its file: letters, digits and hyphens


def overlay(image: Image.Image, attention: np.ndarray, *, strength: float = 0.75) -> Image.Image:
    """The image in grey, overlaid with the attention map in colour; the largest share is drawn at full strength.

    Args:
        image: any size; the map is stretched over all of it, so pass the crop that the model saw.
        attention: [rows, columns], not negative; shares or logits' exponentials, whatever their sum.
        strength: opacity of the largest share.

    Raises:
        BadData: the map is not two-dimensional, or has a negative or no finite value.
    """
    shares = np.asarray(attention, dtype=np.float64)
    if shares.ndim != 2 or not shares.size or not np.isfinite(shares).all() or (shares < 0).any():
        raise BadData(f"a map of attention of shape {shares.shape}; allowed: [rows, columns], finite and not negative")
    top = shares.max()
    small = Image.fromarray((shares / top if top else shares).astype(np.float32), mode="F")
    share = np.clip(np.asarray(small.resize(image.size, Image.Resampling.BICUBIC), dtype=np.float64), 0, 1)
    colour = np.stack([np.interp(share, np.linspace(0, 1, len(_RAMP)), _RAMP[:, c]) for c in range(3)], axis=-1)
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float64)
    # The square root makes medium shares visible; regions without attention show the plain image.
    opacity = strength * np.sqrt(share)[..., None]
    return Image.fromarray((grey * (1 - opacity) + colour * opacity).round().astype(np.uint8))


def render(picture: Picture, longest_px: int = THUMBNAIL_PX) -> Image.Image:
    """The picture with its attention map, its longer side `longest_px` pixels."""
    image = picture.image.convert("RGB")
    scale = longest_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Images of a few pixels are shown as the pixels they are.
    image = image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)
    return image if picture.attention is None else overlay(image, picture.attention)


def data_url(picture: Picture, longest_px: int = THUMBNAIL_PX, *, kind: str = "webp") -> str:
    """The rendered picture as a data URL: 'data:image/webp;base64,…'."""
    buffer = io.BytesIO()
    render(picture, longest_px).save(buffer, kind.upper(), quality=75)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


SHOWN_LAYERS = 0.1
"""Difference of mean layers that can be seen where they are shown, with one digit after the point."""


def mean_layers(attention: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """The mean layer of each image's attention: [images, tokens] shares and the layer of each token → [images].

    Raises:
        BadData: the shapes do not match.
    """
    shares, depths = np.asarray(attention, dtype=np.float64), np.asarray(layers, dtype=np.float64)
    if shares.ndim != 2 or shares.shape[1:] != depths.shape:
        raise BadData(f"attention of shape {shares.shape} over {depths.size} tokens; allowed: [images, {depths.size}]")
    return (shares @ depths) / shares.sum(axis=1)


def differ(mean_layers: np.ndarray) -> bool:
    """Whether the mean layers of images differ by more than is shown of them, so that attention depends on the image."""
    return float(np.ptp(mean_layers)) >= SHOWN_LAYERS


def early_and_late(
    attention: np.ndarray, layers: Sequence[int], picture: Callable[[int], Picture], count: int = 8
) -> tuple[Strip, ...]:
    """The images whose attention has the lowest mean layer, and those with the highest; none if all have the same.

    Args:
        attention: [images, tokens] shares, as saved with rows of ALF, or their means over seeds.
        layers: the layer of each token.
        picture: test image i as a picture; its caption is followed by the mean layer.
        count: number of images in each strip, at most half of all.
    """
    means = mean_layers(attention, layers)
    if not differ(means):
        return ()
    order = np.argsort(means, kind="stable")
    count = min(count, len(order) // 2)
    median, last = float(np.median(means)), max(layers)

    def strip(name: str, extreme: str, rows: np.ndarray) -> Strip:
        pictures = []
        for row in rows:
            original = picture(int(row))
            caption = ", ".join(filter(None, [original.caption, f"layer {means[row]:.1f}"]))
            pictures.append(Picture(original.image, caption, original.attention))
        description = (
            f"The {len(rows)} of {len(means)} test images with the {extreme} mean layer of attention, which stands under each "
            f"(the last layer is {last}; the median is {median:.1f})."
        )
        return Strip(f"Attention in {name} layers", description, tuple(pictures), name=f"read-{name}")

    return strip("early", "lowest", order[:count]), strip("late", "highest", order[::-1][:count])
