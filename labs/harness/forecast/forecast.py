"""A forecast of every load point, before any engine starts.

vLLM's own scheduler plays each trial in virtual time, with the requests that will be sent and the
arguments that the engine will be started with (`serving/simulator/`). Its steps take as long as a
step that is timed here, was timed before a run on file, or follows from a GPU's datasheet.
What clients would have seen is then measured as a real trial is, so that a forecast and a
measurement are the same figure by the same function.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from labs.harness.analysis.computed import (
    DAYS,
    SEARCH,
    TWO_ENGINES,
    Band,
    OnTwoEngines,
    PointForecasts,
    ScaledDay,
    Searched,
)
from labs.harness.analysis.machine_speed import MachineSpeed, usual_spread
from labs.harness.analysis.metrics import METRICS
from labs.harness.derived.lab_modules import parts_of
from labs.harness.forecast.copied_text import Copies, read_answers, share_copied
from labs.harness.forecast.forecaster import Forecaster, ForecastError, side_by_side, started
from labs.harness.forecast.load_forecast import LoadForecast
from labs.harness.forecast.simulated_loads import forecast_loads, processes
from labs.harness.forecast.simulated_trials import (
    NO_CAPACITIES,
    PLAYED_AS,
    PointPlays,
    VirtualTrials,
    write_prompts,
)
from labs.harness.forecast.step_timing import (
    Steps,
    config_of,
    described,
    earlier_speeds,
    have_kernels,
    served_folder,
    steps_as_timed,
    steps_of_card,
    steps_on_file,
)
from labs.harness.plan.progress import ProgressDisplay
from labs.harness.plan.resolve import Setup, requests_file
from labs.harness.spec.lab import Lab, LabError, Point, Variant
from loadtests.arrivals import OfCapacity
from loadtests.trace import MOST_ROWS
from serving.engines import ENGINES
from serving.engines.flags import with_places
from serving.engines.vllm import Vllm
from serving.engines.vllm_flags import VllmFlags
from serving.metrics import KvUse
from serving.models import catalog
from serving.simulator.protocol import SyntheticRequest


def forecast(
    setup: Setup, requests: Mapping[str, Sequence[Path]], progress: ProgressDisplay
) -> PointForecasts:
    """Forecast every point whose step can be timed.

    `requests[workload]` holds the file of each repeat. Raises ForecastError where the step cannot
    be timed, vLLM does not import, or its scheduler cannot be driven.
    """
    without = reasons_against(setup)
    points = [p for p in setup.points if p.variant.name not in without]
    if not points:
        return PointForecasts(points={}, without=without)
    with _trials(setup, points, requests, progress) as trials:
        progress.waiting("playing every load on vLLM's scheduler in virtual time")
        capacities = NO_CAPACITIES
        if setup.lab.finds_capacity and points[0] is setup.points[0]:
            capacities = trials.capacities_per_s(points[0])
        if not all(capacities):
            points = [p for p in points if not isinstance(p.load, OfCapacity)]
        all_plays = trials.played(points, capacities)
        # these come last, as the forecaster ends with an error
        searched = _or_why_not(without, SEARCH, lambda: _searched(trials, points, capacities[0]))
        on_two = _or_why_not(without, TWO_ENGINES, lambda: _on_two_engines(trials, points))
        days = _or_why_not(without, DAYS, lambda: _days(trials, points, capacities[0]))
    return PointForecasts(
        points={plays.point.key: plays.bands(setup.lab) for plays in all_plays},
        without=without,
        trial_s={plays.point.key: plays.trial_s for plays in all_plays},
        least_found={p.point.key: found for p in all_plays if (found := p.least_found)},
        copied=_shares_copied(all_plays, trials.copies, random.Random(setup.lab.seed)),
        watches={plays.point.key: plays.watches for plays in all_plays if plays.watches},
        timelines={plays.point.key: line for plays in all_plays if (line := plays.timeline)},
        kv_use=KvUse.over_trials({p.point.key: p.kv_uses for p in all_plays if p.kv_uses}),
        kv_bands={p.point.key: bands for p in all_plays if (bands := p.kv_bands(setup.lab))},
        on_two=on_two,
        days=days,
        step_times=described(trials.steps.values()),
        machine_spread=trials.spread,
        searched=searched,
        growing=tuple(plays.point.key for plays in all_plays if plays.as_timed[0].grows),
    )


@contextlib.contextmanager
def _trials(
    setup: Setup,
    points: Sequence[Point],
    requests: Mapping[str, Sequence[Path]],
    progress: ProgressDisplay,
) -> Iterator[VirtualTrials]:
    """Find the steps of these points, and what their engines copy; end with the forecaster."""
    speeds = [] if setup.elsewhere else earlier_speeds(setup.machine)
    spread = setup.on_file.spread if setup.on_file else usual_spread(speeds, setup.lab.repeats)
    with started() as forecaster:
        steps = steps_of(setup, points, speeds, forecaster, progress)
        long = any(len(p.workload.trace) > MOST_ROWS for p in points)  # without a text
        copies = {} if long else read_answers(setup, points, requests, forecaster, progress)
        prompts = requests if long else write_prompts(requests, setup.writer)
        yield VirtualTrials(setup, prompts, steps, copies, spread, forecaster)


@dataclass(frozen=True)
class FleetSize:
    """Says how many replicas serve together, and which routers are tried."""

    replicas: int
    routers: tuple[str, ...]


@dataclass(frozen=True)
class FleetForecasts:
    """Holds a forecast for each open load of each engine, one a router."""

    points: Mapping[tuple[str, str], LoadForecast]  # by a point's key and the router
    without: Mapping[str, str]  # variant -> why it has no forecast


def require_open_loads(setup: Setup) -> None:
    """Check that a router would change anything. Raises LabError."""
    if not _open_points(setup):
        raise LabError(
            f"{setup.lab.name} has no load whose requests come at times of their own, which several"
            " engines could share: its clients wait for answers, or its rates are multiples of one"
            " engine's capacity. Give traffic with TRACE=, or leave REPLICAS and ROUTER out"
        )


def _open_points(setup: Setup) -> list[Point]:
    return [p for p in setup.points if p.load.open_loop and not isinstance(p.load, OfCapacity)]


def write_lengths(setup: Setup, work: Path) -> None:
    """Write the requests of traces without a text: nothing reads one where nothing is sent."""
    for workload in setup.lab.workloads:
        path = requests_file(work, workload, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for index, (_, prompt, output) in enumerate(workload.trace):
                request = SyntheticRequest(index=index, prompt_tokens=prompt, output_tokens=output)
                file.write(request.model_dump_json() + "\n")


def forecast_fleets(
    setup: Setup,
    requests: Mapping[str, Sequence[Path]],
    size: FleetSize,
    progress: ProgressDisplay,
) -> FleetForecasts:
    """Forecast every open load of every engine whose step is known, behind each router.

    Raises ForecastError where the step cannot be timed, or vLLM's scheduler cannot be driven.
    """
    without = reasons_against(setup)
    points = [p for p in _open_points(setup) if p.variant.name not in without]
    if not points:
        return FleetForecasts({}, without)
    with _trials(setup, points, requests, progress) as trials:
        loads = {
            (point.key, router): trials.of_a_fleet(point, size.replicas, router)
            for point in points
            for router in size.routers
        }
    with side_by_side(processes(max(len(p.lengths) for p in points))) as forecasters:
        where = f"{size.replicas} replicas"
        found = forecast_loads(loads, forecasters, setup.lab.slo, progress, where)
    return FleetForecasts(found, without)


Found = TypeVar("Found")


def _or_why_not(
    without: dict[str, str], name: str, found: Callable[[], tuple[Found, ...]]
) -> tuple[Found, ...]:
    """Return what is forecast beside the points; note why where vLLM cannot be driven so."""
    try:
        return found()
    except ForecastError as error:
        without[name] = str(error)
        return ()


def _searched(
    trials: VirtualTrials, points: Sequence[Point], capacity_per_s: float | None
) -> tuple[Searched, ...]:
    """Forecast the settings that the lab looks among, over the step of the first point.

    Raises ForecastError.
    """
    search = trials.setup.lab.searched
    if not points or not search or not (alone := search(points)):
        return ()
    plays = replace(trials, steps={p.key: trials.steps[points[0].key] for p in alone})
    return tuple(
        Searched(
            flags=dict(point.flags),
            figures={
                name: value
                for name, value in figures.items()
                if METRICS[name].forecast and value is not None
            },
        )
        for point, figures in zip(alone, plays.figures(alone, capacity_per_s), strict=True)
    )


def steps_of(
    setup: Setup,
    points: Sequence[Point],
    speeds: Sequence[MachineSpeed],
    forecaster: Forecaster,
    progress: ProgressDisplay,
) -> Steps:
    """Find how long the steps of these points take: from a datasheet, from a run on file, or timed.

    `speeds` are those of earlier runs on this machine. Raises ForecastError.
    """
    if setup.datasheet:
        return steps_of_card(setup, points, setup.datasheet)
    if setup.on_file:
        return steps_on_file(points, setup.on_file)
    # alone on the machine: beside another process that works, steps take a third longer
    progress.waiting("timing the stand-in step, for the forecast")
    return steps_as_timed(setup, points, speeds, forecaster)


UNSEEN: dict[str, object] = {
    "enforce-eager": False, "compilation-config": {}, "async-scheduling": True,
    "attention-backend": "", "attention-config": {},
}  # fmt: skip
"""Flags of a step's launching, scheduling and kernels -> vLLM's own value.

A forecast's step is the same whatever they say.
"""


def _on_two_engines(trials: VirtualTrials, points: Sequence[Point]) -> tuple[OnTwoEngines, ...]:
    """Forecast on two engines what the lab asks for. Raises ForecastError."""
    lab = trials.setup.lab
    pairs = parts_of(lab.name).on_two(points) if lab.findings else ()
    return trials.on_two_engines(pairs) if pairs else ()


def _days(
    trials: VirtualTrials, points: Sequence[Point], capacity_per_s: float | None
) -> tuple[ScaledDay, ...]:
    """Forecast the days that the lab asks for. Raises ForecastError."""
    lab = trials.setup.lab
    asked = parts_of(lab.name).days(points) if lab.findings and capacity_per_s else ()
    return trials.days(asked, capacity_per_s) if asked and capacity_per_s else ()


def rests_on_kernels(setup: Setup) -> bool:
    """Tell whether the steps of all that is forecast come from published times of kernels."""
    without = reasons_against(setup)
    return have_kernels(setup, [p for p in setup.points if p.variant.name not in without])


def reasons_against(setup: Setup) -> dict[str, str]:
    """Say of each variant whose step cannot be timed in advance why not."""
    return {v.name: why for v in setup.lab.variants if (why := reason_against(setup, v))}


def reason_against(setup: Setup, variant: Variant) -> str | None:
    """Say why this variant's step cannot be timed in advance; None where it can."""
    flags = setup.lab.flags_of(variant)
    if setup.endpoint:
        return "an endpoint's settings are not known here"
    if setup.engine_command or ENGINES[variant.engine] is not Vllm:
        return "the engine is not the vLLM of this environment"
    if flags.speculative_config and setup.lab.acceptance is None:
        return "how many drafts are accepted is not known beforehand"
    if (policy := flags.router.get("policy")) and str(policy) not in PLAYED_AS:
        return f"the policy {policy} of a router is not played"
    if flags.kv_offloading_bytes:
        return "copying keys and values back from the host's memory was not timed"
    if setup.datasheet:
        return _unpublished(flags) or _undivided_draft(setup, flags) or _unseen(setup.lab, variant)
    if flags.devices > 1:
        return "communication between devices was not timed"
    has_experts = setup.weights.get(variant.name, setup.model).shape.experts
    if has_experts and (setup.on_file or setup.machine.kind != "cpu"):
        return "routed experts were not timed"
    if setup.on_file and (why := _untimed_on_file(setup, variant)):
        return why
    if setup.machine.kind == "cpu":
        return None if flags.enforce_eager else "a compiled step was not timed"
    return _untimed_on_a_gpu(setup, variant)


def _untimed_on_file(setup: Setup, variant: Variant) -> str | None:
    """Say what in this variant's step is not in the one on file, which is the model's own."""
    if setup.lab.flags_of(variant).speculative_config.get("model"):
        return "the step of a draft model is not on file"
    return _other_kernels(setup, variant)


def _other_kernels(setup: Setup, variant: Variant) -> str | None:
    """Say which operators this variant has in the place of the model's own, or beside them."""
    if _has_quantized_weights(setup, variant):
        return "the kernels of quantized weights were not timed"
    if setup.lab.flags_of(variant).quantizes_cache:
        return "attention to a quantized cache was not timed"
    if setup.lab.flags_of(variant).get("enable-lora"):
        return "vLLM's operators for adapters were not timed"
    return None


def _untimed_on_a_gpu(setup: Setup, variant: Variant) -> str | None:
    if why := _other_kernels(setup, variant):
        return why
    flags = setup.lab.flags_of(variant)
    if flags.enforce_eager:
        return "an eager step was not timed: what is timed there is replayed as a CUDA graph"
    return _unseen(setup.lab, variant)


def _unseen(lab: Lab, variant: Variant) -> str | None:
    """Say which flag leaves the forecast's step as it is, although the lab compares it.

    The variants that leave such a flag to vLLM keep their forecast.
    """
    alike = [lab.flags_of(v) for v in lab.variants if v.engine == variant.engine]
    own = lab.flags_of(variant)
    for flag, default in UNSEEN.items():
        value = own.get(flag, default)
        if value != default and any(flags.get(flag, default) != value for flags in alike):
            return f"the forecast's step is the same whatever {flag} says, which is compared here"
    return None


def _has_quantized_weights(setup: Setup, variant: Variant) -> bool:
    return "quantization_config" in config_of(served_folder(setup, variant) / "config.json")


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
    shape = catalog.shape_of(config_of(Path(str(draft)) / "config.json"))
    if shape.heads % gpus or shape.kv_heads % gpus:
        return f"{gpus} GPUs cannot share the {shape.heads} heads of the draft model"
    return None


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
