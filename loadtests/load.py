"""One trial's load, in one load process: who may send what, when, and what counts.

A load process plays its share of a trial (`TrialPlan.share`) on a clock of its own, in seconds from
its start. Users ask for their next turn; what an answer held is parsed elsewhere
(`loadtests/streaming.py`) and kept here until the next report.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import gevent
import gevent.event
from gevent.queue import SimpleQueue

from loadtests.admission import Admission, counts_file
from loadtests.arrivals import Contended, OfSessions, OfTrace, Waves, send_times
from loadtests.connection import Pieces
from loadtests.plan import (
    LEAST_COUNTED,
    PlannedRequest,
    Progress,
    TrialPlan,
    in_dialect,
    most_answer_bytes,
    read_requests,
)
from loadtests.records import BY_CLIENT, RequestRecord

GIVE_UP_AFTER = 5  # connection failures in a row, which mean that the engine is gone
AFTER_ERROR_S = 0.1  # that a user waits before it sends again
now = time.monotonic


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
        self.admission: Admission | None = None
        if plan.admission:
            counts = counts_file(plan.trial, plan.requests.parent)
            self.admission = Admission(plan.admission, plan.share, counts)
        self.adapters: Counter[str] = Counter()  # of the requests in flight
        self._adapted = any(r.adapter for r in requests)
        self.loop_lag_s: float | None = None  # the worst since the last report
        self.t0 = float("inf")  # not started
        self._counted = self._answered = 0  # sent within the window; of those, succeeded
        self._awaited = 0  # requests that count and have not ended
        self.answered_under_load = False
        self._load_over = gevent.event.Event()  # the first user of a closed loop has stopped
        self.awaited_elsewhere = plan.share[1] > 1  # other load processes await requests that count
        self.report_none_awaited: Callable[[], None] | None = None  # that none are awaited here
        self.aborted: str | None = None
        self.exhausted = False
        self.unparsed: SimpleQueue[Ended] = SimpleQueue()
        self.fresh: list[RequestRecord] = []
        self._order: Iterator[PlannedRequest] = iter(self.requests)
        self._turns_left: dict[int, deque[PlannedRequest]] = defaultdict(deque)  # seat -> session's
        self._last_sent: dict[int, int] = {}  # seat -> request
        self._schedule: list[float] | None = None
        duration_s = plan.warmup_s + plan.window_s
        if isinstance(plan.arrival, OfTrace):
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
        self.window_end_s = duration_s
        if isinstance(plan.arrival, Waves) and self.users:
            self.window_start_s = float("inf")  # set by the first wave that counts
        if isinstance(plan.arrival, OfTrace) and due and max(due) < duration_s:
            self.window_end_s = max(due)  # the trace is over, or what was prepared of it
            self.exhausted = len(due) == len(requests)

    @property
    def name(self) -> str:
        """The name in Locust's own statistics."""
        return f"{self.plan.workload} {self.plan.arrival}"

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

    def all_have_opened(self) -> None:
        """Note that every load process has prepared its share: what they share needs no name."""
        if self.admission:
            self.admission.remove_file()

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
        deadline_s = self.plan.warmup_s + self.plan.window_s
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

    def next_turn(self, seat: int, round_s: float | None = None) -> Turn | None:
        """Block until this user may send; return None when the trial has nothing more to send.

        Where the loads of several plans take turns, `round_s` is when the round began: it decides
        for all of them whether a closed loop ends, and whether what they send counts.
        """
        if self._intruding and seat == self._streams:
            assert isinstance(self.plan.arrival, Contended)
            return self._intrude(self.plan.arrival.every_s)
        due_s: float | None = None
        if rest_s := self.rest_s(seat):
            self._load_over.wait(rest_s)
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
            at = self.elapsed_s() if round_s is None else round_s
            if self._load_ends(at):
                return None
            counts = at >= self.plan.warmup_s and not self._closed(at)
        session = self._turns_left[seat]
        session.extend(() if session else islice(self._order, self.plan.turns))
        if not session:
            self._run_out()
            return None
        request = session.popleft()
        self._last_sent[seat] = request.index
        self.sent += 1
        self._counted += counts
        self._awaited += counts
        return Turn(request, due_s, counts)

    def rest_s(self, seat: int) -> float:
        """Return how long a user rests before its next turn: a session's gap, or to its first."""
        arrival, (number, of) = self.plan.arrival, self.plan.share
        if not isinstance(arrival, OfSessions):
            return 0.0
        if seat in self._last_sent:
            return arrival.gaps_s[self._last_sent[seat] % len(arrival.gaps_s)]
        return arrival.begins_s(number + seat * of)

    def _was_given_up(self) -> bool:
        return self.aborted is not None

    def _closed(self, at_s: float) -> bool:
        """Whether what a closed loop sends no longer counts.

        On a slow machine the window is extended until as many requests as there are users, and five
        in all, have been sent in it, and five long prompts where there is an intruder; and then
        until they have succeeded.
        """
        few = self._counted < self.plan.least_counted or self._long_prompts_left > 0
        return at_s >= self.window_end_s and (at_s >= self.plan.latest_s or not few)

    def _load_ends(self, at_s: float) -> bool:
        """Whether a closed loop sends nothing more.

        After the window its users go on, uncounted, until every request that counts has been
        answered, so that the last of them meet the same load as the first.
        """
        if not self._closed(at_s):
            return False
        if not self._awaited and self.report_none_awaited:
            self.report_none_awaited()
            self.report_none_awaited = None
        over = at_s >= self.plan.latest_s or not (self._awaited or self.awaited_elsewhere)
        if over:
            self._end_load()
        return over

    def _end_load(self) -> None:
        """Note how a closed loop's load ends, as its first user stops; wake a waiting intruder."""
        if not self._load_over.is_set():
            self.answered_under_load = not (self._awaited or self.awaited_elsewhere)
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
        """Note at once that a request has ended; give up when connections fail in a row.

        One that this client turned away says nothing of the connections. A server that is silent
        for too long has failed the request alone: it may be busy.
        """
        self._awaited -= ended.turn.counts
        if not ended.turned_away_here:
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


def turns(loads: Sequence[Load], seat: int) -> Iterator[tuple[Load, Turn]]:
    """Yield a user's turns until there are no more: of several loads one each, round after round.

    As many of each load count, unless one of them fails.
    """
    left = [*loads]
    while left:
        round_s = left[0].elapsed_s() if len(loads) > 1 else None
        for load in tuple(left):
            if turn := load.next_turn(seat, round_s):
                yield load, turn
            else:
                left.remove(load)


@dataclass(slots=True)
class Ended:
    """Holds a request that has ended, with its answer as it was read."""

    turn: Turn
    pieces: Pieces
    sent_s: float  # on the clock `now`, as is the end
    end_s: float
    error: str | None
    connection_failed: bool

    @property
    def turned_away_here(self) -> bool:
        """Whether it was not sent, as the client's own limits turned it away."""
        return (self.error or "").startswith(BY_CLIENT)
