"""A study: every model on every data set of a recipe. First a plan, then both stages for what is missing, then the rows.

What is cached or done is found by its identity, so that a study goes on wherever it was stopped, and one that has grown by a
seed or a data set does only that. A model or a data set that fails costs the others nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mlfusion import models
from mlfusion.errors import MlfusionError
from mlfusion.extraction import plan as plan_module
from mlfusion.extraction.plan import estimate
from mlfusion.extraction.request import Images, Request
from mlfusion.extraction.run import ExtractionResult, fill, load
from mlfusion.models.backbone import Backbone
from mlfusion.probing import costs, evaluation
from mlfusion.probing.jobs import Job, jobs_of
from mlfusion.results import Results, Row
from mlfusion.results.trackers import open_trackers
from mlfusion.specs.identity import GRID_SIDES, FeatureSpec, TokenKind
from mlfusion.specs.options import StorageOptions
from mlfusion.store import FeatureStore
from mlfusion.store.features import SplitPair
from mlfusion.system import disk
from mlfusion.system.progress import duration
from mlfusion.workflows.recipe import Recipe

TRIAL_SECONDS = 2.0  # of forward passes of each model; its rate then stands for all data sets


@dataclass(frozen=True, eq=False)
class Case:
    """One model on one data set: what is asked for, what of it is missing, and what that will take."""

    model: str  # as the recipe says it
    dataset: str
    asked: Request  # of the tokens that are needed still
    jobs: tuple[Job, ...]
    missing: tuple[Job, ...]
    stage_one: plan_module.Plan | None  # None where no token is needed
    extract_seconds: float
    probe_seconds: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.asked.names.model} on {self.asked.names.dataset}"

    @property
    def keys(self) -> tuple[str, str]:
        """Of the features that probes read: train and test."""
        train, test = (spec.key for spec in _read_by_probes(self.asked))
        return train, test

    @property
    def images_to_run(self) -> int:
        """That go through the model."""
        return sum(split.images_to_run for split in self.stage_one.splits) if self.stage_one else 0

    @property
    def forward_passes(self) -> int:
        """Batches of them."""
        return sum(split.forward_passes for split in self.stage_one.splits) if self.stage_one else 0

    @property
    def bytes_to_write(self) -> int:
        """Into the cache."""
        return self.stage_one.bytes_to_write if self.stage_one else 0

    def to_json(self) -> dict[str, Any]:
        """A line of the plan."""
        return {
            "model": self.asked.names.model,
            "dataset": self.asked.names.dataset,
            "images": self.images_to_run,
            "forward_passes": self.forward_passes,
            "bytes": self.bytes_to_write,
            "extract_seconds": round(self.extract_seconds, 1),
            "rows": len(self.missing),
            "rows_done": len(self.jobs) - len(self.missing),
            "probe_seconds": round(self.probe_seconds, 1),
        }


@dataclass(frozen=True)
class Failure:
    """A model on a data set that could not be planned or done."""

    model: str
    dataset: str
    error: str

    def __str__(self) -> str:
        return f"{self.model} on {self.dataset}: {' '.join(self.error.split())}"


@dataclass(frozen=True, eq=False)
class Plan:
    """What is missing of a study, by arithmetic and short measured trials."""

    cases: tuple[Case, ...]
    failures: tuple[Failure, ...]
    free_bytes: int
    storage: StorageOptions  # where features and rows are kept

    @property
    def bytes_to_write(self) -> int:
        """In all."""
        return sum(case.bytes_to_write for case in self.cases)

    @property
    def fits(self) -> bool:
        """Whether the disk has room for it."""
        return self.bytes_to_write <= self.free_bytes

    @property
    def seconds(self) -> float:
        """Of both stages."""
        return sum(case.extract_seconds + case.probe_seconds for case in self.cases)

    @property
    def is_done(self) -> bool:
        """Nothing is missing."""
        return not self.failures and not any(case.missing or case.images_to_run for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion run --dry-run --json` prints."""
        return {
            "cases": [case.to_json() for case in self.cases],
            "failures": [vars(failure) for failure in self.failures],
            "forward_passes": sum(case.forward_passes for case in self.cases),
            "bytes_to_write": self.bytes_to_write,
            "free_bytes": self.free_bytes,
            "fits": self.fits,
            "rows": sum(len(case.missing) for case in self.cases),
            "seconds": round(self.seconds, 1),
        }

    def __str__(self) -> str:
        """The plan in a sentence."""
        if self.is_done:
            return "nothing is missing: every row is there already"
        passes = sum(case.forward_passes for case in self.cases)
        rows = sum(len(case.missing) for case in self.cases)
        every = sum(len(case.jobs) for case in self.cases)
        first = sum(case.extract_seconds for case in self.cases)
        return (
            f"to do: {passes:,} forward passes ({duration(first)}), {self.bytes_to_write / 1e6:,.1f} MB of "
            f"{self.free_bytes / 1e6:,.1f} MB free, {rows:,} of {every:,} rows ({duration(self.seconds - first)}); about "
            f"{duration(self.seconds)} in all, by short trials"
        )


@dataclass(frozen=True, eq=False)
class StudyResult:
    """What a study came to."""

    rows: list[Row]  # in the recipe's order, those made earlier too
    made: int
    extracted: list[ExtractionResult]
    failures: tuple[Failure, ...]


def plan(recipe: Recipe, storage: StorageOptions = StorageOptions(), *, device: str = "auto") -> Plan:
    """Say what of a recipe is missing and what that will take. Reads every image's bytes once; writes nothing.

    Args:
        recipe: what is asked for.
        storage: where features and rows are kept.
        device: device of the forward pass.

    Raises:
        MlfusionError: the cache or the results cannot be read. What cannot be had of the models and data sets is in the plan.
    """
    planner = _Planner(recipe, storage, device)
    cases: list[Case] = []
    failures: list[Failure] = []
    for model, dataset in product(recipe.asked_models, recipe.datasets):
        try:
            cases.append(planner.case(model, dataset))
        except MlfusionError as err:
            failures.append(Failure(model, dataset, str(err)))
    return Plan(tuple(cases), tuple(failures), disk.free_bytes(FeatureStore(storage.cache).root), storage)


class _Planner:
    """What the cases of a plan share: images are read once for all models, a model and its rates serve all data sets."""

    def __init__(self, recipe: Recipe, storage: StorageOptions, device: str) -> None:
        self.recipe, self.cache, self.device = recipe, storage.cache, device
        self._done = {row.id for row in Results(Path(storage.results)).rows()}
        self._images: dict[str, Images | MlfusionError] = {}
        self._rates: dict[str, float] = {}
        self._model = _Loaded()

    def case(self, model: str, dataset: str) -> Case:
        """Raises MlfusionError: the model or the data set cannot be had, or cannot be used so."""
        recipe, images = self.recipe, self._read(dataset)
        asked = Request.of(model, images, recipe.features, replace(recipe.compute, device=self.device))
        spec, tested = _read_by_probes(asked)
        probes, wanted = recipe.asked(spec.model.depth)
        jobs = jobs_of(probes, recipe.search)
        keys = spec.key, tested.key
        missing = tuple(job for job in jobs if not any(one.row_id(keys) in self._done for one in job.answers("cpu")))
        pairs = frozenset(pair for job in missing for pair in job.probe.representation.pairs(spec.model.depth))
        # What is named, tokens or views, is cached though no probe reads it.
        asked = replace(asked, pairs=wanted if recipe.all_tokens or len(recipe.features.views) > 1 else pairs)
        stage_one, seconds = None, 0.0
        if asked.pairs:
            trial = None if model in self._rates else TRIAL_SECONDS
            stage_one = estimate(asked, cache=self.cache, trial=trial, model=self._model)
            if stage_one.images_per_second:
                self._rates[model] = stage_one.images_per_second
            if any(split.images_to_run for split in stage_one.splits):
                seconds = sum(split.images_to_run for split in stage_one.splits) / self._rates[model]
        return Case(
            model=model,
            dataset=dataset,
            asked=asked,
            jobs=tuple(jobs),
            missing=missing,
            stage_one=stage_one,
            extract_seconds=seconds,
            probe_seconds=sum(self._probing(job, asked, len(spec.data.classes)) for job in missing),
        )

    def _read(self, dataset: str) -> Images:
        if dataset not in self._images:
            try:
                self._images[dataset] = Images.of(dataset, self.recipe.features)
            except MlfusionError as err:
                self._images[dataset] = err  # the next model need not try again
        found = self._images[dataset]
        if isinstance(found, MlfusionError):
            raise found
        return found

    @staticmethod
    def _probing(job: Job, asked: Request, classes: int) -> float:
        split, spec = asked.jobs[0].split, asked.jobs[0].spec
        representation = job.probe.representation
        each = sum(_tokens(kind, asked) for kind in representation.kinds)
        return costs.seconds(
            job.probe,
            costs.Problem(
                tokens=len(representation.layers(spec.model.depth)) * each,
                width=spec.model.width,
                classes=classes,
                images=job.shots * classes if job.shots else len(split),
            ),
            job.search,
        )


def _tokens(kind: TokenKind, asked: Request) -> int:
    """Of a kind an image and layer has, reckoned with before the model is loaded; with one token that is no patch."""
    if kind == "all":
        height, width = asked.jobs[0].steps.pixels
        patch = models.shape(asked.checkpoint).patch_px or 16
        return (height // patch) * (width // patch) + 1
    return GRID_SIDES.get(kind, 1) ** 2


def _read_by_probes(asked: Request) -> tuple[FeatureSpec, FeatureSpec]:
    """Train and test as they are, not in another view."""
    train, test = (job.spec for job in asked.jobs if job.steps.view == "plain")
    return train, test


class _Loaded:
    """The model that was asked for last: loaded once for all its data sets."""

    def __init__(self) -> None:
        self._held: tuple[models.Checkpoint, Backbone] | None = None

    def __call__(self, asked: Request) -> Backbone:
        if self._held is None or self._held[0] != asked.checkpoint:
            self._held = asked.checkpoint, load(asked)
        return self._held[1]


def run(planned: Plan, *, log: Callable[[str], None] = lambda _: None) -> StudyResult:
    """Do what a plan says is missing: of each case the tokens first, then the rows.

    Returns:
        Every row that there is now, and why others are not: of a case that failed half-way, what was made is kept.
    """
    storage, model = planned.storage, _Loaded()
    store, results, trackers = FeatureStore(storage.cache), Results(Path(storage.results)), open_trackers(storage.track)
    rows: list[Row] = []
    extracted: list[ExtractionResult] = []
    failures = list(planned.failures)
    made = 0
    for number, case in enumerate(planned.cases, 1):
        if case.missing or case.images_to_run:
            log(f"{number} of {len(planned.cases)}: {case.name}")
        try:
            if case.stage_one:
                extracted += fill(case.asked, cache=storage.cache, log=log, model=model)
            if case.missing:
                pair = _pair(case, store)
                made += evaluation.run(pair, case.missing, results, save=storage.save, trackers=trackers, log=log)[1]
        except MlfusionError as err:
            failures.append(Failure(case.model, case.dataset, str(err)))
        rows += [row for job in case.jobs if (row := evaluation.stored(results, job, case.keys))]
    return StudyResult(rows, made, extracted, tuple(failures))


def _pair(case: Case, store: FeatureStore) -> SplitPair:
    train, test = (store.entry(spec) for spec in _read_by_probes(case.asked))
    assert train is not None and test is not None  # filled just now
    return SplitPair(case.asked.names.model, case.asked.names.dataset, train, test, older=0)
