"""Files and folders that are replaced whole: written aside, flushed, and put in place in one step of the file system.

A file is written under a temporary name beside its target and renamed over it. A folder is written as a whole beside
its target, what it keeps of the old one included, and the two are swapped by one system call (renameat2 with
RENAME_EXCHANGE on Linux, renamex_np on macOS). So whatever opens the path finds the old version or the new one, never
files of both, and a process that is killed at any moment leaves one of them whole. What it had written aside stays as
``.<name>.<random>.part``, a file with its own suffix after that; the next save of the same target removes it.

Where a system cannot swap, the old folder is renamed to ``.<name>.old`` and the new one takes its name. A process that
is killed between these two renames leaves the old folder whole under that other name; the next save or load of ours
gives it its name back.

A reader that opens the files of a folder one after the other, by their paths, can begin in the old folder and go on in
the new one. `read_folder` reads the folder's identity before and after, and reads again where it has changed.
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
# Of a folder that is swapped away while it is read; more in a row than that is no coincidence.
_TRIES = 20
# A temporary name that is younger may not have its lock yet.
_YOUNG = 60.0


def write_file(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file under a temporary name, and put it in the place of ``path``.

    A symbolic link stays one; the file that it names is replaced. Permissions are those of the file that is replaced.
    Raises     OSError: as the file system says; the old file is as it was then.
    """
    target = Path(os.path.realpath(path))
    _sweep(target)
    # The suffix says in which form a file is written.
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
    """Let ``write`` fill a folder under a temporary name, and put it in the place of ``path``.

    owned      whether a file of the old folder, by its name, is what this replaces; every other one is kept (as a hard
               link to the same file, where the system has such)
    Raises     ValueError: ``path`` is no folder, or one that this process works in.  OSError: as the file system says.
               The old folder is as it was then.
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
        # The new folder after an error; the old one, under that name, after a swap.
        shutil.rmtree(aside, ignore_errors=True)
    _flush(target.parent)


def read_folder(op: str, path: str | os.PathLike[str], read: Callable[[Path], _T]) -> _T:
    """What ``read`` makes of the folder at ``path``, all of it of one version of it.

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
    """What is not replaced, into the new folder: hard links, which cost nothing, or copies."""

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
    """``new`` in the place of ``target``; what was there is at ``new`` then, or gone."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchanged(new, target):
        old = _old(target)
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed when the new one had its name already
        os.rename(target, old)
        os.rename(new, target)
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system, or this file system, cannot."""
    try:
        library: Any = ctypes.CDLL(None, use_errno=True)
        first, second = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            failed = library.renamex_np(first, second, ctypes.c_uint(_SWAP))
        else:
            failed = library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, ctypes.c_uint(_EXCHANGE))
    except (OSError, AttributeError, TypeError):  # no such function, or no such library
        return False
    if failed:
        code = ctypes.get_errno()
        if code not in _CANNOT:
            raise OSError(code, os.strerror(code), str(other))
    return not failed


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _give_back(target: Path) -> None:
    """Its name to a folder that an interrupted save without a swap has left under the other one."""
    if not target.exists() and _old(target).is_dir():
        os.rename(_old(target), target)


def _permissions(target: Path, usual: int, fresh: bool = False) -> int:
    """Those of what is replaced, or of anything new: a temporary name is for its owner alone."""
    if target.exists() and not fresh:
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return usual & ~mask


def _opened(path: Path) -> int | None:
    """Some systems cannot open a folder."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None


def _flush(path: Path) -> None:
    """Contents and names onto the disk."""
    handle = os.open(path, os.O_RDWR) if path.is_file() else _opened(path)
    if handle is not None:
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _locked(handle: int | None) -> Iterator[None]:
    """Hold a lock that tells `_sweep` of a living writer; the system drops it with the process."""
    try:
        if fcntl is not None and handle is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _sweep(target: Path) -> None:
    """Remove what killed writers of ``target`` have left: temporary names, a minute old, that nobody has locked."""
    if fcntl is None or not target.parent.is_dir():
        return
    # Eight letters, digits or underscores: what tempfile draws.
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
