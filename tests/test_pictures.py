"""Which files count as pictures, links in tars, pictures of 16 bits, long thin pictures: nothing is lost without a word."""

import io
import sys
import tarfile

import numpy as np
import pytest
from forms import put, rows
from PIL import Image
from tiny import save_images

from mlfusion import cli, datasets
from mlfusion.datasets import Decoder, ReadOptions
from mlfusion.datasets.images import FORMATS, HEIF_SUFFIXES
from mlfusion.errors import BadData, BadImage


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
