"""Writes docs/reference.md: every command with its Python call and its options, and every options class with its fields.

python -m mlfusion.cli.reference > docs/reference.md
"""

from collections.abc import Iterator
from typing import Any

import typer.main

from mlfusion.specs import options, selection
from mlfusion.specs.definitions import EFFECTS, Options, definitions

CALLS: dict[str, str] = {
    "extract": "mlfusion.extract",
    "plan": "mlfusion.plan",
    "probe": "mlfusion.probe",
    "run": "mlfusion.run",
    "report": "mlfusion.report.write_page",
    "advise": "mlfusion.advise",
    "attend": "mlfusion.analysis.attention.attend",
    "predict": "mlfusion.predict",
    "doctor": "mlfusion.workflows.doctor.doctor",
    "data": "mlfusion.datasets.describe.describe",
    "ls": "mlfusion.workflows.listings.listing",
    "pretrain": "mlfusion.embedded.pretrain.pretrain",
    "cache ls": "mlfusion.store.housekeeping.list_entries",
    "cache du": "mlfusion.store.housekeeping.disk_usage",
    "cache explain": "mlfusion.explain",
    "cache verify": "mlfusion.store.verify.verify",
    "cache prune": "mlfusion.store.housekeeping.prune",
    "cache export": "mlfusion.store.housekeeping.copy_entries",
    "cache embeddings": "mlfusion.Features.write",
    "cache import": "mlfusion.store.housekeeping.copy_entries",
    "cache path": "mlfusion.store.housekeeping.entry_paths",
    "results ls": "mlfusion.Results.listing",
    "results show": "mlfusion.statistics.certainty",
    "results best": "mlfusion.results.best.best",
    "results rm": "mlfusion.Results.remove",
    "results compare": "mlfusion.statistics.compare_named",
    "results rank": "mlfusion.statistics.rank",
    "results export": "mlfusion.results.export.write",
    "results import": "mlfusion.Results.take_from",
    "results rerun": "mlfusion.rerun",
    "results track": "mlfusion.results.trackers.log_rows",
}
"""Command → the Python function that does the same."""

HEAD = """# Which commands and options are there?

`python -m mlfusion.cli.reference` writes this page from the definitions in `mlfusion/specs/` and the commands. Do
not edit it by hand.

Every command has a Python function that does the same. Functions of `mlfusion` itself take the fields of the options classes as
keywords, such as `mlfusion.extract("clip-vit-b16", "dtd", layers="last")`; the other functions take the classes themselves.
"""


def commands(group: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full name of every command, such as 'cache ls', and the command."""
    from mlfusion.cli import app

    root: Any = group or typer.main.get_command(app)
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def option_classes() -> list[type[Options]]:
    """Every options class, in the order of definition."""
    defined = (vars(options) | vars(selection)).values()
    classes = [value for value in defined if isinstance(value, type) and issubclass(value, Options)]
    return [cls for cls in classes if cls is not Options]


def page() -> str:
    """The page as Markdown."""
    lines = [HEAD, "## Commands\n"]
    for name, command in commands():
        call = CALLS[name]
        lines.append(f"### `mlfusion {name}`\n\n{' '.join((command.help or '').split())}\n\nIn Python: `{call}`.\n")
        rows = [_row(param) for param in command.params if not param.hidden and param.name != "help"]
        lines += ["| option | meaning |", "|---|---|", *rows, ""] if rows else []
    lines.append("## Options classes\n\nThe last column is the effect of a change of the option.\n")
    for cls in option_classes():
        lines.append(f"### `{cls.__name__}`\n\n{' '.join((cls.__doc__ or '').split())}\n")
        lines += ["| field | option | meaning | default | effect |", "|---|---|---|---|---|"]
        for name, one in definitions(cls):
            former = "".join(f" (before: `--{old.replace('_', '-')}`)" for old in one.former)
            cells = f"`{name}`", f"`--{one.flag}`{former}", _cell(one.help), f"`{one.default!r}`", EFFECTS[one.effect]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _row(param: Any) -> str:
    names = (
        f"`{param.name.upper()}`" if param.param_type_name == "argument" else ", ".join(f"`{o}`" for o in param.opts)
    )
    shown = (
        param.default not in (None, False, "", [])
        and param.param_type_name == "option"
        and "[default" not in (param.help or "")
    )
    default = f" [default: {param.default}]" if shown and not callable(param.default) else ""
    return f"| {names} | {_cell(param.help or '')}{default} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    typer.echo(page(), nl=False)
