"""`mlfusion.predict` against a probe that is applied by hand: transformers' own model and processor, arithmetic in NumPy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file
from tiny import save_images, save_model

import mlfusion


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, images of three colours, and features of one of the other."""
    root = tmp_path_factory.mktemp("prediction")
    save_model("vit", root / "vit")
    save_images(root / "colours", {"train": 8, "test": 4})
    mlfusion.extract(str(root / "vit"), str(root / "colours"), cache=root / "cache", dtype="float32")
    return root


def probed(root: Path, probe: str) -> Path:
    """The folder of the saved probe."""
    [row] = mlfusion.probe(
        str(root / "colours"), probes=probe, grid="quick", seeds=(0,), save=True, cache=root / "cache"
    ).rows
    return Path("results/probes") / row.id


def tokens_by_hand(root: Path, files: list[Path], layers: list[int]) -> np.ndarray:
    """CLS and mean patch token of each layer; of the last one after the final norm: [images, tokens, D]."""
    model = transformers.ViTModel.from_pretrained(root / "vit").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(root / "vit", use_fast=False)
    seen: dict[int, torch.Tensor] = {}
    for number, block in enumerate(model.layers):  # layer 2 is the second norm of block 2, counted from 0
        block.layernorm_after.register_forward_hook(lambda _, __, out, number=number: seen.update({number: out}))
    pixels = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen[len(model.layers)] = model(pixels).last_hidden_state
    parts = [part for layer in layers for part in (seen[layer][:, :1], seen[layer][:, 1:].mean(1, keepdim=True))]
    return torch.cat(parts, 1).numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def unit(tokens: np.ndarray) -> np.ndarray:
    """Each token divided by its length."""
    return tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)


def probabilities(made: list[Any], classes: list[str]) -> np.ndarray:
    return np.array([[dict(one.top)[name] for name in classes] for one in made])


@pytest.mark.slow
def test_a_linear_probe_by_hand(root: Path) -> None:
    """Tokens of length 1, one linear map of all of them, and a softmax."""
    folder = probed(root, "cls+ap-2-layers/linear")
    files = sorted((root / "colours" / "test").rglob("*.png"))
    card, held = json.loads((folder / "card.json").read_text()), load_file(folder / "probe.safetensors")
    assert (card["layers"], card["kinds"]) == ([2, 4], ["cls", "ap"])
    tokens = unit(tokens_by_hand(root, files, card["layers"]))
    expected = softmax(tokens.reshape(len(files), -1) @ held["weight"].T + held["bias"])
    made = mlfusion.predict(folder, files, top=3, batch_size=5)
    np.testing.assert_allclose(probabilities(made, card["classes"]), expected, atol=1e-5)
    assert [one.image for one in made] == list(map(str, files)) and all(one.number is None for one in made)
    for one, each in zip(mlfusion.predict(folder, files, top=2), expected, strict=True):
        assert [name for name, _ in one.top] == [card["classes"][c] for c in np.argsort(-each)[:2]]
        assert one.to_json()["top"] == [{"class": name, "probability": share} for name, share in one.top]


def test_votes_of_neighbours_by_hand(root: Path) -> None:
    """Every vote is exp(cosine / temperature), the cosine being the mean over the tokens; of the nearest images alone."""
    folder = probed(root, "cls+ap-last/knn")
    files = sorted((root / "colours" / "test").rglob("*.png"))
    card = json.loads((folder / "card.json").read_text())
    train = sorted((root / "colours" / "train").rglob("*.png"))
    cosines = np.einsum(
        "itd,jtd->ij", unit(tokens_by_hand(root, files, [4])), unit(tokens_by_hand(root, train, [4])) / 2
    )
    truth = np.array([card["classes"].index(file.parent.name) for file in train])
    expected = np.zeros((len(files), 3))
    for votes, cosine in zip(expected, cosines, strict=True):
        for number in np.argsort(-cosine)[: card["selected"]["neighbours"]]:
            votes[truth[number]] += np.exp(cosine[number] / card["selected"]["temperature"])
    expected /= expected.sum(1, keepdims=True)
    made = mlfusion.predict(folder, files, top=3)
    np.testing.assert_allclose(probabilities(made, card["classes"]), expected, atol=1e-4)


def test_a_number_by_hand(tmp_path: Path) -> None:
    """Ridge regression gives the number less the training mean, over the training deviation."""
    save_model("vit", tmp_path / "vit")
    data = save_images(tmp_path / "colours", {"train": 8, "test": 4})
    files, red = {}, {}
    for split in ("train", "test"):
        files[split] = sorted((data / split).rglob("*.png"))
        red[split] = np.array([np.asarray(Image.open(file))[..., 0].mean() for file in files[split]])
        lines = [f"{file.relative_to(data)},{number}" for file, number in zip(files[split], red[split], strict=True)]
        (data / f"{split}.csv").write_text("\n".join(["path,redness", *lines]) + "\n")
    reading = mlfusion.ReadOptions(label_column="redness", target="number")
    mlfusion.extract(str(tmp_path / "vit"), str(data), read=reading, dtype="float32")
    [row] = mlfusion.probe(str(data), probes="ap-last/ridge", grid="quick", seeds=(0,), save=True).rows
    folder = Path("results/probes") / row.id
    card, weights = json.loads((folder / "card.json").read_text()), load_file(folder / "probe.safetensors")
    tokens = unit(tokens_by_hand(tmp_path, files["test"], [4])[:, 1:])[:, 0]
    expected = (tokens @ weights["weight"].T + weights["bias"])[:, 0] * red["train"].std() + red["train"].mean()
    made = mlfusion.predict(folder, files["test"])
    np.testing.assert_allclose([one.number for one in made], expected, rtol=1e-4)
    assert card["target"]["kind"] == "number" and made[0].top == ()
    assert made[0].to_json() == {"image": str(files["test"][0]), "number": made[0].number}
    assert np.corrcoef([one.number for one in made], red["test"])[0, 1] > 0.9  # and it is what was asked for


@pytest.mark.long
def test_an_images_prediction_does_not_depend_on_its_company(root: Path) -> None:
    folder = probed(root, "cls+ap-last/attentive")
    files = sorted((root / "colours" / "test").rglob("*.png"))
    together = mlfusion.predict(folder, files, top=3)
    for file, one in zip(files[::-1], together[::-1], strict=True):
        [alone] = mlfusion.predict(folder, [file], top=3)
        assert dict(alone.top) == pytest.approx(dict(one.top), abs=1e-5)
    assert mlfusion.predict(folder, []) == []
