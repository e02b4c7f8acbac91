"""Prometheus beside a run: no container, no service, its data kept between runs.

It scrapes the load generator's exporter and every engine once a second. Engines are found through
a file that is rewritten as they start, with the labels `lab, variant, run_id` that the client's
metrics carry too. The Debian build serves its graph page at /classic/graph.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import requests

from serving.install import find_prometheus
from serving.models import CACHE, ROOT
from serving.process import Process

READY_TIMEOUT_S = 15.0

_CONFIG = """\
global:
  scrape_interval: 1s
  scrape_timeout: 1s
scrape_configs:
  - job_name: client
    honor_labels: true
    static_configs:
      - targets: ["127.0.0.1:{exporter_port}"]
  - job_name: engine
    file_sd_configs:
      - files: ["{targets}"]
        refresh_interval: 1s
    metric_relabel_configs:  # a series for every set of adapters that ever ran together
      - source_labels: [__name__]
        regex: vllm:lora_requests_info
        action: drop
"""


class Prometheus:
    """A running Prometheus, or the reason why there is none (`missing`)."""

    def __init__(self, port: int, exporter_port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.missing: str | None = None
        self._process: Process | None = None
        self._found: list[dict[str, object]] = []
        home = CACHE / "prometheus"
        home.mkdir(parents=True, exist_ok=True)
        self._targets = home / "engines.json"
        self._write_targets()
        config = home / "prometheus.yml"
        config.write_text(_CONFIG.format(exporter_port=exporter_port, targets=self._targets))
        binary = find_prometheus(ROOT)
        if binary is None:
            self.missing = "Prometheus is not installed (`make setup` says how to get it)"
            return
        argv = [
            str(binary),
            f"--config.file={config}",
            f"--storage.tsdb.path={home / 'data'}",
            "--storage.tsdb.retention.size=2GB",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        self._process = Process("prometheus", argv, log=log)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline and self._process.returncode is None:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/-/ready", timeout=1).ok:
                    return
            time.sleep(0.1)
        self.missing = f"Prometheus did not start: {self._process.tail(1)}"
        self.stop()

    @property
    def graph_url(self) -> str:
        return f"{self.url}/classic/graph"

    def watch_engine(self, url: str, labels: Mapping[str, str]) -> None:
        """Scrape this engine from now on."""
        self._found.append({"targets": [url.removeprefix("http://")], "labels": dict(labels)})
        self._write_targets()

    def _write_targets(self) -> None:
        half = self._targets.with_suffix(".half")
        half.write_text(json.dumps(self._found))
        half.rename(self._targets)

    def value(self, expression: str) -> float | None:
        """An instant query's single number; None without an answer."""
        if self.missing or (self._process and self._process.returncode is not None):
            self.missing = self.missing or "Prometheus ended during the run"
            return None
        try:
            answer = requests.get(
                f"{self.url}/api/v1/query", {"query": expression}, timeout=10
            ).json()
            return float(answer["data"]["result"][0]["value"][1])
        except (requests.RequestException, KeyError, IndexError, ValueError):
            return None

    def settle(self, expression: str, expected: float, timeout_s: float = 5.0) -> float | None:
        """The query's value once it equals `expected`, or its last one when time is up.

        A counter is complete in Prometheus only one scrape after its last change.
        """
        deadline = time.monotonic() + timeout_s
        while (found := self.value(expression)) != expected and time.monotonic() < deadline:
            if self.missing:
                return None
            time.sleep(0.25)
        return found

    def stop(self) -> None:
        if self._process:
            self._process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
