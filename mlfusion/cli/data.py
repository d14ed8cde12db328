"""`mlfusion data`: shows a data set's splits, classes and ids; with --check, whether every image can be read."""

from typing import Annotated, Any

import typer

from mlfusion.cli.options import AsJson, taking
from mlfusion.cli.output import print_json, print_rows

READING: dict[str, tuple[Any, Any]] = {  # field of datasets.ReadOptions → the option's annotation and default
    "image_column": (
        Annotated[
            str | None,
            typer.Option(
                "--image-column", help="Column of a table or hub data set that holds the images; guessed if not given."
            ),
        ],
        None,
    ),
    "label_column": (
        Annotated[
            str | None, typer.Option("--label-column", help="Column that holds the labels; guessed if not given.")
        ],
        None,
    ),
    "id_column": (
        Annotated[
            str | None, typer.Option("--id-column", help="Column that holds sample ids; default: paths or row numbers.")
        ],
        None,
    ),
    "image_root": (
        Annotated[
            str | None,
            typer.Option("--image-root", help="Folder that the paths in a table start from; default: its own."),
        ],
        None,
    ),
    "target": (
        Annotated[
            str | None,
            typer.Option("--target", help="Kind of the labels: class, labels or number; guessed if not given."),
        ],
        None,
    ),
    "split_ratio": (
        Annotated[
            str | None,
            typer.Option(
                "--carve", help="Split train anew, by shares of train/test or train/validation/test, such as 0.8/0.2."
            ),
        ],
        None,
    ),
    "split_seed": (Annotated[int, typer.Option("--carve-seed", help="Seed of the split that --carve makes.")], 0),
    "exif_transpose": (
        Annotated[bool, typer.Option("--upright", help="Rotate images as their EXIF orientation says.")],
        False,
    ),
    "max_pixels": (
        Annotated[
            int | None, typer.Option("--max-pixels", help="Largest number of pixels of an image; default: 178,956,970.")
        ],
        None,
    ),
    "stream": (
        Annotated[
            bool, typer.Option("--stream", help="Read a hub data set from where it is stored, without a local copy.")
        ],
        False,
    ),
    "config": (
        Annotated[str | None, typer.Option("--config", help="Configuration of a hub data set that has several.")],
        None,
    ),
}


def _reading(asked: dict[str, Any]) -> Any:
    from mlfusion.datasets import ReadOptions

    return ReadOptions(**{name: value for name, value in asked.items() if name != "max_pixels" or value is not None})


reads_data = taking("reading", READING, _reading)
"""Gives a command the options of `datasets.ReadOptions`, and hands them to it as its argument `reading`."""


@reads_data
def data(
    dataset: Annotated[str, typer.Argument(help="Catalogue name, hub id, folder or file.")],
    reading: Any = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read every image, and name those that cannot be read.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a data set: splits, images, classes, labels; with --check, the images that cannot be read."""
    from mlfusion.datasets import load
    from mlfusion.datasets.describe import describe
    from mlfusion.system.progress import track

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
