"""Where tensors live: the accelerator that is there, or the one that was asked for."""

import platform
import re
from pathlib import Path

import torch

from mlfusion.errors import Unavailable, UnknownName
from mlfusion.specs import COMPUTES, Compute


def pick_device(word: str) -> str:
    """'auto' → cuda, mps or cpu, whichever is there; anything else must be there.

    Raises:
        Unavailable: the device asked for is not there.
    """
    there = [
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
        "cpu",
    ]
    if word == "auto":
        return there[0]
    if word.split(":")[0] not in there:
        raise Unavailable(f"no device {word!r} on this machine; allowed: auto, {', '.join(there)}")
    return word


def pick_compute(word: str, device: str) -> Compute:
    """'auto' → bfloat16 where the device has units for its products, else float32; a type by name stays.

    Units are found by what the device says of itself, not by a measurement: the answer is part of the features' key. float16
    can overflow in large models, so it is taken only where it is asked for.

    Raises:
        UnknownName: it is no type to compute in.
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
    """What people call it: 'NVIDIA H200', 'AMD EPYC'."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
