"""`mlfusion run`: a recipe's study, planned, done and reported."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlfusion.cli.options import AsJson, with_options
from mlfusion.cli.output import print_json, print_rows, print_table, row_json, say, say_extracted
from mlfusion.specs.definitions import command
from mlfusion.specs.options import RunOptions, StorageOptions

if TYPE_CHECKING:
    from mlfusion.results import Results, Row
    from mlfusion.workflows.study import Failure, Plan


@with_options
def run(
    *,
    recipe: Annotated[Path, typer.Argument(help="A file of pipelines/.")],
    asked: RunOptions,
    storage: StorageOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and do nothing.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="File of the page; default: RESULTS/<recipe>.html.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the findings as a page of text here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run both stages and write the report, as a recipe says. What is cached or done already is not done again."""
    from mlfusion.results import Results
    from mlfusion.workflows import study
    from mlfusion.workflows.recipe import load

    whole = load(recipe, data=asked.data)
    if asked.seeds:
        whole = replace(whole, search=replace(whole.search, seeds=asked.seeds))
    planned = study.plan(whole, storage, device=asked.device)
    _print_plan(planned, dry_run=dry_run, as_json=as_json)
    if dry_run:
        _end(planned.failures)
        return
    done = study.run(planned, log=say)
    for one in done.extracted:
        say_extracted(one.to_json(), say=say)
    page = html or Path(storage.results) / f"{recipe.stem}.html"
    if done.rows:
        kept = Results(Path(storage.results))
        _page(done.rows, page, kept, storage.cache)
        if markdown:
            # What is given as --data is a folder of this machine: no page says where it is.
            words = replace(asked, data="DIR" if asked.data else None, device="auto").words()
            again = command("run", [str(recipe), *words, "--markdown", str(markdown)])
            _text(done.rows, markdown, kept, recipe, again)
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
        typer.echo(f"report: {page}" + (f", {markdown}" if markdown else ""))
    _end(done.failures)


def _print_plan(planned: "Plan", *, dry_run: bool, as_json: bool) -> None:
    """What is missing, case by case where that was asked for or something is missing."""
    from mlfusion.system.progress import duration

    if dry_run and as_json:
        print_json(planned.to_json())
    elif not as_json and (dry_run or not planned.is_done):
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


def _page(rows: "list[Row]", path: Path, kept: "Results", cache: str | None) -> None:
    """The page, with pictures where images are at hand."""
    from mlfusion.analysis import gallery
    from mlfusion.report import write_page

    write_page(rows, path, results=kept, pictures=gallery.of_study(rows, kept, cache=cache, say=say))


def _text(rows: "list[Row]", path: Path, kept: "Results", recipe: Path, command: str) -> None:
    """The page of text, headed by what the recipe says of itself."""
    from mlfusion.report import write_findings
    from mlfusion.workflows.recipe import about

    opening, _ = about(recipe)
    title, _, rest = opening.partition(": ")
    write_findings(
        rows,
        path,
        results=kept,
        title=title.rstrip(".") or recipe.stem,
        about=rest[:1].upper() + rest[1:],
        command=command,
    )


def _end(failures: "tuple[Failure, ...]") -> None:
    """Exit 1 where something failed, said last so that it is seen."""
    for failure in failures:
        say(f"error: {failure}")
    if failures:
        raise typer.Exit(1)
