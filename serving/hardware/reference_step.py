"""The reference step: short work that is always the same, which times the machine itself.

A machine's own speed wanders: other guests of its host, its clock, its temperature. So the same
work is timed again and again beside what is measured: *reading* a matrix larger than the caches, as
decode reads weights, and *computing* a product of two matrices. On a CPU it runs on the engine's
cores, with a thread for each; on a GPU it is a copy and a product in BF16.

The process that does it stays for a whole run (`python -m serving.hardware.reference_step
cpu|gpu`): for each line on standard input it prints a line of `ReferenceStep`. On a GPU it holds
no memory between two steps but the context of the process. On a CPU the stand-in step of a
forecast is timed in turn with reference steps, too (`serving/simulator/profiled_step.py`), by
which its minutes can be compared with those of the trials.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

from pydantic import BaseModel, PositiveFloat

from serving.hardware import gpus
from serving.hardware import machine as machines
from serving.processes.process import Process

SIZE = 6144  # of a square matrix of float32: 144 MiB, beyond the caches that one guest can count on
FACTOR = 640  # rows of the matrices that are multiplied on a CPU
GPU_COPY_BYTES, GPU_FACTOR = 128 * 2**20, 4096
EACH_S, LEAST_TIMES = 0.04, 3  # of each kind of work, in one step
ANSWER_LIMIT_S = 20.0
FIRST_ANSWER_LIMIT_S = 90.0  # on a GPU it imports PyTorch first, maybe from a cold disk
NUMPY_THREADS = "OPENBLAS_NUM_THREADS"  # the variable that NumPy's own builds heed


class ReferenceStep(BaseModel, frozen=True, extra="forbid"):
    """The median seconds of the two kinds of work, over one reference step."""

    reading_s: PositiveFloat
    computing_s: PositiveFloat


def middle(steps: Sequence[ReferenceStep]) -> ReferenceStep | None:
    """Return the median of each part; None of no steps."""
    if not steps:
        return None
    return ReferenceStep(
        reading_s=median(step.reading_s for step in steps),
        computing_s=median(step.computing_s for step in steps),
    )


class ReferenceTimer:
    """Times reference steps in a guarded process; see `started`."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._limit_s = FIRST_ANSWER_LIMIT_S

    def time(self) -> ReferenceStep | None:
        """Time one step, in about 0.1 s; None where the process has failed, and then it is ended.

        Its log says why.
        """
        try:
            # past the buffer, which a process that has ended would leave full
            os.write(self.process.stdin.fileno(), b"time\n")
            ready, _, _ = select.select([self.process.stdout], [], [], self._limit_s)
            answer = self.process.stdout.readline() if ready else ""
            self._limit_s = ANSWER_LIMIT_S
            return ReferenceStep.model_validate_json(answer)
        except (OSError, ValueError):
            self.process.request_stop()
            return None


def threads(kind: str) -> str:
    """Return on how many threads a step computes: one for each of its cores."""
    return str(max(1, len(machines.timing_cores(kind))))


@contextlib.contextmanager
def started(kind: str, log: Path) -> Iterator[ReferenceTimer]:
    """Start the process for this kind of machine (`cpu` or `gpu`); it ends with the block."""
    cores, argv = (
        machines.timing_cores(kind),
        [sys.executable, "-m", "serving.hardware.reference_step", kind],
    )
    names = (NUMPY_THREADS, "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    env = dict.fromkeys(names, threads(kind))
    with Process("reference step", argv, log=log, env=env, cores=cores, talk=True) as process:
        yield ReferenceTimer(process)


# ------------------------------------------------------------------------ in the process itself


def on_cpu() -> Callable[[], ReferenceStep]:
    """Make the matrices of a CPU's step once; return what times a step on them."""
    import numpy as np

    matrix, vector = np.ones((SIZE, SIZE), np.float32), np.ones(SIZE, np.float32)
    factor = np.ones((FACTOR, FACTOR), np.float32)
    sums, product = np.empty_like(vector), np.empty_like(factor)
    return lambda: ReferenceStep(
        reading_s=median_s(lambda: np.matmul(matrix, vector, out=sums)),
        computing_s=median_s(lambda: np.matmul(factor, factor, out=product)),
    )


def on_gpu() -> Callable[[], ReferenceStep]:
    """Make the context of a GPU's step; return what times a step and frees its memory again."""
    import torch

    of_16_bits = gpus.type_of_16_bits(torch, "cuda")
    torch.zeros(1, device="cuda")  # the context, before an engine counts what memory is free

    def timed() -> ReferenceStep:
        source = torch.ones(GPU_COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        factor = torch.ones(GPU_FACTOR, GPU_FACTOR, dtype=of_16_bits, device="cuda")

        def copy() -> None:
            target.copy_(source)
            torch.cuda.synchronize()

        def multiply() -> None:
            factor @ factor
            torch.cuda.synchronize()

        median_s(multiply)  # leaves the idle clock
        return ReferenceStep(reading_s=median_s(copy), computing_s=median_s(multiply))

    def step() -> ReferenceStep:
        result = timed()
        torch.cuda.empty_cache()
        return result

    return step


def median_s(work: Callable[[], object]) -> float:
    """Time the work for EACH_S after one that does not count; return the median in seconds."""
    work()
    times_s: list[float] = []
    while len(times_s) < LEAST_TIMES or sum(times_s) < EACH_S:
        began = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - began)
    return median(times_s)


if __name__ == "__main__":
    timed_step = on_gpu() if sys.argv[1] == "gpu" else on_cpu()
    for _ in sys.stdin:
        print(timed_step().model_dump_json(), flush=True)
