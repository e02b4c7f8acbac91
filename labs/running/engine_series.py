"""The engine's own gauges and counters, kept with each trial as Prometheus scraped them.

Prometheus keeps what it scrapes for as long as its data lie there, and for whoever ran the lab. A
run's files outlast that and are shared, so each trial keeps what the dashboards ask of an engine:
once a second the gauges and counters, of histograms the sums and counts. `make import` puts them
back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, TypeAdapter, model_validator

from dashboards import series
from dashboards.prometheus import Prometheus
from labs.filing import bounded
from labs.filing.bounded import DamagedError
from labs.filing.results import RunFolder, write_gzip
from labs.lab import Lab, Point

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


def keep(folder: RunFolder, points: Sequence[Point], lab: Lab, there: Prometheus) -> None:
    """Write the series of each finished trial that has none on file yet, where Prometheus has them.

    It is called once the last scrape is over; without Prometheus nothing is written.
    """
    if there.missing:
        return
    for point in points:
        for repeat in range(1, lab.rounds + 1):
            home = folder.trial_folder(point, repeat)
            result = folder.trial_result(point, repeat)
            if result is None or result.summary is None or (home / FILE).exists():
                continue
            start = result.summary.started_unix_s
            matchers = {"lab": lab.name, "run_id": folder.path.name, "variant": point.variant.name}
            found = there.samples(_selector(matchers), start, start + result.took_s)
            kept = [_kept(labels, samples, start) for labels, samples in found]
            if kept:
                write_gzip(home / FILE, [one.model_dump() for one in kept])


def _selector(matchers: Mapping[str, str]) -> str:
    names = "|".join(series.ENGINE_KEPT)
    wanted = ",".join(f'{label}="{value}"' for label, value in matchers.items())
    return f'{{__name__=~"{names}",{wanted}}}'


def _kept(labels: Mapping[str, str], samples: Sequence[tuple[float, float]], start: float) -> Kept:
    there = [(round(at - start, 3), value) for at, value in samples if math.isfinite(value)]
    return Kept(
        name=labels["__name__"],
        labels={name: labels[name] for name in LABELS if name in labels},
        times_s=[at for at, _ in there],
        values=[value for _, value in there],
    )


def read(home: Path) -> list[Kept]:
    """Read what a trial's folder holds of its engine; [] where nothing was kept.

    Raises DamagedError.
    """
    path = home / FILE
    if not path.exists():
        return []
    try:
        return _FILE.validate_json(bounded.unpacked(path))
    except ValueError as error:
        raise DamagedError(f"{path}: {str(error).splitlines()[0]}") from error


def lines(
    home: Path, labels: Mapping[str, str], start_unix_s: float, since_s: float
) -> Iterator[str]:
    """Write a trial's series as samples with their times, from `since_s` after its start on."""
    for kept in read(home):
        every = {**labels, **kept.labels}
        told = ",".join(f'{name}="{value}"' for name, value in every.items())
        for at, value in zip(kept.times_s, kept.values, strict=True):
            if at >= since_s:
                yield f"{kept.name}{{{told}}} {value!r} {start_unix_s + at:.3f}"
