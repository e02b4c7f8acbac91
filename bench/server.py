"""How many chunks a second vLLM's own API server can send: the CPU time that each takes.

The server is vLLM's, in its own process, and so is the scheduler. In the place of the model an
executor sleeps for each step (`bench/instant.py`), so that neither cores nor a GPU are busy with
what the server is not.
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

from bench import BenchError
from bench.clients import ENGINE_FLAGS, PROMPT_TOKENS
from bench.clock import Clock
from bench.console import console
from bench.load import RunningLocust, locust, trial
from labs.harness.running.machine_load import ServerLoad
from labs.harness.telling import instruments
from loadtests import plan, records
from loadtests.prompts import Writer, counter
from loadtests.workload import Request
from serving.engines.flags import FlagValue
from serving.engines.vllm import Vllm
from serving.hardware import machine as machines
from serving.weights import models

STREAMS = (16, 64, 256)
OUTPUT_TOKENS = 128
TEXTS, REQUESTS = 64, 20_000  # different prompts; as many as nobody sends in a trial
WARMUP_S, WINDOW_S, START_S = 3.0, 8.0, 90.0
EXPECTED_S = START_S + len(STREAMS) * 25
INSTANT = "bench.instant.InstantExecutor"


def measure(clock: Clock, work: Path) -> instruments.Server:
    """Have users in a closed loop stream short answers, more and more of them.

    Raises BenchError where a request fails, EngineError where vLLM does not start.
    """
    work.mkdir(parents=True)
    machine = machines.detect()
    model = models.resolve(machine)
    writer, rng = Writer(counter(str(model.path))), random.Random("bench")
    texts = [writer.chat(PROMPT_TOKENS, rng)[-1]["content"] for _ in range(TEXTS)]
    sent = [
        Request(i, [{"role": "user", "content": texts[i % TEXTS]}], PROMPT_TOKENS, OUTPUT_TOKENS)
        for i in range(REQUESTS)
    ]
    plan.write_requests(work / "requests.jsonl", sent, model.name)
    flags: dict[str, FlagValue] = {
        **ENGINE_FLAGS,
        "max-num-seqs": max(STREAMS),
        "kv-cache-memory-bytes": 4 * 2**30,  # counted, and never taken
        "distributed-executor-backend": INSTANT,
    }
    rows = []
    with contextlib.ExitStack() as exits:
        clock.tell("starting vLLM", 0)
        engine = Vllm("bench", model, flags, kind=machine.kind, log=work / "engine.log")
        exits.callback(engine.stop)
        engine.wait()
        for i, streams in enumerate(STREAMS):
            clock.tell(f"{streams} streams", (START_S + 25 * i) / EXPECTED_S)
            with locust(streams, work / f"{streams}") as load:
                rows.append(answering(engine, load, streams, work))
    server = instruments.Server(vllm=Vllm.version(), rows=rows)
    console.print(instruments.server_sentence(server))
    return server


def answering(engine: Vllm, load: RunningLocust, streams: int, work: Path) -> instruments.Answering:
    """Measure the server's CPU time in the window of a trial. Raises BenchError."""
    server_load, recorded = ServerLoad(engine.api_servers()), work / f"records-{streams}"
    planned = trial(engine.url, streams, work / "requests.jsonl", WARMUP_S, WINDOW_S, recorded)
    summary = load.generator.play(planned, server_load.read)
    server_load.read()
    start, end = summary.window_s
    began_s = summary.started_monotonic_s or 0.0
    share = server_load.busiest(began_s + start, began_s + end)
    read = list(records.read(recorded))
    if failed := [r.error for r in read if r.error]:
        raise BenchError(f"{len(failed)} of {len(read)} requests failed: {failed[0]}")
    chunks = sum(start <= at < end for r in read for at, _ in r.chunks)
    if not share or not chunks:
        raise BenchError("the server's CPU time is not known, or nothing came in the window")
    return instruments.Answering(
        streams=streams,
        chunks_per_s=chunks / (end - start),
        core_share=share,
        cpu_s_per_chunk=share * (end - start) / chunks,
    )
