"""A system that has only what every system has: MLFUSION_PLAIN=1 takes away what is POSIX's or Linux's, before all imports.

`test_platforms.py` runs a part of the tests so. What guards against links is not there either, so tests of it cannot pass.
"""

import io
import os
import shutil
import sys
from functools import wraps
from typing import Any

PLAIN = os.environ.get("MLFUSION_PLAIN") == "1"
ABSENT = (
    *("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "preadv", "RWF_NOWAIT", "posix_fadvise"),
    *("sched_getaffinity", "fwalk", "fchmod", "register_at_fork", "sysconf"),
)
RELATIVE = ("open", "stat", "lstat", "mkdir", "unlink", "rename", "link", "utime")  # to an opened folder
UNSEEN = ("/proc", "/sys/fs")


def hide() -> None:
    """Take it away from this process."""
    for name in ABSENT:
        if hasattr(os, name):
            delattr(os, name)
    os.supports_dir_fd = set()
    shutil._use_fd_functions = False  # it was decided when shutil was imported
    for name in RELATIVE:
        setattr(os, name, _plain(getattr(os, name)))
    os.supports_follow_symlinks = set()
    io.open = _plain(io.open)  # by which pathlib reads
    for name in ("resource", "pwd"):
        sys.modules[name] = None


def _plain(function: Any) -> Any:
    @wraps(function)
    def plain(path: Any, *args: Any, **words: Any) -> Any:
        if any(words.get(name) is not None for name in ("dir_fd", "src_dir_fd", "dst_dir_fd")):
            raise NotImplementedError(f"{function.__name__} relative to a folder, on a plain system")
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(UNSEEN):
            raise FileNotFoundError(2, "there is no such folder on a plain system", os.fspath(path))
        return function(path, *args, **words)

    return plain
