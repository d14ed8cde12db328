"""Sums whose order does not depend on the number of threads: each is formed by one thread, and threads share the sums."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

_threads = 0  # torch's threads outside `in_order`; 0 outside of it


@contextmanager
def in_order() -> Iterator[None]:
    """Context in which torch computes every result by one thread, so that it adds up in one order on one kind of machine."""
    global _threads
    outer, before = _threads, torch.get_num_threads()
    _threads = outer or before
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _threads = outer


def count() -> int:
    """The number of threads that this process may use, inside of `in_order` too."""
    return _threads or torch.get_num_threads()


def share(work: Callable[[Any], Any], items: Sequence[Any], *, worth: bool = True) -> None:
    """Do some work for every item, on as many threads as there are; no result may depend on the order of the items.

    `worth`: whether the work takes so long that starting threads, a tenth of a millisecond each, is worth it.
    """
    if (workers := min(count(), len(items))) < 2 or not worth:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, items))
