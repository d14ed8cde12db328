"""Over seeds: how much another training run would differ."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over n seeds; no deviation for one."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """One value a seed."""
        held = list(values)
        return cls(fmean(held), stdev(held) if len(held) > 1 else None, len(held))
