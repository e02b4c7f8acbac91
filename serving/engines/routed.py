"""Replicas of vLLM behind a router, which the labs take for one engine.

The router is SGLang's, a Rust program from PyPI: <https://github.com/sgl-project/sglang>. What is
asked of the engine itself, such as its metrics or to forget its prefixes, is asked of each replica;
a request goes to the router, with the head that the load generator gives it. Observed with
sglang-router 0.3.2. vLLM's own, vllm-router 0.1.13 to 0.1.17, compares no texts of chats: 0.1.17
has a replica tokenize each, which vLLM 0.32 refuses without `--enable-scale-out`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

from serving import metrics
from serving.engines.base import METRICS_TIMEOUT_S, MOST_READY_BYTES, EngineError, Unsupported
from serving.engines.flags import Flags
from serving.engines.vllm import Vllm
from serving.engines.vllm_flags import VllmFlags
from serving.hardware import machine as machines
from serving.hardware.machine import Machine
from serving.models.catalog import Model
from serving.places import how_to_install
from serving.plugins.replicas import environment_of
from serving.processes.answers import ask
from serving.processes.ports import LOOPBACK, free_port

PACKAGE = "sglang_router"
PLAIN: Flags = {
    "disable-retries": True,  # what fails counts once
    "disable-circuit-breaker": True,
    "request-timeout-secs": 86_400,
    "worker-startup-timeout-secs": 3_600,
    "health-check-interval-secs": 3_600,  # each replica is watched as the engines are
    "worker-startup-check-interval": 1,
    "log-level": "info",  # it logs its policy
}
"""Flags under which the router passes on each request once, at once, whatever became of others."""


class Routed(Vllm):
    """A router, and the replicas of vLLM that it sends requests to."""

    title = "vLLM behind a router"

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._given, self._named = given, named
        plan = json.loads(self.argv[-1])
        self._replicas: list[str] = plan["urls"]
        self._router_metrics: str = plan["metrics"]

    @classmethod
    def whole_argv(
        cls, command: Sequence[str], model: Model, flags: Flags, port: int
    ) -> Sequence[str]:
        vllm_flags, metrics_port = VllmFlags(flags), free_port()
        ports = [free_port() for _ in range(vllm_flags.replicas)]
        urls = [f"http://{LOOPBACK}:{each}" for each in ports]
        own = {
            **PLAIN,
            **vllm_flags.router,
            "worker-urls": urls,
            "host": LOOPBACK,
            "port": port,
            "prometheus-host": LOOPBACK,
            "prometheus-port": metrics_port,
        }
        plan = {
            "replicas": [[*command, *cls.server_argv(model, flags, each)] for each in ports],
            "router": [sys.executable, "-m", f"{PACKAGE}.launch_router", *router_argv(own)],
            "gpus": here.count if (here := machines.detect()).kind == "gpu" else 0,
            "urls": urls,
            "metrics": f"http://{LOOPBACK}:{metrics_port}",
        }
        return [sys.executable, "-m", "serving.plugins.replicas", json.dumps(plan)]

    @classmethod
    def read_log(cls, log: Path) -> dict[str, dict[str, str]]:
        return {**super().read_log(log), metrics.ROUTER: policy_of(log.read_text(errors="replace"))}

    def another(self, flags: Flags, env: Mapping[str, str]) -> Vllm:
        """Start one more replica, with these flags and variables before its own.

        It has the next core or GPU, and the router does not know it.
        """
        (name, model, own), named, number = self._given, self._named, len(self._replicas)
        inherited = {**os.environ, **self.environment(named["kind"], model, named["beside"])}
        gpus = here.count if (here := machines.detect()).kind == "gpu" else 0
        return Vllm(
            f"{name}, replica {number}",
            model,
            {**own, **flags},
            **{**named, "log": self.log.with_name(f"{self.log.stem}-{number}.log")},
            more_env={**environment_of(number, number + 1, gpus, inherited), **env},
        )

    def admit(self, url: str) -> None:
        """Have the router send requests to one more replica, too. Raises EngineError."""
        self._tell_router("POST", "workers", json={"url": url})

    def dismiss(self, url: str) -> None:
        """Have the router send no more requests to a replica. Raises EngineError."""
        for worker in self._tell_router("GET", "workers")["workers"]:
            if worker["url"] == url:
                self._tell_router("DELETE", f"workers/{worker['id']}")

    def _tell_router(self, method: str, path: str, **body: Any) -> Any:
        try:
            answer = ask(
                method,
                f"{self.url}/{path}",
                within_s=METRICS_TIMEOUT_S,
                most_bytes=MOST_READY_BYTES,
                **body,
            )
        except requests.RequestException as error:
            raise EngineError(f"the router of {self.name} did not answer: {error}") from error
        if not answer.ok:
            raise EngineError(
                f"the router of {self.name} refused {method} /{path}: {answer.text[:300]}"
            )
        return answer.json() if answer.body else None

    @property
    def engine_urls(self) -> Sequence[str]:
        return self._replicas

    def _is_ready(self, base: str) -> bool:
        """Ask a replica for its health, and the router whether it knows that of all."""
        url = f"{base}/readiness" if base == self.url else f"{base}{self.ready_path}"
        return ask("GET", url, within_s=2, most_bytes=MOST_READY_BYTES, headers={}).ok

    @property
    def scraped(self) -> Mapping[str, str]:
        replicas = {str(i): url for i, url in enumerate(self._replicas)}
        return {**replicas, "router": self._router_metrics}

    @classmethod
    def require_devices(cls, variant: str, flags: Flags, machine: Machine) -> None:
        """Check for the router, and on a CPU for a core for each replica. Raises EngineError."""
        vllm_flags = VllmFlags(flags)
        if not importlib.util.find_spec(PACKAGE):
            raise Unsupported(
                f"{variant} needs sglang-router, which is not installed here:"
                f" {how_to_install('cuda' if machine.kind == 'gpu' else 'cpu')}"
            )
        if machine.kind == "cpu" and vllm_flags.copies > machine.count:
            raise EngineError(
                f"{variant} has {vllm_flags.copies} copies of the model, and this machine"
                f" {machine.count} cores: give as many replicas as cores, or fewer"
            )
        super().require_devices(variant, vllm_flags.without_router(), machine)


def policy_of(text: str) -> dict[str, str]:
    """Read what a router logs of itself as it starts: its policy, its limits, how many replicas."""
    found = re.search(r"worker_urls: \[(.*?)\] \} \| policy: (\w+)(?: \{(.*?)\})?", text)
    if not found:
        return {}
    urls, policy, limits = found.groups(default="")
    return {
        "replicas": str(urls.count("http")),
        "policy": re.sub(r"(?<!^)(?=[A-Z])", "_", policy).lower(),
        **dict(re.findall(r"(\w+): ([\d.]+)", limits)),
    }


def router_argv(flags: Flags) -> list[str]:
    """Turn the router's flags into arguments; it has no `--no-` form.

    {"policy": "random", "disable-retries": True} -> ["--policy", "random", "--disable-retries"]
    """
    argv: list[str] = []
    for name, value in flags.items():
        if value is not False:
            values = value if isinstance(value, list) else [] if value is True else [str(value)]
            argv += [f"--{name}", *values]
    return argv
