"""`mlfusion attend`: what a result's attention shows, image by image."""

from pathlib import Path
from typing import Annotated

import typer

from mlfusion.cli.options import AsJson, Cache, ResultsPath
from mlfusion.cli.output import print_json, print_rows, say

SHOWN = 5  # images at either end


def attend(
    row: Annotated[str, typer.Argument(help="Id of a result, or its beginning (mlfusion results ls).")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw it on images, into this folder (PNG and SVG).")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Pictures of a strip.")] = 6,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Where the images are, if they moved.")] = None,
    cache: Cache = None,
    results: ResultsPath = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Show the attention of a probe: on which patches, and which images it reads in early or in late layers."""
    from mlfusion.analysis.attention import maps
    from mlfusion.errors import BadData
    from mlfusion.report.pictures import mean_layers
    from mlfusion.results import Results

    kept = Results(results)
    one = kept.named(row)
    held = one.attention
    if held is None:
        raise BadData(f"{one.probe} does not attend; allowed: results of attentive probes, such as alf and aat")
    shares = kept.arrays(one)["attention"]
    at = mean_layers(shares, held.layers) if len(set(held.layers)) > 1 else None
    over = maps(one, shares) if any(kind not in ("cls", "ap") for kind in held.kinds) else None
    body = {
        "id": one.id,
        "probe": one.probe,
        "images": len(shares),
        "mean_layer": None if at is None else [round(float(layer), 4) for layer in at],
        "maps": None if over is None else [[[round(float(v), 6) for v in line] for line in each] for each in over],
    }
    if as_json:
        print_json(body)
    if at is not None and not as_json:
        order = at.argsort(kind="stable")
        ends = dict.fromkeys([*order[:SHOWN].tolist(), *order[::-1][:SHOWN].tolist()])
        print_rows([{"test image": n, "mean layer": f"{at[n]:.2f}"} for n in ends], nothing="")
        typer.echo(f"mean layer of {len(at):,} images: {at.mean():.2f} ± {at.std():.2f}")
    if over is not None and not as_json:
        whole = over.sum((1, 2))
        typer.echo(
            f"maps of {over.shape[1]} by {over.shape[2]} patches over {len(over):,} images; {100 * whole.mean():.1f} % of the "
            "attention goes to patches"
        )
    if out:
        from mlfusion.analysis import gallery
        from mlfusion.report import write_strips

        strips = gallery.of_row(one, kept, cache=cache, dataset=dataset, count=images)
        write_strips(strips, out)
        for strip in strips:
            say(f"{out / f'{strip.name}.png'}: {strip.description}")
