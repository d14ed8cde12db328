"""`mlfusion data`: shows a data set's splits, classes and ids; with --check, whether every image can be read."""

from typing import Annotated

import typer

from mlfusion.cli.options import AsJson, with_options
from mlfusion.cli.output import print_json, print_rows
from mlfusion.specs.options import ReadOptions


@with_options
def data(
    *,
    dataset: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or file.")],
    read: ReadOptions,
    check: Annotated[
        bool, typer.Option("--check", help="Read every image and name those that cannot be read.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print a data set's splits, images, classes and labels; with --check, which images cannot be read."""
    from mlfusion.datasets import load
    from mlfusion.datasets.describe import describe
    from mlfusion.system.progress import track

    found = load(dataset, read)
    total = sum(map(len, found.splits.values()))
    with track(f"reading {found.name}", total if check else 1, "images") as bar:
        splits = describe(found, check=check, progress=lambda *_: bar.advance())
    if as_json:
        print_json(
            {
                "dataset": found.name,
                "source": found.source,
                "form": found.form,
                "target": found.label_kind,
                "classes": list(found.classes),
                "carve": found.resplit,
                "splits": [one.to_json() for one in splits],
            }
        )
        return
    typer.echo(
        f"{found.name}: {', '.join(dict.fromkeys([found.form, found.source]))}"
        + (f", split anew {found.resplit}" if found.resplit else "")
    )
    named = ", ".join(found.classes[:8]) + (", …" if len(found.classes) > 8 else "")
    what = {"class": "one class an image", "labels": "several labels an image", "number": "a number an image"}
    typer.echo(what[found.label_kind] + (f"; {len(found.classes):,}: {named}" if found.classes else ""))
    rows = []
    for one in splits:
        about = ", ".join(f"{name} {value:,}" for name, value in one.labels.items())
        row = {
            "split": one.split,
            "images": one.images,
            "of a class" if found.label_kind == "class" else "labels": about,
        }
        if one.checked:
            sizes = [one.checked.smallest, one.checked.largest]
            row["unreadable"] = len(one.checked.unreadable)
            row["repeated"] = one.checked.repeated
            row["pixels"] = " … ".join(f"{size[0]}x{size[1]}" for size in sizes if size)
        rows.append({**row, "first ids": ", ".join(one.first_ids)})
    print_rows(rows, nothing="")
    for one in splits:
        for name, why in (one.checked.unreadable if one.checked else {}).items():
            typer.echo(f"{name}: {why}")
        for other, count in (one.checked.elsewhere if one.checked else {}).items():
            typer.echo(f"byte for byte in {other} too: {count:,} image{'s' * (count > 1)} of {one.split}")
