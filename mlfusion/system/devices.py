"""Chooses the device and the compute type: by default the best of this machine, else the user's choice."""

import platform
import re
from pathlib import Path

import torch

from mlfusion.errors import Unavailable, UnknownName
from mlfusion.specs.identity import COMPUTES, Compute


def pick_device(name: str) -> str:
    """Resolve a device: 'auto' → the first available one of cuda, mps and cpu; raises Unavailable for any other."""
    tests = (("cuda", torch.cuda.is_available), ("mps", torch.backends.mps.is_available), ("cpu", lambda: True))
    available = [name for name, is_available in tests if is_available()]
    if name == "auto":
        return available[0]
    if name.split(":")[0] not in available:
        raise Unavailable(f"no device {name!r} on this machine; allowed: auto, {', '.join(available)}")
    return name


def pick_compute(name: str, device: str) -> Compute:
    """Resolve a compute type: 'auto' → bfloat16 if the device has units for bfloat16 products, else float32.

    The choice depends on the device's properties, not on a measurement, because it is part of the features' key. 'auto' never
    chooses float16, which can overflow in large models. Raises UnknownName if `word` is no compute type.
    """
    if name in COMPUTES:
        return name
    if name != "auto":
        raise UnknownName("compute", name, [*COMPUTES, "auto"])
    target = torch.device(device)
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
