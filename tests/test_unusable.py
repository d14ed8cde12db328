"""Inputs that cannot be used are refused in one sentence, before a model is loaded or a probe trained."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from tiny import save_images, save_model

import mlfusion
from mlfusion import datasets, models
from mlfusion.errors import BadData, BadModel, UnknownName
from mlfusion.models import preprocessing
from mlfusion.workflows.doctor import doctor

# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_a_folder", [False, True], ids=["file", "class folder"])
def test_a_name_that_is_no_text_is_refused_when_the_data_set_is_opened(of_a_folder: bool, tmp_path: Path) -> None:
    root = save_images(tmp_path / "set", {"train": 4, "test": 2})
    old = next((root / "train").iterdir()) if of_a_folder else next((root / "train").rglob("*.png"))
    os.rename(os.fsencode(old), os.fsencode(old.parent) + b"/caf\xe9" + os.fsencode(old.suffix))
    with pytest.raises(BadData, match=r"caf\\udce9.*is no UTF-8.*Rename"):
        datasets.load(str(root))


def test_names_of_other_scripts_are_text(tmp_path: Path) -> None:
    root = save_images(tmp_path / "set", {"train": 4, "test": 2})
    old = next((root / "train").rglob("*.png"))
    old.rename(old.with_name("картина é 図.png"))
    assert any("картина é 図" in name for name in datasets.load(str(root)).split("train").ids)


@pytest.mark.parametrize("name", ["a b/c", "--x/y"])
def test_what_is_neither_a_path_nor_an_id_of_the_hub_is_an_unknown_name(name: str) -> None:
    with pytest.raises(UnknownName, match=f"no data set named '{name}'.*or a folder or file"):
        datasets.load(name)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_a_split_without_any_label_is_refused_when_the_data_set_is_opened() -> None:
    images, labels = np.zeros((6, 4, 4), np.uint8), np.array([[1, 0], [0, 1], [1, 1]] * 2)
    with pytest.raises(BadData, match="mine, split test: no image has a label"):
        datasets.array_dataset("mine", {"train": (images, labels), "test": (images, np.zeros_like(labels))})
    with pytest.raises(BadData, match="mine, split train: no image has a label"):
        datasets.array_dataset("mine", {"train": (images, [[]] * 6), "test": (images, [[]] * 6)}, target="labels")


# --- weights ----------------------------------------------------------------------------------------------------------


class Code:
    """Pickled, it is a call; where it is unpickled, a folder appears."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("TOUCHED",)


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _long(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Code()}, folder / "pytorch_model.bin")


def _no_tensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": "text"}, folder / "pytorch_model.bin")


DAMAGES = {
    _pointer: "is a Git LFS pointer and holds no weights; type `git lfs pull`",
    _short: "is damaged or cut short",
    _long: "is damaged or cut short",
    _empty: "is damaged or cut short",
    _pickle: "holds more than plain tensors and is not loaded",
    _no_tensors: "holds no tensors by name",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_weights_that_are_none_are_one_sentence(damage, tmp_path: Path) -> None:
    folder = save_model("vit", tmp_path / "model")
    images = save_images(tmp_path / "set", {"train": 4, "test": 2})
    damage(folder)
    with pytest.raises(BadModel, match=DAMAGES[damage]):
        mlfusion.extract(str(folder), str(images))
    [problem] = [finding for finding in doctor(str(folder)) if finding.check == "model"]
    assert problem.state == "problem" and DAMAGES[damage] in problem.description
    assert not Path("TOUCHED").exists()


def test_sound_weights_of_either_form_are_read(tmp_path: Path) -> None:
    folder = save_model("vit", tmp_path / "model")
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, pickled / "pytorch_model.bin")
    assert [file.name for file in models.weight_files(folder)] == ["model.safetensors"]
    assert [file.name for file in models.weight_files(pickled)] == ["pytorch_model.bin"]


# --- settings of a processor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_center_crop": True}, "'crop_size' is missing"),
        ({"do_center_crop": True, "crop_size": {"width": 8}}, "allowed are height and width"),
        ({"image_mean": "abc"}, "'abc' for colours: allowed are three numbers"),
        ({"image_mean": [0.5, 0.5]}, "image_mean .*: allowed are three finite numbers"),
        ({"image_std": 0}, "image_std .*: allowed are numbers other than 0"),
        ({"rescale_factor": 0}, "rescale_factor 0.0: allowed are finite numbers above 0"),
        ({"rescale_factor": "0.1"}, "rescale_factor '0.1': allowed are numbers"),
        ({"size": {"height": -1, "width": 4}}, "allowed are 1 pixel and more"),
        ({"size": 100_000}, "up to 16,777,216 in a picture"),
        ({"size": 7.5}, "allowed are whole numbers of pixels"),
        ({"size": [4, 5, 6]}, "cannot be used"),
        ({"resample": [2]}, "cannot be used"),
        ({"rescale_factor": []}, "cannot be used"),
    ],
)
def test_settings_that_say_too_little_are_one_sentence(settings: dict, message: str, tmp_path: Path) -> None:
    folder = save_model("vit", tmp_path / "model")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(BadModel, match=message):
        preprocessing.read(folder)
