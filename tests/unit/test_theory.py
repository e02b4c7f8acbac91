"""Predictions against numbers worked by hand.

A dense 70B in 16 bits (80 layers, 8 KV heads of 128, 140 GB) on 3350 GB/s and 989 TFLOP/s.
"""

from dataclasses import replace

import numpy as np
import pytest

from labs.harness.spec import theory
from serving.hardware.machine import Ceilings
from serving.models.catalog import Shape
from tests.unit.builders import CEILINGS, SHAPE

BIG = Shape(
    layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, vocab=128_256,
    max_positions=8192, params=70 * 10**9, matmul_params=70 * 10**9, weight_bytes=140 * 10**9,
)  # fmt: skip
FAST = Ceilings(
    memory_bandwidth_bytes_per_s=3350e9, bf16_flops_per_s=989e12, threads=1, torch="-",
    measured_at="-",
)  # fmt: skip


def test_kv_cache_of_a_token() -> None:
    assert BIG.kv_bytes_per_token() == 2 * 80 * 8 * 128 * 2 == 327_680
    assert BIG.kv_bytes_per_token() * 8192 == 2.5 * 2**30
    assert BIG.kv_bytes_per_token(bytes_per_value=1) == 163_840


def test_one_sequence_decodes_no_faster_than_the_weights_are_read() -> None:
    step_s = theory.decode_step_s(BIG, FAST, batch=1, context_tokens=0)
    assert round(1000 * step_s, 1) == 41.8
    assert round(1 / step_s, 2) == 23.93


def test_decode_reads_the_weights_once_and_every_sequences_keys_and_values() -> None:
    assert theory.decode_bytes(BIG, batch=2, context_tokens=8192) == 140e9 + 2 * 2_684_354_560
    assert theory.decode_bytes(SHAPE, batch=3, context_tokens=10) == 2000 + 3 * 10 * 32


def test_a_small_batch_reads_few_experts_of_a_mixture() -> None:
    """Of 2000 bytes 1600 are four experts', two for each token: of two tokens each misses half."""
    mixture = replace(SHAPE, experts=4, experts_per_token=2, expert_bytes=1600)
    assert theory.decode_bytes(mixture, batch=2, context_tokens=0) == 400 + 1600 * 3 / 4
    assert theory.forward_s(mixture, CEILINGS, 1, 0) == pytest.approx(0.0012)
    # two tokens at 2 x 872, a head and 32 x (100 - 64) are 4,896 FLOP, less than 1,600 bytes take
    assert theory.prefill_left_s(mixture, CEILINGS, 10, 8) == pytest.approx(0.0016)


def test_decode_work_is_two_flop_a_parameter_and_attention_over_the_context() -> None:
    # 4 x 2 layers x 2 heads x 4 a token of context
    assert theory.decode_flops(SHAPE, batch=3, context_tokens=10) == 3 * (2 * 1000 + 64 * 10)


def test_step_takes_the_slower_of_memory_and_compute() -> None:
    # 2000 bytes at 1e6 bytes/s; 2000 FLOP a sequence at 1e7 FLOP/s
    assert theory.decode_step_s(SHAPE, CEILINGS, 1, 0) == pytest.approx(0.002)
    assert theory.decode_step_s(SHAPE, CEILINGS, 50, 0) == pytest.approx(0.01)


def test_ridge_is_where_memory_and_compute_take_equally_long() -> None:
    assert theory.ridge_batch(SHAPE, CEILINGS) == pytest.approx(10)
    below, above = (theory.decode_step_s(SHAPE, CEILINGS, b, 0) for b in (9.9, 10.1))
    assert below == 0.002 < above
    assert theory.ridge_batch(BIG, FAST) == pytest.approx(989 / 3.35)


def test_prefill_is_two_flop_a_parameter_and_token_and_causal_attention() -> None:
    # of 1000 parameters 16 x 8 are the head's, which one token needs:
    # 2 x 872 x 10 + 2 x 128 + 2 x 2 layers x 2 heads x 4 x 10^2 = 20,896 FLOP
    assert theory.prefill_s(SHAPE, CEILINGS, 10) == pytest.approx(20_896 / 1e7)


def test_prefill_of_the_rest_still_attends_to_what_is_cached() -> None:
    # 2 x 872 x 50 + 2 x 128 + 32 x (100^2 - 50^2) FLOP
    assert theory.prefill_left_s(SHAPE, CEILINGS, 100, 50) == pytest.approx(327_456 / 1e7)
    assert theory.prefill_left_s(SHAPE, CEILINGS, 100, 0) == theory.prefill_s(SHAPE, CEILINGS, 100)


def test_prefill_of_a_cached_prompt_reads_the_weights_once() -> None:
    assert theory.prefill_left_s(SHAPE, CEILINGS, 100, 99.9) == 0.002


def test_copying_pays_from_where_attention_takes_longer_than_the_link() -> None:
    # 32 bytes a token; 2 x 872 FLOP a token and 32 N^2 FLOP at 1e7 FLOP/s: 174.4 us and 3.2 us N
    assert theory.kv_copy_s(SHAPE, 100, 1e5) == pytest.approx(100 * 32 / 1e5)
    slow, fast = 1e5, 2e5
    n = theory.copying_pays_from_tokens(SHAPE, 1e7, slow)
    assert n == pytest.approx((320e-6 - 174.4e-6) / 3.2e-6)
    body_s = (theory.prefill_flops(SHAPE, n) - 2 * 128) / 1e7
    assert body_s == pytest.approx(theory.kv_copy_s(SHAPE, n, slow))
    assert theory.copying_pays_from_tokens(SHAPE, 1e7, fast) == 0
    assert slow < theory.link_that_pays_bytes_per_s(SHAPE, 1e7) < fast
    assert theory.copying_pays_from_tokens(SHAPE, 1e7, slow, kv_value_bytes=1) == 0


def test_throughput_gives_every_request_a_prefill_that_makes_its_first_token() -> None:
    # context 10 + 5: a step reads 2000 + 4 x 15 x 32 bytes, 3.92 ms; prefill takes 2.0896 ms
    rate = theory.batch_throughput(SHAPE, CEILINGS, 4, prompt_tokens=10, output_tokens=10)
    assert rate == pytest.approx(10 / (9 * 0.00392 / 4 + 0.0020896))
    only = theory.batch_throughput(SHAPE, CEILINGS, 4, prompt_tokens=10, output_tokens=1)
    assert only == pytest.approx(1 / 0.0020896)


def test_static_batch_lasts_as_long_as_its_longest_answer() -> None:
    # (5 + 4) / 2 over (1 + 1 + 1 + 5 + 4 + 4 + 4 + 4) / 8; the last two fill no batch
    lengths = [1, 1, 1, 5, 4, 4, 4, 4, 100, 100]
    assert theory.static_batching_penalty(lengths, batch=4) == pytest.approx(4.5 / 3)


@pytest.mark.parametrize(("batch", "harmonic"), [(8, 2.717857), (32, 4.058495)])
def test_static_penalty_of_exponential_lengths_is_the_harmonic_number(
    batch: int, harmonic: float
) -> None:
    lengths = np.random.default_rng(0).exponential(1000, 320_000).round().astype(int).tolist()
    # four standard errors of 10,000 maxima, each spread by at most pi / sqrt(6)
    error = 4 * 1.2825 / np.sqrt(len(lengths) / batch)
    penalty = theory.static_batching_penalty(lengths, batch)
    assert penalty == pytest.approx(harmonic, abs=float(error))


def test_a_piece_rides_along_free_until_its_compute_takes_longer_than_the_reading() -> None:
    # four at 15 tokens read 2000 + 4 x 15 x 32 bytes, the piece the 96 tokens before it
    step_s = theory.chunk_step_s(SHAPE, CEILINGS, 4, 15, prompt_tokens=100, chunk_tokens=4)
    # they compute 4 x (2000 + 64 x 15) FLOP, it 2 x 872 x 4 + 256 + 32 x (100^2 - 96^2)
    assert step_s == pytest.approx(max((3920 + 96 * 32) / 1e6, (11_840 + 32_320) / 1e7))
    larger = theory.chunk_step_s(SHAPE, CEILINGS, 4, 15, prompt_tokens=100, chunk_tokens=40)
    assert larger == pytest.approx((11_840 + 2 * 872 * 40 + 256 + 32 * (100**2 - 60**2)) / 1e7)


@pytest.mark.parametrize("chunk_tokens", [100, 4000])
def test_a_piece_is_at_most_the_prompt(chunk_tokens: int) -> None:
    steps_s = [
        of(SHAPE, CEILINGS, 4, 15, 100, chunk_tokens)
        for of in (theory.chunk_step_s, theory.chunked_prefill_s)
    ]
    assert steps_s == pytest.approx([(11_840 + 2 * 872 * 100 + 256 + 32 * 100**2) / 1e7] * 2)


def test_every_piece_brings_the_decoding_streams_along() -> None:
    # 40 + 40 + 20 tokens: three times the streams' step and the head, the rest stays what it was
    prefill_s = theory.chunked_prefill_s(SHAPE, CEILINGS, 4, 15, prompt_tokens=100, chunk_tokens=40)
    assert prefill_s == pytest.approx((3 * (11_840 + 256) + 2 * 872 * 100 + 32 * 100**2) / 1e7)


@pytest.mark.parametrize(
    ("acceptance", "draft_tokens", "tokens"),
    [(0.5, 2, 1 + 0.5 + 0.25), (0.0, 5, 1), (1.0, 3, 4), (0.9, 1, 1.9)],
)
def test_a_draft_yields_its_accepted_beginning_and_one_token(
    acceptance: float, draft_tokens: int, tokens: float
) -> None:
    assert theory.accepted_length(acceptance, draft_tokens) == pytest.approx(tokens)


def test_forward_pass_is_the_slower_of_reading_and_computing() -> None:
    # 2000 + 1920 bytes at 1 MB/s against 2 x 1000 x 4 FLOP at 10 MFLOP/s
    assert theory.forward_s(SHAPE, CEILINGS, 4, 1920) == pytest.approx(0.00392)
    assert theory.forward_s(SHAPE, CEILINGS, 50, 1920) == pytest.approx(0.01)


def test_kv_memory_holds_whole_blocks() -> None:
    # 16 tokens of 32 bytes a block in 16 bits, of 16 bytes in 8
    assert theory.kv_tokens(SHAPE, 10 * 512 + 300, 2, block=16) == 160
    assert theory.kv_tokens(SHAPE, 10 * 512 + 300, 1, block=16) == 21 * 16
    assert theory.kv_tokens(SHAPE, 511, 2, block=16) == 0
