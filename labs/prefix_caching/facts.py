"""Conclude what sharing a prefix gains, what TTFT consists of, and whether timing leaks prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.filing.results import Finding
from labs.harness.judging.judge import Interval, contrast
from labs.harness.judging.text import number, ratio_number, sentences
from labs.harness.spec import Point
from serving import metrics

UNSALTED, SALTED = "no salt", "a `cache_salt` each"
TELLS_BELOW = 0.9  # a ratio of times this far from 1 can be told from a few requests
A_STRANGER = {
    True: "a stranger can",
    False: "a stranger cannot",
    None: "it is not settled whether a stranger can",
}


@dataclass(frozen=True)
class Timed:
    """Holds how long a stranger's prompts took: those a victim had sent before, and new ones."""

    salting: str
    known_median_s: float
    fresh_median_s: float
    ratio: Interval  # known / fresh
    low: float
    high: float

    @property
    def tells(self) -> bool | None:
        """Whether timing tells a known prompt from a fresh one; None where it is not settled."""
        if self.high < 1 and self.ratio.value < TELLS_BELOW:
            return True
        return None if self.low < TELLS_BELOW else False


@dataclass(frozen=True)
class TimingLeak:
    """Says whether timing shows a stranger what was sent before, without and with a salt."""

    prompt_tokens: int
    timed: tuple[Timed, ...]

    @property
    def passed(self) -> bool | None:
        """Whether a salt hides it.

        None where that is not settled, and where timing does not tell without a salt either: then
        there was nothing to hide, or nothing that this timing could see.
        """
        tells = {t.salting: t.tells for t in self.timed}
        if tells.get(SALTED):
            return False
        return True if tells.get(SALTED) is False and tells.get(UNSALTED) else None


def timing_leak(context: Context) -> TimingLeak | None:
    """Divides the time to first token of known prompts by that of fresh ones, paired by round.

    Returns None where the probe did not run.
    """
    variants = context.lab.variants
    probe = next((p for v in variants if (p := context.folder.probe_result("salt", v.name))), None)
    if probe is None:
        return None
    timed = []
    for name, salting in (("shared", UNSALTED), ("salted", SALTED)):
        known, fresh = (
            dict(enumerate(probe["took_s"][f"{name}, {state}"])) for state in ("known", "fresh")
        )
        measured = contrast(known, fresh, paired=True)
        if measured is None or measured.ratio.low is None or measured.ratio.high is None:
            continue
        timed.append(
            Timed(
                salting=salting,
                known_median_s=float(np.median(list(known.values()))),
                fresh_median_s=float(np.median(list(fresh.values()))),
                ratio=measured.ratio,
                low=measured.ratio.low,
                high=measured.ratio.high,
            )
        )
    return TimingLeak(probe["prompt_tokens"], tuple(timed))


def tell_timing(facts: TimingLeak | None) -> Finding:
    title = "Does the cache tell tenants about each other?"
    if facts is None:
        return Finding(title=title, lines=["The probe did not run."])
    rows = [["Stranger's prompt", "Sent before by the victim", "Never sent", "Ratio", "95%"]]
    rows += [
        [
            t.salting,
            number(t.known_median_s, "s"),
            number(t.fresh_median_s, "s"),
            f"{ratio_number(t.ratio.value)}x",
            f"{ratio_number(t.low)} to {ratio_number(t.high)}",
        ]
        for t in facts.timed
    ]
    paired = "Times are medians of single requests; the ratio and its interval are paired by round."
    lines = [*stranger_sentences(facts), paired]
    return Finding(title=title, rows=rows, lines=lines, passed=facts.passed)


def stranger_sentences(facts: TimingLeak) -> list[str]:
    return [
        f"With {t.salting}, {A_STRANGER[t.tells]} tell from its timing that a prompt of"
        f" {facts.prompt_tokens} tokens was sent before."
        for t in facts.timed
    ]


TIMING_LEAK = Conclusion("timing-leak", timing_leak, tell_timing)

# ------------------------------------------------------------------------------------ the answers


def sharing(run: JudgedRun) -> str | None:
    shared = [
        f"{ratio} with {text}"
        for claim, text in (
            ("ttft-share-50", "half of the prompt shared"), ("ttft-share-90", "nine tenths"),
            ("ttft-share-97", "all but a question"),
        )
        if (ratio := run.ratio(claim))
    ]  # fmt: skip
    if not shared:
        return None
    rest = [
        f"{text} {ratio}"
        for claim, text in (
            ("thrash", "with more prefixes than the cache holds, TTFT is"),
            ("cost", "where nothing is shared, throughput is"),
        )
        if (ratio := run.ratio(claim))
    ]
    return sentences([f"the more is shared, the more it helps: TTFT is {', '.join(shared)}", *rest])


def where_to_look(run: JudgedRun) -> str | None:
    """Splits the time to the first token into queue and prefill, as the engine counts them."""
    parts = []
    for variant, workload, users, text in (
        ("off", "share-90", 1, "one prompt at a time, nothing cached"),
        ("off", "share-90", 4, "four at once"),
        ("on", "share-90", 1, "one at a time, its prefix cached"),
    ):
        point = run.point(variant, workload, f"concurrent:{users}")
        if point is None:
            return None
        queue_s = _engine_mean_s(run, point, metrics.QUEUE_TIME)
        prefill_s = _engine_mean_s(run, point, metrics.PREFILL_TIME)
        if queue_s is None or prefill_s is None:
            return None
        parts.append(
            f"{text}, {number(queue_s, 's')} queued and {number(prefill_s, 's')} in prefill"
        )
    return (
        "Look at how the engine itself splits it, into mean time in the queue and mean time in"
        " prefill. Here: " + "; ".join(parts) + "."
        " A long queue means too much load; a long prefill means a long prompt, a cold cache, or"
        " other prompts that are prefilled in the same steps."
    )


def _engine_mean_s(context: Context, point: Point, histogram: str) -> float | None:
    histograms = [
        trial.engine.histograms[histogram]
        for _, _, trial in context.folder.trials([point], context.lab)
        if trial and trial.engine and histogram in trial.engine.histograms
    ]
    count = sum(h.count for h in histograms)
    return sum(h.sum for h in histograms) / count if count else None


def leak_by_time(run: JudgedRun) -> str | None:
    leak = TIMING_LEAK.facts_of(run)
    return " ".join(stranger_sentences(leak)) or None if leak else None


# ------------------------------------------------------------------- what others published

PUBLISHED: PublishedFigures = {
    "claims": {
        "cost": (Published(figure="less than 1% lost", setting="no hits", source="vLLM V1"),),
        "throughput": (
            Published(figure="up to 6.4x", source="SGLang"),
            Published(figure="59 to 498% more capacity", source="Mooncake"),
        ),
        "ttft-share-97": (Published(figure="TTFT a 46th", source="Mooncake Store"),),
    },
    "forecasts": {
        "hit-rate": (Published(figure="94% hits", source="traces of Codex"),),
    },
}

PARTS = ReportParts(
    conclusions=(TIMING_LEAK,),
    answers={"SO-4": sharing, "IP-5": where_to_look, "SA-4": leak_by_time},
    published=PUBLISHED,
    headline=Headline(
        claim="ttft-share-90",
        done="Keeping the nine tenths of a prompt that many requests share",
        figure="the time to the first token",
    ),
)
