"""NVML of a machine with one idle H100, as far as the lab asks; see `tests/rehearsal`."""

from __future__ import annotations

from types import SimpleNamespace

from serving.gpus import DATASHEETS
from tests.fake.nvml import make_nvml

MODEL, SHEET = next(iter(DATASHEETS.items()))  # an H100
globals().update(
    vars(
        make_nvml(
            NVML_CLOCK_MEM=2,
            nvmlDeviceGetName=lambda handle: MODEL,
            nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(
                total=SHEET.memory_bytes, used=2**30, free=SHEET.memory_bytes - 2**30
            ),
            nvmlDeviceGetMaxClockInfo=lambda handle, kind: 1980,
            nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0,
            nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
            nvmlSystemGetDriverVersion=lambda: "a stand-in",
            nvmlSystemGetCudaDriverVersion=lambda: 13000,
        )
    )
)
