"""A trained probe as a folder: its weights as safetensors, and a card with their origin and scores.

Reading executes nothing. The card names the backbone by the digests of its weights, architecture and
preprocessing, so that the probe is never used with another. A digest binds its fields and the tensors to each other, and the
tensors' header is compared with the card before a head is built. A README.md with the Hub's front matter says the same for
readers, so that the folder can be uploaded.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from msgspec import Meta, Struct
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mlfusion.errors import ResultsUnusable, UnknownName, first_line, printable
from mlfusion.probing.heads import HEADS, HeadModule, HeadShape
from mlfusion.probing.solvers.design import FixedLinear
from mlfusion.probing.solvers.neighbours import Neighbourhood, Neighbours
from mlfusion.probing.targets import TARGETS, Number, Target
from mlfusion.results import Selected
from mlfusion.results.rows import Key, Layer, Name, Place, Score, Seed, Time
from mlfusion.specs.identity import DTYPES, KINDS, Dtype, TokenKind
from mlfusion.specs.names import HEAD_NAMES, Head, parse_probes
from mlfusion.system import disk, memory
from mlfusion.system.regular import opened
from mlfusion.system.text import markdown

FORMAT = 3
READ = (2, 3)  # in 2 the card has no digest of its own
LARGEST_CARD = 2**24  # bytes; that of ten thousand classes has a third of a million
CARD, TENSORS, README = "card.json", "probe.safetensors", "README.md"


class Backbone(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The backbone of a probe, identified by the digests; the names are for readers."""

    name: Name
    source: Place  # hub id, 'embedded:…', or a folder
    weights: Name  # sha256 of the weight files
    config: Name  # digest of the architecture
    preprocess: Name  # digest of the preprocessing
    hook: Name
    compute: Name
    preparation: Annotated[str, Meta(max_length=100_000)]  # the preprocessing itself, as in the features' key


class Card(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a probe except its weights."""

    probe: Name  # "cls+ap-all-layers/attentive"
    head: Head
    shape: HeadShape
    target_fields: dict[str, Any] = msgspec.field(name="target")  # kind, and the fields of that kind
    classes: tuple[str, ...]
    backbone: Backbone
    layers: Annotated[tuple[Layer, ...], Meta(min_length=1)]
    kinds: Annotated[tuple[TokenKind, ...], Meta(min_length=1)]
    dtype: Dtype  # storage type of the features, to which new ones are rounded
    features: tuple[Key, Key]  # cache keys: train, test
    dataset: Name
    seed: Seed
    selected: Selected
    metric: Name
    scores: dict[Literal["val", "test", "train"], Score]
    versions: Annotated[dict[Name, Name], Meta(max_length=100)]
    code: Name
    created: Time
    chosen_on: Place = "the validation part"  # the images that chose; those of older cards are a part of train

    def target(self) -> Target:
        """The target that the probe was trained for.

        Raises:
            ValueError: its fields are not those of a target.
        """
        fields = dict(self.target_fields)
        kind = TARGETS[fields.pop("kind")]
        if unknown := set(fields) - {field.name for field in dataclasses.fields(kind)}:
            raise ValueError(f"a target has no {', '.join(sorted(unknown))}")
        return msgspec.convert(fields, kind)


def is_id(text: str) -> bool:
    """Whether a text has the form of a result's id, or of its beginning."""
    return re.fullmatch(r"r[0-9a-f]{0,15}", text) is not None


def describe(target: Target) -> dict[str, Any]:
    """A target as a card stores it; the names are the card's `classes`."""
    fields = asdict(target)
    del fields["names"]
    return {"kind": target.kind, **fields}


def save(folder: Path, card: Card, weights: Mapping[str, np.ndarray]) -> None:
    """Write a probe, whole or not at all; an existing folder is left as it is.

    `weights` are parameters and statistics of one configuration, by name.

    Raises:
        ResultsUnusable: the folder cannot be written.
    """
    tensors = save_tensors({name: np.array(value, order="C") for name, value in weights.items()})
    body = {"format": FORMAT, "tensors": hashlib.sha256(tensors).hexdigest(), **msgspec.to_builtins(card)}
    body["sha256"] = _digest(body)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with disk.drafted(disk.draft_name(folder.parent)) as draft:
            draft.mkdir()
            (draft / TENSORS).write_bytes(tensors)
            disk.flush(draft / TENSORS)
            disk.write(draft / README, readme(card))
            disk.write(draft / CARD, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
        disk.publish_folder(draft, folder)
    except OSError as err:
        raise ResultsUnusable(
            f"cannot save a probe in {str(folder)!r}: {err.strerror or err}. Make room there or allow writing, or name "
            "another folder with --results PATH, and run it again"
        ) from err


def readme(card: Card) -> str:
    """A model card: front matter with the scores, as the Hub reads it, and how to use the probe.

    A local folder is named by its last part only.
    """
    from huggingface_hub import EvalResult, ModelCardData

    source = card.backbone.source
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    metric = card.metric.replace("_", " ")
    task = "image-feature-extraction" if card.target().kind == "number" else "image-classification"
    data = ModelCardData(
        library_name="mlfusion",
        pipeline_tag=task,
        tags=["mlfusion", "probe", "vision-transformer", card.head],
        base_model=source if on_hub else None,
        model_name=printable(f"{card.probe} on {card.backbone.name}"),
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=printable(card.dataset),
                dataset_name=printable(card.dataset),
                dataset_split="test",
                metric_type=card.metric,
                metric_name=metric,
                metric_value=card.scores["test"],
                verified=False,
            )
        ],
    )
    scores = "".join(f"| {split} | {card.scores[split]:.4f} |\n" for split in ("test", "val", "train"))
    selected = ", ".join(f"{name} {value:g}" for name, value in card.selected.given().items())
    layers = ", ".join(map(str, card.layers))
    names = ", ".join(map(markdown, card.classes))
    classes = names if len(card.classes) <= 20 else f"{len(card.classes)}, named in `{CARD}`"
    title = f"{card.probe} on {markdown(card.backbone.name)}, trained on {markdown(card.dataset)}"
    return f"""---
{data.to_yaml()}
---

# {title}

A probe: a small head on a frozen vision transformer. It reads the {" and ".join(card.kinds)} tokens of layers {layers}; the
backbone itself is not in this folder. `{CARD}` identifies it by the digests of its weights, architecture and preprocessing,
and the probe is used with no other.

```
pip install mlfusion
mlfusion predict --probe FOLDER image.jpg
```

`FOLDER` is this folder. Nothing in it is executed: `probe.safetensors` holds numbers, and `{CARD}` holds text.

| {metric} | |
|---|---:|
{scores}
Seed {card.seed}; chosen on {markdown(card.chosen_on)}: {selected}. Classes: {classes}. Made {card.created} by mlfusion
{markdown(card.versions.get("mlfusion", ""))} ({markdown(card.code)}).
"""


def load(folder: Path) -> tuple[Card, HeadModule]:
    """Read a probe, in evaluation mode, as a population of one.

    Raises:
        ResultsUnusable: there is no probe, it is damaged, or from a newer version.
    """
    try:
        with opened(folder, CARD) as file:
            body = json.loads(file.read(LARGEST_CARD))
        with opened(folder, TENSORS) as file:
            if (size := os.fstat(file.fileno()).st_size) > memory.available():
                raise ValueError(f"{TENSORS} has {size:,} bytes, which is more than the memory that is free")
            tensors = file.read()
    except FileNotFoundError as err:
        raise ResultsUnusable(
            f"no probe in {str(folder.absolute())!r}; allowed: a folder with {CARD} and {TENSORS}, or the id of a result. Make "
            "one with `mlfusion probe --save`, which says where it is"
        ) from err
    except (OSError, ValueError, RecursionError) as err:
        raise ResultsUnusable(f"{folder / CARD} cannot be read ({err}); {REMAKE}") from err
    body = _checked(folder, body, tensors)
    try:
        _check_names(body)
        card = msgspec.convert(body, Card)
        _check_card(card)
        probe = _build(card, _read_tensors(card, tensors))
    except (
        TypeError,
        KeyError,
        ValueError,
        RuntimeError,
        ZeroDivisionError,
        msgspec.ValidationError,
        UnknownName,
        SafetensorError,
    ) as err:
        raise ResultsUnusable(f"{folder} holds no probe that can be built ({first_line(err)}); {REMAKE}") from err
    probe.eval()
    return card, probe


REMAKE = "make it again with `mlfusion probe --save` and a fresh --results PATH"


def _digest(body: Mapping[str, Any]) -> str:
    """The digest of all fields of a card but its own, however they are spaced and ordered."""
    rest = {name: value for name, value in body.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _checked(folder: Path, body: Any, tensors: bytes) -> dict[str, Any]:
    """The fields of a card whose format is known and whose digests fit.

    Raises:
        ResultsUnusable: it is of another format, or a byte of card or tensors was changed.
    """
    number = body.get("format") if isinstance(body, dict) else None
    if isinstance(number, int) and number not in READ:
        advice = "Update mlfusion: pip install -U mlfusion" if number > FORMAT else REMAKE[0].upper() + REMAKE[1:]
        raise ResultsUnusable(f"{folder} is of format {number}; this version reads format {FORMAT}. {advice}")
    if number not in READ or body.get("tensors") != hashlib.sha256(tensors).hexdigest():
        raise ResultsUnusable(f"{folder} is damaged: {TENSORS} is not the one that {CARD} names; {REMAKE}")
    if number == FORMAT and body.get("sha256") != _digest(body):
        raise ResultsUnusable(f"{folder} is damaged: {CARD} does not match its digest; {REMAKE}")
    return {name: value for name, value in body.items() if name not in ("format", "tensors", "sha256")}


def _check_names(body: dict[str, Any]) -> None:
    """Refuse a card with names that this version does not know.

    Raises:
        UnknownName: lists the names that are allowed.
    """
    names = [("head", body["head"], HEAD_NAMES), ("dtype", body["dtype"], DTYPES)]
    for field, name, known in [*names, *(("token kind", kind, KINDS) for kind in body["kinds"])]:
        if isinstance(name, str) and name not in known:  # of another type it is refused with all the card's types
            raise UnknownName(field, name, known)


def _check_card(card: Card) -> None:
    """Compare the fields of a card with each other.

    Raises:
        ValueError: says which fields do not fit.
        UnknownName: its probe or target is none that this version knows.
    """
    shape, target = card.shape, card.target()
    if min(dataclasses.astuple(shape)) < 1 or max(dataclasses.astuple(shape)) > LARGEST_SIZE:
        raise ValueError(f"sizes of {dataclasses.astuple(shape)}; allowed: from 1 to {LARGEST_SIZE:,}")
    if target.outputs != shape.classes or not 0 <= getattr(target, "smoothing", 0.0) < 1:
        raise ValueError(f"a target of {target.outputs} outputs for {shape.classes} of the head")
    if isinstance(target, Number):
        if not (target.deviation > 0 and all(map(math.isfinite, (target.mean, target.deviation, target.origin)))):
            raise ValueError("the target's mean, deviation or origin is no number")
    elif len(card.classes) != shape.classes:
        raise ValueError(f"{len(card.classes)} classes for {shape.classes} outputs")
    if missing := {"val", "test", "train"} - card.scores.keys():
        raise ValueError(f"no score of {min(missing)}")
    if len(set(card.classes)) < len(card.classes):
        raise ValueError("two classes have one name")
    json.dumps(card.classes, ensure_ascii=False).encode()  # half a character is no name
    [probe] = parse_probes([card.probe], max(card.layers))
    read = probe.representation
    if (probe.head, read.kinds, read.layers(max(card.layers))) != (card.head, card.kinds, card.layers):
        raise ValueError(f"head {card.head}, layers {card.layers} and kinds {card.kinds} are not those of {card.probe}")
    tokens = len(card.layers) * len(card.kinds)
    if shape.tokens != tokens if not read.spatial and "registers" not in card.kinds else shape.tokens < tokens:
        raise ValueError(f"{shape.tokens} tokens for {len(card.layers)} layers of {'+'.join(card.kinds)}")


LARGEST_SIZE = 2**24
"""Largest number of tokens, channels, classes or attention heads."""

MAX_HEADER = 2**24  # bytes


def _read_tensors(card: Card, data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a card's probe, whose header is compared with the card before anything is built of its sizes.

    Raises:
        ValueError: they have other names or sizes than the card's head, or hold what is no finite number.
        msgspec.ValidationError: their header is no object of objects.
        SafetensorError: they are no safetensors.
    """
    length = int.from_bytes(data[:8], "little")
    header = msgspec.convert(json.loads(data[8 : 8 + min(length, MAX_HEADER)]), dict[str, dict[str, Any]])
    sizes = {name: tuple(one["shape"]) for name, one in header.items() if name != "__metadata__"}
    for name, size in _expected(card).items():
        if sizes.get(name) != size and (size or name not in sizes):
            raise ValueError(f"{name} of {sizes.get(name, 'no')} size; {card.head} has {size}")
    if unknown := sizes.keys() - _expected(card).keys():
        raise ValueError(f"{card.head} has no tensor named {min(unknown)}")
    tensors = load_tensors(data)
    for name, value in tensors.items():
        if value.dtype.kind == "f" and (value.dtype != np.float32 and card.head != "knn"):
            raise ValueError(f"{name} is of {value.dtype}; allowed: float32")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} holds what is no finite number")
    return tensors


def _expected(card: Card) -> dict[str, tuple[int, ...]]:
    """{name: size} of the tensors of a card's head; () for a size that its sizes do not tell."""
    shape = card.shape
    if card.head in ("ridge", "logistic"):
        return {"weight": (shape.classes, shape.tokens * shape.width), "bias": (shape.classes,)}
    if card.head == "knn":
        return dict.fromkeys(("bank", "values", "neighbours", "temperature"), ())
    with torch.device("meta"):  # takes no memory
        probe = HEADS[card.head](shape, seeds=[0], dropouts=[0.0])
    return {name: tuple(value.shape[1:]) for name, value in probe.state_dict().items()}


def _build(card: Card, tensors: Mapping[str, np.ndarray]) -> HeadModule:
    """The probe that a card describes, with these numbers."""
    shape = card.shape
    state = {name: torch.from_numpy(value)[None] for name, value in tensors.items()}
    if card.head in ("ridge", "logistic"):
        return FixedLinear(state["weight"], state["bias"])
    if card.head == "knn":
        neighbourhood = Neighbourhood(int(tensors["neighbours"]), float(tensors["temperature"]))
        bank, values = state["bank"][0], state["values"][0]
        if bank.shape != (len(values), shape.tokens * shape.width) or values.shape[1] != shape.classes:
            raise ValueError(f"{tuple(bank.shape)} neighbours and votes of {tuple(values.shape)}")
        if not (neighbourhood.neighbours >= 1 and neighbourhood.temperature > 0):
            raise ValueError(f"{neighbourhood.neighbours} neighbours at a temperature of {neighbourhood.temperature}")
        return Neighbours(bank, values, [neighbourhood], card.target().kind)
    probe = HEADS[card.head](shape, seeds=[0], dropouts=[0.0])
    probe.load_state_dict(state)  # refuses tensors of another shape or name
    return probe
