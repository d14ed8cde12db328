"""Where the patches are: rows and columns of maps, at every size of picture, and special tokens, at every block."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from zoo import PLAIN, ZOO, given, shaken

from mlfusion import models
from mlfusion.errors import BadModel
from mlfusion.models import Shape
from mlfusion.models.backbone import Anatomy, Backbone, dissect
from mlfusion.models.backbone.loading import forward_arguments
from mlfusion.models.backbone.patches import grid_of
from mlfusion.models.backbone.taps import Reducer

NEAR = 1e-5


def dissected(model: nn.Module, patch_px: int | None, depth: int, pixels: Tensor) -> Anatomy:
    arguments = partial(forward_arguments, model, patch_px)
    return dissect(model, arguments, tuple(pixels.shape[1:]), shape=Shape(depth, 32, patch_px), name="m")


def last_layer(model: nn.Module, anatomy: Anatomy, patch_px: int | None, pixels: Tensor, kind: str) -> Tensor:
    """Tokens of a kind at the last layer's place, as the model runs."""
    tap, read = anatomy.taps["norm2"][anatomy.depth], []
    with tap.hook(read.append, "m"):
        model(**forward_arguments(model, patch_px, pixels))
    return Reducer(tap)(tap.sequence(read[0]), kind)


def sizes(low: int, high: int, step: int = 1) -> list[tuple[int, int]]:
    return [(height, width) for height in range(low, high, step) for width in range(low, high, step)]


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**{**PLAIN, "num_hidden_layers": 1}), add_pooling_layer=False)


def dinov2() -> nn.Module:
    small = {**PLAIN, "num_hidden_layers": 1, "patch_size": 7, "image_size": 28, "num_register_tokens": 2}
    del small["intermediate_size"]
    return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**small, mlp_ratio=1))


def radio() -> nn.Module:
    """Its patches are cut by a reshape: no convolution tells their rows."""
    small = {**PLAIN, "num_hidden_layers": 1, "num_cls_tokens": 3, "num_registers": 5, "mlp_ratio": 1.0}
    del small["intermediate_size"]
    return transformers.RadioModel(transformers.RadioConfig(**small))


def swin() -> nn.Module:
    small = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "image_size": 32, "patch_size": 4, "window_size": 2}
    return transformers.SwinModel(transformers.SwinConfig(**small))


def segformer() -> nn.Module:
    small = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    return transformers.SegformerModel(transformers.SegformerConfig(**small, mlp_ratios=[1, 1, 1, 1]))


def whole(height: int, width: int, patch: int) -> tuple[int, int]:
    """A convolution without padding, as wide as its step: what does not fill a patch is left out."""
    return height // patch, width // patch


def padded(height: int, width: int) -> tuple[int, int]:
    """Swin: padded to whole patches of 4, then merged two by two, padded to an even number of rows and columns."""
    return -(-height // 8), -(-width // 8)


def overlapping(height: int, width: int) -> tuple[int, int]:
    """SegFormer: kernels of 7 and 3, steps of 4, 2, 2, 2, padding of half a kernel."""
    for step, kernel in ((4, 7), (2, 3), (2, 3), (2, 3)):
        height, width = ((side + 2 * (kernel // 2) - kernel) // step + 1 for side in (height, width))
    return height, width


# model → patch in pixels, blocks, special tokens, rows and columns by its source, smallest size that is tried
ODD = {
    "ViT": (vit, 8, 1, 1, partial(whole, patch=8), 16),
    "DINOv2, registers": (dinov2, 7, 1, 3, partial(whole, patch=7), 14),
    "RADIO": (radio, 8, 1, 8, partial(whole, patch=8), 16),
    "Swin": (swin, 4, 2, 0, padded, 17),
    "SegFormer": (segformer, None, 4, 0, overlapping, 33),
}


def check_grid(name: str, model: nn.Module, height: int, width: int) -> None:
    """grid2 of the last layer is pooled from transformers' own last hidden state, laid out by the rows of the source."""
    _, patch_px, depth, special, rows_of, _ = ODD[name]
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))
    anatomy = dissected(model, patch_px, depth, pixels)
    rows, columns = rows_of(height, width)
    tap = anatomy.taps["norm2"][depth]
    assert tap.grid == (rows, columns), (height, width)
    with torch.inference_mode():
        own = model(**forward_arguments(model, patch_px, pixels)).last_hidden_state
        if own.ndim == 3:
            own = own[:, special:].mT.unflatten(2, (rows, columns))
        want = F.adaptive_avg_pool2d(own, 2).flatten(2).mT
        torch.testing.assert_close(
            last_layer(model, anatomy, patch_px, pixels, "grid2"), want, atol=NEAR, rtol=NEAR, msg=f"{height}, {width}"
        )


@pytest.mark.parametrize("name", ODD)
def test_rows_and_columns_are_those_of_the_models_own_patches(name):
    build, *_, low = ODD[name]
    model = shaken(build())
    whole_patches = 8 if name == "RADIO" else 1  # it takes no others
    for height, width in sizes(low, low + 24 * whole_patches, whole_patches)[::83]:
        check_grid(name, model, height, width)


@pytest.mark.long
@pytest.mark.parametrize("name", ODD)
def test_rows_and_columns_at_every_size(name):
    build, *_, low = ODD[name]
    model = shaken(build())
    whole_patches = 8 if name == "RADIO" else 1
    for height, width in sizes(low, low + 20 * whole_patches, whole_patches):
        check_grid(name, model, height, width)


@pytest.mark.parametrize("patch", [14, 16, 32])
def test_the_map_decides_and_not_the_ratio_of_the_sides(patch):
    """Every size below 320 pixels, from the sides of the patch embedding's map, and its merged stages."""
    for height, width in sizes(patch, 320)[::7]:
        rows, columns = height // patch, width // patch
        assert grid_of(rows * columns, [(rows, columns)], (height, width)) == (rows, columns)
        half = (-(-rows // 2), -(-columns // 2))
        assert grid_of(half[0] * half[1], [(rows, columns)], (height, width)) == half


def test_without_a_map_only_a_single_patch_size_that_fits_is_believed():
    assert grid_of(12, [], (64, 63)) == (4, 3)
    assert grid_of(12, [], (63, 64)) == (3, 4)
    assert grid_of(7, [], (64, 64)) is None  # no square patches
    assert grid_of(160, [], (224, 150)) == (16, 10)


# --- special tokens that come in later -------------------------------------------------------------------------------


def saved(model: nn.Module, folder, side: int) -> str:
    model.save_pretrained(folder)
    steps = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(steps))
    return str(folder)


PVT = {"image_size": 64, "hidden_sizes": [16, 24, 32, 48], "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 2, 2]}


def test_a_class_token_of_the_last_stage_is_no_patch(tmp_path):
    """PVT: CLS joins the patches in its last stage, and is read at the layers that have it."""
    model = shaken(transformers.PvtModel(transformers.PvtConfig(**PVT)))
    backbone = Backbone(models.locate(saved(model, tmp_path / "pvt", 64)))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        own = model(pixels).last_hidden_state
    patches = own[:, 1:]
    found = backbone(pixels, [(6, kind) for kind in ("cls", "ap", "max", "std", "grid2", "all")])
    want = {
        "cls": own[:, :1],
        "ap": patches.mean(1, keepdim=True),
        "max": patches.amax(1, keepdim=True),
        "std": patches.std(1, keepdim=True, correction=0),
        "grid2": patches,  # two by two patches are left
        "all": own,
    }
    for kind, tokens in want.items():
        torch.testing.assert_close(found[6, kind], tokens, atol=NEAR, rtol=NEAR)
    assert [backbone.count(layer, "cls") for layer in range(7)] == [0, 0, 0, 0, 1, 1, 1]
    with pytest.raises(BadModel, match=r"no cls token at layer 1; it has one at --layers 4-6"):
        backbone(pixels, [(1, "cls")])
    block = Backbone(models.locate(f"{tmp_path / 'pvt'}:block"))
    output = given(model, {"pixel_values": pixels}, model.encoder.block[3][0], entering=False)[0]
    torch.testing.assert_close(block(pixels, [(5, "cls")])[5, "cls"], output[:, :1], atol=NEAR, rtol=NEAR)


def test_queries_that_join_before_the_last_blocks_are_no_class_tokens(tmp_path):
    """EoMT puts its queries ahead of CLS, registers and patches, two blocks before the end."""
    small = {**PLAIN, "num_hidden_layers": 4, "num_register_tokens": 3, "num_queries": 10, "num_blocks": 2}
    del small["intermediate_size"]
    config = transformers.EomtConfig(**small, mlp_ratio=2, num_upscale_blocks=1)
    model = shaken(transformers.EomtForUniversalSegmentation(config))
    backbone = Backbone(models.locate(saved(model, tmp_path / "eomt", 32)))
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        own = model(pixels).last_hidden_state
    found = backbone(pixels, [(4, kind) for kind in ("cls", "registers", "ap", "all")])
    torch.testing.assert_close(found[4, "all"], own, atol=NEAR, rtol=NEAR)
    torch.testing.assert_close(found[4, "cls"], own[:, 10:11], atol=NEAR, rtol=NEAR)
    torch.testing.assert_close(found[4, "registers"], own[:, 11:14], atol=NEAR, rtol=NEAR)
    torch.testing.assert_close(found[4, "ap"], own[:, 14:].mean(1, keepdim=True), atol=NEAR, rtol=NEAR)
    assert [backbone.count(layer, "all") for layer in range(5)] == [20, 20, 30, 30, 30]
    assert [backbone.count(layer, "cls") for layer in range(5)] == [1] * 5


def test_of_a_convolutional_networks_maps_no_place_is_a_special_token(tmp_path):
    """RegNet: at many places of the first map all channels are 0 behind a ReLU, in every picture."""
    small = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "groups_width": 4}
    model = shaken(transformers.RegNetModel(transformers.RegNetConfig(**small)))
    with torch.no_grad():
        model.embedder.embedder.normalization.bias.sub_(1.2)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        dead = (model.embedder(pixels) == 0).all(1).all(0).sum()
        own = model(pixels).last_hidden_state.flatten(2).mT
    assert dead > own.shape[1], "too few places are dead to show anything"
    backbone = Backbone(models.locate(saved(model, tmp_path / "regnet", 64)))
    found = backbone(pixels, [(4, "ap"), (4, "all")])
    torch.testing.assert_close(found[4, "all"], own, atol=NEAR, rtol=NEAR)
    torch.testing.assert_close(found[4, "ap"], own.mean(1, keepdim=True), atol=NEAR, rtol=NEAR)


def test_every_family_gives_a_grid_at_a_size_that_is_no_square():
    """Of the families whose size may differ from the trained one: rows and columns follow height and width."""
    for name in ("MAE", "CLIP, vision", "Pixio", "SwinV2", "PVTv2", "ConvNeXt", "ResNet", "DINOv3"):
        truth = ZOO[name]
        model = shaken(truth.build())
        side = truth.pixels
        pixels = torch.randn(1, 3, side + 13, side * 2 - 3, generator=torch.Generator().manual_seed(5))
        depth = sum(model.config.depths) if hasattr(model.config, "depths") else model.config.num_hidden_layers
        patch = getattr(model.config, "patch_size", None)
        anatomy = dissected(model, patch if isinstance(patch, int) else None, depth, pixels)
        first = anatomy.taps["block"][0].grid
        assert first is not None
        step = side // truth.grid
        low = ((side + 13) // step, (side * 2 - 3) // step)
        assert low[0] <= first[0] <= low[0] + 1, name  # up to one more where the stem pads
        assert low[1] <= first[1] <= low[1] + 1, name
