"""How often each fault of the cache was tried, and what was lost: the table of docs/measurements/faults.md.

    python benchmarks/faults.py [FILE …] [--minutes M] [--folder DIR] [--page] [--table]

Runs the long form of tests/faults, file by file, a process each. A file that passed is not run again while its tally lies in
--folder, unless it is named; one that failed is, and says why. `--minutes 60 soak` lets users of every kind loose on one
cache for an hour; `inputs` gives random data sets and processors to the readers, `model_folders` forged configurations, and
`cards` forged saved probes: with --minutes as many of their trials as begin within that time.
With --page the tables go into docs/measurements/faults.md, losses included, the table of all faults only once every file has a
tally; with --table nothing is run, and they show the tallies there are.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import page

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests" / "faults"


def run(test: Path, kept: Path, minutes: float | None) -> None:
    """Run one file and keep its tally."""
    tally, began = kept.with_suffix(".tally"), time.monotonic()
    tally.unlink(missing_ok=True)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(test)],
        env=os.environ
        | {"MLFUSION_LONG": str(minutes or "inf"), "MLFUSION_TALLY": str(tally)}
        | ({"MLFUSION_SOAK": str(minutes)} if minutes else {}),
        cwd=ROOT,
        check=False,
    )
    body = json.loads(tally.read_text()) if tally.exists() else {"tally": {}, "figures": {}}
    body |= {"passed": ran.returncode == 0, "minutes": (time.monotonic() - began) / 60}
    kept.write_text(json.dumps(body))


def load(kept: Path) -> dict[str, Any] | None:
    """What was kept of a file's run, if it was run."""
    return json.loads(kept.read_text()) if kept.exists() else None


def trials(found: list[dict[str, Any]]) -> str:
    """The table of what was tried and what was lost."""
    counts: dict[str, list[int]] = {}
    for body in found:
        for what, (tried, lost) in body["tally"].items():
            count = counts.setdefault(what, [0, 0])
            count[0] += tried
            count[1] += lost
    every = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [(what, f"{tried:,}", f"{lost:,}") for what, (tried, lost) in sorted(counts.items())]
    return page.table(["fault", "trials", "lost"], [*rows, ("**all**", *(f"**{count:,}**" for count in every))])


def soak(figures: dict[str, Any]) -> str:
    """The table of what the users of one busy cache did, and of what their processes held."""
    before, after = figures["mebibytes"]
    rows = [
        ("minutes", f"{figures['minutes']:.0f}"),
        *((what, f"{count:,}") for what, count in sorted(figures["did"].items())),
        ("images run through the model", f"{figures['images']:,}"),
        ("processes that ran from the beginning to the end", f"{figures['residents']}"),
        ("memory of the process that grew most, second quarter of the time → last", f"{before:.0f} → {after:.0f} MiB"),
        (
            "file descriptors of each process between two operations, at most; unchanged at the end",
            f"{figures['descriptors']}",
        ),
    ]
    return page.table(["event", "count"], rows)


def shards(figures: dict[str, Any]) -> str:
    """The table of what takes how long in an entry of very many shards."""
    rows = [(what, f"{seconds:,.2f}") for what, seconds in figures["seconds"].items()]
    return page.table([f"{figures['shards']:,} shards of one image each", "seconds"], rows)


def inputs(figures: dict[str, Any]) -> str:
    """The table of random inputs, and of what became of them."""
    outcomes = ["valid", "spoilt", "right", "refused", "traceback", "silently wrong"]
    counts = {form: [count.get(name, 0) for name in outcomes] for form, count in sorted(figures.items())}
    rows = [(form, *(f"{count:,}" for count in each)) for form, each in counts.items()]
    every = [sum(column) for column in zip(*counts.values(), strict=True)]
    heads = ["input", "valid", "with a fault", "right", "refused in one sentence", "traceback", "silently wrong"]
    return page.table(heads, [*rows, ("**all**", *(f"**{count:,}**" for count in every))])


def folders(figures: dict[str, Any]) -> str:
    """The table of forged configurations of models, and of what became of them."""
    outcomes = ["tried", "right", "refused", "traceback", "silently wrong"]
    rows = [(form, *(f"{count.get(name, 0):,}" for name in outcomes)) for form, count in sorted(figures.items())]
    every = [f"**{sum(count.get(name, 0) for count in figures.values()):,}**" for name in outcomes]
    heads = ["form of the folder", "configurations", "right", "refused in one sentence", "traceback", "silently wrong"]
    return page.table(heads, [*rows, ("**all**", *every)])


def records(figures: dict[str, Any]) -> str:
    """The table of forged records or cards, and of what became of them."""
    rows = [(what, f"{count:,}") for what, count in figures.items()]
    return page.table(["outcome", "trials"], [*rows, ("**all**", f"**{sum(figures.values()):,}**")])


PARTS = {"records": records, "soak": soak, "shards": shards, "inputs": inputs, "folders": folders, "cards": records}


def main() -> None:
    """Run what is missing, print the tables, write them."""
    tests = {test.stem.removeprefix("test_"): test for test in sorted(TESTS.glob("test_*.py"))}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"run these, and only these, anew: {', '.join(tests)}")
    parser.add_argument("--minutes", type=float, help="that the soak takes: 1; after which no other trial begins: none")
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "faults", help="for the tallies")
    parser.add_argument("--page", action="store_true", help="put the tables into docs/measurements/faults.md")
    parser.add_argument("--table", action="store_true", help="run nothing")
    asked = parser.parse_args()
    if unknown := set(asked.files) - set(tests):
        parser.error(f"no such files: {', '.join(sorted(unknown))}; allowed: {', '.join(tests)}")
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: folder / f"{test.stem}.json" for name, test in tests.items()}
    if not asked.table:
        for name in asked.files or tests:
            old = load(kept[name])
            if asked.files or old is None or not old["passed"]:
                run(tests[name], kept[name], asked.minutes)
    found = [body for path in kept.values() if (body := load(path)) is not None]
    parts = {"faults": f"{page.machine()}.\n\n{trials(found)}"} if any(body["tally"] for body in found) else {}
    for body in found:
        for part, figures in body.get("figures", {}).items():
            parts[part] = PARTS[part](figures)
    for part, text in parts.items():
        print(text, end="\n\n")
        if asked.page and part == "faults" and len(found) < len(kept):
            print(
                f"the table of all faults stays as it is: {len(kept) - len(found)} of the files have no tally in {folder}\n"
            )
        elif asked.page:
            page.put("measurements/faults.md", part, text)
    if not all(body["passed"] for body in found):
        sys.exit("a test failed: see above")


if __name__ == "__main__":
    main()
