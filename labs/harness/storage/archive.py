"""Packs results into archives to take home: `labs all ARCHIVE=results.tar.gz`.

Everything that was recorded goes in, engines' logs included; pages and plots do not, since
`make report` writes them again. Where one archive would grow beyond what may be taken out of a
locked-down machine, further ones follow (`results-2.tar.gz`), each whole by itself: all are
unpacked in the same folder, in any order.

`python -m labs.harness.storage.archive FILE` packs what a call left that was killed before.
"""

from __future__ import annotations

import contextlib
import gzip
import sys
import tarfile
from pathlib import Path

from labs.harness.storage import results
from serving import atomic
from serving.hardware import machine

MOST_BYTES = 15 * 10**6  # of an archive
HEADER_BYTES = 2048  # of a file in a tar, and what ends one
LEFT_OUT = (".html", ".svg", ".half")


def write_here(file: Path) -> list[Path]:
    """Pack this machine's results, as `write` does; nothing where there are none."""
    home = results.RESULTS / machine.detect().slug
    return write(home, file) if home.exists() else []


def write(home: Path, file: Path, most_bytes: int = MOST_BYTES) -> list[Path]:
    """Pack the folder `home`, under its parent's name, into `file` and what must follow it.

    Each archive is replaced as a whole, and those of an earlier, longer packing are removed. Return
    their paths. No archive is larger than `most_bytes`, unless a single file is.
    """
    waiting = [
        path
        for path in sorted(home.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.suffix not in LEFT_OUT
    ]
    written: list[Path] = []
    while waiting or not written:
        target = _numbered(file, len(written) + 1)
        with atomic.file(target) as half:
            waiting = _pack(waiting, home.parent.parent, half, most_bytes)
        written.append(target)
    number = len(written) + 1
    while (left := _numbered(file, number)).is_file():
        left.unlink()
        number += 1
    return written


def _numbered(file: Path, number: int) -> Path:
    stem, dot, suffixes = file.name.partition(".")
    return file if number == 1 else file.with_name(f"{stem}-{number}{dot}{suffixes}")


def _pack(paths: list[Path], above: Path, file: Path, most_bytes: int) -> list[Path]:
    """Pack as many of these files as fit, at least one; return the others."""
    with (
        file.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb") as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for number, path in enumerate(paths):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                packed.flush()
                # what is compressed already, as most of it is, does not shrink
                if number and raw.tell() + path.stat().st_size + HEADER_BYTES > most_bytes:
                    return paths[number:]
                archive.add(path, str(path.relative_to(above)))
    return []


if __name__ == "__main__":
    write_here(Path(sys.argv[1]))
