"""The child process of a forecast: what it leaves behind, and what its failures say."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from labs.harness.forecast import forecaster as processes
from labs.harness.forecast.forecaster import Forecaster, ForecastError
from serving.simulator.__main__ import RECEIVING, Engines
from serving.simulator.fleet import Handover
from serving.simulator.profiled_step import TimingPlan
from serving.simulator.protocol import ForecastPlan, ForecastPlay, PlannedEngine, PlannedTrial
from serving.simulator.step import StepTimes
from serving.simulator.traffic import Traffic
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
    engines=(PlannedEngine(argv=(), step_times=STEP, trials=(TRIAL,)),),
)


TAKES_AN_ORDER = "print('ready', flush=True); input(); "


def stand_in(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def _played(forecaster: Forecaster) -> list[ForecastPlay]:
    forecaster.send(ONE_TRIAL)
    return list(forecaster.plays())


def _played_beside_others(forecaster: Forecaster) -> None:
    list(processes.play_all([forecaster], [ONE_TRIAL] * 3))


def _timed(forecaster: Forecaster) -> None:
    forecaster.time_steps([PLAN])


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def test_the_process_of_a_forecast_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = """
import sys, time
from labs.harness.forecast import forecaster as processes
code = "import time; print('x', flush=True); time.sleep(600)"
processes.FORECASTER_ARGV = (sys.executable, "-c", code)
with processes.started():
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
    monkeypatch.setattr(processes, "FORECASTER_ARGV", stand_in("import time; time.sleep(600)"))
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    family: list[psutil.Process] = []

    def interrupted() -> None:
        with processes.started():
            children = psutil.Process().children(recursive=True)
            family.extend(p for p in children if p.pid not in before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert family
    assert not any(p.is_running() for p in family)


@pytest.mark.parametrize(
    ("code", "ask", "error"),
    [
        (f"{TAKES_AN_ORDER}raise SystemExit('no device')", _timed, "timed: no device"),
        (f"{TAKES_AN_ORDER}raise ValueError('no flag')", _played, "driven: ValueError: no flag"),
        (f"{TAKES_AN_ORDER}raise SystemExit('no flag')", _played_beside_others, "no flag"),
        ("raise ImportError('no vllm')", _played, "import: ImportError: no vllm"),
    ],
    ids=["a step", "a scheduler", "one of several", "an import"],
)
def test_what_fails_there_is_told_with_its_last_line(
    code: str,
    ask: Callable[[Forecaster], object],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "FORECASTER_ARGV", stand_in(code))
    with pytest.raises(ForecastError, match=error), processes.started() as forecaster:
        ask(forecaster)


@pytest.mark.parametrize("done", ["", "print('ready', flush=True);"])
def test_a_timing_that_hangs_is_ended(done: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        processes, "FORECASTER_ARGV", stand_in(f"import time; {done} time.sleep(600)")
    )
    monkeypatch.setattr(processes, "TIMING_LIMIT_S", 0.1)
    with (
        pytest.raises(ForecastError, match=r"timed|import"),
        processes.started() as forecaster,
    ):
        _timed(forecaster)


def test_a_play_that_takes_long_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ends only when all others have been read, and these do not fit into a pipe."""
    code = f"""
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    key = json.loads(line)["engines"][0]["trials"][0]["key"]
    while key == "long" and not os.path.exists({str(tmp_path / "read")!r}):
        time.sleep(0.01)
    play = dict(answers=[], window_s=[0, 1], answered_under_load=False)
    print(json.dumps(dict(key=key, repeat=1, play=play, counters={{"x" * 200_000: 1}},
                          kv_capacity_tokens=0)), flush=True)
"""
    monkeypatch.setattr(processes, "FORECASTER_ARGV", stand_in(code))
    keys = ["long", "a", "b", "c"]
    plans = plans_of(keys)
    ended = []
    with processes.side_by_side(2) as forecasters:
        for number, play in processes.play_all(forecasters, plans):
            assert play.key == keys[number]
            ended.append(play.key)
            if len(ended) == 3:
                (tmp_path / "read").touch()
        again = [play.key for _, play in processes.play_all(forecasters, plans[:1])]
    assert ended == ["a", "b", "c", "long"]
    assert again == ["long"]


def plans_of(keys: Sequence[str]) -> list[ForecastPlan]:
    """Plans of one trial each."""
    trials = [TRIAL.model_copy(update={"key": key}) for key in keys]
    return [
        ForecastPlan(engines=(PlannedEngine(argv=(), step_times=STEP, trials=(trial,)),))
        for trial in trials
    ]


@pytest.mark.parametrize(
    ("fails", "processes_", "played"),
    [("print('failed', flush=True)", 1, ["a", "c"]), ("break", 1, ["a"]), ("break", 2, ["a", "c"])],
    ids=["a plan", "the only process", "one of two processes"],
)
def test_a_plan_that_fails_takes_no_other_with_it(
    fails: str, processes_: int, played: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those that no process is left for."""
    code = f"""
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    key = json.loads(line)["engines"][0]["trials"][0]["key"]
    if key == "b":
        print("ValueError: no flag", file=sys.stderr, flush=True)
        {fails}
        continue
    play = dict(answers=[], window_s=[0, 1], answered_under_load=False)
    print(json.dumps(dict(key=key, repeat=1, play=play, counters={{}}, kv_capacity_tokens=0)),
          flush=True)
"""
    monkeypatch.setattr(processes, "FORECASTER_ARGV", stand_in(code))
    keys, failed = ["a", "b", "c"], dict[int, ForecastError]()
    with processes.side_by_side(processes_) as forecasters:
        ended = [play.key for _, play in processes.play_all(forecasters, plans_of(keys), failed)]
    assert sorted(ended) == played
    assert [keys[number] for number in sorted(failed)] == [key for key in keys if key not in played]
    assert {str(error) for error in failed.values()} == {
        "vLLM's scheduler could not be driven: ValueError: no flag"
    }


def test_engines_are_built_once_and_begin_anew() -> None:
    class Engine:
        def __init__(
            self, argv: tuple[str, ...], step: Any, draft: Any, on_cuda: bool = False
        ) -> None:
            built.append((*argv, on_cuda))
            self.times: tuple[Any, ...] = (step, draft)

        def begin_anew(self, *times: Any) -> None:
            self.times = times

    built: list[tuple[Any, ...]] = []
    make: Any = Engine
    engines = Engines(make)

    def replicas(argv: str, number: int, step: StepTimes, on_cuda: bool = False) -> list[Any]:
        planned = PlannedEngine(
            argv=(argv,), step_times=step, trials=(), replicas=number, on_cuda=on_cuda
        )
        return engines.replicas(planned)

    one = replicas("a", 1, STEP)
    three = replicas("a", 3, STEP.times(2))
    other = replicas("b", 1, STEP)
    assert built == [("a", False)] * 3 + [("b", False)]
    assert three[:1] == one
    assert other[0] not in three
    assert [engine.times for engine in three] == [(STEP.times(2), None)] * 3
    assert replicas("a", 2, STEP) == three[:2]
    assert replicas("a", 1, STEP, on_cuda=True)[0] not in three
    assert built[-1] == ("a", True)
    handover = Handover(bytes_per_token=1, link_bytes_per_s=1, asked_s=0)
    pair = PlannedEngine(argv=("a",), step_times=STEP, trials=(), handover=handover)
    prefilling, decoding = engines.replicas(pair)
    assert prefilling is one[0]
    assert built.pop() == ("a", *RECEIVING, False)
    assert engines.replicas(pair) == [prefilling, decoding]
