"""Play loads in virtual time, side by side in processes, and measure what their clients see.

A play is engines (one, several behind a router, or a pair) under traffic: a `ForecastPlan` of one
trial. Each load is played three times: as expected, with a faster and with a slower step. A lab's
engines as fleets (`forecast.py`) and the loads of a capacity plan (`capacity_plan.py`) come here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

from labs.harness.analysis.measure import grows, in_time, percentile
from labs.harness.forecast.forecaster import Forecaster, play_all
from labs.harness.forecast.load_forecast import Latencies, LoadForecast
from labs.harness.forecast.simulated_trials import records
from labs.harness.plan.progress import ProgressDisplay
from labs.harness.spec.lab import SLO
from serving.hardware.host_memory import available_bytes
from serving.simulator.protocol import ForecastPlan, ForecastPlay

MOST_PROCESSES = 16  # that play loads side by side
FORECASTER_BYTES = 1.5e9  # of memory for each of them, and for every request of its longest play
REQUEST_BYTES = 4e3
Load = TypeVar("Load")


def processes(requests: int = 0) -> int:
    """Count the forecasters that this machine has cores and memory for.

    `requests` are those of the longest play.
    """
    room = int(available_bytes() / (FORECASTER_BYTES + requests * REQUEST_BYTES))
    return max(1, min(len(os.sched_getaffinity(0)), MOST_PROCESSES, room))


def forecast_loads(
    loads: Mapping[Load, Sequence[ForecastPlan]],
    forecasters: Sequence[Forecaster],
    slo: SLO,
    progress: ProgressDisplay,
    where: str,
) -> dict[Load, LoadForecast]:
    """Play each load's plans, of one trial each; return what its clients would observe.

    The last loads are played first: let those be the longest, so that no process waits for them.
    Raises ForecastError.
    """
    plans = [(load, end, plan) for load, ends in loads.items() for end, plan in enumerate(ends)]
    plans.reverse()
    played: dict[tuple[Load, int], Latencies] = {}
    progress.waiting(f"loading vLLM's scheduler, for {where}")
    for number, play in play_all(forecasters, [plan for _, _, plan in plans]):
        load, end, _ = plans[number]
        played[load, end] = latencies(play, slo)
        progress.waiting(
            f"playing {where} in virtual time: {len(played)} of {len(plans)} loads done"
        )
    return {
        load: LoadForecast.of([played[load, end] for end in range(len(ends))])
        for load, ends in loads.items()
    }


def latencies(play: ForecastPlay, slo: SLO) -> Latencies:
    """Measure what the clients of a play would observe, over the requests that count."""
    counted = [record for record in records(play.play) if record.in_window]
    ttft_s = [record.ttft_s for record in counted if record.ttft_s is not None]
    tpot_s = [record.tpot_s for record in counted if record.tpot_s is not None]
    e2e_s = [record.e2e_s for record in counted if record.e2e_s is not None]
    looked_up = play.counters.get("prefix_queries", 0)
    return Latencies(
        requests=len(counted),
        within=sum(in_time(record, slo) for record in counted) / len(counted),
        ttft_p50_s=percentile(ttft_s, 50),
        ttft_p99_s=percentile(ttft_s, 99),
        tpot_p50_s=percentile(tpot_s, 50),
        tpot_p99_s=percentile(tpot_s, 99),
        e2e_p50_s=percentile(e2e_s, 50),
        e2e_p99_s=percentile(e2e_s, 99),
        grows=grows(counted),
        hit_rate=play.counters.get("prefix_hits", 0) / looked_up if looked_up else None,
        preemptions=play.counters["preemptions"],
    )
