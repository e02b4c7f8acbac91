"""Files and folders that are there whole or not at all, whenever the process ends.

They are filled under another name beside their own, `.NAME.PID.half`, and renamed when they are
complete: a rename within a folder is atomic. Two processes that write the same one do not meet,
and the last one's stays. What a killed process has left under such a name can be removed, and
`.gitignore` names it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write(path: Path, content: str | bytes, mode: int = 0o666) -> Path:
    """Write a file, in the place of one that is there; make its folder where there is none.

    `mode` is that of a new file, less the process's umask, from the first byte on. Returns `path`.
    """
    with file(path) as half:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(half, flags, mode), "wb") as sink:
            sink.write(content.encode() if isinstance(content, str) else content)
    return path


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Where to write a file that is `path` at the end of the block, and is gone if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = _half(path)
    half.unlink(missing_ok=True)
    try:
        yield half
        half.rename(path)
    finally:
        half.unlink(missing_ok=True)


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is `path` at the end of the block, and is gone if that fails.

    Raises OSError where `path` is a folder that is not empty.
    """
    half = _half(path)
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        yield half
        half.rename(path)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _half(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.half")
