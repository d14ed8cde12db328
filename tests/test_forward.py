"""A pass that fits: sized by measuring, halved when memory runs out, the same numbers whatever the pieces."""

import pytest
import torch
from tiny import noise_images, save_images, save_model

import mlfusion
from mlfusion import models
from mlfusion.errors import MlfusionError, UnknownName
from mlfusion.extraction import forward
from mlfusion.extraction.forward import Forward
from mlfusion.models.backbone import Backbone
from mlfusion.system import memory

PAIRS = frozenset({(1, "cls"), (4, "ap"), (4, "all")})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_model("vit", tmp_path_factory.mktemp("model") / "tiny-vit"))


@pytest.fixture
def backbone(folder) -> Backbone:
    return Backbone(models.locate(folder))


def starved(backbone: Backbone, most: int) -> None:
    """From now on the second block takes more memory than there is when it is given more than `most` images: the real error."""

    def hook(module: torch.nn.Module, args: tuple) -> None:
        if len(args[0]) > most:
            torch.empty(2**60, dtype=torch.uint8)

    backbone.anatomy.blocks[1].register_forward_pre_hook(hook)


def pictures(backbone: Backbone, count: int) -> torch.Tensor:
    return torch.stack([torch.tensor(backbone.preprocessing.picture(image)) for image in noise_images(count)])


@pytest.mark.parametrize("most", [1, 3, 5])
def test_a_pass_that_does_not_fit_is_run_in_pieces(most, backbone):
    given = pictures(backbone, 11)
    whole = Forward(backbone, backbone.preprocessing, PAIRS, 16)(given, PAIRS)
    starved(backbone, most)
    pieces = Forward(backbone, backbone.preprocessing, PAIRS, 16)
    found = pieces(given, PAIRS)
    assert pieces.shrunk
    assert most / 2 < pieces.batch_size <= most  # halved no more than there was need for
    for pair in PAIRS:
        torch.testing.assert_close(found[pair], whole[pair], atol=1e-6, rtol=0)
    before = pieces.passes
    pieces(given[:most], PAIRS)
    assert pieces.passes == before + -(-most // pieces.batch_size)  # what did not fit is not tried again


def test_not_even_one_image_fits(backbone):
    starved(backbone, 0)
    with pytest.raises(MlfusionError, match=r"no memory on cpu for one image in tiny-vit; allowed: --compute bfloat16"):
        Forward(backbone, backbone.preprocessing, PAIRS, 4)(pictures(backbone, 2), PAIRS)


def test_other_errors_are_not_taken_for_a_lack_of_memory(backbone):
    backbone.anatomy.blocks[1].register_forward_pre_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        Forward(backbone, backbone.preprocessing, PAIRS, 4)(pictures(backbone, 2), PAIRS)


def test_the_batch_follows_from_what_is_free(backbone, monkeypatch):
    with memory.measured() as taken:
        backbone(backbone.preprocessing(noise_images(forward.TRIAL_IMAGES)), PAIRS)
    image = taken() / forward.TRIAL_IMAGES
    assert image > 3 * 32 * 32 * 4  # a picture alone
    for room, want in ((0, 1), (3, 2), (9, 8), (10**9, forward.MAX_BATCH_SIZES["cpu"])):
        monkeypatch.setattr(memory, "available", lambda _, room=room: room * 1.3 * image / forward.MEMORY_SHARE)
        assert Forward(backbone, backbone.preprocessing, PAIRS).batch_size == want


def test_an_extraction_that_runs_out_of_memory_loses_nothing(folder, tmp_path, monkeypatch):
    data = str(save_images(tmp_path / "d", {"train": 7, "test": 2}))
    [want] = mlfusion.extract(folder, data, splits="train", cache=tmp_path / "a")
    load = Backbone.__init__

    def starving(self: Backbone, *args: object, **words: object) -> None:
        load(self, *args, **words)
        starved(self, 2)

    monkeypatch.setattr(Backbone, "__init__", starving)
    [found] = mlfusion.extract(folder, data, splits="train", cache=tmp_path / "b", batch_size=8)
    assert found.images_written == 21
    a, b = (one.entry.read([1, 2, 3, 4], ["cls", "ap"]).astype(float) for one in (want, found))
    assert abs(a - b).max() < 2e-3
    [run] = found.entry.path.glob("runs/*.json")
    assert '"out_of_memory": true' in run.read_text()


COSINES = {"bfloat16": 2e-3, "float16": 5e-5}
"""Of 1 - cosine to float32, any layer, CLS and AP; the page of speed has the measured ones by layer."""


@pytest.mark.slow
@pytest.mark.parametrize("compute", COSINES)
def test_narrower_numbers_are_near_and_another_key(compute, shared, tmp_path):
    from PIL import Image

    folder = shared / "weights" / "deit_tiny_patch16_224"
    photos = [Image.open(path).convert("RGB") for path in sorted((shared / "dtd10" / "test").glob("*/*.jpg"))[::30]]
    pairs = frozenset((layer, kind) for layer in range(1, 13) for kind in ("cls", "ap"))
    one, other = (Backbone(models.locate(str(folder)), compute=each) for each in ("float32", compute))
    pixels = one.preprocessing(photos)
    found = other(pixels, pairs)
    assert all(tokens.dtype == torch.float32 for tokens in found.values())
    for pair, want in one(pixels, pairs).items():
        apart = 1 - torch.cosine_similarity(want.double(), found[pair].double(), dim=-1)
        assert 0 < apart.max() < COSINES[compute], pair


def test_types_to_compute_in_are_names():
    from mlfusion.system.devices import pick_compute

    assert pick_compute("float16", "cpu") == "float16"
    assert pick_compute("auto", "cpu") in ("float32", "bfloat16")
    with pytest.raises(UnknownName, match="no compute named 'float8'"):
        pick_compute("float8", "cpu")
