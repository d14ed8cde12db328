"""`mlfusion doctor`: prints what would stop a run, and what to do about it."""

from typing import Annotated

import typer

from mlfusion.cli.options import AsJson, Cache, Device
from mlfusion.cli.output import print_json

MARKS = {"ok": "ok  ", "note": "note", "problem": "FAIL"}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="Catalogue name, hub id or folder of a model; without it, only the machine is checked."),
    ] = None,
    cache: Cache = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Check libraries, device, memory, disk and hub, and the access, files, blocks and tokens of a model. Downloads nothing."""
    from mlfusion.workflows import doctor as library

    found = []
    for one in library.doctor(model, cache=cache, device=device):
        found.append(one)
        if not as_json:
            typer.echo(f"{MARKS[one.state]}  {one.check}: {one.found}" + (f"\n      → {one.do}" if one.do else ""))
    if as_json:
        print_json({"model": model, "sound": library.sound(found), "findings": [one.to_json() for one in found]})
    if not library.sound(found):
        raise typer.Exit(1)
