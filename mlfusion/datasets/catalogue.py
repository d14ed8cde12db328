"""The catalogue of data sets: rows of `catalogue.csv`, the study's twenty and the embedded one.

Sizes and classes of training splits are the study's (arXiv 2601.09322). Test sizes are those of DataComp's task list for the
same exports (mlfoundations/datacomp, tasklist.yml), and the hub's for dmlab. Terms are those on the authors' pages, empty if
these state none; look there before you use a data set.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import msgspec


@dataclass(frozen=True, kw_only=True)
class CatalogueRow:
    """One line of the catalogue."""

    name: str
    source: str  # hub id, or "embedded"
    domain: str
    train_images: int
    test_images: int | None = None  # not known for all
    classes: int
    terms: str = ""


with open(Path(__file__).with_name("catalogue.csv"), encoding="utf-8", newline="") as _file:
    _cells = [{name: cell for name, cell in line.items() if cell} for line in csv.DictReader(_file)]
CATALOGUE = {row.name: row for row in msgspec.convert(_cells, list[CatalogueRow], strict=False)}
