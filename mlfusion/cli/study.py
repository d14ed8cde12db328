"""`mlfusion run`: plans and runs the study of a recipe, and writes the report."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlfusion.cli.options import AsJson, with_options
from mlfusion.cli.output import notify, print_extracted, print_json, print_rows, print_table, row_json, say
from mlfusion.specs.definitions import command
from mlfusion.specs.options import RunOptions, StorageOptions

if TYPE_CHECKING:
    from mlfusion.results import Results, Row
    from mlfusion.workflows.study import Failure, Plan


@with_options
def run(
    *,
    recipe: Annotated[Path, typer.Argument(help="Recipe file, such as pipelines/default.toml.")],
    options: RunOptions,
    storage: StorageOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the HTML page to this file; default: RESULTS/<recipe>.html.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the findings as Markdown to this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run both stages of a recipe and write the report. Cached features and stored results are reused."""
    from mlfusion.results import Results
    from mlfusion.workflows import study
    from mlfusion.workflows.recipe import load

    loaded = load(recipe, data=options.data, seeds=options.seeds)
    planned = study.plan(loaded, storage, device=options.device)
    _print_plan(planned, dry_run=dry_run, as_json=as_json)
    if dry_run:
        _exit_if_failed(planned.failures)
        return
    result = study.run(planned, log=notify)
    for extracted in result.extracted:
        print_extracted(extracted.to_json(), write=notify)
    page = html or Path(storage.results) / f"{recipe.stem}.html"
    if result.rows:
        results = Results(Path(storage.results))
        _write_page(result.rows, page, results, storage.cache)
        if markdown:
            # --data is a folder of this machine: the page does not name it.
            words = replace(options, data="DIR" if options.data else None, device="auto").words()
            rerun_command = command("run", [str(recipe), *words, "--markdown", str(markdown)])
            _write_findings(result.rows, markdown, results, recipe, rerun_command)
    if as_json:
        print_json(
            {
                "features": [extracted.to_json() for extracted in result.extracted],
                "results": [row_json(row) for row in result.rows],
                "made": result.trained,
                "failures": [vars(failure) for failure in result.failures],
                "html": str(page) if result.rows else None,
            }
        )
    elif result.rows:
        print_table(result.rows, results)
        say(f"report: {page}" + (f", {markdown}" if markdown else ""))
    _exit_if_failed(result.failures)


def _print_plan(planned: "Plan", *, dry_run: bool, as_json: bool) -> None:
    """Print the plan: a table of the cases with --dry-run or if work is missing, then a summary."""
    from mlfusion.system.progress import duration

    if dry_run and as_json:
        print_json(planned.to_json())
    elif not as_json and (dry_run or not planned.is_done):
        lines = [
            {
                "model": case.request.names.model,
                "dataset": case.request.names.dataset,
                "images": case.images_to_run,
                "passes": case.forward_passes,
                "MB": f"{case.bytes_to_write / 1e6:,.1f}",
                "extraction": duration(case.extract_seconds) if case.images_to_run else "",
                "rows": len(case.missing),
                "done": len(case.jobs) - len(case.missing),
                "probing": duration(case.probe_seconds) if case.missing else "",
            }
            for case in planned.cases
        ]
        print_rows(lines, empty="nothing can be planned")
    notify(str(planned))
    if not planned.fits:
        notify(
            "that does not fit; ask for fewer data sets or tokens, make room (mlfusion cache prune), or another --cache"
        )


def _write_page(rows: "list[Row]", path: Path, results: "Results", cache: str | None) -> None:
    """Write the page, with figures of images if the images are available."""
    from mlfusion.analysis import gallery
    from mlfusion.report import write_page

    write_page(rows, path, results=results, pictures=gallery.of_study(rows, results, cache=cache, log=notify))


def _write_findings(rows: "list[Row]", path: Path, results: "Results", recipe: Path, command: str) -> None:
    """Write the findings as Markdown; the head of the recipe gives the title and the introduction."""
    from mlfusion.report import write_findings
    from mlfusion.workflows.recipe import about

    opening, _ = about(recipe)
    title, _, rest = opening.partition(": ")
    write_findings(
        rows,
        path,
        results=results,
        title=title.rstrip(".") or recipe.stem,
        about=rest[:1].upper() + rest[1:],
        command=command,
    )


def _exit_if_failed(failures: "tuple[Failure, ...]") -> None:
    """Print the failures, after all other output, and exit 1 if there are any."""
    for failure in failures:
        notify(f"error: {failure}")
    if failures:
        raise typer.Exit(1)
