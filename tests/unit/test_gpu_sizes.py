"""The labs' sizes on GPUs, on the cards of every class of memory, as their datasheets have them."""

from __future__ import annotations

import functools
from statistics import mean

import pytest

from labs import FIRST, LABS
from labs.chunked_prefill.lab import long_ttft_s
from labs.harness.derived.offloading import EXAMPLE_CARD, EXAMPLE_MODEL, EXAMPLE_TOKENS, on_one_card
from labs.harness.spec import theory
from labs.harness.spec.lab import Lab, Point, factors
from labs.harness.spec.page import GPU, page_of
from labs.prefix_caching.lab import cached_tokens
from labs.single_stream.lab import least_s
from loadtests.plan import LEAST_COUNTED
from serving.hardware.gpus import CLASSES, DATASHEETS
from serving.hardware.machine import Ceilings
from serving.models import dummy
from serving.models.catalog import Shape, shape_of
from serving.simulator import cards
from serving.simulator.datasheet import EXPECTED, MOST_EFFICIENT
from tests.cases import each
from tests.default_models import config_of

CARDS = {  # name -> class of memory in GB, bytes/s, dense BF16 FLOP/s, FP8 FLOP/s
    "RTX A4000": (16, 448e9, 76.7e12, None),
    "L4": (24, 300e9, 121e12, 242e12),
    "A10G": (24, 600e9, 70e12, None),
    "RTX 4090": (24, 1008e9, 165e12, 330e12),
    "A40": (48, 696e9, 150e12, None),
    "RTX A6000": (48, 768e9, 155e12, None),
    "L40S": (48, 864e9, 362e12, 733e12),
    "A100": (80, 2040e9, 312e12, None),
    "H100": (80, 3350e9, 989e12, 1979e12),
    "H200": (141, 4800e9, 989e12, 1979e12),
}
EVERY_CARD = each("card", CARDS)
EVERY_MODEL = each("random", [False, True])  # weights


def ceilings_of(card: str, reading: float, computing: float) -> Ceilings:
    """Those that a card reaches with these shares of its datasheet."""
    _, bandwidth, bf16, fp8 = CARDS[card]
    return Ceilings(
        memory_bandwidth_bytes_per_s=reading * bandwidth,
        bf16_flops_per_s=computing * bf16,
        fp8_flops_per_s=fp8 and computing * fp8,
        threads=1, torch="-", measured_at="-",
    )  # fmt: skip


def expected_on(card: str) -> Ceilings:
    return ceilings_of(card, EXPECTED.reading, EXPECTED.computing)


@functools.cache
def shape_on(card: str, random: bool) -> Shape:
    """The model that a card serves by default."""
    (of,) = (c for c in CLASSES if c.gb == CARDS[card][0])
    return shape_of(dummy.config_of(of.dummy) if random else config_of(of.model))


def lab_on(name: str, card: str, random: bool, quick: bool = False) -> Lab:
    return resolved(name, CARDS[card][0], random, quick)


@functools.cache
def resolved(name: str, gb: int, random: bool, quick: bool) -> Lab:
    """What a lab is on all cards of a class."""
    return LABS[name].at(f"gpu-{gb}", quick, dummy=random)


def points_on(lab: Lab, card: str, random: bool) -> list[Point]:
    return lab.points(shape_on(card, random), expected_on(card))


def test_every_class_has_a_card() -> None:
    assert {gb for gb, *_ in CARDS.values()} == {c.gb for c in CLASSES}


@each("quick", [False, True])
@EVERY_MODEL
@EVERY_CARD
def test_a_long_prompt_is_prefilled_well_before_the_next_one(
    card: str, random: bool, quick: bool
) -> None:
    """In its smallest pieces too; and the window is as long as its figures need."""
    lab = lab_on("chunked-prefill", card, random, quick)
    for point in points_on(lab, card, random):
        assert point.load.kind == "contended"
        assert long_ttft_s(point) < 0.35 * point.load.every_s, point.key
        assert lab.window_s > LEAST_COUNTED * point.load.every_s


@EVERY_MODEL
@EVERY_CARD
def test_long_requests_of_one_user_do_not_run_out(card: str, random: bool) -> None:
    """There are twice as many as the fastest engine that is expected could answer in a trial."""
    lab = lab_on("tiled-attention", card, random)
    ceilings = ceilings_of(card, MOST_EFFICIENT.reading, MOST_EFFICIENT.computing)
    for point in lab.points(shape_on(card, random), ceilings):
        assert point.load.users == 1
        prefix = point.workload.prefix
        cached_tokens = prefix.tokens if prefix else 0
        request_s = theory.prefill_left_s(
            point.shape, ceilings, point.prompt_tokens, cached_tokens
        ) + (point.output_tokens - 1) * theory.decode_step_s(
            point.shape, ceilings, 1, point.context_tokens
        )
        steps_s = point.output_tokens * MOST_EFFICIENT.step_s
        sent = (lab.warmup_s + lab.window_s) / (request_s + steps_s)
        assert 2 * sent < lab.requests, point.key


@EVERY_MODEL
@EVERY_CARD
def test_prompts_that_return_were_evicted_and_are_all_in_the_hosts_memory(
    card: str, random: bool
) -> None:
    """And copying them back is forecast to pay, over the slowest link that a card has."""
    lab = lab_on("kv-quantization", card, random)
    at = {p.variant.name: p for p in points_on(lab, card, random) if p.workload.name == "returning"}
    recompute, offload = at["recompute"], at["offload"]
    prefix = offload.workload.prefix
    assert prefix is not None
    prompt_bytes = offload.prompt_tokens * offload.shape.kv_bytes_per_token()
    # one that runs fits, and so many fewer than come in turn that none is left as it returns
    assert prompt_bytes < recompute.flags.kv_cache_memory_bytes < (prefix.groups - 1) * prompt_bytes
    assert 1.2 * prefix.groups * prompt_bytes < offload.flags.kv_offloading_bytes
    assert offload.flags.kv_offloading_bytes <= 16 * 2**30
    assert factors(offload, recompute) == ["--kv-offloading-size"]
    (claim,) = (c for c in lab.claims if c.name == "returning")
    assert claim.predict(offload, recompute).value < 0.5
    assert not [v for v in LABS["kv-quantization"].at("cpu", quick=False).variants
                if v.name in at]  # fmt: skip


@EVERY_MODEL
@EVERY_CARD
@each(
    ("name", "workload"),
    [("kv-quantization", "far"), ("context-retrieval", "far"), ("diagnosis", "context")],
)
def test_long_contexts_are_each_users_own_and_fit_the_cache(
    card: str, random: bool, name: str, workload: str
) -> None:
    """One that all share would be read once from memory, and by the others from the L2."""
    for point in points_on(lab_on(name, card, random), card, random):
        if point.workload.name != workload:
            continue
        flags, prefix, users = point.flags, point.workload.prefix, point.load.users
        assert prefix
        assert prefix.groups == users
        kv_bytes = flags.kv_cache_memory_bytes
        room = theory.kv_tokens(point.shape, kv_bytes, flags.kv_value_bytes, block=16)
        assert users * max(map(sum, point.lengths)) < room, point.key


DRAFTS = {  # class of memory -> weights of the published draft and KV of a token, in bytes
    16: (0.99e9, 12_288),
    24: (0.99e9, 12_288),
    80: (2.47e9, 32_768),
    141: (15.2e9, 57_344),
}


@each("card", [card for card, (gb, *_) in CARDS.items() if gb in DRAFTS])
def test_verifying_guesses_is_not_free_in_the_largest_batch(card: str) -> None:
    lab = lab_on("speculative-decoding", card, random=False)
    weight_bytes, _ = DRAFTS[CARDS[card][0]]
    points = lab.points(
        shape_on(card, False), expected_on(card), about={"draft": {"weight_bytes": weight_bytes}}
    )
    (claim,) = (c for c in lab.claims if c.name == "draft-crowd")
    ((treatment, baseline),) = lab.pairs(claim, points)
    assert claim.expect == "rises"
    assert claim.predict(treatment, baseline).value > 1 + claim.margin


@EVERY_MODEL
@each("gb", [c.gb for c in CLASSES])
def test_every_batch_of_guesses_fits_the_cache(gb: int, random: bool) -> None:
    """And the plain batches, without a draft, are as large as what is verified there."""
    card = next(name for name, (of, *_) in CARDS.items() if of == gb)
    lab, shape = lab_on("speculative-decoding", card, random), shape_on(card, random)
    memory_bytes = lab.all_flags[0].kv_cache_memory_bytes
    own = shape.kv_bytes_per_token()
    # random weights' draft has an eighth of the layers
    draft = own / 8 if random else DRAFTS.get(gb, (0, 0))[1]
    for workload in lab.workloads:
        per_token = own if workload.only == ("none",) else own + draft
        most = max(load.users for load in workload.loads)
        assert most * workload.longest_tokens * per_token <= memory_bytes, workload.name
    largest = {w.name: max(load.users for load in w.loads) for w in lab.workloads}
    assert largest["crowd"] >= 6 * largest["story"]


@EVERY_MODEL
@EVERY_CARD
def test_three_waves_end_in_a_window(card: str, random: bool) -> None:
    lab = lab_on("continuous-batching", card, random)
    points = points_on(lab, card, random)
    (wave,) = (p for p in points if str(p.load) == "waves:32" and p.workload.name == "exponential")
    outputs = [output for _, output in wave.lengths]
    longest = mean(max(outputs[i : i + 32]) for i in range(0, len(outputs), 32))
    half_full = 16  # places, on average, until the longest answer of a wave ends
    step_s = theory.decode_step_s(wave.shape, wave.ceilings, half_full, wave.context_tokens)
    assert lab.window_s > 2.8 * longest * (step_s + EXPECTED.step_s)


@pytest.mark.parametrize("name", ["continuous-batching", "structured-output"])
@EVERY_MODEL
@EVERY_CARD
def test_short_requests_do_not_run_out(name: str, card: str, random: bool) -> None:
    lab = lab_on(name, card, random)
    for point in points_on(lab, card, random):
        if point.load.open_loop:
            continue
        step_s = theory.decode_step_s(
            point.shape, point.ceilings, point.load.users, point.context_tokens
        )
        request_s = theory.prefill_s(point.shape, point.ceilings, point.prompt_tokens)
        request_s += point.output_tokens * (step_s + EXPECTED.step_s) / point.load.users
        sent = (lab.warmup_s + lab.window_s) / request_s
        assert sent + point.load.users < lab.requests, point.key


@EVERY_MODEL
@EVERY_CARD
def test_what_a_claim_expects_to_be_equal_is_so_by_its_formula(card: str, random: bool) -> None:
    """A short context in 8 bits, and adapters of another rank."""
    of_layers = shape_on(card, random)
    width = of_layers.heads * of_layers.head_dim + of_layers.kv_heads * of_layers.head_dim
    params = 8 * of_layers.layers * 2 * (2 * of_layers.hidden + width)
    about = {"adapters": {"params_per_adapter": params, "rank": 8}}
    for name, claimed in (("kv-quantization", "near"), ("multi-lora", "rank")):
        lab = lab_on(name, card, random)
        points = lab.points(of_layers, expected_on(card), about=about)
        (claim,) = (c for c in lab.claims if c.name == claimed)
        ((treatment, baseline),) = lab.pairs(claim, points)
        assert claim.expect == "unchanged"
        assert 1 / (1 + claim.margin) < claim.predict(treatment, baseline).value < 1 + claim.margin


@functools.cache
def alone_s(card: str, random: bool) -> float:
    """A step of one request alone, in seconds."""
    step_s = theory.decode_step_s(shape_on(card, random), expected_on(card), 1, 1024)
    return step_s + EXPECTED.step_s


@pytest.mark.parametrize("name", LABS)
@EVERY_MODEL
@EVERY_CARD
def test_an_objective_on_a_gpu_is_no_cpus_and_can_be_met(
    name: str, card: str, random: bool
) -> None:
    tpot_s = lab_on(name, card, random).slo.tpot_s
    assert 1.5 * alone_s(card, random) < tpot_s < LABS[name].slo.tpot_s


# ------------------------------------------------------------------- the sizes of a quick run

FEWER_BYTES = {"w8a8": 2, "fp8": 2, "w4a16-gptq": 4, "w4a16-awq": 4}  # a weight in BF16 has more


def fastest_s(point: Point) -> float:
    """The time of a request in flight on the whole of the datasheet: no engine is as fast."""
    flags, prefix, users = point.flags, point.workload.prefix, point.load.users
    step_s = theory.decode_step_s(point.shape, point.ceilings, users, point.context_tokens)
    step_s /= FEWER_BYTES.get(point.variant.weights, 1) * (2 if flags.kv_value_bytes == 1 else 1)
    if guessing := flags.speculative_config:
        step_s /= 1 + guessing["num_speculative_tokens"]
    cached = prefix.tokens if prefix and flags.enable_prefix_caching else 0
    prefill_s = theory.prefill_left_s(point.shape, point.ceilings, point.prompt_tokens, cached)
    eight_bits = point.variant.weights in ("w8a8", "fp8")
    return prefill_s / (2 if eight_bits else 1) + point.output_tokens * step_s / users


@pytest.mark.parametrize("name", FIRST)
@EVERY_MODEL
@EVERY_CARD
def test_requests_of_a_quick_run_do_not_run_out(name: str, card: str, random: bool) -> None:
    lab = lab_on(name, card, random, quick=True)
    for point in lab.points(shape_on(card, random), ceilings_of(card, 1, 1)):
        trial_s = lab.warmup_of(point.workload) + lab.window_s
        own = 3 / 4 if point.workload.intruder else 1  # every fourth is the intruder's
        sent = trial_s / fastest_s(point) + point.load.users
        prepared = lab.requests_of(point.workload)
        assert sent < own * prepared, point.key
        # what is sent beforehand is the first of each group
        assert not point.workload.prefix or point.workload.prefix.groups <= prepared


@pytest.mark.parametrize("name", FIRST)
@EVERY_MODEL
@EVERY_CARD
def test_all_that_a_quick_run_sends_at_once_fits_the_cache(
    name: str, card: str, random: bool
) -> None:
    """But for the points whose cache is short on purpose."""
    for point in points_on(lab_on(name, card, random, quick=True), card, random):
        workload, flags, users = point.workload, point.flags, point.load.users
        of_value = flags.kv_value_bytes
        room = theory.kv_tokens(point.shape, flags.kv_cache_memory_bytes, of_value, block=16)
        assert room > flags.max_model_len  # or the engine refuses to start
        if workload.name == "growing":
            assert of_value == 1 or users * point.context_tokens > room
            continue
        prefix, long = workload.prefix, workload.intruder
        shared = prefix.tokens if prefix and flags.enable_prefix_caching else 0
        contexts = min(users, prefix.groups) if prefix else 0
        own = workload.model_copy(update={"intruder": None}).longest_tokens - shared
        intruding = long.prompt_tokens + long.output_tokens if long else 0
        assert contexts * shared + intruding + users * own < room, point.key


@EVERY_MODEL
@EVERY_CARD
def test_a_quick_run_has_more_prefixes_than_fit_where_it_says_so(card: str, random: bool) -> None:
    points = points_on(lab_on("prefix-caching", card, random, quick=True), card, random)
    found = {p.workload.name: cached_tokens(p) for p in points if p.variant.name == "on"}
    assert found == {"share-0": 0, "share-90": 7200, "many": 0}


@EVERY_MODEL
@EVERY_CARD
def test_a_quick_run_claims_what_its_sizes_can_show(card: str, random: bool) -> None:
    """Of the cache in 8 bits: its long context and its short memory have other sizes."""
    lab = lab_on("kv-quantization", card, random, quick=True)
    points = points_on(lab, card, random)
    for claim in lab.claims:
        ((treatment, baseline),) = lab.pairs(claim, points)
        predicted = claim.predict(treatment, baseline).value
        assert (claim.expect == "rises") == (predicted > 1 + claim.margin), claim.name
        assert (claim.expect == "falls") == (predicted < 1 / (1 + claim.margin)), claim.name


def test_what_eager_costs_on_a_gpu_is_what_the_labs_formula_predicts_there() -> None:
    """The page and the forecast for an H100 tell one thing, and say of which step."""
    lab, h100 = lab_on("single-stream", "H100", random=True), ceilings_of("H100", 1, 1)
    points = lab.points(shape_on("H100", True), h100)
    page = page_of("single-stream")
    assert page
    said = page[GPU].named["KO-2"]
    for name in ("eager", "no-graphs"):
        (claim,) = (c for c in lab.claims if c.name == name)
        ((treatment, baseline),) = lab.pairs(claim, points)
        assert f"{claim.predict(treatment, baseline).value:.2f}x" in said
        assert f"{1e3 * least_s(baseline):.2f} ms" in said


@pytest.mark.parametrize(
    ("lab", "question"), [("prefix-routing", "SA-6"), ("agent-sessions", "SA-7")]
)
def test_a_long_prefill_on_a_gpu_is_the_example_of_every_page_with_its_band(
    lab: str, question: str
) -> None:
    example, page = on_one_card(), page_of(lab)
    assert page
    assert f"{example.tokens:,} tokens" in page[GPU].named[question]
    assert str(example.prefill_s) in page[GPU].named[question]


def test_no_prefill_of_the_example_is_extrapolated() -> None:
    config = dummy.config_of(EXAMPLE_MODEL)
    for times in cards.steps(config, shape_of(config), DATASHEETS[EXAMPLE_CARD]):
        assert times.attention
        assert times.attention.lengths[-1] >= EXAMPLE_TOKENS
