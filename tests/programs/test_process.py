"""Nothing outlives the process that started it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.engines.vllm import Vllm
from serving.hardware import machine
from serving.models.catalog import Model
from serving.processes.process import GIVES_WAY, Process
from tests.processes import lives
from tests.unit.builders import SHAPE

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 15.0  # a bound, not a measurement: a busy machine may take seconds to start Python

# leaves two sleepers: one in a session of its own whose parent is gone, as a daemon's would be
FAMILY = """
import os, subprocess, sys
pids = [subprocess.Popen(["sleep", "600"], start_new_session=True).pid]
r, w = os.pipe()
if os.fork() == 0:
    os.setsid()
    pid = os.fork()
    if pid:
        os.write(w, str(pid).encode())
        os._exit(0)
    os.execvp("sleep", ["sleep", "600"])
os.wait()
pids.append(int(os.read(r, 20)))
print(*pids, flush=True)
"""
STAYING = FAMILY + "\nimport time\ntime.sleep(600)\n"


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def ended(process: Process) -> int | None:
    until(lambda: process.returncode is not None)
    return process.returncode


def running(pid: int) -> bool:
    try:
        return lives(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def parent_of(code: str, cwd: Path = ROOT, **given: Any) -> subprocess.Popen[str]:
    """Start a Python program that imports `Process`, and then waits."""
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        f"from serving.processes.process import Process\n{code}\ntime.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), **given.pop("env", {})}
    argv = [sys.executable, "-c", program]
    return subprocess.Popen(argv, cwd=cwd, stdout=subprocess.PIPE, text=True, env=env, **given)


def python(code: str, log: Path, talk: bool = False) -> Process:
    return Process("child", [sys.executable, "-c", code], log=log, talk=talk)


@pytest.mark.parametrize(
    ("script", "code"), [("exit 7", 7), ("kill -KILL $$", 128 + signal.SIGKILL)]
)
def test_exit_code_is_the_childs_or_128_and_the_signal(
    script: str, code: int, tmp_path: Path
) -> None:
    with Process("child", ["sh", "-c", script], log=tmp_path / "log") as process:
        assert ended(process) == code


@pytest.mark.parametrize("own_session", [True, False])
def test_a_child_is_out_of_reach_of_the_terminals_ctrl_c(own_session: bool, tmp_path: Path) -> None:
    """That goes to the runner's group, which ends the child, in order, when it has recorded all."""
    log = tmp_path / "log"
    with Process("child", ["sleep", "600"], log=log, own_session=own_session) as process:
        assert os.getpgid(process.pid) == process.pid
        assert (os.getsid(process.pid) != os.getsid(0)) == own_session


def test_a_killed_guard_is_told_as_a_killed_child(tmp_path: Path) -> None:
    with Process("child", ["sleep", "600"], log=tmp_path / "log") as process:
        os.kill(process.pid, signal.SIGKILL)
        assert ended(process) == process.wait() == 128 + signal.SIGKILL


def test_stopped_child_died_by_sigterm(tmp_path: Path) -> None:
    argv = ["sh", "-c", "echo up; exec sleep 600"]
    with Process("child", argv, log=tmp_path / "log", talk=True) as process:
        assert process.stdout.readline() == "up\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_log_keeps_both_streams_and_shows_its_last_lines(tmp_path: Path) -> None:
    script = "echo one; echo two >&2; echo three"
    with Process("child", ["sh", "-c", script], log=tmp_path / "deep" / "log") as process:
        ended(process)
        assert process.tail() == "one\ntwo\nthree"
        assert process.tail(1) == "three"


def test_program_that_does_not_exist_says_so_in_the_log(tmp_path: Path) -> None:
    with Process("child", ["/no/such/program"], log=tmp_path / "log") as process:
        assert ended(process) != 0
        assert "/no/such/program" in process.tail()


def test_environment_is_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    argv = ["sh", "-c", "echo $INHERITED $ADDED"]
    with Process("child", argv, log=tmp_path / "log", env={"ADDED": "too"}) as process:
        ended(process)
        assert process.tail() == "yes too"


@pytest.fixture
def family() -> Iterator[list[int]]:
    """Process ids to clear away if a test fails to see them end."""
    pids: list[int] = []
    yield pids
    for pid in filter(running, pids):
        os.kill(pid, signal.SIGKILL)


def test_stop_passes_over_a_line_that_nobody_read(tmp_path: Path) -> None:
    with Process("talker", ["true"], log=tmp_path / "log", talk=True) as child:
        child.wait()
        with pytest.raises(BrokenPipeError):
            child.stdin.write("a plan\n")
    assert child.stdin.closed


@pytest.mark.parametrize("stays", [True, False])
def test_grandchildren_in_sessions_of_their_own_end_with_the_child(
    tmp_path: Path, family: list[int], stays: bool
) -> None:
    """Whether it is stopped or has come to its end by itself."""
    with python(STAYING if stays else FAMILY, tmp_path / "log", talk=True) as process:
        family += map(int, process.stdout.readline().split())
        if stays:
            assert [running(pid) for pid in family] == [True, True]
        else:
            assert ended(process) == 0
            assert [running(pid) for pid in family] == [False, False]
    assert [running(pid) for pid in family] == [False, False]


@pytest.mark.parametrize("talk", [True, False])
def test_what_lost_the_one_it_talked_with_is_killed_without_being_asked(
    tmp_path: Path, family: list[int], talk: bool
) -> None:
    up, asked = tmp_path / "up", tmp_path / "asked"
    shell = f"trap 'touch {asked}; exit' TERM; touch {up}; sleep 600 & wait"
    code = f"""
process = Process("child", ["sh", "-c", {shell!r}], log=Path("{tmp_path}/log"), talk={talk})
print(process.pid, flush=True)
"""
    parent = parent_of(code)
    assert parent.stdout
    guard = int(parent.stdout.readline())
    until(up.exists)
    family += [parent.pid, guard, *(p.pid for p in psutil.Process(guard).children(recursive=True))]
    parent.kill()
    parent.communicate()
    until(lambda: not any(running(pid) for pid in family))
    assert asked.exists() is not talk


def stopped(pids: list[int]) -> list[bool]:
    return [psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in pids]


def test_a_family_is_suspended_as_a_whole_and_goes_on(tmp_path: Path, family: list[int]) -> None:
    with python(STAYING, tmp_path / "log", talk=True) as process:
        family += map(int, process.stdout.readline().split())
        below = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
        assert {*family} < {*below}  # the child itself is one of them
        process.suspend()
        until(lambda: all(stopped(below)))
        assert stopped([process.pid]) == [False]  # the guard, which ends them
        assert process.returncode is None
        process.resume()
        until(lambda: not any(stopped(below)))
        process.resume()  # once more does nothing
    assert [running(pid) for pid in family] == [False, False]
    process.suspend()  # nothing, where none is left
    process.resume()


def niceness(pid: int) -> set[int]:
    threads = psutil.Process(pid).threads()
    return {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in threads}


def test_what_may_run_on_given_cores_gives_way_there_with_all_its_threads(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "cores = sorted(os.sched_getaffinity(0))\n"
        "bind = lambda: os.sched_setaffinity(0, cores[:1])\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "bound = subprocess.Popen(sleep, preexec_fn=bind)\n"
        "print(os.getpid(), bound.pid, flush=True)\n"
        "time.sleep(600)"
    )
    cores = sorted(os.sched_getaffinity(0))
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with python(code, tmp_path / "log", talk=True) as process:
        child, bound = map(int, process.stdout.readline().split())
        process.give_way(cores[1:])
        assert niceness(child) == ({GIVES_WAY} if cores[1:] else {own})
        assert len(psutil.Process(child).threads()) == 2
        assert niceness(bound) == niceness(process.pid) == {own}
        process.give_way(cores)
        assert niceness(bound) == {GIVES_WAY}


@pytest.mark.parametrize("guard_too", [True, False])
def test_a_suspended_child_ends_by_sigterm_and_in_order(tmp_path: Path, guard_too: bool) -> None:
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: exit(7))\n"
        "print('up', flush=True)\n"
        "time.sleep(600)"
    )
    with python(code, tmp_path / "log", talk=True) as process:
        assert process.stdout.readline() == "up\n"
        process.suspend()
        if guard_too:
            os.kill(process.pid, signal.SIGSTOP)
    assert process.returncode == 7  # its own handler has run: it was not killed


@pytest.mark.parametrize("halted", ["nobody", "the child", "the guard too"])
@pytest.mark.parametrize("own_session", [True, False])
def test_killed_parent_leaves_no_process(
    tmp_path: Path, family: list[int], own_session: bool, halted: str
) -> None:
    """In the parent's session the kernel then sends SIGHUP to the guard, too."""
    code = f"""
argv, log = [sys.executable, "-c", {STAYING!r}], Path({str(tmp_path / "log")!r})
process = Process(
    "child", argv, log=log, talk=True, own_session={own_session}, folder_variable="OWN"
)
pids = process.stdout.readline()
if {halted != "nobody"}:
    process.suspend()
print(process.pid, pids, flush=True)
"""
    parent = parent_of(code, start_new_session=True, env={"TMPDIR": str(tmp_path)})
    family.append(parent.pid)
    assert parent.stdout
    guard, *sleepers = map(int, parent.stdout.readline().split())
    family += [guard, *sleepers, *(p.pid for p in psutil.Process(guard).children(recursive=True))]
    assert len(sleepers) == 2
    until(lambda: stopped(sleepers) == [halted != "nobody"] * 2)
    if halted == "the guard too":
        os.kill(guard, signal.SIGSTOP)
    assert len(list(tmp_path.glob("labs-*"))) == 1
    parent.kill()
    parent.communicate()
    until(lambda: not any(running(pid) for pid in family))
    assert not list(tmp_path.glob("labs-*"))  # the guard has come to its end


FOLDER = """
import os, time
open(os.environ["OWN"] + "/socket", "w").close()
print(os.environ["OWN"], flush=True)
time.sleep(600)
"""


def test_the_childs_own_folder_goes_with_it(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", FOLDER]
    with Process("child", argv, log=tmp_path / "log", talk=True, folder_variable="OWN") as process:
        folder = Path(process.stdout.readline().strip())
        assert (folder / "socket").exists()
    assert not folder.exists()


# as vLLM: a server whose engine core, here in a session of its own, finds the plugin and calls it
CORE = """
import multiprocessing, os, sys, time
from importlib.metadata import entry_points
os.setsid()
print(os.getpid(), flush=True)
while LATE and os.getppid() == multiprocessing.parent_process().pid:
    time.sleep(0.02)
for plugin in entry_points(group="vllm.general_plugins", name="end_with_parent"):
    plugin.load()()
open("called", "w").close()
time.sleep(600)
"""


@pytest.mark.parametrize("runner_too", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_killed_guard_leaves_no_engine_core(
    tmp_path: Path, family: list[int], runner_too: bool, late: bool
) -> None:
    """Also where the server is gone before its core calls the plugin."""
    env = Vllm.environment("gpu", Model("abacus", tmp_path, SHAPE))
    (tmp_path / "server.py").write_text(f"""
import multiprocessing, time
if __name__ == "__main__":
    core = {CORE.replace("LATE", str(late))!r}
    multiprocessing.get_context("spawn").Process(target=exec, args=(core,)).start()
    time.sleep(600)
""")
    code = f"""
argv = [sys.executable, "server.py"]
process = Process("engine", argv, log=Path("log"), talk=True, env={env!r})
print(process.pid, process.stdout.readline(), flush=True)
"""
    runner = parent_of(code, tmp_path)
    family.append(runner.pid)
    assert runner.stdout
    guard, core = map(int, runner.stdout.readline().split())
    family += [guard, core]
    until(lambda: late or (tmp_path / "called").exists())
    assert all(running(pid) for pid in family)
    if runner_too:
        runner.kill()
    os.kill(guard, signal.SIGKILL)
    until(lambda: not running(core))
    assert (tmp_path / "called").exists() is not late
    runner.kill()
    runner.communicate()


def test_what_measures_the_ceilings_ends_with_the_runner(tmp_path: Path, family: list[int]) -> None:
    told = tmp_path / "pid"
    code = f"""
from serving.hardware import machine
machine.MEASURING = ("sh", "-c", "echo $$ > {told}.half; mv {told}.half {told}; exec sleep 600")
machine.measure_ceilings(machine.cpu())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    family.append(parent.pid)
    until(told.exists)
    family.append(int(told.read_text()))
    assert all(running(pid) for pid in family)
    parent.kill()
    parent.wait()
    until(lambda: not any(running(pid) for pid in family))


def test_ceilings_that_cannot_be_measured_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MEASURING", ("sh", "-c", "echo no kernel >&2; exit 3"))
    with pytest.raises(machine.CeilingsError, match=r"^no kernel$"):
        machine.measure_ceilings(machine.cpu())


def test_child_that_ignores_sigterm_is_killed_after_the_grace(family: list[int]) -> None:
    guard = (
        "import sys, serving.processes.process as p; p.GRACE_S = 0.2;"
        " sys.exit(p.guard(0, sys.argv[1:]))"
    )
    stubborn = ["sh", "-c", "trap '' TERM; echo $$; exec sleep 600"]
    process = subprocess.Popen(
        [sys.executable, "-c", guard, *stubborn],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,  # the guard's sign that its parent lives
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    child = int(process.stdout.readline())
    family += [process.pid, child]
    process.terminate()
    process.communicate(timeout=PATIENCE_S)
    assert not running(child)
