"""Recognises checkpoints of timm and open_clip by their files, and describes them as configurations of transformers' classes.

Neither library is needed. timm writes `config.json` with an `architecture` and the tensors of its VisionTransformer;
open_clip writes `open_clip_config.json` and a state dict whose image tower begins with `visual.`. This module finds the class
that fits (`timm`, `open_clip`), by the tensors' names and shapes; `backbone.conversion` renames the tensors.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlfusion.errors import BadModel, first_line
from mlfusion.models import open_clip, timm

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
        try:
            if file.suffix == ".safetensors":
                with open(file, "rb") as stream:
                    body = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
                body.pop("__metadata__", None)
                found = {key: Header(file, tuple(entry["shape"]), entry["dtype"]) for key, entry in body.items()}
            else:
                tensors = unpickled(file).items()
                found = {key: Header(file, tuple(tensor.shape), str(tensor.dtype)) for key, tensor in tensors}
        except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as err:
            raise BadModel(
                f"{file} holds no tensors that can be read ({err}); allowed: safetensors, or plain tensors"
            ) from err
        if twice := sorted(found.keys() & headers):
            raise BadModel(
                f"{file} and {headers[twice[0]].file} both hold {twice[0]}; allowed: one file for each tensor"
            )
        headers |= found
    return headers


def shapes_of(files: tuple[Path, ...]) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape; errors as in `headers_of`."""
    return {name: header.shape for name, header in headers_of(files).items()}


def unpickled(file: Path) -> dict[str, Any]:
    """The tensors of a .bin or .pt file, memory-mapped if possible; raises BadModel if it holds anything else, unloaded."""
    import pickle
    import zipfile

    import torch

    try:
        # Files of torch before 1.6 are no zip archives, and cannot be mapped.
        body = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        LookupError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as err:
        raise BadModel(
            f"{file} holds more than plain tensors and is not loaded ({first_line(err)}); allowed: safetensors"
        ) from err
    for key in ("state_dict", "model"):
        if isinstance(body, dict) and isinstance(body.get(key), dict):
            body = body[key]
    if not isinstance(body, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in body.values()):
        raise BadModel(f"{file} holds no tensors by name; allowed: a state dict")
    return body


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object, or an empty one if there is no such file; raises BadModel if it holds something else."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        raise BadModel(f"{path} cannot be read: {err}") from err
    if not isinstance(body, dict):
        raise BadModel(f"{path} holds no JSON object")
    return body
