"""Replicas and their router are one program: where one ends, all end, and it is said which."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from serving.processes.process import Process

WAITS = [sys.executable, "-c", "import time; time.sleep(60)"]
ENDS = [sys.executable, "-c", "raise SystemExit(3)"]


def started(log: Path, replicas: list[list[str]], router: list[str]) -> Process:
    plan = json.dumps({"replicas": replicas, "gpus": 0, "router": router})
    return Process("engine", [sys.executable, "-m", "serving.inside.replicas", plan], log=log)


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
