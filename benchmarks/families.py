"""Every family of models that is tried, against another way to compute its layers: the tables of docs/models.md.

    python benchmarks/families.py [--page] [--model FOLDER --data FOLDER [--per-class 2]]

Each family of `tests/zoo.py` is built small, with random weights, and dissected; every layer's tokens are compared with what
copies of the model with one MLP taken out, and norms computed from their weights in double precision, give. A second table
compares every block's output with transformers' own, and in half precision with float32, drops tensors of the file one by
one, and counts the sizes of pictures whose map is found. With --model (a ViT's folder) and --data (a folder of data sets),
the same tensors are loaded as ViT, as DINOv2 and as MAE, and the features of every set are compared. With --page the tables
are written into docs/models.md.
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
import page
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor

import mlfusion
from mlfusion import models
from mlfusion.errors import BadModel
from mlfusion.models.backbone import Anatomy, Backbone, dissect
from mlfusion.specs.identity import HOOKS, KINDS

THREE = {"vit": "ViT", "dinov2": "DINOv2", "vit_mae": "MAE"}
COMPARED = "cls,ap,max,std,grid4"


def row(name: str, folder: Path) -> list[str]:
    """One family: what was found, and how far its layers are from those of the other way."""
    backbone = Backbone(models.locate(str(zoo.save(name, folder))))
    side = zoo.ZOO[name].pixels
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    expected = zoo.layers_by_hand(name, zoo.tower_of(name, folder), pixels)
    found = [backbone(pixels, [(layer, "all")])[layer, "all"] for layer in range(backbone.depth + 1)]
    worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    anatomy = backbone.anatomy
    return [
        name,
        f"`{type(backbone._model).__name__}`",
        f"`{anatomy.lists}`",
        f"`{anatomy.norm2}`" if anatomy.norm2 else "none: output",
        f"`{anatomy.final}` ({anatomy.final_mode})" if anatomy.final else "none (raw)",
        tokens(anatomy),
        ", ".join(hook for hook in HOOKS if len(anatomy.taps.get(hook, {})) >= anatomy.depth),
        f"{worst:.0e}",
    ]


def tokens(anatomy: Anatomy) -> str:
    """'1 cls, 4 registers, 4 x 4 patches'; of stages the first and the last layer's patches."""
    special = [
        f"{len(getattr(anatomy.taps['norm2'][anatomy.depth].special, kind))} {kind}"
        for kind in ("cls", "dist", "registers")
    ]
    grids = [anatomy.taps["norm2"][layer].grid for layer in (0, anatomy.depth)]
    sizes = dict.fromkeys(" x ".join(map(str, grid)) if grid else "unordered" for grid in grids)
    return ", ".join([one for one in special if not one.startswith("0")] + [f"{' to '.join(sizes)} patches"])


def families() -> str:
    """The table of all families."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name, Path(folder) / str(number)) for number, name in enumerate(zoo.ZOO)]
    heads = ["family", "tower", "blocks", "second norm", "final norm", "tokens", "hook points", "difference"]
    return f"transformers {transformers.__version__}, torch {torch.__version__}\n\n" + page.table(heads, rows, left=7)


def library_difference(name: str, folder: Path, backbone: Backbone, pixels: Tensor) -> float:
    """The largest difference of a block's output from what transformers' own model gives, loaded without mlfusion."""
    tower, truth = zoo.tower_of(name, folder), zoo.ZOO[name]
    worst = 0.0
    with torch.inference_mode():
        for layer, block in enumerate(zoo.blocks_of(name, tower), 1):
            own = zoo.flat(zoo.given(tower, truth.arguments(pixels), block, entering=False), truth.channels_first)
            worst = max(worst, float((backbone(pixels, [(layer, "all")])[layer, "all"] - own).abs().max()))
    return worst


def half_difference(folder: Path, compute: str, exact: Backbone, pixels: Tensor) -> float:
    """The largest difference from float32 over all blocks' outputs, as a share of the largest number."""
    half = Backbone(models.locate(f"{folder}:block"), compute=compute)
    pairs = [(layer, "all") for layer in range(1, exact.depth + 1)]
    want, found = exact(pixels, pairs), half(pixels, pairs)
    return max(float((found[pair] - want[pair]).abs().max() / want[pair].abs().max()) for pair in pairs)


def odd_sizes(name: str, checkpoint: models.Checkpoint, backbone: Backbone) -> str:
    """'n of m': at so many sizes of m that the model itself takes, rows and columns are those of its patches."""
    side, grid = zoo.ZOO[name].pixels, zoo.ZOO[name].grid
    ran = right = 0
    for height, width in ((side + 5, side), (side, side + 9), (side + 8, side + 16), (2 * side - 3, side + 13)):
        try:
            anatomy = dissect(
                backbone._model, backbone._arguments, (3, height, width), shape=models.shape(checkpoint), name=name
            )
        except BadModel:  # it takes its own size only, or whole patches
            continue
        found, step, ran = anatomy.taps["block"][0].grid, side // grid, ran + 1
        # A stem that pads or overlaps may add one row or column.
        right += found is not None and all(
            edge // step <= count <= edge // step + 1 for count, edge in zip(found, (height, width), strict=True)
        )
    return f"{right} of {ran}" if ran else "its own only"


def dropped(folder: Path, backbone: Backbone, pixels: Tensor) -> str:
    """What happens without one tensor of the file, for those outside the blocks and of the first block."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tried = [key for key in tensors if not re.search(r"\.[1-9]\d*\.", key)]
    pairs = [(backbone.depth, "all")]
    want, outcomes = backbone(pixels, pairs)[pairs[0]], {"refused": 0, "not used": 0, "CHANGED": 0}
    for key in tried:
        save_file({other: tensor for other, tensor in tensors.items() if other != key}, file, {"format": "pt"})
        try:
            found = Backbone(models.locate(str(folder)))(pixels, pairs)[pairs[0]]
        except BadModel:
            outcomes["refused"] += 1
        else:
            outcomes["not used" if torch.equal(found, want) else "CHANGED"] += 1
    save_file(tensors, file, {"format": "pt"})
    return ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items() if count)


def check_row(name: str, folder: Path) -> list[str]:
    """One family of the second table."""
    zoo.save(name, folder)
    side = zoo.ZOO[name].pixels
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    checkpoint = models.locate(f"{folder}:block")
    blocks = Backbone(checkpoint)
    return [
        name,
        f"{library_difference(name, folder, blocks, pixels):.0e}",
        dropped(folder, Backbone(models.locate(str(folder))), pixels),
        odd_sizes(name, checkpoint, blocks),
        *(f"{half_difference(folder, compute, blocks, pixels):.0e}" for compute in ("bfloat16", "float16")),
    ]


def checks() -> str:
    """The second table of all families."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for number, name in enumerate(zoo.ZOO):
            rows.append(check_row(name, Path(folder) / str(number)))
            print(rows[-1], flush=True)
    heads = ["family", "from transformers", "tensors dropped", "odd sizes", "bfloat16", "float16"]
    return page.table(heads, rows)


def some(data: Path, per_class: int, to: Path) -> Path:
    """A data set with so many images of each class and split; 0 is all of it."""
    for file in sorted(data.glob("*/*/*")) if per_class else ():
        copy = to / data.name / file.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if len(list(copy.parent.iterdir())) < per_class:
            shutil.copy(file, copy)
    return to / data.name if per_class else data


def three_families(model: Path, data: Path, splits: str, per_class: int) -> str:
    """The table of one checkpoint under three names, set by set."""
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folders = {family: zoo.as_family(model, family, Path(made) / family) for family in THREE}
        for whole in sorted(folder for folder in data.iterdir() if (folder / "test").is_dir()):
            images = str(some(whole, per_class, Path(made) / "data"))
            held = {
                family: [
                    one.entry
                    for one in mlfusion.extract(
                        str(folder),
                        images,
                        splits=splits,
                        tokens=COMPARED,
                        dtype="float32",
                        cache=Path(made) / "c",
                    )
                ]
                for family, folder in folders.items()
            }
            cells = [whole.name, f"{sum(entry.spec.data.images for entry in held['vit']):,}"]
            for family in list(THREE)[1:]:
                worst = largest = 0.0
                for one, other in zip(held["vit"], held[family], strict=True):
                    layers = range(1, one.spec.model.depth + 1)
                    for kind in [kind for kind in KINDS if kind in COMPARED.split(",")]:
                        a, b = one.read(list(layers), [kind]), other.read(list(layers), [kind])
                        worst, largest = max(worst, float(np.abs(a - b).max())), max(largest, float(np.abs(a).max()))
                cells.append(f"{worst:.1e}")
            rows.append([*cells, f"{largest:.1f}"])
            print(rows[-1], flush=True)
    return page.table(["data set", "images", "DINOv2 - ViT", "MAE - ViT", "largest feature"], rows)


def main() -> None:
    """Compute what was asked for and print it, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write into docs/models.md")
    parser.add_argument("--model", type=Path, help="a ViT's folder")
    parser.add_argument("--data", type=Path, help="a folder of data sets")
    parser.add_argument("--splits", default="train,test")
    parser.add_argument("--per-class", type=int, default=0, help="so many images of each class and split; default: all")
    asked = parser.parse_args()
    parts = {"families": families(), "checks": checks()}
    if asked.model and asked.data:
        parts["three-families"] = three_families(asked.model, asked.data, asked.splits, asked.per_class)
    for part, text in parts.items():
        if asked.page:
            page.put("models.md", part, text)
        else:
            print(text)


if __name__ == "__main__":
    main()
