"""`mlfusion data`: what one data set is: its splits, classes, ids; with --check, whether every image can be read."""

from typing import Annotated, Any

import typer

from mlfusion.cli.words import AsJson, print_json, print_rows, taking

READING: dict[str, tuple[Any, Any]] = {  # of datasets.Reading → the option's annotation and default
    "image_column": (
        Annotated[str | None, typer.Option("--image-column", help="Of a table or hub data set; else guessed.")],
        None,
    ),
    "label_column": (Annotated[str | None, typer.Option("--label-column", help="Likewise.")], None),
    "id_column": (
        Annotated[str | None, typer.Option("--id-column", help="Of sample ids; else paths or row numbers.")],
        None,
    ),
    "image_root": (
        Annotated[str | None, typer.Option("--image-root", help="Folder that a table's paths begin at; else its own.")],
        None,
    ),
    "target": (
        Annotated[str | None, typer.Option("--target", help="What labels are: class, labels, number; else guessed.")],
        None,
    ),
    "carve": (
        Annotated[
            str | None, typer.Option("--carve", help="Cut train anew: shares of train/test or train/validation/test.")
        ],
        None,
    ),
    "carve_seed": (Annotated[int, typer.Option("--carve-seed", help="Decides which image goes where.")], 0),
    "upright": (Annotated[bool, typer.Option("--upright", help="Turn images as their EXIF says.")], False),
    "max_pixels": (
        Annotated[int | None, typer.Option("--max-pixels", help="Refuse larger images; default 178,956,970.")],
        None,
    ),
    "stream": (
        Annotated[bool, typer.Option("--stream", help="Read a hub data set from where it lies; keep no copy.")],
        False,
    ),
    "config": (Annotated[str | None, typer.Option("--config", help="Of a hub data set that has several.")], None),
}


def _reading(asked: dict[str, Any]) -> Any:
    from mlfusion.datasets import Reading

    return Reading(**{name: value for name, value in asked.items() if name != "max_pixels" or value is not None})


reads_data = taking("reading", READING, _reading)
"""Gives a command the options of `datasets.Reading`, and hands them to it as its argument `reading`."""


@reads_data
def data(
    dataset: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or file.")],
    reading: Any = None,
    check: Annotated[bool, typer.Option("--check", help="Read every image; name those that cannot be.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a data set is: splits, images, classes, labels; with --check, which images cannot be read."""
    from mlfusion.datasets import load
    from mlfusion.datasets.describe import describe
    from mlfusion.progress import track

    found = load(dataset, reading)
    total = sum(map(len, found.splits.values()))
    with track(f"reading {found.name}", total if check else 1, "images") as bar:
        splits = describe(found, check=check, progress=lambda *_: bar.advance())
    if as_json:
        print_json(
            {
                "dataset": found.name,
                "source": found.source,
                "form": found.form,
                "target": found.target,
                "classes": list(found.classes),
                "carve": found.carve,
                "splits": [one.to_json() for one in splits],
            }
        )
        return
    typer.echo(
        f"{found.name}: {', '.join(dict.fromkeys([found.form, found.source]))}"
        + (f", carved {found.carve}" if found.carve else "")
    )
    named = ", ".join(found.classes[:8]) + (", …" if len(found.classes) > 8 else "")
    what = {"class": "one class an image", "labels": "several labels an image", "number": "a number an image"}
    typer.echo(what[found.target] + (f"; {len(found.classes):,}: {named}" if found.classes else ""))
    rows = []
    for one in splits:
        about = ", ".join(f"{name} {value:,}" for name, value in one.labels.items())
        row = {"split": one.split, "images": one.images, "of a class" if found.target == "class" else "labels": about}
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
