"""Generates the load: Locust's master directs and records, its workers send and take times.

    locust -f loadtests/locustfile.py --headless --processes 1 -u 16 -r 16 --lab-exporter-port 9111

Trials come as JSON lines on the master's standard input (`TrialPlan`), events go out as JSON lines
on its standard output. Users are started once and wait between trials, so that a trial does not
start a process. With `--lab-plan FILE` there are no trials: every user that Locust's web UI starts
sends that plan's requests one after another, until it is stopped.

With several `--processes` each worker has its share of the users, of the requests and of the
schedule. They start together, and each counts time from its own start. If one dies, its share is
lost, which the trial's summary says; the next trial is shared among those that are left. Some may
be on other machines (`loadtests/load_workers.py`), which have what they are to send from the
master, and whose clocks nobody reads.

A worker does as little as it can while streams are open: what arrives is kept with its time, as it
is (`loadtests/connection.py`); a stream that has ended waits in a queue, of which one is parsed
every 2 ms, so that many that end together delay neither the next requests nor each other's first
tokens; connections are opened before the load; garbage is collected between trials. The master,
another process, writes the records and serves Prometheus.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import gc
import itertools
import json
import math
import os
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.fileobject
import orjson
from gevent.queue import SimpleQueue
from locust import User, events, runners, task
from locust.env import Environment
from locust.rpc import zmqrpc
from locust.runners import STATE_MISSING, MasterRunner, WorkerRunner

from loadtests import load_workers, records
from loadtests.arrivals import Contended, Replay, Waves, send_times
from loadtests.connection import Connection, EndlessAnswer, Lines, Pieces, lines_of
from loadtests.exporter import Exporter
from loadtests.plan import (
    LEAST_COUNTED,
    PlannedRequest,
    Progress,
    TrialPlan,
    TrialSummary,
    in_dialect,
    merged_summary,
    most_answer_bytes,
    read_requests,
    total_progress,
)
from loadtests.records import RequestRecord

PATH = "/v1/chat/completions"
HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}
if key := os.environ.get("VLLM_API_KEY"):  # that the engine, or an endpoint, asks for
    HEADERS["Authorization"] = f"Bearer {key}"
REPORT_EVERY_S = 0.5
LOOP_TICK_S = 0.02
CONNECTION_TIMEOUT_S = 10.0
MASTER_TIMEOUT_S = 60.0  # of silence, on another machine
CODE_TIMEOUT_S = 10.0  # in which a worker says which code it has
PARSE_EVERY_S = 0.002
FEW_PIECES = 4  # of an answer that is parsed at once: a refusal is known before the next try
GIVE_UP_AFTER = 5  # connection failures in a row, which mean that the engine is gone
PR_SET_PDEATHSIG = 1  # linux/prctl.h
now = time.monotonic


# Locust's worker measures its master's silence on the wall clock, which may jump. It needs no such
# limit where it ends with its master; one on another machine has `watch_master`.
runners.MASTER_HEARTBEAT_TIMEOUT = math.inf
if "--lab-remote" in sys.argv:
    runners.CONNECT_RETRY_COUNT = 5  # of 5 s: the run may have ended meanwhile


def encrypt_messages(key: str) -> None:
    """Let only those who hold the key exchange messages with the master, and encrypt them all."""
    plain = zmqrpc.BaseSocket.__init__

    def encrypted(self: zmqrpc.BaseSocket, sock_type: int, ipv4_only: bool) -> None:
        plain(self, sock_type, ipv4_only)
        load_workers.encrypt(self.socket, key)

    zmqrpc.BaseSocket.__init__ = encrypted


if given := os.environ.get(load_workers.KEY):
    encrypt_messages(given)


def say(**event: object) -> None:
    """Write an event, as a JSON line on the standard output, to what started this process."""
    print(json.dumps(event), flush=True)


# ------------------------------------------------------------------------------ one trial's load


class Turn:
    """A turn is the permission to send one request: which, when it was due, whether it counts."""

    def __init__(self, request: PlannedRequest, due_s: float | None, counts: bool) -> None:
        self.request, self.due_s, self.counts = request, due_s, counts


class Load:
    """Plays one trial's share: gives turns to users as the arrival says, and keeps the records."""

    def __init__(self, plan: TrialPlan) -> None:
        self.plan = plan
        planned = read_requests(plan.requests)[plan.skip :]
        requests = [in_dialect(request, plan.fields) for request in planned]
        longest = max((r.output_tokens * r.choices for r in requests), default=0)
        self.most_bytes = most_answer_bytes(longest)
        self.requests = plan.own_share([r for r in requests if not r.intruder])
        self.users = plan.seats
        self._intruding = isinstance(plan.arrival, Contended) and plan.share[0] == 0
        self._streams = self.users - self._intruding  # the intruder has the last seat
        self._long_prompts_left = LEAST_COUNTED if self._intruding else 0  # to send that count
        self._long_answers_left = self._long_prompts_left
        self._intrusions = iter([r for r in requests if r.intruder])
        self.sent = self.in_flight = self.failures = 0
        self.adapters: Counter[str] = Counter()  # of the requests in flight
        self._adapted = any(r.adapter for r in requests)
        self.loop_lag_s: float | None = None  # the worst since the last report
        self.t0 = float("inf")  # not started
        self._counted = self._answered = 0  # sent within the window; of those, succeeded
        self._awaited = 0  # requests that count and have not ended
        self.answered_under_load = False
        self._load_over = gevent.event.Event()  # the first user of a closed loop has stopped
        self.others_wait = plan.share[1] > 1  # other load processes await requests that count
        self.tell_others: Callable[[], None] | None = None  # that none are awaited here
        self.aborted: str | None = None
        self.exhausted = False
        self.unparsed: SimpleQueue[Ended] = SimpleQueue()
        self.fresh: list[RequestRecord] = []
        self._order: Iterator[PlannedRequest] = iter(self.requests)
        if plan.window_s is None:
            self._order = itertools.cycle(self.requests)
        self._schedule: list[float] | None = None
        duration_s = plan.warmup_s + (plan.window_s or 0)
        if isinstance(plan.arrival, Replay):
            due = [r.due_s / plan.arrival.speed for r in requests if r.due_s is not None]
            self._schedule = [*plan.own_share([at_s for at_s in due if at_s < duration_s])]
        else:
            times = send_times(plan.arrival, duration_s, plan.seed, plan.capacity_per_s)
            self._schedule = None if times is None else [*plan.own_share(times)]
        if self._schedule is not None:  # each request has a user of its own: more are not needed
            self.users = min(self.users, len(self._schedule))
        self._due = iter(self._schedule or ())
        self._next_intrusion_s = 0.0
        self._gathered = 0
        self._gate = gevent.event.Event()
        self._wave_counts = False
        self.window_start_s = plan.warmup_s
        self.window_end_s = plan.warmup_s + (plan.window_s or 0)
        if isinstance(plan.arrival, Waves) and self.users:
            self.window_start_s = float("inf")  # set by the first wave that counts
        if isinstance(plan.arrival, Replay) and due and max(due) < duration_s:
            self.window_end_s = max(due)  # the trace is over, or what was prepared of it
            self.exhausted = len(due) == len(requests)

    @property
    def name(self) -> str:
        """The name in Locust's own statistics; with the web UI the user sets the arrival there."""
        by_hand = self.plan.window_s is None
        return self.plan.workload if by_hand else f"{self.plan.workload} {self.plan.arrival}"

    @property
    def _closed_loop(self) -> bool:
        return self._schedule is None and not isinstance(self.plan.arrival, Waves)

    @property
    def planned(self) -> int | None:
        """The number of requests in the schedule; None under closed loop."""
        return None if self._schedule is None else len(self._schedule)

    def start(self) -> None:
        """Start the trial's clock."""
        self.t0, self.started_unix_s = now(), time.time()

    def elapsed_s(self) -> float:
        """Return the time on the trial's clock, in seconds."""
        return now() - self.t0

    def progress(self) -> Progress:
        """Report how far the load has come, with the loop's worst lag since the last report."""
        lag_s, self.loop_lag_s = self.loop_lag_s, None
        due = None
        if self._schedule is not None:
            due = bisect.bisect_right(self._schedule, self.elapsed_s())
        adapters = frozenset(+self.adapters) if self._adapted else None
        return Progress(
            sent=self.sent,
            in_flight=self.in_flight,
            warm=self.elapsed_s() >= self.window_start_s,
            due=due,
            adapters=adapters,
            loop_lag_s=lag_s,
        )

    def _gather(self) -> None:
        """Wait until all users have gathered; the last one to arrive opens the gate."""
        self._gathered += 1
        if self._gathered < self.users:
            self._gate.wait()
            return
        self._gathered = 0
        gate, self._gate = self._gate, gevent.event.Event()
        self._begin_wave()
        gate.set()

    def _begin_wave(self) -> None:
        at = self.elapsed_s()
        deadline_s = self.plan.warmup_s + (self.plan.window_s or float("inf"))
        late = at >= self.plan.latest_s and self._counted
        enough = at >= deadline_s and (late or self._counted >= self.plan.least_counted)
        self.exhausted = not enough and self.sent + self.users > len(self.requests)
        self._waves_over = enough or self.exhausted or self.aborted is not None
        self._wave_counts = at >= self.plan.warmup_s
        if self._waves_over:
            self.window_end_s = at
            self.window_start_s = min(self.window_start_s, at)
        elif self._wave_counts:
            self.window_start_s = min(self.window_start_s, at)

    def next_turn(self, seat: int) -> Turn | None:
        """Block until this user may send; return None when the trial has nothing more to send."""
        if self._intruding and seat == self._streams:
            assert isinstance(self.plan.arrival, Contended)
            return self._intrude(self.plan.arrival.every_s)
        due_s: float | None = None
        if isinstance(self.plan.arrival, Waves):
            self._gather()  # even at the end, so that all users leave together
            if self._waves_over:
                return None
            counts = self._wave_counts
        elif self._was_given_up():
            return None
        elif self._schedule is not None:
            due_s = next(self._due, None)
            if due_s is None:
                return None
            gevent.sleep(max(0.0, due_s - self.elapsed_s()))
            if self._was_given_up():  # meanwhile
                return None
            counts = due_s >= self.plan.warmup_s
        else:
            at = self.elapsed_s()
            if self._load_ends(at):
                return None
            counts = at >= self.plan.warmup_s and not self._closed(at)
        request = next(self._order, None)
        if request is None:
            self._run_out()
            return None
        self.sent += 1
        self._counted += counts
        self._awaited += counts
        return Turn(request, due_s, counts)

    def _was_given_up(self) -> bool:
        return self.aborted is not None

    def _closed(self, at_s: float) -> bool:
        """Whether what a closed loop sends no longer counts.

        On a slow machine the window is extended until as many requests as there are users, and five
        in all, have been sent in it, and five long prompts where there is an intruder; and then
        until they have succeeded.
        """
        if self.plan.window_s is None:
            return False
        few = self._counted < self.plan.least_counted or self._long_prompts_left > 0
        return at_s >= self.window_end_s and (at_s >= self.plan.latest_s or not few)

    def _load_ends(self, at_s: float) -> bool:
        """Whether a closed loop sends nothing more.

        After the window its users go on, uncounted, until every request that counts has been
        answered, so that the last of them meet the same load as the first.
        """
        if not self._closed(at_s):
            return False
        if not self._awaited and self.tell_others:
            self.tell_others()
            self.tell_others = None
        over = at_s >= self.plan.latest_s or not (self._awaited or self.others_wait)
        if over:
            self._end_load()
        return over

    def _end_load(self) -> None:
        """Note how a closed loop's load ends, as its first user stops; wake a waiting intruder."""
        if not self._load_over.is_set():
            self.answered_under_load = not (self._awaited or self.others_wait)
        self._load_over.set()

    def _run_out(self) -> None:
        """Note that the prepared requests have run out: the window ends, unless it already had."""
        at = self.elapsed_s()
        if self._closed_loop:
            self._end_load()
            if self._closed(at):
                return
        if not self.exhausted:
            self.exhausted = True
            self.window_end_s = min(self.window_end_s, at)

    def _intrude(self, every_s: float) -> Turn | None:
        """Wait for the intruder's next turn, a period after the last; a late one starts at once.

        It goes on for as long as the users do.
        """
        due_s = self._next_intrusion_s = self._next_intrusion_s + every_s
        if self._load_over.wait(max(0.0, due_s - self.elapsed_s())) or self.aborted:
            return None
        at = self.elapsed_s()
        counts = at >= self.plan.warmup_s and not self._closed(at)
        request = next(self._intrusions, None)
        if request is None:
            self.exhausted |= counts
            self._long_prompts_left = 0
            return None
        self.sent += 1
        self._awaited += counts
        self._long_prompts_left -= counts
        return Turn(request, None, counts)

    def end(self, ended: Ended) -> None:
        """Note at once that a request has ended; give up when connections fail in a row."""
        self._awaited -= ended.turn.counts
        self.failures = self.failures + 1 if ended.connection_failed else 0
        if self.failures >= GIVE_UP_AFTER and self.aborted is None:
            self.aborted = f"{GIVE_UP_AFTER} connections failed in a row: {ended.error}"
            self._load_over.set()

    def keep(self, answers: Sequence[RequestRecord]) -> None:
        """Keep the records of a request for the next report, one for each answer it asked for."""
        self.fresh += answers
        record = answers[0]
        if record.in_window and all(answer.ok for answer in answers):
            long = self.plan.is_intruder(record.index)
            self._long_answers_left -= long
            self._answered += not long
            awaited = self._long_answers_left if long else self.plan.least_counted - self._answered
            if self._closed_loop and awaited == 0:
                assert record.end_s is not None
                self.window_end_s = max(self.window_end_s, record.end_s)


@dataclass(slots=True)
class Ended:
    """Holds a request that has ended, with its answer as it was read."""

    turn: Turn
    pieces: Pieces
    sent_s: float  # on the clock `now`, as is the end
    end_s: float
    error: str | None
    connection_failed: bool


def stream(connection: Connection, turn: Turn, load: Load) -> Ended:
    """Send one request and read its answer."""
    pieces: Pieces = []
    error, connection_failed = None, False
    request = turn.request
    load.in_flight += 1
    if request.adapter:
        load.adapters[request.adapter] += 1
    most_s = load.plan.longest_s(request.output_tokens)
    sent = now()
    try:
        connection.ask(request.body.encode(), pieces, most_s, load.most_bytes)
    except EndlessAnswer as failure:
        error = str(failure)
    except Exception as failure:  # any failure of the network is recorded with the request
        error, connection_failed = f"{type(failure).__name__}: {failure}", True
    end = now() if error or not pieces else pieces[-1][0]
    load.in_flight -= 1
    if request.adapter:
        load.adapters[request.adapter] -= 1
    return Ended(turn, pieces, sent, end, error, connection_failed)


def read(ended: Ended) -> tuple[Lines, str | None]:
    """Parse an answer as HTTP; return its lines, and an error or None."""
    try:
        status, lines = lines_of(ended.pieces)
    except HTTPException as failure:
        return [], ended.error or f"{type(failure).__name__}: {failure}"
    if ended.error or status == 200:
        return lines, ended.error
    text = b"\n".join(line for _, line in lines).decode(errors="replace")
    return lines, f"HTTP {status}: {text[:200]}"


def records_of(ended: Ended, load: Load) -> list[RequestRecord]:
    """Parse a request's answer; return a record for each answer that it asked for."""
    lines, error = read(ended)
    choices = ended.turn.request.choices
    several = choices > 1
    parts, odd = by_choice(lines, choices) if several else ([lines], None)
    times = (ended.sent_s, lines[0][0] if lines else None, ended.end_s)
    return [
        record_of(ended.turn, load, times, part, error or odd, choice)
        for part, choice in zip(parts, range(len(parts)) if several else [None], strict=True)
    ]


def record_of(
    turn: Turn,
    load: Load,
    times: tuple[float, float | None, float],
    lines: Lines,
    error: str | None,
    choice: int | None,
) -> RequestRecord:
    """Make the record of an answer from its lines; `times` are of the send, first byte and end."""
    t0 = load.t0
    sent, first_byte, end = times
    chunks, prompt_tokens, output_tokens, complaint = (
        tokens_of(lines, t0, turn.request.output_tokens) if lines else ([],) + (None,) * 3
    )
    keep = load.plan.keep_text and chunks and not complaint
    model = model_of(lines) if chunks and not complaint else None
    if error is None and not chunks:
        error = complaint or "the stream ended without a token"
    return RequestRecord(
        index=turn.request.index,
        asked_tokens=turn.request.output_tokens,
        scheduled_s=turn.due_s,
        sent_s=round(sent - t0, 6),
        chunks=chunks,
        end_s=round(end - t0, 6),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        in_window=turn.counts,
        error=error or complaint,
        first_byte_s=None if first_byte is None else round(first_byte - t0, 6),
        text=text_of(lines) if keep else None,
        model=None if model is None else load.plan.model_names.get(model, model),
        choice=choice,
    )


def by_choice(lines: Lines, choices: int) -> tuple[list[Lines], str | None]:
    """Part a stream of several answers by the index in each event; return a complaint or None.

    What names no answer, such as an error, is every answer's. The last usage counts the tokens of
    all of them together, and has to agree with theirs; it is left out of the parts.
    """
    parts: list[Lines] = [[] for _ in range(choices)]
    places = {index: index for index in range(choices)}
    newest = [0] * choices  # tokens of each answer, by its own usage
    total: int | None = None
    complaint: str | None = None
    for at, line in lines:
        index = None
        try:
            event = orjson.loads(line[5:]) if line.startswith(b"data:") else {}
            usage, found = event.get("usage"), event.get("choices")
            if found:
                (index,) = {places[choice["index"]] for choice in found}
                count = usage["completion_tokens"] if usage else None
                newest[index] = count if type(count) is int else newest[index]
            elif usage:
                total = usage["completion_tokens"]
                continue
        except (ValueError, TypeError, KeyError, AttributeError):
            if line[5:].strip() != b"[DONE]":
                complaint = f"not an event of one of {choices} answers: {line[:80]!r}"
        for part in parts if index is None else [parts[index]]:
            part.append((at, line))
    if complaint is None and total is not None and total != sum(newest):
        complaint = f"the usage counts {total} tokens, and {sum(newest)} answer by answer"
    return parts, complaint


def tokens_of(
    lines: Lines, t0: float, asked_tokens: int
) -> tuple[list[tuple[float, int]], int | None, int | None, str | None]:
    """Parse server-sent events, each with the time at which it was read.

    Returns the chunks that carry tokens, the prompt tokens, the output tokens, and a complaint or
    None. A chunk's tokens are the increase of the usage in it. Where a server sends usage only at
    the end, each chunk with text counts as one token; the sums are compared later. A usage that is
    no count, falls, or is beyond twice what was asked for is a complaint.
    """
    chunks: list[tuple[float, int]] = []
    prompt_tokens = output_tokens = complaint = None
    counted = reported = 0
    most_tokens = 2 * asked_tokens
    for at, line in lines:
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        try:
            event = orjson.loads(line[5:])
            if "error" in event:
                complaint = complaint_of(event["error"])
            if usage := event.get("usage"):
                prompt, output = usage["prompt_tokens"], usage["completion_tokens"]
                if type(output) is not int or not reported <= output <= most_tokens:
                    return chunks, None, None, f"not a usage: {str(usage)[:80]}"
                if prompt != prompt_tokens:
                    if type(prompt) is not int or prompt < 0:
                        return chunks, None, None, f"not a usage: {str(usage)[:80]}"
                    prompt_tokens = prompt
                output_tokens = reported = output
                tokens = output_tokens - counted if event.get("choices") else 0
            else:
                choices = event.get("choices") or [{}]
                tokens = 1 if (choices[0].get("delta") or {}).get("content") else 0
        except (ValueError, TypeError, KeyError, AttributeError):
            return chunks, prompt_tokens, output_tokens, f"not a completion event: {line[:80]!r}"
        if tokens > 0:
            counted += tokens
            chunks.append((round(at - t0, 6), tokens))
    return chunks, prompt_tokens, output_tokens, complaint


def complaint_of(error: Any) -> str:
    """Word an error that came within a stream.

    vLLM checks the limits on its queue before it answers, and once more when its answer has begun:
    then what it turns away has a status of 200, and says its own in the stream.
    """
    code = error.get("code") if isinstance(error, dict) else None
    turned_away = next((name for name in records.TURNED_AWAY if name == f"HTTP {code}"), "")
    return f"{turned_away}{': ' * bool(turned_away)}{error}"[:200]


def text_of(lines: Lines) -> str:
    """Extract the completion from an event stream that `tokens_of` read without complaint."""
    events = [orjson.loads(e) for _, line in lines if (e := line[5:].strip()).startswith(b"{")]
    choices = [choice for event in events for choice in event.get("choices") or ()]
    return "".join((choice.get("delta") or {}).get("content") or "" for choice in choices)


def model_of(lines: Lines) -> str | None:
    """Read the name of the model that answered, from the first event of a stream that was read."""
    first = next((e for _, line in lines if (e := line[5:].strip()).startswith(b"{")), b"{}")
    name = orjson.loads(first).get("model")
    return None if name is None else str(name)


# ------------------------------------------------------------------------------ Locust's worker


class WaitingRoom:
    """Holds a worker's users between trials, and starts and ends each trial with all of them."""

    def __init__(self) -> None:
        self.load: Load | None = None
        self.opened = gevent.event.Event()
        self.ready_users = 0
        self.users_left = 0
        self.seats = itertools.count()

    def play(self, load: Load, meet: Callable[[], None]) -> None:
        """Play one trial to its end: connect every user, start the clock, wait for the last.

        `meet` waits for the other load processes before the clock starts.
        """
        self.ready_users = self.users_left = 0
        self.go = gevent.event.Event()
        self.everyone_ready, self.everyone_left = gevent.event.Event(), gevent.event.Event()
        self.load = load
        opened, self.opened = self.opened, gevent.event.Event()
        opened.set()
        if load.users:
            self.everyone_ready.wait()
        gc.collect()
        gc.disable()
        meet()
        load.start()
        self.go.set()
        if load.users:
            self.everyone_left.wait()
        gc.enable()
        self.load = None

    def ready(self) -> None:
        """Say that this user is connected, and wait for the trial's start."""
        assert self.load
        self.ready_users += 1
        if self.ready_users == self.load.users:
            self.everyone_ready.set()
        self.go.wait()

    def leave(self) -> None:
        """Say that this user has nothing more to send; the last one ends the trial."""
        assert self.load
        self.users_left += 1
        if self.users_left == self.load.users:
            self.everyone_left.set()


waiting_room = WaitingRoom()


class ChatUser(User):
    """A user that has at most one request in flight."""

    def on_start(self) -> None:
        """Take a seat; a trial uses the first seats."""
        self.seat = next(waiting_room.seats)

    @task
    def take_part(self) -> None:
        """Wait for a trial and send its requests, turn by turn, until it has no more."""
        if waiting_room.load is None or waiting_room.load.plan.window_s is not None:
            waiting_room.opened.wait()
        load = waiting_room.load
        if load is None or (load.plan.window_s is not None and self.seat >= load.users):
            return
        connection = connect(load)
        if load.plan.window_s is not None:
            waiting_room.ready()
        stopped = False
        try:
            while turn := load.next_turn(self.seat):
                ended = stream(connection, turn, load)
                load.end(ended)
                if load.plan.reconnects:
                    connection.close()
                    connection = connect(load)
                if ended.error is None and len(ended.pieces) > FEW_PIECES:
                    load.unparsed.put(ended)
                elif parse(ended, load, self.environment).error:
                    gevent.sleep(0.1)
        except gevent.GreenletExit:  # this process ends: its share is lost, not played to its end
            stopped = True
            raise
        finally:
            connection.close()
            if load.plan.window_s is not None and not stopped:
                waiting_room.leave()


def parse(ended: Ended, load: Load, environment: Environment) -> RequestRecord:
    """Parse a stream, keep its records and tell Locust's statistics; return the first record."""
    answers = records_of(ended, load)
    load.keep(answers)
    record = answers[0]
    environment.events.request.fire(
        request_type="POST",
        name=load.name,
        response_time=1000 * (ended.end_s - ended.sent_s),
        response_length=sum(answer.output_tokens or 0 for answer in answers),
        exception=RuntimeError(record.error) if record.error else None,
        context={},
    )
    return record


def parse_in_turn(load: Load, environment: Environment) -> None:
    """Parse what has ended, one every 2 ms, while the load goes on.

    Where streams end faster than that, one is parsed whenever all sockets have been served.
    """
    while True:
        parse(load.unparsed.get(), load, environment)
        gevent.sleep(PARSE_EVERY_S if load.unparsed.qsize() < load.users else 0)


def connect(load: Load) -> Connection:
    """Open a connection to the engine before the load, so that no request pays for it."""
    connection = Connection(load.plan.url, PATH, HEADERS, CONNECTION_TIMEOUT_S, load.plan.timeout_s)
    with contextlib.suppress(Exception):  # the first request will say what is wrong
        connection.open("/health")
    return connection


requests_text: gevent.queue.Queue[dict[str, str]] = gevent.queue.Queue()


def fetched(plan: TrialPlan, runner: WorkerRunner) -> Load:
    """Prepare a share whose requests are on the master's machine."""
    runner.send_message("lab-fetch", plan.trial)
    while (found := requests_text.get())["trial"] != plan.trial:
        pass
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="labs-requests-") as file:
        file.write(found["text"])
        file.flush()
        return Load(plan.model_copy(update={"requests": Path(file.name)}))


def play_trial(environment: Environment, msg: Any, remote: bool, **_: object) -> None:
    """Play a trial on a worker; tell the master where that fails."""
    plan, runner = TrialPlan.model_validate_json(msg.data), environment.runner
    assert isinstance(runner, WorkerRunner)
    try:
        play_plan(environment, runner, plan, remote)
    except Exception as failure:
        reason = f"a load process failed: {type(failure).__name__}: {failure}"
        runner.send_message("lab-failed", {"trial": plan.trial, "reason": reason})
        raise


def play_plan(
    environment: Environment, runner: WorkerRunner, plan: TrialPlan, remote: bool
) -> None:
    """Play a trial; send the records as they come and the summary at the end."""
    load = fetched(plan, runner) if remote else Load(plan)
    if plan.window_s is None:
        load.start()
        waiting_room.load = load
        waiting_room.opened.set()
        gevent.spawn(report_forever, runner, load)
        gevent.spawn(parse_in_turn, load, environment)
        return
    lags: list[float] = []
    parser = gevent.spawn(parse_in_turn, load, environment)
    helpers = [gevent.spawn(watch_loop, load, lags), gevent.spawn(report_forever, runner, load)]
    cpu = time.process_time()
    if load.others_wait:
        load.tell_others = partial(runner.send_message, "lab-answered", plan.trial)
    waiting_room.play(load, partial(meet, runner, plan.trial))
    gevent.killall(helpers)
    parser.kill()
    while load.unparsed.qsize():
        parse(load.unparsed.get(), load, environment)
    cpu = time.process_time() - cpu
    report(runner, load)
    lags.sort()
    summary = TrialSummary(
        started_unix_s=load.started_unix_s,
        started_monotonic_s=None if remote else load.t0,
        window_s=(load.window_start_s, load.window_end_s),
        answered_under_load=load.answered_under_load,
        planned=load.planned,
        sent=load.sent,
        exhausted=load.exhausted,
        loop_lag_p99_s=lags[int(0.99 * (len(lags) - 1))] if lags else 0.0,
        loop_lag_max_s=lags[-1] if lags else 0.0,
        cpu_s=cpu,
        aborted=load.aborted,
    )
    done = {"trial": plan.trial, "summary": summary.model_dump_json()}
    runner.send_message("lab-done", done)
    if remote:
        say(event="sent", requests=load.sent)


gate = gevent.event.Event()


def meet(runner: WorkerRunner, trial: str) -> None:
    """Say that this load process is ready, and wait until all are."""
    gate.clear()
    runner.send_message("lab-ready", trial)
    gate.wait()


def stop_waiting_for_others() -> None:
    """Let this load process's users stop: the counted requests of all processes are answered."""
    if waiting_room.load:
        waiting_room.load.others_wait = False


def watch_loop(load: Load, lags: list[float]) -> None:
    """Measure how late the event loop wakes a greenlet that asked to sleep 20 ms."""
    while True:
        before = now()
        gevent.sleep(LOOP_TICK_S)
        lags.append(max(0.0, now() - before - LOOP_TICK_S))
        load.loop_lag_s = max(load.loop_lag_s or 0.0, lags[-1])


def report(runner: WorkerRunner, load: Load) -> None:
    """Send the master the records since the last report, and the progress."""
    fresh, load.fresh = load.fresh, []
    found = {
        "trial": load.plan.trial,
        "records": [vars(r) for r in fresh],
        "progress": load.progress().model_dump_json(),
    }
    runner.send_message("lab-records", found)


def watch_master(runner: WorkerRunner) -> None:
    """End this process where it hears nothing more of a master on another machine."""
    heard = now()

    def hear(**_: object) -> None:
        nonlocal heard
        heard = now()

    runner.environment.events.heartbeat_received.add_listener(hear)
    while now() - heard < MASTER_TIMEOUT_S:
        gevent.sleep(1)
    refuse_to_go_on(runner, f"nothing was heard of the run for {MASTER_TIMEOUT_S:.0f} s")


def refuse_to_go_on(runner: WorkerRunner, reason: str) -> None:
    """Say why this process leaves the run, and end it."""
    say(event="refused", reason=reason)
    gevent.spawn(runner.quit)  # which ends the greenlets of the runner, as this may be one


def report_forever(runner: WorkerRunner, load: Load) -> None:
    """Report until another load takes its place, as when the web UI starts again."""
    while True:
        gevent.sleep(REPORT_EVERY_S)
        if waiting_room.load is not load:
            return
        report(runner, load)


# ------------------------------------------------------------------------------ Locust's master


class Director:
    """Directs the workers: reads plans, shares them out, writes records, feeds Prometheus."""

    def __init__(self, runner: MasterRunner, exporter: Exporter) -> None:
        self.runner, self.exporter = runner, exporter
        self.plan: TrialPlan | None = None
        self.records: list[RequestRecord] = []
        self.shares: dict[str, TrialPlan] = {}  # worker -> its share of the trial under way
        self.ready: set[str] = set()
        self.answered: set[str] = set()  # workers whose requests that count have been answered
        self.done: dict[str, TrialSummary] = {}
        self.gone: set[str] = set()  # this trial's workers that were lost, for good
        self.progress: dict[str, Progress] = {}
        self.team: set[str] | None = None  # workers that have users; None where any may join
        self.code: dict[str, str] = {}  # of each worker, by its hash
        self.went = (0.0, 0.0)  # when the trial under way started, by both clocks of this machine
        runner.register_message("lab-code", self.on_code)
        runner.register_message("lab-fetch", self.on_fetch)
        runner.register_message("lab-ready", self.on_ready)
        runner.register_message("lab-answered", self.on_answered)
        runner.register_message("lab-records", self.on_records)
        runner.register_message("lab-done", self.on_done)
        runner.register_message("lab-failed", self.on_failed)

    def begin(self, plan: TrialPlan) -> None:
        """Begin a trial: send each living worker its share of the plan."""
        plan = plan.model_copy(update={"trial": secrets.token_hex(8)})
        self.plan, self.records, self.gone = plan, [], set()
        self.exporter.begin(plan)
        workers = sorted(self.alive() if self.team is None else self.alive() & self.team)
        self.ready, self.answered, self.done, self.progress = set(), set(), {}, {}
        self.shares = {
            worker: plan.model_copy(update={"share": (number, len(workers))})
            for number, worker in enumerate(workers)
        }
        for worker, share in self.shares.items():
            self.runner.send_message("lab-trial", share.model_dump_json(), client_id=worker)

    def direct(self, users: int, workers: int) -> None:
        """Wait for the users to start, then play the plans from the standard input."""
        while self.runner.user_count < users:
            gevent.sleep(0.02)
        # When a worker comes late, or leaves, Locust would share the users out anew, amid a trial.
        self.runner.start = lambda *_, **__: None
        self.team = self.alive()
        reason = None
        if len(self.team) > workers:
            reason = (
                f"{len(self.team)} load processes have joined where {workers} were expected: start"
                " as many load workers as LOAD_WORKERS= says"
            )
        elif others := self.with_other_code():
            reason = (
                f"the load worker on {', '.join(others)} has other code in loadtests/ than this"
                " machine: check out the same commit on both"
            )
        if reason:
            self.runner.send_message("lab-refused", reason)
            say(event="failed", reason=reason)
            return
        users_each = users // len(self.team)
        gevent.spawn(self.watch)
        say(event="ready")
        for line in gevent.fileobject.FileObjectPosix(sys.stdin.fileno(), "rb"):
            plan = TrialPlan.model_validate_json(line)
            assert plan.arrival.seats <= users_each, (
                f"{plan.arrival} needs more than {users_each} users"
            )
            self.begin(plan)

    def with_other_code(self) -> list[str]:
        """Ask every worker for the hash of its code; return the machines where it is another."""
        assert self.team
        self.runner.send_message("lab-code")
        asked = now()
        while not self.team <= self.code.keys() and now() - asked < CODE_TIMEOUT_S:
            gevent.sleep(0.02)
        here = load_workers.code_sha256()
        return sorted({machine_of(w) for w in self.team if self.code.get(w) != here})

    def on_code(self, msg: Any, **_: object) -> None:
        """Take the hash of a worker's code."""
        self.code[msg.node_id] = msg.data

    def on_fetch(self, msg: Any, **_: object) -> None:
        """Send a worker on another machine the requests of the trial."""
        if self.is_late(msg, msg.data):
            return
        assert self.plan
        try:
            text = self.plan.requests.read_text(encoding="utf-8")
        except OSError as error:
            self.fail(f"the requests could not be read: {error}")
            return
        found = {"trial": self.plan.trial, "text": text}
        self.runner.send_message("lab-requests", found, client_id=msg.node_id)

    def is_late(self, msg: Any, trial: str) -> bool:
        """Whether a message is about another trial, or from a worker that was lost in this one."""
        under_way = self.plan is not None and trial == self.plan.trial
        return not under_way or msg.node_id not in self.shares.keys() - self.gone

    def fail(self, reason: str) -> None:
        """End the trial without a summary."""
        self.shares = {}
        self.exporter.end()
        say(event="failed", reason=reason)

    def on_failed(self, msg: Any, **_: object) -> None:
        """Take a worker's word that it cannot play its share."""
        if not self.is_late(msg, msg.data["trial"]):
            self.fail(f"{machine_of(msg.node_id)}: {msg.data['reason']}")

    def watch(self) -> None:
        """Check regularly whether a worker has died, so that the trial does not wait for it."""
        while True:
            gevent.sleep(REPORT_EVERY_S)
            if self.shares:
                self.go_on()

    def alive(self) -> set[str]:
        """Return the ids of the workers that are connected."""
        return {c.id for c in self.runner.clients.all if c.state != STATE_MISSING}

    def go_on(self) -> None:
        """Start the trial once all living workers are ready, and end it once all are done.

        In between, let the users stop once all requests that count have been answered. A worker
        that was lost for a while has not played its share as the others did: it is lost for good.
        """
        self.gone |= self.shares.keys() - self.alive() - self.done.keys()
        left = self.shares.keys() - self.gone
        if self.ready and left <= self.ready:
            self.ready = set()
            self.went = (time.time(), now())
            self.runner.send_message("lab-go")
        if left <= self.done.keys():
            self.end()
        elif self.answered and left <= self.answered | self.done.keys():
            self.answered = set()
            self.runner.send_message("lab-enough")

    def on_ready(self, msg: Any, **_: object) -> None:
        """Note that a worker is ready."""
        if not self.is_late(msg, msg.data):
            self.ready.add(msg.node_id)
            self.go_on()

    def on_answered(self, msg: Any, **_: object) -> None:
        """Note that a worker's requests that count have been answered."""
        if not self.is_late(msg, msg.data):
            self.answered.add(msg.node_id)
            self.go_on()

    def on_records(self, msg: Any, **_: object) -> None:
        """Take a worker's records and progress."""
        if self.is_late(msg, msg.data["trial"]):
            return
        for fields in msg.data["records"]:
            fields["chunks"] = [(at, tokens) for at, tokens in fields["chunks"]]
            record = RequestRecord(**fields)
            self.exporter.observe(record)
            if self.plan and self.plan.window_s is not None:
                self.records.append(record)
        self.progress[msg.node_id] = Progress.model_validate_json(msg.data["progress"])
        self.exporter.progress(total_progress([*self.progress.values()]))

    def on_done(self, msg: Any, **_: object) -> None:
        """Take a worker's summary. Where its clocks are another machine's, take ours instead."""
        if self.is_late(msg, msg.data["trial"]):
            return
        summary = TrialSummary.model_validate_json(msg.data["summary"])
        if summary.started_monotonic_s is None:
            unix_s, monotonic_s = self.went
            aborted = summary.aborted and f"{machine_of(msg.node_id)}: {summary.aborted}"
            ours = {"started_unix_s": unix_s, "started_monotonic_s": monotonic_s}
            summary = summary.model_copy(update={**ours, "aborted": aborted})
        self.done[msg.node_id] = summary
        self.go_on()

    def end(self) -> None:
        """End the trial: write the records, and send the runner the combined summary."""
        assert self.plan
        seats = {worker: share.seats for worker, share in self.shares.items()}
        self.shares = {}
        if self.team is not None:
            self.team -= self.gone
            for worker in self.gone:
                self.runner.send_message("quit", client_id=worker)
        self.exporter.end()
        summaries = [s for worker, s in self.done.items() if seats[worker]]
        if not summaries:
            say(event="failed", reason="the load processes that were to send have died")
            return
        summary = merged_summary(
            summaries, sum(seats[worker] for worker in self.gone) / sum(seats.values())
        )
        try:
            records.write(self.plan.records, self.records)
        except OSError as error:  # a full disk, for one
            say(event="failed", reason=f"the records could not be written: {error}")
        else:
            say(event="done", summary=summary.model_dump())


def machine_of(worker: str) -> str:
    """Return the name of the machine that a worker is on: Locust's id of it begins with that."""
    return worker.rpartition("_")[0]


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    group = parser.add_argument_group("inference-serving lab")
    group.add_argument("--lab-exporter-port", type=int, help="serve client metrics on this port")
    # options travel from master to worker as msgpack, which knows no Path
    group.add_argument("--lab-plan", help="send this TrialPlan's requests until stopped")
    group.add_argument("--lab-remote", action="store_true", help="the master is elsewhere")
    group.add_argument("--lab-load-workers", type=int, default=0, help="workers elsewhere")


@events.init.add_listener
def _begin(environment: Environment, **_: object) -> None:
    runner, options = environment.runner, environment.parsed_options
    assert options
    if isinstance(runner, WorkerRunner):
        # It must not outlive the master, even where nobody is left to end it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(PermissionError):
            os.nice(-10)  # its times must not wait for an engine that spins on its core
        remote = bool(options.lab_remote)  # read now: the master's options come to its workers
        runner.register_message("lab-trial", partial(play_trial, remote=remote), concurrent=True)
        runner.register_message("lab-requests", lambda msg, **_: requests_text.put(msg.data))
        code = load_workers.code_sha256()
        runner.register_message("lab-code", lambda **_: runner.send_message("lab-code", code))
        runner.register_message("lab-go", lambda **_: gate.set())
        runner.register_message("lab-enough", lambda **_: stop_waiting_for_others())
        if remote:
            runner.register_message(
                "lab-refused", lambda msg, **_: refuse_to_go_on(runner, msg.data)
            )
            gevent.spawn(watch_master, runner)
            say(event="joined")
    elif isinstance(runner, MasterRunner):
        os.nice(19)  # it shares a core with the worker, whose times must not wait
        exporter = Exporter()
        if options.lab_exporter_port:
            exporter.serve(options.lab_exporter_port)
        options.expect_workers += options.lab_load_workers
        director = Director(runner, exporter)
        if options.lab_plan:
            plan = TrialPlan.model_validate_json(Path(options.lab_plan).read_bytes())
            events.test_start.add_listener(lambda **_: director.begin(plan))
        else:
            gevent.spawn(director.direct, options.num_users, options.expect_workers)
