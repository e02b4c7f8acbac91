"""How many processes send, where neither the lab nor the reader says so."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs import LABS
from labs.harness.plan.load_processes import chosen_number, cores_for_clients, most_users
from labs.harness.plan.resolve import RunRequest, lab_of, with_load_processes
from labs.harness.runner.reproduce import request as request_again
from labs.harness.spec.lab import Lab, digest_of
from labs.harness.storage import manifest
from labs.harness.storage.recorded import Run
from serving.hardware.machine import Machine
from tests.unit.builders import make_lab, make_workload, write_run

GPU = Machine(kind="gpu", model="Any", count=1, memory_bytes=80 * 2**30)
LAB = LABS["kv-quantization"]


def cores(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(
        "serving.hardware.machine.os.sched_getaffinity", lambda _: set(range(number))
    )


def resolved(request: RunRequest, here: Machine | None, told: list[str] | None = None) -> Lab:
    display: Any = SimpleNamespace(message=(told if told is not None else []).append)
    return with_load_processes(lab_of(request, "gpu-80"), request, here, display)


def of_loads(*loads: str) -> Lab:
    return make_lab(workloads=(make_workload(*loads),), requests=1024)


@pytest.mark.parametrize(
    ("loads", "number"),
    [
        (("concurrent:1",), 1),
        (("concurrent:64",), 1),
        (("concurrent:65",), 2),
        (("concurrent:256", "concurrent:1"), 4),
        (("poisson:16", "waves:128"), 1),
    ],
)
def test_there_is_one_for_each_64_users_of_the_largest_closed_loop(
    loads: tuple[str, ...], number: int
) -> None:
    assert chosen_number(of_loads(*loads)) == number


def test_an_intruder_is_not_among_the_users() -> None:
    loads = {"workloads.contended.loads": ["contended:64/2"]}
    lab = LABS["chunked-prefill"].at("gpu-80", False, loads)
    assert max(load.seats for workload in lab.workloads for load in workload.loads) == 65
    assert chosen_number(lab) == 1


def test_beside_a_gpu_they_leave_cores_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = of_loads("concurrent:512")
    found = []
    for number in (1, 2, 4, 16):
        cores(monkeypatch, number)
        found.append(chosen_number(lab, cores_for_clients("gpu")))
    assert found == [1, 1, 2, 8]


def test_a_lab_on_a_gpu_has_as_many_as_its_users_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 16)
    told: list[str] = []
    for quick, number in ((True, 2), (False, 3)):
        lab = resolved(RunRequest(LAB, quick), GPU, told)
        assert (lab.load_processes, lab.load_processes_chosen) == (number, True)
        assert lab.resolved()["load_processes"] == number
    assert [re.findall(r"\d+", line) for line in told] == [["2", "96"], ["3", "192"]]


def test_what_the_lab_the_reader_or_a_recorded_run_says_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cores(monkeypatch, 16)
    told: list[str] = []
    by_lab = resolved(RunRequest(LABS["speculative-decoding"]), GPU, told)
    assert most_users(by_lab) == 768
    by_reader = resolved(RunRequest(LAB, changes={"load_processes": 1}), GPU, told)
    recorded = resolved(RunRequest(LAB), GPU)
    monkeypatch.setattr("serving.hardware.machine.os.sched_getaffinity", lambda _: {0})
    again = resolved(RunRequest(recorded, reproduces="x"), GPU, told)
    found = [by_lab, by_reader, again]
    assert [lab.load_processes for lab in found] == [4, 1, 3]
    assert [lab.load_processes_chosen for lab in found] == [False, False, True]
    assert "4 processes" in told[0]
    assert len(told) == 2


def test_a_machine_that_is_not_here_counts_by_the_users_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The page of a forecast names the settings of a run that is made there."""
    cores(monkeypatch, 1)
    told: list[str] = []
    there = resolved(RunRequest(LAB), None, told)
    assert (there.load_processes, told) == (3, [])
    assert there.digest() == LAB.at("gpu-80", quick=False).digest()


def test_no_digest_has_a_chosen_number() -> None:
    plain, chosen = make_lab(), {"load_processes": 4, "load_processes_chosen": True}
    lab = plain.model_copy(update=chosen)
    assert lab.digest() == digest_of(lab.resolved()) == plain.digest()
    assert make_lab(load_processes=4).digest() != plain.digest()
    assert "load_processes_chosen" not in plain.resolved()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of a lab on a GPU, which chose 2."""
    cores(monkeypatch, 16)
    like = write_run(tmp_path).run()
    lab = resolved(RunRequest(LAB, quick=True), GPU)
    update = {"lab": lab.resolved(), "digest": lab.digest(), "scale": "gpu-80", "quick": True}
    return like.model_copy(update=update)


def test_a_run_that_chose_is_not_of_other_settings(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.lab["load_processes"] == 2
    assert not manifest.is_stale(run)
    setting = LAB.model_copy(update={"quick": {**LAB.quick, "load_processes": 3}})
    monkeypatch.setitem(LABS, LAB.name, setting)
    assert manifest.is_stale(run)


def test_a_run_whose_reader_set_it_is_compared_with_that(run: Run) -> None:
    lab = LAB.at("gpu-80", True, changes := {"load_processes": 5})
    by_reader = run.model_copy(update={"lab": lab.resolved(), "changes": changes})
    assert not manifest.is_stale(by_reader)
    forged = {**lab.resolved(), "load_processes": 6}
    assert manifest.is_stale(by_reader.model_copy(update={"lab": forged}))


def test_a_run_that_is_asked_for_again_keeps_its_number(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(monkeypatch, 64)
    again = request_again(run, model="abacus-1")
    lab = resolved(again, GPU)
    assert lab.load_processes == 2
    assert lab.digest() == run.digest
    facts = [manifest.facts(of) for of in (run, run.model_copy(update={"lab": lab.resolved()}))]
    assert manifest.differences(*facts) == []
    assert facts[0]["lab.load_processes"] == "2"
