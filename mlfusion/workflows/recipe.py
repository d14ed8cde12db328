"""Reads recipes (`pipelines/*.toml`), which describe a study. All errors of a recipe are reported at once, with their lines.

models = ["formula-vit", "$DATA/weights/mine"]                # catalogue names, hub ids, folders; $DATA is given by --data
datasets = ["digits"]                                         # catalogue names, hub ids, folders, files
probes = ["all", "{cls,ap}-each-layer/linear", "alf:h8"]      # braces expand as in a shell
grid = "quick"                                                # or "paper"
seeds = [0, 1, 2]
size = 448                                                    # any option of `mlfusion extract` that decides features
"""

import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlfusion.errors import BadRecipe, MlfusionError, UnknownName
from mlfusion.specs.definitions import Option, all_definitions, build
from mlfusion.specs.identity import Pair
from mlfusion.specs.names import Probe, expand_braces, parse_probes, parse_tokens
from mlfusion.specs.options import MAX_DEPTH, ComputeOptions, FeatureOptions, SearchOptions
from mlfusion.specs.splits import split_word
from mlfusion.system.references import parse_model

DATA = "$DATA"  # stands for the folder that --data names, at the beginning of a model's or data set's name
_IN_DATA = re.compile(rf"{re.escape(DATA)}(/|$)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The models, data sets and probes of a study, and the options of both stages."""

    models: tuple[str, ...]
    datasets: tuple[str, ...]
    probes: tuple[str, ...] = ("all",)
    features: FeatureOptions = FeatureOptions()
    compute: ComputeOptions = ComputeOptions()
    search: SearchOptions = SearchOptions()
    all_tokens: bool = False  # cache all tokens of `features`, even those that no probe reads

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
    def model_refs(self) -> tuple[str, ...]:
        """The models as references with the recipe's `hook` and `set`, unless the model's name has its own."""
        features = self.features
        return tuple(str(parse_model(word).with_defaults(features.hook, features.settings)) for word in self.models)

    def probes_and_tokens(self, depth: int) -> tuple[tuple[Probe, ...], frozenset[Pair]]:
        """Probes for a model of `depth` blocks, and the tokens to cache for them.

        If the recipe names tokens, 'all' selects those of the study's ten probes that read no others.

        Raises:
            UnknownName: a layer that the model does not have.
        """
        named = parse_probes([word for word in self.probes if word != "all"], depth)
        study_probes = parse_probes("all", depth) if "all" in self.probes else ()
        pairs = frozenset(pair for probe in named for pair in probe.representation.pairs(depth))
        if not self.all_tokens:
            pairs |= {pair for probe in study_probes for pair in probe.representation.pairs(depth)}
        else:
            pairs |= parse_tokens(self.features.tokens, self.features.layers, depth)
            study_probes = tuple(probe for probe in study_probes if probe.representation.pairs(depth) <= pairs)
        return tuple(dict.fromkeys([*study_probes, *named])), pairs


def load(path: Path, *, data: Path | str | None = None, seeds: tuple[int, ...] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the file.
        data: the folder that `$DATA` stands for.
        seeds: replace the recipe's seeds.

    Raises:
        BadRecipe: the file cannot be read or is not TOML, or has unknown keys or values; the message has all errors with
            their lines.
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
    names: dict[str, str] = {}  # field of an options class → the key that sets it
    for key, value in body.items():
        if key in ("models", "datasets"):
            parsed, key_faults = _sources(key, value, data)
        elif key == "probes":
            parsed, key_faults = _probes(key, value)
        elif key in KEYS:
            parsed, key_faults = _option(key, value, data)
            if (other := names.setdefault(KEYS[key][0], key)) != key:
                key_faults.append((None, f"{other} and {key} are one option; keep one of them"))
        else:
            faults.append((_line(text, key), f"unknown key {key!r}; allowed: {', '.join(NAMES)}"))
            continue
        values[key] = parsed
        faults += [(_line(text, key, word), fault) for word, fault in key_faults]
    faults += [(0, f"{name} is missing") for name in ("models", "datasets") if name not in body]
    if faults:
        lines = [
            f"line {line}: {fault}" if line else fault for line, fault in sorted(faults, key=lambda fault: fault[0])
        ]
        raise BadRecipe(f"{path}: " + "; ".join(lines))
    return Recipe.of(**values | ({"seeds": seeds} if seeds else {}))


def about(path: Path) -> tuple[str, dict[str, str]]:
    """The comment at the head of a recipe: its introduction, '' without one, and the texts after Run, Cost and Expect."""
    head = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    lines = [line[1:].strip() for line in head]
    sections: dict[str, str] = {"": ""}
    section = ""
    for line in lines:
        if match := re.match(r"(Run|Cost|Expect): *(.*)", line):
            section, line = match[1], match[2]
            sections[section] = ""
        sections[section] = f"{sections[section]} {line}".strip()
    return sections.pop(""), sections


# --- values of keys ---------------------------------------------------------------------------------------------------

Faults = list[tuple[str | None, str]]
"""(word, message): the message is about this word of the value, or about the whole key if it is None."""

Parsed = tuple[Any, Faults]
"""(value, faults)."""


def _list_faults(key: str, value: Any) -> Faults:
    is_list = isinstance(value, list) and value and all(isinstance(word, str) and word for word in value)
    return [] if is_list else [(None, f"{key} = {value!r}: allowed is a list of names in quotes")]


def _duplicates(key: str, words: Iterable[Any]) -> Faults:
    listed = list(words)
    return [(str(word), f"{key}: {word!r} twice") for word in dict.fromkeys(listed) if listed.count(word) > 1]


def _sources(key: str, value: Any, data: Path | str | None) -> Parsed:
    """Names of models or data sets. Hub ids are not checked here."""
    if list_faults := _list_faults(key, value):
        return value, list_faults
    from mlfusion import datasets, models

    kind, known = ("model", models.CATALOGUE) if key == "models" else ("data set", datasets.CATALOGUE)
    faults, resolved = _duplicates(key, value), []
    for word in value:
        if (fault := _unknown(kind, word, known)) is not None:
            faults.append((word, fault))
        path, path_faults = _resolve_data(word, data)
        resolved.append(path)
        faults += path_faults
    return tuple(resolved), faults


def _resolve_data(word: str, data: Path | str | None) -> tuple[str, Faults]:
    """Replace $DATA in a name by the folder."""
    if not _IN_DATA.match(word):
        return word, []
    if data is None:
        return word, [(word, f"{word!r} lies in a folder of yours; say which: --data DIR")]
    path = str(Path(data).expanduser().resolve()) + word.removeprefix(DATA)
    existing = path if Path(path).exists() else parse_model(path).name  # a hook point may follow a model's name
    return path, [] if Path(existing).exists() else [(word, f"there is no {existing}")]


def _unknown(kind: str, word: str, known: Iterable[str]) -> str | None:
    """The error message for a name that is neither known, a hub id nor a path; else None."""
    try:
        name = parse_model(word).name if kind == "model" else word
    except UnknownName as err:
        return str(err)
    if _IN_DATA.match(name) or name in known or "/" in name or Path(name).expanduser().exists():
        return None
    return str(UnknownName(kind, name, known, otherwise=f"Or an id on the hub, a folder, or {DATA}/… with --data DIR."))


def _probes(key: str, value: Any) -> Parsed:
    if faults := _list_faults(key, value):
        return value, faults
    for word in value:
        try:
            parse_probes(expand_braces([word]), MAX_DEPTH)
        except MlfusionError as err:
            faults.append((word, str(err)))
    return tuple(expand_braces(value)), faults + _duplicates(key, expand_braces(value))


KEYS: dict[str, tuple[str, Option]] = {
    name: (field, definition)
    for cls in (FeatureOptions, ComputeOptions, SearchOptions)
    for field, definition in all_definitions(cls).items()
    if cls is not ComputeOptions or field in ("format", "skip_bad")  # the other options belong to the machine
    for name in (definition.name, *definition.former)
}
"""Key, present or former → (field of an options class, definition)."""

NAMES = ("models", "datasets", "probes", *(name for name, (_, definition) in KEYS.items() if name == definition.name))


def _option(key: str, value: Any, data: Path | str | None) -> Parsed:
    """Parse and check the value of an option by its definition."""
    field, definition = KEYS[key]
    parsed, faults = definition.kind.read(value), []
    if fault := definition.kind.fault(parsed):
        quoted = re.findall(r"'([^']+)'", fault)
        faults.append((next((w for w in quoted if w in str(value)), None), f"{key} = {value!r}: {fault}"))
    elif field == "splits" and [split_word(word.partition("=")[0]) for word in parsed] not in (
        ["train", "test"],
        ["train", "test", "validation"],
    ):
        faults.append((None, f"{key} = {value!r}: allowed are train,test and, say, train,test=validation"))
    elif field == "image_root":
        return _resolve_data(parsed, data)
    if field == "views" and isinstance(parsed, tuple) and "plain" not in parsed:
        faults.append((None, f'{key} = {value!r}: "plain" must be among them, which is what probes read'))
    return parsed, faults


def _line(text: str, key: str, word: str | None = None) -> int:
    """Number of the line that sets the key, or that has the word in its value; tomllib does not report lines."""
    lines: Sequence[str] = text.splitlines()
    name = re.compile(rf"\s*(\[+\s*)?[\"']?{re.escape(key)}[\"']?\s*(=|\.|\])")
    first = next((number for number, line in enumerate(lines) if name.match(line)), 0)
    if word is not None:
        return next((n + 1 for n in _value(lines, first) if word in lines[n].partition("#")[0]), first + 1)
    return first + 1


def _value(lines: Sequence[str], first: int) -> Iterator[int]:
    """Numbers of the lines from the key to the next key, or from a table to the next table."""
    ends = r"\s*\[\[?\w" if lines[first].lstrip().startswith("[") else r"\s*(\[\[?\w|[\w-]+\s*=)"
    for number in range(first, len(lines)):
        if number > first and re.match(ends, lines[number]):
            return
        yield number
