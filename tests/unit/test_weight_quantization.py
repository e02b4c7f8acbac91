"""What a run says of quantized weights and of their quality beyond its claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labs import LABS
from labs.harness.derived.quality_summary import Quality, quality
from labs.harness.spec.lab import Variant
from labs.harness.storage.writing import write_gzip
from labs.weight_quantization.facts import facts, on_a_gpu, outliers, phases
from loadtests.workload import Fixed
from tests.unit.builders import make_lab, make_workload
from tests.unit.judged import answered, context, judged_run, told_of, withheld

LAB = LABS["weight-quantization"].at("cpu", quick=False).model_copy(update={"requests": 64})


def evaluated(home: Path, probability: float, right: int, again: bool = True) -> Quality | None:
    """The quality of `on` beside `off`, which gives every token one half and 90 right answers."""
    run = context(home, make_lab(findings=("quality",)), {})
    assert quality(run) is None
    plain = answered(0.5, 90)
    write_gzip(run.folder.probe_file("quality", "off"), {"answers": [plain] * (1 + again)})
    treated = {"answers": [answered(probability, right)]}
    write_gzip(run.folder.probe_file("quality-quick", "on"), treated)
    return quality(run)


@pytest.mark.parametrize(
    ("probability", "right", "outcome"),
    [(0.5, 90, "pass"), (0.25, 90, "fail"), (0.5, 20, "fail"), (0.5, 88, "undecided")],
)
def test_quality_is_gated_beside_its_false_alarms(
    probability: float, right: int, outcome: str, tmp_path: Path
) -> None:
    found = evaluated(tmp_path, probability, right)
    assert found
    assert (found.levels.perplexity.value, found.levels.needles_found.value) == (2, 0.9)
    assert (found.tokens, found.needles, found.tasks) == (100, 100, 100)
    assert [of.gate for of in found.compared.values()] == ["pass", outcome]
    treated = found.treatments["on"]
    assert treated.levels.perplexity.value == pytest.approx(1 / probability)
    assert treated.perplexity_ratio.value == pytest.approx(0.5 / probability)
    assert treated.levels.needles_found.value == right / 100


def test_needles_by_where_they_lay(tmp_path: Path) -> None:
    """90 of 100 found, then 80: five fewer at either length, all ten at the one depth."""
    found = evaluated(tmp_path, 0.5, 80, again=False)
    assert found
    assert found.again is None
    changes = {where: of.value for where, of in found.treatments["on"].needles_at.items()}
    assert changes == {where: pytest.approx(-0.1) for where in ("256 tokens", "512 tokens",
                                                                "depth 0.5")}  # fmt: skip


def test_weights_by_their_bytes_and_by_the_clock(tmp_path: Path) -> None:
    lab = make_lab(
        variants=(Variant(name="bf16"), Variant(name="half", weights="half")),
        workloads=(make_workload("concurrent:1", "concurrent:4", name="decode"),
                   make_workload(name="prefill")),
        claims=(), evidence=(),
    )  # fmt: skip
    run = context(tmp_path, lab, {
        "bf16/decode/concurrent-1": {"tpot_mean_s": 0.010},
        "half/decode/concurrent-1": {"tpot_mean_s": 0.008},
        "half/decode/concurrent-4": {"output_tokens_per_s": 50.0},
        "half/prefill/concurrent-1": {"ttft_mean_s": 0.003},
    }, halved=["half"],
       about={"half": {"tool": "halver", "tool_version": "1.2", "seconds": 61.2}})  # fmt: skip
    weights = facts(judged_run(run)).weights
    plain, half = weights.kinds
    assert (weights.most_users, half.bytes_ratio, half.by_bytes.value) == (4, 0.5, 2)
    assert not plain.speed_up.known
    assert half.speed_up.value == pytest.approx(1.25)
    assert (half.tokens_per_s.value, plain.tokens_per_s.value) == (50, None)
    assert half.prefill_tokens_per_s.value == pytest.approx(2000)
    assert half.prefill_tokens_per_s.unit == "tok/s"
    assert half.making
    assert half.making.took_s.value == 61.2
    assert plain.making is None


def test_outliers_by_what_they_cost(tmp_path: Path) -> None:
    """Two passages of 10 and 30 tokens; one scale a tensor costs half a nat a token in each."""
    dearer = {"tensor": 0.5, "tensor, smoothed": 0.1, "token": 0.0}
    study = {
        "passages_tokens": [10, 30],
        "loss_nats": {"none": [20.0, 60.0], **{
            f"activations by {name}, weights by channel": [20 + 10 * nats, 60 + 30 * nats]
            for name, nats in dearer.items()
        }},
        "inputs": {"q_proj": {"kurtosis_mean": 9.0, "kurtosis_max": 40.0,
                              "largest_over_median_max": 1234.5}},
    }  # fmt: skip
    found = outliers(context(tmp_path, make_lab(), {}, about={"outliers": study}))
    assert found
    assert [r.perplexity for r in found.roundings] == pytest.approx(np.exp([2, 2.5, 2.1, 2]))
    assert found.by_tensor.low == pytest.approx(np.exp(0.5))
    assert found.smoothed.value == pytest.approx(np.exp(0.1))
    assert found.by_token.value == pytest.approx(1)
    assert [(i.kind, i.max_kurtosis) for i in found.inputs] == [("q_proj", 40)]
    assert outliers(context(tmp_path / "no", make_lab(), {})) is None


@pytest.mark.parametrize(
    ("decode_ms", "prefill_ms", "gains"),
    [
        (5, 100, "decode"),
        (5, 50, "both"),
        (12, 100, "neither"),
        (12, 50, "prefill"),
        ((7, 13), 100, "open"),
        (5, (60, 130), "open"),
    ],
)
def test_fewer_bytes_are_held_against_both_phases(
    decode_ms: Any, prefill_ms: Any, gains: str, tmp_path: Path
) -> None:
    """Half the bytes, beside 10 ms in decode and 100 ms in prefill."""
    lab = make_lab(
        variants=(Variant(name="bf16"), Variant(name="w4a16-gptq", weights="w4a16-gptq")),
        workloads=(make_workload(name="decode"), make_workload(name="prefill")),
        claims=(), evidence=(),
    )  # fmt: skip
    run = context(tmp_path, lab, {
        "bf16/decode/concurrent-1": {"tpot_mean_s": 0.010},
        "bf16/prefill/concurrent-1": {"ttft_mean_s": 0.100},
        "w4a16-gptq/decode/concurrent-1": {"tpot_mean_s": np.divide(decode_ms, 1000).tolist()},
        "w4a16-gptq/prefill/concurrent-1": {"ttft_mean_s": np.divide(prefill_ms, 1000).tolist()},
    }, halved=["w4a16-gptq"])  # fmt: skip
    valid = phases(run)
    not_valid = phases(withheld(run, "bf16/decode/concurrent-1", ("tpot_mean_s",)))
    assert valid
    assert not_valid
    assert valid.control
    assert valid.decode_flop_per_byte < valid.prefill_flop_per_byte
    assert (valid.control.gains, valid.control.bytes_ratio) == (gains, 0.5)
    assert not_valid.control is None


def test_more_requests_are_held_against_a_longer_prompt(tmp_path: Path) -> None:
    """Twice the prompt of 6 tokens."""
    decode = make_workload("concurrent:1", "concurrent:8", name="decode")
    lab = make_lab(
        variants=(Variant(name="bf16"), Variant(name="w4a16-gptq", weights="w4a16-gptq")),
        workloads=(decode, make_workload(name="prefill", prompt_tokens=Fixed(tokens=12))),
        claims=(), evidence=(),
    )  # fmt: skip
    run = context(tmp_path, lab, {
        "bf16/decode/concurrent-1": {"tpot_mean_s": 0.010, "ttft_mean_s": 0.050},
        "bf16/decode/concurrent-8": {"tpot_mean_s": 0.015},
        "bf16/prefill/concurrent-1": {"ttft_mean_s": 0.090},
        "w4a16-gptq/decode/concurrent-1": {"tpot_mean_s": 0.010},
        "w4a16-gptq/prefill/concurrent-1": {"ttft_mean_s": 0.090},
    })  # fmt: skip
    found = phases(run)
    assert found
    more = found.more_tokens
    assert more
    assert (more.users, more.prompt_times, more.is_valid) == (8, 2, True)
    assert more.decode.value == pytest.approx(1.5)
    assert more.prefill.value == pytest.approx(1.8)
    cold = phases(withheld(run, "bf16/prefill/concurrent-1", ("ttft_mean_s",)))
    assert cold
    assert cold.more_tokens
    assert not cold.more_tokens.is_valid


def test_a_gpu_reverses_the_order_of_the_formats() -> None:
    """Llama 8B on an H100: 16.1 GB, in 4 bits 5.7 of which 1.05 are an embedding table.

    One stream reads 15 GB at 2.85 TB/s, 5.3 ms, or 4.7 GB, 1.6 ms, and takes 1.2 ms beside that:
    6.5 / 2.8 = 2.3. With 256 in flight 16 bits take 256 x 14e9 FLOP at 504 TFLOP/s, 7.1 ms, and
    4 bits the same, FP8 half of that.
    """
    by_name = {of.name: of for of in on_a_gpu().weights}
    eight, four = by_name["W8A8"], by_name["W4A16"]
    assert (on_a_gpu().first_for_few, on_a_gpu().first_for_many) == (four.name, eight.name)
    assert four.few.value == pytest.approx(2.3, rel=0.05)
    assert four.many.value == pytest.approx(1, abs=0.02)
    assert 1.3 < (eight.many.value or 0) < 2


def test_weights_that_are_not_valid_are_not_ranked(tmp_path: Path) -> None:
    names = ("bf16", "w8a8", "w4a16-awq")
    lab = LAB.model_copy(update={"variants": tuple(v for v in LAB.variants if v.name in names)})
    found = context(tmp_path, lab, {
        f"{name}/decode/concurrent-1": {"output_tokens_per_s": rate}
        for name, rate in zip(names, (100.0, 200.0, 150.0), strict=True)
    })  # fmt: skip
    without = judged_run(withheld(found, "w8a8/decode/concurrent-1"))
    (valid,), (rest,) = (facts(run).throughput for run in (judged_run(found), without))
    assert [gain.variant for gain in valid.gains] == ["w8a8", "w4a16-awq"]
    assert [gain.ratio.value for gain in valid.gains] == pytest.approx([2, 1.5])
    assert valid.first
    assert rest.first
    assert (valid.first.beats, rest.first.variant, rest.first.beats) == (
        "yes", "w8a8", "not valid",  # AWQ is of the same format as GPTQ
    )  # fmt: skip
    assert [(gain.variant, gain.ratio.known) for gain in rest.gains] == [
        ("w4a16-awq", True), ("w8a8", False),
    ]  # fmt: skip
    assert "CO-1" in told_of(without).answers
