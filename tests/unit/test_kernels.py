"""The step of a GPU put together from published kernels: what its parts add up to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serving.hardware.gpus import short_names
from serving.models import dummy
from serving.simulator import kernels
from serving.simulator.kernels import Decoder, KernelsError, step_times
from serving.simulator.step import AttentionTimes, Piece, Step


def decoder(shape: str) -> Decoder:
    return Decoder.of(json.loads((dummy.HOME / f"{shape}.json").read_text()))


LLAMA = decoder("llama-8b")
ALONE = Step([Piece(1, 100)], 1)
US = 1e-6


def test_one_stream_decodes_at_the_published_rate() -> None:
    """vLLM's 155 tokens/s for an 8B model in BF16 on an H100, from which the host's share comes."""
    assert 1 / step_times(LLAMA, "h100").seconds(ALONE) == pytest.approx(155, rel=0.005)


def test_a_step_is_its_kernels_and_the_host() -> None:
    """Worked by hand from the tables' rows, for a model whose sizes are all in them."""
    small = Decoder(
        layers=2, hidden=4096, heads=32, kv_heads=8, head_dim=128, inner=8192, vocab=65536
    )
    down_us = 27.33  # pooled: of 30.25 alone, and shorter times of 2 to 16 rows
    products_us = 19.9 + 15.05 + 46.02 + down_us  # qkv 6144, output 4096, gate and up 16384
    values = 8 * 4096 + 2 * 32 * 128 + 6 * 8 * 128 + 3 * 8192
    small_us = 5 * 2.924 + 2 * values / 3.061e12 / US
    attention_us = 11.54
    head_us = 194.4 + 2 * 2.924  # pooled: of 218 alone
    expected_us = 2 * (products_us + small_us + attention_us) + 2.924 + head_us + 190
    found_s = step_times(small, "h100").seconds(Step([Piece(1, 31)], 1))
    assert found_s / US == pytest.approx(expected_us, rel=0.01)


def test_a_prompt_reaches_the_share_of_the_dense_rate_that_was_published() -> None:
    """0.71 to 0.73 of 989 TFLOP/s in the products of 1,024 to 2,048 tokens of an 8B model."""
    times = step_times(LLAMA, "h100")
    products_s = times.linear_s[times.tokens.index(2048)]
    flops = 2 * 2048 * 6.98e9  # parameters of the layers
    assert flops / products_s / 989e12 == pytest.approx(0.70, abs=0.04)


def test_no_product_takes_less_time_than_one_of_fewer_rows() -> None:
    """Those that contradict share their geometric mean: 4 and 1 are 2 each."""
    rows = np.array([[[4.0, 1.0, 9.0], [np.nan] * 3]])
    filled = kernels._filled(rows, k=np.array([1.0, 2.0]))
    assert filled[0] == pytest.approx(np.array([[2, 2, 9], [4, 4, 18]]))


SHIPPED = sorted(kernels.TABLES.glob("*/*.csv"))


@pytest.mark.parametrize("path", SHIPPED, ids=[f"{p.parent.name} {p.stem}" for p in SHIPPED])
def test_no_table_that_ships_has_a_hole(path: Path) -> None:
    head = path.read_text().splitlines()[0].split(",")
    keys = sum(not name.isdigit() for name in head)
    sizes, rows = kernels._table(path.parent.name, path.stem, keys)
    assert rows
    assert all(len(row) == len(sizes) and np.isfinite(row).all() for row in rows.values())
    if path.stem == "products":
        for kind in {kind for kind, _, _ in rows}:
            assert np.isfinite(kernels._products(path.parent.name, kind).all_s).all()


@pytest.mark.parametrize("card", kernels.cards())
def test_the_step_of_no_model_has_a_hole(card: str) -> None:
    """Of Qwen3 14B, decoding on an A100 has one between sizes that were timed."""
    attention = step_times(decoder("qwen3-14b"), card).attention
    assert attention
    assert np.isfinite(attention.decode_s).all()
    assert np.isfinite(attention.prefill_s).all()


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table of a card, to be written."""
    monkeypatch.setattr(kernels, "TABLES", tmp_path)
    kernels._table.cache_clear()
    (tmp_path / "card").mkdir()
    yield tmp_path / "card" / "attention.csv"
    kernels._table.cache_clear()


@pytest.mark.parametrize(
    ("power", "filled_us"), [(1, [6, 6, 10, 18, 36]), (2, [6, 6, 8.4, 18, 72])]
)
def test_what_was_not_timed_follows_from_what_was(
    made_up: Path, power: int, filled_us: list[float]
) -> None:
    made_up.write_text("heads,1,2,4,8,16\n32,,6,,18,\n")
    _, rows = kernels._table("card", "attention", 1, power=power)
    assert rows["32",] / US == pytest.approx(filled_us)


@pytest.mark.parametrize("row", ["32,6,nan", "32,6,inf", "32,6,0", "32,6,x", "32,,", "32,6"])
def test_what_is_no_time_is_refused_with_its_table(made_up: Path, row: str) -> None:
    made_up.write_text(f"heads,1,2\n{row}\n")
    with pytest.raises(ValueError, match=r"card/attention\.csv, row 32: "):
        kernels._table("card", "attention", 1)


def test_gpus_that_share_layers_exchange_results() -> None:
    one, four = (step_times(LLAMA, "h100", gpus).seconds(ALONE) for gpus in (1, 4))
    exchanges_s = 65 * 5e-6
    assert one / 4 + exchanges_s < four < one / 2


@pytest.mark.parametrize(
    ("changed", "card", "gpus", "why"),
    [
        ({}, "l40s", 2, "exchanges"),
        ({}, "h100", 16, "cannot share 32 and 8"),
        ({"head_dim": 96}, "h100", 1, "heads of 96"),
        ({"experts": 7, "experts_per_token": 2}, "h100", 1, "experts of this shape"),
        ({"heads": 28, "kv_heads": 4}, "h100", 8, "cannot share 28 and 4"),
        ({}, "l4", 1, "products"),
    ],
)
def test_what_no_table_has_is_named(
    changed: dict[str, int], card: str, gpus: int, why: str
) -> None:
    with pytest.raises(KernelsError, match=why):
        step_times(replace(LLAMA, **changed), card, gpus)


def test_eight_bits_read_half() -> None:
    plain = step_times(LLAMA, "h100")
    eight = step_times(LLAMA, "h100", eight_bit_weights=True)
    assert 0.5 < eight.seconds(ALONE) / plain.seconds(ALONE) < 0.75


def test_experts_have_a_table() -> None:
    moe = step_times(decoder("moe-30b"), "h100")
    assert moe.seconds(ALONE) < step_times(LLAMA, "h100").seconds(ALONE)
    assert step_times(replace(decoder("moe-30b"), layers=24), "h100").linear_s[0] == pytest.approx(
        moe.linear_s[0] / 2, rel=0.01
    )


def test_more_kv_heads_than_any_table_has_are_more_requests() -> None:
    """32 KV heads of one request keep the kernel as busy as 8 of four."""
    wide = step_times(replace(LLAMA, kv_heads=32), "h100").attention
    narrow = step_times(replace(LLAMA, heads=8, kv_heads=8), "h100").attention
    assert wide
    assert narrow
    assert wide.requests_each == 4
    assert wide.seconds([Piece(1, 1023)] * 2) == narrow.seconds([Piece(1, 1023)] * 8)


ATTENTION = AttentionTimes(
    batches=(1, 2, 4),
    contexts=(2, 1024, 2048),
    decode_s=((1.0, 2.0, 3.0), (1.0, 3.0, 5.0), (2.0, 6.0, 10.0)),
    lengths=(1, 512, 1024),
    prefill_s=(1.0, 5.0, 17.0),
)


@pytest.mark.parametrize(("heads", "kv_heads"), [(40, 40), (40, 10), (20, 20), (32, 32), (40, 8)])
def test_no_cache_is_read_faster_than_memory(heads: int, kv_heads: int) -> None:
    attention = step_times(replace(LLAMA, heads=heads, kv_heads=kv_heads), "h100").attention
    assert attention
    read_bytes = 32 * 2000 * 2 * LLAMA.layers * kv_heads * LLAMA.head_dim * 2
    assert read_bytes / attention.seconds([Piece(1, 1999)] * 32) < 3.35e12


def test_layers_of_another_kind_have_no_step() -> None:
    config = json.loads((dummy.HOME / "llama-8b.json").read_text())
    full = {**config, "layer_types": ["full_attention"] * 32}
    assert Decoder.of(full) == LLAMA
    for more in ({"n_routed_experts": 64}, {"layer_types": ["sliding_attention"]}):
        with pytest.raises(KernelsError):
            Decoder.of({**config, **more})


def test_a_router_takes_as_long_as_the_shortest_kernel() -> None:
    products = kernels._products("h100", "bfloat16")
    assert products.seconds(n=8, k=4096)[0] == products.shortest_s


@pytest.mark.parametrize(
    ("pieces", "seconds"),
    [
        ([Piece(1, 1023)], 2.0),
        ([Piece(1, 1023), Piece(1, 2047)], 4.0),  # 1,536 tokens on average
        ([Piece(1, 1023)] * 3, 4.5),
        ([Piece(512, 0)], 5.0),
        ([Piece(512, 512)], 1.0 + 12.0),
        ([Piece(512, 0), Piece(512, 0)], 1.0 + 4.0 + 4.0),  # one launch
        ([Piece(512, 0), Piece(1, 1023)], 2.0 + 4.0),
        ([Piece(16, 2032)], 1.0 + 3.0 - 1.0),  # reading the cache takes longer than computing
        ([Piece(2048, 0)], 17.0 * 4),
    ],
)
def test_attention_of_a_step(pieces: list[Piece], seconds: float) -> None:
    assert ATTENTION.seconds(pieces) == pytest.approx(seconds)


def test_everything_takes_a_factor_longer() -> None:
    times = step_times(LLAMA, "a100")
    step = Step([Piece(1, 700), Piece(300, 50)], 2)
    assert times.times(1.5).seconds(step) == pytest.approx(1.5 * times.seconds(step))


def test_every_card_with_tables_has_a_datasheet() -> None:
    assert set(kernels.cards()) <= set(short_names())
