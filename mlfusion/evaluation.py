"""Stage 2: cached tokens → probes → rows. Opens no image and no model; a row that is there already is not made again."""

import logging
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache as once
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mlfusion import population, protocol, trackers, trained
from mlfusion.batches import Tokens
from mlfusion.devices import pick_device
from mlfusion.errors import BadData, NotCached, UnknownName
from mlfusion.features import SplitPair, extract_command, impossible, require, split_pairs
from mlfusion.memory import available
from mlfusion.options import Precision, SearchOptions, TrainingOptions
from mlfusion.progress import track as bar_of
from mlfusion.results import Results, Row
from mlfusion.specs import FeatureSpec, Probe, digest, parse_probes, spelt_out
from mlfusion.store import Entry, FeatureStore, Place, TokenReader
from mlfusion.store.encoding import ENCODINGS
from mlfusion.targets import target_of

log = logging.getLogger(__name__)

PROBES = "probes"  # folder of the results that trained probes are kept in

PROTOCOL = 3
"""Part of every row's id: raised when a change of code changes scores, so that old rows are made again."""

AAT_HEADS = 8
"""Of attention over all tokens or a grid; over any other representation it has one a token (the study's choice)."""


@dataclass(frozen=True, eq=False)
class Probed:
    """What a call of `probe` came to."""

    rows: list[Row]
    trained: int  # rows that were not there before
    left_out: list[str]  # probes of 'all' whose tokens are not cached, with what to run


def probe(
    dataset: str,
    *,
    model: str | None = None,
    probes: str | Sequence[str] = "all",
    grid: str = "paper",
    seeds: Sequence[int] = (0, 1, 2),
    shots: Sequence[int | None] = (None,),
    halving: bool = False,
    smoothing: float = 0.0,
    save: bool = False,
    cache: Place = None,
    results: str | os.PathLike[str] = "results",
    device: str = "cpu",
    memory: int | None = None,
    precision: Precision = "auto",
    track: str | Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Probed:
    """Train and test probes on cached features, each by the study's protocol.

    Args:
        dataset: as given to `extract`.
        model: likewise; None is every model whose features of the data set are cached.
        probes: names as in `mlfusion ls probes`, or 'all': those of the study's ten that the cache can serve.
        grid: 'paper' (21 configurations, 63 for attentive probes) or 'quick'.
        seeds: each gives a row; split, initialisation, order, jitter and dropout follow from it.
        shots: train on so many images of each class, drawn by the seed; None is all of them.
        halving: stop configurations without hope early, see `protocol.Training`.
        smoothing: of the labels.
        save: keep every trained probe in RESULTS/probes/ID, for `mlfusion.predict`.
        cache: its root, or layers of them; default $MLFUSION_CACHE, or ./cache.
        results: the folder that rows are kept in.
        device: where to train.
        memory: bytes that a probe's training may take, by default most of what is free. Tokens that take more than half of
            it are not loaded but read in shuffled batches as training goes on.
        precision: of the matrix products of training: 'float32', 'bfloat16', or 'auto', bfloat16 where it is faster here.
        track: where new rows are shown as they are saved, such as 'tensorboard:runs'; see `trackers`.
        say: told what is reused and what is left out, a line each.

    Raises:
        NotCached: says which `mlfusion extract` to run.
        MlfusionError: any other of its kinds.
    """
    if grid not in protocol.SEARCH_GRIDS:
        raise UnknownName("grid", grid, protocol.SEARCH_GRIDS)
    if not 0 <= smoothing < 1:
        raise BadData(f"--smoothing {smoothing:g}; allowed: from 0 to below 1, such as 0.1")
    store, kept, shown = FeatureStore(cache), Results(Path(results)), trackers.opened(track)
    rows: list[Row] = []
    made, left_out = 0, []
    for pair in split_pairs(store, dataset, model):
        word = model or pair.train.names[0].model_source
        chosen, lacking = _servable(pair, probes, word, dataset)
        left_out += lacking
        for line in lacking:
            say(line)
        say(
            f"{pair.model} on {pair.dataset}: features reused from the cache ({pair.train.key}, {pair.test.key}), no "
            "forward pass"
        )
        if pair.older:
            say(f"{pair.older} other sets of features go by these names; those extracted last are used")
        jobs = jobs_of(chosen, seeds, grid, shots=shots, halving=halving, smoothing=smoothing)
        held, new = run(
            pair, jobs, kept, save=save, device=device, memory=memory, precision=precision, shown=shown, say=say
        )
        rows, made = rows + held, made + new
    return Probed(rows, made, left_out)


def run(
    pair: SplitPair,
    jobs: Sequence["Job"],
    kept: Results,
    *,
    save: bool = False,
    device: str = "cpu",
    memory: int | None = None,
    precision: Precision = "auto",
    shown: Sequence[trackers.Tracker] = (),
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Row], int]:
    """The row of each job on these features, made where it is not kept yet; and how many were made.

    Arguments and errors as in `probe`.
    """
    device = pick_device(device)
    limit = int(population.SPARE * available("cpu")) if memory is None else memory
    narrow = population.resolve(precision, device)
    rows: list[Row] = []
    made = 0
    known = {job: kept.find(job.row_id(pair.keys)) for job in jobs}
    lost = {job for job, row in known.items() if row and save and not (_folder(kept, row) / trained.CARD).is_file()}
    if done := sum(row is not None for row in known.values()):
        say(f"{done} of {len(jobs)} results are in {kept.root} already and are not made again")
    if lost:
        say(f"{len(lost)} of them are trained again, since their probes were not kept")
    for job in jobs:
        row = known[job]
        if row is None or job in lost:
            new, arrays, card, weights = _run(pair, job, device, limit, narrow)
            if save:
                trained.save(_folder(kept, new), card, weights)
                say(f"{job.probe.name}, seed {job.seed}, is kept in {_folder(kept, new)}")
            if row is None:
                row = new
                kept.append(row, arrays)
                made += 1
                log.info(
                    "%s seed %d: val %.4f, test %.4f, %.1f s, %s",
                    *(row["probe"], row["seed"], row["val"], row["test"], row["seconds"], row["selected"]),
                )
                for tracker in shown:
                    tracker.log(row)
        rows.append(row)
    return rows, made


@dataclass(frozen=True, eq=False)
class Rerun:
    """A row, and what training it again from what it says gave."""

    row: Row
    again: Row
    differs: list[str]  # in how the two were made: code, versions, the protocol

    @property
    def same(self) -> bool:
        """Scores and choice are the same to the last bit."""
        return all(self.row[name] == self.again[name] for name in ("val", "test", "train", "selected"))


def rerun(
    row_id: str,
    *,
    keep: bool = False,
    cache: Place = None,
    results: str | os.PathLike[str] = "results",
    device: str | None = None,
    memory: int | None = None,
) -> Rerun:
    """Train a row's probe again from the row alone: its features by their keys, its probe, seed, grid and options.

    Args:
        row_id: its id, or the beginning of it.
        keep: where the scores are the same, put arrays and trained probe beside the row if they are not there.
        cache: where the features are, as for `probe`.
        results: where the row is.
        device: where to train; None is where the row was.
        memory: as for `probe`; whether tokens are loaded or streamed is as it was.

    Raises:
        NotCached: the features are gone; says how to make them again.
        UnknownName: no such row.
    """
    store, kept = FeatureStore(cache), Results(Path(results))
    row = kept.named(row_id)
    [one] = parse_probes(row["probe"], row["depth"])
    pair = _pair_of(store, row, one)
    job = Job(
        one,
        row["seed"],
        row["grid"],
        shots=row.get("shots"),
        halving=row.get("halving", False),
        smoothing=row.get("smoothing", 0.0),
    )
    limit = int(population.SPARE * available("cpu")) if memory is None else memory
    where = pick_device(device or row.get("device", "cpu"))
    again, arrays, card, weights = _run(
        pair, job, where, limit, row.get("precision", "float32"), row.get("streamed", False)
    )
    then, now = (
        {"code": made["code"], "device": made.get("device", where), **made["versions"]} for made in (row, again)
    )
    differs = [f"{name} {then[name]} then, {now[name]} now" for name in now if then.get(name, now[name]) != now[name]]
    if row["id"] != again["id"]:
        differs.append(f"protocol {row.get('protocol', 'of an older version')} then, {PROTOCOL} now")
    done = Rerun(row, again, differs)
    if keep and done.same:
        kept.keep_arrays(row, arrays)
        trained.save(_folder(kept, row), card, weights)
    return done


def _pair_of(store: FeatureStore, row: Row, one: Probe) -> SplitPair:
    """The features that a row was made from, by their keys."""
    train, test = (store.by_key(key) for key in row["features"])
    model, dataset, pairs = row["model"], row["dataset"], one.representation.pairs(row["depth"])
    command = extract_command(model, dataset, pairs)
    if "sources" in row:
        model, dataset = row["sources"]["model"], row["sources"]["dataset"]
        command = row["sources"].get("extract", command)
    if train is None or test is None:
        raise NotCached(
            f"the features of result {row['id']} ({', '.join(row['features'])}) are not in {store.root}. Name the cache that "
            f"has them with --cache, or make them again: {command}"
        )
    for entry in (train, test):
        require(entry, pairs, model, dataset)
    return SplitPair(row["model"], row["dataset"], train, test, older=0)


def _servable(pair: SplitPair, names: str | Sequence[str], model: str, dataset: str) -> tuple[list[Probe], list[str]]:
    """The probes asked for. Of 'all', those whose tokens are not cached are left out with a word; others are refused."""
    depth = pair.train.spec.model.depth
    words = spelt_out(names)
    named = parse_probes([word for word in words if word != "all"], depth)
    for one in named:
        for entry in (pair.train, pair.test):
            require(entry, one.representation.pairs(depth), model, dataset)
    chosen, lacking = dict.fromkeys(named), []
    for one in parse_probes("all", depth) if "all" in words else ():
        if absent := one.representation.pairs(depth) - pair.held:
            none = impossible(pair.train.spec.model, absent)
            lacking.append(
                f"{one.name} is left out: {model} {none}"
                if none
                else f"{one.name} is left out, its tokens are not cached; to have it: {extract_command(model, dataset, absent)}"
            )
        else:
            chosen[one] = None
    return list(chosen), lacking


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What changes a result beyond probe, grid and seed; at these values it is as if they were not there."""

    shots: int | None = None
    halving: bool = False
    smoothing: float = 0.0


@dataclass(frozen=True)
class Job(_Options):
    """One row to make."""

    probe: Probe
    seed: int
    grid: str

    def options(self) -> dict[str, Any]:
        """Those that are not as always; a part of the row and of its id."""
        return {f.name: getattr(self, f.name) for f in fields(_Options) if getattr(self, f.name) != f.default}

    def row_id(self, features: tuple[str, str]) -> str:
        """The same features (keys of train and test), probe, grid, seed and options under the same protocol are the same
        result."""
        named = [PROTOCOL, *features, self.probe.name, self.grid, self.seed]
        return digest([*named, self.options()] if self.options() else named)


def jobs_of(
    probes: Iterable[Probe],
    seeds: Sequence[int],
    grid: str,
    *,
    shots: Sequence[int | None] = (None,),
    halving: bool = False,
    smoothing: float = 0.0,
) -> list[Job]:
    """Every row that `probe` makes of one model's features of one data set."""
    return [
        Job(one, seed, grid, shots=count, halving=halving, smoothing=smoothing)
        for count, one, seed in product(shots, probes, seeds)
    ]


def heads_of(one: Probe) -> int | None:
    """Attention heads: those asked for, or the study's number; None is one a token."""
    return one.heads or (AAT_HEADS if one.representation.spatial else None)


def _folder(results: Results, row: Row) -> Path:
    """Where a row's trained probe is kept."""
    return results.root / PROBES / row["id"]


def _run(
    pair: SplitPair, job: Job, device: str, memory: int, precision: Precision, stream: bool | None = None
) -> tuple[Row, dict[str, np.ndarray], trained.Card, dict[str, np.ndarray]]:
    with ExitStack() as opened:
        return _fitted(pair, job, device, memory, precision, stream, opened)


def _fitted(
    pair: SplitPair,
    job: Job,
    device: str,
    memory: int,
    precision: Precision,
    stream: bool | None,
    opened: ExitStack,
) -> tuple[Row, dict[str, np.ndarray], trained.Card, dict[str, np.ndarray]]:
    spec, one = pair.train.spec, job.probe
    train = _tokens(pair.train, one, memory, opened, stream)
    test = lambda: _tokens(pair.test, one, memory, opened)  # noqa: E731
    streamed = isinstance(train.values, TokenReader)
    target = target_of(train.labels, len(spec.data.classes), smoothing=job.smoothing)
    if job.shots is not None:
        train = train.of(protocol.draw(train.labels, job.shots, classes=target.outputs, seed=job.seed))
    with bar_of(f"{one.name} on {pair.dataset}, seed {job.seed}", 1, "steps") as bar:
        outcome = protocol.fit(
            one.head,
            train,
            test,
            target=target,
            options=protocol.FitOptions(
                seed=job.seed,
                heads=heads_of(one),
                search=SearchOptions(grid=job.grid, halving=job.halving, precision=precision),  # type: ignore[arg-type]
            ),
            training=TrainingOptions(
                device=device,
                memory=max(1, memory - (0 if streamed else train.nbytes)) if device == "cpu" else None,
            ),
            progress=bar.to,
        )
    arrays = {
        # Probabilities lose nothing that matters in half the bytes; numbers might, and may be larger than float16 holds.
        "probabilities": outcome.predictions.astype(np.float32 if target.kind == "number" else np.float16),
        "labels": pair.test.samples.labels[pair.test.rows],
    }
    if outcome.attention is not None:
        arrays["attention"] = outcome.attention.astype(np.float16)
    depth = spec.model.depth
    row: Row = {
        "id": job.row_id(pair.keys),
        "model": pair.model,
        "dataset": pair.dataset,
        "probe": one.name,
        "seed": job.seed,
        "metric": outcome.metric,
        "val": outcome.val,
        "test": outcome.test,
        "train": outcome.train,
        "metrics": outcome.metrics,
        "selected": outcome.selected,
        "grid": job.grid,
        "configurations": outcome.configurations,
        "parameters": outcome.parameters,
        "seconds": round(outcome.seconds, 3),
        "layers": list(one.representation.layers(depth)),
        "tokens": list(one.representation.kinds),
        "depth": depth,
        "width": spec.model.width,
        "classes": list(spec.data.classes),
        "images": {"train": len(train), "test": len(pair.test.rows)},
        "features": list(pair.keys),
        "attention": _attention(one, pair.train, outcome.attention),
        "versions": {name: version(name) for name in ("mlfusion", "torch", "numpy", "scikit-learn")},
        "code": _code(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol": PROTOCOL,
        "device": device,
        "bytes": (len(train) + len(pair.test.rows)) * train.shape[1] * _vector_bytes(spec),
        "sources": {
            "model": pair.train.names[0].model_source,
            "dataset": pair.train.names[0].dataset_source,
            "weights": spec.model.weights,
            "train": spec.data.content,
            "test": pair.test.spec.data.content,
            "extract": _command(pair, one),
        },
        **job.options(),  # type: ignore[typeddict-item]
        **({"streamed": True} if streamed else {}),
        **({"precision": precision} if precision != "float32" else {}),
    }
    model, names = spec.model, pair.train.names[0]
    card = trained.Card(
        probe=one.name,
        head=one.head,
        shape=asdict(outcome.shape),
        target=trained.describe(target),
        classes=list(spec.data.classes),
        backbone=trained.Backbone(
            name=names.model,
            source=names.model_source,
            weights=model.weights,
            config=model.config,
            preprocess=digest(model.preprocess),
            hook=model.hook,
            compute=model.compute,
            preparation=model.preprocess,
        ),
        layers=row["layers"],
        kinds=row["tokens"],
        dtype=spec.dtype,
        features=row["features"],
        dataset=pair.dataset,
        seed=job.seed,
        selected=outcome.selected,
        metric=outcome.metric,
        scores={"val": outcome.val, "test": outcome.test, "train": outcome.train},
        versions=row["versions"],
        code=row["code"],
        created=row["created"],
    )
    return row, arrays, card, outcome.weights


def _tokens(entry: Entry, one: Probe, memory: int, opened: ExitStack, stream: bool | None = None) -> Tokens:
    """[images, tokens, width]: layer by layer, in each layer CLS before AP; in memory, or read as training goes on.

    `stream` says which; None is as memory allows.
    """
    layers = one.representation.layers(entry.spec.model.depth)
    rows, samples = entry.rows, entry.samples
    ids = tuple(samples.ids[row] for row in rows)
    reader = opened.enter_context(entry.open(layers, one.representation.kinds))
    tokens = Tokens(reader, samples.labels[rows], ids)
    if stream if stream is not None else tokens.nbytes > memory / 2:
        return tokens
    return Tokens(tokens[:], tokens.labels, ids)


def _command(pair: SplitPair, one: Probe) -> str:
    """What caches the tokens of this probe from the model and the images themselves."""
    names, spec = pair.train.names[0], pair.train.spec
    command = extract_command(
        names.model_source, names.dataset_source, one.representation.pairs(spec.model.depth), spec
    )
    return command if spec.model.view == "plain" else f"{command} --view {spec.model.view}"


def _vector_bytes(spec: FeatureSpec) -> int:
    """What a token takes in the cache."""
    encoding = ENCODINGS[spec.dtype]
    return (spec.model.width + encoding.extra) * encoding.stored.itemsize


def _attention(one: Probe, entry: Entry, attention: np.ndarray | None) -> dict[str, Any] | None:
    """Mean and spread over the test images of the attention on each token, [images, tokens]."""
    if attention is None:
        return None
    layers, kinds = one.representation.layers(entry.spec.model.depth), one.representation.kinds
    homes = entry.sources()
    tokens = [(layer, kind) for layer in layers for kind in kinds for _ in range(homes[layer, kind].stream.tokens)]
    return {
        "layers": [layer for layer, _ in tokens],
        "kinds": [kind for _, kind in tokens],
        "mean": [float(v) for v in attention.mean(0, dtype=np.float64)],
        "sd": [float(v) for v in attention.std(0, dtype=np.float64)],
    }


@once
def _code() -> str:
    """The commit that a checkout is at, with '-dirty' if it was changed; the version where there is no checkout."""
    here = Path(__file__).resolve().parent.parent
    if (here / ".git").exists():
        git = ["git", "-C", str(here), "describe", "--always", "--dirty"]
        said = subprocess.run(git, capture_output=True, text=True, check=False)
        if said.returncode == 0:
            return said.stdout.strip()
    return version("mlfusion")


def check_seeds(words: str) -> tuple[int, ...]:
    """'0,1,2' → (0, 1, 2).

    Raises:
        BadData: not whole numbers from 0, or one twice.
    """
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise BadData(f"--seeds {words!r}; allowed: different whole numbers from 0, such as 0,1,2")
    return tuple(int(part) for part in parts)


def check_shots(words: str) -> tuple[int, ...]:
    """'2,4,8' → (2, 4, 8).

    Raises:
        BadData: not whole numbers from 2, or one twice.
    """
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdecimal() and int(part) > 1 for part in parts) or len(set(parts)) != len(parts):
        raise BadData(
            f"--shots {words!r}; allowed: different whole numbers from 2, one image to fit and one to choose on, such as 2,4,8"
        )
    return tuple(int(part) for part in parts)


def check_precision(word: str) -> Precision:
    """The word, if it is one.

    Raises:
        UnknownName: it is not.
    """
    if word not in get_args(Precision):
        raise UnknownName("precision", word, get_args(Precision))
    return word  # type: ignore[return-value]
