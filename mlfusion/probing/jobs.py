"""Jobs: a job is one row to train, described by a probe and its search options, which determine the row's id."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

from mlfusion.probing.search import SOLVERS
from mlfusion.probing.training.precision import resolve
from mlfusion.specs.identity import digest
from mlfusion.specs.names import Probe
from mlfusion.specs.options import SearchOptions

PROTOCOL = 5
"""Part of every row's id; it is raised when a change of code changes scores, so that old rows are made again."""


@dataclass(frozen=True)
class Job:
    """One row to train: `search` has one seed and one number of shots."""

    probe: Probe
    search: SearchOptions

    @property
    def seed(self) -> int:
        """The seed of the split, the initialisation, the order of images, jitter and dropout."""
        [seed] = self.search.seeds
        return seed

    @property
    def shots(self) -> int | None:
        """Training images per class; None is all of them."""
        [shots] = self.search.shots
        return shots

    def resolved(self, device: str) -> "Job":
        """The same job with the precision that 'auto' means on this machine; float32 for a head that is solved for."""
        solved = self.probe.head in SOLVERS
        return self._with("float32" if solved else resolve(self.search.precision, device))

    def equivalents(self, device: str) -> list["Job"]:
        """The resolved jobs whose row serves for this one: with 'auto' both precisions, that of this machine first."""
        own = self.resolved(device)
        if self.search.precision != "auto" or self.probe.head in SOLVERS:
            return [own]
        return [own, own._with("float32" if own.search.precision == "bfloat16" else "bfloat16")]

    def row_id(self, features: tuple[str, ...]) -> str:
        """Id of a resolved job's row: r, and 15 digits of the digest of protocol, `identity` of the features, probe, search.

        The keys are those of train, test, and validation if its images choose, so that they say what `choose_on` resolved to.
        The letter keeps other programs from reading an id of decimal digits in a CSV as a number.
        """
        if self.search.precision == "auto":
            raise ValueError("'auto' names no row; resolve the job first")
        return "r" + digest([PROTOCOL, *features, self.probe.name, replace(self.search, choose_on="auto")], 15)

    def _with(self, precision: str) -> "Job":
        return replace(self, search=replace(self.search, precision=precision))  # type: ignore[arg-type]


def identity(keys: tuple[str, ...], groups: Iterable[str] = ()) -> tuple[str, ...]:
    """What a row's id says of its features: their keys, and the digests of the groups of train and test if they have any."""
    return (*keys, *(f"groups {digest}" for digest in groups if digest))


def jobs_of(probes: Iterable[Probe], search: SearchOptions) -> list[Job]:
    """Every row that `probe` makes of one model's features of one data set."""
    return [
        Job(probe, replace(search, seeds=(seed,), shots=(shots,)))
        for shots, probe, seed in product(search.shots, probes, search.seeds)
    ]
