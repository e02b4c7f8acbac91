"""Drives the load generator from the runner: its command line, and JSON lines over its pipes."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

from loadtests.plan import TrialPlan, TrialSummary, most_output_tokens

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 60.0
GRACE_S = 30.0  # beyond the longest time that a trial may take


class GeneratorError(Exception):
    """The load generator died or no longer responds."""


class Child(Protocol):
    """The generator's process, which the caller starts."""

    @property
    def stdin(self) -> IO[str]:
        """Takes trial plans."""

    @property
    def stdout(self) -> IO[str]:
        """Gives events."""

    @property
    def returncode(self) -> int | None:
        """The exit code, or None while it runs."""

    def tail(self, lines: int = 12) -> str:
        """Return the last lines of its log."""


def argv(users: int, exporter_port: int, master_port: int, processes: int = 1) -> list[str]:
    """Build the command line of a headless Locust, which listens on loopback.

    Each load process has all the users, of which those beyond its share are idle. So if the others
    die, one process can go on alone.
    """
    all_users = str(processes * users)
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--processes", str(processes)),
        *("--master-bind-host", LOOPBACK, "--master-bind-port", str(master_port)),
        *("--master-host", LOOPBACK, "--master-port", str(master_port)),
        *("--lab-exporter-port", str(exporter_port), "--loglevel", "WARNING"),
        *("--headless", "--only-summary", "-u", all_users, "-r", all_users),
    ]


class Generator:
    """Plays trials one after another on one Locust process."""

    def __init__(self, child: Child) -> None:
        """Wait until all users are there, on every load process; raises GeneratorError."""
        self._child = child
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._expect("ready", START_TIMEOUT_S, lambda: None)

    def _listen(self) -> None:
        try:
            for line in self._child.stdout:
                if line.startswith('{"event"'):  # Locust prints lines of its own, too
                    self._events.put(json.loads(line))
        except ValueError:  # the pipe was closed while reading: the run is over
            return

    def _expect(self, event: str, timeout_s: float, waiting: Callable[[], None]) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                message = self._events.get(timeout=0.2)
            except queue.Empty:
                if (code := self._child.returncode) is not None:
                    raise GeneratorError(self._last_lines(f"exit code {code}")) from None
                waiting()
                continue
            if message["event"] == "failed":
                raise GeneratorError(message["reason"])
            if message["event"] == event:
                return message
        raise GeneratorError(
            f"Locust said nothing for {timeout_s:.0f} s; its last lines:\n{self._child.tail()}"
        )

    def _last_lines(self, end: str) -> str:
        tail = self._child.tail()
        return f"Locust ended with {end}" + (f"; its last lines:\n{tail}" if tail else "")

    def play(self, plan: TrialPlan, waiting: Callable[[], None] = lambda: None) -> TrialSummary:
        """Play one trial, which has no other beside it, as `play_together` does."""
        (summary,) = self.play_together(plan, waiting)
        return summary

    def play_together(
        self, plan: TrialPlan, waiting: Callable[[], None] = lambda: None
    ) -> list[TrialSummary]:
        """Play a trial and those beside it; return the summaries, in their order.

        Their records are on disk when this returns. Raises GeneratorError.

        After that error the generator may still be playing: it has to be started again.

        `waiting` is called a few times a second; an exception it raises (a dead engine, Ctrl-C)
        ends the wait.
        """
        try:
            self._child.stdin.write(plan.model_dump_json() + "\n")
            self._child.stdin.flush()
        except OSError as error:  # nobody reads it any more
            raise GeneratorError(self._last_lines("a closed pipe")) from error
        plans = plan.all_plans
        answers_s = sum(each.longest_s(most_output_tokens(each.requests)) for each in plans)
        longest_s = plan.latest_s + answers_s + GRACE_S
        done = self._expect("done", longest_s, waiting)
        return [TrialSummary.model_validate(summary) for summary in done["summaries"]]
