"""Attention by itself and on the engine: the arithmetic by hand, fits, the facts of a run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from labs import LABS
from labs.harness.analysis.computed import Predictions
from labs.harness.derived.fits import Estimate, least_squares
from labs.harness.derived.lab_modules import before_engines
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.plots import plots_of
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_gzip, write_json
from labs.tiled_attention.facts import (
    Tiling,
    attention_times,
    facts,
    power_of_memory,
    power_of_time,
    quadratic,
)
from labs.tiled_attention.lab import (
    arithmetic,
    split_ratio,
    step_ratio,
    ttft_ratio,
)
from serving.hardware import attention, gpus
from serving.hardware.attention import AttentionTimes, Kernel, KernelTimes, SplitTimes
from tests.unit.builders import CEILINGS, MACHINE, SHAPE
from tests.unit.judged import context, judged_run, told_of, with_facts

LAB = LABS["tiled-attention"].at("cpu", quick=False)
LENGTHS = (1024, 2048, 4096, 8192)


def point(workload: str) -> Point:
    return next(p for p in LAB.points(SHAPE, CEILINGS) if p.workload.name == workload)


# ------------------------------------------------------------------------------- the arithmetic


def test_work_and_scores_of_two_heads_of_four() -> None:
    assert theory.attention_flops(SHAPE, 10) == 4 * 100 * 4 * 2
    assert theory.scores_bytes(SHAPE, 10) == 2 * 100 * 4


def test_traffic_is_that_of_the_paper() -> None:
    """A cache of 64 bytes holds 32 numbers: N^2 d^2 / M is 100 x 16 / 32 numbers a head.

    Q and O of 2 heads, K and V of 1, of 4 numbers of 2 bytes.
    """
    once = (2 * 2 + 2 * 1) * 10 * 4 * 2
    assert theory.attention_bytes(SHAPE, 10, None) == once + 4 * (2 * 100 * 4)
    assert theory.attention_bytes(SHAPE, 10, 64) == once + 2 * (100 * 16 / 32) * 2
    # twice the length: four times what is squared
    assert theory.attention_bytes(SHAPE, 20, 64) == 2 * once + 4 * 2 * (100 * 16 / 32) * 2


def test_the_share_that_grows_as_the_square_is_that_of_the_flop() -> None:
    """2 x 1,000 a token but for the head, which meets one; 2 layers x 8 wide x 2 N^2."""
    body = 2 * (SHAPE.matmul_params - SHAPE.head_params) * 100 + 2 * SHAPE.head_params
    squared = 2 * 2 * 8 * 100**2
    share = theory.quadratic_share
    assert share(SHAPE, 100) == pytest.approx(squared / (body + squared))
    assert share(SHAPE, 1) < share(SHAPE, 100) < share(SHAPE, 1e6)


def test_what_findings_are_held_against_is_written_beforehand() -> None:
    told = arithmetic(LAB, LAB.points(SHAPE, CEILINGS)[0])
    assert [told[f"growth of memory, {k}"].value for k in ("untiled", "tiled")] == [2, 1]
    assert [told[f"growth of time, {k}"].value for k in ("untiled", "tiled")] == [2, 2]
    assert {f"memory, untiled at {n}" for n in LAB.attention_tokens} <= told.keys()
    assert told["time, tiled / untiled at 8192"].kind == "ceiling"
    assert told["TPOT for each token of context"].value == SHAPE.kv_bytes_per_token() / 1e6
    assert told["share of TTFT that grows as N^2 at 1536"].value == theory.quadratic_share(
        SHAPE, 1536
    )


def test_the_claims_are_predicted_by_work_and_bytes() -> None:
    assert ttft_ratio(point("longest"), point("short")).value > 12  # 12 times the tokens
    near, far = point("near"), point("far")
    per_token = SHAPE.kv_bytes_per_token()
    expected = (SHAPE.weight_bytes + per_token * far.context_tokens) / (
        SHAPE.weight_bytes + per_token * near.context_tokens
    )
    assert step_ratio(far, near).value == pytest.approx(expected)


def test_one_kv_head_of_132_processors_reads_a_132nd_of_the_bandwidth() -> None:
    far = point("far")
    kv, weights = far.kv_bytes(), SHAPE.weight_bytes
    found = split_ratio(far, far)
    assert found.value == pytest.approx((weights + kv) / (weights + 132 * kv))
    assert found.kind == "floor"


# ---------------------------------------------------------------------------------- the lab


@pytest.mark.parametrize("gb", [c.gb for c in gpus.CLASSES])
def test_splits_are_limited_where_a_gpu_may_be_hoppers(gb: int) -> None:
    lab = LABS["tiled-attention"].at(f"gpu-{gb}", quick=False)
    names = [v.name for v in lab.variants]
    assert names == (["default", "unsplit"] if gb >= 80 else ["default"])
    assert {"split", "split-near"} <= {c.name for c in lab.claims} or gb < 80
    assert all(w.longest_tokens <= lab.flags_of(v).max_model_len
               for w in lab.workloads for v in lab.variants)  # fmt: skip


# ------------------------------------------------------------------------------------- the fits


def test_a_buffer_that_does_not_grow_bends_no_power() -> None:
    for power in (1, 2):
        found = power_of_memory(LENGTHS, [900_000 + 3 * n**power for n in LENGTHS])
        assert found
        assert found.value == pytest.approx(power, abs=0.01)
        low, high = found.interval().low, found.interval().high
        assert low is not None
        assert high is not None
        assert high - low < 0.05
    assert power_of_memory(LENGTHS[:3], [1, 4, 16]) is None


def test_the_power_of_time_is_a_line_of_logarithms() -> None:
    found = power_of_time(LENGTHS, [(2e-9 * n**2, 3e-9 * n**2) for n in LENGTHS])
    assert found
    assert found.value == pytest.approx(2)
    assert found.freedom == 2
    two = power_of_time(LENGTHS[:2], [(1.0,), (4.0,)])
    assert two
    assert two.value == pytest.approx(2)
    assert two.error is None
    assert power_of_time(LENGTHS[:1], [(1.0,)]) is None


def test_a_fit_finds_what_values_are_made_of() -> None:
    at = [(n, 0.01 + 1e-3 * n + 1e-6 * n**2) for n in (256, 768, 1536, 3072)]
    found = quadratic(at)
    assert found
    assert found.fixed.value == pytest.approx(0.01, rel=1e-4)
    assert found.even_tokens == pytest.approx(1000, rel=1e-4)
    share = found.share(1000)
    assert share.value == pytest.approx(1 / 2.01, rel=1e-4)
    assert share.freedom == 1
    assert quadratic(at[:2]) is None
    three = quadratic(at[:3])
    assert three
    assert three.squared.interval().low is None


def test_errors_of_a_fit_are_those_of_a_textbook() -> None:
    """Of equal values but for one: the mean, by relative errors."""
    (found,) = least_squares([[1.0, 1.0]], [0.9, 1.1]) or [Estimate(0, None, 0)]
    # weights 1 / y^2: (1/.9 + 1/1.1) / (1/.81 + 1/1.21)
    assert found.value == pytest.approx((1 / 0.9 + 1 / 1.1) / (1 / 0.81 + 1 / 1.21))
    assert found.error
    residuals = sum((1 - found.value / y) ** 2 for y in (0.9, 1.1))
    assert found.error == pytest.approx((residuals / (1 / 0.81 + 1 / 1.21)) ** 0.5)
    assert least_squares([[1.0, 1.0], [2.0, 2.0]], [1.0, 2.0]) is None


# ------------------------------------------------------------------------------------ the facts


def times_of(left_out: dict[str, str] | None = None) -> AttentionTimes:
    """Untiled holds 2.25 copies of the scores and takes four times as long."""

    def timed(kernel: Kernel, n: int) -> KernelTimes:
        untiled = kernel == "untiled"
        peak = 9 * 2 * n * n if untiled else 500_000 + 16 * n
        seconds = (4e-9 if untiled else 1e-9) * n * n
        return KernelTimes(kernel=kernel, tokens=n, peak_bytes=peak,
                           times_s=(seconds, 1.1 * seconds, 1.05 * seconds))  # fmt: skip

    return AttentionTimes(
        heads=2, head_dim=4, device="cpu", threads=1, cache_bytes=2**20, most_bytes=2**30,
        timed=tuple(timed(k, n) for n in LENGTHS for k in attention.BACKENDS),
        left_out=left_out or {}, took_s=1.0,
    )  # fmt: skip


def measured(home: Path, values: dict[str, Any], times: AttentionTimes | None = None) -> JudgedRun:
    found = context(home, LAB, values)
    told = arithmetic(LAB, found.points[0])
    predictions = Predictions(effects={}, forecasts={}, arithmetic=told)
    write_json(found.folder.path / "predictions.json", predictions)
    if times:
        write_gzip(found.folder.probe_file("attention"), orjson.loads(times.model_dump_json()))
    return judged_run(found)


def tiling_of(run: JudgedRun) -> Tiling:
    found = facts(run).tiling
    assert found
    return found


SERVED = {
    **{f"default/{name}/concurrent-1": {
        "ttft_mean_s": [s * f for f in (0.99, 1.0, 1.01)]}
       for name, n in (("short", 128), ("long", 512), ("longest", 1536))
       for s in [0.02 + 1e-3 * n + 1e-6 * n**2]},
    **{f"default/{name}/concurrent-1": {
        "tpot_mean_s": [s * f for f in (0.999, 1.0, 1.001)]}
       for name, n in (("near", 136), ("far", 1544))
       for s in [0.02 + 64e-6 * n]},
}  # fmt: skip


def test_what_tiling_saves_is_held_against_what_was_predicted(tmp_path: Path) -> None:
    run = measured(tmp_path, {}, times_of({"untiled/16384": "its scores would take 10 GB"}))
    found = tiling_of(run)
    assert [n.tokens for n in found.lengths] == [*LENGTHS]
    grown = [
        found.memory["untiled"],
        found.memory["tiled"],
        found.time["untiled"],
        found.time["tiled"],
    ]
    assert [g.power.value for g in grown] == pytest.approx([2, 1, 2, 2], abs=0.01)
    assert {g.outcome for g in grown} == {"held"}
    assert found.longest
    assert found.longest.of_formula.value == pytest.approx(1.125)  # 2.25 copies of two
    assert found.memory_outcome == "held"
    assert found.longest.times_ratio.value == pytest.approx(0.25)
    assert found.time_outcome == "not broken"
    flop = theory.attention_flops(SHAPE, 8192)
    assert found.longest.kernels["tiled"]["rate"].value == pytest.approx(
        flop / (1e-9 * 8192**2) / 1e9
    )
    assert found.is_above_bf16_rate  # of the abacus
    assert found.left_out == (("untiled", 16384, "its scores would take 10 GB"),)
    assert "KO-1" in told_of(run).answers


def test_the_longest_length_is_one_of_both_kernels(tmp_path: Path) -> None:
    times = times_of()
    timed = tuple(t for t in times.timed if (t.kernel, t.tokens) != ("untiled", 8192))
    found = tiling_of(measured(tmp_path, {}, times.model_copy(update={"timed": timed})))
    assert found.longest
    assert found.longest.tokens == 4096
    assert not found.lengths[-1].times_ratio.known
    assert not found.memory["untiled"].power.known  # of three lengths


def test_a_run_in_which_it_was_not_timed_has_no_answer(tmp_path: Path) -> None:
    run = measured(tmp_path, {})
    assert facts(run).tiling is None
    assert "KO-1" not in told_of(run).answers
    assert not any(plots_of(LAB.name)[name](with_facts(run)) for name in ("growth", "lengths"))


def test_damaged_times_are_named(tmp_path: Path) -> None:
    found = measured(tmp_path, {})
    write_gzip(found.folder.probe_file("attention"), {"heads": 0})
    with pytest.raises(DamagedError, match="probe attention"):
        attention_times(found.folder)


def test_the_square_in_ttft_is_a_share_with_an_interval(tmp_path: Path) -> None:
    found = facts(measured(tmp_path, SERVED)).long_prompts
    assert found
    assert found.fit
    assert found.fit.squared.value == pytest.approx(1e-6, rel=0.15)
    assert found.longest["squared_share"].value == pytest.approx(0.6, abs=0.01)
    assert found.shows == "yes"
    assert found["even_tokens"].value == pytest.approx(1000, rel=0.2)
    assert not found.is_even_beyond


def test_a_line_in_ttft_shows_no_square(tmp_path: Path) -> None:
    line = {
        f"default/{name}/concurrent-1": {"ttft_mean_s": [1e-3 * n, 1.05e-3 * n, 1.02e-3 * n]}
        for name, n in (("short", 128), ("long", 512), ("longest", 1536))
    }
    found = facts(measured(tmp_path, line)).long_prompts
    assert found
    assert found.shows == "may not"
    assert not found["even_tokens"].known


def test_the_slope_of_a_step_gives_the_rate_of_reading(tmp_path: Path) -> None:
    """64 us a token of 32 bytes: half of the bandwidth of the abacus."""
    run = measured(tmp_path, SERVED)
    (found,) = facts(run).long_contexts
    assert [s["tokens"].value for s in found.rows] == [136, 1544]
    assert found["per_thousand_s"].value == pytest.approx(0.064, rel=0.01)
    assert found["rate"].value == pytest.approx(32 / 64e-6 / 1e9, rel=0.01)
    assert found["least_per_thousand_s"].value == pytest.approx(0.032)
    assert (found.adds, found.outcome) == (True, "not broken")
    assert "KO-4" in told_of(run).answers


def test_a_context_that_costs_nothing_is_not_given_a_rate(tmp_path: Path) -> None:
    flat = {
        f"default/{name}/concurrent-1": {"tpot_mean_s": [0.02, 0.021, 0.0205]}
        for name in ("near", "far")
    }
    (found,) = facts(measured(tmp_path, flat)).long_contexts
    assert (found.adds, found["rate"].low) == (False, None)


def test_one_head_gains_from_splits_what_idle_processors_add(tmp_path: Path) -> None:
    """Two processors: one head leaves one idle, three take two turns, four none."""
    taken = [SplitTimes(kv_heads=n, tokens=64, whole_s=(whole, 1.1 * whole), split_s=(n, 1.1 * n))
             for n, whole in ((1, 2), (3, 4), (4, 4))]  # fmt: skip
    times = times_of().model_copy(update={"processors": 2, "splits": tuple(taken)})
    found = facts(measured(tmp_path, SERVED, times)).splits
    assert found
    assert [b["ratio"].value for b in found.rows] == pytest.approx([1 / 2, 3 / 4, 1])
    assert [b["predicted"].value for b in found.rows] == [1 / 2, 3 / 4, 1]
    assert facts(measured(tmp_path / "older", SERVED, times_of())).splits is None


def test_both_plots_are_drawn(tmp_path: Path) -> None:
    run = with_facts(measured(tmp_path, SERVED, times_of()))
    assert all(plots_of(LAB.name)[name](run) for name in ("growth", "lengths"))
    another = run.summary.model_copy(update={"facts": {"tiling": "as another version has it"}})
    stale = replace(run, summary=another)
    assert not any(plots_of(LAB.name)[name](stale) for name in ("growth", "lengths"))


# ------------------------------------------------------------------------------- within a run


def time_with(
    program: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, endpoint: bool = False
) -> list[str]:
    """What a run says in which this program stands in for the kernels."""
    monkeypatch.setattr("labs.tiled_attention.probes.ARGV", (sys.executable, "-c", program))
    setup: Any = SimpleNamespace(
        lab=LAB, machine=MACHINE, endpoint=endpoint, model=SimpleNamespace(path=folder.path)
    )
    messages: list[str] = []
    progress: Any = SimpleNamespace(message=messages.append, waiting=lambda text: None)
    before_engines(LAB.name)(setup, folder, progress)
    return messages


def test_a_run_keeps_what_was_timed_and_times_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    prints = f"print('progress'); print({times_of().model_dump_json()!r})"
    assert time_with(prints, folder, monkeypatch, endpoint=True) == []
    assert attention_times(folder) is None
    (done,) = time_with(prints, folder, monkeypatch)
    assert "was timed by itself" in done
    assert attention_times(folder) == times_of()
    assert time_with("raise SystemExit(1)", folder, monkeypatch) == []  # it is on file


def test_a_timing_that_fails_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    (failed,) = time_with("raise SystemExit('no torch here')", folder, monkeypatch)
    assert failed == "Attention by itself could not be timed: no torch here"
    (odd,) = time_with("print('half of it')", folder, monkeypatch)
    assert "it printed no figures" in odd
    assert attention_times(folder) is None
