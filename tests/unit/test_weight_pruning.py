"""The lab of pruning: its arithmetic by hand, its knee, and what is told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs import LABS
from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.analysis.verdicts import is_within
from labs.harness.forecast import step_timing
from labs.harness.spec.lab import Variant
from labs.weight_pruning.facts import (
    EIGHT_BITS,
    Sparsities,
    compared,
    facts,
    kernels,
    sparsities,
)
from labs.weight_pruning.lab import (
    HALF,
    SAME_SPEED,
    SERVED,
    bytes_ratio,
    energy_gone,
    energy_gone_2_4,
)
from serving.hardware import gpus
from serving.models.catalog import Model
from serving.models.prune import METHODS, Method
from tests.unit.builders import CEILINGS, SHAPE
from tests.unit.judged import Values, context, judged_run

LAB = LABS["weight-pruning"].at("cpu", quick=False).model_copy(update={"requests": 64})
ONE, MANY = "decode/concurrent-1", "decode/concurrent-16"


# ------------------------------------------------------------------------------- the arithmetic


def test_zeros_change_no_step_and_no_rate() -> None:
    points = LAB.points(SHAPE, CEILINGS)
    zeros = [claim for claim in LAB.claims if claim.expect == "unchanged"]
    assert len(zeros) == 4
    for claim in zeros:
        ((treatment, baseline),) = LAB.pairs(claim, points)
        assert claim.predict(treatment, baseline).value == 1


def test_half_of_the_layers_are_predicted_by_what_is_left() -> None:
    """Where 800 of 1,000 parameters are in layers, 600 are left."""
    half = replace(SHAPE, layers=SHAPE.layers // 2, weight_bytes=SHAPE.weight_bytes * 6 // 10,
                   matmul_params=SHAPE.matmul_params * 6 // 10)  # fmt: skip
    points = LAB.points(SHAPE, CEILINGS, {HALF: half})
    for claim in LAB.claims[-2:]:
        ((treatment, baseline),) = LAB.pairs(claim, points)
        ratio = claim.predict(treatment, baseline).value
        assert 0.5 < (ratio if claim.expect == "falls" else 1 / ratio) <= 0.6


def test_equal_speed_excludes_half_of_what_a_sparse_kernel_would_gain() -> None:
    """A step of the bundled model with 2:4: 212.3 of its 269.1 MB are in pruned matrices."""
    sparse = 1 - 212.3 / 269.1 * (1 - bytes_ratio("2:4", 0.5))
    assert sparse == pytest.approx(0.66, abs=0.01)
    assert {c.margin for c in LAB.claims if c.expect == "unchanged"} == {SAME_SPEED}
    assert not is_within(math.sqrt(sparse), SAME_SPEED)


def test_the_energy_of_the_smallest_normal_weights() -> None:
    """Half of normal weights lie within 0.6745 deviations: 0.5 - 2 x 0.6745 x 0.3178."""
    assert energy_gone(0.5) == pytest.approx(0.5 - 2 * 0.6745 * 0.3178, abs=1e-4)
    assert energy_gone(0.02) == pytest.approx(math.pi / 6 * 0.02**3, rel=1e-3)
    assert energy_gone(0.9999) == pytest.approx(1, abs=0.01)
    assert energy_gone(0.3) < energy_gone(0.5) < energy_gone_2_4() < energy_gone(0.7)


def test_the_energy_of_the_pattern_is_that_of_drawn_weights() -> None:
    import numpy as np

    drawn = np.sort(np.random.default_rng(1).standard_normal((100_000, 4)) ** 2, axis=1)
    assert energy_gone_2_4() == pytest.approx(drawn[:, :2].sum() / drawn.sum(), rel=0.01)


def test_bytes_of_a_sparse_form() -> None:
    """Of four 16-bit weights two are kept with two bits each: 36 of 64 bits."""
    assert bytes_ratio("2:4", 0.5) == 9 / 16 == bytes_ratio("bitmap", 0.5)
    assert bytes_ratio("2:4", 0.5, bits=8) == 10 / 16
    assert bytes_ratio("bitmap", 1 / 16) == 1 == bytes_ratio("index", 0.5)
    assert bytes_ratio("dense", 0.7) == 1


@pytest.mark.parametrize(("value_bytes", "matrix"), [(2, 36 / 64), (4, 68 / 128)])
def test_the_bytes_of_a_step_are_those_of_the_weights_as_they_are_served(
    value_bytes: int, matrix: float, tmp_path: Path
) -> None:
    """Of 1,000 weights 800 are pruned; of four two are kept, with two bits each."""
    shape = replace(SHAPE, value_bytes=value_bytes, weight_bytes=1000 * value_bytes)
    run = context(tmp_path, LAB, TIMES, about=ABOUT)
    run = replace(run, points=[replace(p, shape=shape) for p in run.points])
    point = run.points[0]
    all_bytes = shape.weight_bytes + point.context_tokens * shape.kv_bytes_per_token()
    found = kernels(run)
    assert found
    assert found.pruned_share.value == pytest.approx(value_bytes * 800 / all_bytes)
    assert found.forms["2:4"]["matrices"].value == matrix
    assert found.forms[EIGHT_BITS]["matrices"].value == 1 / value_bytes


def test_pruned_weights_share_the_timing_of_the_model(tmp_path: Path) -> None:
    """Two timings of the same step would differ by chance, and forecast an effect of the zeros."""
    folders = {"dense": "{}", "wanda-50": "{}", "w8a8": '{"quantization_config": {}}'}
    for name, config in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    served = {n: Model("tiny", tmp_path / n, SHAPE) for n in folders}
    setup: Any = SimpleNamespace(model=served.pop("dense"), weights=served)
    timed = {n: step_timing._timed(setup, Variant(name=n)).name for n in folders}
    assert timed == {"dense": "dense", "wanda-50": "dense", "w8a8": "w8a8"}


@pytest.mark.parametrize("scale", ["cpu", *(f"gpu-{c.gb}" for c in gpus.CLASSES)])
def test_what_is_served_can_be_made_and_each_claim_has_its_pair(scale: str) -> None:
    lab = LABS["weight-pruning"].at(scale, quick=False)
    assert {v.weights for v in lab.variants if v.weights} == {*SERVED, "training"}
    assert {*SERVED} <= set(METHODS)
    assert set(lab.derived()) == {"sparsity", *(v.weights for v in lab.variants if v.weights)}
    small = lab.model_copy(update={"requests": 256})
    for claim in lab.claims:
        assert len(small.pairs(claim, small.points(SHAPE, CEILINGS))) == 1


# ------------------------------------------------------------------------------- what is told

GROWTH = {10: 1.01, 20: 1.02, 30: 1.05, 40: 1.1, 50: 1.5, 60: 3.0, 70: 20.0}


def study(growth: Mapping[int, float] = GROWTH) -> dict[str, Any]:
    """Perplexity e^2 dense; by magnitude as in `growth`, by Wanda half as much lost."""

    def nats(name: str) -> list[float]:
        grown = 2.0 if name.endswith("2-4") else growth[int(name.rpartition("-")[2])]
        each = math.log(grown) / (2 if name.startswith("wanda") else 1)
        return [100 * (2 + 0.99 * each), 100 * (2 + 1.01 * each)]

    return {
        "passages_tokens": [100, 100],
        "loss_nats": {"dense": [200.0, 200.0], **{m: nats(m) for m in METHODS}},
        "solved": {"dense": [True] * 4, **{m: [True, False] * 2 for m in METHODS}},
        "energy_gone": {
            "dense": 0.0, **{m: 1.1 * energy_gone(Method.parse(m).share) for m in METHODS}
        },
        "pruned_params": 800,
        "held_out_sha256": "ab" * 32,
        "calibration_sha256": "cd" * 32,
        "calibration_tokens": 2048,
    }  # fmt: skip


def made(share: float = 0.5, full: int = 0) -> dict[str, Any]:
    return {"asked": share, "zeros": share, "groups_too_full": full, "pruned_params": 800,
            "seconds": 9.0}  # fmt: skip


TRAINED: Mapping[str, Any] = {
    "params": SHAPE.params - 400,
    "passages_tokens": [100, 100],
    # losses of e^2 in perplexity, multiplied by what stands here
    "loss_nats": {
        name: [100 * (2 + math.log(grown) * part) for part in (0.99, 1.01)]
        for name, grown in {
            "file": 1.0, "file-nearest-4": 1.5, "spread": 1.2, "spread-nearest-4": 1.8,
            "plain": 0.9, "plain-nearest-4": 1.35, "plain-gptq-4": 1.08, "tuned-qat-4": 0.99,
            "kept": 100.0, "untaught-1": 9.0, "untaught-2": 4.0, "untaught-3": 5.0,
            "distilled": 3.0,
        }.items()
    },
    "efforts": {
        name: {"tokens": tokens, "seconds": took_s}
        for name, tokens, took_s in (
            ("plain", 9000, 50.0), ("gptq-4", 1000, 10.0), ("tuned-qat-4", 6000, 60.0),
            ("distilled", 9000, 50.0), ("untaught", 9000, 60.0),
        )
    },
    "calibration_tokens": 1000,
    "held_out_sha256": "ab" * 32,
}  # fmt: skip
ABOUT: Mapping[str, Any] = {
    "training": TRAINED, "sparsity": study(), "wanda-50": made(full=7), "wanda-2-4": made(),
}  # fmt: skip
TIMES: Mapping[str, Values] = {
    f"{variant}/{where}": {"tpot_mean_s": [0.10, 0.101, 0.102], "output_tokens_per_s": 50.0}
    for variant in ("dense", *SERVED, HALF)
    for where in (ONE, MANY)
}


def test_what_was_served_has_its_zeros_and_equal_bytes(tmp_path: Path) -> None:
    found = facts(judged_run(context(tmp_path, LAB, TIMES, about=ABOUT))).zeros
    assert found
    dense, half, pattern, _ = found.rows
    assert [str(of["zeros"]) for of in found.rows] == ["–", "50%", "50%", "–"]
    assert [of["groups_too_full"].value for of in found.rows] == [None, 7, 0, None]
    assert dense["weights"] == half["weights"] == pattern["weights"]
    assert half["slower"].value == half["many"].value == 1
    assert not dense["slower"].known


def studied(growth: Mapping[int, float] = GROWTH) -> Sparsities:
    found = sparsities(study(growth))
    assert found
    return found


def test_the_study_has_its_ratios_and_its_forecast() -> None:
    at = {step.pattern: step for step in studied().steps}
    assert at["0"].by["magnitude"]["perplexity"].value == pytest.approx(math.e**2)
    fifty = at["50"].by["magnitude"]
    assert fifty["ratio"].value == pytest.approx(1.5)
    assert (fifty["ratio"].low or 2) < 1.5 < (fifty["ratio"].high or 0)
    assert fifty["solved"].value == 2
    assert [str(at["50"].energy_normal), str(fifty["energy_gone"])] == ["7.13%", "7.85%"]
    assert str(at["2-4"].energy_normal) == "13.2%"
    assert studied().farthest.energy_ratio.value == pytest.approx(1.1)


def test_the_knee_is_before_the_first_step_that_costs_more_than_a_tenth() -> None:
    def at(growth: Mapping[int, float]) -> list[str | None]:
        knees = studied({**dict.fromkeys(GROWTH, 1.0), **growth}).knees
        return [knee.before.pattern if knee else None for knee in knees.values()]

    assert at(GROWTH) == ["40", "40"]
    assert at({}) == [None, None]
    assert at({10: 1.15}) == ["0", None]  # by Wanda half of that is lost
    assert at({70: 1.0999}) == [None, None]  # not over it


def test_kernels_are_arithmetic_but_for_what_was_served(tmp_path: Path) -> None:
    """1,600 of the step's bytes are pruned matrices: 2:4 saves 7/16 of them."""
    found = context(tmp_path, LAB, TIMES, about=ABOUT)
    kernels = facts(judged_run(found)).kernels
    assert kernels
    point = next(p for p in found.points if p.load.users == 1)
    read = 2000 + point.context_tokens * SHAPE.kv_bytes_per_token()
    steps = {name: form["step"].value or 0 for name, form in kernels.forms.items()}
    assert steps["2:4"] == pytest.approx(1 - 1600 / read * 7 / 16)
    assert steps[EIGHT_BITS] < steps["2:4"] < steps["dense"] == 1
    assert kernels.measured.value == 1
    unmeasured = facts(judged_run(context(tmp_path / "b", LAB, {}, about=ABOUT))).kernels
    assert unmeasured
    assert not unmeasured.measured.known


def test_a_mixture_of_experts_reads_few_for_one_token_and_most_for_many(tmp_path: Path) -> None:
    found = facts(judged_run(context(tmp_path, LAB, {}))).experts
    one, *_, most = found.rows
    assert (found["experts"].value, found["per_token"].value) == (128, 8)
    assert one["needed"].value == pytest.approx(8)
    assert 0.05 < (one["share"].value or 0) < 0.2 < 0.99 < (most["share"].value or 0) <= 1
    assert 0.08 < (found["active_share"].value or 0) < 0.13


def test_training_is_told_beside_its_reference_with_its_price(tmp_path: Path) -> None:
    found = facts(judged_run(context(tmp_path, LAB, TIMES, about=ABOUT))).training
    assert found
    (at,), models = found.bits, found.models
    ratios = [
        of["ratio"].value
        for of in (at.nearest, at.gptq, at.qat, models["distilled"], models["spread_nearest"])
    ]
    assert ratios == pytest.approx([1.5, 1.2, 1.1, 3.0, 1.5])
    assert at.qat_over_gptq.value == pytest.approx(1.1 / 1.2)
    assert at.qat_is == "better"
    assert at.from_tuned
    assert at.times_as_long.value == 6
    assert at.qat["flop"].value == pytest.approx(6 * SHAPE.matmul_params * 6000 / 1e12)
    assert at.gptq["flop"].value == pytest.approx(2 * SHAPE.matmul_params * 1000 / 1e12)
    half = SHAPE.matmul_params - 400
    assert models["distilled"]["flop"].value == pytest.approx(6 * half * 9000 / 1e12)
    assert not models["kept"]["flop"].known


def test_distillation_stands_beside_the_best_epoch_without_a_teacher(tmp_path: Path) -> None:
    found = facts(judged_run(context(tmp_path, LAB, TIMES, about=ABOUT))).training
    assert found
    assert found.untaught
    assert found.untaught.last["ratio"].value == pytest.approx(5.0)
    assert found.untaught.last["tokens"] == found.models["distilled"]["tokens"] == Quantity(9000)
    assert found.untaught.best_epoch == 2
    assert found.untaught.best["ratio"].value == pytest.approx(4.0)
    assert found.untaught.distilled_over_best.value == pytest.approx(3 / 4)
    assert found.untaught.distilled_is == "better"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.8, 0.9, "better"), (0.9, 1.1, "not told apart"), (1.1, 1.2, "worse")],
)
def test_what_an_interval_of_perplexities_says(low: float, high: float, said: str) -> None:
    assert compared(Quantity(1, RATIO, low, high)) == said


def test_an_older_study_is_told_with_its_own_qat_and_no_other_training(tmp_path: Path) -> None:
    nats = {n: of for n, of in TRAINED["loss_nats"].items() if not n.startswith("untaught")}
    nats["qat-4"] = nats.pop("tuned-qat-4")
    about = {"training": {**TRAINED, "loss_nats": nats}}
    found = facts(judged_run(context(tmp_path, LAB, TIMES, about=about))).training
    assert found
    assert found.untaught is None
    assert found.bits[0].qat["ratio"].value == pytest.approx(1.1)
    assert not found.bits[0].from_tuned


@pytest.mark.parametrize("about", [{}, {"training": {"params": 600}}])
def test_a_run_without_the_study_says_nothing_of_training(
    about: Mapping[str, Any], tmp_path: Path
) -> None:
    """An older run has none, and of a large model half of the layers stay untrained."""
    assert facts(judged_run(context(tmp_path, LAB, TIMES, about=about))).training is None
