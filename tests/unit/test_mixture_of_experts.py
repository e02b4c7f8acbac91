"""The lab of mixtures of experts: how many a batch needs, by hand, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from labs import LABS
from labs.harness.analysis.verdicts import ForecastAtPoint, is_within
from labs.harness.derived.run_view import Context
from labs.harness.reports import dials
from labs.harness.reports.drawing import GREY, plt
from labs.harness.spec import theory
from labs.harness.spec.lab import MARGIN, Claim, Lab
from labs.harness.spec.theory import experts_needed, step_of
from labs.mixture_of_experts.facts import facts
from labs.mixture_of_experts.lab import (
    ACTIVE,
    TOTAL,
    gain_lost,
    step_ratio,
)
from labs.mixture_of_experts.plots import PLOTS
from serving.hardware import gpus
from serving.hardware.machine import Ceilings
from serving.models import dummy
from serving.models.catalog import Shape, shape_of
from serving.simulator.datasheet import EXPECTED
from tests.unit.builders import CEILINGS, changes_next
from tests.unit.judged import Values, context, judged_run, withheld

LAB = LABS["mixture-of-experts"].at("cpu", quick=False)
SLOW_MEMORY = Ceilings(
    memory_bandwidth_bytes_per_s=1e10, bf16_flops_per_s=1e15, threads=1, torch="-", measured_at="-"
)


CPUS = [  # memory bandwidth and BF16 rate as measured, the second without instructions for BF16
    SLOW_MEMORY.model_copy(update={"memory_bandwidth_bytes_per_s": b, "bf16_flops_per_s": f})
    for b, f in ((28.8e9, 212e9), (10.8e9, 26e9), (13.8e9, 1.44e12))
]
AT_16 = LAB.model_copy(update={"claims": (gain_lost(16),)})


def shapes(name: str) -> dict[str, Shape]:
    """The shape of that name under "", and those of both dense models beside it."""
    config = dummy.config_of(name)
    return {"": shape_of(config), **{d: shape_of(dummy.dense(config, d)) for d in dummy.DENSE}}


def ratio(name: str, claim: str, lab: Lab = LAB, ceilings: Ceilings = SLOW_MEMORY) -> float:
    """What a claim predicts in that shape; where arithmetic costs nothing unless told otherwise."""
    weights = shapes(name)
    points = lab.model_copy(update={"repeats": 1, "requests": 64}).points(
        weights.pop(""), ceilings, weights
    )
    (asked,) = (c for c in lab.claims if c.name == claim)
    ((treatment, baseline),) = lab.pairs(asked, points)
    assert asked.predict is step_ratio
    return asked.predict(treatment, baseline).value


# ------------------------------------------------------------------------------- the arithmetic


def test_how_many_experts_a_batch_needs() -> None:
    assert experts_needed(32, 4, 1) == pytest.approx(4)
    assert experts_needed(4, 2, 2) == pytest.approx(3)  # each misses two of four: a quarter is idle
    assert experts_needed(8, 1, 1000) == pytest.approx(8)


@pytest.mark.parametrize("name", ["moe-tiny", "moe-3b", "moe-30b"])
def test_the_dense_models_have_the_parameters_of_all_experts_and_of_one_token(name: str) -> None:
    of = shapes(name)
    mixture, total, active = of[""], of[TOTAL], of[ACTIVE]
    router = mixture.layers * mixture.hidden * mixture.experts
    assert total.experts == active.experts == 0
    assert mixture.params - total.params == router
    assert mixture.matmul_params - active.matmul_params == router
    assert mixture.step_bytes(1) - active.weight_bytes == 2 * router
    assert total.kv_bytes_per_token() == active.kv_bytes_per_token() == mixture.kv_bytes_per_token()
    assert 2 * router < 0.02 * active.weight_bytes  # so little sets them apart


def test_what_the_shape_of_a_cpu_predicts_by_hand() -> None:
    """8 layers of 32 experts of 3 x 512 x 512; a quarter of the bytes is the head and attention."""
    expert = 3 * 512 * 512
    beside = 8 * 512 * 64 * 2 * (8 + 4) + 49_152 * 512
    one, all_ = beside + 8 * 4 * expert, beside + 8 * 32 * expert
    assert ratio("moe-tiny", "one-total") == pytest.approx(one / all_, rel=0.01)
    assert ratio("moe-tiny", "one-active") == pytest.approx(1, rel=0.01)
    sixteen = beside + 8 * 32 * expert * (1 - (7 / 8) ** 16)
    assert ratio("moe-tiny", "many-total", AT_16) == pytest.approx(sixteen / all_, rel=0.01)
    four = beside + 8 * 32 * expert * (1 - (7 / 8) ** 4)
    assert ratio("moe-tiny", "batch") == pytest.approx(four / one, rel=0.02)


@pytest.mark.parametrize("ceilings", CPUS, ids=lambda c: f"{c.bf16_flops_per_s:.3g}")
def test_claims_expect_what_their_formula_says_on_every_cpu(ceilings: Ceilings) -> None:
    for asked in LAB.claims:
        expect_what_is_predicted(asked, ratio(LAB.shape, asked.name, LAB, ceilings))


def expect_what_is_predicted(asked: Claim, value: float) -> None:
    if asked.expect == "unchanged":
        assert is_within(value, asked.margin), asked.name
    else:
        assert not is_within(value, MARGIN), asked.name
        assert (value > 1) == (asked.expect == "rises"), asked.name


@pytest.mark.parametrize("card", dials.cards_of(LAB), ids=lambda card: card.card)
def test_claims_expect_what_their_formula_says_on_every_card(card: dials.Hardware) -> None:
    lab = LABS["mixture-of-experts"].at(card.scale, quick=False)
    assert card.shape.experts
    assert card.weights.keys() == {TOTAL, ACTIVE}
    for asked in lab.claims:
        expect_what_is_predicted(asked, ratio(lab.shape, asked.name, lab, card.ceilings))
    (total,) = (
        point
        for point in lab.model_copy(update={"repeats": 1}).points(
            card.shape, card.ceilings, card.weights
        )
        if (point.variant.name, point.load.users) == (TOTAL, 64)
    )
    read_s = theory.decode_bytes(total.shape, 64, total.context_tokens)
    assert step_of(total) == read_s / card.ceilings.memory_bandwidth_bytes_per_s  # memory limits it


@pytest.mark.parametrize("scale", ["cpu", *(f"gpu-{c.gb}" for c in gpus.CLASSES)])
def test_all_requests_fit_the_cache_at_their_longest_whatever_is_turned_next(scale: str) -> None:
    lab = LABS["mixture-of-experts"]
    resolved = lab.at(scale, quick=False)
    for knob, changes in (("", {}), *changes_next(resolved)):
        turned = lab.at(scale, False, changes)
        weights = shapes(turned.shape)
        for point in turned.points(weights.pop(""), SLOW_MEMORY, weights):
            room = point.flags.kv_cache_memory_bytes / point.shape.kv_bytes_per_token()
            peak_tokens = point.load.users * (point.prompt_tokens + point.output_tokens + 16)
            assert peak_tokens <= room, (knob, point.key)  # a last block is partly filled


@pytest.mark.parametrize("card", dials.cards_of(LAB), ids=lambda card: card.card)
def test_requests_do_not_run_out_on_any_card(card: dials.Hardware) -> None:
    """There are more than each model could answer in a trial if a step took reading alone."""
    lab = LABS["mixture-of-experts"].at(card.scale, quick=False).model_copy(update={"repeats": 1})
    for point in lab.points(card.shape, card.ceilings, card.weights):
        request_s = point.output_tokens * (step_of(point) + EXPECTED.step_s)
        sent = point.load.users * ((lab.warmup_s + lab.window_s) / request_s + 1)
        assert sent < lab.requests, point.key


def test_variants_differ_in_their_weights_alone() -> None:
    mixture, *dense = LAB.variants
    assert mixture.weights == ""
    assert [(v.flags, v.weights) for v in dense] == [(mixture.flags, v.name) for v in dense]
    said = {e.arm.variant: e.value for e in LAB.evidence if e.label == "architecture"}
    for name, shown in said.items():
        config = dummy.config_of(LAB.shape)
        served = dummy.dense(config, str(name)) if name in dummy.DENSE else config
        assert served["architectures"] == [shown]


# ------------------------------------------------------------------------------- what is told

TPOTS_S = {
    "mixture": {1: 0.012, 4: 0.022, 16: 0.040},
    TOTAL: {1: 0.040, 4: 0.042, 16: 0.044},
    ACTIVE: {1: 0.010, 4: 0.011, 16: 0.012},
}
TIMES: Mapping[str, Values] = {
    f"{variant}/decode/concurrent-{users}": {"tpot_mean_s": [s, 1.01 * s, 0.99 * s]}
    for variant, of in TPOTS_S.items()
    for users, s in of.items()
}


def measured(home: Path, times: Mapping[str, Values] = TIMES) -> Context:
    """A run in the shape of a CPU, with these times."""
    small = LAB.model_copy(update={"requests": 64})
    found = context(home, small, times)
    weights = shapes("moe-tiny")
    return replace(found, points=small.points(weights.pop(""), CEILINGS, weights))


def test_what_was_served_holds_as_much_and_reads_less(tmp_path: Path) -> None:
    mixture, total, active = facts(judged_run(measured(tmp_path))).shapes
    assert [of.experts for of in (mixture, total, active)] == [32, 0, 0]
    assert str(mixture.held_mb) == str(total.held_mb) == "516 MB"
    assert [str(of.alone_mb) for of in (mixture, total, active)] == ["114 MB", "466 MB", "113 MB"]
    assert str(total.active_share) == "90.2%"  # all but the input embedding


def test_the_gain_shrinks_with_the_batch(tmp_path: Path) -> None:
    found = facts(judged_run(measured(tmp_path)))
    assert [str(at.needed) for at in found.batches] == ["4", "13.2", "28.2"]
    beside = [at.total.measured.value for at in found.batches if at.total]
    assert beside == pytest.approx([0.3, 22 / 42, 40 / 44], rel=0.01)
    by_bytes = [at.total.by_bytes.value or 0 for at in found.batches if at.total]
    assert by_bytes == sorted(by_bytes)
    assert found.full
    assert found.full.active
    assert found.full.active.valid.value == pytest.approx(40 / 12, rel=0.01)


def test_what_is_not_valid_has_no_valid_ratio(tmp_path: Path) -> None:
    found = withheld(measured(tmp_path), f"{TOTAL}/decode/concurrent-1")
    one = facts(judged_run(found)).one
    assert one
    assert one.total
    assert (one.total.measured.known, one.total.valid.known) == (True, False)


def test_the_plot_has_the_forecast_of_each_point_and_of_each_ratio(tmp_path: Path) -> None:
    run = judged_run(measured(tmp_path))
    forecasts = [
        ForecastAtPoint(
            point=f"{variant}/decode/concurrent-{users}", metric="tpot_mean_s",
            value=1.1 * seconds, low=seconds, high=1.3 * seconds, measured=None,
        )
        for variant, of in TPOTS_S.items()
        for users, seconds in of.items()
    ]  # fmt: skip
    summary = run.summary.model_copy(update={"in_virtual_time": forecasts})
    run = replace(run, summary=summary)
    assert PLOTS["batches"](run, facts(run))
    figure = plt.gcf()
    left, right = figure.axes
    plt.close(figure)
    assert left.get_legend_handles_labels()[1] == ["forecast, with its band", *TPOTS_S]
    assert right.get_legend_handles_labels()[1] == [f"mixture / {TOTAL}", f"mixture / {ACTIVE}"]
    grey = [line for line in right.lines if line.get_marker() == "_" and line.get_color() == GREY]
    drawn = sorted(float(line.get_ydata()[0]) for line in cast(Any, grey))
    assert drawn == pytest.approx(sorted(
        seconds / TPOTS_S[dense][users]
        for dense in (TOTAL, ACTIVE)
        for users, seconds in TPOTS_S["mixture"].items()
    ))  # fmt: skip
