"""`mlfusion advise`: recommends a probe by a pilot study, and prints the evidence."""

from typing import Annotated, Any

import typer

from mlfusion.cli.options import DATASET, MODEL, AsJson, Cache, Dataset, Device, Model, with_options
from mlfusion.cli.output import print_json, print_rows, say
from mlfusion.specs.definitions import command
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
    from mlfusion.statistics.uncertainty import few_test_images
    from mlfusion.system.progress import duration
    from mlfusion.workflows import advice

    result = advice.advise(model, dataset, pilot, probes=probes or advice.CANDIDATES, cache=cache, device=device)
    if as_json:
        print_json(result.to_json())
        return
    print_rows(
        [
            {
                "probe": candidate.probe,
                "pilot, %": f"{100 * candidate.score.value:.1f}",
                "from - to": _ends(candidate.score, ".1f", " - "),
                "gain, points": _difference_text(candidate.gain),
                "cache, MB": f"{candidate.bytes / 1e6:,.1f}",
                "extraction": duration(candidate.extract_seconds) if candidate.extract_seconds else "cached",
                "probing": duration(candidate.probe_seconds),
            }
            for candidate in result.candidates
        ]
    )
    metric = result.metric.replace("_", " ")
    over = f", {_difference_text(result.best.gain)} points over cls-last/linear" if result.best.gain else ""
    say()
    say(
        f"A pilot on {result.images:,} of {result.train_images:,} training images, {duration(result.seconds)}: {metric} of "
        "images left out, with 95 % intervals; probing is one seed of the paper's grid. The test images were not looked at."
    )
    say(f"Use {result.best.probe}: {100 * result.best.score.value:.1f} %{over}.")
    if result.cheapest_equivalent is not result.best:
        say(
            f"{result.cheapest_equivalent.probe} is cheaper, and the pilot cannot tell it from the best "
            f"({_difference_text(result.cheapest_equivalent.behind)} points behind{_reason(result.cheapest_equivalent.lead)})."
        )
    if result.wants_folds:
        again = command("probe", ["--folds", "5"], model=model, dataset=dataset, cache=cache)
        say(f"{few_test_images(result.test_images)}: {again}")


def _difference_text(gain: Any) -> str:
    return f"{100 * gain.value:+.1f} ({_ends(gain, '+.1f', ' to ')})".replace("-", "\N{MINUS SIGN}") if gain else ""


def _reason(lead: Any) -> str:
    """Why the lead of the best candidate could not be told; empty if it could."""
    return f"; {lead.reason}" if lead and lead.reason else ""


def _ends(one: Any, form: str, between: str) -> str:
    """The ends of an interval in percent; 'no interval' if it is refused."""
    return "no interval" if one.low is None else between.join(f"{100 * end:{form}}" for end in (one.low, one.high))
