"""What a run says of one stream: its two phases, what their time is made of, and its flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from labs.harness import theory
from labs.harness.facts.context import Context
from labs.harness.facts.drawing import plt
from labs.harness.facts.steps import Parts, decode_s, split
from labs.harness.filing.results import Band, PointForecasts, Predictions, write_json
from labs.harness.judging.quantity import Quantity
from labs.harness.spec import Variant
from labs.single_stream.facts import Facts, facts, flag_effects, phase
from labs.single_stream.plots import flags
from loadtests.workload import Fixed
from serving.forecasting.step import StepTimes
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


def made(measured_s: float, stand_in_s: float | None = None) -> Parts:
    """A pass of 9.39 ms of reading and 1.32 ms of computing."""
    reads, computes = 0.00939 * BANDWIDTH, 0.00132 * RATE
    return split(Quantity(measured_s, "s"), CEILINGS, reads, computes, stand_in_s)


@pytest.mark.parametrize(
    ("measured_s", "rest_s", "limit"),
    [(0.0263, 0.01559, "neither"), (0.016, 0.00529, "bandwidth"), (0.0105, -0.00021, "bandwidth"),
     (0.0200, 0.00929, "none")],
)  # fmt: skip
def test_the_parts_of_a_step_add_up(measured_s: float, rest_s: float, limit: str) -> None:
    """The rest is negative where the device reads and computes at once."""
    parts = made(measured_s)
    assert parts.rest_s.value == pytest.approx(rest_s)
    assert parts.limit == limit
    assert parts.share(parts.rest_s).value == pytest.approx(rest_s / measured_s)
    assert not parts.engine_s.known


@pytest.mark.parametrize(
    ("stand_in_s", "overhead_s", "engine_s"),
    [(0.020, 0.00929, 0.0063), (0.028, 0.01729, -0.0017), (0.009, 0, 0.01559)],
)
def test_a_step_with_a_timed_stand_in_has_four_parts(
    stand_in_s: float, overhead_s: float, engine_s: float
) -> None:
    """Also where the engine was faster than it, or where it reads and computes at once."""
    parts = made(0.0263, stand_in_s)
    assert parts.overhead_s.value == pytest.approx(overhead_s)
    assert parts.engine_s.value == pytest.approx(engine_s)
    assert parts.rest_s.value == pytest.approx(overhead_s + engine_s)


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


def test_a_pass_has_its_stand_in_where_one_was_timed(tmp_path: Path) -> None:
    values: dict[str, Values] = {
        "default decode": {"tpot_mean_s": 3}, "default prefill": {"ttft_mean_s": 20},
        "eager decode": {"tpot_mean_s": 3}, "eager prefill": {"ttft_mean_s": 20},
    }  # fmt: skip
    run = judged_run(with_stand_in(alone(tmp_path, values), "default"))
    default, eager = facts(run).flags.variants
    assert default.decode
    assert default.prefill
    assert eager.decode
    passes = [p.parts.stand_in_s.value for p in (default.decode, default.prefill, eager.decode)]
    assert passes == [2, 9, None]
    assert flags(run, facts(run))
    labels = {text.get_text() for text in plt.gcf().legends[0].get_texts()}
    assert {"overhead", "the engine's own", "the rest"} <= labels
    plt.close("all")


def test_a_step_that_brings_a_token_has_at_least_one_request() -> None:
    """Between whole numbers of requests its time is interpolated."""
    times = StepTimes(
        tokens=(1, 2), linear_s=(1, 3), rows=(1, 2), head_s=(0, 0), attention_pair_s=0,
        attention_read_s=0,
    )  # fmt: skip
    assert [decode_s(times, batch, 8) for batch in (0.9, 1, 1.25, 2)] == [1, 1, 1.5, 3]


def test_whose_step_was_timed_is_not_guessed(tmp_path: Path) -> None:
    """Of a lab with several models or kinds of kernels, several steps are on file."""
    run = alone(tmp_path, {"default decode": {"tpot_mean_s": 3}})
    decode = phase(with_stand_in(run, "default", steps=2), "default", "decode")
    assert decode
    assert not decode.parts.stand_in_s.known


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
