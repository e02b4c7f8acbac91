"""Locust's master: shares trials out among the load processes, and writes their records."""

from __future__ import annotations

import json
import secrets
import sys
from typing import Any

import gevent
import gevent.fileobject
from locust.runners import STATE_MISSING, MasterRunner

from loadtests import records
from loadtests.exporter import Exporter
from loadtests.plan import Progress, TrialPlan, TrialSummary, merged_summary, total_progress
from loadtests.records import RequestRecord

WATCH_EVERY_S = 0.5


class Director:
    """Directs the workers: reads plans, shares them out, writes records, feeds Prometheus."""

    def __init__(self, runner: MasterRunner, exporter: Exporter) -> None:
        self.runner, self.exporter = runner, exporter
        self.plan: TrialPlan | None = None
        self.spools: list[records.Spool] = []  # of each plan
        self.shares: dict[str, TrialPlan] = {}  # worker -> its share of the trial under way
        self.ready: set[str] = set()
        self.answered: set[str] = set()  # workers whose requests that count have been answered
        self.done: dict[str, list[TrialSummary]] = {}  # of each plan
        self.gone: set[str] = set()  # this trial's workers that were lost, for good
        self.progress: dict[int, dict[str, Progress]] = {}  # of each plan, by worker
        self.team: set[str] = set()  # workers that have users
        runner.register_message("lab-ready", self.on_ready)
        runner.register_message("lab-answered", self.on_answered)
        runner.register_message("lab-records", self.on_records)
        runner.register_message("lab-done", self.on_done)
        runner.register_message("lab-failed", self.on_failed)

    def begin(self, plan: TrialPlan) -> None:
        """Begin a trial: send each living worker its share of the plan."""
        plan = shared(plan, trial=secrets.token_hex(8))
        self.plan, self.gone = plan, set()
        try:
            self.keep_records(plan)
        except OSError as error:  # a full disk, for one
            self.fail(f"the records could not be written: {error}")
            return
        self.exporter.begin(*plan.all_plans)
        workers = sorted(self.alive() & self.team)
        self.ready, self.answered, self.done, self.progress = set(), set(), {}, {}
        self.shares = {
            worker: shared(plan, share=(number, len(workers)))
            for number, worker in enumerate(workers)
        }
        for worker, share in self.shares.items():
            self.runner.send_message("lab-trial", share.model_dump_json(), client_id=worker)

    def keep_records(self, plan: TrialPlan) -> None:
        """Begin to keep the records of a trial."""
        for spool in self.spools:
            spool.close()
        self.spools = []
        for each in plan.all_plans:
            self.spools.append(records.Spool(each.records))

    def direct(self, users: int) -> None:
        """Wait for the users to start, then play the plans from the standard input."""
        while self.runner.user_count < users:
            gevent.sleep(0.02)
        # When a worker leaves, Locust would share the users out anew, amid a trial.
        self.runner.start = lambda *_, **__: None
        self.team = self.alive()
        users_each = users // len(self.team)
        gevent.spawn(self.watch)
        say(event="ready")
        for line in gevent.fileobject.FileObjectPosix(sys.stdin.fileno(), "rb"):
            plan = TrialPlan.model_validate_json(line)
            assert plan.arrival.seats <= users_each, (
                f"{plan.arrival} needs more than {users_each} users"
            )
            self.begin(plan)

    def is_late(self, msg: Any, trial: str) -> bool:
        """Whether a message is about another trial, or from a worker that was lost in this one."""
        under_way = self.plan is not None and trial == self.plan.trial
        return not under_way or msg.node_id not in self.shares.keys() - self.gone

    def fail(self, reason: str) -> None:
        """End the trial without a summary."""
        self.shares = {}
        say(event="failed", reason=reason)
        self.exporter.end()

    def on_failed(self, msg: Any, **_: object) -> None:
        """Take a worker's word that it cannot play its share."""
        if not self.is_late(msg, msg.data["trial"]):
            self.fail(msg.data["reason"])

    def watch(self) -> None:
        """Check regularly whether a worker has died, so that the trial does not wait for it."""
        while True:
            gevent.sleep(WATCH_EVERY_S)
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
        number = msg.data["number"]
        for fields in msg.data["records"]:
            record = RequestRecord.of(fields)
            self.exporter.observe(record, number)
            try:
                self.spools[number].add(record)
            except OSError as error:
                self.fail(f"the records could not be written: {error}")
                return
        of_plan = self.progress.setdefault(number, {})
        of_plan[msg.node_id] = Progress.model_validate_json(msg.data["progress"])
        self.exporter.progress(total_progress([*of_plan.values()]), number)

    def on_done(self, msg: Any, **_: object) -> None:
        """Take a worker's summaries, one of each plan."""
        if self.is_late(msg, msg.data["trial"]):
            return
        summaries = msg.data["summaries"]
        self.done[msg.node_id] = [TrialSummary.model_validate_json(one) for one in summaries]
        self.go_on()

    def end(self) -> None:
        """End the trial: write the records, and send the runner the combined summaries."""
        assert self.plan
        seats = {worker: share.seats for worker, share in self.shares.items()}
        self.shares = {}
        self.team -= self.gone
        for worker in self.gone:
            self.runner.send_message("quit", client_id=worker)
        self.exporter.end()
        summaries = [s for worker, s in self.done.items() if seats[worker]]
        if not summaries:
            say(event="failed", reason="the load processes that were to send have died")
            return
        lost_share = sum(seats[worker] for worker in self.gone) / sum(seats.values())
        merged = [merged_summary(of_plan, lost_share) for of_plan in zip(*summaries, strict=True)]
        try:
            for spool in self.spools:
                spool.pack()
        except OSError as error:
            say(event="failed", reason=f"the records could not be written: {error}")
        else:
            say(event="done", summaries=[summary.model_dump() for summary in merged])


def say(**event: object) -> None:
    """Tell the runner of an event, as a JSON line on the standard output."""
    print(json.dumps(event), flush=True)


def shared(plan: TrialPlan, **fields: Any) -> TrialPlan:
    """Return a plan with these fields, which those beside it get as well."""
    beside = tuple(other.model_copy(update=fields) for other in plan.beside)
    return plan.model_copy(update={**fields, "beside": beside})
