"""Trains jobs in several processes: a step of a small probe is mostly Python, of which threads run one at a time."""

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from threading import Thread

import torch

from mlfusion.errors import MlfusionError, TooLittleMemory
from mlfusion.probing.fitting import Resources, Trained, open_tokens, train
from mlfusion.probing.jobs import Job
from mlfusion.store.features import SplitPair
from mlfusion.system import progress, threads

PATIENCE = 5.0  # seconds of training after which other processes may be started
WORTH = 12.0  # seconds of training left for which they are: each takes three to import PyTorch
LEAST_MEMORY = 1 << 30  # bytes of each process
TOKENS_SHARE = 4  # a process has memory for so many times its tokens: half of it lets it load them


def trained(pair: SplitPair, jobs: Sequence[Job], resources: Resources) -> Iterator[Trained]:
    """Train resolved jobs, each by one process and alone or beside others, and yield their results in order.

    A result does not depend on the number of processes, as it depends neither on threads nor on memory.

    Raises:
        MlfusionError: the first error of a job; later jobs are not trained then.
    """
    start = time.monotonic()
    for done, job in enumerate(jobs):
        passed, left = time.monotonic() - start, jobs[done:]
        if passed > PATIENCE and passed / max(1, done) * len(left) > WORTH and count(pair, left, resources) > 1:
            yield from _side_by_side(pair, left, resources)
            return
        yield train(pair, job, resources)


def count(pair: SplitPair, jobs: Sequence[Job], resources: Resources) -> int:
    """The number of processes for these jobs: one for each thread that this process may use, as far as memory suffices."""
    if resources.device != "cpu" or len(jobs) < 2 or threads.count() < 2:
        return 1
    largest = 0
    for probe in dict.fromkeys(job.probe for job in jobs):
        with open_tokens(pair.train, probe) as tokens:
            largest = max(largest, tokens.nbytes)
    return max(1, min(threads.count(), len(jobs), resources.memory // max(LEAST_MEMORY, TOKENS_SHARE * largest)))


def _side_by_side(pair: SplitPair, jobs: Sequence[Job], resources: Resources) -> Iterator[Trained]:
    processes = count(pair, jobs, resources)
    own = replace(resources, memory=resources.memory // processes)
    title = f"{pair.model} on {pair.dataset}, {processes} processes"
    with _results(pair, jobs, own, processes) as results, progress.track(title, len(jobs), "rows") as bar:
        for job in jobs:
            result = next(results)
            if isinstance(result, TooLittleMemory):
                results = iter(list(results))  # when all others have ended, it has the whole of the memory
                result = train(pair, job, resources)
            if isinstance(result, MlfusionError):
                raise result
            bar.advance()
            yield result


@contextmanager
def _results(
    pair: SplitPair, jobs: Sequence[Job], resources: Resources, processes: int
) -> Iterator[Iterator[Trained | MlfusionError]]:
    """Context in which processes work on these jobs; what they have not begun when it ends is left undone."""
    from joblib import Parallel, delayed  # takes a fifth of a second, and most commands do without

    # Unlike a pool of the standard library, joblib's does not run the script of the caller again in each process.
    parallel = Parallel(n_jobs=processes, backend="loky", batch_size=1, max_nbytes=None, return_as="generator")
    results = parallel(delayed(_in_process)(pair, job, resources, os.getpid()) for job in jobs)
    try:
        yield results
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that some are left undone
            results.close()


def _in_process(pair: SplitPair, job: Job, resources: Resources, parent: int) -> Trained | MlfusionError:
    """Train a job in a process of its own; an error is returned, so that it is raised in its turn, after earlier results."""
    _end_with(parent)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with progress.hidden():  # the parent shows how far all are
            return train(pair, job, resources)
    except MlfusionError as err:
        return err
    finally:
        # Where joblib may start no process, such as in a process that has to have no children, this is the caller's own.
        torch.set_num_threads(before)


@cache
def _end_with(parent: int) -> None:
    """End this process when its parent has ended: joblib's would wait for ever for one that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if os.getpid() != parent:
        Thread(target=watch, daemon=True).start()
