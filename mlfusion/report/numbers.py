"""Formatting of the numbers of a report: scores in percent, gains in points, p-values, counts."""

from collections.abc import Callable, Iterable, Sequence

from mlfusion.statistics import Spread


def percent(value: float, digits: int = 1) -> str:
    """0.9712 → '97.1'."""
    return f"{100 * value:.{digits}f}"


def points(value: float, digits: int = 1) -> str:
    """A gain in points with its sign, a true minus for losses; a gain that rounds to zero has no sign."""
    text = f"{100 * value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "\N{MINUS SIGN}")


def between(low: float | None, high: float | None) -> str:
    """'+0.3 to +1.2': the ends of an interval in points; 'none' without an interval."""
    return "none" if low is None or high is None else f"{points(low)} to {points(high)}"


def between_percent(low: float | None, high: float | None) -> str:
    """'90.1 to 95.3': the ends of an interval in percent; 'none' without an interval."""
    return "none" if low is None or high is None else f"{percent(low)} to {percent(high)}"


def mean_sd(spread: Spread, write: Callable[[float], str] = percent) -> str:
    """'97.1 ± 0.3'; the mean alone for one seed. `write` is `percent` or `points`."""
    return write(spread.mean) + plus_minus(spread.sd)


def plus_minus(sd: float | None) -> str:
    """' ± 0.3', or '' without a deviation."""
    return "" if sd is None else f" ± {percent(sd)}"


def p_value(p: float) -> str:
    """Three decimals, '< 0.001' below that."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def count(value: int) -> str:
    """18447 → '18 447' with thin spaces."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def short_count(value: int) -> str:
    """18447 → '18.4 k'."""
    for scale, unit in ((1e6, " M"), (1e3, " k")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return str(value)


def from_to(values: Iterable[int]) -> str:
    """{3, 5, 4} → '3 to 5', {3} → '3'."""
    ordered = sorted(values)
    return " to ".join(str(value) for value in dict.fromkeys((ordered[0], ordered[-1])))


def capitalized(text: str) -> str:
    """'balanced accuracy' → 'Balanced accuracy'."""
    return text[:1].upper() + text[1:]


def enumerated(words: Sequence[str]) -> str:
    """['a', 'b', 'c'] → 'a, b and c'."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
