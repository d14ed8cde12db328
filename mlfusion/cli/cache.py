"""`mlfusion cache`: lists, measures, verifies, prunes and copies the feature cache."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlfusion.cli.options import DATASET, MODEL, AsJson, Cache, Dataset, Model, with_options
from mlfusion.cli.output import notify, print_json, print_rows, say
from mlfusion.errors import CacheUnusable
from mlfusion.specs.definitions import command
from mlfusion.specs.options import ComputeOptions, FeatureOptions
from mlfusion.specs.selection import CopyOptions, EmbeddingOptions, EntryFilter, PruneOptions
from mlfusion.system.words import plural

if TYPE_CHECKING:
    from mlfusion.store import Entry

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Manage the feature cache.")


@app.command()
@with_options
def ls(
    *,
    entries: EntryFilter,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """List cached entries: model, data set, split, tokens, size."""
    from mlfusion.store.housekeeping import cache_root, list_entries

    listing = list_entries(cache, entries, reasons=as_json)
    body = asdict(listing)
    if as_json:
        print_json(body)
        return
    rows = [{name: value for name, value in row.items() if name != "unreadable"} for row in body["entries"]]
    if rows or not listing.damaged:
        print_rows(rows, empty=f"no features in {cache_root(cache)}; run: mlfusion extract")
    for reason in listing.damaged:
        notify(f"not listed: {reason}")


@app.command()
def du(cache: Cache = None, as_json: AsJson = False) -> None:
    """Show the size on disk of each model and data set, and of the other folders in the cache."""
    from mlfusion.store.housekeeping import cache_root, disk_usage

    usage = disk_usage(cache)
    body = usage.to_json()
    if as_json:
        print_json(body)
        return
    print_rows(body["entries"], empty=f"no features in {cache_root(cache)}; run: mlfusion extract")
    for reason in usage.damaged:
        notify(f"not counted: {reason}")
    for name, nbytes in usage.beside.items():
        if nbytes:
            say(f"{usage.root / name}: {nbytes:,} bytes; may be deleted")
    say(f"in all: {body['bytes']:,} bytes in {usage.root}")


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
    """Print the entry that extract would use; if there is none, the fields that differ from the nearest one."""
    from mlfusion.extraction.explain import explain as run

    explanations = run(model, dataset, features, compute, cache=cache)
    if as_json:
        print_json({"splits": [explained.to_json() for explained in explanations]})
        return
    for explained in explanations:
        body = explained.to_json()
        lacking = f"; lacks {body['lacking']}" if body["lacking"] and explained.entry else ""
        say(f"{explained.split}: {body['state']}, {body['path'] or explained.key}{lacking}")
        if explained.nearest:
            spec = explained.nearest.spec
            say(f"  nearest: {spec.model.name} on {spec.data.name}/{spec.data.split}, {explained.nearest.key}")
        for name, requested, cached in explained.differences:
            say(f"  {name} differs: " + (f"{requested} here, {cached} there" if cached else f"there, {requested}"))


@app.command()
def verify(
    fix: Annotated[bool, typer.Option("--repair", help="Move damaged files to quarantine/.")] = False,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Run this many images of each entry again, and compare them with the stored tokens."),
    ] = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Compare every file with its checksum; exit 1 if damaged files remain, or if a sample differs."""
    from mlfusion.store.verify import verify as run

    report, again = run(cache, repair=fix), None
    if sample is not None:
        from mlfusion.workflows.sampling import compare_sample

        again = compare_sample(cache, sample)
    if as_json:
        print_json(report.to_json() | ({"sample": again.to_json()} if again else {}))
    else:
        for damage in (*report.damaged, *report.unread):
            say(f"{damage.path}: {damage.why}")
        for path in report.quarantined:
            say(f"moved to {path}")
        say(
            f"{plural(report.entries, 'entry', 'entries')}, {len(report.damaged):,} damaged"
            + (f", {plural(len(report.unread), 'file')} that may not be read" if report.unread else "")
            + ("; run the same `mlfusion extract` again to make what is missing" if report.quarantined else "")
        )
    if again:
        for reason in (*again.skipped, *again.different):
            notify(reason)
    if again and not as_json:
        verdict = f"{len(again.different):,} of the entries differ" if again.different else "they agree"
        say(f"{plural(again.images, 'image')} of {plural(again.entries, 'entry', 'entries')} run again: {verdict}")
    if again and again.different:
        raise CacheUnusable("the cache holds numbers that its models do not give")
    if report.unread:
        raise CacheUnusable(
            "parts of the cache may not be read, and were left as they are; ask their owners to share them"
        )
    if report.damaged and not report.quarantined:
        raise CacheUnusable("parts of the cache are damaged; run: " + command("cache verify --repair", cache=cache))


@app.command()
@with_options
def prune(options: PruneOptions, cache: Cache = None, as_json: AsJson = False) -> None:
    """Remove entries by name, age, size, or because no row needs them; an entry in use is never removed."""
    from mlfusion.results import Results
    from mlfusion.store.housekeeping import prune as run

    needed = None
    if options.unneeded:
        needed = {key for row in Results(Path(options.unneeded)).require() for key in row.features}
    result = run(options, cache, needed=needed)
    body = result.to_json()
    if as_json:
        print_json(body)
        return
    print_rows(body["entries"], empty="no such entries; see: mlfusion cache ls")
    for reason in result.damaged:
        notify(f"stays: {reason}")
    removed = sum(decision.removed for decision in result.decisions)
    verb = "would remove" if options.dry_run else "removed"
    say(f"{verb} {removed:,} of {plural(result.entries, 'entry', 'entries')}, {result.bytes_freed:,} bytes")


@app.command()
@with_options
def export(
    *,
    to: Annotated[Path, typer.Argument(help="Root of the cache to copy to; created if it does not exist.")],
    options: CopyOptions,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Copy entries to another cache, optionally in another format; every chunk is checked while copying."""
    from mlfusion.store.housekeeping import copy_entries

    _print_copied(copy_entries(cache, [to], options), as_json)


@app.command()
@with_options
def embeddings(
    *,
    out: Annotated[Path, typer.Argument(help="File to write; its suffix sets the format: .npy or .parquet.")],
    model: Model = MODEL,
    dataset: Dataset = DATASET,
    options: EmbeddingOptions,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Write cached tokens to a file for search or clustering: all numbers of an image in a row, in float32."""
    from mlfusion.store.features import Selection, only_split, open_features

    split = options.split or only_split(model, dataset, cache=cache)
    selection = Selection(layers=options.layers, tokens=options.tokens, view=options.view)
    features = open_features(model, dataset, split, selection, cache=cache)
    with features.tokens as tokens:
        features.write(out)
    numbers = math.prod(tokens.shape[1:])
    if as_json:
        print_json({"path": str(out), "split": split, "images": len(features), "numbers": numbers})
    else:
        say(f"{out.absolute()}: {plural(len(features), 'image')} of {split}, {numbers:,} numbers each")


@app.command("import")
@with_options
def import_(
    *,
    source: Annotated[Path, typer.Argument(help="Root of the cache to copy from.")],
    options: CopyOptions,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Copy entries of another cache into this one; every chunk is checked while copying.

    Whoever could write that cache decides its numbers; `mlfusion cache verify --sample` runs some images again.
    """
    from mlfusion.store.housekeeping import copy_entries

    _print_copied(copy_entries([source], cache, options), as_json)
    notify(
        f"whoever could write {source} decides the numbers that were copied; to compare some with the model's: "
        + command("cache verify", ["--sample", "16"], cache=cache)
    )


def _print_copied(copied: "list[tuple[Entry, int]]", as_json: bool) -> None:
    if as_json:
        entries = [{"key": entry.key, "path": str(entry.path), "bytes": nbytes} for entry, nbytes in copied]
        print_json({"entries": entries})
        return
    for entry, nbytes in copied:
        say(f"{entry.path}: {nbytes:,} bytes written")


@app.command()
@with_options
def path(
    *,
    entries: EntryFilter,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Print the root of the cache; with filters, the folders of matching entries."""
    from mlfusion.store.housekeeping import entry_paths

    paths = [str(one) for one in entry_paths(cache, entries)]
    if as_json:
        print_json({"paths": paths})
        return
    for one in paths:
        say(one)
    if not paths:
        notify("nothing of that is cached; see: " + command("cache ls", cache=cache))
        raise typer.Exit(1)
