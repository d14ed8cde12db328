"""The report: rows in, an answer out, in the terminal, as one HTML file, or as the figures and tables of a paper. Pure
functions of rows; needs no torch.

`summary` sets rows side by side, `words` says what they show, `figures` draws it, `tables` writes it, `published` sets it
beside the study's own numbers; `terminal`, `page` and `files` present it. `pictures` holds images with maps of attention.
"""

from mlfusion.report.files import write_figures
from mlfusion.report.page import write_page
from mlfusion.report.pictures import Picture, Strip, leaning, overlay
from mlfusion.report.summary import blocks
from mlfusion.report.terminal import markdown, table

__all__ = ["Picture", "Strip", "blocks", "leaning", "markdown", "overlay", "table", "write_figures", "write_page"]
