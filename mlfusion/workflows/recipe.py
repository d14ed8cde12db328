"""Recipes: `pipelines/*.toml` → what to run. Data, never code; everything wrong with one is said at once, line by line.

models = ["formula-vit", "$DATA/weights/mine"]                # catalogue names, hub ids, folders; $DATA is given by --data
datasets = ["digits"]                                         # likewise
probes = ["all", "{cls,ap}-each-layer/linear", "alf:h8"]      # braces are spelt out as in a shell
grid = "quick"                                                # or "paper"
seeds = [0, 1, 2]
size = 448                                                    # and all else that `mlfusion extract` can be told
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfusion.errors import BadRecipe, MlfusionError, UnknownName
from mlfusion.specs.definitions import Option, all_definitions, build
from mlfusion.specs.identity import Pair
from mlfusion.specs.names import Probe, expand_braces, parse_model, parse_probes, parse_tokens
from mlfusion.specs.options import MAX_DEPTH, ComputeOptions, FeatureOptions, SearchOptions

DATA = "$DATA"  # stands for the folder that --data names, at the beginning of a model's or data set's name
_IN_DATA = re.compile(rf"{re.escape(DATA)}(/|$)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Models × data sets × probes × shots × seeds, and the options of both stages."""

    models: tuple[str, ...]
    datasets: tuple[str, ...]
    probes: tuple[str, ...] = ("all",)
    features: FeatureOptions = FeatureOptions()
    compute: ComputeOptions = ComputeOptions()
    search: SearchOptions = SearchOptions()
    all_tokens: bool = False  # cache the tokens of `features`, whether a probe reads them or not

    @classmethod
    def of(
        cls, models: Iterable[str], datasets: Iterable[str], probes: Iterable[str] = ("all",), **keys: Any
    ) -> "Recipe":
        """A recipe from the keys of a file, such as grid="quick" or seeds=[0, 1].

        Raises:
            BadOption: a value that is not allowed.
        """
        values = {KEYS[key][0]: value for key, value in keys.items()}
        return cls(
            models=tuple(models),
            datasets=tuple(datasets),
            probes=tuple(probes),
            features=build(FeatureOptions, values),
            compute=build(ComputeOptions, values),
            search=build(SearchOptions, values),
            all_tokens="tokens" in values,
        )

    @property
    def asked_models(self) -> tuple[str, ...]:
        """The models with `hook` and `set` in their names, unless they have their own."""
        features = self.features
        return tuple(str(parse_model(word).with_defaults(features.hook, features.settings)) for word in self.models)

    def asked(self, depth: int) -> tuple[tuple[Probe, ...], frozenset[Pair]]:
        """Probes for a model of `depth` blocks, and the tokens to cache for them.

        Where the recipe names tokens, 'all' is those of the study's ten that they serve.

        Raises:
            UnknownName: a layer that the model does not have.
        """
        named = parse_probes([word for word in self.probes if word != "all"], depth)
        several = parse_probes("all", depth) if "all" in self.probes else ()
        wanted = frozenset(pair for probe in named for pair in probe.representation.pairs(depth))
        if not self.all_tokens:
            wanted |= {pair for probe in several for pair in probe.representation.pairs(depth)}
        else:
            wanted |= parse_tokens(self.features.tokens, self.features.layers, depth)
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
        if key in ("models", "datasets"):
            found, told = _places(key, value, data)
        elif key == "probes":
            found, told = _probes(key, value)
        elif key in KEYS:
            found, told = _option(key, value, data)
        else:
            faults.append((_line(text, key), f"unknown key {key!r}; allowed: {', '.join(NAMES)}"))
            continue
        values[key] = found
        faults += [(_line(text, key, word), fault) for word, fault in told]
    faults += [(0, f"{name} is missing") for name in ("models", "datasets") if name not in body]
    if faults:
        said = [f"line {line}: {fault}" if line else fault for line, fault in sorted(faults, key=lambda each: each[0])]
        raise BadRecipe(f"{path}: " + "; ".join(said))
    return Recipe.of(**values)


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

Parsed = tuple[Any, Faults]
"""What a key's value means, and what is wrong with it."""


def _listed(value: Any, kind: type, good: Callable[[Any], bool] = bool) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is kind and good(each) for each in value)


def _twice(key: str, words: Iterable[Any]) -> Faults:
    held = list(words)
    return [(str(word), f"{key}: {word!r} twice") for word in dict.fromkeys(held) if held.count(word) > 1]


def _places(key: str, value: Any, data: Path | str | None) -> Parsed:
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


def _unknown(kind: str, word: str, known: Iterable[str]) -> str | None:
    """What is wrong with a name, wherever it lies."""
    try:
        name = parse_model(word).name if kind == "model" else word
    except UnknownName as err:
        return str(err)
    if _IN_DATA.match(name) or name in known or "/" in name or Path(name).expanduser().exists():
        return None
    return str(UnknownName(kind, name, known, otherwise=f"Or an id on the hub, a folder, or {DATA}/… with --data DIR."))


def _probes(key: str, value: Any) -> Parsed:
    if not _listed(value, str):
        return value, [(None, f"{key} = {value!r}: allowed is a list of names in quotes")]
    faults: Faults = []
    for word in value:
        try:
            parse_probes(expand_braces([word]), MAX_DEPTH)
        except MlfusionError as err:
            faults.append((word, str(err)))
    return tuple(expand_braces(value)), faults + _twice(key, expand_braces(value))


KEYS: dict[str, tuple[str, Option]] = {
    name: (field, one)
    for kind in (FeatureOptions, ComputeOptions, SearchOptions)
    for field, one in all_definitions(kind).items()
    if kind is not ComputeOptions or field in ("format", "skip_bad")  # the others are for the machine at hand
    for name in (one.name, *one.former)
}
"""Key → the field of an options class that it sets; names that an option had before are understood."""

NAMES = ("models", "datasets", "probes", *(name for name, (_, one) in KEYS.items() if name == one.name))


def _option(key: str, value: Any, data: Path | str | None) -> Parsed:
    """The value of an option, checked by the option's own definition."""
    field, one = KEYS[key]
    found, faults = one.kind.read(value), []
    if field == "image_root" and isinstance(found, str):
        return _placed(found, data)
    if fault := one.kind.fault(found):
        quoted = re.findall(r"'([^']+)'", fault)
        faults.append((next((w for w in quoted if w in str(value)), None), f"{key} = {value!r}: {fault}"))
    elif field == "splits" and [word.partition("=")[0] for word in found] != ["train", "test"]:
        faults.append((None, f"{key} = {value!r}: allowed are train,test and, say, train,test=validation"))
    if field == "views" and isinstance(found, tuple) and "plain" not in found:
        faults.append((None, f'{key} = {value!r}: "plain" must be among them, which is what probes read'))
    return found, faults


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
