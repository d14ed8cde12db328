"""Specifications that identify models, data and features, and the names of their parts. Nothing here does I/O.

Two specs are equal if and only if they give the same numbers. `digest` hashes exactly the fields that `==` compares, so
equality and identity on disk agree. Names are not compared (`compare=False`): a renamed catalogue row changes no key.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta

FORMAT = 3
"""Version of the key and of the layout on disk; readers reject newer versions. From 3 on, older ones are read and reused."""

MAX_PIXELS = 178_956_970
"""Default of the largest image: Pillow's limit against decompression bombs."""

Dtype = Literal["float16", "bfloat16", "float32", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
"""Storage types of the cache; int8 has one scale per token."""

Compute = Literal["float32", "bfloat16", "float16"]
COMPUTES: tuple[Compute, ...] = get_args(Compute)
"""Types of the forward pass, its weights and activations; tokens are averaged in float32."""

TokenKind = Literal["cls", "ap", "registers", "dist", "max", "std", "grid2", "grid4", "grid7", "all"]
KINDS: tuple[TokenKind, ...] = get_args(TokenKind)
STUDY_KINDS: tuple[TokenKind, ...] = ("cls", "ap")
"""Kinds that the study (arXiv 2601.09322) fuses over layers."""

REDUCED_KINDS: tuple[TokenKind, ...] = tuple(kind for kind in KINDS if kind != "all")
"""Kinds that a probe may join by '+'; 'all' stands alone."""

ABOUT_KINDS: dict[TokenKind, str] = {
    "cls": "the class token",
    "ap": "the mean of the patch tokens",
    "registers": "the register tokens",
    "dist": "DeiT's distillation token",
    "max": "the maximum over the patch tokens, channel by channel",
    "std": "the standard deviation over the patch tokens, channel by channel",
    "grid2": "2 x 2 means of the patch tokens, in raster order",
    "grid4": "4 x 4 means of the patch tokens, in raster order",
    "grid7": "7 x 7 means of the patch tokens, in raster order",
    "all": "every token, in the model's own order",
}
"""A short description of each token kind, for lists."""

GRID_SIDES: dict[TokenKind, int] = {"grid2": 2, "grid4": 4, "grid7": 7}
"""Token kinds that are a grid of pooled patch tokens → the side of the grid."""

Hook = Literal["norm2", "block", "attn", "mlp", "projected"]
HOOKS: tuple[Hook, ...] = get_args(Hook)
ABOUT_HOOKS: dict[Hook, str] = {
    "norm2": "the second norm inside each block, and the final norm: the study's choice and the default",
    "block": "the output of each block, before any norm",
    "attn": "the output of each block's attention, before the residual sum",
    "mlp": "the output of each block's MLP, before the residual sum",
    "projected": "norm2, with the last layer projected to the space that images share with texts (CLIP)",
}
"""A short description of each hook point, for lists."""

Pair = tuple[int, TokenKind]
"""(layer, token kind): the unit in which features are requested, stored and computed."""


# What a record from a stranger may say; creating a spec checks nothing, reading one from a record does.
Text = Annotated[str, Meta(max_length=100_000)]
Name = Annotated[str, Meta(max_length=10_000)]
Depth = Annotated[int, Meta(ge=1, le=10_000)]
Width = Annotated[int, Meta(ge=1, le=1 << 20)]
Images = Annotated[int, Meta(ge=0, le=1 << 40)]

OMIT_IF_DEFAULT = {"omit_if_default": True}
"""Metadata of a field that was added later: digests omit its default, so that existing keys stay the same."""


def digest(value: Any, length: int = 16) -> str:
    """The SHA-256 of a value's canonical JSON, as hex digits; the same on every machine and in every process."""
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _plain(value: Any) -> Any:
    """JSON of a spec: the name of its type and the compared fields, without those to omit."""
    if isinstance(value, (str, int, float)) or value is None:  # first, for speed: there are thousands of ids
        return value
    if dataclasses.is_dataclass(value):
        fields = {
            f.name: _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.compare and not ("omit_if_default" in f.metadata and getattr(value, f.name) == f.default)
        }
        return {"type": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [item if type(item) is str else _plain(item) for item in value]
    raise TypeError(f"a {type(value).__name__} has no place in a spec")


@dataclass(frozen=True)
class Decoding:
    """How a data set's images are decoded, where that changes what is read; it stands in the JSON of the preprocessing."""

    exif_transpose: bool = False  # whether images are rotated by their EXIF orientation
    window: tuple[int, int] | None = None  # values of 16 bits that become 0 and 255; None: the high byte is used
    max_pixels: int = MAX_PIXELS  # larger images are refused, or skipped


AS_STORED = Decoding()


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A frozen backbone with its preprocessing, hook point and compute type, which decide an image's tokens."""

    weights: Name  # sha256 of the weight files
    revision: Name | None  # commit on the hub; None for a folder
    config: Name  # digest of the architecture's configuration
    preprocess: Text  # canonical JSON of the preprocessing
    hook: Hook = "norm2"  # position in each block where tokens are read
    compute: Compute = "float32"  # precision of the forward pass
    depth: Depth  # L, the number of blocks: layers are 1..L, L being the final norm
    width: Width  # D, the channels of a token
    name: Name = field(compare=False)
    family: Name = field(compare=False)  # transformers' model_type
    view: Name = field(default="plain", compare=False)  # the view in `preprocess`
    # Token kinds of the last layer; empty: not known yet.
    kinds: tuple[TokenKind, ...] = field(default=(), compare=False)


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """One split of a data set: its images, their order and their labels."""

    content: Name  # digest of the ids, image bytes and labels of all rows, in order
    split: Name
    images: Images
    classes: tuple[Text, ...]
    resplit: Name = field(default="", metadata=OMIT_IF_DEFAULT)  # ratio and seed of --split-ratio: '0.8/0.2 seed 0'
    name: Name = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """One entry of the cache. Layers and token kinds are streams of the entry, not part of its key."""

    model: ModelSpec
    data: DataSpec
    dtype: Dtype = "float16"
    format: int = FORMAT

    @property
    def key(self) -> str:
        """The name of the entry: 16 hex digits, the same on every machine."""
        return digest(self)
