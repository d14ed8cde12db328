"""Recipes: `pipelines/*.toml` → what to run. Data, never code; everything wrong with one is said at once, line by line.

models = ["formula-vit", "$DATA/weights/mine"]                # catalogue names, hub ids, folders; $DATA is given by --data
datasets = ["digits"]                                         # likewise
probes = ["all", "{cls,ap}-each-layer/linear", "alf:h8"]      # braces are spelt out as in a shell
grid = "quick"                                                # or "paper"
seeds = [0, 1, 2]
size = 448                                                    # and all else that `mlfusion extract` can be told
"""

import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mlfusion.errors import BadRecipe, MlfusionError, UnknownName
from mlfusion.specs.identity import COMPUTES, DTYPES, HOOKS, Pair
from mlfusion.specs.names import (
    ModelRef,
    Probe,
    Setting,
    parse_layers,
    parse_model,
    parse_probes,
    parse_tokens,
    spelt_out,
)

MOST_LAYERS = 64  # deeper than any model: names are checked here before the model's depth is known
DATA = "$DATA"  # stands for the folder that --data names, at the beginning of a model's or data set's name
_IN_DATA = re.compile(rf"{re.escape(DATA)}(/|$)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Models × data sets × probes × shots × seeds."""

    models: tuple[str, ...]
    datasets: tuple[str, ...]
    probes: tuple[str, ...] = ("all",)
    grid: str = "paper"
    seeds: tuple[int, ...] = (0, 1, 2)
    shots: tuple[int | None, ...] = (None,)  # images of each class to train on; None is all of them
    halving: bool = False
    smoothing: float = 0.0
    tokens: str | None = None  # to cache; None is what the probes read
    layers: str = "all"  # of `tokens` that name none
    # Where features are made otherwise than plainly: names and meanings are those of `mlfusion extract`.
    hook: str | None = None  # of models that name none
    set: tuple[tuple[str, Setting], ...] = ()  # likewise, of the models' configuration
    preprocess: str = "exact"
    size: int | None = None
    views: tuple[str, ...] = ("plain",)  # to cache; probes read the plain one
    view_seed: int = 0
    compute: str = "float32"
    dtype: str = "float16"
    format: str = "zarr"
    # How data sets are read, all of them.
    split: str = "train,test"
    image_column: str | None = None
    label_column: str | None = None
    id_column: str | None = None
    image_root: str | None = None
    target: str | None = None
    carve: str | None = None
    carve_seed: int = 0
    upright: bool = False
    max_pixels: int | None = None
    config: str | None = None
    stream: bool = False
    skip_bad: bool = False

    @property
    def asked_models(self) -> tuple[str, ...]:
        """The models with `hook` and `set` in their names, where they have none of their own."""
        return tuple(str(self._word(parse_model(word))) for word in self.models)

    def _word(self, said: ModelRef) -> ModelRef:
        hook = said.hook if said.hook != HOOKS[0] or self.hook is None else parse_model("", self.hook).hook
        return ModelRef(said.name, hook, tuple(sorted((dict(self.set) | dict(said.settings)).items())))

    def asked(self, depth: int) -> tuple[tuple[Probe, ...], frozenset[Pair]]:
        """Probes for a model of `depth` blocks, and the tokens to cache for them.

        Where `tokens` are given, 'all' is those of the study's ten that they serve.

        Raises:
            UnknownName: a layer that the model does not have.
        """
        named = parse_probes([word for word in self.probes if word != "all"], depth)
        several = parse_probes("all", depth) if "all" in self.probes else ()
        wanted = frozenset(pair for probe in named for pair in probe.representation.pairs(depth))
        if self.tokens is None:
            wanted |= {pair for probe in several for pair in probe.representation.pairs(depth)}
        else:
            wanted |= parse_tokens(self.tokens, self.layers, depth)
            several = tuple(probe for probe in several if probe.representation.pairs(depth) <= wanted)
        return tuple(dict.fromkeys([*several, *named])), wanted


def load(path: Path, *, data: Path | str | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the file.
        data: the folder that `$DATA` stands for, where the recipe says so.

    Raises:
        BadRecipe: not there, not TOML, or with unknown keys, wrong types or unknown names: all of them in one message, each
            with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        body = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as err:
        there = ", ".join(str(p) for p in sorted(Path("pipelines").glob("**/*.toml"))) or "none in ./pipelines"
        raise BadRecipe(f"no recipe can be read at {path} ({err}); there are: {there}") from err
    except tomllib.TOMLDecodeError as err:
        raise BadRecipe(f"{path} is not TOML: {err}") from err
    faults: list[tuple[int, str]] = []
    values: dict[str, Any] = {}
    for key, value in body.items():
        if key in PLACED:
            found, told = PLACED[key](key, value, data)
        elif key in KEYS:
            found, told = KEYS[key](key, value)
        else:
            faults.append((_line(text, key), f"unknown key {key!r}; allowed: {', '.join(NAMES)}"))
            continue
        values[key] = found
        faults += [(_line(text, key, word), fault) for word, fault in told]
    faults += [(0, f"{name} is missing") for name in ("models", "datasets") if name not in body]
    if faults:
        said = [f"line {line}: {fault}" if line else fault for line, fault in sorted(faults, key=lambda each: each[0])]
        raise BadRecipe(f"{path}: " + "; ".join(said))
    return Recipe(**values)


def about(path: Path) -> tuple[str, dict[str, str]]:
    """What the head of a recipe says: its first sentences, and what stands behind Run, Cost and Expect."""
    lines = [line[1:].strip() for line in path.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if line]
    said: dict[str, str] = {"": ""}
    word = ""
    for line in lines:
        if match := re.match(r"(Run|Cost|Expect): *(.*)", line):
            word, line = match[1], match[2]
            said[word] = ""
        said[word] = f"{said[word]} {line}".strip()
    return said.pop(""), said


# --- what each key takes ---------------------------------------------------------------------------------------------

Faults = list[tuple[str | None, str]]
"""Each with the word that it is about, to find its line by; None is the key itself."""

Told = tuple[Any, Faults]
"""What a key's value means, and what is wrong with it."""


def _listed(value: Any, kind: type, good: Callable[[Any], bool] = bool) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is kind and good(each) for each in value)


def _twice(key: str, words: Iterable[Any]) -> Faults:
    held = list(words)
    return [(str(word), f"{key}: {word!r} twice") for word in dict.fromkeys(held) if held.count(word) > 1]


def _places(key: str, value: Any, data: Path | str | None) -> Told:
    """Names of models or data sets; that a hub has them shows when they are asked for."""
    if not _listed(value, str):
        return value, [(None, f"{key} = {value!r}: allowed is a list of names in quotes")]
    from mlfusion import datasets, models

    kind, known = ("model", models.CATALOGUE) if key == "models" else ("data set", datasets.CATALOGUE)
    faults, found = _twice(key, value), []
    for word in value:
        if (fault := _unknown(kind, word, known)) is not None:
            faults.append((word, fault))
        place, told = _placed(word, data)
        found.append(place)
        faults += told
    return tuple(found), faults


def _placed(word: str, data: Path | str | None) -> tuple[str, Faults]:
    """A name with the folder that $DATA stands for."""
    if not _IN_DATA.match(word):
        return word, []
    if data is None:
        return word, [(word, f"{word!r} lies in a folder of yours; say which: --data DIR")]
    place = str(Path(data).expanduser().resolve()) + word.removeprefix(DATA)
    there = place if Path(place).exists() else place.partition(":")[0]  # a hook point may follow a model's name
    return place, [] if Path(there).exists() else [(word, f"there is no {there}")]


def _root(key: str, value: Any, data: Path | str | None) -> Told:
    """A folder that the paths in a table begin at."""
    found, faults = _text(key, value)
    return _placed(found, data) if not faults else (found, faults)


def _unknown(kind: str, word: str, known: Iterable[str]) -> str | None:
    """What is wrong with a name, wherever it lies."""
    try:
        name = parse_model(word).name if kind == "model" else word
    except UnknownName as err:
        return str(err)
    if _IN_DATA.match(name) or name in known or "/" in name or Path(name).expanduser().exists():
        return None
    return str(UnknownName(kind, name, known, otherwise=f"Or an id on the hub, a folder, or {DATA}/… with --data DIR."))


def _probes(key: str, value: Any) -> Told:
    if not _listed(value, str):
        return value, [(None, f"{key} = {value!r}: allowed is a list of names in quotes")]
    faults: Faults = []
    for word in value:
        try:
            parse_probes(spelt_out([word]), MOST_LAYERS)
        except MlfusionError as err:
            faults.append((word, str(err)))
    return tuple(spelt_out(value)), faults + _twice(key, spelt_out(value))


def _grid(key: str, value: Any) -> Told:
    from mlfusion.probing.grids import SEARCH_GRIDS

    return value, [] if value in SEARCH_GRIDS else [(None, f"grid = {value!r}: allowed are {', '.join(SEARCH_GRIDS)}")]


def _seeds(key: str, value: Any) -> Told:
    if not _listed(value, int, lambda each: each >= 0):
        return value, [(None, f"seeds = {value!r}: allowed is a list of whole numbers from 0, such as [0, 1, 2]")]
    return tuple(value), _twice(key, value)


def _shots(key: str, value: Any) -> Told:
    if not (isinstance(value, list) and value and all(n == "all" or (type(n) is int and n > 1) for n in value)):
        return value, [
            (None, f'shots = {value!r}: allowed is a list of whole numbers from 2 and "all", such as [4, 16]')
        ]
    return tuple(None if each == "all" else each for each in value), _twice(key, value)


def _yes_or_no(key: str, value: Any) -> Told:
    return value, [] if isinstance(value, bool) else [(None, f"{key} = {value!r}: allowed are true and false")]


def _whole(least: int) -> Callable[[str, Any], Told]:
    def number(key: str, value: Any) -> Told:
        good = type(value) is int and value >= least
        return value, [] if good else [(None, f"{key} = {value!r}: allowed are whole numbers from {least}")]

    return number


def _text(key: str, value: Any) -> Told:
    good = isinstance(value, str) and bool(value)
    return value, [] if good else [(None, f"{key} = {value!r}: allowed is text in quotes")]


def _one_of(words: Callable[[], Sequence[str]]) -> Callable[[str, Any], Told]:
    """Of words that may lie in a room that is heavy to enter."""

    def chosen(key: str, value: Any) -> Told:
        return value, [] if value in words() else [(None, f"{key} = {value!r}: allowed are {', '.join(words())}")]

    return chosen


def _preparations() -> Sequence[str]:
    from mlfusion.models.preprocessing import VARIANTS

    return VARIANTS


def _formats() -> Sequence[str]:
    from mlfusion.store import FormatName

    return get_args(FormatName)


def _targets() -> Sequence[str]:
    from mlfusion.datasets import LABEL_KINDS

    return LABEL_KINDS


def _views(key: str, value: Any) -> Told:
    from mlfusion.models.preprocessing import is_view

    if not _listed(value, str):
        return value, [(None, f'{key} = {value!r}: allowed is a list of names in quotes, such as ["plain", "flip"]')]
    faults = _twice(key, value)
    faults += [
        (word, f"no view named {word!r}; there are plain, flip, crop1, crop2, …") for word in value if not is_view(word)
    ]
    if "plain" not in value:
        faults.append((None, f'{key} = {value!r}: "plain" must be among them, which is what probes read'))
    return tuple(value), faults


def _settings(key: str, value: Any) -> Told:
    if not (isinstance(value, dict) and value):
        return value, [(None, f'{key} = {value!r}: allowed is a table, such as {{ hidden_act = "gelu" }}')]
    faults: Faults = [
        (name, f"{key}: {name} = {each!r}: allowed are text, numbers, true and false")
        for name, each in value.items()
        if not isinstance(each, (str, int, float, bool))
    ]
    return tuple(sorted(value.items())), faults


def _carve(key: str, value: Any) -> Told:
    from mlfusion.datasets.resplit import parse_ratio

    found, faults = _text(key, value)
    if not faults:
        try:
            parse_ratio(found)
        except MlfusionError as err:
            faults.append((None, str(err).removeprefix("--")))
    return found, faults


def _split(key: str, value: Any) -> Told:
    """'train,test', either of them with the split that is taken for it."""
    found, faults = _text(key, value)
    called = [part.partition("=")[0].strip() for part in found.split(",")] if not faults else []
    if not faults and called != ["train", "test"]:
        faults = [(None, f"{key} = {value!r}: allowed are train,test and, say, train,test=validation")]
    return found, faults


def _smoothing(key: str, value: Any) -> Told:
    good = type(value) in (int, float) and 0 <= value < 1
    return value, [] if good else [(None, f"smoothing = {value!r}: allowed is from 0 to below 1, such as 0.1")]


def _words(key: str, value: Any) -> Told:
    """Of layers or tokens."""
    try:
        if not isinstance(value, str):
            return value, [(None, f"{key} = {value!r}: allowed is text in quotes")]
        parse_tokens(value, "all", MOST_LAYERS) if key == "tokens" else parse_layers(value, MOST_LAYERS)
    except MlfusionError as err:
        return value, [(None, str(err))]
    return value, []


PLACED: dict[str, Callable[[str, Any, Path | str | None], Told]] = {
    "models": _places,
    "datasets": _places,
    "image_root": _root,
}
KEYS: dict[str, Callable[[str, Any], Told]] = {
    "probes": _probes,
    "grid": _grid,
    "seeds": _seeds,
    "shots": _shots,
    "halving": _yes_or_no,
    "smoothing": _smoothing,
    "tokens": _words,
    "layers": _words,
    "hook": _one_of(lambda: HOOKS),
    "set": _settings,
    "preprocess": _one_of(_preparations),
    "size": _whole(1),
    "views": _views,
    "view_seed": _whole(0),
    "compute": _one_of(lambda: (*COMPUTES, "auto")),
    "dtype": _one_of(lambda: DTYPES),
    "format": _one_of(_formats),
    "split": _split,
    "image_column": _text,
    "label_column": _text,
    "id_column": _text,
    "target": _one_of(_targets),
    "carve": _carve,
    "carve_seed": _whole(0),
    "upright": _yes_or_no,
    "max_pixels": _whole(1),
    "config": _text,
    "stream": _yes_or_no,
    "skip_bad": _yes_or_no,
}
NAMES = tuple(field.name for field in dataclasses.fields(Recipe))
assert {*PLACED, *KEYS} == {*NAMES}


def _line(text: str, key: str, word: str | None = None) -> int:
    """The line that the key is set on, or of the word in its value; tomllib keeps neither."""
    lines: Sequence[str] = text.splitlines()
    name = re.compile(rf"\s*(\[+\s*)?[\"']?{re.escape(key)}[\"']?\s*(=|\.|\])")
    first = next((number for number, line in enumerate(lines) if name.match(line)), 0)
    if word is not None:
        return next((n + 1 for n in _value(lines, first) if word in lines[n].partition("#")[0]), first + 1)
    return first + 1


def _value(lines: Sequence[str], first: int) -> Iterator[int]:
    """Lines from the key to before the next one; of a table, to before the next table."""
    ends = r"\s*\[\[?\w" if lines[first].lstrip().startswith("[") else r"\s*(\[\[?\w|[\w-]+\s*=)"
    for number in range(first, len(lines)):
        if number > first and re.match(ends, lines[number]):
            return
        yield number
