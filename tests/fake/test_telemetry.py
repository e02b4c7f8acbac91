"""A run beside a stand-in for a GPU: its energy in the report, its gauges in Prometheus."""

from __future__ import annotations

import re
import time

import pytest
import requests

from serving.models.catalog import ROOT
from serving.packaging.install import find_prometheus
from tests.fake.conftest import Reader
from tests.fake.nvml import WATTS

WITH_A_GPU = (
    "-c",
    "from serving.hardware import gpus, telemetry; from tests.fake.nvml import make_nvml\n"
    "gpus.visible = lambda nvml: [0]\n"
    "telemetry.source = lambda kind, count: telemetry.Gpus(make_nvml())\n"
    "from labs.harness.cli.cli import app; app()",
)
LOADS = (
    "warmup_s=0.1 requests=64 repeats=1 most_repeats=0 window_s=2"
    ' workloads.exponential.loads=["concurrent:4"] workloads.fixed.loads=["concurrent:2"]'
)


def _asked(url: str, query: str) -> list[dict[str, dict[str, str]]]:
    answer = requests.get(f"{url}/api/v1/query", {"query": query}, timeout=10).json()
    found: list[dict[str, dict[str, str]]] = answer["data"]["result"]
    return found


def test_a_run_beside_a_gpu(reader: Reader) -> None:
    command = reader.types("run", "continuous-batching", SET=LOADS, program=WITH_A_GPU)
    if find_prometheus(ROOT):
        url = re.sub(r"/user.*", "", command.until(r"Prometheus: (\S+)")[1])
        while not (shown := _asked(url, "lab_gpu_power_watts")):
            assert command.process.poll() is None, command.said
            time.sleep(0.1)
        labels = shown[0]["metric"]
        assert {k: labels[k] for k in ("lab", "variant", "gpu")} == {
            "lab": "continuous-batching", "variant": "base", "gpu": "0",
        }  # fmt: skip
    assert command.wait() == 0, command.said
    folder = command.folder
    rows = [row for of in folder.summary().measurements.values() for row in of.values()]
    assert rows
    for row in rows:
        energy_j, rate = row["joules_per_token"], row["output_tokens_per_s"]
        assert energy_j
        assert rate
        assert energy_j * rate == pytest.approx(WATTS, rel=0.02)
    report = (folder.path / "report.md").read_text()
    assert "J/token" in report
    assert "**throttled** (no verdict" in report
