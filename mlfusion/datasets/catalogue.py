"""The data sets that have names: rows of `catalogue.csv`, the study's twenty and the embedded one.

Sizes and classes of training splits are the study's (arXiv 2601.09322); test sizes those that DataComp's task list gives for
the same exports (mlfoundations/datacomp, tasklist.yml), dmlab's the hub's. Terms are as the makers' pages state them, empty
where they state none; look there before you use a set.
"""

import csv
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the catalogue."""

    name: str
    source: str  # hub id, or "embedded"
    domain: str
    train_images: int
    test_images: int | None  # not known for all
    classes: int
    terms: str


@lru_cache(maxsize=1)
def catalogue() -> dict[str, Row]:
    """Every row by its name, in their order."""
    text = (files("mlfusion.datasets") / "catalogue.csv").read_text(encoding="utf-8")
    return {
        cells["name"]: Row(
            name=cells["name"],
            source=cells["source"],
            domain=cells["domain"],
            train_images=int(cells["train_images"]),
            test_images=int(cells["test_images"]) if cells["test_images"] else None,
            classes=int(cells["classes"]),
            terms=cells["terms"],
        )
        for cells in csv.DictReader(text.splitlines())
    }


CATALOGUE = catalogue()
