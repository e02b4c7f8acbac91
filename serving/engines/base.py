"""What the lab needs of an engine: a class that a module of this folder fills in for each engine.

A `Server` is whatever answers OpenAI's API at an address; an `Engine` is a server that the lab
starts, checks and stops. A new engine is a subclass of `Engine` that says how it is started and
which of its metrics are which of the lab's (`serving/metrics.py`), and a line in
`serving/engines/__init__.py`. What a subclass does not override, its engine cannot do.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import requests

from serving import metrics
from serving.machine import Machine
from serving.metrics import Snapshot
from serving.models import Model, Shape
from serving.ports import LOOPBACK, free_port
from serving.process import Process

FlagValue = str | int | float | bool | dict[str, object] | list[str]
Flags = Mapping[str, FlagValue]  # the engine's own names, without the leading dashes

START_TIMEOUT_S = 900.0
METRICS_TIMEOUT_S = 10.0


class EngineError(Exception):
    """The engine cannot be started or has died; the message says why and what to do."""


class Unsupported(EngineError):
    """This kind of machine cannot do it, whatever the reader sets."""


class Server(ABC):
    """A server that answers OpenAI's API, whoever has started it."""

    argv: Sequence[str] = ()

    def __init__(self, name: str, model: str, url: str) -> None:
        self.name, self.model, self.url = name, model, url

    @abstractmethod
    def snapshot(self) -> Snapshot | None:
        """Its metrics by the lab's names; None where it has none that are known, or is gone."""

    def wait(self, waiting: Callable[[float], None] = lambda elapsed_s: None) -> None:
        """Return when it answers; raises EngineError with its last lines when it cannot."""
        return

    def died(self) -> str | None:
        """None while it lives, else one paragraph: the exit code, the cause, the last lines."""
        return None

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Without a way to do so nothing happens: a trial that finds
        its prompts in the cache then says so (`labs/judging/validity.py`)."""
        return

    def load_adapter(self, name: str, folder: Path) -> None:
        """Serve a LoRA adapter as the model `name`, while running. Raises EngineError."""
        raise EngineError(f"{self.name} cannot load adapters while it serves")

    def unload_adapter(self, name: str) -> None:
        """Serve this adapter no longer. Raises EngineError."""
        raise EngineError(f"{self.name} cannot unload adapters while it serves")

    def stop(self) -> None:
        """End it, if the lab has started it."""
        return


class Engine(Server):
    """An engine that the lab starts for one variant, in a process of its own."""

    title: ClassVar[str]  # as a reader knows it
    command: ClassVar[Sequence[str]]  # starts its server; the arguments follow
    distributions: ClassVar[Sequence[str]] = ()  # Python packages, one of which carries it
    metric_names: ClassVar[Mapping[str, str]] = {}  # its own name -> that of serving/metrics.py
    ready_path: ClassVar[str] = "/health"  # answers with success once it serves
    start_s: ClassVar[float | None] = None  # until it serves on a CPU, about

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
    ) -> None:
        """Start it, on a free port unless one is given.

        `command` replaces the engine's own: its server wrapped in a profiler for one, or a
        stand-in. `beside` holds the flags of all engines that it is compared with.
        """
        port = port or free_port()
        super().__init__(name, model.name, f"http://{LOOPBACK}:{port}")
        self.log = log
        self.argv = [*(command or self.command), *self.server_argv(model, flags, port)]
        env = self.environment(kind, model, beside)
        self._process = Process(f"engine {name}", self.argv, log=log, env=env)

    # what is known before one is started

    @classmethod
    def version(cls) -> str:
        """Of the package that carries it. Raises EngineError where none is installed."""
        for distribution in cls.distributions:
            with contextlib.suppress(metadata.PackageNotFoundError):
                return metadata.version(distribution)
        raise EngineError(f"{cls.title} is not installed here: run `make setup`")

    @classmethod
    def flag_argv(cls, flags: Flags) -> list[str]:
        """{"max-num-seqs": 8, "enable-x": False} -> ["--max-num-seqs", "8", "--no-enable-x"]."""
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
    @abstractmethod
    def server_argv(cls, model: Model, flags: Flags, port: int) -> list[str]:
        """What follows the command: serve this model on the loopback address with these flags."""

    @classmethod
    def environment(cls, kind: str, model: Model, beside: Sequence[Flags] = ()) -> dict[str, str]:
        """The environment variables that matter to it; everything else is inherited."""
        return {}

    @classmethod
    def check_flags(cls, flag_sets: Sequence[Flags]) -> None:
        """Raises EngineError for a flag that it does not know or a value that it does not take."""
        return

    @classmethod
    def require_devices(cls, variant: str, flags: Flags, machine: Machine) -> None:
        """Raises EngineError where the flags ask for what this machine lacks; Unsupported where no
        setting of the reader's would help."""
        return

    @classmethod
    def require_compiler(cls, variant: str, flags: Flags, machine: Machine) -> None:
        """Raises EngineError where it compiles as it starts and nothing here can."""
        return

    @classmethod
    def require_sizes(cls, variant: str, flags: Flags, model: Model, longest_tokens: int) -> None:
        """Raises EngineError where the model or its longest request exceed the flags' limits."""
        return

    @classmethod
    def require_memory(cls, variant: str, flags: Flags, machine: Machine, shape: Shape) -> None:
        """Raises EngineError where the device cannot hold what is asked for."""
        return

    @classmethod
    def host_memory_bytes(cls, flags: Flags, shape: Shape) -> int | None:
        """What it takes of the host's memory on a CPU; None where that is not known, so that
        engines are started one after another."""
        return None

    # what is read of a running one

    @classmethod
    def read_metrics(cls, text: str) -> Snapshot:
        """What its `/metrics` says, by the lab's names."""
        return metrics.parse(text, cls.metric_names)

    @classmethod
    def read_log(cls, log: Path) -> dict[str, dict[str, str]]:
        """Evidence that only its log has: info metric -> label -> value."""
        return {}

    @classmethod
    def cause(cls, log: Path) -> str:
        """The most telling line of the log of one that has died."""
        return next(iter(exceptions(log)[::-1]), "its log names no exception")

    def snapshot(self) -> Snapshot | None:
        """Its metrics by the lab's names; None where it has none that are known, or is gone."""
        text = metrics_text(self.url)
        try:
            read = self.read_metrics(text or "")
        except ValueError:  # it is no text of Prometheus's
            return None
        if metrics.REQUESTS not in read.values:
            return None
        read.info.update(self._logged)
        return read

    @functools.cached_property
    def _logged(self) -> dict[str, dict[str, str]]:
        return self.read_log(self.log)

    # its life

    def wait(self, waiting: Callable[[float], None] = lambda elapsed_s: None) -> None:
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < START_TIMEOUT_S:
            if reason := self.died():
                raise EngineError(reason)
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}{self.ready_path}", timeout=2).ok:
                    return
            waiting(elapsed)
            time.sleep(0.25)
        raise EngineError(
            f"the engine {self.name} did not answer within {START_TIMEOUT_S:.0f} s; its last"
            f" lines:\n{self._process.tail()}"
        )

    @property
    def pid(self) -> int:
        """Of its guard; the engine's own processes are below it."""
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

    def stop(self) -> None:
        self._process.stop()


def metrics_text(url: str) -> str | None:
    """What a server's `/metrics` says; None where it has none or does not answer."""
    try:
        answer = requests.get(f"{url}/metrics", timeout=METRICS_TIMEOUT_S)
    except requests.RequestException:
        return None
    return answer.text if answer.ok else None


def exceptions(log: Path) -> list[str]:
    """`ValueError: why` of each exception that a Python program has left in its log, cut short."""
    text = log.read_text(errors="replace") if log.exists() else ""
    named = re.findall(r"^(?:\(.*?\) )?.*?\b(\w*(?:Error|Exception): .+)$", text, re.MULTILINE)
    return [line.strip()[:300] for line in named]


def with_places(flags: Flags, places: Mapping[str, Path]) -> dict[str, FlagValue]:
    """Flags with `<name>` replaced by where that derived model lies on this machine."""
    text = json.dumps(dict(flags))
    for name, path in places.items():
        text = text.replace(f"<{name}>", str(path))
    replaced: dict[str, FlagValue] = json.loads(text)
    return replaced
