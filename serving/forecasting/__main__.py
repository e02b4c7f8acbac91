"""Play traffic on virtual engines: a `ForecastPlan` as JSON on standard input, plays as JSON lines.

Runs in the engine's environment. The first line of output says that vLLM is imported.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from serving.forecasting.plan import ForecastPlan, ForecastPlay
from serving.forecasting.traffic import Prompt, play


def main() -> None:
    """Announce that vLLM is imported, read the plan, and print each play as soon as it is over."""
    logging.disable(logging.WARNING)  # vLLM describes at length engines that never serve
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints must not mix with the plays
    from serving.forecasting.virtual_engine import VirtualEngine

    print("ready", file=out, flush=True)
    plan = ForecastPlan.model_validate_json(sys.stdin.readline())
    tokenize = _tokenizer(str(plan.tokenizer))
    for engine in plan.engines:
        server = VirtualEngine(engine.argv, engine.step_times, engine.draft_times)
        for trial in engine.trials:
            server.reset_prefix_cache()
            server.clock.acceptance = trial.acceptance
            for prompt in list(_prompts(trial.requests, tokenize, None))[: trial.primed]:
                server.add(f"prime-{prompt.index}", prompt.model_copy(update={"output_tokens": 1}))
                while server.busy:
                    server.step()
            server.read_counters()
            played = play(
                server,
                trial.traffic,
                _prompts(trial.requests, tokenize, False),
                _prompts(trial.requests, tokenize, True),
                plan.delays,
            )
            forecast_play = ForecastPlay(
                key=trial.key,
                repeat=trial.repeat,
                play=played,
                counters=server.read_counters(),
                kv_capacity_tokens=server.kv_capacity_tokens,
            )
            print(forecast_play.model_dump_json(), file=out, flush=True)


def _prompts(requests: Path, tokenize: Any, intruders: bool | None) -> Iterator[Prompt]:
    """Yield the prompts in the order they are sent, tokenized one by one as they are needed.

    `intruders` selects the intruders or all other requests; None selects both.
    """
    with requests.open() as lines:
        for line in lines:
            planned = json.loads(line)
            if intruders in (None, bool(planned.get("intruder"))):
                yield Prompt(
                    index=planned["index"],
                    token_ids=tokenize(planned["body"]),
                    output_tokens=planned["output_tokens"],
                    adapter=planned.get("adapter"),
                )


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    @cache
    def tokenize(body: str) -> tuple[int, ...]:
        token_ids = tokenizer.apply_chat_template(
            json.loads(body)["messages"], add_generation_prompt=True, return_dict=False
        )
        return tuple(token_ids)

    return tokenize


if __name__ == "__main__":
    status = 0
    try:
        main()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # vLLM's clean-up at exit has nothing to clean up, and prints pages of it
