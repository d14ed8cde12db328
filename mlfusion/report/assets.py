"""JavaScript and CSS inside the page, read from installed packages: Vega from vl-convert, DataTables from itables.

The project holds no copy of them.
"""

import re
from dataclasses import dataclass
from functools import cache

from mlfusion.errors import Unavailable


@dataclass(frozen=True)
class Assets:
    """A script for an element of its own, and the styles that it needs."""

    script: str
    style: str


@cache
def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script for all figures; bundling takes seconds."""
    import vl_convert

    return _embedded(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"), "</script")


@cache
def data_tables() -> Assets:
    """DataTables with its extensions (sorting, searching, filters in the headings, export) as `window.dataTables`.

    Raises:
        Unavailable: the installed itables holds it in an unknown form.
    """
    import itables
    from itables.utils import read_package_file

    bundle = read_package_file("html", "dt_bundle.js")
    # The bundle is a module; a page of one file can import none. Its exports are made a global's fields instead.
    head, export, tail = bundle.rpartition("export{")
    names, _, rest = tail.partition("}")
    pairs = re.findall(r"([\w$]+) as ([\w$]+)", names)
    if not export or "jQuery" not in {name for _, name in pairs}:
        raise Unavailable(
            f"itables {itables.__version__} does not hold DataTables in the form that the page takes it in; allowed: a version "
            "from 2.5 on. Type: pip install 'mlfusion[report]'"
        )
    exports = ",".join(f"{name}:{inner}" for inner, name in pairs)
    script = f'(()=>{{"use strict";{head}window.dataTables={{{exports}}};{rest.lstrip(";")}\n}})();'
    return Assets(_embedded(script, "</script"), _embedded(read_package_file("html", "dt_bundle.css"), "</style"))


def _embedded(text: str, end: str) -> str:
    """Text that an HTML element can hold: nothing in it ends the element or begins a comment.

    '<!--' may stand in a string or a regular expression, where '<\\x21--' means the same.
    """
    assert end not in text.lower(), f"the library's code would end its own element with {end}"
    return text.replace("<!--", r"<\x21--")
