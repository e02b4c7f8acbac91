"""vLLM's throughput under our load generator and under `vllm bench serve`: the same requests."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from bench import BenchError, tell
from bench.load import RunningLocust, locust, trial
from labs.harness.analysis.verdicts import Interval, contrast
from labs.harness.reports import instruments
from loadtests import plan, records
from loadtests.prompts import Writer, counter
from loadtests.workload import Request
from serving import metrics
from serving.engines.flags import Flags
from serving.engines.vllm import Vllm
from serving.hardware import machine as machines
from serving.models import catalog
from serving.plugins import guard
from serving.processes.process import Process

USERS, PROMPT_TOKENS, OUTPUT_TOKENS, REQUESTS = 8, 48, 48, 40
PAIRS = 4  # how often each tool sends them, in turn
OURS, THEIRS = "our Locust", "vllm bench serve"
ENGINE_FLAGS: Flags = {
    "max-model-len": 1024,
    "enable-prefix-caching": False,
    "enforce-eager": True,
    "kv-cache-memory-bytes": 2**30,
}
# The `vllm` command fails in the CPU build; a "custom" data set needs pandas, ShareGPT's does not.
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class AnswerTimes:
    """When one tool sent a request and read its answer, in seconds on the tool's own clock."""

    sent_s: float
    first_s: float
    last_s: float
    tokens: int


def rate(answers: Sequence[AnswerTimes]) -> float:
    """Compute output tokens / (last token - first send), the same way for every tool."""
    span = max(a.last_s for a in answers) - min(a.sent_s for a in answers)
    return sum(a.tokens for a in answers) / span


def ttft_ms(answers: Sequence[AnswerTimes]) -> float:
    return 1000 * mean(a.first_s - a.sent_s for a in answers)


def tpot_ms(answers: Sequence[AnswerTimes]) -> float:
    return 1000 * mean((a.last_s - a.first_s) / (a.tokens - 1) for a in answers)


def write_work(work: Path, model: catalog.Model) -> None:
    """Write the same requests twice: for our Locust, and for vLLM's tool."""
    work.mkdir(parents=True, exist_ok=True)
    writer, rng = Writer(counter(str(model.path))), random.Random("bench")
    texts = [writer.chat(PROMPT_TOKENS, rng)[-1]["content"] for _ in range(REQUESTS)]
    conversations = [{"conversations": [{"value": text}, {"value": ""}]} for text in texts]
    (work / "prompts.json").write_text(json.dumps(conversations))
    plan.write_requests(
        work / "requests.jsonl",
        [
            Request(i, [{"role": "user", "content": text}], PROMPT_TOKENS, OUTPUT_TOKENS)
            for i, text in enumerate(texts)
        ],
        model.name,
    )


def send_by_locust(
    load: RunningLocust, url: str, requests_file: Path, work: Path
) -> list[AnswerTimes]:
    """Send the requests by our Locust. Raises BenchError when one of them fails."""
    window_s = 300.0  # never reached: the requests run out
    load.generator.play(trial(url, USERS, requests_file, 0, window_s, work / "records"))
    recorded = list(records.read(work / "records"))
    for record in recorded:
        if record.error or not record.chunks or record.output_tokens is None:
            raise BenchError(f"a request of our Locust failed: {record.error}")
    return [
        AnswerTimes(r.sent_s, r.chunks[0][0], r.chunks[-1][0], r.output_tokens or 0)
        for r in recorded
    ]


def send_by_vllm_bench(
    engine: Vllm, model: catalog.Model, prompts: Path, cores: Sequence[int], work: Path
) -> list[AnswerTimes]:
    """Send the requests by `vllm bench serve` on these cores. Raises BenchError when it fails."""
    flags = {
        "backend": "openai-chat",
        "base-url": engine.url,
        "endpoint": "/v1/chat/completions",
        "model": model.path,
        "served-model-name": model.name,
        "dataset-name": "sharegpt",
        "dataset-path": prompts,
        "sharegpt-output-len": OUTPUT_TOKENS,
        "num-prompts": REQUESTS,
        "max-concurrency": USERS,
        "temperature": 0,
        "ready-check-timeout-sec": 0,
        "result-dir": work,
        "result-filename": "vllm-bench.json",
    }
    switches = ("ignore-eos", "disable-shuffle", "disable-tqdm", "save-result", "save-detailed")
    argv = [sys.executable, "-c", VLLM_BENCH, *(f"--{switch}" for switch in switches)]
    for flag, value in flags.items():
        argv += [f"--{flag}", str(value)]
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OPENAI_API_KEY": guard.key(),
    }
    with Process("vllm bench", argv, log=work / "vllm-bench.log", env=env, cores=cores) as process:
        deadline = time.monotonic() + 180
        while process.returncode is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if process.returncode != 0:
            raise BenchError(f"vllm bench serve failed; its last lines:\n{process.tail()}")
    saved = json.loads((work / "vllm-bench.json").read_text())
    columns = zip(
        saved["start_times"], saved["ttfts"], saved["itls"], saved["output_lens"], strict=True
    )
    return [
        AnswerTimes(start, start + ttft, start + ttft + sum(itl), tokens)
        for start, ttft, itl, tokens in columns
    ]


def measure(work: Path) -> instruments.Engine:
    """Send the same requests by our Locust and by vLLM's own tool, in turn, to one engine."""
    machine = machines.detect()
    model = catalog.resolve(machine)
    write_work(work, model)
    cores = machines.split_cores()[1]
    tell("engine: starting vLLM")
    with contextlib.ExitStack() as exits:
        served = Vllm("bench", model, ENGINE_FLAGS, kind=machine.kind, log=work / "engine.log")
        exits.callback(served.stop)
        load = exits.enter_context(locust(USERS, work / "locust"))
        served.wait()
        tell("engine: warming up")
        send_by_locust(load, served.url, work / "requests.jsonl", work / "warm-up")
        answers: dict[str, list[list[AnswerTimes]]] = {OURS: [], THEIRS: []}
        counted: dict[str, set[tuple[float, float]]] = {OURS: set(), THEIRS: set()}
        for pair in range(PAIRS):
            # A B, B A, ...: a drift affects both in the same way
            for name in (THEIRS, OURS) if pair % 2 else (OURS, THEIRS):
                tell(f"engine: {name}, {pair + 1} of {PAIRS}")
                before, folder = served.snapshot(), work / f"{pair}-{name}"
                if name == OURS:
                    sent = send_by_locust(load, served.url, work / "requests.jsonl", folder)
                else:
                    sent = send_by_vllm_bench(served, model, work / "prompts.json", cores, folder)
                answers[name].append(sent)
                time.sleep(0.3)  # the engine counts a request a moment after its last chunk
                if before and (after := served.snapshot()):
                    delta = after.since(before).values
                    tokens = (delta[metrics.PROMPT_TOKENS], delta[metrics.GENERATION_TOKENS])
                    counted[name].add(tokens)
    if len(set().union(*counted.values())) > 1:
        raise BenchError(f"the tools did not send the same work, by the engine's counts: {counted}")
    throughput, ttft, tpot = (ratio_of(answers, of) for of in (rate, ttft_ms, tpot_ms))
    return instruments.Engine(throughput=throughput, ttft=ttft, tpot=tpot)


def ratio_of(
    answers: Mapping[str, Sequence[Sequence[AnswerTimes]]],
    of: Callable[[Sequence[AnswerTimes]], float],
) -> Interval:
    """Compute the ratio of a figure under our tool to that under vLLM's, paired by round."""
    ours, theirs = (dict(enumerate(map(of, answers[tool]))) for tool in (OURS, THEIRS))
    found = contrast(ours, theirs, paired=True)
    assert found
    return found.ratio
