"""What keeping tokens in fewer bits does to every probe: the tables of docs/measurements/dtypes.md.

    python benchmarks/dtypes.py --model MODEL --data FOLDER [--sets a,b,...] [--folder DIR] [--table]

Extracts each data set once, in float32, and keeps the same tokens in every dtype in a cache of its own, as `mlfusion
extract --dtype` would: so all of them come from the same forward passes. Then trains each head on them by the quick grid,
with three seeds or one (CHEAP, SMALL, SLOW), on ten images a class for the head in SHOTS, and compares with float16 fit by
fit: same data set, head, seed, split, order and jitter. What is in the results already is not made again; with --table
nothing is trained, and the tables show what there is.
"""

import argparse
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import msgspec
import numpy as np
import page
import torch

import mlfusion
from mlfusion.results import Results, Row
from mlfusion.specs.identity import DTYPES, Dtype
from mlfusion.specs.names import HEAD_NAMES
from mlfusion.store import Entry, FeatureStore

REPRESENTATION = "cls+ap-2-layers"
LAYERS = "6,12"
SEEDS = (0, 1, 2)
CHEAP = ("linear", "scalar-mix", "ridge", "logistic", "knn")  # three seeds on every set
SMALL = ("dtd10", "cifar10", "flowers5")  # on which all but the next have three
SLOW = ("v-jepa", "v-jepa-4")  # one seed
SHOTS = {"v-jepa-4": 10}  # images of a class; of every other head all
USUAL: Dtype = "float16"
OTHERS: tuple[Dtype, ...] = ("int8", "bfloat16", "float32")
SETS = "dtd10,cifar10,flowers5,sign_digits,fashion_mnist"


def seeds_of(head: str, name: str) -> tuple[int, ...]:
    """Fewer where fits take long."""
    return SEEDS if head not in SLOW and (head in CHEAP or name in SMALL) else SEEDS[:1]


def keep_as(entry: Entry, dtype: Dtype, cache: Path) -> None:
    """The tokens of a float32 entry, encoded as an extraction encodes them, in another cache; resumed where it was."""
    other = FeatureStore(cache).create(replace(entry.spec, dtype=dtype), entry.samples, entry.names()[0])
    if entry.complete_pairs() <= other.complete_pairs():
        return
    for mine in entry.complete_streams():
        stream = msgspec.structs.replace(mine, dtype=dtype)
        other.begin([stream])
        tokens = entry.read(mine.layers, mine.kinds)
        for shard in other.missing_shards(stream):
            rows = stream.rows(shard)
            with other.draft(stream, shard) as draft:
                draft.append(tokens[rows.start : rows.stop])
                draft.publish()
    other.seal()


def tests(rows: list[Row]) -> dict[tuple[str, str, int], float]:
    """(data set, head, seed) → balanced accuracy on the test split."""
    found = {}
    for row in rows:
        head = row.probe.rpartition("/")[2]
        if row.shots == SHOTS.get(head):
            found[row.dataset, head, row.seed] = row.test
    return found


def percent(values: list[float], sign: bool = False) -> str:
    """Mean ± sample deviation, in percent or points."""
    if not values:
        return "-"
    return f"{100 * fmean(values):{'+' if sign else ''}.1f}" + (
        f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    )


def interval(values: list[float]) -> str:
    """Mean of paired differences and the half-width of its 95 % interval, in points, by the normal quantile."""
    if len(values) < 2:
        return "-"
    return f"{100 * fmean(values):+.2f} ± {196 * stdev(values) / math.sqrt(len(values)):.2f}"


def sizes(folder: Path, sets: list[str]) -> str:
    """Bytes of all sets together over float16's, and how far tokens are from float32's."""
    lines = []
    exact = {(e.spec.data.content, e.spec.data.split): e for e in FeatureStore(folder / "float32").entries()}
    usual = sum(entry.nbytes() for entry in FeatureStore(folder / USUAL).entries())
    for dtype in DTYPES:
        errors, nbytes = [], 0
        for entry in FeatureStore(folder / dtype).entries():
            if entry.names()[0].dataset not in sets:
                continue
            nbytes += entry.nbytes()
            [stream] = entry.complete_streams()
            true = exact[entry.spec.data.content, entry.spec.data.split].read(stream.layers, stream.kinds)
            kept = entry.read(stream.layers, stream.kinds).astype(np.float32)
            errors.append(np.linalg.norm(kept - true, axis=-1) / np.linalg.norm(true, axis=-1))
        every = np.concatenate([error.ravel() for error in errors])
        far = "0" if not every.any() else f"{every.mean():.1e}"
        lines.append((f"`{dtype}`", f"{nbytes / usual:.3f}", far, "0" if not every.any() else f"{every.max():.1e}"))
    return page.table(["dtype", f"bytes, relative to {USUAL}", "relative error of a token, mean", "largest"], lines)


def accuracies(found: dict[str, dict[tuple[str, str, int], float]], sets: list[str]) -> str:
    """Scores with the usual dtype."""
    cells = []
    for head in HEAD_NAMES:
        each = [[t for (s, h, _), t in found[USUAL].items() if (s, h) == (name, head)] for name in sets]
        fits = sum(map(len, each))
        cells.append((f"`{head}`", *map(percent, each), str(fits), f"{SHOTS.get(head, 'all')}"))
    return page.table(["head", *sets, "fits", "images per class"], cells)


def differences(found: dict[str, dict[tuple[str, str, int], float]], dtype: Dtype, sets: list[str]) -> str:
    """Paired differences from the usual dtype, in points."""
    cells, all_heads = [], []
    for head in HEAD_NAMES:
        paired: dict[str, list[float]] = {name: [] for name in sets}
        for key, test in found[dtype].items():
            if key[1] == head and key in found[USUAL]:
                paired[key[0]].append(test - found[USUAL][key])
        every = [each for name in sets for each in paired[name]]
        all_heads += every
        same = f"{sum(each == 0 for each in every)} of {len(every)}"
        cells.append((f"`{head}`", *(percent(paired[name], sign=True) for name in sets), interval(every), same))
    same = f"{sum(each == 0 for each in all_heads)} of {len(all_heads)}"
    cells.append(("**all**", *[""] * len(sets), interval(all_heads), same))
    return page.table(["head", *sets, "all sets", "same score"], cells)


def main() -> None:
    """Train what is missing, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit-ti16", help="as for mlfusion extract")
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the data sets")
    parser.add_argument("--sets", default=SETS, help="their names")
    parser.add_argument("--folder", type=Path, default=Path("results/dtypes"), help="for the caches and the rows")
    parser.add_argument("--table", action="store_true", help="train nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    sets = asked.sets.split(",")
    places = [] if asked.table else [str(asked.data / name) for name in sets]
    exact = asked.folder / "float32"
    for where in places:
        mlfusion.extract(asked.model, where, tokens="cls,ap", layers=LAYERS, dtype="float32", cache=exact)
        for entry in FeatureStore(exact).find(model=asked.model, dataset=where):
            for dtype in (USUAL, *OTHERS[:-1]):
                keep_as(entry, dtype, asked.folder / dtype)
    # Slow heads last, so that what there is after a stop is of use.
    for head, where in product(sorted(HEAD_NAMES, key=SLOW.__contains__), places):
        for dtype in DTYPES:
            mlfusion.probe(
                where,
                model=asked.model,
                probes=[f"{REPRESENTATION}/{head}"],
                grid="quick",
                seeds=seeds_of(head, Path(where).name),
                shots=[SHOTS.get(head)],
                cache=asked.folder / dtype,
                results=asked.folder / "rows" / dtype,
                log=print,
            )
    rows = {dtype: Results(asked.folder / "rows" / dtype).require() for dtype in DTYPES}
    versions = rows[USUAL][0].versions
    found = {dtype: tests(each) for dtype, each in rows.items()}
    page.put("measurements/dtypes.md", "sizes", sizes(asked.folder, sets))
    page.put("measurements/dtypes.md", "accuracies", f"torch {versions['torch']}.\n\n{accuracies(found, sets)}")
    for dtype in OTHERS:
        page.put("measurements/dtypes.md", dtype, differences(found, dtype, sets))


if __name__ == "__main__":
    main()
