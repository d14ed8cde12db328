"""Where does each form of data set name the label and the split of an image, and which place goes first?

    python benchmarks/places.py [--page]

Writes the table from the constants by which data sets are read. With --page the table goes into docs/datasets.md.
"""

import argparse

import page

from mlfusion.datasets.arrays import ROLES
from mlfusion.datasets.columns import LABELS
from mlfusion.datasets.files import TABLE_NAMES, TABLES
from mlfusion.datasets.places import PLACES, SPLIT_PLACES
from mlfusion.datasets.tars import CLASS_NAMES, LABEL_FILES
from mlfusion.specs.splits import SPLIT_WORDS, SPLITS

NAMES = ", ".join(f"`{name}`" for name in LABELS)
LABEL_PLACES = {
    "class folders": "the folder in the split's folder",
    "CSV, TSV or JSON Lines": f"`--label-column`; a column {NAMES}; the only column left",
    "tars": f"`--label-column`; the sample's file .{', .'.join(LABEL_FILES)}; `{CLASS_NAMES}` names the numbers",
    "Parquet": f"`--label-column`; a column of the hub's type ClassLabel; a column {NAMES}; the only one left",
    "arrays": f"`--label-column`; the array {', '.join(f'`{word}`' for word, role in ROLES.items() if role == 'labels')}",
}


def text() -> str:
    """The table in Markdown, and the words that name a split."""
    rows = [
        (form, label, "; ".join(f"{number}. {PLACES[place]}" for number, place in enumerate(SPLIT_PLACES[form], 1)))
        for form, label in LABEL_PLACES.items()
    ]
    words = "; ".join(
        f"{split}: {', '.join(f'`{word}`' for word, meant in SPLIT_WORDS.items() if meant == split)}"
        for split in SPLITS
    )
    names = ", ".join(f"`{name}`" for name in TABLE_NAMES if name.endswith(TABLES[0]))
    return (
        page.table(("form", "place of the label", "place of the split, the first that names one"), rows, left=3)
        + f"\n\nWords that name a split, in any case: {words}. A table in the folder of its images is called {names} (or "
        + f"{', '.join(TABLES[1:])})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true")
    if parser.parse_args().page:
        page.put("datasets.md", "places", text())
    else:
        print(text())


if __name__ == "__main__":
    main()
