"""Read a running server's metrics over an interval, and a healthy reading from a file.

Nothing is sent but requests for `/v1/models` and `/metrics`: what the server counts is its own
traffic. Histograms and counters of an engine grow from its start, so the difference of two readings
is what happened between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveFloat, field_validator

from labs.harness.analysis.diagnosis import Reading
from labs.harness.spec.lab import LabError
from labs.harness.storage.bounded import DamagedError, read_json
from labs.harness.storage.recorded import snapshot_from_json, snapshot_json
from labs.harness.storage.writing import write_json
from serving import metrics
from serving.engines.endpoint import Endpoint
from serving.metrics import Snapshot

POLL_S = 0.5
ANOTHER = (
    "the second reading is not of the same engine, because its counters fell or have other buckets:"
    " it was started again meanwhile, or several servers answer at this address; give the address"
    " of one engine, or those of all in ENDPOINT_METRICS=url,url"
)


class ReadingFile(BaseModel, frozen=True, extra="forbid"):
    """A reading on file, as `OUT=` writes it and `BASELINE=` reads it; no address is in it."""

    model: str
    seconds: PositiveFloat
    counted: dict[str, Any]

    @field_validator("counted")
    @classmethod
    def _is_a_snapshot(cls, plain: dict[str, Any]) -> dict[str, Any]:
        try:
            snapshot_from_json(plain)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no reading of an engine's metrics ({error!r})") from error
        return plain

    @property
    def reading(self) -> Reading:
        return Reading(snapshot_from_json(self.counted), self.seconds)


def read_over(server: Endpoint, seconds: float, waiting: Callable[[str], None]) -> Reading:
    """Read `/metrics`, wait, and read it again. Raises LabError where it cannot be read."""
    before, start = _snapshot(server), time.monotonic()
    while (left := start + seconds - time.monotonic()) > 0:
        waiting(f"reading {server.model}, {left:.0f} s left")
        time.sleep(min(POLL_S, left))
    after = _snapshot(server)
    return Reading(between(before, after), time.monotonic() - start)


def between(before: Snapshot, after: Snapshot) -> Snapshot:
    """Return what was counted from one reading to the next. Raises LabError where counts fell."""
    try:
        counted = after.since(before)
    except ValueError as error:  # a histogram has other buckets than before
        raise LabError(ANOTHER) from error
    fell = [n for n, v in counted.values.items() if metrics.is_counter(n) and v < 0]
    if fell or any(h.count < 0 for h in counted.histograms.values()):
        raise LabError(ANOTHER)
    return counted


def _snapshot(server: Endpoint) -> Snapshot:
    if (snapshot := server.snapshot()) is None:
        raise LabError(
            f"{server.url}/metrics does not show the metrics of an engine that the lab knows (vLLM,"
            " or one of `serving/engines/`): give the address of the engine itself, not of a proxy"
            " before it, and have it show its metrics, without a number that is none (NaN, negative"
            f" or above {metrics.MOST:g})"
        )
    return snapshot


def keep(path: Path, model: str, seconds: float, reading: Reading) -> None:
    """Write a reading, so that later ones can be compared with it."""
    write_json(
        path,
        ReadingFile(model=model, seconds=seconds, counted=snapshot_json(reading.counted)),
    )


def kept(path: Path) -> ReadingFile:
    """Read a reading on file. Raises DamagedError, which says how to make one."""
    try:
        return read_json(path, ReadingFile)
    except DamagedError as error:
        raise DamagedError(
            f"BASELINE: {error}; while the server is well, `make diagnose ENDPOINT=.. OUT={path}`"
            " writes one"
        ) from error
