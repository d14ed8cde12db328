"""The provenance of a row: its fields `code`, `versions` and `created`."""

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
    """The commit of the checkout, with '-dirty' if it was changed; the version where there is no checkout."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / ".git").exists():
        git = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
        described = subprocess.run(git, capture_output=True, text=True, check=False)
        if described.returncode == 0:
            return described.stdout.strip()
    return version("mlfusion")


def now() -> str:
    """The current time as a row stores it: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
