"""One place for each way in which text from rows, caches and data sets leaves the program.

Names of models, data sets and classes may come from a stranger, and no way out lets one act: `one_line` is for a terminal,
`markdown` and `code_span` are for Markdown, `csv_cell` for spreadsheets and `json_text` for JSON. HTML is escaped by Jinja's
own rule; reports compare rows whose names `one_line` has written, since XML cannot hold control characters.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from mlfusion.errors import printable

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters for which spreadsheets take a text for a formula."""

_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {c: f"\\{c}" for c in "\\`*[]|~"})


def one_line(text: str) -> str:
    """Text as one line of a terminal: `printable`, and line breaks as escapes too."""
    if text.isascii() and text.isprintable():  # nearly all
        return text
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def markdown(text: str) -> str:
    """Text for a sentence or a table's cell in Markdown: no HTML, no link, no code, no further line or column."""
    return one_line(text).translate(_MARKDOWN)


def code_span(text: str) -> str:
    """Text as code in Markdown, between more backticks than it has; in a table too."""
    text = one_line(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{space}{text}{space}{fence}"


def csv_cell(value: Any) -> Any:
    """A cell of a CSV: a text that a spreadsheet would take for a formula gets an apostrophe in front; numbers stay."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def json_text(body: Any, *, indent: int | None = None) -> str:
    """JSON for a terminal or a file: no NaN, which is no JSON, but null; hidden characters as escapes, which JSON has."""
    try:
        text = json.dumps(body, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(body), ensure_ascii=False, indent=indent, allow_nan=False)
    # Hidden characters stand inside of strings alone: JSON's own structure has none but line breaks.
    return "".join(c if printable(c) == c else f"\\u{ord(c):04x}" for c in text) if printable(text) != text else text


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
