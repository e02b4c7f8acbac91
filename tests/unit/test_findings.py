"""What labs conclude beyond their claims, each on a synthetic run worked by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labs import LABS
from labs.harness.facts.context import Context
from labs.harness.facts.offloading import CopyOrCompute, break_even_sentence
from labs.harness.facts.parts import Conclusion, parts_of
from labs.harness.filing.results import (
    Finding,
    write_gzip,
)
from labs.harness.spec import Variant
from labs.kv_quantization.facts import CONTEXT_SLOPE, MEMORY_LADDER, PREEMPTION
from loadtests.workload import Fixed
from tests.unit.builders import (
    make_lab,
    make_workload,
)
from tests.unit.judged import Values, answered, context

INF = float("inf")


def cells(finding: Finding, *columns: int) -> list[list[str]]:
    """Those columns of the rows below the header."""
    assert len({len(row) for row in finding.rows}) == 1
    return [[row[c] for c in columns] for row in finding.rows[1:]]


CONCLUSIONS = {c.name: c for lab in LABS for c in parts_of(lab).conclusions}


@pytest.mark.parametrize("conclusion", CONCLUSIONS.values(), ids=CONCLUSIONS)
def test_a_run_of_which_nothing_came_has_a_finding_all_the_same(
    conclusion: Conclusion[Any], tmp_path: Path
) -> None:
    """A report is written whatever failed."""
    finding = conclusion.finding(context(tmp_path, make_lab(), {}))
    assert finding.title
    assert finding.passed is None


# ------------------------------------------------------------------------------------ quantization


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
        claims=(), evidence=(),
    )  # fmt: skip
    return context(home, lab, values)


def test_preemption_is_first_seen_where_a_trial_has_any(tmp_path: Path) -> None:
    run = caches(tmp_path, {
        f"{v}/growing/concurrent-{n}": {"preemptions": thrown, "kv_capacity_tokens": capacity}
        for v, n, thrown, capacity in (
            ("bf16-tight", 4, (3.0, 0.0), 20.0), ("bf16-tight", 2, 0.0, 20.0),
            ("fp8-tight", 2, 0.0, 40.0), ("fp8-tight", 4, 0.0, 40.0),
        )
    })  # fmt: skip
    finding = PREEMPTION.finding(run)
    tight, quantized = finding.lines
    # requests of 10 tokens at their longest, 8 at the mean
    assert "20 tokens hold 2.0 requests of the longest and 2.5 of the mean length" in tight
    assert tight.endswith("There was none at 2 in flight, and some at 4.")
    assert quantized == "`fp8-tight`: no preemption up to 4 in flight."
    assert len(cells(finding, 0)) == 4


def test_a_capacity_that_is_not_known_is_no_capacity_of_0(tmp_path: Path) -> None:
    run = caches(tmp_path, {"bf16-tight/growing/concurrent-2": {"preemptions": 3.0}})
    assert PREEMPTION.finding(run).lines == [
        "`bf16-tight`: how many tokens the engine holds is not known, so nothing was predicted."
        " There was some at 2 in flight, the smallest load."
    ]


@pytest.mark.parametrize(
    ("near_ms", "far_ms", "said"),
    [
        # BF16 takes 10 ms and 10 ms a thousand tokens more: 9.92 ms at no context
        (
            12.0,
            17.0,
            "50% of the slope of `bf16` (50% by the bytes); it breaks even at 408 tokens",
        ),
        (9.0, 14.0, "50% of the slope of `bf16` (50% by the bytes); ahead at every context."),
        (11.0, 26.0, "150% of the slope of `bf16` (50% by the bytes); it never breaks even"),
        (
            8.0,
            23.0,
            "150% of the slope of `bf16` (50% by the bytes); by the fit it is ahead up to 408"
            " tokens of context, not beyond.",
        ),
    ],
)
def test_where_a_quantized_cache_breaks_even(
    near_ms: float, far_ms: float, said: str, tmp_path: Path
) -> None:
    run = caches(tmp_path, {
        f"{variant}/{workload}/concurrent-1": {"tpot_mean_s": ms / 1000}
        for variant, near, far in (("bf16", 10.0, 20.0), ("fp8", near_ms, far_ms))
        for workload, ms in (("near", near), ("far", far))
    })  # fmt: skip
    finding = CONTEXT_SLOPE.finding(run)
    assert finding.lines[0].startswith(f"`fp8`: {said}")
    assert cells(finding, 0, 2, 3, 4)[0] == ["bf16", "10 ms", "10 to 10 ms", "32"]
    assert cells(finding, 4) == [["32"], ["16"]]


@pytest.mark.parametrize("far_ms", [(18.0, 24.0), 21.0])
def test_slopes_within_their_noise_are_not_told_apart(far_ms: Any, tmp_path: Path) -> None:
    """The second time with one repeat, that has no noise to go by."""
    run = caches(tmp_path, {
        f"{variant}/{workload}/concurrent-1": {"tpot_mean_s": np.divide(ms, 1000).tolist()}
        for variant, far in (("bf16", 20.0), ("fp8", far_ms))
        for workload, ms in (("near", 10.0), ("far", far))
    })  # fmt: skip
    if far_ms == 21.0:
        one = {k: {1: of[1]} for k, of in run.values.items()}
        run = replace(run, values=one)
    (line, *_) = CONTEXT_SLOPE.finding(run).lines
    assert "the repeats vary too much to distinguish the two slopes" in line


def test_the_memory_ladder_climbs(tmp_path: Path) -> None:
    run = caches(tmp_path, {
        "bf16-tight/near/concurrent-1": {"kv_capacity_tokens": 640.0},
        "fp8-tight/growing/concurrent-4": {"kv_capacity_tokens": 1280.0},
        "bf16/far/concurrent-1": {"tpot_mean_s": 0.020},
        "fp8/far/concurrent-1": {"tpot_mean_s": 0.025},
    })  # fmt: skip
    rows = cells(MEMORY_LADDER.finding(run), 1, 2)
    assert rows[0][0] == rows[1][0] == rows[2][0] == "640 tokens"
    # 3/4 of 2000 bytes of weights less 16 x 8 values of the head, at 16 bytes a token
    # offloading frees nothing for a request that runs
    assert [r[0] for r in rows[3:]] == ["1,280 tokens", "1,362 tokens", "1,362 tokens"]
    assert rows[3][1] == "at worst *TPOT, mean* 1.25x (1.25 to 1.25) over a long context"


def test_offloading_is_priced_as_measured_or_is_said_to_be_arithmetic(tmp_path: Path) -> None:
    ladder = MEMORY_LADDER.finding(caches(tmp_path / "cpu", {}))
    assert cells(ladder, 2, 3)[-1][0] == "a prompt that returns is copied back"
    assert cells(ladder, 2, 3)[-1][1].startswith("arithmetic: what runs has to be")
    # 32 bytes a token at 1e7 FLOP/s, by 2 x 872 FLOP a token
    assert "32 bytes a token back over a GPU's link of 32 GB/s (PCIe 4.0 x16" in ladder.lines[-1]
    assert "at any length of the prefix. A link of more than 0.000183 GB/s is" in ladder.lines[-1]
    variants = [Variant(name=n, flags={"kv-cache-memory-bytes": 32 * 640})
                for n in ("bf16", "bf16-tight", "recompute", "offload")]  # fmt: skip
    lab = make_lab(variants=tuple(variants), workloads=(make_workload(name="returning"),),
                   claims=(), evidence=())  # fmt: skip
    measured = context(tmp_path / "gpu", lab, {
        "recompute/returning/concurrent-1": {"ttft_mean_s": 0.4},
        "offload/returning/concurrent-1": {"ttft_mean_s": 0.1},
    })  # fmt: skip
    price, known = cells(MEMORY_LADDER.finding(measured), 2, 3)[-1]
    assert price == (
        "a prompt that returns is copied back, with 0.25x (0.25 to 0.25) the TTFT of computing it"
        " again (measured in BF16, without the steps above)"
    )
    assert known.startswith("arithmetic: ")
    ceilings = measured.points[0].ceilings
    pair = CopyOrCompute.of(replace(measured.points[0], ceilings=ceilings.times(2)))
    assert "over the links of 2 GPUs, 64 GB/s together (PCIe" in break_even_sentence(pair)
    slow = replace(CopyOrCompute.of(measured.points[0]), link_is_measured=True, pays_from_tokens=45)
    assert "GB/s (measured)" in (text := break_even_sentence(slow))
    assert "from 45 tokens of prefix on" in text


def test_a_failed_gate_is_part_of_the_price(tmp_path: Path) -> None:
    """The FP8 cache loses 70 of 90 needles; of its speeds the worst one is named."""
    run = caches(tmp_path, {
        "bf16/far/concurrent-1": {"tpot_mean_s": 0.020, "output_tokens_per_s": 50.0},
        "fp8/far/concurrent-1": {"tpot_mean_s": 0.021, "output_tokens_per_s": 40.0},
        "bf16/near/concurrent-1": {"ttft_mean_s": 0.1},
        "fp8/near/concurrent-1": {"ttft_mean_s": 0.05},
    })  # fmt: skip
    for variant, right in (("bf16", 90), ("fp8", 20)):
        answers = {"answers": [answered(0.5, right)]}
        write_gzip(run.folder.probe_file("quality", variant), answers)
    price = cells(MEMORY_LADDER.finding(run), 2)[3][0]
    assert "needles found -70 points, the quality gate says *fail*" in price
    assert price.endswith("at worst *Output throughput* 0.80x (0.80 to 0.80) over a long context")
