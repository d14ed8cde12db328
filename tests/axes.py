"""Which modules name the axes of their arrays, and are checked for them in every test."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def modules_with_axes() -> list[str]:
    """Every module that imports `mlfusion.shapes`, so that none need be listed."""
    paths = [path for path in (ROOT / "mlfusion").rglob("*.py") if "from mlfusion.shapes import" in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in sorted(paths)]
