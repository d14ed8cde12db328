"""What narrow products cost in accuracy: the lockstep probe in bfloat16 and in float32 against a literal loop in float32.

    python benchmarks/bfloat16.py --model MODEL --data FOLDER [--sets dtd10,flowers5] [--seeds 0,1,2] [--results FILE] [--page]

On the CLS and AP tokens of every layer, by the quick grid: the same split, batches, jitter, schedule and class weights for
all three, and each of them chooses its own learning rate on the images held out, is refitted and tested once. The loop
projects keys and values for every token, one configuration at a time, by torch's layers and AdamW; its initialisation and
dropout are drawn by torch, so that it is one more draw of the same experiment. What is in the file of results is not made
again. With --page the table goes into docs/measurements/speed.md, after every set.
"""

import argparse
import json
import math
import time
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import page
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import nn
from usual import Usual

import mlfusion
from mlfusion.probing import grids, protocol, splits
from mlfusion.probing.losses import class_weights, cross_entropy
from mlfusion.probing.search import FitOptions
from mlfusion.probing.targets import OneClass
from mlfusion.probing.training.batches import Schedule, Tokens, batches
from mlfusion.probing.training.optimizer import cosine
from mlfusion.probing.training.population import Configuration
from mlfusion.specs.options import SearchOptions

GRID = "quick"


def tokens(model: str, where: str, split: str, cache: str | None) -> tuple[Tokens, int]:
    """CLS and AP of every layer, and how many classes there are."""
    held = mlfusion.load_features(model, where, split, cache=cache)
    return Tokens(held.tokens.reshape(len(held.tokens), -1, held.tokens.shape[-1]), held.labels), len(held.classes)


def literal(train: Tokens, rows: np.ndarray, classes: int, one: Configuration, *, seed: int) -> nn.Module:
    """One configuration, trained on these images by a plain loop."""
    grid = grids.SEARCH_GRIDS[GRID]
    schedule = Schedule.of(len(rows), epochs=grid.epochs, least_steps=grid.least_steps)
    torch.manual_seed(seed)
    model = Usual(train.shape[2], train.shape[1], classes, dropout=one.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=one.lr, weight_decay=one.weight_decay)
    weights = torch.from_numpy(class_weights(train.labels[rows], classes)).float()
    criterion = nn.CrossEntropyLoss(weight=weights)
    passing = batches(train, rows, schedule, seed=seed, device="cpu")
    for step, (x, y) in enumerate(islice(passing, schedule.steps)):
        [optimizer.param_groups[0]["lr"]] = cosine([one.lr], step, schedule.steps)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, held: Tokens, rows: np.ndarray) -> torch.Tensor:
    return model(held.normalised(rows, "cpu"))


def by_the_loop(train: Tokens, test: Tokens, classes: int, seed: int) -> float:
    """Balanced accuracy on test of what the loop chooses."""
    fitted, held_out = splits.split(train.labels, seed=seed)
    grid = grids.SEARCH_GRIDS[GRID].configurations("attentive")
    truth = torch.from_numpy(train.labels[held_out])
    weights = torch.from_numpy(class_weights(train.labels[fitted], classes)).float()
    score, loss = [], []
    for one in grid:
        found = outputs(literal(train, fitted, classes, one, seed=seed), train, held_out)
        score.append(balanced_accuracy_score(train.labels[held_out], found.argmax(1).numpy()))
        loss.append(float(cross_entropy(found[None], truth, weights)))
    best = grid[protocol.choose(np.array(score), np.array(loss))]
    model = literal(train, np.arange(len(train)), classes, best, seed=seed)
    return balanced_accuracy_score(test.labels, outputs(model, test, np.arange(len(test))).argmax(1).numpy())


def in_lockstep(train: Tokens, test: Tokens, classes: int, seed: int, precision: str) -> float:
    """Balanced accuracy on test of what the population chooses."""
    return protocol.fit(
        "attentive",
        train,
        lambda: test,
        target=OneClass(classes),
        options=FitOptions(seed=seed, search=SearchOptions(grid=GRID, precision=precision)),  # type: ignore[arg-type]
    ).test


WAYS = {
    "literal, float32": by_the_loop,
    "lockstep, float32": partial(in_lockstep, precision="float32"),
    "lockstep, bfloat16": partial(in_lockstep, precision="bfloat16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit-ti16", help="as for mlfusion extract")
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the data sets")
    parser.add_argument("--sets", default="dtd10,flowers5,sign_digits,fashion_mnist,cifar10", help="their names")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--cache", default=None)
    parser.add_argument("--results", type=Path, default=Path("results/bfloat16.json"))
    parser.add_argument("--page", action="store_true", help="put the table into docs/measurements/speed.md")
    asked = parser.parse_args()
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    sets = asked.sets.split(",")
    found: dict[str, dict[str, dict[str, float]]] = {}  # by data set, way and seed
    if asked.results.exists():
        found = json.loads(asked.results.read_text())
    for name in sets:
        kept = found.setdefault(name, {way: {} for way in WAYS})
        lacking = [(way, seed) for way in WAYS for seed in seeds if str(seed) not in kept[way]]
        if lacking:
            where = str(asked.data / name)
            mlfusion.extract(asked.model, where, cache=asked.cache)
            (train, classes), (test, _) = (
                tokens(asked.model, where, split, asked.cache) for split in ("train", "test")
            )
        for way, seed in lacking:
            kept[way][str(seed)] = WAYS[way](train, test, classes, seed)
            asked.results.parent.mkdir(parents=True, exist_ok=True)
            asked.results.write_text(json.dumps(found, indent=1))
        print(
            *line(name, found[name]), f"{time.process_time() / 60:.1f} minutes of processor time", sep="  ", flush=True
        )
        if asked.page:
            there = [one for one in sets if all(len(found.get(one, {}).get(way, {})) > 1 for way in WAYS)]
            heads = ("data set", *WAYS, "bfloat16 - literal", "spread")
            text = page.table(heads, (line(one, found[one]) for one in there))
            if absent := [one for one in sets if one not in there]:
                text += f"\n\nNot measured yet: {', '.join(absent)}; the same command goes on from here."
            page.put("measurements/speed.md", "bfloat16", f"{page.machine()}, torch {torch.__version__}.\n\n{text}")


def line(name: str, found: dict[str, dict[str, float]]) -> tuple[str, ...]:
    """One of the table."""
    each = [list(found[way].values()) for way in WAYS]
    plain, _, narrow = each
    gap, deviation = fmean(narrow) - fmean(plain), math.hypot(stdev(plain), stdev(narrow))
    scores = [f"{100 * fmean(one):.1f} ± {100 * stdev(one):.1f}" for one in each]
    return name, *scores, f"{100 * gap:+.1f}", f"{100 * deviation:.1f}"


if __name__ == "__main__":
    main()
