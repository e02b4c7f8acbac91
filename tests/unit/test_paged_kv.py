"""The lab of the paged KV cache: its arithmetic by hand, its allocator, and what is told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from labs import LABS
from labs.harness.facts.context import Context
from labs.harness.spec import Lab, Point, RequestLengths, factors
from labs.paged_kv.facts import (
    ALLOCATOR,
    HEADS,
    TILES,
    WATERMARK,
    Allocation,
    Allocations,
    block_size,
    contiguous,
    gain_sentence,
    heads_saved,
    tell_allocator,
    tell_heads,
    tell_tiles,
    tell_watermarks,
    tiles_or_pages,
)
from labs.paged_kv.lab import admitted, held_tokens, kept_free_blocks, replay, replayed
from serving import gpus
from tests.unit.builders import CEILINGS, SHAPE, make_point
from tests.unit.judged import context, judged, judged_run
from tests.unit.test_findings import cells

LAB = LABS["paged-kv"].at("cpu", quick=False)
MIXED, NEAR, FAR = "mixed/concurrent-16", "near/concurrent-1", "far/concurrent-1"
GROWING = "growing/concurrent-28"


def point(key: str, lab: Lab = LAB) -> Point:
    return next(p for p in lab.points(SHAPE, CEILINGS) if p.key == key)


def predicted(claim: str) -> float:
    """What a claim predicts where `mha` serves two KV heads, and the model has one."""
    (one,) = (c for c in LAB.claims if c.name == claim)
    points = LAB.points(SHAPE, CEILINGS, {"mha": replace(SHAPE, kv_heads=2)})
    ((treatment, baseline),) = LAB.pairs(one, points)
    return one.predict(treatment, baseline).value


# ------------------------------------------------------------------------------- the arithmetic


def test_a_request_holds_whole_blocks_of_what_it_has_written() -> None:
    """Of 6 to 9 tokens in blocks of 4: two blocks for 6, 7 and 8, three for 9."""
    assert held_tokens(make_point(), 4) == (8 + 8 + 8 + 12) / 4
    assert held_tokens(make_point(), 1) == (6 + 7 + 8 + 9) / 4
    # requests of 1 and of 3 steps: the longer one counts for three
    two = replace(make_point(), lengths=RequestLengths([(6, 1), (6, 3)]))
    assert held_tokens(two, 4) == (8 + 8 + 8 + 8) / 4


def test_as_many_run_as_are_in_flight_allowed_or_held() -> None:
    paged, large, whole = (point(f"{n}/{MIXED}") for n in ("paged", "large-blocks", "contiguous"))
    assert {p.kv_room_tokens for p in (paged, large, whole)} == {1536}
    assert admitted(whole) == 6
    assert admitted(paged) == 16 < (1536 - 32) / held_tokens(paged, 32)
    assert admitted(large) == pytest.approx((1536 - 128) / held_tokens(large, 128))
    assert admitted(whole) < admitted(large) < admitted(paged)
    few = replace(paged, load=paged.load.model_copy(update={"users": 2}))
    assert admitted(few) == 2


def test_twice_the_heads_hold_half_the_tokens() -> None:
    assert predicted("heads") == 2
    # per step at one context: 2,000 bytes of weights, and 32 or 64 bytes for each token
    tokens = 2048 + 8
    assert predicted("context") == pytest.approx((2000 + 32 * tokens) / (2000 + 64 * tokens))


@pytest.mark.parametrize("scale", ["cpu", *(f"gpu-{c.gb}" for c in gpus.CLASSES)])
@pytest.mark.parametrize("random", [False, True], ids=["real", "random"])
def test_the_limit_of_contiguous_allocation_is_the_capacity_by_the_longest(
    scale: str, random: bool
) -> None:
    """And all variants of it hold as many tokens, in fewer or more blocks."""
    lab = LABS["paged-kv"].at(scale, quick=False, dummy=random)
    flags = {v.name: lab.flags_of(v) for v in lab.variants}
    sizes = {
        name: flags[name].num_gpu_blocks_override * flags[name].block_size
        for name in ("paged", "large-blocks", "contiguous")
    }
    (tokens,) = set(sizes.values())
    whole = flags["contiguous"]
    assert whole.max_num_seqs == tokens // whole.max_model_len
    # all in flight fit into small blocks, and not into large ones
    (mixed,) = (w for w in lab.workloads if w.name == "mixed")
    assert mixed.longest_tokens <= whole.max_model_len
    paged, large = (
        point(f"{n}/mixed/{mixed.loads[0].name}", lab) for n in ("paged", "large-blocks")
    )
    assert whole.max_num_seqs < admitted(large) < admitted(paged) == paged.load.users


def test_what_to_turn_next_keeps_the_capacity() -> None:
    """A knob of two flags changes both sides of what it compares, and no more."""
    for scale in ("cpu", "gpu-80"):
        knobs = LABS["paged-kv"].at(scale, quick=False).next_knobs
        halved = next(k for k in knobs if "halves" in k)
        size, blocks = (int(n) for n in re.findall(r"(?:size|override)=(\d+)", halved))
        paged = point(f"paged/{MIXED}") if scale == "cpu" else None
        assert size * blocks == (paged.kv_room_tokens if paged else 8192)


# -------------------------------------------------------------------------------- the allocator


def test_one_request_alone_holds_whole_blocks() -> None:
    done = replay([(3, 4)] * 400, 1, 100, 4)  # of 3 to 6 tokens
    assert done
    assert (done.running, done.preempted) == (1, 0)
    assert done.written_tokens == pytest.approx((3 + 4 + 5 + 6) / 4, rel=0.01)
    assert done.held_tokens == pytest.approx((4 + 4 + 8 + 8) / 4, rel=0.01)
    assert done.wasted_tokens == pytest.approx(6 - 4.5, rel=0.02)


def test_blocks_of_a_token_waste_nothing_and_contiguous_allocation_the_rest() -> None:
    lengths = [(8, 8), (8, 24)] * 40
    exact = replay(lengths, 16, 256, 1)
    whole = replay(lengths, 16, 256, 1, stretch_tokens=64)
    assert exact
    assert whole
    assert exact.useful == 1
    assert whole.running == pytest.approx(4)  # 256 / 64
    assert whole.preempted == 0
    assert whole.useful < 0.5 < exact.running / 16


def test_half_a_block_is_wasted_where_lengths_are_spread_evenly() -> None:
    lengths = [(p, 32) for p in range(1, 129)]
    done = replay(lengths, 8, 10_000, 32)
    assert done
    assert done.wasted_tokens == pytest.approx((32 - 1) / 2, rel=0.05)


def test_the_newest_gives_its_blocks_back_and_keeps_what_it_has_written() -> None:
    """Two of 2 tokens fit into 7 until each has 4; alone the elder grows to 7.

    The other comes back with its 4 tokens once the first has ended, and so does the next.
    """
    done = replay([(2, 6)] * 40, 2, 7, 1)
    assert done
    assert done.preempted > 0
    assert done.held_tokens <= 7
    # no step is done twice: each request takes its six
    in_all = replay([(2, 6)] * 40, 1, 7, 1)
    assert in_all
    assert done.running > in_all.running == 1


def test_what_never_fits_or_never_waits_has_no_replay() -> None:
    assert replay([(8, 8)], 1, 15, 1) is None
    assert replay([(8, 8)], 1, 16, 1) is None


def test_with_a_watermark_the_second_waits_until_so_much_is_free() -> None:
    """Two of 2 tokens do not fit into 7 once they have grown; with 4 kept free none is preempted.

    The first alone holds 2 to 7 tokens, so that the next comes when it has gone.
    """
    done = replay([(2, 6)] * 40, 2, 7, 1, kept_free_tokens=4)
    assert done
    assert (done.running, done.preempted) == (1, 0)
    without = replay([(2, 6)] * 40, 2, 7, 1)
    assert without
    assert without.preempted > 0


def test_a_watermark_is_rounded_down_to_whole_blocks() -> None:
    assert [kept_free_blocks(0.05, n) for n in (12, 19, 20, 48)] == [0, 0, 1, 2]


@pytest.mark.parametrize("scale", ["cpu", *(f"gpu-{c.gb}" for c in gpus.CLASSES)])
def test_the_lab_is_sent_what_grows_beyond_the_cache_and_a_watermark_spares_it(scale: str) -> None:
    lab = LABS["paged-kv"].at(scale, quick=False)
    (growing,) = (w for w in lab.workloads if w.name == "growing")
    paged, treated = (
        point(f"{n}/growing/{growing.loads[0].name}", lab) for n in ("paged", "watermark")
    )
    assert growing.longest_tokens <= paged.flags.max_model_len
    without, kept_free = replayed(paged), replayed(treated)
    assert without
    assert kept_free
    assert without.preempted > 20
    assert kept_free.preempted < 0.7 * without.preempted
    assert kept_free.running > 0.9 * without.running


# ---------------------------------------------------------------------------- what is told of it


def found(home: Path) -> Context:
    """A run in which `paged` runs 2.5 times as many as `contiguous`; `mha` has two KV heads."""
    two = LAB.points(SHAPE, CEILINGS, {"mha": replace(SHAPE, kv_heads=2)})
    measured = context(home, LAB, {
        f"paged/{MIXED}": {"batch": 15.0, "kv_capacity_tokens": 1536},
        f"large-blocks/{MIXED}": {"batch": 10.0},
        f"contiguous/{MIXED}": {"batch": 6.0},
        f"paged/{GROWING}": {"preemptions": 40.0, "itl_p99_s": 0.4, "ttft_mean_s": 0.5},
        f"watermark/{GROWING}": {"preemptions": 20.0, "itl_p99_s": 0.4, "ttft_mean_s": 1.0},
        f"gqa/{NEAR}": {"tpot_mean_s": 0.040, "kv_capacity_tokens": 7264},
        f"gqa/{FAR}": {"tpot_mean_s": 0.0592},
        f"mha/{NEAR}": {"tpot_mean_s": 0.041, "kv_capacity_tokens": 3616},
        f"mha/{FAR}": {"tpot_mean_s": 0.0794},
    })  # fmt: skip
    return replace(measured, points=two)


def test_allocations_are_told_by_arithmetic_replayed_and_measured(tmp_path: Path) -> None:
    told = ALLOCATOR.finding(found(tmp_path))
    names = [row[0] for row in cells(told, 0)]
    assert names == ["contiguous", *(f"blocks of {b}" for b in (256, 128, 64, 32, 16, 8, 1))]
    by_name = {row[0]: row for row in cells(told, *range(8))}
    assert by_name["contiguous"][4:] == ["6", "6", "6", "`contiguous`"]
    assert by_name["blocks of 32"][3] == "15.5 tok"
    assert by_name["blocks of 32"][6:] == ["15", "`paged`"]
    assert by_name["blocks of 1"][1:4] == ["100%", "0 tok", "0 tok"]
    assert by_name["blocks of 1"][6:] == ["–", "–"]
    assert "measured 2.5 times with 16 in flight" in told.lines[0]


def test_on_a_gpu_too_allocations_and_their_answers_are_told(tmp_path: Path) -> None:
    """There every engine has `max-num-seqs`; the limit of `contiguous` alone is its own."""
    lab = LABS["paged-kv"].at("gpu-80", quick=False)
    run = context(tmp_path, lab, {
        f"{name}/mixed/concurrent-28": {"batch": batch}
        for name, batch in (("paged", 26.0), ("large-blocks", 20.0), ("contiguous", 8.0))
    })  # fmt: skip
    facts = ALLOCATOR.facts(run)
    assert facts
    assert facts.contiguous
    assert (facts.contiguous.variant, facts.contiguous.measured) == ("contiguous", 8)
    assert [(a.variant, a.block) for a in facts.served] == [("paged", 16), ("large-blocks", 256)]
    claims = {"admitted": 3.0, "throughput": 2.0, "blocks": 1.8}
    judged_one = judged_run(run, [judged(name, ratio) for name, ratio in claims.items()])
    assert block_size(judged_one)
    assert contiguous(judged_one)
    assert tiles_or_pages(judged_one)


def test_the_smaller_the_block_the_more_run(tmp_path: Path) -> None:
    facts = ALLOCATOR.facts(found(tmp_path))
    assert facts
    running = [a.replayed.running for a in facts.all]
    assert running[1:] == sorted(running[1:])
    assert running[0] == 6
    for allocation in facts.all:  # what is preempted has left: the replay is below the arithmetic
        assert allocation.replayed.running == pytest.approx(allocation.admitted, rel=0.15)


def test_without_measurements_nothing_is_said_to_be_measured() -> None:
    whole, paged = (replay([(8, 8)] * 40, 16, 128, 4, stretch) for stretch in (64, 0))
    assert whole
    assert paged
    facts = Allocations(16, 128, 64, (
        Allocation(0, 2, whole, "contiguous", None), Allocation(4, 9, paged, "paged", 6.0),
    ))  # fmt: skip
    assert "measured" not in (gain_sentence(facts) or "measured")
    assert len(tell_allocator(facts).rows) == 3
    assert tell_allocator(None).rows == tell_heads(None).rows == tell_tiles(None).rows == []


def test_a_watermark_is_told_replayed_and_measured(tmp_path: Path) -> None:
    told = WATERMARK.finding(found(tmp_path))
    assert [row[:2] for row in cells(told, 0, 1)] == [
        ["0", "0 of 48"], ["0.02", "0 of 48"], ["0.05", "2 of 48"], ["0.1", "4 of 48"],
        ["0.2", "9 of 48"],
    ]  # fmt: skip
    by_share = {row[0]: row[1:] for row in cells(told, 0, 3, 6, 9, 11)}
    assert by_share["0"][1:] == ["40", "400 ms", "`paged`"]
    assert by_share["0.05"][1:] == ["20", "400 ms", "`watermark`"]
    assert by_share["0.02"] == [by_share["0"][0], "–", "–", "–"]  # rounded down, so the same
    assert told.lines[0].startswith(
        "A watermark of 0.05 keeps 2 of 48 blocks free: 20 preemptions in a trial instead of 40,"
        " 0.50x (0.50 to 0.50). Relative to no watermark: p99 of ITL 1.00x"
    )
    assert "TTFT 2.00x" in told.lines[0]
    assert tell_watermarks(None).rows == []


def test_heads_are_told_with_bytes_capacity_and_slope(tmp_path: Path) -> None:
    """From 136 to 2,056 tokens are 1,920: 19.2 ms with one KV head, 38.4 ms with two."""
    told = HEADS.finding(found(tmp_path))
    assert cells(told, 0, 1, 2, 3, 4) == [
        ["multi-head (MHA)", "2", "64", "3,616", "measured"],
        ["multi-query (MQA)", "1", "32", "7,264", "measured"],
    ]
    assert [row[0] for row in cells(told, 7)] == ["20 ms", "10 ms"]


def test_a_number_of_heads_that_was_not_run_is_arithmetic(tmp_path: Path) -> None:
    run = found(tmp_path)
    wide = replace(SHAPE, heads=4, kv_heads=2)
    points = LAB.points(wide, CEILINGS, {"mha": replace(wide, kv_heads=4)})
    rows = cells(HEADS.finding(replace(run, points=points)), 0, 1, 4, 7)
    assert rows[1] == ["grouped (GQA)", "2", "measured", "10 ms"]
    assert rows[2] == ["multi-query (MQA)", "1", "arithmetic", "–"]


def test_on_a_gpu_one_head_for_all_is_served_too(tmp_path: Path) -> None:
    lab = LABS["paged-kv"].at("gpu-80", quick=False)
    wide = replace(SHAPE, heads=4, kv_heads=2)
    weights = {"mha": replace(wide, kv_heads=4), "mqa": replace(wide, kv_heads=1)}
    points = lab.points(wide, CEILINGS, weights)
    (claim,) = (c for c in lab.claims if c.name == "one-head")
    ((one, grouped),) = lab.pairs(claim, points)
    assert (one.variant.name, factors(one, grouped)) == ("mqa", ["weights"])
    assert claim.predict(one, grouped).value == pytest.approx(2, rel=0.01)
    measured = context(tmp_path, lab, {
        f"{name}/near/concurrent-1": {"tpot_mean_s": 0.01, "kv_capacity_tokens": tokens}
        for name, tokens in (("mha", 1000), ("gqa", 2000), ("mqa", 4000))
    })  # fmt: skip
    rows = cells(HEADS.finding(replace(measured, points=points)), 0, 3, 4)
    assert rows[-1] == ["multi-query (MQA)", "4,000", "measured"]
    run = judged_run(measured, [judged("heads", 2.0), judged("one-head", 2.0)])
    assert (heads_saved(run) or "").endswith("one for all beside grouped: 2.00x (1.82 to 2.20)"
                                             " the tokens.")  # fmt: skip
    assert "mqa" not in [v.name for v in LAB.variants]  # on a CPU


def test_traffic_is_arithmetic_and_requests_do_not_depend_on_it(tmp_path: Path) -> None:
    """2 layers, 2,048 tokens: Q and O of 2 heads, K and V of 1, of 4 numbers of 2 bytes."""
    facts = TILES.facts(found(tmp_path))
    assert facts
    assert facts.inputs_bytes == 2 * 2048 * (2 * 2 + 2 * 1) * 4 * 2
    assert facts.scores_bytes == 2 * 2 * 2048**2 * 4 * 2
    rows = cells(tell_tiles(facts), 0, 1, 4, 5)
    assert [row[2] for row in rows] == ["6", "15", "6", "15"]
    assert [row[3] for row in rows] == ["no: arithmetic"] * 2 + ["emulated", "yes"]


def test_each_question_has_its_answer(tmp_path: Path) -> None:
    claims = {"admitted": 3.0, "throughput": 2.0, "blocks": 1.8, "step": 1.0, "heads": 2.0,
              "context": 0.7}  # fmt: skip
    run = judged_run(found(tmp_path), [judged(name, ratio) for name, ratio in claims.items()])
    assert (text := heads_saved(run))
    assert "32 bytes; with one for each query head 64, 2 times as many" in text
    assert "2.00x (1.82 to 2.20) the tokens in the same memory" in text
    assert (text := block_size(run))
    assert "tokens with blocks of 32, " in text
    assert "tokens with blocks of 128)" in text
    assert "1.80x" in text
    assert "20 preemptions in a trial instead of 40" in text
    assert (text := contiguous(run))
    assert text.startswith("It reserves 256 tokens")
    assert "2.00x (1.82 to 2.20) the throughput" in text
    assert (text := tiles_or_pages(run))
    assert "3.00x" in text
    assert "(arithmetic: every kernel here tiles)" in text


def test_what_no_engine_measured_is_said_to_be_arithmetic(tmp_path: Path) -> None:
    run = judged_run(context(tmp_path, LAB, {}))
    text = heads_saved(run)
    assert text
    assert text.endswith("(arithmetic).")
    assert (block_size(run), contiguous(run), tiles_or_pages(run)) == (None, None, None)
