"""What we mean, as frozen values: which model, which images, which tokens, which probe. Nothing here does I/O.

Two specs are equal exactly when they name the same numbers, and `digest` hashes just the fields that `==` compares, so
equality and identity on disk agree by construction. Names are for people (`compare=False`): renaming a catalogue row
empties no cache.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mlfusion.errors import MlfusionError, UnknownName

FORMAT = 2
"""Version of the key and of the layout on disk; an older reader refuses a newer one."""

Dtype = Literal["float16", "bfloat16", "float32", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
"""How the cache keeps a number; int8 keeps a scale with every token's vector."""

Compute = Literal["float32", "bfloat16", "float16"]
COMPUTES: tuple[Compute, ...] = get_args(Compute)
"""In what the forward pass is computed: weights and activations; tokens are averaged in float32."""

TokenKind = Literal["cls", "ap", "registers", "dist", "max", "std", "grid2", "grid4", "grid7", "all"]
KINDS: tuple[TokenKind, ...] = get_args(TokenKind)
ABOUT_KINDS: dict[TokenKind, str] = {
    "cls": "the class token",
    "ap": "the mean of the patch tokens",
    "registers": "the register tokens",
    "dist": "DeiT's distillation token",
    "max": "the maximum over the patch tokens, channel by channel",
    "std": "their standard deviation, channel by channel",
    "grid2": "2 x 2 means of the patch tokens, in raster order",
    "grid4": "likewise 4 x 4",
    "grid7": "likewise 7 x 7",
    "all": "every token, in the model's own order",
}
"""A few words about each kind, for lists."""

GRIDS: dict[TokenKind, int] = {"grid2": 2, "grid4": 4, "grid7": 7}
"""Kinds that are patch tokens pooled to a grid → its side."""

Hook = Literal["norm2", "block", "attn", "mlp", "projected"]
HOOKS: tuple[Hook, ...] = get_args(Hook)
ABOUT_HOOKS: dict[Hook, str] = {
    "norm2": "the second norm inside each block, and the final norm: the study's choice and the default",
    "block": "what each block gives, before any norm",
    "attn": "what each block's attention gives, before it is added",
    "mlp": "what each block's MLP gives, before it is added",
    "projected": "as norm2, but the last layer goes through the projection to the space shared with texts (CLIP)",
}
"""A few words about each hook point, for lists."""

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
HEADS: tuple[Head, ...] = get_args(Head)

ABOUT: dict[Head, str] = {
    "linear": "one linear map of all tokens",
    "attentive": "cross-attention of one learned query (the study's)",
    "scalar-mix": "one learned weight a token (ELMo, S3PRL)",
    "efficient": "32 learned queries, no keys (efficient probing)",
    "abmil": "gated attention (AbMIL)",
    "simpool": "the mean token asks (SimPool)",
    "aim": "attention pooling of AIM and CoCa",
    "v-jepa": "attentive pooler with an MLP (V-JEPA)",
    "v-jepa-4": "the same, four blocks deep (V-JEPA 2)",
    "ridge": "ridge regression, solved for",
    "logistic": "logistic regression, solved for (CLIP's protocol)",
    "knn": "weighted votes of the nearest images",
}
"""A few words about each head, for lists."""

Pair = tuple[int, TokenKind]
"""(layer, token kind): the unit in which features are asked for, held and computed."""


LATER = {"later": True}
"""Metadata of a field that came after the first caches: at its default it is left out of the digest, so their names stay."""


def digest(value: Any, length: int = 16) -> str:
    """Hex digits that name this value on every machine, in every process."""
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _plain(value: Any) -> Any:
    """JSON of a spec: its type's name and the fields that `==` compares, but for later ones at their default."""
    if isinstance(value, (str, int, float)) or value is None:  # most of what there is: thousands of ids
        return value
    if dataclasses.is_dataclass(value):
        fields = {
            f.name: _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.compare and not (f.metadata == LATER and getattr(value, f.name) == f.default)
        }
        return {"type": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [item if type(item) is str else _plain(item) for item in value]
    raise TypeError(f"a {type(value).__name__} has no place in a spec")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A frozen backbone together with everything between the image's bytes and a token's numbers."""

    weights: str  # sha256 of the weight files
    revision: str | None  # commit on the hub; None for a folder
    config: str  # digest of the architecture's configuration
    preprocess: str  # canonical JSON of what is done to a picture
    hook: Hook = "norm2"  # where in each block tokens are read
    compute: Compute = "float32"  # precision of the forward pass
    name: str = field(compare=False)
    family: str = field(compare=False)  # transformers' model_type
    depth: int = field(compare=False)  # L, the number of blocks: layers are 1..L, L being the final norm
    width: int = field(compare=False)  # D, channels of a token
    kinds: tuple[TokenKind, ...] = field(default=(), compare=False)  # that its last layer has; empty: not looked at yet

    @property
    def view(self) -> str:
        """What is shown of each image: 'plain' is all that the model's preprocessing leaves."""
        return str(json.loads(self.preprocess).get("view", "plain"))

    def upright(self) -> "ModelSpec":
        """The same model of images that are turned as their EXIF says: other pictures, another key."""
        turned = {**json.loads(self.preprocess), "exif": "upright"}
        return dataclasses.replace(self, preprocess=json.dumps(turned, sort_keys=True))


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """One split of a data set: which images in which order with which labels."""

    content: str  # digest over every row's id, image bytes and label, in order
    split: str
    images: int
    classes: tuple[str, ...]
    carve: str = field(default="", metadata=LATER)  # how the split was cut, where we cut it: '0.8/0.2 seed 0'
    name: str = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """One entry of the cache. Layers and token kinds are streams inside it, never part of its key."""

    model: ModelSpec
    data: DataSpec
    dtype: Dtype = "float16"
    format: int = FORMAT

    @property
    def key(self) -> str:
        """Sixteen hex digits: the entry's name on every machine."""
        return digest(self)


# --- words for models ------------------------------------------------------------------------------------------------

Setting = str | int | float | bool | None


@dataclass(frozen=True)
class ModelWord:
    """A model as it is asked for: 'clip-vit-b16', or with a hook point and changed settings behind a colon.

    'clip-vit-b16:block' reads it elsewhere, 'clip-vit-b16:hidden_act=gelu' changes its configuration; both are other
    features, and so other names.
    """

    name: str  # of the catalogue, a hub id, or a folder
    hook: Hook = "norm2"
    settings: tuple[tuple[str, Setting], ...] = ()  # of the configuration, sorted

    def __str__(self) -> str:
        return self.name + self.suffix

    @property
    def suffix(self) -> str:
        """':block,hidden_act=gelu', or nothing."""
        parts: list[str] = [self.hook] if self.hook != "norm2" else []
        parts += [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in self.settings]
        return f":{','.join(parts)}" if parts else ""


def parse_model(word: str, hook: str | None = None, settings: Sequence[str] = ()) -> ModelWord:
    """'NAME', 'NAME:HOOK' or 'NAME:key=value,…' → its parts; `hook` and `settings` ('key=value') are added to them.

    Raises:
        UnknownName: no hook point is called so.
    """
    scheme, name = ("embedded:", word.removeprefix("embedded:")) if word.startswith("embedded:") else ("", word)
    name, _, rest = name.partition(":")
    parts = [part.strip() for part in rest.split(",") if part.strip()] + ([hook] if hook else []) + list(settings)
    found: Hook = "norm2"
    changed: dict[str, Setting] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if equals and key:
            changed[key] = _value(value)
        elif part in HOOKS:
            found = part
        else:
            raise UnknownName("hook point", part, HOOKS, otherwise="Or a setting of the model's, as hidden_act=gelu.")
    return ModelWord(scheme + name, found, tuple(sorted(changed.items())))


def _value(text: str) -> Setting:
    """'0.1' → 0.1, 'true' → True, 'gelu' → 'gelu'."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (str, int, float, bool)) or value is None else text


# --- words for layers and tokens -------------------------------------------------------------------------------------


def parse_layers(words: str, depth: int) -> tuple[int, ...]:
    """'all' (1..L), 'last', or a list such as '1-4,8,12'; layer 0, the first block's norm, may be named.

    Raises:
        UnknownName: a word that is no layer of a model of this depth.
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
    """'cls,ap' at every one of `layers`, or with layers of a kind's own: 'cls,ap,all@last' → {(layer, kind), …}."""
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
    """{(1, 'cls'), (1, 'ap'), (2, 'ap')} → 'cls@1,ap@1-2': the words `parse_tokens` reads."""
    layers_of: dict[TokenKind, set[int]] = {}
    for layer, kind in pairs:
        layers_of.setdefault(kind, set()).add(layer)
    groups: dict[str, list[TokenKind]] = {}
    for kind in KINDS:
        if kind in layers_of:
            groups.setdefault(layer_ranges(layers_of[kind]), []).append(kind)
    return ",".join(f"{'+'.join(kinds)}@{layers}" for layers, kinds in groups.items())


def layer_ranges(layers: Iterable[int]) -> str:
    """{1, 2, 3, 6} → '1-3,6': the words `parse_layers` reads."""
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
    """Which tokens of which layers a probe is given, for example `cls+ap-all-layers`."""

    kinds: tuple[TokenKind, ...]
    at: str  # "last", "all-layers", "layer-7", or "N-layers": the N layers that part the depth evenly

    @property
    def name(self) -> str:
        """As in the study's tables: 'all-tokens-last', 'cls+ap-4-layers'."""
        return f"{'all-tokens' if self.kinds == ('all',) else '+'.join(self.kinds)}-{self.at}"

    @property
    def spatial(self) -> bool:
        """Whether it holds many tokens of one layer: all of them, or a grid."""
        return any(kind == "all" or kind in GRIDS for kind in self.kinds)

    def layers(self, depth: int) -> tuple[int, ...]:
        """The layers for a model of `depth` blocks: of 12, '2-layers' are 6 and 12, '4-layers' 3, 6, 9 and 12."""
        if self.at == "last":
            return (depth,)
        if self.at == "all-layers":
            return tuple(range(1, depth + 1))
        count = int(re.sub(r"\D", "", self.at))
        if self.at.startswith("layer-"):
            if count > depth:
                raise UnknownName("layer", self.at, [f"layer-0 … layer-{depth}"])
            return (count,)
        return tuple(sorted({-(-depth * k // count) for k in range(1, count + 1)}))

    def pairs(self, depth: int) -> frozenset[Pair]:
        """Every (layer, kind) this representation reads."""
        return frozenset((layer, kind) for layer in self.layers(depth) for kind in self.kinds)


@dataclass(frozen=True)
class Probe:
    """A representation and the head that is trained on it: `cls+ap-all-layers/attentive` is ALF."""

    representation: Representation
    head: Head
    heads: int | None = None  # of the attention, where another number than the study's is asked for

    @property
    def name(self) -> str:
        """'representation/head', as in the study's tables; with ':h8' behind it, eight attention heads."""
        return f"{self.representation.name}/{self.head}{f':h{self.heads}' if self.heads else ''}"

    def attention_heads(self) -> int | None:
        """Attention heads: those asked for, or the study's number; None is one for each token that is read."""
        return self.heads or (STUDY_HEADS if self.representation.spatial else None)


STUDY_HEADS = 8
"""Attention heads over all tokens or a grid; over any other representation there is one for each token (the study's choice)."""

BASELINE = "cls-last/linear"
ALIASES = {"alf": "cls+ap-all-layers/attentive", "aat": "all-tokens-last/attentive"}
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
"""The study's ten; others follow the same grammar, such as `ap-layer-7/linear`."""

_PROBE = re.compile(
    rf"(?P<kinds>all-tokens|(?:{'|'.join(KINDS[:-1])})(?:\+(?:{'|'.join(KINDS[:-1])}))*)-"
    r"(?P<at>last|all-layers|each-layer|[1-9]\d*-layers|layer-\d+)/(?P<head>[\w-]+)(?::h(?P<heads>[1-9]\d*))?"
)
_BRACES = re.compile(r"\{([^{}]*)\}")


def spelt_out(words: str | Iterable[str]) -> list[str]:
    """Words as a shell would expand them: 'a-{b,c}/{d,e}' → a-b/d, a-b/e, a-c/d, a-c/e. Text is parted at commas first."""
    asked = re.split(r",(?![^{]*\})", words) if isinstance(words, str) else list(words)
    done: list[str] = []
    for word in asked:
        if match := _BRACES.search(word):
            around = word[: match.start()], word[match.end() :]
            done += spelt_out([each.strip().join(around) for each in match[1].split(",")])
        else:
            done.append(word.strip())
    return done


def parse_probes(names: str | Sequence[str], depth: int) -> tuple[Probe, ...]:
    """Names, aliases ('alf', 'aat') or 'all' (the study's ten) → probes; 'cls-each-layer/linear' is one a layer.

    'cls+ap-{last,all-layers}/{linear,attentive}' are four, 'alf:h8' is ALF with eight attention heads.

    Raises:
        UnknownName: with the nearest names.
    """
    probes: dict[Probe, None] = {}
    for word in spelt_out(names):
        alias, _, heads = word.partition(":")
        named = f"{ALIASES[alias.lower()]}:{heads}".rstrip(":") if alias.lower() in ALIASES else word
        for name in STUDY if word == "all" else (named,):
            match = _PROBE.fullmatch(name)
            if not match or match["head"] not in HEADS or (match["heads"] and match["head"] != "attentive"):
                grammar = "Others: KINDS-LAYERS/HEAD, as ap-layer-7/linear or cls-each-layer/linear; heads: "
                raise UnknownName(
                    "probe",
                    name,
                    [*STUDY, *ALIASES, "all"],
                    otherwise=f"{grammar}{', '.join(HEADS)}; attentive:h8 has eight attention heads.",
                )
            words = ["all"] if match["kinds"] == "all-tokens" else match["kinds"].split("+")
            kinds = tuple(kind for kind in KINDS if kind in words)
            ats = [f"layer-{n}" for n in range(1, depth + 1)] if match["at"] == "each-layer" else [match["at"]]
            count = int(match["heads"]) if match["heads"] else None
            probes.update({Probe(Representation(kinds, at), match["head"], count): None for at in ats})
    for probe in probes:
        probe.representation.layers(depth)  # a layer this model does not have is refused here, not in mid-run
    return tuple(probes)
