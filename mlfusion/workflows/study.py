"""Plans and runs a study: every model on every data set of a recipe, through both stages.

Cached features and stored rows are found by their identity, so an interrupted study continues, and a study with a new seed or
data set runs only that. If one model or data set fails, the others still run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mlfusion import models
from mlfusion.errors import BadData, MlfusionError
from mlfusion.extraction import plan as plan_module
from mlfusion.extraction.plan import estimate
from mlfusion.extraction.request import Images, Request
from mlfusion.extraction.request import Job as ExtractionJob
from mlfusion.extraction.run import ExtractionResult, fill, load
from mlfusion.models.backbone import Backbone
from mlfusion.probing import costs, evaluation
from mlfusion.probing.jobs import Job, identity, jobs_of
from mlfusion.results import Results, Row
from mlfusion.results.trackers import open_trackers
from mlfusion.specs.identity import GRID_SIDES, TokenKind
from mlfusion.specs.options import ChooseOn, StorageOptions
from mlfusion.specs.splits import SPLITS
from mlfusion.store import FeatureStore
from mlfusion.store.features import SplitPair
from mlfusion.store.overlap import compared_pair
from mlfusion.system import disk
from mlfusion.system.progress import duration
from mlfusion.system.words import plural
from mlfusion.workflows.recipe import Recipe

TRIAL_SECONDS = 2.0  # duration of the trial of each model, whose rate is used for all data sets


@dataclass(frozen=True, eq=False)
class Case:
    """One model on one data set: the requested work, the missing part of it, and its estimated duration."""

    model: str  # name in the recipe
    dataset: str
    request: Request  # for the tokens of the missing jobs
    choose_on: ChooseOn
    jobs: tuple[Job, ...]
    missing: tuple[Job, ...]
    stage_one: plan_module.Plan | None  # None if no token is needed
    extract_seconds: float
    probe_seconds: float

    @property
    def name(self) -> str:
        """The name in messages."""
        return f"{self.request.names.model} on {self.request.names.dataset}"

    @property
    def features(self) -> tuple[str, ...]:
        """The `identity` of the features that probes read: of train, test, and validation if its images choose."""
        return _identity(_read_by_probes(self.request, self.choose_on))

    @property
    def images_to_run(self) -> int:
        """Number of images to run through the model."""
        return sum(split.images_to_run for split in self.stage_one.splits) if self.stage_one else 0

    @property
    def forward_passes(self) -> int:
        """Number of forward passes, one per batch."""
        return sum(split.forward_passes for split in self.stage_one.splits) if self.stage_one else 0

    @property
    def bytes_to_write(self) -> int:
        """Bytes to write to the cache."""
        return self.stage_one.bytes_to_write if self.stage_one else 0

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this case in a plan."""
        return {
            "model": self.request.names.model,
            "dataset": self.request.names.dataset,
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
    """The error of a model and a data set that could not be planned or run."""

    model: str
    dataset: str
    error: str

    def __str__(self) -> str:
        return f"{self.model} on {self.dataset}: {' '.join(self.error.split())}"


@dataclass(frozen=True, eq=False)
class Plan:
    """The missing work of a study, estimated by arithmetic and short measured trials."""

    cases: tuple[Case, ...]
    failures: tuple[Failure, ...]
    free_bytes: int
    storage: StorageOptions

    @property
    def bytes_to_write(self) -> int:
        """Bytes to write for all cases."""
        return sum(case.bytes_to_write for case in self.cases)

    @property
    def fits(self) -> bool:
        """Whether the disk has enough free space."""
        return self.bytes_to_write <= self.free_bytes

    @property
    def seconds(self) -> float:
        """Estimated duration of both stages."""
        return sum(case.extract_seconds + case.probe_seconds for case in self.cases)

    @property
    def is_done(self) -> bool:
        """Whether nothing is missing."""
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
        computed = plural(passes, "forward pass", "forward passes")
        rows = sum(len(case.missing) for case in self.cases)
        total = sum(len(case.jobs) for case in self.cases)
        extraction = sum(case.extract_seconds for case in self.cases)
        return (
            f"to do: {computed} ({duration(extraction)}), {self.bytes_to_write / 1e6:,.1f} MB of "
            f"{self.free_bytes / 1e6:,.1f} MB free, {rows:,} of {plural(total, 'row')} "
            f"({duration(self.seconds - extraction)}); about {duration(self.seconds)} in all, by short trials"
        )


@dataclass(frozen=True, eq=False)
class StudyResult:
    """The results of a study."""

    rows: list[Row]  # new and stored rows, in the recipe's order
    trained: int  # number of new rows
    extracted: list[ExtractionResult]
    failures: tuple[Failure, ...]


def plan(recipe: Recipe, storage: StorageOptions = StorageOptions(), *, device: str = "auto") -> Plan:
    """List the missing work of a recipe and estimate its duration. Reads every image's bytes once; writes nothing.

    Raises:
        MlfusionError: the cache or the results cannot be read. Errors of models and data sets are in the plan.
    """
    planner = _Planner(recipe, storage, device)
    cases: list[Case] = []
    failures: list[Failure] = []
    for model, dataset in product(recipe.model_refs, recipe.datasets):
        try:
            cases.append(planner.case(model, dataset))
        except MlfusionError as err:
            failures.append(Failure(model, dataset, str(err)))
    return Plan(tuple(cases), tuple(failures), disk.free_bytes(FeatureStore(storage.cache).root), storage)


class _Planner:
    """Shares work between cases: images are read once for all models, a model is loaded and measured once."""

    def __init__(self, recipe: Recipe, storage: StorageOptions, device: str) -> None:
        self.recipe, self.cache, self.device = recipe, storage.cache, device
        results = Results(Path(storage.results))
        # With --save, a row whose probe was not kept is not done.
        self._done = {row.id for row in results.rows() if not storage.save or evaluation.is_saved(results, row)}
        self._images: dict[str, Images | MlfusionError] = {}
        self._rates: dict[str, float] = {}
        self._model = _ModelLoader()

    def case(self, model: str, dataset: str) -> Case:
        """Plan one model on one data set; raises MlfusionError if one of them is not available or not usable."""
        recipe, images = self.recipe, self._read(dataset)
        request = Request.of(model, images, recipe.features, replace(recipe.compute, device=self.device))
        read = _read_by_probes(request, recipe.search.choose_on)
        if recipe.search.choose_on == "validation" and len(read) < len(SPLITS):
            raise BadData(
                f'{images.data.name} has no split validation beside train and test; allowed: choose_on = "held-out", which '
                'chooses on a fifth of train, or "auto"'
            )
        spec = read[0].spec
        probes, all_pairs = recipe.probes_and_tokens(spec.model.depth)
        jobs = jobs_of(probes, recipe.search)
        features = _identity(read)
        missing = tuple(
            job for job in jobs if not any(same.row_id(features) in self._done for same in job.equivalents("cpu"))
        )
        pairs = frozenset(pair for job in missing for pair in job.probe.representation.pairs(spec.model.depth))
        if missing and recipe.search.drop_duplicates:
            kinds = tuple(self._model(request).kinds)
            pairs, all_pairs = (each | {compared_pair(replace(spec.model, kinds=kinds))} for each in (pairs, all_pairs))
        # Tokens and views that the recipe names are cached even if no probe reads them.
        request = replace(request, pairs=all_pairs if recipe.all_tokens or len(recipe.features.views) > 1 else pairs)
        stage_one, seconds = None, 0.0
        if request.pairs:
            trial = None if model in self._rates else TRIAL_SECONDS
            stage_one = estimate(request, cache=self.cache, trial=trial, model=self._model)
            if stage_one.images_per_second:
                self._rates[model] = stage_one.images_per_second
            if images_to_run := sum(split.images_to_run for split in stage_one.splits):
                seconds = images_to_run / self._rates[model]
        return Case(
            model=model,
            dataset=dataset,
            request=request,
            choose_on=recipe.search.choose_on,
            jobs=tuple(jobs),
            missing=missing,
            stage_one=stage_one,
            extract_seconds=seconds,
            probe_seconds=sum(
                self._probe_seconds(job, request, len(spec.data.classes), beside_others=len(missing) > 1)
                for job in missing
            ),
        )

    def _read(self, dataset: str) -> Images:
        if dataset not in self._images:
            try:
                features = self.recipe.features
                if features.splits is None and self.recipe.search.choose_on == "held-out":
                    features = replace(features, splits=("train", "test"))  # nothing is extracted that no probe reads
                self._images[dataset] = Images.of(dataset, features)
            except MlfusionError as err:
                self._images[dataset] = err  # the next model need not try again
        images = self._images[dataset]
        if isinstance(images, MlfusionError):
            raise images
        return images

    @staticmethod
    def _probe_seconds(job: Job, request: Request, classes: int, *, beside_others: bool) -> float:
        split, spec = request.jobs[0].split, request.jobs[0].spec
        representation = job.probe.representation
        tokens_per_layer = sum(_tokens(kind, request) for kind in representation.kinds)
        return costs.seconds(
            job.probe,
            costs.Problem(
                tokens=len(representation.layers(spec.model.depth)) * tokens_per_layer,
                width=spec.model.width,
                classes=classes,
                images=job.shots * classes if job.shots else len(split),
            ),
            job.search,
            beside_others=beside_others,
        ) * (job.search.folds or 1)


def _tokens(kind: TokenKind, request: Request) -> int:
    """Estimate the number of tokens of a kind per image and layer before the model is loaded, assuming one prefix token."""
    if kind == "all":
        height, width = request.jobs[0].steps.pixels
        patch = models.shape(request.checkpoint).patch_px or 16
        return (height // patch) * (width // patch) + 1
    return GRID_SIDES.get(kind, 1) ** 2


def _read_by_probes(request: Request, choose_on: ChooseOn) -> tuple[ExtractionJob, ...]:
    """The jobs of the plain views of train, test, and validation if its images choose and are neither train's nor test's."""
    train, test, *others = (job for job in request.jobs if job.steps.view == "plain")
    known = {train.spec.data.content, test.spec.data.content}
    chooses = choose_on != "held-out" and others and others[0].spec.data.content not in known
    return (train, test, *others) if chooses else (train, test)


def _identity(read: Sequence[ExtractionJob]) -> tuple[str, ...]:
    """The `identity` of the features that probes read: the groups are those of train and test."""
    return identity(tuple(job.spec.key for job in read), [job.names.groups for job in read[:2]])


class _ModelLoader:
    """Loads the model of a request, and keeps the last one for its next data set."""

    def __init__(self) -> None:
        self._loaded: tuple[models.Checkpoint, Backbone] | None = None

    def __call__(self, request: Request) -> Backbone:
        if self._loaded is None or self._loaded[0] != request.checkpoint:
            self._loaded = request.checkpoint, load(request)
        return self._loaded[1]


def run(planned: Plan, *, log: Callable[[str], None] = lambda _: None) -> StudyResult:
    """Run the missing work of a plan, case by case: the tokens first, then the rows.

    If a case fails, its error is in the result, and the rows that it finished are kept.
    """
    storage, model = planned.storage, _ModelLoader()
    store, results, trackers = FeatureStore(storage.cache), Results(Path(storage.results)), open_trackers(storage.track)
    rows: list[Row] = []
    extracted: list[ExtractionResult] = []
    failures = list(planned.failures)
    trained = 0
    for number, case in enumerate(planned.cases, 1):
        if case.missing or case.images_to_run:
            log(f"{number} of {len(planned.cases)}: {case.name}")
        try:
            if case.stage_one:
                extracted += fill(case.request, cache=storage.cache, log=log, model=model)
            if case.missing:
                pair = _pair(case, store)
                trained += evaluation.run(pair, case.missing, results, save=storage.save, trackers=trackers, log=log)[1]
        except MlfusionError as err:
            failures.append(Failure(case.model, case.dataset, str(err)))
        rows += [row for job in case.jobs if (row := evaluation.stored(results, job, case.features))]
    return StudyResult(rows, trained, extracted, tuple(failures))


def _pair(case: Case, store: FeatureStore) -> SplitPair:
    jobs = _read_by_probes(case.request, case.choose_on)
    train, test, *others = (store.entry(job.spec) for job in jobs)
    assert train is not None and test is not None  # filled just now
    names = tuple(job.names for job in jobs)
    return SplitPair(names[0].model, names[0].dataset, train, test, names, 0, others[0] if others else None)
