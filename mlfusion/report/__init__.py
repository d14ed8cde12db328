"""The report: rows in, an answer out, in the terminal, as one HTML file, or as the figures and tables of a paper.

Functions of rows that need no torch. `summary` and `studies` group rows for comparison, `numbers` and `sentences` write what
they show, `figures` and `tables` draw it, `published` compares it with the study's own numbers. `catalogue` lists the figures,
and `sections` those parts of the page that hold them. `terminal`, `page`, `files` and `findings` present the report; `pictures`
draws images with attention maps, and `commands` writes the commands that reproduce the results.
"""

from mlfusion.report.files import write_figures, write_markdown, write_strips
from mlfusion.report.findings import write_findings
from mlfusion.report.page import write_page
from mlfusion.report.pictures import Picture, Strip, differ, early_and_late, overlay
from mlfusion.report.published import compare_with_published
from mlfusion.report.summary import comparison_groups
from mlfusion.report.terminal import markdown, table

__all__ = [
    "Picture",
    "Strip",
    "compare_with_published",
    "comparison_groups",
    "differ",
    "early_and_late",
    "markdown",
    "overlay",
    "table",
    "write_figures",
    "write_findings",
    "write_markdown",
    "write_page",
    "write_strips",
]
