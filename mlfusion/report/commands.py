"""The commands that reproduce a report's results: `extract`, `probe` and `report` as one would type them."""

import shlex
from collections.abc import Iterable, Sequence
from typing import cast

from mlfusion.report.summary import ComparisonGroup, Score
from mlfusion.specs.identity import Pair
from mlfusion.specs.names import STUDY, token_words


def reproduction_commands(groups: Iterable[ComparisonGroup], page: str) -> list[str]:
    """An `extract` and a `probe` for each set of seeds that make each group's rows, each once, and the page's `report`."""
    commands = []
    for group in groups:
        by_seeds: dict[tuple[int, ...], list[Score]] = {}
        for score in group.scores:
            by_seeds.setdefault(score.seeds, []).append(score)
        commands.append(_extract(group))
        commands += [
            _probe(group, _probe_names(scores, group.first.depth), seeds) for seeds, scores in by_seeds.items()
        ]
    return [*dict.fromkeys(commands), f"mlfusion report --html {shlex.quote(page)}"]


def layerwise_command(group: ComparisonGroup) -> str:
    """The `probe` of single layers that a group has no rows of."""
    return _probe(group, ["cls-each-layer/linear", "ap-each-layer/linear"], group.seeds)


def _place(group: ComparisonGroup) -> str:
    return f"--model {shlex.quote(group.model)} --dataset {shlex.quote(group.dataset)}"


def _extract(group: ComparisonGroup) -> str:
    tokens = cast(set[Pair], set(group.tokens))
    kinds = {kind for _, kind in tokens}
    default: set[Pair] = {(layer, kind) for layer in range(1, group.first.depth + 1) for kind in ("cls", "ap")}
    if kinds & {"cls", "ap"}:  # as the command does by default; what is cached is one stream
        tokens |= {(layer, kind) for layer, kind in default if kind in kinds}
    option = f" --tokens {token_words(tokens)}" if tokens - default else ""
    return f"mlfusion extract {_place(group)}{option}"


def _probe(group: ComparisonGroup, names: Sequence[str], seeds: Sequence[int]) -> str:
    numbers = ",".join(str(seed) for seed in seeds)
    return f"mlfusion probe {_place(group)} --probe {','.join(names)} --grid {group.grid} --seeds {numbers}"


def _probe_names(scores: Sequence[Score], depth: int) -> list[str]:
    """Names as short as possible: 'all' for the study's ten, '…-each-layer/…' for a whole series."""
    names = [score.probe for score in scores]
    if set(STUDY) <= set(names):
        names = ["all", *(name for name in names if name not in STUDY)]
    for series in dict.fromkeys(found[0] for score in scores if (found := score.layerwise)):
        kinds, _, head = series.partition("/")
        whole = [f"{kinds}-layer-{layer}/{head}" for layer in range(1, depth + 1)]
        if set(whole) <= set(names):
            names = [*(name for name in names if name not in whole), f"{kinds}-each-layer/{head}"]
    return names
