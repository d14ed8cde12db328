"""The results: append-only rows that survive a kill, each leading home to its features, seed and code.

A folder holds `rows.jsonl`, one JSON object a line, and `arrays/<id>.npz` for what is too long for a line. It lies
apart from the cache, so that deleting the cache loses no result. Reading needs no torch: a report starts at once.
"""

import json
import logging
import math
import os
import re
import types
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np

from mlfusion import disk
from mlfusion.errors import ResultsUnusable

log = logging.getLogger(__name__)

ROWS = "rows.jsonl"
ARRAYS = "arrays"

_ID = re.compile(r"\w[\w.-]*")  # an id is a file name too: it may not lead out of the folder


class Metrics(TypedDict):
    """Scores on the test split, as fractions, of one class an image."""

    balanced_accuracy: float
    accuracy: float
    top5: float
    macro_f1: float
    loss: float  # cross-entropy, nats
    recall: list[float | None]  # one a class, in the order of the row's `classes`; None for one without test images


class LabelMetrics(TypedDict):
    """The same, of several labels an image."""

    mean_average_precision: float
    average_precision: list[float | None]  # one a label; None for one that no test image has
    micro_f1: float
    macro_f1: float
    loss: float  # binary cross-entropy, nats


class NumberMetrics(TypedDict):
    """The same, of a number an image."""

    r2: float
    mae: float  # in the labels' unit
    rmse: float


class Selected(TypedDict, total=False):
    """The hyper-parameters chosen on the validation part; which there are depends on the head."""

    lr: float
    weight_decay: float
    steps: int
    batch_size: int
    dropout: float
    heads: int
    penalty: float  # ridge and logistic
    neighbours: int
    temperature: float


class Images(TypedDict):
    """How many images each split has."""

    train: int
    test: int


class Attention(TypedDict):
    """How attentive probes share their attention among T tokens, averaged over heads; four lists of length T."""

    layers: list[int]
    kinds: list[str]  # "cls", "ap" or "all"
    mean: list[float]  # over the test images
    sd: list[float]  # over the test images


class Row(TypedDict):
    """One probe, trained with one seed on one model's features of one data set, and tested once."""

    id: str
    model: str
    dataset: str
    probe: str  # "cls+ap-all-layers/attentive"
    seed: int
    metric: str  # what val, test and train are: balanced_accuracy, mean_average_precision or r2
    val: float  # of the chosen configuration, on the 20 % of train held out for the choice
    test: float  # looked at once
    train: float
    metrics: Metrics | LabelMetrics | NumberMetrics
    selected: Selected
    grid: Literal["paper", "quick"]
    configurations: int  # tried on the validation part
    parameters: int  # of one probe
    seconds: float
    layers: list[int]  # that the probe reads
    tokens: list[str]  # kinds that the probe reads
    depth: int  # L, the model's blocks
    width: int  # D, channels of a token
    classes: list[str]
    images: Images
    features: list[str]  # cache keys: train, test
    attention: Attention | None
    versions: dict[str, str]
    code: str
    created: str  # ISO 8601
    shots: NotRequired[int]  # images of each class trained on, where not all
    halving: NotRequired[Literal[True]]
    smoothing: NotRequired[float]
    streamed: NotRequired[Literal[True]]  # read in shuffled batches, not loaded
    precision: NotRequired[Literal["bfloat16"]]  # of the matrix products of training, where not float32


class Results:
    """Every row of one folder, safe under several writers; reading again costs only what was appended since."""

    def __init__(self, root: Path | str) -> None:
        """`root` is the folder, or the `.jsonl` file in it. Nothing is created before the first row is saved."""
        root = Path(root)
        self.path = root if root.suffix == ".jsonl" else root / ROWS
        self.root = self.path.parent
        self._forget()

    def _forget(self) -> None:
        self.damaged: list[int] = []  # numbers of the lines that a kill left torn; they stay in the file
        self._rows: dict[str, Row] = {}
        self._bytes = self._lines = 0  # understood so far

    def append(self, row: Row, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Save a row for good, its arrays first: a row that can be read has its arrays.

        Args:
            row: every field of `Row`; a row whose id was saved before takes that one's place.
            arrays: such as probabilities [n_test, C] float16, attention [n_test, T] float16 and labels [n_test].

        Raises:
            ResultsUnusable: the folder cannot be written (read-only, full, not a folder). Nothing half-written is left.
            ValueError: the row or an array is not one that can be read back.
        """
        if fault := _fault(row, Row):
            raise ValueError(f"not a row: {fault}")
        line = json.dumps(row, allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        try:
            if arrays is not None:
                self._save_arrays(row["id"], arrays)
            self._append_line(line)
        except OSError as err:
            raise ResultsUnusable(
                f"cannot save results in {str(self.root)!r}: {err.strerror or err}. Nothing was lost but this row; "
                "make room there or allow writing, or name another folder with --results PATH, and run it again"
            ) from err

    def _save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        if pickled := [key for key, array in arrays.items() if np.asarray(array).dtype.hasobject]:
            raise ValueError(f"arrays of Python objects cannot be read back: {', '.join(pickled)}")
        final = self.root / ARRAYS / f"{name}.npz"
        final.parent.mkdir(parents=True, exist_ok=True)
        draft = final.with_name(f".{name}.{uuid.uuid4().hex[:8]}")
        try:
            with draft.open("xb") as file:
                np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            draft.replace(final)
        finally:
            draft.unlink(missing_ok=True)
        disk.flush(final.parent)

    def _append_line(self, line: bytes) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # a killed writer's torn line stays a line of its own; an empty line is no harm
            # One write() in append mode: lines of several writers follow each other, never interleave.
            if os.write(descriptor, line) != len(line):
                raise OSError("no space left for a whole row")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if fresh:
            disk.flush(self.root)

    def rows(self) -> list[Row]:
        """Every row, oldest first; of those with the same id the last. Empty where nothing was saved yet.

        Raises:
            ResultsUnusable: the file cannot be read, or a whole line of it is no row.
        """
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._bytes:  # deleted and begun anew
                    self._forget()
                file.seek(self._bytes)
                new = file.read()
        except FileNotFoundError:
            self._forget()
            return []
        except OSError as err:
            raise ResultsUnusable(
                f"cannot read results in {str(self.path)!r}: {err.strerror}; allowed: a folder that `mlfusion probe` "
                "wrote (results by default), or the rows.jsonl in it"
            ) from err
        whole = new[: new.rfind(b"\n") + 1]
        for text in whole.splitlines(keepends=True):
            self._take(text, self._lines + 1)
            self._lines += 1
            self._bytes += len(text)
        if new[len(whole) :].strip():
            log.warning("%s ends in a torn line (a killed run's); it is left out", self.path)
        return list(self._rows.values())

    def _take(self, text: bytes, line: int) -> None:
        if not text.strip():
            return
        try:
            row = json.loads(text)
        except ValueError:  # JSON and UTF-8 errors alike
            self.damaged.append(line)
            log.warning("%s line %d is torn (a killed run's); it is left out", self.path, line)
            return
        if fault := _fault(row, Row):
            raise ResultsUnusable(
                f"{self.path} line {line} is no result: {fault}. Rows are written by `mlfusion probe`; move "
                "that line out of the file, or name another folder of results"
            )
        self._rows.pop(row["id"], None)
        self._rows[row["id"]] = row

    def require(self) -> list[Row]:
        """Like `rows`, for a reader that has nothing to say without any.

        Raises:
            ResultsUnusable: there are none; says how to make some.
        """
        if rows := self.rows():
            return rows
        state = "holds no row yet" if self.path.exists() else "does not exist"
        raise ResultsUnusable(
            f"no results: {str(self.path)!r} {state}. Make some with `mlfusion probe --dataset digits --results "
            f"{self.root}`, or name a folder that has them: `mlfusion report RESULTS`"
        )

    def find(self, row_id: str) -> Row | None:
        """The row of that id, None where it was not saved yet."""
        self.rows()
        return self._rows.get(row_id)

    def arrays(self, row: Row) -> dict[str, np.ndarray]:
        """What was saved beside the row: probabilities [n_test, C], attention [n_test, T], labels [n_test].

        Raises:
            ResultsUnusable: nothing was, or it cannot be read.
        """
        path = self.root / ARRAYS / f"{row['id']}.npz"
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
                return {name: held[name] for name in held.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as err:
            what = "were not kept" if isinstance(err, FileNotFoundError) else f"cannot be read ({err})"
            raise ResultsUnusable(
                f"the arrays of result {row['id']} {what}: {path}. Make them again with `mlfusion probe --model "
                f"{row['model']} --dataset {row['dataset']} --probe {row['probe']} --seeds {row['seed']} --results "
                "PATH`, PATH being a fresh folder"
            ) from err


def _fault(value: Any, hint: Any, where: str = "row") -> str | None:
    """What keeps a JSON value from being of the hinted type; None where nothing does. Unknown fields are let be."""
    origin, args = get_origin(hint), get_args(hint)
    if is_typeddict(hint):
        if not isinstance(value, dict):
            return f"{where} is {_shown(value)}, not an object"
        if missing := sorted(hint.__required_keys__ - value.keys()):
            return f"{where} lacks {', '.join(missing)}"
        hints = get_type_hints(hint)
        inside = "" if hint is Row else f"{where}."
        faults = (_fault(value[key], hints[key], inside + key) for key in hints if key in value)
        if hint is Row and isinstance(value["id"], str) and not _ID.fullmatch(value["id"]):
            return f"id {value['id']!r} cannot name a file; allowed: letters, digits, '_', '-' and '.'"
        return next((fault for fault in faults if fault), None)
    if origin in (Union, types.UnionType):
        return None if any(_fault(value, arg, where) is None for arg in args) else _fault(value, args[0], where)
    if origin is Literal:
        return None if value in args else f"{where} is {_shown(value)}; allowed: {', '.join(map(repr, args))}"
    if origin is list:
        if not isinstance(value, list):
            return f"{where} is {_shown(value)}, not a list"
        return next((fault for i, item in enumerate(value) if (fault := _fault(item, args[0], f"{where}[{i}]"))), None)
    if origin is dict:
        if not isinstance(value, dict):
            return f"{where} is {_shown(value)}, not an object"
        return next((fault for key, item in value.items() if (fault := _fault(item, args[1], f"{where}.{key}"))), None)
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return None if number else f"{where} is {_shown(value)}, not a finite number"
    exact = isinstance(value, hint) and not isinstance(value, bool)
    return None if exact else f"{where} is {_shown(value)}, not {'text' if hint is str else 'a whole number'}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
