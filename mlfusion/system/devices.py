"""Chooses the device and the compute type: the best of this machine, or the one that the user names."""

import platform
import re
from pathlib import Path

import torch

from mlfusion.errors import Unavailable, UnknownName
from mlfusion.specs.identity import COMPUTES, Compute


def pick_device(word: str) -> str:
    """Resolve a device: 'auto' → the first available one of cuda, mps and cpu; raises Unavailable for any other."""
    tests = (("cuda", torch.cuda.is_available), ("mps", torch.backends.mps.is_available), ("cpu", lambda: True))
    available = [name for name, is_available in tests if is_available()]
    if word == "auto":
        return available[0]
    if word.split(":")[0] not in available:
        raise Unavailable(f"no device {word!r} on this machine; allowed: auto, {', '.join(available)}")
    return word


def pick_compute(word: str, device: str) -> Compute:
    """Resolve a compute type: 'auto' → bfloat16 if the device has units for bfloat16 products, else float32.

    The choice depends on the device's properties, not on a measurement, because it is part of the features' key. 'auto' never
    chooses float16, which can overflow in large models. Raises UnknownName if `word` is no compute type.
    """
    if word in COMPUTES:
        return word
    if word != "auto":
        raise UnknownName("compute", word, [*COMPUTES, "auto"])
    where = torch.device(device)
    if where.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(where) >= (8, 0) else "float32"
    units = where.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return "bfloat16" if units else "float32"


def device_name(device: str) -> str:
    """The device's product name, such as 'NVIDIA H200' or 'AMD EPYC'."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
