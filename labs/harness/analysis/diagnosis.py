"""Names the cause of unsteady or worse latency from an engine's own metrics.

A `Reading` is what an engine counted over an interval. `diagnose` compares it with a reading of the
same service while it was healthy. It first asks what became worse, and only then why: each cause
explains some symptoms, and leaves a mark of its own that the others do not leave. Marks are looked
for in a fixed order. A cause that a counter proves (a preemption) comes before one that only times
suggest (a slower step), and what was sent (longer prompts) before what that brings about (a queue).

Every threshold was set for the reason beside it; none was fitted, and all but one before any run
that is judged by it (`BUDGET_CLAIM`). What the metrics cannot show: vLLM books all of a
prompt's tokens on the step that ends its prefill, so `iteration_tokens_total` does not show how
large the pieces were. A larger token budget is therefore told by its effect: a few gaps are longer,
and all others shorter. Times are means over the interval, or the buckets of vLLM's histograms, no
percentiles.

Source of the metrics: vLLM's documentation, "Production metrics", and `vllm/v1/metrics/stats.py` of
0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from labs.harness.analysis.quantity import RATIO, Quantity
from serving import metrics
from serving.metrics import Histogram, Snapshot

LEAST_REQUESTS = 5
"""Fewer finished requests say nothing: the labs ask for as many before a figure counts."""
SLOWER_TOKEN = 1.15
"""TPOT is worse beyond this multiple of the healthy one.

A machine's own speed wanders by 5 to 6% (one standard deviation, over 100 s on two machines), so
two readings of one service differ by 8%: this is two of those.
"""
LATER_FIRST_TOKEN = 1.3
"""TTFT is worse beyond this multiple: it also depends on the step that a request just missed."""
MORE_LONG_GAPS = 0.04
"""Gaps are worse where so many more lie in buckets above the one of the healthy p99: of 1%, 5%"""
BUDGET_CLAIM = ("budget", "ttft_mean_s")
"""The claim about a large token budget, and its metric. A run that claims another one is from
before its mark was changed as well: it was that a token takes no longer on average, which two runs
of one day found in one of eight trials."""
PREEMPTED = 0.02
"""Preemptions a finished request from which on they count; a server with enough memory has none."""
HITS_LOST = 0.2
"""The share of looked-up prompt tokens that is no longer found in the cache: a fifth of a prefill
is about what makes a first token later by more than its symptom's threshold."""
DRAFTS_LOST = 0.2
"""The share of drafted tokens by which fewer are accepted than before."""
MORE_SHORT_GAPS = MORE_LONG_GAPS
"""The other gaps are shorter where so many more lie below the bucket of the healthy mean, or so
many fewer above it: as many as have become long."""
MORE_AT_ONCE = 1.5
"""A step holds more requests where it holds so many times what slower tokens alone bring about: a
request that takes longer meets more others, though no more come (Little's law). Half again as much
in a step is about the least that makes one longer by more than the symptom's threshold."""
QUEUED_SHARE = 0.5
"""The queue explains a later first token where at least half of what was added was spent in it."""

# without a healthy reading
REJECTED = 0.3
"""Below this share of accepted tokens a draft hardly pays at any load: with one guess ahead, a step
yields 1.3 tokens, and a verification costs about that much more in a batch."""
LONGER_PROMPT = 4.0
"""The longest prompt is a neighbour's where it is longer than this multiple of the median."""
LONG_GAP = 3.0
"""A gap is long where it is this multiple of the mean: several steps' time in one."""

Symptom = Literal["first tokens come later", "tokens come slower", "more gaps are long"]
LATER: Symptom = "first tokens come later"
SLOWER: Symptom = "tokens come slower"
GAPS: Symptom = "more gaps are long"

Cause = Literal[
    "healthy", "preemption", "speculation", "long context", "long neighbour", "cold cache",
    "large budget", "burst", "more requests at once", "slow step", "unknown", "cannot be told",
]  # fmt: skip

Lacking = Literal[
    "TTFT", "TPOT", "the gaps between tokens", "the time in the queue", "preemptions",
    "the lengths of prompts", "hits in the prefix cache", "the number of requests at once",
]  # fmt: skip
SYMPTOMS_NEED: frozenset[Lacking] = frozenset({"TTFT", "TPOT", "the gaps between tokens"})
THRESHOLDS_NEED: frozenset[Lacking] = frozenset({
    "TTFT", "the gaps between tokens", "the time in the queue", "preemptions",
    "the lengths of prompts",
})  # fmt: skip
"""The figures without which nothing can be said to be well: beside a healthy reading, and alone."""


@dataclass(frozen=True)
class Reading:
    """Holds what an engine counted over an interval; a figure that it lacks is None."""

    counted: Snapshot
    seconds: float | None = None  # of the interval; None where they are not known

    @property
    def requests(self) -> float:
        """The requests that were finished in the interval."""
        return self.counted.values.get(metrics.REQUESTS, 0.0)

    @property
    def ttft_s(self) -> float | None:
        """The mean time to first token, in seconds."""
        return self._mean(metrics.TTFT)

    @property
    def queue_s(self) -> float | None:
        """The mean time until a request was first scheduled, in seconds."""
        return self._mean(metrics.QUEUE_TIME)

    @property
    def prefill_s(self) -> float | None:
        """The mean time from then to its first token, in seconds."""
        return self._mean(metrics.PREFILL_TIME)

    @property
    def gap_s(self) -> float | None:
        """The mean gap between two arrivals of tokens in one answer: a step, in seconds."""
        return self._mean(metrics.ITL)

    @property
    def tpot_s(self) -> float | None:
        """The mean time per output token after the first, in seconds.

        Where an engine guesses ahead, several tokens come after one gap.
        """
        gaps, firsts = self._histogram(metrics.ITL), self._histogram(metrics.TTFT)
        tokens = self.counted.values.get(metrics.GENERATION_TOKENS)
        if gaps is None or firsts is None or tokens is None:
            return None
        later = tokens - firsts.count
        return gaps.sum / later if later > 0 else None

    @property
    def preemptions(self) -> float | None:
        """The preemptions a finished request."""
        count = self.counted.values.get(metrics.PREEMPTIONS)
        return None if count is None or not self.requests else count / self.requests

    @property
    def hit_rate(self) -> float | None:
        """The share of looked-up prompt tokens that were found in the prefix cache."""
        return self._ratio(metrics.PREFIX_HITS, metrics.PREFIX_QUERIES)

    @property
    def accepted(self) -> float | None:
        """The share of drafted tokens that were accepted; None where none was drafted."""
        return self._ratio(metrics.SPEC_ACCEPTED, metrics.SPEC_DRAFTED)

    @property
    def median_prompt_tokens(self) -> tuple[float, float] | None:
        """The bounds of the bucket with the median prompt, in tokens."""
        return self._bucket(metrics.REQUEST_PROMPT_TOKENS, 0.5)

    @property
    def longest_prompt_tokens(self) -> tuple[float, float] | None:
        """The bounds of the bucket with the longest prompt, in tokens."""
        return self._bucket(metrics.REQUEST_PROMPT_TOKENS, 1)

    @property
    def decoding(self) -> float | None:
        """The mean number of requests in decode, by Little's law: their decode time a second.

        The gaps between tokens add up to that time, and count when they pass; a request's whole
        decode time would count when it ends.
        """
        gaps = self._histogram(metrics.ITL)
        return gaps.sum / self.seconds if gaps and self.seconds else None

    @property
    def waiting(self) -> float | None:
        """The requests that waited at the end of the interval."""
        return self.counted.values.get(metrics.WAITING)

    def gaps_above(self, gap_s: float) -> float | None:
        """The share of gaps in buckets that begin at so many seconds."""
        gaps = self._histogram(metrics.ITL)
        return gaps.share_above(gap_s) if gaps else None

    def gap_bucket_around_s(self, gap_s: float) -> tuple[float, float] | None:
        """The bounds of the bucket in which a gap of so many seconds lies, in seconds."""
        gaps = self._histogram(metrics.ITL)
        return gaps.bucket_around(gap_s) if gaps else None

    def gap_bucket_s(self, quantile: float) -> tuple[float, float] | None:
        """The bounds of the bucket with this quantile of the gaps, in seconds."""
        return self._bucket(metrics.ITL, quantile)

    @property
    def long_gap_s(self) -> float | None:
        """The upper bound of the bucket with the p99 of the gaps, in seconds."""
        bucket = self.gap_bucket_s(0.99)
        return bucket[1] if bucket else None

    @property
    def lacks(self) -> frozenset[Lacking]:
        """The figures that the engine did not show, or of which nothing was counted."""
        known: dict[Lacking, bool] = {
            "TTFT": self.ttft_s is not None,
            "TPOT": self.tpot_s is not None,
            "the gaps between tokens": self._histogram(metrics.ITL) is not None,
            "the time in the queue": self.queue_s is not None,
            "preemptions": self.preemptions is not None,
            "the lengths of prompts": self.median_prompt_tokens is not None,
            # an engine whose cache is off shows that it looked nothing up
            "hits in the prefix cache": metrics.PREFIX_QUERIES in self.counted.values,
            "the number of requests at once": self.decoding is not None,
        }
        return frozenset(name for name, is_known in known.items() if not is_known)

    def _histogram(self, name: str) -> Histogram | None:
        histogram = self.counted.histograms.get(name)
        return histogram if histogram and histogram.count > 0 else None

    def _bucket(self, name: str, quantile: float) -> tuple[float, float] | None:
        histogram = self._histogram(name)
        return histogram.bucket_of(quantile) if histogram else None

    def _mean(self, name: str) -> float | None:
        histogram = self._histogram(name)
        return histogram.mean() if histogram else None

    def _ratio(self, part: str, whole: str) -> float | None:
        total = self.counted.values.get(whole)
        return self.counted.values.get(part, 0.0) / total if total else None


@dataclass(frozen=True)
class Mark:
    """Holds a cause to which the metrics point, and the figures that do: `mark.md` says them."""

    cause: Cause
    figures: Mapping[str, Quantity]
    by_threshold: bool = False  # without a healthy reading


@dataclass(frozen=True)
class Diagnosis:
    """Says what became worse, and which causes the metrics point to, the first one foremost."""

    symptoms: tuple[Symptom, ...]
    marks: tuple[Mark, ...]
    lacking: tuple[Lacking, ...] = ()  # what was not compared, as a reading lacks it
    needed: frozenset[Lacking] = frozenset()  # without which nothing can be said to be well

    @property
    def cause(self) -> Cause:
        """The foremost cause; `healthy` where nothing is worse, and all that is needed is known."""
        if self.marks:
            return self.marks[0].cause
        if self.symptoms:
            return "unknown"
        return "cannot be told" if self.needed.intersection(self.lacking) else "healthy"


class TooLittle(ValueError):
    """A reading has too few requests to be diagnosed; the message says how many."""


def diagnose(now: Reading, healthy: Reading | None = None) -> Diagnosis:
    """Name the cause of worse latency. Without a healthy reading only stated thresholds are used.

    Raises TooLittle where either reading has fewer than LEAST_REQUESTS.
    """
    for reading, name in ((now, "the reading"), (healthy, "the healthy reading")):
        if reading is not None and reading.requests < LEAST_REQUESTS:
            raise TooLittle(
                f"{reading.requests:.0f} requests were finished in {name}, and {LEAST_REQUESTS}"
                " are needed"
            )
    return _by_thresholds(now) if healthy is None else _compared(now, healthy)


# --------------------------------------------------------------------- beside a healthy reading


def _compared(now: Reading, healthy: Reading) -> Diagnosis:
    symptoms = tuple(_symptoms(now, healthy))
    marks = []
    for explains, look in _MARKS:
        if explains.intersection(symptoms) and (mark := look(now, healthy)):
            marks.append(mark)
    lacking = _in_order(now.lacks | healthy.lacks)
    if SLOWER in symptoms and not marks:
        marks.append(_slow_step(now, healthy))
    return Diagnosis(symptoms, tuple(marks), lacking, SYMPTOMS_NEED)


def _in_order(lacking: frozenset[Lacking]) -> tuple[Lacking, ...]:
    return tuple(name for name in get_args(Lacking) if name in lacking)


def _symptoms(now: Reading, healthy: Reading) -> Sequence[Symptom]:
    symptoms: list[Symptom] = []
    if (_factor(now.ttft_s, healthy.ttft_s) or 0.0) > LATER_FIRST_TOKEN:
        symptoms.append(LATER)
    if (_factor(now.tpot_s, healthy.tpot_s) or 0.0) > SLOWER_TOKEN:
        symptoms.append(SLOWER)
    if (more_long_gaps(now, healthy) or 0.0) > MORE_LONG_GAPS:
        symptoms.append(GAPS)
    return symptoms


def more_long_gaps(now: Reading, healthy: Reading) -> float | None:
    """Return by how much the share of gaps above the bucket of the healthy p99 has grown.

    None where either reading lacks the gaps.
    """
    long_s = healthy.long_gap_s
    if long_s is None:
        return None
    above, before = now.gaps_above(long_s), healthy.gaps_above(long_s)
    return None if above is None or before is None else above - before


def more_short_gaps(now: Reading, healthy: Reading) -> float:
    """Return by how much the share of gaps has grown that are shorter than the healthy mean.

    The mean may lie anywhere in its bucket, so this is the larger of two changes: below that
    bucket, and in it or below.
    """
    mean_s = healthy.gap_s
    bounds_s = healthy.gap_bucket_around_s(mean_s) if mean_s else None
    if bounds_s is None:
        return 0.0
    return max(
        (healthy.gaps_above(bound_s) or 0.0) - (now.gaps_above(bound_s) or 0.0)
        for bound_s in bounds_s
    )


def _factor(now: float | None, before: float | None) -> float | None:
    return now / before if now is not None and before else None


def _preemption(now: Reading, healthy: Reading) -> Mark | None:
    count, before = now.preemptions, healthy.preemptions
    if count is None or before is None or count - before < PREEMPTED:
        return None
    return Mark("preemption", {"preemptions": Quantity(count), "healthy": Quantity(before)})


def _speculation(now: Reading, healthy: Reading) -> Mark | None:
    accepted, before = now.accepted, healthy.accepted
    if accepted is None or (before is not None and before - accepted < DRAFTS_LOST):
        return None
    return Mark(
        "speculation",
        {
            "accepted": Quantity(accepted, "share"),
            "healthy": _share(before),
            "slower": _times(now.tpot_s, healthy.tpot_s),
            "later": _times(now.ttft_s, healthy.ttft_s),
        },
    )


def _share(value: float | None) -> Quantity:
    return Quantity(value, "share", why="nothing was counted" if value is None else "")


def _times(now: float | None, before: float | None) -> Quantity:
    factor = _factor(now, before)
    return Quantity(factor, RATIO, why="nothing to compare" if factor is None else "")


def _long_context(now: Reading, healthy: Reading) -> Mark | None:
    median, before = now.median_prompt_tokens, healthy.median_prompt_tokens
    if median is None or before is None or median[0] < before[1]:
        return None
    return Mark("long context", {"tokens": Quantity(median[0]), "healthy": Quantity(before[1])})


def _long_neighbour(now: Reading, healthy: Reading) -> Mark | None:
    longest, before = now.longest_prompt_tokens, healthy.longest_prompt_tokens
    if longest is None or before is None or longest[0] < before[1]:
        return None
    return Mark("long neighbour", {"tokens": Quantity(longest[0]), "healthy": Quantity(before[1])})


def _cold_cache(now: Reading, healthy: Reading) -> Mark | None:
    hits, before = now.hit_rate or 0.0, healthy.hit_rate or 0.0
    if "hits in the prefix cache" in now.lacks or before - hits < HITS_LOST:
        return None
    return Mark("cold cache", {"hits": _share(hits), "healthy": _share(before)})


def _large_budget(now: Reading, healthy: Reading) -> Mark | None:
    longer, shorter = more_long_gaps(now, healthy) or 0.0, more_short_gaps(now, healthy)
    if shorter < MORE_SHORT_GAPS:
        return None
    return Mark("large budget", {"longer": _share(longer), "shorter": _share(shorter)})


def _burst(now: Reading, healthy: Reading) -> Mark | None:
    if now.queue_s is None or healthy.queue_s is None or not now.ttft_s or not healthy.ttft_s:
        return None
    later_s, queued_s = now.ttft_s - healthy.ttft_s, now.queue_s - healthy.queue_s
    if later_s <= 0 or queued_s < QUEUED_SHARE * later_s:
        return None
    slower = _factor(now.tpot_s, healthy.tpot_s) or 1.0
    if now.queue_s < LATER_FIRST_TOKEN * slower * healthy.queue_s:
        return None  # every step is slower, and those that a request waits for are no exception
    return Mark(
        "burst",
        {
            "queue": Quantity(now.queue_s, "s"),
            "healthy": Quantity(healthy.queue_s, "s"),
            "of_added": _share(queued_s / later_s),
        },
    )


def _more_at_once(now: Reading, healthy: Reading) -> Mark | None:
    """Compare how many requests a token shares its step with, itself among them.

    One that comes meets the mean number and joins it, however long the engine idles in between.
    """
    decoding, before = now.decoding, healthy.decoding
    if decoding is None or before is None:
        return None
    by_slower_tokens = before * max(1.0, _factor(now.tpot_s, healthy.tpot_s) or 1.0)
    if 1 + decoding < MORE_AT_ONCE * (1 + by_slower_tokens):
        return None
    return Mark(
        "more requests at once",
        {
            "decoding": Quantity(decoding),
            "healthy": Quantity(before),
            "by_slower_tokens": Quantity(by_slower_tokens),
        },
    )


def _slow_step(now: Reading, healthy: Reading) -> Mark:
    return Mark("slow step", {"slower": _times(now.tpot_s, healthy.tpot_s)})


Look = Callable[[Reading, Reading], Mark | None]
_MARKS: tuple[tuple[frozenset[Symptom], Look], ...] = (
    (frozenset({LATER, SLOWER, GAPS}), _preemption),
    (frozenset({LATER, SLOWER, GAPS}), _speculation),
    (frozenset({LATER, SLOWER, GAPS}), _long_context),
    (frozenset({LATER, SLOWER, GAPS}), _long_neighbour),
    (frozenset({LATER, SLOWER, GAPS}), _cold_cache),
    (frozenset({GAPS}), _large_budget),
    (frozenset({LATER}), _burst),
    (frozenset({SLOWER}), _more_at_once),
)
"""What each cause explains, and how it is recognised; the first mark that is found counts."""

# ------------------------------------------------------------------------------------------ alone


def _by_thresholds(now: Reading) -> Diagnosis:
    """Use thresholds alone: what has grown, cooled down or become slower needs a comparison."""
    marks: list[Mark] = []
    if (now.preemptions or 0.0) >= PREEMPTED:
        marks.append(_alone("preemption", {"preemptions": Quantity(now.preemptions)}))
    if now.accepted is not None and now.accepted < REJECTED:
        figures = {"accepted": _share(now.accepted), "limit": _share(REJECTED)}
        marks.append(_alone("speculation", figures))
    if mark := _neighbour_alone(now):
        marks.append(mark)
    if now.queue_s and now.ttft_s and now.queue_s > QUEUED_SHARE * now.ttft_s:
        figures = {
            "queued": _share(now.queue_s / now.ttft_s),
            "ttft": Quantity(now.ttft_s, "s"),
            "waiting": Quantity(now.waiting or None),
        }
        marks.append(_alone("burst", figures))
    return Diagnosis((), tuple(marks), _in_order(now.lacks & THRESHOLDS_NEED), THRESHOLDS_NEED)


def _alone(cause: Cause, figures: Mapping[str, Quantity]) -> Mark:
    return Mark(cause, figures, by_threshold=True)


def _neighbour_alone(now: Reading) -> Mark | None:
    median, longest = now.median_prompt_tokens, now.longest_prompt_tokens
    gap_s = now.gap_s
    if median is None or longest is None or gap_s is None:
        return None
    long_gaps = now.gaps_above(LONG_GAP * gap_s) or 0.0
    if longest[0] < LONGER_PROMPT * median[1] or long_gaps < MORE_LONG_GAPS:
        return None
    figures = {
        "tokens": Quantity(longest[0]),
        "median": Quantity(median[1]),
        "long_gaps": _share(long_gaps),
        "mean_gaps": Quantity(LONG_GAP),
    }
    return _alone("long neighbour", figures)
