"""A machine by what a run on it left: which runs count, what is refused, what rests on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs import LABS
from labs.harness.analysis.computed import Band, PointForecasts
from labs.harness.cli.options import recorded_machine
from labs.harness.forecast import capacity_plan
from labs.harness.forecast.capacity_figures import Demand
from labs.harness.forecast.capacity_plan import Question, plan
from labs.harness.forecast.forecast import reasons_against, steps_of
from labs.harness.plan import recorded_machines, resolve
from labs.harness.plan.recorded_machines import MachineOnFile, find_machine
from labs.harness.plan.resolve import machine_of
from labs.harness.reports import capacity_plans, markdown
from labs.harness.spec.lab import SLO, LabError
from labs.harness.storage import results
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from serving.hardware.machine import Machine
from serving.models.catalog import BUNDLED, bundled, load
from serving.simulator.step import StepTimes
from tests.unit.builders import CEILINGS, MACHINE, SHAPE, write_run
from tests.unit.test_capacity_plan import SilentProgress, without_playing
from tests.unit.test_forecasting import TIMES

CPU = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=8 * 2**30)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path


def timed(folder: RunFolder, *steps: StepTimes, spread: float = 1.1) -> RunFolder:
    """The same run, before whose engines these steps were timed."""
    band = {"tpot_mean_s": Band(value=1, low=1, high=1)}
    forecasts = PointForecasts(
        points={p.key: band for p in folder.run().points()},
        step_times=[s.model_dump() for s in steps],
        machine_spread=spread,
    )
    before = folder.predictions().model_copy(update={"in_virtual_time": forecasts})
    write_json(folder.path / "predictions.json", before)
    return folder


def larger(tokens: int) -> StepTimes:
    return TIMES.model_copy(update={"tokens": (*TIMES.tokens[:-1], tokens)})


def test_a_machine_is_found_by_its_name_and_a_run_by_its_path(home: Path) -> None:
    run = timed(write_run(home), TIMES)
    for name in (MACHINE.slug, str(home / MACHINE.slug), str(run.path)):
        found = find_machine(name)
        assert found
        assert (found.machine, found.ceilings) == (MACHINE, CEILINGS)
        assert (found.model, found.shape, found.step) == ("abacus-1", SHAPE, TIMES)
        assert found.run == "/".join(run.path.parts[-3:])
        assert found.spread == 1.1
    assert recorded_machines.named() == [MACHINE.slug]


def test_of_a_machine_the_newest_run_counts_that_timed_the_steps_needed(home: Path) -> None:
    timed(write_run(home, "20260101"), larger(4096))
    timed(write_run(home, "20260102"), larger(2048))
    timed(write_run(home, "20260103"), larger(2048))
    timed(write_run(home, "20260104"), larger(64))
    damaged = timed(write_run(home, "20260105"), larger(9000))
    (damaged.path / "predictions.json").write_text("{")
    found = find_machine(MACHINE.slug)
    assert found
    for needed, day in ((64, "04"), (65, "03"), (2048, "03"), (2049, "01"), (8192, "01")):
        assert Path(found.covering(needed).run).name.startswith(f"202601{day}T"), needed


def test_a_step_far_beyond_the_largest_that_was_timed_is_refused(home: Path) -> None:
    """Which is so of a run that is named, and timed little."""
    timed(write_run(home, "20260101"), larger(4096))
    run = timed(write_run(home, "20260102"), larger(32))
    found = find_machine(str(run.path))
    assert found
    assert found.covering(64) == found
    with pytest.raises(LabError, match=r"1,024 tokens.* 32: name"):
        found.covering(1024)
    machine = find_machine(MACHINE.slug)
    assert machine
    with pytest.raises(LabError, match=r"8,193 tokens.* 4,096"):
        machine.covering(8193)


def test_the_run_that_counts_is_one_of_the_model_that_is_asked_for(home: Path) -> None:
    """A newer one of another model, with a larger table, does not hide it."""
    for day, name, tokens in (
        ("20260101", "small", 64), ("20260102", "other", 4096), ("20260103", "small", 32),
        ("20260104", "other", 2048),
    ):  # fmt: skip
        folder = timed(write_run(home, day), larger(tokens))
        write_json(folder.path / "run.json", folder.run().model_copy(update={"model": name}))
    small, other, newest = (find_machine(MACHINE.slug, model) for model in ("small", "other", ""))
    assert small
    assert other
    assert (small.model, small.largest) == ("small", 32)
    assert small.covering(64).largest == 64
    assert (other.model, other.largest) == ("other", 2048)
    assert newest == other
    with pytest.raises(LabError, match=r"small and other .* third"):
        find_machine(MACHINE.slug, "third")


def test_a_run_that_timed_several_steps_or_none_is_refused_with_the_reason(home: Path) -> None:
    run = write_run(home)
    with pytest.raises(LabError, match="timed no step"):
        find_machine(MACHINE.slug)
    timed(run, TIMES, larger(64))
    with pytest.raises(LabError, match="timed 2 steps"):
        find_machine(str(run.path))


def test_a_step_of_quantized_parts_is_not_the_models_own(home: Path) -> None:
    run = timed(write_run(home, flags={"kv-cache-dtype": "fp8"}), TIMES)
    with pytest.raises(LabError, match="model as it is"):
        find_machine(str(run.path))


def test_a_name_that_nothing_has_is_refused_with_those_that_are_known(home: Path) -> None:
    timed(write_run(home), TIMES)
    assert recorded_machine("h100", "") is None
    assert recorded_machine("", "") is None
    name = MACHINE.slug[:-1]
    assert recorded_machine(name, "") is None
    with pytest.raises(
        LabError, match=f"did you mean {MACHINE.slug}.* h100.*on file {MACHINE.slug}"
    ):
        machine_of(name)


@pytest.fixture
def measured() -> MachineOnFile:
    """The bundled model, at a tenth of a second for each token of a step."""
    model = load(bundled(), BUNDLED)
    step = StepTimes(
        tokens=(0, 1024), linear_s=(0, 102.4), rows=(0, 1000), head_s=(0, 0), attention_pair_s=0,
        attention_read_s=0,
    )  # fmt: skip
    return MachineOnFile(
        "abacus/lab/run", CPU, "cpu", CEILINGS, BUNDLED, False, model.shape, step, 1.0
    )


def test_only_engines_with_the_models_own_step_are_forecast_on_it(measured: MachineOnFile) -> None:
    def reasons(name: str) -> dict[str, str]:
        lab = LABS[name].at("cpu", quick=False)
        setup: Any = SimpleNamespace(
            lab=lab, endpoint=None, engine_command=(), datasheet=None, on_file=measured, weights={},
            places={}, machine=CPU, model=load(bundled(), BUNDLED),
        )  # fmt: skip
        return reasons_against(setup)

    assert not reasons("chunked-prefill")
    assert not reasons("prefix-caching")
    for name, lacking in (
        ("multi-lora", "adapters"), ("kv-quantization", "quantized cache"),
        ("speculative-decoding", "draft model"),
    ):  # fmt: skip
        assert any(lacking in reason for reason in reasons(name).values())


def test_a_lab_takes_the_run_that_timed_steps_as_large_as_its_own(measured: MachineOnFile) -> None:
    """And says what is extrapolated, where none did."""
    said = list[str]()
    progress: Any = SimpleNamespace(message=said.append)
    older = replace(measured, run="abacus/lab/older", step=larger(4096))
    model = load(bundled(), BUNDLED)

    def chosen(name: str, newest: MachineOnFile) -> str:
        lab = LABS[name].at("cpu", quick=False)
        return resolve._covering(lab, model, newest, progress).run

    both = replace(measured, earlier=(older,))
    assert chosen("overload", both) == measured.run
    assert chosen("continuous-batching", both) == older.run
    assert not said
    assert chosen("continuous-batching", measured) == measured.run
    assert "1,024 tokens" in said[0]
    assert "2,048" in said[0]


def test_its_steps_have_the_bands_of_a_timed_step(measured: MachineOnFile) -> None:
    points = LABS["continuous-batching"].at("cpu", quick=False).points(measured.shape, CEILINGS)
    setup: Any = SimpleNamespace(datasheet=None, on_file=replace(measured, spread=1.1))
    nobody: Any = None
    found = steps_of(setup, points, [], nobody, SilentProgress())
    assert found.keys() == {p.key for p in points}
    (expected, _), (faster, _), (slower, _) = found[points[0].key]
    assert expected == measured.step
    assert faster.linear_s[1] == pytest.approx(0.9 * 102.4 / 1.1)
    assert slower.linear_s[1] == pytest.approx(1.18 * 102.4 * 1.1)


def asked(measured: MachineOnFile, **more: Any) -> Question:
    settings: dict[str, Any] = {
        "model": load(bundled(), BUNDLED), "precision": "bf16", "card": CPU.slug,
        "demand": Demand(100, 20), "slo": SLO(ttft_s=20, tpot_s=1),
        "on_file": measured,
    }  # fmt: skip
    return Question(**settings | more)


def test_a_plan_for_it_rests_on_what_was_measured(
    measured: MachineOnFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = without_playing(monkeypatch)
    answer = plan(asked(measured), SilentProgress())
    assert answer.alone
    assert answer.alone.tokens_per_s.value == pytest.approx(10)  # a tenth of a second for a token
    assert answer.alone.prompt_s.low == pytest.approx(0.9 * 10)
    engines = [engine for planned in played for engine in planned.engines]
    assert {engine.on_cuda for engine in engines} == {False}
    assert all("--enforce-eager" in engine.argv for engine in engines)
    (fit,) = answer.fits
    assert fit.usable_bytes - fit.weight_bytes == pytest.approx(4 * 2**30)
    text = markdown.document(capacity_plans.page(answer))
    assert "`abacus/lab/run`" in text
    assert "datasheet" not in text
    assert "GPU" not in text


def test_what_was_not_timed_there_is_refused(measured: MachineOnFile) -> None:
    """Another precision, several devices, far larger steps, another model."""
    other = replace(measured, shape=SHAPE, model="abacus-1")
    for question, said in (
        (asked(measured, precision="fp8"), "one device's step in BF16"),
        (asked(measured, gpus=2), "one device's step in BF16"),
        (asked(replace(measured, step=larger(64))), "2,048 tokens.* 64"),
        (asked(other), f"abacus-1 .* {BUNDLED}"),
    ):
        with pytest.raises(LabError, match=said):
            plan(question, SilentProgress())
    assert capacity_plan.model_on_file(measured, "").shape == measured.shape
