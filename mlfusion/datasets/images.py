"""Decodes an image file's bytes: a function of the bytes and of two settings only, the same in every process.

PIL decodes, with four exceptions where it would silently be wrong or run code that it should not: see `Decoder`.
"""

import importlib
import importlib.util
import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mlfusion.errors import BadImage
from mlfusion.specs.identity import MAX_PIXELS
from mlfusion.system import room

HEIF_PLUGIN = "pillow_heif"  # reads HEIC; imported when the first such image is met
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})

_JPEG = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"}
_JPEG_2000 = {".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"}
_NETPBM = {".ppm", ".pgm", ".pbm", ".pnm"}
_OTHERS = {".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".avifs"}
SUFFIXES = frozenset(_JPEG | _JPEG_2000 | _NETPBM | _OTHERS) | (
    HEIF_SUFFIXES if importlib.util.find_spec(HEIF_PLUGIN) else frozenset()
)
"""Suffixes of the files in a folder that count as images; HEIC where its plugin is installed."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
"""PIL's formats that are opened; others are left out, some because they start programs (EPS)."""

T = TypeVar("T")

_pil_limit = threading.Lock()


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Open an image of up to `max_pixels`, which may be more than PIL's own limit.

    PIL has one limit for the whole process: it is raised only while such an image is opened, and then put back.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if data[4:8] != b"ftyp" or data[8:12] not in HEIF_BRANDS:
            raise
        return _open_heif(data)
    except Image.DecompressionBombError:
        pass
    with _pil_limit:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max(max_pixels, before or 0)
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _open_heif(data: bytes) -> Image.Image:
    """Open a HEIC image by PIL's plugin for it."""
    try:
        plugin = importlib.import_module(HEIF_PLUGIN)
    except ImportError as err:
        raise BadImage("HEIC is read by a plugin that is not installed: pip install 'mlfusion[heic]'") from err
    plugin.register_heif_opener()
    return Image.open(io.BytesIO(data), formats=("HEIF",))


def is_16_bit_grey(image: Image.Image) -> bool:
    """Whether an open image is grey with 16 bits; PIL reads some such PNG and PGM files as 32-bit integers."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _is_16_bit_colour(image: Image.Image) -> bool:
    """Whether an open image has colours of 16 bits, of which PIL reads the high byte."""
    return (
        image.mode not in ("I", "F")
        and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        and (not is_16_bit_grey(image))
    )


@lru_cache(maxsize=4)
def _levels(window: tuple[int, int]) -> np.ndarray:
    """[65536] uint8: the level of each value, linear in the window, rounded (a half up) and clipped."""
    low, high = window
    return np.clip((2 * 255 * (np.arange(65536) - low) + high - low) // (2 * (high - low)), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Decoder:
    """Encoded bytes → RGB image; of an animation, the first frame.

    * The size is checked before anything is decoded; an image of more than `max_pixels` is refused.
    * Of 16-bit grey, `window` says which values become 0 and 255. Without it the high byte is used, as PIL does for 16-bit
      colour; PIL's own conversion would make all above 255 white.
    * Integers and floats of 32 bits are refused: nothing says which value is white.
    * The EXIF orientation is ignored, as in the study and in the hub's image processors, unless `exif_transpose` is set.

    Transparency is dropped, CMYK, palettes and grey are converted as PIL does.
    """

    exif_transpose: bool = False
    max_pixels: int = MAX_PIXELS
    window: tuple[int, int] | None = None

    def __call__(self, data: bytes) -> Image.Image:
        """Decode one image; raises BadImage, which gives the reason, if they are not a readable image."""
        return self._opened(data, self._rgb)

    def bits(self, data: bytes) -> int:
        """Bits of a value, 8 or 16, by the file's header alone; BadImage as for decoding."""
        return self._opened(data, lambda image: 16 if is_16_bit_grey(image) or _is_16_bit_colour(image) else 8)

    def values(self, data: bytes) -> tuple[np.ndarray, int]:
        """An image's values before a window is applied, and their bits: 16-bit grey, else RGB; BadImage as for decoding."""

        def read(image: Image.Image) -> tuple[np.ndarray, int]:
            if is_16_bit_grey(image):
                room.take(room.PIXEL_BYTES * image.width * image.height)
                return np.asarray(image).astype(np.uint16), 16
            deep = _is_16_bit_colour(image)
            pixels = np.asarray(replace(self, window=None)._rgb(image))
            return (pixels.astype(np.uint16) * 257, 16) if deep else (pixels, 8)

        return self._opened(data, read)

    def converted(self, image: Image.Image) -> Image.Image:
        """The RGB image of one that is open already, as of its file; raises BadImage, which gives the reason, if it is none."""
        with self._reasons():
            return self._sized(image, self._rgb)

    def _opened(self, data: bytes, read: Callable[[Image.Image], T]) -> T:
        if not data:
            raise BadImage("the file is empty")
        with self._reasons(), _open(data, self.max_pixels) as image:
            return self._sized(image, read)

    def _sized(self, image: Image.Image, read: Callable[[Image.Image], T]) -> T:
        """Read an image whose size is allowed; it is known before anything is decoded."""
        if (pixels := image.width * image.height) > self.max_pixels:
            raise BadImage(self._too_large(f"{image.width:,} x {image.height:,} = {pixels:,}"))
        if not pixels:
            raise BadImage("it has no pixels")
        return read(image)

    @contextmanager
    def _reasons(self) -> Iterator[None]:
        """Whatever PIL raises on an image becomes a BadImage with the reason."""
        try:
            yield
        except (BadImage, MemoryError):
            raise
        except UnidentifiedImageError as err:
            raise BadImage("not an image") from err
        except Image.DecompressionBombError as err:
            raise BadImage(self._too_large(f"{int(re.findall(r'[0-9]+', str(err))[0]):,}")) from err
        except Exception as err:
            raise BadImage(str(err) or type(err).__name__) from err

    def _too_large(self, pixels: str) -> str:
        return f"{pixels} pixels; allowed are {self.max_pixels:,}: raise --max-pixels if you trust where it is from"

    def _rgb(self, image: Image.Image) -> Image.Image:
        room.take(room.PIXEL_BYTES * image.width * image.height)
        is_16_bit = is_16_bit_grey(image)
        if self.window and _is_16_bit_colour(image):
            raise BadImage("16-bit colour, to which --window does not apply; save it as 16-bit grey, or with 8 bits")
        if image.mode in ("I", "F") and not is_16_bit:
            raise BadImage("32-bit pixels, of which nothing says what is white; save it with 8 or 16 bits")
        if self.exif_transpose:
            image = ImageOps.exif_transpose(image)
        if is_16_bit:
            values = np.asarray(image).astype(np.uint16)
            image = Image.fromarray(_levels(self.window)[values] if self.window else (values >> 8).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours, without PIL's warning
        return image.convert("RGB")
