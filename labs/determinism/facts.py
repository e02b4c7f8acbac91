"""Where greedy answers to the same prompt part, how nearly tied their tokens were, and a forecast.

An answer is compared with the plain engine's answer to the same prompt alone, up to and with the
first token that differs: beyond it the two continue different texts. The forecast of a way to serve
takes the *shifts* of every third prompt (how far the gap between the two best tokens moved) and,
of the other prompts, nothing but their gaps as the plain engine alone has them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from statistics import fmean, median
from typing import Literal, NamedTuple

import numpy as np

from labs.harness.analysis.quantity import Quantity
from labs.harness.analysis.verdicts import share
from labs.harness.derived.run_view import JudgedRun

EQUAL = 1e-4  # nats: logprobs are on file with five decimals


class Position(NamedTuple):
    """A token of an answer with the best other token, and their logprobs in nats."""

    token: int
    logprob: float
    other: int
    other_logprob: float

    @property
    def gap(self) -> float:
        return self.logprob - self.other_logprob


Answer = Sequence[Position]


@dataclass(frozen=True)
class Beside:
    """The plain engine's answer to a prompt alone, and another answer to it of as many tokens."""

    alone: Answer
    answer: Answer

    @property
    def same_tokens(self) -> int:
        """The tokens before the first that differs; all where none does."""
        pairs = zip(self.alone, self.answer, strict=True)
        return sum(1 for _ in takewhile(lambda pair: pair[0].token == pair[1].token, pairs))

    @property
    def roundings(self) -> list[float]:
        """|change of the logprob| of each token before the answers part, in nats."""
        pairs = zip(self.alone, self.answer[: self.same_tokens], strict=False)
        return [abs(a.logprob - b.logprob) for a, b in pairs]

    @property
    def shifts(self) -> list[float]:
        """|change of the gap| at each position with the same context and the same two best tokens.

        The position where the answers part is one of them.
        """
        pairs = zip(self.alone[: self.same_tokens + 1], self.answer, strict=False)
        return [
            abs(a.gap - (b.gap if a.token == b.token else -b.gap))
            for a, b in pairs
            if {a.token, a.other} == {b.token, b.other}
        ]


def chance_to_part(gap: float, shifts: Sequence[float]) -> float:
    """Return the chance that rounding puts the second-best token first, from sorted |shifts|.

    A shift goes either way with the same chance, and parts the answers where it is against the best
    token and larger than the gap. Where it makes the two equal, either is taken as often.
    """
    larger = len(shifts) - bisect_right(shifts, gap + EQUAL)
    as_large = len(shifts) - bisect_right(shifts, gap - EQUAL) - larger if gap > EQUAL else 0
    return (larger + as_large / 2) / 2 / len(shifts)


def chances_still_equal(answer: Answer, shifts: Sequence[float]) -> list[float]:
    """Return the chance that no token has parted after each position: prod(1 - chance)."""
    return list(accumulate((1 - chance_to_part(p.gap, shifts) for p in answer), lambda a, b: a * b))


@dataclass(frozen=True)
class Forecast:
    """The share of answers that differ, as forecast from the answers to other prompts."""

    share: Quantity
    measured: Quantity  # with Wilson's interval
    still_equal: tuple[float, ...]  # forecast share after each position

    @property
    def held(self) -> bool:
        """Whether it lies in the interval of what was measured, which has a width at 0, too."""
        low, high = self.measured.low or 0.0, self.measured.high or 1.0
        return low <= (self.share.value or 0.0) <= high


def forecast(known: Sequence[Beside], judged: Sequence[Beside]) -> Forecast | None:
    """Forecast the answers of `judged` from the shifts of `known` and from their own gaps alone."""
    shifts = sorted(shift for pair in known for shift in pair.shifts)
    if not shifts or not judged:
        return None
    equal = [chances_still_equal(pair.alone, shifts) for pair in judged]
    differ = sum(pair.same_tokens < len(pair.alone) for pair in judged)
    return Forecast(
        share=Quantity(1 - fmean(of[-1] for of in equal), "share"),
        measured=Quantity.of(share(differ, len(judged)), "share"),
        still_equal=tuple(round(fmean(of), 4) for of in zip(*equal, strict=True)),
    )


@dataclass(frozen=True)
class Way:
    """A way to serve the prompts, and what it changes."""

    variant: str
    asked: str  # alone, again, or how many are in flight
    differ: Quantity  # share of the answers, with Wilson's interval
    first: Quantity  # the token by which half of those that differ have parted
    moved: Quantity  # share of the tokens whose logprob is another
    rounding: Quantity  # |change of a logprob| that 95% of the tokens do not exceed, in nats
    parted_gap: Quantity  # median, in nats
    same_gap: Quantity  # median over the positions before
    still_equal: tuple[float, ...]  # share of the answers after each position
    parted_gaps: tuple[float, ...]
    forecast: Forecast | None

    @property
    def changes(self) -> Literal["texts", "bits", "nothing"]:
        if self.differ.value:
            return "texts"
        return "bits" if self.moved.value else "nothing"


def way(variant: str, asked: str, pairs: Sequence[Beside]) -> Way:
    """Compare all answers of one way: every third is forecast from, the others are forecast."""

    def middle(values: Sequence[float]) -> Quantity:
        return Quantity.given(median(values) if values else None, why="no answer differs")

    alike = [(pair.alone, pair.same_tokens) for pair in pairs]
    parted = [(n + 1, alone[n].gap) for alone, n in alike if n < len(alone)]
    roundings = [r for pair in pairs for r in pair.roundings]
    moved = fmean(r >= EQUAL / 2 for r in roundings) if roundings else None
    most_moved = float(np.percentile(roundings, 95)) if roundings else None
    return Way(
        variant=variant,
        asked=asked,
        differ=Quantity.of(share(len(parted), len(pairs)), "share"),
        first=middle([token for token, _ in parted]),
        moved=Quantity.given(moved, "share"),
        rounding=Quantity.given(most_moved),
        parted_gap=middle([gap for _, gap in parted]),
        same_gap=middle([p.gap for alone, n in alike for p in alone[:n]]),
        still_equal=tuple(fmean(n > at for _, n in alike) for at in range(len(alike[0][0]))),
        parted_gaps=tuple(sorted(gap for _, gap in parted)),
        forecast=forecast(pairs[::3], [p for at, p in enumerate(pairs) if at % 3]),
    )


@dataclass(frozen=True)
class SameText:
    """All ways to serve the same prompts, beside the plain engine that serves one at a time."""

    prompts: int
    tokens: int  # of an answer
    ways: tuple[Way, ...]
    ties: Quantity  # share of all positions where the two best tokens are equal, alone
    gaps: tuple[float, ...]  # at all positions, alone: their percentiles from 0 to 100, in nats
    batch_matters: bool  # whether any text is another with 16 in flight than with 4

    def of(self, name: str) -> Way | None:
        """Find the way of a variant's name, or one that `plain` was asked in: `again`, `16`."""
        return next((w for w in self.ways if name in (w.asked, w.variant)), None)


@dataclass(frozen=True)
class Facts:
    same_text: SameText | None  # None: nothing was asked, as of random weights


def facts(run: JudgedRun) -> Facts:
    probes = {v.name: run.folder.probe_result("greedy", v.name) for v in run.lab.variants}
    answers = {
        (variant, asked): [[Position(*p) for p in answer] for answer in of]
        for variant, probe in probes.items()
        if probe
        for asked, of in probe["answers"].items()
    }
    plain = run.lab.variants[0].name
    alone = answers.pop((plain, "alone"), None)
    return Facts(same_text(alone, answers, plain) if alone else None)


def same_text(
    alone: Sequence[Answer], answers: Mapping[tuple[str, str], Sequence[Answer]], plain: str
) -> SameText:
    """Compare each way, by variant and how it was asked, with what `plain` answers alone."""
    gaps = [p.gap for answer in alone for p in answer]
    few, many = ([[p.token for p in of] for of in answers.get((plain, n), ())] for n in ("4", "16"))
    return SameText(
        prompts=len(alone),
        tokens=len(alone[0]),
        ways=tuple(way(*key, list(map(Beside, alone, of))) for key, of in answers.items()),
        ties=Quantity(fmean(gap < EQUAL for gap in gaps), "share"),
        gaps=tuple(round(float(gap), 4) for gap in np.percentile(gaps, range(101))),
        batch_matters=few != many,
    )
