"""The same requests sent to one engine by our load generator and by `vllm bench serve`."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from bench import BenchError
from bench.load import RunningLocust, trial
from loadtests import plan, records
from loadtests.prompts import Writer, counter
from loadtests.workload import Request
from serving.engines.vllm import Vllm
from serving.inside import guard
from serving.processes.process import Process
from serving.weights import models

USERS, PROMPT_TOKENS, OUTPUT_TOKENS, REQUESTS = 8, 48, 48, 40
ENGINE_FLAGS: dict[str, str | int | float | bool | dict[str, object]] = {
    "max-model-len": 1024, "enable-prefix-caching": False, "enforce-eager": True,
    "kv-cache-memory-bytes": 2**30,
}  # fmt: skip
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


def write_work(work: Path, model: models.Model) -> None:
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
    engine: Vllm, model: models.Model, prompts: Path, cores: Sequence[int], work: Path
) -> list[AnswerTimes]:
    """Send the requests by `vllm bench serve` on these cores. Raises BenchError when it fails."""
    flags = {
        "backend": "openai-chat", "base-url": engine.url, "endpoint": "/v1/chat/completions",
        "model": model.path, "served-model-name": model.name, "dataset-name": "sharegpt",
        "dataset-path": prompts, "sharegpt-output-len": OUTPUT_TOKENS, "num-prompts": REQUESTS,
        "max-concurrency": USERS, "temperature": 0, "ready-check-timeout-sec": 0,
        "result-dir": work, "result-filename": "vllm-bench.json",
    }  # fmt: skip
    switches = ("ignore-eos", "disable-shuffle", "disable-tqdm",
                "save-result", "save-detailed")  # fmt: skip
    argv = [sys.executable, "-c", VLLM_BENCH, *(f"--{switch}" for switch in switches)]
    for flag, value in flags.items():
        argv += [f"--{flag}", str(value)]
    env = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "OPENAI_API_KEY": guard.key(),
    }  # fmt: skip
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
