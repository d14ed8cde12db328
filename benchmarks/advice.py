"""What a pilot's advice is worth: its word against the full results, case by case. The table of docs/advice.md.

    mlfusion run pipelines/study.toml --data DIR
    python benchmarks/advice.py [--results results] [--cache cache] [--case MODEL/DATASET] [--table]

For every model on every data set of which the results hold all candidates, `mlfusion.workflows.advice.advise` is asked,
and what it says is kept in RESULTS/advice; with --table nothing is asked, and the table shows what there is. Regret is what
the best candidate's mean test score exceeds the advised one's by.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import page

from mlfusion.report.numbers import percent, points
from mlfusion.results import Results, Row
from mlfusion.workflows.advice import CANDIDATES, advise

FIXED = {
    "always `cls-last/linear`": "cls-last/linear",
    "always `cls+ap-all-layers/linear`": "cls+ap-all-layers/linear",
    "always ALF": "cls+ap-all-layers/attentive",
    "always AAT": "all-tokens-last/attentive",
}


def cases(rows: list[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """{(model, data set): {candidate: its rows}}, where there are rows of all candidates with the same seeds."""
    held: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row.probe in CANDIDATES and not row.options():
            held.setdefault((row.model, row.dataset), {}).setdefault(row.probe, []).append(row)
    whole = {}
    for case, probes in held.items():
        if len(probes) == len(CANDIDATES):
            seeds = set.intersection(*({row.seed for row in each} for each in probes.values()))
            whole[case] = {name: [row for row in each if row.seed in seeds] for name, each in probes.items()}
    return {case: probes for case, probes in whole.items() if all(probes.values())}


def table(held: dict[tuple[str, str], dict[str, list[Row]]], said: dict[tuple[str, str], dict]) -> str:
    """One line a case, and the mean regret of the advice beside that of always using the same probe."""
    heads = ["model", "data set", "seeds", "advised", "pilot score, %", "gain in the pilot, points", "test score, %"]
    lines = []
    regrets: dict[str, list[float]] = {}
    for case, advice in said.items():
        tests = {name: fmean(row.test for row in each) for name, each in held[case].items()}
        best = max(tests, key=lambda name: tests[name])
        one = next(each for each in advice["candidates"] if each["probe"] == advice["use"])
        gain = one["gain"]
        gained = f"{points(gain['value'])} ({points(gain['low'])} to {points(gain['high'])})" if gain else ""
        tested = tests[advice["use"]], tests[best]
        lines.append(
            [
                *case,
                str(len(held[case][best])),
                f"`{advice['use']}`",
                percent(one["score"]["value"]),
                gained,
                percent(tested[0]),
                f"`{best}`",
                percent(tested[1]),
                percent(tested[1] - tested[0]),
            ]
        )
        ways = {
            "the advice": advice["use"],
            "the cheapest that the pilot cannot distinguish from the best": advice["enough"],
        } | FIXED
        for way, name in ways.items():
            regrets.setdefault(way, []).append(tests[best] - tests[name])
    widths = [each["score"]["high"] - each["score"]["low"] for one in said.values() for each in one["candidates"]]
    images = sorted({one["images"] for one in said.values()})
    rules = [[way, percent(fmean(each)), percent(max(each))] for way, each in regrets.items()]
    return "\n\n".join(
        [
            page.table([*heads, "best by test", "test score, %", "regret"], lines, left=2),
            f"The pilots used {images[0]} to {images[-1]} images; the intervals of their scores are {percent(min(widths))} to "
            f"{percent(max(widths))} points wide. Mean and largest regret over these {len(said)} cases, in points:",
            page.table(["rule", "mean", "largest"], rules),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--cache", default=None)
    parser.add_argument("--case", action="append", help="MODEL/DATASET; default: all")
    parser.add_argument("--table", action="store_true", help="ask nothing; show what was said")
    asked = parser.parse_args()
    held = cases(Results(asked.results).rows())
    folder = asked.results / "advice"
    folder.mkdir(exist_ok=True)
    said = {}
    for case, probes in held.items():
        kept = folder / f"{case[0]}.{case[1]}.json"
        if not kept.is_file() and not asked.table and (not asked.case or "/".join(case) in asked.case):
            sources = next(iter(probes.values()))[0].sources
            dataset = case[1] if sources.dataset == "embedded" else sources.dataset
            advice = advise(sources.model, dataset, cache=asked.cache)
            kept.write_text(json.dumps(advice.to_json()), encoding="utf-8")
        if kept.is_file():
            said[case] = json.loads(kept.read_text(encoding="utf-8"))
    if said:
        page.put("advice.md", "regret", table(held, said))


if __name__ == "__main__":
    main()
