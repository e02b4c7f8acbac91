"""Writes the files of a run; each appears only when it is whole, and on the disk."""

from __future__ import annotations

import errno
import gzip
import json
import lzma
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel

from labs.harness.spec.lab import LabError
from serving import atomic

LEAST_FREE_BYTES = 300 * 2**20


def write_json(path: Path, model: BaseModel) -> None:
    """Write a model as JSON; the file appears only when it is whole."""
    atomic.write(path, json.dumps(model.model_dump(mode="json"), indent=1) + "\n", on_disk=True)


def write_trial(home: Path, result: BaseModel) -> None:
    """Write `trial.json`, with which a trial counts as played, after all else in its folder."""
    for path in home.glob("*.gz"):
        atomic.sync(path)
    write_json(home / "trial.json", result)


def write_packed_json(path: Path, model: BaseModel) -> None:
    """Write a model as JSON, packed by xz; the file appears only when it is whole."""
    atomic.write(path, lzma.compress(model.model_dump_json().encode() + b"\n"), on_disk=True)


def write_gzip(path: Path, plain: Any) -> None:
    """Write plain data as gzipped JSON; the file appears only when it is whole."""
    packed = gzip.compress(orjson.dumps(plain, option=orjson.OPT_NON_STR_KEYS), mtime=0)
    atomic.write(path, packed, on_disk=True)


def require_room(path: Path) -> None:
    """Make the folder; raises LabError where a run's files cannot be written or might not fit."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise LabError(
            f"RESULTS={path} cannot be written ({error.strerror}): name another folder"
        ) from error
    free_bytes = shutil.disk_usage(path).free
    if free_bytes < LEAST_FREE_BYTES:
        raise LabError(
            f"{free_bytes / 2**20:.0f} MiB are free under {path}, and a run needs"
            f" {LEAST_FREE_BYTES / 2**20:.0f} MiB: free some disk space, and run again"
        )


def run_id(digest: str) -> str:
    """Name a run that starts now: UTC time and digest."""
    return f"{moment()}-{digest}"


def moment() -> str:
    """Write the UTC time of now as names of files and folders hold it."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
