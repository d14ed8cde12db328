"""The family of probes on real features, and what successive halving does to the choice: the tables of docs/probes.md.

    python benchmarks/probes.py --model MODEL --data FOLDER [--sets dtd10,flowers5] [--minutes 25] [--table]

Caches every layer's CLS and AP and all tokens of the last layer, trains each head on both (quick grid, three seeds), and
a few probes by the paper's grid with and without halving, and writes both tables into docs/probes.md. What is in the
results already is not made again; after so many minutes of processor time nothing more is begun, and the same command goes
on from there; with --table nothing is trained, and the tables show what there is. The order is that of `plan`.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import page

import mlfusion
from mlfusion.results import Results, Row
from mlfusion.specs.names import ABOUT_HEADS, BASELINE, HEAD_NAMES
from mlfusion.system.progress import duration

SEEDS = (0, 1, 2)
LAYERS, TOKENS = "cls+ap-all-layers", "all-tokens-last"
HALVED = (
    BASELINE,
    "cls+ap-last/linear",
    "cls+ap-all-layers/linear",
    "cls+ap-last/attentive",
    "cls+ap-all-layers/attentive",
)
HEAVIEST = "v-jepa-4"  # a minute and more a seed, and many over all tokens


def plan(sets: list[str], parts: list[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What is trained, in this order: data set, probe and options.

    Every head on the tokens of all layers of every set; then halving; then every head but the heaviest on all tokens of the
    last layer, the solved ones first.
    """
    quick = {"grid": "quick", "seeds": SEEDS}
    for name in sets if "family" in parts else ():
        for probe in (BASELINE, *(f"{LAYERS}/{head}" for head in HEAD_NAMES)):
            yield name, probe, quick
    for name in sets if "halving" in parts else ():
        for probe in HALVED:
            for half in (True, False):
                yield name, probe, {"grid": "paper", "seeds": SEEDS, "halving": half}
    for head in (
        sorted(HEAD_NAMES, key=lambda head: head not in ("ridge", "logistic", "knn")) if "family" in parts else ()
    ):
        for name in sets:
            if head != HEAVIEST:
                yield name, f"{TOKENS}/{head}", quick


def spread(values: list[float], best: bool = False) -> str:
    """Percent, mean ± sample deviation."""
    if not values:
        return "-"
    text = f"{100 * fmean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")
    return f"**{text}**" if best else text


def family(rows: list[Row], sets: list[str]) -> str:
    """Test scores of every head on every data set, a table a representation."""
    held: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.grid == "quick" and not row.options():
            held.setdefault((row.dataset, row.probe), []).append(row)

    def tests(name: str, probe: str) -> list[float]:
        return [row.test for row in held.get((name, probe), [])]

    tables = []
    for representation in (LAYERS, TOKENS):
        lines = [("`cls-last/linear`", "the baseline", *(spread(tests(name, BASELINE)) for name in sets), "")]
        probes = {head: f"{representation}/{head}" for head in HEAD_NAMES}
        best = {name: max((fmean(t) for p in probes.values() if (t := tests(name, p))), default=0.0) for name in sets}
        for head, probe in probes.items():
            scores = {name: tests(name, probe) for name in sets}
            cells = [spread(found, bool(found) and fmean(found) == best[name]) for name, found in scores.items()]
            seconds = [row.seconds for row in held.get((sets[0], probe), [])]
            lines.append((f"`{head}`", ABOUT_HEADS[head], *cells, duration(median(seconds)) if seconds else "-"))
        tables.append(page.table((f"on `{representation}`", "what", *sets, "time"), lines, left=2))
    return "\n\n".join(tables)


def halving(rows: list[Row], sets: list[str], head: str) -> str | None:
    """Probes of this head with the same seeds by the paper's grid, chosen among all and chosen by halving; None without any."""
    ways: dict[tuple[str, str], dict[int, dict[bool, Row]]] = {}
    for row in rows:
        if row.grid == "paper" and row.probe in HALVED and row.probe.endswith(f"/{head}"):
            seeds = ways.setdefault((row.dataset, row.probe), {})
            seeds.setdefault(row.seed, {})[row.halving] = row
    lines = [
        "| data set | probe | seeds | same choice | val, all | val, halving | test, all | test, halving "
        "| time, all | time, halving |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in sets:
        for probe in HALVED:
            pairs = [way for way in ways.get((name, probe), {}).values() if len(way) == 2]
            if not pairs:
                continue
            same = sum(way[True].selected == way[False].selected for way in pairs)
            scores = [
                spread([getattr(way[half], what) for way in pairs])
                for what in ("val", "test")
                for half in (False, True)
            ]
            times = [duration(median(way[half].seconds for way in pairs)) for half in (False, True)]
            cells = [name, f"`{probe}`", str(len(pairs)), f"{same} of {len(pairs)}", *scores, *times]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else None


def main() -> None:
    """Train what is missing, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit-ti16", help="as for mlfusion extract")
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the data sets")
    parser.add_argument("--sets", default="dtd10,flowers5", help="their names")
    parser.add_argument("--cache", default=None)
    parser.add_argument("--results", type=Path, default=Path("results/probes"))
    parser.add_argument("--parts", default="family,halving", help="of the page that are made")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of processor time")
    parser.add_argument("--table", action="store_true", help="train nothing")
    asked = parser.parse_args()
    sets, parts = asked.sets.split(","), asked.parts.split(",")
    cached = set()
    for name, probe, options in () if asked.table else plan(sets, parts):
        if time.process_time() > 60 * asked.minutes:
            print(f"{asked.minutes:g} minutes are over; the same command goes on from here")
            break
        where = str(asked.data / name)
        if name not in cached:
            mlfusion.extract(asked.model, where, tokens="cls,ap,all@last", cache=asked.cache)
            cached.add(name)
        mlfusion.probe(
            where, probes=[probe], model=asked.model, cache=asked.cache, results=asked.results, log=print, **options
        )
    rows = Results(asked.results).require()
    if "family" in parts:
        page.put("probes.md", "family", family(rows, sets))
    for part in ("linear", "attentive"):
        if "halving" in parts and (table := halving(rows, sets, part)):
            page.put("probes.md", f"halving, {part}", table)


if __name__ == "__main__":
    main()
