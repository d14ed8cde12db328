"""Recipes: `pipelines/*.toml` → what to run. Data, never code; everything wrong with one is said at once.

models = ["formula-vit"]          # catalogue names, hub ids, folders
datasets = ["digits"]             # likewise
tokens = "cls,ap,all@last"        # kinds, each at `layers` unless it names its own
layers = "all"
probes = ["all", "cls-each-layer/linear"]
grid = "quick"                    # or "paper"
seeds = [0, 1, 2]
"""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfusion.errors import BadRecipe, MlfusionError
from mlfusion.specs import parse_probes, parse_tokens

MOST_LAYERS = 64  # deeper than any model: names are checked here before the model's depth is known


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Models × data sets × probes × seeds, and the tokens they need."""

    models: tuple[str, ...]
    datasets: tuple[str, ...]
    layers: str = "all"
    tokens: str = "cls,ap"
    probes: tuple[str, ...] = ("all",)
    grid: str = "paper"
    seeds: tuple[int, ...] = (0, 1, 2)


def load(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        BadRecipe: not there, not TOML, or with unknown keys, wrong types or unknown names: all of them in one message.
    """
    try:
        body = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as err:
        there = ", ".join(str(p) for p in sorted(Path("pipelines").glob("**/*.toml"))) or "none in ./pipelines"
        raise BadRecipe(f"no recipe can be read at {path} ({err}); there are: {there}") from err
    except tomllib.TOMLDecodeError as err:
        raise BadRecipe(f"{path} is not TOML: {err}") from err
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    faults = [f"unknown key {key!r}; allowed: {', '.join(fields)}" for key in body if key not in fields]
    faults += [f"{name} is missing" for name in ("models", "datasets") if name not in body]
    values: dict[str, Any] = {}
    for name, value in body.items():
        if name in fields:
            fault = _fault(name, value)
            faults += [fault] if fault else []
            values[name] = tuple(value) if isinstance(value, list) else value
    if faults:
        raise BadRecipe(f"{path}: " + "; ".join(faults))
    return Recipe(**values)


def _fault(name: str, value: Any) -> str | None:
    """What keeps `value` from being what the key `name` takes."""
    from mlfusion.protocol import GRIDS

    if name in ("models", "datasets", "probes"):
        if not (isinstance(value, list) and value and all(isinstance(v, str) and v for v in value)):
            return f"{name} = {value!r}: allowed is a list of names in quotes"
    elif name == "seeds":
        if not (isinstance(value, list) and value and all(type(v) is int and v >= 0 for v in value)):
            return f"seeds = {value!r}: allowed is a list of whole numbers from 0, such as [0, 1, 2]"
    elif not isinstance(value, str):
        return f"{name} = {value!r}: allowed is text in quotes"
    if name == "grid" and value not in GRIDS:
        return f"grid = {value!r}: allowed are {', '.join(GRIDS)}"
    try:
        if name == "probes":
            parse_probes(value, MOST_LAYERS)
        if name == "tokens":
            parse_tokens(value, "all", MOST_LAYERS)
    except MlfusionError as err:
        return str(err)
    return None
