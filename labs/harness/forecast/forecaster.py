"""The process that imports vLLM, times steps and plays traffic on virtual engines."""

from __future__ import annotations

import contextlib
import itertools
import selectors
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence

from pydantic import BaseModel

from labs.harness.plan.side_process import guarded, last_line
from labs.harness.spec.lab import LabError
from serving.hardware import reference_step
from serving.processes.process import Process
from serving.simulator.ngram_acceptance import Copying, CopyingPlan
from serving.simulator.profiled_step import TimingPlan
from serving.simulator.protocol import FAILED, ForecastPlan, ForecastPlay, TimingPlans
from serving.simulator.step import StepTimes

TIMING_LIMIT_S = 300
FORECASTER_ARGV: Sequence[str] = (sys.executable, "-m", "serving.simulator")


class ForecastError(LabError):
    """No forecast can be made; the message says why. The run goes on without one."""


class Forecaster:
    """The process that times steps and plays traffic on virtual engines; it imports vLLM once.

    Each plan that is sent is read to its end before the next is sent.
    """

    def __init__(self, process: Process) -> None:
        """Speak to this process, which is importing vLLM."""
        self.process = process
        self.ready = self.ended = False
        self.due = 0

    def time_steps(self, plans: Iterable[TimingPlan]) -> dict[TimingPlan, StepTimes]:
        """Time each kind of step once, on the engine's cores or the GPU.

        Raises ForecastError where that fails, or takes longer than TIMING_LIMIT_S.
        """
        kinds = list(dict.fromkeys(plans))
        time_limit = threading.Timer(TIMING_LIMIT_S, self.process.request_stop)
        time_limit.start()
        try:
            self._write(TimingPlans(timing=tuple(kinds)))
            lines = [self._line("the step could not be timed") for _ in kinds]
        finally:
            time_limit.cancel()
        return {
            plan: StepTimes.model_validate_json(line)
            for plan, line in zip(kinds, lines, strict=True)
        }

    def read_answers(self, plan: CopyingPlan) -> Copying:
        """Have the model answer, and look up in what it wrote. Raises ForecastError."""
        self._write(plan)
        return Copying.model_validate_json(self._line("the model's answers could not be read"))

    def send(self, plan: ForecastPlan) -> None:
        """Have the trials of a plan played. Raises ForecastError where vLLM does not import."""
        self.due = sum(len(engine.trials) for engine in plan.engines)
        self._write(plan)

    def plays(self) -> Iterator[ForecastPlay]:
        """Yield the plays of the plan that was sent; raises ForecastError where one fails."""
        for _ in range(self.due):
            line = self._line("vLLM's scheduler could not be driven")
            yield ForecastPlay.model_validate_json(line)

    def _write(self, plan: BaseModel) -> None:
        self.ready = self.ready or self._line("vLLM's engine core does not import") == "ready\n"
        with contextlib.suppress(BrokenPipeError):  # it has ended: the next line is missing
            self.process.stdin.write(plan.model_dump_json() + "\n")
            self.process.stdin.flush()

    def _line(self, failure: str) -> str:
        line = self.process.stdout.readline()
        self.ended = not line
        if self.ended:
            self.process.wait()
        if self.ended or line == f"{FAILED}\n":
            raise ForecastError(f"{failure}: {last_line(self.process)}")
        return line


@contextlib.contextmanager
def started() -> Iterator[Forecaster]:
    """Start a forecaster, which ends with the block."""
    env = {reference_step.NUMPY_THREADS: reference_step.threads("cpu")}
    with guarded("forecaster", FORECASTER_ARGV, env) as process:
        yield Forecaster(process)


@contextlib.contextmanager
def side_by_side(forecasters: int) -> Iterator[list[Forecaster]]:
    """Start so many forecasters, which end with the block."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(started()) for _ in range(forecasters)]


def play_all(
    forecasters: Sequence[Forecaster],
    plans: Sequence[ForecastPlan],
    failed: dict[int, ForecastError] | None = None,
) -> Iterator[tuple[int, ForecastPlay]]:
    """Play plans side by side; yield (a plan's index, a play of it), whichever ends first.

    The plans begin in their order, each as soon as a forecaster has no other, so those that take
    longest come first. Raises ForecastError where vLLM does not import, or its scheduler cannot be
    driven; where there is a place for what `failed`, a plan's error is noted in it by the plan's
    index, and the others are played.
    """
    waiting = iter(enumerate(plans))
    with selectors.DefaultSelector() as selector:

        def play_next(forecaster: Forecaster) -> None:
            for number, plan in itertools.islice(waiting, 1):
                forecaster.send(plan)
                selector.register(
                    forecaster.process.stdout, selectors.EVENT_READ, (forecaster, number)
                )

        for forecaster in forecasters:
            play_next(forecaster)
        while selector.get_map():
            for key, _ in selector.select():
                selector.unregister(key.fileobj)
                forecaster, number = key.data
                try:
                    yield from ((number, played) for played in forecaster.plays())
                except ForecastError as error:
                    if failed is None:
                        raise
                    failed[number] = error
                if not forecaster.ended:
                    play_next(forecaster)
        if failed:
            *_, last = failed.values()
            failed.update({number: last for number, _ in waiting})  # no process is left for these
