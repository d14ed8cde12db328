"""`mlfusion doctor`: prints the findings of the diagnostics, with advice for each problem."""

from typing import Annotated

import typer

from mlfusion.cli.options import AsJson, Cache, Device
from mlfusion.cli.output import print_json, say

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
    """Check libraries, device, memory, disk and hub, and the access, files, blocks and tokens of a model; download nothing."""
    from msgspec import to_builtins

    from mlfusion.workflows import doctor as diagnostics

    findings = []
    for finding in diagnostics.doctor(model, cache=cache, device=device):
        findings.append(finding)
        if not as_json:
            say(f"{MARKS[finding.state]}  {finding.check}: {finding.description}")
            if finding.advice:
                say(f"      → {finding.advice}")
    passed = diagnostics.passed(findings)
    if as_json:
        print_json({"model": model, "sound": passed, "findings": to_builtins(findings)})
    if not passed:
        raise typer.Exit(1)
