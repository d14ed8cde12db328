"""What rounding does to the answers of every head: other instructions on one machine, and twins, for docs/method.md.

    python benchmarks/rounding.py [--heads linear,attentive,...] [--page]

Trains each configuration of the quick grid on eight images a class of the digits (CLS and AP of the last layer of
formula-vit), and compares probabilities for 300 test images: with other instructions of PyTorch and of MKL, as another kind
of machine would have them, and with the twin by which the search finds unstable configurations. Heads that are solved for are
fitted by the protocol. With --page the table goes into docs/method.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import page
import torch

import mlfusion
from mlfusion.probing import protocol, search, splits
from mlfusion.probing.grids import SEARCH_GRIDS
from mlfusion.probing.heads import HEADS, HeadShape
from mlfusion.probing.search import FitOptions
from mlfusion.probing.targets import OneClass
from mlfusion.probing.training import population
from mlfusion.probing.training.batches import Tokens
from mlfusion.probing.training.population import Population, TrainingData
from mlfusion.specs.names import HEAD_NAMES, Head
from mlfusion.specs.options import SearchOptions

PATHS = {  # switches of the libraries, which are read when they are loaded
    "PyTorch without AVX": {"ATEN_CPU_CAPABILITY": "default"},
    "MKL for any processor": {"MKL_CBWR": "COMPATIBLE"},
}
TARGET, SHOTS, TEST = OneClass(10), 8, 300
OPTIONS = FitOptions(seed=0, search=SearchOptions(grid="quick", precision="float32"))


def features() -> tuple[Tokens, Tokens]:
    """Train, of which some are drawn, and test."""
    parts = []
    for split in ("train", "test"):
        found = mlfusion.load_features("formula-vit", "digits", split, layers="last", tokens="cls,ap")
        parts.append(Tokens(found.tokens.reshape(len(found.labels), -1, found.tokens.shape[-1]), found.labels))
    train, test = parts
    return train.of(splits.draw(train.labels, SHOTS, target=TARGET, seed=0)), test.of(np.arange(TEST))


def outputs(heads: list[Head]) -> dict[str, np.ndarray]:
    """Outputs for the test images by 'head, learning rate' and 'head, learning rate, twin'."""
    (train, test), found = features(), {}
    _, t, d = train.shape
    for head in heads:
        if head in search.SOLVERS:
            predictions = protocol.fit(head, train, lambda: test, target=TARGET, options=OPTIONS).predictions
            found[f"{head}, "] = np.log(predictions + 1e-30)
            continue
        shape = HeadShape(tokens=t, width=d, classes=10, heads=t if HEADS[head].has_attention else 1)
        grid = SEARCH_GRIDS["quick"].configurations(head)
        members = [*grid, *(replace(one, twin=True) for one in grid)]
        data = TrainingData(train, np.arange(len(train)), SEARCH_GRIDS["quick"].schedule(len(train)))
        for part, probe in population.train(Population(head, shape, members, seed=0), data):
            [(out, _)] = population.read(probe, test, np.arange(TEST), block=TEST, device="cpu")
            one = members[part.start]
            found[f"{head}, {one.lr:g}{', twin' if one.twin else ''}"] = out[0].numpy()
    return found


def cell(one: np.ndarray, others: list[np.ndarray]) -> str:
    """The largest difference of a probability, answers that differ, and images that count as changed: the most of all."""
    a, *rest = (torch.softmax(torch.from_numpy(each), -1) for each in (one, *others))
    gap = max(float((a - b).abs().max()) for b in rest)
    flips = max(int((a.argmax(-1) != b.argmax(-1)).sum()) for b in rest)
    moved = max(search.changed(TARGET, torch.from_numpy(one), torch.from_numpy(other)) for other in others)
    return f"{gap:.0e}, {flips}, {100 * moved:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", default=",".join(HEAD_NAMES))
    parser.add_argument("--page", action="store_true", help="put the table into docs/method.md")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    heads = args.heads.split(",")
    if args.out:
        np.savez(args.out, **outputs(heads))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for n, switches in enumerate(({}, *PATHS.values())):
            out = Path(folder) / f"{n}.npz"
            words = [sys.executable, __file__, "--heads", args.heads, "--out", str(out)]
            subprocess.run(words, env=os.environ | switches, check=True)
            with np.load(out) as arrays:
                found.append(dict(arrays))
    own, *others = found
    rows = []
    for name, value in own.items():
        if not name.endswith("twin"):
            head, rate = name.split(", ")
            twin = cell(value, [own[f"{name}, twin"]]) if f"{name}, twin" in own else "-"
            rows.append([f"`{head}`", rate or "-", *(cell(value, [other[name]]) for other in others), twin])
    text = page.table(["head", "learning rate", *PATHS, "twin"], rows)
    print(text)
    if args.page:
        page.put("method.md", "rounding", f"{page.machine()}, torch {torch.__version__}.\n\n{text}")


if __name__ == "__main__":
    main()
