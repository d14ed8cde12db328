"""The ways a user can go wrong, on one page; each message says what was wrong, what was allowed and what to type next.

MlfusionError
  BadOption          an option has a value that is not allowed
  UnknownName        no model, data set, probe, layer or token kind of that name
  Unavailable        it exists, but cannot be had from here: no network, a gated model, a missing extra
  BadModel           the folder or checkpoint is not one that can be read as a vision transformer
  BadData            the images or labels cannot be used as they are
    BadImage         one image that cannot be read
    TooLittleMemory  what they need is more than may be taken
  NotCached          stage 2 was asked for features that stage 1 has not written
  CacheUnusable      the cache cannot be written or read: read-only, full, damaged, from a newer version
    CacheUnread      a file of it that may not be read, which is no damage
  ResultsUnusable    likewise the results, or there are none yet
  BadRecipe          a recipe says something that no recipe may say

The command line prints any of these in one line and exits with 1; every other exception is our bug and stays a traceback.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class MlfusionError(Exception):
    """Something the user can mend."""


class BadOption(MlfusionError):
    """An option with a value that it cannot have."""


class UnknownName(MlfusionError):
    """No such name; offers the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, otherwise: str = "") -> None:
        """`otherwise` says what else would have been accepted, such as a folder."""
        allowed = sorted(known)
        folded = {word.casefold(): word for word in allowed}
        near = [folded[word] for word in get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        rest = f" {otherwise}" if otherwise else ""
        super().__init__(f"no {kind} named {name!r}.{hint} Known: {', '.join(allowed)}.{rest}")


class Unavailable(MlfusionError):
    """It exists, but not from here and now."""


class BadModel(MlfusionError):
    """Not a checkpoint whose layers can be read."""


class BadData(MlfusionError):
    """Images or labels that cannot be used as they are."""


class TooLittleMemory(BadData):
    """A computation that needs more memory than it may take; says how much of both."""


class BadImage(BadData):
    """One image that cannot be read; says which and why."""


class NotCached(MlfusionError):
    """Features that no extraction has written yet."""


class CacheUnusable(MlfusionError):
    """The cache cannot be written to or trusted."""


class CacheUnread(CacheUnusable):
    """A file of the cache that the system does not let us read; it may be sound."""


class ResultsUnusable(MlfusionError):
    """Results that cannot be saved or read."""


class BadRecipe(MlfusionError):
    """A recipe that cannot be run as written."""


_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
    """Text for a terminal: control characters and those that turn the direction of text as escapes, '\\x1b'."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@contextmanager
def boundary(sentence: Callable[[str], MlfusionError]) -> Iterator[None]:
    """A call into a library on what somebody else wrote: whatever it raises there becomes one of our errors.

    Libraries raise exceptions of every type on a damaged or forged file, so that no list of types is complete. Only calls of
    a library belong inside, since a mistake of ours would be taken for one of the file.

    Args:
        sentence: makes the error from the first line of the library's message.
    """
    try:
        yield
    except MlfusionError:
        raise
    except Exception as err:
        if is_device_failure(err) or type(err).__name__ == "OutOfMemoryError":  # of a GPU, which has not read the file
            raise
        raise sentence(first_line(err)) from err


def first_line(err: BaseException) -> str:
    """The first line of a library's message, short enough to quote in one of ours; its type's name if it has none.

    A line that ends in a colon goes on with the next one.
    """
    if isinstance(err, KeyError):
        return f"{err} is missing"[:200]
    first, *others = [line.strip() for line in str(err).splitlines() if line.strip()] or [type(err).__name__]
    return f"{first} {others[0] if first.endswith(':') and others else ''}".strip()[:200]


SHORTAGES = (
    *("cannot allocate memory", "can't allocate memory", "not enough memory", "failed to map segment", "out of memory"),
    *("cublas_status_alloc_failed", "cudnn_status_alloc_failed", "cusolver_status_alloc_failed"),
)
"""What systems, torch and the libraries of GPUs say when memory ran out, in small letters."""

DEVICE_FAILURES = ("cuda error", "cuda driver error", "hip error", "cudnn error", "cublas error", "nccl error")
"""How torch begins what a GPU reports when it fails, in small letters."""


def is_shortage(err: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a device, in a library's words too."""
    return isinstance(err, MemoryError) or (
        isinstance(err, (RuntimeError, ImportError)) and any(word in str(err).lower() for word in SHORTAGES)
    )


def is_device_failure(err: BaseException) -> bool:
    """Whether a device failed or was lost: nothing more can be computed on it in this process."""
    failed = type(err).__name__ == "AcceleratorError" or str(err).lower().startswith(DEVICE_FAILURES)
    return isinstance(err, RuntimeError) and failed and not is_shortage(err)
