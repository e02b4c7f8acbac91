"""Replicas and their router are one program: where one ends, all end, and it is said which."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from serving.engines.base import EngineError, Server
from serving.engines.flags import Flags
from serving.engines.routed import PACKAGE, PLAIN, Routed, router_argv
from serving.processes.ports import LOOPBACK, free_port
from serving.processes.process import Process
from tests.unit.answering import Answering, answered_by

WAITS = [sys.executable, "-c", "import time; time.sleep(60)"]
ENDS = [sys.executable, "-c", "raise SystemExit(3)"]


def started(log: Path, replicas: list[list[str]], router: list[str]) -> Process:
    plan = json.dumps({"replicas": replicas, "gpus": 0, "router": router})
    return Process("engine", [sys.executable, "-m", "serving.plugins.replicas", plan], log=log)


@pytest.mark.parametrize(
    ("replicas", "router", "which"),
    [
        ([WAITS, ENDS], WAITS, "replica 1 of 2 ended with exit code 3"),
        ([WAITS], ENDS, "the router ended with exit code 3"),
    ],
)
def test_all_end_where_one_does(
    tmp_path: Path, replicas: list[list[str]], router: list[str], which: str
) -> None:
    with started(tmp_path / "log", replicas, router) as program:
        assert program.wait() == 1
        assert which in program.tail()


def test_all_end_with_the_lab(tmp_path: Path) -> None:
    program = started(tmp_path / "log", [WAITS, WAITS], WAITS)
    until = time.monotonic() + 60
    while len(members := program.family()) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    program.stop()
    assert len(members) == 4
    assert not any(psutil.pid_exists(member.pid) for member in members)


class Healthy(Answering):
    """A replica that serves nothing."""

    def do_GET(self) -> None:
        self.reply({}, 200 if self.path == "/health" else 404)


class Told(Routed):
    """A router that the test has started."""

    def __init__(self, url: str) -> None:
        Server.__init__(self, "one", "base", url)

    def wait_for(self, workers: int) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with suppress(EngineError):
                if self._tell_router("GET", "workers")["total"] == workers:
                    return
            time.sleep(0.1)
        raise AssertionError(f"the router does not know {workers} replicas")


@pytest.mark.skipif(not find_spec(PACKAGE), reason="sglang-router is not installed")
def test_a_router_admits_a_replica_and_dismisses_it(tmp_path: Path) -> None:
    with answered_by(Healthy) as first, answered_by(Healthy) as other:
        router = Told(f"http://{LOOPBACK}:{(port := free_port())}")
        plain: Flags = {"host": LOOPBACK, "port": port, "prometheus-port": free_port()}
        argv = router_argv({**PLAIN, **plain, "policy": "cache_aware", "worker-urls": [first]})
        command = [sys.executable, "-m", f"{PACKAGE}.launch_router", *argv]
        with Process("router", command, log=tmp_path / "log"):
            router.wait_for(1)
            router.admit(other)
            router.wait_for(2)
            router.dismiss(other)
            router.wait_for(1)
        with pytest.raises(EngineError, match="did not answer"):
            router.admit(other)
