"""Capacity plans: the arithmetic by hand, what is refused, and the page; no engine is played."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from labs.harness.cli.cli import app
from labs.harness.forecast import capacity_plan, simulated_loads
from labs.harness.forecast.capacity_figures import Assumed, Demand
from labs.harness.forecast.capacity_plan import Question, plan
from labs.harness.forecast.load_forecast import Latencies, LoadForecast
from labs.harness.plan.resolve import machine_of
from labs.harness.reports import capacity_plans, markdown
from labs.harness.spec.lab import SLO, LabError
from loadtests.trace import TraceRow
from serving.engines.vllm import ACTIVATION_BYTES
from serving.models.catalog import ModelError
from serving.simulator import cards
from serving.simulator.protocol import ForecastPlan
from tests.cases import each


class SilentProgress:
    """Shows nothing."""

    def message(self, text: str) -> None: ...

    def expect(self, remaining_s: float) -> None: ...

    def waiting(self, text: str) -> None: ...

    def part_done(self, text: str, remaining_s: float) -> None: ...

    def show(self, content: str) -> None: ...


def latencies(within: float) -> Latencies:
    return Latencies(500, within, 0.1, 0.2, 0.01, 0.02, 1, 2, within < 0.4, 0.5, 0)


def without_playing(monkeypatch: pytest.MonkeyPatch) -> list[ForecastPlan]:
    """Each GPU serves 20 requests/s as expected, 25 with a faster step and 10 with a slower one.

    Returns what is played.
    """
    played: list[ForecastPlan] = []

    def forecast_loads(loads: Any, *_: Any) -> dict[Any, LoadForecast]:
        played.extend(planned for plans in loads.values() for planned in plans)
        found = {}
        for name, (expected, *_) in loads.items():
            (engine,) = expected.engines
            at_s = engine.trials[0].traffic.schedule_s
            shares = [float(len(at_s) / at_s[-1] <= most * engine.replicas) for most in LIMITS]
            found[name] = LoadForecast.of([latencies(max(0.5, share)) for share in shares])
        return found

    monkeypatch.setattr(capacity_plan, "forecast_loads", forecast_loads)
    monkeypatch.setattr(capacity_plan, "side_by_side", lambda _: nullcontext([]))
    monkeypatch.setattr(capacity_plan, "_estimate_per_s", lambda *_: 20.0)
    return played


LIMITS = 20.0, 25.0, 10.0
capacity = pytest.fixture(without_playing, name="capacity")


def question(name: str = "llama-8b", **more: Any) -> Question:
    machine, _ = machine_of("h100")
    settings: dict[str, Any] = {
        "model": capacity_plan.model_named(machine, name), "precision": "bf16", "card": "h100",
        "demand": Demand(1000, 100, rate_per_s=70), "slo": SLO(ttft_s=1, tpot_s=0.05),
        "routers": ("round-robin", "least-loaded"),
    }  # fmt: skip
    return Question(**settings | more)


def test_seventy_billion_parameters_fit_one_card_of_80_gb_in_eight_bits_at_most() -> None:
    answer = plan(question("llama-70b"), SilentProgress())
    fitting = [f.precision for f in answer.fits if f.kv_tokens >= 1100]
    assert fitting == ["fp8", "w8a8", "w4a16-gptq"]
    bf16 = answer.fits[0]
    assert bf16.weight_bytes == pytest.approx(2 * 70.55e9, rel=0.001)
    assert bf16.kv_bytes_per_token == 327_680  # 2 x 80 layers x 8 KV heads x 128 x 2 bytes
    text = markdown.document(capacity_plans.page(answer))
    assert re.search(r"does not fit: 141\.1 GB", text)
    ways = " or ".join([*(f"PRECISION={precision}" for precision in fitting), "TP=2"])
    assert f"It fits with {ways}.**" in text
    assert "One request alone" not in text


@pytest.mark.usefixtures("capacity")
def test_the_capacity_lies_between_the_rates_that_meet_the_objective_and_do_not() -> None:
    answer = plan(question(usd_per_hour=3.6, api_usd_per_million=0.5), SilentProgress())
    assert answer.capacity_per_s
    low, value, high = (getattr(answer.capacity_per_s, n) for n in ("low", "value", "high"))
    assert 8 <= low < value < high
    assert 15 <= value <= 21
    assert answer.replicas == -(-70 // value)
    assert [*answer.fleets] == ["round-robin", "least-loaded"]
    text = markdown.document(capacity_plans.page(answer))
    assert "Break-even" in text
    assert "| 173 |" in text  # 24 h x 3.6 USD/h / 0.5 USD
    assert "nothing was measured" in text


def test_a_limit_in_flight_and_the_kv_blocks_are_played_and_told(
    capacity: list[ForecastPlan],
) -> None:
    answer = plan(question(in_flight=24, kv_blocks=2000, replicas=3), SilentProgress())
    assert answer.assumed == Assumed(kv_blocks=2000, block_tokens=16, batch=1024, in_flight=24)
    engines = [engine for planned in capacity for engine in planned.engines]
    assert {e.replicas: e.trials[0].traffic.most_in_flight for e in engines} == {1: 24, 3: 72}
    held = engines[0].argv[engines[0].argv.index("--kv-cache-memory-bytes") + 1]
    assert int(held) == 2000 * 16 * 131_072  # 2 x 32 layers x 8 KV heads x 128 x 2 bytes
    text = markdown.document(capacity_plans.page(answer))
    for figure in ("2,000 KV blocks of 16 tokens", "1,024 requests", "24 in flight"):
        assert figure in text


@pytest.mark.usefixtures("capacity")
def test_an_objective_that_no_rate_meets_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity_plan, "_estimate_per_s", lambda *_: 200.0)
    answer = plan(question(), SilentProgress())
    assert answer.capacity_per_s is None
    assert "The objective is not met" in markdown.document(capacity_plans.page(answer))
    assert not answer.fleets


@pytest.mark.usefixtures("capacity")
def test_rates_are_tried_until_a_faster_step_cannot_serve_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The band's upper end is where the faster step ends, not the highest rate of a first grid."""
    monkeypatch.setattr(capacity_plan, "_estimate_per_s", lambda *_: 17.0)
    answer = plan(question(), SilentProgress())
    assert answer.capacity_per_s
    assert 17 * 1.25 < answer.capacity_per_s.high <= 17 * 1.5
    assert len(answer.rates) == sum(map(len, capacity_plan.GRIDS))


def trace(requests: int, prompt: int = 500, output: int = 100) -> tuple[TraceRow, ...]:
    return tuple((float(i), prompt, output) for i in range(requests))


def test_a_short_trace_is_repeated_for_loads_at_other_rates() -> None:
    """Else all of its requests could fall into the warm-up, and none would count."""
    asked = question(demand=Demand(500, 100, 1.0, trace=trace(30)))
    load = capacity_plan._drawn(asked, 200.0, 8000)
    assert len(load.requests) == len(load.schedule_s)
    counted = sum(at_s >= load.counted_from_s for at_s in load.schedule_s)
    assert counted >= 0.9 * capacity_plan.FEWEST
    assert [r.index for r in load.requests] == list(range(len(load.requests)))
    replayed = capacity_plan._replayed(asked.demand)
    assert (len(replayed.requests), replayed.schedule_s[-1]) == (30, 29.0)


def test_no_request_is_longer_than_the_cache_and_the_positions() -> None:
    asked = question(demand=Demand(2000, 4000, 1.0))
    load = capacity_plan._drawn(asked, 1.0, 7000)
    assert max(r.prompt_tokens + r.output_tokens for r in load.requests) == 7000
    with pytest.raises(LabError, match=r"250,000 tokens, .* 131,071"):
        plan(question(demand=Demand(1000, 100, 1.0, trace=trace(9, 150_000, 100_000))),
             SilentProgress())  # fmt: skip


def test_engines_are_built_for_the_longest_request_and_serve_side_by_side(
    capacity: list[ForecastPlan],
) -> None:
    """The same engines play one GPU and a fleet, whose servers prepare requests side by side."""
    plan(question(replicas=8), SilentProgress())
    engines = [engine for planned in capacity for engine in planned.engines]
    assert len({engine.argv for engine in engines}) == 1
    assert engines[0].argv[engines[0].argv.index("--max-model-len") + 1] == "1401"  # 1000 + 4 x 100
    assert {engine.replicas for engine in engines} == {1, 8}
    assert {of.engines[0].replicas: of.delays.serial_s for of in capacity} == {
        1: 0.002, 8: 0.002 / 8,
    }  # fmt: skip
    assert {of.delays.request_s for of in capacity} == {cards.DELAYS.request_s}
    capacity.clear()
    long = (*trace(9), (9.0, 700, 900))
    plan(question(demand=Demand(500, 100, 1.0, trace=long)), SilentProgress())
    assert "1601" in capacity[0].engines[0].argv


def test_the_last_loads_are_played_first_and_all_come_back_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = list[Any]()

    def play_all(_: Any, plans: Any) -> Iterator[tuple[int, Any]]:
        begun.extend(plans)
        yield from reversed([*enumerate(plans)])  # as they end

    monkeypatch.setattr(simulated_loads, "play_all", play_all)
    monkeypatch.setattr(simulated_loads, "latencies", lambda play, _: latencies(play))
    loads: Any = {"short": (0.3, 0.2, 0.4), "long": (0.6, 0.5, 0.7)}
    played = simulated_loads.forecast_loads(loads, [], question().slo, SilentProgress(), "here")
    assert begun == [0.7, 0.5, 0.6, 0.4, 0.2, 0.3]
    assert [(name, of.within.value, of.within.low) for name, of in played.items()] == [
        ("short", 0.3, 0.2), ("long", 0.6, 0.5),
    ]  # fmt: skip


def test_there_are_no_more_processes_than_cores_and_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def processes(cores: int, forecasters: float, requests: int = 0) -> int:
        """With memory for so many forecasters."""
        memory = SimpleNamespace(available=forecasters * simulated_loads.FORECASTER_BYTES)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        return simulated_loads.processes(requests)

    assert processes(2, 99) == 2
    assert processes(256, 99) == simulated_loads.MOST_PROCESSES
    assert processes(256, 3.9) == 3
    assert processes(256, 0) == 1
    most = round(simulated_loads.FORECASTER_BYTES / simulated_loads.REQUEST_BYTES)
    assert processes(256, 4, most) == 2


def test_a_mixture_of_experts_is_planned_with_what_can_be_derived() -> None:
    machine, sheet = machine_of("h100")
    assert sheet
    fits = list(capacity_plan._fits(question("moe-30b"), machine, sheet))
    assert [fit.precision for fit in fits] == ["bf16"]


def test_a_folder_of_quantized_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    with pytest.raises(ModelError, match="quantized weights: give"):
        question(str(tmp_path))


@pytest.mark.usefixtures("capacity")
def test_two_cards_hold_what_one_does_not_and_cost_twice_as_much() -> None:
    asked = question("llama-70b", gpus=2, usd_per_hour=3.6)
    answer = plan(asked, SilentProgress())
    bf16 = answer.fits[0]
    usable = 2 * (0.92 * 81559 * 2**20 - ACTIVATION_BYTES)
    assert bf16.usable_bytes == pytest.approx(usable)
    assert bf16.kv_tokens == pytest.approx((usable - bf16.weight_bytes) / 327_680, rel=0.01)
    assert answer.alone
    assert answer.alone.ceiling_tokens_per_s == pytest.approx(2 * 3.35e12 / 141e9, rel=0.02)
    assert answer.price
    assert answer.price.usd_per_hour == 7.2
    text = markdown.document(capacity_plans.page(answer))
    assert text.startswith(f"# {answer.model} in bf16 on {answer.card}, 2 ")
    for words in ("NVLink", "replica of 2 GPUs", "memory of 2 GPUs", f"{answer.replicas} replicas"):
        assert words in text
    one = markdown.document(capacity_plans.page(plan(question(), SilentProgress())))
    assert "replica of" not in one
    assert "NVLink" not in one


@pytest.mark.parametrize(
    ("card", "gpus", "said"),
    [
        ("l4", 2, "NVLink, which the l4"),
        ("h100", 3, "3 GPUs .* 32 heads and 8 KV heads"),
        ("h100", 16, "NVLink joins 8 GPUs"),
    ],
)
def test_gpus_that_cannot_share_a_layer_are_refused(card: str, gpus: int, said: str) -> None:
    with pytest.raises(LabError, match=said):
        plan(question(card=card, gpus=gpus), SilentProgress())


def test_a_capacity_is_interpolated() -> None:
    crossing = capacity_plan._crossing
    assert crossing([(1, 1.0), (2, 0.97), (3, 0.93)]) == pytest.approx(2.5)
    assert crossing([(1, 0.5)]) is None
    assert crossing([(1, 1.0), (2, 0.99)]) == 2  # at least


@each(
    ("command", "said"),
    [
        ("plan --machine h1000", "mean h100?"),
        ("plan --machine h100 --model llama-9b", "'llama-9b'"),
        ("plan --machine h100 --precision fp9", "PRECISION=fp9"),
        ("plan --machine h100 --router random", "ROUTER=random"),
        ("plan --machine h100 --slo fast", "SLO=fast"),
        ("plan --machine h100 --slo 100/0", "SLO=100/0"),
        ("plan --machine h100 --lengths 1000000/5", "131,072 tokens"),
        ("plan --machine h100 --documents 9/2000", "document"),
        ("plan --machine h100 --trace /nowhere.csv", "/nowhere.csv"),
        ("plan --machine h100 --replicas 65", "equal to 64"),
        ("plan --machine h100 --rate -1", "equal to 0"),
        ("plan --machine h100 --rate inf", "RATE=inf: give"),
        ("forecast --lab chunked-prefill --router least-loaded", "REPLICAS="),
        ("forecast --lab chunked-prefill --router random --replicas 2", "ROUTER=random"),
        ("forecast --lab chunked-prefill --machine h1000", "mean h100?"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_played(command: str, said: str) -> None:
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code != 0
    assert said in " ".join(done.output.replace("│", "").split())
