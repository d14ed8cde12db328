"""`mlfusion data`: shows a data set's splits, classes and ids; with --check, whether every image can be read."""

from typing import TYPE_CHECKING, Annotated

import typer

from mlfusion.cli.options import AsJson, with_options
from mlfusion.cli.output import print_json, print_rows, say
from mlfusion.specs.options import ReadOptions

if TYPE_CHECKING:
    from mlfusion.datasets import DataSet
    from mlfusion.datasets.describe import SplitSummary

NARROW = 0.1  # images whose values use less than this share of the possible range are reported


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

    data_set = load(dataset, read)
    total = sum(map(len, data_set.splits.values()))
    with track(f"reading {data_set.name}", total if check else 1, "images") as bar:
        splits = describe(data_set, check=check, progress=lambda *_: bar.advance())
    if as_json:
        print_json(
            {
                "dataset": data_set.name,
                "source": data_set.source,
                "form": data_set.form,
                "target": data_set.label_kind if data_set.labelled else None,
                "classes": list(data_set.classes),
                "carve": data_set.resplit,
                "grouped_by": data_set.grouped_by,
                "splits": [one.to_json() for one in splits],
            }
        )
        return
    say(
        f"{data_set.name}: {', '.join(dict.fromkeys([data_set.form, data_set.source]))}"
        + (f", split anew {data_set.resplit}" if data_set.resplit else "")
    )
    say(_label_text(data_set))
    rows = []
    for one in splits:
        counts = ", ".join(f"{name} {value:,}" for name, value in one.labels.items())
        row = {
            "split": one.split,
            "images": one.images,
            **({} if one.groups is None else {"groups": one.groups}),
            "of a class" if data_set.label_kind == "class" else "labels": counts,
        }
        if one.checked:
            sizes = [one.checked.smallest, one.checked.largest]
            row["unreadable"] = len(one.checked.unreadable)
            row["repeated"] = one.checked.repeated
            row["pixels"] = " … ".join(f"{size[0]}x{size[1]}" for size in sizes if size)
            if one.checked.values:
                row["values"] = f"{one.checked.bits} bits, {one.checked.values[0]:,} … {one.checked.values[1]:,}"
        rows.append({**row, "first ids": ", ".join(one.first_ids)})
    print_rows(rows)
    for one in splits:
        _print_findings(one, windowed=data_set.decoding.window is not None)


def _label_text(data_set: "DataSet") -> str:
    """The kind of the labels, and the first classes."""
    if not data_set.labelled:
        return "no labels"
    texts = {"class": "one class an image", "labels": "several labels an image", "number": "a number an image"}
    classes = ", ".join(data_set.classes[:8]) + (", …" if len(data_set.classes) > 8 else "")
    return texts[data_set.label_kind] + (f"; {len(data_set.classes):,}: {classes}" if data_set.classes else "")


def _print_findings(one: "SplitSummary", *, windowed: bool) -> None:
    """Print what a check found in a split: unreadable images, a narrow range of values, images of other splits."""
    if (checked := one.checked) is None:
        return
    for name, reason in checked.unreadable.items():
        say(f"{name}: {reason}")
    if checked.used_share < NARROW and not windowed:
        advice = ": --window auto stretches it" if checked.bits == 16 else ""
        say(
            f"{one.split}: values use {100 * checked.used_share:.1f} % of the range of {checked.bits} bits, and images are "
            f"nearly of one colour{advice}"
        )
    for other, count in checked.elsewhere.items():
        say(f"byte for byte in {other} too: {count:,} image{'s' * (count > 1)} of {one.split}")
