"""How the CPU time to play a fleet grows: with replicas, requests, and those in flight."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench import BenchError
from bench.clock import Clock
from bench.console import console, table
from labs.harness.running.capacity_plan import Served, model_named
from labs.harness.running.forecaster import Forecaster, ForecastError, started
from labs.harness.running.resolve import machine_of
from labs.harness.telling import instruments
from serving.engines.vllm import Vllm
from serving.forecasting.fleet import serial_delays
from serving.forecasting.plan import (
    ForecastPlan,
    ForecastPlay,
    PlannedEngine,
    PlannedTrial,
    SyntheticRequest,
)
from serving.forecasting.traffic import Traffic

CARD, MODEL = "h100", "llama-8b"
PROMPT_TOKENS, OUTPUT_TOKENS = 1000, 200  # the latter a mean; as `make plan` has them by default
LONGEST_OUTPUT = 4 * OUTPUT_TOKENS
TOKEN_S = 40e-6  # of a core, about, by which the time left is estimated


@dataclass(frozen=True)
class Case:
    """A load on a fleet; the rate and the requests are those of each replica."""

    replicas: int
    rate_per_s: float
    requests: int
    router: str = "least-loaded"


CASES = (
    *(Case(replicas, 10, 200) for replicas in (1, 2, 4, 8, 16)),
    *(Case(8, 10, 200, router) for router in ("round-robin", "prefix-aware")),
    *(Case(1, rate_per_s, 400) for rate_per_s in (2.5, 5, 10, 20, 40)),
    *(Case(1, 10, requests) for requests in (100, 800, 1600)),
)
EXPECTED_S = 20 + TOKEN_S * OUTPUT_TOKENS * sum(case.replicas * case.requests for case in CASES)


def measure(clock: Clock, work: Path) -> instruments.Fleet:
    """Play each case in one process, one after another, and take its CPU time.

    That is the wall time on a core of its own: the scheduler in virtual time never waits.

    Raises BenchError where vLLM's scheduler cannot be driven.
    """
    work.mkdir(parents=True)
    try:
        with started() as forecaster:
            fleet = _measured(forecaster, clock, work)
    except ForecastError as error:
        raise BenchError(str(error)) from error
    show(fleet)
    return fleet


def _measured(forecaster: Forecaster, clock: Clock, work: Path) -> instruments.Fleet:
    clock.tell("importing vLLM", 0)
    most = max(case.replicas for case in CASES)
    one = Case(1, 10, 1)
    ready_s, _ = _timed(forecaster, one, work)  # vLLM is imported, and an engine built
    built_s, _ = _timed(forecaster, Case(most, 10, 1), work)
    rows: list[instruments.Played] = []
    due = sum(case.replicas * case.requests for case in CASES)
    for case in CASES:
        done = sum(row.requests for row in rows) / due
        clock.tell(f"replicas: {case.replicas}, router: {case.router}", done)
        cpu_s, play = _timed(forecaster, case, work)
        rows.append(played(case, cpu_s, play))
    return instruments.Fleet(
        vllm=Vllm.version(),
        import_s=ready_s,
        build_s=built_s / (most - 1),
        held_bytes=sum(process.memory_info().rss for process in _processes(forecaster)),
        rows=rows,
    )


def _timed(forecaster: Forecaster, case: Case, work: Path) -> tuple[float, ForecastPlay]:
    """Play a case; return the CPU time in seconds, the first time with the start, and the play."""
    before_s = _cpu_s(forecaster) if forecaster.ready else 0.0
    forecaster.send(_plan(case, work / "requests.jsonl"))
    (play,) = forecaster.plays()
    return _cpu_s(forecaster) - before_s, play


def _cpu_s(forecaster: Forecaster) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _processes(forecaster))


def _processes(forecaster: Forecaster) -> list[psutil.Process]:
    """Find the processes below the forecaster's guard."""
    return psutil.Process(forecaster.process.pid).children(recursive=True)


def _plan(case: Case, requests: Path) -> ForecastPlan:
    """Write the requests of a case, and plan its trial; raises LabError."""
    machine, sheet = machine_of(CARD)
    assert sheet
    served = Served.of(model_named(machine, MODEL), "bf16", machine, sheet)
    drawn, rng = _drawn(case), random.Random(1)
    requests.write_text("".join(request.model_dump_json() + "\n" for request in drawn))
    gaps_s = (rng.expovariate(case.rate_per_s * case.replicas) for _ in drawn)
    schedule_s = tuple(itertools.accumulate(gaps_s))
    trial = PlannedTrial(
        key="",
        repeat=1,
        requests=requests,
        ends_only=True,
        router=case.router,
        traffic=Traffic(
            kind="open", schedule_s=schedule_s, warmup_s=0, window_s=max(1e-9, schedule_s[-1])
        ),
    )
    engine = PlannedEngine(
        argv=served.argv(PROMPT_TOKENS + LONGEST_OUTPUT + 1),
        step_times=served.steps[0],
        replicas=case.replicas,
        on_cuda=True,
        trials=(trial,),
    )
    delays = serial_delays(case.replicas)
    return ForecastPlan(delays=delays, engines=(engine,))


def _drawn(case: Case) -> list[SyntheticRequest]:
    rng = random.Random(0)
    return [
        SyntheticRequest(
            index=index,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=max(1, round(min(rng.expovariate(1 / OUTPUT_TOKENS), LONGEST_OUTPUT))),
        )
        for index in range(case.replicas * case.requests)
    ]


def played(case: Case, cpu_s: float, play: ForecastPlay) -> instruments.Played:
    """Gather the figures of a case that was played."""
    answers = play.play.answers
    ends_s = [answer.chunks[-1][0] for answer in answers]
    open_s = sum(end - answer.sent_s for end, answer in zip(ends_s, answers, strict=True))
    return instruments.Played(
        router=case.router,
        replicas=case.replicas,
        rate_per_s=case.rate_per_s,
        requests=len(answers),
        output_tokens=sum(answer.asked_tokens for answer in answers),
        in_flight=open_s / max(ends_s) / case.replicas,
        cpu_s=cpu_s,
    )


def show(fleet: instruments.Fleet) -> None:
    """Print the table, and what a process costs before it plays."""
    shown = table("Fleets in virtual time, on one core", *instruments.PLAYED)
    for row in fleet.rows:
        shown.add_row(*instruments.played_row(row))
    console.print(shown)
    console.print(instruments.fleet_sentence(fleet))
