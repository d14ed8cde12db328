"""`mlfusion doctor`: what stands in the way of a run, and what to do about it."""

from typing import Annotated

import typer

from mlfusion.cli.words import AsJson, Cache, Device, print_json

MARKS = {"ok": "ok  ", "note": "note", "problem": "FAIL"}


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Catalogue name, hub id, or folder; none: the machine alone.")
    ] = None,
    cache: Cache = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Check libraries, device, memory, disk and hub; of a model its access, files, blocks and tokens. Downloads nothing."""
    from mlfusion.doctor import examine

    found = []
    for one in examine(model, cache=cache, device=device):
        found.append(one)
        if not as_json:
            typer.echo(f"{MARKS[one.state]}  {one.check}: {one.found}" + (f"\n      → {one.do}" if one.do else ""))
    if as_json:
        print_json({"model": model, "sound": _sound(found), "findings": [one.to_json() for one in found]})
    if not _sound(found):
        raise typer.Exit(1)


def _sound(found: list) -> bool:  # type: ignore[type-arg]
    return all(one.state != "problem" for one in found)
