"""What a run says of token budgets, and what is forecast of a split of prefill and decode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labs.chunked_prefill.facts import (
    TokenBudgets,
    facts,
    token_budgets,
)
from labs.chunked_prefill.lab import context_tokens
from labs.harness.analysis.computed import Band, OnTwoEngines, PointForecasts, Predictions
from labs.harness.derived.run_view import Context
from labs.harness.spec.lab import SLO, Variant
from labs.harness.storage.writing import write_json
from loadtests.workload import Intruder
from tests.unit.builders import make_lab, make_point, make_workload
from tests.unit.judged import context, judged_run, withheld

SIZES = {"small": 10, "middle": 18, "whole": 64}


def intruded(
    home: Path,
    limit_s: float | None = 0.025,
    stalls_ms: tuple[float, ...] = (10, 20, 40),
    long_ttft_ms: tuple[float, ...] = (80, 60, 50),
    own_ms: Sequence[Any] = (90, 30, 20),
) -> Context:
    """Pieces of 8, 16 and the whole 32 tokens beside two streams."""
    lab = make_lab(
        variants=tuple(
            Variant(name=name, flags={"max-num-batched-tokens": tokens,
                                      "enable-chunked-prefill": name != "whole"})
            for name, tokens in SIZES.items()
        ),
        workloads=(make_workload("contended:2/1", intruder=Intruder(prompt_tokens=32)),),
        claims=(), evidence=(), slo=SLO(ttft_s=1, tpot_s=1, itl_s=limit_s),
    )  # fmt: skip
    return context(home, lab, {
        f"{name}/short/contended-2-1": {
            "stall_mean_s": stall / 1000, "intruder_ttft_mean_s": ttft / 1000,
            "ttft_mean_s": np.divide(own, 1000).tolist(),
        }
        for name, stall, ttft, own in zip(SIZES, stalls_ms, long_ttft_ms, own_ms, strict=True)
    })  # fmt: skip


def found(home: Path, not_valid: str = "", **given: Any) -> TokenBudgets:
    return token_budgets(withheld(intruded(home, **given), f"{not_valid}/short/contended-2-1"))


@pytest.mark.parametrize(
    ("limit_s", "not_valid", "best", "within", "are_valid"),
    [
        (0.025, "", "middle", ["yes", "yes", "no"], True),
        (0.005, "", None, ["no", "no", "no"], True),
        (0.025, "middle", "small", ["yes", "not valid", "no"], False),
        (0.015, "small", None, ["not valid", "no", "no"], False),
        (None, "", None, ["no limit"] * 3, True),
    ],
)
def test_the_budget_within_the_slo_whose_long_prompt_waits_least(
    limit_s: float | None, not_valid: str, best: str | None, within: list[str], are_valid: bool,
    tmp_path: Path,
) -> None:  # fmt: skip
    budgets = found(tmp_path, not_valid, limit_s=limit_s)
    assert (budgets.best.variant if budgets.best else None) == best
    assert [b.within_slo for b in budgets.budgets] == within
    assert budgets.are_valid == are_valid


@pytest.mark.parametrize(
    ("small_ms", "not_valid", "pay"),
    [(90, "", "yes"), (10, "", "no"), ((5, 90), "", "open"), (90, "small", "not valid"),
     (90, "middle", "yes")],
)  # fmt: skip
def test_streams_pay_or_gain_or_neither_is_settled(
    small_ms: Any, not_valid: str, pay: str, tmp_path: Path
) -> None:
    budgets = found(tmp_path, not_valid, own_ms=(small_ms, 30, 20))
    assert budgets.streams_pay == pay
    _, middle, whole = budgets.budgets
    assert middle.streams_beside_whole.value == pytest.approx(1.5)
    assert not whole.streams_beside_whole.known


def test_the_stall_is_a_line_over_the_piece(tmp_path: Path) -> None:
    """8, 16 and 32 tokens take 10, 20 and 40 ms: no decode step, and 1.25 ms a token."""
    line = found(tmp_path).line
    assert line
    assert line.fixed_s.value == pytest.approx(0)
    assert line.token_s.value == pytest.approx(0.00125)
    assert line.tokens_per_s.value == pytest.approx(800)
    assert line.r_squared == pytest.approx(1)
    assert found(tmp_path / "falls", stalls_ms=(40, 20, 10)).line is None


def test_the_context_of_the_streams_leaves_the_long_prompts_out() -> None:
    point = make_point(load="contended:2/1", intruder=Intruder(prompt_tokens=32))
    assert 32 in [prompt for prompt, _ in point.lengths]
    (own,) = {(prompt, output) for prompt, output in point.lengths if prompt != 32}
    assert context_tokens(point) == own[0] + own[1] / 2


def test_a_long_prompt_that_takes_longer_than_the_time_to_the_next_is_told(tmp_path: Path) -> None:
    assert found(tmp_path / "a").late == []
    (late,) = found(tmp_path / "b", long_ttft_ms=(1080, 60, 50)).late
    assert late.variant == "small"


def test_the_link_that_a_split_of_prefill_needs(tmp_path: Path) -> None:
    """32 tokens of 32 bytes in the 50 ms of `whole`.

    An H100 prefills 16,384 tokens of 131,072 bytes in 447 ms, by the forecast: 2.1 GB, 38 Gbit/s.
    """
    handover = found(tmp_path).handover
    assert handover
    assert handover.needed_by_example.value == pytest.approx(38, rel=0.05)
    assert handover.kv.value == pytest.approx(0.001024)
    assert handover.needed.value == pytest.approx(8 * 1024 / 0.05 / 1e9)


def test_a_split_is_forecast_beside_the_smallest_budget(tmp_path: Path) -> None:
    run = intruded(tmp_path)
    small, middle, whole = (p.key for p in run.points)
    assert facts(judged_run(run)).split is None

    def bands(stall_s: float, long_s: float, own_s: float, rate: float) -> dict[str, Band]:
        figures = {
            "stall_mean_s": stall_s, "intruder_ttft_mean_s": long_s, "ttft_mean_s": own_s,
            "output_tokens_per_s": rate,
        }  # fmt: skip
        return {m: Band(value=v, low=v, high=v) for m, v in figures.items()}

    forecasts = PointForecasts(
        points={small: bands(0.1, 1.2, 0.4, 50), middle: bands(0.2, 0.9, 0.3, 60)},
        on_two=(
            OnTwoEngines(point=whole, link_gbit_per_s=1, bands=bands(0.02, 0.8, 0.3, 90)),
            OnTwoEngines(point=whole, link_gbit_per_s=100, bands=bands(0.02, 0.7, 0.3, 90)),
            OnTwoEngines(point=middle, link_gbit_per_s=None, bands=bands(0.2, 0.8, 0.2, 75)),
            OnTwoEngines(point=small, link_gbit_per_s=None, bands=bands(0.1, 1.1, 0.2, 70)),
        ),
    )
    before = Predictions(effects={}, forecasts={}, in_virtual_time=forecasts)
    write_json(run.folder.path / "predictions.json", before)
    split = facts(judged_run(intruded(tmp_path))).split
    assert split
    assert (split.fast_gbit_per_s, split.slow_gbit_per_s) == (100, 1)
    assert (split.fast.long_ttft_s.value, split.slow.long_ttft_s.value) == (0.7, 0.8)
    assert (split.fast.stall_s.value, split.fast.tokens_per_s.value) == (0.02, 90)
    assert split.budget == "small"
    assert (split.one.long_ttft_s.value, split.two.long_ttft_s.value) == (1.2, 1.1)
