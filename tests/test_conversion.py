"""Checkpoints of timm and open_clip: each against the model they are of, written out here from the tensors."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import mlfusion
from mlfusion import models
from mlfusion.errors import BadModel
from mlfusion.models.backbone import Backbone

WIDTH, INNER, BLOCKS, HEADS, PATCH, PIXELS = 32, 64, 3, 2, 8, 32
GATED = 88  # channels of a SwiGLU in the class of transformers, at a ratio of four
PATCHES = (PIXELS // PATCH) ** 2
NEAR = 2e-6


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(max(shape[-1], 8)) for name, shape in shapes.items()
    }


def block_shapes(
    qkv: str, out: str, up: str, down: str, norms: tuple[str, str], inner: int = INNER, hidden: int = INNER
):
    linear = {qkv: (3 * WIDTH, WIDTH), out: (WIDTH, WIDTH), up: (inner, WIDTH), down: (WIDTH, hidden)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linear.items():
        shapes |= {f"{name}weight": shape, f"{name}bias": shape[:1]}
    return shapes | {f"{norm}.{part}": (WIDTH,) for norm in norms for part in ("weight", "bias")}


def timm(
    *,
    cls: int = 1,
    dist: int = 0,
    reg: int = 0,
    positions: int | None = None,
    scales: bool = False,
    swiglu: bool = False,
) -> dict[str, Tensor]:
    """A VisionTransformer of timm, by timm's names."""
    up, down = (2 * GATED, GATED) if swiglu else (INNER, INNER)
    one = block_shapes("attn.qkv.", "attn.proj.", "mlp.fc1.", "mlp.fc2.", ("norm1", "norm2"), up, down)
    if scales:
        one |= {"ls1.gamma": (WIDTH,), "ls2.gamma": (WIDTH,)}
    shapes = {f"blocks.{i}.{name}": shape for i in range(BLOCKS) for name, shape in one.items()}
    tokens = PATCHES + cls + dist if positions is None else positions
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    shapes |= {"pos_embed": (1, tokens, WIDTH), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= {name: (1, n, WIDTH) for name, n in {"cls_token": cls, "dist_token": dist, "reg_token": reg}.items() if n}
    shapes |= {"head.weight": (10, WIDTH), "head.bias": (10,)}
    return random_tensors(shapes)


def timm_clip() -> dict[str, Tensor]:
    tensors = timm()
    del tensors["patch_embed.proj.bias"]
    return tensors | random_tensors({"norm_pre.weight": (WIDTH,), "norm_pre.bias": (WIDTH,)}, 1)


def open_clip() -> dict[str, Tensor]:
    """A CLIP of open_clip, by its names, with something of a text tower."""
    one = block_shapes("attn.in_proj_", "attn.out_proj.", "mlp.c_fc.", "mlp.c_proj.", ("ln_1", "ln_2"))
    shapes = {f"visual.transformer.resblocks.{i}.{name}": shape for i in range(BLOCKS) for name, shape in one.items()}
    shapes |= {f"visual.{norm}.{part}": (WIDTH,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")}
    shapes |= {"visual.conv1.weight": (WIDTH, 3, PATCH, PATCH), "visual.class_embedding": (WIDTH,)}
    shapes |= {"visual.positional_embedding": (PATCHES + 1, WIDTH), "visual.proj": (WIDTH, 20)}
    return random_tensors(shapes | {"text_projection": (8, 20), "logit_scale": (1,), "token_embedding.weight": (9, 8)})


def norm(t: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def attention(x: Tensor, qkv: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor]) -> Tensor:
    """As both libraries do: queries, keys and values stacked in one matrix."""
    q, k, v = F.linear(x, *qkv).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
    return F.linear((weights @ v).transpose(1, 2).flatten(2), *out)


def pair(t: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return t[f"{name}weight"], t[f"{name}bias"]


def timm_by_hand(t: dict[str, Tensor], pixels: Tensor, *, eps: float = 1e-6, act=F.gelu) -> list[Tensor]:
    """norm2 of every block, then the final norm: timm's VisionTransformer, `_pos_embed`, Block and LayerScale."""
    x = F.conv2d(pixels, t["patch_embed.proj.weight"], t.get("patch_embed.proj.bias"), stride=PATCH).flatten(2).mT
    first = [t[name].expand(len(x), -1, -1) for name in ("cls_token", "dist_token", "reg_token") if name in t]
    if t["pos_embed"].shape[1] == x.shape[1]:  # no_embed_class
        x = torch.cat([*first, x + t["pos_embed"]], 1)
    else:
        x = torch.cat([*first, x], 1) + t["pos_embed"]
    if "norm_pre.weight" in t:
        x = norm(t, "norm_pre", x, eps)
    layers = []
    for i in range(BLOCKS):
        b = f"blocks.{i}."
        gates = [t.get(f"{b}ls{half}.gamma", torch.ones(WIDTH)) for half in (1, 2)]
        attended = attention(norm(t, f"{b}norm1", x, eps), pair(t, f"{b}attn.qkv."), pair(t, f"{b}attn.proj."))
        x = x + gates[0] * attended
        layers.append(norm(t, f"{b}norm2", x, eps))
        hidden = F.linear(layers[-1], *pair(t, f"{b}mlp.fc1."))
        if hidden.shape[-1] == 2 * t[f"{b}mlp.fc2.weight"].shape[1]:  # SwiGLUPacked
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        else:
            hidden = act(hidden)
        x = x + gates[1] * F.linear(hidden, *pair(t, f"{b}mlp.fc2."))
    return [*layers, norm(t, "norm", x, eps)]


def open_clip_by_hand(t: dict[str, Tensor], pixels: Tensor, act) -> list[Tensor]:
    """ln_2 of every block, then ln_post of all tokens: open_clip's VisionTransformer and ResidualAttentionBlock."""
    v = "visual."
    x = F.conv2d(pixels, t[f"{v}conv1.weight"], stride=PATCH).flatten(2).mT
    x = torch.cat([t[f"{v}class_embedding"].expand(len(x), 1, -1), x], 1) + t[f"{v}positional_embedding"]
    x = norm(t, f"{v}ln_pre", x, 1e-5)
    layers = []
    for i in range(BLOCKS):
        b = f"{v}transformer.resblocks.{i}."
        x = x + attention(norm(t, f"{b}ln_1", x, 1e-5), pair(t, f"{b}attn.in_proj_"), pair(t, f"{b}attn.out_proj."))
        layers.append(norm(t, f"{b}ln_2", x, 1e-5))
        x = x + F.linear(act(F.linear(layers[-1], *pair(t, f"{b}mlp.c_fc."))), *pair(t, f"{b}mlp.c_proj."))
    return [*layers, norm(t, f"{v}ln_post", x, 1e-5)]


def quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def write_timm(folder, tensors, architecture: str, pickled: bool = False):
    folder.mkdir()
    cfg = {
        "input_size": [3, PIXELS, PIXELS],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    body = {"architecture": architecture, "num_classes": 10, "model_args": {"num_heads": HEADS}, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(body))
    if pickled:
        torch.save({"state_dict": tensors}, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def write_open_clip(folder, tensors, **more):
    folder.mkdir()
    vision = {"image_size": PIXELS, "layers": BLOCKS, "width": WIDTH, "patch_size": PATCH, "head_width": WIDTH // HEADS}
    body = {
        "model_cfg": {"embed_dim": 20, "vision_cfg": vision, **more},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(body))
    torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    return folder


TIMM = {  # name → architecture, tensors, tokens before the patches, eps and activation
    "ViT": ("vit_base_patch16_224", timm, 1, {}),
    "DeiT, distilled": ("deit_base_distilled_patch16_224", lambda: timm(dist=1), 2, {}),
    "DeiT 3": ("deit3_base_patch16_224", lambda: timm(positions=PATCHES, scales=True), 1, {}),
    "DINOv2": ("vit_base_patch14_dinov2", lambda: timm(scales=True), 1, {}),
    "DINOv2, registers": ("vit_base_patch14_reg4_dinov2", lambda: timm(reg=4, positions=PATCHES, scales=True), 5, {}),
    "DINOv2, giant": ("vit_giant_patch14_dinov2", lambda: timm(scales=True, swiglu=True), 1, {}),
    "CLIP": ("vit_base_patch16_clip_224", timm_clip, 1, {"eps": 1e-5}),
    "CLIP, QuickGELU": ("vit_base_patch16_clip_quickgelu_224", timm_clip, 1, {"eps": 1e-5, "act": quick}),
    "without a class token": ("vit_base_patch16_gap_224", lambda: timm(cls=0), 0, {}),
}


@pytest.mark.parametrize("name", TIMM)
def test_a_checkpoint_of_timm_gives_what_timm_computes(name, tmp_path):
    architecture, make, before, words = TIMM[name]
    tensors = make()
    backbone = Backbone(models.locate(str(write_timm(tmp_path / "m", tensors, architecture, pickled=name == "ViT"))))
    pixels = torch.randn(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(3))
    found = backbone(pixels, itertools.product(range(BLOCKS + 1), ("all", "ap")))
    for layer, want in enumerate(timm_by_hand(tensors, pixels, **words)):
        torch.testing.assert_close(found[layer, "all"], want, atol=NEAR, rtol=NEAR)
        torch.testing.assert_close(found[layer, "ap"][:, 0], want[:, before:].mean(1), atol=NEAR, rtol=NEAR)
    assert backbone.kinds.get("cls", 0) == (before > 0)
    assert backbone.kinds.get("registers", 0) == (4 if "registers" in name else 0)
    assert backbone.kinds.get("dist", 0) == ("distilled" in name)


@pytest.mark.parametrize(("more", "act"), [({"quick_gelu": True}, quick), ({}, F.gelu)])
def test_a_checkpoint_of_open_clip_gives_what_open_clip_computes(more, act, tmp_path):
    tensors = open_clip()
    folder = write_open_clip(tmp_path / "m", tensors, **more)
    pixels = torch.randn(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(3))
    found = Backbone(models.locate(str(folder)))(pixels, [(layer, "all") for layer in range(BLOCKS + 1)])
    by_hand = open_clip_by_hand(tensors, pixels, act)
    for layer, want in enumerate(by_hand):
        torch.testing.assert_close(found[layer, "all"], want, atol=NEAR, rtol=NEAR)
    projected = Backbone(models.locate(f"{folder}:projected"))(pixels, [(BLOCKS, "all")])[BLOCKS, "all"]
    torch.testing.assert_close(projected, by_hand[-1] @ tensors["visual.proj"], atol=NEAR, rtol=NEAR)


@pytest.mark.slow
def test_such_a_checkpoint_goes_through_both_stages(tmp_path):
    from tiny import save_images

    folder, data = (
        write_timm(tmp_path / "m", timm(), "vit_base_patch16_224"),
        save_images(tmp_path / "d", {"train": 8, "test": 4}),
    )
    [one, _] = mlfusion.extract(str(folder), str(data))
    assert (one.entry.spec.model.family, one.entry.spec.model.depth, one.entry.spec.model.width) == (
        "vit",
        BLOCKS,
        WIDTH,
    )
    done = mlfusion.probe(str(data), model=str(folder), probes="cls-last/linear", grid="quick", seeds=(0,))
    assert done.rows[0].test > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"blocks.0.attn.q_norm.weight": torch.ones(16)},
            r"vit_base_patch16_224 has blocks\.0\.attn\.q_norm\.weight, for which",
        ),
        (lambda t: t | {"attn_pool.q.weight": torch.ones(16, 16)}, r"has attn_pool\.q\.weight"),
        (lambda t: {k: v for k, v in t.items() if k != "pos_embed"}, "has no pos_embed"),
        (lambda t: {k: v for k, v in t.items() if "blocks.0.mlp" not in k}, r"has no blocks\.0\.mlp\.fc1\.weight"),
        (
            lambda t: {k: v for k, v in t.items() if k != "blocks.1.norm2.bias"},
            r"lack 1 tensor .*layers?\.1\.layernorm_after\.bias",
        ),
    ],
)
def test_what_transformers_cannot_compute_is_refused(change, message, tmp_path):
    folder = write_timm(tmp_path / "m", change(timm()), "vit_base_patch16_224")
    with pytest.raises(BadModel, match=message):
        Backbone(models.locate(str(folder)))


@pytest.mark.parametrize("block", [0, 1])
def test_a_layer_scale_that_is_lost_is_not_taken_for_one(block, tmp_path):
    tensors = timm(scales=True)
    del tensors[f"blocks.{block}.ls1.gamma"]
    folder = write_timm(tmp_path / "m", tensors, "vit_base_patch14_dinov2")
    with pytest.raises(BadModel, match=rf"lack 1 tensor .*{block}\.layer_scale1\.lambda1"):
        Backbone(models.locate(str(folder)))


def test_no_pickle_is_loaded(tmp_path):
    folder = write_open_clip(tmp_path / "m", open_clip())
    torch.save({"visual.conv1.weight": print}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(BadModel, match="more than plain tensors"):
        Backbone(models.locate(str(folder)))
