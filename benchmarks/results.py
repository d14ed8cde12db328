"""What a result costs to save, to find and to list, as the results grow to a hundred thousand. Prints docs/results.md's table.

    python benchmarks/results.py [--most 100000] [--folder FOLDER] [--repeat 5]

Rows are as the study makes them: twenty data sets of 10 to 1,000 classes, recall by class, attention over 24 tokens. Each
number is the least of --repeat measurements, so that other work on the machine spoils little; of saving and finding, each
measurement is the mean of twenty calls. FOLDER must lie on the disk that is asked about (default: a fresh folder in results/).
"""

import argparse
import hashlib
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlfusion.results import Results, Row, export
from mlfusion.results.records import from_object
from mlfusion.specs.names import STUDY

CALLS = 20
BLOCK = 5_000  # rows taken over in one commit, to fill
CLASSES = [
    10,
    10,
    101,
    20,
    1000,
    100,
    211,
    37,
    102,
    196,
    100,
    43,
    10,
    2,
    10,
    45,
    5,
    47,
    7,
    6,
]  # of the study's data sets
NAMES = {count: [f"class {k} of {count}" for k in range(count)] for count in CLASSES}


def rows(first: int, count: int) -> Iterator[Row]:
    """Rows number `first` and on."""
    random = np.random.default_rng(first)
    for number in range(first, first + count):
        classes = CLASSES[number % len(CLASSES)]
        recall = random.random(classes).tolist()
        share = random.dirichlet(np.ones(24)).tolist()
        body = {
            "id": hashlib.sha256(str(number).encode()).hexdigest()[:16],
            "model": f"model-{number // 20 % 9}",
            "dataset": f"data-set-{number % 20}",
            "probe": STUDY[number // 180 % 10],
            "seed": number // 1800,
            "metric": "balanced_accuracy",
            "val": 0.5,
            "test": float(np.mean(recall)),
            "train": 0.9,
            "metrics": {
                "kind": "class",
                "balanced_accuracy": 0.5,
                "accuracy": 0.5,
                "top5": 0.9,
                "macro_f1": 0.5,
                "loss": 1.0,
                "recall": recall,
            },
            "selected": {
                "lr": 0.01,
                "weight_decay": 1e-6,
                "dropout": 0.1,
                "heads": 24,
                "steps": 1000,
                "batch_size": 2048,
            },
            "grid": "paper",
            "configurations": 63,
            "parameters": 1_000_000,
            "seconds": 1.5,
            "layers": list(range(1, 13)),
            "tokens": ["cls", "ap"],
            "depth": 12,
            "width": 768,
            "classes": NAMES[classes],
            "images": {"train": 5000, "test": 1000},
            "features": ["0a" * 8, "0b" * 8],
            "attention": {
                "layers": sorted([*range(1, 13)] * 2),
                "kinds": ["cls", "ap"] * 12,
                "mean": share,
                "sd": share,
            },
            "versions": {"mlfusion": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6", "scikit-learn": "1.9.1"},
            "code": "0123456",
            "created": "2026-01-01T00:00:00+00:00",
            "protocol": 2,
            "device": "cpu",
            "precision": "float32",
            "bytes": 221_184_000,
            "sources": {
                "model": f"organisation/model-{number // 20 % 9}",
                "dataset": f"organisation/data-set-{number % 20}",
                "weights": "a" * 64,
                "train": "d" * 64,
                "test": "e" * 64,
                "extract": "mlfusion extract --model MODEL --dataset DATASET --tokens cls+ap@1-12",
            },
        }
        yield from_object(body)


def timed(call: Callable[[], Any], repeat: int) -> float:
    """Least seconds."""
    taken = []
    for _ in range(repeat):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return min(taken)


def append_many(root: Path, first: int, count: int) -> None:
    """What one of several writers does."""
    store = Results(root)
    for row in rows(first, count):
        store.append(row)


def measure(root: Path, held: int, repeat: int) -> dict[str, float]:
    """With `held` rows there. Rows saved on the way are saved again under the same ids: the number stays."""
    store = Results(root)
    some = list(rows(0, CALLS))
    asked = [row.id for row in rows(max(0, held // 2), CALLS)]
    command = [sys.executable, "-m", "mlfusion", "results", "ls", "--results", str(root)]
    return {
        "save one row": timed(lambda: [store.append(row) for row in some], repeat) / CALLS,
        "find one row": timed(lambda: [store.find(row_id) for row_id in asked], repeat) / CALLS,
        "list the newest 100": timed(lambda: store.listing(limit=100), repeat),
        "`mlfusion results ls`, with program start": timed(
            lambda: subprocess.run(command, check=True, capture_output=True), repeat
        ),
        "list all": timed(store.listing, repeat),
        "read every row completely": timed(store.rows, repeat),
        "rows of one model on one data set": timed(lambda: store.rows(model="model-3", dataset="data-set-7"), repeat),
        "file, MB": store.path.stat().st_size / 1e6,
    }


def main() -> None:
    """Fill, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    asked = parser.parse_args()
    Path("results").mkdir(exist_ok=True)
    root = asked.folder or Path(tempfile.mkdtemp(dir="results"))
    found: dict[int, dict[str, float]] = {}
    try:
        store, held = Results(root), 0
        for many in sorted({min(10**k, asked.most) for k in range(3, 7)}):
            while held < many:
                held += store.take(rows(held, min(BLOCK, many - held))).taken
            found[many] = measure(root, many, asked.repeat)
            print(many, found[many], file=sys.stderr, flush=True)
        exports = {form: timed(partial(export.write, store.rows(), root / f"all.{form}"), 1) for form in export.FORMATS}
        each, writers = 25, 4
        crowd = [
            multiprocessing.Process(target=append_many, args=(root, 10**7 * (w + 1), each)) for w in range(writers)
        ]
        begun = time.perf_counter()
        for one in crowd:
            one.start()
        for one in crowd:
            one.join()
        rate = writers * each / (time.perf_counter() - begun)
        assert store.count() == held + writers * each
    finally:
        shutil.rmtree(root)
    names = list(next(iter(found.values())))
    print("| | " + " | ".join(f"{many:,} rows" for many in found) + " |\n|---|" + "---:|" * len(found))
    for name in names:
        cells = [f"{one[name]:.1f}" if "MB" in name else _said(one[name]) for one in found.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\n{writers} writers at once into {held:,} rows: {rate:,.0f} rows/s. Export of {held:,} rows: ", end="")
    print(", ".join(f".{form} {_said(seconds)}" for form, seconds in exports.items()) + ".")


def _said(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{1000 * seconds:.2g} ms"


if __name__ == "__main__":
    main()
