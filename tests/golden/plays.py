"""The plan, and the figures of its plays, which `__init__.py` says how to record."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loadtests.prompts import tokenizer
from serving.models import catalog
from serving.simulator.protocol import (
    ForecastPlan,
    ForecastPlay,
    PlannedEngine,
    PlannedTrial,
    SyntheticRequest,
)
from serving.simulator.step import StepTimes
from serving.simulator.traffic import Prompt, Traffic

STEP = StepTimes(
    tokens=(1, 1024), linear_s=(0.008, 0.04), rows=(1, 256), head_s=(0.001, 0.002),
    attention_pair_s=1e-9, attention_read_s=1e-8,
)  # fmt: skip
BLOCK = 32
KV_BYTES_PER_TOKEN = 23_040  # of the bundled model
LENGTHS = [(40 + 37 * i % 200, 6 + 13 * i % 20) for i in range(12)]  # of prompt and answer
USERS = Traffic(kind="closed", users=4, warmup_s=0, window_s=0.4)
BESIDE_LONG = USERS.model_copy(update={"intruder_every_s": 0.15, "least_intruders": 1})
WAVE = Traffic(kind="waves", users=6, warmup_s=0, window_s=0.1)
SCHEDULED = Traffic(kind="open", schedule_s=tuple(0.03 * i for i in range(12)), warmup_s=0,
                    window_s=0.4)  # fmt: skip
NGRAM = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'

Figures = dict[str, dict[str, Any]]


def plan(folder: Path) -> ForecastPlan:
    """Plan the plays that are compared; their requests are written to `folder`."""
    model = catalog.bundled()

    def synthetic(name: str, *requests: SyntheticRequest) -> Path:
        return written(name, [request.model_dump_json() for request in requests])

    def written(name: str, lines: Iterable[str]) -> Path:
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
        return folder / name

    tokens_of = tokenizer(str(model))

    def chat(index: int, words: int, adapter: str | None = None, intruder: bool = False) -> str:
        token_ids = tokens_of([{"role": "user", "content": "street " * words}])
        return Prompt(
            index=index, token_ids=tuple(map(int, token_ids)), output_tokens=8 + index % 5,
            intruder=intruder, adapter=adapter, priority=index % 3,
        ).model_dump_json()  # fmt: skip

    mixed = synthetic("mixed", *(
        SyntheticRequest(index=i, prompt_tokens=prompt, output_tokens=output)
        for i, (prompt, output) in enumerate(LENGTHS)
    ))  # fmt: skip
    documents = synthetic("documents", *(
        SyntheticRequest(
            index=i, prompt_tokens=400, output_tokens=6, document=i % 3, document_tokens=320
        )
        for i in range(12)
    ))  # fmt: skip
    heavy = synthetic("heavy", *(
        SyntheticRequest(index=i, prompt_tokens=300, output_tokens=100 + i) for i in range(6)
    ))  # fmt: skip
    tenants = written("tenants", [chat(i, 5, f"tenant-{i % 4}") for i in range(12)])
    chats = written("chats", [chat(i, 20) for i in range(16)])
    long = [*chats.read_text().splitlines(), *(chat(100 + i, 600, None, True) for i in range(4))]
    beside_long = written("beside-long", long)

    def engine(
        key: str,
        requests: Path,
        *flags: str,
        traffic: Traffic = USERS,
        acceptance: float = 0.0,
        kv_tokens: int = 16_384,
    ) -> PlannedEngine:
        trial = PlannedTrial(
            key=key, repeat=1, requests=requests, traffic=traffic, acceptance=acceptance
        )
        return PlannedEngine(
            argv=(
                "--model", str(model), "--max-model-len", "1024", "--block-size", str(BLOCK),
                "--kv-cache-memory-bytes", str(kv_tokens * KV_BYTES_PER_TOKEN),
                "--max-num-seqs", "64", "--max-num-batched-tokens", "1024", *flags,
            ),
            step_times=STEP,
            on_cuda=True,
            draft_times=STEP.times(0.2) if "draft_model" in "".join(flags) else None,
            trials=(trial,),
        )  # fmt: skip

    draft = json.dumps({"method": "draft_model", "model": str(model), "num_speculative_tokens": 3})
    return ForecastPlan(
        engines=(
            engine("batches", mixed),
            engine("batches, synchronous", mixed, "--no-async-scheduling"),
            engine("schedule", mixed, traffic=SCHEDULED),
            engine("pieces", beside_long, "--max-num-batched-tokens", "256", traffic=BESIDE_LONG),
            engine("cached", documents, "--enable-prefix-caching"),
            engine("preempted", heavy, traffic=WAVE, kv_tokens=48 * BLOCK),
            engine(
                "preempted, synchronous",
                heavy,
                "--no-async-scheduling",
                traffic=WAVE,
                kv_tokens=48 * BLOCK,
            ),
            engine("adapters", tenants, "--enable-lora", "--max-loras", "2"),
            engine("priorities", chats, "--max-num-seqs", "2", "--scheduling-policy", "priority"),
            engine("n-grams", mixed, "--speculative-config", NGRAM, acceptance=0.6),
            engine("draft model", mixed, "--speculative-config", draft, acceptance=0.6),
        ),
    )


def figures(lines: Iterable[str]) -> Figures:
    """Return play -> what is compared; an answer is (index, send, first and last token in s)."""
    plays = [ForecastPlay.model_validate_json(line) for line in lines]
    return {
        play.key: {
            "kv_capacity_tokens": play.kv_capacity_tokens,
            "counters": play.counters,
            "answers": [
                [a.index, *(round(at_s, 6) for at_s in (a.sent_s, a.chunks[0][0], a.chunks[-1][0]))]
                for a in play.play.answers
            ],
        }
        for play in plays
    }


if __name__ == "__main__":
    rows = figures(line for line in sys.stdin if line != "ready\n")
    print(
        "{", ",\n".join(f'"{key}": {json.dumps(row)}' for key, row in rows.items()), "}", sep="\n"
    )
