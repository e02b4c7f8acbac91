"""A load process, Locust's worker: its users play the shares of trials that the master sends it."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gevent
import gevent.event
import gevent.queue
from locust import User, task
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtests.connection import Connection
from loadtests.halting import one_awake
from loadtests.load import AFTER_ERROR_S, Ended, Load, Turn, now, turns
from loadtests.plan import TrialPlan, TrialSummary
from loadtests.records import RequestRecord
from loadtests.streaming import connect, records_of, stream

REPORT_EVERY_S = 0.5
LOOP_TICK_S = 0.02
PARSE_EVERY_S = 0.002
NEXT_TURN_S = 1e-6  # a pause of 0 may end before the event loop has looked at the sockets again
FEW_PIECES = 4  # of an answer that is parsed at once: a refusal is known before the next try


class WaitingRoom:
    """Holds a worker's users between trials, and starts and ends each trial with all of them."""

    def __init__(self) -> None:
        self.loads: tuple[Load, ...] = ()  # of the plans of a trial, which are played together
        self.opened = gevent.event.Event()
        self.ready_users = 0
        self.users_left = 0
        self.seats = itertools.count()
        self.cpu_s = 0.0  # CPU time of this process when the present trial's clock started

    def play(self, loads: tuple[Load, ...], meet: Callable[[], None]) -> None:
        """Play one trial to its end: connect every user, start the clock, wait for the last.

        `meet` waits for the other load processes before the clock starts.
        """
        users = loads[0].users  # as many of each
        self.ready_users = self.users_left = 0
        self.go = gevent.event.Event()
        self.everyone_ready, self.everyone_left = gevent.event.Event(), gevent.event.Event()
        self.loads = loads
        opened, self.opened = self.opened, gevent.event.Event()
        opened.set()
        if users:
            self.everyone_ready.wait()
        gc.collect()
        gc.disable()
        try:
            meet()
            self.cpu_s = time.process_time()
            for load in loads:
                load.start()
            self.go.set()
            if users:
                self.everyone_left.wait()
        finally:
            gc.enable()
        self.loads = ()

    def ready(self) -> None:
        """Say that this user is connected, and wait for the trial's start."""
        assert self.loads
        self.ready_users += 1
        if self.ready_users == self.loads[0].users:
            self.everyone_ready.set()
        self.go.wait()

    def leave(self) -> None:
        """Say that this user has nothing more to send; the last one ends the trial."""
        assert self.loads
        self.users_left += 1
        if self.users_left == self.loads[0].users:
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
        waiting_room.opened.wait()
        loads = waiting_room.loads
        if not loads or self.seat >= loads[0].users:
            return
        connections = {load: connect(load) for load in loads}
        waiting_room.ready()
        stopped = False
        try:
            with one_awake([load.plan.pids for load in loads]) as wake:
                for load, turn in turns(loads, self.seat):
                    wake(loads.index(load))
                    self._send(turn, load, connections)
                    if load.plan.rest_s:
                        gevent.sleep(load.plan.rest_s)
        except gevent.GreenletExit:  # this process ends: its share is lost, not played to its end
            stopped = True
            raise
        finally:
            for connection in connections.values():
                connection.close()
            if not stopped:
                waiting_room.leave()

    def _send(self, turn: Turn, load: Load, connections: dict[Load, Connection]) -> None:
        """Send a request, and read and keep what comes."""
        ended = stream(connections[load], turn, load)
        load.end(ended)
        if load.plan.reconnects:
            connections[load].close()
            connections[load] = connect(load)
        if ended.error is None and len(ended.pieces) > FEW_PIECES:
            load.unparsed.put(ended)
        elif parse(ended, load, self.environment).error:
            gevent.sleep(AFTER_ERROR_S)


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
        gevent.sleep(PARSE_EVERY_S if load.unparsed.qsize() < load.users else NEXT_TURN_S)


def play_trial(environment: Environment, msg: Any, **_: object) -> None:
    """Play a trial on a worker; tell the master where that fails."""
    plan, runner = TrialPlan.model_validate_json(msg.data), environment.runner
    assert isinstance(runner, WorkerRunner)
    try:
        play_plan(environment, runner, plan)
    except Exception as failure:
        reason = f"a load process failed: {type(failure).__name__}: {failure}"
        runner.send_message("lab-failed", {"trial": plan.trial, "reason": reason})
        raise


def play_plan(environment: Environment, runner: WorkerRunner, plan: TrialPlan) -> None:
    """Play a trial; send the records as they come and the summary at the end."""
    loads = tuple(map(Load, plan.all_plans))
    lags: list[float] = []
    parsers = [gevent.spawn(parse_in_turn, load, environment) for load in loads]
    helpers = [gevent.spawn(watch_loop, loads, lags), gevent.spawn(report_forever, runner, loads)]
    for load in loads:
        if load.awaited_elsewhere:
            load.report_none_awaited = partial(runner.send_message, "lab-answered", plan.trial)
    try:
        waiting_room.play(loads, partial(meet, runner, loads))
    finally:
        all_have_opened(loads)  # also where this process ends before they have met
    gevent.killall([*helpers, *parsers])
    for load in loads:
        while load.unparsed.qsize():
            parse(load.unparsed.get(), load, environment)
            gevent.sleep(NEXT_TURN_S)  # for the heartbeats, or the master gives this process up
    cpu = time.process_time() - waiting_room.cpu_s
    report(runner, loads)
    lags.sort()
    summaries = [summary_of(load, lags, cpu).model_dump_json() for load in loads]
    runner.send_message("lab-done", {"trial": plan.trial, "summaries": summaries})


def summary_of(load: Load, lags_s: list[float], cpu_s: float) -> TrialSummary:
    """Sum up one load of a trial, with the sorted lags and the CPU time of the whole process."""
    return TrialSummary(
        started_unix_s=load.started_unix_s,
        started_monotonic_s=load.t0,
        window_s=(load.window_start_s, load.window_end_s),
        answered_under_load=load.answered_under_load,
        planned=load.planned,
        sent=load.sent,
        exhausted=load.exhausted,
        loop_lag_p99_s=lags_s[int(0.99 * (len(lags_s) - 1))] if lags_s else 0.0,
        loop_lag_max_s=lags_s[-1] if lags_s else 0.0,
        cpu_s=cpu_s,
        aborted=load.aborted,
    )


gate = gevent.event.Event()


def meet(runner: WorkerRunner, loads: Sequence[Load]) -> None:
    """Say that this load process is ready, and wait until all are."""
    gate.clear()
    runner.send_message("lab-ready", loads[0].plan.trial)
    gate.wait()
    all_have_opened(loads)


def all_have_opened(loads: Sequence[Load]) -> None:
    """Note that every load process has prepared its share."""
    for load in loads:
        load.all_have_opened()


def stop_waiting_for_others() -> None:
    """Let this load process's users stop: the counted requests of all processes are answered."""
    for load in waiting_room.loads:
        load.awaited_elsewhere = False


def watch_loop(loads: Sequence[Load], lags: list[float]) -> None:
    """Measure how late the event loop wakes a greenlet that asked to sleep 20 ms."""
    while True:
        before = now()
        gevent.sleep(LOOP_TICK_S)
        lags.append(max(0.0, now() - before - LOOP_TICK_S))
        for load in loads:
            load.loop_lag_s = max(load.loop_lag_s or 0.0, lags[-1])


def report(runner: WorkerRunner, loads: Sequence[Load]) -> None:
    """Send the master the records since the last report, and the progress."""
    for number, load in enumerate(loads):
        fresh, load.fresh = load.fresh, []
        message = {
            "trial": load.plan.trial,
            "number": number,  # of its plans
            "records": [r.fields for r in fresh],
            "progress": load.progress().model_dump_json(),
        }
        runner.send_message("lab-records", message)


def report_forever(runner: WorkerRunner, loads: Sequence[Load]) -> None:
    """Report regularly, until the trial ends."""
    while True:
        gevent.sleep(REPORT_EVERY_S)
        report(runner, loads)


def listen(runner: WorkerRunner) -> None:
    """Take the master's messages from now on."""
    runner.register_message("lab-trial", play_trial, concurrent=True)
    runner.register_message("lab-go", lambda **_: gate.set())
    runner.register_message("lab-enough", lambda **_: stop_waiting_for_others())
