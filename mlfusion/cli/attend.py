"""`mlfusion attend`: what a result's attention shows, image by image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlfusion.cli.options import AsJson, Cache, ResultsPath
from mlfusion.cli.output import print_json, print_rows, say

if TYPE_CHECKING:
    from mlfusion.analysis.attention import Attended

SHOWN = 5  # images at either end


def attend(
    row: Annotated[str, typer.Argument(help="Id of a result, or its beginning (mlfusion results ls).")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for pictures of the attention (PNG and SVG).")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Number of images per figure.")] = 6,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Folder or file of the images, if they have moved.")
    ] = None,
    cache: Cache = None,
    results: ResultsPath = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Show the attention of a probe: on which patches, and which images it reads in early or in late layers."""
    from mlfusion.analysis.attention import attend as run
    from mlfusion.results import Results

    kept = Results(results)
    done = run(kept, row)
    if as_json:
        maps = (
            None if done.maps is None else [[[round(float(v), 6) for v in line] for line in each] for each in done.maps]
        )
        layers = None if done.mean_layer is None else [round(float(layer), 4) for layer in done.mean_layer]
        body = {"id": done.row.id, "probe": done.row.probe, "images": len(done.shares)}
        print_json(body | {"mean_layer": layers, "maps": maps})
    else:
        _print_attention(done)
    if out:
        from mlfusion.analysis import gallery
        from mlfusion.report import write_strips

        strips = gallery.of_row(done.row, kept, cache=cache, dataset=dataset, count=images)
        write_strips(strips, out)
        for strip in strips:
            say(f"{out / f'{strip.name}.png'}: {strip.description}")


def _print_attention(done: "Attended") -> None:
    """The images at either end of the layers, and the share of attention on patches."""
    at, maps = done.mean_layer, done.maps
    if at is not None:
        order = at.argsort(kind="stable")
        ends = dict.fromkeys([*order[:SHOWN].tolist(), *order[::-1][:SHOWN].tolist()])
        print_rows([{"test image": n, "mean layer": f"{at[n]:.2f}"} for n in ends], nothing="")
        typer.echo(f"mean layer of {len(at):,} images: {at.mean():.2f} ± {at.std():.2f}")
    if maps is not None:
        typer.echo(
            f"maps of {maps.shape[1]} by {maps.shape[2]} patches over {len(maps):,} images; "
            f"{100 * maps.sum((1, 2)).mean():.1f} % of the attention goes to patches"
        )
