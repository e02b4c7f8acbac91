"""Every Python that starts with this folder on its path has one GPU, which can compute nothing.

Python imports a module of this name by itself as it starts. NVML is `tests/rehearsal/stand_in`'s,
also where vLLM asks its own copy, and what `torch.cuda` says of devices is said here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pynvml

from tests.rehearsal.cards import rehearsed

CARD = rehearsed()
FREE_BYTES = CARD.memory_bytes - 2**30
PROPERTIES = SimpleNamespace(
    name=CARD.name,
    major=CARD.capability[0],
    minor=CARD.capability[1],
    total_memory=CARD.memory_bytes,
    multi_processor_count=CARD.multiprocessors,
    warp_size=32,
)


def stand_in_for_nvml(vllm: Path) -> None:
    """Have vLLM find the stand-in where its own copy of NVML's bindings would be."""
    third_party = ModuleType("vllm.third_party")
    third_party.__path__ = [str(vllm / "third_party")]
    sys.modules["vllm.third_party"] = third_party
    sys.modules["vllm.third_party.pynvml"] = third_party.pynvml = pynvml  # type: ignore[attr-defined]


def stand_in_for_devices() -> None:
    """Have `torch.cuda` describe the device."""
    import torch

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "_device_count_nvml": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: CARD.capability,
        "get_device_name": lambda device=None: CARD.name,
        "get_device_properties": lambda device=None: PROPERTIES,
        "mem_get_info": lambda device=None: (FREE_BYTES, CARD.memory_bytes),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


if (found := importlib.util.find_spec("vllm")) and found.origin:
    stand_in_for_nvml(Path(found.origin).parent)
    stand_in_for_devices()
