"""Every tensor of a checkpoint is used or has a reason not to be; every tensor that is needed is there, in its shape."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tampering
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file
from test_conversion import open_clip, timm, write_open_clip, write_timm
from tiny import save_model
from torch import Tensor

from mlfusion import models
from mlfusion.errors import BadModel
from mlfusion.models.backbone import Backbone
from mlfusion.models.backbone.loading import memory_of
from mlfusion.models.backbone.tracing import CallRecorder
from mlfusion.workflows import doctor

Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]
PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def edit(folder: Path, change: Edit) -> Path:
    """Other tensors in a folder's file."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.contiguous().clone() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, {"format": "pt"})
    return folder


def configure(folder: Path, **settings: object) -> Path:
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(body | settings))
    return folder


def features(folder: Path) -> Tensor:
    backbone = Backbone(models.locate(str(folder)))
    return backbone(PIXELS, [(backbone.depth, "all")])[backbone.depth, "all"]


def refusal(folder: Path) -> str:
    with pytest.raises(BadModel) as refused:
        features(folder)
    return str(refused.value)


def without(part: str) -> Edit:
    return lambda held: {name: tensor for name, tensor in held.items() if part not in name}


def beside(**more: Tensor) -> Edit:
    return lambda held: {**held, **{name.replace("__", "."): tensor for name, tensor in more.items()}}


# --- tensors without a place ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "tensor"),
    [
        ({"qkv_bias": False}, "encoder.layer.0.attention.attention.key.bias (and 11 more tensors)"),
        ({"num_hidden_layers": 3}, "encoder.layer.3."),
    ],
    ids=["biases", "layers"],
)
def test_what_the_configuration_has_no_place_for_is_refused(settings: dict, tensor: str, tmp_path: Path) -> None:
    folder = configure(save_model("vit", tmp_path / "m"), **settings)
    assert f"the weights of m have {tensor}" in refusal(folder)


def test_registers_under_a_class_without_them_are_refused(tmp_path: Path) -> None:
    folder = zoo.save("DINOv2, registers", tmp_path / "m")
    configure(folder, model_type="dinov2", architectures=["Dinov2Model"])
    assert "have embeddings.register_tokens, for which the model of its configuration has no place" in refusal(folder)


QUERY = "encoder.layer.1.attention.attention.query"
CHANGES = {
    f"{QUERY}.lora_A": "an adapter",
    f"{QUERY}.lora_A.default.weight": "an adapter",
    f"{QUERY}.lora_magnitude_vector": "an adapter",
    f"{QUERY}.hada_w1_a": "an adapter",
    f"{QUERY}.weight_scale": "quantised weights or their scale",
    f"{QUERY}.weight_scale_inv": "quantised weights or their scale",
    f"{QUERY}.input_scale": "quantised weights or their scale",
    f"{QUERY}.SCB": "quantised weights or their scale",
    f"{QUERY}.qweight": "quantised weights or their scale",
    f"{QUERY}.weight.absmax": "quantised weights or their scale",
    f"base_model.model.{QUERY}.lora_B.weight": "an adapter",
    "encoder.layer.1.extra": "no place",
    "encoder.layer.1.head.weight": "no place",
    "encoder.layer.1.attention.decoder.weight": "no place",
    "encoder.rel_pos_bias": "no place",
    "extra.weight": "no place",
}


@pytest.mark.parametrize("tensor", CHANGES)
def test_a_tensor_that_could_change_the_features_is_refused(tensor: str, tmp_path: Path) -> None:
    folder = edit(save_model("vit", tmp_path / "m"), lambda held: {**held, tensor: torch.ones(4, 32)})
    said = refusal(folder)
    assert f"have {tensor}, " in said
    assert CHANGES[tensor] in said


HARMLESS = [
    *(
        "classifier.weight",
        "head.bias",
        "head_dist.weight",
        "lm_head.weight",
        "decoder.layers.0.weight",
        "decoder_embed.bias",
    ),
    *(
        "decode_head.classifier.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "text_projection.weight",
        "logit_scale",
    ),
    *("teacher.encoder.layer.0.weight", "model_ema.x", "embeddings.position_ids", "embeddings.mask_token"),
    *("encoder.layer.0.norm.num_batches_tracked", "encoder.layer.0.relative_position_index"),
]


def test_heads_decoders_text_and_buffers_change_nothing(tmp_path: Path) -> None:
    folder = save_model("vit", tmp_path / "m")
    before = features(folder)
    edit(folder, lambda held: {**held, **{name: torch.ones(2, 2) for name in HARMLESS}})
    torch.testing.assert_close(features(folder), before, rtol=0, atol=0)


def headed(kind: str, folder: Path, **settings: object) -> transformers.PreTrainedModel:
    """A model with a head, with random numbers in every tensor, and its checkpoint in `folder`."""
    config = getattr(transformers, kind).config_class(**zoo.PLAIN, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": size})
    )
    return model.eval()


def test_the_norm_of_a_pretraining_head_is_not_that_of_the_tower(tmp_path: Path) -> None:
    """BEiT's head calls it `layernorm`, as the tower does behind its prefix."""
    settings = {"use_absolute_position_embeddings": True, "use_mask_token": True, "use_mean_pooling": False}
    folder = tmp_path / "m"
    model = headed("BeitForMaskedImageModeling", folder, **settings)
    with torch.inference_mode():
        torch.testing.assert_close(features(folder), model.beit(PIXELS).last_hidden_state)
    edit(folder, without("beit.layernorm"))
    assert "lack 2 tensors" in refusal(folder)


def test_a_head_whose_names_only_its_class_tells_is_left_over(tmp_path: Path) -> None:
    """The pyramid of data2vec's segmentation; without its class, and for other names, it is refused."""
    folder = tmp_path / "m"
    headed("Data2VecVisionForSemanticSegmentation", folder, out_indices=[1, 2, 3, 3])
    before = features(folder)
    edit(folder, without("fpn1"))
    torch.testing.assert_close(features(folder), before, rtol=0, atol=0)
    edit(folder, beside(data2vec_vision__encoder__layer__1__extra=torch.ones(3)))
    assert "data2vec_vision.encoder.layer.1.extra" in refusal(folder)
    edit(folder, without("extra"))
    configure(folder, architectures=["Data2VecVisionModel"])
    assert "have fpn2.0.bias" in refusal(folder)


@pytest.mark.parametrize("prefix", ["backbone.", "module.", "model.encoder_q."])
def test_names_of_another_program_are_shown_beside_those_expected(prefix: str, tmp_path: Path) -> None:
    folder = edit(save_model("vit", tmp_path / "m"), lambda held: {prefix + name: held[name] for name in held})
    said = refusal(folder)
    assert "the names in the weights of m are not those of the class" in said
    assert f"the file has {prefix}" in said
    assert re.search("the class has [a-z]", said)


@pytest.mark.parametrize("prefix", ["module.", "student.backbone."])
def test_the_prefix_of_a_wrapper_is_named_for_timm_and_open_clip(prefix: str, tmp_path: Path) -> None:
    def wrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + name: tensor for name, tensor in tensors.items()}

    for folder in (
        write_timm(tmp_path / "t", wrapped(timm()), "vit_base_patch16_224"),
        write_open_clip(tmp_path / "c", wrapped(open_clip())),
    ):
        assert f"begin with {prefix}, as a wrapper of the model saves them" in refusal(folder)


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    """With and without the prefix of a model with a head."""
    folder = edit(save_model("vit", tmp_path / "m"), lambda held: {**held, "vit.layernorm.weight": torch.ones(32)})
    assert "layernorm.weight and vit.layernorm.weight" in refusal(folder)


# --- tensors that are missing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CLIP", "CLIP, vision", "MetaCLIP 2", "SigLIP", "SigLIP 2, NaFlex", "BLIP", "ViT"])
def test_positions_that_are_missing_are_refused_at_every_size(name: str, tmp_path: Path) -> None:
    folder = edit(zoo.save(name, tmp_path / "m"), without("position_embedding"))
    for side in (32, 48, 64):
        size = {"height": side, "width": side}
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"size": size, "crop_size": size}))
        assert re.search("lack 1 tensor that the forward pass needs, such as .*position_embedding", refusal(folder))


def test_a_pooler_that_is_missing_is_not_needed(tmp_path: Path) -> None:
    folder = save_model("vit", tmp_path / "m")
    before = features(folder)
    edit(folder, without("pooler"))
    torch.testing.assert_close(features(folder), before, rtol=0, atol=0)


def test_what_the_trial_pass_does_not_read_costs_no_pass_of_its_own(tmp_path: Path) -> None:
    """A missing pooler is read after the last layer, and positions before it."""
    passes = []

    def opened(folder: Path) -> int:
        passes.clear()
        with torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: passes.append(type(module).__name__)
        ):
            Backbone(models.locate(str(folder)))
        return passes.count("ViTModel")

    whole = opened(save_model("vit", tmp_path / "m"))
    assert opened(edit(tmp_path / "m", without("pooler"))) == whole
    with pytest.raises(BadModel):
        opened(edit(tmp_path / "m", without("position_embeddings")))
    assert passes.count("ViTModel") > whole


class _ByRoundabout(torch.nn.Module):
    """Uses its weight by a view, by a view of the view in place of it, and a tied one by another name; one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.viewed, self.tied = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
        self.alias, self.unread = self.tied, torch.nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.viewed.data[None].expand(2, 4)[:, :2].sum() + self.alias.sum()


def test_reading_is_seen_however_a_module_comes_by_its_tensor() -> None:
    recorder, module = CallRecorder(), _ByRoundabout()
    with torch.inference_mode(), recorder.recording([module], dict(module.named_parameters(remove_duplicate=False))):
        module(torch.ones(1))
    [call] = recorder.calls
    assert recorder.reads.keys() == {"viewed", "tied", "alias"}
    assert all(call.begin < step < call.end for step in recorder.reads.values())


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_a_file_that_is_written_again_does_not_change_a_loaded_model(kind: torch.dtype, tmp_path: Path) -> None:
    folder = edit(save_model("vit", tmp_path / "m"), lambda held: {name: held[name].to(kind) for name in held})
    backbone, file = Backbone(models.locate(str(folder))), folder / "model.safetensors"
    before = backbone(PIXELS, [(2, "all")])[2, "all"]
    with open(file, "r+b") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(start)
        stream.write(bytes(file.stat().st_size - start))
    torch.testing.assert_close(backbone(PIXELS, [(2, "all")])[2, "all"], before, rtol=0, atol=0)


def test_one_layer_scale_that_is_missing_is_refused(tmp_path: Path) -> None:
    """transformers does not report it; some checkpoints of RADIO have none at all."""
    whole = zoo.save("RADIO", tmp_path / "m")
    scale = next(name for name in load_file(whole / "model.safetensors") if re.search(r"ls1|layer_scale1", name))
    assert "layer_scale1.lambda1" in refusal(edit(whole, without(scale)))
    none = edit(whole, lambda held: {name: held[name] for name in held if not re.search(r"\.ls\d|layer_scale", name)})
    assert features(none).isfinite().all()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(number: float, tmp_path: Path) -> None:
    def spoil(held: dict[str, Tensor]) -> dict[str, Tensor]:
        held["layernorm.weight"][3] = number
        return held

    said = refusal(edit(save_model("vit", tmp_path / "m"), spoil))
    assert "layernorm.weight in " in said
    assert "has 1 number that is not finite" in said


@pytest.mark.parametrize(
    "part", ["patch_embeddings.projection.weight", "layer.2.layernorm_before.weight", "layernorm.weight"]
)
@pytest.mark.parametrize("pooler", [True, False])
def test_weights_too_large_for_finite_tokens_are_the_cause_that_is_named(
    part: str, pooler: bool, tmp_path: Path
) -> None:
    def spoil(held: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(name for name in held if name.endswith(part))
        return {
            key: torch.full_like(tensor, 3e38) if key == name else tensor
            for key, tensor in held.items()
            if pooler or "pooler" not in key
        }

    said = refusal(edit(save_model("vit", tmp_path / "m"), spoil))
    assert "the weights of m give numbers that are not finite" in said
    assert re.search(rf"the largest weight is 3e\+38, in \S*{part.rpartition('.layer')[2]}", said)


# --- shapes and types -------------------------------------------------------------------------------------------------


def test_a_shape_that_differs_is_named_with_both_shapes(tmp_path: Path) -> None:
    """A distilled DeiT as a ViT, which has a token less; a larger image; and one matrix."""
    distilled = configure(save_model("deit", tmp_path / "m"), model_type="vit", architectures=["ViTModel"])
    assert "embeddings.position_embeddings in the weights of m has the shape (1, 18, 32)" in refusal(distilled)
    larger = configure(save_model("vit", tmp_path / "n"), image_size=64)
    assert "shape (1, 17, 32), and the model of its configuration has (1, 65, 32)" in refusal(larger)
    spoilt = edit(save_model("vit", tmp_path / "o"), lambda held: held | {"layernorm.weight": torch.ones(16)})
    assert "layernorm.weight in the weights of o has the shape (16,)" in refusal(spoilt)


def test_a_configuration_of_a_huge_model_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    huge = {"hidden_size": 65536, "num_attention_heads": 64, "intermediate_size": 262144}
    folder = configure(save_model("vit", tmp_path / "m"), **huge)
    assert "the model of its configuration has (1, 1, 65536)" in refusal(folder)


def test_shapes_of_timm_and_open_clip_that_differ_are_named(tmp_path: Path) -> None:
    one = write_timm(tmp_path / "timm", timm() | {"pos_embed": torch.ones(1, 9, 32)}, "vit_base_patch16_224")
    assert "has 9 positions in its file; 32 x 32 pixels in patches of 8 need 16" in refusal(one)
    other = write_open_clip(
        tmp_path / "clip",
        open_clip() | {"visual.ln_post.weight": torch.ones(16), "visual.ln_post.bias": torch.ones(16)},
    )
    assert "visual.ln_post.bias in the weights of clip has the shape (16,)" in refusal(other)


INTEGERS = [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("scale", [True, False], ids=["with its scale", "alone"])
@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_quantised_matrices_are_refused(kind: torch.dtype, scale: bool, tmp_path: Path) -> None:
    def quantise(held: dict[str, Tensor]) -> dict[str, Tensor]:
        matrices = [name for name in held if name.endswith("dense.weight")]
        scales = {f"{name}_scale": torch.full((1,), 0.01) for name in matrices if scale}
        return held | {name: (100 * held[name]).to(kind) for name in matrices} | scales

    assert "quantised weights are not read" in refusal(edit(save_model("vit", tmp_path / "m"), quantise))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_every_size_are_read(kind: torch.dtype, tmp_path: Path) -> None:
    folder = edit(save_model("vit", tmp_path / "m"), lambda held: {name: held[name].to(kind) for name in held})
    with torch.inference_mode():
        said = transformers.ViTModel.from_pretrained(folder, dtype=torch.float32).eval()(PIXELS).last_hidden_state
    torch.testing.assert_close(features(folder), said)


# --- timm and open_clip -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"blocks.0.attn.qkv.lora_A": torch.ones(4, 32)}, "blocks.0.attn.qkv.lora_A"),
        ({"fc_norm.weight": torch.ones(32)}, "norm and fc_norm, of which it uses one"),
        ({"extra": torch.ones(3)}, "extra"),
    ],
)
def test_a_tensor_of_timm_without_a_place_is_refused(more: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    assert said in refusal(write_timm(tmp_path / "m", timm() | more, "vit_base_patch16_224"))


def test_a_tensor_in_the_image_tower_of_open_clip_without_a_place_is_refused(tmp_path: Path) -> None:
    assert "visual.extra" in refusal(write_open_clip(tmp_path / "m", open_clip() | {"visual.extra": torch.ones(3)}))


# --- memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from mlfusion import models
from mlfusion.models.backbone import Backbone
Backbone(models.locate(sys.argv[1]))
print(next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(folder: Path) -> int:
    said = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True)
    return int(said.stdout.split()[-1])


def vision_language(folder: Path, **text: int) -> Path:
    """A LLaVA in half precision with a small image tower."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64} | text
    config = transformers.LlavaConfig(
        vision_config={**zoo.PLAIN, "model_type": "clip_vision_model"},
        text_config={"model_type": "llama", "vocab_size": 1000, **sizes},
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}})
    )
    return folder


def test_the_image_tower_of_a_large_model_is_read_without_its_text_model(tmp_path: Path) -> None:
    folder = vision_language(tmp_path / "m")
    held = load_file(folder / "model.safetensors")
    text = [name for name in held if "language_model" in name or "lm_head" in name]
    before = features(folder)
    with torch.inference_mode():
        model = transformers.LlavaModel.from_pretrained(folder, dtype=torch.float32).eval().vision_tower
        said = model.vision_model if hasattr(model, "vision_model") else model
        tokens = said.post_layernorm(said(PIXELS).last_hidden_state)
    torch.testing.assert_close(before, tokens)
    edit(folder, lambda held: {name: held[name] * 0 + torch.nan if name in text else held[name] for name in held})
    torch.testing.assert_close(features(folder), before, rtol=0, atol=0)


def test_doctor_asks_for_the_memory_of_the_tower_and_not_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = vision_language(tmp_path / "m", hidden_size=256, intermediate_size=1024)
    held = load_file(folder / "model.safetensors")
    tower = sum(4 * tensor.numel() for name, tensor in held.items() if "vision" in name)
    assert memory_of(models.locate(str(folder))) == tower
    assert 4 * tower < (folder / "model.safetensors").stat().st_size
    for free, refused in ((3 * tower, False), (tower, True)):
        monkeypatch.setattr(doctor, "available", lambda _, free=free: free)
        found = list(doctor._files(str(folder), "cpu"))
        assert any("GB needed" in one.description for one in found) == refused
        assert any(one.check == "features" for one in found) != refused


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_the_memory_is_that_of_the_tower(tmp_path: Path) -> None:
    small = vision_language(tmp_path / "small")
    large = vision_language(tmp_path / "large", hidden_size=1024, num_hidden_layers=4, intermediate_size=4096)
    nbytes = (large / "model.safetensors").stat().st_size
    assert nbytes > 100e6
    assert peak(large) - peak(small) < nbytes / 4


# --- every tensor of every family -------------------------------------------------------------------------------------

SAMPLE = [*itertools.islice(zoo.ZOO, 0, None, 7)]


@pytest.mark.long
@pytest.mark.parametrize("name", SAMPLE)
def test_a_tensor_that_is_missing_added_renamed_or_reshaped_is_refused_or_not_used(name: str, tmp_path: Path) -> None:
    """A sample of the tensors of a few families; `benchmarks/tensors.py` tries them all."""
    counts = tampering.family(name, tmp_path, every=11)
    assert counts["silently wrong"] == 0
    assert counts["refused"] > 0
