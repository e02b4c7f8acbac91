"""`python -m serving.forecasting`, forked from a process that has imported vLLM before.

Importing vLLM is half of what a forecast takes here, and each lab that the tests run on a real
engine asks for one. `python -m tests.forecaster` hands its standard streams to one process that
imports vLLM for all of them, and ends as the child does that was forked there. That process ends
with the tests. The README's lab, and the tests of the forecaster itself, start as a reader's do.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

PLACE = "TESTS_FORECASTER"
"""The environment variable that holds the path of the socket; its folder goes with the tests."""
START_LIMIT_S = 30
IDLE_LIMIT_S = 1800  # the folder of tests that were killed stays
ROOT = Path(__file__).resolve().parents[1]


def start() -> None:
    """Start the process that imports vLLM, where it is not up; a test calls this, not what it runs.

    Whatever a lab's run starts ends with it.
    """
    place = Path(os.environ[PLACE])
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        end_s = time.monotonic() + START_LIMIT_S
        with contextlib.suppress(OSError), _connected(place):
            return
        nothing = subprocess.DEVNULL
        subprocess.Popen(
            [sys.executable, "-m", __name__, "serve", str(place)], cwd=ROOT,
            start_new_session=True, stdin=nothing, stdout=nothing, stderr=nothing,
        )  # fmt: skip
        while time.monotonic() < end_s:
            with contextlib.suppress(OSError), _connected(place):
                return
            time.sleep(0.1)
    raise TimeoutError("the process that imports vLLM for the forecasts did not start")


def _connected(place: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(place))
    except OSError:
        connection.close()
        raise
    return connection


def ask() -> int:
    """Have a child forked, and return its exit code."""
    with _connected(Path(os.environ[PLACE])) as server:
        about = json.dumps({"env": dict(os.environ), "folder": str(Path.cwd())}).encode()
        socket.send_fds(server, [len(about).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(about)
        for stream in (0, 1):  # only the child may hold them open
            os.close(stream)
        return int(server.recv(1)[0])


def serve(place: Path) -> None:
    """Import vLLM, and fork a child for everyone who asks, until the folder is gone."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place))
    listener.listen()
    import serving.forecasting.virtual_engine  # noqa: F401
    from serving.forecasting import __main__ as forecasting

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who relays an exit code
    asked_s = time.monotonic()
    while place.exists() and time.monotonic() - asked_s < IDLE_LIMIT_S:
        if not select.select([listener], [], [], 1)[0]:
            continue
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _relay(connection, forecasting.main)
        connection.close()
        asked_s = time.monotonic()


def _relay(connection: socket.socket, work: Callable[[], None]) -> NoReturn:
    """Run the work in a child with the asker's streams, and tell its exit code.

    It ends with the asker.
    """
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    if not size:  # asked only whether somebody listens
        os._exit(0)
    length, parts = int.from_bytes(size, "big"), bytearray()
    while len(parts) < length:
        parts += connection.recv(length - len(parts))
    about = json.loads(parts)
    child = os.fork()
    if child == 0:
        connection.close()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        os.environ.clear()
        os.environ.update(about["env"])
        os.chdir(about["folder"])
        _end_with(work)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    readable, _, _ = select.select([ended, connection.fileno()], [], [])
    if ended not in readable:  # the asker is gone
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(bytes([code % 256]))
    os._exit(0)


def _end_with(work: Callable[[], None]) -> NoReturn:
    """Do the work, and end this process as Python would."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]))
    else:
        sys.exit(ask())
