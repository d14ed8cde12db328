"""The catalogue of data sets: rows of `catalogue.csv`, the study's twenty and the embedded one.

Sizes and classes of training splits are the study's (arXiv 2601.09322). Test sizes are those of DataComp's task list for the
same exports (mlfoundations/datacomp, tasklist.yml), and the hub's for dmlab. Terms are as the makers' pages state them,
empty if they state none; look there before you use a set.
"""

import csv
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files


@dataclass(frozen=True, kw_only=True)
class CatalogueRow:
    """One line of the catalogue."""

    name: str
    source: str  # hub id, or "embedded"
    domain: str
    train_images: int
    test_images: int | None  # not known for all
    classes: int
    terms: str


@lru_cache(maxsize=1)
def catalogue() -> dict[str, CatalogueRow]:
    """Name → row, in the order of the file."""
    text = (files("mlfusion.datasets") / "catalogue.csv").read_text(encoding="utf-8")
    return {
        cells["name"]: CatalogueRow(
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
