"""`mlfusion results`: what was found, how it compares, how it is made again, and where else it goes."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlfusion.cli.options import AsJson, Cache, ResultsPath, with_options
from mlfusion.cli.output import print_json, print_rows, say
from mlfusion.specs.options import FilterOptions

if TYPE_CHECKING:
    from mlfusion.results import Row
    from mlfusion.results.database import RowFilter
    from mlfusion.statistics.rows import Certainty, Comparison

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at results, compare them, make them again.")

OfModel = Annotated[str | None, typer.Option("--model", "-m", help="Only results of this model.")]
OfDataset = Annotated[str | None, typer.Option("--dataset", "-d", help="Only results on this data set.")]
OfProbe = Annotated[str | None, typer.Option("--probe", help="Only results of this probe.")]
RowId = Annotated[str, typer.Argument(help="A result's id, or the beginning of it (mlfusion results ls).")]
RESULTS = Path("results")


@app.command()
@with_options
def ls(
    *,
    rows: FilterOptions,
    probe: OfProbe = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Number of results to list, the newest.")] = None,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """List results, the newest last: the newest 100 unless --limit says otherwise, all of them with --json."""
    from mlfusion.results import Results

    kept = Results(results)
    place: RowFilter = {"model": rows.model, "dataset": rows.dataset, "grid": rows.grid, "probe": probe}
    found = kept.listing(**place, limit=limit if limit or as_json else 100)
    if as_json:
        print_json({"results": found})
        return
    if not found:
        kept.require(**place)  # says what to do
    names = ("id", "model", "dataset", "probe", "seed", "grid", "metric", "val", "test", "seconds", "created")
    short = {"val": "{:.4f}", "test": "{:.4f}", "seconds": "{:.1f}", "seed": "{}"}
    print_rows([{name: short.get(name, "{}").format(one[name]) for name in names} for one in found], nothing="")
    if len(found) < (there := kept.count(**place)):
        say(f"the newest {len(found):,} of {there:,}; more with --limit")


@app.command()
def show(row: RowId, results: ResultsPath = RESULTS, as_json: AsJson = False) -> None:
    """Print one result: its sources, scores with intervals, calibration, confusions, and the command that trains it again."""
    from msgspec import to_builtins

    from mlfusion.results import Results
    from mlfusion.statistics import certainty

    kept = Results(results)
    one = kept.named(row)
    sure, whole = certainty(kept, one), to_builtins(one)
    again = f"mlfusion results rerun {one.id} --results {results}"
    if as_json:
        print_json({"result": whole, **to_builtins(sure), "rerun": again})
        return
    metrics = whole.pop("metrics")
    del whole["attention"]
    lines = whole | {"classes": len(one.classes)}
    lines |= {f"metrics.{name}": value for name, value in metrics.items() if isinstance(value, float)}
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name.ljust(width)}  {_said(value)}")
    _print_certainty(one, sure)
    typer.echo(f"\nagain: {again}")


@app.command()
@with_options
def compare(
    *,
    a: Annotated[str, typer.Argument(help="Name of a probe, or id of a result.")],
    b: Annotated[str, typer.Argument(help="Probe or result that gains are counted from.")],
    rows: FilterOptions,
    level: Annotated[
        float, typer.Option("--level", min=0.5, max=0.999, help="Confidence level of the intervals.")
    ] = 0.95,
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Number of bootstrap resamples.")] = 2000,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Compare A with B on the same test images: scores, paired differences, intervals and p-values."""
    from mlfusion import statistics
    from mlfusion.report.numbers import p_value, points
    from mlfusion.results import Results

    bootstrap = statistics.Bootstrap(level=level, resamples=resamples)
    compared = statistics.compare_named(
        Results(results), a, b, model=rows.model, dataset=rows.dataset, grid=rows.grid, bootstrap=bootstrap
    )
    over = statistics.over_datasets(compared)
    if as_json:
        tests = {name: {"refused": one} if isinstance(one, str) else asdict(one) for name, one in over.items()}
        print_json({"comparisons": [asdict(one) for one in compared], "over_datasets": tests})
        return
    print_rows([_compared(one) for one in compared], nothing="")
    for one in compared:
        for mark in one.marks:
            say(f"{one.model} on {one.dataset}: {mark}")
    if len(compared) == 1:
        return
    for name, test in over.items():
        if isinstance(test, str):
            say(f"{name}: {test}")
        else:
            typer.echo(
                f"{name}, over {test.n} data sets: gain {points(test.mean)} points on average, {points(test.median)} in the "
                f"median; Wilcoxon signed-rank, one-sided, p-value {p_value(test.p)}"
            )


@app.command()
@with_options
def rank(
    *,
    rows: FilterOptions,
    baseline: Annotated[str, typer.Option("--baseline", help="Probe that gains are counted from.")] = "cls-last/linear",
    level: Annotated[
        float,
        typer.Option("--level", min=0.5, max=0.999, help="Confidence level of the tests: 0.95 means p below 0.05."),
    ] = 0.95,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Rank probes over data sets: mean ranks, critical difference, and gains with q-values (from six data sets)."""
    from mlfusion.report.numbers import p_value, percent, points
    from mlfusion.results import Results
    from mlfusion.statistics import rank as rank_probes

    found = rank_probes(
        Results(results).require(model=rows.model, dataset=rows.dataset, grid=rows.grid), baseline=baseline, level=level
    )
    if as_json:
        print_json(asdict(found))
        return
    ranking, tested = found.ranking, {one.name: one for one in found.against}
    lines = []
    for probe, place, mean in zip(ranking.names, ranking.ranks, ranking.means, strict=True):
        one = tested.get(probe)
        p, q = (p_value(value) if value is not None else "too few" for value in (one.p, one.q)) if one else ("", "")
        gain = points(one.mean) if one else ""
        line = {"probe": probe, "mean rank": f"{place:.2f}", "mean score": percent(mean), "gain": gain, "p": p, "q": q}
        lines.append(line)
    print_rows(lines, nothing="")
    typer.echo(
        f"{ranking.datasets} data sets; Friedman p-value {p_value(ranking.friedman)}; mean ranks that differ by more than "
        f"{ranking.critical_difference:.2f} differ at {100 * level:.0f} % (Nemenyi). Not told apart: "
        + ("; ".join(" = ".join(group) for group in ranking.groups) or "none")
    )
    if found.left_out:
        say(f"not on all {ranking.datasets} data sets, left out: {', '.join(found.left_out)}")


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="Its ending is the form: .csv, .parquet or .jsonl.")],
    model: OfModel = None,
    dataset: OfDataset = None,
    probe: OfProbe = None,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Write results for other programs; .jsonl can be imported again."""
    from mlfusion.results import Results
    from mlfusion.results.export import write

    rows = Results(results).require(model=model, dataset=dataset, probe=probe)
    write(rows, path)
    if as_json:
        print_json({"path": str(path), "results": len(rows)})
    else:
        typer.echo(f"{path}: {len(rows):,} results")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Another folder of results, or a .jsonl file of them.")],
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Take over results of elsewhere, with their arrays; what is here already and not older stays as it is."""
    from mlfusion.results import Results

    taken, there = Results(results).take_from(source)
    if as_json:
        print_json({"taken": taken, "there": there})
    else:
        typer.echo(f"{taken:,} results taken over, {there:,} were here already")


@app.command()
def rerun(
    row: RowId,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep arrays and trained probe too, if the scores are the same.")
    ] = False,
    device: Annotated[str | None, typer.Option("--device", help="Device; default: the row's own.")] = None,
    cache: Cache = None,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Train a result's probe again from the result alone; exit 1 if its scores are not the same."""
    from mlfusion.probing.rerun import rerun as run
    from mlfusion.specs.options import StorageOptions

    done = run(row, keep=keep, storage=StorageOptions(cache=cache, results=str(results)), device=device)
    scores = {name: {"then": then, "now": now} for name, then, now in done.scores()}
    if as_json:
        print_json({"id": done.row.id, "same": done.same, "scores": scores, "differs": done.differs})
    else:
        for name, one in scores.items():
            told = (
                f"{_said(one['then'])} then and now"
                if one["then"] == one["now"]
                else f"{one['then']} then, {one['now']} now"
            )
            typer.echo(f"{name}: {told}")
        for line in done.differs:
            say(line)
    if not done.same:
        say("the scores are not the same" + ("" if done.differs else ", though nothing that rows tell of differs"))
        raise typer.Exit(1)


@app.command()
def track(
    where: Annotated[
        str, typer.Argument(help="Trackers: tensorboard:DIR, wandb:PROJECT or mlflow:URI, comma-separated.")
    ],
    model: OfModel = None,
    dataset: OfDataset = None,
    probe: OfProbe = None,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Show results that are there already in a tracker, a run each."""
    from mlfusion.results import Results
    from mlfusion.results.trackers import log_rows, open_trackers
    from mlfusion.system.progress import track as bar_of

    trackers = open_trackers(where)
    rows = Results(results).require(model=model, dataset=dataset, probe=probe)
    with bar_of("results", len(rows), "results") as bar:
        log_rows(rows, trackers, bar.advance)
    if as_json:
        print_json({"where": where, "results": len(rows)})
    else:
        typer.echo(f"{len(rows):,} results shown in {where}")


# --- saying ----------------------------------------------------------------------------------------------------------


def _print_certainty(row: "Row", sure: "Certainty") -> None:
    from mlfusion.report.numbers import percent

    if sure.interval:
        one = sure.interval
        typer.echo(
            f"\n{row.metric.replace('_', ' ')} {percent(one.value)}, {100 * one.level:.0f} % interval over test images "
            f"{percent(one.low)} to {percent(one.high)}"
        )
    if sure.calibration:
        typer.echo(f"expected calibration error {percent(sure.calibration.ece)}")
    for pair in sure.confusions or ():
        typer.echo(f"{pair.images} of {pair.of} {pair.name} taken for {pair.taken_for}")
    if sure.missing:
        say(sure.missing)


def _compared(one: "Comparison") -> dict[str, Any]:
    from mlfusion.report.numbers import mean_sd, p_value, points

    drawn = one.images
    return {
        "model": one.model,
        "dataset": one.dataset,
        f"A: {one.a}": mean_sd(one.score_a),
        f"B: {one.b}": mean_sd(one.score_b),
        "gain, points": mean_sd(one.gain, points),
        "seeds": one.gain.n,
        f"{100 * drawn.level:.0f} % over images"
        if drawn
        else "over images": f"{points(drawn.low)} to {points(drawn.high)}" if drawn else "no arrays",
        "p, bootstrap": p_value(drawn.p) if drawn else "",
        "p, McNemar": " ".join(p_value(test.p) for test in one.mcnemar),
    }


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
