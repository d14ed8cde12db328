"""Where tensors live: the accelerator that is there, or the one that was asked for."""

import torch

from mlfusion.errors import Unavailable


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
