"""Trains a row's probe again from the row alone, and compares the scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mlfusion.errors import NotCached
from mlfusion.probing.evaluation import same_scores, save_probe
from mlfusion.probing.fitting import Resources, train
from mlfusion.probing.jobs import Job
from mlfusion.results import Results, Row
from mlfusion.specs.names import Probe, parse_probes
from mlfusion.specs.options import StorageOptions, TrainingOptions
from mlfusion.store import Entry, FeatureStore, Names
from mlfusion.store.features import SplitPair
from mlfusion.store.lookup import require


@dataclass(frozen=True, eq=False)
class Rerun:
    """A row, and the row of training its probe again."""

    row: Row
    again: Row
    differs: list[str]  # differences in code, versions, device and protocol

    @property
    def same(self) -> bool:
        """Whether scores and choice are the same to the last bit."""
        return same_scores(self.row, self.again)

    def scores(self) -> list[tuple[str, Any, Any]]:
        """(name, then, now) of scores and choice."""
        names = ("val", "test", "train")
        scores = [(name, getattr(self.row, name), getattr(self.again, name)) for name in names]
        return [*scores, ("selected", self.row.selected.given(), self.again.selected.given())]


def rerun(
    row_id: str,
    *,
    keep: bool = False,
    storage: StorageOptions = StorageOptions(),
    device: str | None = None,
    memory: int | None = None,
) -> Rerun:
    """Train a row's probe again from the row alone, and compare; arguments and errors as in `mlfusion.rerun`."""
    store, results = FeatureStore(storage.cache), Results(Path(storage.results))
    row = results.named(row_id)
    [probe] = parse_probes(row.probe, row.depth)
    pair = _pair_of(store, row, probe)
    job = Job(probe, row.search())
    resources = Resources.of(TrainingOptions(device=device or row.device, memory=memory), streams=row.streamed)
    again = train(pair, job, resources)
    then, now = ({"code": r.code, "device": r.device, **r.versions} for r in (row, again.row))
    differs = [f"{name} {then[name]} then, {now[name]} now" for name in now if then.get(name, now[name]) != now[name]]
    if row.protocol != again.row.protocol:
        differs.append(f"protocol {row.protocol} then, {again.row.protocol} now")
    result = Rerun(row, again.row, differs)
    if keep and result.same:
        results.keep_arrays(row, again.arrays)
        if row.folds is None:
            save_probe(results, row, again)
    return result


def _pair_of(store: FeatureStore, row: Row, probe: Probe) -> SplitPair:
    """The features that a row was trained on, found by their keys."""
    entries = [entry for key in row.keys if (entry := store.by_key(key)) is not None]
    if len(entries) < len(row.keys):
        raise NotCached(
            f"the features of result {row.id} ({', '.join(row.keys)}) are not in {store.root}. Name the cache that "
            f"has them with --cache, or make them again: {row.extract_command(str(store.root.absolute()))}"
        )
    for entry in entries:
        require(
            entry, probe.representation.pairs(row.depth), row.sources.model, row.sources.dataset, row.sources.options
        )
    groups = row.groups.digests if row.groups else ("", "")
    train, test, *others = entries
    names = [_names_with(entry, digest, row) for entry, digest in zip((train, test), groups, strict=True)]
    names += [entry.names()[-1] for entry in others]
    return SplitPair(row.model, row.dataset, train, test, tuple(names), 0, others[0] if others else None)


def _names_with(entry: Entry, groups: str, row: Row) -> Names:
    """The last names of an entry that refer to these groups, or to none."""
    if not groups:
        return msgspec.structs.replace(entry.names()[-1], groups="", grouped_by="")
    for names in reversed(entry.names()):
        if names.groups == groups:
            return names
    raise NotCached(
        f"the groups of result {row.id} are not among the names of {entry.path}; extract them again: {row.extract_command()}"
    )
