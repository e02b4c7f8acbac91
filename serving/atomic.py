"""Writes files and folders that are either complete or absent, whenever the process ends.

They are written under another name in the same folder, `.NAME.PID.half`, and renamed when they are
complete: a rename within a folder is atomic. Two processes that write the same file do not disturb
each other; the last one's content stays. A killed process may leave such a name behind: it can be
removed, and `.gitignore` names it.

A rename would also put a file in the place of a device, a pipe or a link: only a regular file is
replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path


def write(path: Path, content: str | bytes, mode: int = 0o666, on_disk: bool = False) -> Path:
    """Write or replace a file, and make its folder where there is none; return `path`.

    `mode` is the new file's, less the process's umask, from the first byte on. With `on_disk` it is
    whole after a power cut, too: a rename may be on the disk before what was written.
    """
    with file(path) as half:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(half, flags, mode), "wb") as sink:
            sink.write(content.encode() if isinstance(content, str) else content)
        if on_disk:
            sync(half)
    if on_disk:
        sync(path.parent)
    return path


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk.

    Raises OSError for a file alone: not every file system does so for a folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Yield a path to write to: it becomes `path` at the end of the block, or is removed.

    Raises OSError, also where `path` is there and is not a regular file.
    """
    _require_replaceable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # "File exists" would not say what is wrong with it
        code = errno.ENOTDIR
        raise NotADirectoryError(code, os.strerror(code), str(path.parent)) from error
    half = half_name(path)
    half.unlink(missing_ok=True)
    try:
        yield half
        half.rename(path)
    except OSError as error:  # of a write it names no file
        error.filename = error.filename or str(path)
        raise
    finally:
        half.unlink(missing_ok=True)


def _require_replaceable(path: Path) -> None:
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        reason = "only a regular file is replaced, and this is none: name another file"
        raise FileExistsError(errno.EEXIST, reason, str(path))


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill: it becomes `path` at the end of the block, or is removed.

    Raises OSError where `path` is a folder that is not empty.
    """
    half = half_name(path)
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        yield half
        half.rename(path)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def half_name(path: Path) -> Path:
    """Return the name under which this process writes `path` until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.half")
