"""Recognises checkpoints of timm and open_clip by their files, and describes them as configurations of transformers' classes.

Neither library is needed. timm writes `config.json` with an `architecture` and the tensors of its VisionTransformer;
open_clip writes `open_clip_config.json` and a state dict whose image tower begins with `visual.`. This module finds the class
that fits (`timm`, `open_clip`), by the tensors' names and shapes; `backbone.conversion` renames the tensors.
"""

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlfusion.errors import BadModel, boundary
from mlfusion.models import open_clip, timm

LARGEST_JSON = 1 << 26  # bytes; the index of a model of 100,000 tensors has a tenth of it
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit

Layout = Literal["transformers", "timm", "open_clip"]


def layout(folder: Path) -> Layout:
    """The library whose format a folder has."""
    config = read_json(folder / "config.json")
    if "model_type" in config and config["model_type"] != "timm_wrapper":
        return "transformers"
    if "architecture" in config:
        return "timm"
    return "open_clip" if (folder / "open_clip_config.json").is_file() else "transformers"


def configuration(folder: Path, files: tuple[Path, ...]) -> Any:
    """The configuration of the class of transformers that computes the same as this checkpoint.

    Raises BadModel, which names a field or a tensor, if no class computes the same.
    """
    if layout(folder) == "timm":
        return timm.configuration(read_json(folder / "config.json"), shapes_of(files))
    return open_clip.configuration(read_json(folder / "open_clip_config.json"), shapes_of(files), folder.name)


@dataclass(frozen=True)
class Header:
    """What a file says of one of its tensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # 'F32', 'BF16', 'I8' and so on in safetensors; 'torch.float32' and so on in a pickle


def headers_of(files: Iterable[Path]) -> dict[str, Header]:
    """Tensor name → its header; raises BadModel if a file holds anything but tensors, or two files hold the same one."""
    headers: dict[str, Header] = {}
    for file in files:
        if file.suffix == ".safetensors":
            found = _header_of(file)
        else:
            tensors = unpickled(file).items()
            found = {key: Header(file, tuple(tensor.shape), str(tensor.dtype)) for key, tensor in tensors}
        if twice := sorted(found.keys() & headers):
            raise BadModel(
                f"{file} and {headers[twice[0]].file} both hold {twice[0]}; allowed: one file for each tensor"
            )
        headers |= found
    return headers


def _header_of(file: Path) -> dict[str, Header]:
    """The header of a safetensors file, which the library has checked (`files.verify`)."""
    with (
        boundary(
            lambda reason: BadModel(f"{file} holds no tensors that can be read ({reason}); allowed: whole safetensors")
        ),
        open(file, "rb") as stream,
    ):
        length = int.from_bytes(stream.read(8), "little")
        if length > LARGEST_HEADER:
            raise BadModel(f"{file} has a header of {length:,} bytes; allowed: at most {LARGEST_HEADER:,}")
        body = json.loads(stream.read(length))
        body.pop("__metadata__", None)
        return {key: Header(file, tuple(entry["shape"]), entry["dtype"]) for key, entry in body.items()}


def shapes_of(files: tuple[Path, ...]) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape; errors as in `headers_of`."""
    return {name: header.shape for name, header in headers_of(files).items()}


def unpickled(file: Path) -> dict[str, Any]:
    """The tensors of a .bin or .pt file, memory-mapped if possible; raises BadModel if it holds anything else, unloaded."""
    import zipfile

    import torch

    with boundary(
        lambda reason: BadModel(
            f"{file} holds more than plain tensors and is not loaded ({reason}); allowed: safetensors"
        )
    ):
        # Files of torch before 1.6 are no zip archives, and cannot be mapped.
        body = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for key in ("state_dict", "model"):
        if isinstance(body, dict) and isinstance(body.get(key), dict):
            body = body[key]
    if not isinstance(body, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in body.values()):
        raise BadModel(f"{file} holds no tensors by name; allowed: a state dict")
    return body


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object, or an empty one if there is no such file; raises BadModel if it holds something else."""
    if not path.exists() and not path.is_symlink():
        return {}
    cannot, allowed = f"{path} cannot be read", "allowed: a JSON object in a plain file"
    with (
        boundary(lambda reason: BadModel(f"{cannot} ({reason}); {allowed}. Download it again")),
        # Without waiting, as it would for a pipe.
        open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file,
    ):
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_JSON:
            raise BadModel(f"{cannot}; {allowed} of at most {LARGEST_JSON:,} bytes. Download it again")
        body = json.loads(file.read().decode())
    if not isinstance(body, dict):
        raise BadModel(f"{path} holds no JSON object")
    return body
