"""Which files count as pictures, links in tars, pictures of 16 bits, long thin pictures: nothing is lost without a word."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from forms import put, rows
from PIL import Image
from tiny import save_images, save_model

from mlfusion import cli, datasets
from mlfusion.datasets import Decoder, ReadOptions
from mlfusion.datasets.images import FORMATS, HEIF_SUFFIXES
from mlfusion.errors import BadData, BadImage
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
