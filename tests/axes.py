"""Which modules name the axes of their arrays, and how calls of their functions are checked in every test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from beartype import BeartypeConf, beartype

ROOT = Path(__file__).parent.parent
CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is good enough for a float


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype's check of arguments and result, but of no `Self`, which it knows only where it sees the class."""
    hints = getattr(function, "__annotations__", {})
    hints.update({name: Any for name, hint in hints.items() if hint is Self})
    return CHECK(function)


def modules_with_axes() -> list[str]:
    """Every module that imports `mlfusion.shapes`, so that none need be listed."""
    paths = [path for path in (ROOT / "mlfusion").rglob("*.py") if "from mlfusion.shapes import" in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in sorted(paths)]
