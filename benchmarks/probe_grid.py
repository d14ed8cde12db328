"""How much faster a whole grid of attentive probes trains than by the usual loop, and how far it is from what there is to have.

    python benchmarks/probe_grid.py [--device cuda] [--precision float32|bfloat16|auto] [--steps 10] [--page]

Without --precision, float32 and, where the device has units for it, bfloat16.

Both train on synthetic features of DTD's size: 1,504 images x 24 tokens x 768 channels, 47 classes, 24 heads, batches of
301, the paper's 63 configurations. The baseline is what a researcher would write: one configuration at a time, keys and
values projected for every token, torch's AdamW, a DataLoader over samples that jitters each of them. Its steps are timed
before ours and after, 20 at least in all, and the grid's time follows from their median; so are steps of the same loop
with denormal numbers taken as 0, as ours takes them, in every thread of PyTorch. Ours trains the 63 in lockstep by
`mlfusion.probing.training.population.train`, as `mlfusion probe` does. Floating-point operations are those of matrix
products, counted by torch's own counter. With --page the tables go into docs/measurements/speed.md.
"""

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import page
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from usual import Usual, flushed, usual, wait

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
BAR, BAR_SHARE = 50, 0.85
GOAL_CUDA = 10  # seconds, of the whole grid


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


def has_bfloat16(device: str) -> bool:
    """Whether the device has units that multiply bfloat16 numbers."""
    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def ways(device: str, precision: Precision) -> str:
    """How the products are computed, and why."""
    auto = resolve("auto", device)
    faster = "takes less than" if auto == "bfloat16" else "does not take less than"
    kernel = why if (why := kernels.why_unavailable()) else "they are compiled, and the processor has AVX-512 BF16"
    by = "PyTorch" if why or precision == "float32" else "own kernels and PyTorch"
    if not why and precision == "float32":
        kernel = "they serve bfloat16 alone"
    return (
        f"{precision} by {by}: of the own kernels, {kernel}; 'auto' is {auto} here, as a product in bfloat16 {faster} two "
        "thirds of the time"
    )


def baselines(
    tokens: Tokens, device: str, steps: int, between: Callable[[], Any]
) -> tuple[list[float], list[float], Any]:
    """Seconds of steps of the usual loop and of the flushed one, half of them before `between` and half after; its result."""
    loops = usual(tokens, HEADS, device), flushed(tokens, HEADS, device)
    for loop in loops:
        loop(2)
    first = [loop(steps // 2) for loop in loops]
    found = between()
    last = [loop(steps - steps // 2) for loop in loops]
    return first[0] + last[0], first[1] + last[1], found


def timed(tokens: Tokens, device: str, precisions: list[Precision], steps: int) -> tuple[int, dict[Precision, Any]]:
    """The peak of memory before, and for each precision the seconds of our steps, and the peak."""
    before, found = peak(device), {}
    for precision in precisions:
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        with freed_memory_kept():  # as at the command line
            mine = ours(tokens, steps, device, precision)
        found[precision] = mine, peak(device)
    return before, found


def measure(device: str, precisions: list[Precision], steps: int, baseline_steps: int) -> list[dict[str, Any]]:
    """All figures, for each precision."""
    tokens = features()
    theirs, without, (before, found) = baselines(
        tokens, device, baseline_steps, lambda: timed(tokens, device, precisions, steps)
    )
    model = Usual(WIDTH, HEADS, CLASSES).to(device)
    _, x, _ = block(device, False)
    y = torch.zeros(len(x), dtype=torch.int64, device=device)
    common = {
        "device": torch.cuda.get_device_name() if device != "cpu" else page.machine(),
        "threads": torch.get_num_threads(),
        "usual_s": statistics.median(theirs),
        "usual_quartiles_s": statistics.quantiles(theirs, n=4)[::2],
        "flushed_s": statistics.median(without),
        "flushed_quartiles_s": statistics.quantiles(without, n=4)[::2],
        "usual_gflop": operations(lambda: F.cross_entropy(model(x), y).backward()) / 1e9,
        "usual_peak_mb": before / 1e6,
        "copy_gb_per_s": copy_rate(device) / 1e9,
    }
    return [common | of_precision(common, device, precision, *found[precision]) for precision in precisions]


def of_precision(
    common: dict[str, Any], device: str, precision: Precision, mine: list[float], ours_peak: int
) -> dict[str, Any]:
    """The figures of one precision, with the time that each of its steps took."""
    schedule, count = Schedule.of(IMAGES), len(SEARCH_GRIDS["paper"].configurations("attentive"))
    each = statistics.median(mine) / count
    rate = product_rate(torch.bfloat16 if precision == "bfloat16" else torch.float32, device)
    one, x, y = block(device, precision == "bfloat16")
    flops = operations(lambda: one.step(x, y, 0, 100))
    traffic = 28 * sum(
        p.numel() for p in one.probe.parameters()
    )  # parameter, gradient and two moments read, three written
    limit = flops / rate + traffic / (1e9 * common["copy_gb_per_s"])
    need = population.needs("attentive", SHAPE, schedule.batch_size, Numerics.of(device, precision))
    low, _, high = statistics.quantiles(mine, n=4) if len(mine) > 1 else (mine[0],) * 3
    return {
        "precision": precision,
        "ways": ways(device, precision),
        "ratio": common["usual_s"] / each,
        "ratio_flushed": common["flushed_s"] / each,
        "limit_share": limit / each,
        "ours_s": each,
        "ours_quartiles_s": [low / count, high / count],
        "usual_grid_h": common["usual_s"] * count * schedule.steps / 3600,
        "ours_grid_s": each * count * schedule.steps,
        "configurations": count,
        "steps": schedule.steps,
        "gflop": flops / 1e9,
        "gflop_per_s": flops / each / 1e9,
        "product_gflop_per_s": rate / 1e9,
        "optimizer_mb": traffic / 1e6,
        "optimizer_share": traffic / (1e9 * common["copy_gb_per_s"]) / each,
        "limit_s": limit,
        "limit_ratio": common["flushed_s"] / limit,
        "configuration_mb": need.each / 1e6,
        "step_mb": need.step / 1e6,
        "peak_mb": ours_peak / 1e6,
        "parts_ms": parts_of_a_step(device, precision == "bfloat16") if device == "cpu" else [],
    }


def lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table."""

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:.3g} ms"

    low, high = found["ours_quartiles_s"]
    (first, third), (lowest, highest) = found["usual_quartiles_s"], found["flushed_quartiles_s"]
    return [
        ("ratio", f"{found['ratio']:.1f}", "to the usual loop as people run it"),
        (
            "ratio, flushed",
            f"{found['ratio_flushed']:.1f}",
            f"to the usual loop with denormal numbers taken as 0; required of bfloat16: {BAR}; with all products and AdamW at "
            f"full speed: {found['limit_ratio']:.0f}",
        ),
        (
            "share of the limit",
            f"{found['limit_share']:.2f}",
            f"required: {BAR_SHARE}; the limit is {ms(found['limit_s'])}: operations at the rate of a plain product, then the "
            "optimizer at the rate of a copy",
        ),
        ("ways", found["precision"], found["ways"]),
        ("usual loop", ms(found["usual_s"]), f"one step of one configuration; quartiles {ms(first)}, {ms(third)}"),
        ("usual loop, flushed", ms(found["flushed_s"]), f"quartiles {ms(lowest)}, {ms(highest)}"),
        ("ours", ms(found["ours_s"]), f"one step of one configuration; quartiles {ms(low)}, {ms(high)}"),
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
    parser.add_argument("--precision", default="each", choices=["each", "auto", "float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=10, help="of ours that are timed")
    parser.add_argument("--baseline-steps", type=int, default=24)
    parser.add_argument("--page", action="store_true", help="put the table into docs/measurements/speed.md")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    both: list[Precision] = ["float32", "bfloat16"] if has_bfloat16(args.device) else ["float32"]
    asked: list[Precision] = both if args.precision == "each" else [resolve(args.precision, args.device)]
    measured = measure(args.device, asked, args.steps, max(20, args.baseline_steps))
    machine = f"{measured[0]['device']}, {measured[0]['threads']} threads, torch {torch.__version__}, {date.today()}."
    if not has_bfloat16(args.device):
        machine += " The device has no units for bfloat16."
    texts = [machine]
    for found in measured:
        print()
        for name, value, note in lines(found):
            print(f"{name:<24}{value:>14}   {note}")
        total = math.fsum(spent for _, spent in found["parts_ms"])
        for name, spent in found["parts_ms"]:
            print(f"  {name:<26}{spent:>8.1f} ms   {100 * spent / total:.0f} % of a step on one thread")
        texts.append(page.table([found["precision"], "", ""], lines(found)))
        if found["parts_ms"]:
            rows = [(name, f"{spent:.1f} ms", f"{100 * spent / total:.0f} %") for name, spent in found["parts_ms"]]
            texts += ["Time of one step of one configuration, on one thread:", page.table(["", "", ""], rows)]
    print(f"\n{machine}")
    if args.page:
        where = "processor" if args.device == "cpu" else "gpu"
        page.put("measurements/speed.md", f"grid on a {where}", "\n\n".join(texts))
    if args.json:
        print(json.dumps(measured))


if __name__ == "__main__":
    main()
