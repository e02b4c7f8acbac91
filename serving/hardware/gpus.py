"""GPUs: classes of memory and what each serves, the vendors' figures, and which are visible here.

A new class or card is a row of `CLASSES` or `DATASHEETS`. The GPUs that CUDA lets this process use
are read through NVML; nothing is set. CUDA_VISIBLE_DEVICES names GPUs and slices of them (MIG) by
number or by the beginning of a UUID; a name that fits none ends the list. A process sees only the
first slice, and no whole GPU beside it (NVIDIA, MIG User Guide, "CUDA device enumeration").
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

VARIABLE = "CUDA_VISIBLE_DEVICES"
ORDER, BY_BUS = "CUDA_DEVICE_ORDER", "PCI_BUS_ID"  # NVML's own; CUDA's own begins with the fastest
BF16_CAPABILITY = (8, 0)  # compute capability of Ampere, the first that multiplies BF16
FP8_CAPABILITY = (8, 9)  # compute capability of Ada, the first with FP8 tensor cores
COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}
VGPU = 2  # nvmlGpuVirtualizationMode_t, nvml.h: the GPU is a virtual machine's share of one
FILLED = 0.95  # of a class's memory is enough to be in it: drivers keep some


class GpuError(Exception):
    """A GPU that is to serve does not answer; the message says what to do."""


@dataclass(frozen=True)
class MemoryClass:
    """GPUs of about this much memory, and what one of them serves by default."""

    gb: int
    model: str  # a Hugging Face id that asks for no account
    dummy: str  # a shape of serving/models/dummy.py, under WEIGHTS=dummy
    kv_bytes: int  # an engine's KV cache, where a lab does not say otherwise


CLASSES = (  # from the smallest; a lab has sizes for each under `gpu-<gb>`
    MemoryClass(16, "Qwen/Qwen2.5-1.5B-Instruct", "llama-1b", 6 * 2**30),
    MemoryClass(24, "Qwen/Qwen2.5-3B-Instruct", "llama-1b", 8 * 2**30),
    MemoryClass(48, "Qwen/Qwen2.5-7B-Instruct", "llama-8b", 18 * 2**30),
    MemoryClass(80, "NousResearch/Meta-Llama-3.1-8B-Instruct", "llama-8b", 32 * 2**30),
    MemoryClass(141, "Qwen/Qwen2.5-32B-Instruct", "llama-8b", 48 * 2**30),
)


def class_of(memory_bytes: int) -> MemoryClass:
    """Find the largest class that a GPU of this memory fills; the smallest where it fills none."""
    filled = [c for c in CLASSES if memory_bytes >= FILLED * c.gb * 10**9]
    return filled[-1] if filled else CLASSES[0]


@dataclass(frozen=True)
class Datasheet:
    """The vendor's figures for dense arithmetic.

    A run only shows them beside the measured ceilings; a forecast for a card that is not here
    starts from them.
    """

    short_name: str  # by which MACHINE= asks for it
    memory_bytes: int  # as NVML reports it
    memory_bandwidth_bytes_per_s: float
    bf16_flops_per_s: float  # or of FP16, where it has no BF16
    fp8_flops_per_s: float | None = None
    link_bytes_per_s: float | None = None  # of NVLink to other GPUs, one way; None: it has none
    host_bytes_per_s: float | None = None  # of PCIe to the host's memory, one way


DATASHEETS = {  # by the name NVML gives: SXM and PCIe cards of one name differ
    "NVIDIA H100 80GB HBM3": Datasheet(
        "h100", 81559 * 2**20, 3.35e12, 989e12, 1979e12, 450e9, 64e9
    ),
    "NVIDIA H200": Datasheet("h200", 143771 * 2**20, 4.8e12, 989e12, 1979e12, 450e9, 64e9),
    "NVIDIA A100-SXM4-80GB": Datasheet("a100", 81920 * 2**20, 2.04e12, 312e12, None, 300e9, 32e9),
    "NVIDIA L40S": Datasheet("l40s", 46068 * 2**20, 0.864e12, 362e12, 733e12, None, 32e9),
    "NVIDIA L4": Datasheet("l4", 23034 * 2**20, 0.30e12, 121e12, 242e12, None, 32e9),
    "NVIDIA GeForce RTX 4090": Datasheet(
        "rtx-4090", 24564 * 2**20, 1.008e12, 165e12, 330e12, None, 32e9
    ),
    # FP16, by NVIDIA's "Turing GPU architecture" (WP-09183), appendix on the Tesla T4; PCIe 3.0
    "Tesla T4": Datasheet("t4", 15360 * 2**20, 0.32e12, 65e12, None, None, 16e9),
}
PCIE_4_BYTES_PER_S = 32e9
"""PCIe 4.0 x16, one way, by its specification: taken where no link to the host was measured."""


def short_names() -> list[str]:
    """Name the cards that have a datasheet here."""
    return [sheet.short_name for sheet in DATASHEETS.values()]


def type_of_16_bits(torch: Any, device: str) -> Any:
    """Return the type in which weights of 16 bits are served on `cuda` or `cpu`.

    That is BF16, and on a GPU that has none FP16, which vLLM then takes (`_resolve_auto_dtype` in
    vllm/config/model.py of 0.32).
    """
    lacks = device == "cuda" and torch.cuda.get_device_capability() < BF16_CAPABILITY
    return torch.float16 if lacks else torch.bfloat16


def visible(nvml: ModuleType) -> list[Any]:
    """Return NVML's handles of the visible GPUs, in CUDA's order.

    That is NVML's own order, since every command sets `ORDER` for itself and its children. GPUs
    that do not answer are passed over, in the numbers too.
    """
    devices: dict[str, list[Any]] = {}  # by number and by UUID
    slices: list[Any] = []
    answering, _ = _answers(nvml)
    for number, (gpu, uuid) in enumerate(answering):
        parts = _slices(nvml, gpu) if _is_partitioned(nvml, gpu) else [gpu]
        devices |= {nvml.nvmlDeviceGetUUID(part): [part] for part in parts}
        devices[str(number)] = devices[uuid] = parts
        slices += [part for part in parts if part is not gpu]
    selection = os.environ.get(VARIABLE)
    selected: list[Any] = []
    for name in map(str, range(len(answering))) if selection is None else selection.split(","):
        parts_named = _named(devices, name.strip())
        if parts_named is None:
            break
        selected += parts_named
    return [part for part in selected if part in slices][:1] or selected


def silent(nvml: ModuleType) -> dict[int, str]:
    """Say of each GPU that does not answer why, by its number in `nvidia-smi`."""
    return _answers(nvml)[1]


def _answers(nvml: ModuleType) -> tuple[list[tuple[Any, str]], dict[int, str]]:
    """Ask every GPU for its handle and UUID; return these, and why the others do not answer.

    One may have fallen off the bus, or be closed to this process.
    """
    answering, failing = [], {}
    for number in range(nvml.nvmlDeviceGetCount()):
        try:
            gpu = nvml.nvmlDeviceGetHandleByIndex(number)
            answering.append((gpu, nvml.nvmlDeviceGetUUID(gpu)))
        except nvml.NVMLError as error:
            failing[number] = str(error)
    return answering, failing


def hidden() -> bool:
    """Tell whether the reader hides every GPU, so as to use the CPU."""
    return os.environ.get(VARIABLE, "0").strip() in ("", "-1")


def _named(devices: dict[str, list[Any]], name: str) -> list[Any] | None:
    if name.startswith(("GPU-", "MIG-")):
        return next((parts for uuid, parts in devices.items() if uuid.startswith(name)), None)
    return devices.get(name)


def _is_partitioned(nvml: ModuleType, gpu: Any) -> bool:
    """Tell whether a GPU is divided into slices (MIG); most GPUs cannot be."""
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(gpu)
    except nvml.NVMLError:
        return False
    return bool(current)


def _slices(nvml: ModuleType, gpu: Any) -> list[Any]:
    slices = []
    try:
        most = nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)
    except nvml.NVMLError:  # it stopped answering
        return []
    for index in range(most):
        with contextlib.suppress(nvml.NVMLError):  # no slice has this index
            slices.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index))
    return slices


def is_part(nvml: ModuleType, gpu: Any) -> bool:
    """Tell whether it is a part of a GPU: a slice (MIG), or the share of a virtual machine (vGPU).

    Of a part much cannot be read, whatever its user does.
    """
    for query, answer in (
        (nvml.nvmlDeviceIsMigDeviceHandle, 1),
        (nvml.nvmlDeviceGetVirtualizationMode, VGPU),
    ):
        with contextlib.suppress(nvml.NVMLError):  # not of this GPU: then it is none
            if query(gpu) == answer:
                return True
    return False


def compute_mode(nvml: ModuleType, gpu: Any) -> str | None:
    """Read which processes may compute on a GPU (nvmlComputeMode_t, nvml.h); None where untold."""
    try:
        return COMPUTE_MODES.get(nvml.nvmlDeviceGetComputeMode(gpu), "unknown")
    except nvml.NVMLError:
        return None


def admits_one_process(mode: str | None) -> bool:
    """Tell whether a GPU in this compute mode serves one process at a time."""
    return mode is not None and mode.startswith("exclusive")
