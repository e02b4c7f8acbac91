"""Defines what the runner and the load generator tell each other: one JSON line each way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt

from loadtests.arrivals import Arrival, Contended, Waves
from loadtests.records import LONGEST_S
from loadtests.workload import Request, intrudes

T = TypeVar("T")
LAST_UNIX_S = 1e10  # in the year 2286
TrialTime = Annotated[float, Field(ge=0, le=LONGEST_S)]  # in seconds, on the trial's clock
LEAST_COUNTED = 5  # requests that a figure is taken over; long prompts, where they are sent
# how long a window may be held open for them: so many windows, or so long where that is more
WINDOWS_AT_MOST, HELD_OPEN_AT_MOST_S = 4, 120.0
# What an answer may take beyond the time to its first byte, and beyond its first lines: many times
# what an engine needs, so that only an answer without an end is cut off.
TOKEN_AT_MOST_S, TOKEN_AT_MOST_BYTES = 2.0, 4096
FIRST_LINES_AT_MOST_BYTES = 65536


class QueueLimits(BaseModel, frozen=True, extra="forbid"):
    """Limits on what is in the engine at once; None: no limit."""

    requests: PositiveInt | None = None  # that are unfinished, as vLLM's max-num-queued-reqs
    prompt_tokens: PositiveInt | None = None  # of prompts, as vLLM's max-num-queued-tokens


class TrialPlan(BaseModel, frozen=True, extra="forbid"):
    """One trial to play: a warm-up, a measured window, and a drain.

    The window of a closed loop or of waves is held open until five requests count, and one of
    every user. In the drain the users of a closed loop go on sending, uncounted, until every
    request that counts has been answered; an open loop and waves send nothing new.

    With plans `beside` it, which have as many users, each user sends one request of every plan in
    turn, so that what the machine's speed does meanwhile meets all of them alike. The time that is
    given is then the time of all together. Where `pids` are given, an engine is suspended while
    another has its turn.
    """

    url: str
    arrival: Arrival
    requests: Path  # JSON lines of PlannedRequest
    skip: int = 0  # so many of the first are not sent: an earlier attempt at the trial has
    records: Path  # written when the trial has ended
    warmup_s: float
    window_s: PositiveFloat
    timeout_s: PositiveFloat  # the longest silence within one response
    seed: int
    lab: str
    variant: str
    run_id: str
    workload: str
    unnamed: bool = False  # Prometheus is not told which load it is
    keep_text: bool = False
    capacity_per_s: float | None = None  # of which an arrival's rate may be a multiple
    slo_s: dict[str, float] = {}  # ttft, tpot, itl: lines on a dashboard
    turns_away: bool = False  # the queue is limited: what is refused has not failed
    admission: QueueLimits | None = None  # that the client holds, where the engine has none
    turns: PositiveInt = 1  # requests in a row that are one session's, and one user's
    # where the server's dialect is another than vLLM's, in which bodies are written:
    fields: dict[str, Any] = {}  # of every body, set to these; None leaves a field out
    model_names: dict[str, str] = {}  # that it gives models in its answers -> the lab's
    reconnects: bool = False  # before each request, as it closes connections after an answer
    # a regular expression of secrets, which errors do not repeat; its group `name` stays
    secrets: str = ""
    share: tuple[int, int] = (0, 1)  # (number of this load process, number of all)
    trial: str = ""  # a name that the master gives it, by which late messages are told apart
    beside: tuple[TrialPlan, ...] = ()
    pids: tuple[int, ...] = ()  # of what computes in the engine, on the load process's machine
    rest_s: float = 0.0  # after each of its answers, before another engine has its turn

    @property
    def all_plans(self) -> tuple[TrialPlan, ...]:
        """This plan, and those whose requests take turns with its own."""
        return (self, *self.beside)

    def longest_s(self, output_tokens: int) -> float:
        """Return the most time that an answer of so many tokens may take, in seconds."""
        return self.timeout_s + TOKEN_AT_MOST_S * output_tokens

    @property
    def latest_s(self) -> float:
        """When the last request that counts may be sent, in seconds on the trial's clock."""
        return self.warmup_s + most_held_open_s(self.window_s)

    @property
    def least_counted(self) -> int:
        """This share of the requests that the window is held open for: one a user, five in all."""
        number, of = self.share
        sending = 1 if isinstance(self.arrival, Waves) else min(of, self.arrival.users)
        least = max(self.arrival.users, LEAST_COUNTED)
        return least // sending + (number < least % sending)

    @property
    def seats(self) -> int:
        """The number of users of this share, each with at most one request in flight."""
        number, of = self.share
        if isinstance(self.arrival, Waves):  # a wave is sent at once, so one process sends it all
            return self.arrival.seats if number == 0 else 0
        extra = self.arrival.seats - self.arrival.users  # the intruder
        users = self.arrival.users // of + (number < self.arrival.users % of)
        return users + (extra if number == 0 else 0)

    def own_share(self, items: Sequence[T]) -> Sequence[T]:
        """Select this load process's share of what all of them send together."""
        if isinstance(self.arrival, Waves):
            return items
        number, of = self.share
        return [item for i, item in enumerate(items) if i // self.turns % of == number]

    def is_intruder(self, index: int) -> bool:
        """Whether the request of this index is the intruder's."""
        return isinstance(self.arrival, Contended) and intrudes(index)


class TrialSummary(BaseModel, frozen=True, extra="forbid"):
    """Holds what only the load processes know of a trial; the records give everything else."""

    # wall clock at the trial's time 0: for dashboards, never for durations
    started_unix_s: Annotated[float, Field(ge=0, le=LAST_UNIX_S)]
    # the same moment on the machine's monotonic clock
    started_monotonic_s: FiniteFloat | None = None
    window_s: tuple[TrialTime, TrialTime]  # the measured window
    # the users of a closed loop went on until every request that counts had been answered; False
    # in an open loop, in waves, and in records made when all users stopped with the window
    answered_under_load: bool = False
    planned: NonNegativeInt | None  # requests the schedule holds (open loop)
    sent: NonNegativeInt
    exhausted: bool  # the prepared requests ran out before the window did
    loop_lag_p99_s: FiniteFloat  # how late an event loop ran, in the worst load process
    loop_lag_max_s: FiniteFloat
    cpu_s: FiniteFloat  # CPU time of the load processes
    aborted: str | None = None
    lost_share: FiniteFloat = 0.0  # share of the users whose load process died


def most_held_open_s(window_s: float) -> float:
    """Return how long after the warm-up a request may be sent that counts, in seconds.

    A window is a stated time, and on a slow machine one answer may take several of them.
    """
    return max(WINDOWS_AT_MOST * window_s, HELD_OPEN_AT_MOST_S)


def merged_summary(summaries: Sequence[TrialSummary], lost_share: float) -> TrialSummary:
    """Combine the summaries of all shares of a trial.

    Each share counts time from its own start, so that no clocks are compared. The window ends where
    the first share ran out of requests, and otherwise with the last that was held open: until then
    the users of all shares go on.
    """
    ends_s = [s.window_s[1] for s in summaries]
    ran_out_s = [s.window_s[1] for s in summaries if s.exhausted]
    planned = [s.planned for s in summaries if s.planned is not None]
    started_s = [s.started_monotonic_s for s in summaries if s.started_monotonic_s is not None]
    return TrialSummary(
        started_unix_s=min(s.started_unix_s for s in summaries),
        started_monotonic_s=min(started_s, default=None),
        window_s=(max(s.window_s[0] for s in summaries), min(ran_out_s, default=max(ends_s))),
        answered_under_load=all(s.answered_under_load for s in summaries),
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
    """Reports how far a trial's load has come, while it runs."""

    sent: int = 0
    in_flight: int = 0
    warm: bool = False  # the warm-up is over: what is sent now counts
    due: int | None = None  # of the schedule, by now (open loop)
    adapters: frozenset[str] | None = None  # of the requests in flight; None without adapters
    loop_lag_s: float | None = None  # the worst since the last report


def total_progress(shares: Sequence[Progress]) -> Progress:
    """Combine the progress of all load processes."""
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
    """A request as it will be sent: its body as JSON text, and when a trace has it due."""

    index: int
    output_tokens: int
    body: str
    prompt_tokens: int = 0
    intruder: bool = False
    due_s: float | None = None  # in the trace that is replayed
    adapter: str | None = None
    choices: int = 1  # answers that it asks for, of output_tokens each
    alike_tokens: int | None = None  # of its text that another prompt begins with, unplanned


def body(request: Request, model: str) -> dict[str, Any]:
    """Build a chat completion request: streamed, of exact length, with the usage in every chunk.

    It is greedy, unless its workload samples. A priority of 0, vLLM's default, is left out: an
    engine that does not schedule by priority refuses any other.
    """
    imposed = {"structured_outputs": request.imposed} if request.imposed else {}
    return {
        "model": request.adapter or model,
        "messages": request.messages,
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "temperature": request.temperature,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **({"priority": request.priority} if request.priority else {}),
        **({"cache_salt": request.salt} if request.salt else {}),
        **({"n": request.choices} if request.choices > 1 else {}),
        **imposed,
    }


def in_dialect(request: PlannedRequest, fields: Mapping[str, Any]) -> PlannedRequest:
    """Return a request whose body has these fields; a field that is None is left out of it."""
    if not fields:
        return request
    changed = {**orjson.loads(request.body), **fields}
    kept = {name: value for name, value in changed.items() if value is not None}
    return request.model_copy(update={"body": orjson.dumps(kept).decode()})


def write_requests(path: Path, requests: list[Request], model: str) -> None:
    """Write the requests as JSON lines of `PlannedRequest`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for request in requests:
            planned = PlannedRequest(
                index=request.index,
                output_tokens=request.output_tokens,
                body=orjson.dumps(body(request, model)).decode(),
                prompt_tokens=request.prompt_tokens,
                intruder=request.intruder,
                due_s=request.due_s,
                adapter=request.adapter,
                choices=request.choices,
                alike_tokens=request.alike_tokens,
            )
            file.write(planned.model_dump_json().encode() + b"\n")


def sent_sha256(paths: Sequence[Path]) -> str:
    """Hash what is sent and when a trace has it due, but nothing else in the files."""
    digest = hashlib.sha256()
    for request in (request for path in paths for request in read_requests(path)):
        digest.update(f"{request.due_s} {request.body}\n".encode())
    return digest.hexdigest()


def most_output_tokens(path: Path) -> int:
    """Return the longest answer that the requests of a file ask for, in tokens."""
    with path.open("rb") as file:
        return max((int(orjson.loads(line)["output_tokens"]) for line in file), default=0)


def most_answer_bytes(output_tokens: int) -> int:
    """Return the most bytes that an answer of so many tokens may have."""
    return FIRST_LINES_AT_MOST_BYTES + TOKEN_AT_MOST_BYTES * output_tokens


def read_requests(path: Path) -> list[PlannedRequest]:
    """Read what `write_requests` wrote."""
    return [PlannedRequest.model_validate_json(line) for line in path.open("rb")]
