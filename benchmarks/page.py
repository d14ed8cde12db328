"""Where benchmarks publish: the part of a page in docs/ that lies between two marks is theirs, and nobody writes it by hand."""

import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def put(page: str, part: str, text: str) -> None:
    """Replace what is between `<!-- part -->` and `<!-- end of part -->` of docs/`page`.

    Raises:
        ValueError: the page has no such part.
    """
    path = DOCS / page
    begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    old = path.read_text(encoding="utf-8")
    new, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{text.strip()}\n{end}", old, flags=re.S)
    if count != 1:
        raise ValueError(f"{path} has {count} parts {begin} … {end}; allowed: one")
    path.write_text(new, encoding="utf-8")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Markdown, the first `left` columns flush left."""
    marks = ["---" if n < left else "---:" for n in range(len(heads))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, marks, *rows))


def machine() -> str:
    """The processor's name as it gives it, its cores, and what of it matters to matrix products."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        name = (re.findall(r"model name\s*:\s*(.+)", text) or [name])[0]
        flags = set((re.findall(r"flags\s*:\s*(.+)", text) or [""])[0].split())
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name}, {os.cpu_count()} cores" + (f" ({', '.join(wide)})" if wide else "")
