"""Maps of attention fall where the patches are, by sums that can be done by hand, and are drawn on the right images."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import row
from tiny import save_images, save_model

import mlfusion
from mlfusion.analysis import attention
from mlfusion.errors import BadData
from mlfusion.results import Results


def attending(tokens: list[tuple[int, str]], probe: str = "all-tokens-last/attentive") -> dict:
    layers, kinds = [layer for layer, _ in tokens], [kind for _, kind in tokens]
    held = {"layers": layers, "kinds": kinds, "mean": [0.0] * len(tokens), "sd": [0.0] * len(tokens)}
    return row(probe=probe, attention=held, depth=max(4, *layers))


@given(edge=st.integers(4, 40), prefix=st.integers(0, 5))
def test_the_patches_are_the_last_square(edge, prefix):
    assert attention.side(edge**2 + prefix) == edge


@pytest.mark.parametrize(("tokens", "edge"), [(197, 14), (198, 14), (257, 16), (261, 16), (50, 7), (196, 14), (37, 6)])
def test_of_models_in_use(tokens, edge):
    """ViT and DeiT, DeiT with distillation, DINOv2, DINOv2 with registers, CLIP B/32, SigLIP without CLS, the embedded one."""
    assert attention.side(tokens) == edge


def test_patches_in_no_square_are_refused():
    with pytest.raises(BadData, match="no square"):
        attention.side(14 * 18 + 1)


def test_a_map_is_the_patches_of_all_layers_and_nothing_else():
    one = attending([(12, "all")] * 6 + [(6, "all")] * 6)  # two layers of two tokens and 2 x 2 patches
    shares = np.arange(24, dtype=np.float16).reshape(2, 12)
    made = attention.maps(one, shares)
    by_hand = [[[2 + 8, 3 + 9], [4 + 10, 5 + 11]], [[14 + 20, 15 + 21], [16 + 22, 17 + 23]]]
    np.testing.assert_array_equal(made, by_hand)


def test_pooled_patches_lie_on_the_patches_that_they_are_of():
    one = attending([(12, "cls"), *[(12, "grid2")] * 4, *[(12, "all")] * 17], "cls+grid2-last/attentive")
    shares = np.zeros((1, 22))
    shares[0, :5] = 0.2, 0.4, 0, 0, 0.08  # CLS, and two quarters
    shares[0, 5] = 0.3  # the model's CLS
    shares[0, 6 + 5] = 0.02  # patch in row 1, column 1
    made = attention.maps(one, shares)[0]
    want = np.zeros((4, 4))
    want[:2, :2] += 0.1
    want[2:, 2:] += 0.02
    want[1, 1] += 0.02
    np.testing.assert_allclose(made, want)


@given(a=st.integers(1, 9), b=st.integers(1, 9), seed=st.integers(0, 99))
def test_spreading_a_map_loses_nothing(a, b, seed):
    coarse, fine = min(a, b), max(a, b)
    shares = np.random.default_rng(seed).random((3, coarse, coarse))
    spread = attention._resample(shares, fine)
    assert spread.shape == (3, fine, fine)
    np.testing.assert_allclose(spread.sum((1, 2)), shares.sum((1, 2)))
    if fine % coarse == 0:
        np.testing.assert_allclose(
            spread, np.kron(shares, np.ones((1, fine // coarse, fine // coarse))) * (coarse / fine) ** 2
        )


def test_what_has_no_map_is_refused():
    with pytest.raises(BadData, match="reads no patches"):
        attention.maps(attending([(1, "cls"), (1, "ap")]), np.ones((3, 2)))
    with pytest.raises(BadData, match="attention none"):
        attention.maps(row(), np.ones((3, 2)))
    with pytest.raises(BadData, match="of 2 tokens, and the array is of shape"):
        attention.maps(attending([(1, "cls"), (1, "ap")]), np.ones((3, 5)))


@pytest.mark.long
def test_the_images_of_a_row_are_those_it_was_tested_on(tmp_path):
    """A probe of one image: the picture found for number i is the one whose class the arrays say."""
    model, data = save_model("deit", tmp_path / "m"), save_images(tmp_path / "d", {"train": 4, "test": 3})
    (data / "test" / "green" / "001.png").write_bytes(b"no image")
    mlfusion.extract(str(model), str(data), tokens="cls,ap,all@last", skip_bad=True)
    done = mlfusion.probe(str(data), probes="aat,cls-last/linear", grid="quick", seeds=(0,))
    aat = done.rows[0]
    arrays = Results("results").arrays(aat)
    seen = attention.row_images(aat)
    assert seen.ids == [
        f"test/{c}/{i:03d}.png" for c in ("blue", "green", "red") for i in range(3) if (c, i) != ("green", 1)
    ]
    made = attention.maps(aat, arrays["attention"])
    assert made.shape == (8, 4, 4)
    assert (made.sum((1, 2)) < 1).all()
    for number in (0, 3, 7):
        picture = seen.picture(number)
        assert picture.size == (32, 32)  # as the model saw it: 36 pixels, cropped
        # class number c is brightest in channel c, see `tiny.save_images`
        assert np.asarray(picture, float).mean((0, 1)).argmax() == arrays["labels"][number]
    moved = data.rename(tmp_path / "moved")
    assert attention.row_images(aat, dataset=str(moved)).ids == seen.ids
    (moved / "test" / "red" / "002.png").rename(moved / "test" / "red" / "9.png")
    with pytest.raises(BadData, match="other test images"):
        attention.row_images(aat, dataset=str(moved))
    with pytest.raises(BadData, match="not in the cache"):
        attention.row_images(aat, dataset=str(moved), cache=tmp_path / "none")


def test_images_of_arrays_in_memory_are_asked_for(tmp_path):
    model, pixels = (
        str(save_model("deit", tmp_path / "m")),
        np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3), np.uint8),
    )
    parts = {"train": (pixels[:8], [0, 1] * 4), "test": (pixels[8:], [0, 1] * 2)}
    mlfusion.extract(model, mlfusion.array_dataset("mine", parts), layers="last", tokens="cls")
    [made] = mlfusion.probe("mine", probes="cls-last/ridge", seeds=(0,)).rows
    with pytest.raises(BadData, match=r"arrays in memory \(mine\).*give --dataset FILE.npz"):
        attention.row_images(made)
    saved = {f"{split}_images": part[0] for split, part in parts.items()}
    saved |= {f"{split}_labels": np.array(part[1]) for split, part in parts.items()}
    np.savez(tmp_path / "mine.npz", **saved)
    assert attention.row_images(made, dataset=str(tmp_path / "mine.npz")).ids == [f"test/{row}" for row in range(4)]


def test_pictures_are_shown_at_the_size_that_the_model_saw(tmp_path):
    model, data = save_model("deit", tmp_path / "m"), save_images(tmp_path / "d", {"train": 4, "test": 1})
    mlfusion.extract(str(model), str(data), layers="last", tokens="cls", size=64)
    [made] = mlfusion.probe(str(data), probes="cls-last/ridge", seeds=(0,)).rows
    assert attention.row_images(made).picture(0).size == (64, 64)
    shutil.rmtree(model)  # the features say how their pictures were made
    assert attention.row_images(made).picture(0).size == (64, 64)
