"""The machine's own speed, by reference steps: planted slowdowns."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from labs.harness.analysis.computed import PointForecasts
from labs.harness.analysis.machine_speed import (
    MOST_SPREAD,
    MachineSpeed,
    TimedTrial,
    jump,
    machine_speed,
    relative_speed,
    usual_spread,
)
from labs.harness.analysis.validity import check, speed_jumped
from labs.harness.comparison import compare, reproduction, side_by_side
from labs.harness.comparison.sides import read_side
from labs.harness.derived.summarize import summarise
from labs.harness.forecast import step_timing
from labs.harness.reports import report
from labs.harness.reports.document import plain_text
from labs.harness.runner import harness
from labs.harness.storage import results
from labs.harness.storage.recorded import TrialResult
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from serving.hardware import reference_step
from serving.hardware.reference_step import ReferenceStep
from serving.simulator.step import StepTimes
from tests.cases import each
from tests.unit.builders import write_slowed

NO_TIME: Any = {
    "tokens": (1,), "linear_s": (0.0,), "rows": (1,), "head_s": (0.0,), "attention_pair_s": 0.0,
    "attention_read_s": 0.0,
}  # fmt: skip
QUIET = [1.0, 1.02, 0.98, 1.01, 0.99, 1.0, 1.03, 0.97]


def step(reading: float = 1.0, computing: float = 1.0) -> ReferenceStep:
    """A step of 10 ms reading and 5 ms computing, each times a factor."""
    return ReferenceStep(reading_s=0.010 * reading, computing_s=0.005 * computing)


def quiet(*more: TimedTrial) -> list[TimedTrial]:
    trials = [
        TimedTrial("quiet", 10.0 * i, step(f, f), step(f + 0.01, f - 0.01))
        for i, f in enumerate(QUIET)
    ]
    return [*trials, *more]


def test_a_quiet_machine_is_no_caveat() -> None:
    assert speed_jumped(quiet()) == []
    speed = machine_speed(quiet())
    assert speed
    assert speed.steps == 2 * len(QUIET)
    assert speed.reading.median_s == pytest.approx(0.01, rel=0.03)
    assert speed.computing.low_s < 0.005 < speed.computing.high_s


def test_the_spread_of_earlier_runs_covers_four_of_five_later_means() -> None:
    """Simulated: every trial, and the moment of a forecast, at a speed drawn for itself."""
    draw = np.random.default_rng(7)

    def run(spread: float, trials: int) -> list[float]:
        return list(np.exp(draw.normal(0, spread, trials)))

    def speed(factors: list[float]) -> MachineSpeed:
        told = machine_speed([TimedTrial("p", float(i), step(f, f), step(f, f))
                              for i, f in enumerate(factors)])  # fmt: skip
        assert told
        return told

    earlier = [speed(run(0.2, 200)) for _ in range(8)]
    for trials in (1, 3, 5):
        factor = usual_spread(earlier, trials)
        ratios = [np.mean(run(0.2, trials)) / run(0.2, 1)[0] for _ in range(4000)]
        assert np.mean([1 / factor < ratio < factor for ratio in ratios]) == pytest.approx(
            0.8, abs=0.04
        )
    assert usual_spread([], 3) == 1.0
    steady = speed([1.0, 1.0, 1.0])
    assert usual_spread([steady], 3) == 1.0
    for damage, spread in (({"high_s": 1e300}, MOST_SPREAD), ({"low_s": 0.0}, 1.0)):
        part = steady.reading.model_copy(update=damage)
        damaged = steady.model_copy(update={"reading": part, "computing": part})
        assert usual_spread([damaged], 3) == spread


@each(
    ("before", "after", "part", "ratio", "beside"),
    [
        (step(), step(computing=1.3), "computing", 1.30, False),
        (step(reading=1.3), step(), "reading", 0.77, False),
        (step(1.4, 1.0), step(1.4, 1.0), "reading", 1.39, True),
        (step(1.0, 0.7), step(1.0, 0.7), "computing", 0.71, True),
    ],
)
def test_a_planted_slowdown_is_told_with_its_trial(
    before: ReferenceStep, after: ReferenceStep, part: str, ratio: float, beside: bool
) -> None:
    slow = TimedTrial("slow", 90.0, before, after)
    (caveat,) = speed_jumped(quiet(slow))
    assert (caveat.point, caveat.blocks) == ("slow", False)
    run = machine_speed(quiet(slow))
    assert run
    found = jump(slow, run)
    assert found
    assert (found.part, found.beside) == (part, beside)
    assert found.ratio == pytest.approx(ratio, abs=0.005)


@each(("computing", "again"), [(1.6, True), (0.6, True), (1.4, False)])
def test_a_trial_is_measured_again_where_the_machine_changed_far(
    computing: float, again: bool
) -> None:
    trial = TimedTrial("a", 0.0, step(), step(1.0, computing))
    assert [c.point for c in check("speed-within", "a", trial)] == ["a"] * again


def test_a_change_below_the_rule_is_no_jump() -> None:
    run = machine_speed(quiet())
    assert run
    assert jump(TimedTrial("a", 0.0, step(), step(1.2, 0.85)), run) is None


def test_a_machine_that_slows_along_the_run_shows_a_trend() -> None:
    """1.5 times as long at the end as at the start, in even steps of the logarithm."""
    factors = [1.5 ** (i / 10) for i in range(11)]
    speed = machine_speed(
        [TimedTrial("a", 7.0 * i, step(f), step(f)) for i, f in enumerate(factors)]
    )
    assert speed
    assert speed.reading.trend == pytest.approx(0.5)
    assert speed.computing.trend == pytest.approx(0.0)
    assert machine_speed([]) is None
    once = machine_speed([TimedTrial("a", 7.0, step(), step())])
    assert once
    assert once.reading.trend is None


def test_speeds_of_two_sittings_are_divided_part_by_part() -> None:
    slow = machine_speed([TimedTrial("a", 0.0, step(1.25, 2.0), step(1.25, 2.0))])
    fast = machine_speed([TimedTrial("a", 0.0, step(), step())])
    assert slow
    assert fast
    assert relative_speed(slow, fast) == pytest.approx({"reading": 0.8, "computing": 0.5})


# ----------------------------------------------------------------------------- in a run's files


def timed(folder: RunFolder, of: Callable[[int], ReferenceStep]) -> RunFolder:
    """The run with the same reference step on both sides of each trial, given its number."""
    paths = sorted(folder.path.glob("trials/**/trial.json"))
    for number, path in enumerate(paths):
        result = TrialResult.model_validate_json(path.read_text())
        steps = {"reference_before": of(number), "reference_after": of(number)}
        write_json(path, result.model_copy(update=steps))
    summarise(folder)
    return folder


def test_a_run_without_reference_steps_is_read_and_told_as_before(folder: RunFolder) -> None:
    path = next(folder.path.glob("trials/**/trial.json"))
    plain = json.loads(path.read_text())
    del plain["reference_before"], plain["reference_after"]
    path.write_text(json.dumps(plain))
    assert summarise(folder).machine_speed is None


def test_a_report_has_the_machines_speed_along_the_run_and_as_the_forecast_was_made(
    folder: RunFolder,
) -> None:
    timed(folder, lambda number: step(2.0 if number == 3 else 1.0))
    slower = [StepTimes(**NO_TIME, reference=step(r, 0.9)).model_dump() for r in (1.1, 1.2, 1.3)]
    known = PointForecasts(points={}, step_times=[*slower, StepTimes(**NO_TIME).model_dump()])
    predictions = folder.predictions().model_copy(update={"in_virtual_time": known})
    write_json(folder.path / "predictions.json", predictions)
    text = report.write(folder).read_text()
    for figures in ("| Reading | 10 ms |", "| Computing | 5 ms |", "reading took 2.00 times",
                    "reading took 1.20 times and computing took 0.90 times"):  # fmt: skip
        assert figures in text


def test_where_a_gpu_admits_one_process_the_engine_has_it_alone(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference step's process would hold a context of CUDA for the whole run."""
    monkeypatch.setattr(reference_step, "started", lambda kind, log: contextlib.nullcontext(log))
    setup: Any = SimpleNamespace(endpoint=None, machine=SimpleNamespace(kind="gpu"))
    said = list[str]()
    progress: Any = SimpleNamespace(message=said.append)
    with contextlib.ExitStack() as exits:
        assert harness._reference(setup, folder, progress, exits) is not None
        assert said == []
        run = folder.run()
        here = run.environment.model_copy(update={"compute_mode": "exclusive process"})
        write_json(folder.path / "run.json", run.model_copy(update={"environment": here}))
        assert harness._reference(setup, folder, progress, exits) is None
    for text in (said[0], report.write(folder).read_text()):
        assert "exclusive process" in text


def test_two_sittings_are_compared_by_their_reference_steps(folder: RunFolder) -> None:
    later = timed(write_slowed(folder, 1.25), lambda number: step(1.25, 1.25))
    a, b = (read_side(str(f.path)) for f in (folder, later))
    assert compare.compare(a, b).speeds is None  # the first run timed none
    timed(folder, lambda number: step())
    found = compare.compare(read_side(str(folder.path)), b)
    assert found.speeds == pytest.approx({"reading": 0.8, "computing": 0.8})
    again = reproduction.compare_with_original(folder, later)
    assert "0.80x at computing" in plain_text(side_by_side.headline(found))
    assert "0.80x at computing" in reproduction.told(again)


def test_a_forecast_reads_the_speeds_of_earlier_runs_on_this_machine(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = folder.run().machine
    monkeypatch.setattr(results, "RESULTS", folder.path.parents[2])
    assert step_timing.earlier_speeds(here) == []  # that run timed no step
    report.write(timed(folder, lambda number: step(1 + number % 2)))
    (speed,) = step_timing.earlier_speeds(here)
    assert usual_spread([speed], 3) > 1.2
    assert step_timing.earlier_speeds(here.model_copy(update={"count": here.count + 1})) == []
    (folder.path / "summary.json").write_text("{")
    assert step_timing.earlier_speeds(here) == []
