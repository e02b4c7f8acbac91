"""Tells what is being measured, and how long all of it will still take."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

from labs.commands.terminal import minutes


class Clock:
    """Tells what is being measured, and about how long all that was asked for will still take."""

    def __init__(self, expected_s: Mapping[str, float]) -> None:
        self._left_s = dict(expected_s)  # of the parts that have not ended
        self._part, self._began = "", time.monotonic()

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        self._part, self._began = part, time.monotonic()
        try:
            yield
        finally:
            del self._left_s[part]

    def tell(self, text: str, done: float) -> None:
        """`done` is the share of the part that is over."""
        left = minutes(self.left_s(done, time.monotonic() - self._began))
        line = f"{self._part}: {text} (about {left} left)"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def left_s(self, done: float, spent_s: float) -> float:
        """At the pace so far once a fifth of the part is over, as expected until then."""
        later_s = sum(s for part, s in self._left_s.items() if part != self._part)
        expected_s = max(0.0, self._left_s[self._part] - spent_s)
        return later_s + (spent_s * (1 - done) / done if done >= 0.2 else expected_s)
