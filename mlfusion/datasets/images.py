"""From an image's bytes to its picture: a function of the bytes and of two settings alone, the same in every process.

What PIL does with a file is what happens, with four exceptions, each where PIL would be wrong without a word or would run
what it should not: see `Decoder`.
"""

import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mlfusion.errors import BadImage

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
"""Of files in a folder that are taken for images."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
"""That are opened; others of PIL's are left out, some because they start programs of their own (EPS)."""

MAX_PIXELS = 2 * 89_478_485
"""Width x height beyond which PIL refuses an image as a decompression bomb, and so do we unless told otherwise."""


@dataclass(frozen=True)
class Decoder:
    """Encoded bytes → the picture in RGB, of the first frame where there are several.

    * Sizes are looked at before anything is decoded; an image of more than `max_pixels` is refused.
    * 16-bit grey keeps its high byte, as PIL itself reads 16-bit colour; PIL's conversion would turn all above 255 white.
    * Integers and floats of 32 bits have no range that would say what is white, and are refused.
    * An orientation in the EXIF is left alone, as in the study and in the hub's image processors, unless `upright`.

    Transparency is dropped, CMYK, palettes and grey are converted as PIL does.
    """

    upright: bool = False
    max_pixels: int = MAX_PIXELS

    def __call__(self, data: bytes) -> Image.Image:
        """The picture.

        Raises:
            BadImage: why there is none.
        """
        if not data:
            raise BadImage("the file is empty")
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = self.max_pixels  # PIL refuses more than twice its own; somebody asked for that
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if (pixels := image.width * image.height) > self.max_pixels:
                    raise BadImage(self._too_large(f"{image.width:,} x {image.height:,} = {pixels:,}"))
                return self._rgb(image)
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
        # A PNG or PGM that is read as 32-bit integers holds 16 of them.
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        if image.mode in ("I", "F") and not deep:
            raise BadImage("32-bit pixels, of which nothing says what is white; save it with 8 or 16 bits")
        if self.upright:
            image = ImageOps.exif_transpose(image)
        if deep:
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours, without PIL's warning
        return image.convert("RGB")
