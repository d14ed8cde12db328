"""Pre-training by formula: how the model that ships with the package is made, and made again, from one recipe.

`pretrain("pipelines/formula-vit.toml", out)` draws a bank of patterns (`formula.py`), trains a vision transformer on
pictures composed from them, and leaves a Hugging Face folder. Five questions are asked about each picture:

formula   which formula drew this pattern (cross-entropy, of CLS and of the mean patch token)
fill      which formula drew the second texture in it, where there is one (cross-entropy, of the mean patch token)
contrast  which other picture shows the same scene (NT-Xent among the pictures of a crew, arXiv 2002.05709; of both)
layout    where the ink, the colours and the edges are (smooth L1, of CLS): the others would give place and colour away
grain     mean and spread of the colours, edges by size and direction (smooth L1, of the mean patch token)

The recipe and its seed determine pictures, order and initial weights: every step draws from a stream named by (seed,
step, crew), so a run that was stopped goes on from its checkpoint as if it had not been. Another machine, with other
kernels, computes the same with other roundings.

Made for few cores: bfloat16 products over float32 master weights, some patches left out of nearly every step (arXiv
2212.00794), Muon for the matrices (Jordan et al. 2024), and a batch split into crews that each run on one thread from
the pictures to the gradient.
"""

import hashlib
import json
import os
import tempfile
import time
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from mlfusion.embedded import formula
from mlfusion.errors import BadRecipe

PATTERNS = "patterns.npy"
QUESTIONS = ("formula", "fill", "contrast", "layout", "grain")

# --- The recipe ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Network:
    """A plain ViT: one CLS token, learned positions, LayerNorm before attention and MLP."""

    image_px: int
    patch_px: int
    depth: int
    width: int
    heads: int


@dataclass(frozen=True, kw_only=True)
class Images:
    """Which patterns are drawn, once, before training."""

    families: tuple[str, ...]
    classes: int  # of each family
    instances: int  # of each class
    pattern_px: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, how fast, on how much at a time."""

    seed: int
    steps: int
    crews: int  # parts of a batch, each on one thread; contrast is within a crew
    scenes: int  # of each crew in each step; twice as many pictures
    kept_patches: int  # of every picture, until the last steps
    whole_last: int  # steps at the end that see every patch
    learning_rate: float
    weight_decay: float
    warmup: int  # steps with a rising rate
    cooldown: int  # steps with a falling rate, at the end; until then a longer run's weights are the same
    checkpoint_every: int  # steps


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How much each question counts."""

    formula: float
    fill: float
    contrast: float
    layout: float
    grain: float
    temperature: float  # of the contrast


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that determines the weights."""

    network: Network
    images: Images
    schedule: Schedule
    weights: Weights

    @property
    def digest(self) -> str:
        """Twelve hex digits naming this recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; every field must be there, and nothing else may be."""
    try:
        body = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as err:
        raise BadRecipe(
            f"cannot read the recipe {path}: {err.strerror}; the one that ships: mlfusion pretrain pipelines/formula-vit.toml"
        ) from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise BadRecipe(f"{path} is not TOML: {err}") from err
    rooms = {f.name: f.type for f in fields(Recipe)}
    refuse_strangers(path, "sections", body, rooms)
    recipe = Recipe(**{name: section(path, name, kind, body[name]) for name, kind in rooms.items()})
    check(path, recipe)
    return recipe


def refuse_strangers(path: Path, what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Neither a key that means nothing nor a missing one."""
    unknown, missing = sorted(set(given) - set(allowed)), sorted(set(allowed) - set(given))
    if unknown or missing:
        found = (("unknown", unknown), ("missing", missing))
        wrong = [f"{word}: {', '.join(names)}" for word, names in found if names]
        raise BadRecipe(
            f"{path}: {what} {'; '.join(wrong)}. Exactly these are allowed and needed: {', '.join(sorted(allowed))}."
        )


def section(path: Path, name: str, kind: Any, body: Any) -> Any:
    """One table of the recipe as its dataclass, types checked."""
    if not isinstance(body, dict):
        raise BadRecipe(f"{path}: {name} must be a table; write [{name}] above its keys.")
    types = typing.get_type_hints(kind)
    refuse_strangers(path, f"keys of [{name}]", body, types)
    values = {}
    for key, wanted in types.items():
        value = body[key]
        if wanted is float and type(value) is int:
            value = float(value)
        if wanted == tuple[str, ...] and isinstance(value, list) and all(isinstance(v, str) for v in value):
            value = tuple(value)
        elif type(value) is not wanted:
            expected = (
                "a list of names" if wanted == tuple[str, ...] else "a whole number" if wanted is int else "a number"
            )
            raise BadRecipe(f"{path}: {key} in [{name}] is {body[key]!r}; it must be {expected}.")
        values[key] = value
    return kind(**values)


def check(path: Path, recipe: Recipe) -> None:
    """What the types cannot say."""
    net, images, plan = recipe.network, recipe.images, recipe.schedule
    strange = sorted(set(images.families) - set(formula.FAMILIES))
    patches = (net.image_px // max(net.patch_px, 1)) ** 2
    for wrong, message in (
        (strange, f"families has no {', '.join(strange)}; it may name {', '.join(formula.FAMILIES)}"),
        (not set(images.families) & set(formula.TEXTURES), f"families needs a texture: one of {', '.join(formula.TEXTURES)}"),
        (net.patch_px < 1 or net.image_px % net.patch_px, "image_px must be a multiple of patch_px"),
        (net.heads < 1 or net.width % net.heads, "width must be a multiple of heads"),
        (
            min(net.depth, images.classes, images.instances, plan.steps, plan.crews, plan.checkpoint_every) < 1,
            "depth, classes, instances, steps, crews and checkpoint_every start at 1",
        ),
        (plan.scenes < 2, "scenes must be at least 2: contrast needs another scene"),
        (not 1 <= plan.kept_patches <= patches, f"kept_patches must lie in 1 … {patches}, the patches of a picture"),
        (
            not all(0 <= part <= plan.steps for part in (plan.whole_last, plan.warmup, plan.cooldown)),
            f"whole_last, warmup and cooldown are steps, 0 … {plan.steps}",
        ),
    ):  # fmt: skip
        if wrong:
            raise BadRecipe(f"{path}: {message}.")


# --- The network -----------------------------------------------------------------------------------------------------


class Questions(nn.Module):
    """What is asked of the network while it learns; left behind afterwards."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.formula_of_cls = nn.Linear(width, classes)
        self.formula_of_patches = nn.Linear(width, classes)
        self.fill = nn.Linear(width, classes)
        self.contrast = nn.Sequential(nn.Linear(2 * width, 512), nn.GELU(), nn.Linear(512, 128))
        self.layout = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, formula.LAYOUT))
        self.grain = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, formula.GRAIN))


class Learner(nn.Module):
    """The ViT and the questions, seeded."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        net = recipe.network
        torch.manual_seed(recipe.schedule.seed)
        self.vit = ViTModel(vit_config(net), add_pooling_layer=False)
        with torch.no_grad():  # drawn here, so that they do not depend on how a version of transformers draws them
            self.vit.embeddings.cls_token.normal_(0, 0.02)
            self.vit.embeddings.position_embeddings.normal_(0, 0.02)
        self.questions = Questions(net.width, recipe.images.classes * len(recipe.images.families))


def vit_config(net: Network) -> ViTConfig:
    """The network in transformers' words."""
    return ViTConfig(
        image_size=net.image_px,
        patch_size=net.patch_px,
        num_hidden_layers=net.depth,
        hidden_size=net.width,
        num_attention_heads=net.heads,
        intermediate_size=4 * net.width,
        layer_norm_eps=1e-6,
    )


def embedded(vit: ViTModel, pictures: Tensor, kept: int, draw: torch.Generator) -> Tensor:
    """Pictures `[b, 3, px, px]` → CLS and `kept` of the patches, chosen at random, `[b, 1 + kept, width]`."""
    parts = vit.embeddings
    projection = parts.patch_embeddings.projection
    patch_px: Any = vit.config.patch_size
    patches = F.unfold(pictures, patch_px, stride=patch_px).transpose(1, 2).to(projection.weight.dtype)
    places = parts.position_embeddings[:, 1:]
    if kept < patches.shape[1]:
        chosen = torch.rand(patches.shape[:2], generator=draw).topk(kept, dim=1).indices
        patches = patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2]))
        # A product with 0 and 1 instead of indexing: its gradient is a sum in a fixed order.
        places = F.one_hot(chosen, places.shape[1]).to(places.dtype) @ places[0]
    tokens = F.linear(patches, projection.weight.flatten(1), projection.bias) + places
    cls = parts.cls_token + parts.position_embeddings[:, :1]
    return torch.cat([cls.expand(len(pictures), -1, -1), tokens], 1)


def encoded(vit: ViTModel, tokens: Tensor) -> Tensor:
    """The blocks and the final norm, `[b, t, width]` → the same; what `ViTModel` computes, with its weights.

    Queries, keys and values in one product and attention in plain batched ones: for a few dozen tokens, about half the
    time of the fused CPU kernel's forward and backward pass.
    """
    b, t, width = tokens.shape
    heads = vit.config.num_attention_heads
    each = width // heads
    block: Any
    for block in vit.layers:
        attention = block.attention
        scale = each**-0.5
        weight = torch.cat([attention.q_proj.weight * scale, attention.k_proj.weight, attention.v_proj.weight])
        bias = torch.cat([attention.q_proj.bias * scale, attention.k_proj.bias, attention.v_proj.bias])
        joint = F.linear(block.layernorm_before(tokens), weight, bias).view(b, t, 3, heads, each)
        q, k, v = joint.permute(2, 0, 3, 1, 4).reshape(3, b * heads, t, each).unbind(0)
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        tokens = tokens + attention.o_proj(mixed.view(b, heads, t, each).transpose(1, 2).reshape(b, t, width))
        tokens = tokens + block.mlp(block.layernorm_after(tokens))
    return vit.layernorm(tokens)


# --- One step --------------------------------------------------------------------------------------------------------


def pictures_of(bank: formula.Bank, recipe: Recipe, step: int, crew: int) -> tuple[formula.Pair, torch.Generator]:
    """The pictures of one crew in one step, and the stream that drew them."""
    plan = recipe.schedule
    rng = formula.stream("pretrain", plan.seed, step, crew)
    draw = torch.Generator().manual_seed(int(rng.integers(2**62)))
    rows = rng.integers(len(bank.ink), size=plan.scenes)
    fills = rng.choice(bank.textures, size=plan.scenes)
    return formula.pair(bank, rows, fills, recipe.network.image_px, draw), draw


def asked(learner: Learner, pair: formula.Pair, recipe: Recipe, kept: int, draw: torch.Generator) -> dict[str, Tensor]:
    """The loss of every question, unweighted."""
    ask = learner.questions
    out = encoded(learner.vit, embedded(learner.vit, pair.pictures, kept, draw))
    cls, mean = out[:, 0], out[:, 1:].mean(1)

    def named(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=0.05)

    shown = pair.fill_shows
    codes = F.normalize(ask.contrast(torch.cat([cls, mean], 1)).float(), dim=1)
    alike = (codes @ codes.T / recipe.weights.temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(codes)).roll(len(codes) // 2)
    return {
        "formula": (named(ask.formula_of_cls(cls), pair.labels) + named(ask.formula_of_patches(mean), pair.labels)) / 2,
        "fill": named(ask.fill(mean[shown]), pair.fill_labels[shown]) if shown.any() else mean.sum() * 0,
        "contrast": F.cross_entropy(alike, partner),
        "layout": F.smooth_l1_loss(ask.layout(cls).float(), pair.layout),
        "grain": F.smooth_l1_loss(ask.grain(mean).float(), pair.grain),
    }


def rate(plan: Schedule, step: int) -> float:
    """The learning rate: up, level, down (warm-up, stable, decay)."""
    up = (step + 1) / max(plan.warmup, 1)
    down = (plan.steps - step) / max(plan.cooldown, 1)
    return plan.learning_rate * min(1.0, up, down)


def orthogonal(update: Tensor) -> Tensor:
    """Matrices `[n, r, c]`, r ≤ c → about the nearest ones with orthonormal rows (Newton-Schulz; Jordan et al. 2024)."""
    x = (update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.float()


class Optimiser:
    """Muon for the matrices inside the blocks, AdamW for all else, over float32 masters of the bfloat16 weights."""

    def __init__(self, learner: Learner, plan: Schedule) -> None:
        self.plan = plan
        self.live = dict(learner.named_parameters())
        self.master = {name: p.detach().float().clone() for name, p in self.live.items()}
        inner = [n for n, p in self.live.items() if n.startswith("vit.layers.") and p.ndim == 2]
        self.matrices = [
            [n for n in inner if self.live[n].shape == s] for s in sorted({self.live[n].shape for n in inner})
        ]
        self.momentum = {n: torch.zeros_like(self.master[n]) for n in inner}
        rest = [n for n in self.live if n not in self.momentum]
        # Matrices of the questions decay; vectors, positions and the CLS token do not.
        decays = {True: [n for n in rest if self.live[n].ndim == 2], False: [n for n in rest if self.live[n].ndim != 2]}
        self.adam = torch.optim.AdamW(
            [
                {"params": [self.master[n] for n in names], "weight_decay": plan.weight_decay * on}
                for on, names in decays.items()
            ],
            betas=(0.9, 0.98),
        )
        self.show()

    def show(self) -> None:
        """Copy the masters to the weights that compute."""
        with torch.no_grad():
            for name, p in self.live.items():
                p.copy_(self.master[name])

    def step(self, gradient: dict[str, Tensor], rate: float) -> None:
        """One update from the gradient of every weight; its norm is clipped at 1."""
        norm = torch.stack([g.norm() for g in gradient.values()]).norm()
        clip = (1 / norm).clamp(max=1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        for name, p in self.master.items():
            p.grad = gradient[name] * clip
        self.adam.step()
        with torch.no_grad():
            for names in self.matrices:
                grads = torch.stack([gradient[n] * clip for n in names])
                old = torch.stack([self.momentum[n] for n in names])
                old.lerp_(grads, 0.05)
                update = grads.lerp(old, 0.95)
                flat = update if update.shape[1] <= update.shape[2] else update.mT
                update = orthogonal(flat) if flat is update else orthogonal(flat).mT
                # Scaled to the size of Adam's updates (Liu et al. 2025), so that one rate serves both.
                step = rate * 0.2 * max(update.shape[1:]) ** 0.5
                for name, u, m in zip(names, update, old, strict=True):
                    self.master[name].mul_(1 - rate * self.plan.weight_decay).sub_(u, alpha=step)
                    self.momentum[name] = m
        self.show()

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {"master": self.master, "momentum": self.momentum, "adam": self.adam.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        for name, value in state["master"].items():
            self.master[name].copy_(value)
        self.momentum = state["momentum"]
        self.adam.load_state_dict(state["adam"])
        self.show()


# --- The run ---------------------------------------------------------------------------------------------------------


def pretrain(
    recipe: Path, out: Path, *, work: Path | None = None, progress: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Run a recipe and leave a Hugging Face folder in `out`; returns what it took.

    Args:
        recipe: a TOML file, see `Recipe`.
        out: a folder; its files are replaced when the run is complete, a model card in it is left alone.
        work: keeps the bank of patterns (about 160 MB) and the checkpoint, from which the same call goes on after an
            interruption; default: a folder named by the recipe's digest where the system keeps temporary files.
        progress: gets a dict at every step: stage, done, of, seconds, and the losses.

    Raises:
        BadRecipe: it says something that no recipe may say, or lacks something.
    """
    plan = load_recipe(recipe)
    work = work or Path(tempfile.gettempdir()) / f"mlfusion-pretrain-{plan.digest}"
    work.mkdir(parents=True, exist_ok=True)
    tell = progress or (lambda event: None)

    bank = drawn(plan, work, tell)
    learner = Learner(plan).bfloat16()
    optimiser = Optimiser(learner, plan.schedule)
    checkpoint = work / "checkpoint.pt"
    step, seconds, history = 0, 0.0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        optimiser.restore(saved["optimiser"])
        step, seconds, history = saved["step"], saved["seconds"], saved["history"]

    # Crews are the parallelism. Threads inside each operation would mostly wait: these are too small to share.
    with (
        single_threaded(),
        ThreadPoolExecutor(plan.schedule.crews, initializer=torch.set_num_threads, initargs=(1,)) as crews,
    ):
        while step < plan.schedule.steps:
            began = time.perf_counter()
            losses = one_step(learner, optimiser, bank, plan, step, crews)
            step, seconds = step + 1, seconds + time.perf_counter() - began
            history.append([round(losses[name], 4) for name in QUESTIONS])
            if step % plan.schedule.checkpoint_every == 0 or step == plan.schedule.steps:
                save = {"step": step, "seconds": seconds, "history": history, "optimiser": optimiser.state()}
                replaced(checkpoint, partial(torch.save, save))
            tell({"stage": "train", "done": step, "of": plan.schedule.steps, "seconds": seconds, **losses})
    report = {
        "recipe": plan.digest,
        "steps": step,
        "pictures": step * plan.schedule.crews * plan.schedule.scenes * 2,
        "patterns": len(bank.ink),
        "seconds": round(seconds),
        "losses": dict(zip(QUESTIONS, np.mean(history[-50:], axis=0).round(3).tolist(), strict=True)),
    }
    write_folder(plan, optimiser.master, report, Path(out))
    checkpoint.unlink()
    (work / PATTERNS).unlink()
    with suppress(OSError):  # the caller keeps something of his own there
        work.rmdir()
    return report | {"out": str(out)}


@contextmanager
def single_threaded() -> Iterator[None]:
    """One thread in each of torch's operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def one_step(
    learner: Learner, optimiser: Optimiser, bank: formula.Bank, plan: Recipe, step: int, crews: ThreadPoolExecutor
) -> dict[str, float]:
    """Pictures, losses, gradients, update; returns the losses."""
    schedule = plan.schedule
    last = step >= schedule.steps - schedule.whole_last
    kept = (plan.network.image_px // plan.network.patch_px) ** 2 if last else schedule.kept_patches
    weights = asdict(plan.weights)

    def work(crew: int) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        pair, draw = pictures_of(bank, plan, step, crew)
        losses = asked(learner, pair, plan, kept, draw)
        total = torch.stack([weights[name] * losses[name] for name in QUESTIONS]).sum()
        # A question that nothing was asked of in this step (a fill that shows nowhere) has a gradient of zero.
        gradients = torch.autograd.grad(total, list(optimiser.live.values()), materialize_grads=True)
        return gradients, {name: losses[name].item() for name in QUESTIONS}

    # Summed in the crews' order, not in that of their arrival: floating-point sums depend on it.
    results = list(crews.map(work, range(schedule.crews)))
    gradient = {
        name: torch.stack([gradients[i].float() for gradients, _ in results]).sum(0) / schedule.crews
        for i, name in enumerate(optimiser.live)
    }
    optimiser.step(gradient, rate(schedule, step))
    return {name: sum(losses[name] for _, losses in results) / schedule.crews for name in QUESTIONS}


def drawn(plan: Recipe, work: Path, tell: Callable[[dict[str, Any]], None]) -> formula.Bank:
    """The bank of patterns as a memory map in `work`; drawn if it is not there."""
    images, seed = plan.images, plan.schedule.seed
    path = work / PATTERNS
    shape = (len(images.families) * images.classes * images.instances, images.pattern_px, images.pattern_px)

    def fill(draft: Path) -> None:
        ink = np.lib.format.open_memmap(draft, mode="w+", dtype=np.uint8, shape=shape)
        formula.draw_into(ink, images.families, images.classes, images.instances, seed, tell)
        ink.flush()

    if not path.exists():
        replaced(path, fill)
    return formula.bank(np.load(path, mmap_mode="r"), images.families, images.classes, images.instances)


def replaced(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under another name and rename: what has the name is whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_folder(plan: Recipe, master: dict[str, Tensor], report: dict[str, Any], out: Path) -> None:
    """The Hugging Face folder: config, float16 weights, preprocessing, and what the run took."""
    net = plan.network
    vit = ViTModel(vit_config(net), add_pooling_layer=False)
    vit.load_state_dict({n.removeprefix("vit."): p for n, p in master.items() if n.startswith("vit.")})
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as draft:
        vit.half().save_pretrained(draft)
        (Path(draft) / "preprocessor_config.json").write_text(
            json.dumps(preprocessing(net), indent=2) + "\n", encoding="utf-8"
        )
        (Path(draft) / "pretraining.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        out.mkdir(exist_ok=True)
        for file in sorted(Path(draft).iterdir()):
            file.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(file, out / file.name)


def preprocessing(net: Network) -> dict[str, Any]:
    """Squash to the input size, RGB, 0 … 255 to −1 … 1: as `ViTImageProcessor` reads it."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": net.image_px, "width": net.image_px},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
