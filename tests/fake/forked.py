"""Starts `labs` commands by forking a process that has imported their libraries before.

A command takes two to three seconds of CPU time to import transformers, SciPy, Matplotlib and
others, and these tests type more than a hundred. So each process of the tests has one that imports
these packages, and none of the lab's own modules, and that forks a child for each command. The
child becomes one of the tests' own, with the arguments, the environment and the streams of a fresh
process; it runs the program's module and ends as that does. `tests/cpu` starts commands as a
reader does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
LIBRARIES = (
    "grafana_foundation_sdk.builders.barchart", "grafana_foundation_sdk.builders.prometheus",
    "grafana_foundation_sdk.builders.table", "grafana_foundation_sdk.builders.timeseries",
    "jsonschema", "matplotlib.pyplot", "matplotlib.backends.backend_svg", "orjson",
    "plotly.offline", "prometheus_client.core", "prometheus_client.openmetrics.exposition",
    "prometheus_client.parser", "psutil", "pydantic.type_adapter", "requests",
    "rich.live", "rich.progress", "rich.table", "scipy.optimize", "scipy.stats",
    "transformers.tokenization_utils_tokenizers", "typer", "zmq.asyncio",
)  # fmt: skip


class Forked:
    """A child process, as `subprocess.Popen` has one."""

    def __init__(self, pid: int, argv: Sequence[str]) -> None:
        self.pid, self._argv = pid, list(argv)
        self.stdin = self.stdout = None
        self.returncode: int | None = None
        self._reaping = threading.Lock()

    def poll(self) -> int | None:
        """Its exit code, negative where a signal ended it; None while it runs."""
        with self._reaping:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends. Raises subprocess.TimeoutExpired."""
        end_s = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if timeout is not None and end_s is not None and time.monotonic() > end_s:
                raise subprocess.TimeoutExpired(self._argv, timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, where it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(argv: Sequence[str], env: Mapping[str, str], out: Path) -> Forked:
    """Start Python with these arguments, `-m MODULE WORDS` or `-c SCRIPT WORDS`.

    It leads a session of its own, and writes to the file `out`.
    """
    parent = _parent()
    assert parent.stdin
    assert parent.stdout
    out.touch()  # it may be read before the child has begun
    about = {"argv": list(argv), "env": dict(env), "out": str(out)}
    with adopting_orphans():
        parent.stdin.write(json.dumps(about) + "\n")
        parent.stdin.flush()
        return Forked(int(parent.stdout.readline()), argv)


@cache
def _parent() -> subprocess.Popen[str]:
    """The process that is forked; it ends with this one, whose end closes its standard input."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Have those who are orphaned meanwhile become children of this process."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


# ------------------------------------------------------------------------ in the process itself


def serve() -> None:
    """Import the libraries, and fork a child for each line; return in a child, to run it."""
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages of all that was imported
    for line in sys.stdin:
        pid = fork_orphan()
        if pid == 0:
            become(json.loads(line))
            return
        os.write(1, f"{pid}\n".encode())
    sys.exit()


def fork_orphan() -> int:
    """Fork a child that somebody else adopts; return its pid, and 0 in the child, as `os.fork`.

    A process between this one and the child ends at once, which orphans the child: it then belongs
    to the nearest process above that is `adopting_orphans`.
    """
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        between = os.getpid()
        pid = os.fork()
        if pid:
            os.write(writing, pid.to_bytes(8, "big"))
            os._exit(0)
        while os.getppid() == between:  # it is to have one parent from its beginning
            time.sleep(0.001)
    else:
        os.waitpid(between, 0)
        pid = int.from_bytes(os.read(reading, 8), "big")
    os.close(reading)
    os.close(writing)
    return pid


def become(about: dict[str, object]) -> None:
    """Turn this child into what a fresh process would be."""
    os.setsid()
    # a shell's background job ignores SIGINT, and its children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(str(about["out"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(stream, target)
    for stream in (nothing, out):
        os.close(stream)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(stream, "w", closefd=False), "utf-8", write_through=True)
        for stream in (1, 2)
    )
    env, argv = about["env"], about["argv"]
    assert isinstance(env, dict)
    assert isinstance(argv, list)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv


def run() -> None:
    """Do as Python does with its arguments."""
    option, program, *words = sys.argv
    if option == "-m":
        sys.argv = [program, *words]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [option, *words]
        exec(program, {"__name__": "__main__"})


if __name__ == "__main__":
    serve()
    run()
