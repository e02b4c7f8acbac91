"""What the runner tells the load generator, and what it is told back: one JSON line each way."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, PositiveFloat

from loadtests.arrivals import Arrival, Contended, Waves
from loadtests.workload import Request, intrudes

T = TypeVar("T")
WINDOWS_AT_MOST = 4  # how long a closed loop's window may be held open for answers, in windows


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
    slo_s: dict[str, float] = {}  # ttft, tpot, itl: lines on a dashboard
    share: tuple[int, int] = (0, 1)  # of a load process: its number, and how many there are

    @property
    def seats(self) -> int:
        """Of this share: users, each with at most one request in flight."""
        number, of = self.share
        if isinstance(self.arrival, Waves):  # they leave together: one process sends them all
            return self.arrival.seats if number == 0 else 0
        extra = self.arrival.seats - self.arrival.users  # an intruder's
        mine = self.arrival.users // of + (number < self.arrival.users % of)
        return mine + (extra if number == 0 else 0)

    def own_share(self, items: Sequence[T]) -> Sequence[T]:
        """This share of what is sent one after another: divided, not multiplied."""
        number, of = self.share
        return items if isinstance(self.arrival, Waves) else items[number::of]

    def is_intruder(self, index: int) -> bool:
        return isinstance(self.arrival, Contended) and intrudes(index)


class TrialSummary(BaseModel, frozen=True, extra="forbid"):
    """What only the load processes can know; everything else is computed from the records."""

    started_unix_s: float  # wall clock at the trial's time 0: for dashboards, never for durations
    window_s: tuple[float, float]  # the measured window, on the trial's clock
    planned: int | None  # requests the schedule holds (open loop)
    sent: int
    exhausted: bool  # the prepared requests ran out before the window did
    loop_lag_p99_s: float  # how late a load process's event loop ran: the latest of them
    loop_lag_max_s: float
    cpu_s: float  # CPU time of the load processes
    aborted: str | None = None
    lost_share: float = 0.0  # of the users, who went with a load process that died


def merged_summary(summaries: Sequence[TrialSummary], lost_share: float) -> TrialSummary:
    """Of all shares of a trial. Each counts from its own start: no clocks are compared."""
    planned = [s.planned for s in summaries if s.planned is not None]
    return TrialSummary(
        started_unix_s=min(s.started_unix_s for s in summaries),
        window_s=(max(s.window_s[0] for s in summaries), min(s.window_s[1] for s in summaries)),
        planned=sum(planned) if planned else None,
        sent=sum(s.sent for s in summaries),
        exhausted=any(s.exhausted for s in summaries),
        loop_lag_p99_s=max(s.loop_lag_p99_s for s in summaries),
        loop_lag_max_s=max(s.loop_lag_max_s for s in summaries),
        cpu_s=sum(s.cpu_s for s in summaries),
        aborted=next((s.aborted for s in summaries if s.aborted), None),
        lost_share=lost_share,
    )


class Progress(BaseModel, frozen=True, extra="forbid"):
    """How far a trial's load is, told while it runs."""

    sent: int = 0
    in_flight: int = 0
    warm: bool = False  # the warm-up is over: what is sent now counts
    due: int | None = None  # of the schedule, by now (open loop)
    adapters: frozenset[str] | None = None  # of the requests in flight, where any are asked for
    loop_lag_s: float | None = None  # the worst since the last report, where it is watched


def total_progress(shares: Sequence[Progress]) -> Progress:
    """Of all load processes."""
    due = [p.due for p in shares if p.due is not None]
    adapters = [p.adapters for p in shares if p.adapters is not None]
    lags = [p.loop_lag_s for p in shares if p.loop_lag_s is not None]
    return Progress(
        sent=sum(p.sent for p in shares),
        in_flight=sum(p.in_flight for p in shares),
        warm=all(p.warm for p in shares),
        due=sum(due) if due else None,
        adapters=frozenset().union(*adapters) if adapters else None,
        loop_lag_s=max(lags, default=None),
    )


class PlannedRequest(BaseModel, frozen=True, extra="forbid"):
    index: int
    output_tokens: int
    body: str
    intruder: bool = False
    due_s: float | None = None  # in the trace that is replayed
    adapter: str | None = None


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
                adapter=request.adapter,
            )
            file.write(planned.model_dump_json().encode() + b"\n")


def sent_sha256(paths: Sequence[Path]) -> str:
    """Of what is sent and when a trace has it due, whatever else the files come to say."""
    digest = hashlib.sha256()
    for planned in (request for path in paths for request in read_requests(path)):
        digest.update(f"{planned.due_s} {planned.body}\n".encode())
    return digest.hexdigest()


def read_requests(path: Path) -> list[PlannedRequest]:
    return [PlannedRequest.model_validate_json(line) for line in path.open("rb")]
