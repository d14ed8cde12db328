"""A report as files: the tables as Markdown; every figure as SVG, PNG and CSV; every table as Markdown, LaTeX and CSV."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlfusion.errors import MlfusionError
from mlfusion.report import tables, terminal
from mlfusion.report.catalogue import ReportData, figure_files, table_files
from mlfusion.report.figures.charts import require_altair
from mlfusion.report.figures.drawing import Figure, png, svg, to_csv
from mlfusion.report.figures.layers import Cka
from mlfusion.report.figures.strips import strip_figure
from mlfusion.report.pictures import Strip
from mlfusion.results import Results, Row
from mlfusion.system import disk
from mlfusion.system.text import markdown


def write_figures(
    rows: Sequence[Row],
    folder: Path | str,
    *,
    cka: Cka | None = None,
    pictures: Mapping[str, Sequence[Strip]] | None = None,
    paper: bool = False,
) -> list[Path]:
    """Write every figure and table that is not empty; return the paths.

    File names do not depend on what else is written.

    Args:
        rows: rows of any models and data sets; those that cannot be compared (another metric, grid or option) get own files.
        folder: created if missing; existing files are replaced, each as a whole.
        cka: similarity of layers, drawn beside accuracy by layer.
        pictures: {data set: its strips}.
        paper: also draw the comparison with the published scores, if there is one.

    Raises:
        MlfusionError: there are no rows, or the folder cannot be written.
        Unavailable: Altair is not installed; says what to install.
    """
    require_altair()
    data = ReportData(rows, cka=cka, pictures=pictures)
    written: list[Path] = []
    for name, figure in figure_files(data, paper=paper):
        written += _write(folder, name, _drawings(figure) | {".csv": to_csv(figure.numbers)})
        for other, records in figure.more_numbers.items():
            written += _write(folder, f"{name}-{other}", {".csv": to_csv(records)})
    escaped = ReportData([row.renamed(markdown) for row in rows])
    for (name, table), (_, in_markdown) in zip(table_files(data), table_files(escaped), strict=True):
        texts = {".md": tables.markdown(in_markdown), ".tex": tables.latex(table), ".csv": to_csv(table.numbers)}
        written += _write(folder, name, texts)
    return list(dict.fromkeys(written))


def write_strips(strips: Sequence[Strip], folder: Path | str) -> list[Path]:
    """Write strips of pictures, each as SVG and PNG, into a folder; returns the paths.

    Raises:
        MlfusionError: the folder cannot be written.
        Unavailable: Altair is not installed; says what to install.
    """
    return [path for strip in strips for path in _write(folder, strip.name, _drawings(strip_figure(strip)))]


def write_markdown(rows: Sequence[Row], path: Path | str, *, results: Results | None = None) -> Path:
    """Write the tables of the terminal as Markdown, whole or not at all; returns the path. `results` as in `terminal.table`.

    Raises:
        MlfusionError: there are no rows, or the file cannot be written there.
    """
    return write_whole(Path(path), terminal.markdown(rows, results=results))


def _drawings(figure: Figure) -> dict[str, str | bytes]:
    return {".svg": (drawing := svg(figure)), ".png": png(drawing)}


def _write(folder: Path | str, name: str, bodies: Mapping[str, str | bytes]) -> list[Path]:
    return [write_whole(Path(folder, f"{name}{ending}"), body) for ending, body in bodies.items()]


def write_whole(path: Path, body: str | bytes) -> Path:
    """Write a file whole or not at all; its folder is created if missing.

    Raises:
        MlfusionError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.atomic(path, replace=True) as draft:
            draft.write_bytes(body.encode() if isinstance(body, str) else body)
    except OSError as err:
        raise MlfusionError(
            f"cannot write the report to {str(path)!r}: {err.strerror or err}; allowed: a file in a folder that can be "
            "written to. Type: mlfusion report --html report.html"
        ) from err
    return path
