"""The `labs` command on a made-up GPU, an H100: `python -m tests.fake.one_gpu FACTOR WORDS`.

NVML is the rehearsal's stand-in, and the host has memory enough. Nothing can be timed on the GPU,
so no step is forecast, and the reference step takes as long each time; FACTOR times as long from
when engines were loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from labs.harness.judging.idle_neighbours import STEPS
from labs.harness.running import engines, run
from serving.hardware import gpus, reference_step
from serving.hardware.reference_step import ReferenceStep, ReferenceTimer
from tests.fake import bare
from tests.rehearsal import NVML

HOST_BYTES = 64 * 2**30


class DisturbedTimer(ReferenceTimer):
    """A reference step that takes longer once it was timed alone."""

    def __init__(self, factor: float) -> None:
        self.factor, self.times = factor, 0

    def time(self) -> ReferenceStep:
        self.times += 1
        factor = self.factor if self.times > STEPS + 1 else 1.0
        return ReferenceStep(reading_s=0.0002 * factor, computing_s=0.001)


def app(factor: float) -> None:
    """Run the command line, in a process of its own."""

    @contextmanager
    def started(kind: str, log: Path) -> Iterator[ReferenceTimer]:
        yield DisturbedTimer(factor)

    os.environ.pop(gpus.VARIABLE, None)
    sys.path.insert(0, str(NVML))
    run.in_virtual_time = lambda *_: None
    bare.with_a_constant_reference_step = lambda: None
    reference_step.started = started
    setattr(engines, "available_bytes", lambda: HOST_BYTES)  # noqa: B010 - whatever other tests hold meanwhile
    bare.app()


if __name__ == "__main__":
    app(float(sys.argv.pop(1)))
