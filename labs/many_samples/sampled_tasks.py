"""Small tasks with exact solutions, and what many sampled answers to them are worth.

* *pass@k* is the chance that at least one of k answers is right, where something can check them. Of
  N answers with c right it is 1 - C(N - c, k) / C(N, k), without bias (Chen et al. 2021, Codex).
* *vote@k* is the chance that the answer given most often among k is right (self-consistency, Wang
  et al. 2022). It is the mean over sets of k of the N answers, drawn without replacement. A tie
  counts as the share of the leaders that are right, and what is no answer does not vote.

Intervals are over tasks, since answers to one task have its difficulty in common: a percentile
bootstrap (Efron 1979), and Wilson's where all tasks came out alike, as a bootstrap has no width
there. Tasks are drawn from a seed, of easy and of hard kinds, so that a small model solves some of
the easy ones now and then, and a large one some of the hard ones. Three solved examples come before
each question, the same for all of a kind. No question is among its examples, and none is asked
twice, not even with its numbers in another order.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from labs.harness.analysis.verdicts import CONFIDENCE, Interval, share

SHOTS = 3
DRAWS_AT_MOST = 100  # for each question, before there seem to be no others
VOTES_DRAWN = 400  # sets of k answers, of which a vote is the mean
RESAMPLED = 2000  # times the tasks, for an interval
Question = tuple[str, str]  # and its answer


@dataclass(frozen=True)
class Task:
    """A question after solved examples of its kind, and the only right answer."""

    kind: str
    prompt: str
    expected: str


def _sum(rng: random.Random, terms: Sequence[range]) -> Question:
    numbers = [rng.choice(numbers) for numbers in terms]
    return f"{' + '.join(map(str, numbers))} =", str(sum(numbers))


def _product(rng: random.Random, first: range, second: range) -> Question:
    a, b = rng.choice(first), rng.choice(second)
    return f"{a} x {b} =", str(a * b)


def _largest(rng: random.Random) -> Question:
    numbers = rng.sample(range(10, 100), 3)
    return f"Largest of {', '.join(map(str, numbers))}:", str(max(numbers))


def _sorted(rng: random.Random, count: int) -> Question:
    numbers = rng.sample(range(10, 100), count)
    listed, in_order = (", ".join(map(str, n)) for n in (numbers, sorted(numbers)))
    return f"{listed} in ascending order:", in_order


KINDS: dict[str, Callable[[random.Random], Question]] = {
    "add": partial(_sum, terms=(range(11, 30), range(2, 10))),
    "add two": partial(_sum, terms=(range(10, 100),) * 2),
    "add four": partial(_sum, terms=(range(100, 1000),) * 4),
    "multiply": partial(_product, first=range(6, 10), second=range(6, 13)),
    "multiply long": partial(_product, first=range(12, 100), second=range(101, 1000)),
    "largest": _largest,
    "sort five": partial(_sorted, count=5),
}


def tasks(each: int, seed: int) -> list[Task]:
    """Draw so many tasks of each kind; a seed gives the same ones on any machine."""
    drawn = []
    for kind, draw in KINDS.items():
        lines = _distinct(draw, random.Random(f"{seed}/{kind}"), SHOTS + each)
        shots = [" ".join(line) for line in lines[:SHOTS]]
        drawn += [
            Task(kind, "\n".join((*shots, question)), canonical(answer) or "")
            for question, answer in lines[SHOTS:]
        ]
    return drawn


def _distinct(
    draw: Callable[[random.Random], Question], rng: random.Random, count: int
) -> list[Question]:
    """Draw so many questions, no two of the same numbers. Raises ValueError where there are few."""
    found = dict[tuple[str, ...], Question]()
    for _ in range(DRAWS_AT_MOST * count):
        question, answer = draw(rng)
        found.setdefault(tuple(sorted(re.findall(r"\d+", question))), (question, answer))
        if len(found) == count:
            return [*found.values()]
    raise ValueError(f"there are hardly {count} different questions like {question!r}")


def canonical(text: str) -> str | None:
    """Reduce a completion to the numbers of its first line; None where there are none.

    A comma within a number is passed over: `4,318` is `4318`.
    """
    line = text.lstrip().partition("\n")[0]
    numbers = re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3}\b)", "", line))
    return " ".join(str(int(n)) for n in numbers) or None


def pass_at(k: int, answers: Sequence[str | None], expected: str) -> float:
    """Estimate the chance that at least one of k answers is right, from at least k answers."""
    n, right = len(answers), sum(a == expected for a in answers)
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def vote_at(k: int, answers: Sequence[str | None], expected: str) -> float:
    """Estimate the chance that a vote of k answers is right, from at least k answers."""
    if k == 1:
        return sum(a == expected for a in answers) / len(answers)
    if k == len(answers):
        return _vote(answers, expected)
    votes = ([answers[i] for i in drawn] for drawn in _draws(k, len(answers)))
    return sum(_vote(of_draw, expected) for of_draw in votes) / VOTES_DRAWN


@lru_cache(maxsize=64)  # every task of a run is voted on by the same draws
def _draws(k: int, n: int) -> tuple[tuple[int, ...], ...]:
    """Draw k places of n, as often as a vote is drawn."""
    rng = random.Random(f"{k}/{n}")
    return tuple(tuple(rng.sample(range(n), k)) for _ in range(VOTES_DRAWN))


def _vote(answers: Sequence[str | None], expected: str) -> float:
    counts = Counter(a for a in answers if a is not None)
    most = max(counts.values(), default=0)
    leaders = [answer for answer, votes in counts.items() if votes == most]
    return (expected in leaders) / len(leaders) if leaders else 0.0


def over_tasks(values: Sequence[float]) -> Interval:
    """Average a share over tasks, with its 95% interval; `n` is the number of tasks."""
    n, mean = len(values), float(np.mean(values))
    if len(set(values)) == 1:
        alike = share(round(mean * n), n)
        low, high = min(mean, alike.low or 0.0), max(mean, alike.high or 0.0)
        return Interval(value=mean, low=low, high=high, n=n)
    low, high = _resampled(values)
    return Interval(value=mean, low=low, high=high, n=n)


def gain_over_tasks(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Average the change of a share over the same tasks, paired, with its 95% interval.

    Where no task changed there is no interval: so few tasks cannot tell how rare a change is.
    """
    gains = [b - a for a, b in zip(before, after, strict=True)]
    mean = float(np.mean(gains))
    low, high = _resampled(gains) if len(set(gains)) > 1 else (None, None)
    return Interval(value=mean, low=low, high=high, n=len(gains))


def _resampled(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the percentile bootstrap's interval of a mean."""
    rng = np.random.default_rng(0)
    means = np.array(values)[rng.integers(0, len(values), (RESAMPLED, len(values)))].mean(axis=1)
    rest = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [rest, 100 - rest])
    return float(low), float(high)
