"""A replica that joins while more comes than is served: who answered, and what was lost."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from labs.harness.analysis.probes import ProbedEngine
from labs.harness.spec.lab import Variant
from labs.scale_out import probes
from loadtests.prompts import Writer
from loadtests.workload import Fixed
from serving import metrics
from serving.engines.base import EngineError, Server
from serving.engines.flags import Flags
from serving.engines.routed import Routed
from serving.metrics import Snapshot
from tests.unit.answering import Answering, answered_by
from tests.unit.builders import make_lab, make_workload
from tests.unit.test_prompts import words

ANSWER_S = 0.02  # of a replica, which has one request at a time


class Router(Answering):
    """Sends each request in turn to one of the replicas that it knows; every ninth is lost."""

    replicas: list[Replica]
    lock = threading.Lock()
    sent = 0

    def do_POST(self) -> None:
        self.asked()
        with self.lock:
            Router.sent += 1
            number = self.sent
        if number % 9 == 0:
            return self.reply({"error": "busy"}, 503)
        replica = self.replicas[number % len(self.replicas)]
        replica.counts["waiting"] += 1
        with replica.lock:
            time.sleep(ANSWER_S)
        replica.counts["waiting"] -= 1
        replica.counts["completed"] += 1
        self.reply(b'data: {"choices": []}\n\ndata: [DONE]\n\n')


class Replica(Server):
    """A replica that only counts."""

    age_s = 0.5

    def __init__(self) -> None:
        super().__init__("another", "base", "http://another")
        self.counts, self.lock, self.stopped = Counter[str](), threading.Lock(), False

    def snapshot(self) -> Snapshot:
        counted = {metrics.REQUESTS: self.counts["completed"]}
        return Snapshot({**counted, metrics.WAITING: self.counts["waiting"]})

    def stop(self) -> None:
        self.stopped = True


class Behind(Routed):
    """A router and its first replica, which no test has started; others have no compiler."""

    def __init__(self, url: str, first: Replica) -> None:
        Server.__init__(self, "one", "base", url)
        self.first, self.others = first, list[Replica]()
        self.dismissed = list[str]()

    def snapshot(self) -> Snapshot:
        return self.first.snapshot()

    def another(self, flags: Flags, env: Mapping[str, str]) -> Any:
        if flags.get("enforce-eager") is False:
            raise EngineError("no compiler")
        self.others.append(Replica())
        return self.others[-1]

    def admit(self, url: str) -> None:
        Router.replicas.append(self.others[0])

    def dismiss(self, url: str) -> None:
        self.dismissed.append(url)


def test_who_answered_and_what_was_lost_is_counted_of_every_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "CAPACITY_S", 0.5)
    monkeypatch.setattr(probes, "AFTER_S", 0.5)
    first = Replica()
    Router.replicas, Router.sent = [first], 0
    lab = make_lab(
        variants=(variant := Variant(name="one", flags={}),),
        flags={"max-num-seqs": 2},
        workloads=(make_workload(prompt_tokens=Fixed(tokens=40)),),
        claims=(),
        evidence=(),
    )
    with answered_by(Router) as url:
        engine = Behind(url, first)
        served = ProbedEngine(variant, lab, engine, {}, Writer(words))
        found = probes.joining(served)
    assert found["rate_per_s"] == pytest.approx(probes.TIMES * found["capacity_per_s"])
    assert found["decided_s"] <= found["serves_s"] <= found["first_s"] <= found["ends_s"]
    answered = [r for r in found["requests"] if r["e2e_s"] is not None]
    assert len(answered) < len(found["requests"])
    assert sum(found["completed_by"]) == len(answered)
    assert found["completed_by"][1] > 0
    assert all(r["ttft_s"] <= r["e2e_s"] for r in answered)
    assert {r["ttft_s"] for r in found["requests"] if r not in answered} == {None}
    assert found["starts"]["eager"] == 0.5
    assert found["starts"]["compiled, caches empty"] == "no compiler"
    assert engine.dismissed == ["http://another"]
    assert all(other.stopped for other in engine.others)


def test_a_request_counts_from_when_it_was_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late a thread is free for it: here the first answer takes the only one."""

    class Gate(Answering):
        opened = threading.Event()

        def do_POST(self) -> None:
            self.asked()
            self.opened.wait()
            self.reply(b'data: {"choices": []}\n\ndata: [DONE]\n\n')

    monkeypatch.setattr(probes, "MOST_AT_ONCE", 1)
    lab = make_lab(workloads=(make_workload(prompt_tokens=Fixed(tokens=40)),))
    with answered_by(Gate) as url:
        engine = Behind(url, Replica())
        clients = probes.Clients(ProbedEngine(lab.variants[0], lab, engine, {}, Writer(words)))
        with clients.sending(rate_per_s=50) as asked:
            while len(asked) < 5:
                time.sleep(0.01)
            opened_s = clients.now_s
            Gate.opened.set()
    for request in [future.result() for future in asked[:5]]:
        assert request["sent_s"] is not None
        assert request["ttft_s"] is not None
        assert request["sent_s"] <= opened_s <= request["sent_s"] + request["ttft_s"]


def test_a_replica_joins_others_behind_a_router_only() -> None:
    lab = make_lab()
    alone: Any = Replica()
    with pytest.raises(ValueError, match="router"):
        probes.joining(ProbedEngine(lab.variants[0], lab, alone, {}, Writer(words)))


def test_what_is_not_there_in_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "WITHIN_S", 0.0)
    with pytest.raises(EngineError, match="the queue was not there"):
        probes.until("the queue", lambda: False)
