"""Build the page that says what an engine's metrics point to, with its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from labs.harness.analysis.diagnosis import Diagnosis, Reading, diagnose
from labs.harness.analysis.text import between, number
from labs.harness.derived.lab_modules import BlindTrial
from labs.harness.reports.document import Table
from labs.harness.reports.markdown import Markdown
from labs.harness.reports.templates import filled

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


@dataclass(frozen=True)
class Case:
    """A trial for a reader who is to name what was wrong, and what gives it away."""

    machine: str
    cause: str
    named: str  # by the rule, from the same figures
    figures: Mapping[str, tuple[str, str]]  # name -> healthy, and in this trial
    mark: Markdown  # what the figures say, where the rule named the cause
    meaning: str
    foretold: str

    @property
    def by_cause(self) -> tuple[str, str]:
        """The cause, and what was predicted of it."""
        return self.cause, self.foretold

    @classmethod
    def of(cls, trial: BlindTrial, machine: str) -> Case:
        found = diagnose(trial.now, trial.healthy)
        now, healthy = _figures(trial.now), _figures(trial.healthy)
        mark = next((mark for mark in found.marks if mark.cause == trial.cause), None)
        return cls(
            machine,
            trial.cause,
            found.cause,
            {name: (healthy[name], now[name]) for name in now if name not in NOT_COMPARED},
            filled("mark.md", mark=mark) if mark else Markdown(),
            MEANINGS.get(trial.cause, ""),
            ", ".join(f"{figure} {WAYS[way]}" for figure, way in trial.foretold.items()),
        )


WAYS = {"rises": "up", "falls": "down", "stays": "as before"}
NOT_COMPARED = ("Requests finished", "In decode, mean", "Waiting at the end")
"""Figures that tell nothing between trials and a reference of several, which has no duration."""


def page(
    model: str, seconds: float, now: Reading, healthy: Reading | None, diagnosis: Diagnosis
) -> Markdown:
    """Say what the metrics point to, with the evidence, and show the figures."""
    readings = {"Now": now} | ({"Healthy": healthy} if healthy else {})
    columns = [_figures(reading) for reading in readings.values()]
    return filled(
        "marks.md",
        model=model,
        requests=f"{now.requests:.0f}",
        seconds=f"{seconds:.0f}",
        healthy=healthy is not None,
        diagnosis=diagnosis,
        several=len(diagnosis.marks) > 1,
        meanings=MEANINGS,
        figures=Table(
            ("Figure", *readings),
            ([name, *(figures[name] for figures in columns)] for name in columns[0]),
        ),
    )


def asked(name: str, causes: Sequence[str], page_url: str) -> Markdown:
    """Ask a reader what is wrong in a round of a drill."""
    return filled("drill_asked.md", round=name, causes=causes, page_url=page_url)


def answered(case: Case, answer: str, right: int, rounds: int) -> Markdown:
    """Say what was wrong, what gives it away, and what the rule would have said."""
    return filled(
        "drill_told.md",
        case=case,
        answer=answer,
        right=right,
        rounds=rounds,
        figures=Table(
            ("Figure", "Healthy", "Now"), ([name, *pair] for name, pair in case.figures.items())
        ),
    )


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
