"""The latency law: how long a step lasts, and how many drafted tokens it accepts."""

from __future__ import annotations

import argparse
import math
import random


class Noise:
    """A factor on the length of a step, of mean 1, as a machine's speed varies.

    `jitter` acts from step to step, `drift` over seconds (an Ornstein-Uhlenbeck process, so that
    what is measured soon after something else is like it), `spread` from one start to the next.
    Each is the standard deviation of a logarithm.
    """

    def __init__(
        self, seed: int | None, jitter: float, drift: float, drift_s: float, spread: float
    ) -> None:
        self._random = random.Random(seed)
        self._jitter, self._drift, self._drift_s = jitter, drift, drift_s
        self._start = self._random.gauss(0, spread) - (jitter**2 + drift**2 + spread**2) / 2
        self._at, self._drifted = -math.inf, 0.0

    def factor(self, at_s: float) -> float:
        """The factor of a step that begins at this time, no earlier than the last one asked for."""
        kept = math.exp((self._at - at_s) / self._drift_s)
        fresh = self._random.gauss(0, self._drift) * math.sqrt(1 - kept * kept)
        self._at, self._drifted = at_s, kept * self._drifted + fresh
        log = self._start + self._drifted + self._random.gauss(0, self._jitter)
        return math.exp(log)


class Law:
    """What `--step-s` and its kin say of the steps of continuous batching."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._random = random.Random(options.seed)
        self._noise = Noise(
            options.seed, options.jitter, options.drift, options.drift_s, options.start_spread
        )

    def step_length_s(self, start_s: float, batch: int, prefilled_tokens: int) -> float:
        """How long the step lasts that begins then; steps are asked for in their order."""
        options = self._options
        length_s: float = options.step_s + options.step_per_seq_s * batch
        length_s += options.prefill_per_token_s * prefilled_tokens
        return length_s * self._noise.factor(start_s)

    def accepted(self, guesses: int) -> int:
        """How many of the tokens that a sequence drafted are accepted: all up to the first not."""
        accepted = 0
        while accepted < guesses and self._random.random() < self._options.acceptance:
            accepted += 1
        return accepted
