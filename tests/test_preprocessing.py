"""Pictures as the model is given them: to the bit those of transformers' processors in their PIL form, from our own reading."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mlfusion import preprocessing
from mlfusion.errors import BadModel, UnknownName
from mlfusion.preprocessing import Borrowed, Steps

SIZES = [(50, 44), (224, 224), (31, 200), (257, 131), (300, 225), (20, 20)]  # height, width; some smaller than the crop

# A processor's class and what its preprocessor_config.json says: today's words, old ones, and next to nothing.
PROCESSORS = {
    "clip": ("CLIPImageProcessor", {}),
    "clip, old": ("CLIPFeatureExtractor", {"size": 224, "crop_size": 224, "resample": 3}),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 256}, "image_mean": [0.485, 0.456, 0.406]}),
    "vit": ("ViTImageProcessor", {}),
    "vit, old": ("ViTFeatureExtractor", {"size": 30, "image_std": [0.2, 0.3, 0.4]}),
    "vit, wide": ("ViTImageProcessorFast", {"size": {"height": 20, "width": 50}, "resample": 0}),
    "mae": ("ViTFeatureExtractor", {"size": 224, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.2, 0.2, 0.2]}),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 56, "width": 56}, "resample": 2}),
    "deit": ("DeiTImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": 32}),
    "deit, old": ("DeiTFeatureExtractor", {"size": 256, "crop_size": 224}),
    "beit": ("BeitImageProcessor", {}),
    "beit, cropped": ("BeitFeatureExtractor", {"size": 256, "do_center_crop": True, "crop_size": 224}),
    "convnext": ("ConvNextImageProcessor", {"size": 224, "crop_pct": 0.875}),
    "convnext, squashed": ("ConvNextImageProcessor", {}),
    "bytes": ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
    "not normalised": ("ViTImageProcessor", {"do_normalize": False}),
    "doubled": ("ViTImageProcessor", {"rescale_factor": 1 / 127.5}),
    "odd factor": ("ViTImageProcessor", {"rescale_factor": 0.0031}),
    "as large as it is": ("CLIPImageProcessor", {"do_resize": False, "crop_size": 33}),
}


def processor_folder(root: Path, name: str, settings: dict) -> Path:
    root.mkdir(exist_ok=True)
    word = "image_processor_type" if "ImageProcessor" in name else "feature_extractor_type"
    (root / "preprocessor_config.json").write_text(json.dumps({word: name, **settings}))
    (root / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return root


def images() -> list[Image.Image]:
    random = np.random.default_rng(3)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)) for size in SIZES]


@pytest.mark.parametrize("case", PROCESSORS)
def test_every_bit_is_the_processors_own(case, tmp_path):
    folder = processor_folder(tmp_path / "m", *PROCESSORS[case])
    found = preprocessing.read(folder)
    oracle = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert isinstance(found, Steps)
    for image in images():
        want = np.asarray(oracle(images=[image], return_tensors="np")["pixel_values"], np.float32)
        np.testing.assert_array_equal(found([image]), want)
        assert want.shape[-2:] == found.pixels


def test_photographs_by_deit_to_the_bit(shared):
    folder = shared / "weights" / "deit_tiny_patch16_224"
    oracle = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    photos = [Image.open(path) for path in sorted((shared / "dtd10" / "test").glob("*/*.jpg"))[::9]]
    photos = [photo.convert("RGB") for photo in photos]
    np.testing.assert_array_equal(
        preprocessing.read(folder)(photos), oracle(photos, return_tensors="np")["pixel_values"]
    )


def test_a_processor_with_rules_of_its_own_is_borrowed(tmp_path):
    settings = {"size": {"longest_edge": 48}, "pad_size": {"height": 48, "width": 48}}
    folder = processor_folder(tmp_path / "m", "SamImageProcessor", settings)
    found = preprocessing.read(folder)
    oracle = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert isinstance(found, Borrowed)
    assert found.pixels == (48, 48)
    for image in images():
        np.testing.assert_array_equal(found([image]), oracle(images=[image], return_tensors="np")["pixel_values"])
    assert json.loads(found.key())["size"] == {"longest_edge": 48}


def test_dinov3_resizes_floats_as_torchvision_does(tmp_path):
    """Its processor needs torchvision, which calls this very function of torch; the order is its own: rescale, then resize."""
    folder = processor_folder(tmp_path / "m", "DINOv3ViTImageProcessorFast", {"size": {"height": 48, "width": 64}})
    found = preprocessing.read(folder)
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for image in images():
        scaled = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] * 0.00392156862745098
        resized = torch.nn.functional.interpolate(scaled, (48, 64), mode="bilinear", antialias=True)
        torch.testing.assert_close(found([image]), (resized - mean) / std, rtol=0, atol=0)


def torchvision_like(image: Image.Image, edge: int, resample: int, mean, std) -> np.ndarray:
    """torchvision's Resize(edge), CenterCrop(224), ToTensor, Normalize, from its documentation: crops round half to even."""
    width, height = image.size
    scaled = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
    image = image.resize(scaled, resample)
    left, top = (round((n - 224) / 2.0) for n in image.size)
    array = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / np.float32(255)
    return ((array - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)


CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("family", "edge", "resample", "colours"),
    [("clip", 224, 3, CLIP), ("vit", 248, 3, HALF), ("dinov2", 256, 2, IMAGENET), ("vit_mae", 256, 2, IMAGENET)],
)
def test_the_studys_recipes(family, edge, resample, colours, tmp_path):
    folder = processor_folder(tmp_path / "m", "ViTImageProcessor", {})
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    found = preprocessing.read(folder, "paper")
    for image in images():
        np.testing.assert_array_equal(found([image])[0], torchvision_like(image, edge, resample, *colours))
    assert found.key() != preprocessing.read(folder).key()


def test_a_family_that_the_study_has_not(tmp_path):
    folder = processor_folder(tmp_path / "m", "ViTImageProcessor", {})
    (folder / "config.json").write_text(json.dumps({"model_type": "swin"}))
    with pytest.raises(BadModel, match=r"no model of the family swin .*clip, clip_vision_model, vit, dinov2, vit_mae"):
        preprocessing.read(folder, "paper")
    with pytest.raises(UnknownName, match=r"no preprocessing named 'papre'.*paper"):
        preprocessing.read(folder, "papre")


def test_timms_configuration_is_read(tmp_path):
    config = {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base", "pretrained_cfg": config}))
    for image in images():
        np.testing.assert_array_equal(preprocessing.read(tmp_path)([image])[0], torchvision_like(image, 248, 3, *HALF))
    squashed = {**config, "crop_mode": "squash", "crop_pct": 1.0}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": squashed}))
    assert preprocessing.read(tmp_path).size == (224, 224)


def test_open_clips_configuration_is_read(tmp_path):
    body = {
        "model_cfg": {"vision_cfg": {"image_size": 224}},
        "preprocess_cfg": {"mean": CLIP[0], "std": CLIP[1], "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(body))
    for image in images():
        np.testing.assert_array_equal(preprocessing.read(tmp_path)([image])[0], torchvision_like(image, 224, 3, *CLIP))
    body["preprocess_cfg"]["resize_mode"] = "squash"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(body))
    assert preprocessing.read(tmp_path).size == (224, 224)


@pytest.mark.parametrize("settings", [{"do_center_crop": False}, {"do_center_crop": False, "do_resize": False}])
def test_pictures_of_every_shape_are_refused(settings, tmp_path):
    with pytest.raises(BadModel, match="every shape"):
        preprocessing.read(processor_folder(tmp_path / "m", "CLIPImageProcessor", settings))
