"""Every family of the zoo: layers, token kinds, hook points and the order of patches, against `zoo`'s other way."""

import itertools
import re

import pytest
import torch
import zoo
from PIL import Image
from torch import Tensor

from mlfusion import models
from mlfusion.errors import BadModel, UnknownName
from mlfusion.models.backbone import Backbone
from mlfusion.specs.identity import KINDS

NEAR = 5e-6  # largest difference of numbers of size 1, float32 to float64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family → its folder; each is made once."""
    made: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in made:
            made[name] = str(zoo.save(name, tmp_path_factory.mktemp("zoo") / re.sub(r"\W+", "-", name)))
        return made[name]

    return folder


def opened(word: str) -> Backbone:
    return Backbone(models.locate(word))


def pictures(name: str, count: int = 2) -> Tensor:
    side = zoo.ZOO[name].pixels
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def pooled(patches: Tensor, side: int) -> Tensor:
    """[b, n · n, d] in raster order → [b, side · side, d]: cell by cell, in loops."""
    n = round(patches.shape[1] ** 0.5)
    maps = patches.unflatten(1, (n, n))
    bounds = [(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
    return torch.stack([maps[:, a:b, c:d].mean((1, 2)) for (a, b), (c, d) in itertools.product(bounds, bounds)], 1)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_layer_and_kind_is_what_it_is_by_hand(name, folders):
    truth, pixels = zoo.ZOO[name], pictures(name)
    backbone, tower = opened(folders(name)), zoo.tower_of(name, folders(name))
    by_hand = zoo.layers_by_hand(name, tower, pixels)
    assert backbone.depth == len(by_hand) - 1
    special = truth.cls + truth.dist + truth.registers
    for layer, want in enumerate(by_hand):
        held = [kind for kind in KINDS if backbone.count(layer, kind)]
        found = {kind: one for (_, kind), one in backbone(pixels, [(layer, kind) for kind in held]).items()}
        assert {kind: one.shape[1] for kind, one in found.items()} == {k: backbone.count(layer, k) for k in held}
        patches = want[:, special:]
        parts = {
            "all": want,
            "cls": want[:, : truth.cls],
            "dist": want[:, truth.cls : truth.cls + truth.dist],
            "registers": want[:, truth.cls + truth.dist : special],
            "ap": patches.mean(1, keepdim=True),
            "max": patches.max(1, keepdim=True).values,
            "std": (patches - patches.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt(),
        }
        for side in (2, 4, 7):
            if name != "Hiera" and patches.shape[1] >= side**2:  # whose patches are in an order of its own, see below
                parts[f"grid{side}"] = pooled(patches, side)
        for kind, part in parts.items():
            assert (kind in found) == (part.shape[1] > 0), kind
            if kind in found:
                torch.testing.assert_close(found[kind].double(), part.double(), atol=NEAR, rtol=NEAR)
    if truth.last == "all":
        with torch.inference_mode():
            said = tower(**truth.arguments(pixels)).last_hidden_state
        last = backbone(pixels, [(backbone.depth, "all")])[backbone.depth, "all"]
        torch.testing.assert_close(last, said, atol=NEAR, rtol=NEAR)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_blocks_are_read_at_their_output(name, folders):
    pixels, tower = pictures(name), zoo.tower_of(name, folders(name))
    backbone = opened(f"{folders(name)}:block")
    with torch.inference_mode():
        for number, block in enumerate(zoo.blocks_of(name, tower)):
            output = zoo.given(tower, zoo.ZOO[name].arguments(pixels), block, entering=False)
            want = zoo.flat(output, zoo.ZOO[name].channels_first)
            found = backbone(pixels, [(number + 1, "all")])[number + 1, "all"]
            torch.testing.assert_close(found, want, atol=NEAR, rtol=NEAR)


@pytest.mark.parametrize("name", ["ViT", "DeiT, distilled", "CLIP", "SigLIP", "AIMv2", "I-JEPA", "V-JEPA 2"])
def test_a_block_adds_its_attention_and_its_mlp(name, folders):
    """So that what `attn` and `mlp` read is known from what `block` reads."""
    pixels = pictures(name)
    block, attention, mlp = (opened(f"{folders(name)}:{hook}") for hook in ("block", "attn", "mlp"))
    for layer in range(1, block.depth + 1):
        parts = [
            one(pixels, [(n, "all")])[n, "all"] for one, n in ((block, layer - 1), (attention, layer), (mlp, layer))
        ]
        torch.testing.assert_close(sum(parts), block(pixels, [(layer, "all")])[layer, "all"], atol=NEAR, rtol=NEAR)
    with pytest.raises(BadModel, match="has no layer 0 at this hook point; allowed: --layers 1-3"):
        mlp(pixels, [(0, "ap")])


ORDERED = [
    name for name in zoo.ZOO if name not in ("PVTv2", "SegFormer", "Hiera", "ResNet")
]  # whose patches overlap, or see below


@pytest.mark.parametrize("name", ORDERED)
def test_a_patch_of_the_picture_is_its_own_token(name, folders):
    truth = zoo.ZOO[name]
    backbone = opened(f"{folders(name)}:block")
    special, size = truth.cls + truth.dist + truth.registers, truth.pixels // truth.grid
    plain = pictures(name, 1)
    before = backbone(plain, [(0, "all")])[0, "all"]
    for row, column in ((0, 1), (truth.grid - 1, 0), (1, 2)):
        other = plain.clone()
        other[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size] += 1
        moved = (backbone(other, [(0, "all")])[0, "all"] != before).any(-1)[0].nonzero().flatten().tolist()
        assert moved == [special + row * truth.grid + column]


def test_hieras_grid_is_in_order_whatever_its_tokens_are(folders):
    backbone = opened(f"{folders('Hiera')}:block")
    pixels = pictures("Hiera", 1)
    before = backbone(pixels, [(0, "grid4")])[0, "grid4"]
    for cell in (1, 6, 11):
        row, column = divmod(cell, 4)
        other = pixels.clone()
        other[:, :, row * 16 + 4 : row * 16 + 12, column * 16 + 4 : column * 16 + 12] += 1
        moved = (backbone(other, [(0, "grid4")])[0, "grid4"] != before).any(-1)[0].nonzero().flatten().tolist()
        assert moved == [cell]
    # Deeper, where a patch moves them all: the model's own maps of each stage.
    tower = zoo.tower_of("Hiera", folders("Hiera"))
    with torch.inference_mode():
        maps = tower(pixels, output_hidden_states=True).reshaped_hidden_states
    for layer, stage in ((1, 1), (3, 2), (4, 3)):
        want = pooled(maps[stage].flatten(1, 2), 4)
        torch.testing.assert_close(backbone(pixels, [(layer, "grid4")])[layer, "grid4"], want, atol=NEAR, rtol=NEAR)


@pytest.mark.parametrize("name", ["CLIP", "CLIP, with projection", "MetaCLIP 2"])
def test_the_projected_last_layer_is_the_models_embedding(name, folders):
    pixels = pictures(name)
    backbone = opened(f"{folders(name)}:projected")
    found = backbone(pixels, [(3, "cls"), (3, "all"), (2, "cls")])
    model = type(zoo.ZOO[name].build()).from_pretrained(folders(name), dtype=torch.float32).eval().requires_grad_(False)
    with torch.inference_mode():
        said = model.get_image_features(pixels) if hasattr(model, "get_image_features") else model(pixels)
        embedding = next(
            getattr(said, f) for f in ("image_embeds", "pooler_output") if getattr(said, f, None) is not None
        )
    torch.testing.assert_close(found[3, "cls"][:, 0], embedding, atol=NEAR, rtol=NEAR)
    assert found[3, "all"].shape == (2, 17, 24)
    plain = opened(folders(name))(pixels, [(3, "all"), (2, "cls")])
    by_hand = plain[3, "all"] @ model.visual_projection.weight.T
    torch.testing.assert_close(found[3, "all"], by_hand, atol=NEAR, rtol=NEAR)
    torch.testing.assert_close(found[2, "cls"], plain[2, "cls"])


def test_settings_change_the_configuration(folders):
    """CLIP with exact GELU: as a model that was built so."""
    pixels = pictures("CLIP")
    tower = zoo.tower_of("CLIP", folders("CLIP"))
    quick = zoo.layers_by_hand("CLIP", tower, pixels)
    for block in tower.encoder.layers:
        block.mlp.activation_fn = torch.nn.GELU()
    exact = zoo.layers_by_hand("CLIP", tower, pixels)
    found = opened(f"{folders('CLIP')}:hidden_act=gelu")(pixels, [(3, "all")])[3, "all"]
    torch.testing.assert_close(found.double(), exact[3], atol=NEAR, rtol=NEAR)
    assert (exact[3] - quick[3]).abs().max() > 100 * NEAR


@pytest.mark.parametrize(
    ("suffix", "kind", "message"),
    [
        (":hidden_at=gelu", UnknownName, "no setting named 'hidden_at'. Did you mean hidden_act"),
        (":layer_norm_eps=high", BadModel, "layer_norm_eps=high is a str; allowed: float"),
        (":blok", UnknownName, "no hook point named 'blok'. Did you mean block"),
        (
            ":projected",
            BadModel,
            "has no projection to an embedding shared with texts.*allowed: block, norm2, attn, mlp",
        ),
    ],
)
def test_what_a_model_cannot_be_asked_is_refused_with_what_it_can(suffix, kind, message, folders):
    with pytest.raises(kind, match=message):
        opened(folders("ViT") + suffix)


def test_a_token_that_is_not_there_is_refused_with_those_that_are(folders):
    backbone = opened(folders("SigLIP"))
    with pytest.raises(
        BadModel, match=r"no cls token; allowed: ap, max, std, grid2, grid4, all\. .*ap-all-layers/attentive"
    ):
        backbone(pictures("SigLIP"), [(1, "cls")])
    with pytest.raises(BadModel, match=r"no grid7 tokens at layer 1; allowed: cls, ap"):
        opened(folders("ViT")).shapes([(1, "grid7")])
    with pytest.raises(BadModel, match=r"no hook point 'attn'; allowed: norm2, block"):
        opened(f"{folders('ResNet')}:attn")


def test_pictures_of_another_size_interpolate_positions(folders):
    """As the model does when it is asked to."""
    backbone = opened(folders("ViT"))
    pixels = torch.randn(2, 3, 48, 40)
    with torch.inference_mode():
        said = zoo.tower_of("ViT", folders("ViT"))(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(backbone._model(**backbone._arguments(pixels)).last_hidden_state, said)


@pytest.mark.slow
def test_one_set_of_real_tensors_is_three_families(shared, tmp_path):
    """DeiT-Ti loads as ViT, as DINOv2 and as MAE; on real photographs the features are the same."""
    folder = shared / "weights" / "deit_tiny_patch16_224"
    photos = sorted((shared / "dtd10" / "test").glob("*/*.jpg"))[::60]
    pairs = list(itertools.product(range(13), ("cls", "ap", "max", "std", "grid2")))
    found = []
    for family in ("vit", "dinov2", "vit_mae"):
        backbone = opened(str(zoo.as_family(folder, family, tmp_path / family)))
        pixels = backbone.preprocessing([Image.open(photo) for photo in photos])
        found.append(backbone(pixels, pairs))
    for other in found[1:]:
        for pair in pairs:
            torch.testing.assert_close(other[pair], found[0][pair], atol=2e-5, rtol=2e-5)
