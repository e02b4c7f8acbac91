"""Which GPUs a process may use: CUDA_VISIBLE_DEVICES and slices, on a stand-in for NVML."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from serving import gpus, machine
from serving.machine import GIB
from serving.telemetry import Gpus
from tests.fake.nvml import NVMLError, make_nvml

# three GPUs; where the last one is cut, into two slices, the first place of four is empty
UUIDS = {0: "GPU-aa", 1: "GPU-ab", 2: "GPU-b", "one": "MIG-1", "two": "MIG-2"}
SLICES = {1: "one", 3: "two"}


def three(*cut: int) -> ModuleType:
    def of_slice(gpu: int, index: int) -> str:
        if index not in SLICES:
            raise NVMLError
        return SLICES[index]

    return make_nvml(
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetUUID=UUIDS.__getitem__,
        nvmlDeviceGetMigMode=lambda gpu: (int(gpu in cut), 0),
        nvmlDeviceGetMaxMigDeviceCount=lambda gpu: 4,
        nvmlDeviceGetMigDeviceHandleByIndex=of_slice,
        nvmlDeviceGetName=lambda h: f"Abacus {h}",
        nvmlDeviceGetMemoryInfo=lambda h: SimpleNamespace(
            total=(80 if isinstance(h, int) else 10) * GIB, used=0
        ),
    )


def seen(monkeypatch: pytest.MonkeyPatch, wanted: str | None, *cut: int) -> list[Any]:
    monkeypatch.delenv(gpus.VARIABLE, raising=False)
    if wanted is not None:
        monkeypatch.setenv(gpus.VARIABLE, wanted)
    return gpus.visible(three(*cut))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2", [2]),
        ("2, 0", [2, 0]),
        ("1,3,0", [1]),  # CUDA reads no further than what is not there
        ("GPU-b", [2]),
        ("GPU-a", [0]),
        ("GPU-c", []),
    ],
)
def test_cuda_visible_devices_is_honoured(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, found: list[int]
) -> None:
    assert seen(monkeypatch, wanted) == found


@pytest.mark.parametrize(
    ("wanted", "found"),
    [(None, ["one"]), ("2", ["one"]), ("0,1", [0, 1]), ("MIG-2", ["two"]), ("GPU-b", ["one"])],
)
def test_of_a_gpu_in_slices_one_is_seen(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, found: list[Any]
) -> None:
    assert seen(monkeypatch, wanted, 2) == found


def test_the_machine_is_what_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", three(2))
    monkeypatch.setenv(gpus.VARIABLE, "1,0")
    here = machine.detect()
    assert (here.model, here.count, here.memory_bytes) == ("Abacus 1", 2, 80 * GIB)
    assert len(Gpus(three(2)).read()) == 2
    monkeypatch.setenv(gpus.VARIABLE, "MIG-2")
    here = machine.detect()
    assert (here.model, here.count, here.memory_bytes) == ("Abacus two", 1, 10 * GIB)
    monkeypatch.setenv(gpus.VARIABLE, "")
    assert machine.detect().kind == "cpu"
