"""Diagnostics: checks libraries, device, kernels, memory, cache, hub, and a model from its name to its first features."""

import os
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from msgspec import Struct, field

from mlfusion import models
from mlfusion.errors import BadModel, MlfusionError, Unavailable, UnknownName
from mlfusion.models import checkpoints, hub, preprocessing
from mlfusion.models.backbone import Backbone
from mlfusion.models.backbone.loading import memory_of
from mlfusion.probing.heads import kernels
from mlfusion.specs.identity import HOOKS
from mlfusion.specs.names import layer_ranges
from mlfusion.store import CachePath, default_root
from mlfusion.system import disk
from mlfusion.system.devices import device_name, failures, pick_compute, pick_device, processor_count
from mlfusion.system.memory import available
from mlfusion.system.references import find_path, missing_path, parse_model

State = Literal["ok", "note", "problem"]
LIBRARIES = ("torch", "transformers", "datasets", "huggingface-hub", "zarr", "h5py", "safetensors", "pillow")
EXTRAS = {"altair": "pip install 'mlfusion[report]' for the figures of reports"}
LOADING_FACTOR = 2.0  # memory for loading a model and running one batch, by the size of its vision tower in float32


class Finding(Struct, frozen=True):
    """The result of one check."""

    check: str
    state: State
    description: str = field(name="found")
    advice: str = field(default="", name="do")  # action for the user


def doctor(model: str | None = None, *, cache: CachePath = None, device: str = "auto") -> Iterator[Finding]:
    """Check everything that a run needs, and yield a finding for each check; nothing is downloaded or stored.

    Args:
        model: a catalogue name, hub id or folder; None checks the machine only.
        cache: root of the feature cache.
        device: the device that the model would run on.
    """
    yield _libraries()
    yield _device(device)
    yield _kernels()
    yield _memory()
    yield _cache(cache)
    yield _hub()
    if model is not None:
        yield from _model(model, device)


def _libraries() -> Finding:
    installed, absent = [f"python {platform.python_version()}"], []
    for name in LIBRARIES:
        try:
            installed.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            absent.append(name)
    if absent:
        return Finding("libraries", "problem", f"{', '.join(absent)} not installed", "pip install mlfusion")
    for name, advice in EXTRAS.items():
        try:
            version(name)
        except PackageNotFoundError:
            return Finding("libraries", "note", f"{', '.join(installed)}; {name} is not installed", advice)
    return Finding("libraries", "ok", ", ".join(installed))


def _device(requested: str) -> Finding:
    try:
        device = pick_device(requested)
    except Unavailable as err:
        return Finding("device", "problem", str(err), "--device auto")
    if device.startswith("cuda"):
        return _gpu(device)
    if device == "mps":
        advice = "mlfusion was never tried on such a device: compare some features with those of --device cpu"
        return Finding("device", "note", "mps: the graphics of this machine", advice)
    return Finding(
        "device",
        "note",
        f"cpu: {processor_count()} cores, no accelerator",
        "mlfusion plan says how long an extraction takes here; large models want a GPU",
    )


def _gpu(device: str) -> Finding:
    """Ask the GPU for its memory, and for one product: a driver may know a GPU that this PyTorch has no code for."""
    try:
        with failures(device, "a product of two small matrices"):
            free, total = torch.cuda.mem_get_info(torch.device(device))
            small = torch.ones(8, 8, device=device)
            product = float((small @ small).sum())
    except Unavailable as err:
        return Finding("device", "problem", str(err), "install a PyTorch that is built for this GPU, or --device cpu")
    if product != 8**3:
        return Finding("device", "problem", f"{device} computes {product} for {8**3}", "--device cpu")
    advice = "--compute auto is faster there than float32" if pick_compute("auto", device) != "float32" else ""
    name = device_name(device)
    return Finding("device", "ok", f"{device}: {name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free", advice)


def _kernels() -> Finding:
    if (reason := kernels.why_unavailable()) is None:
        return Finding("kernels", "ok", "attentive probes train by AVX-512 BF16")
    advice = "install a C compiler, then mlfusion again: with it they train faster" if "compiler" in reason else ""
    return Finding("kernels", "note", f"attentive probes train by PyTorch alone: {reason}", advice)


def _memory() -> Finding:
    free = available("cpu")
    if free < 2e9:
        return Finding("memory", "problem", f"{free / 1e9:.1f} GB free", "end other programs; models load into memory")
    return Finding("memory", "ok", f"{free / 1e9:.1f} GB free")


def _cache(path: CachePath) -> Finding:
    root = Path(os.fspath(path) if isinstance(path, (str, os.PathLike)) else default_root()).expanduser().absolute()
    free = disk.free_bytes(root)
    status = f"{root}{'' if root.exists() else ' (not there yet)'}, {free / 1e9:.1f} GB free"
    if not os.access(disk.nearest_existing(root), os.W_OK):
        advice = "name another place by --cache or $MLFUSION_CACHE"
        return Finding("cache", "problem", f"{status}, not writable", advice)
    if free < 1e9:
        advice = "make room with mlfusion cache prune, or name another place by --cache"
        return Finding("cache", "problem", status, advice)
    return Finding("cache", "ok", status)


def _hub() -> Finding:
    login = "logged in" if hub.logged_in() else "not logged in, which only gated models need (hf auth login)"
    if hub.offline():
        advice = "unset HF_HUB_OFFLINE to download models"
        return Finding("hub", "note", f"not asked, HF_HUB_OFFLINE is set; {login}", advice)
    try:
        hub.fetch_info("google/vit-base-patch16-224", "the hub", None)
    except Unavailable:
        advice = "connect to download models; what is here works without"
        return Finding("hub", "note", f"cannot be reached; {login}", advice)
    return Finding("hub", "ok", f"reached; {login}")


def passed(findings: Iterable[Finding]) -> bool:
    """Whether none of the findings is a problem."""
    return all(finding.state != "problem" for finding in findings)


# --- a model ---------------------------------------------------------------------------------------------------------


def _model(name: str, device: str) -> Iterator[Finding]:
    try:
        ref = parse_model(name)
        row = models.CATALOGUE.get(ref.name)
        local = bool(row and row.embedded) or find_path("model", ref.name) is not None
        if not row and not local and ("/" not in ref.name or missing_path(ref.name)):
            models.locate(name)  # raises an error with the names that exist
    except (UnknownName, BadModel) as err:
        yield Finding("name", "problem", str(err), "mlfusion ls models")
        return
    if row:
        gated = "; gated" if row.gated else ""
        text = f"{row.family}, {row.depth} layers of width {row.width}, {row.image_px} px; {row.licence}{gated}; {row.source}"
        yield Finding("name", "ok", text)
    if not local:
        if not row:
            text = f"{ref.name}: an id of the hub; not pinned: its newest state, the commit of which goes into the key"
            yield Finding("name", "ok", text)
        source, revision = (row.source, row.revision) if row else (ref.name, None)
        copy = hub.find_local(source, revision)
        yield from _access(source, ref.name, revision, copy)
        if copy is None:
            return
    yield from _files(name, device)


def _access(source: str, name: str, revision: str | None, copy: Path | None) -> Iterator[Finding]:
    """Check that the model is on this machine, or else that it can be downloaded."""
    if copy is not None:
        yield Finding("copy", "ok", f"on this machine: {copy}")
    if hub.offline():
        if copy is None:
            download = f"hf download {source}" + (f" --revision {revision}" if revision else "")
            place = f"and copy its folder below {hub.cache_folder()}"
            advice = f"unset HF_HUB_OFFLINE; or where there is a network: {download}, {place}"
            yield Finding("copy", "problem", "not on this machine, and HF_HUB_OFFLINE is set", advice)
        return
    try:
        remote = hub.fetch_info(source, name, revision)
    except Unavailable as err:
        advice = (
            "ask for access, then: hf auth login" if "gated" in str(err) else "connect, or give a folder with --model"
        )
        yield Finding("access", "note" if copy else "problem", str(err), "" if copy else advice)
        return
    free = disk.free_bytes(hub.cache_folder())
    status = f"may be read{', gated' if remote.gated else ''}; licence {remote.licence or 'not said'}"
    download = f"{status}; a download takes {remote.nbytes / 1e9:.2f} GB"
    if copy is not None:
        yield Finding("access", "ok", status)
    elif remote.nbytes > free:
        description = f"{download} and {free / 1e9:.2f} GB are free in {hub.cache_folder()}"
        yield Finding("access", "problem", description, "make room, or set HF_HUB_CACHE to another disk")
    else:
        yield Finding("access", "ok", download, f"mlfusion extract -m {name}")


def _files(name: str, device: str) -> Iterator[Finding]:
    """Check that the model's files can be read, up to the first features."""
    try:
        checkpoint = models.locate(name)
        files = models.weight_files(checkpoint.folder)
        layout = checkpoints.layout(checkpoint.folder)
        yield Finding("files", "ok", f"{layout} format, {_size(files)}, {checkpoint.folder}")
        shape = models.shape(checkpoint)
        yield Finding("configuration", "ok", f"{shape.depth} layers of width {shape.width}")
        steps = preprocessing.read(checkpoint.folder)
        yield Finding("preprocessing", "ok", f"images of {steps.pixels[0]} x {steps.pixels[1]} px")
        needed = int(LOADING_FACTOR * memory_of(checkpoint))
        if needed > (free := available("cpu")):
            description = f"about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} free"
            yield Finding("memory", "problem", description, "free some memory")
            return
        yield from _features(Backbone(checkpoint, pick_device(device), preprocessing=steps))
    except MlfusionError as err:
        yield Finding("model", "problem", str(err))


def _features(backbone: Backbone) -> Iterator[Finding]:
    """Check the blocks, tokens and hook points of a model, and the features of a gray image."""
    anatomy = backbone.anatomy
    norm = f"the second norm is {anatomy.norm2}" if anatomy.norm2 else "no second norm, so read at their output"
    final = {
        "hook": f"the final norm is {anatomy.final}",
        "apply": f"the final norm {anatomy.final} is applied to all tokens",
        "raw": "no final norm",
    }[anatomy.final_mode]
    yield Finding("blocks", "ok", f"{anatomy.depth} in {anatomy.lists}; {norm}; {final}")
    yield Finding("tokens", "ok", ", ".join(f"{kind} ({count})" for kind, count in backbone.kinds.items()))
    hooks = [f"{hook} (layers {layer_ranges(anatomy.taps[hook])})" for hook in HOOKS if hook in anatomy.taps]
    yield Finding("hook points", "ok", ", ".join(hooks + ["projected"] * backbone.projects))
    pixels = torch.zeros(1, 3, *backbone.preprocessing.pixels)
    if all(torch.isfinite(tokens).all() for tokens in backbone(pixels, [(backbone.depth, "ap")]).values()):
        yield Finding("features", "ok", "a gray image gives finite numbers")
    else:
        yield Finding("features", "problem", "a gray image gives numbers that are not finite", "look at the weights")


def _size(files: list[Path]) -> str:
    total = sum(file.stat().st_size for file in files)
    return f"{total / 1e9:.2f} GB" if total >= 1e8 else f"{total / 1e6:.1f} MB"
