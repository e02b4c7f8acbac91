"""Packs a complete run: a handful of files in the place of a folder for each trial.

While a run lasts, each trial is written by itself, so that nothing is lost however it ends. Once it
has COMPLETE, its files are packed (`filing.packed` names them). The last to appear, whole and on
the disk, is `trials.jsonl.xz`: with it the run is packed, and only then do the trials' folders go.
So a run that was killed in between is read as well as before or after, and packing it again ends
what was begun. The same run gives the same bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import lzma
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel

from labs.harness.filing import packed, quality_columns
from labs.harness.filing.packed import (
    PREDICTIONS,
    PROBES,
    QUALITY,
    REQUESTS,
    SERIES,
    SUMMARY,
    TELEMETRY,
    TRIALS,
)
from labs.harness.filing.results import RunFolder, Summary, TrialResult, write_json
from labs.harness.names import TrialName
from serving import whole

PRESET = 6
Line = dict[str, Any]


def pack(folder: RunFolder) -> bool:
    """Pack a run that is complete; tell whether anything was left to do. Raises DamagedError."""
    if not folder.complete:
        return False
    home = folder.path
    begun = (home / TRIALS).exists()
    if not begun:
        _write_all(folder)
    left = [home / name for name in ("trials", "probes", "predictions.json", "summary.json")]
    removed = [path for path in left if path.exists()]
    for path in removed:
        _remove(path)
    return bool(removed) or not begun


def write_summary(folder: RunFolder, summary: Summary) -> None:
    """Write what was computed from the trials of a run, in the form that the run has."""
    if folder.is_packed:
        _write_json(folder.path / SUMMARY, summary)
    else:
        write_json(folder.path / "summary.json", summary)


def _write_json(path: Path, model: BaseModel) -> None:
    _write(path, [model.model_dump(mode="json")])


def _write_all(folder: RunFolder) -> None:
    """Write every packed file, that of the trials last."""
    run, home = folder.run(), folder.path
    lab = run.rebuilt_lab()
    results = folder.trial_results(run.points(), lab)
    _write_json(home / PREDICTIONS, folder.predictions())
    _write_json(home / SUMMARY, folder.summary())
    probes = folder.probe_results()
    scored = [name for name in probes if name.startswith("quality-")]
    scored.sort(key=lambda name: _place(name, [variant.name for variant in lab.variants]))
    if scored and (columns := quality_columns.take(probes, scored)):
        _write(home / QUALITY, [columns])
    _write(home / PROBES, ({"probe": name, "result": of} for name, of in probes.items()))
    _write(home / REQUESTS, _requests(folder, results))
    _write(home / SERIES, _series(folder, results))
    _write(home / TELEMETRY, _telemetry(folder, results))
    _write(home / TRIALS, (result.model_dump(mode="json") for result in results))


def _place(probe: str, variants: list[str]) -> int:
    """Find the variant of a probe, by the longest of the names in which the probe's ends."""
    matching = [name for name in variants if probe.endswith(f"-{name}")]
    return variants.index(max(matching, key=len)) if matching else len(variants)


def _requests(folder: RunFolder, results: Iterable[TrialResult]) -> Iterator[Line]:
    for result in results:
        if folder.has_records(result.point, result.repeat):
            for block in packed.blocks(folder.records(result.point, result.repeat)):
                yield {"trial": _name(result), **packed.to_columns(block)}


def _series(folder: RunFolder, results: Iterable[TrialResult]) -> Iterator[Line]:
    for result in results:
        for kept in folder.series(result.point, result.repeat):
            yield {"trial": _name(result), **kept.model_dump()}


def _telemetry(folder: RunFolder, results: Iterable[TrialResult]) -> Iterator[Line]:
    for result in results:
        if samples := folder.telemetry(result.point, result.repeat):
            yield {"trial": _name(result), **packed.sample_columns(samples)}


def _name(result: TrialResult) -> str:
    return str(TrialName(result.point, result.repeat))


def _write(path: Path, lines: Iterable[Line]) -> None:
    """Write lines of JSON, packed, and wait until they are on the disk; no file without lines."""
    remaining = iter(lines)
    first = next(remaining, None)
    if first is None:
        path.unlink(missing_ok=True)  # of a packing that was killed
        return
    with whole.file(path) as half:
        with half.open("wb") as raw, lzma.LZMAFile(raw, "wb", preset=PRESET) as file:
            for line in itertools.chain([first], remaining):
                file.write(orjson.dumps(line, option=orjson.OPT_NON_STR_KEYS) + b"\n")
        _sync(half)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system does so for a folder
            os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
