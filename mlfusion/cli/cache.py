"""`mlfusion cache`: lists, measures, verifies, prunes and copies the feature cache."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlfusion.cli.options import DATASET, MODEL, AsJson, Cache, Dataset, Model, with_options
from mlfusion.cli.output import print_json, print_rows, say
from mlfusion.errors import CacheUnusable
from mlfusion.specs.options import ComputeOptions, FeatureOptions, PruneOptions

if TYPE_CHECKING:
    from mlfusion.store import Entry

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after the feature cache.")

SomeModel = Annotated[str | None, typer.Option("--model", "-m", help="Only entries of this model.")]
SomeDataset = Annotated[str | None, typer.Option("--dataset", "-d", help="Only entries of this data set.")]
SomeSplit = Annotated[str | None, typer.Option("--split", help="Only entries of this split.")]
NewFormat = Annotated[
    str | None, typer.Option("--format", help="Format of the copy: zarr or hdf5; default: unchanged.")
]


@app.command()
def ls(
    model: SomeModel = None,
    dataset: SomeDataset = None,
    split: SomeSplit = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """List cached entries: model, data set, split, tokens, size."""
    from mlfusion.store.housekeeping import list_entries

    found = list_entries(cache, model=model, dataset=dataset, split=split, reasons=as_json)
    listed = asdict(found)
    if as_json:
        print_json(listed)
        return
    rows = [{name: value for name, value in row.items() if name != "unreadable"} for row in listed["entries"]]
    if rows or not found.damaged:
        print_rows(rows, nothing="no features yet; run: mlfusion extract")
    for why in found.damaged:
        say(f"not listed: {why}")


@app.command()
def du(cache: Cache = None, as_json: AsJson = False) -> None:
    """Show the bytes on disk by model and data set, measured file by file, and of other folders in the cache."""
    from mlfusion.store.housekeeping import disk_usage

    usage = disk_usage(cache)
    body = usage.to_json()
    if as_json:
        print_json(body)
        return
    print_rows(body["entries"], nothing="no features yet; run: mlfusion extract")
    for name, nbytes in usage.beside.items():
        if nbytes:
            typer.echo(f"{usage.root / name}: {nbytes:,} bytes; may be deleted")
    typer.echo(f"in all: {body['bytes']:,} bytes in {usage.root}")


@app.command()
@with_options
def explain(
    *,
    model: Model = MODEL,
    dataset: Dataset = DATASET,
    features: FeatureOptions,
    compute: ComputeOptions,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Print which entry extract would use; if there is none, which fields differ from the nearest one."""
    from mlfusion.extraction.explain import explain as run

    found = run(model, dataset, features, compute, cache=cache)
    if as_json:
        print_json({"splits": [one.to_json() for one in found]})
        return
    for one in found:
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
    """Read every byte and compare it with its checksum; exit 1 if something is, and stays, damaged."""
    from mlfusion.store.verify import verify as run

    found = run(cache, repair=fix)
    if as_json:
        print_json(found.to_json())
    else:
        for one in found.damaged:
            typer.echo(f"{one.path}: {one.why}")
        for path in found.quarantined:
            typer.echo(f"moved to {path}")
        typer.echo(
            f"{found.entries:,} entries, {len(found.damaged):,} damaged"
            + ("; run the same `mlfusion extract` again to make what is missing" if found.quarantined else "")
        )
    if found.damaged and not found.quarantined:
        raise CacheUnusable("parts of the cache are damaged; run: mlfusion cache verify --repair")


@app.command()
@with_options
def prune(options: PruneOptions, cache: Cache = None, as_json: AsJson = False) -> None:
    """Remove entries by name, age, size, or because no row needs them; an entry in use is never removed."""
    from mlfusion.results import Results
    from mlfusion.store.housekeeping import prune as run

    needed = None
    if options.unneeded:
        needed = {key for row in Results(Path(options.unneeded)).require() for key in row.features}
    done = run(options, cache, needed=needed)
    body = done.to_json()
    if as_json:
        print_json(body)
        return
    print_rows(body["entries"], nothing="no such entries; see: mlfusion cache ls")
    removed = sum(each.removed for each in done.decisions)
    verb = "would remove" if options.dry_run else "removed"
    typer.echo(f"{verb} {removed:,} of {done.entries:,} entries, {done.bytes_freed:,} bytes")


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
    from mlfusion.store.housekeeping import copy_entries

    names = {"model": model, "dataset": dataset, "split": split}
    _print_copied(copy_entries(cache, [to], **names, format=format), as_json)  # type: ignore[arg-type]


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
    from mlfusion.store.housekeeping import copy_entries

    names = {"model": model, "dataset": dataset, "split": split}
    _print_copied(copy_entries([source], cache, **names, format=format), as_json)  # type: ignore[arg-type]


def _print_copied(copied: "list[tuple[Entry, int]]", as_json: bool) -> None:
    if as_json:
        entries = [{"key": entry.key, "path": str(entry.path), "bytes": nbytes} for entry, nbytes in copied]
        print_json({"entries": entries})
        return
    for entry, nbytes in copied:
        typer.echo(f"{entry.path}: {nbytes:,} bytes written")


@app.command()
def path(
    model: SomeModel = None,
    dataset: SomeDataset = None,
    split: SomeSplit = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Show where the cache lies; with names, the folders of its entries."""
    from mlfusion.store.housekeeping import entry_paths

    paths = [str(one) for one in entry_paths(cache, model=model, dataset=dataset, split=split)]
    if as_json:
        print_json({"paths": paths})
        return
    for one in paths:
        typer.echo(one)
    if not paths:
        say("nothing of that is cached; see: mlfusion cache ls")
