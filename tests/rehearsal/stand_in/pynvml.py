"""NVML of a machine with one idle GPU, as far as the labs and vLLM ask; see `tests/rehearsal`."""

from __future__ import annotations

from types import SimpleNamespace

from tests.fake.nvml import make_nvml
from tests.rehearsal.cards import rehearsed

CARD = rehearsed()
globals().update(
    vars(
        make_nvml(
            NVML_CLOCK_MEM=2,
            nvmlShutdown=lambda: None,
            nvmlDeviceGetName=lambda handle: CARD.name,
            nvmlDeviceGetMemoryInfo=lambda handle, *version: SimpleNamespace(
                total=CARD.memory_bytes, used=2**30, free=CARD.memory_bytes - 2**30
            ),
            nvmlDeviceGetMaxClockInfo=lambda handle, kind: 1980,
            nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0,
            nvmlDeviceGetCudaComputeCapability=lambda handle: CARD.capability,
            nvmlSystemGetDriverVersion=lambda: "a stand-in",
            nvmlSystemGetCudaDriverVersion=lambda: 13000,
        )
    )
)
