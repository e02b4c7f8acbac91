"""Which GPUs a process may use: CUDA_VISIBLE_DEVICES and slices, on a stand-in for NVML."""

from __future__ import annotations

import os
import signal
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from labs import LABS
from labs.harness.cli.__main__ import main
from labs.harness.cli.terminal import EXPECTED_ERRORS
from labs.harness.plan.resolve import gpus_used
from serving.engines.transformers import Transformers
from serving.hardware import gpus, machine, telemetry
from serving.hardware.machine import GIB
from serving.hardware.telemetry import Gpus
from serving.models.catalog import ROOT
from tests.fake.nvml import NVMLError, make_nvml, unsupported

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


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({}, False),
        ({"nvmlDeviceIsMigDeviceHandle": lambda h: 1}, True),
        ({"nvmlDeviceGetVirtualizationMode": lambda h: 1}, False),  # passed through whole
        ({"nvmlDeviceGetVirtualizationMode": lambda h: 2}, True),
        (
            {"nvmlDeviceIsMigDeviceHandle": unsupported,
             "nvmlDeviceGetVirtualizationMode": unsupported},
            False,
        ),
    ],
)  # fmt: skip
def test_a_part_of_a_gpu_is_known_as_one(
    changed: dict[str, Any], part: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = make_nvml(
        nvmlDeviceGetName=lambda h: "Abacus",
        nvmlDeviceGetMemoryInfo=lambda h: SimpleNamespace(total=80 * GIB, used=0),
        **changed,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv(gpus.VARIABLE, raising=False)
    assert machine.detect().parts is part


def test_only_the_gpus_that_the_engines_use_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A colleague's work on another visible GPU disturbs no trial."""
    nvml = three()
    running = {0: [1], 1: [2], 2: [3, 4]}
    monkeypatch.setattr(nvml, "nvmlDeviceGetComputeRunningProcesses", running.__getitem__)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv(gpus.VARIABLE, "2,0,1")
    lab = LABS["continuous-batching"].at("gpu-80", quick=False)
    for changes, watched, processes in (
        ({}, 1, 2),
        ({"tensor-parallel-size": 2}, 2, 3),
        ({"tensor-parallel-size": 2, "distributed-executor-backend": "ray"}, 3, 4),
    ):
        changed = lab.model_copy(update={"flags": {**lab.flags, **changes}})
        source = telemetry.source("gpu", gpus_used(changed))
        assert source
        assert (len(source.read()), source.processes()) == (watched, processes)
    assert Transformers.gpus_used({}) is None  # it may spread a model over all that it sees


@pytest.mark.parametrize(("told", "mode"), [(0, "default"), (3, "exclusive process")])
def test_the_first_gpus_compute_mode_is_recorded(
    told: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = make_nvml(
        nvmlDeviceGetComputeMode=lambda h: told, nvmlSystemGetCudaDriverVersion=lambda: 13000,
        nvmlSystemGetDriverVersion=lambda: "580.1", nvmlDeviceGetMaxClockInfo=lambda h, kind: 1980,
        NVML_CLOCK_MEM=2,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv(gpus.VARIABLE, raising=False)
    found = machine.environment(ROOT, "gpu")
    assert found.compute_mode == mode
    assert gpus.admits_one_process(mode) == (mode != "default")


@pytest.mark.parametrize(("given", "order"), [("", "PCI_BUS_ID"), ("FASTEST_FIRST",) * 2])
def test_every_command_has_cuda_count_gpus_as_nvml_does(
    given: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a machine with two kinds of GPU would be described by the one that is not used."""
    monkeypatch.setenv(gpus.ORDER, given)
    if not given:
        monkeypatch.delenv(gpus.ORDER)
    monkeypatch.setenv("MPLCONFIGDIR", "here")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    seen = list[str]()
    monkeypatch.setattr("labs.harness.cli.cli.app", lambda **_: seen.append(os.environ[gpus.ORDER]))
    with pytest.raises(SystemExit):
        main()
    assert seen == [order]
    assert (gpus.ORDER in machine.engine_variables(os.environ)) == bool(given)


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


def lost(gpu: int) -> ModuleType:
    """Of the three one has fallen off the bus."""
    nvml = three()

    def handle(number: int) -> int:
        if number == gpu:
            raise NVMLError("GPU is lost")
        return number

    nvml.nvmlDeviceGetHandleByIndex = handle  # type: ignore[attr-defined]
    return nvml


@pytest.mark.parametrize(
    ("wanted", "found"), [(None, [0, 2]), ("1", [2]), ("2", []), ("GPU-b", [2])]
)
def test_a_gpu_that_does_not_answer_is_passed_over(
    wanted: str | None, found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(gpus.VARIABLE, raising=False)
    if wanted is not None:
        monkeypatch.setenv(gpus.VARIABLE, wanted)
    assert gpus.visible(lost(1)) == found
    assert gpus.silent(lost(1)) == {1: "GPU is lost"}


def test_a_gpu_whose_memory_is_not_told_gets_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = three()
    for name in ("nvmlDeviceGetMemoryInfo", "nvmlSystemGetDriverVersion"):
        monkeypatch.setattr(nvml, name, unsupported, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv(gpus.VARIABLE, raising=False)
    with pytest.raises(gpus.GpuError, match="the memory"):
        machine.detect()
    assert gpus.GpuError in EXPECTED_ERRORS
    assert machine.environment(ROOT, "gpu").driver is None  # which it does not tell either


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu"])
@pytest.mark.parametrize("wanted", [None, "", "7"])
def test_where_vllm_is_for_gpus_and_none_answers_nothing_starts(
    wanted: str | None, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the lab would go on as on a machine without a GPU."""
    monkeypatch.setattr("serving.hardware.machine.metadata.version", lambda _: version)
    monkeypatch.delenv(gpus.VARIABLE, raising=False)
    if wanted is not None:
        monkeypatch.setenv(gpus.VARIABLE, wanted)
    for nvml in (make_nvml(nvmlInit=unsupported), make_nvml(nvmlDeviceGetCount=unsupported)):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        if wanted == "" or "cpu" in version:
            assert machine.detect().kind == "cpu"
        else:
            with pytest.raises(gpus.GpuError, match="none answers"):
                machine.detect()


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [("cuda", (7, 5), "FP16"), ("cuda", (8, 0), "BF16"), ("cpu", (7, 5), "BF16")],
)
def test_sixteen_bits_are_fp16_where_a_gpu_has_no_bf16(
    device: str, capability: tuple[int, int], expected: str
) -> None:
    cuda = SimpleNamespace(get_device_capability=lambda: capability)
    torch = SimpleNamespace(cuda=cuda, float16="FP16", bfloat16="BF16")
    assert gpus.type_of_16_bits(torch, device) == expected
