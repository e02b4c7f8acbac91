"""The child process of a forecast: what it leaves behind, and what its failures say."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from labs.running import forecast
from labs.running.forecast import Forecaster, ForecastError
from serving.forecasting.plan import ForecastPlan, ForecastPlay, PlannedEngine, PlannedTrial
from serving.forecasting.step import StepTimes
from serving.forecasting.timing import TimingPlan
from serving.forecasting.traffic import Traffic
from tests.processes import lives

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0  # a bound, not a measurement
PLAN = TimingPlan(config=Path("config.json"), device="cpu")
STEP = StepTimes(
    tokens=(1,), linear_s=(1.0,), rows=(1,), head_s=(0.0,), attention_pair_s=0, attention_read_s=0
)
TRIAL = PlannedTrial(
    key="base/fixed/waves-1", repeat=1, requests=Path("nowhere"),
    traffic=Traffic(kind="waves", warmup_s=0, window_s=1),
)  # fmt: skip
ONE_TRIAL = ForecastPlan(
    tokenizer=Path("nowhere"),
    engines=(PlannedEngine(argv=(), step_times=STEP, trials=(TRIAL,)),),
)


def stand_in(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def _played(forecaster: Forecaster) -> list[ForecastPlay]:
    forecaster.send(ONE_TRIAL)
    return list(forecaster.plays())


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def test_the_process_of_a_forecast_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = """
import sys, time
from labs.running import forecast
code = "import time; print('x', flush=True); time.sleep(600)"
forecast.FORECASTER_ARGV = (sys.executable, "-c", code)
with forecast.started():
    time.sleep(600)
"""
    # what a killed parent cannot remove stays in the test's own folder
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env)
    try:
        # the parent, the guard and the child
        until(lambda: len(psutil.Process(parent.pid).children(recursive=True)) >= 2)
        family = psutil.Process(parent.pid).children(recursive=True)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not any(map(lives, family)))


def test_an_interrupted_forecast_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "FORECASTER_ARGV", stand_in("import time; time.sleep(600)"))
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    family: list[psutil.Process] = []

    def interrupted() -> None:
        with forecast.started():
            children = psutil.Process().children(recursive=True)
            family.extend(p for p in children if p.pid not in before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert family
    assert not any(p.is_running() for p in family)


def test_a_step_that_cannot_be_timed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print('ready', flush=True); input(); raise SystemExit('no such device')"
    monkeypatch.setattr(forecast, "FORECASTER_ARGV", stand_in(code))
    with (
        pytest.raises(ForecastError, match="the step could not be timed: no such device"),
        forecast.started() as forecaster,
    ):
        forecaster.time_steps([PLAN])


@pytest.mark.parametrize("done", ["", "print('ready', flush=True);"])
def test_a_timing_that_hangs_is_ended(done: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        forecast, "FORECASTER_ARGV", stand_in(f"import time; {done} time.sleep(600)")
    )
    monkeypatch.setattr(forecast, "TIMING_LIMIT_S", 0.1)
    with (
        pytest.raises(ForecastError, match=r"could not be timed|does not import"),
        forecast.started() as forecaster,
    ):
        forecaster.time_steps([PLAN])


def test_a_scheduler_that_does_not_import_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "FORECASTER_ARGV", stand_in("raise ImportError('no vllm')"))
    with (
        pytest.raises(ForecastError, match="does not import: ImportError: no vllm"),
        forecast.started() as forecaster,
    ):
        _played(forecaster)


def test_a_scheduler_that_fails_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print('ready', flush=True); input(); raise ValueError('no such flag')"
    monkeypatch.setattr(forecast, "FORECASTER_ARGV", stand_in(code))
    with (
        pytest.raises(ForecastError, match="could not be driven: ValueError: no such flag"),
        forecast.started() as forecaster,
    ):
        _played(forecaster)
