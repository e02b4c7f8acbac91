"""How much of a forecast is timed and played, and what one without a run waits for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs import LABS
from labs.harness.analysis.computed import PointForecasts, Predictions, Searched
from labs.harness.analysis.machine_speed import MachineSpeed, PartSpeed
from labs.harness.forecast.forecast import reason_against, reasons_against
from labs.harness.forecast.simulated_trials import _traffic, as_one_gpu
from labs.harness.forecast.step_timing import steps_as_timed
from labs.harness.plan.resolve import (
    RunRequest,
    Setup,
    lab_of,
    machine_of,
    require_shared_layers,
    with_whole_prompts,
)
from labs.harness.reports import tables
from labs.harness.runner import run as running
from labs.harness.runner.run import forecast_alone, run_lock
from labs.harness.spec.lab import Lab, LabError
from loadtests.trace import MOST_ROWS
from serving.engines.vllm_flags import VllmFlags
from serving.hardware.gpus import Datasheet
from serving.models.catalog import bundled
from tests.unit.builders import CEILINGS, SHAPE
from tests.unit.test_forecasting import TIMES

PLAYED: list[int] = []


@pytest.fixture(autouse=True)
def _nothing_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record how many repeats are asked for, in place of writing prompts and playing them."""

    def forecast(setup: Setup, requests: Any, progress: Any) -> PointForecasts:
        PLAYED.append(setup.lab.repeats)
        return PointForecasts(points={}, without={})

    PLAYED.clear()
    monkeypatch.setattr(running, "forecast", forecast)
    monkeypatch.setattr(running, "write_requests", lambda *_: [])
    monkeypatch.setattr(running, "predict", lambda *_: Predictions(effects={}, forecasts={}))
    monkeypatch.setattr(running, "resolve", lambda request, _: resolved(request))


@dataclass(frozen=True)
class Resolved:
    """A setup that knows its lab and its card: models and memory do not matter here."""

    lab: Lab
    datasheet: Datasheet | None

    @property
    def elsewhere(self) -> bool:
        return self.datasheet is not None


def resolved(request: RunRequest) -> Resolved:
    return Resolved(request.lab, machine_of(request.card)[1])


QUIET: Any = SimpleNamespace(waiting=lambda text: None)


def test_one_repeat_is_played_for_a_gpu_that_is_not_here_and_all_of_them_here() -> None:
    lab = LABS["continuous-batching"]
    assert lab.repeats > 1
    setup, _ = forecast_alone(RunRequest(lab, card="h100"), QUIET)
    assert setup.lab.digest() == lab.digest()  # the page names the settings of a run
    forecast_alone(RunRequest(lab), QUIET)
    assert [1, lab.repeats] == PLAYED


def test_engines_are_forecast_under_a_trace_in_place_of_the_labs_loads() -> None:
    trace = tuple((0.5 * i, 100 + i, 20) for i in range(41))
    lab = lab_of(RunRequest(LABS["chunked-prefill"], trace=trace), "cpu")
    points = lab.points(SHAPE, CEILINGS)
    assert [p.key for p in points] == [f"{v.name}/trace/replay-1" for v in lab.variants]
    assert points[0].lengths == tuple(row[1:] for row in trace)
    assert (lab.repeats, lab.claims, lab.window_s) == (1, (), 20.0)
    traffic = _traffic(lab, points[0], 1, None)
    assert traffic.schedule_s == tuple(row[0] for row in trace)
    assert traffic.warmup_s + traffic.window_s == 20.0
    with pytest.raises(LabError, match="at one time"):
        lab_of(RunRequest(lab, trace=((0.0, 8, 8), (0.0, 9, 9))), "cpu")


def test_a_trace_that_is_too_long_for_a_run_is_forecast_as_a_whole() -> None:
    trace = tuple((0.5 * i, 100, 20) for i in range(MOST_ROWS + 1))
    lab = lab_of(RunRequest(LABS["chunked-prefill"], trace=trace), "cpu")
    assert lab.workloads[0].trace == trace
    assert lab.window_s == trace[-1][0]


def test_gpus_that_share_layers_are_faster_and_hold_more() -> None:
    """The ceilings and the KV cache of four; to the scheduler they are one."""
    lab = LABS["kv-quantization"].at("gpu-80", quick=False)
    shared = LABS["kv-quantization"].at("gpu-80", False, {"flags.tensor-parallel-size": 4})
    shape = replace(SHAPE, heads=8, kv_heads=8)
    (one, *_), (four, *_) = (each.points(shape, CEILINGS) for each in (lab, shared))
    assert four.ceilings.bf16_flops_per_s == 4 * CEILINGS.bf16_flops_per_s
    assert four.kv_room_tokens == pytest.approx(4 * one.kv_room_tokens, rel=1e-3)
    alone = as_one_gpu(four.flags)
    assert alone.kv_cache_memory_bytes == 4 * one.flags.kv_cache_memory_bytes
    assert alone.devices == 1


def test_a_kv_head_is_never_divided() -> None:
    """Four devices hold the two KV heads of a model twice."""
    flags = VllmFlags({"tensor-parallel-size": 4, "pipeline-parallel-size": 2})
    assert [flags.kv_parts(heads) for heads in (1, 2, 8)] == [2, 4, 8]


def test_what_cannot_be_shared_has_no_forecast() -> None:
    copies = LABS["continuous-batching"].at("gpu-80", False, {"flags.data-parallel-size": 2})
    setup: Any = SimpleNamespace(
        lab=copies, endpoint=None, engine_command=(), datasheet=machine_of("h100")[1], on_file=None
    )
    assert "data parallelism" in (reason_against(setup, copies.variants[0]) or "")
    offloads = LABS["kv-quantization"].at("gpu-80", quick=False)
    setup = SimpleNamespace(
        lab=offloads, endpoint=None, engine_command=(), places={}, datasheet=machine_of("h100")[1]
    )
    reasons = {v.name: reason_against(setup, v) for v in offloads.variants}
    assert reasons["recompute"] is None
    assert (reasons["offload"] or "").endswith("memory was not timed")
    shared = LABS["continuous-batching"].at("gpu-24", False, {"flags.tensor-parallel-size": 2})
    model: Any = SimpleNamespace(shape=SHAPE)
    sheet = machine_of("l4")[1]
    assert sheet is not None
    with pytest.raises(LabError, match=r"TP=2: .* NVLink"):
        require_shared_layers(shared, model, sheet)


def test_routed_experts_are_timed_on_a_cpu_alone() -> None:
    lab = LABS["mixture-of-experts"].at("cpu", quick=False)
    model = SimpleNamespace(shape=replace(SHAPE, experts=32))

    def reason(kind: str, on_file: object = None) -> str | None:
        setup: Any = SimpleNamespace(
            lab=lab, endpoint=None, engine_command=(), weights={}, datasheet=None,
            machine=SimpleNamespace(kind=kind), model=model, on_file=on_file,
        )  # fmt: skip
        return reason_against(setup, lab.variants[0])

    assert reason("cpu") is None
    assert reason("gpu") == reason("cpu", "a run") == "routed experts were not timed"


def _reasons(name: str, here: bool = True, **changes: Any) -> dict[str, str]:
    """Say why which variants of a lab have no forecast, on an H100 that is here or is not."""
    lab = LABS[name].at("gpu-80", False, {k.replace("_", "-"): v for k, v in changes.items()})
    setup: Any = SimpleNamespace(
        lab=lab, endpoint=None, engine_command=(), weights={}, places={},
        machine=SimpleNamespace(kind="gpu"), model=SimpleNamespace(shape=SHAPE, path=bundled()),
        datasheet=None if here else machine_of("h100")[1], on_file=None,
    )  # fmt: skip
    return reasons_against(setup)


@pytest.mark.parametrize("here", [True, False])
def test_on_a_gpu_flags_that_the_step_cannot_see_have_no_forecast_where_they_differ(
    here: bool,
) -> None:
    """All variants of `single-stream` shared one step, so that every claim was forecast as 1."""
    single = _reasons("single-stream", here)
    assert set(single) == {"eager", "no-graphs", "no-fusion", "in-turn", "triton"}
    assert "compilation-config" in single["no-graphs"]
    assert "async-scheduling" in single["in-turn"]
    assert "attention-backend" in single["triton"]
    assert set(_reasons("tiled-attention", here)) == {"unsplit"}
    assert set(_reasons("diagnosis", here)) == {"slow-step"}
    for shared in ("default", "in-turn"):  # a flag that all engines have changes no ratio
        assert not _reasons("single-stream", here, variants=[shared])


def test_a_page_lists_what_else_was_forecast_by_what_differs() -> None:
    figures = {"goodput_per_s": 2.5, "tpot_mean_s": 0.04}
    grid = tuple(
        Searched(flags={"max-num-seqs": batch, "enforce-eager": True}, figures=figures)
        for batch in (4, 8)
    )
    assert tables.searched(PointForecasts(points={})) is None
    found = tables.searched(PointForecasts(points={}, searched=grid))
    assert found
    assert found.rows[0][0] == "4"
    assert len(found.header) == 1 + len(tables.OF_SEARCH)
    assert list(found.rows[1]) == ["8", "2.5 req/s", "–", "40 ms"]


@pytest.mark.parametrize("here", [True, False])
def test_eager_engines_have_no_forecast_on_a_gpu(here: bool) -> None:
    """What is timed there is replayed as a CUDA graph, and what is published is no eager step."""
    reasons = _reasons("continuous-batching", here, **{"flags.enforce-eager": True})
    assert set(reasons) == {v.name for v in LABS["continuous-batching"].variants}
    assert all("eager step" in why for why in reasons.values())


def test_on_a_gpu_adapters_have_no_forecast() -> None:
    """Torch launches thousands of small operations where vLLM has kernels within CUDA graphs."""
    lab = LABS["multi-lora"].at("gpu-80", False)
    ready = {v.name for v in lab.variants if lab.flags_of(v).get("enable-lora")}
    reasons = _reasons("multi-lora")
    assert ready
    assert set(reasons) == ready
    assert all("adapters" in why for why in reasons.values())


def test_only_what_is_timed_here_waits_for_a_run() -> None:
    lab = LABS["continuous-batching"]
    with run_lock():
        forecast_alone(RunRequest(lab, card="h100"), QUIET)
        with pytest.raises(LabError, match="is running"):
            forecast_alone(RunRequest(lab), QUIET)


def test_a_band_is_wider_where_a_point_is_played_fewer_times() -> None:
    """By the machine's speed, which a mean over fewer trials leaves with more chance."""
    lab = LABS["kv-quantization"].at("cpu", quick=False)
    points = lab.points(SHAPE, CEILINGS)
    model: Any = SimpleNamespace(path=Path("model"))
    setup: Any = SimpleNamespace(
        lab=lab, machine=SimpleNamespace(kind="cuda"), model=model, weights={}, points=points,
        quick=False, places={},
    )  # fmt: skip
    timed: Any = SimpleNamespace(time_steps=lambda plans: dict.fromkeys(plans, TIMES))
    part = PartSpeed(median_s=1.0, low_s=0.9, high_s=1.2, trend=None)
    wandering = MachineSpeed(steps=9, reading=part, computing=part)
    found = steps_as_timed(setup, points, [wandering], timed)
    slowest = {lab.repeats_of(p): found[p.key][2][0].linear_s[0] for p in points}
    assert set(slowest) == {3, 5}
    assert slowest[3] > slowest[5]
    steady = steps_as_timed(setup, points, [], timed)
    assert len({steady[p.key][2][0].linear_s for p in points}) == 1


def test_prompts_of_a_trace_are_at_least_as_long_as_the_chat_template() -> None:
    said: list[str] = []
    lab = LABS["continuous-batching"].replaying(((0.0, 3, 5), (1.0, 40, 5), (2.0, 9, 5)))
    whole = with_whole_prompts(lab, 30, SimpleNamespace(message=said.append))
    assert [row[1] for row in whole.workloads[0].trace] == [30, 40, 30]
    assert said[0].startswith("Workload trace: 2 prompts")
    assert with_whole_prompts(LABS["multi-lora"], 30, QUIET) == LABS["multi-lora"]
