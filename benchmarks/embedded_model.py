"""What the embedded model is worth: frozen features against the same architecture untrained, and against raw pixels.

    python benchmarks/embedded_model.py --data FOLDER [--images 10,all] [--draws 3] [--json]

FOLDER holds data sets as class folders (`<set>/train/<class>/…`, `<set>/test/<class>/…`); scikit-learn's digits are
measured with or without it. Balanced accuracy on the test split. Few images a class are drawn `--draws` times, each draw
choosing the training images and seeding the probe, and the mean is told; all of them are drawn once. Raw pixels are the
picture at 32 × 32 in a logistic regression, its penalty chosen as the probes choose: on a stratified fifth of train.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from transformers import AutoConfig, AutoModel

import mlfusion
from mlfusion import datasets, models
from mlfusion.probing import protocol, splits
from mlfusion.probing.grids import SEARCH_GRIDS
from mlfusion.probing.search import FitOptions
from mlfusion.probing.targets import OneClass
from mlfusion.probing.training.batches import Tokens
from mlfusion.specs.options import SearchOptions

PENALTIES = (1e-3, 1e-2, 1e-1, 1e0, 1e1)


def untrained(folder: Path, out: Path) -> Path:
    """A folder with the same architecture and preprocessing, weights drawn from seed 0."""
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.from_pretrained(folder), add_pooling_layer=False).float().save_pretrained(out)
    shutil.copy(folder / "preprocessor_config.json", out)
    return out


def drawn(labels: np.ndarray, images: int | None, seed: int) -> np.ndarray:
    """Rows of `images` images of every class, or all rows."""
    if images is None:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:images] for c in np.unique(labels)]))


def probes_of(
    model: str, dataset: str, cache: Path, grids: dict[str, str]
) -> dict[str, Callable[[int | None, int], float]]:
    """Two probes on a model's cached features; each is a function of the images a class and the draw."""
    mlfusion.extract(model, dataset, cache=cache)
    train, test = (mlfusion.load_features(model, dataset, split, cache=cache) for split in ("train", "test"))

    def accuracy(head: str, cut: Callable[[np.ndarray], np.ndarray], images: int | None, draw: int) -> float:
        rows = drawn(train.labels, images, draw)
        outcome = protocol.fit(
            head,  # type: ignore[arg-type]
            Tokens(cut(train.tokens[rows]), train.labels[rows]),
            lambda: Tokens(cut(test.tokens), test.labels),
            target=OneClass(len(train.classes)),
            options=FitOptions(seed=draw, search=SearchOptions(grid=grids[head], precision="float32")),
        )
        return outcome.test

    return {
        "cls-last/linear": lambda images, draw: accuracy("linear", lambda t: t[:, -1, :1], images, draw),
        "cls+ap-all-layers/attentive": lambda images, draw: accuracy(
            "attentive", lambda t: t.reshape(len(t), -1, t.shape[-1]), images, draw
        ),
    }


def pixels(split: datasets.Split) -> np.ndarray:
    """[images, 3072], 0 … 1."""
    pictures = [np.asarray(split.image(row).resize((32, 32), 2), np.float32) for row in range(len(split))]
    return np.stack(pictures).reshape(len(pictures), -1) / 255


def accuracy_of_pixels(data: datasets.DataSet) -> Callable[[int | None, int], float]:
    """Logistic regression on pixels, as a function of the images a class and the draw."""
    train, test = data.split("train"), data.split("test")
    seen, unseen = pixels(train), pixels(test)

    def fitted(rows: np.ndarray, penalty: float) -> LogisticRegression:
        with warnings.catch_warnings(
            action="ignore", category=ConvergenceWarning
        ):  # the weakest penalties go on for ever
            return LogisticRegression(C=penalty, max_iter=300).fit(seen[rows], train.labels[rows])

    def accuracy(images: int | None, draw: int) -> float:
        rows = drawn(train.labels, images, draw)
        fit, held = (rows[part] for part in splits.split(train.labels[rows], seed=draw))
        score = [balanced_accuracy_score(train.labels[held], fitted(fit, c).predict(seen[held])) for c in PENALTIES]
        return balanced_accuracy_score(test.labels, fitted(rows, PENALTIES[int(np.argmax(score))]).predict(unseen))

    return accuracy


def measured(args: argparse.Namespace, scratch: Path) -> Iterator[dict[str, object]]:
    """One row per data set, number of images, features and probe; then their means over the data sets."""
    embedded = models.locate(args.model).folder
    grids = {"linear": args.linear_grid, "attentive": args.attentive_grid}
    contenders = {"trained": str(embedded), "untrained": str(untrained(embedded, scratch / "untrained"))}
    sets = ["digits", *sorted(str(f.parent) for f in args.data.glob("*/train"))] if args.data else ["digits"]
    collected: dict[str, list[float]] = {}
    for dataset in sets:
        data = datasets.load(dataset)
        scores = {"pixels-32/logistic": accuracy_of_pixels(data)}
        for name, model in contenders.items():
            probes = probes_of(model, dataset, scratch / "cache", grids)
            scores |= {f"{name}/{probe}": score for probe, score in probes.items()}
        for words in args.images.split(","):
            images = None if words == "all" else int(words)
            for name, score in scores.items():
                mean = float(np.mean([score(images, draw) for draw in range(args.draws if images else 1)]))
                collected.setdefault(f"{words}/{name}", []).append(mean)
                print(f"{data.name}/{words}/{name} {mean:.3f}", file=sys.stderr, flush=True)
                yield {"name": f"{data.name}/{words}/{name}", "value": round(mean, 4), "unit": "balanced accuracy"}
    for name, means in collected.items():
        yield {"name": f"mean/{name}", "value": round(float(np.mean(means)), 4), "unit": "balanced accuracy"}


def table(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown: a line per data set and number of images, percent."""
    values = {str(row["name"]): float(str(row["value"])) for row in rows}
    lines: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        dataset, images, what = name.split("/", 2)
        lines.setdefault(f"{dataset} | {images}", {})[what] = 100 * value
    heads = list(next(iter(lines.values())))
    text = [f"| data set | images a class | {' | '.join(heads)} |", f"|---|---{'|---:' * len(heads)}|"]
    return "\n".join(
        text + [f"| {name} | {' | '.join(f'{v[head]:.1f}' for head in heads)} |" for name, v in lines.items()]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of data sets in class folders; without it, digits only")
    parser.add_argument("--model", default="formula-vit", help="a catalogue name or a folder")
    parser.add_argument(
        "--images", default="10,all", help="training images a class, comma-separated; 'all' is every one"
    )
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--linear-grid", default="paper", choices=sorted(SEARCH_GRIDS))
    parser.add_argument(
        "--attentive-grid",
        default="quick",
        choices=sorted(SEARCH_GRIDS),
        help="'paper' takes 20 times as long",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(measured(args, Path(scratch)))
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps({"rows": rows, "machine": machine}) if args.json else table(rows))


if __name__ == "__main__":
    main()
