"""Programs that are forked from a process which has imported vLLM before, for labs on a CPU.

Importing vLLM takes longer than all that an engine with a few layers computes in a test, and longer
than a forecast. `python -m tests.with_vllm MODULE WORDS` hands its standard streams to one process
that imports vLLM for all of them, and ends as the child does that was forked there to run MODULE as
Python does with `-m`; `-c SCRIPT` is run likewise. That process ends with the tests.

A lab's run is forked with a process of its own beside it, which forks its engines: they are below
the lab's run, as a reader's are, each under its guard. `fork_engines` has the run ask for them. The
code that runs is the same. The README's lab, an engine that compiles its steps and one with its
worker apart start as a reader's do.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from tests.fake.forked import LIBRARIES, Forked, adopting_orphans, fork_orphan
from tests.startup import sitecustomize
from tests.startup.sitecustomize import CORES, EAGER, NO_COMPILER, SERVER, WORKER_APART

PLACE = "TESTS_WITH_VLLM"
"""The environment variable that holds the path of the socket; its folder goes with the tests."""
ENGINES = "TESTS_ENGINES"
"""The variable that holds, in a lab's run, the descriptor of what forks its engines."""
ITS_GUARD, REPLICAS = "serving.processes.process", "serving.plugins.replicas"
VLLM = (  # what an engine and a forecast import of it; none begins a thread
    "vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.model_loader", "vllm.model_executor.models.llama",
    "vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_model_runner", "vllm.v1.worker.cpu_worker",
)  # fmt: skip
START_LIMIT_S = 120
IDLE_LIMIT_S = 1800  # the folder of tests that were killed stays
ROOT = Path(__file__).resolve().parents[1]


def argv_of(module: str, *words: str) -> list[str]:
    """Return the command line that has a module, or after `-c` a script, run in such a child."""
    return [sys.executable, "-m", __name__, module, *words]


def python(module: str, *words: str) -> list[str]:
    """Start that process, and return `argv_of` these; where there is a GPU, what runs them anew."""
    from serving.hardware import machine

    if machine.detect().kind == "cpu":
        start()
        return argv_of(module, *words)
    return [sys.executable, *(["-c"] if module == "-c" else ["-m", module]), *words]


def start() -> None:
    """Start the process that imports vLLM, where it is not up; a test calls this, not what it runs.

    Whatever a lab's run starts ends with it.
    """
    from serving.hardware import machine  # not in the process that is forked

    cores = len(machine.split_cores("cpu")[0])  # of an engine
    place = Path(os.environ[PLACE])
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        end_s = time.monotonic() + START_LIMIT_S
        with contextlib.suppress(OSError), _connected(place):
            return
        nothing = subprocess.DEVNULL
        # what an engine's process reads of its environment when it imports vLLM
        env = {NO_COMPILER: "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(cores)}
        subprocess.Popen(
            [sys.executable, "-m", __name__, "--serve", str(place)], cwd=ROOT,
            env={**os.environ, **env},
            start_new_session=True, stdin=nothing, stdout=nothing, stderr=nothing,
        )  # fmt: skip
        while time.monotonic() < end_s:
            with contextlib.suppress(OSError), _connected(place):
                return
            time.sleep(0.1)
    raise TimeoutError("the process that imports vLLM for the tests did not start")


def _connected(place: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(place))
    except OSError:
        connection.close()
        raise
    return connection


def ask(argv: Sequence[str]) -> int:
    """Have a child forked that runs a module, and return its exit code."""
    with _connected(Path(os.environ[PLACE])) as server:
        about = {"argv": argv, "env": dict(os.environ), "folder": str(Path.cwd())}
        _send(server, about, [0, 1, 2])
        for stream in (0, 1):  # only the child may hold them open
            os.close(stream)
        return int(server.recv(1)[0])


def _send(to: socket.socket, about: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    message = json.dumps(about).encode()
    socket.send_fds(to, [len(message).to_bytes(4, "big")], descriptors)
    to.sendall(message)


def _receive(connection: socket.socket, most: int) -> tuple[dict[str, Any], list[int]]:
    """Return what was sent, and the descriptors with it; nothing where the other side is gone."""
    size, descriptors, _, _ = socket.recv_fds(connection, 4, most)
    length, parts = int.from_bytes(size, "big"), bytearray()
    while len(parts) < length:
        parts += connection.recv(length - len(parts))
    return (json.loads(parts) if parts else {}), descriptors


# ------------------------------------------------------------------ in the process that is forked


def serve(place: Path) -> None:
    """Import vLLM, and fork a child for everyone who asks, until the folder is gone."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place))
    listener.listen()
    before = dict(os.environ)
    for module in (*VLLM, *LIBRARIES):
        importlib.import_module(module)
    from vllm.model_executor.models import registry

    # which looks at a model's class in a process of its own, that imports vLLM again
    setattr(registry, "_run_in_subprocess", lambda look: look())  # noqa: B010
    # what importing vLLM has set, and a process that had imported it itself would have, too
    set_by_vllm = {k: v for k, v in os.environ.items() if before.get(k) != v}
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
    sitecustomize.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who relays an exit code
    asked_s = time.monotonic()
    while place.exists() and time.monotonic() - asked_s < IDLE_LIMIT_S:
        if not select.select([listener], [], [], 1)[0]:
            continue
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _relay(connection, set_by_vllm)
        connection.close()
        asked_s = time.monotonic()


def _relay(connection: socket.socket, set_by_vllm: Mapping[str, str]) -> NoReturn:
    """Run the module in a child with the asker's streams, and tell its exit code.

    It ends with the asker.
    """
    about, streams = _receive(connection, 3)
    if not about:  # asked only whether somebody listens
        os._exit(0)
    child = os.fork()
    if child == 0:
        connection.close()
        _become(about, streams)
        engines = _engines_beside(set_by_vllm)
        os.environ[ENGINES] = str(engines)
        _end_with(lambda: _run_module(about["argv"]))
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


def _become(about: Mapping[str, Any], streams: Sequence[int]) -> None:
    """Give this child the environment, the folder and the standard streams of a fresh process."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(about["env"])
    os.chdir(about["folder"])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]


def _run_module(argv: Sequence[str]) -> None:
    """Do as `python -m` does with these arguments, or as `python` where the first is `-c`."""
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(argv[1], {"__name__": "__main__"})
        return
    sys.orig_argv = [sys.executable, "-m", *argv]
    sys.argv = list(argv)
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def _end_with(work: Callable[[], object]) -> NoReturn:
    """Do the work, and end this process as Python would."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ------------------------------------------------------------------------- engines of a lab's run


def _engines_beside(set_by_vllm: Mapping[str, str]) -> int:
    """Fork what forks this process's engines and ends with it; return the descriptor to ask it."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        _fork_guards(theirs, set_by_vllm)
    theirs.close()
    return ours.detach()


def _fork_guards(asked: socket.socket, set_by_vllm: Mapping[str, str]) -> NoReturn:
    """Fork a guard for each engine that is asked for, and orphan it: who asked then adopts it.

    As in a run of its own, the engines share a session.
    """
    os.setsid()
    while True:
        about, descriptors = _receive(asked, 3)
        if not about:
            os._exit(0)
        guard = fork_orphan()
        if guard == 0:
            os.close(asked.fileno())
            _guard(about, descriptors, set_by_vllm)
        asked.sendall(guard.to_bytes(8, "big"))
        for descriptor in descriptors:
            os.close(descriptor)


def _guard(
    about: Mapping[str, Any], descriptors: Sequence[int], set_by_vllm: Mapping[str, str]
) -> NoReturn:
    """Be the guard of an engine, which it forks."""
    alive, *streams = descriptors
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _become(about, [os.open(os.devnull, os.O_RDONLY), *streams])
    real_popen = subprocess.Popen

    def popen(argv: Sequence[str], preexec_fn: Callable[[], None]) -> Forked:
        child = os.fork()
        if child == 0:
            setattr(subprocess, "Popen", real_popen)  # noqa: B010
            preexec_fn()
            os.close(alive)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.set_wakeup_fd(-1)
            for name, value in set_by_vllm.items():
                os.environ.setdefault(name, value)
            if REPLICAS in argv:
                _fork_replicas()
            else:
                sitecustomize.become_server(argv)
            _end_with(lambda: _run_module(argv[2:]))
        return Forked(child, argv)

    setattr(subprocess, "Popen", popen)  # noqa: B010
    _, _, module, _, *words = about["argv"]
    _end_with(lambda: _run_module([module, str(alive), *words]))


def _fork_replicas() -> None:
    """Have this process, which is to start replicas and their router, fork the replicas."""
    real_popen = subprocess.Popen

    def popen(argv: Sequence[str], **others: Any) -> subprocess.Popen[bytes] | Forked:
        if SERVER not in argv:
            return real_popen(argv, **others)
        child = os.fork()
        if child == 0:
            setattr(subprocess, "Popen", real_popen)  # noqa: B010
            os.environ.clear()
            os.environ.update(others["env"])
            sitecustomize.become_server(argv)
            _end_with(lambda: _run_module(argv[2:]))
        return Forked(child, argv)

    setattr(subprocess, "Popen", popen)  # noqa: B010


def fork_engines() -> None:
    """Have this process, a lab's run, ask for its engines what was forked beside it."""
    from serving.processes import process

    asking, one_at_a_time = socket.socket(fileno=int(os.environ.pop(ENGINES))), threading.Lock()

    def popen(
        argv: Sequence[str],
        *,
        stdout: IO[bytes] | int,
        stderr: IO[bytes] | int,
        env: Mapping[str, str],
        pass_fds: Sequence[int],
        **others: Any,
    ) -> subprocess.Popen[str] | Forked:
        if not _can_be_forked(argv, env):
            return subprocess.Popen(
                argv, stdout=stdout, stderr=stderr, env=env, pass_fds=pass_fds, **others
            )
        assert not isinstance(stdout, int)
        assert not isinstance(stderr, int)
        about = {"argv": list(argv), "env": dict(env), "folder": str(Path.cwd())}
        with one_at_a_time, adopting_orphans():
            _send(asking, about, [*pass_fds, stdout.fileno(), stderr.fileno()])
            return Forked(int.from_bytes(asking.recv(8), "big"), argv)

    own = types.SimpleNamespace(**{**vars(subprocess), "Popen": popen})
    setattr(process, "subprocess", own)  # noqa: B010


def _can_be_forked(argv: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether the command starts the guard of an engine that differs in nothing if it is forked."""
    words = " ".join(argv)  # those of replicas are in one argument
    eager = ITS_GUARD in argv and SERVER in words and EAGER in words
    return eager and env.get(WORKER_APART) != "1" and CORES in env


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(Path(sys.argv[2]))
    else:
        sys.exit(ask(sys.argv[1:]))
