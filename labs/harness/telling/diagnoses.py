"""Build the page that says what an engine's metrics point to, with its figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from labs.harness.judging.diagnosis import Diagnosis, Reading
from labs.harness.judging.text import between, number
from labs.harness.telling.document import (
    Inline,
    Paragraph,
    Section,
    Strong,
    bullets,
    section,
    table,
)
from labs.harness.telling.words import shared

MEANINGS = {
    "preemption": "The KV cache is too small for what runs at once. Give it more memory, or lower"
    " max-num-seqs.",
    "speculation": "Guessing ahead does not pay at this load. Turn it off, or guess fewer tokens.",
    "long context": "What is sent has become longer. Each token costs more; nothing is broken.",
    "long neighbour": "Some prompts are far longer than the others. Lower max-num-batched-tokens,"
    " or send them to an engine of their own.",
    "cold cache": "Prompts that used to be found in the prefix cache no longer are: after a"
    " restart, with a prefix that changes (a date in the system prompt), or with more prefixes than"
    " the cache holds.",
    "large budget": "A step takes in too much of a prompt at once. Lower max-num-batched-tokens.",
    "burst": "More requests come than the batch takes. Limit the queue, add an engine, or raise"
    " max-num-seqs where memory admits.",
    "more requests at once": "More traffic comes than before, and a step serves more of it at once;"
    " nothing is broken. Where tokens are too slow, lower max-num-seqs, so that some requests wait,"
    " or add an engine.",
    "slow step": "Look at the engine and the machine: eager mode, CUDA graphs, number types,"
    " kernels, clocks, other work.",
}
NOT_WITHOUT = (
    "Without a healthy reading (BASELINE=) a cold cache, a longer context, a larger token budget,"
    " more requests at once and a slower step cannot be told: there is nothing to compare them"
    " with."
)


def page(
    model: str, seconds: float, now: Reading, healthy: Reading | None, diagnosis: Diagnosis
) -> Section:
    """Say what the metrics point to, with the evidence, and show the figures."""
    return section(
        f"Diagnosis of {model}, {now.requests:.0f} requests in {seconds:.0f} s",
        Paragraph(_foremost(diagnosis, healthy)),
        bullets(
            (Strong(mark.cause), ": ", shared("mark.md", mark=mark), f" {MEANINGS[mark.cause]}")
            for mark in diagnosis.marks
        ),
        Paragraph(NOT_WITHOUT) if healthy is None else None,
        Paragraph(_lacking(diagnosis, healthy)) if diagnosis.lacking else None,
        section("The figures", table(_header(healthy), _rows(now, healthy))),
    )


def _foremost(diagnosis: Diagnosis, healthy: Reading | None) -> Inline:
    worse = f"Beside the healthy reading {' and '.join(diagnosis.symptoms)}. " * bool(
        diagnosis.symptoms
    )
    if diagnosis.marks:
        more = ", and to what follows it below" if len(diagnosis.marks) > 1 else ""
        return (f"{worse}The metrics point to ", Strong(diagnosis.cause), f"{more}.")
    if diagnosis.symptoms:
        return f"{worse}No mark of a cause that the rule knows was found."
    if diagnosis.cause == "cannot be told":
        return (
            "Whether something is wrong cannot be told, as figures are missing. Of the others"
            + (
                " none is beyond its threshold."
                if healthy is None
                else " none is worse than healthy."
            )
        )
    if healthy is None:
        return "Nothing is wrong by the thresholds that need no comparison."
    return "Nothing is wrong: neither first tokens, tokens nor gaps are worse than healthy."


def _lacking(diagnosis: Diagnosis, healthy: Reading | None) -> str:
    names = ", ".join(diagnosis.lacking)
    if healthy is None:
        return f"Not judged, because the reading lacks them: {names}."
    return f"Not compared, because one of the readings lacks them: {names}."


def _header(healthy: Reading | None) -> Sequence[Inline]:
    return ("Figure", "Now", *(("Healthy",) if healthy else ()))


def _rows(now: Reading, healthy: Reading | None) -> list[Sequence[Inline]]:
    columns = [_figures(r) for r in (now, healthy) if r]
    return [(name, *(figures[name] for figures in columns)) for name in columns[0]]


def _figures(reading: Reading) -> dict[str, str]:
    return {
        "Requests finished": number(reading.requests),
        "TTFT, mean": number(reading.ttft_s, "s"),
        "in the queue": number(reading.queue_s, "s"),
        "in prefill": number(reading.prefill_s, "s"),
        "TPOT, mean": number(reading.tpot_s, "s"),
        "Gap between tokens, p99": _within(reading.gap_bucket_s(0.99), "s"),
        "Preemptions a request": number(reading.preemptions),
        "Prefix hit rate": number(reading.hit_rate, "share"),
        "Drafts accepted": number(reading.accepted, "share"),
        "Median prompt": _within(reading.median_prompt_tokens, "tok"),
        "Longest prompt": _within(reading.longest_prompt_tokens, "tok"),
        "In decode, mean": number(reading.decoding),
        "Waiting at the end": number(reading.waiting),
    }


def _within(bounds: tuple[float, float] | None, unit: str) -> str:
    """Write the bucket of a histogram that holds a quantile."""
    if bounds is None:
        return "–"
    low, high = bounds
    if math.isinf(high):
        return f"over {number(low, unit)}"
    return between(low, high, unit)
