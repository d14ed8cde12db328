"""How the library's objects show themselves: one line in a terminal, one small table in a notebook, never their numbers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from html import escape

from mlfusion.system.text import one_line

SHOWN = 20  # lines of a table


class Displayed(ABC):
    """Base of a class with many or large values; a dataclass that has it says `repr=False`."""

    @abstractmethod
    def summary(self) -> str:
        """The object in one line."""

    def lines(self) -> Sequence[Mapping[str, object]]:
        """The rows of its table in a notebook, each with the same columns; empty: the line alone."""
        return ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {one_line(self.summary())}>"

    def _repr_html_(self) -> str:
        """The line and the first rows of the table, as HTML without links, styles or scripts."""
        lines = list(self.lines())
        parts = [f"<div>{escape(repr(self))}</div>"]
        if lines:
            head = "".join(f"<th>{_cell(name)}</th>" for name in lines[0])
            body = "".join(
                f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in line.values())}</tr>" for line in lines[:SHOWN]
            )
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        if len(lines) > SHOWN:
            parts.append(f"<div>and {len(lines) - SHOWN:,} more</div>")
        return "".join(parts)


def _cell(value: object) -> str:
    return escape(
        one_line(f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value))
    )
