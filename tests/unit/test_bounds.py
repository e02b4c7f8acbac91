"""What a run asks of this machine, against the cores, the memory and the disk that are here."""

from __future__ import annotations

import os
from collections import namedtuple
from dataclasses import replace
from typing import Any

import pytest

from labs import LABS
from labs.harness.cli.terminal import ConsoleProgress
from labs.harness.plan import bounds
from labs.harness.plan.bounds import PROCESSES_EACH_CORE, require_bounds
from labs.harness.plan.resolve import RunRequest, resolve
from labs.harness.spec.lab import Lab, LabError, Variant
from loadtests.workload import Fixed
from serving.engines.vllm import Vllm
from serving.hardware import gpus
from serving.hardware.machine import Machine
from tests.unit import hostile
from tests.unit.builders import SHAPE, make_lab, make_workload
from tests.unit.test_endpoint import MODELS, STREAMS

CORES = 4
CPU = Machine(kind="cpu", model="Any", count=CORES, memory_bytes=16 * 2**30)
GPU = Machine(kind="gpu", model="Any", count=1, memory_bytes=80 * 2**30)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, free_bytes: int = 16 * 2**30) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))
    monkeypatch.setattr(bounds, "available_bytes", lambda: free_bytes)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(free_bytes))


def refused(lab: Lab, machine: Machine = CPU, starts_engines: bool = True) -> str:
    """What it asks for too much of; nothing where it is accepted."""
    try:
        require_bounds(lab, machine, replace(SHAPE, hidden=4096), starts_engines)
    except LabError as error:
        return str(error).partition(" asks for")[0]
    return ""


def with_servers(number: int) -> Lab:
    wide = Variant(name="wide", flags={"api-server-count": number})
    return make_lab(variants=(wide,), claims=(), evidence=(), probed=())


MOST = PROCESSES_EACH_CORE * CORES
LONG = (make_workload("concurrent:1", prompt_tokens=Fixed(tokens=100_000)),)


@pytest.mark.parametrize(
    ("lab", "what"),
    [
        (make_lab(load_processes=MOST), ""),
        (make_lab(load_processes=MOST + 1), "load_processes"),
        (make_lab(load_processes=16, workloads=LONG, requests=2000), "load_processes"),
        (make_lab(workloads=LONG, requests=20_000), "requests"),  # of all repeats, on disk
        (make_lab(workloads=LONG, requests=2000), ""),
        (with_servers(16), ""),
        (with_servers(17), "the engine of wide"),
        (make_lab(attention_tokens=(131_072,)), ""),
        (make_lab(attention_tokens=tuple(range(131_000, 131_070))), "attention_tokens"),
    ],
)
def test_a_run_asks_for_no_more_than_is_here(lab: Lab, what: str) -> None:
    assert refused(lab) == what


def test_an_endpoints_engine_is_not_started_here() -> None:
    assert refused(with_servers(17), starts_engines=False) == ""


def test_one_process_is_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "available_bytes", lambda: 0)
    assert refused(make_lab()) == ""


@pytest.mark.parametrize("name", LABS)
def test_every_lab_fits_a_small_machine(name: str) -> None:
    scales = [("cpu", CPU), *((f"gpu-{of.gb}", GPU) for of in gpus.CLASSES)]
    assert {refused(LABS[name].at(scale, False), machine) for scale, machine in scales} == {""}


def test_engines_that_stay_loaded_together_are_counted_with_all_their_servers() -> None:
    flags: dict[str, Any] = {"kv-cache-memory-bytes": 2**20}
    one = Vllm.host_memory_bytes(flags, SHAPE)
    four = Vllm.host_memory_bytes({**flags, "api-server-count": 4}, SHAPE)
    assert four - one == 3 * Vllm.server_bytes


def test_a_recorded_run_is_refused_before_anything_starts() -> None:
    """As is what a reader sets: there is one place for both."""
    recorded = LABS["continuous-batching"].at("cpu", True, {"load_processes": 256})
    with hostile.serving({"/v1/models": MODELS, "/v1/chat/completions": STREAMS}) as url:
        request = RunRequest(recorded, quick=True, reproduces="x", endpoint=url)
        with pytest.raises(LabError, match=r"load_processes .* 256"):
            resolve(request, ConsoleProgress())
