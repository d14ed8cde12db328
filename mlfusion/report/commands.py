"""The commands that reproduce a report's results, from the options stored in its rows."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import cast

from mlfusion.report.summary import ComparisonGroup, Score
from mlfusion.specs.commands import extract_command, probe_command
from mlfusion.specs.definitions import command
from mlfusion.specs.identity import Pair
from mlfusion.specs.names import STUDY
from mlfusion.specs.options import SearchOptions
from mlfusion.system.text import one_line


def reproduction_commands(groups: Iterable[ComparisonGroup], page: str) -> list[str]:
    """The commands of each group, `extract` and one `probe` per search of its rows; then the `report` of the page."""
    commands = []
    for group in groups:
        by_search: dict[SearchOptions, list[Score]] = {}
        for score in group.scores:
            search = replace(score.rows[0].search(), seeds=score.seeds)  # each row is one seed of it
            by_search.setdefault(search, []).append(score)
        commands.append(_extract(group))
        commands += [
            _probe(group, _probe_names(scores, group.first.depth), search) for search, scores in by_search.items()
        ]
    return [one_line(line) for line in (*dict.fromkeys(commands), command("report", ["--html", page]))]


def layerwise_command(group: ComparisonGroup) -> str:
    """The `probe` command for single layers."""
    search = replace(group.first.search(), seeds=group.seeds)
    return one_line(_probe(group, ["cls-each-layer/linear", "ap-each-layer/linear"], search))


def _extract(group: ComparisonGroup) -> str:
    tokens = cast(set[Pair], set(group.tokens))
    kinds = {kind for _, kind in tokens}
    default: set[Pair] = {(layer, kind) for layer in range(1, group.first.depth + 1) for kind in ("cls", "ap")}
    if kinds & {"cls", "ap"}:  # they share a stream, and the command caches all layers by default
        tokens |= {(layer, kind) for layer, kind in default if kind in kinds}
    sources = group.first.sources
    options = [_without_folder(word) for word in sources.options]
    model, dataset = _without_folder(sources.model), _without_folder(sources.dataset)
    return extract_command(model, dataset, tokens if tokens - default else (), options)


def _probe(group: ComparisonGroup, names: Sequence[str], search: SearchOptions) -> str:
    sources = group.first.sources
    return probe_command(_without_folder(sources.model), _without_folder(sources.dataset), names, search)


def _without_folder(word: str) -> str:
    """A page is passed on: it does not say where a folder of this machine is."""
    return f"DIR/{PurePath(word).name}" if PurePath(word).is_absolute() else word


def _probe_names(scores: Sequence[Score], depth: int) -> list[str]:
    """Names as short as possible: 'all' for the study's ten, '…-each-layer/…' for a whole series."""
    names = [score.probe for score in scores]
    if set(STUDY) <= set(names):
        names = ["all", *(name for name in names if name not in STUDY)]
    for series in dict.fromkeys(score.layerwise[0] for score in scores if score.layerwise):
        kinds, _, head = series.partition("/")
        every_layer = [f"{kinds}-layer-{layer}/{head}" for layer in range(1, depth + 1)]
        if set(every_layer) <= set(names):
            names = [*(name for name in names if name not in every_layer), f"{kinds}-each-layer/{head}"]
    return names
