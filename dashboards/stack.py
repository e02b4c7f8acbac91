"""Prometheus and Grafana in containers: `make stack`, `make stop`.

The containers read the committed dashboards, and the data and targets of `make watch`. Their
Prometheus takes the place of that one: labs record into it, and it shows imported runs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from dashboards import prometheus
from serving import atomic
from serving.models.catalog import CACHE
from serving.processes.ports import require_port

COMPOSE = Path(__file__).with_name("compose.yml")
PASSWORD_FILE = CACHE / "grafana-password"
WITHOUT = "`make watch` needs no container"


class StackError(Exception):
    """The containers cannot be started; the message says why and how to mend it."""


@dataclass(frozen=True)
class Stack:
    """The containers: Prometheus and Grafana on these ports."""

    grafana_port: int
    prometheus_port: int

    @property
    def url(self) -> str:
        """Return the address of Grafana."""
        return f"http://127.0.0.1:{self.grafana_port}"

    def start(self) -> None:
        """Start the containers, or none of them.

        Raises StackError, or PortTaken where a port is in use.
        """
        require_docker()
        if prometheus.watching():
            raise StackError("a Prometheus is up already and has the data: `make stop` stops it")
        if not self._compose("ps", "--quiet"):  # else the ports are its own
            require_port(self.prometheus_port, "PROMETHEUS_PORT")
            require_port(self.grafana_port, "GRAFANA_PORT")
        prometheus.prepare()
        try:
            self._compose("up", "--detach", "--wait")
            prometheus.adopt(self.prometheus_port, self._prometheus_pid(), own=False)
        except StackError:
            with contextlib.suppress(StackError):
                self._compose("down")
            raise

    def stop(self) -> None:
        """Stop the containers. Raises StackError."""
        require_docker()
        prometheus.unwatch()
        self._compose("down")

    def _prometheus_pid(self) -> int:
        """Find the container's process on this machine. Raises StackError.

        With Docker in a virtual machine, the same number may belong to another process here.
        """
        container = self._compose("ps", "--quiet", "prometheus").strip()
        if not container:
            line = self._compose("logs", "--no-log-prefix", "--tail", "1", "prometheus").strip()
            raise StackError(f"Prometheus ended in its container: {line or 'its log is empty'}")
        pid = int(_output_of(["docker", "inspect", "--format", "{{.State.Pid}}", container]))
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).name() == "prometheus":
                return pid
        raise StackError(
            "docker does not run on this machine itself (in a virtual machine?), so labs could"
            f" not record into its Prometheus; {WITHOUT}"
        )

    def _compose(self, *arguments: str) -> str:
        return _output_of(
            ["docker", "compose", "--file", str(COMPOSE), *arguments],
            {
                "GRAFANA_PASSWORD": password(),
                "GRAFANA_PORT": str(self.grafana_port),
                "PROMETHEUS_PORT": str(self.prometheus_port),
                "PROMETHEUS_DATA": str(prometheus.HOME),
                "LAB_USER": f"{os.getuid()}:{os.getgid()}",
            },
        )


def require_docker() -> None:
    """Check that containers can be started here. Raises StackError where they cannot."""
    if shutil.which("docker") is None:
        raise StackError(f"docker is not installed: the stack runs in containers; {WITHOUT}")
    if _fails("docker", "compose", "version"):
        raise StackError(
            "docker has no compose plugin (`docker compose version` fails): install it, on Debian"
            f" and Ubuntu as docker-compose-plugin or docker-compose-v2; {WITHOUT}"
        )
    try:
        security = _output_of(["docker", "info", "--format", "{{.SecurityOptions}}"])
    except StackError as error:
        raise StackError(
            "the docker daemon does not answer: start it, or have yourself added to the group"
            f" docker; {WITHOUT}"
        ) from error
    if "rootless" in security:
        raise StackError(
            "this docker is rootless: its containers do not share this machine's loopback, on"
            f" which labs and Prometheus meet; {WITHOUT}"
        )


def password() -> str:
    """Return GRAFANA_PASSWORD, or a random one, stored where only its owner can read it."""
    if chosen := os.environ.get("GRAFANA_PASSWORD"):
        return chosen
    with contextlib.suppress(FileNotFoundError):
        if stored := PASSWORD_FILE.read_text():
            return stored
    atomic.write(PASSWORD_FILE, secrets.token_urlsafe(18), mode=0o600)
    return PASSWORD_FILE.read_text()


def _fails(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


def _output_of(command: list[str], settings: dict[str, str] | None = None) -> str:
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(settings or {})}
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise StackError(f"`{' '.join(command[:2])}` failed: {last}")
    return process.stdout
