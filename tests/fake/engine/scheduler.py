"""The schedulers: continuous batching, or each request by the program that it brought."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

from tests.fake.engine.alarm import Alarm
from tests.fake.engine.kv_cache import KVCache
from tests.fake.engine.law import Law
from tests.fake.engine.metrics import Metrics
from tests.fake.engine.request import Request, Step

MOST_OVERDUE = 16  # chunks that a programmed stream gets together: others wait meanwhile
Emit = Callable[[Request, int, Step], int]
"""Sends a request a chunk of so many tokens, or of what is left; returns how many."""


class Batching:
    """Continuous batching: steps, one after another, as long as there is work."""

    def __init__(
        self,
        options: argparse.Namespace,
        alarm: Alarm,
        cache: KVCache,
        metrics: Metrics,
        emit: Emit,
    ) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._options, self._alarm, self._cache = options, alarm, cache
        self._metrics, self._emit = metrics, emit
        self._law = Law(options)
        self._stepping = False
        self._stall_s: float = options.stall_s

    def arrive(self, request: Request) -> None:
        self.waiting.append(request)
        if self._options.scheduling_policy == "priority":
            self.waiting = deque(sorted(self.waiting, key=lambda r: (r.priority, r.received)))
        if not self._stepping:
            self._begin(request.received)

    def drop(self, request: Request) -> None:
        (self.waiting if request in self.waiting else self.running).remove(request)

    def _begin(self, start: float) -> None:
        """Begins a step; where its loop is late, `start` may lie before what has arrived since."""
        if self.waiting and not self.running:
            start = max(start, self.waiting[0].received)
        preempted, work = self._preempt(), list[tuple[Request, int]]()
        budget: int = self._options.max_num_batched_tokens
        for request in self.running:
            if new := min(request.left, budget):
                work.append((request, new))
                budget = max(0, budget - new - self._options.guesses * (request.left == 1))
        if not preempted:
            work += self._admit(start, budget)
        self._stepping = bool(work)
        if work:
            prefilled = sum(new for request, new in work if new > 1 or not request.times)
            due = start + self._law.step_length_s(start, len(work), prefilled)
            step = Step(due, len(work), prefilled)
            self._alarm.at(step.due, partial(self._end, step, work))

    def _preempt(self) -> bool:
        """Makes room for the next tokens of those that came first."""
        preempted = False
        while len(self.running) > 1 and self._cache.filled(self.running) > self._cache.blocks:
            request = self.running.pop()
            request.computed, preempted = 0, True
            self.waiting.appendleft(request)
            self._metrics.counters["num_preemptions_total"] += 1
        return preempted

    def _admit(self, start: float, budget: int) -> list[tuple[Request, int]]:
        """The waiting ones that budget, memory and adapter slots have room for, and their tokens.

        One without a slot is passed over, as in vLLM; the others keep their order. One that came
        after the start waits for the next step.
        """
        options, admitted, skipped = self._options, list[tuple[Request, int]](), deque[Request]()
        while self.waiting and len(self.running) < options.max_num_seqs and budget:
            request = self.waiting[0]
            if request.received > start:
                break
            room = self._cache.blocks - self._cache.kept_free
            if self.running and (
                self._cache.filled([*self.running, request]) > room
                or (request.length > budget and not options.enable_chunked_prefill)
            ):
                break
            self.waiting.popleft()
            adapters = {r.adapter for r in (*self.running, request)} - {None}
            if len(adapters) > options.max_loras:
                skipped.append(request)
                continue
            if not request.scheduled:
                request.scheduled = start
                request.n_cached = request.computed = self._cache.look_up(request)
            new = min(request.left, budget)
            budget -= new
            admitted.append((request, new))
            self.running.append(request)
        self.waiting.extendleft(reversed(skipped))
        return admitted

    def _end(self, step: Step, work: Sequence[tuple[Request, int]]) -> None:
        generated = 0
        here = [(request, new) for request, new in work if not request.finish]
        for request, new in here:
            request.computed += new
            if request.left == 0:
                generated += self._emit(request, self._chunk_tokens(request), step)
                request.computed = request.length - 1
        if here:  # else all of them have gone away meanwhile
            self._metrics.observe("iteration_tokens_total", step.prefilled + generated)
        self.running = [request for request in self.running if not request.finish]
        sent = self._metrics.counters["generation_tokens_total"]
        if self._stall_s and 0 < self._options.stall_after <= sent:
            resume, self._stall_s = step.due + self._stall_s, 0.0  # once
            self._alarm.at(resume, partial(self._begin, resume))
        else:
            self._begin(step.due)

    def _chunk_tokens(self, request: Request) -> int:
        """Tokens of its next chunk; all that were accepted count, even past the answer's end."""
        if not request.times:
            return 1
        if not (guesses := self._options.guesses):
            return int(self._options.tokens_per_chunk)
        accepted = self._law.accepted(guesses)
        self._metrics.drafted(accepted)
        return 1 + accepted


class Programmed:
    """No scheduler: every request keeps to the schedule that it brought."""

    def __init__(
        self, options: argparse.Namespace, alarm: Alarm, metrics: Metrics, emit: Emit
    ) -> None:
        self.waiting: Sequence[Request] = ()
        self.running: set[Request] = set()
        self._options, self._alarm, self._metrics, self._emit = options, alarm, metrics, emit

    def arrive(self, request: Request) -> None:
        options, truth = self._options, request.truth
        request.scheduled = request.received
        self.running.add(request)
        first: float = request.received + truth.get("ttft_s", options.step_s) * options.slowdown
        gap_s: float = truth.get("gap_s", options.step_s) * options.slowdown
        stall_s: float = truth.get("stall_s", 0.0) * options.slowdown
        size = max(1, int(truth.get("tokens_per_chunk", options.tokens_per_chunk)))
        middle = -(-request.n_out // size) // 2

        def due(i: int) -> float:
            return first + i * gap_s + stall_s * (i >= middle)

        self._alarm.at(due(0), partial(self._chunk, request, due, size))

    def drop(self, request: Request) -> None:
        self.running.remove(request)

    def _chunk(self, request: Request, due: Callable[[int], float], size: int) -> None:
        if request.finish:
            return  # it went away
        now, first = time.monotonic(), len(request.times)
        with request.connection.at_once() if due(first + 1) <= now else nullcontext():
            for i in range(first, first + MOST_OVERDUE):  # all that are due, where it is behind
                step = Step(due(i), len(self.running), 0 if i else len(request.prompt))
                sent = self._emit(request, size, step)
                self._metrics.observe("iteration_tokens_total", step.prefilled + sent)
                if request.sent == request.n_out:
                    self.running.remove(request)
                    return
                if due(i + 1) > now:
                    break
        self._alarm.at(due(i + 1), partial(self._chunk, request, due, size))
