"""Engines that share a GPU: what fits, that idle ones must be harmless, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs import LABS
from labs.harness.changes import parse_changes
from labs.harness.filing.recorded import Residency, TrialResult
from labs.harness.filing.results import RunFolder
from labs.harness.filing.sampling import took_turns
from labs.harness.filing.writing import write_json
from labs.harness.judging.idle_neighbours import PROOF_S, STEPS, slowdown, times_as_long
from labs.harness.running.clock import CLOSING_S, Clock, TimeUsedUp
from labs.harness.running.engines import Engines, resident_groups, shares_of_gpu
from labs.harness.running.harness import CUT_SHORT, NO_ROOM, NOT_TIMED
from labs.harness.spec import Lab
from labs.harness.telling import method
from labs.harness.telling.templates import filled
from serving.engines.base import EngineError
from serving.engines.vllm import CONTEXT_BYTES, GRAPHS_BYTES, Vllm
from serving.hardware.gpus import DATASHEETS
from serving.hardware.machine import Machine
from serving.hardware.reference_step import START_S, ReferenceStep
from serving.weights import dummy
from serving.weights.models import Model, scale_of, shape_of
from tests.unit.builders import SHAPE, write_run
from tests.unit.test_turns import Noted, set_lab

H100 = Machine(
    kind="gpu",
    model="NVIDIA H100 80GB HBM3",
    count=1,
    memory_bytes=DATASHEETS["NVIDIA H100 80GB HBM3"].memory_bytes,
)
LLAMA_8B = Model("llama-8b", Path("/nowhere"), shape_of(dummy.config_of("llama-8b")), dummy=True)
FLAGS = {"kv-cache-memory-bytes": 8 * 2**30, "max-num-batched-tokens": 8192, "max-num-seqs": 256}


def lab_of(name: str, settings: str = "", machine: Machine = H100) -> Lab:
    return LABS[name].at(scale_of(machine), True, parse_changes(settings), dummy=True)


def shares(lab: Lab, machine: Machine = H100, model: Model = LLAMA_8B) -> dict[str, float]:
    return shares_of_gpu(lab, machine, model, {})


def steps(reading_ms: float, computing_ms: float = 1.0, spread: float = 0.0) -> list[ReferenceStep]:
    """STEPS of them, evenly between this and `spread` more."""
    factors = [1 + spread * n / (STEPS - 1) for n in range(STEPS)]
    return [
        ReferenceStep(reading_s=1e-3 * reading_ms * f, computing_s=1e-3 * computing_ms * f)
        for f in factors
    ]


# ---------------------------------------------------------------------------------- what fits


def test_an_engines_memory_is_its_weights_its_cache_and_what_is_beside_them() -> None:
    beside = CONTEXT_BYTES + GRAPHS_BYTES
    activations = 2 * 32 * 8192 * 4096  # bytes x hidden sizes x tokens x hidden size
    logits = 4 * 4 * 256 * 128_256  # bytes x copies x requests x vocabulary
    expected = LLAMA_8B.shape.held_bytes + 8 * 2**30 + beside + activations + logits
    assert Vllm.gpu_memory_bytes(FLAGS, LLAMA_8B.shape) == expected
    assert 6e9 < expected - LLAMA_8B.shape.held_bytes - 8 * 2**30 < 8e9
    eager = Vllm.gpu_memory_bytes({**FLAGS, "enforce-eager": True}, LLAMA_8B.shape)
    assert eager == expected - GRAPHS_BYTES


@pytest.mark.parametrize("lab", ["single-stream", "prefix-caching", "chunked-prefill"])
def test_quick_runs_of_these_labs_share_a_gpu_of_80_gb(lab: str) -> None:
    """So that half an hour there is not spent on starting one engine after another."""
    quick = LABS[lab].at("gpu-80", quick=True, dummy=True)
    assert set(shares(quick)) == {v.name for v in quick.variants}


@pytest.mark.parametrize(
    "more",
    [
        {"gpu-memory-utilization": 0.5},
        {"tensor-parallel-size": 2},
        {"data-parallel-size": 2},
        {"distributed-executor-backend": "ray"},
        {"speculative-config": {"model": "<draft>", "num_speculative_tokens": 4}},
        {"enable-lora": True},
        {"kv-offloading-size": 16},
    ],
)
def test_what_cannot_be_counted_is_not_known(more: Mapping[str, Any]) -> None:
    """A share that the lab sets, several GPUs, a draft, adapters, a cache that is offloaded."""
    assert Vllm.gpu_memory_bytes({**FLAGS, **more}, LLAMA_8B.shape) is None
    without = {name: value for name, value in FLAGS.items() if name != "kv-cache-memory-bytes"}
    assert Vllm.gpu_memory_bytes(without, LLAMA_8B.shape) is None


def test_two_engines_of_8_billion_parameters_share_a_gpu_of_80_gb() -> None:
    lab = lab_of("prefix-caching")
    found = shares(lab)
    assert set(found) == {"off", "on"}
    assert sum(found.values()) <= 0.9
    for variant in lab.variants:
        need = Vllm.gpu_memory_bytes(lab.flags_of(variant), LLAMA_8B.shape)
        assert need
        assert 0 <= found[variant.name] - need / H100.memory_bytes < 0.001
    l4 = Machine(kind="gpu", model="NVIDIA L4", count=1, memory_bytes=23034 * 2**20)
    assert shares(lab_of("prefix-caching", machine=l4), l4) == {}
    assert shares(lab_of("continuous-batching")) == {}  # one engine has it all


@pytest.mark.parametrize(
    "settings",
    ["flags.gpu-memory-utilization=.4", "flags.tensor-parallel-size=2",
     f"flags.kv-cache-memory-bytes={30 * 2**30}"],
)  # fmt: skip
def test_a_lab_that_shares_its_gpu_otherwise_takes_turns(settings: str) -> None:
    assert shares(lab_of("prefix-caching", settings)) == {}


def test_weights_of_a_variants_own_are_counted() -> None:
    small = Model("small", Path("/nowhere"), SHAPE, dummy=True)
    lab = lab_of("weight-quantization", f"flags.kv-cache-memory-bytes={3 * 2**30}")
    own = {v.name: small for v in lab.variants if v.weights}
    assert shares_of_gpu(lab, H100, LLAMA_8B, {}) == {}
    found = shares_of_gpu(lab, H100, LLAMA_8B, own)
    assert max(found, key=lambda name: found[name]) == "bf16"


def test_the_host_has_room_for_all_of_them_and_a_resumed_run_goes_on_as_it_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup: Any = SimpleNamespace(
        lab=lab_of("prefix-caching"), endpoint=None, machine=H100, model=LLAMA_8B, weights={}
    )
    for free_bytes, in_turn, groups in (
        (2**37, None, 1), (2**33, None, 2), (2**37, True, 2), (2**33, False, 1),
    ):  # fmt: skip
        monkeypatch.setattr(
            "labs.harness.running.engines.available_bytes", lambda free=free_bytes: free
        )
        assert len(resident_groups(setup, in_turn)) == groups


# ---------------------------------------------------------------------------------- idle neighbours


def test_idle_engines_are_harmless_within_the_spread_of_the_machine() -> None:
    quiet = steps(0.2)
    assert slowdown(quiet, steps(0.205)) is None
    assert slowdown(quiet, steps(0.19)) is None  # faster does no harm
    said = slowdown(quiet, steps(0.22)) or ""
    assert all(figure in said for figure in ("reading", "1.10 times", "0.22 ms", "0.2 ms"))
    assert "computing" in (slowdown(quiet, steps(0.2, computing_ms=1.2)) or "")
    assert slowdown(steps(0.2, spread=0.1), steps(0.22)) is None  # it wandered as much before
    one_late = [*quiet[:-1], ReferenceStep(reading_s=1, computing_s=1)]
    assert slowdown(one_late, steps(0.25))  # which hides nothing
    assert times_as_long(quiet, steps(0.3, 2.0)) == pytest.approx({"reading": 1.5, "computing": 2})


# ---------------------------------------------------------------------------------- in a run


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of `off` and `on`, of which no trial is on file."""
    folder = write_run(tmp_path)
    for path in folder.path.rglob("trial.json"):
        path.unlink()
    set_lab(folder, flags={"max-model-len": 128, **FLAGS})
    return folder


class OnOneGpu(Noted):
    """The noted harness on a GPU that both engines fit, whose reference steps are given."""

    def __init__(self, folder: RunFolder, *timed: list[ReferenceStep]) -> None:
        super().__init__(folder)
        setup: Any = self.setup
        setup.machine, setup.model, setup.weights = H100, LLAMA_8B, {}
        progress: Any = self.progress
        progress.waiting = lambda text: None
        self.groups, self.trials._in_turn = [list(setup.lab.variants)], False
        answers, started = iter(timed), list[list[str]]()

        def time_machine(count: int) -> tuple[ReferenceStep, ...]:
            assert count == STEPS
            started.append([*self.noted])
            return tuple(next(answers))

        trials: Any = self.trials
        trials.time_machine = time_machine
        self.timed_after = started  # which engines had started by then


def test_engines_share_a_gpu_once_idle_ones_are_shown_to_be_harmless(folder: RunFolder) -> None:
    harness = OnOneGpu(folder, steps(0.2), steps(0.201))
    harness.play_lab()
    assert harness.noted == ["off", "on", *"11112222"]
    assert harness.timed_after == [[], ["off", "on"]]
    assert len(harness.groups) == 1
    assert harness.steps == []
    kept = folder.residency()
    assert kept
    assert (kept.in_turn, len(kept.alone), len(kept.beside)) == ("", STEPS, STEPS)
    assert kept.shares == harness.engines.shares == {"off": 0.37, "on": 0.37}
    run = folder.run()
    assert took_turns(folder, run.points(), run.rebuilt_lab()) is False


def test_engines_that_slow_the_gpu_down_while_idle_take_turns(folder: RunFolder) -> None:
    harness = OnOneGpu(folder, steps(0.2), steps(0.24))
    harness.play_lab()
    (said,) = harness.steps
    assert "reading took 1.20 times" in said
    assert len(harness.groups) == 2
    assert harness.trials._in_turn
    assert harness.engines.shares == {}  # each has the GPU to itself
    assert harness.noted[:2] == ["off", "on"]
    assert len([n for n in harness.noted[2:] if n in ("off", "on")]) >= 2
    kept = folder.residency()
    assert kept
    assert kept.in_turn in said
    assert len(kept.beside) == STEPS
    points = folder.run().points()
    assert {r.start for p in points if (r := folder.trial_result(p, 1))} == {2}


def test_where_one_does_not_start_beside_the_others_they_take_turns(folder: RunFolder) -> None:
    """Free memory is less than its share, say. The next engine is started alone."""
    harness = OnOneGpu(folder, steps(0.2))
    start = harness.engines._wait

    def refused(variant: Any, engine: Any) -> None:
        if variant.name == "on" and harness.engines.shares:
            raise EngineError("too little\nits last lines")
        start(variant, engine)

    harness.engines._wait = refused  # type: ignore[method-assign]
    harness.play_lab()
    assert harness.steps[0] == "too little\nits last lines"
    assert "take turns" in harness.steps[1]
    kept = folder.residency()
    assert kept
    assert kept.in_turn.endswith(": too little")
    assert not kept.beside
    run = folder.run()
    assert all(
        (result := folder.trial_result(point, repeat)) and result.failed is None
        for point in run.points()
        for repeat in (1, 2)
    )


def test_a_call_that_is_killed_in_a_joint_start_goes_on_in_turn(folder: RunFolder) -> None:
    harness = OnOneGpu(folder, steps(0.2))

    def killed(variant: Any, engine: Any) -> None:
        raise KeyboardInterrupt

    harness.engines._wait = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        harness.play_lab()
    kept = folder.residency()
    assert kept
    assert (kept.in_turn, len(kept.alone)) == (CUT_SHORT, STEPS)
    run = folder.run()
    assert took_turns(folder, run.points(), run.rebuilt_lab()) is True


def test_after_a_joint_start_that_failed_an_engines_start_has_to_fit(folder: RunFolder) -> None:
    harness = OnOneGpu(folder, steps(0.2))
    harness.dead.add("on")
    setup: Any = harness.setup
    setup.clock = Clock.of(CLOSING_S + 200, [240.0], [])
    with pytest.raises(TimeUsedUp, match=r"starting (off|on)"):
        harness.play_lab()
    assert harness.noted == ["off", "on"]
    kept = folder.residency()
    assert kept
    assert kept.in_turn  # so the next call goes on


def test_where_nothing_can_be_timed_no_engine_starts_beside_another(folder: RunFolder) -> None:
    harness = OnOneGpu(folder, [])
    harness.play_lab()
    (said,) = harness.steps
    assert NOT_TIMED in said
    assert harness.timed_after == [[]]
    assert harness.noted[1] == "1"  # a trial, before another engine is started


def test_a_call_whose_time_ends_has_to_hold_the_timing_too(folder: RunFolder) -> None:
    harness = OnOneGpu(folder)
    setup: Any = harness.setup
    trial_s = harness.trials.trial_s(setup.points[0])
    needed_s = 100 + trial_s + START_S + PROOF_S
    for left_s in (needed_s - 1, needed_s + 1):
        setup.clock = Clock.of(CLOSING_S + left_s, [100.0], [])
        setup.clock.played = True
        with pytest.raises(TimeUsedUp if left_s < needed_s else StopIteration):
            harness.play_lab()  # goes on to a step of which no time is given
    assert harness.noted == []


def test_a_run_whose_engines_could_not_share_the_gpu_goes_on_in_turn(folder: RunFolder) -> None:
    """Before its first trial too; after that its trials tell."""
    run = folder.run()
    points, lab = run.points(), run.rebuilt_lab()
    for in_turn, expected in (("too slow", True), ("", None)):
        write_json(folder.residency_file, Residency(shares={"off": 0.4}, in_turn=in_turn))
        assert took_turns(folder, points, lab) is expected
    played = TrialResult(point=points[0].key, repeat=1)
    write_json(folder.trial_folder(points[0], 1) / "trial.json", played)
    again = OnOneGpu(folder)
    again.play_lab()  # with its engines together, and nothing is timed again
    assert again.noted[:2] == ["off", "on"]
    assert set(again.engines.shares) == {"off", "on"}
    assert again.steps == []


def test_a_run_that_goes_on_in_turn_before_its_first_trial_says_so(folder: RunFolder) -> None:
    """Its engines were shown to share the GPU, and then less of the host's memory was free."""
    shared = Residency(shares={"off": 0.37, "on": 0.37}, alone=tuple(steps(0.2)))
    write_json(folder.residency_file, shared)
    harness = OnOneGpu(folder)
    harness.groups, harness.trials._in_turn = [[v] for v in harness.setup.lab.variants], True
    harness.play_lab()
    assert folder.residency() == shared.model_copy(update={"in_turn": NO_ROOM})
    first = Residency(shares={}, in_turn="too slow")
    write_json(folder.residency_file, first)
    harness.play_lab()
    assert folder.residency() == first


def test_an_engine_that_shares_the_gpu_is_told_its_share_and_one_alone_is_not(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[Any]()

    class Told(Vllm):
        def __init__(self, name: str, model: Model, flags: Any, **_: Any) -> None:
            told.append(dict(flags))

        def stop(self) -> None:
            pass

    monkeypatch.setattr("labs.harness.running.engines.ENGINES", {"vllm": Told})
    monkeypatch.setattr(Engines, "_wait", lambda self, variant, engine: None)
    harness = OnOneGpu(folder)
    setup: Any = harness.setup
    setup.places, setup.engine_command = {}, ()
    engines = Engines(setup, folder.path, harness.prometheus, {}, harness.progress)
    off, on = setup.lab.variants
    engines.load([off, on])
    engines.load([off])
    assert [flags.pop("gpu-memory-utilization", None) for flags in told] == [0.37, 0.37, None]
    assert told[0] == told[2] == setup.lab.engine_flags_of(off)


def test_a_report_says_how_the_gpu_was_shared(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    run, lab, summary = folder.run(), folder.run().rebuilt_lab(), folder.summary()
    repeats = method.repeats(lab, summary)

    def said(**fields: Any) -> str:
        shared = Residency(shares={"off": 0.4, "on": 0.35}, **fields)
        known = method.known(run, lab, None, shared)
        return filled("method.md", run=run, lab=lab, repeats=repeats, **known)

    assert "residency" not in said()
    shared = said(alone=steps(0.2), beside=steps(0.3))
    for figure in ("off 0.4, on 0.35", "reading took 1.50 times", "computing 1.00 times as long"):
        assert figure in shared
    assert "too slow" in said(in_turn="too slow")
