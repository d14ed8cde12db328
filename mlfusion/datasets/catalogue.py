"""The catalogue of data sets: rows of `catalogue.csv`, the study's twenty and the embedded one.

Sizes and classes of training splits are the study's (arXiv 2601.09322). Test sizes are those of DataComp's task list for the
same exports (mlfoundations/datacomp, tasklist.yml), and the hub's for dmlab. Terms are those on the authors' pages, empty if
these state none; look there before you use a data set.
"""

from dataclasses import dataclass

import msgspec

from mlfusion.system.references import catalogue_cells


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


CATALOGUE = {row.name: row for row in msgspec.convert(catalogue_cells("data set"), list[CatalogueRow], strict=False)}
