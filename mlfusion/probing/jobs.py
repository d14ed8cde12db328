"""One job is one row to make: its options, its identity, and the jobs of a call."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mlfusion.probing.search import SOLVERS
from mlfusion.probing.training.precision import resolve
from mlfusion.results.rows import RowPrecision
from mlfusion.specs.identity import digest
from mlfusion.specs.names import Probe
from mlfusion.specs.options import Precision

PROTOCOL = 3
"""Part of every row's id: raised when a change of code changes scores, so that old rows are made again."""


OPTIONS: dict[str, Any] = {"shots": None, "halving": False, "smoothing": 0.0}
"""What changes a result beyond probe, grid, seed and precision; at these values it is as if the option did not exist."""


@dataclass(frozen=True)
class Job:
    """One row to make."""

    probe: Probe
    seed: int
    grid: str
    precision: Precision = "auto"  # of the matrix products of training
    shots: int | None = None
    halving: bool = False
    smoothing: float = 0.0

    def options(self) -> dict[str, Any]:
        """Options that are not at their default; a part of the row and of its id."""
        return {name: getattr(self, name) for name, usual in OPTIONS.items() if getattr(self, name) != usual}

    def resolved(self, device: str) -> "Job":
        """The same job with the precision that 'auto' means on this machine; float32 for a head that is solved for."""
        solved = self.probe.head in SOLVERS
        return replace(self, precision="float32" if solved else resolve(self.precision, device))

    def answers(self, device: str) -> list["Job"]:
        """The resolved jobs whose row answers this one: with 'auto' those of either precision, this machine's own first."""
        own = self.resolved(device)
        if self.precision != "auto" or self.probe.head in SOLVERS:
            return [own]
        return [own, replace(own, precision="float32" if own.precision == "bfloat16" else "bfloat16")]

    def row_id(self, features: tuple[str, str]) -> str:
        """Id of the row that a resolved job makes: the same features (keys of train and test), probe, grid, seed, precision
        and options under the same protocol are the same result.
        """
        named = [PROTOCOL, *features, self.probe.name, self.grid, self.seed, _narrowed(self.precision)]
        return digest([*named, self.options()] if self.options() else named)


def _narrowed(precision: Precision) -> RowPrecision:
    """The precision of a resolved job."""
    if precision == "auto":
        raise ValueError("'auto' names no row; resolve the job first")
    return precision


def jobs_of(
    probes: Iterable[Probe],
    seeds: Sequence[int],
    grid: str,
    *,
    shots: Sequence[int | None] = (None,),
    halving: bool = False,
    smoothing: float = 0.0,
    precision: Precision = "auto",
) -> list[Job]:
    """Every row that `probe` makes of one model's features of one data set."""
    return [
        Job(one, seed, grid, precision, count, halving, smoothing) for count, one, seed in product(shots, probes, seeds)
    ]
