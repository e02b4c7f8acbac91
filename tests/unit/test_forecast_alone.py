"""How much of a forecast is timed and played, and what one without a run waits for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs import LABS
from labs.filing.results import PointForecasts, Predictions
from labs.judging.machine_speed import MachineSpeed, PartSpeed
from labs.lab import Lab, LabError
from labs.running import run as running
from labs.running.forecast import _step_of, _steps_as_timed
from labs.running.resolve import RunRequest, Setup, machine_of
from labs.running.run import forecast_alone, run_lock
from serving.gpus import Datasheet
from tests.unit.builders import CEILINGS, SHAPE
from tests.unit.test_forecasting import TIMES

PLAYED: list[int] = []


@pytest.fixture(autouse=True)
def _nothing_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record how many repeats are asked for, in place of writing prompts and playing them."""

    def forecast(setup: Setup, requests: Any, progress: Any) -> PointForecasts:
        PLAYED.append(setup.lab.repeats)
        return PointForecasts(points={}, without={})

    PLAYED.clear()
    monkeypatch.setattr(running, "forecast", forecast)
    monkeypatch.setattr(running, "write_requests", lambda setup, work: [])
    monkeypatch.setattr(running, "predict", lambda *_: Predictions(effects={}, forecasts={}))
    monkeypatch.setattr(running, "resolve", lambda request, _: resolved(request))


@dataclass(frozen=True)
class Resolved:
    """A setup that knows its lab and its card: models and memory do not matter here."""

    lab: Lab
    datasheet: Datasheet | None


def resolved(request: RunRequest) -> Resolved:
    return Resolved(request.lab, machine_of(request.card)[1])


QUIET: Any = SimpleNamespace(waiting=lambda text: None)


def test_one_repeat_is_played_for_a_gpu_that_is_not_here_and_all_of_them_here() -> None:
    lab = LABS["continuous-batching"]
    assert lab.repeats > 1
    forecast_alone(RunRequest(lab, card="h100"), QUIET)
    forecast_alone(RunRequest(lab), QUIET)
    assert [1, lab.repeats] == PLAYED


def test_only_what_is_timed_here_waits_for_a_run() -> None:
    lab = LABS["continuous-batching"]
    with run_lock():
        forecast_alone(RunRequest(lab, card="h100"), QUIET)
        with pytest.raises(LabError, match="another lab is running"):
            forecast_alone(RunRequest(lab), QUIET)


def test_a_band_is_wider_where_a_point_is_played_fewer_times() -> None:
    """By the machine's speed, which a mean over fewer trials leaves with more chance."""
    lab = LABS["kv-quantization"].at("cpu", quick=False)
    points = lab.points(SHAPE, CEILINGS)
    model: Any = SimpleNamespace(path=Path("model"))
    setup: Any = SimpleNamespace(
        lab=lab, machine=SimpleNamespace(kind="cuda"), model=model, weights={}, points=points,
        quick=False, places={},
    )  # fmt: skip
    timed: Any = SimpleNamespace(time_steps=lambda plans: dict.fromkeys(plans, TIMES))
    part = PartSpeed(median_s=1.0, low_s=0.9, high_s=1.2, trend=None)
    wandering = MachineSpeed(steps=9, reading=part, computing=part)
    found = _steps_as_timed(setup, points, [wandering], timed)
    slowest = {lab.repeats_of(p): found[p.key][2][0].linear_s[0] for p in points}
    assert set(slowest) == {3, 5}
    assert slowest[3] > slowest[5]
    steady = _steps_as_timed(setup, points, [], timed)
    assert len({steady[p.key][2][0].linear_s for p in points}) == 1


def test_a_quick_run_times_the_step_less_often() -> None:
    points = LABS["continuous-batching"].at("cpu", quick=False).points(SHAPE, CEILINGS)
    here: Any = SimpleNamespace(kind="cuda")
    model: Any = SimpleNamespace(path=Path("model"))

    def passes(quick: bool) -> int:
        setup: Any = SimpleNamespace(
            machine=here, model=model, weights={}, points=points, quick=quick
        )
        return _step_of(setup, points[0]).passes

    assert (passes(quick=True), passes(quick=False)) == (3, 6)
