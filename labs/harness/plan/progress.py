"""Define how a run reports its progress, whatever displays it."""

from __future__ import annotations

from typing import Protocol


class ProgressDisplay(Protocol):
    """Shows the progress of a run; `labs.harness.cli.terminal` has the one for a terminal."""

    def message(self, text: str) -> None:
        """Show a line that stays."""

    def expect(self, remaining_s: float) -> None:
        """Set how long the trials, starts and probes that are to come will take, in seconds."""

    def waiting(self, text: str) -> None:
        """Show what the run is waiting for; the next call replaces it."""

    def part_done(self, text: str, remaining_s: float) -> None:
        """Show what a finished trial or probe brought, and the seconds that remain after it."""

    def show(self, content: str) -> None:
        """Show a part of a document, in Markdown."""
