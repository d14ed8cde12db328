"""The report: rows in, an answer out, in the terminal or as one HTML file. Pure functions of rows; needs no torch.

`summary` sets rows side by side, `words` says what they show, `figures` draws it, `terminal` and `page` present it.
"""

from mlfusion.report.page import write_page
from mlfusion.report.terminal import markdown, table

__all__ = ["markdown", "table", "write_page"]
