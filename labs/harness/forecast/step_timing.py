"""Plan what is to be timed of each point's step, and how far a step may be from what was timed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs.harness.analysis.machine_speed import MachineSpeed, usual_spread
from labs.harness.forecast.forecaster import Forecaster
from labs.harness.plan.recorded_machines import MachineOnFile, largest_step
from labs.harness.plan.resolve import Setup
from labs.harness.spec.lab import Point, Variant
from labs.harness.storage.checks import unreadable
from labs.harness.storage.results import all_runs
from serving.engines.flags import FlagValue, with_places
from serving.engines.vllm import Vllm
from serving.engines.vllm_flags import VllmFlags
from serving.hardware import machine as machines
from serving.hardware.gpus import Datasheet
from serving.hardware.machine import Machine
from serving.models import catalog
from serving.models.catalog import Shape
from serving.simulator import cards
from serving.simulator.datasheet import as_draft
from serving.simulator.profiled_step import PASSES, QUICK_PASSES, TimingPlan
from serving.simulator.step import StepTimes

LEAST_OF_STAND_IN, MOST_OF_STAND_IN = 0.90, 1.18
"""The ends of a band: the engine's own step may take this many times as long as the stand-in step.

Both factors were measured on two machines (vLLM 0.32 on CPU, batches of 1 to 16 and a prompt of 768
tokens, a stand-in of PyTorch's operators), before any run that is judged by them. With vLLM's own
projections the engine took 0.92 to 1.01 times as long as the stand-in on a third, and 0.99 to 1.11
times with vLLM's own model on a fourth. Both ends are further off by the usual spread of the
machine's speed, as the reference steps of earlier runs on it show, and at least by how much the
speed wandered while the step was timed.
"""


def served_folder(setup: Setup, variant: Variant) -> Path:
    return setup.weights.get(variant.name, setup.model).path


def _timed(setup: Setup, variant: Variant) -> Path:
    """Return the folder whose step is timed: the model's own, where the variant's configuration is.

    Pruned weights change no step, so that variants which serve them share the model's timing.
    """
    model, served = setup.model.path, served_folder(setup, variant)
    if served == model:
        return model
    configs = [(folder / "config.json").read_bytes() for folder in (served, model)]
    return model if configs[0] == configs[1] else served


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def _step_of(setup: Setup, point: Point) -> TimingPlan:
    """Plan what to time for this point: its model's step, with adapters if its engine has any."""
    flags, cpu = VllmFlags(point.variant.flags), setup.machine.kind == "cpu"
    adapters = bool(flags.get("enable-lora"))
    return TimingPlan(
        config=_timed(setup, point.variant) / "config.json",
        device="cpu" if cpu else "cuda",
        cores=machines.timing_cores(setup.machine.kind),
        # one size for all variants, so that those whose steps are the same share a timing
        tokens=tuple(2**i for i in range(14) if 2**i < 2 * largest_step(setup.points)),
        rows=(1, 4, 16, 64) if cpu else (1, 16, 64, 256),
        adapters=flags.max_loras if adapters else 0,
        adapter_rank=flags.max_lora_rank if adapters else 0,
        adapters_asked_for=not adapters or point.workload.adapters is not None,
        engine_argv=_engine_argv(_timed(setup, point.variant), flags) if cpu else (),
        passes=QUICK_PASSES if setup.quick else PASSES,
    )


def _engine_argv(model: Path, flags: Mapping[str, FlagValue]) -> tuple[str, ...]:
    """Return the arguments that decide which operators an engine chooses."""
    deciding = ("block-size", "dtype", "kv-cache-dtype")
    kept = {name: flag for name, flag in flags.items() if name in deciding}
    return (*Vllm.model_argv(model), *Vllm.flag_argv(kept))


def _draft_of(setup: Setup, point: Point) -> TimingPlan | None:
    """Plan what to time of the draft model; None where the point has none."""
    flags = VllmFlags(with_places(point.variant.flags, setup.places))
    named = flags.speculative_config.get("model")
    if not named:
        return None
    step, model = _step_of(setup, point), Path(str(named))
    argv = _engine_argv(model, flags) if step.engine_argv else ()
    return step.model_copy(update={"config": model / "config.json", "engine_argv": argv})


EngineSteps = tuple[StepTimes, StepTimes | None]  # of the model, and of its draft model
Steps = dict[str, tuple[EngineSteps, EngineSteps, EngineSteps]]
"""Point -> its steps as expected, on a faster and on a slower machine: the ends of the band."""


def ends_of_band(times: StepTimes, spread: float = 1.0) -> tuple[StepTimes, StepTimes, StepTimes]:
    """Return a timed step as expected, on a faster machine and on a slower one.

    `spread` is the usual one of this machine's speed, a factor of 1 or more.
    """
    apart = max(times.wander, spread)
    return (
        times,
        times.times(LEAST_OF_STAND_IN / apart),
        times.times(MOST_OF_STAND_IN * apart),
    )


def earlier_speeds(machine: Machine) -> list[MachineSpeed]:
    """List how fast this machine was in the finished runs on file; damaged runs are left out."""
    folders = (f for f in all_runs() if f.machine_slug == machine.slug and f.complete)
    speeds = (f.summary().machine_speed for f in folders if not unreadable(f))
    return [speed for speed in speeds if speed]


def steps_as_timed(
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


def steps_on_file(points: Sequence[Point], on_file: MachineOnFile) -> Steps:
    """Take the step of every one of these points from a run on a machine that is not here."""
    expected, faster, slower = ends_of_band(on_file.step, on_file.spread)
    return {p.key: ((expected, None), (faster, None), (slower, None)) for p in points}


def steps_of_card(setup: Setup, points: Sequence[Point], card: Datasheet) -> Steps:
    """Find the steps of these points on a GPU that is not here, all in the same way."""
    known = have_kernels(setup, points)
    served = {p.key: _served(setup, p) for p in points}

    def at(point: Point) -> tuple[EngineSteps, EngineSteps, EngineSteps]:
        model, *draft = (
            cards.steps(one.config, one.shape, card, one.gpus, one.kv_value_bytes, not known)
            for one in served[point.key]
        )
        drafting = map(as_draft, draft[0]) if draft else (None, None, None)
        expected, faster, slower = zip(model, drafting, strict=True)
        return expected, faster, slower

    return {point.key: at(point) for point in points}


def have_kernels(setup: Setup, points: Iterable[Point]) -> bool:
    """Tell whether times of all kernels of these points' steps were published for the GPU."""
    card = setup.datasheet
    return card is not None and all(
        cards.have_kernels(*one.on(card)) for point in points for one in _served(setup, point)
    )


@dataclass(frozen=True)
class _Served:
    """A model as an engine serves it."""

    config: Mapping[str, Any]
    shape: Shape
    gpus: int
    kv_value_bytes: float | None = None

    def on(self, card: Datasheet) -> tuple[Mapping[str, Any], Datasheet, int, float | None]:
        return self.config, card, self.gpus, self.kv_value_bytes


def _served(setup: Setup, point: Point) -> list[_Served]:
    """Name the model of a point's engine, and its draft model where it has one."""
    flags = VllmFlags(with_places(point.variant.flags, setup.places))
    draft, gpus = flags.speculative_config.get("model"), flags.tensor_parallel_size
    config = config_of(served_folder(setup, point.variant) / "config.json")
    served = [_Served(config, point.shape, gpus, flags.kv_value_bytes)]
    if draft:  # vLLM divides it like the model itself
        config = config_of(Path(str(draft)) / "config.json")
        served.append(_Served(config, catalog.shape_of(config), gpus))
    return served


def described(steps: Iterable[tuple[EngineSteps, EngineSteps, EngineSteps]]) -> list[Any]:
    """List the expected steps, each once, as a run keeps them."""
    return list(
        {
            times.model_dump_json(): times.model_dump()
            for (expected, draft), _, _ in steps
            for times in (expected, draft)
            if times
        }.values()
    )
