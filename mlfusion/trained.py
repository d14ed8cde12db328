"""A trained probe as a folder: its numbers as safetensors, and a card that says what they were made of and how good they are.

Nothing in it is executed when it is read. The card names the backbone by the digests of its weights, architecture and
preprocessing, so that the probe is never put on top of another.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mlfusion import disk
from mlfusion.errors import ResultsUnusable, UnknownName
from mlfusion.exact import Neighbourhood, Neighbours, Solved
from mlfusion.probes import PROBES, Probe, Shape
from mlfusion.specs import DTYPES, HEADS, KINDS, Head
from mlfusion.targets import KINDS as TARGETS
from mlfusion.targets import OneClass, Target

FORMAT = 1
CARD, TENSORS = "card.json", "probe.safetensors"


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What a probe was trained on top of; the digests decide, the names are for people."""

    name: str
    source: str  # hub id, 'embedded:…', or a folder
    weights: str  # sha256 of the weight files
    config: str  # digest of the architecture
    preprocess: str  # digest of the processor's settings
    hook: str
    compute: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """Everything about a probe but its numbers."""

    probe: str  # "cls+ap-all-layers/attentive"
    head: Head
    shape: dict[str, int]  # tokens, width, classes, heads
    target: dict[str, Any]  # kind, and the fields of that kind
    classes: list[str]
    backbone: Backbone
    layers: list[int]
    kinds: list[str]
    dtype: str  # in which the features were kept, and new ones are rounded to
    features: list[str]  # cache keys: train, test
    dataset: str
    seed: int
    selected: dict[str, float | int]
    metric: str
    scores: dict[str, float]  # val, test, train
    versions: dict[str, str]
    code: str
    created: str

    @property
    def goal(self) -> Target:
        """The target that the probe was trained for."""
        fields = dict(self.target)
        return TARGETS[fields.pop("kind")](**fields)


def describe(target: Target) -> dict[str, Any]:
    """A target, as a card has it."""
    return {"kind": target.kind, **asdict(target)}


def save(folder: Path, card: Card, weights: Mapping[str, np.ndarray]) -> None:
    """Write a probe, whole or not at all; one that is there already is left alone.

    Args:
        folder: what is to hold it; folders above are made.
        card: about it.
        weights: parameters and statistics of one configuration, by name.

    Raises:
        ResultsUnusable: the folder cannot be written.
    """
    tensors = save_tensors({name: np.array(value, order="C") for name, value in weights.items()})
    body = {"format": FORMAT, "tensors": hashlib.sha256(tensors).hexdigest(), **asdict(card)}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = disk.draft_name(folder.parent)
        draft.mkdir()
        try:
            (draft / TENSORS).write_bytes(tensors)
            disk.flush(draft / TENSORS)
            disk.write(draft / CARD, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
        except OSError:
            disk.remove(draft)
            raise
        disk.publish_folder(draft, folder)
    except OSError as err:
        raise ResultsUnusable(
            f"cannot save a probe in {str(folder)!r}: {err.strerror or err}. Make room there or allow writing, or name "
            "another folder with --results PATH, and run it again"
        ) from err


def load(folder: Path) -> tuple[Card, Probe]:
    """Read a probe, in evaluation mode, as a population of one.

    Raises:
        ResultsUnusable: there is none, it is damaged, or from a newer version.
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
        raise ResultsUnusable(f"{folder / CARD} cannot be read ({err}); {AGAIN}") from err
    number = body.get("format") if isinstance(body, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise ResultsUnusable(
            f"{folder} is of format {number}; this version reads up to {FORMAT}. Update mlfusion: pip install -U mlfusion"
        )
    if number != FORMAT or body.get("tensors") != hashlib.sha256(tensors).hexdigest():
        raise ResultsUnusable(f"{folder} is damaged: {TENSORS} is not the one that {CARD} names; {AGAIN}")
    try:
        fields = {name: value for name, value in body.items() if name not in ("format", "tensors")}
        card = Card(**fields | {"backbone": Backbone(**fields["backbone"])})
        probe = _build(card, load_tensors(tensors))
    except (TypeError, KeyError, ValueError, RuntimeError, AttributeError, UnknownName, SafetensorError) as err:
        raise ResultsUnusable(f"{folder} holds no probe that can be built ({_first_line(err)}); {AGAIN}") from err
    probe.eval()
    return card, probe


AGAIN = "make it again with `mlfusion probe --save` and a fresh --results PATH"


def _build(card: Card, tensors: Mapping[str, np.ndarray]) -> Probe:
    """The probe that a card describes, with these numbers."""
    for kind, word, known in (("head", card.head, HEADS), ("dtype", card.dtype, DTYPES)):
        if word not in known:
            raise UnknownName(kind, word, known)
    if unknown := set(card.kinds) - set(KINDS):
        raise UnknownName("token kind", unknown.pop(), KINDS)
    shape, target = Shape(**card.shape), card.goal
    if isinstance(target, OneClass) and len(card.classes) != shape.classes:
        raise ValueError(f"{len(card.classes)} classes for {shape.classes} outputs")
    held = {name: torch.from_numpy(value)[None] for name, value in tensors.items()}
    if card.head in ("ridge", "logistic"):
        if held["weight"].shape != (1, shape.classes, shape.tokens * shape.width):
            raise ValueError(f"weights of shape {tuple(held['weight'].shape[1:])}")
        return Solved(held["weight"], held["bias"])
    if card.head == "knn":
        chosen = Neighbourhood(int(tensors["neighbours"]), float(tensors["temperature"]))
        bank, values = held["bank"][0], held["values"][0]
        if bank.shape != (len(values), shape.tokens * shape.width) or values.shape[1] != shape.classes:
            raise ValueError(f"{tuple(bank.shape)} neighbours and votes of {tuple(values.shape)}")
        return Neighbours(bank, values, [chosen], target.kind)
    probe = PROBES[card.head](shape, seeds=[0], dropouts=[0.0])
    probe.load_state_dict(held)  # of another shape, or another name: refused
    return probe


def _first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:200]
