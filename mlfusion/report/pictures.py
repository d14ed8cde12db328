"""Pictures beside numbers: a map of attention drawn on its image, and the images that a probe reads early or late."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mlfusion.errors import BadData

THUMBNAIL_PX = 112

# Dark to bright through violet and orange: in lightness alone it runs as it does in colour, so nobody needs the hue.
_RAMP = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Picture:
    """One image with a few words; with a map of attention, that is drawn on it."""

    image: Image.Image
    caption: str = ""
    attention: np.ndarray | None = None  # [rows, columns] of patches, any scale, not negative


@dataclass(frozen=True, eq=False)
class Strip:
    """Pictures in a row under a title, such as a data set's examples."""

    title: str
    says: str  # a sentence on what is seen
    pictures: tuple[Picture, ...]
    name: str  # of its file: letters, digits and hyphens


def overlay(image: Image.Image, attention: np.ndarray, *, strength: float = 0.75) -> Image.Image:
    """The image in grey, and over it in colour where the attention goes; the largest share is drawn at full strength.

    Args:
        image: any size; the map is stretched over all of it, so hand over what the model saw (its crop).
        attention: [rows, columns], not negative; shares or logits' exponentials, whatever their sum.
        strength: opacity of the largest share.

    Raises:
        BadData: the map is not two-dimensional, or has a negative or no finite value.
    """
    held = np.asarray(attention, dtype=np.float64)
    if held.ndim != 2 or not held.size or not np.isfinite(held).all() or (held < 0).any():
        raise BadData(f"a map of attention of shape {held.shape}; allowed: [rows, columns], finite and not negative")
    top = held.max()
    small = Image.fromarray((held / top if top else held).astype(np.float32), mode="F")
    share = np.clip(np.asarray(small.resize(image.size, Image.Resampling.BICUBIC), dtype=np.float64), 0, 1)
    colour = np.stack([np.interp(share, np.linspace(0, 1, len(_RAMP)), _RAMP[:, c]) for c in range(3)], axis=-1)
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float64)
    # The square root lets middling shares be seen; what gets none stays the image itself.
    opacity = strength * np.sqrt(share)[..., None]
    return Image.fromarray((grey * (1 - opacity) + colour * opacity).round().astype(np.uint8))


def drawn(picture: Picture, longest_px: int = THUMBNAIL_PX) -> Image.Image:
    """The picture as it is shown, its longer side `longest_px`."""
    image = picture.image.convert("RGB")
    scale = longest_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Images of a few pixels are shown as the pixels they are.
    image = image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)
    return image if picture.attention is None else overlay(image, picture.attention)


def data_url(picture: Picture, longest_px: int = THUMBNAIL_PX, *, kind: str = "webp") -> str:
    """The picture as it is shown, inside an address: 'data:image/webp;base64,…'."""
    held = io.BytesIO()
    drawn(picture, longest_px).save(held, kind.upper(), quality=75)
    return f"data:image/{kind};base64,{base64.b64encode(held.getvalue()).decode()}"


def depths(attention: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """[images, tokens] shares, the layer of each token → [images] the mean layer that each image's attention lies at.

    Raises:
        BadData: shapes that do not fit.
    """
    held, at = np.asarray(attention, dtype=np.float64), np.asarray(layers, dtype=np.float64)
    if held.ndim != 2 or held.shape[1:] != at.shape:
        raise BadData(f"attention of shape {held.shape} over {at.size} tokens; allowed: [images, {at.size}]")
    return (held @ at) / held.sum(axis=1)


def leaning(
    attention: np.ndarray, layers: Sequence[int], picture: Callable[[int], Picture], count: int = 8
) -> tuple[Strip, Strip]:
    """The images whose attention over layers lies earliest, and those whose lies latest.

    Args:
        attention: [images, tokens] shares, as rows of ALF keep them; means over seeds will do.
        layers: of each token.
        picture: test image i as a picture; its caption is followed by the mean layer.
        count: how many of each, at most half of all.
    """
    at = depths(attention, layers)
    order = np.argsort(at, kind="stable")
    count = min(count, len(order) // 2)
    middle, last = float(np.median(at)), max(layers)

    def strip(name: str, word: str, rows: np.ndarray) -> Strip:
        pictures = []
        for row in rows:
            held = picture(int(row))
            said = f"{held.caption}, layer {at[row]:.1f}" if held.caption else f"layer {at[row]:.1f}"
            pictures.append(Picture(held.image, said, held.attention))
        says = (
            f"The {len(rows)} of {len(at)} test images whose attention over the layers lies {word}; its mean layer stands "
            f"under each (of {last}; the middle image's is {middle:.1f})."
        )
        return Strip(f"Read {name}", says, tuple(pictures), name=f"read-{name}")

    return strip("early", "earliest", order[:count]), strip("late", "latest", order[::-1][:count])
