"""Records that a stranger forged, their digests made to fit: the right numbers or one sentence, and nothing outside the cache.

A record of a sound cache is changed by a grammar of edits, then everything that reads a cache does so: list, read, verify,
import, and in some trials repair and extract.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sealed import read_json
from workers import NAMES, RUN, extract, numbers, spec

from mlfusion.errors import MlfusionError
from mlfusion.specs.identity import FeatureSpec
from mlfusion.store import Entry
from mlfusion.store.entry import zarr_group
from mlfusion.store.housekeeping import copy_entries, list_entries
from mlfusion.store.verify import verify
from mlfusion.system import disk

IMAGES = 12
RECORDS = ("entry.json", "names/*.json", "runs/*.json", "tokens/*/stream.json", "tokens/*/manifest.json")
RECORDS += ("tokens/*/c/*/commit.json", "../../mlfusion-cache.json")
ODD: list[Any] = [None, True, False, -1, 0, 1, 2, 3, 5, 16, 2**31, 2**63, 2**64, 10**30, 1.5, 1e308, -0.0, [], {}, ""]
ODD += [
    "x",
    "../../planted",
    "/planted",
    "a\x1b]0;b\x07\u202e",
    "\ud800x",
    "\x00",
    "é" * 300,
    "y" * 200_000,
    [[]],
    {"0": "x"},
]
ODD += [list(range(5000)), ["cls", "cls"], ["max"], [0], [3, 2, 1], "int8", "float32", "hdf5", "[", "{}", {"7": 7}]
TEXTS = ("NaN", "Infinity", "1e999", "9" * 5000, "[" * 100_000 + "]" * 100_000, '"\\ud800"', "{", "")


def places(body: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in JSON."""
    yield path
    for key, value in body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ():
        yield from places(value, (*path, key))


def put(body: Any, path: tuple, value: Any) -> Any:
    """JSON with another value at a path."""
    if not path:
        return value
    body = body.copy()
    body[path[0]] = put(body[path[0]], path[1:], value)
    return body


def take(body: Any, path: tuple) -> Any:
    for key in path:
        body = body[key]
    return body


def forged(body: dict[str, Any], random: np.random.Generator) -> str:
    """The text of a record after one to three edits."""
    hole = "the hole"
    for _ in range(int(random.integers(1, 4))):
        found = [path for path in places(body) if path]
        path = found[int(random.integers(len(found)))]
        owner = take(body, path[:-1])
        match int(random.integers(8)):
            case 0 if isinstance(owner, dict):
                body = put(body, path[:-1], {key: value for key, value in owner.items() if key != path[-1]})
            case 1 if isinstance(owner, dict):
                body = put(body, path[:-1], {**owner, "more": ODD[int(random.integers(len(ODD)))]})
            case 2:
                body = put(body, path, take(body, found[int(random.integers(len(found)))]))
            case 3 if isinstance(owner, list):
                body = put(body, path[:-1], owner * 2)
            case 4 if type(take(body, path)) is int:
                body = put(body, path, max(0, take(body, path) + int(random.choice([-1, 1, 2, 1000]))))
            case 5:
                text = json.dumps(put(body, path, hole), indent=1)
                return text.replace(json.dumps(hole), TEXTS[int(random.integers(len(TEXTS)))])
            case 6 if isinstance(owner, dict) and owner:
                text = json.dumps(put(body, path[:-1], {**owner, hole: take(body, path)}), indent=1)
                return text.replace(json.dumps(hole), json.dumps(path[-1]))  # a key that occurs twice
            case _:
                body = put(body, path, ODD[int(random.integers(len(ODD)))])
        if not body:
            break
    return json.dumps(body, indent=1)


def rename_to_key(folder: Path) -> Path:
    """Give a forged entry the name that its record asks for, where it can be read at all."""
    try:
        key = msgspec.convert(read_json(folder / "entry.json"), FeatureSpec, str_keys=True).key
    except Exception:  # noqa: BLE001 - then the forger had no key either
        return folder
    (folder / "tokens" / "zarr.json").write_text(zarr_group(key))
    return folder.rename(folder.with_name(key))


def read_all(root: Path) -> str:
    """'right', or 'other numbers', of everything that a cache says it holds; MlfusionError if it refuses."""
    for path in sorted((root / "v3").iterdir()):
        entry = Entry(path)
        rows = entry.rows()
        entry.names()
        for layer, kind in sorted(entry.complete_pairs()):
            got = entry.read([layer], [kind])[:, 0]
            if not np.array_equal(got, numbers(rows, layer, kind).astype(np.float16)):
                return "other numbers"
    return "right"


def listed(root: Path) -> str:
    return "right" if not list_entries(root).damaged else "one sentence"


def verified(root: Path) -> str:
    return "one sentence" if verify(root).damaged else "right"


def imported(root: Path) -> str:
    target = root.with_name("target")
    shutil.rmtree(target, ignore_errors=True)
    copy_entries(root, target)
    return read_all(target)


def repaired(root: Path) -> str:
    verify(root, repair=True)
    extract(root, images=IMAGES)
    return read_all(root)


def outcome(act: Callable[[Path], str], root: Path) -> str:
    try:
        return act(root)
    except MlfusionError as err:
        return "one sentence" if "\n" not in str(err) else "traceback"
    except Exception as err:  # noqa: BLE001 - that is what is looked for
        return f"traceback: {type(err).__name__}: {err}"


def outside(folder: Path) -> dict[str, int]:
    """What lies beside the cache, without the targets of imports."""
    return {
        str(path): path.lstat().st_mtime_ns
        for top in folder.iterdir()
        if top.name not in ("cache", "target")
        for path in (top, *top.rglob("*"))
    }


@pytest.mark.slow
def test_forged_records(many, trial, figures, tmp_path, monkeypatch):
    """Never a traceback, never other numbers, nothing outside; and `verify` finds whatever a reader cannot use."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    root, sound = tmp_path / "cache", tmp_path / "sound"
    entry = extract(sound, images=IMAGES)
    entry.record_run(RUN)
    entry.add_alias(msgspec.structs.replace(NAMES, split="train"))
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("kept")
    random, counts = np.random.default_rng(20), Counter[str]()
    shutil.copytree(sound, root)
    before = outside(tmp_path)
    for number in range(many(60, 10_000)):
        folder = root / "v3" / spec(IMAGES).key
        pattern = RECORDS[int(random.integers(len(RECORDS)))]
        file = sorted(folder.glob(pattern))[0] if ".." not in pattern else root / "mlfusion-cache.json"
        text = forged(read_json(file), random)
        file.write_bytes(disk.sealed(text).encode(errors="surrogatepass") if text[:1] == "{" else text.encode())
        if pattern == "entry.json" and random.integers(2):
            folder = rename_to_key(folder)
        acts = [
            listed,
            read_all,
            verified,
            *([imported] if number % 4 == 0 else []),
            *([repaired] if number % 20 == 0 else []),
        ]
        with trial("records forged by a grammar"):
            found = {act.__name__: outcome(act, root) for act in acts}
            if (found["verified"] == "right" and found["read_all"] != "right") or outside(tmp_path) != before:
                found["verify missed it, or outside"] = f"escape: {outside(tmp_path) != before}"
            bad = [name for name, what in found.items() if what not in ("right", "one sentence")]
            counts["right" if set(found.values()) == {"right"} else "one sentence" if not bad else found[bad[0]]] += 1
            assert not bad, (number, file, text[:2000], found)
        if number % 20 == 0 or folder.name != spec(IMAGES).key:
            shutil.rmtree(root)
            shutil.copytree(sound, root)
        else:
            shutil.copy2(sound / file.relative_to(root), file)
    escapes = ("traceback", "written or deleted outside", "other numbers silently")
    figures["records"] = {name: counts[name] for name in ("right", "one sentence", *escapes)}
    assert "one sentence" in counts
    assert read_all(root) == "right"
