"""Makes the timeline of a trial, which pictures show beside that of its forecast.

What was measured and what was played in virtual time have the same records, so their timelines are
made by the same function. It is short enough to be kept with the predictions of a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from pydantic import BaseModel, FiniteFloat

from labs.harness.spec.lab import Point
from loadtests.records import RequestRecord

GRID_S = 0.02  # between two readings of the gaps
DIGITS = 4  # of seconds, after the point

Span = tuple[FiniteFloat, FiniteFloat]  # seconds from the trial's start: from, to


class Timeline(BaseModel, frozen=True, extra="forbid"):
    """Holds when the answers of a trial were decoded, or what long prompts did to the streams.

    The gap of a stream at a moment is the one between the two chunks around it. `gaps_s` has the
    longest of all streams within each GRID_S from the trial's start, None where nothing was
    decoded. Beside long prompts it takes the place of `decoding_s`.
    """

    decoding_s: tuple[Span, ...] = ()  # each answer, from its first token to its last
    prefills_s: tuple[Span, ...] = ()  # each long prompt, from its arrival to its first token
    gaps_s: tuple[FiniteFloat | None, ...] = ()


def timeline(point: Point, records: Iterable[RequestRecord]) -> Timeline:
    """Make the timeline of a trial of this point, its warm-up and drain included."""
    workload, answered = point.workload, [r for r in records if r.chunks]
    if not workload.intruder:
        return Timeline(decoding_s=tuple(_span(r.chunks[0][0], r.chunks[-1][0]) for r in answered))
    return Timeline(
        prefills_s=tuple(
            _span(r.sent_s, r.chunks[0][0]) for r in answered if workload.is_intruder(r.index)
        ),
        gaps_s=_longest_gaps_s([r for r in answered if not workload.is_intruder(r.index)]),
    )


def _span(start_s: float, end_s: float) -> Span:
    return round(start_s, DIGITS), round(end_s, DIGITS)


def _longest_gaps_s(streams: Sequence[RequestRecord]) -> tuple[float | None, ...]:
    end_s = max((r.chunks[-1][0] for r in streams), default=0.0)
    longest_s = np.zeros(math.floor(end_s / GRID_S) + 1)
    for r in streams:
        for (start_s, _), (next_s, _) in pairwise(r.chunks):
            within = longest_s[math.floor(start_s / GRID_S) : math.floor(next_s / GRID_S) + 1]
            np.maximum(within, next_s - start_s, out=within)
    return tuple(round(gap_s, DIGITS) or None for gap_s in longest_s.tolist())
