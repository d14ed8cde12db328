"""`mlfusion report`: results as a table, a page, figures and tables as files, and a comparison with the published scores."""

from pathlib import Path
from typing import Annotated

import typer

from mlfusion.cli.options import Cache, with_options
from mlfusion.cli.output import print_table, say
from mlfusion.specs.options import ReportOptions

MAX_SHOWN = 40  # lines of the comparison in the terminal; its CSV and the page have all


@with_options
def report(
    *,
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
    asked: ReportOptions,
    cache: Cache = None,
) -> None:
    """Print a table of results; write a page, figures or tables, or compare with published scores, if asked for."""
    from rich.console import Console

    from mlfusion.report import compare_with_published, published, write_figures, write_markdown, write_page
    from mlfusion.results import Results

    store = Results(results)
    rows = store.require()
    cka = None
    if asked.cka:
        from mlfusion.analysis.similarity import to_the_last

        cka = to_the_last(rows, cache=cache, say=say)
    if asked.html:
        write_page(rows, Path(asked.html), results=store, cka=cka)
    if asked.figures:
        files = write_figures(rows, Path(asked.figures), cka=cka, paper=asked.against == "paper")
    if asked.markdown:
        write_markdown(rows, Path(asked.markdown))
    if asked.against:
        Console().print(published.table(compare_with_published(rows), most=MAX_SHOWN))
    else:
        print_table(rows, long=asked.long)
    if asked.html:
        typer.echo(f"report: {asked.html}")
    if asked.figures:
        typer.echo(f"figures: {len(files)} files in {asked.figures}")
