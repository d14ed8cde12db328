"""`mlfusion predict`: classifies new images with a saved probe."""

from typing import Annotated

import typer

from mlfusion.cli.options import AsJson, Device
from mlfusion.cli.output import print_json, say


def predict(
    images: Annotated[list[str], typer.Argument(help="Image files.")],
    probe: Annotated[
        str, typer.Option("--probe", metavar="PATH", help="Folder of a probe that `mlfusion probe --save` wrote.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub id of the same backbone, if it has moved.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Number of classes to print.")] = 5,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            min=1,
            help="Largest number of pixels of an image; larger images are rejected; default: 178,956,970.",
        ),
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Classify images with a saved probe and its backbone, and print the most probable classes."""
    from mlfusion.workflows.prediction import predict as run

    predictions = run(probe, images, model=model, top=top, device=device, max_pixels=max_pixels)
    if as_json:
        print_json({"predictions": [prediction.to_json() for prediction in predictions]})
        return
    for prediction in predictions:
        if prediction.number is not None:
            say(f"{prediction.image}: {prediction.number:.{prediction.digits}g}")
            continue
        say(f"{prediction.image}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in prediction.top))
