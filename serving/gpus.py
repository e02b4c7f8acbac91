"""Which GPUs this process may use, as CUDA sees them; read through NVML, nothing is set.

CUDA_VISIBLE_DEVICES names them by number or by the beginning of a UUID, a slice of a GPU (MIG) too;
a name that fits nothing ends the list. Of slices a process sees one, the first, and no whole GPU
beside it (NVIDIA, MIG User Guide, "CUDA device enumeration").
"""

from __future__ import annotations

import contextlib
import os
from types import ModuleType
from typing import Any

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible(nvml: ModuleType) -> list[Any]:
    """NVML's handles of them in CUDA's order, which among GPUs of one kind is NVML's own."""
    devices: dict[str, list[Any]] = {}  # by number and by UUID
    slices: list[Any] = []
    count = nvml.nvmlDeviceGetCount()
    for number in range(count):
        gpu = nvml.nvmlDeviceGetHandleByIndex(number)
        parts = _slices(nvml, gpu) if _is_cut(nvml, gpu) else [gpu]
        devices |= {nvml.nvmlDeviceGetUUID(part): [part] for part in parts}
        devices[str(number)] = devices[nvml.nvmlDeviceGetUUID(gpu)] = parts
        slices += [part for part in parts if part is not gpu]
    wanted = os.environ.get(VARIABLE)
    found: list[Any] = []
    for name in map(str, range(count)) if wanted is None else wanted.split(","):
        named = _named(devices, name.strip())
        if named is None:
            break
        found += named
    return [part for part in found if part in slices][:1] or found


def _named(devices: dict[str, list[Any]], name: str) -> list[Any] | None:
    if name.startswith(("GPU-", "MIG-")):
        return next((found for uuid, found in devices.items() if uuid.startswith(name)), None)
    return devices.get(name)


def _is_cut(nvml: ModuleType, gpu: Any) -> bool:
    """Whether it is divided into slices; most GPUs cannot be."""
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(gpu)
    except nvml.NVMLError:
        return False
    return bool(current)


def _slices(nvml: ModuleType, gpu: Any) -> list[Any]:
    found = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        with contextlib.suppress(nvml.NVMLError):  # there is none at this place
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index))
    return found
