"""A lab's engines behind a router: what is played, and what has nothing to route."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs.harness.cli.planning import _fleet_size
from labs.harness.forecast import forecast
from labs.harness.forecast.forecast import (
    FleetForecasts,
    FleetSize,
    forecast_fleets,
    require_open_loads,
    write_lengths,
)
from labs.harness.forecast.load_forecast import LoadForecast
from labs.harness.plan.resolve import requests_file
from labs.harness.reports import forecasts, markdown
from labs.harness.spec.lab import LabError
from loadtests.trace import MOST_ROWS
from serving.simulator.protocol import ForecastPlan, SyntheticRequest
from tests.unit.builders import make_lab, make_workload
from tests.unit.test_capacity_plan import SilentProgress, latencies
from tests.unit.test_virtual_trials import make_setup, steps_of

TRACE = tuple((0.5 * i, 100 + i, 20) for i in range(41))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[ForecastPlan]:
    """The plans that are played; each play has half of its requests within the objective."""
    plans: list[ForecastPlan] = []

    def forecast_loads(loads: Any, *_: Any) -> dict[Any, LoadForecast]:
        plans.extend(plan for of_load in loads.values() for plan in of_load)
        return {load: LoadForecast.of([latencies(0.5)] * 3) for load in loads}

    monkeypatch.setattr(forecast, "started", lambda: nullcontext(None))
    monkeypatch.setattr(forecast, "side_by_side", lambda _: nullcontext([]))
    monkeypatch.setattr(forecast, "steps_of", lambda setup, points, *_: steps_of(points))
    monkeypatch.setattr(forecast, "reasons_against", lambda _: {})
    monkeypatch.setattr(forecast, "earlier_speeds", lambda _: [])
    monkeypatch.setattr(forecast, "write_prompts", lambda requests, _: requests)
    monkeypatch.setattr(forecast, "forecast_loads", forecast_loads)
    return plans


def found_of(setup: Any, size: FleetSize) -> FleetForecasts:
    files = {w.name: [Path("requests.jsonl")] for w in setup.lab.workloads}
    return forecast_fleets(setup, files, size, SilentProgress())


def told(setup: Any, found: FleetForecasts, replicas: int, **without: str) -> str:
    """The page of these forecasts."""
    machine: Any = SimpleNamespace(model="Abacus", describe=lambda: "an abacus")
    basis = forecasts.Basis(setup.lab, "abacus-1", machine, here=True)
    return markdown.document(forecasts.page_of_fleets(basis, replicas, found.points, without))


def test_every_engine_plays_the_trace_behind_every_router(played: list[ForecastPlan]) -> None:
    setup = make_setup(make_lab().replaying(TRACE))
    found = found_of(setup, FleetSize(3, ("round-robin", "least-loaded")))
    assert [*found.points] == [
        (f"{variant}/trace/replay-1", router)
        for variant in ("off", "on")
        for router in ("round-robin", "least-loaded")
    ]
    assert len(played) == 2 * 2 * 3  # engines, routers, and a step as expected, faster, slower
    for plan in played:
        (engine,) = plan.engines
        (trial,) = engine.trials
        assert engine.replicas == 3
        assert plan.delays.serial_s == 0.002 / 3
        assert trial.ends_only
        assert trial.traffic.schedule_s == tuple(row[0] for row in TRACE)
    text = told(setup, found, 3, eager="it was not timed")
    assert re.search("3 replicas .*Abacus", text)
    assert re.search("`eager` .*: it was not timed", text)
    assert text.count("| least-loaded | 50% |") == 2


@pytest.mark.parametrize(
    ("replicas", "by_client", "said"), [(4, True, True), (4, False, False), (1, True, False)]
)
def test_a_limit_that_clients_hold_is_told_to_be_one_on_all_replicas(
    played: list[ForecastPlan], replicas: int, by_client: bool, said: bool
) -> None:
    lab = make_lab(flags={"max-num-queued-reqs": 3}, admission_by_client=by_client)
    setup = make_setup(lab.replaying(TRACE))
    found = found_of(setup, FleetSize(replicas, ("round-robin",)))
    assert ("limit on all replicas" in told(setup, found, replicas)) == said


def test_of_a_labs_own_loads_the_open_ones_are_shared(played: list[ForecastPlan]) -> None:
    lab = make_lab(workloads=(make_workload("concurrent:2", "poisson:2"),), claims=(), evidence=())
    found = found_of(make_setup(lab), FleetSize(2, ("round-robin",)))
    assert {key for key, _ in found.points} == {"off/short/poisson-2", "on/short/poisson-2"}


def test_what_waits_for_answers_has_nothing_to_route() -> None:
    for load in ("concurrent:2", "waves:2"):
        lab = make_lab(workloads=(make_workload(load),), claims=(), evidence=())
        with pytest.raises(LabError, match="at times of their own"):
            require_open_loads(make_setup(lab))


def test_a_long_trace_is_written_as_lengths(tmp_path: Path) -> None:
    setup = make_setup(make_lab().replaying(TRACE))
    write_lengths(setup, tmp_path)
    lines = requests_file(tmp_path, setup.lab.workloads[0], 1).read_text().splitlines()
    written = [SyntheticRequest.model_validate(json.loads(line)) for line in lines]
    assert [(r.index, r.prompt_tokens, r.output_tokens) for r in written] == [
        (i, prompt, output) for i, (_, prompt, output) in enumerate(TRACE)
    ]


def test_which_forecasts_are_played_as_fleets() -> None:
    assert _fleet_size(0, "all", TRACE) is None
    assert _fleet_size(0, "all", TRACE * (MOST_ROWS // 20)) == FleetSize(1, ("round-robin",))
    assert _fleet_size(1, "all", TRACE) == FleetSize(1, ("round-robin",))
    assert _fleet_size(4, "least-loaded", ()) == FleetSize(4, ("least-loaded",))
    assert len(_fleet_size(4, "all", ()).routers) == 3  # type: ignore[union-attr]
