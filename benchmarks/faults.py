"""How often each fault of the cache was tried, and what was lost: the table of docs/faults.md.

    python benchmarks/faults.py [--folder DIR] [--page] [--table]

Runs the long form of tests/faults, file by file, a process each. A file that passed is not run again while its tally lies in
--folder; one that failed is, and says why. With --page the table goes into docs/faults.md, losses and all;
with --table nothing is run, and it shows the tallies there are.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import page

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests" / "faults"


def run(test: Path, kept: Path) -> dict[str, object]:
    """One file's tally; made anew where it is not there, or of a run that failed."""
    if kept.exists() and (old := json.loads(kept.read_text()))["passed"]:
        return old
    tally, began = kept.with_suffix(".tally"), time.monotonic()
    tally.unlink(missing_ok=True)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(test)],
        env=os.environ | {"MLFUSION_FAULTS": "long", "MLFUSION_TALLY": str(tally)},
        cwd=ROOT,
        check=False,
    )
    body = {
        "passed": ran.returncode == 0,
        "minutes": (time.monotonic() - began) / 60,
        "tally": json.loads(tally.read_text()) if tally.exists() else {},
    }
    kept.write_text(json.dumps(body))
    return body


def main() -> None:
    """Run what is missing, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "faults", help="for the tallies")
    parser.add_argument("--page", action="store_true", help="put the table into docs/faults.md")
    parser.add_argument("--table", action="store_true", help="run nothing")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tests = sorted(TESTS.glob("test_*.py"))
    kept = [folder / f"{test.stem}.json" for test in tests]
    found = (
        [json.loads(path.read_text()) for path in kept if path.exists()] if asked.table else list(map(run, tests, kept))
    )
    counts: dict[str, list[int]] = {}
    for body in found:
        for what, (tried, lost) in body["tally"].items():  # type: ignore[attr-defined]
            count = counts.setdefault(what, [0, 0])
            count[0] += tried
            count[1] += lost
    every = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [(what, f"{tried:,}", f"{lost:,}") for what, (tried, lost) in sorted(counts.items())]
    text = page.table(["what was done", "trials", "lost"], [*rows, ("**all**", *(f"**{count:,}**" for count in every))])
    print(text)
    if asked.page:
        page.put("faults.md", "faults", f"{page.machine()}.\n\n{text}")
    if not all(body["passed"] for body in found):
        sys.exit("a test failed: see above")


if __name__ == "__main__":
    main()
