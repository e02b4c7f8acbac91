"""Judge whether engines that are loaded and idle leave a GPU as fast as it was before them.

Engines that share a GPU are compared with one another, so those that wait must not slow down the
one under load. The reference step (`serving/hardware/reference_step.py`) is timed several times
before any of them is loaded, and again once all are loaded and none has work.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from labs.harness.judging.machine_speed import PARTS, Part, part_s
from serving.hardware.reference_step import ReferenceStep

STEPS = 10  # reference steps on each side
PROOF_S = 8.0  # for both sides, about

MOST_SLOWER = 0.05
"""The largest slowdown that is put up with, beyond the spread of the steps before."""


def slowdown(alone: Sequence[ReferenceStep], beside: Sequence[ReferenceStep]) -> str | None:
    """Say by how much a part of the reference step is slower beside the engines; None: it is not.

    It is where its median beside them exceeds the 90th percentile of the steps before by more than
    MOST_SLOWER. One step that was late (of ten) does not raise that percentile.
    """
    for part in PARTS:
        times_s = [part_s(step, part) for step in alone]
        slowest_s = float(np.percentile(times_s, 90, method="lower"))
        before_s, now_s = _typical_s(alone, part), _typical_s(beside, part)
        if now_s > (1 + MOST_SLOWER) * slowest_s:
            return (
                f"with all of them loaded and idle the reference step's {part} took"
                f" {now_s / before_s:.2f} times as long as before ({1e3 * now_s:.3g} ms, not"
                f" {1e3 * before_s:.3g} ms), beyond its spread by more than {MOST_SLOWER:.0%}"
            )
    return None


def times_as_long(
    alone: Sequence[ReferenceStep], beside: Sequence[ReferenceStep]
) -> dict[Part, float]:
    """Return how many times as long each part of the reference step took beside the engines."""
    return {part: _typical_s(beside, part) / _typical_s(alone, part) for part in PARTS}


def _typical_s(steps: Sequence[ReferenceStep], part: Part) -> float:
    return median(part_s(step, part) for step in steps)
