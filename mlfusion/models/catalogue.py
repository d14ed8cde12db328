"""The catalogue of models: one row of `catalogue.csv` for each name.

A name stands for one commit, its revision, and so gives the same numbers in future years; the revisions come from public
records of snapshots of these repositories. A repository without such a record has no row: it is used by its hub id, which
means its newest state, and the commit of that state is part of the key.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from mlfusion.system.references import catalogue_cells

EMBEDDED = "formula-vit"


@dataclass(frozen=True, kw_only=True)
class CatalogueRow:
    """One line of the catalogue."""

    name: str
    source: str  # hub id, or "embedded:<folder>" for a model that ships with the package
    revision: str | None = None  # commit on the hub; None for a model that ships with the package
    family: str
    image_px: int  # height and width of the input
    depth: int  # L, the number of blocks of all stages together
    width: int  # D, the channels of a token in the last block
    patch_px: int
    licence: str  # as its authors state it; look there before you rely on it
    gated: bool  # access must be requested on the hub
    study: bool  # one of the study's eleven (arXiv 2601.09322)
    about: str

    @property
    def embedded(self) -> Path | None:
        """The folder of a model that ships with the package."""
        if not self.source.startswith("embedded:"):
            return None
        return Path(__file__).parent.parent / "embedded" / self.source.removeprefix("embedded:")


CATALOGUE = {row.name: row for row in msgspec.convert(catalogue_cells("model"), list[CatalogueRow], strict=False)}
