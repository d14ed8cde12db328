"""Features that are very large or very small: scaled to length 1 all the same, and refused where a storage type loses them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_images, save_model

import mlfusion
from mlfusion.errors import BadData
from mlfusion.extraction.writer import vanished
from mlfusion.probing import protocol
from mlfusion.probing.search import FitOptions
from mlfusion.probing.targets import target_of
from mlfusion.probing.training.batches import Tokens
from mlfusion.specs.identity import Dtype
from mlfusion.specs.names import Head
from mlfusion.specs.options import SearchOptions
from mlfusion.store.encoding import ENCODINGS


@pytest.mark.parametrize("power", [-36, -30, -20, 0, 18, 20, 30, 37])
def test_lengths_are_one_at_any_size(power: int) -> None:
    """Numbers whose squares float32 cannot hold, against float64, which holds them."""
    tokens = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3, 32)) * 10.0**power).float()
    tokens[2, 1] = 0
    wide = tokens.double()
    expected = wide / wide.square().sum(-1, keepdim=True).sqrt()
    expected[2, 1] = 0
    made = Tokens(tokens.numpy(), np.zeros(6, np.int64)).normalised(np.arange(6), "cpu")
    torch.testing.assert_close(made.double(), expected, atol=2e-7, rtol=1e-6)


def test_one_channel_may_be_enormous() -> None:
    tokens = np.random.default_rng(0).normal(size=(5, 1, 8)).astype(np.float32)
    tokens[3, 0, 2] = 1e30
    wide = tokens.astype(np.float64)
    made = Tokens(tokens, np.zeros(5, np.int64)).normalised(np.arange(5), "cpu").numpy()
    np.testing.assert_allclose(made, wide / np.linalg.norm(wide, axis=-1, keepdims=True), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("power", [-100, 66])
@pytest.mark.parametrize("head", ["linear", "ridge", "knn", "logistic"])
def test_a_probe_learns_from_numbers_of_any_size(head: Head, power: int) -> None:
    """Scores are those of the same tokens at an ordinary size, as a power of two changes no digit of a token."""
    random, labels = np.random.default_rng(0), np.arange(60) % 3
    tokens = (random.normal(size=(60, 1, 16)) + 3 * np.eye(3, 16)[labels][:, None]).astype(np.float32)
    scores = []
    for scale in (1.0, 2.0**power):
        train, test = (Tokens(tokens[at::2] * np.float32(scale), labels[at::2]) for at in (0, 1))
        options = FitOptions(seed=0, search=SearchOptions(grid="quick", precision="float32"))
        target = target_of(train.labels, 3)
        done = protocol.fit(head, train, lambda test=test: test, target=target, options=options)  # type: ignore[misc]
        scores.append((done.val, done.test))
    assert scores[0] == scores[1]
    assert scores[0][1] > 0.6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_what_vanishes_is_what_the_stored_numbers_lack(dtype: Dtype) -> None:
    """Tokens from one size to another, with zeros and one large number, against encoding and decoding."""
    random = np.random.default_rng(0)
    tokens = random.normal(size=(300, 2, 24)) * 10.0 ** random.uniform(-12, 2, (300, 1, 1))
    tokens[::3, 0, 0] *= 10.0 ** random.uniform(0, 4, 100)
    tokens[::5, 1, :20] = 0
    tokens[7] = 0
    values = torch.from_numpy(tokens.astype(np.float32))
    encoding = ENCODINGS[dtype]
    kept = np.asarray(encoding.decode(encoding.encode(values.numpy())), np.float32)
    lost = ((kept == 0) & (values.numpy() != 0)).sum(-1) > 0.5 * (values.numpy() != 0).sum(-1)
    assert vanished(values, dtype).tolist() == lost.any(-1).tolist()
    assert lost.any() == (dtype in ("float16", "int8"))


def scaled_model(family: str, folder: Path, norm: str, factor: float) -> str:
    """A model whose last norm gives numbers `factor` times as large."""
    save_model(family, folder)
    held = load_file(folder / "model.safetensors")
    for name in (f"{norm}.weight", f"{norm}.bias"):
        held[name] = held[name] * factor
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "norm"), [("vit", "layernorm"), ("dinov2", "layernorm")])
@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_features_that_float16_makes_zero_are_refused(family: str, norm: str, format: str) -> None:
    data = str(save_images(Path("set"), {"train": 4, "test": 2}))
    small = scaled_model(family, Path("small"), norm, 2.0**-30)
    with pytest.raises(BadData, match=r"layer \d of image '.*000.png' would become zeros in float16.*--dtype float32"):
        mlfusion.extract(small, data, layers="last", format=format)
    mlfusion.extract(small, data, layers="1", format=format)  # the other layers are as they were
    usual = scaled_model(family, Path("usual"), norm, 1.0)
    rows = []
    for model in (small, usual):
        mlfusion.extract(model, data, layers="last", dtype="float32", format=format)
        rows += mlfusion.probe(data, model=model, probes="cls-last/ridge", seeds=(0,)).rows
    assert (rows[0].val, rows[0].test) == (rows[1].val, rows[1].test)


def test_an_image_that_is_skipped_is_not_held_to_it() -> None:
    folder = save_images(Path("set"), {"train": 4, "test": 2})
    (folder / "train/red/000.png").write_bytes(b"no image")
    model = str(save_model("vit", Path("m")))
    first, _ = mlfusion.extract(model, str(folder), layers="last", skip_bad=True)
    assert first.images_skipped == 1
