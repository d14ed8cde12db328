"""The model inside the package: small, complete, and made by the recipe that says so."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, ViTModel

from mlfusion.embedded import pretrain

FOLDER = Path(str(files("mlfusion"))) / "embedded" / "formula-vit"
RECIPE = Path(__file__).parents[1] / "pipelines" / "formula-vit.toml"


def test_it_fits_in_six_megabytes() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 6_000_000


@pytest.fixture(scope="module")
def model() -> ViTModel:
    model, loading = AutoModel.from_pretrained(
        FOLDER, add_pooling_layer=False, dtype=torch.float32, output_loading_info=True
    )
    assert isinstance(model, ViTModel)
    assert not any(loading.values()), f"keys missing, unexpected or of another shape: {loading}"
    return model.eval()


def test_it_is_deep_enough_to_have_layers_worth_fusing(model: ViTModel) -> None:
    assert model.config.num_hidden_layers >= 6
    assert sum(p.numel() for p in model.parameters()) <= 3_200_000


def test_its_features_are_finite_and_tell_pictures_apart(model: ViTModel) -> None:
    px = model.config.image_size
    pictures = torch.rand(4, 3, px, px, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures[0] = -1  # black, all of it
    with torch.no_grad():
        out = model(pictures).last_hidden_state
    assert out.isfinite().all()
    assert (out[0, 0] - out[1, 0]).norm() > 1


def test_its_preprocessing_is_what_it_was_trained_with(model: ViTModel) -> None:
    said = json.loads((FOLDER / "preprocessor_config.json").read_text(encoding="utf-8"))
    plan = pretrain.load_recipe(RECIPE)
    assert said == pretrain.preprocessing(plan.network)
    assert type(AutoImageProcessor.from_pretrained(FOLDER)).__name__.startswith("ViTImageProcessor")
    assert said["size"] == {"height": model.config.image_size, "width": model.config.image_size}


def test_it_was_made_by_the_recipe_that_ships(model: ViTModel) -> None:
    plan = pretrain.load_recipe(RECIPE)
    report = json.loads((FOLDER / "pretraining.json").read_text(encoding="utf-8"))
    assert report["recipe"] == plan.digest
    assert report["steps"] == plan.schedule.steps
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (plan.network.depth, plan.network.width)


def test_its_card_says_what_it_is(model: ViTModel) -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("formula", "steps", "Cost", "untrained", "raw pixels", "10 images", "mlfusion pretrain"):
        assert word in card
