"""The vocabulary of labs, and every lab of the list."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
from pydantic import ValidationError

from labs import FIRST, LABS
from labs.harness.analysis.checks.treatment import ARGUMENTS, ECHOED
from labs.harness.analysis.metrics import trial_metrics
from labs.harness.derived.lab_modules import findings_of, probes_of
from labs.harness.plan.resolve import require_no_reading
from labs.harness.reports.plots import plots_of
from labs.harness.spec.lab import (
    NO_TEXT,
    NOT_QUICK,
    WITHOUT,
    Arm,
    Evidence,
    Lab,
    LabError,
    Point,
    Variant,
    factors,
)
from labs.harness.spec.overrides import parse_changes
from labs.harness.spec.questions import QUESTIONS
from loadtests.arrivals import Concurrent
from loadtests.workload import Fixed, Workload
from serving import metrics
from serving.engines import DEFAULT_ENGINE, ENGINES
from serving.engines.vllm import KV_MEMORY
from serving.hardware import gpus
from serving.models import catalog
from tests.cases import each
from tests.unit.builders import (
    CEILINGS,
    SHAPE,
    changes_next,
    make_claim,
    make_lab,
    make_point,
    make_workload,
)

# ------------------------------------------------------------------------------------- resolving

LAYERED = make_lab(
    scales={"gpu": {"window_s": 20, "repeats": 5, "workloads.short.output_tokens.tokens": 64}},
    quick={"window_s": 1},
)


def outputs(lab: Lab) -> int:
    lengths = lab.workloads[0].output_tokens
    assert isinstance(lengths, Fixed)
    return lengths.tokens


def test_scale_lies_over_the_lab_quick_over_scale_and_changes_over_all() -> None:
    layers: list[tuple[str, bool, dict[str, Any]]] = [
        ("cpu", False, {}), ("gpu", False, {}), ("gpu", True, {}), ("gpu", True, {"window_s": 3}),
    ]  # fmt: skip
    resolved = [LAYERED.at(*layer) for layer in layers]
    assert [lab.window_s for lab in resolved] == [4, 20, 1, 3]
    assert [lab.repeats for lab in resolved] == [2, 5, 3, 3]
    assert [outputs(lab) for lab in resolved] == [4, 64, 64, 64]
    assert outputs(LAYERED) == 4


@each(
    ("changes", "message"),
    [
        ({"windw_s": 3}, "'windw_s': .* window_s.* name, "),
        ({"workloads.long.loads": []}, "'long'.* short"),
        ({"workloads.short.output_tokens.mean": 3}, "'mean'.* kind, tokens"),
        ({"workloads.short.loads": "[concurrent:1"}, r"^workloads\.short\.loads: .* list in JSON"),
        ({"requests": 1}, "^requests=1 .* SET=requests=2"),
        ({"window_s.x": 3}, "'x'.* none"),
        ({"scales.gpu": {}}, "'scales'"),
        ({"workloads.short": 3}, r"workloads\.short\.<field>="),
        ({"window_s": -1}, r"window_s: .* greater than 0 \(given -1\)"),
        ({"repeats": "many"}, r"repeats: .*\(given 'many'\)"),
        ({"variants": ["onn"]}, "^variants: .*'onn': .* on.* off, on$"),
        ({"workloads": ["long"]}, "^workloads: .*'long'.* short"),
        ({"claims": 5, "window_s": 3}, r"^claims: .* list in JSON \(given 5\)"),
        ({"variants": []}, "^variants: .* one.* off, on$"),
        ({"workloads.short.loads": ["bursty:8"]}, "concurrent:<users>"),
        ({"workloads.short.loads": ["concurrent:2000"]}, "1024"),
    ],
)
def test_change_that_does_not_fit_is_refused_with_what_would(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LabError, match=message):
        make_lab().at("cpu", quick=False, changes=changes)


def test_some_variants_and_workloads_are_kept_with_all_that_speaks_of_no_other() -> None:
    whole = LABS["kv-quantization"].at("cpu", quick=False)
    kept = ["fp8", "bf16"]
    some = LABS["kv-quantization"].at("cpu", quick=True, changes={"variants": kept})
    assert [v.name for v in some.variants] == ["bf16", "fp8"]  # in the lab's order
    assert [(w.name, w.only) for w in some.workloads] == [
        ("near", ("bf16", "fp8")), ("far", ("bf16", "fp8")),
    ]  # fmt: skip
    assert [c.name for c in some.claims] == [c.name for c in whole.claims if c.name != "batch"]
    assert {e.arm.variant for e in some.evidence} == set(kept)
    assert (some.probes, set(some.probed)) == (("quality-quick",), set(kept))
    near = LABS["kv-quantization"].at("cpu", True, {"variants": kept, "workloads": ["near"]})
    assert [c.name for c in near.claims] == ["capacity", "near"]
    tight = {"variants": ["bf16-tight"], "variants.bf16-tight.flags.max-num-seqs": 4}
    alone = LABS["kv-quantization"].at("cpu", True, tight)
    assert (alone.probes, alone.probed, alone.claims) == ((), (), ())
    assert alone.flags_of(alone.variants[0])["max-num-seqs"] == 4
    with pytest.raises(LabError, match="none of these variants"):
        LABS["kv-quantization"].at("cpu", True, tight | {"workloads": ["near"]})


def test_a_class_of_memory_lies_over_the_gpu_sizes() -> None:
    lab = make_lab(scales={"gpu": {"window_s": 20, "repeats": 5}, "gpu-24": {"window_s": 9}})
    resolved = [lab.at(scale, quick=False) for scale in ("gpu", "gpu-24", "gpu-80")]
    assert [(at.window_s, at.repeats) for at in resolved] == [(20, 5), (9, 5), (20, 5)]


def test_a_quick_run_on_a_gpu_may_have_sizes_of_its_own() -> None:
    own = {
        "gpu-24": {"window_s": 9}, "gpu-quick": {"window_s": 5}, "gpu-80-quick": {"window_s": 3},
    }  # fmt: skip
    lab = make_lab(scales=own, quick={"window_s": 1})
    assert [lab.at("gpu-80", quick).window_s for quick in (True, False)] == [3, lab.window_s]
    resolved = [lab.at(scale, quick) for scale in ("cpu", "gpu-24") for quick in (True, False)]
    assert [one.window_s for one in resolved] == [1, lab.window_s, 5, 9]
    quick = [lab.at(scale, quick=True) for scale in ("gpu-24", "cpu")]
    assert [(of.repeats, of.rounds, of.decides) for of in quick] == [
        (3, 3, ()), (3, 6, ("faster",))
    ]  # fmt: skip


BRIEF = make_lab(
    variants=(Variant(name="off"), Variant(name="on"), Variant(name="far", flags={"x": 1})),
    workloads=(make_workload(), make_workload(name="long", only=("far",)),
               make_workload(name="wide")),
    claims=(make_claim(), make_claim(name="far", treatment=Arm(variant="far", workload="wide"),
                                     baseline=Arm(variant="off", workload="wide"))),
    scales={"gpu-quick": {"without": ("far", "elsewhere")}, "gpu-80-quick": {"without": ("wide",)}},
)  # fmt: skip


def test_a_quick_run_may_do_without_some_parts_and_says_so() -> None:
    """What speaks of no other goes with them; a class adds to what its kind does without."""
    lab = BRIEF.at("gpu-24", quick=True)
    assert [v.name for v in lab.variants] == ["off", "on"]
    assert [w.name for w in lab.workloads] == ["short", "wide"]  # `long` was for `far` alone
    assert [c.name for c in lab.claims] == ["faster"]
    assert lab.left_out == (f"far, long: {NOT_QUICK}",)
    assert [w.name for w in BRIEF.at("gpu-80", quick=True).workloads] == ["short"]
    for scale in ("gpu-80", "cpu"):
        whole = BRIEF.at(scale, quick=False)
        assert (len(whole.variants), len(whole.workloads), whole.left_out) == (3, 3, ())


def test_what_a_scale_does_without_is_no_part_of_it() -> None:
    lab = BRIEF.model_copy(update={"scales": {"cpu": {"without": ["far"]}}})
    for quick in (True, False):
        on_cpu = lab.at("cpu", quick)
        assert [v.name for v in on_cpu.variants] == ["off", "on"]
        assert [c.name for c in on_cpu.claims] == ["faster"]
        assert on_cpu.left_out == ()
    assert lab.at("gpu-80", quick=False).variants[2].name == "far"


@pytest.mark.parametrize(
    ("changes", "variants", "workloads"),
    [
        ({"variants.far.flags.x": 2}, ["off", "on", "far"], ["short", "long"]),
        ({"variants": ["off", "far"]}, ["off", "far"], ["short", "long"]),
        ({"workloads": ["long", "short"]}, ["off", "on", "far"], ["short", "long"]),
        ({"workloads.wide.keep_text": True}, ["off", "on"], ["short", "wide"]),
        ({"window_s": 3}, ["off", "on"], ["short"]),
    ],
)
def test_a_quick_run_has_what_a_reader_names(
    changes: dict[str, Any], variants: list[str], workloads: list[str]
) -> None:
    lab = BRIEF.at("gpu-80", True, changes)
    assert [v.name for v in lab.variants] == variants
    assert [w.name for w in lab.workloads] == workloads


def test_fewer_requests_are_prepared_where_a_workload_says_so() -> None:
    few = make_workload(name="few").model_copy(update={"most_requests": 3})
    more = make_workload(name="more").model_copy(update={"most_requests": 99})
    lab = make_lab(workloads=(make_workload(), few, more), repeats=2)
    assert [lab.requests_of(w) for w in lab.workloads] == [8, 3, 8]
    lengths = {p.workload.name: len(p.lengths) for p in lab.points(SHAPE, CEILINGS)}
    assert lengths == {"short": 16, "few": 6, "more": 16}
    assert "most_requests" not in make_lab().resolved()["workloads"][0]  # recorded runs stand
    with pytest.raises(LabError, match=r"^workloads\.few\.most_requests=1 .* 2"):
        lab.at("cpu", False, {
            "workloads.few.most_requests": 1, "workloads.few.loads": ["concurrent:2"],
        })  # fmt: skip


def test_a_layer_may_lead_into_what_another_brought() -> None:
    """Also to a field that a digest leaves out while it is the default."""
    brought = {"workloads": [make_workload(name="other").model_dump()], "claims": ()}
    own = {"gpu": brought, "gpu-quick": {"workloads.other.most_requests": 5}}
    lab = make_lab(scales=own).at("gpu", quick=True)
    assert [lab.requests_of(w) for w in lab.workloads] == [5]


def test_a_quick_run_on_a_cpu_repeats_what_its_first_claim_compares_and_little_else() -> None:
    first = make_claim(
        treatment=Arm(variant="on", workload="short", load="concurrent:2"),
        baseline=Arm(variant="off", workload="short", load="concurrent:2"),
    )
    other = make_claim(name="one", treatment=Arm(variant="on", load="concurrent:1"),
                       baseline=Arm(variant="off", load="concurrent:1"))  # fmt: skip
    loads = tuple(Concurrent(users=users) for users in (1, 2, 4))
    short = make_workload().model_copy(update={"loads": loads})
    long = make_workload(name="long").model_copy(update={"loads": loads})
    third = Variant(name="third")
    lab = make_lab(
        variants=(Variant(name="off"), Variant(name="on"), third), claims=(first, other),
        workloads=(short, long),
    )  # fmt: skip

    def played(**changes: Any) -> dict[str, int]:
        at = lab.at("cpu", quick=True, changes=changes)
        return {p.key: at.repeats_of(p) for p in at.points(SHAPE, CEILINGS)}

    assert played() == {
        f"{name}/short/concurrent-{users}": repeats
        for name in ("off", "on")
        for users, repeats in ((1, 1), (2, 3))
    }
    assert lab.at("cpu", quick=True).left_out == (f"third, long: {NOT_QUICK}",)
    assert len(played(workloads=["long", "short"])) == 3 * (3 + 3)  # what a reader lists, whole
    assert any(key.startswith("third/") for key in played(**{"variants.third.flags.x": 1}))


def test_labs_go_on_until_their_claims_are_decided_quick_ones_with_little_time() -> None:
    lab = make_lab(repeats=5, most_repeats=10)
    at = [lab.at("cpu", False), lab.at("gpu-80", False), lab.at("cpu", True)]
    assert [(lab.looks, lab.rounds, lab.most_s, lab.starts) for lab in at] == [
        (2, 10, 420, 2), (2, 10, 1800, 2), (2, 6, 100, 1),
    ]  # fmt: skip
    longer = make_lab(scales={"gpu": {"most_s": 60}}, quick={"starts": 2})
    assert (longer.at("gpu", False).most_s, longer.at("cpu", True).starts) == (60, 2)


def test_points_that_no_claim_compares_may_be_played_fewer_times() -> None:
    claim = make_claim(
        treatment=Arm(variant="on", load="concurrent:2"),
        baseline=Arm(variant="off", load="concurrent:2"),
    )

    def repeats(**fields: Any) -> dict[str, int]:
        lab = make_lab(claims=(claim,), **fields)
        return {p.key: lab.repeats_of(p) for p in lab.points(SHAPE, CEILINGS)}

    compared = {f"{name}/short/concurrent-2": 5 for name in ("on", "off")}
    others = [f"{name}/short/concurrent-1" for name in ("on", "off")]
    assert repeats(repeats=5) == compared | dict.fromkeys(others, 5)
    assert repeats(repeats=5, curve_repeats=2) == compared | dict.fromkeys(others, 2)
    assert set(repeats(repeats=1, curve_repeats=2).values()) == {1}
    alone = make_lab(claims=(), repeats=5, curve_repeats=2)
    assert {alone.repeats_of(p) for p in alone.points(SHAPE, CEILINGS)} == {5}
    assert make_lab().digest() != make_lab(curve_repeats=2).digest()
    assert "curve_repeats" not in make_lab().resolved()  # those of recorded runs stand


def test_a_change_within_a_layers_value_leaves_the_layer_alone() -> None:
    lab = make_lab(scales={"gpu": {"flags": {"block-size": 16}}})
    changed = lab.at("gpu", quick=False, changes={"flags.block-size": 32})
    assert changed.flags["block-size"] == 32
    assert lab.at("gpu", quick=False).flags["block-size"] == 16


READ = make_lab(
    name="prefix-caching",
    probes=("quality", "salt"), findings=("quality",), needs_text=("quality",),
    quick={"window_s": 1},
)  # fmt: skip


def test_random_weights_leave_what_is_not_read_off_the_text() -> None:
    lab = READ.at("cpu", quick=True, dummy=True)
    assert (lab.probes, lab.findings, lab.window_s) == (("salt",), (), 1)
    assert lab.left_out == (f"quality: {NO_TEXT}",)
    assert READ.at("cpu", quick=False).left_out == ()
    assert make_lab().at("cpu", quick=False, dummy=True).left_out == ()


def test_a_lab_says_how_it_asks_random_weights_and_the_reader_has_the_last_word() -> None:
    longer = make_lab(dummy=lambda lab: lab.model_copy(update={"window_s": 7, "repeats": 3}))
    lab = longer.at("cpu", quick=False, changes={"repeats": 4}, dummy=True)
    assert (lab.window_s, lab.repeats) == (7, 4)
    assert longer.at("cpu", quick=False).digest() == make_lab().at("cpu", quick=False).digest()


def test_a_probe_that_reads_text_is_refused_on_random_weights_whoever_added_it() -> None:
    """A lab that asks of no text has nothing to leave out; a reader may still add a probe."""
    with pytest.raises(LabError, match=r"^quality: .* random weights"):
        READ.at("cpu", quick=False, changes={"probes": ["quality"]}, dummy=True)
    added = make_lab().at("cpu", quick=False, changes={"probes": ["quality"]}, dummy=True)
    with pytest.raises(LabError, match=r"^quality: .* random weights"):
        require_no_reading(added)
    require_no_reading(make_lab(name="prefix-caching", probes=("salt",)))


def test_set_reads_json_and_else_text() -> None:
    text = ' window_s=4  a.b=true\tload=waves:8 loads=["waves:8"] name= x=1=2 '
    assert parse_changes(text) == {
        "window_s": 4, "a.b": True, "load": "waves:8", "loads": ["waves:8"], "name": "", "x": "1=2",
    }  # fmt: skip
    assert parse_changes("") == {}

    with pytest.raises(LabError, match=r"'repeats' .*field=value"):
        parse_changes("window_s=4 repeats")


# ---------------------------------------------------------------------------------------- digest


def longer(point: Any, other: Any) -> Any:
    raise AssertionError("a digest calls nothing")


WORKLOAD = make_lab().workloads[0]


@each(
    "knob",
    [
        {"seed": 1},
        {"window_s": 5},
        {"requests": 9},
        {"slo": {"ttft_s": 2, "tpot_s": 0.1}},
        {"flags": {"max-model-len": 256}},
        {"variants": (Variant(name="off"), Variant(name="on"))},
        {"workloads": (WORKLOAD.model_copy(update={"loads": (Concurrent(users=3),)}),)},
        {"workloads": (WORKLOAD.model_copy(update={"output_tokens": Fixed(tokens=5)}),)},
        {"claims": (make_claim(metric="ttft_p50_s"),)},
        {"claims": (make_claim(expect="falls"),)},
        {"claims": (make_claim(predict=longer),)},
        {"evidence": ()},
    ],
)
def test_digest_changes_with_a_knob(knob: dict[str, Any]) -> None:
    assert make_lab(**knob).digest() != make_lab().digest()


@each(
    "prose",
    [
        {"title": "Another title"},
        {"question": "Another question?"},
        {"limits": {"cpu": "It is slow."}},
        {"next_knobs": ("SET=window_s=9 takes longer",)},
        {"claims": (make_claim(title="Another claim"),)},
    ],
)
def test_digest_stays_with_a_word(prose: dict[str, Any]) -> None:
    assert make_lab(**prose).digest() == make_lab().digest()


# ------------------------------------------------------------------------------ points and pairs


def test_points_are_every_variant_under_every_load_with_all_flags() -> None:
    points = make_lab().points(SHAPE, CEILINGS)
    assert [p.key for p in points] == [
        "off/short/concurrent-1", "off/short/concurrent-2",
        "on/short/concurrent-1", "on/short/concurrent-2",
    ]  # fmt: skip
    assert points[2].variant.flags == {"max-model-len": 128, "enable-prefix-caching": True}
    assert (points[0].prompt_tokens, points[0].output_tokens) == (6, 4)


def test_a_workload_may_be_for_some_variants_only() -> None:
    lab = make_lab(workloads=(make_workload(), make_workload(name="long", only=("on",))))
    keys = [p.key for p in lab.points(SHAPE, CEILINGS)]
    assert [k for k in keys if "long" in k] == ["on/long/concurrent-1"]
    assert len(keys) == 3


def test_a_variant_with_other_weights_has_another_shape() -> None:
    lab = make_lab(variants=(Variant(name="off"), Variant(name="on", weights="small")))
    smaller = replace(SHAPE, weight_bytes=500)
    points = lab.points(SHAPE, CEILINGS, {"on": smaller}, {"small": {"bits": 4}})
    assert [p.shape.weight_bytes for p in points] == [2000, 2000, 500, 500]
    assert {p.variant.weights for p in points} == {"", "small"}
    assert all(p.about == {"small": {"bits": 4}} for p in points)


def test_derived_models_are_those_of_weights_and_flags_once_each() -> None:
    guessing: dict[str, Any] = {"speculative-config": {"model": "<draft>", "method": "x"}}
    tenants: dict[str, Any] = {"lora-modules": ["a=<adapters>/a", "b=<adapters>/b"]}
    off, far, on = Variant(name="off", flags=guessing), Variant(name="far"), Variant(name="on")
    on = on.but("on", tenants, weights="w8a8")
    lab = make_lab(variants=(off, far.but("far", guessing), on))
    assert lab.derived() == ["draft", "adapters", "w8a8"]
    studying = lab.model_copy(update={"studies": ("outliers", "draft")})
    assert studying.derived() == ["draft", "adapters", "w8a8", "outliers"]
    assert make_lab().derived() == []


def paired(**arms: Arm) -> list[str]:
    lab = make_lab()
    pairs = lab.pairs(make_claim(**arms), lab.points(SHAPE, CEILINGS))
    return [f"{t.key.replace('/short/concurrent', '')} {b.key.replace('/short/concurrent', '')}"
            for t, b in pairs]  # fmt: skip


def test_pairs_meet_what_the_arms_say_and_agree_on_what_both_leave_open() -> None:
    assert paired() == ["on-1 off-1", "on-2 off-2"]
    assert paired(treatment=Arm(variant="on", load="concurrent:2")) == ["on-2 off-1", "on-2 off-2"]
    many, one = Arm(load="concurrent:2"), Arm(load="concurrent:1")
    assert paired(treatment=many, baseline=one) == ["off-2 off-1", "on-2 on-1"]
    assert paired(treatment=Arm(variant="on", kind="waves")) == []


@each(
    "naming",
    [
        {"claims": (make_claim(treatment=Arm(variant="best")),)},
        {"claims": (make_claim(baseline=Arm(variant="best")),)},
        {"evidence": (Evidence(arm=Arm(variant="best"), kind="rises", metric="x"),)},
        {"probed": ("best",)},
        {"workloads": (make_workload(only=("best", "on")),)},
    ],
)
def test_unknown_variant_is_refused(naming: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"\['best'\] .* tiny"):
        make_lab(**naming)


# ------------------------------------------------------------------------------ the labs we have

EVERY = pytest.mark.parametrize("lab", LABS.values(), ids=LABS)
CLASSES = [f"gpu-{c.gb}" for c in gpus.CLASSES]
SCALES = ["cpu", catalog.CPU_FP32, "gpu", *CLASSES]
SIZES = [*itertools.product(SCALES, (False, True), (False, True))]
RESOLVED = pytest.mark.parametrize("sizes", LABS, indirect=True, scope="module")
"""Each lab at each scale, in full and quick, with real and with random weights: all tests of a lab
follow each other, and share these and their points."""


@dataclass(frozen=True)
class Size:
    """A lab as it is resolved for a scale, with its points."""

    lab: Lab
    points: list[Point]
    told: str


def resolved(name: str, scale: str, quick: bool = False, dummy: bool = False) -> Lab:
    return resolved_once(name, scale, quick, dummy)


@functools.cache
def resolved_once(name: str, scale: str, quick: bool, dummy: bool) -> Lab:
    return LABS[name].at(scale, quick, dummy=dummy)


@pytest.fixture(scope="module")
def sizes(request: pytest.FixtureRequest) -> list[Size]:
    found = []
    for scale, quick, dummy in SIZES:
        lab = resolved(request.param, scale, quick, dummy)
        told = f"{scale}, {'quick' if quick else 'full'}, {'random' if dummy else 'real'} weights"
        found.append(Size(lab, real_points(lab), told))
    return found


# a shape and ceilings of a size that predictions make sense for
REAL = replace(
    SHAPE, layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64,
    params=135 * 10**6, matmul_params=135 * 10**6, weight_bytes=270 * 10**6,
)  # fmt: skip
HALF = replace(REAL, weight_bytes=135 * 10**6)
ABOUT = {
    "draft": {"weight_bytes": 27 * 10**6, "acceptance": 0.6},
    "adapters": {"params_per_adapter": 10**6, "rank": 8},
}


def real_points(lab: Lab) -> list[Point]:
    """With what would be known of the models it says it needs, and of no other.

    They have the lengths of one repeat: a claim's prediction takes their mean.
    """
    lab = lab.model_copy(update={"repeats": 1, "most_repeats": 0})
    weights = {v.name: HALF for v in lab.variants if v.weights}
    return lab.points(
        REAL, CEILINGS, weights, {name: ABOUT.get(name, {}) for name in lab.derived()}
    )


@RESOLVED
def test_every_claim_has_a_pair_and_a_prediction(sizes: list[Size]) -> None:
    for size in sizes:
        for claim in size.lab.claims:
            at, pairs = (claim.name, size.told), size.lab.pairs(claim, size.points)
            assert pairs, at
            assert all(0 < claim.predict(t, b).value < math.inf for t, b in pairs), at
        for forecast in size.lab.forecasts:
            at = (forecast.name, size.told)
            values = [forecast.predict(p).value for p in size.points if forecast.arm.matches(p)]
            assert values, at
            assert all(0 <= v < math.inf for v in values), at


def test_fp8_prefill_is_predicted_from_the_fp8_rate_that_was_measured() -> None:
    """10,464 FLOP of the linear layers at twice the rate; attention's and the head's as before."""
    lab = LABS["weight-quantization"].at("gpu", quick=False)
    predict = next(c.predict for c in lab.claims if c.name == "fp8-prefill")
    twice = CEILINGS.model_copy(update={"fp8_flops_per_s": 2 * CEILINGS.bf16_flops_per_s})
    for ceilings, expected in ((twice, (5232 + 1152 + 256) / 11_872), (CEILINGS, 1)):
        plain = replace(make_point(), ceilings=ceilings)
        quantized = replace(plain, variant=Variant(name="fp8", weights="fp8"))
        assert predict(quantized, plain).value == pytest.approx(expected)
    w4a16 = replace(plain, variant=Variant(name="w4", weights="w4a16-gptq"), ceilings=twice)
    assert predict(w4a16, replace(plain, ceilings=twice)).value == 1


@RESOLVED
def test_a_claim_changes_one_thing_or_says_why_not(sizes: list[Size]) -> None:
    for size in sizes:
        for claim in size.lab.claims:
            changed = [factors(*pair) for pair in size.lab.pairs(claim, size.points)]
            several = [names for names in changed if len(names) > 1]
            assert bool(several) == bool(claim.coupled), (claim.name, several, size.told)


@RESOLVED
def test_every_lab_runs_against_itself(sizes: list[Size]) -> None:
    for size in sizes:
        lab, twins = size.lab, size.lab.against_itself()
        base, twin = twins.variants
        assert twins.flags_of(base) == twins.flags_of(twin), size.told
        assert Lab.model_validate(dict(twins)) == twins, size.told
        of_twins = real_points(twins)
        most = len(size.points) - (len(lab.variants) > 2)
        assert len(of_twins) <= most or len(lab.variants) < 2, size.told
        for claim in twins.claims:
            assert claim.expect == "unchanged", size.told
            assert claim.metric in {c.metric for c in lab.claims}, size.told
            pairs = lab.pairs(claim, of_twins)
            assert pairs, size.told
            for treatment, baseline in pairs:
                assert factors(treatment, baseline) == [], size.told
                assert claim.predict(treatment, baseline).value == 1, size.told
        assert twins.digest() != lab.digest(), size.told


PROVED_BY: dict[str, tuple[str, ...]] = {  # flag -> metrics, or labels of the engines' logs
    "compilation-config": ("cudagraph_mode", "compilation_mode"),
    "structured-outputs-config": ("structured_outputs_backend",),
    "attention-config": ("max_num_splits",),
    "enable-lora": ("max_lora",),
    "hf-overrides": ("sliding_window",),
    "watermark": ("watermark",),
    "kv-offloading-size": (metrics.KV_LOADED_BYTES,),
}
BY_DOSE = {
    "speculative-config"
}  # tokens drafted and accepted (`labs/harness/analysis/expected_treatment.py`)
BY_ANSWERS = {"lora-modules"}  # each names the adapter that it came from


@RESOLVED
def test_every_flag_in_which_two_engines_differ_is_proved(sizes: list[Size]) -> None:
    """Asynchronous scheduling and kernels of attention were compared and proved by nothing."""
    for size in sizes:
        lab = size.lab
        asked = {(e.arm.variant, shown) for e in lab.evidence for shown in (e.metric, e.label)}
        for above, below in itertools.combinations(lab.variants, 2):
            if above.engine != below.engine or not ENGINES[above.engine].shown_metrics():
                continue  # of other engines, or of one without a log to read, the report says so
            flags = [lab.flags_of(v) for v in (above, below)]
            for flag in {f for own in flags for f in own if flags[0].get(f) != flags[1].get(f)}:
                if flag in {*ECHOED, *ARGUMENTS} | BY_DOSE | BY_ANSWERS:
                    continue
                setting = [v for v in (above, below) if flag in v.flags]
                assert setting, (flag, size.told)
                for variant in setting:
                    proofs = PROVED_BY.get(flag, ())
                    assert any((variant.name, shown) in asked for shown in proofs), (
                        f"nothing proves {flag} of {variant.name}: {size.told}"
                    )


@RESOLVED
def test_every_point_has_a_name_of_its_own_and_requests_for_its_users(sizes: list[Size]) -> None:
    for size in sizes:
        lab, points = size.lab, size.points
        assert len({p.key for p in points}) == len(points), size.told
        assert all(p.load.users <= lab.requests for p in points), size.told
        assert len({c.name for c in lab.claims}) == len(lab.claims), size.told


@EVERY
def test_names_in_a_lab_exist(lab: Lab) -> None:
    assert lab.answers
    assert set(lab.answers) <= QUESTIONS.keys()
    assert set(lab.plots) <= plots_of(lab.name).keys()
    assert {c.metric for c in lab.claims} | {f.metric for f in lab.forecasts} <= {*trial_metrics()}
    assert set(lab.probes) | set(lab.quick.get("probes", ())) <= probes_of(lab.name).keys()
    assert set(lab.findings) == set(findings_of(lab.name))
    pieces = {e.metric for e in lab.evidence if e.kind == "pieces"}
    assert pieces <= {*trial_metrics()}
    assert all(metrics.is_known(e.metric) for e in lab.evidence if e.metric not in pieces)
    assert all(bool(e.label) == (e.kind == "echoes") for e in lab.evidence)
    assert set(lab.scales) <= {*SCALES, "gpu-quick", *(f"{c}-quick" for c in CLASSES)}
    assert set(lab.limits) == {"cpu", "gpu"}


@EVERY
def test_a_quick_run_on_a_gpu_has_repeats_enough_for_an_interval(lab: Lab) -> None:
    """Most of its time goes into engine starts; one repeat gave next to no claim a verdict."""
    for scale in ("gpu", *CLASSES):
        quick = resolved(lab.name, scale, quick=True)
        assert (quick.repeats, quick.starts, quick.looks) == (3, 1, 1), scale
    assert lab.at("gpu-80", True, {"repeats": 1}).repeats == 1
    on_cpu = resolved(lab.name, "cpu", quick=True)
    assert (on_cpu.repeats, on_cpu.rounds, len(on_cpu.deciding)) == (3, 6, 1)
    assert not {"repeats", "most_repeats"} & lab.quick.keys()


def unsent(lab: Lab) -> set[str]:
    """The variants that no workload is for; their engines are only probed."""
    sent = {v.name for w in lab.workloads for v in lab.variants if not w.only or v.name in w.only}
    return {v.name for v in lab.variants} - sent


@EVERY
def test_a_quick_run_on_a_gpu_does_without_parts_that_the_lab_has(lab: Lab) -> None:
    for scale in ("gpu", *CLASSES):
        wholes = [resolved(lab.name, scale, dummy=dummy) for dummy in (False, True)]
        parts = {name for at in wholes for name in at._part_names()}
        of_quick = (lab.scales.get(f"{name}-quick", {}) for name in ("gpu", scale))
        assert {name for own in of_quick for name in own.get(WITHOUT, ())} <= parts
        for whole, dummy in zip(wholes, (False, True), strict=True):
            quick = resolved(lab.name, scale, quick=True, dummy=dummy)
            assert {c.name for c in quick.claims} <= {c.name for c in whole.claims}
            assert bool(quick.claims) == bool(whole.claims)
            assert unsent(quick) <= unsent(whole)  # no engine starts for nothing


@EVERY
def test_a_lab_repeats_as_often_as_its_intervals_were_tried_for(lab: Lab) -> None:
    on_cpu = resolved(lab.name, "cpu")
    assert 3 <= on_cpu.repeats <= 5  # of which the simulations speak
    # a lab that has no time for a second look spends its time on what it compares
    arms = [arm for claim in on_cpu.claims for arm in (claim.treatment, claim.baseline)]
    points = on_cpu.points(SHAPE, CEILINGS)
    only_compared = all(any(arm.matches(point) for arm in arms) for point in points)
    if on_cpu.looks == 1:
        assert on_cpu.curve_repeats > 0 or only_compared
    else:
        assert on_cpu.curve_repeats == 0


@EVERY
def test_what_needs_text_is_part_of_the_lab(lab: Lab) -> None:
    parts = {*lab.studies, *lab.probes, *lab.findings, *lab.plots, *lab.quick.get("probes", ())}
    assert {name.removesuffix("-quick") for name in lab.needs_text} <= parts
    require_no_reading(resolved(lab.name, "cpu", dummy=True))


@EVERY
def test_variants_differ_and_those_with_other_flags_show_it(lab: Lab) -> None:
    """Other weights show in no counter: the engine's command line on file names them.

    An engine without metrics shows nothing: the client's records prove its trials.
    """
    first, *others = lab.variants
    assert len({str((lab.flags_of(v), v.weights)) for v in lab.variants}) == len(lab.variants)
    assert len({v.name for v in lab.variants}) == len(lab.variants)
    flagged = [v for v in others if lab.flags_of(v) != lab.flags_of(first)]
    # how many pieces is each variant's own; any other evidence must say whose it is
    telling = [e for e in lab.evidence if e.arm.variant or e.kind == "pieces"]
    showing = [v for v in [first, *flagged] if ENGINES[v.engine].shown_metrics()]
    for variant in showing if flagged else []:
        assert any(e.arm.variant in (None, variant.name) for e in telling), variant.name


@EVERY
def test_what_to_turn_next_can_be_turned(lab: Lab) -> None:
    digest = resolved(lab.name, "cpu").digest()
    for knob, changes in changes_next(lab):
        turned = lab.at("cpu", quick=False, changes=changes)
        assert turned.digest() != digest, knob
        for evidence in turned.evidence:
            flag = next(
                (f for f, told in ECHOED.items() if told == (evidence.metric, evidence.label)), ""
            )
            for variant in (v for v in turned.variants if v.name == evidence.arm.variant):
                if flag in variant.flags and not str(evidence.value).startswith("--"):
                    assert str(variant.flags[flag]) == str(evidence.value), (
                        f"{knob}: its evidence says no"
                    )


@pytest.mark.parametrize("dummy", [False, True], ids=["real", "random"])
@pytest.mark.parametrize("name", FIRST)
def test_what_to_turn_next_fits_the_sizes_of_a_quick_run(name: str, dummy: bool) -> None:
    """It may name a part that a quick run does without, which then has it."""
    quick = resolved(name, "gpu-80", quick=True, dummy=dummy)
    digest = quick.digest()
    for knob, changes in changes_next(quick):
        turned = LABS[name].at("gpu-80", True, changes, dummy)
        assert turned.digest() != digest, knob
        longest = max(w.longest_tokens for w in turned.workloads)
        assert all(longest <= flags.max_model_len for flags in turned.all_flags), knob


def test_what_a_workload_has_not_is_set_as_a_whole() -> None:
    lab = LABS["continuous-batching"]

    def turned(text: str) -> Workload:
        changed = lab.at("cpu", quick=False, changes=parse_changes(text))
        return next(w for w in changed.workloads if w.name == "fixed")

    samples = turned('workloads.fixed.samples={"count":4,"together":true}').samples
    assert samples
    assert (samples.count, samples.together) == (4, True)
    both = turned('workloads.fixed.samples={"count":4} workloads.fixed.samples.count=2').samples
    assert both
    assert both.count == 2
    structured = turned('workloads.fixed.structure={"form":"record","imposed":false}').structure
    assert structured
    assert structured.form == "record"
    assert turned("workloads.fixed.priorities=[0,1]").priorities == (0, 1)
    with pytest.raises(LabError, match=r"workloads\.fixed\.samples="):
        turned("workloads.fixed.samples.count=4")
    plain = lab.at("cpu", quick=False)
    same = lab.at("cpu", quick=False, changes={"window_s": plain.window_s})
    assert same.digest() == plain.digest()


def test_engines_on_a_gpu_are_alike_where_a_lab_says_nothing_else() -> None:
    lab = make_lab(flags={"max-num-seqs": 4}, scales={"gpu-80": {"flags.max-model-len": 100}})
    assert lab.at("cpu", False).flags == {"max-num-seqs": 4}
    of_class = lab.at("gpu-80", False).flags
    assert (of_class["max-num-seqs"], of_class["max-model-len"]) == (4, 100)
    assert of_class["max-num-batched-tokens"] == 8192
    assert of_class["kv-cache-memory-bytes"] == 32 * 2**30
    assert "kv-cache-memory-bytes" not in lab.at("gpu", False).flags
    changed = lab.at("gpu-80", False, {"flags.max-num-batched-tokens": 64}).flags
    assert changed["max-num-batched-tokens"] == 64


@pytest.mark.parametrize("name", LABS)
@each("scale", CLASSES)
def test_what_is_compiled_for_one_lab_serves_the_next(name: str, scale: str) -> None:
    lab = resolved(name, scale, quick=True, dummy=name != "quantization-tools")
    for variant in lab.variants:
        flags = lab.flags_of(variant)
        assert "kv-cache-memory-bytes" in flags
        assert "max-num-seqs" in flags
        if name in {*FIRST, "overload", "structured-output"}:
            assert flags["max-model-len"] == 8192
            if variant.name != "sixteenth":  # whose budget is what it is about
                assert flags["max-num-batched-tokens"] == 8192
        if name in FIRST:
            assert flags["max-num-seqs"] == 256


@pytest.mark.parametrize("name", LABS)
def test_in_float32_as_many_tokens_fit_as_in_bf16(name: str) -> None:
    plain, wide = (resolved(name, scale) for scale in ("cpu", catalog.CPU_FP32))
    own = LABS[name].scales.get(catalog.CPU_FP32, {})
    assert (plain.value_bytes, wide.value_bytes) == (2, 4)
    assert plain.digest() != wide.digest()
    for before, after in zip(
        plain.points(SHAPE, CEILINGS), wide.points(SHAPE, CEILINGS), strict=True
    ):
        if before.variant.engine != DEFAULT_ENGINE:
            assert after.variant.flags == {
                **before.variant.flags, **ENGINES[before.variant.engine].in_float32
            }  # fmt: skip
            continue
        assert after.flags["dtype"] == "float32"
        if KV_MEMORY in before.flags and f"flags.{KV_MEMORY}" not in own:
            assert after.flags.kv_cache_memory_bytes == 2 * before.flags.kv_cache_memory_bytes


def test_a_lab_that_is_resolved_again_for_float32_stays_as_it_is() -> None:
    """As for a page that predicts for a machine of that scale from a resolved lab."""
    for name, lab in LABS.items():
        once = lab.at(catalog.CPU_FP32, False)
        again = once.model_copy(update={"scales": {}, "quick": {}}).at(catalog.CPU_FP32, False)
        assert (again.flags, again.variants) == (once.flags, once.variants), name


def test_a_reader_may_serve_in_bf16_nevertheless() -> None:
    changed = LABS["single-stream"].at(catalog.CPU_FP32, False, {"flags.dtype": "bfloat16"})
    assert changed.value_bytes == 2
