"""The catalogue of models: `catalogue.csv`, a row each.

A revision is the commit that a name stands for, so that it stands for the same numbers in years to come; they were read off
public records of snapshots of these repositories. A repository of which no record was found has no row: it is used by its
hub id, which means its newest state, and the commit that this was goes into the key.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

EMBEDDED = "formula-vit"
NUMBERS = ("image_px", "depth", "width", "patch_px")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the catalogue."""

    name: str
    source: str  # hub id, or "embedded:<folder>" for what ships with the package
    revision: str | None  # commit on the hub; none for what ships with the package
    family: str
    image_px: int  # a side of a prepared picture
    depth: int  # blocks, L; of all stages together
    width: int  # channels per token in the last block, D
    patch_px: int
    licence: str  # as its authors say; look there before you rely on it
    gated: bool  # access has to be asked for
    study: bool  # one of the study's eleven (arXiv 2601.09322)
    about: str

    @property
    def embedded(self) -> Path | None:
        """The folder of a model that ships with the package."""
        if not self.source.startswith("embedded:"):
            return None
        return Path(__file__).parent.parent / "embedded" / self.source.removeprefix("embedded:")


def _read(path: Path) -> dict[str, Row]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = {}
        for line in csv.DictReader(file):
            values = {name: int(value) if name in NUMBERS else value for name, value in line.items()}
            marks = {"revision": line["revision"] or None} | {name: line[name] == "yes" for name in ("gated", "study")}
            rows[line["name"]] = Row(**{**values, **marks})
    return rows


CATALOGUE: dict[str, Row] = _read(Path(__file__).with_name("catalogue.csv"))
