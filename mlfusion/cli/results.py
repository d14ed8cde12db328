"""`mlfusion results`: what was found, how it compares, how it is made again, and where else it goes."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlfusion.cli.words import AsJson, Cache, ResultsPath, print_json, print_rows, say
from mlfusion.errors import MlfusionError

if TYPE_CHECKING:
    from mlfusion.results import Row
    from mlfusion.statistics import Comparison

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at results, compare them, make them again.")

OfModel = Annotated[str | None, typer.Option("--model", "-m", help="Only results of this model.")]
OfDataset = Annotated[str | None, typer.Option("--dataset", "-d", help="Only results on this data set.")]
OfProbe = Annotated[str | None, typer.Option("--probe", help="Only results of this probe.")]
OfGrid = Annotated[str | None, typer.Option("--grid", help="Only results of this grid: paper or quick.")]
RowId = Annotated[str, typer.Argument(help="A result's id, or the beginning of it (mlfusion results ls).")]
RESULTS = Path("results")


@app.command()
def ls(
    model: OfModel = None,
    dataset: OfDataset = None,
    probe: OfProbe = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many, the newest.")] = None,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Every result, the newest last: a line each; the newest 100 unless told otherwise, all with --json."""
    from mlfusion.results import Results

    kept = Results(results)
    place = {"model": model, "dataset": dataset, "probe": probe}
    found = kept.listing(**place, limit=limit if limit or as_json else 100)
    if as_json:
        print_json({"results": found})
        return
    if not found:
        kept.require(**place)  # says what to do
    names = ("id", "model", "dataset", "probe", "seed", "grid", "metric", "val", "test", "seconds", "created")
    print_rows([{name: _short(name, one[name]) for name in names} for one in found], nothing="")
    if len(found) < (there := kept.count(**place)):
        say(f"the newest {len(found):,} of {there:,}; more with --limit")


@app.command()
def show(row: RowId, results: ResultsPath = RESULTS, as_json: AsJson = False) -> None:
    """One result: where it comes from, how good and how sure, how calibrated, what it confuses, how to make it again."""
    from mlfusion.results import Results

    kept = Results(results)
    one = kept.named(row)
    sure = _sureness(kept, one)
    again = f"mlfusion results rerun {one['id']} --results {results}"
    if as_json:
        print_json({"result": one, **sure, "rerun": again})
        return
    held = dict(one) | {"classes": len(one["classes"])}
    for name in ("attention", "metrics"):
        held.pop(name)
    held |= {f"metrics.{name}": value for name, value in one["metrics"].items() if not isinstance(value, list)}
    width = max(map(len, held))
    for name, value in held.items():
        typer.echo(f"{name.ljust(width)}  {_said(value)}")
    if interval := sure["interval"]:
        typer.echo(
            f"\n{one['metric'].replace('_', ' ')} {_percent(interval['value'])}, {100 * interval['level']:.0f} % interval over "
            f"test images {_percent(interval['low'])} to {_percent(interval['high'])}"
        )
    if sure["calibration"]:
        typer.echo(f"expected calibration error {_percent(sure['calibration']['ece'])}")
    for pair in sure["confusions"] or ():
        typer.echo(f"{pair['images']} of {pair['of']} {pair['class']} taken for {pair['taken_for']}")
    if sure["missing"]:
        say(sure["missing"])
    typer.echo(f"\nagain: {again}")


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A probe's name, or a result's id.")],
    b: Annotated[str, typer.Argument(help="Likewise; gains are counted from it.")],
    model: OfModel = None,
    dataset: OfDataset = None,
    grid: OfGrid = None,
    level: Annotated[float, typer.Option("--level", min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Of the bootstrap.")] = 2000,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """A against B on the same test images: scores, paired difference with interval and p-values; over data sets from six on."""
    from mlfusion import statistics
    from mlfusion.results import Results

    kept, how = Results(results), {"level": level, "resamples": resamples}
    names = [_probe_name(word) for word in (a, b)]
    if None not in names:
        rows = [row for row in kept.require(model=model, dataset=dataset) if grid in (None, row["grid"])]
        compared = statistics.compare_probes(kept, rows, str(names[0]), str(names[1]), **how)  # type: ignore[arg-type]
    else:
        compared = [statistics.compare(kept, kept.named(a), kept.named(b), **how)]  # type: ignore[arg-type]
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
                f"{name}, over {test.n} data sets: gain {_points(test.mean)} points on average, {_points(test.median)} in the "
                f"median; Wilcoxon signed-rank, one-sided, p = {_p(test.p)}"
            )


@app.command()
def rank(
    model: OfModel = None,
    grid: OfGrid = None,
    baseline: Annotated[
        str, typer.Option("--baseline", help="The probe that gains are counted from.")
    ] = "cls-last/linear",
    level: Annotated[
        float, typer.Option("--level", min=0.5, max=0.999, help="Of the tests: 0.95 is p below 0.05.")
    ] = 0.95,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Probes over data sets: mean ranks with their critical difference, and gains with q-values (six data sets or more)."""
    from mlfusion import statistics
    from mlfusion.results import Results

    held = Results(results).require(model=model)
    table = statistics.by_dataset(row for row in held if grid in (None, row["grid"]))
    most = max((frozenset(sets) for sets in table.values()), key=len, default=frozenset())
    whole = {probe: sets for probe, sets in table.items() if sets.keys() >= most}
    left_out = sorted(table.keys() - whole.keys())
    order = sorted(most)
    found = statistics.ranking({p: [sets[d] for d in order] for p, sets in whole.items()}, level=1 - level)
    name = _probe_name(baseline) or baseline
    gains = {p: [sets[d] - whole[name][d] for d in order] for p, sets in whole.items() if name in whole and p != name}
    tested = {one.name: one for one in statistics.against(gains, level=1 - level)}
    if as_json:
        against = [asdict(one) for one in tested.values()]
        print_json({"ranking": asdict(found), "against": against, "baseline": name, "left_out": left_out})
        return
    rows = []
    for probe, place, mean in zip(found.names, found.ranks, found.means, strict=True):
        one = tested.get(probe)
        rows.append(
            {
                "probe": probe,
                "mean rank": f"{place:.2f}",
                "mean score": _percent(mean),
                "gain": _points(one.mean) if one else "",
                "p": _p(one.p) if one else "",
                "q": _p(one.q) if one else "",
            }
        )
    print_rows(rows, nothing="")
    typer.echo(
        f"{found.datasets} data sets; Friedman p = {_p(found.friedman)}; mean ranks that differ by more than "
        f"{found.critical_difference:.2f} differ at {100 * level:.0f} % (Nemenyi). Not told apart: "
        + ("; ".join(" = ".join(group) for group in found.groups) or "none")
    )
    if left_out:
        say(f"not on all {len(order)} data sets, left out: {', '.join(left_out)}")


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
    from mlfusion.results.database import LINES, read_lines

    if source.suffix == ".jsonl" and source.name != LINES:
        try:
            offered, folder = read_lines(source), None
        except OSError as err:
            raise MlfusionError(
                f"cannot read {str(source)!r}: {err.strerror}; allowed: a folder or a .jsonl file"
            ) from err
    else:
        there = Results(source)
        offered, folder = there.require(), there.root
    taken = Results(results).take(offered, folder)
    if as_json:
        print_json({"taken": taken, "there": len(offered) - taken})
    else:
        typer.echo(f"{taken:,} results taken over, {len(offered) - taken:,} were here already")


@app.command()
def rerun(
    row: RowId,
    keep: Annotated[
        bool, typer.Option("--keep", help="Where the scores are the same, keep arrays and trained probe too.")
    ] = False,
    device: Annotated[str | None, typer.Option("--device", help="Default: where it was trained.")] = None,
    cache: Cache = None,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Train a result's probe again from the result alone; exit 1 if its scores are not the same."""
    from mlfusion.evaluation import rerun as run

    done = run(row, keep=keep, cache=cache, results=results, device=device)
    scores = {name: {"then": done.row[name], "now": done.again[name]} for name in ("val", "test", "train", "selected")}
    if as_json:
        print_json({"id": done.row["id"], "same": done.same, "scores": scores, "differs": done.differs})
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
    where: Annotated[str, typer.Argument(help="tensorboard:DIR, wandb:PROJECT or mlflow:URI, comma-separated.")],
    model: OfModel = None,
    dataset: OfDataset = None,
    probe: OfProbe = None,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Show results that are there already in a tracker, a run each."""
    from mlfusion import trackers
    from mlfusion.progress import track as bar_of
    from mlfusion.results import Results

    opened = trackers.opened(where)
    rows = Results(results).require(model=model, dataset=dataset, probe=probe)
    with bar_of("results", len(rows), "results") as bar:
        for row in rows:
            for one in opened:
                one.log(row)
            bar.advance()
    if as_json:
        print_json({"where": where, "results": len(rows)})
    else:
        typer.echo(f"{len(rows):,} results shown in {where}")


# --- saying ----------------------------------------------------------------------------------------------------------


def _sureness(kept: Any, row: "Row") -> dict[str, Any]:
    """What the test images say of a row; None where its arrays do not."""
    from mlfusion import statistics
    from mlfusion.errors import ResultsUnusable

    found: dict[str, Any] = {"interval": None, "calibration": None, "confusions": None, "missing": None}
    try:
        held = kept.arrays(row)
    except ResultsUnusable as err:
        return found | {"missing": str(err)}
    labels, predictions = held["labels"], held["probabilities"]
    found["interval"] = asdict(statistics.interval(labels, predictions, metric=row["metric"]))
    if labels.ndim == 1 and labels.dtype.kind != "f":
        found["calibration"] = asdict(statistics.calibration(labels, predictions))
        counts = statistics.confusion(labels, predictions)
        of = counts.sum(1)
        pairs = sorted(
            ((int(counts[i, j]), i, j) for i, j in zip(*counts.nonzero(), strict=True) if i != j), reverse=True
        )
        names = row["classes"]
        found["confusions"] = [
            {"class": names[i], "taken_for": names[j], "images": images, "of": int(of[i])} for images, i, j in pairs[:5]
        ]
    return found


def _probe_name(word: str) -> str | None:
    """The name of a probe, or None if it is not one: ids have no '/'."""
    from mlfusion.specs import ALIASES

    return word if "/" in word else ALIASES.get(word.lower())


def _compared(one: "Comparison") -> dict[str, Any]:
    drawn = one.images
    return {
        "model": one.model,
        "dataset": one.dataset,
        f"A: {one.a}": _spread(one.score_a.mean, one.score_a.sd),
        f"B: {one.b}": _spread(one.score_b.mean, one.score_b.sd),
        "gain, points": _points(one.gain.mean) + (f" ± {_percent(one.gain.sd)}" if one.gain.sd is not None else ""),
        "seeds": one.gain.n,
        f"{100 * drawn.level:.0f} % over images"
        if drawn
        else "over images": f"{_points(drawn.low)} to {_points(drawn.high)}" if drawn else "no arrays",
        "p, bootstrap": _p(drawn.p) if drawn else "",
        "p, McNemar": " ".join(_p(test.p) for test in one.mcnemar),
    }


def _short(name: str, value: Any) -> Any:
    if name in ("val", "test"):
        return f"{value:.4f}"
    return f"{value:.1f}" if name == "seconds" else str(value) if name == "seed" else value


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _spread(mean: float, sd: float | None) -> str:
    return _percent(mean) + (f" ± {_percent(sd)}" if sd is not None else "")


def _p(value: float | None) -> str:
    if value is None:
        return "too few"
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"
