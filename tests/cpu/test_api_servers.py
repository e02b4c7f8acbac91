"""Several API servers of a real vLLM, in front of an engine core that computes nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import requests

from bench.engine import ENGINE_FLAGS
from labs.harness.runner.machine_load import ServerLoad
from serving import metrics
from serving.engines.vllm import Vllm
from serving.hardware import machine
from serving.models import catalog
from serving.plugins import guard

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        machine.detect().kind != "cpu", reason="this machine has a GPU: see tests/gpu"
    ),
]
ASKED = 12
INSTANT = "tests.cpu.instant.InstantExecutor"


@pytest.mark.timeout(900)  # beside the labs of other tests
def test_two_api_servers_are_found_and_their_counts_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answers some of the requests, and either shows what both have counted."""
    counts = tmp_path / "counts"  # forked servers have imported their client of Prometheus before
    counts.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(counts))
    flags = {**ENGINE_FLAGS, "distributed-executor-backend": INSTANT, "api-server-count": 2}
    host = machine.detect()
    model = catalog.resolve(host)
    engine = Vllm("two", model, flags, kind=host.kind, log=tmp_path / "engine.log")
    try:
        engine.wait()
        servers = engine.api_servers()
        assert len(servers) == 2
        server_load, began_s = ServerLoad(servers), time.monotonic()
        before = engine.snapshot()
        assert before
        for _ in range(ASKED):  # each on a connection of its own
            answer = requests.post(
                f"{engine.url}/v1/chat/completions",
                json={"model": model.name, "messages": [{"role": "user", "content": "Count."}],
                      "max_tokens": 4, "ignore_eos": True},
                headers=guard.headers(), timeout=60,
            )  # fmt: skip
            assert answer.json()["usage"]["completion_tokens"] == 4
        ended_s = time.monotonic()
        server_load.read()
        assert server_load.busiest(began_s, ended_s)
        after = engine.snapshot()
        assert after
        risen = after.since(before)
        assert risen.values[metrics.REQUESTS] == ASKED
        assert risen.values[metrics.GENERATION_TOKENS] == 4 * ASKED
        assert risen.histograms[metrics.TTFT].count == ASKED
        assert metrics.CACHE_CONFIG in after.info
        assert metrics.ENGINE_CONFIG in after.info
    finally:
        engine.stop()
