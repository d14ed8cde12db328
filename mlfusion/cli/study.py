"""`mlfusion run`: a recipe's study, planned, done and reported."""

from pathlib import Path
from typing import Annotated

import typer

from mlfusion.cli.words import (
    AsJson,
    Cache,
    ResultsPath,
    Track,
    print_json,
    print_rows,
    print_table,
    row_json,
    say,
    say_extracted,
    write_page,
)


def run(
    recipe: Annotated[Path, typer.Argument(help="A file of pipelines/.")],
    data: Annotated[Path | None, typer.Option("--data", help="The folder that $DATA means in the recipe.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and do nothing.")] = False,
    cache: Cache = None,
    results: ResultsPath = Path("results"),
    html: Annotated[Path | None, typer.Option("--html", help="The page; default RESULTS/<recipe>.html.")] = None,
    device: Annotated[
        str, typer.Option("--device", help="Of the forward pass; probes train on the processor.")
    ] = "auto",
    track: Track = "",
    as_json: AsJson = False,
) -> None:
    """Both stages and the report, as a recipe says. What is cached or done already is not done again."""
    from mlfusion import study
    from mlfusion.progress import duration
    from mlfusion.recipe import load

    planned = study.plan(load(recipe, data=data), cache=cache, results=results, device=device)
    if dry_run and as_json:
        print_json(planned.to_json())
    if (dry_run and not as_json) or (not planned.is_done and not as_json):
        lines = [
            {
                "model": case.asked.names.model,
                "dataset": case.asked.names.dataset,
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
        print_rows(lines, nothing="nothing can be planned")
    say(str(planned))
    if not planned.fits:
        say(
            "that does not fit; ask for fewer data sets or tokens, make room (mlfusion cache prune), or another --cache"
        )
    if dry_run:
        _end(planned.failures)
        return
    done = study.run(planned, cache=cache, results=results, track=track, say=say)
    for one in done.extracted:
        say_extracted(one.to_json(), say=say)
    page = html or results / f"{recipe.stem}.html"
    if done.rows:
        write_page(done.rows, page, results)
    if as_json:
        print_json(
            {
                "features": [one.to_json() for one in done.extracted],
                "results": [row_json(row) for row in done.rows],
                "made": done.made,
                "failures": [vars(failure) for failure in done.failures],
                "html": str(page) if done.rows else None,
            }
        )
    elif done.rows:
        print_table(done.rows)
        typer.echo(f"report: {page}")
    _end(done.failures)


def _end(failures: object) -> None:
    """Exit 1 where something failed, said last so that it is seen."""
    for failure in list(failures):  # type: ignore[call-overload]
        say(f"error: {failure}")
    if failures:
        raise typer.Exit(1)
