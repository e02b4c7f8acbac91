"""The lab of pruning: its arithmetic by hand, its knee, and what is told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs import LABS
from labs.harness.judging.judge import is_within
from labs.harness.running import step_timing
from labs.harness.spec import Variant
from labs.weight_pruning.facts import (
    EIGHT_BITS,
    EXPERTS,
    KERNELS,
    SERVED,
    SWEEP,
    TRAINING,
    cliff,
    distillation,
    qat,
    sparse_kinds,
)
from labs.weight_pruning.lab import SAME_SPEED, bytes_ratio, energy_gone, energy_gone_2_4, knee
from serving import gpus
from serving.models import Model
from serving.prune import METHODS, Method
from tests.unit.builders import CEILINGS, SHAPE
from tests.unit.judged import Values, context, judged, judged_run
from tests.unit.test_findings import cells

LAB = LABS["weight-pruning"].at("cpu", quick=False).model_copy(update={"requests": 64})
ONE, MANY = "decode/concurrent-1", "decode/concurrent-16"


# ------------------------------------------------------------------------------- the arithmetic


def test_zeros_change_no_step_and_no_rate() -> None:
    points = LAB.points(SHAPE, CEILINGS)
    for claim in LAB.claims:
        ((treatment, baseline),) = LAB.pairs(claim, points)
        assert claim.predict(treatment, baseline).value == 1
        assert claim.expect == "unchanged"


def test_equal_speed_excludes_half_of_what_a_sparse_kernel_would_gain() -> None:
    """A step of the bundled model with 2:4: 212.3 of its 269.1 MB are in pruned matrices."""
    sparse = 1 - 212.3 / 269.1 * (1 - bytes_ratio("2:4", 0.5))
    assert sparse == pytest.approx(0.66, abs=0.01)
    assert {claim.margin for claim in LAB.claims} == {SAME_SPEED}
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


def test_the_knee_is_before_the_first_step_that_costs_more_than_a_tenth() -> None:
    flat = [(0.0, 10.0), (0.1, 10.1), (0.2, 11.0)]
    assert knee(flat) is None
    assert knee([*flat, (0.3, 12.2), (0.4, 20.0)]) == 0.2
    assert knee([(0.0, 10.0), (0.1, 11.5)]) == 0
    assert knee([*flat, (0.3, 11.0 * 1.1)]) is None  # not over it


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
    assert {v.weights for v in lab.variants if v.weights} <= set(METHODS)
    assert set(lab.derived()) == {"sparsity", *(v.weights for v in lab.variants if v.weights)}
    small = lab.model_copy(update={"requests": 256})
    for claim in lab.claims:
        assert len(small.pairs(claim, small.points(SHAPE, CEILINGS))) == 1


# ------------------------------------------------------------------------------- what is told

GROWTH = {10: 1.01, 20: 1.02, 30: 1.05, 40: 1.1, 50: 1.5, 60: 3.0, 70: 20.0}


def study(methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """Perplexity e^2 dense; by magnitude as in GROWTH, by Wanda half as much lost."""

    def nats(name: str) -> list[float]:
        growth = 2.0 if name.endswith("2-4") else GROWTH[int(name.rpartition("-")[2])]
        each = math.log(growth) / (2 if name.startswith("wanda") else 1)
        return [100 * (2 + 0.99 * each), 100 * (2 + 1.01 * each)]

    return {
        "passages_tokens": [100, 100],
        "loss_nats": {"dense": [200.0, 200.0], **{m: nats(m) for m in methods}},
        "solved": {"dense": [True] * 4, **{m: [True, False] * 2 for m in methods}},
        "energy_gone": {
            "dense": 0.0, **{m: 1.1 * energy_gone(Method.parse(m).share) for m in methods}
        },
        "pruned_params": 800,
        "held_out_sha256": "ab" * 32,
        "calibration_sha256": "cd" * 32,
        "calibration_tokens": 2048,
    }  # fmt: skip


def made(share: float = 0.5, full: int = 0) -> dict[str, Any]:
    return {"asked": share, "zeros": share, "groups_too_full": full, "pruned_params": 800,
            "seconds": 9.0}  # fmt: skip


ABOUT: Mapping[str, Any] = {
    "sparsity": study(), "wanda-50": made(full=7), "wanda-2-4": made(),
}  # fmt: skip
TIMES: Mapping[str, Values] = {
    f"{variant}/{where}": {"tpot_mean_s": [0.10, 0.101, 0.102], "output_tokens_per_s": 50.0}
    for variant in ("dense", "wanda-50", "wanda-2-4")
    for where in (ONE, MANY)
}


def test_what_was_served_shows_its_zeros_and_equal_bytes(tmp_path: Path) -> None:
    finding = SERVED.finding(context(tmp_path, LAB, TIMES, about=ABOUT))
    assert cells(finding, 0, 1, 2, 3) == [
        ["`dense`", "–", "–", "–"],
        ["`wanda-50`", "50%", "50.00%", "7"],
        ["`wanda-2-4`", "50%", "50.00%", "0"],
    ]
    assert len({row[4] for row in finding.rows[1:]}) == 1
    assert "1.00x" in finding.rows[2][6]
    assert finding.rows[1][6] == "–"


def test_the_sweep_has_its_knees_and_its_forecast(tmp_path: Path) -> None:
    found = context(tmp_path, LAB, TIMES, about=ABOUT)
    facts = found.once(SWEEP.facts)
    assert facts is not None
    assert facts.dense.perplexity == pytest.approx(math.e**2)
    assert facts.knees == {"magnitude": 0.4, "wanda": 0.4}
    fifty = facts.at("magnitude", "50")
    assert fifty is not None
    assert fifty.ratio == pytest.approx(1.5)
    assert fifty.low is not None
    assert fifty.high is not None
    assert fifty.low < 1.5 < fifty.high
    assert fifty.solved == 2
    finding = SWEEP.finding(found)
    rows = {row[0]: row for row in finding.rows}
    assert list(rows)[1:3] == ["none", "10%"]
    assert rows["2:4"][8] == "13.24%"
    assert rows["50%"][7:] == ["7.85%", "7.13%"]
    assert "Magnitude has it at 40%" in finding.lines[0]
    assert "1.10 times as much" in finding.lines[1]


def test_a_study_of_few_methods_is_told_all_the_same(tmp_path: Path) -> None:
    about = {"sparsity": study(["wanda-50", "wanda-60"])}
    finding = SWEEP.finding(context(tmp_path, LAB, {}, about=about))
    assert {row[1] for row in finding.rows[2:]} == {"–"}
    assert "not measured" in finding.lines[1]


def test_kernels_are_arithmetic_but_for_what_was_served(tmp_path: Path) -> None:
    """1,600 of the step's bytes are pruned matrices: 2:4 saves 7/16 of them."""
    found = context(tmp_path, LAB, TIMES, about=ABOUT)
    facts = found.once(KERNELS.facts)
    assert facts is not None
    point = next(p for p in found.points if p.load.users == 1)
    read = 2000 + point.context_tokens * SHAPE.kv_bytes_per_token()
    assert facts.step_of("2:4") == pytest.approx(1 - 1600 / read * 7 / 16)
    assert facts.step_of(EIGHT_BITS) < facts.step_of("2:4") < 1
    finding = KERNELS.finding(found)
    assert [row[3].startswith("measured") for row in finding.rows[1:]] == [True, *[False] * 6]


def test_a_mixture_of_experts_reads_few_for_one_token_and_most_for_many(tmp_path: Path) -> None:
    facts = context(tmp_path, LAB, {}).once(EXPERTS.facts)
    assert (facts.experts, facts.per_token) == (128, 8)
    one, *_, last = facts.steps
    assert one.experts == pytest.approx(8)
    assert 0.05 < one.share < 0.2 < 0.99 < last.share <= 1
    assert 0.08 < facts.active_params / facts.params < 0.13
    assert "No mixture of experts is served" in EXPERTS.finding(context(tmp_path, LAB, {})).lines[0]


def test_half_of_the_layers_is_counted_with_the_pruned_weights(tmp_path: Path) -> None:
    facts = context(tmp_path, LAB, TIMES, about=ABOUT).once(TRAINING.facts)
    assert facts is not None
    assert facts.half_params == 0.6  # 800 of 1,000 parameters are halved
    assert facts.train_flop / facts.calibrate_flop == pytest.approx(6 * 1e7 / (2 * 2048))


def test_the_answers_say_what_is_arithmetic(tmp_path: Path) -> None:
    judgements = [judged("half-one", 1.01), judged("pattern-one", 0.99)]
    run = judged_run(context(tmp_path, LAB, TIMES, about=ABOUT), judgements)
    kinds = sparse_kinds(run)
    assert kinds is not None
    assert "TPOT is 1.01x" in kinds
    assert kinds.count("(arithmetic") == 2
    for answer in (distillation, qat):
        text = answer(run)
        assert text is not None
        assert text.startswith("By arithmetic: ")
    assert "Wanda has it at 40%" in (cliff(run) or "")
    bare = judged_run(context(tmp_path / "bare", LAB, {}))
    assert [f(bare) for f in (sparse_kinds, distillation, qat, cliff)] == [None] * 4
