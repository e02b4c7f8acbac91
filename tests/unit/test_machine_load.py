"""Whose CPU time it was."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from labs.running import machine_load
from labs.running.machine_load import OtherLoad, Shares, wait_until_idle
from serving.models import ROOT

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
import pytest

from labs.running import machine_load
from labs.running.machine_load import OtherLoad, wait_until_idle
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


@pytest.mark.parametrize("engine_pid", [None, 9])
def test_others_are_what_neither_we_nor_our_engine_use(
    engine_pid: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 10 s on two cores: 1 s stolen, and 6 s used, of these 4 s by us and 3 s by our engine."""
    readings, times = iter([(0.0, 0.0, 0.0, 0.0), (1.0, 6.0, 4.0, 3.0)]), iter([100.0, 110.0])
    monkeypatch.setattr(OtherLoad, "_now", lambda _: next(readings))
    # of the module alone: other threads of the tests read the clock, too
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr("labs.running.machine_load.time", clock)
    monkeypatch.setattr("labs.running.machine_load.psutil", SimpleNamespace(cpu_count=lambda: 2))
    engine = None if engine_pid is None else 0.15
    assert OtherLoad(engine_pid).shares() == Shares(0.05, 0.1, engine)


OURS = f"""
import subprocess, sys
import pytest

from labs.running import machine_load
from labs.running.machine_load import OtherLoad, wait_until_idle
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
        other_load = OtherLoad(engine.pid)
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
