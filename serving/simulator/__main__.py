"""Time steps, and play traffic on virtual engines: a plan a line on standard input, as JSON.

Runs in the engine's environment. The first line of output says that vLLM is imported. Then each
step of `TimingPlans` gives its `StepTimes`, a `CopyingPlan` its `Copying`, and each trial of a
`ForecastPlan` a `ForecastPlay`, a JSON line each, in the order of the plans. A plan that fails ends
in the line `FAILED`, and why is the last line on standard error; the next plan is taken up.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

from pydantic import Field, TypeAdapter

from serving.simulator.fleet import Fleet, Scaled, Split
from serving.simulator.ngram_acceptance import CopyingPlan, copying
from serving.simulator.profiled_step import step_times
from serving.simulator.protocol import (
    FAILED,
    ForecastPlan,
    ForecastPlay,
    PlannedEngine,
    PlannedTrial,
    SyntheticRequest,
    TimingPlans,
)
from serving.simulator.traffic import Prompt, VirtualServer, play

if TYPE_CHECKING:
    from serving.simulator.virtual_engine import VirtualEngine

Plan = ForecastPlan | TimingPlans | CopyingPlan
PLANS: TypeAdapter[Plan] = TypeAdapter(Plan)
# in turn: to choose the better of two that fit, both would be read, with all of a prompt's tokens
REQUESTS: TypeAdapter[Prompt | SyntheticRequest] = TypeAdapter(
    Annotated[Prompt | SyntheticRequest, Field(union_mode="left_to_right")]
)


def main() -> None:
    """Announce that vLLM is imported, read plans, and print each result as soon as it is there."""
    logging.disable(logging.WARNING)  # vLLM describes at length engines that never serve
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints must not mix with the plays
    gc.disable()  # nothing is searched for garbage while vLLM is imported, a fifth of that time,
    from serving.simulator.virtual_engine import VirtualEngine

    gc.freeze()  # what it has imported never is, and what a trial leaves only after it
    print("ready", file=out, flush=True)
    engines = Engines(VirtualEngine)
    for line in sys.stdin:
        try:
            _carry_out(PLANS.validate_json(line), engines, out)
        except (Exception, SystemExit) as error:
            if not isinstance(error, SystemExit):  # vLLM's parser says why before it exits
                traceback.print_exc()
            sys.stderr.flush()
            engines = Engines(VirtualEngine)  # none that stopped half-way is used again
            print(FAILED, file=out, flush=True)


def _carry_out(plan: Plan, engines: Engines, out: IO[str]) -> None:
    """Print what a plan asks for."""
    if isinstance(plan, ForecastPlan):
        _play(plan, engines, out)
    elif isinstance(plan, CopyingPlan):
        print(copying(plan).model_dump_json(), file=out, flush=True)
    else:
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
    for engine in plan.engines:
        replicas = engines.replicas(engine)
        for trial in engine.trials:
            for replica in replicas:
                replica.reset_prefix_cache()
                replica.clock.acceptance = trial.acceptance
                replica.clock.guessed = trial.guessed
                replica.clock.masking = trial.masking
                replica.clock.pace = trial.pace
            server = _server(engine, trial, replicas)
            _prime(server, islice(_read(trial.requests), trial.primed))
            for replica in replicas:
                replica.read_counters()
            start_s = server.now_s
            played = play(
                server,
                trial.traffic,
                _prompts(trial, intruders=False),
                _prompts(trial, intruders=True),
                plan.delays,
                trial.ends_only,
            )
            # both are read before counts start anew
            only = replicas[0] if len(replicas) == 1 else None
            window_s = [start_s + at_s for at_s in played.window_s]
            kv_use = only.kv_use(*window_s) if only else None
            found_tokens = only.found_tokens if only else []
            counters = Counter[str]()
            for replica in replicas:
                counters.update(replica.read_counters())
            forecast_play = ForecastPlay(
                key=trial.key,
                repeat=trial.repeat,
                play=played,
                counters=counters,
                kv_capacity_tokens=replicas[0].kv_capacity_tokens,
                kv_use=kv_use,
                found_tokens=found_tokens,
                replicas=server.mean_replicas if isinstance(server, Scaled) else None,
            )
            print(forecast_play.model_dump_json(), file=out, flush=True)
            del played, forecast_play
            gc.collect()


def _server(
    engine: PlannedEngine, trial: PlannedTrial, replicas: Sequence[VirtualEngine]
) -> VirtualServer:
    """Return what a trial's requests are sent to: an engine, or several that serve together."""
    if engine.handover:
        prefilling, decoding = replicas
        return Split(prefilling, decoding, engine.handover)
    if trial.scaling:
        return Scaled(replicas, trial.routing.router(), trial.scaling)
    return replicas[0] if len(replicas) == 1 else Fleet(replicas, trial.routing.router())


def _prime(server: VirtualServer, prompts: Iterable[Prompt]) -> None:
    """Send prompts one after another, so that their prefixes are cached."""
    for prompt in prompts:
        server.add(f"prime-{prompt.index}", prompt.model_copy(update={"output_tokens": 1}))
        while server.busy:
            server.step()


def _read(requests: Path) -> Iterator[Prompt]:
    """Yield the prompts in the order they are sent, read one by one as they are needed."""
    with requests.open() as lines:
        for line in lines:
            request = REQUESTS.validate_json(line)
            yield request if isinstance(request, Prompt) else request.prompt


def _prompts(trial: PlannedTrial, intruders: bool) -> Iterator[Prompt]:
    """Yield the intruders, or all other prompts, with what is known of their answers.

    What is copied in the answers that are known stands for all others, in turn.
    """
    copied = cycle(trial.copied or ((),))
    compile_s = trial.masking.compile_s if trial.masking else 0.0
    for prompt in _read(trial.requests):
        if prompt.intruder == intruders:
            known = () if intruders else next(copied)
            yield prompt.model_copy(update={"copied": known, "compile_s": compile_s})


if __name__ == "__main__":
    status = 0
    try:
        main()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # vLLM's clean-up at exit has nothing to clean up, and prints pages of it
