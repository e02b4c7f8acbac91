"""The GPUs that a rehearsal can pretend to have: one for each class of memory, and the others with
a datasheet in `serving/hardware/gpus.py`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from serving.hardware.gpus import DATASHEETS

VARIABLE = "REHEARSED_GPU"  # names the card, for all processes that see the stand-ins


@dataclass(frozen=True)
class Card:
    """A GPU as NVML and CUDA describe it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]  # compute capability
    multiprocessors: int


CUDA = {  # datasheet's short name -> compute capability, multiprocessors
    "h100": ((9, 0), 132),
    "h200": ((9, 0), 132),
    "a100": ((8, 0), 108),
    "l4": ((8, 9), 58),
    "rtx-4090": ((8, 9), 128),
    "l40s": ((8, 9), 142),
    "t4": ((7, 5), 40),
}
CARDS = {
    **{
        sheet.short_name: Card(name, sheet.memory_bytes, *CUDA[sheet.short_name])
        for name, sheet in DATASHEETS.items()
    },
    # a class of memory without a datasheet
    "rtx-a4000": Card("NVIDIA RTX A4000", 16376 * 2**20, (8, 6), 48),
}


def rehearsed() -> Card:
    """Return the card that the environment names; an H100 where it names none."""
    return CARDS[os.environ.get(VARIABLE) or "h100"]
