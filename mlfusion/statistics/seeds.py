"""Over seeds: how much another training run would differ."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import fsum, sqrt
from statistics import fmean


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
        mean, n = fmean(held), len(held)
        # `statistics.stdev` reckons in fractions, which takes a hundred thousand rows ten seconds.
        return cls(mean, sqrt(fsum((value - mean) ** 2 for value in held) / (n - 1)) if n > 1 else None, n)
