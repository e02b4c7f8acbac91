"""Packs a complete run: a handful of files in the place of a folder for each trial.

While a run lasts, each trial is written by itself, so that nothing is lost however it ends. Once it
has COMPLETE, its files are packed (`storage.packed` names them). The last to appear, whole and on
the disk, is `trials.jsonl.xz`: with it the run is packed, and only then do the trials' folders go.
So a run that was killed in between is read as well as before or after, and packing it again ends
what was begun. The same run gives the same bytes.

Each file is read back before it counts, and the requests of a trial have to come out of their
columns as they went in, to a microsecond: else the run stays as it was. Of two commands that pack
one run at once, the second waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import lzma
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from labs.harness.analysis.computed import Summary
from labs.harness.spec.names import TrialName
from labs.harness.storage import bounded, packed, quality_columns
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.packed import (
    PREDICTIONS,
    PROBES,
    QUALITY,
    REQUESTS,
    SERIES,
    SUMMARY,
    TELEMETRY,
    TRIALS,
)
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from serving import atomic

# for text: no alignment of bytes (pb), and a dictionary that a reader has memory for
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6 | lzma.PRESET_EXTREME, "pb": 0, "lc": 2}]
Line = dict[str, Any]


def pack(folder: RunFolder) -> bool:
    """Pack a run that is complete; tell whether anything was left to do. Raises DamagedError."""
    if not folder.complete:
        return False
    home = folder.path
    with _alone(home):
        begun = folder.is_packed
        if not begun:
            _write_all(folder)
        files = [home / name for name in ("predictions.json", "summary.json")]
        left = [path for path in (home / "trials", home / "probes", *files) if path.exists()]
        for path in left:
            path.unlink() if path in files else shutil.rmtree(path)
    return bool(left) or not begun


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Wait until no other process packs this run or writes its summary, and keep others from it."""
    handle = os.open(home, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_summary(folder: RunFolder, summary: Summary) -> None:
    """Write what was computed from the trials of a run, in the form that the run has.

    A complete run may be packed meanwhile: then what packing read would stay.
    """
    with _alone(folder.path) if folder.complete else contextlib.nullcontext():
        if folder.is_packed:
            _write(folder.path / SUMMARY, [summary.model_dump(mode="json")])
        else:
            write_json(folder.path / "summary.json", summary)


def _write_all(folder: RunFolder) -> None:
    """Write every packed file, that of the trials last."""
    run, home = folder.run(), folder.path
    lab = run.rebuilt_lab()
    results = folder.trial_results(run.points(), lab)
    trials = [TrialName(result.point, result.repeat) for result in results]
    _write(home / PREDICTIONS, [folder.predictions().model_dump(mode="json")])
    _write(home / SUMMARY, [folder.summary().model_dump(mode="json")])
    probes = folder.probe_results()
    scored = [name for name in probes if name.startswith("quality-")]
    scored.sort(key=lambda name: _place(name, [variant.name for variant in lab.variants]))
    if scored and (columns := quality_columns.take(probes, scored)):
        _write(home / QUALITY, [columns])
    _write(home / PROBES, ({"probe": name, "result": of} for name, of in probes.items()))
    _write(home / REQUESTS, (line for trial in trials for line in _requests(folder, trial)))
    _write(
        home / SERIES,
        (
            {"trial": str(trial), **kept.model_dump()}
            for trial in trials
            for kept in folder.series(trial.point, trial.repeat)
        ),
    )
    _write(
        home / TELEMETRY,
        (
            {"trial": str(trial), **packed.sample_columns(samples)}
            for trial in trials
            if (samples := folder.telemetry(trial.point, trial.repeat))
        ),
    )
    _write(home / TRIALS, (result.model_dump(mode="json") for result in results))


def _place(probe: str, variants: list[str]) -> int:
    """Find the variant of a probe, by the longest of the names in which the probe's ends."""
    matching = [name for name in variants if probe.endswith(f"-{name}")]
    return variants.index(max(matching, key=len)) if matching else len(variants)


def _requests(folder: RunFolder, trial: TrialName) -> Iterator[Line]:
    for block in packed.blocks(folder.records(trial.point, trial.repeat)):
        columns = packed.to_columns(block)
        again = packed.of_columns(columns)
        if not _alike([record.fields for record in block], [record.fields for record in again]):
            raise DamagedError(f"{folder.path}: {trial} cannot be put into columns")
        yield {"trial": str(trial), **columns}


def _alike(value: Any, again: Any) -> bool:
    """Compare plain data; times may differ by less than a microsecond."""
    if isinstance(value, dict):
        return value.keys() == again.keys() and all(_alike(of, again[n]) for n, of in value.items())
    if isinstance(value, list | tuple):
        return len(value) == len(again) and all(map(_alike, value, again))
    if isinstance(value, float) and isinstance(again, float):
        return abs(value - again) < 1e-6
    return bool(value == again)


def _write(path: Path, lines: Iterable[Line]) -> None:
    """Write lines of JSON, packed, and wait until they are on the disk; no file without lines."""
    remaining = iter(lines)
    first = next(remaining, None)
    if first is None:
        path.unlink(missing_ok=True)  # of a packing that was killed
        return
    written = hashlib.sha256()
    with atomic.file(path) as half:
        with half.open("wb") as raw, lzma.LZMAFile(raw, "wb", filters=FILTERS) as file:
            for line in itertools.chain([first], remaining):
                text = orjson.dumps(line, option=orjson.OPT_NON_STR_KEYS) + b"\n"
                written.update(text)
                file.write(text)
        atomic.sync(half)
        read_back = hashlib.sha256()
        for text in bounded.lines(half):
            read_back.update(text + b"\n")
        if read_back.digest() != written.digest():
            raise DamagedError(f"{path} reads back otherwise than it was written")
    atomic.sync(path.parent)
