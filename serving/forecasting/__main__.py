"""Time steps, and play traffic on virtual engines: a plan a line on standard input, as JSON.

Runs in the engine's environment. The first line of output says that vLLM is imported. Then each
step of `TimingPlans` gives its `StepTimes`, a `CopyingPlan` its `Copying`, and each trial of a
`ForecastPlan` a `ForecastPlay`, a JSON line each, in the order of the plans.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import cycle, islice
from typing import IO, TYPE_CHECKING, Any

from pydantic import TypeAdapter

from serving.forecasting.copying import Copied, CopyingPlan, copying
from serving.forecasting.fleet import ROUTERS, Fleet, Split
from serving.forecasting.plan import (
    ForecastPlan,
    ForecastPlay,
    PlannedEngine,
    PlannedTrial,
    SyntheticRequest,
    TimingPlans,
)
from serving.forecasting.timing import step_times
from serving.forecasting.traffic import Prompt, VirtualServer, play

if TYPE_CHECKING:
    from serving.forecasting.virtual_engine import VirtualEngine

Plan = ForecastPlan | TimingPlans | CopyingPlan
PLANS: TypeAdapter[Plan] = TypeAdapter(Plan)


def main() -> None:
    """Announce that vLLM is imported, read plans, and print each result as soon as it is there."""
    logging.disable(logging.WARNING)  # vLLM describes at length engines that never serve
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints must not mix with the plays
    from serving.forecasting.virtual_engine import VirtualEngine

    print("ready", file=out, flush=True)
    engines = Engines(VirtualEngine)
    for line in sys.stdin:
        plan = PLANS.validate_json(line)
        if isinstance(plan, ForecastPlan):
            _play(plan, engines, out)
            continue
        if isinstance(plan, CopyingPlan):
            print(copying(plan).model_dump_json(), file=out, flush=True)
            continue
        for times in step_times(plan.timing):
            print(times.model_dump_json(), file=out, flush=True)


RECEIVING = (
    "--kv-transfer-config", '{"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"}',
)  # fmt: skip
"""Arguments of an engine that receives keys and values: of a prompt it computes the last token.

By this connector, vLLM's own for measuring decode alone, the scheduler finds all other tokens of
each prompt already there, and gives them blocks.
"""


class Engines:
    """Virtual engines by their arguments: each is built once, and begins anew for every plan."""

    def __init__(self, make: Callable[..., VirtualEngine]) -> None:
        self.make = make
        self.made: dict[tuple[bool, tuple[str, ...]], list[VirtualEngine]] = {}

    def replicas(self, planned: PlannedEngine) -> list[VirtualEngine]:
        """Return as many engines as were planned, all as if they had just been built.

        Of a split pair the first prefills, and the second takes what the first has computed.
        """
        if planned.handover:
            return [*self._of(planned, 1), *self._of(planned, 1, RECEIVING)]
        return self._of(planned, planned.replicas)

    def _of(
        self, planned: PlannedEngine, count: int, more_argv: tuple[str, ...] = ()
    ) -> list[VirtualEngine]:
        argv = (*planned.argv, *more_argv)
        made = self.made.setdefault((planned.on_cuda, argv), [])
        times = planned.step_times, planned.draft_times
        for engine in made[:count]:
            engine.begin_anew(*times)
        made += [self.make(argv, *times, planned.on_cuda) for _ in range(count - len(made))]
        return made[:count]


def _play(plan: ForecastPlan, engines: Engines, out: IO[str]) -> None:
    """Play the trials of a plan, and print each play."""
    tokenize = _tokenizer(str(plan.tokenizer))
    for engine in plan.engines:
        replicas = engines.replicas(engine)
        for trial in engine.trials:
            for replica in replicas:
                replica.reset_prefix_cache()
                replica.clock.acceptance = trial.acceptance
                replica.clock.guessed = trial.guessed
                replica.clock.masking = trial.masking
                replica.clock.pace = trial.pace
            one = len(replicas) == 1
            server = _server(engine, trial, replicas)
            _prime(server, islice(_prompts(trial, tokenize, None, 0.0), trial.primed))
            for replica in replicas:
                replica.read_counters()
            start_s = server.now_s
            compile_s = trial.masking.compile_s if trial.masking else 0.0
            played = play(
                server,
                trial.traffic,
                _prompts(trial, tokenize, False, compile_s),
                _prompts(trial, tokenize, True, compile_s),
                plan.delays,
                trial.ends_only,
            )
            window_s = [start_s + s for s in played.window_s]
            # both are read before counts start anew
            kv_use = replicas[0].kv_use(*window_s) if one else None
            found_tokens = replicas[0].found_tokens if one else []
            forecast_play = ForecastPlay(
                key=trial.key,
                repeat=trial.repeat,
                play=played,
                counters=_sum_of(replica.read_counters() for replica in replicas),
                kv_capacity_tokens=sum(replica.kv_capacity_tokens for replica in replicas),
                kv_use=kv_use,
                found_tokens=found_tokens,
            )
            print(forecast_play.model_dump_json(), file=out, flush=True)


def _server(
    engine: PlannedEngine, trial: PlannedTrial, replicas: Sequence[VirtualEngine]
) -> VirtualServer:
    """Return what a trial's requests are sent to: an engine, or several that serve together."""
    if engine.handover:
        prefilling, decoding = replicas
        return Split(prefilling, decoding, engine.handover)
    return replicas[0] if len(replicas) == 1 else Fleet(replicas, ROUTERS[trial.router]())


def _prime(server: VirtualServer, prompts: Iterable[Prompt]) -> None:
    """Send prompts one after another, so that their prefixes are cached."""
    for prompt in prompts:
        server.add(f"prime-{prompt.index}", prompt.model_copy(update={"output_tokens": 1}))
        while server.busy:
            server.step()


def _sum_of(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Add up what several replicas counted."""
    total: Counter[str] = Counter()
    for counted in counts:
        total.update(counted)
    return dict(total)


def _prompts(
    trial: PlannedTrial, tokenize: Any, intruders: bool | None, compile_s: float
) -> Iterator[Prompt]:
    """Yield the prompts in the order they are sent, tokenized one by one as they are needed.

    `intruders` selects the intruders or all other requests; None selects both. What is copied in
    the answers that are known stands for all others, in turn.
    """
    answers: Iterator[Copied] = cycle(trial.copied or ((),))
    with trial.requests.open() as lines:
        for line in lines:
            planned = json.loads(line)
            if "body" not in planned:
                request = SyntheticRequest.model_validate(planned)
                if intruders is not True:
                    yield Prompt(
                        index=request.index,
                        token_ids=request.token_ids,
                        output_tokens=request.output_tokens,
                    )
            elif intruders in (None, bool(planned.get("intruder"))):
                known = () if planned.get("intruder") else next(answers)
                yield Prompt(
                    index=planned["index"],
                    token_ids=tokenize(planned["body"]),
                    output_tokens=planned["output_tokens"],
                    adapter=planned.get("adapter"),
                    priority=json.loads(planned["body"]).get("priority", 0),
                    compile_s=compile_s,
                    choices=planned.get("choices", 1),
                    copied=known,
                )


@cache
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
