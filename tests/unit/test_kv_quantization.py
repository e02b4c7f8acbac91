"""What a run says of a quantized KV cache beyond its claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labs.harness.derived.offloading import CopyOrCompute
from labs.harness.derived.quality_summary import quality
from labs.harness.derived.run_view import Context
from labs.harness.spec.lab import Variant
from labs.harness.storage.writing import write_gzip
from labs.kv_quantization.facts import MemoryLadder, context_slope, memory_ladder, onsets
from loadtests.workload import Fixed
from tests.unit.builders import make_lab, make_workload
from tests.unit.judged import Values, answered, context, withheld


def caches(home: Path, values: Mapping[str, Values]) -> Context:
    """BF16 and FP8 caches, near (context 8) and far (1008), and growing at 2 and 4 in flight."""
    kinds = {"bf16": "auto", "fp8": "fp8_e4m3", "bf16-tight": "auto", "fp8-tight": "fp8_e4m3"}
    lab = make_lab(
        variants=tuple(
            Variant(name=n, flags={"kv-cache-dtype": t, "kv-cache-memory-bytes": 32 * 640})
            for n, t in kinds.items()
        ),
        workloads=(
            make_workload(name="near"),
            make_workload(name="far", prompt_tokens=Fixed(tokens=1006)),
            make_workload("concurrent:2", "concurrent:4", name="growing"),
        ),
        claims=(), evidence=(), findings=("quality",),
    )  # fmt: skip
    return context(home, lab, values)


def test_preemption_is_first_seen_where_a_trial_has_any(tmp_path: Path) -> None:
    tight, quantized = onsets(caches(tmp_path, {
        f"{v}/growing/concurrent-{n}": {"preemptions": thrown, "kv_capacity_tokens": capacity}
        for v, n, thrown, capacity in (
            ("bf16-tight", 4, (3.0, 0.0), 20.0), ("bf16-tight", 2, 0.0, 20.0),
            ("fp8-tight", 2, 1.0, None), ("fp8-tight", 4, 0.0, None),
        )
    }))  # fmt: skip
    # requests of 10 tokens at their longest, 8 at the mean
    assert (tight.longest_held.value, tight.mean_held.value) == (2, 2.5)
    assert (tight.calm_users, tight.first_users, tight.most_users) == (2, 4, 4)
    assert (quantized.calm_users, quantized.first_users) == (None, 2)
    assert not quantized.mean_held.known  # a capacity that is not known is none of 0


@pytest.mark.parametrize(
    ("near_ms", "far_ms", "ahead", "tokens"),
    [
        # BF16 takes 10 ms and 10 ms a thousand tokens more: 9.92 ms at no context
        (12.0, 17.0, "beyond", 408),
        (9.0, 14.0, "always", None),
        (11.0, 26.0, "never", None),
        (8.0, 23.0, "up to", 408),
        (10.0, (18.0, 24.0), "open", None),  # within the noise
    ],
)
def test_where_a_quantized_cache_breaks_even(
    near_ms: float, far_ms: Any, ahead: str, tokens: float | None, tmp_path: Path
) -> None:
    run = caches(tmp_path, {
        f"{variant}/{workload}/concurrent-1": {"tpot_mean_s": np.divide(ms, 1000).tolist()}
        for variant, near, far in (("bf16", 10.0, 20.0), ("fp8", near_ms, far_ms))
        for workload, ms in (("near", near), ("far", far))
    })  # fmt: skip
    found = context_slope(run)
    slope, line = found.slopes["fp8"], found.lines["bf16"].per_1000_tokens
    assert slope.ahead == ahead
    assert slope.share.value == pytest.approx(np.mean(far_ms) / 10 - near_ms / 10)
    assert slope.share_of_bytes.value == 0.5
    assert not tokens or slope.tokens.value == pytest.approx(tokens)
    assert (line.value, line.low) == pytest.approx((0.010, 0.010))
    once = context_slope(replace(run, values={k: {1: of[1]} for k, of in run.values.items()}))
    assert once.slopes["fp8"].ahead == "open"  # one repeat has no noise to go by
    assert once.lines["bf16"].per_1000_tokens.low is None


def ladder(run: Context) -> MemoryLadder:
    found = memory_ladder(run, quality(run))
    assert found
    return found


def test_the_memory_ladder_climbs(tmp_path: Path) -> None:
    found = ladder(caches(tmp_path, {
        "bf16-tight/growing/concurrent-4": {"kv_capacity_tokens": 640.0},
        "fp8-tight/growing/concurrent-4": {"kv_capacity_tokens": 1280.0},
    }))  # fmt: skip
    assert (found.capacity_tokens, found.in_8_bits_tokens) == (640, 1280)
    assert (found.is_measured, found.in_8_bits_is_measured) == (True, True)
    # 3/4 of 2000 bytes of weights less 16 x 8 values of the head, at 16 bytes a token
    assert found.with_4_bits_tokens == pytest.approx(1280 + 0.75 * (2000 - 256) / 16)
    assert not ladder(caches(tmp_path / "arithmetic", {})).is_measured


def test_the_price_of_a_cache_is_its_gate_and_the_worst_of_its_valid_speeds(
    tmp_path: Path,
) -> None:
    """The FP8 cache loses 70 of 90 needles."""
    run = caches(tmp_path, {
        "bf16/far/concurrent-1": {"tpot_mean_s": 0.020, "output_tokens_per_s": 50.0},
        "fp8/far/concurrent-1": {"tpot_mean_s": 0.021, "output_tokens_per_s": 40.0},
        "bf16/near/concurrent-1": {"ttft_mean_s": 0.1},
        "fp8/near/concurrent-1": {"ttft_mean_s": 0.05},
    })  # fmt: skip
    assert ladder(run).quality is None
    for variant, right in (("bf16", 90), ("fp8", 20)):
        answers = {"answers": [answered(0.5, right)]}
        write_gzip(run.folder.probe_file("quality", variant), answers)
    worst, price = ladder(run).worst, ladder(run).quality
    assert worst
    assert (worst.place, worst.metric) == ("far", "output_tokens_per_s")
    assert worst.ratio.value == pytest.approx(0.8)
    assert price
    assert price.needles_change.value == pytest.approx(-0.7)
    assert price.gate == "fail"
    assert ladder(withheld(run, "fp8/far/concurrent-1")).worst is None


def test_offloading_is_priced_as_measured_or_is_arithmetic(tmp_path: Path) -> None:
    plain = ladder(caches(tmp_path / "cpu", {}))
    assert not plain.returning.known
    # 32 bytes a token at 1e7 FLOP/s, by 2 x 872 FLOP a token
    assert plain.offload.pays_at_any_length
    assert plain.offload.pays_from_bytes_per_s == pytest.approx(32 * 1e7 / (2 * 872), rel=0.01)
    assert not plain.offload.link_is_measured
    # so the page has both figures of an H100: 16,384 tokens of 131,072 bytes at its 64 GB/s
    example = plain.offload.example
    assert example.copy_s.value == pytest.approx(16_384 * 131_072 / 64e9)
    # 299e12 FLOP by its kernels' times, which reach about 70% of 989 TFLOP/s
    assert example.prefill_s.value == pytest.approx(299e12 / (0.7 * 989e12), rel=0.05)
    assert example.even.value == pytest.approx(16_384 * 131_072 / 0.447e9, rel=0.01)
    variants = [Variant(name=n, flags={"kv-cache-memory-bytes": 32 * 640})
                for n in ("bf16", "bf16-tight", "recompute", "offload")]  # fmt: skip
    lab = make_lab(variants=tuple(variants), workloads=(make_workload(name="returning"),),
                   claims=(), evidence=())  # fmt: skip
    measured = context(tmp_path / "gpu", lab, {
        "recompute/returning/concurrent-1": {"ttft_mean_s": 0.4},
        "offload/returning/concurrent-1": {"ttft_mean_s": 0.1},
    })  # fmt: skip
    assert ladder(measured).returning.value == pytest.approx(0.25)
    point = measured.points[0]
    pair = CopyOrCompute.of(replace(point, ceilings=point.ceilings.times(2)))
    assert (pair.links, pair.link.value) == (2, 64)
