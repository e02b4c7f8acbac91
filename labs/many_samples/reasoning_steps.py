"""Sums written out step by step, each step with one right form, and what checks of them are worth.

A check of the *end* (an outcome reward) chooses among whole solutions; a check of each *step* (a
process reward) chooses what a search goes on from. Both are exact here, as no reward model is;
`chosen` says what is left of either where it errs. With a chance p of each step to be right, alike
for all and independent, N whole solutions of s steps hold a right one with the chance
1 - (1 - p^s)^N, and a search with N candidates a step finds one with (1 - (1 - p)^N)^s.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile

from labs.many_samples.sampled_tasks import SHOTS, canonical

BREAK = ";"  # between steps
REVISED = "Checked:"
SUMS = [(start, added) for start in range(11, 50) for added in (2, 3, 5)]
"""What is drawn from: of these the bundled model has most steps right, and none always."""


@dataclass(frozen=True)
class Chain:
    """A question, the right steps of its solution, and solved examples of as many steps."""

    question: str
    steps: tuple[str, ...]
    shots: tuple[Chain, ...] = ()

    @property
    def solution(self) -> str:
        return " " + f"{BREAK} ".join(self.steps)

    @property
    def prompt(self) -> str:
        """Ask for the steps."""
        return "\n".join([*(f"{of.question}{of.solution}" for of in self.shots), self.question])

    def revising(self, solution: str) -> str:
        """Ask again, with the last solution shown: every second one of the examples was right."""
        shown = [
            f"{of.question}{of.solution if i % 2 else of.mistaken}\n{REVISED}{of.solution}"
            for i, of in enumerate(self.shots)
        ]
        last = BREAK.join(_written(solution)[: len(self.steps)]).strip()
        return "\n".join([*shown, f"{self.question} {last}", REVISED])

    @property
    def mistaken(self) -> str:
        """A solution whose last step is wrong."""
        end = self.steps[-1].split()[-1]
        return f"{self.solution.removesuffix(end)}{int(end) + 10}"


def adding(start: int, added: int, times: int) -> Chain:
    """Add a number so many times."""
    sums = [start + i * added for i in range(times + 1)]
    steps = (f"{a} + {added} = {b}" for a, b in pairwise(sums))
    return Chain(f"Add {added} to {start}, {times} times:", tuple(steps))


def chains(each: int, lengths: Sequence[int], seed: int) -> list[Chain]:
    """Draw so many for each number of steps; a seed gives the same ones on any machine."""
    drawn = list[Chain]()
    for times in lengths:
        sums = random.Random(f"{seed}/steps/{times}").sample(SUMS, SHOTS + each)
        solved = [adding(start, added, times) for start, added in sums]
        drawn += [replace(chain, shots=tuple(solved[:SHOTS])) for chain in solved[SHOTS:]]
    return drawn


def _written(solution: str) -> list[str]:
    return solution.lstrip().partition("\n")[0].split(BREAK)


def is_step(text: str, step: str) -> bool:
    """Check a step, whatever its spaces."""
    return "".join(text.split()).rstrip(".") == "".join(step.split())


def steps_right(solution: str, steps: Sequence[str]) -> int:
    """Count the steps that are right before the first that is wrong or missing."""
    right = (is_step(*pair) for pair in zip(_written(solution), steps, strict=False))
    return sum(takewhile(bool, right))


def end_of(solution: str, times: int) -> str | None:
    """Read the last number of so many steps; None where they are not there."""
    written = _written(solution)[:times]
    numbers = (canonical(written[-1]) or "").split()
    return numbers[-1] if numbers and len(written) == times else None


def chosen(right: int, of: int, n: int, error: float = 0.0) -> float:
    """Return the chance that the one of n drawn candidates which a checker keeps is right.

    The n come out of `of`, of which so many are right. The checker calls a right one wrong, or a
    wrong one right, with the chance `error`, keeps any that it calls right, else any at all. One
    that does not err gives pass@n.
    """

    def kept(c: int) -> float:
        return sum(
            _binomial(a, c, 1 - error)
            * _binomial(b, n - c, error)
            * (a / (a + b) if a + b else c / n)
            for a in range(c + 1)
            for b in range(n - c + 1)
        )

    return sum(
        math.comb(right, c) * math.comb(of - right, n - c) / math.comb(of, n) * kept(c)
        for c in range(min(right, n) + 1)
    )


def _binomial(k: int, n: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def found_at_end(p: float, steps: int, n: int) -> float:
    """Forecast how often one of n whole solutions is right."""
    return float(1 - (1 - p**steps) ** n)


def found_by_steps(p: float, steps: int, n: int) -> float:
    """Forecast how often a search with n candidates a step ends right."""
    return float((1 - (1 - p) ** n) ** steps)
