"""The hyper-parameter grids, and how successive halving thins them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from mlfusion.probing.heads import HEADS
from mlfusion.probing.training.batches import Schedule
from mlfusion.probing.training.population import Configuration
from mlfusion.specs.names import Head

HALVING_FACTOR = 3  # one configuration in three continues, for three times as many steps
RUNGS = 3


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The configurations to choose from, and how long each is trained."""

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    dropouts: tuple[float, ...]  # dropout rates of the attention weights, for heads with dropout
    epochs: int
    least_steps: int

    def configurations(self, head: Head) -> tuple[Configuration, ...]:
        """All configurations, always in the same order: if scores and losses are equal, the first is chosen."""
        dropouts = self.dropouts if HEADS[head].has_dropout else (0.0,)
        return tuple(Configuration(*point) for point in product(self.learning_rates, self.weight_decays, dropouts))

    def schedule(self, images: int) -> Schedule:
        """Steps and batches for a number of images."""
        return Schedule.of(images, epochs=self.epochs, least_steps=self.least_steps)


SEARCH_GRIDS = {
    "paper": Grid(
        learning_rates=(1e-1, 1e-2, 1e-3),
        weight_decays=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0),
        dropouts=(0.0, 0.1, 0.3),
        epochs=40,
        least_steps=1000,
    ),
    "quick": Grid(
        learning_rates=(1e-1, 1e-2, 1e-3),
        weight_decays=(1e-2,),
        dropouts=(0.1,),
        epochs=12,
        least_steps=300,
    ),
}


SMALLEST_POSSIBLE = {"dropout": 0.0, "neighbours": 1}


def at_end(candidates: Sequence[Any], best: int) -> dict[str, str]:
    """The hyper-parameters of the chosen candidate that are 'smallest' or 'largest' among all candidates, by name.

    A value beyond these was not tried and might be better. One below the smallest that is possible does not exist.
    """
    ends = {}
    for name, value in asdict(candidates[best]).items():
        tried = {getattr(candidate, name) for candidate in candidates}
        if len(tried) > 1 and value == max(tried):
            ends[name] = "largest"
        elif len(tried) > 1 and value == min(tried) and value != SMALLEST_POSSIBLE.get(name):
            ends[name] = "smallest"
    return ends


def rungs(configurations: int, steps: int, *, halving: bool) -> list[tuple[int, int]]:
    """(configurations, steps) of every stage of successive halving; without halving, one stage with all of both.

    63 configurations for 1,000 steps give (63, 112), (21, 334), (7, 1000): a third of the work.
    """
    if not halving:
        return [(configurations, steps)]
    parts = [HALVING_FACTOR**power for power in range(RUNGS)]
    return [(-(-configurations // part), -(-steps * part // parts[-1])) for part in parts]
