"""A forecast of every load point, before any engine starts.

vLLM's own scheduler plays each trial in virtual time, with the requests that will be sent and the
arguments that the engine will be started with, over a step timed on this machine
(`serving/forecasting/`). What clients would have seen is then measured as a real trial is, so that
a forecast and a measurement are the same figure by the same function.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
import selectors
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean, stdev
from typing import Any

import numpy as np
from pydantic import BaseModel
from scipy import stats

from labs.filing.results import Band, PointForecasts, all_runs, unreadable
from labs.findings.parts import ReportParts, parts_of
from labs.judging.machine_speed import MachineSpeed, usual_spread
from labs.judging.measure import Trial
from labs.judging.metrics import METRICS, measure
from labs.judging.signals import Watch, watch
from labs.judging.timeline import Timeline, timeline
from labs.lab import OF_FORECASTS, Lab, LabError, Point, Prediction, Variant
from labs.running.progress import ProgressDisplay
from labs.running.resolve import Setup
from labs.running.side_process import guarded, last_line
from loadtests.arrivals import Contended, OfCapacity, Replay, Waves, send_times
from loadtests.plan import LEAST_COUNTED, TrialSummary, most_held_open_s
from loadtests.records import TURNED_AWAY, RequestRecord
from serving import machine as machines
from serving import metrics, models
from serving.engines import ENGINES
from serving.engines.base import FlagValue, with_places
from serving.engines.vllm import Vllm, VllmFlags, usable_bytes
from serving.forecasting import datasheet
from serving.forecasting.copying import Copied, Copying, CopyingPlan, Lookup, decoded
from serving.forecasting.datasheet import Efficiency
from serving.forecasting.plan import (
    ForecastPlan,
    ForecastPlay,
    PlannedEngine,
    PlannedTrial,
    TimingPlans,
)
from serving.forecasting.step import StepTimes
from serving.forecasting.timing import PASSES, QUICK_PASSES, TimingPlan
from serving.forecasting.traffic import Play, Traffic
from serving.gpus import Datasheet
from serving.machine import Machine
from serving.metrics import KvUse, Snapshot
from serving.models import Shape
from serving.process import Process

FASTER, SLOWER = 0.90, 1.18
"""The ends of a band: the engine's own step may take this many times as long as the stand-in step.

Both factors were measured on two machines (vLLM 0.32 on CPU, batches of 1 to 16 and a prompt of 768
tokens, a stand-in of PyTorch's operators), before any run that is judged by them. With vLLM's own
operators the engine took 0.92 to 1.01 times as long as the stand-in on a third. Both ends are
further off by the usual spread of the machine's speed, as the reference steps of earlier runs on it
show; the slow end at least by how much the speed wandered while the step was timed, since the
stand-in step is the least of several times, and an engine cannot choose its moments.
"""
DEFAULT_BUDGET_TOKENS = 2048  # of vLLM 0.32 on a CPU; larger steps are extrapolated
TIMING_LIMIT_S = 300
PLAYS_OF_CHANCE = 9  # at least, where long prompts meet streams that are all alike
ANSWERS = 24  # of the model, at least, for each load of an engine that copies from the context
UNSAID_LOOKUP = 5  # tokens of an n-gram, where neither its least nor its most is given
DRAWS, MOST_DRAWN = 2000, 1000  # of trials, and requests in each
FORECASTER_ARGV = (sys.executable, "-m", "serving.forecasting")


class ForecastError(LabError):
    """No forecast can be made; the message says why. The run goes on without one."""


def forecast(
    setup: Setup, requests: Mapping[str, Sequence[Path]], progress: ProgressDisplay
) -> PointForecasts:
    """Forecast every point whose step can be timed.

    `requests[workload]` holds the file of each repeat. Raises ForecastError where the step cannot
    be timed, vLLM does not import, or its scheduler cannot be driven.
    """
    without = {v.name: why for v in setup.lab.variants if (why := reason_against(setup, v))}
    points = [p for p in setup.points if p.variant.name not in without]
    if not points:
        return PointForecasts(points={}, without=without)
    speeds = [] if setup.datasheet else earlier_speeds(setup.machine)
    spread = usual_spread(speeds, setup.lab.repeats)
    with started() as forecaster:
        if setup.datasheet:
            steps = _steps_by_datasheet(setup, points, setup.datasheet)
        else:
            # alone on the machine: beside another process that works, steps take a third longer
            progress.waiting("timing the stand-in step, for the forecast")
            steps = _steps_as_timed(setup, points, speeds, forecaster)
        copies = _read_answers(setup, points, requests, forecaster, progress)
        progress.waiting("playing every load on vLLM's scheduler in virtual time")
        trials = VirtualTrials(setup, requests, steps, copies, spread, forecaster)
        capacities = NO_CAPACITIES
        if setup.lab.finds_capacity and points[0] is setup.points[0]:
            capacities = trials.capacities_per_s(points[0])
        if not all(capacities):
            points = [p for p in points if not isinstance(p.load, OfCapacity)]
        all_plays = trials.played(points, capacities)
    return PointForecasts(
        points={plays.point.key: plays.bands(setup.lab) for plays in all_plays},
        without=without,
        trial_s={plays.point.key: plays.trial_s for plays in all_plays},
        copied=_shares_copied(all_plays, copies, random.Random(setup.lab.seed)),
        watches={plays.point.key: plays.watches for plays in all_plays if plays.watches},
        timelines={plays.point.key: line for plays in all_plays if (line := plays.timeline)},
        kv_use=KvUse.over_trials({p.point.key: p.kv_uses for p in all_plays if p.kv_uses}),
        step_times=_described(steps.values()),
        machine_spread=spread,
    )


def ratio_of_forecasts(
    forecasts: PointForecasts, metric: str, treatment: Point, baseline: Point
) -> Prediction | None:
    """Predict a claim from the forecasts of its two points; None where either has none."""
    above, below = (forecasts.points.get(p.key, {}).get(metric) for p in (treatment, baseline))
    if not above or not below or not below.typical or not above.typical:
        return None
    return Prediction(
        value=above.typical / below.typical,
        formula="forecast of the treatment / forecast of the baseline",
        assumptions=(
            "vLLM's own scheduler in virtual time, over a step timed on this machine beforehand",
        ),
        source=OF_FORECASTS,
    )


def reason_against(setup: Setup, variant: Variant) -> str | None:
    """Say why this variant's step cannot be timed in advance; None where it can."""
    flags = VllmFlags(setup.lab.flags_of(variant))
    if setup.endpoint:
        return "an endpoint's settings are not known here"
    if setup.engine_command or ENGINES[variant.engine] is not Vllm:
        return "the engine is not the vLLM of this environment"
    if flags.speculative_config and setup.lab.acceptance is None:
        return "how many drafts are accepted is not known beforehand"
    if setup.datasheet:
        return _unpublished(flags) or _undivided_draft(setup, flags)
    if flags.devices > 1:
        return "communication between devices was not timed"
    if setup.model.shape.experts:
        return "routed experts were not timed"
    if setup.machine.kind == "cpu":
        return None if flags.enforce_eager else "a compiled step was not timed"
    return _untimed_on_a_gpu(setup, variant)


def _untimed_on_a_gpu(setup: Setup, variant: Variant) -> str | None:
    if _has_quantized_weights(setup, variant):
        return "the kernels of quantized weights were not timed"
    if _has_quantized_cache(setup, variant):
        return "attention to a quantized cache was not timed"
    return None


def _has_quantized_weights(setup: Setup, variant: Variant) -> bool:
    return "quantization_config" in _config(_served(setup, variant) / "config.json")


def _has_quantized_cache(setup: Setup, variant: Variant) -> bool:
    dtype = VllmFlags(setup.lab.flags_of(variant)).get("kv-cache-dtype", "auto")
    return str(dtype) not in ("auto", "bfloat16")


def _unpublished(flags: VllmFlags) -> str | None:
    """Say of what in these flags no published figure gives the cost; None where all is covered."""
    if flags.devices > flags.tensor_parallel_size:
        return "no published figure gives the cost of pipeline or data parallelism"
    if flags.get("enable-expert-parallel"):
        return "no published figure gives the cost of sending tokens to experts on other GPUs"
    if flags.enforce_eager:
        return "no published figure gives the cost of launching an eager step"
    if flags.get("enable-lora"):
        return "no published figure gives the cost of an adapter's operations"
    return None


def _undivided_draft(setup: Setup, flags: VllmFlags) -> str | None:
    """Say whether GPUs that share the model's layers cannot share those of its draft model."""
    gpus = flags.tensor_parallel_size
    draft = VllmFlags(with_places(flags, setup.places)).speculative_config.get("model")
    if gpus == 1 or not draft:
        return None
    shape = models.shape_of(_config(Path(str(draft)) / "config.json"))
    if shape.heads % gpus or shape.kv_heads % gpus:
        return f"{gpus} GPUs cannot share the {shape.heads} heads of the draft model"
    return None


def _served(setup: Setup, variant: Variant) -> Path:
    return setup.weights.get(variant.name, setup.model).path


def _timed(setup: Setup, variant: Variant) -> Path:
    """Return the folder whose step is timed: the model's own, where the variant's configuration is.

    Pruned weights change no step, so that variants which serve them share the model's timing.
    """
    model, served = setup.model.path, _served(setup, variant)
    if served == model:
        return model
    configs = [(folder / "config.json").read_bytes() for folder in (served, model)]
    return model if configs[0] == configs[1] else served


def _config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text())
    return config


# ----------------------------------------------------------------------------- timing the step


def _step_of(setup: Setup, point: Point) -> TimingPlan:
    """Plan what to time for this point: its model's step, with adapters if its engine has any."""
    flags, cpu = VllmFlags(point.variant.flags), setup.machine.kind == "cpu"
    adapters = bool(flags.get("enable-lora"))
    return TimingPlan(
        config=_timed(setup, point.variant) / "config.json",
        device="cpu" if cpu else "cuda",
        cores=tuple(machines.split_cores()[0]) if cpu else (),
        # one size for all variants, so that those whose steps are the same share a timing
        tokens=tuple(2**i for i in range(14) if 2**i < 2 * _largest_step(setup)),
        rows=(1, 4, 16, 64) if cpu else (1, 16, 64, 256),
        adapters=flags.max_loras if adapters else 0,
        adapter_rank=flags.max_lora_rank if adapters else 0,
        adapters_asked_for=not adapters or point.workload.adapters is not None,
        kernels=_kernel_argv(_timed(setup, point.variant), flags) if cpu else (),
        passes=QUICK_PASSES if setup.quick else PASSES,
    )


def _kernel_argv(model: Path, flags: Mapping[str, FlagValue]) -> tuple[str, ...]:
    """Return the arguments that decide which operators an engine chooses."""
    deciding = ("block-size", "kv-cache-dtype")
    kept = {name: flag for name, flag in flags.items() if name in deciding}
    return ("--model", str(model), *Vllm.flag_argv(kept))


def _largest_step(setup: Setup) -> int:
    """Count the tokens of the largest possible step: all users' prompts, within the budget."""
    return max(
        min(
            VllmFlags(
                {"max-num-batched-tokens": DEFAULT_BUDGET_TOKENS} | p.variant.flags
            ).max_num_batched_tokens,
            p.sequences * max(prompt for prompt, _ in p.lengths),
        )
        for p in setup.points
    )


def _draft_of(setup: Setup, point: Point) -> TimingPlan | None:
    """Plan what to time of the draft model; None where the point has none."""
    flags = VllmFlags(with_places(point.variant.flags, setup.places))
    named = flags.speculative_config.get("model")
    if not named:
        return None
    step, model = _step_of(setup, point), Path(str(named))
    kernels = _kernel_argv(model, flags) if step.kernels else ()
    return step.model_copy(update={"config": model / "config.json", "kernels": kernels})


Figures = dict[str, float | None]  # of a play, by metric
EngineSteps = tuple[StepTimes, StepTimes | None]  # of the model, and of its draft model
Steps = dict[str, tuple[EngineSteps, EngineSteps, EngineSteps]]
"""Point -> its steps as expected, on a faster and on a slower machine: the ends of the band."""


def ends_of_band(times: StepTimes, spread: float = 1.0) -> tuple[StepTimes, StepTimes, StepTimes]:
    """Return a timed step as expected, on a faster machine and on a slower one.

    `spread` is the usual one of this machine's speed, a factor of 1 or more.
    """
    return times, times.times(FASTER / spread), times.times(SLOWER * max(times.wander, spread))


def earlier_speeds(machine: Machine) -> list[MachineSpeed]:
    """List how fast this machine was in the finished runs on file; damaged runs are left out."""
    folders = (f for f in all_runs() if f.path.parent.parent.name == machine.slug and f.complete)
    speeds = (f.summary().machine_speed for f in folders if not unreadable(f))
    return [speed for speed in speeds if speed]


def _steps_as_timed(
    setup: Setup, points: Sequence[Point], earlier: Sequence[MachineSpeed], forecaster: Forecaster
) -> Steps:
    """Time the steps of these points. Raises ForecastError.

    A point that is played fewer times than others differs more by the machine's speed, of which
    `earlier` runs tell.
    """
    plans = {p.key: (_step_of(setup, p), _draft_of(setup, p)) for p in points}
    times = forecaster.time_steps(plan for pair in plans.values() for plan in pair if plan)

    def at(point: Point, end: int) -> EngineSteps:
        step, draft = plans[point.key]
        spread = usual_spread(earlier, setup.lab.repeats_of(point))
        return (
            ends_of_band(times[step], spread)[end],
            ends_of_band(times[draft], spread)[end] if draft else None,
        )

    return {p.key: (at(p, 0), at(p, 1), at(p, 2)) for p in points}


def _steps_by_datasheet(setup: Setup, points: Sequence[Point], sheet: Datasheet) -> Steps:
    """Compute the steps of these points on a GPU that is not here."""

    def at(point: Point, efficiency: Efficiency) -> EngineSteps:
        flags = VllmFlags(with_places(point.variant.flags, setup.places))
        draft, gpus = flags.speculative_config.get("model"), flags.tensor_parallel_size
        served = _config(_served(setup, point.variant) / "config.json")
        return (
            datasheet.step_times(
                point.shape, sheet, efficiency, flags.kv_value_bytes, is_eight_bit(served), gpus
            ),
            # vLLM divides a draft model like the model itself
            datasheet.step_times(
                models.shape_of(_config(Path(str(draft)) / "config.json")), sheet, efficiency,
                gpus=gpus,
            )
            if draft
            else None,
        )  # fmt: skip

    ends = (datasheet.EXPECTED, datasheet.FASTER, datasheet.SLOWER)
    return {p.key: (at(p, ends[0]), at(p, ends[1]), at(p, ends[2])) for p in points}


def is_eight_bit(config: Mapping[str, Any]) -> bool:
    """Tell whether activations are quantized too, so that the layers multiply at 8 bits."""
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    return any(group.get("input_activations") for group in groups)


def _described(steps: Iterable[tuple[EngineSteps, EngineSteps, EngineSteps]]) -> list[Any]:
    """List the expected steps, each once, as a run keeps them."""
    return list(
        {
            times.model_dump_json(): times.model_dump()
            for (expected, draft), _, _ in steps
            for times in (expected, draft)
            if times
        }.values()
    )


# ------------------------------------------------------------------- what copying would guess

Copies = Mapping[str, Sequence[Sequence[Copied]]]
"""Point -> repeat -> what is copied in the answers to its first requests, where it is known."""


def _read_answers(
    setup: Setup,
    points: Sequence[Point],
    requests: Mapping[str, Sequence[Path]],
    forecaster: Forecaster,
    progress: ProgressDisplay,
) -> Copies:
    """Let the model answer what is sent to engines that copy from the context, and look up there.

    Points whose lookups and requests agree share their answers. A point is left out where there is
    no model that writes a text, and where it does not answer here: what the lab assumes then holds.
    """
    if setup.datasheet or setup.model.dummy:
        return {}
    plans: dict[str, CopyingPlan] = {}
    for point in points:
        if lookup := lookup_of(point.variant.flags):
            files = tuple(requests[point.workload.name])
            plans[point.key] = CopyingPlan(
                model=_served(setup, point.variant),
                requests=files,
                answers=-(-ANSWERS // len(files)),
                lookup=lookup,
            )
    found = {}
    for plan in dict.fromkeys(plans.values()):
        progress.waiting("letting the model answer, to see what can be copied")
        found[plan] = forecaster.read_answers(plan).answers
    return {key: found[plan] for key, plan in plans.items() if found[plan]}


def lookup_of(flags: Mapping[str, FlagValue]) -> Lookup | None:
    """Say how an engine with these flags looks n-grams up; None where it does not.

    Source: `SpeculativeConfig` of vllm/config/speculative.py for what is left out.
    """
    config = VllmFlags(flags).speculative_config
    if config.get("method") != "ngram":
        return None
    least, most = config.get("prompt_lookup_min"), config.get("prompt_lookup_max")
    return Lookup(
        guesses=int(config["num_speculative_tokens"]),
        least=int(least or most or UNSAID_LOOKUP),
        most=int(most or least or UNSAID_LOOKUP),
    )


def share_copied(
    known: Sequence[Sequence[Copied]], requests: int, chance: random.Random
) -> Band | None:
    """Forecast the share of drafted tokens that is accepted in a trial of so many requests.

    The guesses in one answer are right or wrong together, and answers to prompts that share a
    prefix are too. So the band is not that of independent draws: it holds 98% of trials whose
    answers are drawn from the known ones of one repeat. None where these have nothing to copy.
    """
    repeats = [[decoded(copied) for copied in repeat] for repeat in known]

    def share(drawn: Sequence[tuple[int, int]]) -> float | None:
        drafted = sum(guesses for guesses, _ in drawn)
        return sum(accepted for _, accepted in drawn) / drafted if drafted else None

    value = share([answer for repeat in repeats for answer in repeat])
    if value is None:
        return None
    draws = (share(chance.choices(chance.choice(repeats), k=requests)) for _ in range(DRAWS))
    low, high = np.percentile([drawn for drawn in draws if drawn is not None] or [value], (1, 99))
    return Band(value=value, low=min(value, float(low)), high=max(value, float(high)))


def _shares_copied(
    found: Sequence[PointPlays], copies: Copies, chance: random.Random
) -> dict[str, Band]:
    """Forecast that share for each point whose answers are known."""
    shares = {
        plays.point.key: share_copied(known, plays.fewest_sent, chance)
        for plays in found
        if (known := copies.get(plays.point.key))
    }
    return {key: share for key, share in shares.items() if share}


# ------------------------------------------------------------------------------ virtual engines


class Forecaster:
    """The process that times steps and plays traffic on virtual engines; it imports vLLM once.

    Each plan that is sent is read to its end before the next is sent.
    """

    def __init__(self, process: Process) -> None:
        """Speak to this process, which is importing vLLM."""
        self.process = process
        self.ready = False
        self.due = 0

    def time_steps(self, plans: Iterable[TimingPlan]) -> dict[TimingPlan, StepTimes]:
        """Time each kind of step once, on the engine's cores or the GPU.

        Raises ForecastError where that fails, or takes longer than TIMING_LIMIT_S.
        """
        kinds = list(dict.fromkeys(plans))
        time_limit = threading.Timer(TIMING_LIMIT_S, self.process.request_stop)
        time_limit.start()
        try:
            self._write(TimingPlans(timing=tuple(kinds)))
            lines = [self._line("the step could not be timed") for _ in kinds]
        finally:
            time_limit.cancel()
        return {
            plan: StepTimes.model_validate_json(line)
            for plan, line in zip(kinds, lines, strict=True)
        }

    def read_answers(self, plan: CopyingPlan) -> Copying:
        """Have the model answer, and look up in what it wrote. Raises ForecastError."""
        self._write(plan)
        return Copying.model_validate_json(self._line("the model's answers could not be read"))

    def send(self, plan: ForecastPlan) -> None:
        """Have the trials of a plan played. Raises ForecastError where vLLM does not import."""
        self.due = sum(len(engine.trials) for engine in plan.engines)
        self._write(plan)

    def plays(self) -> Iterator[ForecastPlay]:
        """Yield the plays of the plan that was sent; raises ForecastError where one fails."""
        for _ in range(self.due):
            line = self._line("vLLM's scheduler could not be driven")
            yield ForecastPlay.model_validate_json(line)

    def _write(self, plan: BaseModel) -> None:
        self.ready = self.ready or self._line("vLLM's engine core does not import") == "ready\n"
        with contextlib.suppress(BrokenPipeError):  # it has ended: the next line is missing
            self.process.stdin.write(plan.model_dump_json() + "\n")
            self.process.stdin.flush()

    def _line(self, failure: str) -> str:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise ForecastError(f"{failure}: {last_line(self.process)}")
        return line


@contextlib.contextmanager
def started() -> Iterator[Forecaster]:
    """Start a forecaster, which ends with the block."""
    with guarded("forecaster", FORECASTER_ARGV) as process:
        yield Forecaster(process)


@contextlib.contextmanager
def side_by_side(forecasters: int) -> Iterator[list[Forecaster]]:
    """Start so many forecasters, which end with the block."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(started()) for _ in range(forecasters)]


def play_all(
    forecasters: Sequence[Forecaster], plans: Sequence[ForecastPlan]
) -> Iterator[tuple[int, ForecastPlay]]:
    """Play plans side by side; yield (a plan's index, a play of it), whichever ends first.

    The plans begin in their order, each as soon as a forecaster has no other, so those that take
    longest come first. Raises ForecastError where vLLM does not import, or its scheduler cannot be
    driven.
    """
    waiting = iter(enumerate(plans))
    with selectors.DefaultSelector() as selector:

        def play_next(forecaster: Forecaster) -> None:
            for number, plan in itertools.islice(waiting, 1):
                forecaster.send(plan)
                selector.register(
                    forecaster.process.stdout, selectors.EVENT_READ, (forecaster, number)
                )

        for forecaster in forecasters:
            play_next(forecaster)
        while selector.get_map():
            for key, _ in selector.select():
                selector.unregister(key.fileobj)
                forecaster, number = key.data
                yield from ((number, played) for played in forecaster.plays())
                play_next(forecaster)


Capacities = Sequence[float | None]
"""The requests/s that are served at the expected, a faster and a slower step; None: unknown."""
NO_CAPACITIES: Capacities = (None, None, None)


@dataclass(frozen=True)
class VirtualTrials:
    """Plays the trials of a lab on virtual engines, and measures what their clients saw."""

    setup: Setup
    requests: Mapping[str, Sequence[Path]]  # workload -> the file of each repeat
    steps: Steps
    copies: Copies
    spread: float  # the usual one of the machine's speed, a factor of 1 or more
    forecaster: Forecaster

    def capacities_per_s(self, point: Point) -> Capacities:
        """Find the requests/s that the first trial of a point serves. Raises ForecastError."""
        (plays,) = self.played([point], NO_CAPACITIES)
        return [play.figures["requests_per_s"] for play in (plays.as_timed[0], *plays.shifted)]

    def played(self, points: Sequence[Point], capacities: Capacities) -> list[PointPlays]:
        """Play all trials of these points; return the plays of each. Raises ForecastError.

        Loads may be multiples of the capacities.
        """
        self.forecaster.send(self._plan(points, capacities))
        known = {p.key: p for p in points}
        lab, outcomes = self.setup.lab, {key: list[Outcome]() for key in known}
        parts = parts_of(lab.name) if lab.findings or lab.plots else ReportParts()
        over_time, watched = (
            {p.key for p in of(points)} for of in (parts.over_time, parts.watched)
        )
        timelines: dict[str, Timeline] = {}  # of each point's first play
        for play in self.forecaster.plays():
            trial = _trial(lab, known[play.key], play)
            if play.key in over_time - timelines.keys():
                timelines[play.key] = timeline(trial.point, trial.records)
            outcomes[play.key].append(Outcome.of(trial, play.kv_use, play.key in watched))
        # the last two of a point are those at the ends of the band
        return [
            PointPlays(p, of[:-2], of[-2:], timelines.get(p.key))
            for p in points
            for of in [outcomes[p.key]]
        ]

    def _plan(self, points: Sequence[Point], capacities: Capacities) -> ForecastPlan:
        """Plan all repeats at the expected step, then the first at a faster and a slower one."""
        first = [(1, 1.0)]
        return ForecastPlan(
            tokenizer=self.setup.model.path,
            engines=(
                *(self._engine(p, 0, self._repeats(p), capacities) for p in points),
                *(self._engine(p, end, first, capacities) for end in (1, 2) for p in points),
            ),
        )

    def _repeats(self, point: Point) -> list[tuple[int, float]]:
        """List the plays at the expected step: a repeat, and a factor on its step.

        Where long prompts come beside streams, no two plays have the same speed: see `paces`.
        """
        repeats = self.setup.lab.repeats
        if repeats == 1 or not isinstance(point.load, Contended):
            return [(repeat, 1.0) for repeat in range(1, repeats + 1)]
        speeds = paces(max(repeats, PLAYS_OF_CHANCE), self.spread / FASTER)
        return [(1 + i % repeats, pace) for i, pace in enumerate(speeds)]

    def _engine(
        self,
        point: Point,
        end: int,
        plays: Sequence[tuple[int, float]],
        capacities: Capacities,
    ) -> PlannedEngine:
        """Plan an engine with the step at this end of the band: 0 is the expected one."""
        setup = self.setup
        step_times, draft_times = self.steps[point.key][end]
        flags = with_places(point.variant.flags, setup.places)
        if setup.datasheet:
            defaults = defaults_on_a_gpu(setup.machine, point.shape, point.variant.flags)
            flags = as_one_gpu({**defaults, **flags})
        return PlannedEngine(
            argv=(
                *("--model", str(_served(setup, point.variant))),
                *(("--load-format", "dummy") if setup.model.dummy else ()),
                *Vllm.flag_argv(flags),
            ),
            step_times=step_times,
            draft_times=draft_times,
            on_cuda=self.setup.machine.kind == "gpu",
            trials=tuple(
                self._planned(point, repeat, pace, capacities[end]) for repeat, pace in plays
            ),
        )

    def _planned(
        self, point: Point, repeat: int, pace: float, capacity_per_s: float | None
    ) -> PlannedTrial:
        lab, key = self.setup.lab, point.key
        speculates = bool(point.flags.speculative_config)
        return PlannedTrial(
            key=key,
            repeat=repeat,
            requests=self.requests[point.workload.name][repeat - 1],
            acceptance=lab.acceptance(point) if lab.acceptance and speculates else 0.0,
            guessed=lab.guessed(point) if lab.guessed and speculates else 1.0,
            copied=tuple(self.copies[key][repeat - 1]) if key in self.copies else (),
            pace=pace,
            masking=lab.masking(point) if lab.masking else None,
            primed=_primed(point),
            traffic=_traffic(lab, point, repeat, capacity_per_s),
        )


def paces(plays: int, spread: float) -> list[float]:
    """Spread factors on a step's time evenly within 1 / spread and spread; the first is 1.

    Streams whose requests are all alike send their next prompts together, and a long prompt comes
    every so often. Which of the two comes first decides whether the streams wait for seconds, and
    depends on the exact speed of a step, which is not known that well. A single play would show
    only one of the two outcomes.
    """
    places = [(i + 1) // 2 * (-1) ** i for i in range(plays)]  # 0, -1, 1, -2, 2 ..
    if plays % 2 == 0:
        places[-1] = 0  # which has no counterpart
    return [spread ** (2 * place / plays) for place in places]


def defaults_on_a_gpu(machine: Machine, shape: Shape, flags: Mapping[str, FlagValue]) -> VllmFlags:
    """Return the defaults that vLLM 0.32 takes from the GPU, as an API server, and a CPU has not.

    Source: `get_batch_defaults` of vllm/engine/arg_utils.py; a block of 16 tokens is the default of
    the attention kernels on Hopper and Ampere. The KV cache has what the weights leave of the
    memory, which is less than nothing for a model that does not fit.
    """
    large = machine.memory_bytes >= 70 * 2**30 and "A100" not in machine.model
    budget = VllmFlags(
        {"max-num-batched-tokens": 8192 if large else 2048, **flags}
    ).max_num_batched_tokens
    weight_bytes = shape.held_bytes / VllmFlags(flags).weight_parts
    return VllmFlags(
        {
            "max-num-batched-tokens": budget,
            "max-num-seqs": min(1024 if large else 256, budget),
            "block-size": 16,
            "kv-cache-memory-bytes": int(usable_bytes(machine.memory_bytes) - weight_bytes),
        }
    )


def as_one_gpu(flags: Mapping[str, FlagValue]) -> VllmFlags:
    """Return the flags of one GPU that holds what several hold that share each layer.

    To the scheduler their KV cache is one: each of them holds its heads of every token.
    """
    shared = VllmFlags(flags)
    rest = {name: flag for name, flag in flags.items() if name != "tensor-parallel-size"}
    memory_bytes = shared.tensor_parallel_size * shared.kv_cache_memory_bytes
    return VllmFlags({**rest, "kv-cache-memory-bytes": memory_bytes})


def _primed(point: Point) -> int:
    cached = VllmFlags(point.variant.flags).enable_prefix_caching
    prefix = point.workload.prefix
    return prefix.groups if cached and prefix and point.workload.primed else 0


def _traffic(lab: Lab, point: Point, repeat: int, capacity_per_s: float | None) -> Traffic:
    """Describe a load for the virtual clients; the schedule is the one that will be sent.

    Where it is a multiple of the capacity, it is one of the capacity that was forecast.
    """
    load = point.load
    warmup_s, window_s = lab.warmup_of(point.workload), lab.window_s
    if isinstance(load, Replay):
        schedule_s: Sequence[float] = [at / load.speed for at, _, _ in point.workload.trace]
        window_s = max(1e-9, min(window_s, schedule_s[-1] - warmup_s))  # it ends with the trace
    else:
        duration_s, seed = warmup_s + lab.window_s, lab.draw_seed(repeat)
        schedule_s = send_times(load, duration_s, seed, capacity_per_s) or ()
    return Traffic(
        kind="waves" if isinstance(load, Waves) else "open" if load.open_loop else "closed",
        users=load.users,
        schedule_s=tuple(t for t in schedule_s if t < warmup_s + lab.window_s),
        intruder_every_s=load.every_s if isinstance(load, Contended) else None,
        warmup_s=warmup_s,
        window_s=window_s,
        least_counted=LEAST_COUNTED,
        least_intruders=LEAST_COUNTED,
        most_held_open_s=most_held_open_s(lab.window_s),
    )


def _trial(lab: Lab, point: Point, forecast_play: ForecastPlay) -> Trial:
    """Present a play as a finished trial, so that the same functions measure it."""
    play = forecast_play.play
    return Trial(
        point,
        forecast_play.repeat,
        lab.slo,
        list(records(play)),
        _summary(play),
        _snapshot(forecast_play),
    )


def records(play: Play) -> Iterator[RequestRecord]:
    """Present what the clients of a play observed as the records of a trial."""
    for a in play.answers:
        yield RequestRecord(
            index=a.index,
            asked_tokens=a.asked_tokens,
            scheduled_s=a.scheduled_s,
            sent_s=a.sent_s,
            chunks=a.chunks,
            end_s=a.chunks[-1][0] if a.chunks else a.turned_away_s,
            prompt_tokens=a.prompt_tokens,
            output_tokens=sum(tokens for _, tokens in a.chunks),
            in_window=a.in_window,
            error=None if a.turned_away_s is None else TURNED_AWAY[0],
            choice=a.choice,
        )


def _summary(play: Play) -> TrialSummary:
    return TrialSummary(
        started_unix_s=0, window_s=play.window_s, answered_under_load=play.answered_under_load,
        planned=None, sent=len(play.answers),
        exhausted=False, loop_lag_p99_s=0, loop_lag_max_s=0, cpu_s=0,
    )  # fmt: skip


def _snapshot(forecast_play: ForecastPlay) -> Snapshot:
    """Present what the engine would have counted under the names of its metrics."""
    counted = forecast_play.counters
    return Snapshot(
        values={
            metrics.PREFIX_QUERIES: counted.get("prefix_queries", 0),
            metrics.PREFIX_HITS: counted.get("prefix_hits", 0),
            metrics.PREEMPTIONS: counted.get("preemptions", 0),
            metrics.TURNED_AWAY: counted.get("turned_away", 0),
            **(
                {
                    metrics.SPEC_DRAFTS: counted["drafts"],
                    metrics.SPEC_DRAFTED: counted["draft_tokens"],
                    metrics.SPEC_ACCEPTED: counted["accepted_tokens"],
                }
                if "drafts" in counted
                else {}
            ),
        },
        info={
            metrics.CACHE_CONFIG: {
                "num_gpu_blocks": str(forecast_play.kv_capacity_tokens), "block_size": "1",
            }
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Holds what a play came to."""

    figures: Figures
    lasts_s: float  # until its last answer ended
    sent: int  # requests
    watch: Watch | None  # where its load is watched
    kv_use: KvUse | None

    @classmethod
    def of(cls, trial: Trial, kv_use: KvUse | None, watched: bool = False) -> Outcome:
        return cls(
            figures=measure(trial),
            lasts_s=max((r.end_s or 0.0 for r in trial.records), default=0.0),
            sent=len(trial.records),
            watch=watch(trial) if watched else None,
            kv_use=kv_use,
        )


@dataclass(frozen=True)
class PointPlays:
    """Holds what all plays of a point came to."""

    point: Point
    as_timed: Sequence[Outcome]  # at the expected step
    shifted: Sequence[Outcome]  # the first at FASTER and at SLOWER
    timeline: Timeline | None  # of the first, where the lab's plots show it

    @property
    def trial_s(self) -> float:
        """The mean time until the last answer of a trial has ended."""
        return fmean(play.lasts_s for play in self.as_timed)

    @property
    def fewest_sent(self) -> int:
        """The requests of the play that sent fewest, and at most as many as are drawn."""
        return min(MOST_DRAWN, *(play.sent for play in (*self.as_timed, *self.shifted)))

    @property
    def watches(self) -> tuple[Watch, ...]:
        return tuple(play.watch for play in self.as_timed if play.watch)

    @property
    def kv_uses(self) -> list[KvUse]:
        return [play.kv_use for play in self.as_timed if play.kv_use]

    def bands(self, lab: Lab) -> dict[str, Band]:
        """Return the band of each metric in which the mean of the lab's trials is expected."""
        # trials of a run share the speed that these plays differ in
        repeats = 1 if isinstance(self.point.load, Contended) else lab.repeats_of(self.point)
        as_timed, shifted = (
            [play.figures for play in plays] for plays in (self.as_timed, self.shifted)
        )
        return _bands(as_timed, shifted, repeats)


def _bands(
    as_timed: Sequence[Mapping[str, float | None]],
    shifted: Sequence[Mapping[str, float | None]],
    repeats: int,
) -> dict[str, Band]:
    """Take each metric's mean over plays, how far another step shifts it, and what chance adds.

    `as_timed` holds the figures of each play, `shifted` those of the first at FASTER and SLOWER.
    `repeats` independent trials will be measured. Their mean differs by chance from that of the
    plays, by as much as these differ from one another: the band holds that with 80%, and no end of
    it lies beyond all plays.
    """
    bands = {}
    for name in (name for name, metric in METRICS.items() if metric.forecast):
        values = [v for row in as_timed if (v := row.get(name)) is not None]
        if not values:
            continue
        value, first = fmean(values), as_timed[0].get(name)
        ends = [v for row in shifted if (v := row.get(name)) is not None]
        shifts = [v - first for v in ends if first is not None]
        chance = by_chance(values, repeats)
        below, above = (math.hypot(f(0.0, *shifts, 0.0), chance) for f in (min, max))
        bands[name] = Band(
            value=value,
            low=min(value, max(value - below, min(*values, *ends, value))),
            high=max(value, min(value + above, max(*values, *ends, value))),
            geometric_mean=geometric_mean(values) if min(values) > 0 else None,
        )
    return bands


def by_chance(values: Sequence[float], repeats: int) -> float:
    """Tell how far the mean of so many trials lies from that of these plays, with 80%."""
    if len(values) < 2:
        return 0.0
    error = stdev(values) * math.sqrt(1 / len(values) + 1 / repeats)
    return error * float(stats.t.ppf(0.9, len(values) - 1))
