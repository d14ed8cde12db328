"""A data set from a stranger reads nothing outside of its folder, waits for nothing, and damage is one sentence."""

import dataclasses
import hashlib
import io
import json
import os
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import xxhash
from forms import npy, parquet, plain, put, rows, tars
from PIL import Image
from tiny import save_features, save_images

from mlfusion import cli, datasets
from mlfusion.datasets import ReadOptions, arrays, hub, remote
from mlfusion.datasets import tars as tar_reader
from mlfusion.datasets.files import Files
from mlfusion.errors import BadData, CacheUnusable
from mlfusion.store import overlap
from mlfusion.system import room


def csv_files(root: Path) -> Path:
    """train.csv and test.csv beside their images."""
    plain(root)
    for split in ("train", "test"):
        paths = sorted(path.relative_to(root).as_posix() for path in (root / split).rglob("*.png"))
        (root / f"{split}.csv").write_text("path,label\n" + "".join(f"{one},{one.split('/')[1]}\n" for one in paths))
    return root


def npy_files(root: Path) -> Path:
    for split in ("train", "test"):
        np.save(root / f"{split}_images.npy", np.arange(4 * 36, dtype=np.uint8).reshape(4, 6, 6))
        np.save(root / f"{split}_labels.npy", np.array([0, 1, 0, 1]))
    return root


def tar_files(root: Path) -> Path:
    folder = tars(plain(root / "plain"), root)
    (folder / "classnames.txt").write_text("a\nb\nc\n")
    return folder


def parquet_files(root: Path) -> Path:
    return parquet(plain(root / "plain"), root)


def metadata(root: Path) -> Path:
    """train/metadata.csv, which is the hub's form."""
    folder = csv_files(root)
    for split in ("train", "test"):
        text = (folder / f"{split}.csv").read_text().replace(f"{split}/", "")
        (folder / f"{split}.csv").unlink()
        (folder / split / "metadata.csv").write_text(text)
    return folder


def one_image(path: Path) -> datasets.Split:
    """A file that the user names."""
    return datasets.Split(
        "images", (str(path),), np.zeros(1, np.int64), ("x",), Files("", (str(path),)), datasets.Decoder()
    )


Maker = Callable[[Path], Path]
MEMBERS: list[tuple[Maker, str]] = [
    (tar_files, "classnames.txt"),
    (tar_files, "train/000.tar"),
    (parquet_files, "train-00000-of-00001.parquet"),
    (npy_files, "train_images.npy"),
    (npy_files, "train_labels.npy"),
    (csv_files, "train.csv"),
    (csv_files, "train/red/000.png"),
    (metadata, "train"),
    (metadata, "train/metadata.csv"),
    (plain_folder := lambda root: save_images(root, {"train": 2, "test": 2}), "train/red/000.png"),
    (plain_folder, "train"),
]


def first_file(folder: Path, name: str) -> Path:
    """The member of this name; of tars and Parquet files, whichever the maker wrote first."""
    path = folder / name
    return path if path.exists() else next(iter(sorted(folder.rglob(f"*{path.suffix}"))))


def content(folder: Path) -> dict[str, list[tuple[str, str, bytes]]]:
    found = {name: rows(split) for name, split in datasets.load(str(folder)).splits.items()}
    assert all(found.values())
    return found


@pytest.mark.parametrize(("make", "name"), MEMBERS)
def test_a_link_that_leads_out_is_refused_by_name(make: Maker, name: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    folder = make(tmp_path / "set")
    member = first_file(folder, name)
    member.rename(tmp_path / "away")
    member.symlink_to(tmp_path / "away")
    with pytest.raises(BadData, match=rf"{member.name}.* leads out of"):
        content(folder)


@pytest.mark.parametrize(("make", "name"), [(make, name) for make, name in MEMBERS if "." in name])
def test_a_link_that_ends_inside_is_followed(make: Maker, name: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    folder = make(tmp_path / "set")
    before = content(folder)
    member = first_file(folder, name)
    (folder / ".files").mkdir()
    member.rename(folder / ".files" / "one")
    member.symlink_to(folder / ".files" / "one")
    assert content(folder) == before


@pytest.mark.parametrize(("make", "name"), [(make, name) for make, name in MEMBERS if "." in name])
def test_nobody_waits_for_a_pipe(make: Maker, name: str, tmp_path: Path) -> None:
    """It is refused by name, or no file of the data set, which then lacks it."""
    (tmp_path / "set").mkdir()
    folder = make(tmp_path / "set")
    member = first_file(folder, name)
    member.unlink()
    os.mkfifo(member)
    if name == "classnames.txt":
        assert datasets.load(str(folder)).classes != ("a", "b", "c")
        return
    with pytest.raises(BadData):
        content(folder)


def test_an_image_that_the_user_names_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name, sort in (("pipe.png", "a pipe"), ("zero.png", "a device")):
        with pytest.raises(BadData, match=rf"{name} is {sort}; allowed: a regular file"):
            one_image(tmp_path / name).image(0)


def test_a_card_names_no_other_files(tmp_path: Path) -> None:
    other = parquet_files(tmp_path)
    (folder := tmp_path / "set").mkdir()
    random = np.random.default_rng(0)
    table = {"image": [{"bytes": random.bytes(20)} for _ in range(4)], "label": ["a", "b", "a", "b"]}
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"{split}.parquet")
    listed = "".join(f"\n  - split: {name}\n    path: {other}/train*.parquet" for name in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:{listed}\n---\n")
    assert [body for _, _, body in content(folder)["train"]] == [cell["bytes"] for cell in table["image"]]


@pytest.mark.parametrize("file", ["/etc/passwd", "https://elsewhere.org/train.parquet", "../other/train.parquet"])
def test_a_card_on_the_hub_names_files_of_the_hub(file: str) -> None:
    hub._refuse_elsewhere(None, "birds")
    hub._refuse_elsewhere({"train": ["hf://datasets/someone/birds@main/a.parquet"]}, "birds")
    with pytest.raises(BadData, match=r"names the file .* which is not on the hub"):
        hub._refuse_elsewhere({"train": ["hf://datasets/someone/birds@main/a.parquet", file]}, "birds")


# --- sizes ------------------------------------------------------------------------------------------------------------


def holes(path: Path, nbytes: int) -> None:
    with open(path, "ab") as file:
        file.truncate(nbytes)


def test_an_image_of_holes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    holes(save_images(tmp_path, {"train": 2, "test": 2}) / "train/red/000.png", 40 << 30)
    train = datasets.load(str(tmp_path)).split("train")
    for read in (lambda: train.read_digests("set"), lambda: train.image(4)):
        with pytest.raises(BadData, match=r"red/000\.png has 42,949,672,960 bytes; allowed"):
            read()


def test_a_table_of_holes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = csv_files(tmp_path)
    holes(folder / "train.csv", 40 << 30)
    with pytest.raises(BadData, match=r"train\.csv has 42,949,672,960 bytes; allowed"):
        datasets.load(str(folder))


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar's header; a size that octal digits cannot hold is in base 256, as GNU tar writes it."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size % (1 << 96)).to_bytes(12, "big") if size < 0 else tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(body: bytes) -> bytes:
    return body + b"\0" * (-len(body) % 512)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("back", [-512, -1024, -1536, -(1 << 60), 1 << 40])
def test_offsets_in_a_tar_grow(back: int, streamed: bool, tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    sample = header("a.png", len(png.getvalue())) + padded(png.getvalue()) + header("a.cls", 1) + padded(b"0")
    path = tmp_path / "t.tar"
    path.write_bytes(sample + header("b.png", back) + b"\0" * 10240)
    with open(path, "rb") as file, pytest.raises(BadData, match=r"t\.tar cannot be read as a tar"):
        list(tar_reader.samples(file, str(path), hashed=streamed))


def test_a_label_is_no_larger_than_a_label(tmp_path: Path) -> None:
    """And a large file beside it, which is none, is read past."""
    for name, bodies in (("big", {"json": b" " * (5 << 20), "cls": b"0"}), ("bad", {"cls": b"0" * (5 << 20)})):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number in range(2):
                put(tar, f"s{number}.png", b"x")
                for kind, body in bodies.items():
                    put(tar, f"s{number}.{kind}", body if kind == "json" else body.replace(b"0", b"%d" % number))
    assert datasets.load(str(tmp_path / "big.tar")).split("train").classes == ("0", "1")
    with pytest.raises(BadData, match=r"label s0\.cls has 5,242,880 bytes; allowed: 4,194,304"):
        datasets.load(str(tmp_path / "bad.tar"))


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    """Its size is a number in its header alone."""
    (tmp_path / "t.tar").write_bytes(header("z.json", 512, tarfile.GNUTYPE_SPARSE) + b"\0" * 10752)
    with pytest.raises(BadData, match=r"z\.json is sparse"):
        datasets.load(str(tmp_path / "t.tar"))


def declared(shape: str) -> bytes:
    """A .npy file whose header says more than there is."""
    body = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + b"\0" * 16


SHAPES = ["(1000000000000,)", "(-4,)", "()", "(2, -1)", "(99999999999999999999999,)", "((((", "(5,)"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["npy", "npz", "tar"])
def test_an_array_is_no_larger_than_its_file(form: str, shape: str, tmp_path: Path) -> None:
    folder = npy_files(tmp_path)
    if form == "npz":
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("train_images.npy", (folder / "train_images.npy").read_bytes())
            archive.writestr("train_labels.npy", declared(shape))
        source = tmp_path / "a.npz"
    elif form == "tar":
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            put(tar, "s0.png", b"x")
            put(tar, "s0.npy", declared(shape))
        source = tmp_path / "t.tar"
    else:
        (folder / "train_labels.npy").write_bytes(declared(shape))
        source = folder
    with pytest.raises(BadData):
        datasets.load(str(source))


def test_packed_arrays_need_no_more_memory_than_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = np.zeros((2000, 32, 32), np.uint8), np.arange(2000) % 2
    np.savez_compressed(tmp_path / "a.npz", train_images=images, train_labels=labels)
    monkeypatch.setattr(arrays, "PACKED_BYTES", 1 << 20)
    assert datasets.load(str(tmp_path / "a.npz")).split("train").classes == ("0", "1")
    monkeypatch.setattr(room, "free_bytes", lambda: (tmp_path / "a.npz").stat().st_size * 2)
    with pytest.raises(
        BadData, match=r"unpacks to 0\.0 GB, and 0\.0 GB of memory are free; write the arrays with numpy\.save"
    ):
        datasets.load(str(tmp_path / "a.npz"))


# --- damage -----------------------------------------------------------------------------------------------------------


def test_damaged_parquet_is_refused_in_one_sentence_or_read_as_before(tmp_path: Path) -> None:
    folder = parquet_files(tmp_path)
    path = sorted(folder.glob("train*.parquet"))[0]
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = [b"", whole[: len(whole) // 2], whole[:-8] + b"\xff\xff\xff\x7f" + whole[-4:]]
    for _ in range(60):
        body = bytearray(whole)
        at = (
            int(random.integers(len(body))) if len(damaged) % 2 else -int(random.integers(9, 2000))
        )  # anywhere, or its end
        body[at] ^= 1 << int(random.integers(8))
        damaged.append(bytes(body))
    refused = 0
    for body in damaged:
        path.write_bytes(body)
        with suppress(BadData):
            content(folder)
            continue
        refused += 1
    assert 3 < refused < 60


def _encrypted(archive: bytes) -> bytes:
    """Every member's flag says that it is encrypted."""
    body = bytearray(archive)
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := body.find(mark, start + 1)) >= 0:
            body[start + at] |= 1
    return bytes(body)


def _unknown_packing(archive: bytes) -> bytes:
    body = bytearray(archive)
    for mark, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        start = -1
        while (start := body.find(mark, start + 1)) >= 0:
            body[start + at] = 77
    return bytes(body)


@pytest.mark.parametrize(
    "damage", [_encrypted, _unknown_packing, lambda body: body[:-30], lambda _: b"PK", lambda _: b""]
)
def test_damaged_archives_of_arrays_are_refused_in_one_sentence(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", train_images=np.zeros((2, 4, 4), np.uint8), train_labels=np.arange(2))
    (tmp_path / "a.npz").write_bytes(damage((tmp_path / "a.npz").read_bytes()))
    with pytest.raises(BadData, match=r"a\.npz cannot be read: .*allowed: arrays of numbers"):
        datasets.load(str(tmp_path / "a.npz"))


def test_what_is_nested_deep_is_one_sentence(tmp_path: Path) -> None:
    deep = "[" * 100_000
    (tmp_path / "t.jsonl").write_text(deep + "\n")
    with pytest.raises(BadData, match=r"t\.jsonl, line 1: not JSON"):
        datasets.load(str(tmp_path / "t.jsonl"))
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        put(tar, "s0.png", b"x")
        put(tar, "s0.json", deep.encode())
    with pytest.raises(BadData, match=r"the label s0\.json cannot be read"):
        datasets.load(str(tmp_path / "t.tar"), ReadOptions(label_column="json.a"))


def test_folders_inside_each_other_are_walked_without_recursion(tmp_path: Path) -> None:
    save_images(tmp_path, {"train": 2, "test": 2})
    deepest = tmp_path / "train" / "red" / "/".join("d" * 300)
    deepest.mkdir(parents=True)
    (tmp_path / "train/red/000.png").rename(deepest / "000.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(290)
    try:
        found = datasets.load(str(tmp_path))
    finally:
        sys.setrecursionlimit(limit)
    assert len(found.split("train")) == 6


def test_links_in_a_circle_are_refused_by_name(tmp_path: Path) -> None:
    save_images(tmp_path, {"train": 2, "test": 2})
    (tmp_path / "train/red/a.png").symlink_to(tmp_path / "train/red/b.png")
    (tmp_path / "train/red/b.png").symlink_to(tmp_path / "train/red/a.png")
    with pytest.raises(BadData, match=r"[ab]\.png is a link that leads nowhere"):
        datasets.load(str(tmp_path))


def test_a_damaged_index_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    index = tar_reader.Index(
        ["a", "b"], [0, 1], np.array([[0, 9], [9, 9]]), np.arange(64, dtype=np.uint8).reshape(2, 32)
    )
    made: list[int] = []

    def make() -> tar_reader.Index:
        made.append(1)
        return index

    def stored() -> tar_reader.Index:
        return remote._stored_index(tmp_path, "datasets/x@y/0.tar", "key", make)

    stored(), stored()
    assert len(made) == 1
    [file] = tmp_path.glob("*.npz")
    whole, random = file.read_bytes(), np.random.default_rng(0)
    again = 0
    for number in range(300):
        body = bytearray(whole)
        body[int(random.integers(len(body)))] ^= 1 << int(random.integers(8))
        file.write_bytes(bytes(body) if number % 3 else whole[: int(random.integers(len(whole)))])
        made.clear()
        found = stored()
        again += len(made)
        assert (found.keys, found.labels) == (index.keys, index.labels)
        np.testing.assert_array_equal(found.positions, index.positions)
        np.testing.assert_array_equal(found.digests, index.digests)
    assert again > 100
    made.clear()
    stored()
    assert not made


# --- memory -----------------------------------------------------------------------------------------------------------


def test_large_images_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight threads that each need a third of the room, one works at a time: a second would take more than half of it."""
    monkeypatch.setattr(room, "free_bytes", lambda: 3 * room.LARGE)
    at_once, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal at_once, most
        for _ in range(5):
            with room.one_image():
                room.take(room.LARGE)
                with lock:
                    at_once += 1
                    most = max(most, at_once)
                threading.Event().wait(0.001)
                with lock:
                    at_once -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 1
    assert room._total == 0


def test_a_command_has_no_warning_of_an_image_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_images(tmp_path / "d", {"train": 1, "test": 1})  # of 1,440 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(sys, "argv", ["mlfusion", "data", str(tmp_path / "d"), "--check", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    # A warning is an error here, and would make the image unreadable.
    assert all(one["checked"]["unreadable"] == {} for one in json.loads(capsys.readouterr().out)["splits"])


def test_an_image_larger_than_the_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not a bad image, which --skip-bad would leave out on this machine and not on a larger one."""
    Image.new("1", (3000, 2500)).save(tmp_path / "large.png")
    split = one_image(tmp_path / "large.png")
    assert split.image(0).size == (3000, 2500)
    monkeypatch.setattr(room, "free_bytes", lambda: 50 << 20)
    with pytest.raises(
        BadData, match=r"large\.png cannot be read: there is too little memory for it \(90 MB are needed, and 52"
    ):
        split.image(0)
    assert room._total == 0


def test_a_file_of_json_twice_nested_is_still_a_table(tmp_path: Path) -> None:
    save_images(tmp_path, {"train": 2})
    lines = [
        {"path": f"train/{c}/00{i}.png", "label": c, "more": {"a": [1, [2]]}} for c in ("blue", "red") for i in (0, 1)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert datasets.load(str(tmp_path / "t.jsonl")).split("train").classes == ("blue", "red")


def test_a_folder_that_may_not_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its images would be missing without a word."""
    save_images(tmp_path, {"train": 2, "test": 2})
    (private := tmp_path / "train" / "red" / "private").mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path) == str(private):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadData, match=r"private cannot be read: Permission denied"):
        datasets.load(str(tmp_path))


def test_npy_of_a_label_in_a_tar_is_a_vector(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for number in range(4):
            put(tar, f"s{number}.png", b"x")
            put(tar, f"s{number}.npy", npy(np.array([number % 2, 1 - number % 2])))
    assert datasets.load(str(tmp_path / "t.tar")).split("train").labels.tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]


# --- digests ----------------------------------------------------------------------------------------------------------


def test_images_are_identified_by_a_cryptographic_digest_and_former_entries_still_by_theirs(tmp_path: Path) -> None:
    save_images(tmp_path, {"train": 2, "test": 2})
    train = datasets.load(str(tmp_path)).split("train")
    bodies = [body for _, _, body in rows(train)]
    digests = train.read_digests("set")
    assert [each.tobytes() for each in digests] == [hashlib.sha256(body).digest() for body in bodies]
    former = np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, bodies)), np.uint8).reshape(-1, 16)
    for kind in (digests, former):
        assert train.has_digests(kind, "set")
        assert not train.has_digests(kind[::-1], "set")


def test_splits_of_two_sorts_of_digests_are_not_compared(tmp_path: Path) -> None:
    """Else no image of one would be found in the other, without a word."""
    labels, random = np.arange(12) % 3, np.random.default_rng(0)
    made = {
        split: save_features(tmp_path / split, split, random.normal(size=(12, 2, 4)), labels)
        for split in ("train", "test")
    }
    assert overlap.overlap(made["train"], made["test"]).bytes == 0
    samples = made["test"].samples
    wide = dataclasses.replace(samples, digests=np.tile(samples.digests, 2))
    made["test"].__dict__["samples"] = wide
    with pytest.raises(CacheUnusable, match=r"identify images by different digests.*extract both again"):
        overlap.overlap(made["train"], made["test"])
