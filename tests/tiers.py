"""The tiers of the tests: `make test` is short, `make coverage` adds slow tests, `make test-all` adds long forms.

Long forms run for as many minutes as MLFUSION_LONG says; MLFUSION_SLOW=1 adds slow tests only.
"""

import os
import time

MINUTES = float(os.environ.get("MLFUSION_LONG", "0"))
LONG = MINUTES > 0
SLOW = LONG or os.environ.get("MLFUSION_SLOW") == "1"
BEGAN = time.monotonic()


def in_time() -> bool:
    """Whether a long form may still begin."""
    return LONG and time.monotonic() - BEGAN < 60 * MINUTES


def examples(short: int) -> int:
    """How many examples a property is tried on: ten times as many in the long form."""
    return 10 * short if LONG else short
