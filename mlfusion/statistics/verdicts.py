"""What is called a gain, a loss or no clear difference: one rule for terminal, pages, findings, advice and comparisons.

A claim follows from the paired permutation test of the metric that is reported, over the test images of a data set. A mean over
classes rests on its rarest class: where that has too few images, nothing is claimed, since the answers to a handful of images
would decide. docs/method.md shows how often two equally good probes are told apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from mlfusion.statistics.uncertainty import MIN_DIFFERENT, MIN_EFFECTIVE, Difference, Evidence, differs_on
from mlfusion.system.words import plural

LEVEL = 0.05

SHOWN = 3  # rare classes that a sentence names

LOWER_IS_BETTER = ("loss", "mae", "rmse")

Word = Literal["gain", "loss", "no clear difference", "cannot be told"]

NOT_TOLD: Word = "cannot be told"
WORDS: dict[int | None, Word] = {1: "gain", -1: "loss", 0: "no clear difference", None: NOT_TOLD}


class RareClass(msgspec.Struct, frozen=True):
    """A class with so few test images, or groups of them, that no difference of a mean over classes can be told."""

    name: str = msgspec.field(name="class")
    images: int
    noun: str = "test image"

    def __str__(self) -> str:
        """'7 test images of malignant'."""
        return f"{plural(self.images, self.noun)} of {self.name}"


@dataclass(frozen=True)
class Verdict:
    """What may be said about A against B on one data set."""

    word: Word
    metric: str
    p: float | None = None  # the mid-p value of the permutation test of this metric; None if it was not made
    reason: str = ""  # why it cannot be told

    @property
    def direction(self) -> int | None:
        """1 for a gain, -1 for a loss, 0 for no clear difference, None where it cannot be told."""
        return next(direction for direction, word in WORDS.items() if word == self.word)


def verdict(
    found: Difference | None, *, metric: str, classes: Sequence[str], spread: float | None = None, missing: str = ""
) -> Verdict:
    """What is called a gain: a permutation test at 5 % finds it, and it exceeds its deviation over seeds.

    Args:
        found: A - B over the test images; None if the arrays are missing.
        metric: the metric that is reported, of which `found` is.
        classes: the names of the classes or labels, for the reason.
        spread: sample standard deviation of the gain over seeds; None for one seed.
        missing: why there is no `found`.
    """
    if found is None:
        return Verdict(
            NOT_TOLD, metric, reason=missing.rstrip(".") or "the predictions for the test images are missing"
        )
    if reason := untold(found.evidence, classes):
        return Verdict(NOT_TOLD, metric, found.mid_p, reason)
    clear = found.mid_p <= LEVEL and abs(found.value) > (spread or 0.0)
    better = (found.value > 0) != (metric in LOWER_IS_BETTER)
    return Verdict(WORDS[(1 if better else -1) if clear else 0], metric, found.mid_p)


def untold(evidence: Evidence, classes: Sequence[str]) -> str:
    """Why these test images cannot tell two probes apart at the level; empty if they can."""
    if evidence.images < MIN_EFFECTIVE:
        return f"{plural(evidence.images, evidence.noun)}; {MIN_EFFECTIVE} are needed"
    if evidence.effective < MIN_EFFECTIVE:
        rare = rare_classes(evidence.by_class, classes, evidence.effective, evidence.noun)
        few = enumerate_rare(rare) or plural(evidence.images, evidence.noun)
        of_class = " of a class" * bool(evidence.by_class)
        return f"{few}; about {MIN_EFFECTIVE}{of_class} are needed"
    if evidence.different < MIN_DIFFERENT:
        return f"{differs_on(evidence)}; {MIN_DIFFERENT} are needed"
    return ""


def rare_classes(
    by_class: Sequence[int], classes: Sequence[str], effective: float, noun: str = "test image"
) -> tuple[RareClass, ...]:
    """The classes that are too rare for a verdict about a mean over classes, the rarest first; none if one can be told."""
    if effective >= MIN_EFFECTIVE:
        return ()
    counted = sorted((count, number) for number, count in enumerate(by_class) if 0 < count < MIN_EFFECTIVE)
    return tuple(RareClass(classes[number], count, noun) for count, number in counted)


def enumerate_rare(rare: Sequence[RareClass]) -> str:
    """'7 test images of malignant, 12 test images of odd'; at most three, and the number of others."""
    more = f" and {len(rare) - SHOWN} more rare classes" if len(rare) > SHOWN else ""
    return ", ".join(map(str, rare[:SHOWN])) + more
