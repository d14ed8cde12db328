"""How much faster a whole grid of attentive probes trains than by the usual loop, and how far it is from what there is to have.

    python benchmarks/probe_grid.py [--device cuda] [--precision float32|bfloat16|auto] [--steps 10] [--page]

Both train on synthetic features of DTD's size: 1,504 images x 24 tokens x 768 channels, 47 classes, 24 heads, batches of
301, the paper's 63 configurations. The baseline is what a researcher would write: one configuration at a time, keys and
values projected for every token, torch's AdamW, a DataLoader over samples that jitters each of them. Its steps are timed
before ours and after, 20 at least in all, and the grid's time follows from their median. Ours trains the 63 in lockstep by
`mlfusion.probing.training.population.train`, as `mlfusion probe` does. Floating-point operations are those of matrix
products, counted by torch's own counter. With --page the tables go into docs/measurements/speed.md.
"""

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import page
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from mlfusion.cli.malloc import freed_memory_kept
from mlfusion.probing.grids import SEARCH_GRIDS
from mlfusion.probing.heads import HeadShape, kernels
from mlfusion.probing.losses import cross_entropy
from mlfusion.probing.training import population
from mlfusion.probing.training.batches import Schedule, Tokens, batches
from mlfusion.probing.training.population import Configuration, Population, TrainingData
from mlfusion.probing.training.precision import Numerics, resolve
from mlfusion.specs.options import Precision

IMAGES, TOKENS, WIDTH, CLASSES, HEADS = 1504, 24, 768, 47, 24
SHAPE = HeadShape(tokens=TOKENS, width=WIDTH, classes=CLASSES, heads=HEADS)
BAR = 50
GOAL_CUDA = 10  # seconds, of the whole grid


class Samples(Dataset[tuple[Tensor, int]]):
    """One image at a time, of length 1 and jittered."""

    def __init__(self, tokens: Tokens) -> None:
        self.values, self.labels = torch.from_numpy(np.asarray(tokens.values)), tokens.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        x = F.normalize(self.values[row].float(), dim=-1)
        if torch.rand(()) < 0.5:
            x = x + 0.05 * torch.randn_like(x)
        return x, int(self.labels[row])


class Usual(nn.Module):
    """The probe with keys and values projected for every token."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, classes: int = CLASSES, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.head_width = 2 * (width // heads)
        inner = heads * self.head_width
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width) for _ in range(3))
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out, self.norm, self.head = nn.Linear(inner, width), nn.BatchNorm1d(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, C]."""
        b, t, _ = x.shape
        q = (
            self.to_q(self.norm_q(self.query))
            .view(1, 1, self.heads, self.head_width)
            .transpose(1, 2)
            .expand(b, -1, -1, -1)
        )
        k = self.to_k(self.norm_k(x)).view(b, t, self.heads, self.head_width).transpose(1, 2)
        v = self.to_v(self.norm_v(x)).view(b, t, self.heads, self.head_width).transpose(1, 2)
        pooled = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.head(self.norm(self.out(pooled.transpose(1, 2).flatten(1))))


def wait(device: str) -> float:
    """Now, when the device has done all that it was told."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def usual(tokens: Tokens, device: str) -> Callable[[int], list[float]]:
    """The loop; seconds of each of so many steps."""
    model = Usual().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    counts = np.bincount(tokens.labels, minlength=CLASSES)
    criterion = nn.CrossEntropyLoss(weight=torch.from_numpy(len(tokens) / (CLASSES * counts)).float().to(device))

    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from DataLoader(Samples(tokens), batch_size=301, shuffle=True, drop_last=True)

    loader = forever()

    def steps(count: int) -> list[float]:
        took = []
        for _ in range(count):
            start = wait(device)
            x, y = next(loader)
            optimizer.zero_grad()
            criterion(model(x.to(device)), y.to(device)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            took.append(wait(device) - start)
        return took

    return steps


def ours(tokens: Tokens, steps: int, device: str, precision: Precision) -> list[float]:
    """Seconds of each of so many steps of all 63. The first four are not counted: they warm up."""
    times: list[float] = []
    grid = SEARCH_GRIDS["paper"].configurations("attentive")
    data = TrainingData(tokens, np.arange(IMAGES), Schedule.of(IMAGES), until=steps + 5)
    for _ in population.train(
        Population("attentive", SHAPE, grid, seed=0),
        data,
        Numerics.of(device, precision),
        progress=lambda _: times.append(wait(device)),
    ):
        pass
    return np.diff(times)[4:].tolist()


def best(work: Callable[[], Any], device: str, times: int = 9) -> float:
    """Seconds of the fastest of several runs: the rate that the machine has when it is left alone."""
    took = []
    for _ in range(times + 1):
        start = wait(device)
        work()
        took.append(wait(device) - start)
    return min(took[1:])


def product_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of one large matrix product."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / best(lambda: a @ b, device)


def copy_rate(device: str) -> float:
    """Bytes a second read and written by a copy that no cache holds."""
    a = torch.ones(2**27 if device == "cpu" else 2**30, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / best(lambda: b.copy_(a), device)


def block(device: str, bf16: bool) -> tuple[Any, Tensor, Tensor]:
    """One configuration, and a batch for it."""
    loss = partial(cross_entropy, weights=torch.ones(CLASSES, device=device))
    members = Population("attentive", SHAPE, [Configuration(1e-2, 1e-2, 0.1)], seed=0)
    one = population._Block(members, Numerics(device, bf16=bf16), loss)
    [(x, y), *_] = batches(features(302), np.arange(302), Schedule(302, 1, 301, 1), seed=0, device=device)
    return one, x, y


def operations(work: Callable[[], Any]) -> int:
    """Of its matrix products, which are the same by whomever they are done; PyTorch counts its own."""
    with FlopCounterMode(display=False) as counter, kernels.off():
        work()
    return counter.get_total_flops()


class Timed:
    """The compiled kernels, with a clock."""

    def __init__(self) -> None:
        self.library, self.spent = kernels.library(), Counter[str]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.library, name)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            made = function(*args)
            self.spent[name.removeprefix("mlfusion_")] += time.perf_counter() - start
            return made

        return timed


def parts_of_a_step(device: str, bf16: bool) -> list[tuple[str, float]]:
    """Milliseconds of one configuration's step on one thread, by what they go to, largest first."""
    one, x, y = block(device, bf16)
    names = {
        "PyTorch's matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::baddbmm_"),
        "AdamW": ("aten::_fused_adamw_", "adamw", "squares"),
        "softmax": ("aten::_softmax", "aten::_softmax_backward_data"),
        "copies": ("aten::copy_",),
        "own matrix products": (
            "softmax",
            "averages",
            "values",
            "attention_gradients",
        ),  # the first with the products it is of
        "passes over weights": ("fold_norm", "row_products", "row_sums"),
    }
    threads, steps = torch.get_num_threads(), 10
    torch.set_num_threads(1)
    for step in range(3):
        one.step(x, y, step, 100)
    start = wait(device)
    for step in range(steps):
        one.step(x, y, step, 100)
    whole = wait(device) - start
    took: Counter[str] = Counter()
    if kernels.library() is not None:
        own = Timed()
        with mock.patch.object(kernels, "library", return_value=own):
            for step in range(steps):
                one.step(x, y, step, 100)
        took += own.spent
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for step in range(steps):
            one.step(x, y, step, 100)
    torch.set_num_threads(threads)
    for event in seen.key_averages():
        took[event.key] += event.self_cpu_time_total / 1e6
    spent: Counter[str] = Counter()
    for key, seconds in took.items():
        for name, keys in names.items():
            if key in keys:
                spent[name] += seconds * 1e3 / steps
    spent["everything else"] = max(0.0, whole * 1e3 / steps - spent.total())
    return spent.most_common()


def features(images: int = IMAGES) -> Tokens:
    """Synthetic tokens and labels, at least one image a class."""
    random = np.random.default_rng(0)
    values = random.standard_normal((images, TOKENS, WIDTH), np.float32).astype(np.float16)
    return Tokens(values, np.arange(images) % CLASSES)


def peak(device: str) -> int:
    """Bytes: of the device, or of this process so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def measure(device: str, precision: Precision, steps: int, baseline_steps: int) -> dict[str, Any]:
    """All figures."""
    tokens, narrow = features(), resolve(precision, device)
    schedule, count = Schedule.of(IMAGES), len(SEARCH_GRIDS["paper"].configurations("attentive"))
    loop = usual(tokens, device)
    loop(2)
    theirs = loop(baseline_steps // 2)
    before = peak(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    with freed_memory_kept():  # as at the command line
        mine = ours(tokens, steps, device, narrow)
    ours_peak = peak(device)
    theirs += loop(baseline_steps - baseline_steps // 2)

    each_theirs = statistics.median(theirs)
    each = statistics.median(mine) / count
    dtype = torch.bfloat16 if narrow == "bfloat16" else torch.float32
    rate, copies = product_rate(dtype, device), copy_rate(device)
    one, x, y = block(device, narrow == "bfloat16")
    flops = operations(lambda: one.step(x, y, 0, 100))
    model = Usual().to(device)
    y = torch.zeros(len(x), dtype=torch.int64, device=device)
    flops_theirs = operations(lambda: F.cross_entropy(model(x), y).backward())
    parameters = sum(p.numel() for p in one.probe.parameters())
    traffic = 28 * parameters  # parameter, gradient and two moments read, all but the gradient written
    limit = flops / rate + traffic / copies
    need = population.needs("attentive", SHAPE, schedule.batch_size, Numerics.of(device, narrow))
    low, _, high = statistics.quantiles(mine, n=4) if len(mine) > 1 else (mine[0],) * 3
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else page.machine(),
        "threads": torch.get_num_threads(),
        "precision": narrow,
        "kernels": f"PyTorch's alone: {why}" if (why := kernels.why_unavailable()) else "own, by AVX-512 BF16",
        "ratio": each_theirs / each,
        "usual_s": each_theirs,
        "usual_quartiles_s": statistics.quantiles(theirs, n=4)[::2],
        "ours_s": each,
        "ours_quartiles_s": [low / count, high / count],
        "usual_grid_h": each_theirs * count * schedule.steps / 3600,
        "ours_grid_s": each * count * schedule.steps,
        "configurations": count,
        "steps": schedule.steps,
        "gflop": flops / 1e9,
        "usual_gflop": flops_theirs / 1e9,
        "gflop_per_s": flops / each / 1e9,
        "product_gflop_per_s": rate / 1e9,
        "optimizer_mb": traffic / 1e6,
        "copy_gb_per_s": copies / 1e9,
        "optimizer_share": traffic / copies / each,
        "limit_s": limit,
        "limit_ratio": each_theirs / limit,
        "configuration_mb": need.each / 1e6,
        "step_mb": need.step / 1e6,
        "peak_mb": ours_peak / 1e6,
        "usual_peak_mb": before / 1e6,
        "parts_ms": parts_of_a_step(device, narrow == "bfloat16") if device == "cpu" else [],
    }


def lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table."""

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:.3g} ms"

    low, high = found["ours_quartiles_s"]
    first, third = found["usual_quartiles_s"]
    return [
        (
            "ratio",
            f"{found['ratio']:.1f}",
            f"required: {BAR}; with all products and AdamW at full speed: {found['limit_ratio']:.0f}",
        ),
        ("usual loop", ms(found["usual_s"]), f"one step of one configuration; quartiles {ms(first)}, {ms(third)}"),
        (
            "ours",
            ms(found["ours_s"]),
            f"one step of one configuration, {found['precision']}, kernels {found['kernels']}; quartiles {ms(low)}, {ms(high)}",
        ),
        (
            "usual loop, whole grid",
            f"{found['usual_grid_h']:.1f} h",
            f"{found['configurations']} configurations, {found['steps']:,} steps each",
        ),
        ("ours, whole grid", f"{found['ours_grid_s'] / 60:.1f} min", f"goal on a GPU: {GOAL_CUDA} s"),
        (
            "operations",
            f"{found['gflop']:.2f} GFLOP",
            f"one step of one configuration; usual loop {found['usual_gflop']:.0f}",
        ),
        (
            "rate",
            f"{found['gflop_per_s']:.0f} GFLOP/s",
            f"a plain matrix product here: {found['product_gflop_per_s']:.0f}",
        ),
        (
            "optimizer",
            f"{found['optimizer_mb']:.0f} MB",
            f"memory traffic of one step; {100 * found['optimizer_share']:.0f} % of the step's time at the rate of a copy, "
            f"{found['copy_gb_per_s']:.1f} GB/s",
        ),
        (
            "limit",
            ms(found["limit_s"]),
            "operations at the rate of a plain product, then the optimizer at the rate of a copy",
        ),
        (
            "memory",
            f"{found['peak_mb']:,.0f} MB",
            f"peak; usual loop with one configuration {found['usual_peak_mb']:,.0f} MB",
        ),
        (
            "configuration",
            f"{found['configuration_mb']:.0f} MB",
            f"parameters and moments; and {found['step_mb']:.0f} MB during its step",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=10, help="of ours that are timed")
    parser.add_argument("--baseline-steps", type=int, default=24)
    parser.add_argument("--page", action="store_true", help="put the table into docs/measurements/speed.md")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args.device, args.precision, args.steps, max(20, args.baseline_steps))
    for name, value, note in lines(found):
        print(f"{name:<24}{value:>14}   {note}")
    total = math.fsum(spent for _, spent in found["parts_ms"])
    for name, spent in found["parts_ms"]:
        print(f"  {name:<22}{spent:>11.1f} ms   {100 * spent / total:.0f} % of a step on one thread")
    print(f"{found['device']}, {found['threads']} threads")
    if args.page:
        text = page.table(["", "", ""], lines(found))
        if found["parts_ms"]:
            rows = [(name, f"{spent:.1f} ms", f"{100 * spent / total:.0f} %") for name, spent in found["parts_ms"]]
            text += "\n\nTime of one step of one configuration, on one thread:\n\n" + page.table(["", "", ""], rows)
        where = "processor" if args.device == "cpu" else "gpu"
        page.put(
            "measurements/speed.md", f"grid on a {where}", f"{found['device']}, torch {torch.__version__}.\n\n{text}"
        )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
