"""A load process, Locust's worker: its users play the shares of trials that the master sends it."""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.queue
from locust import User, task
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtests import load_workers
from loadtests.event_lines import say
from loadtests.load import AFTER_ERROR_S, Ended, Load, now
from loadtests.plan import TrialPlan, TrialSummary
from loadtests.records import RequestRecord
from loadtests.streaming import connect, records_of, stream

REPORT_EVERY_S = 0.5
LOOP_TICK_S = 0.02
MASTER_TIMEOUT_S = 60.0  # of silence, on another machine
PARSE_EVERY_S = 0.002
NEXT_TURN_S = 1e-6  # a pause of 0 may end before the event loop has looked at the sockets again
FEW_PIECES = 4  # of an answer that is parsed at once: a refusal is known before the next try


class WaitingRoom:
    """Holds a worker's users between trials, and starts and ends each trial with all of them."""

    def __init__(self) -> None:
        self.load: Load | None = None
        self.opened = gevent.event.Event()
        self.ready_users = 0
        self.users_left = 0
        self.seats = itertools.count()
        self.cpu_s = 0.0  # CPU time of this process when the present trial's clock started

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
        self.cpu_s = time.process_time()
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
                    gevent.sleep(AFTER_ERROR_S)
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
        gevent.sleep(PARSE_EVERY_S if load.unparsed.qsize() < load.users else NEXT_TURN_S)


requests_text: gevent.queue.Queue[dict[str, str]] = gevent.queue.Queue()


def fetched(plan: TrialPlan, runner: WorkerRunner) -> Load:
    """Prepare a share whose requests are on the master's machine."""
    runner.send_message("lab-fetch", plan.trial)
    while (message := requests_text.get())["trial"] != plan.trial:
        pass
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="labs-requests-") as file:
        file.write(message["text"])
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
        load.all_have_opened()  # the web UI has one load process
        load.start()
        waiting_room.load = load
        waiting_room.opened.set()
        gevent.spawn(report_forever, runner, load)
        gevent.spawn(parse_in_turn, load, environment)
        return
    lags: list[float] = []
    parser = gevent.spawn(parse_in_turn, load, environment)
    helpers = [gevent.spawn(watch_loop, load, lags), gevent.spawn(report_forever, runner, load)]
    if load.awaited_elsewhere:
        load.report_none_awaited = partial(runner.send_message, "lab-answered", plan.trial)
    try:
        waiting_room.play(load, partial(meet, runner, load))
    finally:
        load.all_have_opened()  # also where this process ends before they have met
    gevent.killall(helpers)
    parser.kill()
    while load.unparsed.qsize():
        parse(load.unparsed.get(), load, environment)
        gevent.sleep(NEXT_TURN_S)  # for the heartbeats, or the master gives this process up
    cpu = time.process_time() - waiting_room.cpu_s
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


def meet(runner: WorkerRunner, load: Load) -> None:
    """Say that this load process is ready, and wait until all are."""
    gate.clear()
    runner.send_message("lab-ready", load.plan.trial)
    gate.wait()
    load.all_have_opened()


def stop_waiting_for_others() -> None:
    """Let this load process's users stop: the counted requests of all processes are answered."""
    if waiting_room.load:
        waiting_room.load.awaited_elsewhere = False


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
    message = {
        "trial": load.plan.trial,
        "records": [vars(r) for r in fresh],
        "progress": load.progress().model_dump_json(),
    }
    runner.send_message("lab-records", message)


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


def listen(runner: WorkerRunner, remote: bool) -> None:
    """Take the master's messages from now on; `remote` says that it is on another machine."""
    code = load_workers.code_sha256()
    runner.register_message("lab-trial", partial(play_trial, remote=remote), concurrent=True)
    runner.register_message("lab-requests", lambda msg, **_: requests_text.put(msg.data))
    runner.register_message("lab-code", lambda **_: runner.send_message("lab-code", code))
    runner.register_message("lab-go", lambda **_: gate.set())
    runner.register_message("lab-enough", lambda **_: stop_waiting_for_others())
    if remote:
        runner.register_message("lab-refused", lambda msg, **_: refuse_to_go_on(runner, msg.data))
        gevent.spawn(watch_master, runner)
        say(event="joined")
