"""Pictures ahead of the model: in order, each once, from threads as from processes, and never more of them than buffers."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from mlfusion.datasets import Split
from mlfusion.errors import BadData, BadImage, MlfusionError
from mlfusion.extraction import loader
from mlfusion.extraction.loader import Loader
from mlfusion.models.preprocessing import Steps

STEPS = Steps(size=(2, 3), crop_size=None, resample="nearest")
WAYS = [False, pytest.param(True, marks=pytest.mark.skipif(not loader.can_fork(), reason="this system does not fork"))]


def one(data: bytes) -> Image.Image:
    """A picture of one colour: the number in the bytes."""
    number = int(data)
    if number < 0:
        raise BadImage(f"number {number}")
    return Image.new("RGB", (3, 2), (number, number // 2, 255 - number))


def split(numbers: list[int], decode=one) -> Split:
    return Split(
        name="train",
        ids=tuple(f"n{i}" for i in range(len(numbers))),
        labels=np.zeros(len(numbers), np.int64),
        classes=("a",),
        encoded=lambda row: str(numbers[row]).encode(),
        decode=decode,
    )


def batches(count: int, size: int) -> list[tuple[range, str]]:
    return [(range(at, min(at + size, count)), f"from {at}") for at in range(0, count, size)]


@pytest.mark.parametrize("processes", WAYS)
@pytest.mark.parametrize(("count", "size", "workers"), [(23, 5, 2), (3, 8, 1), (40, 4, 3), (1, 1, 2)])
def test_every_image_once_and_in_order(processes, count, size, workers):
    feed = Loader(split(list(range(count))), STEPS, size, workers=workers, processes=processes)
    seen = []
    for batch in feed(iter(batches(count, size))):
        assert batch.payload == f"from {batch.rows.start}"
        assert batch.pictures.shape == (len(batch.rows), 3, 2, 3)
        for row, picture in zip(batch.rows, batch.pictures, strict=True):
            want = torch.tensor([row, row // 2, 255 - row], dtype=torch.uint8)[:, None, None].expand(3, 2, 3)
            assert torch.equal(picture, want)
        seen += batch.rows
        assert batch.unread == {}
    assert seen == list(range(count))
    assert feed.busy > 0


@pytest.mark.parametrize("processes", WAYS)
def test_unreadable_images_are_black_and_named_or_end_it(processes):
    numbers = [7, -1, 9, 8, -2, 6]
    feed = Loader(split(numbers), STEPS, 2, skip_bad=True, workers=2, processes=processes)
    unread, pictures = {}, []
    for batch in feed(batches(6, 2)):
        unread |= batch.unread
        pictures += batch.pictures.clone()
    assert sorted(unread) == [1, 4]
    assert "n1 cannot be read: number -1" in unread[1]
    assert [int(picture[0, 0, 0]) for picture in pictures] == [7, 0, 9, 8, 0, 6]
    whole = Loader(split(numbers), STEPS, 2, workers=2, processes=processes)
    with pytest.raises(BadData, match=r"n1 cannot be read: number -1.*--skip-bad"):
        list(whole(batches(6, 2)))


def test_no_more_is_made_than_the_buffers_hold():
    """What was decoded is counted while the first batch is still held: its own, and those ahead."""
    made, lock, enough = [], threading.Lock(), threading.Event()

    def counting(data: bytes) -> Image.Image:
        with lock:
            made.append(int(data))
        if len(made) == 4 * (1 + loader.PREFETCHED_BATCHES):
            enough.set()
        return one(data)

    feed = Loader(split(list(range(80)), counting), STEPS, 4, workers=4)(batches(80, 4))
    next(feed)
    assert enough.wait(10)
    assert sorted(made) == list(range(4 * (1 + loader.PREFETCHED_BATCHES)))
    feed.close()


def test_a_buffer_is_used_again_only_when_it_is_free():
    """Whoever takes a batch may hold its buffer beyond the next: `free` is asked before other pictures are put there."""
    waited = []
    addresses = []
    for batch in Loader(split(list(range(40))), STEPS, 4, workers=2)(batches(40, 4)):
        addresses.append(batch.pictures.data_ptr())
        batch.free = partial(waited.append, len(addresses))
    assert waited == list(range(1, 11))
    assert len(set(addresses)) == loader.PREFETCHED_BATCHES + 1


@pytest.mark.skipif(not loader.can_fork(), reason="this system does not fork")
def test_a_killed_worker_is_said(tmp_path):
    def dying(data: bytes) -> Image.Image:
        if int(data) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return one(data)

    with pytest.raises(MlfusionError, match=r"was killed, as happens when memory runs out.*--workers"):
        list(Loader(split(list(range(8)), dying), STEPS, 2, workers=1, processes=True)(batches(8, 2)))


@pytest.mark.skipif(not loader.can_fork(), reason="this system does not fork")
def test_worker_processes_end_with_their_parent():
    """A child that loads and is killed with SIGKILL leaves no process behind."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:

        def telling(data: bytes) -> Image.Image:
            os.write(write, f"{os.getpid()} ".encode())
            return one(data)

        next(Loader(split(list(range(8)), telling), STEPS, 4, workers=2, processes=True)(batches(8, 4)))
        os.write(write, b"ready")
        signal.pause()
    told = b""
    while b"ready" not in told:
        told += os.read(read, 4096)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    workers = {int(number) for number in told.replace(b"ready", b"").split()}
    assert workers
    os.close(write)
    with ThreadPoolExecutor(1) as waiting:  # the pipe ends when its last writer has ended
        rest = waiting.submit(lambda: b"".join(iter(lambda: os.read(read, 4096), b"")))
        rest.result(30)
    os.close(read)
