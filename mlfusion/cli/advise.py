"""`mlfusion advise`: a pilot's word on which probe to use, with its evidence."""

from typing import Annotated, Any

import typer

from mlfusion.cli.options import DATASET, MODEL, AsJson, Cache, Dataset, Device, Model, with_options
from mlfusion.cli.output import print_json, print_rows
from mlfusion.specs.options import PilotOptions


@with_options
def advise(
    *,
    model: Model = MODEL,
    dataset: Dataset = DATASET,
    probes: Annotated[
        str | None,
        typer.Option("--probe", help="Candidates; default: the baseline, its neighbours, ALF and AAT."),
    ] = None,
    pilot: PilotOptions,
    cache: Cache = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Recommend a representation and a probe, by a pilot on a few hundred images, and estimate what the rest would cost."""
    from mlfusion.system.progress import duration
    from mlfusion.workflows import advice

    said = advice.advise(model, dataset, pilot, probes=probes or advice.CANDIDATES, cache=cache, device=device)
    if as_json:
        print_json(said.to_json())
        return
    print_rows(
        [
            {
                "probe": each.probe,
                "pilot, %": f"{100 * each.score.value:.1f}",
                "from - to": f"{100 * each.score.low:.1f} - {100 * each.score.high:.1f}",
                "gain, points": _signed(each.gain),
                "cache, MB": f"{each.bytes / 1e6:,.1f}",
                "extraction": duration(each.extract_seconds) if each.extract_seconds else "cached",
                "probing": duration(each.probe_seconds),
            }
            for each in said.candidates
        ],
        nothing="",
    )
    metric = said.metric.replace("_", " ")
    typer.echo(
        f"\nA pilot on {said.images:,} of {said.train_images:,} training images, {duration(said.seconds)}: {metric} of images "
        "left out, with 95 % intervals; probing is one seed of the paper's grid. The test images were not looked at.\n"
        f"Use {said.best.probe}: {100 * said.best.score.value:.1f} %{_over(said.best.gain)}."
    )
    if said.enough is not said.best:
        typer.echo(
            f"{said.enough.probe} is cheaper, and the pilot cannot tell it from the best "
            f"({_signed(said.enough.behind)} points behind)."
        )


def _signed(gain: Any) -> str:
    return (
        f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})".replace("-", "\N{MINUS SIGN}")
        if gain
        else ""
    )


def _over(gain: Any) -> str:
    return f", {_signed(gain)} points over cls-last/linear" if gain else ""
