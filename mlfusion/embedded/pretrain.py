"""Pre-training by formula: makes the model that ships with the package, from one recipe.

`pretrain("pipelines/formula-vit.toml", out)` draws a bank of patterns (`formula`), trains a vision transformer on pictures
composed from them (`scenes`), and writes a Hugging Face folder. There are five objectives:

formula   the class of the pattern (cross-entropy, of CLS and of the mean patch token)
fill      the class of the second texture, in pictures that have one (cross-entropy, of the mean patch token)
contrast  the other picture of the same scene (NT-Xent among the pictures of a crew, arXiv 2002.05709; of both tokens)
layout    the places of ink, colours and edges (smooth L1, of CLS): the other objectives would discard place and colour
grain     mean and spread of the colours, edges by size and direction (smooth L1, of the mean patch token)

The recipe and its seed determine pictures, order and initial weights. The random stream of each step is named by (seed, step,
crew), so that a run that was stopped continues from its checkpoint with the same numbers. On another machine, with other
kernels, only the rounding differs.

It is designed for few cores: bfloat16 products with float32 master weights, only some patches in most steps (arXiv
2212.00794), Muon for the matrices (Jordan et al. 2024), and a batch of several parts, the crews; one thread computes all of
a crew's step, from the pictures to the gradient.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTModel

from mlfusion.embedded.formula import Bank, draw_into, label_bank
from mlfusion.embedded.network import PretrainingModel, embed, encode, vit_config
from mlfusion.embedded.optimizer import MuonAdamW
from mlfusion.embedded.plane import stream
from mlfusion.embedded.recipe import Network, Recipe, Schedule, load_recipe
from mlfusion.embedded.scenes import Pair, pair
from mlfusion.system import disk
from mlfusion.system.regular import make_private

PATTERNS, CHECKPOINT = "patterns.npy", "checkpoint.pt"
OBJECTIVES = ("formula", "fill", "contrast", "layout", "grain")

# --- One step --------------------------------------------------------------------------------------------------------


def batch_of(bank: Bank, recipe: Recipe, step: int, crew: int) -> tuple[Pair, torch.Generator]:
    """The pictures of one crew in one step, and the stream that drew them."""
    schedule = recipe.schedule
    rng = stream("pretrain", schedule.seed, step, crew)
    draw = torch.Generator().manual_seed(int(rng.integers(2**62)))
    rows = rng.integers(len(bank.ink), size=schedule.scenes)
    fills = rng.choice(bank.textures, size=schedule.scenes)
    return pair(bank, rows, fills, recipe.network.image_px, draw), draw


def losses_of(
    model: PretrainingModel, batch: Pair, recipe: Recipe, keep: int, draw: torch.Generator
) -> dict[str, Tensor]:
    """The unweighted loss of every objective."""
    heads = model.heads
    out = encode(model.vit, embed(model.vit, batch.pictures, keep, draw))
    cls, mean = out[:, 0], out[:, 1:].mean(1)

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=0.05)

    of_cls = cross_entropy(heads.formula_of_cls(cls), batch.labels)
    of_patches = cross_entropy(heads.formula_of_patches(mean), batch.labels)
    shown = batch.fill_shows
    codes = F.normalize(heads.contrast(torch.cat([cls, mean], 1)).float(), dim=1)
    similarity = (codes @ codes.T / recipe.weights.temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(codes)).roll(len(codes) // 2)
    return {
        "formula": (of_cls + of_patches) / 2,
        "fill": cross_entropy(heads.fill(mean[shown]), batch.fill_labels[shown]) if shown.any() else mean.sum() * 0,
        "contrast": F.cross_entropy(similarity, partner),
        "layout": F.smooth_l1_loss(heads.layout(cls).float(), batch.layout),
        "grain": F.smooth_l1_loss(heads.grain(mean).float(), batch.grain),
    }


def learning_rate(schedule: Schedule, step: int) -> float:
    """The learning rate of a step: linear warm-up, constant, linear decay."""
    up = (step + 1) / max(schedule.warmup, 1)
    down = (schedule.steps - step) / max(schedule.cooldown, 1)
    return schedule.learning_rate * min(1.0, up, down)


# --- The run ---------------------------------------------------------------------------------------------------------


def pretrain(
    recipe: Path, out: Path, *, work: Path | None = None, progress: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Run a recipe, write a Hugging Face folder to `out`, and return a report of the run.

    Args:
        recipe: a TOML file, see `Recipe`.
        out: a folder; its files are replaced when the run is complete, a model card in it is left alone.
        work: a folder for the bank of patterns (about 160 MB) and the checkpoint, from which the same call continues after an
            interruption; default: a hidden folder beside `out`, named by the recipe's digest. No other user may write to it.
        progress: gets a dict at every step: stage, done, of, seconds, and the losses.

    Raises:
        BadRecipe: the recipe has an unknown or wrong field, or lacks one.
        BadOption: others may write to the folder of work files.
    """
    parsed, out = load_recipe(recipe), Path(out)
    work = work or out.parent / f".{out.name}.{parsed.digest}"
    make_private(work)  # a checkpoint that another user planted would become the model
    report_progress = progress or (lambda event: None)
    bank = pattern_bank(parsed, work, report_progress)
    model = PretrainingModel(parsed).bfloat16()
    optimizer = MuonAdamW(model, parsed.schedule)
    checkpoint = work / CHECKPOINT
    step, seconds, history = 0, 0.0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        optimizer.restore(saved["optimizer"])
        step, seconds, history = saved["step"], saved["seconds"], saved["history"]

    # Only crews run in parallel: operations are too small to be divided between threads.
    with (
        ThreadPoolExecutor(parsed.schedule.crews, initializer=torch.set_num_threads, initargs=(1,)) as crews,
        ExitStack() as end,
    ):
        end.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        while step < parsed.schedule.steps:
            start = time.perf_counter()
            losses = train_step(model, optimizer, bank, parsed, step, crews)
            step, seconds = step + 1, seconds + time.perf_counter() - start
            history.append([round(losses[name], 4) for name in OBJECTIVES])
            if step % parsed.schedule.checkpoint_every == 0 or step == parsed.schedule.steps:
                with disk.atomic(checkpoint, replace=True) as draft:
                    saved = {"step": step, "seconds": seconds, "history": history, "optimizer": optimizer.state()}
                    torch.save(saved, draft)
            report_progress({"stage": "train", "done": step, "of": parsed.schedule.steps, "seconds": seconds, **losses})
    report = {
        "recipe": parsed.digest,
        "steps": step,
        "pictures": step * parsed.schedule.crews * parsed.schedule.scenes * 2,
        "patterns": len(bank.ink),
        "seconds": round(seconds),
        "losses": dict(zip(OBJECTIVES, np.mean(history[-50:], axis=0).round(3).tolist(), strict=True)),
    }
    write_folder(parsed, optimizer.master, report, out)
    _remove_work(work)
    return report | {"out": str(out)}


def _remove_work(work: Path) -> None:
    """Remove the files of a run that is complete, and their folder if it holds nothing else."""
    (work / CHECKPOINT).unlink()
    (work / PATTERNS).unlink()
    with suppress(OSError):  # the caller may have other files there
        work.rmdir()


def train_step(
    model: PretrainingModel, optimizer: MuonAdamW, bank: Bank, recipe: Recipe, step: int, crews: ThreadPoolExecutor
) -> dict[str, float]:
    """Pictures, losses, gradients, update; returns the losses."""
    schedule = recipe.schedule
    last = step >= schedule.steps - schedule.whole_last
    keep = (recipe.network.image_px // recipe.network.patch_px) ** 2 if last else schedule.kept_patches
    weights = msgspec.structs.asdict(recipe.weights)

    def run_crew(crew: int) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        batch, draw = batch_of(bank, recipe, step, crew)
        losses = losses_of(model, batch, recipe, keep, draw)
        total = torch.stack([weights[name] * losses[name] for name in OBJECTIVES]).sum()
        # An objective without an example in this step (no picture shows a fill) has a gradient of zero.
        gradients = torch.autograd.grad(total, list(optimizer.live.values()), materialize_grads=True)
        return gradients, {name: losses[name].item() for name in OBJECTIVES}

    # The sum is in the crews' order, not in that of their arrival, since floating-point sums depend on the order.
    results = list(crews.map(run_crew, range(schedule.crews)))
    gradient = {
        name: torch.stack([gradients[i].float() for gradients, _ in results]).sum(0) / schedule.crews
        for i, name in enumerate(optimizer.live)
    }
    optimizer.step(gradient, learning_rate(schedule, step))
    return {name: sum(losses[name] for _, losses in results) / schedule.crews for name in OBJECTIVES}


def pattern_bank(recipe: Recipe, work: Path, progress: Callable[[dict[str, Any]], None]) -> Bank:
    """The bank of patterns as a memory map in `work`; it is drawn if it does not exist."""
    images, seed = recipe.images, recipe.schedule.seed
    path = work / PATTERNS
    shape = (len(images.families) * images.classes * images.instances, images.pattern_px, images.pattern_px)

    if not path.exists():
        with disk.atomic(path) as draft:
            ink = np.lib.format.open_memmap(draft, mode="w+", dtype=np.uint8, shape=shape)
            draw_into(ink, images.families, images.classes, images.instances, seed, progress)
            ink.flush()
    return label_bank(np.load(path, mmap_mode="r"), images.families, images.classes, images.instances)


def write_folder(recipe: Recipe, master: dict[str, Tensor], report: dict[str, Any], out: Path) -> None:
    """Write the Hugging Face folder: config, float16 weights, preprocessing, and the report of the run."""
    net = recipe.network
    vit = ViTModel(vit_config(net), add_pooling_layer=False)
    vit.load_state_dict({n.removeprefix("vit."): p for n, p in master.items() if n.startswith("vit.")})
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as draft:
        vit.half().save_pretrained(draft)
        for name, body in (("preprocessor_config", preprocessing(net)), ("pretraining", report)):
            (Path(draft) / f"{name}.json").write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        out.mkdir(exist_ok=True)
        for file in sorted(Path(draft).iterdir()):
            file.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(file, out / file.name)


def preprocessing(net: Network) -> dict[str, Any]:
    """The settings of `ViTImageProcessor`: RGB, squashed to the input size, 0 … 255 mapped to −1 … 1."""
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
