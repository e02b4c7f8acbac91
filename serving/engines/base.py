"""The base classes of servers and engines.

A `Server` answers OpenAI's API at an address; an `Engine` is a server that the lab starts, checks
and stops. A new engine is a subclass of `Engine`, in a module of this folder, that says how it is
started and maps its metrics to the lab's (`serving/metrics.py`), and a line in
`serving/engines/__init__.py`. What a subclass does not override, its engine cannot do.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import requests

from serving import metrics
from serving.engines.flags import Flags, Harmless
from serving.hardware.machine import Machine
from serving.metrics import Snapshot
from serving.models.catalog import Model, Shape
from serving.places import how_to_install
from serving.plugins import guard
from serving.processes.answers import ask
from serving.processes.ports import LOOPBACK, free_port
from serving.processes.process import Process

START_TIMEOUT_S = 900.0
METRICS_TIMEOUT_S, MOST_METRICS_BYTES = 10.0, 32 * 2**20
MOST_READY_BYTES = 2**20


class EngineError(Exception):
    """The engine cannot be started or has died; the message says why and what to do."""


class Unsupported(EngineError):
    """This kind of machine cannot do it, whatever the reader sets."""


class Server(ABC):
    """A server that answers OpenAI's API, whoever has started it."""

    argv: Sequence[str] = ()
    closes_connections: ClassVar[bool] = False  # after each streamed answer, without saying so

    def __init__(self, name: str, model: str, url: str) -> None:
        self.name, self.model, self.url = name, model, url

    @abstractmethod
    def snapshot(self) -> Snapshot | None:
        """Read its metrics by the lab's names; None where it has no known ones, or is gone."""

    def wait(
        self,
        waiting: Callable[[float], None] = lambda elapsed_s: None,
        timeout_s: float | None = None,
    ) -> None:
        """Wait until it answers. Raises EngineError with its last lines when it cannot.

        `timeout_s` counts from when it was started, so that engines that were started together have
        the same time, whichever is waited for first; `waiting` is given the seconds since then.
        """
        return

    def died(self) -> str | None:
        """Describe how it ended: the exit code, the cause, the last lines; None while it runs."""
        return None

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, if the server has a way to do so.

        Otherwise a trial that finds its prompts in the cache says so (`analysis/checks.toml`).
        """
        return

    @property
    def engine_urls(self) -> Sequence[str]:
        """The addresses of the engines that compute: its own, unless it stands before others."""
        return (self.url,)

    @property
    def scraped(self) -> Mapping[str, str]:
        """The addresses whose `/metrics` Prometheus reads, by a label where they are several."""
        return {"": self.url}

    @property
    def request_fields(self) -> Mapping[str, object]:
        """The fields that it needs otherwise in a request's body; None leaves a field out."""
        return {}

    @property
    def model_names(self) -> Mapping[str, str]:
        """The names that it gives models in its answers -> the lab's, where they differ."""
        return {}

    def served(self) -> dict[str, str]:
        """Ask which weights it serves: `folder`, its name, and `files_sha256`, over its files.

        What it does not say is missing.
        """
        return {}

    @property
    def pid(self) -> int | None:
        """The pid above all of its processes; None where the lab has not started it."""
        return None

    def api_servers(self) -> list[int]:
        """List the pids of the processes that answer requests and leave computing to others.

        Empty where they are not known, or where one process does both.
        """
        return []

    def computing(self) -> list[int]:
        """List the pids of its processes that compute, if the lab has started it."""
        return []

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a LoRA adapter while running, and serve it as the model `name`.

        Raises EngineError.
        """
        raise EngineError(f"{self.name} cannot load adapters while it serves")

    def unload_adapter(self, name: str) -> None:
        """Stop serving this adapter. Raises EngineError."""
        raise EngineError(f"{self.name} cannot unload adapters while it serves")

    def suspend(self) -> None:
        """Halt what computes in it until `resume`, if the lab has started it: requests wait."""
        return

    def resume(self) -> None:
        """Let it go on after `suspend`."""
        return

    def give_way(self, cores: Collection[int]) -> None:
        """Let others go first on these cores, if the lab has started it."""
        return

    def stop(self) -> None:
        """End the server, if the lab has started it."""
        return


class Engine(Server):
    """An engine that the lab starts for one variant, in a process of its own."""

    title: ClassVar[str]  # as a reader knows it
    command: ClassVar[Sequence[str]]  # starts its server; the arguments follow
    distributions: ClassVar[Sequence[str]] = ()  # Python packages, one of which carries it
    reads: ClassVar[str] = ""  # the derived model that holds the served weights in its own format
    says_what_it_serves: ClassVar[bool] = False  # so that a trial must show its weights: `served`
    metric_names: ClassVar[Mapping[str, str]] = {}  # its own name -> that of serving/metrics.py
    ready_path: ClassVar[str] = "/health"  # answers with success once it serves
    sockets_variable: ClassVar[str] = ""  # names the folder of its sockets in its environment
    server_bytes: ClassVar[int] = 2**30  # of each of its servers on the host, about
    start_s: ClassVar[float | None] = None  # until it serves on a CPU, about
    in_float32: ClassVar[Flags] = {}  # by which it serves in float32
    harmless: ClassVar[type[Harmless]] = Harmless  # its flags that may come from anybody
    other_flags: ClassVar[Sequence[str]] = ()  # that it has
    set_by_lab: ClassVar[Sequence[str]] = ()
    lacks: ClassVar[Sequence[str]] = ()  # of what the labs ask of vLLM, for a reader

    def __init__(
        self,
        name: str,
        model: Model,
        flags: Flags,
        *,
        kind: str,
        log: Path,
        command: Sequence[str] = (),
        port: int | None = None,
        beside: Sequence[Flags] = (),
        more_env: Mapping[str, str] | None = None,
    ) -> None:
        """Start it, on a free port unless one is given, with `more_env` before its environment.

        `command` replaces the engine's own: its server wrapped in a profiler for one, or a
        stand-in. `beside` holds the flags of all engines that it is compared with.
        """
        port = port or free_port()
        super().__init__(name, model.name, f"http://{LOOPBACK}:{port}")
        self.log = log
        self._log_bytes, self._log_read = -1, dict[str, dict[str, str]]()  # size when last read
        self.flags = flags
        self.argv = self.whole_argv(command or self.server_command(flags), model, flags, port)
        env = {
            **self.environment(kind, model, beside),
            **self.controls(flags),
            guard.KEY: guard.key(),
            guard.ADAPTERS: os.pathsep.join(self.adapter_folders(flags)),
            **(more_env or {}),
        }
        self._started_s = time.monotonic()
        self._process = Process(
            f"engine {name}",
            self.argv,
            log=log,
            env=env,
            folder_variable=self.sockets_variable,
            own_session=False,  # the engines of a run take turns on a core
        )

    # before it is started

    @classmethod
    def is_installed(cls) -> bool:
        """Tell whether its package is here."""
        try:
            return bool(cls.version())
        except EngineError:
            return False

    @classmethod
    def version(cls) -> str:
        """Return the version of its package. Raises EngineError where none is installed."""
        for distribution in cls.distributions:
            with contextlib.suppress(metadata.PackageNotFoundError):
                return metadata.version(distribution)
        raise EngineError(f"{cls.title} is not installed here: {how_to_install('cuda')}")

    @classmethod
    def cannot_serve(
        cls, model: Model, flags: Flags, machine: Machine, weight_bits: int = 16
    ) -> str:
        """Say why it cannot serve this model here, such as what is not installed and how to.

        Empty where it can, as far as is known before it starts. A lab that compares engines leaves
        its variant out, and goes on with the others.
        """
        return ""

    @classmethod
    def flag_argv(cls, flags: Flags) -> list[str]:
        """Turn flags into arguments: {"max-num-seqs": 8, "enable-x": False} -> ["--max-num-seqs",
        "8", "--no-enable-x"]."""
        argv: list[str] = []
        for name, value in flags.items():
            if isinstance(value, bool):
                argv.append(f"--{name}" if value else f"--no-{name}")
            else:
                items = value if isinstance(value, list) else [value]
                argv += [
                    f"--{name}",
                    *(json.dumps(v) if isinstance(v, dict) else str(v) for v in items),
                ]
        return argv

    @classmethod
    def server_command(cls, flags: Flags) -> Sequence[str]:
        """Return what starts its server with these flags; the arguments follow."""
        return cls.command

    @classmethod
    def whole_argv(
        cls, command: Sequence[str], model: Model, flags: Flags, port: int
    ) -> Sequence[str]:
        """Return the command with its arguments."""
        return [*command, *cls.server_argv(model, flags, port)]

    @classmethod
    @abstractmethod
    def server_argv(cls, model: Model, flags: Flags, port: int) -> list[str]:
        """Return the command's arguments that serve this model with these flags on loopback."""

    @classmethod
    def environment(cls, kind: str, model: Model, beside: Sequence[Flags] = ()) -> dict[str, str]:
        """Return the environment variables that it needs; all others are inherited."""
        return {}

    @classmethod
    def adapter_folders(cls, flags: Flags) -> list[str]:
        """Return the folders below which the adapters lie that it may be told to load."""
        return []

    @classmethod
    def controls(cls, flags: Flags) -> dict[str, str]:
        """Return the variables that open what a run asks beside OpenAI's API.

        Only with the flags that need it, and never for a server that the reader starts by hand.
        """
        return {}

    @classmethod
    def check_flags(cls, flag_sets: Sequence[Flags]) -> None:
        """Check flags' names and values. Raises EngineError for one that it does not accept."""
        cls.require_not_set_by_lab(flag_sets)
        known = [*cls.harmless.names(), *cls.other_flags]
        for name in (name for flags in flag_sets for name in flags if name not in known):
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean --{near[0]}?" if near else f"it has {', '.join(known)}"
            raise EngineError(f"{cls.title} has no flag --{name}: {hint}")
        for flags in flag_sets:
            typed = {name: at for name, at in flags.items() if name not in cls.other_flags}
            if refusal := cls.harmless.refusal(typed):
                raise EngineError(f"{cls.title}: {refusal}")

    @classmethod
    def require_not_set_by_lab(cls, flag_sets: Sequence[Flags]) -> None:
        """Raise EngineError where a flag would have it serve something else, or to others."""
        for name in (name for flags in flag_sets for name in flags if name in cls.set_by_lab):
            raise EngineError(f"the lab sets {name} itself: leave it out")

    @classmethod
    def refusal(cls, flags: Flags) -> str:
        """Say which of the flags may not come from a recorded run or `SET=`; empty for none."""
        return cls.harmless.refusal(flags)

    @classmethod
    def require_devices(cls, variant: str, flags: Flags, machine: Machine) -> None:
        """Check that this machine has the devices that the flags ask for.

        Raises EngineError where it lacks them, Unsupported where no other setting would help.
        """
        return

    @classmethod
    def gpus_used(cls, flags: Flags) -> int | None:
        """Return how many of the visible GPUs it uses, from the first on; None where any may be."""
        return None

    @classmethod
    def servers(cls, flags: Flags) -> int:
        """Return how many processes of it answer requests."""
        return 1

    @classmethod
    def require_compiler(cls, variant: str, flags: Flags, machine: Machine) -> None:
        """Check for a compiler. Raises EngineError where it needs one and none is here."""
        return

    @classmethod
    def require_sizes(cls, variant: str, flags: Flags, model: Model, longest_tokens: int) -> None:
        """Check the flags' limits. Raises EngineError where the model or a request exceeds them."""
        return

    @classmethod
    def require_memory(cls, variant: str, flags: Flags, machine: Machine, shape: Shape) -> None:
        """Check the device's memory. Raises EngineError where weights and cache do not fit."""
        return

    @classmethod
    def require_host_memory(cls, variant: str, flags: Flags) -> None:
        """Check this host's memory for what it keeps there for a GPU. Raises EngineError."""
        return

    @classmethod
    def host_memory_bytes(cls, flags: Flags, shape: Shape) -> int | None:
        """Estimate the host's memory that it takes on a CPU.

        None where that is not known: its engines are then started one after another.
        """
        return None

    # while it runs

    @classmethod
    def read_metrics(cls, text: str) -> Snapshot:
        """Parse the text of its `/metrics`, by the lab's names. Raises ValueError."""
        return metrics.parse(text, cls.metric_names)

    @classmethod
    def shown_metrics(cls) -> frozenset[str]:
        """Return the metrics that it shows, by the lab's names; none where it has no such page."""
        return frozenset(cls.metric_names.values())

    @classmethod
    def has_shown(cls, reading: Snapshot) -> bool:
        """Tell whether this is a reading of its metrics: it counts what the engine counts."""
        counted = cls.shown_metrics() & {metrics.REQUESTS, metrics.GENERATION_TOKENS}
        return bool(counted) and counted <= reading.values.keys()

    @classmethod
    def read_log(cls, log: Path) -> dict[str, dict[str, str]]:
        """Read evidence that only its log has: info metric -> label -> value."""
        return {}

    @classmethod
    def cause(cls, log: Path) -> str:
        """Find the line of a dead engine's log that best explains why it ended."""
        return next(iter(exceptions(log)[::-1]), "its log names no exception")

    def snapshot(self) -> Snapshot | None:
        try:
            readings = [self.read_metrics(metrics_text(url) or "") for url in self.engine_urls]
            if not all(map(self.has_shown, readings)):
                return None
            reading = metrics.across(readings) if len(readings) > 1 else readings[0]
        except ValueError:  # not in Prometheus's format
            return None
        reading.info.update(self._logged())
        return reading

    def _logged(self) -> dict[str, dict[str, str]]:
        """Read its log anew where that has grown: some evidence is written as it first computes."""
        size_bytes = self.log.stat().st_size
        if size_bytes != self._log_bytes:
            self._log_bytes, self._log_read = size_bytes, self.read_log(self.log)
        return self._log_read

    def wait(
        self,
        waiting: Callable[[float], None] = lambda elapsed_s: None,
        timeout_s: float | None = None,
    ) -> None:
        timeout_s = timeout_s or START_TIMEOUT_S
        while True:  # once at least: the time may have passed while another was waited for
            if reason := self.died():
                raise EngineError(reason)
            with contextlib.suppress(requests.RequestException):
                if all(map(self._is_ready, {*self.engine_urls, self.url})):
                    return
            if (elapsed := self.age_s) >= timeout_s:
                raise EngineError(
                    f"the engine {self.name} did not answer within {timeout_s:.0f} s; its last"
                    f" lines:\n{self._process.tail()}"
                )
            waiting(elapsed)
            time.sleep(0.25)

    def _is_ready(self, base: str) -> bool:
        """Ask one of its servers whether it serves. Raises requests.RequestException."""
        url = f"{base}{self.ready_path}"
        return ask("GET", url, within_s=2, most_bytes=MOST_READY_BYTES, headers={}).ok

    @property
    def age_s(self) -> float:
        """The seconds since it was started."""
        return time.monotonic() - self._started_s

    @property
    def pid(self) -> int:
        """The pid of its guard; the engine's own processes are below it."""
        return self._process.pid

    def died(self) -> str | None:
        code = self._process.returncode
        if code is None:
            return None
        killed = " (SIGKILL: was memory short?)" if code == 128 + signal.SIGKILL else ""
        return (
            f"the engine {self.name} ended with exit code {code}{killed}: {self.cause(self.log)}\n"
            f"its last lines ({self.log}):\n{self._process.tail()}"
        )

    def computing(self) -> list[int]:
        apart = self.api_servers()
        return [member.pid for member in self._process.family() if member.pid not in apart]

    def suspend(self) -> None:
        self._process.suspend(but=self.api_servers())  # which go on showing metrics

    def resume(self) -> None:
        self._process.resume()

    def give_way(self, cores: Collection[int]) -> None:
        self._process.give_way(cores)

    def stop(self) -> None:
        self._process.stop()


def metrics_text(url: str) -> str | None:
    """Get a server's `/metrics`; None where it has none or does not answer."""
    try:
        answer = ask(
            "GET", f"{url}/metrics", within_s=METRICS_TIMEOUT_S, most_bytes=MOST_METRICS_BYTES
        )
    except requests.RequestException:
        return None
    return answer.text if answer.ok else None


def exceptions(log: Path) -> list[str]:
    """Find the exceptions in a Python program's log, as `ValueError: why`, cut short."""
    text = log.read_text(errors="replace") if log.exists() else ""
    named = re.findall(r"^(?:\(.*?\) )?.*?\b(\w*(?:Error|Exception): .+)$", text, re.MULTILINE)
    return [line.strip()[:300] for line in named]
