"""Model folders from strangers: forged configurations, damaged weights and links get one sentence, or have no effect.

A folder that loads has the features that transformers computes from the same folder by itself.
"""

import copy
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from tiers import LONG, in_time
from torch import Tensor

from mlfusion import models
from mlfusion.errors import MlfusionError
from mlfusion.models import preprocessing
from mlfusion.models.backbone import Backbone

sys.path.append(str(Path(__file__).parents[1]))
import test_conversion as conversion
import zoo

NEAR = 1e-4  # largest difference of features: eager and fused attention add up in other orders
MEMORY = 4 << 30  # bytes of addresses that a trial may have
FAMILIES = ("ViT", "CLIP", "Swin", "DINOv2", "BEiT", "ResNet")
OTHERS: dict[str, Callable[[Path], Path]] = {
    "timm": lambda folder: conversion.write_timm(folder, conversion.timm(), "vit_base_patch16_224"),
    "open_clip": lambda folder: conversion.write_open_clip(folder, conversion.open_clip()),
}
NUMBERS = [None, True, False, 0, -1, 1, 3, 33, 2.5, 1e300, 10**9, 10**30, float("nan"), float("inf")]
TEXTS = ["", "x", "os.system", "gelu", "flash_attention_2", "../../x", "5" * 300]
WRONG = st.sampled_from([*NUMBERS, *TEXTS, [], [1], [1, 2], ["a", "b", "c"], [[1]], {}, {"a": 1}])
FIELDS = ["quantization_config", "_attn_implementation", "attn_implementation", "auto_map", "architectures", "dtype"]
FIELDS += [
    "vision_config",
    "text_config",
    "model_type",
    "rope_scaling",
    "num_labels",
    "id2label",
    "transformers_weights",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound folder of every form."""
    root = tmp_path_factory.mktemp("folders")
    found = {name: zoo.save(name, root / name) for name in FAMILIES}
    return found | {name: write(root / name) for name, write in OTHERS.items()}


@st.composite
def edits(draw: DrawFn) -> tuple[str, list[tuple[int, str, Any]]]:
    """A form, and what is changed: the number of a field, or its name if it is a further one, and its new value."""
    form = draw(st.sampled_from([*FAMILIES, *OTHERS]))
    field = st.tuples(st.integers(0, 10**6), st.sampled_from(["", "", *FIELDS]), WRONG)
    return form, draw(st.lists(field, min_size=1, max_size=2))


def forged(folder: Path, changes: list[tuple[int, str, Any]], to: Path) -> Path:
    """A copy of a folder with these changes in its configuration, at any depth."""
    shutil.copytree(folder, to)
    file = next(to / name for name in ("open_clip_config.json", "config.json") if (to / name).exists())
    body = json.loads(file.read_text())
    for number, further, value in changes:
        parts = [body, *(part for part in body.values() if isinstance(part, dict))]
        part = parts[number % len(parts)]
        part[further or sorted(part)[number % len(part)] if part else "x"] = copy.deepcopy(value)
    file.write_text(json.dumps(body))
    return to


def features(folder: Path, pixels: Tensor) -> Tensor:
    """The mean patch token of the last layer."""
    backbone = Backbone(models.locate(str(folder)))
    return backbone(pixels, [(backbone.depth, "ap")])[backbone.depth, "ap"][:, 0]


def by_transformers(form: str, folder: Path, pixels: Tensor) -> Tensor:
    """The same by transformers alone, which takes the kind of attention from the folder."""
    truth, file = zoo.ZOO[form], folder / "config.json"
    body = json.loads(file.read_text())
    for part in (body, *(part for part in body.values() if isinstance(part, dict))):
        for field in ("_attn_implementation", "attn_implementation"):
            part.pop(field, None)
    file.write_text(json.dumps(body))
    tokens = zoo.layers_by_hand(form, zoo.tower_of(form, folder), pixels)[-1]
    return tokens[:, truth.cls + truth.dist + truth.registers :].mean(1)


@contextmanager
def limited(more: int = MEMORY) -> Iterator[None]:
    """With an end to the memory, beside what the process has: a size from a forged file must not take the machine's."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.slow
@settings(max_examples=10_000 if LONG else 60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(edit=edits())
def test_a_forged_configuration_is_refused_in_one_sentence_or_gives_what_transformers_computes(
    edit: tuple[str, list[tuple[int, str, Any]]], folders: dict[str, Path], figures: dict[str, Any]
) -> None:
    if LONG and not in_time():
        return
    form, changes = edit
    count = figures.setdefault("folders", {}).setdefault(form, Counter())
    count["tried"] += 1
    side = zoo.ZOO[form].pixels if form in FAMILIES else conversion.PIXELS
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(5))
    with tempfile.TemporaryDirectory() as root, limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn of settings that they take
        folder = forged(folders[form], changes, Path(root).resolve() / "m")
        count["traceback"] += 1
        try:
            found: Tensor | str = features(folder, pixels)
        except MlfusionError as err:
            found = str(err)
        count["traceback"] -= 1
        if isinstance(found, str):
            assert "\n" not in found
            assert len(found) < 2000
            count["refused"] += 1
            return
        if form in FAMILIES:
            count["silently wrong"] += 1
            torch.testing.assert_close(found, by_transformers(form, folder, pixels).float(), atol=NEAR, rtol=NEAR)
            count["silently wrong"] -= 1
        count["right"] += 1


# --- weights ----------------------------------------------------------------------------------------------------------


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """A change of the header of a safetensors file."""

    def spoil(body: bytes) -> bytes:
        length = int.from_bytes(body[:8], "little")
        new = json.dumps(change(json.loads(body[8 : 8 + length]))).encode()
        return len(new).to_bytes(8, "little") + new + body[8 + length :]

    return spoil


def first(entry: dict[str, Any], **new: Any) -> dict[str, Any]:
    """A header whose first tensor has other fields."""
    name = next(key for key in entry if key != "__metadata__")
    return entry | {name: entry[name] | new}


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda body: body[: len(body) // 2],
    "cut in the header": lambda body: body[:40],
    "one byte longer": lambda body: body + b"\0",
    "a header without end": lambda body: (2**63).to_bytes(8, "little") + body[8:],
    "a header of nothing": lambda body: (2).to_bytes(8, "little") + b"{}" + body[-100:],
    "a list": header(lambda entry: list(entry)),
    "nested deep": lambda body: (200_000).to_bytes(8, "little") + b"[" * 200_000 + body,
    "tensors that overlap": header(lambda entry: first(entry, data_offsets=[0, 8])),
    "an unknown type": header(lambda entry: first(entry, dtype="F7")),
    "a shape of other sizes": header(lambda entry: first(entry, shape=[10**9, 10**9])),
    "a negative shape": header(lambda entry: first(entry, shape=[-1])),
    "offsets that are no numbers": header(lambda entry: first(entry, data_offsets=["a", "b"])),
    "not Unicode": lambda body: (4).to_bytes(8, "little") + b"\xff\xfe{}" + body[8:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_refused_in_one_sentence(damage: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["ViT"], tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(MlfusionError, match=r"model\.safetensors.*allowed: ") as refused:
        Backbone(models.locate(str(folder)))
    assert "\n" not in str(refused.value)


# --- links and special files ------------------------------------------------------------------------------------------


def out(file: Path) -> None:
    """A link to a file outside of the folder."""
    file.symlink_to(shutil.copy(file.with_suffix(".old"), file.parents[1] / f"outside of {file.name}"))


PLACED: dict[str, Callable[[Path], Any]] = {
    "a link out of the folder": out,
    "a link in a circle": lambda file: file.symlink_to(file),
    "a link to nothing": lambda file: file.symlink_to("nothing"),
    "a link to a folder": lambda file: file.symlink_to(file.parent),
    "a link to a device": lambda file: file.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("what", PLACED)
def test_what_is_no_file_of_the_folder_is_refused(
    what: str, name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """By its name, without waiting for a pipe, and without reading what lies outside."""
    folder = shutil.copytree(folders["ViT"], tmp_path / "m")
    (folder / name).rename((folder / name).with_suffix(".old"))
    PLACED[what](folder / name)
    with pytest.raises(MlfusionError, match="allowed: "):
        Backbone(models.locate(str(folder)))


def test_links_inside_the_folder_and_those_of_the_hubs_cache_are_followed(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """In the hub's cache a snapshot is links to blobs of its repository."""
    pixels = torch.randn(1, 3, zoo.ZOO["ViT"].pixels, zoo.ZOO["ViT"].pixels, generator=torch.Generator().manual_seed(5))
    plain = shutil.copytree(folders["ViT"], tmp_path / "plain")
    (plain / "model.safetensors").rename(plain / "real.data")
    (plain / "model.safetensors").symlink_to("real.data")
    hub = tmp_path / "models--a--b"
    shutil.copytree(folders["ViT"], hub / "blobs")
    (snapshot := hub / "snapshots" / "0123").mkdir(parents=True)
    for blob in (hub / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    want = features(folders["ViT"], pixels)
    for folder in (plain, snapshot):
        torch.testing.assert_close(features(folder, pixels), want, atol=0, rtol=0)


def test_the_kind_of_attention_is_never_the_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    """A configuration cannot ask for compiled code of another package, at any depth."""
    folder = shutil.copytree(folders["CLIP"], tmp_path / "m")
    body = json.loads((folder / "config.json").read_text())
    for part in (body, body["vision_config"]):
        part["_attn_implementation"] = part["attn_implementation"] = "kernels-community/vllm-flash-attn3"
    (folder / "config.json").write_text(json.dumps(body))
    config = models.configuration(models.locate(str(folder)))
    assert config._attn_implementation is None
    assert config.vision_config._attn_implementation is None
    assert Backbone(models.locate(str(folder))).depth == zoo.PLAIN["num_hidden_layers"]


@pytest.mark.parametrize("name", ["size", "crop_size"])
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "ViTImageProcessor", "PvtImageProcessor"])
def test_a_size_that_no_model_takes_is_refused_before_a_picture_is_made(
    kind: str, name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["ViT"], tmp_path / "m")
    small, large = {"height": 32, "width": 32}, {"height": 20_000, "width": 20_000}
    body = {"image_processor_type": kind, "size": small, "crop_size": small, "do_center_crop": True} | {name: large}
    (folder / "preprocessor_config.json").write_text(json.dumps(body))
    with limited(2 << 30), pytest.raises(MlfusionError, match=r"size .*20000.*allowed"):
        preprocessing.read(folder)
