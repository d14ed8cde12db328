"""Every layer and token kind against transformers run block by block, with attention and MLP written out here."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import FAMILIES, noise_images, save_model
from torch import nn

from mlfusion import models
from mlfusion.errors import BadModel
from mlfusion.models.backbone import Backbone

# family → blocks, attention, its output projection, norm1, norm2, final norm, tokens before the patches
WORDS = {
    "vit": ("layers", "attention", "o_proj", "layernorm_before", "layernorm_after", "layernorm", 1),
    "deit": ("layers", "attention", "o_proj", "layernorm_before", "layernorm_after", "layernorm", 2),
    "mae": ("layers", "attention", "o_proj", "layernorm_before", "layernorm_after", "layernorm", 1),
    "dinov2": ("encoder.layer", "attention", "o_proj", "norm1", "norm2", "layernorm", 1),
    "clip": ("encoder.layers", "self_attn", "out_proj", "layer_norm1", "layer_norm2", "post_layernorm", 1),
}
WORDS["clip-vision"] = WORDS["clip"]


def attend(module: nn.Module, out: str, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Self-attention from its weights, [b, t, d] → [b, t, d]."""

    def split(name: str) -> torch.Tensor:
        return getattr(module, name)(x).unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = split("q_proj"), split("k_proj"), split("v_proj")
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return getattr(module, out)((weights @ v).transpose(1, 2).flatten(2))


@torch.inference_mode()
def by_hand(model: nn.Module, family: str, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Second norms of every block, then the final norm: layers 0..L, each [b, t, d]."""
    blocks, attention, out, norm1, norm2, final, _ = WORDS[family]
    heads = model.config.num_attention_heads
    if family == "mae":
        noise = torch.arange(16.0).expand(len(pixels), -1)
        x = model.embeddings(pixels, noise=noise)[0]
    else:
        x = model.embeddings(pixels)
    if family.startswith("clip"):
        x = model.pre_layrnorm(x)
    layers = []
    for block in model.get_submodule(blocks):
        scale1, scale2 = getattr(block, "layer_scale1", nn.Identity()), getattr(block, "layer_scale2", nn.Identity())
        x = x + scale1(attend(getattr(block, attention), out, getattr(block, norm1)(x), heads))
        layers.append(getattr(block, norm2)(x))
        hidden = block.mlp.fc1(layers[-1])
        x = x + scale2(block.mlp.fc2(block.mlp.activation_fn(hidden)))
    return [*layers, getattr(model, final)(x)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_kind_equals_the_blocks_run_by_hand(family, tmp_path):
    folder = save_model(family, tmp_path / family)
    backbone = Backbone(models.locate(str(folder)))
    pixels = backbone.preprocessing(noise_images(3))
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if family == "mae":
        model.config.mask_ratio = 0.0
    expected = by_hand(getattr(model, "vision_model", model), family, pixels)
    prefix = WORDS[family][-1]
    pairs = [(layer, kind) for layer in range(5) for kind in ("cls", "ap", "all")]
    found = backbone(pixels, pairs)
    assert set(found) == set(pairs)
    for layer in range(5):
        want = expected[layer].numpy()
        np.testing.assert_allclose(found[layer, "all"], want, atol=2e-5)
        np.testing.assert_allclose(found[layer, "cls"][:, 0], want[:, 0], atol=2e-5)
        np.testing.assert_allclose(found[layer, "ap"][:, 0], want[:, prefix:].mean(1), atol=2e-5)
    assert backbone.depth == 4
    assert {kind: backbone.kinds[kind] for kind in ("cls", "ap", "all")} == {"cls": 1, "ap": 1, "all": 16 + prefix}


def test_batches_do_not_change_features(tmp_path):
    backbone = Backbone(models.locate(str(save_model("vit", tmp_path / "vit"))))
    pixels = backbone.preprocessing(noise_images(5))
    whole = backbone(pixels, [(2, "cls"), (4, "ap")])
    for pair, tokens in whole.items():
        alone = np.concatenate([backbone(pixels[i : i + 1], [pair])[pair] for i in range(5)])
        np.testing.assert_allclose(alone, tokens, atol=1e-6)


def test_what_lies_deeper_than_asked_is_not_run(tmp_path):
    backbone = Backbone(models.locate(str(save_model("vit", tmp_path / "vit"))))
    ran: list[int] = []
    for number, block in enumerate(backbone.anatomy.blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    backbone(backbone.preprocessing(noise_images(1)), [(1, "cls"), (2, "ap")])
    assert ran == [0, 1]  # layer 2 is the second norm of block 2, before its MLP
    backbone(backbone.preprocessing(noise_images(1)), [(4, "ap")])
    assert ran == [0, 1, 0, 1, 2, 3]


def test_no_hook_is_left_behind(tmp_path):
    backbone = Backbone(models.locate(str(save_model("clip", tmp_path / "clip"))))
    backbone(backbone.preprocessing(noise_images(1)), [(1, "cls"), (4, "ap")])
    assert not any(module._forward_hooks for module in backbone._model.modules())


def test_deit_tiny_agrees_with_hidden_states(shared):
    """Real weights: from the model's own `output_hidden_states`, layer by layer, with attention written out above."""
    folder = shared / "weights" / "deit_tiny_patch16_224"
    backbone = Backbone(models.locate(str(folder)))
    photos = sorted((shared / "dtd10" / "test").glob("*/*.jpg"))[::40]
    pixels = backbone.preprocessing([Image.open(photo) for photo in photos])
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    with torch.inference_mode():
        said = model(pixels, output_hidden_states=True)
        found = backbone(pixels, [(layer, kind) for layer in range(13) for kind in ("cls", "ap")])
        for layer in range(13):
            if layer < 12:
                block, before = model.layers[layer], said.hidden_states[layer]
                after = before + attend(block.attention, "o_proj", block.layernorm_before(before), 3)
                want = block.layernorm_after(after).numpy()
            else:
                want = said.last_hidden_state.numpy()
            np.testing.assert_allclose(found[layer, "cls"][:, 0], want[:, 0], atol=1e-4)
            np.testing.assert_allclose(found[layer, "ap"][:, 0], want[:, 1:].mean(1), atol=1e-4)


def test_weights_that_the_forward_pass_lacks_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_model("vit", tmp_path / "vit")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "2" in name and "fc1" in name.replace("intermediate.dense", "fc1"))
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadModel, match=r"lack 1 tensor .* random"):
        Backbone(models.locate(str(folder)))


def test_pictures_smaller_than_a_patch_are_refused(tmp_path):
    folder = save_model("vit", tmp_path / "vit")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": {"height": 4, "width": 4}}))
    with pytest.raises(BadModel, match=r"\(4, 4\) pixels"):
        Backbone(models.locate(str(folder)))
