"""A committed trial, step by step: when each request entered the batch and each token came.

A row is a place: a request takes the lowest one that is free when it is sent. The picture is whole
without scripts; with them it is played, or stepped through, from the same times.
Where the engine guesses ahead, a chunk holds what one verification gave: the target's own token and
the drafts that it accepted. Below the rows stands how much of the KV cache the requests held, where
the trial keeps what the engine said of it (`storage.engine_series`); older trials do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from markupsafe import Markup

from dashboards.palette import VARIANTS
from labs.harness.analysis.measure import Trial
from labs.harness.analysis.text import number, point_label
from labs.harness.reports.markdown import plain_text
from labs.harness.reports.pages import svg
from labs.harness.reports.templates import filled
from labs.harness.spec.lab import Point
from labs.harness.storage import engine_series
from labs.harness.storage.results import RunFolder
from loadtests.records import RequestRecord

MOST_CHUNKS = 700  # in one picture: a mark for each
WIDTH, HEAD, LEFT = 420, 4, 6  # of the picture, in its own units: about a phone's pixels
CACHE_GAP, CACHE_HEIGHT = 18, 48  # of the KV cache's part of it, the gap with its title
DECODING, WAITING, HELD = VARIANTS[:3]


@dataclass(frozen=True)
class Replayed:
    """Holds one trial as a picture, and the times that a script needs to play it."""

    title: str
    picture: Markup
    description: str  # what the picture shows, in words
    times: dict[str, Any]
    cache: Cache | None  # None where the trial keeps no reading of it
    places: int  # that requests took: the most that ran at once


@dataclass(frozen=True)
class Cache:
    """Holds the engine's own readings of its KV cache, in seconds since the picture's beginning."""

    times_s: tuple[float, ...]
    shares: tuple[float, ...]  # of the blocks, those that requests hold
    blocks: int | None  # that can be held; None where the engine did not say

    def share_text(self, share: float) -> str:
        """Write a share, and the blocks where their number is known: `43% (20 of 47 blocks)`."""
        of = f" ({round(share * self.blocks):,} of {self.blocks:,} blocks)" if self.blocks else ""
        return f"{100 * share:.0f}%{of}"


@dataclass(frozen=True)
class _Bar:
    """A request in its place: seconds since the picture's beginning."""

    place: int
    start_s: float
    first_s: float  # its first token; its end where none came
    end_s: float
    chunks_s: tuple[float, ...]
    tokens: tuple[int, ...]
    prompt_tokens: int


def replay(folder: RunFolder, keys: Sequence[str]) -> list[Replayed]:
    """Show the first repeat of each of these points over the same seconds; [] where one failed."""
    run = folder.run()
    lab, points = run.rebuilt_lab(), {p.key: p for p in run.points()}
    trials = {key: _trial(folder, points[key]) for key in dict.fromkeys(keys)}
    played = {key: _records(trial) for key, trial in trials.items() if trial}
    if len(played) < len(trials) or not all(played.values()):
        return []
    begins = {key: _begin(records) for key, records in played.items()}
    span_s = min(_span_s(records, begins[key]) for key, records in played.items())
    longest_s = max(_first_whole_s(records, begins[key]) for key, records in played.items())
    span_s = max(span_s, 1.05 * longest_s)
    return [
        _replayed(
            point_label(key, lab),
            _bars(records, begins[key], span_s),
            span_s,
            f"clip-{place}",
            guesses=bool(points[key].flags.speculative_config),
            cache=_cache(folder, trials[key], begins[key], span_s),
        )
        for place, (key, records) in enumerate(played.items())
    ]


def _trial(folder: RunFolder, point: Point) -> Trial | None:
    result = folder.trial_result(point, 1)
    return folder.trial(point, result, folder.run().rebuilt_lab()) if result else None


def _records(trial: Trial) -> list[RequestRecord]:
    return sorted(trial.answered, key=lambda r: r.start_s)


def _cache(folder: RunFolder, trial: Trial | None, begin_s: float, span_s: float) -> Cache | None:
    """Read how full one engine's KV cache was; None where the trial keeps no reading of it.

    Where several engines share the load, each has a cache, and none is shown. Prometheus reads once
    a second, so that none may fall into a short picture.
    """
    if trial is None:
        return None
    usage = engine_series.kv_usage(folder.series(trial.point.key, trial.repeat))
    if usage is None:
        return None
    inside = [
        (t - begin_s, share)
        for t, share in zip(usage.times_s, usage.values, strict=True)
        if 0 <= t - begin_s <= span_s
    ]
    blocks = trial.cache_config.get("num_gpu_blocks", "")
    return Cache(
        tuple(t for t, _ in inside),
        tuple(share for _, share in inside),
        int(blocks) - 1 if blocks.isdecimal() else None,  # the engine keeps one for itself
    )


def _begin(records: Sequence[RequestRecord]) -> float:
    return min((r.start_s for r in records if r.in_window), default=records[0].start_s)


def _span_s(records: Sequence[RequestRecord], begin_s: float) -> float:
    """The seconds in which as many chunks came as one picture can show."""
    times = sorted(t for r in records for t, _ in r.chunks if t >= begin_s)
    return times[min(len(times), MOST_CHUNKS) - 1] - begin_s


def _first_whole_s(records: Sequence[RequestRecord], begin_s: float) -> float:
    """The seconds that the first request of the window took, so that one is shown whole."""
    return next((r.e2e_s or 0.0 for r in records if r.start_s >= begin_s), 0.0)


def _bars(records: Sequence[RequestRecord], begin_s: float, span_s: float) -> list[_Bar]:
    free_from: list[float] = []  # when the request in each place ended
    bars = []
    for record in records:
        start, end = record.start_s, record.chunks[-1][0]
        place = next((i for i, t in enumerate(free_from) if t <= start), len(free_from))
        free_from[place : place + 1] = [end]
        if end <= begin_s or start >= begin_s + span_s:
            continue
        inside = [(t - begin_s, n) for t, n in record.chunks if 0 <= t - begin_s <= span_s]
        bars.append(
            _Bar(
                place, max(0.0, start - begin_s), record.chunks[0][0] - begin_s,
                min(end - begin_s, span_s), tuple(t for t, _ in inside),
                tuple(n for _, n in inside), record.prompt_tokens or 0,
            )
        )  # fmt: skip
    return bars


def _replayed(
    title: str,
    bars: Sequence[_Bar],
    span_s: float,
    clip: str,
    guesses: bool,
    cache: Cache | None = None,
) -> Replayed:
    places = max(bar.place for bar in bars) + 1
    without_token_s = sum(min(b.first_s, b.end_s) - b.start_s for b in bars if b.first_s > 0)
    shown_cache = cache if cache and cache.shares else None
    description = plain_text(
        filled(
            "replay.md",
            title=title,
            requests=len(bars),
            span=number(span_s, "s"),
            places=places,
            at_once=f"{sum(bar.end_s - bar.start_s for bar in bars) / span_s:.1f}",
            waiting=f"{without_token_s / span_s:.1f}",
            tokens=sum(sum(bar.tokens) for bar in bars),
            guesses=guesses,
            accepted=sum(n - 1 for bar in bars for n in bar.tokens),
            most_held=shown_cache.share_text(max(shown_cache.shares)) if shown_cache else "",
        )
    )
    times = {
        "span": round(1000 * span_s),
        "guesses": guesses,
        "bars": [
            [round(1000 * b.start_s), round(1000 * max(0.0, b.first_s)), round(1000 * b.end_s)]
            for b in bars
        ],
        "chunks": [
            [round(1000 * t), n]
            for t, n in sorted(c for b in bars for c in zip(b.chunks_s, b.tokens, strict=True))
        ],
        "cache": [
            [round(1000 * t), cache.share_text(share)]
            for t, share in zip(cache.times_s, cache.shares, strict=True)
        ] if cache else [],
    }  # fmt: skip
    most = max((n for bar in bars for n in bar.tokens), default=1) if guesses else 0
    picture = _picture(bars, places, span_s, description, clip, most, shown_cache)
    return Replayed(title, picture, description, times, cache, places)


def _picture(
    bars: Sequence[_Bar],
    places: int,
    span_s: float,
    description: str,
    clip: str,
    most: int,
    cache: Cache | None,
) -> Markup:
    """Draw the places as rows; a script reveals them by the width of what clips them.

    A chunk of `most` tokens has a mark of a row's height; where that is 0, every chunk has.
    """
    row = 18 if places <= 16 else max(4, 288 // places)
    under = HEAD + places * row
    foot = under + (CACHE_GAP + CACHE_HEIGHT if cache else 0)
    scale = (WIDTH - 2 * LEFT) / span_s
    height = row * 7 / 9

    def x(second: float) -> float:
        return LEFT + second * scale

    drawn = []
    for bar in bars:
        first = min(max(bar.first_s, bar.start_s), bar.end_s)
        parts = ((bar.start_s, first, WAITING), (first, bar.end_s, DECODING))
        drawn.append(
            {
                "top": HEAD + bar.place * row + row / 9,
                "height": height,
                "boxes": [
                    {"x": x(start), "width": (end - start) * scale, "colour": colour}
                    for start, end, colour in parts
                ],
                "marks": [
                    (x(t), height * (n / most if most else 1))
                    for t, n in zip(bar.chunks_s, bar.tokens, strict=True)
                ],
            }
        )
    return svg(
        "replay.svg",
        width=WIDTH,
        left=LEFT,
        right=WIDTH - LEFT,
        foot=foot,
        description=description,
        clip=clip,
        rows=[HEAD + (place + 0.5) * row for place in range(places)],
        bars=drawn,
        kind="token drafted" if most else "token",
        held=_held(cache, under, foot, x) if cache else None,
        ticks=[(x(second), round(second, 3)) for second in _ticks(span_s)],
    )


def _held(cache: Cache, under: int, foot: int, x: Callable[[float], float]) -> dict[str, Any]:
    """Place the readings of the KV cache; 100% is where `full` is."""
    at = [
        (x(t), foot - share * CACHE_HEIGHT)
        for t, share in zip(cache.times_s, cache.shares, strict=True)
    ]
    return {"full": under + CACHE_GAP, "at": at, "colour": HELD}


def _ticks(span_s: float) -> list[float]:
    step = next((s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60) if span_s / s <= 7), 120)
    return list(accumulate([0.0] + [step] * int(span_s / step)))
