"""What the runner tells the load generator, and what it is told back: one JSON line each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, PositiveFloat

from loadtests.arrivals import Arrival
from loadtests.workload import Request


class TrialPlan(BaseModel, frozen=True, extra="forbid"):
    """One trial: a warm-up, a measured window, and a drain in which nothing new is sent."""

    url: str
    arrival: Arrival
    requests: Path  # JSON lines of PlannedRequest
    records: Path  # written when the trial has ended
    warmup_s: float
    window_s: PositiveFloat | None  # None: until stopped (Locust's own web UI)
    timeout_s: PositiveFloat  # the longest silence within one answer
    seed: int
    lab: str
    variant: str
    run_id: str
    workload: str
    keep_text: bool = False


class TrialSummary(BaseModel, frozen=True, extra="forbid"):
    """What only the load process can know; everything else is computed from the records."""

    started_unix_s: float  # wall clock at the trial's time 0: for dashboards, never for durations
    window_s: tuple[float, float]  # the measured window, on the trial's clock
    planned: int | None  # requests the schedule holds (open loop)
    sent: int
    exhausted: bool  # the prepared requests ran out before the window did
    loop_lag_p99_s: float  # how late the load process's event loop ran
    loop_lag_max_s: float
    cpu_s: float  # CPU time of the load process
    aborted: str | None = None


class PlannedRequest(BaseModel, frozen=True, extra="forbid"):
    index: int
    output_tokens: int
    body: str
    intruder: bool = False
    due_s: float | None = None  # in the trace that is replayed


def body(request: Request, model: str) -> dict[str, Any]:
    """The chat completion request: streamed, greedy, of an exact length, usage in every chunk."""
    return {
        "model": request.adapter or model,
        "messages": request.messages,
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def write_requests(path: Path, requests: list[Request], model: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for request in requests:
            planned = PlannedRequest(
                index=request.index,
                output_tokens=request.output_tokens,
                body=orjson.dumps(body(request, model)).decode(),
                intruder=request.intruder,
                due_s=request.due_s,
            )
            file.write(planned.model_dump_json().encode() + b"\n")


def read_requests(path: Path) -> list[PlannedRequest]:
    return [PlannedRequest.model_validate_json(line) for line in path.open("rb")]
