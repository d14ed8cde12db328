"""A trained probe as a folder: its weights as safetensors, and a card with their origin and scores.

Reading executes nothing. The card names the backbone by the digests of its weights, architecture and
preprocessing, so that the probe is never used with another. A README.md with the Hub's front matter says the same for
readers, so that the folder can be uploaded.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mlfusion.errors import ResultsUnusable, UnknownName, first_line
from mlfusion.probing.heads import HEADS, HeadModule, HeadShape
from mlfusion.probing.solvers.design import FixedLinear
from mlfusion.probing.solvers.neighbours import Neighbourhood, Neighbours
from mlfusion.probing.targets import TARGETS, OneClass, Target
from mlfusion.results import Selected
from mlfusion.specs.identity import DTYPES, KINDS, Dtype, TokenKind
from mlfusion.specs.names import HEAD_NAMES, Head
from mlfusion.system import disk

FORMAT = 2
CARD, TENSORS, README = "card.json", "probe.safetensors", "README.md"


class Backbone(Struct, frozen=True, kw_only=True):
    """The backbone of a probe, identified by the digests; the names are for readers."""

    name: str
    source: str  # hub id, 'embedded:…', or a folder
    weights: str  # sha256 of the weight files
    config: str  # digest of the architecture
    preprocess: str  # digest of the preprocessing
    hook: str
    compute: str
    preparation: str  # the preprocessing itself, as in the features' key


class Card(Struct, frozen=True, kw_only=True):
    """Everything about a probe except its weights."""

    probe: str  # "cls+ap-all-layers/attentive"
    head: Head
    shape: HeadShape
    target_fields: dict[str, Any] = msgspec.field(name="target")  # kind, and the fields of that kind
    classes: tuple[str, ...]
    backbone: Backbone
    layers: tuple[int, ...]
    kinds: tuple[TokenKind, ...]
    dtype: Dtype  # storage type of the features, to which new ones are rounded
    features: tuple[str, str]  # cache keys: train, test
    dataset: str
    seed: int
    selected: Selected
    metric: str
    scores: dict[str, float]  # val, test, train
    versions: dict[str, str]
    code: str
    created: str

    def target(self) -> Target:
        """The target that the probe was trained for."""
        fields = dict(self.target_fields)
        return TARGETS[fields.pop("kind")](**fields)


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
        model_name=f"{card.probe} on {card.backbone.name}",
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=card.dataset,
                dataset_name=card.dataset,
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
    classes = ", ".join(card.classes) if len(card.classes) <= 20 else f"{len(card.classes)}, named in `{CARD}`"
    return f"""---
{data.to_yaml()}
---

# {card.probe} on {card.backbone.name}, trained on {card.dataset}

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
Seed {card.seed}; chosen on the validation part: {selected}. Classes: {classes}. Made {card.created} by mlfusion
{card.versions.get("mlfusion", "")} ({card.code}).
"""


def load(folder: Path) -> tuple[Card, HeadModule]:
    """Read a probe, in evaluation mode, as a population of one.

    Raises:
        ResultsUnusable: there is no probe, it is damaged, or from a newer version.
    """
    try:
        body = json.loads((folder / CARD).read_bytes())
        tensors = (folder / TENSORS).read_bytes()
    except FileNotFoundError as err:
        raise ResultsUnusable(
            f"no probe in {str(folder)!r}; allowed: a folder with {CARD} and {TENSORS}. Make one with `mlfusion probe "
            "--save`, which says where it is"
        ) from err
    except (OSError, ValueError) as err:
        raise ResultsUnusable(f"{folder / CARD} cannot be read ({err}); {REMAKE}") from err
    number = body.get("format") if isinstance(body, dict) else None
    if isinstance(number, int) and number != FORMAT:
        advice = "Update mlfusion: pip install -U mlfusion" if number > FORMAT else REMAKE[0].upper() + REMAKE[1:]
        raise ResultsUnusable(f"{folder} is of format {number}; this version reads format {FORMAT}. {advice}")
    if number is None or body.get("tensors") != hashlib.sha256(tensors).hexdigest():
        raise ResultsUnusable(f"{folder} is damaged: {TENSORS} is not the one that {CARD} names; {REMAKE}")
    try:
        _check_names(body)
        card = msgspec.convert(body, Card)
        probe = _build(card, load_tensors(tensors))
    except (
        TypeError,
        KeyError,
        ValueError,
        RuntimeError,
        msgspec.ValidationError,
        UnknownName,
        SafetensorError,
    ) as err:
        raise ResultsUnusable(f"{folder} holds no probe that can be built ({first_line(err)}); {REMAKE}") from err
    probe.eval()
    return card, probe


REMAKE = "make it again with `mlfusion probe --save` and a fresh --results PATH"


def _check_names(body: dict[str, Any]) -> None:
    """Refuse a card with names that this version does not know.

    Raises:
        UnknownName: lists the names that are allowed.
    """
    names = [("head", body["head"], HEAD_NAMES), ("dtype", body["dtype"], DTYPES)]
    for field, name, known in [*names, *(("token kind", kind, KINDS) for kind in body["kinds"])]:
        if name not in known:
            raise UnknownName(field, name, known)


def _build(card: Card, tensors: Mapping[str, np.ndarray]) -> HeadModule:
    """The probe that a card describes, with these numbers."""
    shape, target = card.shape, card.target()
    if isinstance(target, OneClass) and len(card.classes) != shape.classes:
        raise ValueError(f"{len(card.classes)} classes for {shape.classes} outputs")
    state = {name: torch.from_numpy(value)[None] for name, value in tensors.items()}
    if card.head in ("ridge", "logistic"):
        if state["weight"].shape != (1, shape.classes, shape.tokens * shape.width):
            raise ValueError(f"weights of shape {tuple(state['weight'].shape[1:])}")
        return FixedLinear(state["weight"], state["bias"])
    if card.head == "knn":
        neighbourhood = Neighbourhood(int(tensors["neighbours"]), float(tensors["temperature"]))
        bank, values = state["bank"][0], state["values"][0]
        if bank.shape != (len(values), shape.tokens * shape.width) or values.shape[1] != shape.classes:
            raise ValueError(f"{tuple(bank.shape)} neighbours and votes of {tuple(values.shape)}")
        return Neighbours(bank, values, [neighbourhood], target.kind)
    probe = HEADS[card.head](shape, seeds=[0], dropouts=[0.0])
    probe.load_state_dict(state)  # refuses tensors of another shape or name
    return probe
