"""The engines of a lab, several of each behind a router, under open loads: a forecast alone.

It plays what a capacity plan plays (`capacity_plan.py`): vLLM's own scheduler in virtual time for
each replica, once as expected and once at each end of the band, side by side in processes. Nothing
of it is measured or kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from labs.harness.running.capacity_plan import by_load, fleet_forecast, in_order, processes
from labs.harness.running.copied_text import read_answers
from labs.harness.running.forecast import reasons_against, steps_of
from labs.harness.running.forecaster import side_by_side, started
from labs.harness.running.progress import ProgressDisplay
from labs.harness.running.resolve import Setup
from labs.harness.running.step_timing import earlier_speeds
from labs.harness.running.trials import requests_file
from labs.harness.running.virtual_trials import VirtualTrials
from labs.harness.spec import LabError, Point
from labs.harness.telling.capacity_plans import FleetForecast
from loadtests.arrivals import OfCapacity
from loadtests.trace import MOST_ROWS
from serving.forecasting.datasheet import ENDS
from serving.forecasting.fleet import serial_delays
from serving.forecasting.plan import ForecastPlan, SyntheticRequest


@dataclass(frozen=True)
class FleetSize:
    """Says how many replicas serve together, and which routers are tried."""

    replicas: int
    routers: tuple[str, ...]


@dataclass(frozen=True)
class FleetForecasts:
    """Holds a forecast for each open load of each engine, one a router."""

    size: FleetSize
    points: Mapping[str, Sequence[FleetForecast]]
    without: Mapping[str, str]  # variant -> why it has no forecast


def require_open_loads(setup: Setup) -> None:
    """Check that a router would change anything. Raises LabError."""
    if not _open_points(setup):
        raise LabError(
            f"{setup.lab.name} has no load whose requests come at times of their own, which several"
            " engines could share: its clients wait for answers, or its rates are multiples of one"
            " engine's capacity. Give traffic with TRACE=, or leave REPLICAS and ROUTER out"
        )


def _open_points(setup: Setup) -> list[Point]:
    return [p for p in setup.points if p.load.open_loop and not isinstance(p.load, OfCapacity)]


def write_lengths(setup: Setup, work: Path) -> None:
    """Write the requests of traces without a text: nothing reads one where nothing is sent."""
    for workload in setup.lab.workloads:
        path = requests_file(work, workload, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for index, (_, prompt, output) in enumerate(workload.trace):
                request = SyntheticRequest(index=index, prompt_tokens=prompt, output_tokens=output)
                file.write(request.model_dump_json() + "\n")


def forecast_fleets(
    setup: Setup,
    requests: Mapping[str, Sequence[Path]],
    size: FleetSize,
    progress: ProgressDisplay,
) -> FleetForecasts:
    """Forecast every open load of every engine whose step is known, behind each router.

    Raises ForecastError where the step cannot be timed, or vLLM's scheduler cannot be driven.
    """
    without = reasons_against(setup)
    points = [p for p in _open_points(setup) if p.variant.name not in without]
    if not points:
        return FleetForecasts(size, {}, without)
    speeds = [] if setup.elsewhere else earlier_speeds(setup.machine)
    with started() as forecaster:
        steps = steps_of(setup, points, speeds, forecaster, progress)
        with_text = all(len(p.workload.trace) <= MOST_ROWS for p in points)
        copies = read_answers(setup, points, requests, forecaster, progress) if with_text else {}
        trials = VirtualTrials(setup, requests, steps, copies, 1.0, forecaster)
    jobs = list(itertools.product(points, size.routers, range(len(ENDS))))
    plans = [
        ForecastPlan(
            tokenizer=setup.model.path,
            delays=serial_delays(size.replicas),
            engines=(trials.of_a_fleet(point, end, size.replicas, router),),
        )
        for point, router, end in jobs
    ]
    most_requests = max(len(p.lengths) for p in points)
    with side_by_side(processes(most_requests)) as forecasters:
        played = in_order(forecasters, plans, setup.lab.slo, progress, f"{size.replicas} replicas")
    found: dict[str, list[FleetForecast]] = {}
    loads = itertools.product(points, size.routers)
    for (point, router), plays in zip(loads, by_load(played), strict=True):
        found.setdefault(point.key, []).append(fleet_forecast(router, plays))
    return FleetForecasts(size, found, without)
