"""The command line: turns arguments into calls of the library, and errors into exit codes.

Nothing heavy is imported before it is needed: `mlfusion --help` starts neither torch nor transformers.
"""

import os
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import typer

from mlfusion.cli.advise import advise
from mlfusion.cli.attend import attend
from mlfusion.cli.cache import app as cache_app
from mlfusion.cli.data import data
from mlfusion.cli.doctor import doctor
from mlfusion.cli.malloc import freed_memory_kept
from mlfusion.cli.options import (
    DATASET,
    MODEL,
    AnyModel,
    AsJson,
    Cache,
    Dataset,
    Model,
    complete_probes,
    with_options,
)
from mlfusion.cli.output import (
    Commands,
    adapt_streams,
    notify,
    one_sentence_ends,
    print_extracted,
    print_json,
    print_rows,
    print_table,
    row_json,
    say,
    set_verbosity,
)
from mlfusion.cli.predict import predict
from mlfusion.cli.report import report
from mlfusion.cli.results import app as results_app
from mlfusion.cli.study import run
from mlfusion.specs.options import ComputeOptions, FeatureOptions, SearchOptions, StorageOptions, TrainingOptions
from mlfusion.system.words import plural

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cache_app, name="cache")
app.add_typer(results_app, name="results")
app.command()(predict)
app.command()(doctor)
app.command()(data)
app.command()(run)
app.command()(report)
app.command()(advise)
app.command()(attend)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        say(f"mlfusion {version('mlfusion')}")
        raise typer.Exit


@app.callback()
def mlfusion(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print debug messages too, and the traceback of errors.")
    ] = False,
) -> None:
    """Probe the layers of a frozen vision transformer."""
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose are opposites; give one")
    set_verbosity(verbose - quiet)


@app.command()
@with_options
def extract(
    *,
    model: Model = MODEL,
    dataset: Dataset = DATASET,
    features: FeatureOptions,
    compute: ComputeOptions,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Stage 1: run a frozen model once and cache its tokens. Cached tokens are not computed again."""
    from mlfusion.extraction.run import extract as run
    from mlfusion.extraction.run import next_command

    results = run(model, dataset, features, compute, cache=cache, log=notify)
    if as_json:
        print_json({"features": [result.to_json() for result in results]})
        return
    for result in results:
        print_extracted(result.to_json())
    if words := next_command(results, cache):
        notify(f"next: {words}")


@app.command()
@with_options
def plan(
    *,
    model: Model = MODEL,
    dataset: Dataset = DATASET,
    features: FeatureOptions,
    compute: ComputeOptions,
    cache: Cache = None,
    trial: Annotated[float, typer.Option("--trial", help="Number of seconds for which the speed is measured.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Print what extract with the same options would write, and how long it would take. Writes nothing."""
    from mlfusion.extraction.plan import plan as run
    from mlfusion.system.progress import duration

    estimate = run(model, dataset, features, compute, cache=cache, trial=trial)
    if as_json:
        print_json(estimate.to_json())
        return
    print_rows([vars(split) for split in estimate.splits])
    limit = f" (limit: {estimate.limit})" if estimate.limit else ""
    rate = f" at {estimate.images_per_second:,.1f} images/s, as tried{limit}" if estimate.images_per_second else ""
    say(
        f"to write: {estimate.bytes_to_write / 1e6:,.1f} MB of {estimate.free_bytes / 1e6:,.1f} MB free; "
        f"forward passes: {duration(estimate.seconds)}{rate}"
    )
    if estimate.bytes_to_write > estimate.free_bytes:
        notify("that does not fit; ask for fewer --layers or --tokens, --dtype int8, or another --cache")


@app.command()
@with_options
def probe(
    *,
    dataset: Dataset = DATASET,
    model: AnyModel = None,
    probes: Annotated[
        str,
        typer.Option(
            "--probe",
            help="Names of probes (mlfusion ls probes), comma-separated, or all.",
            autocompletion=complete_probes,
        ),
    ] = "all",
    search: SearchOptions,
    training: TrainingOptions,
    storage: StorageOptions,
    as_json: AsJson = False,
) -> None:
    """Stage 2: train and test probes on cached features, by the study's protocol. Runs no forward pass."""
    from mlfusion.probing import evaluation
    from mlfusion.results import Results

    result = evaluation.probe(dataset, model, probes, search, training, storage, notify)
    if as_json:
        print_json({"results": [row_json(row) for row in result.rows]})
    else:
        print_table(result.rows, Results(storage.results))


@app.command()
def ls(
    what: Annotated[str, typer.Argument(help="List: models, datasets, probes, tokens or hooks.")],
    as_json: AsJson = False,
) -> None:
    """List models, data sets, probes, token kinds or hook points. For cached features: mlfusion cache ls."""
    from mlfusion.workflows.listings import listing

    rows = listing(what)
    if as_json:
        print_json({what: rows})
    else:  # the first digits of a commit are enough to recognise it
        short = [{k: v[:8] if k == "revision" else v for k, v in row.items()} for row in rows]
        print_rows(short)


@app.command()
def pretrain(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe file (pipelines/) that describes the images and the training.")
    ] = Path("pipelines/formula-vit.toml"),
    out: Annotated[Path, typer.Option("--out", help="Folder for the model, in the hub's format.")] = Path(
        "results/formula-vit"
    ),
) -> None:
    """Train the embedded model again from its seed: a small ViT, on images drawn by formula."""
    from mlfusion.embedded.pretrain import pretrain as run_pretrain
    from mlfusion.system.progress import Bar

    bar: Bar | None = None
    with ExitStack() as stack:

        def show_progress(event: dict[str, Any]) -> None:
            nonlocal bar
            if bar is None or bar.title != event["stage"]:
                stack.close()
                unit = "steps" if event["stage"] == "train" else "patterns"
                bar = stack.enter_context(closing(Bar(event["stage"], event["of"], unit)))
            bar.to(event["done"])

        summary = run_pretrain(recipe, out, progress=show_progress)
    say(f"{out}: {plural(summary['steps'], 'step')}, {summary['seconds']:,} s")


def main() -> None:
    """Entry point of `mlfusion`."""
    # Waiting threads of GNU OpenMP spin for a long time, which makes small training loops ten times slower on a busy
    # machine; without any spinning they are half as fast on an idle one. torch reads the variable once, when it is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    adapt_streams()
    with one_sentence_ends(), freed_memory_kept():
        app(prog_name="mlfusion")  # completion and messages use this name with `python -m mlfusion` too
