"""`mlfusion report`: results as a table, a page, figures and tables as files, and a comparison with the published scores."""

from pathlib import Path
from typing import Annotated

import typer

from mlfusion.cli.options import Cache
from mlfusion.cli.output import print_table, say
from mlfusion.errors import UnknownName

AGAINST = ("paper",)
MAX_SHOWN = 40  # lines of the comparison in the terminal; its CSV and the page have all


def report(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
    html: Annotated[Path | None, typer.Option(help="Write one self-contained HTML page to this file.")] = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="Write every figure (SVG, PNG, CSV) and table (Markdown, LaTeX, CSV) to this folder."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown to this file.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Compare the scores with published ones; the only choice is paper.")
    ] = None,
    similarity: Annotated[
        bool,
        typer.Option(
            "--cka", help="Draw the similarity of each layer with the last (linear and RBF CKA), from cached features."
        ),
    ] = False,
    long: Annotated[
        bool,
        typer.Option("--long", help="Print one table for each model and data set, with parameters and times."),
    ] = False,
    cache: Cache = None,
) -> None:
    """Print a table of results; write a page, figures or tables, or compare with published scores, if asked for."""
    from rich.console import Console

    from mlfusion.report import compare_with_published, published, write_figures, write_markdown, write_page
    from mlfusion.results import Results

    if against not in (None, *AGAINST):
        raise UnknownName("comparison", against or "", AGAINST)
    store = Results(results)
    rows = store.require()
    cka = None
    if similarity:
        from mlfusion.analysis.similarity import to_the_last

        cka = to_the_last(rows, cache=cache, say=say)
    if html:
        write_page(rows, html, results=store, cka=cka)
    if figures:
        files = write_figures(rows, figures, cka=cka, paper=against == "paper")
    if markdown:
        write_markdown(rows, markdown)
    if against:
        Console().print(published.table(compare_with_published(rows), most=MAX_SHOWN))
    else:
        print_table(rows, long=long)
    if html:
        typer.echo(f"report: {html}")
    if figures:
        typer.echo(f"figures: {len(files)} files in {figures}")
