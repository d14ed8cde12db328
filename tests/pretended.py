"""Pretended devices, so that what a GPU would be told is tested where there is none.

`Machine` puts functions of the same names in place of those of `torch.cuda`, and answers every function of torch that is
called with a tensor "on" a device: numbers are computed by the processor, and everything else is as on a real device.

* Copies are queued: one to this machine's memory fills it with garbage until somebody waits for the queue that it is in, and
  one to the device reads its source at the end of the wait.
* Tensors of two devices in one function are an error, and so is float64 on MPS.
* What a queue uses that another queue computes, without having waited for it, is noted as a fault.
* What would make the processor wait for the device is counted.

A tensor's own place is real (`tensor.device`), so the code under test takes the paths that it takes on a device.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

T = torch.Tensor
KINDS = ("cuda", "mps")
OWN = {T.device.__get__, T.is_cuda.__get__}  # answered by the tensor that is seen
# Functions that take a tensor of the processor beside one of the device.
MIXED = {"copy_", "to", "__get__", "__set__", "__getitem__", "set_", "_has_compatible_shallow_copy_type", "__repr__"}
READ = {"cpu", "item", "tolist", "__bool__", "__float__", "__int__", "numpy", "equal", "allclose", "nonzero"}


def _refuse(_: Any, func: Any, *__: Any) -> None:
    raise AssertionError(f"{func} came past the functions of torch")


REFUSE: Any = classmethod(_refuse)


class Far(torch.Tensor):
    """A tensor that is said to be on a device; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner: T, device: torch.device, queue: Any, at: int) -> "Far":
        with torch._C.DisableTorchFunction():
            new = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=device)
        new.inner, new.queue, new.at = inner, queue, at
        return new

    def record_stream(self, queue: Any) -> None:
        """Tell the allocator that a second queue uses this memory."""
        assert isinstance(queue, Queue)
        Machine.here.recorded.append(self.inner.nbytes)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return Machine.here.call(func, args, kwargs or {})

    __torch_dispatch__ = REFUSE


def done() -> None:
    """What stands in a queue in place of work that is done."""


class Queue:
    """A stream of CUDA: what was put in runs in this order, when somebody waits."""

    def __init__(self, device: Any = None, machine: Any = None) -> None:
        self.machine = machine or Machine.here
        self.device = torch.device(self.machine.kind, self.machine.current if device is None else device.index or 0)
        self.work: list[Callable[[], object]] = []
        self.machine.queues.append(self)
        self.seen: dict[Queue, int] = {}

    def wait_event(self, event: "Mark") -> None:
        """What follows runs after what is before the mark."""
        self.seen |= {**event.seen, event.queue: event.at}
        self.work.append(event.synchronize)

    def run(self, until: int) -> None:
        """Do the first `until` parts of the work."""
        with self.machine.lock:
            for number in range(until):
                job, self.work[number] = self.work[number], done
                job()


class Mark:
    """An event of CUDA."""

    def __init__(self, **_: Any) -> None:
        self.queue: Any = None

    def record(self, stream: Queue | None = None) -> None:
        """Put the mark behind all that is in a queue: without a name, in that of the current device, as torch does."""
        self.queue = stream or Machine.here.current_stream()
        self.until, self.at, self.seen = len(self.queue.work), Machine.here.clock, dict(self.queue.seen)

    def synchronize(self) -> None:
        """Wait."""
        Machine.here.broken()
        self.queue.run(self.until)


class Machine(TorchFunctionMode):
    """A machine with devices of one kind; `count` GPUs of CUDA, or the one of MPS."""

    here: "Machine"

    def __init__(self, kind: str = "cuda", count: int = 2) -> None:
        super().__init__()
        self.kind, self.count, self.current, self.clock = kind, count, 0, 0
        self.lock = threading.RLock()  # several threads wait for queues
        self.room: int | None = None  # bytes of the largest tensor that there is memory for
        self.breaks_at: int | None = None  # the number of functions after which the device is lost
        self.queues: list[Queue] = []
        self.faults: list[str] = []
        self.waits: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.sent: list[tuple[str, int]] = []  # type and bytes of every copy to a device
        self.recorded: list[int] = []  # bytes of the tensors of which a second queue was told
        self.pinned: list[range] = []
        self.actions: list[str] = []
        self._defaults: dict[int, Queue] = {}
        self._chosen: list[Queue] = []

    # --- what torch.cuda offers -----------------------------------------------------------------------------------

    def current_stream(self, device: Any = None) -> Queue:
        index = self.current if device is None or torch.device(device).index is None else torch.device(device).index
        if self._chosen and self._chosen[-1].device.index == index:
            return self._chosen[-1]
        if index not in self._defaults:
            self._defaults[index] = Queue(torch.device(self.kind, index), self)
        return self._defaults[index]

    @contextmanager
    def stream(self, queue: Queue) -> Iterator[None]:
        self._chosen.append(queue)
        try:
            with self.device(queue.device):
                yield
        finally:
            self._chosen.pop()

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, torch.device(device).index or 0
        try:
            yield
        finally:
            self.current = before

    def register(self, address: int, size: int, flags: int) -> int:
        self.actions.append(f"lock {flags}")
        self.pinned.append(range(address, address + size))
        return 0

    def broken(self) -> None:
        if self.breaks_at is not None and self.clock >= self.breaks_at:
            raise torch.AcceleratorError(
                "CUDA error: unspecified launch failure\nCUDA kernel errors might be reported late"
            )

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> "Machine":
        """Put this machine's functions in the place of torch's."""
        Machine.here = self
        free = 8 << 30
        runtime = SimpleNamespace(
            cudaHostRegister=lambda *words: self.register(*words),
            cudaHostUnregister=lambda _: self.actions.append("unlock") or 0,
        )
        cuda = {
            "_lazy_init": lambda: None,
            "is_available": lambda: self.kind == "cuda",
            "device_count": lambda: self.count if self.kind == "cuda" else 0,
            "current_device": lambda: self.current,
            "current_stream": self.current_stream,
            "stream": self.stream,
            "device": self.device,
            "Stream": Queue,
            "Event": Mark,
            "cudart": lambda: runtime,
            "get_device_name": lambda _=None: "pretended",
            "get_device_capability": lambda _=None: (9, 0),
            "mem_get_info": lambda _=None: (free, 2 * free),
            "memory_allocated": lambda _=None: 0,
            "memory_reserved": lambda _=None: 0,
            "max_memory_allocated": lambda _=None: 1 << 20,
            "reset_peak_memory_stats": lambda _=None: None,
            "empty_cache": lambda: self.actions.append(f"empty {self.current}"),
        }
        for name, stand_in in cuda.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: free)
        monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 0)
        monkeypatch.setattr(torch.mps, "empty_cache", lambda: self.actions.append("empty"))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: self.kind == "mps")
        return self

    def __enter__(self) -> "Machine":
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *words: Any) -> None:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        super().__exit__(*words)

    # --- what torch computes ----------------------------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        with torch._C.DisableTorchFunction():
            if func in OWN or func in (torch.device, torch._C._nn._parse_to):
                return func(*args, **kwargs)
            return self._call(func, args, kwargs)

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name = getattr(func, "__name__", str(func))
        leaves = tree_leaves((args, kwargs))
        far = [leaf for leaf in leaves if isinstance(leaf, Far)]
        goal = torch.device("cpu") if name == "cpu" else self._goal(leaves)
        here, leaving = next((leaf.device for leaf in far), None), goal is not None and goal.type == "cpu"
        if name == "is_pinned":
            return any(args[0].data_ptr() in each for each in self.pinned)
        if func == T.data.__set__ and far:
            args[0].inner = args[1].inner
            return None
        if far or (goal is not None and not leaving):
            self._look(name, far, leaves, goal, kwargs)
        if name == "copy_" and here and not isinstance(args[0], Far) and kwargs.get("non_blocking"):
            return self._fetch(args[0], args[1])
        locks = kwargs.get("pin_memory")
        out = func(
            *tree_map(self._inner, args),
            **tree_map(self._inner, {k: v for k, v in kwargs.items() if k != "pin_memory"}),
        )
        if locks:
            self.pinned.append(range(out.data_ptr(), out.data_ptr() + max(out.nbytes, 1)))
        home = goal or here
        if home is None or home.type not in KINDS or (leaving and name in ("to", "cpu")):
            return out
        if not far and name in ("to", "cuda"):
            out = self._send(args[0], out, kwargs)
        return self._wrapped(out, home, far, name)

    def _look(self, name: str, far: list[Far], leaves: list, goal: torch.device | None, kwargs: dict) -> None:
        """Check and count a function of a device."""
        self.clock += name not in ("__get__", "dim", "size", "numel")
        self.broken()
        self.calls[name] += 1
        if len({each.device for each in far}) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, in {name}")
        near = [leaf for leaf in leaves if isinstance(leaf, T) and not isinstance(leaf, Far) and leaf.ndim]
        if far and near and name not in MIXED:
            raise RuntimeError(f"Expected all tensors to be on the same device, in {name}")
        lists = name == "__getitem__" and far and any(isinstance(leaf, int) for leaf in leaves) and len(leaves) > 3
        sends = name in ("to", "tensor", "as_tensor") and not kwargs.get("non_blocking") and not far
        fetches = name == "to" and far and goal is not None and goal.type == "cpu"
        if name in READ or sends or fetches:
            self.waits[name] += 1
        elif name == "__getitem__" and (near or lists):
            self.waits["index"] += 1
        queue = self.current_stream(far[0].device) if far and self.kind == "cuda" else None
        for each in far:
            if (
                each.queue is not queue
                and queue is not None
                and each.queue
                and queue.seen.get(each.queue, -1) < each.at
            ):
                self.faults.append(f"{name} uses what another queue still computes")

    def _goal(self, leaves: list) -> torch.device | None:
        for leaf in leaves:
            if isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.split(":")[0] in (*KINDS, "cpu")):
                device = torch.device(leaf)
                if device.type in KINDS:
                    return torch.device(device.type, self.current if device.index is None else device.index)
                return device if device.type == "cpu" else None
        return None

    def _inner(self, value: Any) -> Any:
        if isinstance(value, Far):
            return value.inner
        if isinstance(value, (torch.device, str)) and str(value).split(":")[0] in KINDS:
            return torch.device("cpu")
        return value

    def _fetch(self, goal: T, source: Far) -> T:
        """A copy to this machine's memory that is complete when somebody has waited for the queue."""
        goal.fill_(torch.nan if goal.is_floating_point() else 1)
        values = source.inner.clone()
        self.current_stream(source.device).work.append(lambda: goal.copy_(values))
        return goal

    def _send(self, source: T, out: T, kwargs: dict) -> T:
        """A copy to the device, which reads the source until somebody has waited for the queue."""
        self.sent.append((str(source.dtype), source.nbytes))
        out = out.clone()
        if kwargs.get("non_blocking"):
            kept = out.clone()

            def check() -> None:
                if not torch.equal(source, kept):
                    self.faults.append("a source was written before its copy was complete")

            self.current_stream().work.append(check)
            if self.kind == "mps":
                self.faults.append("a copy without a wait, which MPS makes from memory that may be gone")
        return out

    def _wrapped(self, out: Any, home: torch.device, far: list[Far], name: str) -> Any:
        same = {id(each.inner): each for each in far}
        queue = self.current_stream(home) if self.kind == "cuda" else None

        def wrap(value: Any) -> Any:
            if not isinstance(value, T) or isinstance(value, Far):
                return value
            if id(value) in same and same[id(value)].device == home:
                return same[id(value)]
            if home.type == "mps" and value.dtype == torch.float64:
                raise TypeError(
                    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
                )
            if self.room is not None and value.nbytes > self.room and name != "__get__":
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {value.nbytes} bytes")
            return Far(value, home, queue, self.clock)

        return tree_map(wrap, out)
