"""Saved probes that a stranger forged, their digests made to fit: the answers of the sound one, or one sentence.

The card, or the header of the tensors, is changed by the grammar of `test_records`. A changed card whose digest does not fit
is refused. A card may honestly say that it is another probe, of other sizes or another target; it then only has to answer.
"""

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiers
from msgspec import to_builtins
from test_records import forged
from tiny import save_images, save_model

import mlfusion
from mlfusion.errors import MlfusionError
from mlfusion.probing import grids, protocol
from mlfusion.probing.saved import load, readme
from mlfusion.probing.training.batches import Tokens

sys.path.append(str(Path(__file__).parents[1]))
from test_trained import SHORT, sealed_digest

PROBES = "cls-last/linear,cls+ap-2-layers/attentive,cls-last/ridge,cls+ap-all-layers/knn"
OF_THE_HEAD = ("head", "shape", "target", "layers", "kinds", "classes")
WITH_BACKBONE = 25  # one trial of so many loads the backbone too, and predicts an image
ENDS = ("right", "another probe, as its card says", "one sentence", "traceback", "other numbers silently")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved probe of every kind of head, and under 'image' an image to predict."""
    root = tmp_path_factory.mktemp("cards")
    model, images = save_model("vit", root / "tiny-vit"), save_images(root / "colours", {"train": 8, "test": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grids.SEARCH_GRIDS, "quick", SHORT)
        where = {"cache": root / "cache"}
        mlfusion.extract(str(model), str(images), **where)
        where |= {"results": root / "results"}
        done = mlfusion.probe(str(images), probes=PROBES, grid="quick", seeds=(0,), save=True, **where)
    folders = {row.probe: root / "results" / "probes" / row.id for row in done.rows}
    return folders | {"image": next((images / "test").rglob("*.png"))}


def forge(folder: Path, random: np.random.Generator) -> bool:
    """Change the card or the header of the tensors; whether the digests fit."""
    card, tensors = folder / "card.json", folder / "probe.safetensors"
    body = json.loads(card.read_text())
    fits = bool(random.integers(4))
    if random.integers(3):
        text = forged({name: value for name, value in body.items() if name != "sha256"}, random)
    else:
        data = tensors.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = forged(json.loads(data[8 : 8 + length]), random).encode(errors="surrogatepass")
        tensors.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        if fits:
            body["tensors"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
        text = json.dumps(body)
    try:
        changed = json.loads(text)
        changed["sha256"] = sealed_digest(changed) if fits else body["sha256"]
        text = json.dumps(changed)
    except (ValueError, TypeError, RecursionError):
        pass  # then the forger has no digest either
    card.write_bytes(text.encode(errors="surrogatepass"))
    return fits


def outputs(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What a card says of its head, and the head's answers for tokens of noise."""
    card, head = load(folder)
    readme(card)
    values = np.random.default_rng(3).normal(size=(5, card.shape.tokens, card.shape.width)).astype(np.float32)
    answers, _ = protocol.predict(head, Tokens(values, np.zeros(5, np.int64)), card.target())
    fields = to_builtins(card)
    return {name: fields[name] for name in OF_THE_HEAD}, answers


def outcome(folder: Path, want: tuple[dict[str, Any], np.ndarray], fits: bool, image: Path | None) -> str:
    """One of ENDS, or the traceback."""
    try:
        says, answers = outputs(folder)
        if image:
            mlfusion.load_probe(folder).predict(str(image))
    except MlfusionError as err:
        return "one sentence" if "\n" not in str(err) and len(str(err)) < 3000 else f"traceback: {err}"
    except Exception as err:  # noqa: BLE001 - that is what is looked for
        return f"traceback: {type(err).__name__}: {err}"
    if says != want[0]:
        return "another probe, as its card says" if fits and np.isfinite(answers).all() else "other numbers silently"
    return "right" if np.array_equal(answers, want[1]) else "other numbers silently"


@pytest.mark.slow
def test_forged_probes(many, trial, figures, sound, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    random, counts = np.random.default_rng(21), Counter[str]()
    folders = [folder for name, folder in sound.items() if name != "image"]
    wants = {folder: outputs(folder) for folder in folders}
    for number in range(many(200, 10_000)):
        if tiers.LONG and not tiers.in_time():
            break
        source = folders[number % len(folders)]
        copy = Path(shutil.copytree(source, tmp_path / "probe"))
        with trial("saved probes forged by a grammar"):
            fits = forge(copy, random)
            found = outcome(copy, wants[source], fits, sound["image"] if number % WITH_BACKBONE == 0 else None)
            end = found.partition(":")[0]
            counts[end] += 1
            assert end not in ENDS[3:], (number, source, (copy / "card.json").read_text()[:2000], found)
        shutil.rmtree(copy)
    figures["cards"] = {name: counts[name] for name in ENDS}
    assert counts["one sentence"]
