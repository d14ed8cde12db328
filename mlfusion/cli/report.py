"""`mlfusion report`: writes results as tables, figures and a page, and compares them with published scores."""

from pathlib import Path
from typing import Annotated

import typer

from mlfusion.cli.options import Cache, with_options
from mlfusion.cli.output import notify, print_renderable, print_table, say
from mlfusion.specs.selection import ReportOptions
from mlfusion.system.words import plural

MAX_SHOWN = 40  # lines of the comparison in the terminal; the CSV file and the page have all lines


@with_options
def report(
    *,
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
    options: ReportOptions,
    cache: Cache = None,
) -> None:
    """Print a table of results; optionally write a page, figures or tables, or compare with published scores."""
    from mlfusion.report import compare_with_published, published, write_figures, write_markdown, write_page
    from mlfusion.results import Results

    store = Results(results)
    rows = store.require()
    cka = None
    if options.cka:
        from mlfusion.analysis.similarity import similarity_to_last

        cka = similarity_to_last(rows, cache=cache, log=notify)
    if options.html:
        write_page(rows, Path(options.html), results=store, cka=cka)
    if options.figures:
        files = write_figures(rows, Path(options.figures), cka=cka, paper=options.against == "paper")
    if options.markdown:
        write_markdown(rows, Path(options.markdown), results=store)
    if options.against:
        comparisons = compare_with_published(rows)
        print_renderable(lambda width: published.table(comparisons, max_lines=MAX_SHOWN))
    else:
        print_table(rows, store, long=options.long)
    if options.html:
        say(f"report: {options.html}")
    if options.figures:
        say(f"figures: {plural(len(files), 'file')} in {options.figures}")
