"""Which files count as pictures, links in tars, pictures of 16 bits, long thin pictures: nothing is lost without a word."""

import io
import json
import math
import struct
import subprocess
import sys
import tarfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from forms import put, rows
from PIL import Image
from tiny import save_images, save_model

import mlfusion
from mlfusion import cli, datasets
from mlfusion.datasets import Decoder, ReadOptions
from mlfusion.datasets.arrays import encode_netpbm
from mlfusion.datasets.depth import measure_window
from mlfusion.datasets.images import FORMATS, HEIF_SUFFIXES
from mlfusion.errors import BadData, BadImage, BadOption
from mlfusion.models import preprocessing
from mlfusion.models.preprocessing import Steps, steps


def encoded(kind: int, seed: int, format: str = "PNG") -> bytes:
    """Noise about a colour of its kind."""
    random = np.random.default_rng([kind, seed])
    colour = np.array([[210, 60, 60], [60, 210, 60], [60, 60, 210]][kind % 3])
    pixels = np.clip(colour + random.normal(0, 40, (36, 40, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), format)
    return file.getvalue()


def run(*words: str) -> int:
    """`mlfusion WORDS` in this process; its exit status."""
    sys.argv = ["mlfusion", *words]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


# --- suffixes --------------------------------------------------------------------------------------------------------


def test_every_suffix_of_the_opened_formats_is_an_image():
    """PIL's own registry is the second list; .pfm holds floats, which are refused, and MPO is JPEG with more behind it."""
    registered = {name for name, format in Image.registered_extensions().items() if format in (*FORMATS, "MPO")}
    assert registered - {".pfm"} == datasets.SUFFIXES - HEIF_SUFFIXES
    assert "EPS" not in FORMATS


FORMAT_OF = {".avif": "AVIF", ".jfif": "JPEG", ".jpe": "JPEG", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".pnm": "PPM"}


def test_class_folders_and_tars_take_images_of_every_suffix(tmp_path):
    bodies = {suffix: encoded(0, n, format) for n, (suffix, format) in enumerate(FORMAT_OF.items())}
    save_images(tmp_path / "set", {"train": 2, "test": 1}, ["finch", "owl"])
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for n, (suffix, body) in enumerate(bodies.items()):
            (tmp_path / "set/train/finch" / f"x{suffix.upper()}").write_bytes(body)
            put(tar, f"{n}{suffix}", body)
            put(tar, f"{n}.cls", str(n % 2).encode())
    train = datasets.load(str(tmp_path / "set")).split("train")
    assert len(train) == 4 + len(bodies)
    assert {body for _, label, body in rows(train) if label == "finch"} >= set(bodies.values())
    tar = datasets.load(str(tmp_path / "t.tar")).split("train")
    assert [body for _, _, body in rows(tar)] == list(bodies.values())
    assert [tar.image(row).size for row in range(len(tar))] == [(40, 36)] * len(bodies)


def test_what_is_left_out_of_class_folders_is_counted_in_one_line(tmp_path, capfd, monkeypatch):
    save_images(tmp_path / "set", {"train": 2, "test": 1}, ["finch", "owl"])
    monkeypatch.setattr(datasets._files, "SUFFIXES", datasets.SUFFIXES - HEIF_SUFFIXES)  # as without the plugin
    for name in ("train/finch/a.heic", "train/owl/b.HEIC", "test/owl/notes.txt", "train/loose.png", "test/.hidden"):
        (tmp_path / "set" / name).write_bytes(b"x")
    for words in (["data"], ["extract", "--layers", "last", "--dataset"]):
        assert run(*words, str(tmp_path / "set")) == 0
        [line] = [line for line in capfd.readouterr().err.splitlines() if "not read" in line]
        assert "3 files are not read as images (2 .heic, 1 .txt)" in line
        assert "pip install" in line


def test_heic_is_read_by_its_plugin_or_refused_by_name(tmp_path):
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    with pytest.raises(BadImage, match=r"pip install 'mlfusion\[heic\]'|not an image"):
        Decoder()(head)
    plugin = pytest.importorskip("pillow_heif")
    pixels = np.asarray(Image.open(io.BytesIO(encoded(0, 1))))
    plugin.from_pillow(Image.fromarray(pixels)).save(tmp_path / "a.heic", quality=-1, chroma=444)
    assert np.abs(np.asarray(Decoder()((tmp_path / "a.heic").read_bytes()), int) - pixels).max() < 8


# --- links in tars ---------------------------------------------------------------------------------------------------


def link(tar: tarfile.TarFile, name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    tar.addfile(info)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_links_in_a_tar_are_the_files_that_they_lead_to(format, tmp_path):
    """As `tar` writes a folder whose equal files are hard links; every reading of the links is by tarfile itself."""
    with tarfile.open(tmp_path / "t.tar", "w", format=format) as tar:
        for n in range(4):
            put(tar, f"a/{n}.png", encoded(n % 2, n))
            put(tar, f"a/{n}.cls", str(n % 2).encode())
        for n, kind in ((4, tarfile.LNKTYPE), (5, tarfile.LNKTYPE), (6, tarfile.SYMTYPE)):
            for suffix in ("png", "cls"):
                target = f"{n - 4}.{suffix}" if kind == tarfile.SYMTYPE else f"a/{n - 4}.{suffix}"
                link(tar, f"a/{n}.{suffix}", target, kind)
        put(tar, "a/7.png", encoded(1, 7))
        link(tar, "a/7.cls", "a/5.cls")  # a link to a link
    split = datasets.load(str(tmp_path / "t.tar")).split("train")
    with tarfile.open(tmp_path / "t.tar") as tar:
        want = [
            (f"train/a/{n}", tar.extractfile(f"a/{n}.cls").read().decode(), tar.extractfile(f"a/{n}.png").read())
            for n in range(8)
        ]
    assert rows(split) == want


@pytest.mark.parametrize("target", ["elsewhere.png", "../1.png", "/etc/passwd", "late.png"])
def test_a_link_to_no_earlier_file_of_the_tar_is_refused_by_name(target, tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        put(tar, "0.png", encoded(0, 0))
        put(tar, "0.cls", b"0")
        link(tar, "1.png", target)
        put(tar, "1.cls", b"1")
        put(tar, "late.png", encoded(1, 1))
    with pytest.raises(BadData, match=r"t\.tar: 1\.png is a link to .*hard-dereference"):
        datasets.load(str(tmp_path / "t.tar"), ReadOptions(max_pixels=10**6))


# --- long thin pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", range(1, 6))
@pytest.mark.parametrize("shape", [(3000, 2), (2, 3000), (2500, 25), (25, 2500), (2001, 3)])
@pytest.mark.parametrize("size", [16, 40])
def test_the_crop_of_a_long_picture_is_the_processors_own_to_the_bit(resample, shape, size, tmp_path, monkeypatch):
    """Against transformers, which resizes all of it; here only the part that the crop shows is computed."""
    from transformers import AutoImageProcessor

    random = np.random.default_rng(size)
    crop = {"height": 31, "width": 24}
    body = {
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": True,
        "crop_size": crop,
        "resample": resample,
    }
    settings = {**body, "size": {"shortest_edge": size}, "do_normalize": False, "do_rescale": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    image = Image.fromarray(random.integers(0, 256, (*shape, 3), np.uint8))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    want = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]
    monkeypatch.setattr(steps, "MAX_RESIZED_PIXELS", 0)
    monkeypatch.setattr(Image.Image, "resize", _resize_below(Image.Image.resize, 2500 * 300))
    np.testing.assert_array_equal(preprocessing.read(tmp_path).picture(image), want)


def _resize_below(resize, limit):
    def limited(self, size, *args):
        assert size[0] * size[1] <= limit
        return resize(self, size, *args)

    return limited


@pytest.mark.long
def test_a_picture_of_one_column_is_read_in_little_memory(tmp_path):
    """Resized it would take 11.8 GB. The process may take 1 GB more than it has when everything is imported."""
    save_model("dinov2", tmp_path / "m")
    settings = json.loads((tmp_path / "m/preprocessor_config.json").read_text())
    (tmp_path / "m/preprocessor_config.json").write_text(json.dumps({**settings, "size": {"shortest_edge": 256}}))
    save_images(tmp_path / "set", {"train": 2, "test": 1})
    column = np.random.default_rng(0).integers(0, 256, (60000, 1, 3), np.uint8)
    Image.fromarray(column).save(tmp_path / "set/train/red/tall.png")
    code = (
        "import resource, mlfusion, torch, transformers\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), -1))\n"
        "[one] = mlfusion.extract('m', 'set', splits='train', layers='last', workers=1, preprocess={!r}, skip_bad={})\n"
        "print(one.images_skipped, one.entry.unreadable())"
    )
    exact = subprocess.run([sys.executable, "-c", code.format("exact", False)], capture_output=True, text=True)
    assert exact.stdout.startswith("0 "), exact.stderr
    fast = subprocess.run([sys.executable, "-c", code.format("fast", True)], capture_output=True, text=True)
    assert "'train/red/tall.png'" in fast.stdout and "256 x 15,360,000 pixels; allowed are" in fast.stdout, fast.stderr


def test_a_long_picture_that_the_fast_path_cannot_prepare_is_refused_by_name():
    image = Image.new("RGB", (60000, 1))
    fast = Steps(size=256, crop_size=(32, 32), kernel="torch-uint8")
    with pytest.raises(
        BadImage, match=r"a\.png cannot be prepared: resized, it has 15,360,000 x 256 pixels; allowed are"
    ):
        fast.picture(image, "a.png")
    image.save(file := io.BytesIO(), "JPEG")
    with pytest.raises(BadImage, match=r"b\.jpg cannot be prepared"):
        fast.from_jpeg(file.getvalue(), "b.jpg")


# --- pictures of 16 bits ---------------------------------------------------------------------------------------------


def deep_pixels(count: int, top: int, seed: int = 0) -> np.ndarray:
    """[count, 12, 12] uint16 from 0 to `top`."""
    return np.random.default_rng(seed).integers(0, top + 1, (count, 12, 12)).astype(np.uint16)


def stretched(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """By exact fractions: the nearest of the levels 0 to 255, the upper one of two."""
    half = Fraction(1, 2)
    return np.vectorize(lambda v: min(255, max(0, math.floor(Fraction(int(v) - low) * 255 / (high - low) + half))))(
        values
    )


def sixteen_bits(root: Path, form: str, top: int) -> Path:
    """Train and test as arrays, PNG, TIFF or PGM in class folders; the test images go further than those of train."""
    parts = {"train": deep_pixels(8, top), "test": deep_pixels(4, 2 * top, seed=1)}
    if form == "npz":
        arrays = {f"{name}_images": images for name, images in parts.items()}
        np.savez(root / "set.npz", **arrays, **{f"{n}_labels": np.arange(len(i)) % 2 for n, i in parts.items()})
        return root / "set.npz"
    for name, images in parts.items():
        for n, image in enumerate(images):
            path = root / "set" / name / "ab"[n % 2] / f"{n}.{form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if form == "pgm":
                path.write_bytes(encode_netpbm(image))
            else:
                Image.fromarray(image).save(path)
    return root / "set"


@pytest.mark.parametrize("form", ["npz", "png", "tif", "pgm"])
def test_one_window_is_used_for_the_whole_data_set(form, tmp_path):
    place = str(sixteen_bits(tmp_path, form, 4095))
    for word, (low, high) in {"0,4095": (0, 4095), "100,300": (100, 300)}.items():
        data = datasets.load(place, ReadOptions(window=word))
        for split in data.splits.values():
            for row in range(len(split)):
                raw = np.asarray(Image.open(io.BytesIO(split.read(row)))).astype(int)
                np.testing.assert_array_equal(np.asarray(split.image(row))[..., 1], stretched(raw, low, high))
    plain = datasets.load(place).split("train")
    assert np.asarray(plain.image(0)).max() <= 15  # the high byte


@pytest.mark.parametrize("form", ["npz", "png"])
def test_auto_is_measured_on_train_alone_and_a_few_hot_pixels_do_not_decide(form, tmp_path):
    place = sixteen_bits(tmp_path, form, 1000)
    values = np.sort(np.concatenate([deep_pixels(8, 1000).ravel()]))
    data = datasets.load(str(place), ReadOptions(window="auto"))
    assert data.decoding.window
    low, high = data.decoding.window
    # At most a thousandth of the pixels is below, and above; one step further in it would be more.
    assert np.mean(values < low) <= 0.001 < np.mean(values <= low)
    assert np.mean(values > high) <= 0.001 < np.mean(values >= high)
    assert all(split.decode.window == (low, high) for split in data.splits.values())
    hot = deep_pixels(8, 1000)
    hot[0, 0, 0] = 65535
    one = datasets.array_dataset("hot", {"train": (hot, [0, 1] * 4)})
    assert measure_window(one.split("train"), "hot")[1] <= 1000


@pytest.mark.slow
def test_the_two_numbers_are_in_the_key_and_a_saved_probe_uses_them(tmp_path):
    place = str(sixteen_bits(tmp_path, "png", 1000))
    keys = {}
    for word in (None, "auto", "0,1000", "0,65535"):
        [one, _] = mlfusion.extract("formula-vit", place, layers="last", window=word)
        keys[word] = (one.entry.key, json.loads(one.entry.spec.model.preprocess).get("window"))
    assert len({key for key, _ in keys.values()}) == 4
    assert (keys[None][1], keys["0,1000"][1]) == (None, [0, 1000])
    low, high = keys["auto"][1]
    [by_hand, _] = mlfusion.extract("formula-vit", place, layers="last", window=f"{low},{high}")
    assert by_hand.entry.key == keys["auto"][0]
    cache = str(tmp_path / "other")
    mlfusion.extract("formula-vit", place, layers="last", window="auto", cache=cache)
    mlfusion.probe(place, probes="cls-last/knn", seeds=(0,), save=True, cache=cache)
    [card] = Path("results").rglob("card.json")
    assert json.loads(json.loads(card.read_text())["backbone"]["preparation"])["window"] == [low, high]
    picture = sorted(Path(place, "test").rglob("*.png"))[0]
    values = np.asarray(Image.open(picture)).astype(int)
    Image.fromarray(stretched(values, low, high).astype(np.uint8)).save(tmp_path / "eight.png")
    for one, other in zip(
        *(mlfusion.predict(card.parent, [str(path)])[0].top for path in (picture, tmp_path / "eight.png")), strict=True
    ):
        assert one == pytest.approx(other) or (one[0] == other[0] and one[1] == pytest.approx(other[1]))


@pytest.mark.parametrize("form", ["npz", "png"])
def test_check_and_extraction_tell_of_sixteen_bits(form, tmp_path, capfd):
    place = str(sixteen_bits(tmp_path, form, 255))
    assert run("data", place, "--check", "--json") == 0
    train, test = json.loads(capfd.readouterr().out)["splits"]
    assert (train["checked"]["bits"], train["checked"]["values"]) == (16, [0, 255])
    assert test["checked"]["values"][1] > 255
    assert run("data", place, "--check") == 0
    said = capfd.readouterr().out
    assert "16 bits, 0 … 255" in said and "values use 0.4 % of the range of 16 bits" in said
    assert run("extract", "--layers", "last", "--split", "train", "--dataset", place) == 0
    assert "images of 16 bits, of which the high byte is used" in capfd.readouterr().err
    assert run("extract", "--layers", "last", "--split", "train", "--window", "0,255", "--dataset", place) == 0
    assert "16 bits" not in capfd.readouterr().err


def test_what_a_window_cannot_do_is_said(tmp_path):
    for word in ("", "5", "9,3", "0,70000", "low,high"):
        with pytest.raises(BadOption, match="allowed are auto, and two whole numbers from 0 to 65535"):
            ReadOptions(window=word)
    save_images(tmp_path / "set", {"train": 2, "test": 1})
    with pytest.raises(BadData, match="no image of train is grey with 16 bits"):
        datasets.load("set", ReadOptions(window="auto"))
    colour = io.BytesIO()
    rows = b"".join(b"\0" + bytes([0, 9] * 3 * 4) for _ in range(4))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    colour.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)))
    colour.write(chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert np.asarray(Decoder()(colour.getvalue())).max() == 0
    assert Decoder().values(colour.getvalue())[1] == 16
    with pytest.raises(BadImage, match="16-bit colour, to which --window does not apply"):
        Decoder(window=(0, 255))(colour.getvalue())
