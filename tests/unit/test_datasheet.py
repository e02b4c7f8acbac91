"""The step of a GPU that is not here: it agrees with the published figures that it stands on."""

from __future__ import annotations

import json

import pytest

from labs.harness.plan.resolve import machine_of
from labs.harness.spec.lab import LabError
from serving.hardware.gpus import DATASHEETS, short_names
from serving.models import catalog, dummy
from serving.models.catalog import Shape
from serving.simulator.datasheet import (
    EXPECTED,
    LEAST_EFFICIENT,
    MOST_EFFICIENT,
    Efficiency,
    as_draft,
    step_times,
)
from serving.simulator.step import Piece, Step

H100 = DATASHEETS["NVIDIA H100 80GB HBM3"]
ALONE = Step([Piece(1, 100)], 1)


def shape(name: str) -> Shape:
    return catalog.shape_of(json.loads((dummy.HOME / f"{name}.json").read_text()))


def test_one_stream_decodes_at_the_published_rate() -> None:
    """vLLM's 155 tokens/s for an 8B model in BF16 on an H100."""
    step_s = step_times(shape("llama-8b"), H100, EXPECTED).seconds(ALONE)
    assert 1 / step_s == pytest.approx(155, rel=0.02)


def test_a_step_bends_where_computing_takes_longer_than_reading() -> None:
    """At 0.51 x 989 TFLOP/s and 0.85 x 3.35 TB/s, 2 bytes a weight: 177.1 tokens, in 16 bits."""
    times = step_times(shape("llama-8b"), H100, EXPECTED)
    assert 178 in times.tokens
    at = dict(zip(times.tokens, times.linear_s, strict=True))
    assert at[178] == pytest.approx(at[128], rel=0.01)
    assert at[256] / at[178] == pytest.approx(256 / 177.1, rel=0.01)


def test_a_pass_of_a_draft_is_launched_and_not_scheduled() -> None:
    target, draft = (step_times(shape(name), H100, EXPECTED) for name in ("llama-8b", "llama-1b"))
    a_pass = as_draft(draft)
    assert a_pass.seconds(ALONE) == pytest.approx(draft.seconds(ALONE) - 0.8e-3)
    assert as_draft(target.model_copy(update={"scheduling_s": 0.15e-3})).scheduling_s == 0.15e-3


def test_a_small_model_is_further_from_the_bandwidth() -> None:
    """Hazy Research (2025): vLLM at 31% of an H100's bandwidth for a 1B model, SGLang at 50%."""
    small = shape("llama-1b")
    step_s = step_times(small, H100, EXPECTED).seconds(ALONE)
    assert 0.31 < small.weight_bytes / step_s / H100.memory_bandwidth_bytes_per_s < 0.50


def test_a_long_prompt_computes_at_the_published_share() -> None:
    large = shape("llama-8b")
    step_s = step_times(large, H100, EXPECTED).seconds(Step([Piece(8192, 0)], 1))
    flops = 2 * large.matmul_params * 8192
    assert 0.45 < flops / step_s / H100.bf16_flops_per_s < 0.51


def test_gpus_that_share_each_layer_divide_the_work_and_exchange_twice_a_layer() -> None:
    """161 exchanges for 80 layers and the embeddings, one for the logits; 8,192 numbers a token."""
    large = shape("llama-70b")
    whole, shared = (step_times(large, H100, EXPECTED, gpus=gpus) for gpus in (1, 4))
    sent_s = 0.75 / (0.76 * 450e9)  # of a byte that every GPU gets from the three others
    for place, tokens in enumerate(whole.tokens):
        summed_s = 161 * (10e-6 + 2 * 2 * 8192 * tokens * sent_s)
        assert shared.linear_s[place] == pytest.approx(whole.linear_s[place] / 4 + summed_s)
        gathered_s = 10e-6 + 2 * large.vocab * tokens * sent_s
        assert shared.head_s[place] == pytest.approx(whole.head_s[place] / 4 + gathered_s)
    assert shared.attention_read_s == pytest.approx(whole.attention_read_s / 4)
    assert shared.attention_pair_s == pytest.approx(whole.attention_pair_s / 4)
    assert shared.scheduling_s == whole.scheduling_s


@pytest.mark.parametrize(
    ("efficiency", "published_s"),
    [
        (EXPECTED, {0.5: 13e-6, 1: 16e-6, 2: 21e-6, 4: 31e-6}),
        (LEAST_EFFICIENT, {0.5: 23e-6, 4: 53e-6}),
    ],
)
def test_an_exchange_takes_as_long_as_published(
    efficiency: Efficiency, published_s: dict[float, float]
) -> None:
    """An all-reduce on six H100: vLLM's fastest, and NCCL (MiB: seconds)."""
    for size, seconds in published_s.items():
        sent_bytes = 2 * size * 2**20 * 5 / 6
        forecast_s = efficiency.exchange_s + sent_bytes / (efficiency.linking * 450e9)
        assert forecast_s == pytest.approx(seconds, rel=0.06)


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize(
    "step", [ALONE, Step([Piece(4096, 0)], 1), Step([Piece(1, 500)] * 256, 256)]
)
def test_the_expected_step_lies_within_its_band(step: Step, gpus: int) -> None:
    times = [
        step_times(shape("llama-8b"), H100, e, gpus=gpus).seconds(step)
        for e in (MOST_EFFICIENT, EXPECTED, LEAST_EFFICIENT)
    ]
    assert times == sorted(times)
    assert times[0] < times[1] < times[2]


def test_eight_bits_read_and_multiply_faster_and_a_cache_of_eight_bits_reads_faster() -> None:
    config = json.loads((dummy.HOME / "llama-8b.json").read_text())
    eight = catalog.shape_of(
        {**config, "quantization_config": {"config_groups": {"g": {"weights": {"num_bits": 8}}}}}
    )
    plain, prompt = shape("llama-8b"), Step([Piece(4096, 0)], 1)
    crowd = Step([Piece(1, 8000)] * 32, 32)
    sixteen = step_times(plain, H100, EXPECTED)
    assert step_times(eight, H100, EXPECTED).seconds(ALONE) < 0.7 * sixteen.seconds(ALONE)
    assert step_times(plain, H100, EXPECTED, eight_bit=True).seconds(prompt) < sixteen.seconds(
        prompt
    )
    assert step_times(plain, H100, EXPECTED, kv_value_bytes=1).seconds(crowd) < sixteen.seconds(
        crowd
    )


def test_a_card_is_known_by_its_short_name() -> None:
    machine, sheet = machine_of("h100")
    assert (machine.kind, catalog.scale_of(machine)) == ("gpu", "gpu-80")
    assert sheet is H100
    scales = {name: catalog.scale_of(machine_of(name)[0]) for name in short_names()}
    assert {"t4": "gpu-16", "l4": "gpu-24", "h200": "gpu-141"}.items() <= scales.items()
    with pytest.raises(LabError, match="mean h100"):
        machine_of("h10")
