"""What a run says of one stream: its two phases, what their time is made of, and its flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from labs.harness.analysis.computed import Band, PointForecasts, Predictions
from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.run_view import Context
from labs.harness.derived.step_parts import Pass, decode_s
from labs.harness.reports.drawing import plt
from labs.harness.spec import theory
from labs.harness.spec.lab import Variant
from labs.harness.storage.writing import write_json
from labs.single_stream.facts import Facts, facts, flag_effects
from labs.single_stream.plots import flags
from loadtests.workload import Fixed
from serving.simulator.step import StepTimes
from tests.unit.builders import CEILINGS, SHAPE, make_lab, make_workload
from tests.unit.judged import Values, context, judged_run, withheld

BANDWIDTH, RATE = CEILINGS.memory_bandwidth_bytes_per_s, CEILINGS.flops_per_s


def alone(home: Path, values: Mapping[str, Values]) -> Context:
    """Two variants decode eight tokens after four, and prefill eight."""
    return context(
        home,
        make_lab(
            variants=(Variant(name="default"), Variant(name="eager")),
            workloads=(
                make_workload("concurrent:1", name="decode"),
                make_workload("concurrent:1", name="prefill", prompt_tokens=Fixed(tokens=8),
                              output_tokens=Fixed(tokens=1)),
            ),
            claims=(), evidence=(),
        ),
        {f"{variant}/{workload}/concurrent-1": of for (variant, workload), of in
         ((key.split(), of) for key, of in values.items())},
    )  # fmt: skip


def found(run: Context) -> Facts:
    return facts(judged_run(run))


def test_the_two_phases_by_their_work(tmp_path: Path) -> None:
    run = alone(
        tmp_path, {"default decode": {"tpot_mean_s": 1}, "default prefill": {"ttft_mean_s": 2}}
    )
    phases = found(run).phases
    decode, prefill = phases.decode, phases.prefill
    assert decode
    assert prefill
    (at,) = {p.context_tokens for p in run.points if p.workload.name == "decode"}
    assert decode.parts.reading_s.value == theory.decode_bytes(SHAPE, 1, at) / BANDWIDTH
    assert prefill.parts.computing_s.value == theory.prefill_flops(SHAPE, 8) / RATE
    assert (decode.tokens_per_s.value, prefill.tokens_per_s.value) == (1, 4)
    assert phases.work.value == prefill.flop_per_byte / decode.flop_per_byte
    for p in (decode, prefill):
        above = p.flop_per_byte > phases.ridge_flop_per_byte
        assert p.nearer_ceiling == ("arithmetic" if above else "bandwidth")


@pytest.mark.parametrize(
    ("measured_ms", "stand_in_ms", "parts_ms", "limit"),
    [
        (26.3, None, (15.59, None, None), "neither"),
        (16.0, None, (5.29, None, None), "bandwidth"),
        (20.0, None, (9.29, None, None), "none"),
        (10.5, None, (-0.21, None, None), "bandwidth"),  # it reads and computes at once
        (26.3, 20, (15.59, 9.29, 6.3), "neither"),
        (26.3, 28, (15.59, 17.29, -1.7), "neither"),  # the engine was faster
        (26.3, 9, (15.59, 0, 15.59), "neither"),  # the stand-in read and computed at once
    ],
)
def test_the_parts_of_a_step_add_up(
    measured_ms: float, stand_in_ms: float | None, parts_ms: Sequence[float | None], limit: str
) -> None:
    """The rest of a step with 9.39 ms of reading and 1.32 ms of computing, and its two parts."""
    stand_in_s = None if stand_in_ms is None else stand_in_ms / 1000
    step = Pass(0.00939 * BANDWIDTH, 0.00132 * RATE, stand_in_s, CEILINGS)
    parts = step.split(Quantity(measured_ms / 1000, "s"))
    rest, *of_it = (None if ms is None else pytest.approx(ms / 1000) for ms in parts_ms)
    assert parts.rest_s.value == rest
    assert [parts.overhead_s.value, parts.engine_s.value] == of_it
    assert parts.limit == limit


def with_stand_in(run: Context, *variants: str, steps: int = 1) -> Context:
    """The same run, forecast over steps of one second and one second more for each token."""
    keys = [p.key for p in run.points if p.variant.name in variants]
    band = {"tpot_mean_s": Band(value=1, low=1, high=1)}
    times = StepTimes(
        tokens=(0, 100), linear_s=(1, 101), rows=(1, 2), head_s=(0, 0), attention_pair_s=0,
        attention_read_s=0,
    )  # fmt: skip
    forecasts = PointForecasts(
        points=dict.fromkeys(keys, band), step_times=[times.model_dump()] * steps
    )
    before = Predictions(effects={}, forecasts={}, in_virtual_time=forecasts)
    write_json(run.folder.path / "predictions.json", before)
    return run


@pytest.mark.parametrize(("steps", "stand_ins_s"), [(1, [2, 9, None]), (2, [None, None, None])])
def test_a_pass_has_its_stand_in_where_one_was_timed(
    steps: int, stand_ins_s: list[float | None], tmp_path: Path
) -> None:
    """Of a lab with several models or kinds of kernels several are on file: whose is not known."""
    values: dict[str, Values] = {
        f"{variant} {name}": {"tpot_mean_s": 3, "ttft_mean_s": 20}
        for variant in ("default", "eager") for name in ("decode", "prefill")
    }  # fmt: skip
    run = judged_run(with_stand_in(alone(tmp_path, values), "default", steps=steps))
    default, eager = facts(run).flags.variants
    passes = [
        p.parts.stand_in_s.value for p in (default.decode, default.prefill, eager.decode) if p
    ]
    assert passes == stand_ins_s
    assert flags(run, facts(run))
    labels = {text.get_text() for text in plt.gcf().legends[0].get_texts()}
    assert ({"overhead", "the engine's own"} <= labels) == (steps == 1)
    assert "the rest" in labels
    plt.close("all")


def test_a_step_that_brings_a_token_has_at_least_one_request() -> None:
    """Between whole numbers of requests its time is interpolated."""
    times = StepTimes(
        tokens=(1, 2), linear_s=(1, 3), rows=(1, 2), head_s=(0, 0), attention_pair_s=0,
        attention_read_s=0,
    )  # fmt: skip
    assert [decode_s(times, batch, 8) for batch in (0.9, 1, 1.25, 2)] == [1, 1, 1.5, 3]


def test_which_flag_matters_is_told_beside_the_noise(tmp_path: Path) -> None:
    run = alone(
        tmp_path,
        {
            "default decode": {"tpot_mean_s": [1.0, 1.01, 0.99], "mbu": 0.36},
            "eager decode": {"tpot_mean_s": [1.5, 1.515, 1.485]},
            "default prefill": {"ttft_mean_s": [1.0, 1.01, 0.99]},
            "eager prefill": {"ttft_mean_s": [1.0, 1.01, 0.99]},
        },
    )
    effects = flag_effects(run)
    default, eager = effects.variants
    assert effects.fastest == default
    assert default.decode_mbu.value == 0.36
    assert (default.decode_beside.matters, default.prefill_beside.matters) == ("not compared",) * 2
    assert eager.decode_beside.ratio.value == pytest.approx(1.5)
    assert (eager.decode_beside.matters, eager.prefill_beside.matters) == ("yes", "no")
    once = replace(run, values={key: {1: of[1]} for key, of in run.values.items()})
    assert flag_effects(once).variants[1].decode_beside.matters == "not settled"


@pytest.mark.parametrize("variant", ["default", "eager"])
def test_what_is_not_valid_is_not_the_fastest_and_matters_to_nothing(
    variant: str, tmp_path: Path
) -> None:
    decode = {"default": [1.5, 1.51, 1.49], "eager": [1.0, 1.01, 0.99]}
    run = alone(tmp_path, {f"{n} decode": {"tpot_mean_s": v} for n, v in decode.items()})
    fastest = flag_effects(run).fastest
    assert fastest
    assert fastest.variant == "eager"
    effects = flag_effects(withheld(run, f"{variant}/decode/concurrent-1"))
    assert effects.fastest is None  # one is left, beside no other
    assert effects.variants[1].decode_beside.matters == "not valid"
