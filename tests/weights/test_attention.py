"""Attention by itself, with tiles and without: counted and timed by PyTorch's kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.hardware import attention
from serving.hardware.attention import AttentionPlan
from tests.weights import needs_torch, torch

pytestmark = needs_torch


def plan(folder: Path, **fields: Any) -> AttentionPlan:
    config = folder / "config.json"
    config.write_text(json.dumps({"num_attention_heads": 2, "hidden_size": 32}))
    plain = {"config": config, "device": "cpu", "lengths_tokens": (64, 32), "passes": 2}
    return AttentionPlan(**{**plain, **fields})


def test_both_kernels_are_counted_and_timed_at_each_length(tmp_path: Path) -> None:
    found = attention.measure(plan(tmp_path, cache_bytes=4096))
    assert (found.heads, found.head_dim, found.cache_bytes) == (2, 16, 4096)
    assert [*found.at("untiled")] == [*found.at("tiled")] == [32, 64]
    # the first look counts as well where it took long, as beside other work
    assert all(len(t.times_s) in (2, 3) and min(t.times_s) > 0 for t in found.timed)
    assert not found.left_out
    untiled, tiled = (found.at(k)[64].peak_bytes for k in attention.BACKENDS)
    # the scores and their softmax at least, in float32; the output at least, in BF16
    assert untiled >= 2 * (2 * 64 * 64 * 4)
    assert tiled >= 2 * 64 * 16 * 2


def test_memory_is_the_most_that_is_held_at_once() -> None:
    def work() -> None:
        for _ in range(3):  # one after another
            torch.empty(250_000)  # of 4 bytes
        kept = torch.empty(500_000)
        torch.empty(250_000)
        del kept

    assert attention.peak_bytes(work, "cpu")[0] == 3_000_000


def test_what_does_not_fit_is_left_out_with_the_reason(tmp_path: Path) -> None:
    # 2.5 copies of 2 x 64 x 64 scores of 4 bytes are 81,920
    found = attention.measure(plan(tmp_path, most_bytes=81_919))
    assert [*found.at("untiled")] == [32]
    assert [*found.at("tiled")] == [32, 64]
    assert "set aside" in found.left_out["untiled/64"]


def test_a_kernel_that_refuses_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("No available kernel.\nAborting")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refused)
    found = attention.measure(plan(tmp_path))
    assert not found.timed
    assert set(found.left_out.values()) == {"No available kernel."}


@pytest.mark.parametrize("pieces", [1, 2, 8])
def test_split_keys_give_the_attention_of_a_textbook(pieces: int) -> None:
    q, k, v = (torch.randn(3, n, 16) for n in (2, 64, 64))
    scores = q @ k.transpose(1, 2) / 16**0.5
    torch.testing.assert_close(attention.attend_split(q, k, v, pieces), scores.softmax(-1) @ v)


def test_a_head_a_request_and_a_batch_are_timed_both_ways(tmp_path: Path) -> None:
    found = attention.measure_splits(plan(tmp_path), 3)
    assert [(s.kv_heads, s.tokens) for s in found] == [(1, 16383), (2, 16383), (6, 16383)]
    assert all(len(s.whole_s) == len(s.split_s) == attention.SPLIT_PASSES for s in found)
