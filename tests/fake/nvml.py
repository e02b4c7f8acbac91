"""A stand-in for NVML: one GPU at work, at a steady power, held back by heat and its power cap."""

from __future__ import annotations

import time
from types import ModuleType, SimpleNamespace

WATTS = 300


class NVMLError(Exception):
    pass


def unsupported(*_: object) -> None:
    raise NVMLError


def make_nvml(**changed: object) -> ModuleType:
    """One GPU at work: WATTS, 1.755 GHz, held by heat and by its power cap."""
    nvml = ModuleType("pynvml")
    known: dict[str, object] = {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": 1,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetUUID": lambda h: f"GPU-{h}",
        "nvmlDeviceGetMigMode": unsupported,
        "nvmlDeviceIsMigDeviceHandle": lambda h: 0,
        "nvmlDeviceGetVirtualizationMode": lambda h: 0,
        "nvmlDeviceGetPowerUsage": lambda h: 1000 * WATTS,
        "nvmlDeviceGetTotalEnergyConsumption": lambda h: int(WATTS * 1000 * time.time()),
        "nvmlDeviceGetClockInfo": lambda h, kind: 1755,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda h: 0x44,
        "nvmlDeviceGetMemoryInfo": lambda h: SimpleNamespace(used=2**30),
        "nvmlDeviceGetComputeRunningProcesses": lambda h: [],
        "nvmlDeviceGetComputeMode": lambda h: 0,
        "nvmlDeviceGetUtilizationRates": lambda h: SimpleNamespace(gpu=87),
    }
    for name, value in {**known, **changed}.items():
        setattr(nvml, name, value)
    return nvml
