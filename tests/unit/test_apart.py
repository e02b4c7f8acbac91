"""Prefill and decode apart, by forecast: what a link carries, how many machines of each kind."""

from __future__ import annotations

from typing import Any

import pytest

from labs.harness.derived.apart import apart

OF = apart()


def known(quantity: Any) -> float:
    assert quantity.value is not None
    return float(quantity.value)


def test_what_moves_is_the_models_keys_and_values_and_its_link_sends_it_in_a_prefills_time() -> (
    None
):
    """32 layers, 8 KV heads of 128 values, keys and values, of 2 bytes."""
    assert known(OF.token_kb) == 32 * 8 * 128 * 2 * 2 / 1e3
    assert known(OF.moved) == pytest.approx(OF.prompt_tokens * known(OF.token_kb) / 1e6)
    assert known(OF.needed) == pytest.approx(8 * known(OF.moved) / known(OF.prefill_s))


def test_apart_the_others_wait_for_a_step_and_the_prompt_for_prefill_link_and_a_step() -> None:
    for row in OF.links:
        assert known(row.copy_s) == pytest.approx(8 * known(OF.moved) / row.gbit_per_s)
        parts = known(OF.prefill_s) + known(row.copy_s) + known(OF.step_s)
        assert known(row.ttft_s) == pytest.approx(parts)
        assert known(row.beside) == pytest.approx(parts / known(OF.pieces[0].ttft_s))
    small, large = OF.pieces
    assert known(OF.step_s) < known(small.gap_s) < known(large.gap_s) < known(OF.prefill_s)
    assert known(small.ttft_s) > known(large.ttft_s) > known(OF.prefill_s)


def test_the_ratio_of_machines_follows_the_lengths_and_a_wrong_one_idles() -> None:
    for row in OF.mixes:
        busy_s = row.output_tokens * known(row.step_s) / OF.users
        assert known(row.machines) == pytest.approx(known(row.prefill_s) / busy_s)
        shares = sorted((known(row.prefill_s), busy_s))
        assert known(row.used) == pytest.approx((shares[0] / shares[1] + 1) / 2)
    assert sorted(OF.mixes, key=lambda row: -known(row.machines)) == [*OF.mixes]
