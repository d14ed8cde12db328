"""Decides which files a checkpoint is: this one list is downloaded, digested and read.

The names and their order are those by which transformers looks for weights. What else lies in the folder changes nothing.
"""

import hashlib
import time
from collections.abc import Iterable
from fnmatch import filter as matching
from functools import lru_cache
from pathlib import Path

from mlfusion.errors import BadModel, boundary
from mlfusion.models import checkpoints

CONFIGURATION = [
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "open_clip_config.json",
    "adapter_config.json",  # read only to refuse the adapter
]
INDEX = ".index.json"
_HUB = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
    "*.safetensors",
)
WEIGHTS: dict[checkpoints.Layout, tuple[str, ...]] = {
    "transformers": _HUB,
    "timm": _HUB,
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "*.safetensors", "*.bin", "*.pt"),
}
"""Names of the file that holds the weights, or that names their files: the first that exists is used."""

LARGEST = {"layers": 4096, "depth": 4096, "num_labels": 1_000_000}  # by a word in the field's name

LFS_POINTER = b"version https://git-lfs"
SETTLED = 2_000_000_000  # ns; a file that is younger may change again within one tick of the file system's clock


def patterns(folder: Path) -> tuple[str, ...]:
    """Names of the file of weights by precedence; transformers' field `transformers_weights` replaces them."""
    named = checkpoints.read_json(folder / "config.json").get("transformers_weights")
    return (named,) if isinstance(named, str) else WEIGHTS[checkpoints.layout(folder)]


def candidates(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The files that may hold the weights, or name their files, by the first pattern that any file fits."""
    weights = sorted(name for name in names if not name.startswith("adapter_"))
    return next(filter(None, (matching(weights, pattern) for pattern in patterns)), [])


def choose(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """The one such file, or None; raises BadModel if there are several, since nothing says which of them is meant."""
    found = candidates(names, patterns)
    if len(found) > 1:
        raise BadModel(
            f"{', '.join(found)} may all be the weights, and no {INDEX[1:]} says which; allowed: model.safetensors, or "
            f"model.safetensors{INDEX} that names its files. Keep only the file that is meant"
        )
    return found[0] if found else None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights.

    Raises:
        BadModel: there are none, several are possible, one is missing or cannot be read, or an adapter lies beside them.
    """
    refuse_adapter(folder)
    allowed = patterns(folder)
    name = choose((path.name for path in folder.iterdir() if path.is_file()), allowed)
    if name is None:
        raise BadModel(f"{folder} holds no weights; allowed: {', '.join(allowed)}")
    files = [folder / shard for shard in shards(folder / name)] if name.endswith(INDEX) else [folder / name]
    for file in files:
        if file.is_symlink():
            refuse_link(file)
        verify(file)
    return files


def shards(index: Path) -> list[str]:
    """The names of the files that an index names, all in its own folder; raises BadModel if one is elsewhere."""
    names = checkpoints.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BadModel(f"{index} names no files; allowed: an object weight_map from tensors to files")
    for name in (files := sorted({str(name) for name in names.values()})):
        if "/" in name or "\\" in name or name.startswith("."):
            raise BadModel(f"{index} names {name!r}; allowed: files of its own folder, without a path")
    return files


def refuse_adapter(folder: Path) -> None:
    """Raise BadModel if the folder holds an adapter of PEFT: it would change the weights, and it is not applied."""
    adapters = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    if found := [name for name in adapters if (folder / name).is_file()]:
        raise BadModel(
            f"{folder} holds an adapter ({', '.join(found)}), and adapters are not applied; merge it into its base with "
            "peft, `model.merge_and_unload().save_pretrained(FOLDER)`, and give that folder"
        )


def refuse_quantised(folder: Path) -> None:
    """Raise BadModel if a configuration, or a part of it such as `text_config`, says that the weights are quantised."""
    parts = [(name, checkpoints.read_json(folder / name)) for name in ("config.json", "open_clip_config.json")]
    while parts:
        file, part = parts.pop()
        if how := part.get("quantization_config") or part.get("compression_config"):
            method = how.get("quant_method") if isinstance(how, dict) else how
            raise BadModel(
                f"{folder / file} says that the weights are quantised ({method or 'no method given'}), and quantised weights "
                "are not read; allowed: weights in float32, float16 or bfloat16, such as the model before its quantisation"
            )
        parts += [(file, value) for value in part.values() if isinstance(value, dict)]


def refuse_sizes(folder: Path) -> None:
    """Raise BadModel for a number of blocks or classes that no model has: building them would take all memory."""
    parts = [(name, checkpoints.read_json(folder / name)) for name in ("config.json", "open_clip_config.json")]
    while parts:
        file, part = parts.pop()
        for field, value in part.items():
            numbers = value if isinstance(value, list) else [value]
            limit = next((most for word, most in LARGEST.items() if word in field), None)
            if limit and any(isinstance(number, (int, float)) and not number <= limit for number in numbers):
                raise BadModel(
                    f"{folder / file} says {field} is {str(value)[:40]}; allowed: at most {limit:,}. Download it again"
                )
        parts += [(file, value) for value in part.values() if isinstance(value, dict)]


def refuse_links(folder: Path) -> None:
    """Check every file of the configuration by `refuse_link`."""
    for name in CONFIGURATION:
        if (folder / name).is_symlink() or (folder / name).exists():
            refuse_link(folder / name)


def refuse_link(file: Path) -> None:
    """Raise BadModel if a file is no plain one, or a link that leads out of its folder.

    In the hub's cache the files of a snapshot are links into their repository's folder, and these are followed.
    """
    folder = file.parent.resolve()
    root = folder.parents[1] if folder.parent.name == "snapshots" else folder
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError):
        raise BadModel(f"{file} is a link that leads nowhere; allowed: the file itself. Download it again") from None
    if not target.is_relative_to(root):
        raise BadModel(
            f"{file} is a link to {target}, which lies outside of {root}; allowed: files of that folder. Copy the file there"
        )
    if not target.is_file():
        raise BadModel(f"{file} is no plain file; allowed: a file. Download it again")


def verify(file: Path) -> None:
    """Check that a file of weights can be read, by its header alone where it is safetensors.

    Raises:
        BadModel: it is missing, a Git LFS pointer, cut short, damaged, or holds more than plain tensors.
    """
    from safetensors import safe_open

    if not file.is_file():
        raise BadModel(f"{file} is missing, and the index names it; download it, or save the model again")
    with boundary(lambda reason: BadModel(f"{file} cannot be read ({reason}); allowed: a file that you may read")):
        with open(file, "rb") as stream:
            begins = stream.read(len(LFS_POINTER))
        if begins == LFS_POINTER:
            raise BadModel(
                f"{file} is a Git LFS pointer and holds no weights; type `git lfs pull` in {file.parent}, or download the "
                "file itself"
            )
    if file.suffix != ".safetensors":
        checkpoints.unpickled(file)
        return
    with (
        boundary(
            lambda reason: BadModel(
                f"{file} is damaged or cut short ({reason}); allowed: a whole safetensors file. Download it again"
            )
        ),
        safe_open(file, framework="numpy"),
    ):
        pass


def sha256(files: Iterable[Path]) -> str:
    """SHA-256 of the files' bytes, since names and dates can be wrong. It takes about a second per gigabyte.

    The digest of files that have not changed is remembered.
    """
    stamps = tuple(stamp(file) for file in files)
    settled = all(time.time_ns() - max(changed, created) > SETTLED for _, _, _, changed, created in stamps)
    return _sha256(stamps) if settled else _sha256.__wrapped__(stamps)


Stamp = tuple[Path, int, int, int, int]


def stamp(file: Path) -> Stamp:
    """Path, size, inode and the times of the last changes of content and of inode: others if the file changes."""
    status = file.stat()
    return file, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=8)
def _sha256(stamps: tuple[Stamp, ...]) -> str:
    total = hashlib.sha256()
    for path, *_ in stamps:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
