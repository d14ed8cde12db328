"""Every figure and table of a report as files: SVG, PNG and the numbers as CSV; tables as Markdown and LaTeX."""

import logging
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mlfusion.errors import MlfusionError
from mlfusion.report import published, tables
from mlfusion.report.figures import block, gains, study
from mlfusion.report.figures.drawing import Figure, needs_altair, numbers_csv, png, svg
from mlfusion.report.figures.pictures import strip_figure
from mlfusion.report.pictures import Strip
from mlfusion.report.summary import Block, Study, blocks, studies
from mlfusion.results import Row

log = logging.getLogger(__name__)


def write_figures(
    rows: Sequence[Row],
    folder: Path | str,
    *,
    cka: block.Cka | None = None,
    pictures: Mapping[str, Sequence[Strip]] | None = None,
    paper: bool = False,
) -> list[Path]:
    """Write all that the rows have something for, under names that do not depend on the rest; returns what was written.

    Args:
        rows: of any models and data sets; what cannot be compared (another metric, grid or option) gets files of its own.
        folder: made if need be; files of the same names are replaced, each whole.
        cka: likeness of layers, to be drawn beside accuracy by layer.
        pictures: {data set: its strips}.
        paper: also the comparison with the published numbers, where there is one.

    Raises:
        MlfusionError: there are no rows, or the folder cannot be written.
        Unavailable: Altair is not installed; says what to install.
    """
    held = blocks(rows)
    needs_altair()
    written: list[Path] = []
    for place, figure in _named(held, rows, cka, pictures or {}, paper):
        drawn = svg(figure)
        kinds: dict[str, str | bytes] = {".svg": drawn, ".png": png(drawn), ".csv": numbers_csv(figure.numbers)}
        written += _write(Path(folder), place, kinds)
        for name, records in figure.more.items():
            written += _write(Path(folder), f"{place}-{name}", {".csv": numbers_csv(records)})
    for place, sheet in sheets(held):
        texts = {".md": tables.markdown(sheet), ".tex": tables.latex(sheet), ".csv": numbers_csv(sheet.numbers)}
        written += _write(Path(folder), place, texts)
    return list(dict.fromkeys(written))


def study_figures(one: Study) -> Iterable[Figure]:
    """What is over the models and data sets of a study, in the order of the page."""
    made = (
        gains.by_probe(one),
        gains.by_model(one),
        study.ranks(one),
        gains.by_token(one),
        gains.by_heads(one),
        study.cost(one),
        study.seeds(one),
        study.train_test(one),
    )
    return (figure for figure in made if figure)


def sheets(held: Sequence[Block]) -> list[tuple[str, tables.Sheet]]:
    """(name of its files, table): table 1 in its two styles, and one a model."""
    made = []
    for one in studies(held):
        if not one.probes:
            continue
        each = [tables.by_significance(one), tables.by_rank(one)]
        if len(one.models) > 1:
            each += [tables.of_model(one, model) for model in one.models]
        made += [(_place(sheet.name, one), sheet) for sheet in each]
    return made


def _place(name: str, one: Study) -> str:
    """'gains-by-probe', or of one of several studies of the same rows 'gains-by-probe.quick-grid'."""
    return tables.slug(name) + (f".{tables.slug(one.name)}" if one.name else "")


def _named(
    held: Sequence[Block],
    rows: Sequence[Row],
    cka: block.Cka | None,
    pictures: Mapping[str, Sequence[Strip]],
    paper: bool,
) -> Iterable[tuple[str, Figure]]:
    for one in studies(held):
        for figure in study_figures(one):
            yield _place(figure.name, one), figure
        attended = block.attended(one)
        for model in one.models:
            mine = [pair for pair in attended if pair[0].model == model]
            if mine:
                yield _place(f"attention-{model}", one), block.attention(mine, top=block.top_share(attended))
            if one.probes and (scores := study.scores_of(one, model)):
                yield _place(scores.name, one), scores
        for dataset in one.datasets:
            mine_too = [found for model in one.models if (found := one.block(model, dataset))]
            if probed := [found for found in mine_too if found.probes]:
                yield _place(f"accuracy-{dataset}", one), block.accuracy(probed)
            if layered := [found for found in mine_too if found.by_layer]:
                yield _place(f"layers-{dataset}", one), block.by_layer(layered, cka)
    for dataset, strips in pictures.items():
        for strip in strips:
            yield tables.slug(f"{dataset}-{strip.name}"), strip_figure(strip)
    if paper and (compared := published.figure(published.beside(held))):
        yield compared.name, compared


def _write(folder: Path, name: str, kinds: Mapping[str, str | bytes]) -> list[Path]:
    return [write_whole(folder / f"{name}{kind}", body) for kind, body in kinds.items()]


def write_whole(path: Path, body: str | bytes) -> Path:
    """Write a file whole or not at all; its folder is made if need be.

    Raises:
        MlfusionError: it cannot be written there.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(body.encode() if isinstance(body, str) else body)
        draft.replace(path)
    except OSError as err:
        raise MlfusionError(
            f"cannot write the report to {str(path)!r}: {err.strerror or err}; allowed: a file in a folder that can be "
            "written to. Type: mlfusion report --html report.html"
        ) from err
    finally:
        if draft.exists():
            draft.unlink()
    return path
