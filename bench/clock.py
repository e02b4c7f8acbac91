"""Shows what is being measured, and about how much time is left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

from labs.harness.commands.terminal import minutes


class Clock:
    """Shows what is being measured, and about how much time all parts still take."""

    def __init__(self, expected_s: Mapping[str, float]) -> None:
        self._left_s = dict(expected_s)  # of the parts that have not ended
        self._part, self._began = "", time.monotonic()

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Measure this part in the block; at its end the part's time is no longer expected."""
        self._part, self._began = part, time.monotonic()
        try:
            yield
        finally:
            del self._left_s[part]

    def tell(self, text: str, share_done: float) -> None:
        """Show what the part is at, on standard error; `share_done` of it (0 to 1) is over."""
        left = minutes(self.left_s(share_done, time.monotonic() - self._began))
        line = f"{self._part}: {text} (about {left} left)"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def left_s(self, share_done: float, spent_s: float) -> float:
        """Estimate the seconds left: as expected, and from a fifth of the part on at its pace."""
        later_s = sum(s for part, s in self._left_s.items() if part != self._part)
        expected_s = max(0.0, self._left_s[self._part] - spent_s)
        at_this_pace_s = spent_s * (1 - share_done) / share_done if share_done else expected_s
        return later_s + (at_this_pace_s if share_done >= 0.2 else expected_s)
