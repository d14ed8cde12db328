"""Faster ways to do what PyTorch does can be switched off: to compare the two, or where one is in doubt."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


class Switch:
    """On, unless the environment's variable of this name is 0."""

    def __init__(self, variable: str) -> None:
        self.on = os.environ.get(variable) != "0"

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it, in every thread, it is off."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before
