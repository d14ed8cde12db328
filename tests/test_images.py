"""What becomes of images that are not plain 8-bit RGB: as PIL has it, or refused by name; every file is made here."""

import io
import pickle
import warnings
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiers import examples

from mlfusion.datasets import Decoder
from mlfusion.errors import BadImage
from mlfusion.specs.identity import MAX_PIXELS

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOURS = np.stack([RAMP, RAMP[::-1], np.roll(RAMP, 3)], -1)


def saved(image: Image.Image, format: str, **options) -> bytes:
    image.save(file := io.BytesIO(), format, **options)
    return file.getvalue()


def read(data: bytes, **settings) -> np.ndarray:
    picture = Decoder(**settings)(data)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, -1)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF"])
def test_lossless_formats_give_the_pixels_that_were_saved(format):
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(read(saved(Image.fromarray(RAMP), format, **options)), grey(RAMP))
    if format != "GIF":
        np.testing.assert_array_equal(read(saved(Image.fromarray(COLOURS), format, **options)), COLOURS)


def test_sixteen_bits_keep_their_high_byte():
    deep = RAMP.astype(np.uint16) * 257  # the range of 16 bits, whose high byte is the 8-bit image
    for format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(read(saved(Image.fromarray(deep), format)), grey(RAMP))
    head = f"P5\n{deep.shape[1]} {deep.shape[0]}\n65535\n".encode()
    np.testing.assert_array_equal(read(head + deep.astype(">u2").tobytes()), grey(RAMP))
    # What PIL's own conversion makes of it, and why it is not used: all above 255 is white.
    clipped = np.asarray(Image.open(io.BytesIO(saved(Image.fromarray(deep), "PNG"))).convert("RGB"))
    assert (clipped[RAMP > 0] == 255).all()


@pytest.mark.parametrize("type", [np.float32, np.int32])
def test_thirty_two_bits_have_no_white(type):
    with pytest.raises(BadImage, match="nothing says what is white; save it with 8 or 16 bits"):
        read(saved(Image.fromarray(RAMP.astype(type)), "TIFF"))


def test_cmyk_is_converted_as_pil_does():
    cmyk = Image.fromarray(np.concatenate([COLOURS, RAMP[..., None]], -1), "CMYK")
    np.testing.assert_array_equal(read(saved(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB")))
    jpeg = saved(cmyk, "JPEG", quality=100)
    np.testing.assert_array_equal(read(jpeg), np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))


def test_transparency_is_dropped_without_a_warning():
    palette = Image.fromarray(COLOURS).quantize(16)
    data = saved(palette, "PNG", transparency=bytes(range(0, 256, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read(data), np.asarray(palette.convert("RGB")))
    clear = Image.fromarray(np.concatenate([COLOURS, np.zeros_like(RAMP)[..., None]], -1), "RGBA")
    np.testing.assert_array_equal(read(saved(clear, "PNG")), COLOURS)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_several(format):
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    np.testing.assert_array_equal(read(data), grey(RAMP))


def test_exif_turns_an_image_only_where_that_is_asked_for():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to the right to see it upright
    data = saved(Image.fromarray(COLOURS), "PNG", exif=exif)
    np.testing.assert_array_equal(read(data), COLOURS)
    np.testing.assert_array_equal(read(data, exif_transpose=True), np.rot90(COLOURS, -1))
    plain = saved(Image.fromarray(COLOURS), "PNG")
    np.testing.assert_array_equal(read(plain, exif_transpose=True), COLOURS)


def test_one_pixel_is_an_image():
    assert read(saved(Image.new("L", (1, 1), 77), "PNG")).tolist() == [[[77, 77, 77]]]


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    bomb = saved(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadImage, match=r"400,000,000 pixels; allowed are 178,956,970: raise --max-pixels"):
        read(bomb)


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_the_limit_on_pixels_is_the_users(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # PIL refuses twice that, as it does 400 million
    data = saved(Image.new("L", (10, 10), 9), "PNG")
    with pytest.raises(BadImage, match=r"10 x 10 = 100 pixels; allowed are 99: raise --max-pixels"):
        read(data, max_pixels=99)
    assert read(data, max_pixels=100).shape == (10, 10, 3)
    assert MAX_PIXELS == 2 * 89_478_485  # PIL's own


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # PIL would start Ghostscript
        (saved(Image.fromarray(COLOURS), "PNG")[:60], "."),
        (saved(Image.effect_noise((64, 64), 90), "JPEG")[:900], "truncated"),
    ],
)
def test_what_is_no_image_is_refused(data, why):
    with pytest.raises(BadImage, match=why):
        read(data)


WHOLE = [
    saved(Image.fromarray(COLOURS), "PNG"),
    saved(Image.fromarray(COLOURS), "JPEG"),
    saved(Image.fromarray(COLOURS), "WEBP"),
    saved(Image.fromarray(RAMP), "GIF"),
    saved(Image.fromarray(COLOURS), "TIFF", compression="tiff_lzw"),
    saved(Image.fromarray(COLOURS), "BMP"),
]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of PIL, about the damage
@settings(max_examples=examples(300), deadline=None)
@given(st.data())
def test_whatever_bytes_change_it_is_an_image_or_refused(data):
    """Never another exception: that would stop an extraction that was told to skip bad images."""
    broken = bytearray(data.draw(st.sampled_from(WHOLE)))
    for at in data.draw(st.lists(st.integers(0, len(broken) - 1), min_size=1, max_size=8)):
        broken[at] = data.draw(st.integers(0, 255))
    with suppress(BadImage):
        assert Decoder(max_pixels=10**6)(bytes(broken[: data.draw(st.integers(0, len(broken)))])).mode == "RGB"


def test_a_decoder_travels_to_other_processes():
    decoder = Decoder(exif_transpose=True, max_pixels=12)
    assert pickle.loads(pickle.dumps(decoder)) == decoder
