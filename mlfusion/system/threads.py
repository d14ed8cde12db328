"""How threads compute: each sum is formed by one thread, whatever their number, and none stumbles over denormal numbers."""

import sys
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


@contextmanager
def denormals(*, kept: bool) -> Iterator[None]:
    """Context in which this thread takes denormal numbers (in float32 below 1.2e-38) as 0, or as what they are if `kept`.

    Where attention saturates, softmax weights and their gradients become that small, and some processors take a hundred times
    as long for a product that meets them. The setting is one of each thread: threads of `pool` take over their caller's.
    """
    before = are_denormals_kept()
    torch.set_flush_denormal(not kept)
    try:
        yield
    finally:
        torch.set_flush_denormal(not before)


def are_denormals_kept() -> bool:
    """Whether this thread computes with denormal numbers."""
    return sys.float_info.min / 2 != 0


def pool(workers: int) -> ThreadPoolExecutor:
    """A pool of threads that take denormal numbers as this thread does now."""
    return ThreadPoolExecutor(workers, initializer=torch.set_flush_denormal, initargs=(not are_denormals_kept(),))


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
    with pool(workers) as threads:
        list(threads.map(work, items))
