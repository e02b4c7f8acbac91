"""The lab of the paged KV cache: its arithmetic by hand, its allocator, its facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from labs import LABS
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.spec.lab import Lab, Point, RequestLengths, factors
from labs.paged_kv.facts import Allocations, HeadsCompared, facts
from labs.paged_kv.lab import admitted, held_tokens, replay, replayed
from labs.tiled_attention import facts as tiled_attention
from serving.hardware import gpus
from tests.unit.builders import CEILINGS, SHAPE, make_point
from tests.unit.judged import context, judged, judged_run, told_of

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


# ------------------------------------------------------------------------------------ the facts


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


def allocated(run: Context) -> Allocations:
    of = facts(judged_run(run)).allocator
    assert of
    return of


def heads(run: Context) -> HeadsCompared:
    of = facts(judged_run(run)).heads
    assert of
    return of


def test_allocations_are_by_arithmetic_replayed_and_measured(tmp_path: Path) -> None:
    of = allocated(found(tmp_path))
    assert [a.block for a in of.all] == [0, 256, 128, 64, 32, 16, 8, 1]
    by_block = {a.block: a for a in of.all}
    whole, small, exact = by_block[0], by_block[32], by_block[1]
    assert (whole.admitted, whole.running, whole.in_decode.value) == (6, 6, 6)
    assert (small.half_block.value, small.in_decode.value, small.variant) == (15.5, 15, "paged")
    assert (exact.useful.value, exact.wasted.value, exact.half_block.value) == (1, 0, 0)
    assert (exact.in_decode.known, exact.variant) == (False, None)
    assert (of.gain_measured.value, of.users) == (2.5, 16)
    assert of.gain_replayed.value == pytest.approx(small.running / 6)
    running = [a.running for a in of.all[1:]]
    assert running == sorted(running)  # the smaller the block, the more


def test_on_a_gpu_too_there_are_allocations_and_their_answers(tmp_path: Path) -> None:
    """There every engine has `max-num-seqs`; the limit of `contiguous` alone is its own."""
    lab = LABS["paged-kv"].at("gpu-80", quick=False)
    run = context(tmp_path, lab, {
        f"{name}/mixed/concurrent-28": {"batch": batch}
        for name, batch in (("paged", 26.0), ("large-blocks", 20.0), ("contiguous", 8.0))
    })  # fmt: skip
    of = allocated(run)
    assert of.contiguous
    assert (of.contiguous.variant, of.contiguous.in_decode.value) == ("contiguous", 8)
    assert [(a.variant, a.block) for a in of.served] == [("paged", 16), ("large-blocks", 256)]
    claims = {"admitted": 3.0, "throughput": 2.0, "blocks": 1.8}
    answers = told_of(with_claims(run, claims)).answers
    assert {"KV-4", "KV-5", "KO-3"} <= answers.keys()


def with_claims(run: Context, ratios: dict[str, float]) -> JudgedRun:
    return judged_run(run, [judged(name, ratio) for name, ratio in ratios.items()])


def test_a_watermark_is_replayed_and_measured(tmp_path: Path) -> None:
    of = facts(judged_run(found(tmp_path))).watermark
    assert of
    assert of.changed
    assert of.blocks == 48
    assert {k.watermark: k.blocks for k in of.all} == {0: 0, 0.02: 0, 0.05: 2, 0.1: 4, 0.2: 9}
    none, rounded_down = of.all[:2]
    assert rounded_down.preempted == none.preempted
    assert not rounded_down.served["preemptions"].known
    treated, untreated = of.changed.treated, of.changed.untreated
    assert (treated.variant, untreated.variant) == ("watermark", "paged")
    assert (treated.served["preemptions"].value, untreated.served["preemptions"].value) == (20, 40)
    assert [of.changed.preemptions.value, of.changed.itl_p99.value] == pytest.approx([0.5, 1])
    assert of.changed.ttft.value == pytest.approx(2)
    assert not of.changed.throughput.known


def test_heads_have_bytes_capacity_and_slope(tmp_path: Path) -> None:
    """From 136 to 2,056 tokens are 1,920: 19.2 ms with one KV head, 38.4 ms with two."""
    of = heads(found(tmp_path))
    assert [(h.kind, h.kv_heads, h.kv_bytes_per_token, h.capacity_tokens) for h in of.all] == [
        ("multi-head", 2, 64, 3616), ("multi-query", 1, 32, 7264),
    ]  # fmt: skip
    assert [h.per_thousand_s.value for h in of.all] == pytest.approx([0.02, 0.01])
    assert of.bytes_ratio.value == 2


def test_a_number_of_heads_that_was_not_run_is_arithmetic(tmp_path: Path) -> None:
    wide = replace(SHAPE, heads=4, kv_heads=2)
    points = LAB.points(wide, CEILINGS, {"mha": replace(wide, kv_heads=4)})
    of = heads(replace(found(tmp_path), points=points))
    assert (of.model.kind, of.model.is_measured) == ("grouped", True)
    assert (of.least.kind, of.least.is_measured) == ("multi-query", False)
    assert not of.least.per_thousand_s.known


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
    least = heads(replace(measured, points=points)).least
    assert (least.kind, least.capacity_tokens, least.is_measured) == ("multi-query", 4000, True)
    assert "mqa" not in [v.name for v in LAB.variants]  # on a CPU


def test_traffic_is_one_layers_by_the_rule_of_tiled_attention(tmp_path: Path) -> None:
    """2,048 tokens: Q and O of 2 heads, K and V of 1, of 4 numbers of 2 bytes; scores of 4."""
    run = judged_run(found(tmp_path))
    machine = run.run.machine.model_copy(update={"caches_bytes": {"L2": 2**20}})
    cached = replace(run, run=run.run.model_copy(update={"machine": machine}))
    of, unknown = facts(cached).tiles_and_pages, facts(run).tiles_and_pages
    assert of
    assert unknown
    inputs, scores = 2048 * (2 * 2 + 2 * 1) * 4 * 2, 2 * 2048**2 * 4
    assert of.untiled_traffic.value == pytest.approx((inputs + 4 * scores) / 1e6)
    assert not unknown.tiled_traffic.known
    assert (of.untiled_traffic, of.tiled_traffic) == tuple(
        tiled_attention.traffic(run.points[0], kernel, 2**20, 2048)
        for kernel in tiled_attention.KERNELS
    )
    assert (of.contiguous.value, of.paged.value) == (6, 15)
