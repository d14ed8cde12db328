"""What tests on ../shared show of real weights and photographs, shown on what everybody has: nothing is tested there alone.

The photographs are the two that scikit-learn ships, the weights those of the embedded model.
"""

import ast
import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
import zoo
from PIL import Image
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from tiny import noise_images

from mlfusion import datasets, models
from mlfusion.models import preprocessing
from mlfusion.models.backbone import Backbone
from mlfusion.probing.solvers.design import Design, Penalty
from mlfusion.probing.solvers.logistic import Logistic
from mlfusion.probing.targets import OneClass
from mlfusion.probing.training.batches import Tokens
from mlfusion.workflows import recipe

TESTS = Path(__file__).parent
PIPELINES = TESTS.parent / "pipelines"
SCORES = TESTS.parent / "mlfusion" / "report" / "paper_balanced_accuracy.csv"

SIBLINGS = {  # a test that needs ../shared → one of the same behaviour that needs nothing
    "test_deit_tiny_agrees_with_hidden_states": "test_every_layer_and_kind_equals_the_blocks_run_by_hand",
    "test_the_catalogue_holds_the_studys_twenty": "test_the_study_has_twenty_data_sets",
    "test_slices_of_photographs": "test_slices_of_noise_score_highly_by_image_and_by_chance_by_patient",
    "test_logistic_regression_of_real_features": "test_logistic_regression_of_a_steep_spectrum",
    "test_one_set_of_real_tensors_is_three_families": "test_one_set_of_tensors_is_three_families",
    "test_narrower_numbers_are_near_and_another_key": "test_narrower_numbers_are_near",
    "test_photographs_by_deit_to_the_bit": "test_every_bit_is_the_processors_own",
    "test_the_fast_path_is_a_level_away_from_the_exact_one": "test_the_fast_path_is_a_level_away",
    "test_the_fast_paths_features_stay_within_the_bound": "test_features_of_the_fast_path_are_near",
    "test_without_simplejpeg_the_bytes_are_the_same": "test_pillow_decodes_the_same_bytes",
    "test_the_papers_recipes_cover_its_models_and_data_sets": "test_the_papers_recipe_covers_the_published_scores",
    "test_deit_tinys_stored_predictions": "test_answers_are_the_stored_test_predictions",
    "test_real_weights_at_another_size": "test_new_images_are_made_as_the_cached_ones_were",
}


def test_none_that_needs_the_real_data_is_the_only_one_of_its_behaviour() -> None:
    needing: dict[str, bool] = {}
    for path in TESTS.rglob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                fixtures = {argument.arg for argument in node.args.args}
                properties = any("given" in ast.unparse(each) for each in node.decorator_list)
                needing[node.name] = "shared" in fixtures and not properties
    assert {name for name, needs in needing.items() if needs} == set(SIBLINGS)
    assert not any(needing[sibling] for sibling in SIBLINGS.values())


# --- the study -------------------------------------------------------------------------------------------------------


def published() -> list[list[str]]:
    lines = SCORES.read_text(encoding="utf-8").splitlines()
    return [line.split(",") for line in lines if not line.startswith("#")][1:]


def test_the_papers_recipe_covers_the_published_scores() -> None:
    asked = recipe.load(PIPELINES / "paper" / "table1.toml")
    assert {score[0] for score in published()} == set(asked.models)
    assert {score[1] for score in published()} <= set(asked.datasets)
    assert {probe.name for probe in asked.probes_and_tokens(12)[0]} == {score[2] for score in published()}


def test_the_study_has_twenty_data_sets() -> None:
    """And some are as large as their authors say."""
    asked = recipe.load(PIPELINES / "paper" / "table1.toml").datasets
    assert len(set(asked)) == 20
    sizes = {"cars": (8144, 196), "dtd": (1880, 47), "fgvc-aircraft": (3334, 100), "stl10": (5000, 10)}
    for name, (images, classes) in sizes.items():
        row = datasets.CATALOGUE[name]
        assert (row.train_images, row.classes) == (images, classes), name


# --- models ----------------------------------------------------------------------------------------------------------


def photographs() -> list[bytes]:
    """Two JPEGs of 640 x 427 pixels."""
    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [(folder / name).read_bytes() for name in ("china.jpg", "flower.jpg")]


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def large(data: bytes) -> bytes:
    """The same photograph at four times its size, so that it may be decoded at a share."""
    image = opened(data)
    image.resize((image.width * 4, image.height * 4), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def embedded() -> Path:
    return Path(models.locate("formula-vit").folder)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((1 - torch.cosine_similarity(one.double(), other.double(), dim=-1)).max())


@pytest.mark.parametrize(("compute", "most"), [("bfloat16", 2e-3), ("float16", 5e-5)])
def test_narrower_numbers_are_near(compute: str, most: float) -> None:
    pairs = frozenset((layer, kind) for layer in range(1, 9) for kind in ("cls", "ap"))
    one, other = (Backbone(models.locate("formula-vit"), compute=each) for each in ("float32", compute))
    pixels = one.preprocessing([opened(data) for data in photographs()] + noise_images(2))
    found = other(pixels, pairs)
    for pair, want in one(pixels, pairs).items():
        assert found[pair].dtype == torch.float32
        assert 0 < apart(want, found[pair]) < most, pair


def test_one_set_of_tensors_is_three_families(embedded: Path, tmp_path: Path) -> None:
    pairs = list(itertools.product(range(9), ("cls", "ap", "max", "std", "grid2")))
    found = []
    for family in ("vit", "dinov2", "vit_mae"):
        backbone = Backbone(models.locate(str(zoo.as_family(embedded, family, tmp_path / family))))
        found.append(backbone(backbone.preprocessing(noise_images(3)), pairs))
    for other in found[1:]:
        for pair in pairs:
            torch.testing.assert_close(other[pair], found[0][pair], atol=2e-5, rtol=2e-5)


# --- the fast path of preprocessing ----------------------------------------------------------------------------------


@pytest.fixture
def deit(tmp_path: Path) -> Path:
    """How DeiT prepares images: the shorter edge to 256 pixels, the middle 224."""
    settings = {"image_processor_type": "DeiTImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return tmp_path


def processors(folder: Path) -> tuple[preprocessing.Steps, preprocessing.Steps]:
    found = preprocessing.read(folder), preprocessing.read(folder, "fast")
    assert isinstance(found[0], preprocessing.Steps)
    assert isinstance(found[1], preprocessing.Steps)
    return found


def test_the_fast_path_is_a_level_away(deit: Path) -> None:
    exact, fast = processors(deit)
    for data in photographs():
        for file, most, mean in ((data, 1, 0.01), (large(data), 12, 0.5)):
            found = fast.from_jpeg(file)
            assert found is not None
            difference = np.abs(found - exact.picture(opened(file)).astype(int))
            assert difference.max() <= most
            assert difference.mean() <= mean


def test_features_of_the_fast_path_are_near(embedded: Path) -> None:
    backbone = Backbone(models.locate("formula-vit"))
    exact, fast = processors(embedded)
    pairs = [(layer, kind) for layer in range(1, 9) for kind in ("cls", "ap")]
    one = backbone(exact([opened(data) for data in photographs()]), pairs)
    pixels = [torch.from_numpy(fast.from_jpeg(data)) for data in photographs()]
    other = backbone(fast.finish(torch.stack(pixels)), pairs)
    assert max(apart(one[pair], other[pair]) for pair in pairs) < 2e-3


def test_pillow_decodes_the_same_bytes(deit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    _, fast = processors(deit)
    files = [*photographs(), *map(large, photographs())]
    want = [fast.from_jpeg(data) for data in files]
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # importing it fails
    for data, pixels in zip(files, want, strict=True):
        np.testing.assert_array_equal(fast.from_jpeg(data), pixels)


# --- probes ----------------------------------------------------------------------------------------------------------


def test_logistic_regression_of_a_steep_spectrum() -> None:
    """Columns whose scale falls by five orders of magnitude, and penalties so weak that the classes part."""
    random, labels = np.random.default_rng(0), np.arange(60) % 5
    values = (random.normal(size=(60, 3 * 96)) + 0.3 * labels[:, None]) * np.logspace(0, -5, 3 * 96)
    tokens = Tokens(values.reshape(60, 3, 96), labels)
    scaled = tokens.values / np.linalg.norm(tokens.values, axis=-1, keepdims=True)
    x = scaled.reshape(60, -1)

    def objective(weight: np.ndarray, bias: np.ndarray, penalty: float) -> float:
        logits = x @ weight.T + bias
        likelihood = logits[np.arange(60), labels] - logsumexp(logits, axis=1)
        return -likelihood.sum() + penalty / 2 * (weight**2).sum()

    for penalty in (1.0, 1e-3):
        [(_, probe)] = Logistic(Design(tokens, np.arange(60), OneClass(5), "cpu")).solve([Penalty(penalty)])
        weight, bias = (each[0].detach().double().numpy() for each in (probe.weight, probe.bias))
        best = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=20_000).fit(x, labels)  # as many of each class
        assert objective(weight, bias, penalty) <= objective(best.coef_, best.intercept_, penalty) * (1 + 1e-6)
