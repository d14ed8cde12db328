"""`mlfusion predict`: predicts new images with a saved probe."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlfusion.cli.options import AsJson, with_options
from mlfusion.cli.output import notify, print_json, say
from mlfusion.specs.options import PredictorOptions
from mlfusion.system.words import plural

if TYPE_CHECKING:
    from mlfusion.errors import BadData
    from mlfusion.workflows.prediction import Prediction


@with_options
def predict(
    *,
    images: Annotated[
        list[str], typer.Argument(help="Image files, and folders: all images below them, in the order of their paths.")
    ],
    probe: Annotated[
        str,
        typer.Option(
            "--probe",
            metavar="PATH",
            help="Folder of a probe that `mlfusion probe --save` wrote, or the id of its result (mlfusion results ls).",
        ),
    ],
    options: PredictorOptions,
    top: Annotated[int, typer.Option("--top", min=1, help="Number of classes to print.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File to write instead of printing; its suffix decides: .csv, .jsonl or .parquet."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip images that cannot be read; their number is printed at the end.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict images with a saved probe and its backbone, and print the most probable classes."""
    from mlfusion.datasets import expand_folders
    from mlfusion.system.progress import track
    from mlfusion.workflows.prediction import load_probe
    from mlfusion.workflows.prediction_files import writing

    files, predictions, skipped = expand_folders(images), list[dict[str, Any]](), list[str]()

    def skip(err: "BadData") -> None:
        notify(f"skipped: {err}")
        skipped.append(str(err))
        bar.advance()

    with ExitStack() as stack:
        write = stack.enter_context(writing(out)) if out else None
        predictor = load_probe(probe, options)
        bar = stack.enter_context(track("predicting", len(files), "images"))
        for prediction in predictor.stream(files, top=top, on_bad=skip if skip_bad else None):
            bar.advance()
            if write:
                write(prediction)
            elif as_json:
                predictions.append(prediction.to_json())
            else:
                say(_line(prediction))
    if as_json:
        body = {"path": str(out), "images": len(files) - len(skipped)} if out else {"predictions": predictions}
        print_json(body | ({"skipped": skipped} if skip_bad else {}))
    elif out:
        say(f"{out.absolute()}: {plural(len(files) - len(skipped), 'prediction')}")
    if skipped:
        notify(f"{plural(len(skipped), 'image')} of {len(files):,} skipped, since they cannot be read")


def _line(prediction: "Prediction") -> str:
    if prediction.number is not None:
        return f"{prediction.image}: {prediction.number:.{prediction.digits}g}"
    return f"{prediction.image}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in prediction.top)
