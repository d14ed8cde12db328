"""`mlfusion report`: rows to a table, a page, figures and tables as files, and our numbers beside the published ones."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mlfusion.cli.words import Cache, print_table, say
from mlfusion.errors import UnknownName

AGAINST = ("paper",)
SHOWN = 40  # of the comparison in the terminal; its CSV and the page have all


def report(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
    html: Annotated[Path | None, typer.Option("--html", help="Write one self-contained page here.")] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures", help="Write every figure (SVG, PNG, CSV) and table (Markdown, LaTeX, CSV) into this folder."
        ),
    ] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the tables as Markdown here.")] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="paper: set the scores beside the published ones.")
    ] = None,
    similarity: Annotated[
        bool,
        typer.Option(
            "--cka", help="Draw the layers' likeness to the last one (CKA, linear and by an RBF), from cached features."
        ),
    ] = False,
    long: Annotated[
        bool,
        typer.Option("--long", help="In the terminal, a table for each model and data set, with parameters and times."),
    ] = False,
    cache: Cache = None,
) -> None:
    """A table of results in the terminal; a page, figures or a comparison if asked for."""
    from mlfusion.report import blocks
    from mlfusion.report import markdown as written
    from mlfusion.results import Results

    if against not in (None, *AGAINST):
        raise UnknownName("comparison", against or "", AGAINST)
    store = Results(results)
    rows = store.require()
    cka = None
    if similarity:
        from mlfusion.similarity import to_the_last

        cka = to_the_last(rows, cache=cache, say=say)
    if html:
        from mlfusion.report import write_page

        write_page(rows, html, results=store, cka=cka)
    if figures:
        from mlfusion.report import write_figures

        files = write_figures(rows, figures, cka=cka, paper=against == "paper")
    if markdown:
        markdown.write_text(written(rows), encoding="utf-8")
    if against:
        _print_against(blocks(rows))
    else:
        print_table(rows, long=long)
    if html:
        typer.echo(f"report: {html}")
    if figures:
        typer.echo(f"figures: {len(files)} files in {figures}")


def _print_against(held: Any) -> None:
    """Our scores beside the published ones: all where they are few, else those that are flagged."""
    from rich.console import Console

    from mlfusion.report import published

    Console().print(published.table(published.beside(held), most=SHOWN))
