"""One way to open what lies below a root, so that no link, pipe or device in a folder from a stranger leads anywhere.

Each access walks from the opened root, one component at a time, and follows no link: a link, or anything else that is neither
a folder nor a regular file, is damage. The root itself may be a link, since the user chose it. A path is a text relative to
the root, such as 'v3/KEY/entry.json'. Who can exchange files between the walk and the access is outside the trust model.

A system without file names relative to an opened folder, such as Windows, gets whole paths instead: there each component is
looked at before it is used, which does not guard against whoever exchanges it in between, and a message says so.
"""

import errno
import io
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Self

from mlfusion.system import disk
from mlfusion.system.disk import Folder, place

logger = logging.getLogger(__name__)

# No link is followed, and a pipe is opened without waiting for its other end.
FILE = os.O_NOFOLLOW | os.O_NONBLOCK if disk.GUARDED else getattr(os, "O_BINARY", 0)
FOLDER = disk.FOLDER | FILE
SORTS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
}


class Tree:
    """Files and folders below one root.

    `damaged` makes the error about a path that is a link or of a wrong sort. Operating system errors are raised as OSError with
    the whole path.
    """

    def __init__(self, root: Path | str, damaged: Callable[[Path, str], Exception], held: Folder | None = None) -> None:
        """`held` is the opened root, which `close` closes; without it the root is opened for each access."""
        if not disk.GUARDED:
            _say_unguarded()
        self.root, self.damaged, self._held = str(root), damaged, held  # a text, since joining paths takes longer

    def hold(self, path: str) -> "Tree":
        """The tree below a folder, which stays open until `close` or the end of a `with`, even if it is moved meanwhile."""
        return Tree(f"{self.root}/{path}", self.damaged, self.open_folder(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the held root."""
        if self._held is not None:
            disk.close(self._held)
            self._held = None

    def path(self, path: str) -> Path:
        """The whole path, for messages."""
        return Path(f"{self.root}/{path}")

    def open_folder(self, path: str = "") -> Folder:
        """A folder, opened; `disk.close` closes it."""
        folder = self._root(reopen=not path)
        walked = ""
        try:
            for part in path.split("/") if path else ():
                if part in ("", ".", ".."):
                    raise ValueError(f"{path!r} is no path below a root")
                walked += f"/{part}"
                inner = _enter(part, folder)
                self._done(folder)
                folder = inner
        except OSError as err:
            fault = self._fault(err, walked, folder, stat.S_IFDIR)
            self._done(folder)
            raise fault from None
        return folder

    def _root(self, *, reopen: bool) -> Folder:
        """The root, opened; a held one by another descriptor if `reopen`."""
        if self._held is not None:
            return os.open(".", FOLDER, dir_fd=self._held) if reopen and isinstance(self._held, int) else self._held
        if disk.GUARDED:
            return os.open(self.root, disk.FOLDER)
        if not stat.S_ISDIR(os.stat(self.root).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.root)
        return self.root

    def _done(self, folder: Folder) -> None:
        """Close an opened folder, but not a held root."""
        if folder != self._held:
            disk.close(folder)

    def _fault(self, err: OSError, path: str, folder: Folder, wanted: int) -> Exception:
        """The error to raise if what a path names cannot be opened: damage if it is of another sort."""
        err.filename = f"{self.root}/{path.removeprefix('/')}"
        if err.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            with suppress(OSError):
                self._check(path.removeprefix("/"), _state(path.rpartition("/")[2], folder), wanted)
        return err

    def _check(self, path: str, state: os.stat_result, wanted: int) -> None:
        """Raise the error about what is of another sort, such as a link where a folder belongs."""
        if (sort := stat.S_IFMT(state.st_mode)) != wanted:
            raise self.damaged(self.path(path), f"it is {SORTS.get(sort, 'of an unknown sort')}, not {SORTS[wanted]}")

    @contextmanager
    def at(self, path: str) -> Iterator[tuple[Folder, str]]:
        """The folder that holds a path, opened, and its name there."""
        parent, _, name = path.rpartition("/")
        folder = self._held if self._held is not None and not parent else self.open_folder(parent)
        try:
            yield folder, name
        except OSError as err:
            if not isinstance(err.filename, str) or "/" not in err.filename:
                err.filename = f"{self.root}/{path}"
            raise
        finally:
            self._done(folder)

    def open(self, path: str) -> int:
        """A descriptor of a regular file, for reading."""
        with self.at(path) as (folder, name):
            return self._open(path, folder, name)[0]

    def _open(self, path: str, folder: Folder, name: str) -> tuple[int, os.stat_result]:
        where, at = place(name, folder)
        if not disk.GUARDED:
            self._check(path, os.lstat(where), stat.S_IFREG)
        try:
            file = os.open(where, os.O_RDONLY | FILE, dir_fd=at)
        except OSError as err:
            raise self._fault(err, path, folder, stat.S_IFREG) from None
        state = os.fstat(file)
        try:
            self._check(path, state, stat.S_IFREG)
        except Exception:
            os.close(file)
            raise
        return file, state

    def read(self, path: str, most: int) -> bytes:
        """The bytes of a regular file; a larger one than `most` bytes is damage."""
        return self.read_at(path, most)[0]

    def read_at(self, path: str, most: int) -> tuple[bytes, os.stat_result]:
        """The bytes and the state of a regular file, as for `read`."""
        with self.at(path) as (folder, name):
            file, state = self._open(path, folder, name)
            try:
                size = state.st_size
                data = os.read(file, min(size, most) + 1)
                while 0 < len(data) < size <= most and (part := os.read(file, size - len(data))):
                    data += part
            finally:
                os.close(file)
        if max(size, len(data)) > most:
            raise self.damaged(self.path(path), f"it has {size:,} bytes; the most is {most:,}")
        return data, state

    def names(self, path: str = "") -> list[str]:
        """Sorted names in a folder that are not drafts; none if it does not exist. A held root is listed by one thread."""
        try:
            folder = self._held if self._held is not None and not path else self.open_folder(path)
        except FileNotFoundError:
            return []
        try:
            return sorted(name for name in os.listdir(folder) if not name.startswith(disk.DRAFT))
        finally:
            self._done(folder)

    def stat(self, path: str) -> os.stat_result | None:
        """The state of a path, a link's own if it is one; None if it does not exist."""
        try:
            with self.at(path) as (folder, name):
                return _state(name, folder)
        except FileNotFoundError:
            return None

    def require(self, path: str, sort: int) -> os.stat_result | None:
        """The state of a path that has to be of one sort, such as stat.S_IFDIR; None if it does not exist."""
        state = self.stat(path)
        if state is not None:
            self._check(path, state, sort)
        return state

    def size(self, path: str) -> int:
        """Bytes of all files below a folder, links not followed; 0 if it does not exist."""
        try:
            folder = self.open_folder(path)
        except FileNotFoundError:
            return 0
        try:
            return _size(folder)
        finally:
            self._done(folder)

    def clock(self, path: str = "") -> float:
        """The current time of the file system of a folder."""
        folder = self.open_folder(path)
        try:
            return disk.clock(folder)
        finally:
            self._done(folder)

    # --- changes: what is made takes the root's mode, whatever the process's umask ------------------------------------

    @property
    def _mode(self) -> int:
        return os.stat(self.root if self._held is None else self._held).st_mode

    def make(self, path: str) -> None:
        """Create a folder, not its parents; FileExistsError if the name is taken."""
        with self.at(path) as (folder, name):
            where, at = place(name, folder)
            os.mkdir(where, dir_fd=at)
            inner = _enter(name, folder)
            try:
                with suppress(PermissionError):  # a file system without modes
                    os.chmod(inner, stat.S_IMODE(self._mode) | 0o700)
            finally:
                disk.close(inner)

    def create(self, path: str) -> io.FileIO:
        """Create a file, open for writing; FileExistsError if the name is taken."""
        with self.at(path) as (folder, name):
            where, at = place(name, folder)
            file = io.FileIO(os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FILE, 0o666, dir_fd=at), "w")
        if hasattr(os, "fchmod"):
            with self._removed_after_error(path), suppress(PermissionError):
                os.fchmod(file.fileno(), stat.S_IMODE(self._mode) & 0o666 | 0o600)
        return file

    def write(self, path: str, data: bytes, *, flush: bool = True) -> None:
        """Create a file, and flush it unless it need not survive a power loss; no file is left after an error."""
        with self.create(path) as file, self._removed_after_error(path):
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            if flush:
                os.fsync(file.fileno())

    def draft(self, folder: str) -> str:
        """The path of a new draft in a folder."""
        return f"{folder}/{disk.DRAFT}{disk.claim()}".lstrip("/")

    @contextmanager
    def drafted(self, folder: str) -> Iterator[str]:
        """The path of a new draft in a folder; it is removed if writing it fails."""
        draft = self.draft(folder)
        with self._removed_after_error(draft):
            yield draft

    @contextmanager
    def _removed_after_error(self, path: str) -> Iterator[None]:
        """Remove a path that we created if the system refuses the rest."""
        try:
            yield
        except OSError:
            self.remove(path)
            raise

    def publish(self, path: str, data: bytes) -> bool:
        """Create a file in one step; False if the name is taken: an existing file stays."""
        draft = self.draft(path.rpartition("/")[0])
        self.write(draft, data)
        with self.at(path) as (folder, name):
            try:
                return disk.publish_file(draft.rpartition("/")[2], name, folder)
            except BaseException:
                disk.remove(draft.rpartition("/")[2], folder)
                raise

    def publish_folder(self, draft: str, path: str) -> bool:
        """Give a folder of finished files its final name; False if another writer was first. The draft may lie elsewhere."""
        with self.at(draft) as (old, name), self.at(path) as (new, final):
            return disk.publish_folder(name, final, old, new)

    def rename(self, path: str, new: str) -> None:
        """Give a file, a link or a folder another name below the root."""
        with self.at(path) as (old, name), self.at(new) as (folder, final):
            (source, source_fd), (goal, goal_fd) = place(name, old), place(final, folder)
            os.rename(source, goal, src_dir_fd=source_fd, dst_dir_fd=goal_fd)

    def move(self, path: str, new: str) -> None:
        """`rename`; where the system cannot rename, as a folder in the lower layer of an overlay, copy and remove."""
        try:
            self.rename(path, new)
        except OSError as err:
            if err.errno != errno.EXDEV:
                raise
            source, target = self.path(path), self.path(new)
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            else:
                shutil.copy2(source, target, follow_symlinks=False)
            self.remove(path)

    def remove(self, path: str) -> None:
        """Remove a file, a link or a folder with all in it; no error if it does not exist."""
        with suppress(FileNotFoundError), self.at(path) as (folder, name):
            disk.remove(name, folder)

    def touch(self, path: str, at_ns: int | None = None) -> None:
        """Set the time of a file or folder to now, or to a time in nanoseconds."""
        with self.at(path) as (folder, name):
            times: dict[str, Any] = {} if at_ns is None else {"ns": (at_ns, at_ns)}
            where, at = place(name, folder)
            os.utime(where, **times, dir_fd=at, **disk.LINK_ITSELF)

    def sweep(self, path: str = "") -> None:
        """Remove the drafts in a folder that dead processes left, and those of other hosts after a day."""
        with suppress(FileNotFoundError):
            folder = self.open_folder(path)
            try:
                disk.sweep_at(folder)
            finally:
                self._done(folder)


@cache
def _say_unguarded() -> None:
    """Say once that whoever can write beside us may lead us elsewhere."""
    logger.warning(
        "this system opens no file relative to an opened folder, so mlfusion does not guard against links that are put into a "
        "cache while it is used; keep caches where no other user can write"
    )


def _enter(name: str, folder: Folder) -> Folder:
    """Open a folder in an opened folder; NotADirectoryError if it is a link or anything else."""
    if isinstance(folder, int):
        return os.open(name, FOLDER, dir_fd=folder)
    if not stat.S_ISDIR(_state(name, folder).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
    return f"{folder}/{name}"


def _state(name: str, folder: Folder) -> os.stat_result:
    """The state of a name in an opened folder, a link's own if it is one."""
    where, at = place(name, folder)
    return os.lstat(where, dir_fd=at)


def _size(folder: Folder) -> int:
    total = 0
    with os.scandir(folder) as items:
        for item in items:
            with suppress(FileNotFoundError):
                if not item.is_dir(follow_symlinks=False):
                    total += item.stat(follow_symlinks=False).st_size
                    continue
                inner = _enter(item.name, folder)
                try:
                    total += _size(inner)
                finally:
                    disk.close(inner)
    return total
