"""An extraction whose every number is known beforehand, run by processes that may be killed, stopped or starved.

The loop, the leases and the cache are the real ones; only the model is a formula, so that a process costs a fork and a
whole extraction a few hundred milliseconds.
"""

import ctypes
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mlfusion.datasets import Split
from mlfusion.errors import MlfusionError
from mlfusion.extraction import run
from mlfusion.extraction.request import ComputeOptions, Job, Request
from mlfusion.models import preprocessing
from mlfusion.specs.identity import DataSpec, Dtype, FeatureSpec, ModelSpec
from mlfusion.store import Entry, FeatureStore, Names, RunRecord, Samples
from mlfusion.store.verify import verify_entry
from mlfusion.system import disk

IMAGES = 44
KINDS = {"cls": 1, "ap": 1, "all": 17}  # tokens of each
WIDTH = 4
PAIRS = frozenset({(layer, kind) for layer in (1, 2, 3) for kind in ("cls", "ap")} | {(3, "all")})
NAMES = Names(model="formula", model_source="a/formula", dataset="numbers", dataset_source="/some where/zählen")
MODEL = ModelSpec(
    weights="ab" * 32,
    revision=None,
    config="cd" * 8,
    preprocess="{}",
    name="formula",
    family="vit",
    depth=3,
    width=WIDTH,
)
UNUSABLE = 3  # exit status of a child that ended with one of our errors
RUN = RunRecord(
    when="2026-01-01T00:00:00+00:00",
    versions={"python": "3.11"},
    device="cpu",
    device_name="a processor",
    processors=2,
    threads=2,
    compute="float32",
    dtype="float16",
    batch_size=4,
    out_of_memory=False,
    images=19,
    forward_passes=5,
    seconds=1.5,
    images_per_second=12.67,
    bottleneck="decoding",
    waited={"decoding": 1.0},
    parts={},
    streams=("cls.ap.L1-3",),
    layers="1-3",
)


def numbers(rows, layer: int, kind: str) -> np.ndarray:
    """[rows, tokens, width] float32: what the model says of these images."""
    inner = np.arange(KINDS[kind] * WIDTH).reshape(1, KINDS[kind], WIDTH)
    at = np.asarray(rows, np.float64).reshape(-1, 1, 1) * 12.9898 + layer * 78.233 + len(kind) * 37.719
    return np.sin(at + inner * 0.618).astype(np.float32)


class Steps(preprocessing.Steps):
    """Stands where preprocessing stands: a picture of one pixel, its row number."""

    def __init__(self) -> None:
        super().__init__(size=(1, 1), crop_size=None, kernel="torch-float32")

    def picture(self, image: int, name: str) -> np.ndarray:  # type: ignore[override]  # a number is an image here
        return np.full((3, 1, 1), image, np.float32)

    def finish(self, pictures: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return pictures


class Model:
    """Stands where the frozen model stands: pixels are row numbers."""

    name, kinds, device = "formula", KINDS, torch.device("cpu")

    def __init__(self, passes: Path | None, pause: float) -> None:
        self._passes, self._pause = passes, pause

    def shapes(self, pairs: frozenset) -> dict:
        return {(layer, kind): (KINDS[kind], WIDTH) for layer, kind in sorted(pairs)}

    def __call__(self, pixels: torch.Tensor, wanted: frozenset) -> dict:
        rows = pixels[:, 0, 0, 0].int().tolist()
        if self._passes:  # one line a pass, so that what was computed twice can be told
            with open(self._passes, "a") as file:
                file.write(f"{os.getpid()} {rows[0]} {rows[-1]}\n")
        time.sleep(self._pause)
        return {(layer, kind): torch.from_numpy(numbers(rows, layer, kind)) for layer, kind in wanted}


def encoded(row: int) -> bytes:
    """The bytes of an image: its number, which `int` reads."""
    return str(row).encode()


def split(count: int) -> Split:
    """A split of so many images, image i being the number i."""
    ids = tuple(map(str, range(count)))
    return Split("train", ids, np.zeros(count, np.int64), ("x",), encoded, int)


def samples(images: int = IMAGES) -> Samples:
    return Samples(
        ids=tuple(f"train/α/{i} ½ #%41 🦆\n.png" for i in range(images)),
        labels=np.arange(images) % 3,
        digests=np.random.default_rng(0).integers(0, 256, (images, 16), np.uint8),
        classes=("x", "y", "z"),
    )


def spec(images: int = IMAGES, dtype: Dtype = "float16") -> FeatureSpec:
    rows = samples(images)
    data = DataSpec(content=rows.content, split="train", images=images, classes=rows.classes, name="numbers")
    return FeatureSpec(model=MODEL, data=data, dtype=dtype)


def extract(
    root: Path,
    *,
    images: int = IMAGES,
    format: str = "zarr",
    dtype: Dtype = "float16",
    passes: Path | None = None,
    pause: float = 0.0,
) -> Entry:
    """`mlfusion.extract` of the formula."""
    asked = Request(
        checkpoint=None,
        names=NAMES,
        pairs=PAIRS,
        jobs=(Job(split(images), samples(images), spec(images, dtype), Steps(), NAMES),),
        compute=ComputeOptions(device="cpu", batch_size=4, format=format),
    )
    [done] = run.fill(asked, cache=root, model=lambda _: Model(passes, pause))
    return done.entry


def tell(pipe: int, text: bytes) -> None:
    """Even where the write that is made to fail is this one."""
    try:
        os.write(pipe, text)
    except OSError:
        os.write(pipe, text)


class Child:
    """A process of our own that does one thing."""

    def __init__(self, work: Callable[..., object], *args: object, **words: object) -> None:
        self._pipe, ours = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                work(*args, **words)
                status = 0
            except MlfusionError as err:
                status = UNUSABLE
                tell(ours, str(err).encode()[:9999])
            except BaseException as err:  # noqa: BLE001 - the parent says it
                tell(ours, "".join(traceback.format_exception(err)).encode()[-9999:])
            finally:
                os._exit(status)
        os.close(ours)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether there is nothing to wait for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> int:
        """Its exit status, or minus the signal that ended it; what it had to say is then in `said`."""
        _, status = os.waitpid(self.pid, 0)
        with open(self._pipe, "rb") as pipe:
            self.said = pipe.read().decode(errors="replace")
        return os.waitstatus_to_exitcode(status)

    def kill_after(self, seconds: float) -> int:
        """Its exit status; it is killed if it lives so long."""
        time.sleep(seconds)
        self.send(signal.SIGKILL)  # of a child that ended already, but was not waited for, nothing comes
        return self.wait()


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder that others may be changing, but the provenance of runs."""
    found = {}
    for at, _, names in os.walk(folder):
        for name in names:
            path = Path(at, name)
            if path.parent.name != "runs":
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def published(entry_folder: Path) -> dict[str, tuple[int, int]]:
    """Every published shard file: what changes if it is written anew."""
    found = (path for path in entry_folder.glob("tokens/[!.]*/c/*/**/*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def litter(root: Path) -> list[Path]:
    """What should not be left in a cache that nobody is at work in."""
    return [*root.rglob(f"{disk.DRAFT}*"), *root.glob("v*/*/leases/*"), *root.glob("v*/*/pins/*")]


def right(entry: Entry) -> None:
    """Assert that an entry reads as the formula says, to the bit."""
    images = entry.spec.data.images
    for layer, kind in sorted(PAIRS):
        want = numbers(range(images), layer, kind).astype(np.float16)[:, None]
        np.testing.assert_array_equal(entry.read([layer], [kind]), want)


def whole(root: Path, images: int = IMAGES) -> Entry:
    """Assert that the cache holds the extraction, whole and right, and nothing beside it."""
    entry = FeatureStore(root).entry(spec(images))
    assert entry is not None
    assert entry.complete_pairs() == PAIRS
    right(entry)
    assert list(verify_entry(entry.path)) == []
    assert litter(root) == []
    return entry


PRIVATE, USER, NAMESPACE = 1 << 18, 0x10000000, 0x20000  # MS_PRIVATE; CLONE_NEWUSER, CLONE_NEWNS
REMOUNT, RECURSIVE = 1 << 5, 1 << 14  # MS_REMOUNT, MS_REC


def mount(place: Path, options: str, *, again: bool = False) -> None:
    """A file system in memory, seen by this process and its children alone; `again` changes the one that is there.

    Raises:
        PermissionError: a process may not have such a thing here.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def must(status: int) -> None:
        if status:
            raise PermissionError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    if not again:
        user, group = os.geteuid(), os.getegid()
        must(libc.unshare(NAMESPACE if user == 0 else NAMESPACE | USER))
        if user:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        must(libc.mount(b"none", b"/", None, PRIVATE | RECURSIVE, None))
        place.mkdir()
    must(libc.mount(b"none", os.fsencode(place), b"tmpfs", REMOUNT if again else 0, options.encode()))


def read_every_way(root: Path, images: int = IMAGES) -> None:
    """Assert that whatever way of reading gives what was written: all, a layer, some images, shuffled ones."""
    entry = FeatureStore(root).entry(spec(images))
    assert entry is not None
    right(entry)
    want = numbers(range(images), 2, "ap").astype(np.float16)
    with entry.open([2], ["ap"]) as tokens:
        for rows in ([5, 1, images - 1], list(range(0, images, 5))):  # few of a shard: it is mapped
            np.testing.assert_array_equal(tokens[rows][:, 0], want[rows])
        for rows, batch in tokens.batches(7, seed=1):
            np.testing.assert_array_equal(batch[:, 0], want[rows])
