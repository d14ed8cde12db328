"""`mlfusion results`: lists, compares, exports, imports and reproduces results."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlfusion.cli.options import AsJson, Cache, ResultsPath, with_options
from mlfusion.cli.output import SHOWN, confirmed, notify, print_json, print_rows, row_json, say
from mlfusion.specs.definitions import command
from mlfusion.specs.selection import BestOptions, RowFilter, SettingFilter
from mlfusion.system.words import plural

if TYPE_CHECKING:
    from mlfusion.results import Row
    from mlfusion.statistics.row_scores import Certainty
    from mlfusion.statistics.rows import Comparison

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, compare and reproduce results.")

RowId = Annotated[str, typer.Argument(help="Id of a result, or the first characters of it (mlfusion results ls).")]
RESULTS = Path("results")
CLASSES = 30  # classes that `show` lists


@app.command()
@with_options
def ls(
    *,
    rows: RowFilter,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Number of newest results to list.")] = None,
    results_path: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """List the newest 100 results, the newest last; --limit changes the number, --json lists all."""
    from mlfusion.results import Results

    results = Results(results_path)
    filters = rows.changed()
    listed = results.listing(**filters, limit=limit if limit or as_json else 100)
    if as_json:
        print_json({"results": listed})
        return
    if not listed:
        results.require(**filters)  # says what to do
    names = ("id", "model", "dataset", "probe", "seed", "grid", "metric", "val", "test", "seconds", "created")
    short = {"val": "{:.4f}", "test": "{:.4f}", "seconds": "{:.1f}", "seed": "{}"}
    print_rows([{name: short.get(name, "{}").format(row[name]) for name in names} for row in listed])
    if len(listed) < (total := results.count(**filters)):
        notify(f"the newest {len(listed):,} of {total:,}; more with --limit")


@app.command()
def show(row: RowId, results_path: ResultsPath = RESULTS, as_json: AsJson = False) -> None:
    """Print one result: its sources, scores with intervals, calibration, confusions, and the command that trains it again."""
    from msgspec import to_builtins

    from mlfusion.results import Results
    from mlfusion.statistics import certainty

    results = Results(results_path)
    stored = results.named(row)
    details, fields = certainty(results, stored), to_builtins(stored)
    rerun_command = command(f"results rerun {stored.id}", results=str(results_path.absolute()))
    if as_json:
        print_json({"result": fields, **to_builtins(details), "rerun": rerun_command})
        return
    metrics = fields.pop("metrics")
    del fields["attention"]
    fields.pop("at_end", None)  # said in a sentence below
    lines = fields | {"classes": len(stored.classes)}
    lines |= {f"metrics.{name}": value for name, value in metrics.items() if isinstance(value, float)}
    width = max(map(len, lines))
    for name, value in lines.items():
        say(f"{name.ljust(width)}  {_format_value(value)}")
    say(f"chosen on: {stored.chosen_on()}")
    _print_certainty(stored, details)
    say()
    for name, text in (
        ("extract", stored.extract_command()),
        ("probe", stored.probe_command()),
        ("rerun", rerun_command),
    ):
        say(f"{name}: {text}")


@app.command()
@with_options
def compare(
    *,
    a: Annotated[str, typer.Argument(help="Name of a probe, or id of a result; with --probe, a model.")],
    b: Annotated[str, typer.Argument(help="Reference of the gains: name of a probe, id of a result, or a model.")],
    rows: RowFilter,
    level: Annotated[
        float, typer.Option("--level", min=0.5, max=0.999, help="Confidence level of the intervals.")
    ] = 0.95,
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Number of bootstrap resamples.")] = 2000,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Compare probes, results or models A and B on the same test images: paired differences, intervals and p-values."""
    from mlfusion import statistics
    from mlfusion.report.numbers import p_value, points
    from mlfusion.results import Results

    bootstrap = statistics.Bootstrap(level=level, resamples=resamples)
    filters = rows.changed()
    if probe := filters.pop("probe", None):
        filters.pop("model", None)
        comparisons = statistics.compare_models(Results(results), a, b, probe, bootstrap=bootstrap, **filters)
    else:
        comparisons = statistics.compare_named(Results(results), a, b, bootstrap=bootstrap, **filters)
    tests = statistics.over_datasets(comparisons)
    if as_json:
        bodies = {name: {"refused": one} if isinstance(one, str) else asdict(one) for name, one in tests.items()}
        print_json({"comparisons": [asdict(one) for one in comparisons], "over_datasets": bodies})
        return
    print_rows([_comparison_cells(one, len({each.setting for each in comparisons}) > 1) for one in comparisons])
    for one in comparisons:
        for mark in one.marks:
            notify(f"{one.model} on {one.dataset}: {mark}")
        if one.verdict.reason:
            notify(f"{one.model} on {one.dataset}: {one.verdict.word}: {one.verdict.reason}")
    if len(comparisons) == 1:
        return
    for name, test in tests.items():
        if isinstance(test, str):
            notify(f"{name}: {test}")
        else:
            say(
                f"{name}, over {test.n} data sets: gain {points(test.mean)} points on average, {points(test.median)} in the "
                f"median; Wilcoxon signed-rank, one-sided, p-value {p_value(test.p)}"
            )


@app.command()
@with_options
def best(
    *,
    options: BestOptions,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Print the probe with the best mean score over its seeds, and the folder of its trained probe."""
    from mlfusion.report.numbers import percent
    from mlfusion.results import Results
    from mlfusion.results.best import best as find

    found = find(Results(results), options)
    row = found.row
    if as_json:
        body = {"result": row_json(row), "mean": found.mean, "seeds": found.seeds}
        print_json(body | {"folder": str(found.folder.absolute()) if found.folder else None})
        return
    say(
        f"{row.id}: {row.probe} of {row.model} on {row.dataset}, {row.parameters:,} parameters, {options.by} "
        f"{percent(found.mean)} % over {plural(found.seeds, 'seed')}; seed {row.seed}: val {percent(row.val)} %, test "
        f"{percent(row.test)} %"
    )
    if found.folder:
        say(f"{found.folder.absolute()}")
    else:
        notify(row.not_kept_note(str(results.absolute())))


@app.command()
def rm(
    ids: Annotated[list[str], typer.Argument(help="Ids of results, or the first characters of them.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Remove results for good, with the arrays of their test images and their trained probes; asks first."""
    from mlfusion.results import Results

    store = Results(results)
    rows = {row.id: row for row in map(store.named, ids)}
    for row in rows.values():
        notify(f"{row.id}: {row.probe} of {row.model} on {row.dataset}, seed {row.seed}, test {row.test:.4f}")
    if not yes and not confirmed(f"Remove {plural(len(rows), 'result')} of {store.root.absolute()}?"):
        notify("nothing was removed")
        raise typer.Exit(1)
    store.remove(list(rows.values()))
    if as_json:
        print_json({"removed": list(rows)})
    else:
        say(f"removed {plural(len(rows), 'result')} of {store.root.absolute()}")


@app.command()
@with_options
def rank(
    *,
    rows: SettingFilter,
    baseline: Annotated[str, typer.Option("--baseline", help="Reference probe of the gains.")] = "cls-last/linear",
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

    result = rank_probes(Results(results).require(**rows.changed()), baseline=baseline, level=level)
    if as_json:
        print_json(asdict(result))
        return
    ranking, tests = result.ranking, {test.name: test for test in result.against}
    lines = []
    for probe, mean_rank, mean in zip(ranking.names, ranking.ranks, ranking.means, strict=True):
        test = tests.get(probe)
        p, q = (p_value(value) if value is not None else "too few" for value in (test.p, test.q)) if test else ("", "")
        gain = points(test.mean) if test else ""
        line = {"probe": probe, "mean rank": f"{mean_rank:.2f}", "mean score": percent(mean), "gain": gain}
        lines.append(line | {"p": p, "q": q})
    print_rows(lines)
    friedman = "none, all are equal" if ranking.friedman is None else p_value(ranking.friedman)
    say(
        f"{ranking.datasets} data sets; Friedman p-value {friedman}; mean ranks that differ by more than "
        f"{ranking.critical_difference:.2f} differ at {100 * level:.0f} % (Nemenyi). Not told apart: "
        + ("; ".join(" = ".join(group) for group in ranking.groups) or "none")
    )
    if result.left_out:
        notify(f"not on all {ranking.datasets} data sets, left out: {', '.join(result.left_out)}")
    if result.datasets_left_out:
        notify(f"data sets without all of these probes, left out: {', '.join(result.datasets_left_out)}")
    for mark in result.marks:
        notify(mark)


@app.command()
@with_options
def export(
    *,
    path: Annotated[Path, typer.Argument(help="File to write; its suffix sets the format: .csv, .parquet or .jsonl.")],
    by_class: Annotated[
        bool,
        typer.Option(
            "--by-class",
            help="Write a line per result and class: test images, recall and its interval, specificity, AUROC.",
        ),
    ] = False,
    rows: RowFilter,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Write results to a file for other programs; a .jsonl file can be imported."""
    from mlfusion.results import Results
    from mlfusion.results.export import write

    store, filters = Results(results), rows.changed()
    if by_class:
        from mlfusion.statistics.row_scores import write_by_class

        lines, missing = write_by_class(store, store.require(**filters), path)
        for reason in missing:
            notify(f"left out: {reason}")
        if as_json:
            print_json({"path": str(path), "lines": lines})
        else:
            say(f"{path}: {plural(lines, 'line')}, one per result and class")
        return
    with store.scan(**filters) as selected:
        if next(iter(selected), None) is None:
            store.require(**filters)  # says what to do
        write(selected, path)
    count = store.count(**filters)
    if as_json:
        print_json({"path": str(path), "results": count})
    else:
        say(f"{path}: {plural(count, 'result')}")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Another folder of results, or an exported .jsonl file.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace results that are here with other values; default: they stay.")
    ] = False,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Import results and their arrays; a result that is here with other values stays, unless --replace is given."""
    from mlfusion.results import Results

    imported = Results(results).take_from(source, replace=replace)
    if as_json:
        print_json({"taken": imported.taken, "there": imported.present, "differing": list(imported.differing)})
        return
    say(f"{plural(imported.taken, 'result')} taken over, {imported.present:,} here already")
    if imported.differing:
        some = ", ".join(imported.differing[:SHOWN]) + ", …" * (len(imported.differing) > SHOWN)
        notify(
            f"{len(imported.differing):,} are here with other values and stay as they are ({some}); to have those of the "
            "source: --replace"
        )


@app.command()
def rerun(
    row: RowId,
    keep: Annotated[
        bool, typer.Option("--keep", help="Store the arrays and the trained probe too, if the scores are the same.")
    ] = False,
    device: Annotated[str | None, typer.Option("--device", help="Device; default: the row's own.")] = None,
    cache: Cache = None,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Train the probe of a result again, and compare the scores; exit 1 if they differ."""
    from mlfusion.probing.rerun import rerun as run
    from mlfusion.specs.options import StorageOptions

    result = run(row, keep=keep, storage=StorageOptions(cache=cache, results=str(results)), device=device)
    scores = {name: {"then": then, "now": now} for name, then, now in result.scores()}
    if as_json:
        print_json({"id": result.row.id, "same": result.same, "scores": scores, "differs": result.differs})
    else:
        for name, pair in scores.items():
            same = pair["then"] == pair["now"]
            text = f"{_format_value(pair['then'])} then and now" if same else f"{pair['then']} then, {pair['now']} now"
            say(f"{name}: {text}")
        for line in result.differs:
            notify(line)
    if keep and result.row.folds is not None:
        notify(result.row.not_kept_note(str(results.absolute())))
    if not result.same:
        notify("the scores are not the same" + ("" if result.differs else ", though nothing that rows tell of differs"))
        raise typer.Exit(1)


@app.command()
@with_options
def track(
    *,
    where: Annotated[
        str, typer.Argument(help="Trackers: tensorboard:DIR, wandb:PROJECT or mlflow:URI, comma-separated.")
    ],
    rows: RowFilter,
    results: ResultsPath = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Send existing results to a tracker, one run for each."""
    from mlfusion.results import Results
    from mlfusion.results.trackers import log_rows, open_trackers
    from mlfusion.system.progress import track as progress_bar

    trackers = open_trackers(where)
    selected = Results(results).require(**rows.changed())
    with progress_bar("results", len(selected), "results") as bar:
        log_rows(selected, trackers, bar.advance)
    if as_json:
        print_json({"where": where, "results": len(selected)})
    else:
        say(f"{plural(len(selected), 'result')} shown in {where}")


# --- printing --------------------------------------------------------------------------------------------------------


def _print_certainty(row: "Row", details: "Certainty") -> None:
    from mlfusion.report.numbers import between_percent, percent

    if details.interval:
        one = details.interval
        interval = f"{100 * one.level:.0f} % interval over test images {between_percent(one.low, one.high)}"
        ends = one.refused or interval
        say()
        say(f"{row.metric.replace('_', ' ')} {percent(one.value)}, {ends}")
    _print_classes(details)
    if details.calibration:
        say(f"expected calibration error {percent(details.calibration.ece)}")
    for pair in details.confusions or ():
        say(f"{pair.images} of {pair.of} {pair.name} taken for {pair.taken_for}")
    if note := row.at_end_note():
        say(f"chosen at an end of the {row.grid} grid, beyond which nothing was tried: {note}")
    if details.missing:
        notify(details.missing)


def _print_classes(details: "Certainty") -> None:
    """The scores class by class, the rarest class in test first; and those that are too rare for a verdict."""
    from mlfusion.report.numbers import between_percent, percent
    from mlfusion.statistics.verdicts import enumerate_rare

    if not details.by_class:
        return
    if details.auroc is not None:
        say(f"AUROC, one class against the rest, mean over classes: {percent(details.auroc)}")
    shown = sorted(details.by_class, key=lambda one: one.images)[:CLASSES]
    say()
    print_rows(
        [
            {
                "class": one.name,
                "test images": one.images,
                "recall (sensitivity), %": _percent(one.recall),
                "95 % interval": between_percent(one.low, one.high),
                "specificity, %": _percent(one.specificity),
                "AUROC, %": _percent(one.auroc),
            }
            for one in shown
        ]
    )
    if hidden := len(details.by_class) - len(shown):
        say(f"and {plural(hidden, 'more class', 'more classes')} with as many images or more: --json")
    if details.rare:
        say(f"{enumerate_rare(details.rare)}: too few to tell two probes apart by a mean over classes")


def _percent(value: float | None) -> str:
    from mlfusion.report.numbers import percent

    return "none" if value is None else percent(value)


def _comparison_cells(comparison: "Comparison", several: bool) -> dict[str, Any]:
    from mlfusion.report.numbers import between, mean_sd, p_value, points
    from mlfusion.report.summary import metric_name
    from mlfusion.statistics.verdicts import NOT_TOLD

    difference, one = comparison.images, comparison.verdict
    tested = "none" if one.p is None or one.word == NOT_TOLD else p_value(one.p)
    heading, interval = "over images", "no arrays"
    if difference:
        heading = f"{100 * difference.level:.0f} % over images"
        interval = between(difference.low, difference.high)
    return ({"setting": comparison.setting} if several else {}) | {
        "model": comparison.model,
        "dataset": comparison.dataset,
        f"A: {comparison.a}": mean_sd(comparison.score_a),
        f"B: {comparison.b}": mean_sd(comparison.score_b),
        "gain, points": mean_sd(comparison.gain, points),
        "seeds": comparison.gain.n,
        heading: interval,
        "verdict": comparison.verdict.word,
        f"p of {metric_name(comparison.metric)}": tested,
        "p of accuracy (McNemar)": " ".join(p_value(test.p) for test in comparison.mcnemar),
    }


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
