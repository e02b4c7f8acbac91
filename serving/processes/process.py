"""A child process that cannot outlive its parent, whatever becomes of the parent.

vLLM starts an engine core and workers of its own, Locust forks its load workers: killing only the
process we started would leave those behind, holding a port or GPU memory. So every child runs
under a small guard (this module run as a script). The guard is a Linux *child subreaper*: orphaned
grandchildren become its children, so it can always find the whole family. It ends the family

- when the child exits by itself,
- when the guard receives SIGTERM, and
- when its parent is gone, which it sees as end-of-file on a pipe that only the parent holds open:
  this works for SIGKILL and for a crash, where no handler of the parent could run.

A guard that is itself killed can end nobody. Then the kernel kills the child, and where the child's
processes have called `end_with_parent`, it kills these with it.

Linux only (prctl). A process stuck in uninterruptible I/O cannot be killed by anybody.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
GRACE_S = 10.0  # from SIGTERM to SIGKILL; vLLM needs about 3 s to free its memory
ORPHAN_GRACE_S = 2.0  # the parent is gone: nobody waits for a tidy end
GIVES_WAY = 10  # the niceness of what gives way; 5 was not enough: docs/notebook


class Process:
    """A guarded child: `with Process("engine", argv, log=path) as p: ...` ends it on any exit.

    `log` receives stderr, and stdout too unless `talk` is set; with `talk`, `stdin` and `stdout`
    are text pipes for a line protocol; once nobody is left to talk with, the family is killed at
    once. `folder_variable` names an environment variable in which the
    child gets a temporary folder of its own, which its guard removes.

    The kernel shares the CPUs out among sessions (autogroups, sched(7)). A child has a session of
    its own, unless it is to share this one: a worker of vLLM's CPU engine looks out for its next
    step for a second after the last, and one of another session that has the same core gets no time
    meanwhile. In one session the two take turns.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cores: Sequence[int] = (),
        talk: bool = False,
        folder_variable: str = "",
        own_session: bool = True,
    ) -> None:
        self.name, self.argv, self.log = name, list(argv), log
        log.parent.mkdir(parents=True, exist_ok=True)
        alive_r, self._alive_w = os.pipe()
        folder = tempfile.mkdtemp(prefix="labs-") if folder_variable else ""
        own = {folder_variable: folder} if folder else {}
        orphan_grace_s = 0.0 if talk else ORPHAN_GRACE_S
        own_argv = [str(alive_r), folder, str(orphan_grace_s), *argv]
        guard = [sys.executable, "-m", "serving.processes.process", *own_argv]
        with log.open("ab") as sink:
            self._guard = subprocess.Popen(
                guard,
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talk else sink,
                stderr=sink,
                env={**os.environ, **(env or {}), **own},
                pass_fds=(alive_r,),
                # Ctrl-C reaches us alone; we end it in order
                start_new_session=own_session,
                process_group=None if own_session else 0,
                preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
                text=True,
                bufsize=1,
            )
        os.close(alive_r)

    @property
    def stdin(self) -> IO[str]:
        """The child's standard input; only with `talk`."""
        assert self._guard.stdin
        return self._guard.stdin

    @property
    def stdout(self) -> IO[str]:
        """The child's standard output; only with `talk`."""
        assert self._guard.stdout
        return self._guard.stdout

    @property
    def pid(self) -> int:
        """The guard's pid; the child and all its descendants are below it."""
        return self._guard.pid

    @property
    def returncode(self) -> int | None:
        """The child's exit code, or 128 + the signal that ended it; None while it runs."""
        code = self._guard.poll()
        return None if code is None else _exit_code(code)

    def wait(self) -> int:
        """Wait until the whole family has ended; return the child's exit code."""
        return _exit_code(self._guard.wait())

    def request_stop(self) -> None:
        """Ask the guard to end the family, and return at once; any thread may call this."""
        self._guard.terminate()
        self._guard.send_signal(signal.SIGCONT)  # somebody may have halted it

    def suspend(self, but: Collection[int] = ()) -> None:
        """Halt the child and its descendants until `resume`, except for some; the guard goes on.

        They keep their memory and ports, and what is sent to them waits.
        """
        for member in self.family():
            if member.pid not in but:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.suspend()

    def resume(self) -> None:
        """Let the child and all its descendants go on; without effect where none is suspended."""
        for member in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()

    def give_way(self, cores: Collection[int]) -> None:
        """Let others go first on these cores: every thread of whatever may run there becomes nicer.

        Descendants that are bound to other cores stay as they are. It cannot be taken back.
        """
        for member in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if set(cores).isdisjoint(member.cpu_affinity()):
                    continue
                for thread in member.threads():  # the niceness of Linux is one of each thread
                    with contextlib.suppress(ProcessLookupError):
                        os.setpriority(os.PRIO_PROCESS, thread.id, GIVES_WAY)

    def family(self) -> list[psutil.Process]:
        """List the child and all its descendants."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def tail(self, lines: int = 12) -> str:
        """Return the last lines of the log, for an error message."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.rstrip().splitlines()[-lines:])

    def stop(self) -> None:
        """End the whole family; return when none of it is left."""
        if self._guard.poll() is None:
            self.request_stop()
            try:
                self._guard.wait(GRACE_S + 5)
            except subprocess.TimeoutExpired:  # the guard hangs: only closing its pipe can help
                self._guard.kill()
        for stream in (self._guard.stdin, self._guard.stdout):
            if stream:
                with contextlib.suppress(BrokenPipeError):  # a line that nobody read is left in it
                    stream.close()
        if self._alive_w >= 0:
            os.close(self._alive_w)
            self._alive_w = -1
        self._guard.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()


def _exit_code(returncode: int) -> int:
    """Return a process's exit code as a shell has it: 128 + the signal that ended it."""
    return returncode if returncode >= 0 else 128 - returncode


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def end_with_parent() -> None:
    """Have the kernel kill this process of `multiprocessing` when the one that started it is gone.

    vLLM calls it in its engine cores and workers (`serving/plugins/metadata`). The server itself
    has no such parent, and its guard has done this for it.
    """
    if parent := multiprocessing.parent_process():
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # it was gone before
            os.kill(os.getpid(), signal.SIGKILL)


def _lives(process: psutil.Process) -> bool:
    """Whether a process runs: its own parent may reap it between any two looks."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end_family(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM every descendant, SIGKILL what is left after `grace_s`, until none remains.

    One that is suspended goes on, as it would not see SIGTERM before. Without any grace the child
    is killed before the others are looked for, which takes long beside hundreds that are busy: what
    is to die with it (PR_SET_PDEATHSIG) does so at once.
    """
    if not grace_s:
        child.kill()
    me, deadline, sent = psutil.Process(), time.monotonic() + grace_s, set[tuple[int, int]]()
    while True:
        child.poll()  # reaped here and nowhere else: its exit code becomes ours
        family = [p for p in me.children(recursive=True) if p.pid != child.pid]
        for orphan in family:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(orphan.pid, os.WNOHANG)
        alive = [p.pid for p in family if _lives(p)]
        alive += [child.pid] if child.returncode is None else []
        if not alive:
            return
        sign = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
        for pid in alive:
            if (pid, sign) not in sent:
                sent.add((pid, sign))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
                    os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)


def guard(alive_fd: int, argv: Sequence[str], orphan_grace_s: float = ORPHAN_GRACE_S) -> int:
    """Run `argv`; return its exit code when it and all its descendants are gone."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    _prctl(PR_SET_PDEATHSIG, signal.SIGCONT)  # when the parent is gone, should it be halted itself
    wake_r, wake_w = os.pipe()
    for fd in (wake_r, wake_w):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    stop_requested = False

    def request_stop(*_: object) -> None:
        nonlocal stop_requested
        stop_requested = True

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, request_stop)
    # the kernel sends it when the parent is gone while the child is suspended (setpgid(2))
    signal.signal(signal.SIGHUP, request_stop)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake select()
    child = subprocess.Popen(argv, preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    orphaned = False
    while child.poll() is None and not stop_requested and not orphaned:
        ready, _, _ = select.select([alive_fd, wake_r], [], [], 1.0)
        if wake_r in ready:
            os.read(wake_r, 4096)
        orphaned = alive_fd in ready  # nothing is ever written: readable means end-of-file
    _end_family(child, orphan_grace_s if orphaned else GRACE_S)
    return _exit_code(child.wait())


if __name__ == "__main__":
    alive_fd, folder, orphan_grace_s, *argv = sys.argv[1:]
    code = guard(int(alive_fd), argv, float(orphan_grace_s))
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)
