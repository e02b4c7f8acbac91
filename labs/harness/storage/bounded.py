"""Reads files of results, which anybody may have written: regular ones, of a bounded size.

A link would lead out of the folder, a pipe or a device would never end, and a few kilobytes of gzip
or xz can hold gigabytes: all are told in a sentence before anything is read into memory. So is JSON
that is all commas and brackets, since an object in memory is many times as large as the text `[],`.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from labs.harness.spec.lab import LabError
from loadtests.records import values_at_most

M = TypeVar("M", bound=BaseModel)
MOST_JSON_BYTES = 16 * 2**20
MOST_UNPACKED_BYTES = 256 * 2**20  # of one gzipped file
MOST_LINES_BYTES = 2**30  # of a packed file that is read line by line: a run's requests
MOST_PARSED_BYTES = 32 * 2**20  # of one that is parsed as a whole; the largest on file has 2
MOST_VALUES = 4_000_000  # of JSON, by its commas and brackets; the largest on file has 120,000
MOST_FILES = 20_000  # of a run
CHUNK_BYTES = 2**20
MOST_XZ_MEMORY_BYTES = 2**27  # ten times what a file takes that is packed here


class DamagedError(LabError, ValueError):
    """A file of a run cannot be read; the message says which, and what is wrong with it."""


def text(path: Path) -> str:
    """Read a text file that holds JSON. Raises DamagedError."""
    _require_regular(path, MOST_JSON_BYTES)
    content = path.read_bytes()
    _require_few_values(path, content)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path}: not text") from error


def unpacked(path: Path) -> bytes:
    """Read a file that is packed by gzip or xz. Raises DamagedError."""
    return b"".join(_unpacked(path, MOST_UNPACKED_BYTES))


def unpacked_json(path: Path) -> bytes:
    """Read a packed file of JSON that can be parsed in bounded memory. Raises DamagedError."""
    content = b"".join(_unpacked(path, min(MOST_PARSED_BYTES, MOST_UNPACKED_BYTES)))
    _require_few_values(path, content)
    return content


def parsed(path: Path) -> Any:
    """Read and parse a packed file of JSON. Raises DamagedError."""
    try:
        return orjson.loads(unpacked_json(path))
    except orjson.JSONDecodeError as error:
        raise DamagedError(f"{path}: {error}") from error


def read_json(path: Path, kind: type[M]) -> M:
    """Read a model from JSON; raises DamagedError, which names the file and the field."""
    return validated(path, unpacked_json(path) if path.suffix == ".xz" else text(path), kind)


def validated(path: Path, content: str | bytes, kind: type[M]) -> M:
    """Read a model from JSON that a file held; raises DamagedError as `read_json` does."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise DamagedError(f"{path}{first_error(error)}") from error


def first_error(error: ValidationError) -> str:
    """Say where a model's content is first wrong, and how, behind the name of what holds it."""
    first = error.errors()[0]
    place = f", {'.'.join(map(str, first['loc']))}" if first["loc"] else ""
    return f"{place}: {first['msg']}"


def lines(path: Path) -> Iterator[bytes]:
    """Read the lines of a packed file one after the other. Raises DamagedError."""
    rest = b""
    for chunk in _unpacked(path, MOST_LINES_BYTES):
        *whole_lines, rest = (rest + chunk).split(b"\n")
        for line in whole_lines:
            _require_few_values(path, line)
            yield line
        if len(rest) > MOST_PARSED_BYTES:
            raise DamagedError(f"{path} has a line of more than {MOST_PARSED_BYTES} bytes")
    if rest:
        raise DamagedError(f"{path}: damaged (its last line is cut off)")


def unpacked_bytes(path: Path, most_bytes: int | None = None) -> int:
    """Count the bytes that a packed file holds, without keeping them. Raises DamagedError."""
    most = MOST_UNPACKED_BYTES if most_bytes is None else min(most_bytes, MOST_UNPACKED_BYTES)
    return sum(map(len, _unpacked(path, most)))


def _require_few_values(path: Path, content: bytes) -> None:
    if values_at_most(content) > MOST_VALUES:
        raise DamagedError(f"{path} holds more than {MOST_VALUES} values")


def state(path: Path) -> object:
    """Return what changes whenever a file is written anew; None where there is no file."""
    try:
        file_status = path.lstat()
    except OSError:
        return None
    return file_status.st_ino, file_status.st_size, file_status.st_mtime_ns


def require_own_files(folder: Path) -> None:
    """Check that all that lies below a folder are regular files. Raises DamagedError."""
    places = (folder, *folder.parents[:2])  # the run, its lab, its machine
    if linked := next((place for place in places if place.is_symlink()), None):
        raise DamagedError(f"{linked} is a link: a run lies in a folder of its own")
    for count, entry in enumerate(_entries(folder)):
        if count == MOST_FILES:
            raise DamagedError(f"{folder} has more than {MOST_FILES} files, which no run has")
        if entry.name == ".git":
            raise DamagedError(f"{entry.path} is a repository of its own, which no run has")
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            raise DamagedError(
                f"{entry.path} is not a regular file: a run has neither links nor pipes"
            )


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    folders = [str(folder)]
    while folders:
        with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:  # those that another process packs go meanwhile
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)


def _require_regular(path: Path, most_bytes: int) -> None:
    try:
        file_status = path.lstat()
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing") from error
    if not stat.S_ISREG(file_status.st_mode):
        raise DamagedError(f"{path} is not a regular file")
    if file_status.st_size > most_bytes:
        raise DamagedError(
            f"{path} has {file_status.st_size / 2**20:.0f} MiB, and"
            f" {most_bytes / 2**20:.0f} are the most"
        )


def _unpacked(path: Path, most_bytes: int) -> Iterator[bytes]:
    _require_regular(path, most_bytes)
    size = 0
    try:
        for chunk in _gzip_chunks(path) if path.suffix == ".gz" else _xz_chunks(path):
            size += len(chunk)
            if size > most_bytes:
                raise DamagedError(f"{path} unpacks to more than {most_bytes / 2**20:.0f} MiB")
            yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise DamagedError(f"{path}: damaged ({error})") from error


def _gzip_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _xz_chunks(path: Path) -> Iterator[bytes]:
    """Unpack a file of xz in bounded memory, whatever dictionary it asks for."""
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_XZ_MEMORY_BYTES)
    with path.open("rb") as file:
        while not unpacker.eof:
            packed = file.read(CHUNK_BYTES) if unpacker.needs_input else b""
            if unpacker.needs_input and not packed:
                raise EOFError("it ends too early")
            yield unpacker.decompress(packed, CHUNK_BYTES)
        if unpacker.unused_data or file.read(1):
            raise lzma.LZMAError("something follows its end")
