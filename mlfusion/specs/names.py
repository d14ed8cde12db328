"""Parses the names that a user types: models, layers, tokens, representations and probes."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mlfusion.errors import MlfusionError, UnknownName
from mlfusion.specs.identity import GRID_SIDES, KINDS, REDUCED_KINDS, Hook, Pair, TokenKind

Head = Literal[
    "linear",
    "attentive",
    "scalar-mix",
    "efficient",
    "abmil",
    "simpool",
    "aim",
    "v-jepa",
    "v-jepa-4",
    "ridge",
    "logistic",
    "knn",
]
HEAD_NAMES: tuple[Head, ...] = get_args(Head)
Stability = Literal["stable", "unstable", "instead of an unstable one"]
"""Whether rounding alone changes the answers of a chosen configuration; or the best had to give way to a stable one."""

STUDY_HEADS: tuple[Head, ...] = ("linear", "attentive")
"""Heads of the study (arXiv 2601.09322); the others are for comparison."""

ABOUT_HEADS: dict[Head, str] = {
    "linear": "one linear map of all tokens",
    "attentive": "cross-attention of one learned query (the study's)",
    "scalar-mix": "one learned weight per token (ELMo, S3PRL)",
    "efficient": "32 learned queries, no keys (efficient probing)",
    "abmil": "gated attention (AbMIL)",
    "simpool": "attention with the mean token as query (SimPool)",
    "aim": "attention pooling of AIM and CoCa",
    "v-jepa": "attentive pooler with an MLP (V-JEPA)",
    "v-jepa-4": "attentive pooler of four blocks (V-JEPA 2)",
    "ridge": "ridge regression in closed form",
    "logistic": "logistic regression at its optimum (CLIP's protocol)",
    "knn": "weighted votes of the nearest training images",
}
"""A short description of each head, for lists."""


# --- names of models ------------------------------------------------------------------------------------------------

Setting = str | int | float | bool | None


@dataclass(frozen=True)
class ModelRef:
    """A reference to a model: its name, and after a colon an optional hook point and changed settings of its configuration.

    'clip-vit-b16:block' reads other tokens than 'clip-vit-b16'; 'clip-vit-b16:hidden_act=gelu' changes the activation.
    """

    name: str  # a catalogue name, a hub id, or a folder
    hook: Hook = "norm2"
    settings: tuple[tuple[str, Setting], ...] = ()  # changed settings, sorted

    def __str__(self) -> str:
        return self.name + self.suffix

    @property
    def suffix(self) -> str:
        """The part after the name, ':block,hidden_act=gelu'; empty at the defaults."""
        parts: list[str] = [self.hook] if self.hook != "norm2" else []
        parts += [f"{key}={setting_text(value)}" for key, value in self.settings]
        return f":{','.join(parts)}" if parts else ""

    def with_defaults(self, hook: Hook | None, settings: Iterable[tuple[str, Setting]]) -> "ModelRef":
        """The same model with this hook point and these settings, unless its name has its own."""
        merged = dict(settings) | dict(self.settings)
        own_hook = self.hook if self.hook != "norm2" else hook or "norm2"
        return ModelRef(self.name, own_hook, tuple(sorted(merged.items())))


def setting_text(value: Setting) -> str:
    """The text of a setting: 0.1 → '0.1', 'gelu' → 'gelu'; text that looks like a number is quoted."""
    return value if isinstance(value, str) and setting_value(value) == value else json.dumps(value)


def setting_value(text: str) -> Setting:
    """'0.1' → 0.1, 'true' → True, 'gelu' → 'gelu'."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (str, int, float, bool)) or value is None else text


# --- layers and tokens -------------------------------------------------------------------------------------


def parse_layers(words: str, depth: int) -> tuple[int, ...]:
    """Parse 'all' (1..L), 'last', or a list such as '1-4,8,12'. Layer 0 is the first block's norm.

    Raises:
        UnknownName: a word is not a layer of a model of this depth.
    """
    layers: set[int] = set()
    for word in (part.strip() for part in words.split(",")):
        if word == "all":
            layers.update(range(1, depth + 1))
        elif word == "last":
            layers.add(depth)
        elif (match := re.fullmatch(r"(\d+)(?:-(\d+))?", word)) and int(match[2] or match[1]) <= depth:
            layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
        else:
            raise UnknownName("layer", word, ["all", "last", f"0-{depth}", "1,6,12"])
    if not layers:
        raise MlfusionError(f"{words!r} names no layer; allowed: all, last, or a list such as 1-4,{depth}")
    return tuple(sorted(layers))


def parse_tokens(words: str | Iterable[str], layers: str, depth: int) -> frozenset[Pair]:
    """Parse token kinds → {(layer, kind), …}, at `layers` or at the layers after an '@', as in 'cls,ap,all@last'."""
    parts = words.split(",") if isinstance(words, str) else list(words)
    # A comma also separates the layers of one kind ('all@6,12'): a part that begins with a digit belongs to the last '@'.
    joined: list[str] = []
    for part in (p.strip() for p in parts):
        if joined and "@" in joined[-1] and re.match(r"\d", part):
            joined[-1] += "," + part
        else:
            joined.append(part)
    pairs: set[Pair] = set()
    for part in joined:
        kinds, _, own = part.partition("@")
        for kind in kinds.split("+"):
            if kind not in KINDS:
                raise UnknownName("token kind", kind, KINDS)
            pairs.update((layer, kind) for layer in parse_layers(own or layers, depth))
    return frozenset(pairs)


def token_words(pairs: Iterable[Pair]) -> str:
    """{(1, 'cls'), (1, 'ap'), (2, 'ap')} → 'cls@1,ap@1-2', for `parse_tokens`."""
    layers_of: dict[TokenKind, set[int]] = {}
    for layer, kind in pairs:
        layers_of.setdefault(kind, set()).add(layer)
    groups: dict[str, list[TokenKind]] = {}
    for kind in KINDS:
        if kind in layers_of:
            groups.setdefault(layer_ranges(layers_of[kind]), []).append(kind)
    return ",".join(f"{'+'.join(kinds)}@{layers}" for layers, kinds in groups.items())


def layer_ranges(layers: Iterable[int]) -> str:
    """{1, 2, 3, 6} → '1-3,6', for `parse_layers`."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


# --- representations and probes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Representation:
    """The tokens and layers that a probe reads, for example `cls+ap-all-layers`."""

    kinds: tuple[TokenKind, ...]
    at: str  # "last", "all-layers", "layer-7", "layers-6,9,12", or "N-layers": N evenly spaced layers

    @property
    def name(self) -> str:
        """The name in the study's tables: 'all-tokens-last', 'cls+ap-4-layers'."""
        return f"{'all-tokens' if self.kinds == ('all',) else '+'.join(self.kinds)}-{self.at}"

    @property
    def spatial(self) -> bool:
        """Whether it has many tokens per layer: all of them, or a grid."""
        return any(kind == "all" or kind in GRID_SIDES for kind in self.kinds)

    def layers(self, depth: int) -> tuple[int, ...]:
        """The layers for a model of `depth` blocks: with 12, '2-layers' are 6 and 12, '4-layers' 3, 6, 9 and 12."""
        if self.at == "last":
            return (depth,)
        if self.at == "all-layers":
            return tuple(range(1, depth + 1))
        if self.at.startswith("layers-"):
            return parse_layers(self.at.removeprefix("layers-"), depth)
        count = int(re.sub(r"\D", "", self.at))
        if self.at.startswith("layer-"):
            if count > depth:
                raise UnknownName("layer", self.at, [f"layer-0 … layer-{depth}"])
            return (count,)
        return tuple(sorted({-(-depth * k // count) for k in range(1, count + 1)}))

    def pairs(self, depth: int) -> frozenset[Pair]:
        """Every (layer, kind) that this representation reads."""
        return frozenset((layer, kind) for layer in self.layers(depth) for kind in self.kinds)


@dataclass(frozen=True)
class Probe:
    """A representation and the head that is trained on it: `cls+ap-all-layers/attentive` is ALF."""

    representation: Representation
    head: Head
    heads: int | None = None  # number of attention heads; None: the study's

    @property
    def name(self) -> str:
        """'representation/head' as in the study's tables, with a suffix such as ':h8' for eight attention heads."""
        return f"{self.representation.name}/{self.head}{f':h{self.heads}' if self.heads else ''}"

    def attention_heads(self) -> int | None:
        """Number of attention heads: the given or the study's number; None: one for each token."""
        return self.heads or (SPATIAL_HEADS if self.representation.spatial else None)


SPATIAL_HEADS = 8
"""Number of attention heads over all tokens or a grid; other representations have one head per token (as in the study)."""

ALL_LAYERS = "cls+ap-all-layers"
MOST_LAYERS = 9999  # in a name, before the model's depth is known
BASELINE = "cls-last/linear"
ALIASES = {"alf": f"{ALL_LAYERS}/attentive", "aat": "all-tokens-last/attentive"}
STUDY = (
    BASELINE,
    "cls+ap-last/linear",
    "cls+ap-last/attentive",
    "cls+ap-2-layers/linear",
    "cls+ap-2-layers/attentive",
    "cls+ap-4-layers/linear",
    "cls+ap-4-layers/attentive",
    "cls+ap-all-layers/linear",
    "cls+ap-all-layers/attentive",
    "all-tokens-last/attentive",
)
"""The study's ten probes; others follow the same grammar, such as `ap-layer-7/linear`."""

_JOINED = "|".join(REDUCED_KINDS)
_PROBE = re.compile(
    rf"(?P<kinds>all-tokens|(?:{_JOINED})(?:\+(?:{_JOINED}))*)-"
    r"(?P<at>last|all-layers|each-layer|[1-9]\d*-layers|layer-\d+|layers-\d[\d,-]*)"
    r"/(?P<head>[\w-]+)(?::h(?P<heads>[1-9]\d*))?"
)
_COMMA = re.compile(r",(?!\s*\d)(?![^{]*\})")  # outside of braces; before a digit it separates layers of one probe
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_braces(words: str | Iterable[str]) -> list[str]:
    """Expand braces as a shell does: 'a-{b,c}/{d,e}' → a-b/d, a-b/e, a-c/d, a-c/e. Text is first split at commas.

    A comma before a digit does not split: 'ridge,cls-layers-6,9/linear' are two.
    """
    parts = _COMMA.split(words) if isinstance(words, str) else list(words)
    expanded: list[str] = []
    for word in parts:
        if match := _BRACES.search(word):
            around = word[: match.start()], word[match.end() :]
            expanded += expand_braces([part.strip().join(around) for part in match[1].split(",")])
        else:
            expanded.append(word.strip())
    return expanded


def full_name(word: str) -> str:
    """The full name of a probe: of an alias ('alf', 'alf:h8'), or of a head, which reads CLS and AP of all layers ('ridge')."""
    short, colon, heads = word.partition(":")
    if short.lower() in ALIASES:
        return ALIASES[short.lower()] + colon + heads
    return f"{ALL_LAYERS}/{word}" if short in HEAD_NAMES else word


def parse_probes(names: str | Sequence[str], depth: int) -> tuple[Probe, ...]:
    """Parse names, aliases ('alf', 'aat') or 'all' (the study's ten) → probes; 'cls-each-layer/linear' is one per layer.

    'cls+ap-{last,all-layers}/{linear,attentive}' are four, 'alf:h8' is ALF with eight attention heads.

    Raises:
        UnknownName: a name or layer does not exist; the message has the nearest names.
    """
    probes: dict[Probe, None] = {}
    for word in expand_braces(names):
        for name in STUDY if word == "all" else (full_name(word),):
            match = _PROBE.fullmatch(name)
            if not match or match["head"] not in HEAD_NAMES or (match["heads"] and match["head"] != "attentive"):
                grammar = (
                    "Others: KINDS-LAYERS/HEAD, as ap-layer-7/linear, cls+ap-layers-6,9,12/linear or cls-each-layer/linear; or "
                    "HEAD alone, on CLS and AP of all layers; heads: "
                )
                raise UnknownName(
                    "probe",
                    word,
                    [*STUDY, *ALIASES, *HEAD_NAMES, "all"],
                    otherwise=f"{grammar}{', '.join(HEAD_NAMES)}; attentive:h8 has eight attention heads.",
                )
            words = ["all"] if match["kinds"] == "all-tokens" else match["kinds"].split("+")
            kinds = tuple(kind for kind in KINDS if kind in words)
            every_layer = [f"layer-{n}" for n in range(1, depth + 1)]
            positions = every_layer if match["at"] == "each-layer" else [_layers_name(match["at"])]
            count = int(match["heads"]) if match["heads"] else None
            probes.update({Probe(Representation(kinds, at), match["head"], count): None for at in positions})
    for probe in probes:
        probe.representation.layers(depth)  # raises for a layer that the model lacks, before a run starts
    return tuple(probes)


def _layers_name(at: str) -> str:
    """One name for one choice of layers: 'layers-9,6,7' → 'layers-6-7,9', 'layers-6' → 'layer-6'."""
    if not at.startswith("layers-"):
        return at
    layers = parse_layers(at.removeprefix("layers-"), MOST_LAYERS)
    return f"layers-{layer_ranges(layers)}" if len(layers) > 1 else f"layer-{layers[0]}"
