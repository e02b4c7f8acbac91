"""The load generator of a run: Locust is started once, and again where it fails in a trial."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from labs.harness.plan.resolve import Setup
from loadtests.generator import Generator, GeneratorError, argv
from loadtests.plan import TrialPlan, TrialSummary
from serving.hardware import machine as machines
from serving.plugins import guard
from serving.processes.ports import free_port
from serving.processes.process import Process


class LoadGenerator:
    """Holds the Locust that plays a run's trials; a context that ends it."""

    def __init__(self, setup: Setup, exporter_port: int, log: Path) -> None:
        """Start it. Raises GeneratorError where it does not start."""
        self._argv = argv(setup.users, exporter_port, free_port(), setup.lab.load_processes)
        self._cores, self._log = machines.split_cores(setup.machine.kind)[1], log
        self._process: Process | None = None
        self._generator = self._start()

    def play(self, plan: TrialPlan, waiting: Callable[[], None]) -> list[TrialSummary]:
        """Play a trial and those beside it; start Locust anew first where it failed before.

        Raises GeneratorError, after which Locust is ended: it may have died, or may still be
        playing this trial, and its late answers must not be taken for those of the next.
        """
        if self._process is None:
            self._generator = self._start()
        try:
            return self._generator.play_together(plan, waiting)
        except GeneratorError:
            self.stop()
            raise

    def stop(self) -> None:
        """End Locust, if it runs."""
        if self._process:
            self._process.stop()
            self._process = None

    def _start(self) -> Generator:
        env = {guard.KEY: guard.key()}
        process = Process(
            "locust",
            self._argv,
            log=self._log,
            env=env,
            cores=self._cores,
            talk=True,
            own_session=False,  # niceness counts within a session only: sched(7), autogroups
        )
        self._process = process
        try:
            return Generator(process)
        except BaseException:
            self.stop()
            raise
