"""Whose CPU time it was."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace

import psutil
import pytest

from labs.harness.runner import machine_load
from labs.harness.runner.machine_load import OtherLoad, ServerLoad, Shares, wait_until_idle
from serving.models.catalog import ROOT

BUSY = "import time; e = time.process_time() + 0.4\nwhile time.process_time() < e: pass"
STRANGER = "import time; e = time.process_time() + 30\nwhile time.process_time() < e: pass"
ORPHAN = f"""
import subprocess, sys
nowhere = subprocess.DEVNULL
child = subprocess.Popen([sys.executable, "-c", {STRANGER!r}], stdout=nowhere, stderr=nowhere)
print(child.pid)
"""
MEASURED = f"""
import subprocess, sys, time, psutil
from labs.harness.runner.machine_load import OtherLoad
other_load = OtherLoad()
printed = subprocess.run([sys.executable, "-c", {ORPHAN!r}], capture_output=True, check=True)
stranger = psutil.Process(int(printed.stdout))
try:
    while sum(stranger.cpu_times()[:2]) < 0.3:
        time.sleep(0.01)
    print(*other_load.shares())
finally:
    stranger.kill()
"""


def test_what_a_stranger_uses_is_told() -> None:
    """A process whose parent has gone is no child of ours.

    It is measured by a process of its own: one that had children before counts at once, when they
    end, all that they ever used.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], capture_output=True, text=True, cwd=ROOT, check=True
    )
    stolen, strangers, engine = done.stdout.split()
    assert engine == "None"
    assert 0 <= float(stolen) <= 1
    assert 0 < float(strangers) <= 1.05


@pytest.mark.parametrize("engine_pids", [(), (9,), (9, 10)])
def test_others_are_what_neither_we_nor_our_engines_use(
    engine_pids: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 10 s on two cores: 1 s stolen, and 6 s used, of these 4 s by us and 3 s by our engines."""
    readings, times = iter([(0.0, 0.0, 0.0, 0.0), (1.0, 6.0, 4.0, 3.0)]), iter([100.0, 110.0])
    monkeypatch.setattr(OtherLoad, "_now", lambda _: next(readings))
    # of the module alone: other threads of the tests read the clock, too
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr("labs.harness.runner.machine_load.time", clock)
    monkeypatch.setattr(
        "labs.harness.runner.machine_load.psutil", SimpleNamespace(cpu_count=lambda: 2)
    )
    engines = 0.15 if engine_pids else None
    assert OtherLoad(engine_pids).shares() == Shares(0.05, 0.1, engines)


OURS = f"""
import subprocess, sys
from labs.harness.runner.machine_load import OtherLoad
other_load = OtherLoad()
before = other_load._now()
subprocess.run([sys.executable, "-c", {BUSY!r}], check=True)
_, used_s, ours_s, _ = (b - a for a, b in zip(before, other_load._now(), strict=True))
print(used_s, ours_s)
"""


def test_our_own_work_is_not_others() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OURS], capture_output=True, text=True, cwd=ROOT, check=True
    )
    used_s, ours_s = map(float, done.stdout.split())
    assert ours_s >= 0.4
    assert used_s >= ours_s - 0.1  # both in ticks of 10 ms


def test_what_the_engine_uses_is_told_apart() -> None:
    """Of processes below the pid of its guard, too."""
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]]); input()"
    engine = subprocess.Popen([sys.executable, "-c", parent, BUSY], stdin=subprocess.PIPE)
    try:
        other_load = OtherLoad([engine.pid])
        deadline = time.monotonic() + 60
        while not (shares := other_load.shares()).engine and time.monotonic() < deadline:
            time.sleep(0.01)
        assert shares.engine
    finally:
        engine.communicate(b"\n")


def test_a_process_that_still_looks_out_for_work_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its CPU time, which a busy one may get little of on a machine that has other work."""
    idle = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert wait_until_idle([idle.pid], most_s=30)
    finally:
        idle.kill()
        idle.communicate()
    assert wait_until_idle([])
    monkeypatch.setattr(machine_load, "_used_s", lambda pid: time.monotonic())
    assert not wait_until_idle([1], most_s=0.3)


class Server:
    """A server that has used so many CPU seconds at each reading, and then is gone."""

    used_s: dict[int, list[float]]

    def __init__(self, pid: int) -> None:
        self.left_s = iter(self.used_s[pid])

    def cpu_times(self) -> tuple[float, float, float]:
        if (used_s := next(self.left_s, None)) is None:
            raise psutil.NoSuchProcess(1)
        return used_s / 2, used_s / 2, 1000.0  # of user and system; of children that have ended


@pytest.mark.parametrize(
    ("used_s", "pids", "share"),
    [
        ([[7.0, 7.1, 8.1, 9.1, 9.1]], [1], 0.75),  # half of it in the window's first half second
        ([[7.0, 7.1, 8.1, 9.1, 9.1], [0.0, 0.0, 0.2, 0.4, 0.6]], [1, 2], 0.75),
        ([[0.0, 0.0, 0.2, 0.4, 0.6], [7.0, 7.1, 8.1, 9.1, 9.1]], [1, 2], 0.75),
        ([[7.0, 7.1, 8.1]], [1], None),  # it ended in the window
        ([], [], None),
    ],
)
def test_the_busiest_server_is_told_from_the_beginning_to_the_end_of_the_window(
    used_s: list[list[float]],
    pids: Sequence[int],
    share: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From 101.5 to 103.5, read at 100, 101, 102, 103 and 104."""
    times = iter(range(100, 110))
    monkeypatch.setattr(Server, "used_s", dict(enumerate(used_s, 1)), raising=False)
    stand_in = SimpleNamespace(Process=Server, Error=psutil.Error)
    monkeypatch.setattr(machine_load, "psutil", stand_in)
    monkeypatch.setattr(machine_load, "time", SimpleNamespace(monotonic=lambda: next(times)))
    server_load = ServerLoad(pids)
    for _ in range(4):
        server_load.read()
    assert server_load.busiest(101.5, 103.5) == share
    assert server_load.busiest(99.9, 103.5) is None
    assert server_load.busiest(101.5, 104.1) is None


def test_a_server_that_has_ended_before_its_trial_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert ServerLoad([ended.pid]).busiest(0.0, 1.0) is None
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: True)  # it ends right after
    assert ServerLoad([ended.pid]).busiest(0.0, 1.0) is None
