"""Labs on the fake engine: a reader at a terminal, what they type, and what it leaves behind."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from labs import LABS as EVERY_LAB
from labs.harness.spec.overrides import parse_changes
from labs.harness.storage.recorded import MachineFile
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from serving.engines import DEFAULT_ENGINE, vllm
from serving.engines.vllm import Vllm
from serving.hardware import gpus, machine
from serving.models import catalog
from serving.models.catalog import ROOT
from serving.packaging.install import find_prometheus
from tests import with_vllm
from tests.fake import forked
from tests.processes import lives
from tests.sizes import BRIEF, sizes_of, with_every_part

Json = dict[str, Any]
TOKEN = "hf_" + "a1B2" * 8  # a stranger's, in the command of every engine: nothing may keep it
LAW = ("--step-s", ".01", "--step-per-seq-s", ".0001", "--prefill-per-token-s", "0")
LABS = ("-m", "tests.fake.quiet")
LABS_WITH_FAKE_MODELS = ("-m", "tests.fake.made")
LABS_WITHOUT_PROMETHEUS = ("-m", "tests.fake.bare")
TOO_LARGE = f"flags.kv-cache-memory-bytes={int(0.6 * psutil.virtual_memory().total)}"
"""So that no two engines fit this machine's memory."""
CEILINGS = machine.Ceilings(
    memory_bandwidth_bytes_per_s=2e10,
    bf16_flops_per_s=1e12,
    fp32_flops_per_s=1e12 if machine.cpu().lacks_bf16 else None,
    threads=1,
    torch="none",
    measured_at="not measured: given by the test",
)

needs_prometheus = pytest.mark.skipif(
    find_prometheus(ROOT) is None, reason="Prometheus is not installed"
)


class Command:
    """A `labs` command under way, or ended."""

    def __init__(self, argv: list[str], env: dict[str, str], out: Path, results: Path) -> None:
        self._out, self._results = out, results
        self.process = forked.start(argv, env, out)

    @property
    def said(self) -> str:
        return self._out.read_text(errors="replace")

    def until(self, pattern: str, timeout_s: float = 300) -> re.Match[str]:
        """Waits until it has said something that matches; fails when it ends before."""
        deadline = time.monotonic() + timeout_s
        while (found := re.search(pattern, self.said, re.M)) is None:
            assert self.process.poll() is None, f"it ended before {pattern!r}:\n{self.said}"
            assert time.monotonic() < deadline, f"it never said {pattern!r}:\n{self.said}"
            time.sleep(0.02)
        return found

    def wait(self, timeout_s: float = 300) -> int:
        return self.process.wait(timeout_s)

    def family(self) -> list[psutil.Process]:
        """Every descendant that lives now."""
        return psutil.Process(self.process.pid).children(recursive=True)

    @property
    def folder(self) -> RunFolder:
        """The one run in the results folder."""
        (found,) = self._results.glob("*/*/*/run.json")
        return RunFolder(found.parent)

    @property
    def folders(self) -> list[Path]:
        """Every run in the results folder, one that has barely begun too."""
        return list(self._results.glob("*/*/*"))


class Reader:
    """Someone at a terminal, with a results folder of their own and a fake engine for vLLM."""

    def __init__(self, home: Path) -> None:
        self.home, self.results, self.engines = home, home / "results", home / "engines"
        self.scratch = home / "scratch"  # with a lock of their own: other tests run meanwhile
        self.engines.mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv(gpus.VARIABLE, "")
            here = machine.detect()
        write_json(
            self.results / here.slug / "machine.json",
            MachineFile(machine=here, ceilings=CEILINGS),  # measuring takes 15 s
        )
        self.commands: list[Command] = []

    def types(
        self,
        *words: str,
        engine: tuple[str, ...] = (),
        first_engine: tuple[str, ...] = (),
        program: tuple[str, ...] = LABS,
        **settings: str,
    ) -> Command:
        """Starts `labs WORDS` with the settings in its environment, as make hands them on.

        `engine` are flags of every fake engine it starts, `first_engine` of the first one alone.
        """
        settings = {
            "RESULTS": str(self.results),
            "PROMETHEUS_DATA": str(self.home / "prometheus"),
            "SCRATCH": str(self.scratch),
            "DISTURBED": "keep",  # other tests run meanwhile
            "ENGINE_COMMAND": self.engine_command(engine, first_engine),
            **settings,
        }
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "1000",
            gpus.VARIABLE: "",  # where there is a GPU too, a fake engine's labs are a CPU's
            **{f"LABS_{name}": value for name, value in settings.items()},
        }
        out = self.home / f"{len(self.commands)}.out"
        command = Command([*program, *words], env, out, self.results)
        self.commands.append(command)
        return command

    def engine_command(self, flags: tuple[str, ...], first: tuple[str, ...]) -> str:
        """Every start keeps its arguments, its log, and what was predicted by then."""
        fake = shlex.join([sys.executable, "-m", "tests.fake.engine", *LAW, *flags])
        here = shlex.quote(str(self.engines))
        predictions = f"{shlex.quote(str(self.results))}/*/*/*/predictions.json"
        script = (
            f": {TOKEN};"
            f" cat {predictions} > {here}/$$.predictions 2> {os.devnull};"
            f' echo "$@" > {here}/$$.argv; if mkdir {here}/first 2> {os.devnull};'
            f' then set -- {shlex.join(first)} "$@"; fi; exec {fake} --log {here}/$$.jsonl "$@"'
        )
        return shlex.join(["/bin/sh", "-c", script, "engine"])

    def engine_starts(self) -> list[tuple[float, str]]:
        """(wall clock, arguments) of each engine that was started, in order."""
        return sorted((p.stat().st_mtime, p.read_text()) for p in self.engines.glob("*.argv"))

    def predicted(self) -> list[str]:
        """The predictions that were on file when an engine was started, for each of them."""
        return [path.read_text() for path in self.engines.glob("*.predictions")]

    def engine_log(self) -> list[Json]:
        """What the engines say they sent, in the order in which it was asked for."""
        lines = [
            json.loads(line)
            for path in self.engines.glob("*.jsonl")
            for line in path.read_text().splitlines()
        ]
        return sorted(lines, key=lambda line: float(line["received"]))

    def processes(self) -> list[psutil.Process]:
        """All that live and belong to a command typed here, told by their environment.

        That of a command itself is its parent's, of which it is a copy.
        """
        mine = [psutil.Process(c.process.pid) for c in self.commands if c.process.poll() is None]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("LABS_RESULTS") == str(self.results) and lives(process):
                    mine.append(process)
        return mine

    def leaves(self) -> None:
        """Ends what still runs."""
        for command in self.commands:
            if command.process.poll() is None:
                command.process.kill()
                command.process.wait()
        assert not still_alive(self.processes())


@contextmanager
def reading(home: Path) -> Iterator[Reader]:
    """A reader; nothing of what they started is left when the block ends."""
    someone = Reader(home)
    try:
        yield someone
    finally:
        someone.leaves()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with reading(tmp_path / "reader") as someone:
        yield someone


@dataclass(frozen=True)
class Finished:
    """A whole run of a lab that ended, and who ran it."""

    reader: Reader
    command: Command

    @property
    def folder(self) -> RunFolder:
        return self.command.folder


Finish = Callable[[str], Finished]


@pytest.fixture(scope="session")
def finish(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finish]:
    """Runs a lab to its end, once; many tests look at what it left."""
    done: dict[str, Finished] = {}
    sizes = {name: f"{with_every_part(name)} {sizes_of(name).fake}" for name in EVERY_LAB}
    changes = {name: parse_changes(text) for name, text in sizes.items()}
    scale = catalog.scale_of(machine.cpu())
    resolved = [lab.at(scale, True, changes[name]) for name, lab in EVERY_LAB.items()]
    too_large = parse_changes(f"{sizes['chunked-prefill']} {TOO_LARGE}")
    resolved.append(EVERY_LAB["chunked-prefill"].at(scale, True, too_large))
    # vLLM takes ten seconds to import: the runs below need not ask its parser again
    on_vllm = [(lab, v) for lab in resolved for v in lab.variants if v.engine == DEFAULT_ENGINE]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vllm, "PARSING", with_vllm.python("serving.plugins.parsing"))
        Vllm.check_flags([lab.flags_of(variant) for lab, variant in on_vllm])
    with ExitStack() as readers:

        def finish(lab: str) -> Finished:
            if lab not in done:
                someone = readers.enter_context(reading(tmp_path_factory.mktemp(lab) / "reader"))
                settings = f"{BRIEF} {sizes[lab]}"
                command = someone.types(
                    "run", lab, QUICK="1", SET=settings, program=LABS_WITH_FAKE_MODELS
                )
                command.wait(400)
                done[lab] = Finished(someone, command)
            return done[lab]

        yield finish


@contextmanager
def fake_engine(log: Path, *flags: str) -> Iterator[str]:
    """A fake engine that no lab started; its address. Its log is whole when the block has ended."""
    argv = [sys.executable, "-m", "tests.fake.engine", "--port", "0", "--log", str(log), *flags]
    process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        found = next(m for line in process.stderr if (m := re.search(r"http://\S+", line)))
        yield found[0]
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def router(replicas: Sequence[str]) -> Iterator[str]:
    """Pass connections on to these servers by turns; its address."""
    turns = itertools.cycle(urlsplit(each).port or 80 for each in replicas)

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", next(turns))) as server:
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                there = threading.Thread(target=copy, args=(self.request, server))
                there.start()
                copy(server, self.request)
                there.join()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as front:
        threading.Thread(target=front.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{front.server_address[1]}"
        front.shutdown()


def the_program(name: str, family: list[psutil.Process]) -> psutil.Process:
    """The process itself, not the guard that has its name among its arguments."""
    return next(p for p in family if name in p.cmdline()[:3] or Path(p.cmdline()[0]).name == name)


def still_alive(family: list[psutil.Process], timeout_s: float = 20) -> list[psutil.Process]:
    """Those that live on when the time is up; a zombie has ended."""
    deadline = time.monotonic() + timeout_s
    while left := [p for p in family if lives(p)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []
