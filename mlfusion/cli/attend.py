"""`mlfusion attend`: prints and draws the attention of a trained probe, image by image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlfusion.cli.options import AsJson, Cache, ResultsPath
from mlfusion.cli.output import notify, print_json, print_rows, say
from mlfusion.system.words import plural

if TYPE_CHECKING:
    from mlfusion.analysis.attention import AttentionResult

SHOWN = 5  # number of images with the earliest and with the latest mean layer


def attend(
    row: Annotated[str, typer.Argument(help="Id of a result, or the first characters of it (mlfusion results ls).")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write figures of the attention to (PNG and SVG).")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Number of images per figure.")] = 6,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Folder or file of the images, if they have moved.")
    ] = None,
    cache: Cache = None,
    results_path: ResultsPath = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Show the attention of a probe on patches, and the images that it reads in early or in late layers."""
    from mlfusion.analysis.attention import attend as run
    from mlfusion.results import Results

    results = Results(results_path)
    result = run(results, row)
    if as_json:
        maps = (
            None
            if result.maps is None
            else [[[round(float(v), 6) for v in line] for line in each] for each in result.maps]
        )
        layers = None if result.mean_layer is None else [round(float(layer), 4) for layer in result.mean_layer]
        body = {"id": result.row.id, "probe": result.row.probe, "images": len(result.shares)}
        print_json(body | {"mean_layer": layers, "maps": maps})
    else:
        _print_attention(result)
    if out:
        from mlfusion.analysis import gallery
        from mlfusion.report import write_strips

        strips = gallery.of_row(result.row, results, cache=cache, dataset=dataset, count=images)
        write_strips(strips, out)
        for strip in strips:
            notify(f"{out / f'{strip.name}.png'}: {strip.description}")


def _print_attention(result: "AttentionResult") -> None:
    """Print the images with the earliest and the latest mean layer, and the share of attention on patches."""
    from mlfusion.report import differ

    at, maps = result.mean_layer, result.maps
    if at is not None and not differ(at):
        images = plural(len(at), "image")
        say(f"the attention does not depend on the image: its mean layer is {at.mean():.1f} for each of {images}")
    elif at is not None:
        order = at.argsort(kind="stable")
        ends = dict.fromkeys([*order[:SHOWN].tolist(), *order[::-1][:SHOWN].tolist()])
        print_rows([{"test image": n, "mean layer": f"{at[n]:.2f}"} for n in ends])
        say(f"mean layer of {plural(len(at), 'image')}: {at.mean():.2f} ± {at.std():.2f}")
    if maps is not None:
        say(
            f"maps of {maps.shape[1]} by {maps.shape[2]} patches over {plural(len(maps), 'image')}; "
            f"{100 * maps.sum((1, 2)).mean():.1f} % of the attention goes to patches"
        )
