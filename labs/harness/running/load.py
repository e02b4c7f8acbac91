"""The load generator of a run: Locust is started once, and again where it fails in a trial."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from pathlib import Path

from labs.harness.running.resolve import Setup
from labs.harness.spec import LabError
from loadtests import load_workers
from loadtests.generator import START_TIMEOUT_S, Generator, GeneratorError, argv
from loadtests.load_workers import EVERY_ADDRESS, LOOPBACK, LoadWorkers
from loadtests.plan import TrialPlan, TrialSummary
from serving.hardware import machine as machines
from serving.inside import guard
from serving.processes.ports import free_port
from serving.processes.process import Process

JOIN_TIMEOUT_S = 900.0  # in which somebody starts the load workers on other machines


class LoadGenerator:
    """Holds the Locust that plays a run's trials; a context that ends it."""

    def __init__(
        self,
        setup: Setup,
        exporter_port: int,
        log: Path,
        waiting: Callable[[str], None],
        invite: Callable[[str], None],
    ) -> None:
        """Start it. Raises GeneratorError where it does not start.

        `invite` shows how to start load workers on other machines, once there is something that
        they can join, and `waiting` that they are waited for.
        """
        self._elsewhere, self._waiting, self._invite = setup.load_workers, waiting, invite
        self._argv = argv(
            setup.users, exporter_port, free_port(), setup.lab.load_processes, self._elsewhere
        )
        self._cores, self._log = machines.split_cores(setup.machine.kind)[1], log
        self._process: Process | None = None
        self._generator = self._start()

    def play(self, plan: TrialPlan, waiting: Callable[[], None]) -> list[TrialSummary]:
        """Play a trial and those beside it; start Locust anew first where it failed before.

        Raises GeneratorError, after which Locust is ended: it may have died, or may still be
        playing this trial, and its late answers must not be taken for those of the next. Raises
        LabError where load workers on other machines would have to be started again.
        """
        if self._process is None:
            if self._elsewhere:
                raise LabError(
                    "a trial failed, and the load workers left with it: start this run again with"
                    " RESUME=1, and then the load workers"
                )
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
        elsewhere = self._elsewhere
        # without a key nothing is encrypted: all that is sent stays on loopback
        env = {guard.KEY: guard.key(), load_workers.KEY: elsewhere.key if elsewhere else ""}
        process = Process(
            "locust", self._argv, log=self._log, env=env, cores=self._cores, talk=True
        )
        self._process = process
        try:
            return self._joined(process, elsewhere) if elsewhere else Generator(process)
        except BaseException:
            self.stop()
            raise

    def _joined(self, process: Process, elsewhere: LoadWorkers) -> Generator:
        """Wait for the load workers on other machines. Raises GeneratorError."""
        began = time.monotonic()

        def left_s() -> float:
            return began + JOIN_TIMEOUT_S - time.monotonic()

        def waiting() -> None:
            self._waiting(
                f"waiting for the load workers to join at {elsewhere.address}, for"
                f" {math.ceil(left_s() / 60)} minutes more"
            )

        _wait_until_it_listens(process, elsewhere)
        self._invite(elsewhere.invitation)
        try:
            return Generator(process, JOIN_TIMEOUT_S, waiting)
        except GeneratorError as error:
            if left_s() > 0:
                raise
            raise GeneratorError(
                f"not all load workers joined at {elsewhere.address} within"
                f" {JOIN_TIMEOUT_S / 60:.0f} minutes (LOAD_WORKERS={elsewhere.count}): start them"
                " sooner, or wait for fewer"
            ) from error


def _wait_until_it_listens(process: Process, elsewhere: LoadWorkers) -> None:
    """Return once load workers are answered, or Locust has ended, or START_TIMEOUT_S are over."""
    host = LOOPBACK if elsewhere.host == EVERY_ADDRESS else elsewhere.host
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.returncode is None and time.monotonic() < deadline_s:
        try:
            socket.create_connection((host, elsewhere.port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
