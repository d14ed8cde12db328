"""Pictures as the model is given them: to the bit those of transformers' processors in their PIL form, from our own reading."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import noise_images, save_model

from mlfusion import models
from mlfusion.errors import BadModel, BadOption
from mlfusion.models import preprocessing
from mlfusion.models.backbone import Backbone
from mlfusion.models.preprocessing import Steps, TransformersProcessor
from mlfusion.models.preprocessing.steps import _decode_jpeg, resize_mark
from mlfusion.specs.identity import AS_STORED, Decoding
from mlfusion.specs.options import PREPARATIONS, FeatureOptions

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
    "clip, a number that is square": ("CLIPImageProcessor", {"size": 40, "crop_size": 32, "default_to_square": True}),
    "clip, no number": ("CLIPImageProcessor", {"default_to_square": True}),
    "deit, a number that is the shortest edge": ("DeiTImageProcessor", {"size": 240, "default_to_square": False}),
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
    photos = [Image.open(path).convert("RGB") for path in sorted((shared / "dtd10" / "test").glob("*/*.jpg"))[::9]]
    np.testing.assert_array_equal(
        preprocessing.read(folder)(photos), oracle(photos, return_tensors="np")["pixel_values"]
    )


def test_a_processor_with_rules_of_its_own_is_borrowed(tmp_path):
    settings = {"size": {"longest_edge": 48}, "pad_size": {"height": 48, "width": 48}}
    folder = processor_folder(tmp_path / "m", "SamImageProcessor", settings)
    found = preprocessing.read(folder)
    oracle = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert isinstance(found, TransformersProcessor)
    assert found.pixels == (48, 48)
    for image in images():
        np.testing.assert_array_equal(found([image]), oracle(images=[image], return_tensors="np")["pixel_values"])
    assert json.loads(found.key())["size"] == {"longest_edge": 48}


@pytest.mark.parametrize(
    "case",
    [
        ("ConvNextImageProcessor", {"size": 225, "do_center_crop": True, "crop_size": {"height": 30, "width": 301}}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 40, "longest_edge": 60}, "crop_size": 32}),
    ],
    ids=["two crops", "a limited longer edge"],
)
def test_a_processor_of_common_name_and_rare_settings_is_borrowed(case, tmp_path):
    folder = processor_folder(tmp_path / "m", *case)
    found = preprocessing.read(folder)
    oracle = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert isinstance(found, TransformersProcessor)
    for image in images():
        np.testing.assert_array_equal(found([image]), oracle(images=[image], return_tensors="np")["pixel_values"])


def test_a_borrowed_processor_that_gives_pictures_of_every_shape_is_refused(tmp_path):
    settings = {"size": {"shortest_edge": 40, "longest_edge": 60}, "do_center_crop": False}
    with pytest.raises(BadModel, match="every shape"):
        preprocessing.read(processor_folder(tmp_path / "m", "CLIPImageProcessor", settings))


def test_a_borrowed_processor_that_divides_by_zero_is_refused(tmp_path):
    square = {"height": 48, "width": 48}
    settings = {"size": {"longest_edge": 48}, "pad_size": square, "image_std": [0.5, 0, 0.5]}
    with pytest.raises(BadModel, match=r"cannot prepare a picture .*divide by zero"):
        preprocessing.read(processor_folder(tmp_path / "m", "SamImageProcessor", settings))


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
    with pytest.raises(BadOption, match="--preprocess papre: allowed are exact, fast, paper"):
        FeatureOptions(preprocess="papre")


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


# --- the fast path -----------------------------------------------------------------------------------------------------


def photo_files(shared: Path, count: int) -> list[bytes]:
    """Real JPEGs, large, small and grey."""
    paths = sorted((shared / "dtd10" / "train").glob("*/*.jpg"))[:: 240 // count]
    paths += sorted((shared / "flowers5" / "test").glob("*/*.jpg"))[::40]
    large = sorted((shared / "sign_digits").rglob("*.*"), key=lambda path: path.stat().st_size)[-2:]
    return [path.read_bytes() for path in [*paths, *large]]


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_the_fast_path_is_a_level_away_from_the_exact_one(shared):
    """On photographs at most one level of 255, and in few pixels; where a large one is decoded at a share, a few more."""
    folder = shared / "weights" / "deit_tiny_patch16_224"
    exact, fast = preprocessing.read(folder), preprocessing.read(folder, "fast")
    for data in photo_files(shared, 12):
        image = opened(data)
        want = exact.picture(image).astype(int)
        found = fast.from_jpeg(data)
        assert found is not None
        assert found.dtype == np.uint8
        apart = np.abs(found - want)
        reduced = min(image.size) >= 2 * 2 * 256
        assert apart.max() <= (12 if reduced else 1)
        assert apart.mean() < (0.5 if reduced else 0.01)
        if not reduced:
            np.testing.assert_array_equal(
                fast.picture(image), found
            )  # what is no JPEG goes the same way behind the decoding


BOUND = 2e-5
"""Of 1 - cosine between features of the fast and of the exact path, DeiT-Ti, any layer, CLS and AP, photographs of the size
that data sets have. Large ones, decoded at a share: a hundred times it. docs/measurements/speed.md has what was measured, by
layer."""


@pytest.mark.slow
def test_the_fast_paths_features_stay_within_the_bound(shared):
    folder = shared / "weights" / "deit_tiny_patch16_224"
    backbone = Backbone(models.locate(str(folder)))
    exact, fast = preprocessing.read(folder), preprocessing.read(folder, "fast")
    files = photo_files(shared, 8)
    pairs = [(layer, kind) for layer in range(1, 13) for kind in ("cls", "ap")]
    one = backbone(exact([opened(data) for data in files]), pairs)
    other = backbone(fast.finish(torch.stack([torch.from_numpy(fast.from_jpeg(data)) for data in files])), pairs)
    large = torch.tensor([min(opened(data).size) > 1000 for data in files])
    assert large.any() and not large.all()
    for pair in pairs:
        apart = 1 - torch.cosine_similarity(one[pair].double(), other[pair].double(), dim=-1)[:, 0]
        assert apart[~large].max() < BOUND, pair
        assert apart[large].max() < 100 * BOUND, pair


def test_without_simplejpeg_the_bytes_are_the_same(shared, monkeypatch):
    pytest.importorskip("simplejpeg")
    fast = preprocessing.read(shared / "weights" / "deit_tiny_patch16_224", "fast")
    files = photo_files(shared, 6)
    want = [fast.from_jpeg(data) for data in files]
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # importing it fails
    for data, pixels in zip(files, want, strict=True):
        np.testing.assert_array_equal(fast.from_jpeg(data), pixels)


def test_what_the_fast_path_cannot_judge_is_left_to_pil(tmp_path):
    fast = preprocessing.read(processor_folder(tmp_path / "m", "ViTImageProcessor", {}), "fast")

    def saved(image: Image.Image, form: str) -> bytes:
        image.save(held := io.BytesIO(), form)
        return held.getvalue()

    [image, *_] = images()
    whole = saved(image, "JPEG")
    assert fast.from_jpeg(whole) is not None
    assert fast.from_jpeg(saved(image.convert("L"), "JPEG")) is not None
    for data in (saved(image.convert("CMYK"), "JPEG"), saved(image, "PNG"), whole[: len(whole) // 2], b"", b"\xff\xd8"):
        assert fast.from_jpeg(data) is None
    assert fast.from_jpeg(whole, max_pixels=50 * 44) is not None
    assert fast.from_jpeg(whole, max_pixels=50 * 44 - 1) is None


# --- views and sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["exact", "fast"])
def test_views_follow_from_seed_and_id_alone(word, tmp_path):
    folder = processor_folder(tmp_path / "m", "CLIPImageProcessor", {})
    image = images()[4]

    def seen(view: str, name: str = "a", seed: int = 0) -> np.ndarray:
        return preprocessing.read(folder, word, view=view, seed=seed).picture(image, name)

    plain = seen("plain")
    np.testing.assert_array_equal(seen("flip"), plain[:, :, ::-1])
    crops = [seen("crop1"), seen("crop2"), seen("crop1", "b"), seen("crop1", seed=1), plain]
    for number, one in enumerate(crops):
        assert one.shape == (3, 224, 224)
        assert not any(np.array_equal(one, other) for other in crops[number + 1 :])
    np.testing.assert_array_equal(seen("crop1"), crops[0])
    keys = {
        preprocessing.read(folder, word, view=view, seed=seed).key()
        for view, seed in [("plain", 0), ("flip", 0), ("crop1", 0), ("crop2", 0), ("crop1", 1)]
    }
    assert len(keys) == 5
    # The seed decides nothing in these two.
    assert preprocessing.read(folder, word, view="flip", seed=7).key() in keys


def test_crops_show_a_quarter_of_the_image_or_more_of_about_its_shape(tmp_path):
    steps = preprocessing.read(processor_folder(tmp_path / "m", "ViTImageProcessor", {}), view="crop3")
    found = [steps.region(300, 400, str(name)) for name in range(400)]
    looks = [region for region, _ in found if region is not None]
    assert len(looks) == 400
    for top, left, height, width in looks:
        assert 0 <= top <= 300 - height and 0 <= left <= 400 - width
        assert 0.24 < height * width / 120_000 <= 1
    shares = [height * width / 120_000 for _, _, height, width in looks]
    assert min(shares) < 0.3 and max(shares) > 0.9
    assert 150 < sum(mirrored for _, mirrored in found) < 250


def test_names_of_views_and_refusals(tmp_path):
    assert FeatureOptions(views="1").views == ("plain",)
    assert FeatureOptions(views="4").views == ("plain", "flip", "crop1", "crop2")
    folder = processor_folder(tmp_path / "m", "ViTImageProcessor", {})
    with pytest.raises(BadOption, match="no view named 'crop0'"):
        FeatureOptions(views="crop0")
    with pytest.raises(BadModel, match="--size 0"):
        preprocessing.read(folder, size=0)
    square = {"height": 48, "width": 48}
    sam = processor_folder(tmp_path / "sam", "SamImageProcessor", {"size": {"longest_edge": 48}, "pad_size": square})
    with pytest.raises(BadModel, match="rules of its own"):
        preprocessing.read(sam, "fast")
    torn = processor_folder(tmp_path / "torn", "SamImageProcessor", {"size": {"longest_edge": 64}, "pad_size": square})
    with pytest.raises(BadModel, match="whose sizes fit together"):
        preprocessing.read(torn)


@pytest.mark.parametrize(
    ("case", "size", "want"),
    [
        ("clip", 448, (448, (448, 448))),
        ("deit", 64, (80, (64, 64))),
        ("deit, old", 448, ((512, 512), (448, 448))),
        ("vit", 384, ((384, 384), None)),
    ],
)
def test_another_size_keeps_the_share_that_is_cut_off(case, size, want, tmp_path):
    steps = preprocessing.read(processor_folder(tmp_path / "m", *PROCESSORS[case]), size=size)
    assert (steps.size, steps.crop_size) == want
    assert steps.pixels == (size, size)


@pytest.mark.parametrize("size", [None, 48])
@pytest.mark.parametrize("view", ["plain", "flip", "crop2"])
@pytest.mark.parametrize("word", PREPARATIONS)
@pytest.mark.parametrize("family", ["vit", "clip", "dinov2"])
def test_steps_are_made_again_from_the_key_that_they_wrote(family, word, view, size, tmp_path):
    steps = preprocessing.read(save_model(family, tmp_path / "m"), word, size=size, view=view, seed=7)
    assert isinstance(steps, Steps)
    held = (
        replace(steps, seed=0) if view in ("plain", "flip") else steps
    )  # where nothing is drawn, the seed says nothing
    assert preprocessing.from_key(steps.key()) == (held, AS_STORED)
    assert preprocessing.from_key(steps.key(Decoding(exif_transpose=True))) == (held, Decoding(exif_transpose=True))
    assert steps.key(Decoding(exif_transpose=True)) != steps.key()


def test_what_is_left_out_of_the_steps_is_left_out_again():
    bare = preprocessing.Steps(size=None, crop_size=(8, 8), rescale_factor=None)
    assert preprocessing.from_key(bare.key()) == (bare, AS_STORED)


@pytest.mark.parametrize(
    "change",
    [
        {"spare": 9},
        {"kernel": "magic"},
        {"resample": "magic"},
        {"view": "crop0"},
        {"more": 1},
        {"size": "large"},
        {"size": []},
    ],
)
def test_no_steps_are_made_of_what_they_did_not_write(change, tmp_path):
    key = preprocessing.read(save_model("vit", tmp_path / "m"), "fast").key()
    assert preprocessing.from_key(json.dumps({**json.loads(key), **change}, sort_keys=True)) == (None, AS_STORED)
    for text in ("", "[]", "3", '{"do_resize": true}', key[:-1]):
        assert preprocessing.from_key(text) == (None, AS_STORED)


def test_positions_of_another_size_are_interpolated(tmp_path):
    """A ViT at twice its size: CLS before the blocks by hand, with its grid of positions resampled here by torch."""
    folder = save_model("vit", tmp_path / "vit")
    steps = preprocessing.read(folder, size=64)
    backbone = Backbone(models.locate(str(folder)), preprocessing=steps)
    assert backbone.kinds["all"] == 1 + 8 * 8
    pixels = steps(noise_images(2))
    found = backbone(pixels, [(0, "all")])[0, "all"]
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tables = model.embeddings.position_embeddings
    grid = tables[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(grid, (8, 8), mode="bicubic", align_corners=False).flatten(2).mT
    with torch.inference_mode():
        patches = model.embeddings.patch_embeddings.projection(pixels).flatten(2).mT
        cls = model.embeddings.cls_token.expand(2, -1, -1)
        x = torch.cat([cls, patches], 1) + torch.cat([tables[:, :1], larger], 1)
        block = model.layers[0]
        x = x + block.attention(block.layernorm_before(x))[0]
        torch.testing.assert_close(found, block.layernorm_after(x), atol=1e-5, rtol=0)


def test_naflex_pictures_are_the_square_that_its_patches_make(tmp_path):
    """Of a square picture its own processor keeps the shape: the same pixels, cut into patches."""
    folder = processor_folder(tmp_path / "m", "Siglip2ImageProcessor", {"patch_size": 8, "max_num_patches": 49})
    oracle = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    [square] = [Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 90, 3), np.uint8))]
    found = preprocessing.read(folder)([square])
    patches = oracle([square], return_tensors="pt")["pixel_values"][0]
    assert found.shape == (1, 3, 56, 56)
    cut = found[0].reshape(3, 7, 8, 7, 8).permute(1, 3, 2, 4, 0).reshape(49, -1)
    torch.testing.assert_close(cut, patches, atol=0, rtol=0)


def test_a_video_model_sees_a_picture_as_a_frame(tmp_path):
    """V-JEPA 2, whose processor cannot run here: the shortest edge is 256 / 224 of the crop, bilinear, ImageNet's colours."""
    (tmp_path / "config.json").write_text("{}")
    body = {
        "video_processor_type": "VJEPA2VideoProcessor",
        "crop_size": {"height": 56, "width": 56},
        "size": {"shortest_edge": 9},
    }
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(body))
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (128, 192, 3), np.uint8))
    found = preprocessing.read(tmp_path)([image])[0]
    resized = np.asarray(image.resize((96, 64), Image.Resampling.BILINEAR))[4:60, 20:76]
    want = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(found.permute(1, 2, 0), want, atol=1e-5)


def test_the_studys_recipe_for_timms_own_checkpoints(tmp_path):
    body = {"architecture": "vit_base_patch16_224", "pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.9}}
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    (tmp_path / "config.json").write_text(json.dumps({**body, "pretrained_cfg": {**body["pretrained_cfg"], **half}}))
    assert preprocessing.read(tmp_path, "paper") == preprocessing.read(tmp_path)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_both_decoders_give_the_same_bytes_at_every_scale_and_size(mode, progressive, monkeypatch):
    """Sizes that the scale does not divide, as most large photographs have; noise, which shows every difference."""
    simplejpeg = pytest.importorskip("simplejpeg")
    random = np.random.default_rng(0)
    for height, width in ((97, 203), (160, 128), (211, 96), (104, 333), (255, 257)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
        image.save(file := io.BytesIO(), "JPEG", quality=80, progressive=progressive)
        for scale in (1, 2, 4, 8):
            arguments = file.getvalue(), height, width, scale
            monkeypatch.setitem(sys.modules, "simplejpeg", simplejpeg)
            want = _decode_jpeg(*arguments)
            monkeypatch.setitem(sys.modules, "simplejpeg", None)  # importing it fails
            assert want.shape == (-(-height // scale), -(-width // scale), 3)
            np.testing.assert_array_equal(_decode_jpeg(*arguments), want)


def test_a_pillow_that_resizes_otherwise_has_keys_of_its_own(monkeypatch):
    """Rows first, as Pillow did before 13.0; the digest of the known picture is that of Pillow 10.4, 11.3 and 12.2."""
    steps, resize = Steps(size=8, crop_size=(8, 8)), Image.Image.resize
    here = steps.key()
    assert "resize" not in json.loads(here)
    resize_mark.cache_clear()
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda image, size, *how: resize(resize(image, (size[0], image.height), *how), size, *how),
    )
    there = steps.key()
    assert json.loads(there) == {**json.loads(here), "resize": "98e4a51a680cd4e7"}
    assert replace(steps, kernel="torch-uint8").key().find("resize") == -1  # torch resizes, whatever Pillow does
    assert (preprocessing.from_key(there)[0], preprocessing.from_key(here)[0]) == (steps, None)
    monkeypatch.undo()
    resize_mark.cache_clear()
    assert (preprocessing.from_key(there)[0], preprocessing.from_key(here)[0]) == (None, steps)
