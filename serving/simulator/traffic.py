"""Clients in virtual time: when they send, and what they would observe.

The rules are those of the load generator. In a closed loop a user sends its next request when its
answer is complete, or a gap after it, and goes on after the window, uncounted, until every request
that counts has been answered; the next wave starts when all answers of the last one are complete;
the window of both is held open until enough requests count. An open loop keeps its schedule. The
delays between client and engine are constants, not simulated: see `Delays`.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from serving.simulator.ngram_acceptance import Copied


class VirtualServer(Protocol):
    """The engine that traffic is played on: it has a clock, takes requests and runs steps."""

    @property
    def now_s(self) -> float: ...

    @property
    def busy(self) -> bool: ...

    def add(self, request_id: str, prompt: Prompt) -> bool:
        """Hand a request to the engine now; return False where it turns the request away."""

    def step(self, before_s: float = ...) -> dict[str, tuple[int, bool]]:
        """Run one step; return request -> (new tokens, whether they were its last).

        A server of several engines may instead stop at `before_s`, where the next request comes.
        """

    def wait_until(self, at_s: float) -> None:
        """Let an idle engine's clock move on."""


class Delays(BaseModel, frozen=True, extra="forbid"):
    """Seconds outside the engine's steps, fixed before anything is measured.

    Measured with vLLM 0.32 behind Locust on two cores: tokenizing, HTTP and the transfer to the
    engine's process take some milliseconds a request, one request after another (one thread does
    it), and a client takes about as long from an answer to its next request.
    """

    request_s: float = 0.003  # from the send until the engine may schedule it
    serial_s: float = 0.002  # the part of request_s during which no other request is prepared
    response_s: float = 0.001  # from the end of a step until the client has the token
    client_s: float = 0.003  # from the end of an answer until the same user's next send
    refused_s: float = 0.1  # so much later if it was turned away

    def of_servers(self, servers: int) -> Delays:
        """Return those of servers that prepare requests side by side, each in turn."""
        return self.model_copy(update={"serial_s": self.serial_s / servers})


class Traffic(BaseModel, frozen=True, extra="forbid"):
    """When requests are sent; times are seconds from the trial's start."""

    kind: Literal["closed", "waves", "open"]
    users: int = 1  # in a closed loop, or in each wave
    begins_s: tuple[float, ...] = ()  # of each user of a closed loop; none: all at 0
    # of a closed loop, from the answer to request 0, 1 and so on, in a cycle, until the same
    # user's next send
    gaps_s: tuple[float, ...] = (0.0,)
    turns: int = 1  # requests in a row that are one user's
    schedule_s: tuple[float, ...] = ()  # of an open loop
    most_in_flight: int | None = None  # in an open loop: what is due waits beyond them
    intruder_every_s: float | None = None  # beside a closed loop: one of `intruders` in each period
    warmup_s: float
    window_s: float
    least_counted: int = 1  # requests, or one a user, that the window is held open for
    least_intruders: int = 0  # and as many of `intruders`
    most_held_open_s: float = 120.0  # after the warm-up
    # limits that the client holds, by the rule of `VirtualEngine.add`; None: no limit
    most_requests: int | None = None  # unfinished
    most_prompt_tokens: int | None = None  # of prompts without a first token


class Prompt(BaseModel, frozen=True, extra="forbid"):
    """A request as the engine receives it."""

    index: int
    token_ids: tuple[int, ...]
    output_tokens: int
    adapter: str | None = None
    priority: int = 0
    salt: str | None = None  # under which its blocks are cached
    intruder: bool = False  # beside the users of a closed loop: see `Traffic`
    compile_s: float = 0.0  # until the structure of its answer is compiled
    choices: int = 1  # answers that it asks for, each a request of its own to the engine
    copied: Copied = ()  # what a lookup of n-grams finds in its answer, where that is known


@dataclass(slots=True, kw_only=True)
class VirtualAnswer:
    """An answer as the client would observe it; chunks are (arrival in seconds, tokens).

    It is no model by itself, as a play may hold a hundred thousand: a fifth of the memory.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    index: int
    asked_tokens: int
    prompt_tokens: int
    choice: int | None = None  # which answer of its request, where that asked for several
    scheduled_s: float | None
    sent_s: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    in_window: bool
    turned_away_s: float | None = None  # when it was refused, where it was


class _Admission:
    """What a client that limits the queue knows to be in the engine, at each of its sends.

    A step that is under way at a send has not told the client yet what it ends.
    """

    def __init__(self, traffic: Traffic) -> None:
        self.most, self.most_tokens = traffic.most_requests, traffic.most_prompt_tokens
        self.unfinished = 0
        self.prefilling: dict[str, int] = {}  # answer -> its prompt's tokens, before its first
        self.received: deque[tuple[float, str, bool]] = deque()  # (when, answer, its last token)

    def admits(self, requests: int, at_s: float) -> bool:
        """Tell whether so many more may be sent at this time."""
        while self.received and self.received[0][0] <= at_s:
            _, name, last = self.received.popleft()
            self.prefilling.pop(name, None)
            self.unfinished -= last
        over = self.most is not None and self.unfinished + requests > self.most
        prompt_tokens = sum(self.prefilling.values())
        return not over and (self.most_tokens is None or prompt_tokens < self.most_tokens)

    def sent(self, name: str, prompt_tokens: int) -> None:
        """Count one answer of a request that is sent."""
        self.unfinished += 1
        self.prefilling[name] = prompt_tokens


class Play(BaseModel, extra="forbid"):
    """A trial's answers, and when its measured window began and ended."""

    answers: list[VirtualAnswer]
    window_s: tuple[float, float]
    answered_under_load: bool  # a closed loop's users went on until all that counts was answered


def play(
    server: VirtualServer,
    traffic: Traffic,
    prompts: Iterable[Prompt],
    intruders: Iterable[Prompt] = (),
    delays: Delays | None = None,
    ends_only: bool = False,
) -> Play:
    """Play a trial until its last answer, from the time that the server's clock shows.

    With `ends_only` an answer keeps its first chunk and joins all later ones into its last, which
    is enough for TTFT and TPOT and keeps a hundred thousand answers small.
    """
    return _Trial(server, traffic, prompts, intruders, delays or Delays(), ends_only).run()


class _Trial:
    def __init__(
        self,
        server: VirtualServer,
        traffic: Traffic,
        prompts: Iterable[Prompt],
        intruders: Iterable[Prompt],
        delays: Delays,
        ends_only: bool,
    ) -> None:
        self.server, self.traffic, self.delays = server, traffic, delays
        self.ends_only = ends_only
        self.prompts: Iterator[Prompt] = iter(prompts)
        self.intruders = iter(intruders)
        self.start_s = server.now_s
        self.answers: dict[str, VirtualAnswer] = {}
        self.unanswered: dict[int, int] = {}  # request, by its order -> answers it waits for
        self.request_of: dict[str, int] = {}  # answer -> its request
        self.deliveries: list[tuple[float, int, str, Prompt]] = []  # (when, order, name, prompt)
        # (when, order, due, intruder, turns left of the user's session)
        self.sends: list[tuple[float, int, float | None, bool, Sequence[Prompt]]] = []
        self.turns_left: dict[int, Sequence[Prompt]] = {}  # after the request of this index
        self.order = 0
        self.free_s = 0.0  # when the server has prepared all earlier requests
        self.window = [traffic.warmup_s, traffic.warmup_s + traffic.window_s]
        self.counted = self.answered = self.outstanding = 0
        self.waiting: deque[float | None] = deque()  # when each was due that waits for its turn
        self.least_counted = max(traffic.users, traffic.least_counted)
        self.intruders_left = traffic.least_intruders if traffic.intruder_every_s else 0
        self.intruder_answers_left = self.intruders_left
        self.awaited = 0  # requests that count and have not been answered
        self.load_over = self.answered_under_load = False  # of a closed loop
        limited = (traffic.most_requests, traffic.most_prompt_tokens) != (None, None)
        self.admission = _Admission(traffic) if limited else None

    @property
    def now_s(self) -> float:
        return self.server.now_s - self.start_s

    def _is_due(self, at_s: float) -> bool:
        """Tell whether a time has come, on the server's clock.

        On the trial's own clock, a difference, what the server waited for may never come: after
        some hours the rounding of one clock is coarser than any tolerance on the other.
        """
        return self.start_s + at_s <= self.server.now_s + 1e-12

    def run(self) -> Play:
        self._begin()
        while True:
            self._send_what_is_due()
            while self.deliveries and self._is_due(self.deliveries[0][0]):
                _, _, name, prompt = heapq.heappop(self.deliveries)
                if not self.server.add(name, prompt):
                    self._turned_away(name)
            next_times_s = [heap[0][0] for heap in (self.sends, self.deliveries) if heap]
            if self.server.busy:
                self._receive(self.server.step(self.start_s + min(next_times_s, default=math.inf)))
                continue
            if not next_times_s:
                break
            self.server.wait_until(self.start_s + max(min(next_times_s), self.now_s))
        return Play(
            answers=[*self.answers.values()],
            window_s=(self.window[0], self.window[1]),
            answered_under_load=self.answered_under_load,
        )

    # sending

    def _begin(self) -> None:
        traffic = self.traffic
        if traffic.kind == "open":
            for due_s in traffic.schedule_s:
                self._plan(due_s, due_s)
        elif traffic.kind == "waves":
            self.window[0] = float("inf")  # set by the first wave that counts
            self._wave(0.0)
        else:
            for at_s in traffic.begins_s or (0.0,) * traffic.users:
                self._plan(at_s)
        if traffic.intruder_every_s:
            self.intruder_due_s = traffic.intruder_every_s
            self._plan(self.intruder_due_s, intruder=True)

    def _plan(
        self,
        at_s: float,
        due_s: float | None = None,
        intruder: bool = False,
        session: Sequence[Prompt] = (),
    ) -> None:
        self.order += 1
        heapq.heappush(self.sends, (at_s, self.order, due_s, intruder, session))

    def _send_what_is_due(self) -> None:
        while self.sends and self._is_due(self.sends[0][0]):
            at_s, _, due_s, intruder, session = heapq.heappop(self.sends)
            if self.traffic.kind == "closed" and self._load_ends(at_s, intruder):
                continue
            most = self.traffic.most_in_flight
            if most is not None and len(self.unanswered) >= most:
                self.waiting.append(due_s)
                continue
            turns = 1 if intruder else self.traffic.turns
            session = session or [*islice(self.intruders if intruder else self.prompts, turns)]
            if not session:
                if intruder:
                    self.intruders_left = 0
                else:
                    self._run_out(at_s)
                continue
            prompt, *left = session
            if left:
                self.turns_left[prompt.index] = left
            self._send(prompt, at_s, due_s, intruder)

    def _send(self, prompt: Prompt, at_s: float, due_s: float | None, intruder: bool) -> None:
        counts = at_s >= self.traffic.warmup_s
        if self.traffic.kind == "closed":
            counts = counts and not self._closed(at_s)
        if intruder:
            self.intruders_left -= counts
        else:
            self.counted += counts
        self.awaited += counts
        admitted = not self.admission or self.admission.admits(prompt.choices, at_s)
        if admitted:
            self.free_s = max(self.free_s, at_s) + self.delays.serial_s
        delivered_s = max(self.free_s, at_s + self.delays.request_s) + prompt.compile_s
        request = self.order = self.order + 1
        self.unanswered[request] = prompt.choices
        refused: list[str] = []
        for choice in range(prompt.choices):
            name = f"{prompt.index}-{'i' if intruder else 'r'}-{self.order}-{len(self.answers)}"
            self.request_of[name] = request
            self.answers[name] = VirtualAnswer(
                index=prompt.index, asked_tokens=prompt.output_tokens,
                prompt_tokens=len(prompt.token_ids), scheduled_s=due_s, sent_s=at_s,
                in_window=counts, choice=choice if prompt.choices > 1 else None,
            )  # fmt: skip
            self.order += 1
            if not admitted:
                self.answers[name].turned_away_s = at_s
                refused.append(name)
                continue
            if self.admission:
                self.admission.sent(name, len(prompt.token_ids))
            heapq.heappush(self.deliveries, (delivered_s, self.order, name, prompt))
        if intruder and self.traffic.intruder_every_s:
            self.intruder_name = name
        for name in refused:
            self._answered(name, self.answers[name], at_s)

    @property
    def _latest_s(self) -> float:
        return self.traffic.warmup_s + self.traffic.most_held_open_s

    def _closed(self, at_s: float) -> bool:
        """Tell whether a closed loop's window is over: it stays open until enough count."""
        few = self.counted < self.least_counted or self.intruders_left > 0
        return at_s >= self.window[1] and (at_s >= self._latest_s or not few)

    def _load_ends(self, at_s: float, intruder: bool) -> bool:
        """Tell whether a closed loop sends nothing more; its intruder goes on as its users do."""
        if intruder:
            return self.load_over
        over = self._closed(at_s) and (at_s >= self._latest_s or not self.awaited)
        if over:
            self._end_load()
        return over

    def _end_load(self) -> None:
        """Note how a closed loop's load ends, as its first user stops."""
        if not self.load_over:
            self.load_over, self.answered_under_load = True, not self.awaited

    def _run_out(self, at_s: float) -> None:
        """End the window where the prompts have run out, unless it was over before."""
        if self.traffic.kind == "closed":
            self._end_load()
            if self._closed(at_s):
                return
        self.window[1] = min(self.window[1], max(at_s, self.window[0]))

    def _wave(self, at_s: float) -> None:
        """Send a wave, unless enough have been sent, or fewer prompts are left than it takes."""
        traffic = self.traffic
        deadline_s = traffic.warmup_s + traffic.window_s
        late = at_s >= self._latest_s and self.counted
        if at_s >= deadline_s and (late or self.counted >= self.least_counted):
            self.window[1] = at_s
            return
        wave = list(islice(self.prompts, traffic.users))
        if len(wave) < traffic.users:
            self.window = [min(self.window[0], at_s), at_s]
            return
        self.prompts = chain(wave, self.prompts)
        if at_s >= traffic.warmup_s:
            self.window[0] = min(self.window[0], at_s)
        self.outstanding = traffic.users
        for _ in range(traffic.users):
            self._plan(at_s)

    # receiving

    def _receive(self, outputs: dict[str, tuple[int, bool]]) -> None:
        at_s = self.now_s + self.delays.response_s
        for name, (tokens, last) in outputs.items():
            answer = self.answers[name]
            if self.admission and (tokens or last):
                self.admission.received.append((at_s, name, last))
            if tokens and self.ends_only and len(answer.chunks) > 1:
                answer.chunks[-1] = (at_s, answer.chunks[-1][1] + tokens)
            elif tokens:
                answer.chunks.append((at_s, tokens))
            if last:
                self._answered(name, answer, at_s)

    def _turned_away(self, name: str) -> None:
        answer, at_s = self.answers[name], self.now_s + self.delays.response_s
        answer.turned_away_s = at_s
        self._answered(name, answer, at_s)

    def _answered(self, name: str, answer: VirtualAnswer, at_s: float) -> None:
        """Go on where this was the last answer that its request was waiting for."""
        request = self.request_of.pop(name)
        self.unanswered[request] -= 1
        if self.unanswered[request]:
            return
        del self.unanswered[request]
        refused = answer.turned_away_s is not None
        traffic = self.traffic
        next_s = at_s + self.delays.client_s + refused * self.delays.refused_s
        self.awaited -= answer.in_window
        if traffic.kind == "open":
            if self.waiting:
                self._plan(next_s, self.waiting.popleft())
            return
        if name == getattr(self, "intruder_name", None):  # due a period after the last was
            self.intruder_answers_left -= answer.in_window
            if answer.in_window and self.intruder_answers_left == 0:
                self.window[1] = max(self.window[1], at_s)
            self.intruder_due_s += traffic.intruder_every_s or 0
            self._plan(max(next_s, self.intruder_due_s), None, True)
        elif traffic.kind == "waves":
            self.outstanding -= 1
            if not self.outstanding:
                self._wave(next_s)
        else:
            if answer.in_window:
                self.answered += not refused
                if self.answered == self.least_counted:
                    self.window[1] = max(self.window[1], at_s)
            session = self.turns_left.pop(answer.index, ())
            gap_s = traffic.gaps_s[answer.index % len(traffic.gaps_s)]
            self._plan(next_s + gap_s, session=session)
