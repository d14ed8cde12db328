"""Images by formula are pure functions of their names; pre-training on them can be stopped, resumed and loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, ViTModel

from mlfusion.embedded import formula, network, optimizer, pretrain, scenes
from mlfusion.errors import BadRecipe

SHIPPED = Path(__file__).parents[1] / "pipelines" / "formula-vit.toml"

TINY = """\
[network]
image_px = 16
patch_px = 8
depth = 2
width = 8
heads = 2

[images]
families = ["atom", "stroke", "band"]
classes = 2
instances = 3
pattern_px = 24

[schedule]
seed = 5
steps = 3
crews = 2
scenes = 4
kept_patches = 3
whole_last = 1
learning_rate = 1e-2
weight_decay = 0.05
warmup = 1
cooldown = 1
checkpoint_every = 1

[weights]
formula = 1.0
fill = 0.5
contrast = 1.0
layout = 1.0
grain = 1.0
temperature = 0.2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path


# --- Patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", formula.FAMILIES)
def test_a_pattern_is_a_function_of_its_name_alone(family: str) -> None:
    first = formula.pattern(family, 3, 1, px=48)
    formula.pattern(family, 4, 0, px=48)  # whatever is drawn in between
    np.random.seed(1)
    assert first.dtype == np.uint8
    assert first.shape == (48, 48)
    np.testing.assert_array_equal(first, formula.pattern(family, 3, 1, px=48))


@pytest.mark.parametrize("family", formula.FAMILIES)
def test_class_instance_and_seed_each_change_the_pattern(family: str) -> None:
    here = formula.pattern(family, 3, 1, px=48)
    for other in (
        formula.pattern(family, 4, 1, px=48),
        formula.pattern(family, 3, 2, px=48),
        formula.pattern(family, 3, 1, px=48, seed=1),
    ):
        assert (here != other).mean() > 0.01


@pytest.mark.parametrize("family", formula.FAMILIES)
def test_every_pattern_has_both_ground_and_ink(family: str) -> None:
    for klass in range(12):
        gray = formula.pattern(family, klass, 0, px=48) / 255
        assert 0.01 < gray.mean() < 0.995
        assert gray.std() > 0.03


@pytest.mark.parametrize("family", formula.SHAPES)
def test_instances_of_a_class_are_nearer_than_classes(family: str) -> None:
    """Blurred shapes, mean squared difference: within a class against between classes."""
    drawn = np.stack([[formula.pattern(family, k, i, px=48) for i in range(6)] for k in range(8)]) / 255
    small = drawn.reshape(8, 6, 8, 6, 8, 6).mean((3, 5)).reshape(8, 6, 64)
    within = np.square(small[:, :, None] - small[:, None]).mean() * 6 / 5
    between = np.square(small.mean(1)[:, None] - small.mean(1)[None]).mean() * 8 / 7 + within
    assert within < 0.8 * between


# --- Pictures --------------------------------------------------------------------------------------------------------


def small_bank() -> formula.Bank:
    families, classes, instances = ("atom", "solid", "weave", "cloud"), 3, 2
    ink = np.empty((24, 32, 32), dtype=np.uint8)
    formula.draw_into(ink, families, classes, instances, 0, lambda event: None)
    return formula.label_bank(ink, families, classes, instances)


def test_a_bank_knows_what_it_holds() -> None:
    bank = small_bank()
    np.testing.assert_array_equal(bank.ink[13], formula.pattern("weave", 0, 1, px=32))
    assert bank.classes == 12
    assert bank.labels[13] == 6
    assert set(bank.shapes) == set(range(12))
    assert set(bank.textures) == set(range(12, 24))


def test_pictures_depend_on_the_stream_alone() -> None:
    bank = small_bank()
    rows, fills = np.arange(16), bank.textures[np.arange(16) % 12]

    def seen(seed: int) -> scenes.Pair:
        return scenes.pair(bank, rows, fills, 24, torch.Generator().manual_seed(seed))

    one, same, other = seen(3), seen(3), seen(4)
    assert torch.equal(one.pictures, same.pictures)
    assert torch.equal(one.layout, same.layout)
    assert not torch.equal(one.pictures, other.pictures)
    assert not torch.equal(one.pictures[:16], one.pictures[16:]), "the two views of a scene are the same picture"
    assert torch.equal(one.labels[:16], one.labels[16:])
    assert one.pictures.shape == (32, 3, 24, 24)
    assert one.pictures.abs().max() <= 1
    assert one.layout.shape == (32, scenes.LAYOUT)
    assert one.grain.shape == (32, scenes.GRAIN)
    for part in (one.pictures, one.layout, one.grain):
        assert part.isfinite().all()


def test_edges_are_found_in_the_direction_they_have() -> None:
    """A horizontal ramp has its gradient along x, a vertical one along y: bins 0 and 4 of 8."""
    ramp = torch.linspace(0, 1, 24).expand(1, 3, 24, 24)
    for picture, bin_ in ((ramp, 0), (ramp.mT, 4)):
        strength = scenes.edges(picture)[0].sum((0, 2, 3))
        assert strength.argmax() == bin_
        assert strength[(bin_ + 4) % 8] < 0.1 * strength[bin_]


# --- Pre-training ----------------------------------------------------------------------------------------------------


def stop_after(step: int) -> Callable[[dict[str, Any]], None]:
    def tell(event: dict[str, Any]) -> None:
        if event["stage"] == "train" and event["done"] == step:
            raise KeyboardInterrupt

    return tell


def test_an_interrupted_run_ends_with_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    report = pretrain.pretrain(recipe, tmp_path / "straight", work=tmp_path / "a", progress=events.append)
    assert report["steps"] == 3
    assert report["pictures"] == 3 * 2 * 4 * 2
    assert [e["done"] for e in events if e["stage"] == "train"] == [1, 2, 3]

    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(recipe, tmp_path / "broken", work=tmp_path / "b", progress=stop_after(2))
    assert not (tmp_path / "broken").exists(), "half a run left a folder that looks whole"
    resumed: list[dict[str, Any]] = []
    pretrain.pretrain(recipe, tmp_path / "broken", work=tmp_path / "b", progress=resumed.append)
    assert [e["done"] for e in resumed] == [3], "steps were repeated, or the patterns drawn again"
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_the_folder_loads_as_any_other_model_does(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "README.md").write_text("a card", encoding="utf-8")
    pretrain.pretrain(recipe, out, work=tmp_path / "work")
    model, loading = AutoModel.from_pretrained(
        out, add_pooling_layer=False, dtype=torch.float32, output_loading_info=True
    )
    assert isinstance(model, ViTModel)
    assert not any(loading.values())
    assert json.loads((out / "preprocessor_config.json").read_text())["size"] == {"height": 16, "width": 16}
    assert (out / "README.md").read_text(encoding="utf-8") == "a card"


def test_training_computes_what_transformers_computes(recipe: Path) -> None:
    """The lean forward pass against ViTModel's own, both in float32."""
    model = network.PretrainingModel(pretrain.load_recipe(recipe))
    pictures = torch.rand(5, 3, 16, 16) * 2 - 1
    ours = network.encode(model.vit, network.embed(model.vit, pictures, 4, torch.Generator()))
    torch.testing.assert_close(ours, model.vit.eval()(pictures).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_left_out_patches_keep_their_places(recipe: Path) -> None:
    """With some patches left out, each of the others is one that the whole picture has."""
    vit = network.PretrainingModel(pretrain.load_recipe(recipe)).vit
    pictures = torch.rand(2, 3, 16, 16)
    whole = network.embed(vit, pictures, 4, torch.Generator())
    some = network.embed(vit, pictures, 2, torch.Generator().manual_seed(0))
    assert some.shape == (2, 3, 8)
    torch.testing.assert_close(some[:, 0], whole[:, 0])
    for picture in range(2):
        for patch in some[picture, 1:]:
            assert (whole[picture, 1:] - patch).abs().amax(1).min() < 1e-5


def test_newton_schulz_makes_rows_nearly_orthonormal() -> None:
    draw = torch.Generator().manual_seed(0)
    singular = torch.linalg.svdvals(optimizer.orthogonalise(torch.randn(3, 16, 40, generator=draw)))
    assert singular.min() > 0.5
    assert singular.max() < 1.4


def test_the_rate_rises_holds_and_falls(recipe: Path) -> None:
    plan = pretrain.load_recipe(SHIPPED).schedule
    rates = [pretrain.learning_rate(plan, step) / plan.learning_rate for step in range(plan.steps)]
    assert rates[0] == pytest.approx(1 / plan.warmup)
    assert rates[plan.warmup : plan.steps - plan.cooldown] == pytest.approx(
        [1.0] * (plan.steps - plan.cooldown - plan.warmup)
    )
    assert rates[-1] == pytest.approx(1 / plan.cooldown)


# --- The recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed = 5", "seed = 5\nsede = 6", r"unknown field `sede` - at `\$.schedule`.*\[schedule\] seed, steps"),
        ("seed = 5\n", "", r"missing required field `seed` - at `\$.schedule`"),
        ("[weights]", "[wights]", r"unknown field `wights`.*\[weights\] formula, fill"),
        ("steps = 3", "steps = 3.0", r"Expected `int`, got `float` - at `\$.schedule.steps`"),
        ("steps = 3", "steps = true", r"Expected `int`, got `bool`"),
        ('"band"]', '"bond"]', "no bond; it may name fractal, atom"),
        ('"atom", "stroke", "band"', '"atom", "stroke"', "families needs a texture"),
        ("heads = 2", "heads = 3", "width must be a multiple of heads"),
        ("image_px = 16", "image_px = 20", "image_px must be a multiple of patch_px"),
        ("kept_patches = 3", "kept_patches = 5", "kept_patches must lie in 1 … 4"),
        ("warmup = 1", "warmup = 9", "steps, 0 … 3"),
        ("[network]", "network", "is not TOML"),
    ],
)
def test_a_recipe_says_exactly_what_it_may(recipe: Path, old: str, new: str, said: str) -> None:
    assert old in TINY
    recipe.write_text(TINY.replace(old, new), encoding="utf-8")
    with pytest.raises(BadRecipe, match=said):
        pretrain.load_recipe(recipe)


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"cannot read the recipe .*nowhere\.toml.*mlfusion pretrain"):
        pretrain.load_recipe(tmp_path / "nowhere.toml")


def test_the_shipped_recipe_says_how_to_run_it() -> None:
    head = SHIPPED.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(word in head for word in ("# Run:", "pipelines/formula-vit.toml", "# Cost:", "# Expect:"))
    assert pretrain.load_recipe(SHIPPED)
