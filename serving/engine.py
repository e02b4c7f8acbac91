"""The engine process: build its argv, check it, start it, wait until it serves, read it, stop it.

Flags keep vLLM's own names, so a reader can paste from vLLM's documentation. They are checked
against the installed vLLM's own parser before anything starts.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import requests

from serving import metrics
from serving.machine import engine_version, split_cores
from serving.models import CACHE, Model
from serving.process import Process

FlagValue = str | int | float | bool | dict[str, object] | list[str]

SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
START_TIMEOUT_S = 900.0
PARALLEL = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
LOOPBACK = "127.0.0.1"


class EngineError(Exception):
    """The engine cannot be started or has died; the message says why and what to do."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def require_port(port: int, setting: str) -> int:
    """The port itself if it is free; raises EngineError naming the setting that moves it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise EngineError(
                f"port {port} on {LOOPBACK} is taken: choose another with {setting}="
            ) from error
    return port


def flag_argv(flags: Mapping[str, FlagValue]) -> list[str]:
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


def placed(flags: Mapping[str, FlagValue], places: Mapping[str, Path]) -> dict[str, FlagValue]:
    """Flags with `<name>` replaced by where that model lies on this machine."""
    text = json.dumps(dict(flags))
    for name, path in places.items():
        text = text.replace(f"<{name}>", str(path))
    found: dict[str, FlagValue] = json.loads(text)
    return found


def serve_argv(model: Model, flags: Mapping[str, FlagValue], port: int) -> list[str]:
    own = ["--model", str(model.path), "--served-model-name", model.name]
    own += ["--load-format", "dummy"] if model.dummy else []
    return [*own, "--host", LOOPBACK, "--port", str(port), *flag_argv(flags)]


def serve_env(kind: str, model: Model, one_runner: bool = False) -> dict[str, str]:
    """The environment that matters to vLLM; everything else is inherited.

    `one_runner` has a GPU's engines all run on vLLM's first model runner. Its second, the default,
    knows neither n-grams nor draft models: with it, an engine that guesses ahead would differ from
    one that does not in more than the guesses.
    """
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache, on loopback only
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",  # connections opened before the load stay open
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # adapters come and go, on loopback only
    }
    if model.path.exists():
        env["HF_HUB_OFFLINE"] = "1"
    if model.dummy:  # evenly, as trained routers aim to; a random one has its favourites
        env["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] = "uniform_random"
    if kind == "gpu":
        # Top-k and top-p alone need it, and all that is sent is greedy; it is compiled as the
        # engine starts, which takes a CUDA toolkit that few machines have.
        env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        env |= {"VLLM_USE_V2_MODEL_RUNNER": "0"} if one_runner else {}
    if kind == "cpu":
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(c) for c in split_cores()[0])
    return env


# ---------------------------------------------------------------- checking flags before a start

_PARSE = """
import contextlib, io, json, sys
from vllm.utils.argparse_utils import FlexibleArgumentParser
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # before 0.32
    from vllm.entrypoints.openai.cli_args import make_arg_parser
parser = make_arg_parser(FlexibleArgumentParser())
errors = []
for argv in json.load(sys.stdin):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parser.parse_args(argv)
        errors.append(None)
    except (SystemExit, ValueError) as error:
        lines = said.getvalue().strip().splitlines() or [str(error)]
        errors.append(lines[-1].split(" error: ")[-1])
print(json.dumps({"options": sorted(parser._option_string_actions), "errors": errors}))
"""


def check_flags(flag_sets: Sequence[Mapping[str, FlagValue]]) -> None:
    """Let the installed vLLM's parser read every flag set; what it once accepted is remembered.

    Raises EngineError with the nearest known name for a misspelled flag, or the parser's own words
    for a value out of range. The parser does not check what only the engine's start can know
    (whether a length fits memory, for one).
    """
    memory = CACHE / f"vllm-{engine_version()}-flags.json"
    known = json.loads(memory.read_text()) if memory.exists() else {"options": [], "accepted": []}
    argvs = [flag_argv(flags) for flags in flag_sets]
    digests = [hashlib.sha256(json.dumps(argv).encode()).hexdigest()[:16] for argv in argvs]
    if known["options"]:
        _check_names(argvs, known["options"])
    if not set(digests) <= set(known["accepted"]):
        out = subprocess.run(
            [sys.executable, "-c", _PARSE],
            input=json.dumps(argvs),
            capture_output=True,
            text=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        )
        if out.returncode:
            raise EngineError(f"vLLM does not import here: {out.stderr.strip().splitlines()[-1]}")
        said = json.loads(out.stdout.splitlines()[-1])
        _check_names(argvs, said["options"])
        for error in filter(None, said["errors"]):
            raise EngineError(f"vLLM refuses a flag: {error}")
        known = {"options": said["options"], "accepted": [*known["accepted"], *digests]}
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps(known))


def _check_names(argvs: Sequence[Sequence[str]], options: Sequence[str]) -> None:
    for argument in (a for argv in argvs for a in argv if a.startswith("--")):
        if argument not in options:
            near = difflib.get_close_matches(argument, options, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else "see vLLM's engine arguments"
            raise EngineError(f"vLLM {engine_version()} has no flag {argument}: {hint}")


# --------------------------------------------------------------------------- engines that serve


class VllmEngine:
    """A vLLM we start, by `command`: its server, wrapped in a profiler for one, or a stand-in."""

    def __init__(
        self,
        name: str,
        model: Model,
        flags: Mapping[str, FlagValue],
        *,
        kind: str,
        log: Path,
        command: Sequence[str] = SERVER,
        port: int | None = None,
        one_runner: bool = False,
    ) -> None:
        self.name, self.model, self.log = name, model.name, log
        port = port or free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        self.argv = [*command, *serve_argv(model, flags, port)]
        env = serve_env(kind, model, one_runner)
        self._process = Process(f"engine {name}", self.argv, log=log, env=env)

    def wait(self, waiting: Callable[[float], None] = lambda elapsed_s: None) -> None:
        """Return when it answers; raises EngineError with its last lines when it cannot."""
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < START_TIMEOUT_S:
            if reason := self.died():
                raise EngineError(reason)
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=2).ok:
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
        """None while it lives, else one paragraph: the exit code, the cause, the last lines."""
        code = self._process.returncode
        if code is None:
            return None
        killed = " (SIGKILL: was memory short?)" if code == 128 + signal.SIGKILL else ""
        return (
            f"the engine {self.name} ended with exit code {code}{killed}: {_cause(self.log)}\n"
            f"its last lines ({self.log}):\n{self._process.tail()}"
        )

    def snapshot(self) -> metrics.Snapshot | None:
        found = _snapshot(self.url)
        if found and (resolved := self._resolved):
            found.info[metrics.ENGINE_CONFIG] = resolved
        return found

    @functools.cached_property
    def _resolved(self) -> dict[str, str]:
        """How it says that it runs the model: vLLM's metrics do not tell."""
        with self.log.open(errors="replace") as lines:
            return resolved(next((x for x in lines if "Initializing a V1 LLM engine" in x), ""))

    def reset_prefix_cache(self) -> None:
        requests.post(f"{self.url}/reset_prefix_cache", timeout=30).raise_for_status()

    def stop(self) -> None:
        self._process.stop()


class Endpoint:
    """An OpenAI-compatible server that is already running: driven, never started or stopped."""

    argv: Sequence[str] = ()

    def __init__(self, url: str) -> None:
        self.name, self.url = "endpoint", url.rstrip("/").removesuffix("/v1")
        try:
            answer = requests.get(f"{self.url}/v1/models", timeout=10)
            answer.raise_for_status()
            self.model = str(answer.json()["data"][0]["id"])
        except (requests.RequestException, KeyError, IndexError, ValueError) as error:
            raise EngineError(
                f"ENDPOINT={url} does not answer /v1/models ({type(error).__name__}): start the"
                " server first, or correct the address"
            ) from error

    def died(self) -> str | None:
        return None

    def snapshot(self) -> metrics.Snapshot | None:
        return _snapshot(self.url)

    def reset_prefix_cache(self) -> None:
        with contextlib.suppress(requests.RequestException):  # vLLM's alone, and only in dev mode
            requests.post(f"{self.url}/reset_prefix_cache", timeout=30)

    def stop(self) -> None:
        pass


def _snapshot(url: str) -> metrics.Snapshot | None:
    """The engine's metrics, or None where it has none that we know, or is gone."""
    try:
        answer = requests.get(f"{url}/metrics", timeout=10)
        found = metrics.parse(answer.text) if answer.ok else metrics.Snapshot()
    except (requests.RequestException, ValueError):
        return None
    return found if metrics.REQUESTS in found.values else None


_RESOLVED = {  # in vLLM 0.31 and 0.32
    "enforce_eager": re.compile(r"\benforce_eager=(\w+)"),
    "compilation_mode": re.compile(r"'mode': <CompilationMode\.(\w+)"),
    "cudagraph_mode": re.compile(r"'cudagraph_mode': <CUDAGraphMode\.(\w+)"),
}


def resolved(said: str) -> dict[str, str]:
    """Setting -> value, of those that can be read in an engine's own account of its config."""
    found = {name: pattern.search(said) for name, pattern in _RESOLVED.items()}
    return {name: match[1] for name, match in found.items() if match}


def _cause(log: Path) -> str:
    """The most telling line: the first exception named last before vLLM's own summary of it."""
    text = log.read_text(errors="replace") if log.exists() else ""
    found = re.findall(r"^(?:\(.*?\) )?.*?\b(\w*(?:Error|Exception): .+)$", text, re.MULTILINE)
    telling = [line for line in found if "See root cause above" not in line]
    return telling[-1].strip()[:300] if telling else "its log names no exception"
