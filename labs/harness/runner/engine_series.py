"""Keep the engine's own gauges and counters with each trial.

Prometheus keeps what it scrapes for as long as its data lie there, and for whoever ran the lab. A
run's files outlast that and are shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dashboards import series
from dashboards.prometheus import Prometheus
from labs.harness.spec.lab import Lab, Point
from labs.harness.storage.engine_series import FILE, LABELS, Kept
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_gzip

A_SCRAPE_S = 1.0  # the last one may come so much later than what it shows


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
            if result is None or (home / FILE).exists():
                continue
            if (trial := folder.trial(point, result, lab)) is None:
                continue
            start = trial.summary.started_unix_s
            end = start + trial.length_s + A_SCRAPE_S
            matchers = {"lab": lab.name, "run_id": folder.path.name, "variant": point.variant.name}
            scraped_series = there.samples(_selector(matchers), start, end)
            kept = [_kept(labels, samples, start) for labels, samples in scraped_series]
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
