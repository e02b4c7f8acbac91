"""Mark finished runs as regions of time on a Grafana's dashboards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dashboards.push import Region
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.results import RunFolder, readable


def regions(folders: Sequence[RunFolder], report: Callable[[RunFolder, str], None]) -> list[Region]:
    """Return a region for each finished run, from its first trial's start to its last one's end.

    A run that cannot be read is left out; `report` is called with it and the reason.
    """
    run_regions: list[Region] = []
    for folder in folders:
        try:
            with readable(folder):
                region = _region(folder) if folder.complete else None
        except (DamagedError, OSError) as error:
            report(folder, f"left out: {error}")
            continue
        if region:
            run_regions.append(region)
    return run_regions


def _region(folder: RunFolder) -> Region | None:
    run = folder.run()
    lab = run.rebuilt_lab()
    results = folder.trial_results(run.points(), lab)
    played = [result.summary for result in results if result.summary]
    if not played:
        return None
    return Region(
        start_ms=round(1000 * min(s.started_unix_s for s in played)),
        end_ms=round(1000 * max(s.started_unix_s + s.window_s[1] for s in played)),
        tags=(
            f"lab:{lab.name}",
            f"run:{folder.path.name}",
            *(f"variant:{variant.name}" for variant in lab.variants),
        ),
        text=f"{lab.title} on {run.machine.describe()}, {run.model}",
    )
