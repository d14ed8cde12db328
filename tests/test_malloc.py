"""The allocator is tuned while a command runs, as before afterwards, and never by the library."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlfusion"
SAYS = """
import ctypes, subprocess, sys
from mlfusion.cli.malloc import freed_memory_kept
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
class Info(ctypes.Structure):
    _fields_ = [(f"field_{n}" if n != 3 else "hblks", ctypes.c_size_t) for n in range(10)]
library.mallinfo2.restype = Info
def mapped():
    before = library.mallinfo2().hblks
    block = library.malloc(ctypes.c_size_t(1 << 26))
    found = library.mallinfo2().hblks - before
    library.free(block)
    return found
if "inside" in sys.argv:
    print(mapped(), end=" ")
else:
    child = lambda: print(subprocess.run([sys.executable, sys.argv[1], "inside"], stdout=-1).stdout.decode(), end="")
    print(mapped(), end=" ")
    with freed_memory_kept():
        print(mapped(), end=" ")
        child()
    print(mapped(), end=" ")
    child()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such options")
@pytest.mark.parametrize(("tuned", "said"), [({}, "1 0 0 1 1"), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "1 1 1 1 1")])
def test_large_blocks_come_from_the_heap_within_it_alone(tuned: dict[str, str], said: str, tmp_path: Path) -> None:
    """By glibc's own count of memory maps, before, in it, in a process that is started in it, after it, and in one that is
    started then; where the user has tuned the allocator, it is left alone."""
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, str(script), str(script)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=plain | tuned).stdout
    assert found.strip() == said


def test_only_the_command_line_touches_the_allocator() -> None:
    users = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if "mallopt" in path.read_text()}
    assert users == {"cli/malloc.py"}
    assert not [path for path in PACKAGE.rglob("*.py") if "cli" not in path.parts and "cli.malloc" in path.read_text()]
