"""Chooses the device and the compute type: by default the best of this machine, else the user's choice."""

import logging
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mlfusion.errors import Unavailable, UnknownName, first_line, is_device_failure, is_shortage
from mlfusion.specs.identity import COMPUTES, Compute

logger = logging.getLogger(__name__)

_refusal = ""  # why there is no GPU, in torch's words, which it says only once in a process


def pick_device(name: str) -> str:
    """Resolve a device: 'auto' → the first available one of cuda, mps and cpu.

    Raises:
        Unavailable: there is no such device; the message says why, if the system does, and which there are.
    """
    gpus, reason = _gpus()
    available = [
        kind for kind, there in (("cuda", gpus), ("mps", torch.backends.mps.is_available()), ("cpu", 1)) if there
    ]
    if name == "auto":
        if reason:
            logger.warning("the GPU cannot be used (%s), so %s is; update the GPU's driver", reason, available[0])
        return available[0]
    kind, _, index = name.partition(":")
    if kind not in available or int(index or 0) >= (gpus if kind == "cuda" else 1):
        if not gpus and not reason and torch.version.cuda is None and torch.version.hip is None:
            reason = f"PyTorch {torch.__version__} is built without CUDA"
        why = f" ({reason}; update the GPU's driver, or install another PyTorch: https://pytorch.org)" if reason else ""
        numbered = [f"cuda:{number}" for number in range(gpus)] if gpus > 1 else []
        raise Unavailable(
            f"no device {name!r} on this machine{why if kind == 'cuda' else ''}; allowed: --device auto, "
            f"{', '.join(available + numbered)}"
        )
    return name


def _gpus() -> tuple[int, str]:
    """The number of GPUs of CUDA; if it is 0, why the driver cannot be used, '' if nothing is wrong with it."""
    global _refusal
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return count, ""
    for warning in caught:
        _refusal = str(warning.message).removeprefix("CUDA initialization: ").partition(". ")[0].strip()
    return 0, _refusal


def pick_compute(name: str, device: str) -> Compute:
    """Resolve a compute type: 'auto' → bfloat16 if the device has units for bfloat16 products, else float32.

    The choice depends on the device's properties, not on a measurement, because it is part of the features' key. 'auto' never
    chooses float16, which can overflow in large models.

    Raises:
        UnknownName: it is no compute type.
        Unavailable: the device has no such numbers.
    """
    target = torch.device(device)
    if name in COMPUTES:
        if name == "bfloat16" and target.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
            raise Unavailable("mps has no bfloat16 before macOS 14; allowed: --compute float32, float16")
        return name
    if name != "auto":
        raise UnknownName("compute", name, [*COMPUTES, "auto"])
    if target.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(target) >= (8, 0) else "float32"
    units = target.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return "bfloat16" if units else "float32"


def device_name(device: str) -> str:
    """The device's product name, such as 'NVIDIA H200' or 'AMD EPYC'."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def processor_count() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def failures(device: str, use: str) -> Iterator[None]:
    """Turn what a device reports when it fails, or has too little memory for `use`, into one sentence.

    Raises:
        Unavailable: the device failed, or was lost, or memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as err:
        if is_shortage(err) and device != "cpu":
            raise Unavailable(
                f"there is no memory on {device} for {use} ({first_line(err)}); allowed: --device cpu or another device, a "
                "smaller model, or end other programs there. What was finished is kept"
            ) from err
        if is_device_failure(err):
            raise Unavailable(
                f"{device} failed ({first_line(err)}); what was finished is kept. Run the same command again, which goes on "
                "from there; if it fails again, look at the GPU (nvidia-smi), or take --device cpu"
            ) from err
        raise


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products and convolutions of float32 without TF32 on a GPU, whatever the process has set; other settings stay.

    A user who has set TF32 by the newer of PyTorch's two interfaces may no longer read the older one; one that reads is set.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    restore = []
    try:
        products = torch.get_float32_matmul_precision()
        if products != "highest":
            restore.append(lambda: torch.set_float32_matmul_precision(products))
            torch.set_float32_matmul_precision("highest")
    except RuntimeError:
        newer = matmul.fp32_precision
        restore.append(lambda: setattr(matmul, "fp32_precision", newer))
        matmul.fp32_precision = "ieee"
    try:
        older = cudnn.allow_tf32
        restore.append(lambda: setattr(cudnn, "allow_tf32", older))
        cudnn.allow_tf32 = False
    except RuntimeError:
        convolutions = cudnn.conv.fp32_precision
        restore.append(lambda: setattr(cudnn.conv, "fp32_precision", convolutions))
        cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        for undo in restore:
            undo()
