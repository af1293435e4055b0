"""Files and folders that are replaced as a whole: written to a temporary name, flushed, put in place in one step.

A file is written under a temporary name beside its target and renamed over it. A new folder is written beside its
target, including whatever it keeps of the old folder, and the two are swapped by one system call (renameat2 with
RENAME_EXCHANGE on Linux, renamex_np on macOS). So whoever opens the path finds the old version or the new one, never
files of both, and a process that is killed at any moment leaves one of them whole. Its temporary file or folder stays
as ``.<name>.<random>.part`` (a file has its own suffix after that) until the next save of the same target removes it.

If a system cannot swap, the old folder is renamed to ``.<name>.old`` and the new one takes its name. A process killed
between these two renames leaves the old folder whole under that other name; our next save or load gives it its name
back.

A reader that opens the files of a folder one by one, by their paths, can begin in the old folder and go on in the new
one. `read_folder` compares the folder's identity before and after, and reads again if it has changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fastpeft.ops import _checks

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_T = TypeVar("_T")

_AT_FDCWD, _EXCHANGE, _SWAP = -100, 2, 2
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
# Attempts to read a folder that is swapped while being read; more in a row is no coincidence.
_TRIES = 20
# A temporary name younger than this may not have its lock yet.
_YOUNG = 60.0


def write_file(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file under a temporary name, and move it to ``path``.

    A symbolic link stays one; its target file is replaced. The new file gets the permissions of the old one.
    Raises     OSError: as the file system says; the old file is then unchanged.
    """
    target = Path(os.path.realpath(path))
    _sweep(target)
    # ``write`` chooses the file format by the suffix.
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=f".part{target.suffix}")
    aside = Path(name)
    try:
        with _locked(handle):
            write(aside)
            os.chmod(aside, _permissions(target, 0o666))
            _flush(aside)
            os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _flush(target.parent)


def write_folder(
    op: str, path: str | os.PathLike[str], write: Callable[[Path], None], owned: Callable[[str], bool]
) -> None:
    """Let ``write`` fill a folder under a temporary name, and move it to ``path``.

    owned      whether a file of the old folder, by its name, is to be replaced; every other file is kept (as a hard
               link to the same file, if the system has hard links)
    Raises     ValueError: ``path`` is not a folder, or is this process's working directory.  OSError: as the file
               system says.  The old folder is then unchanged.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _give_back(target)
    _checks.require(not target.exists() or target.is_dir(), op, "path", "be a folder", f"the file {str(path)!r}")
    inside = target.is_dir() and any(os.path.samefile(target, each) for each in (Path.cwd(), *Path.cwd().parents))
    _checks.require(
        not inside, op, "path", "be no folder that the process works in, as it is replaced whole", str(path)
    )
    _sweep(target)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        with _locked(_opened(aside)):
            if target.is_dir():
                _keep(target, aside, owned)
            before = {entry.name for entry in aside.iterdir()}
            write(aside)
            for entry in aside.iterdir():
                if entry.name not in before:
                    os.chmod(entry, _permissions(entry, 0o666, fresh=True))
                    _flush(entry)
            os.chmod(aside, _permissions(target, 0o777))
            _flush(aside)
            _put(aside, target)
    finally:
        # After an error this is the new folder; after a swap, the old one under the temporary name.
        shutil.rmtree(aside, ignore_errors=True)
    _flush(target.parent)


def read_folder(op: str, path: str | os.PathLike[str], read: Callable[[Path], _T]) -> _T:
    """What ``read`` returns for the folder at ``path``, all of it from one version of the folder.

    Raises     FileNotFoundError: no folder.  Whatever ``read`` raises.
    """
    target = Path(path)
    _give_back(target)
    if not target.is_dir():
        raise FileNotFoundError(f"{op}: path must be a folder, got {str(path)!r}")
    for _ in range(_TRIES):
        before = _identity(target)
        try:
            found = read(target)
        except Exception:
            if _identity(target) == before:
                raise
            continue
        if _identity(target) == before:
            return found
    raise OSError(f"{op}: path must be a folder at rest, got {str(path)!r}, which is replaced again and again")


def _identity(folder: Path) -> tuple[int, ...] | None:
    try:
        stat = os.stat(folder)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def _keep(old: Path, new: Path, owned: Callable[[str], bool]) -> None:
    """Put the files that are not replaced into the new folder: as hard links, which cost nothing, or copies."""

    def linked(source: str, to: str) -> None:
        try:
            os.link(source, to)
        except OSError:
            shutil.copy2(source, to)

    for entry in old.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=linked)
        elif entry.is_symlink() and not owned(entry.name):
            os.symlink(os.readlink(entry), new / entry.name)
        elif not owned(entry.name):
            linked(str(entry), str(new / entry.name))


def _put(new: Path, target: Path) -> None:
    """Move ``new`` to ``target``; the old folder is then at ``new``, or gone."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchanged(new, target):
        old = _old(target)
        shutil.rmtree(old, ignore_errors=True)  # left by a process killed after the new folder got its name
        os.rename(target, old)
        os.rename(new, target)
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two names in one step; False if the system, or this file system, cannot."""
    try:
        library: Any = ctypes.CDLL(None, use_errno=True)
        first, second = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            failed = library.renamex_np(first, second, ctypes.c_uint(_SWAP))
        else:
            failed = library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, ctypes.c_uint(_EXCHANGE))
    except (OSError, AttributeError, TypeError):  # the function or the library does not exist
        return False
    if failed:
        code = ctypes.get_errno()
        if code not in _CANNOT:
            raise OSError(code, os.strerror(code), str(other))
    return not failed


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _give_back(target: Path) -> None:
    """Rename a folder back that an interrupted save without a swap has left under ``.<name>.old``."""
    if not target.exists() and _old(target).is_dir():
        os.rename(_old(target), target)


def _permissions(target: Path, usual: int, fresh: bool = False) -> int:
    """Permissions of the replaced file or folder, or the usual ones: a temporary name is readable by its owner only."""
    if target.exists() and not fresh:
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return usual & ~mask


def _opened(path: Path) -> int | None:
    """A handle of the path; None on systems that cannot open a folder."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None


def _flush(path: Path) -> None:
    """Flush contents and names to the disk."""
    handle = os.open(path, os.O_RDWR) if path.is_file() else _opened(path)
    if handle is not None:
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _locked(handle: int | None) -> Iterator[None]:
    """Hold a lock that shows `_sweep` a living writer; the system releases it when the process ends."""
    try:
        if fcntl is not None and handle is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _sweep(target: Path) -> None:
    """Remove what killed writers of ``target`` left: temporary names that are a minute old and not locked."""
    if fcntl is None or not target.parent.is_dir():
        return
    # tempfile draws eight letters, digits or underscores.
    ours = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.part({re.escape(target.suffix)})?")
    for entry in target.parent.iterdir():
        handle = _opened(entry) if ours.fullmatch(entry.name) else None
        if handle is None:
            continue
        try:
            if time.time() - os.fstat(handle).st_mtime < _YOUNG:
                continue
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except OSError:  # a living writer's, or already gone
            continue
        finally:
            os.close(handle)
