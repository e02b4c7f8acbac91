"""What a trial's folder keeps of its engine: gauges and counters, as Prometheus scraped them.

Once a second: the gauges and counters that the dashboards ask of an engine, and of histograms the
sums and counts. `running.engine_series` writes the file; `make import` puts it back into
Prometheus, and the course shows how full the KV cache was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, TypeAdapter, model_validator

from dashboards import series
from labs.harness.storage import bounded
from labs.harness.storage.bounded import DamagedError
from serving.metrics import KV_USAGE, KvUse

FILE = "engine-series.json.gz"
LABELS = ("engine", "position", "finished_reason")  # that tell the series of one engine apart
MOST_SERIES, MOST_SAMPLES = 200, 20_000


def _known(name: str) -> str:
    if name not in series.ENGINE_KEPT:
        raise ValueError("no series that is kept of an engine")
    return name


class Kept(BaseModel, frozen=True, extra="forbid"):
    """One series of an engine over a trial: its samples, in seconds from the trial's start."""

    name: Annotated[str, AfterValidator(_known)]
    labels: dict[str, Annotated[str, Field(pattern=r"^[\w.-]{0,40}$")]]
    times_s: Annotated[list[FiniteFloat], Field(max_length=MOST_SAMPLES)]
    values: Annotated[list[FiniteFloat], Field(max_length=MOST_SAMPLES)]

    @model_validator(mode="after")
    def _samples_are_in_order(self) -> Self:
        if not set(self.labels) <= set(LABELS):
            raise ValueError(f"an engine's series has the labels {', '.join(LABELS)} and no other")
        if len(self.times_s) != len(self.values):
            raise ValueError("as many times as values are needed")
        if any(a >= b for a, b in pairwise(self.times_s)):
            raise ValueError("its times do not rise")
        return self


_FILE = TypeAdapter(Annotated[list[Kept], Field(max_length=MOST_SERIES)])


def read(home: Path) -> list[Kept]:
    """Read what a trial's folder holds of its engine; [] where nothing was kept.

    Raises DamagedError.
    """
    path = home / FILE
    return of_plain(bounded.parsed(path), path) if path.exists() else []


def of_plain(found: object, path: Path) -> list[Kept]:
    """Check the series of a trial that a file held. Raises DamagedError."""
    try:
        return _FILE.validate_python(found)
    except ValueError as error:
        raise DamagedError(f"{path}: {str(error).splitlines()[0]}") from error


def kv_usage(series_kept: Sequence[Kept]) -> Kept | None:
    """Read which share of one engine's KV cache was in use; None where nothing says so.

    Where several engines share the load, each has a cache, and none is told.
    """
    usage = [kept for kept in series_kept if kept.name == KV_USAGE]
    return usage[0] if len(usage) == 1 else None


def kv_use(series_kept: Sequence[Kept], window_s: tuple[float, float]) -> KvUse | None:
    """Tell how much of it was in use in a trial's window."""
    usage = kv_usage(series_kept)
    if usage is None:
        return None
    return KvUse.over_time([*zip(usage.times_s, usage.values, strict=True)], *window_s)


def lines(
    series_kept: Sequence[Kept], labels: Mapping[str, str], start_unix_s: float, since_s: float
) -> Iterator[str]:
    """Write a trial's series as samples with their times, from `since_s` after its start on."""
    for kept in series_kept:
        every = {**labels, **kept.labels}
        label_text = ",".join(f'{name}="{value}"' for name, value in every.items())
        for at, value in zip(kept.times_s, kept.values, strict=True):
            if at >= since_s:
                yield f"{kept.name}{{{label_text}}} {value!r} {start_unix_s + at:.3f}"
