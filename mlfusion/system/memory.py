"""Measures free memory and the memory that a computation needs, so that users need not guess what fits."""

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNKNOWN_BYTES = 2 << 30  # taken to be free where the system tells neither its free nor its whole memory
GROUP_FILES = {  # controllers → folder below the root, files of the limit and of the use, name of the idle bytes
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available(device: str = "cpu") -> int:
    """Bytes that this process can still allocate on a device, within its limits."""
    target = torch.device(device)
    if target.type == "cuda":
        # What torch keeps for reuse counts as taken with the driver, but the next tensor may have it.
        kept = torch.cuda.memory_reserved(target) - torch.cuda.memory_allocated(target)
        return torch.cuda.mem_get_info(target)[0] + kept
    if target.type == "mps":  # which shares the machine's memory
        return max(0, min(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory(), available()))
    limits = [limit for limit in (_machine_bytes(), _group_bytes(), _process_bytes()) if limit is not None]
    return max(0, min(limits, default=UNKNOWN_BYTES))


def _machine_bytes() -> int | None:
    """Bytes that the system can allocate without swapping; half of its memory if it tells only how much it has."""
    if (kilobytes := _number_after(Path("/proc/meminfo"), "MemAvailable:")) is not None:
        return kilobytes * 1024
    for pages, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        with suppress(ValueError, OSError, AttributeError):
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") // share
    return None


def _group_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes left by the control groups (versions 1 and 2) of this process; cached files count as free."""
    left = []
    try:
        entries = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in entries:
        if controllers and "memory" not in controllers.split(","):
            continue
        subfolder, limit_name, use_name, idle_name = GROUP_FILES[controllers and "memory"]
        base = root / subfolder
        own_folder = base / path.lstrip("/")
        for folder in (own_folder, *own_folder.parents):
            if folder == base.parent:
                break
            try:
                limit, used_bytes = (folder / limit_name).read_text().strip(), int((folder / use_name).read_text())
            except (OSError, ValueError):
                continue
            if limit.isdecimal():
                left.append(int(limit) - used_bytes + (_number_after(folder / "memory.stat", idle_name) or 0))
    return min(left, default=None)


def _process_bytes() -> int | None:
    """Bytes left by the limit on the address space (`ulimit -v`)."""
    try:
        import resource  # not on every system
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used_bytes = _number_after(Path("/proc/self/status"), "VmSize:")
    return None if limit == resource.RLIM_INFINITY or used_bytes is None else limit - used_bytes * 1024


def _number_after(path: Path, name: str) -> int | None:
    """The first number after `name` in a line that starts with it."""
    with suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            if line.startswith(name):
                return int(line[len(name) :].split()[0])
    return None


def empty_cache(device: str) -> None:
    """Release the memory that torch keeps for reuse on a device."""
    target = torch.device(device)
    if target.type == "cuda":
        with torch.cuda.device(target):
            torch.cuda.empty_cache()
    elif target.type == "mps":
        torch.mps.empty_cache()


@contextmanager
def measured(device: str = "cpu") -> Iterator[Callable[[], int]]:
    """Yield a function that returns, after the with statement, the peak bytes of the tensors created in it on the device."""
    target = torch.device(device)
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)
        before = torch.cuda.memory_allocated(target)
        yield lambda: torch.cuda.max_memory_allocated(target) - before
    else:
        with Footprint() as footprint:
            yield lambda: footprint.most


class Footprint(TorchDispatchMode):
    """Counts the bytes of the tensors that are created in the with statement: those alive now, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here; the default answer would load the compiler, which takes more than a second.
        return False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in inputs:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._known:
            number, size = id(storage), storage.nbytes()
            self._known.add(number)
            self.alive += size
            self.most = max(self.most, self.alive)
            weakref.finalize(storage, self._freed, number, size)

    def _freed(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.alive -= size
