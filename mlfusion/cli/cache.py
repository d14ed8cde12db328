"""`mlfusion cache`: what lies in the cache, whether it is sound, what may go, and how it travels."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mlfusion.cli.data import reads_data
from mlfusion.cli.words import (
    DATASET,
    MODEL,
    UNITS,
    AsJson,
    Cache,
    Dataset,
    Device,
    Dtype,
    Hook,
    Layers,
    Model,
    Settings,
    Split,
    Tokens,
    amount,
    asked_model,
    makes_tokens,
    print_json,
    print_rows,
    say,
)
from mlfusion.errors import CacheUnusable, NotCached, UnknownName
from mlfusion.specs import token_words

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after the feature cache.")

SomeModel = Annotated[str | None, typer.Option("--model", "-m", help="Only entries of this model.")]
SomeDataset = Annotated[str | None, typer.Option("--dataset", "-d", help="Only entries of this data set.")]
SomeSplit = Annotated[str | None, typer.Option("--split", help="Only entries of this split.")]
NewFormat = Annotated[str | None, typer.Option("--format", help="zarr or hdf5; default: as each stream is kept.")]

TIMES = {"h": 3600, "d": 86400, "w": 7 * 86400}


@app.command()
def ls(
    model: SomeModel = None,
    dataset: SomeDataset = None,
    split: SomeSplit = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Every entry: whose features of what, which tokens, how many bytes."""
    from mlfusion.store import FeatureStore

    damaged: list[str] = []
    rows = []
    for entry in FeatureStore(cache).find(model=model, dataset=dataset, split=split, damaged=damaged.append):
        try:
            rows.append(_row(entry, unreadable=as_json))
        except NotCached:  # removed since
            continue
        except CacheUnusable as err:
            damaged.append(str(err))
    if as_json:
        print_json({"entries": rows, "damaged": damaged})
        return
    if rows or not damaged:
        print_rows(rows, nothing="no features yet; run: mlfusion extract")
    for why in damaged:
        say(f"not listed: {why}")


def _row(entry: Any, unreadable: bool) -> dict[str, Any]:
    spec, home = entry.spec, entry.sources()
    skipped = entry.skipped(home)
    return {
        "model": spec.model.name,
        "dataset": spec.data.name,
        "split": spec.data.split,
        "images": spec.data.images,
        "skipped": len(skipped),
        "tokens": token_words(frozenset(home)) or "(not complete)",
        "dtype": spec.dtype,
        "bytes": sum(s.stream.nbytes for s in dict.fromkeys(home.values()) if s.folder.is_relative_to(entry.path)),
        "key": entry.key,
        **({"unreadable": entry.unreadable(skipped)} if unreadable else {}),
    }


@app.command()
def du(cache: Cache = None, as_json: AsJson = False) -> None:
    """Bytes on disk by model and data set, measured file by file; and what lies beside the entries."""
    from mlfusion.store import FeatureStore, folder_bytes

    store = FeatureStore(cache)
    sums: dict[tuple[str, str], int] = {}
    for entry in store.own():
        place = (entry.spec.model.name, entry.spec.data.name)
        sums[place] = sums.get(place, 0) + entry.size()
    rows = [{"model": m, "dataset": d, "bytes": b} for (m, d), b in sorted(sums.items(), key=lambda one: -one[1])]
    beside = {name: folder_bytes(store.root / name) for name in ("quarantine", "trash", "v1")}
    total = sum(sums.values()) + sum(beside.values())
    if as_json:
        print_json({"entries": rows, "beside": beside, "bytes": total})
        return
    print_rows(rows, nothing="no features yet; run: mlfusion extract")
    for name, nbytes in beside.items():
        if nbytes:
            typer.echo(f"{store.root / name}: {nbytes:,} bytes; may be deleted")
    typer.echo(f"in all: {total:,} bytes in {store.root}")


@app.command()
@reads_data
@makes_tokens
def explain(
    model: Model = MODEL,
    dataset: Dataset = DATASET,
    reading: Any = None,
    split: Split = "train,test",
    layers: Layers = "all",
    tokens: Tokens = "cls,ap",
    hook: Hook = None,
    settings: Settings = None,
    dtype: Dtype = "float16",
    device: Device = "auto",
    making: Any = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Which entry extract would use; where there is none, which field differs from the nearest."""
    from mlfusion.planning import explain as run

    told = run(
        asked_model(model, hook, settings),
        dataset,
        reading=reading,
        splits=split,
        layers=layers,
        tokens=tokens,
        dtype=dtype,  # type: ignore[arg-type]
        device=device,
        making=making,
        cache=cache,
    )
    if as_json:
        print_json({"splits": [one.to_json() for one in told]})
        return
    for one in told:
        body = one.to_json()
        lacking = f"; lacks {body['lacking']}" if body["lacking"] and one.entry else ""
        typer.echo(f"{one.split}: {body['state']}, {body['path'] or one.key}{lacking}")
        if one.nearest:
            spec = one.nearest.spec
            typer.echo(f"  nearest: {spec.model.name} on {spec.data.name}/{spec.data.split}, {one.nearest.key}")
        for name, asked, there in one.differences:
            typer.echo(f"  {name} differs: " + (f"{asked} here, {there} there" if there else f"there, {asked}"))


@app.command()
def verify(
    fix: Annotated[bool, typer.Option("--repair", help="Move what is damaged to quarantine/.")] = False,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte and compare it with its checksum; exit 1 where something is, and stays, damaged."""
    from mlfusion.progress import track
    from mlfusion.store import FeatureStore
    from mlfusion.store.audit import folders, repair, verify

    store = FeatureStore(cache)
    damaged, moved, entries = [], [], 0
    own = folders(store.root)
    places = [(store.root, path) for path in own]
    places += [(lower.root, path) for lower in store.below for path in folders(lower.root)]
    with track("verifying", len(places), "entries") as bar:
        for root, path in places:
            found = list(verify(root, path))
            damaged += found
            entries += 1
            if fix and found and root == store.root:
                moved += repair(root, path, found)
            bar.advance()
    if as_json:
        print_json(
            {"entries": entries, "damaged": [one.to_json() for one in damaged], "quarantined": [str(m) for m in moved]}
        )
    else:
        for one in damaged:
            typer.echo(f"{one.path}: {one.why}")
        for path in moved:
            typer.echo(f"moved to {path}")
        typer.echo(
            f"{entries:,} entries, {len(damaged):,} damaged"
            + ("; run the same `mlfusion extract` again to make what is missing" if moved else "")
        )
    if damaged and not moved:
        raise CacheUnusable("parts of the cache are damaged; run: mlfusion cache verify --repair")


@app.command()
def prune(
    model: SomeModel = None,
    dataset: SomeDataset = None,
    older: Annotated[str | None, typer.Option("--older", help="Unused for so long: 12h, 30d, 8w.")] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Until the cache takes no more: 500MB, 20GB; longest unused first.")
    ] = None,
    unneeded: Annotated[
        Path | None, typer.Option("--unneeded", help="Keep what the results in this folder were made from.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Remove entries by name, age, size, or because no result needs them; never one that is in use."""
    from mlfusion import disk
    from mlfusion.store import FeatureStore
    from mlfusion.store.housekeeping import check_criteria, decide, empty, remove

    check_criteria(model=model, dataset=dataset, older=older, size=size, unneeded=unneeded)
    store = FeatureStore(cache)
    every = list(store.own())
    wanted = {entry.key for entry in store.find(model=model, dataset=dataset)}
    fates = decide(
        [entry for entry in every if entry.key in wanted],
        every=every,
        now=disk.clock(store.root),
        older=amount("older", older, TIMES),
        quota=amount("size", size, UNITS),
        needed=_needed(unneeded) if unneeded else None,
    )
    kept: dict[str, str] = {}
    if not dry_run:
        empty(store.root)
        kept = {fate.entry.key: why for fate in fates if fate.goes and (why := remove(store.root, fate.entry.path))}
    rows = [
        fate.to_json() | ({"removed": False, "why": kept[fate.entry.key]} if fate.entry.key in kept else {})
        for fate in fates
    ]
    gone = [row for row in rows if row["removed"]]
    freed = sum(row["bytes"] for row in gone)
    if as_json:
        print_json({"dry_run": dry_run, "entries": rows, "bytes_freed": freed})
        return
    print_rows(rows, nothing="no such entries; see: mlfusion cache ls")
    typer.echo(f"{'would remove' if dry_run else 'removed'} {len(gone):,} of {len(every):,} entries, {freed:,} bytes")


def _needed(results: Path) -> set[str]:
    from mlfusion.results import Results

    return {key for row in Results(results).require() for key in row.features}


@app.command()
def export(
    to: Annotated[Path, typer.Argument(help="Root of another cache; made if need be.")],
    model: SomeModel = None,
    dataset: SomeDataset = None,
    split: SomeSplit = None,
    format: NewFormat = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Copy entries to another cache, in another format if asked; every chunk is checked on the way."""
    _copy(cache, str(to), model, dataset, split, format, as_json)


@app.command("import")
def bring(
    source: Annotated[Path, typer.Argument(help="Root of the cache to copy from.")],
    model: SomeModel = None,
    dataset: SomeDataset = None,
    split: SomeSplit = None,
    format: NewFormat = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Copy entries of another cache into this one; every chunk is checked on the way."""
    if not source.is_dir():
        raise CacheUnusable(f"there is no cache at {source}")
    _copy(str(source), cache, model, dataset, split, format, as_json)


def _copy(
    source: str | None,
    target: str | None,
    model: str | None,
    dataset: str | None,
    split: str | None,
    format: str | None,
    as_json: bool,
) -> None:
    from mlfusion.progress import track
    from mlfusion.store import FeatureStore
    from mlfusion.store.transfer import copy

    if format not in (None, "zarr", "hdf5"):
        raise UnknownName("format", format or "", ["zarr", "hdf5"])
    here, there = FeatureStore(source), FeatureStore([target] if target else None)
    entries = [entry for entry in here.find(model=model, dataset=dataset, split=split) if entry.held() and entry.names]
    if not entries:
        raise NotCached(f"nothing of that in {here.root}; see: mlfusion cache ls --cache {here.root}")
    copied = []
    with track("copying", sum(entry.nbytes for entry in entries), "bytes") as bar:
        for entry in entries:
            into = there.create(entry.spec, entry.samples, entry.names[0])
            for names in entry.names[1:]:
                into.call(names)
            written = copy(entry, into, format=format, done=bar.advance)  # type: ignore[arg-type]
            copied.append({"key": entry.key, "path": str(into.path), "bytes": written})
    if as_json:
        print_json({"entries": copied})
        return
    for one in copied:
        typer.echo(f"{one['path']}: {one['bytes']:,} bytes written")


@app.command()
def path(
    model: SomeModel = None,
    dataset: SomeDataset = None,
    split: SomeSplit = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Where the cache lies; with names, the folders of its entries."""
    from mlfusion.store import FeatureStore

    store = FeatureStore(cache)
    found = (
        [entry.path for entry in store.find(model=model, dataset=dataset, split=split)]
        if model or dataset or split
        else [store.root]
    )
    paths = [str(one.absolute()) for one in found]
    if as_json:
        print_json({"paths": paths})
        return
    for one in paths:
        typer.echo(one)
    if not paths:
        say("nothing of that is cached; see: mlfusion cache ls")
