"""By what code and which libraries a row is made: what its fields `code`, `versions` and `created` say."""

import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path


def versions() -> dict[str, str]:
    """The installed version of each library that decides a row's numbers."""
    return {name: version(name) for name in ("mlfusion", "torch", "numpy", "scikit-learn")}


@cache
def code() -> str:
    """The commit that a checkout is at, with '-dirty' if it was changed; the version where there is no checkout."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / ".git").exists():
        git = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
        said = subprocess.run(git, capture_output=True, text=True, check=False)
        if said.returncode == 0:
            return said.stdout.strip()
    return version("mlfusion")


def now() -> str:
    """The time, as a row is dated: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
