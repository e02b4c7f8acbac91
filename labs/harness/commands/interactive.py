"""Drive a lab's workload by hand, from Locust's own web UI."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import requests

from dashboards.front import behind, hidden_address
from labs.harness.running.chat_writer import writer_of
from labs.harness.running.resolve import is_dummy, model_for
from labs.harness.spec import Lab, LabError
from loadtests import generator, plan
from loadtests.arrivals import Concurrent
from serving.engines.endpoint import Endpoint
from serving.hardware import machine as machines
from serving.processes import masking
from serving.processes.ports import free_port
from serving.processes.process import Process
from serving.weights import models

PORT, WEB_PORT = 8000, 8089  # defaults of `labs serve` and `labs locust`


@contextlib.contextmanager
def start_locust_ui(
    lab: Lab,
    changes: dict[str, Any],
    workload: str,
    endpoint: str,
    model: str,
    weights: str,
    web_port: int,
) -> Iterator[Process]:
    """Start Locust's web UI on a lab's workload and a running server; it ends with the block.

    The page is there when the block begins. Raises LabError where the lab has no such workload, or
    Locust ends before.
    """
    machine = machines.detect()
    resolved = lab.at(models.scale_of(machine), False, changes, is_dummy(weights))
    by_name = {w.name: w for w in resolved.workloads}
    if workload and workload not in by_name:
        raise LabError(f"{lab.name} has no workload {workload!r}; it has {', '.join(by_name)}")
    chosen = by_name[workload] if workload else resolved.workloads[0]
    server = Endpoint(endpoint)
    server.require_stream()
    writer = writer_of(model_for(resolved, machine, model, weights))
    work = models.CACHE / "locust"
    plan.write_requests(
        work / "requests.jsonl",
        chosen.requests(resolved.requests_of(chosen), resolved.seed, writer),
        server.model,
    )
    by_hand = plan.TrialPlan(
        url=server.url,
        arrival=Concurrent(users=1),  # the number of users is chosen in the web UI
        requests=work / "requests.jsonl",
        records=work / "records.jsonl.gz",
        warmup_s=0,
        window_s=None,
        timeout_s=resolved.timeout_s,
        seed=resolved.seed,
        lab=lab.name,
        variant="by-hand",
        run_id="by-hand",
        workload=chosen.name,
        turns_away=any(flags.turns_away for flags in resolved.all_flags),
        secrets=masking.SECRETS,
    )
    (work / "plan.json").write_text(by_hand.model_dump_json())
    address = hidden_address()
    locust = generator.web_argv(work / "plan.json", 4, address, free_port(), free_port())
    with Process("locust", behind(web_port, address, locust), log=work / "locust.log") as process:
        _wait_for_page(process, f"http://127.0.0.1:{web_port}")
        yield process


def _wait_for_page(process: Process, url: str) -> None:
    """Wait until the page is there and the load process has joined, before which no load starts.

    Raises LabError where Locust ends before.
    """
    while process.returncode is None:
        with contextlib.suppress(requests.RequestException, ValueError):
            if requests.get(f"{url}/stats/requests", timeout=5).json().get("workers"):
                return
        time.sleep(0.1)
    raise LabError(f"Locust ended; its last lines:\n{process.tail()}")
