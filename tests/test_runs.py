"""What can run, runs: every family in half precision, pretraining checkpoints by their blocks; videos are named as such."""

import json

import pytest
import torch
import transformers
import zoo
from torch import nn
from zoo import shaken

from mlfusion import models
from mlfusion.errors import BadModel
from mlfusion.models.backbone import Backbone

NEAR = 1e-5
HALF = {"bfloat16": 0.03, "float16": 0.004}  # type → largest error, as a share of the features' norm


@pytest.mark.parametrize("compute", ["bfloat16", pytest.param("float16", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_family_runs_in_half_precision(name, compute, tmp_path):
    checkpoint = models.locate(str(zoo.save(name, tmp_path / "model")))
    side = zoo.ZOO[name].pixels
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    exact = Backbone(checkpoint)
    half = Backbone(checkpoint, compute=compute)
    assert {parameter.dtype for parameter in half._model.parameters()} == {getattr(torch, compute)}
    pairs = [(layer, kind) for layer in (1, exact.depth) for kind in ("ap", "all")]
    want, found = exact(pixels, pairs), half(pixels, pairs)
    for pair in pairs:
        assert (found[pair] - want[pair]).norm() < HALF[compute] * want[pair].norm(), pair


def test_angles_that_a_model_computes_itself_stay_exact(tmp_path):
    backbone = Backbone(models.locate(str(zoo.save("DINOv3", tmp_path / "model"))), compute="bfloat16")
    computed = [
        b for m in backbone._model.modules() for n, b in m._buffers.items() if n in m._non_persistent_buffers_set
    ]
    assert {buffer.dtype for buffer in computed if buffer.is_floating_point()} == {torch.float32}


# --- pretraining checkpoints -----------------------------------------------------------------------------------------


def saved(model: nn.Module, folder, side: int) -> str:
    model.save_pretrained(folder)
    steps = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(steps))
    return str(folder)


HIERA = {
    "embed_dim": 16,
    "depths": [1, 1, 1],
    "num_heads": [1, 2, 4],
    "image_size": [64, 64],
    "patch_size": [7, 7],
    "patch_stride": [4, 4],
    "patch_padding": [3, 3],
    "masked_unit_size": [4, 4],
    "masked_unit_attention": [True, True, False],
    "num_query_pool": 2,
    "decoder_hidden_size": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
PRETRAINED = {  # name → the model with its head, the part that has the blocks, the size of an image
    "BEiT": (
        lambda: transformers.BeitForMaskedImageModeling(
            transformers.BeitConfig(**zoo.PLAIN, vocab_size=20, use_mask_token=True)
        ),
        "beit",
        32,
    ),
    "Hiera": (lambda: transformers.HieraForPreTraining(transformers.HieraConfig(**HIERA)), "hiera", 64),
    "ViT": (
        lambda: transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**zoo.PLAIN, encoder_stride=8)),
        "vit",
        32,
    ),
    "Swin": (
        lambda: transformers.SwinForMaskedImageModeling(
            transformers.SwinConfig(**{**zoo._STAGES, "window_size": 4, "encoder_stride": 8})
        ),
        "swin",
        32,
    ),
    "MAE": (
        lambda: transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(
                **zoo.PLAIN,
                decoder_hidden_size=16,
                decoder_num_attention_heads=2,
                decoder_num_hidden_layers=1,
                decoder_intermediate_size=16,
                mask_ratio=0.0,
            )
        ),
        "vit",
        32,
    ),
}


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_pretraining_checkpoint_gives_its_blocks_and_the_last_layer_as_the_model_leaves_it(name, tmp_path):
    build, part, side = PRETRAINED[name]
    whole = shaken(build())
    folder = saved(whole, tmp_path / "model", side)
    model = getattr(whole, part)
    if name == "Hiera":  # the same tensors without masking, which its pretraining cannot switch off
        model = transformers.HieraModel(model.config, add_pooling_layer=False).eval()
        model.load_state_dict(getattr(whole, part).state_dict())
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    more = {"noise": torch.arange(16.0).expand(2, -1)} if name == "MAE" else {}
    with torch.inference_mode():
        own = model(pixels, **more).last_hidden_state
        for hook in ("norm2", "block"):
            backbone = Backbone(models.locate(f"{folder}:{hook}"))
            found = backbone(pixels, [(backbone.depth, "all")])[backbone.depth, "all"]
            if hook == "norm2" or name in ("BEiT", "Hiera"):  # the others end in a norm of their own
                torch.testing.assert_close(found, own, atol=NEAR, rtol=NEAR)


def test_a_pooler_that_is_there_in_part_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = zoo.save("BEiT, mean pooling", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["pooler.layernorm.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadModel, match=r"pooler\.layernorm\.bias"):
        Backbone(models.locate(str(folder)))


# --- videos and texts ------------------------------------------------------------------------------------------------

VIDEO = {**zoo.PLAIN, "num_frames": 4}
TAKES = {  # name → model, what it is said to take
    "VideoMAE": (lambda: transformers.VideoMAEModel(transformers.VideoMAEConfig(**VIDEO)), "videos of 4 frames"),
    "TimeSformer": (
        lambda: transformers.TimesformerModel(transformers.TimesformerConfig(**VIDEO)),
        "videos of 4 frames",
    ),
    "ViViT": (
        lambda: transformers.VivitModel(transformers.VivitConfig(**VIDEO, tubelet_size=[2, 8, 8])),
        "videos of 4 frames",
    ),
    "X-CLIP": (
        lambda: transformers.XCLIPModel(
            transformers.XCLIPConfig(
                vision_config={
                    **VIDEO,
                    "mit_hidden_size": 32,
                    "mit_intermediate_size": 32,
                    "mit_num_attention_heads": 2,
                },
                text_config=dict(zoo.TEXT),
                projection_dim=32,
            )
        ),
        "videos of 4 frames",
    ),
    "ViLT": (
        lambda: transformers.ViltModel(transformers.ViltConfig(**zoo.PLAIN, vocab_size=60, max_position_embeddings=8)),
        "a text with each image",
    ),
}


@pytest.mark.parametrize("name", TAKES)
def test_a_model_of_videos_or_of_texts_is_named_as_such(name, tmp_path):
    build, taken = TAKES[name]
    folder = saved(build(), tmp_path / "model", 32)
    with pytest.raises(BadModel, match=f"takes {taken}.*allowed: a model "):
        Backbone(models.locate(folder))
