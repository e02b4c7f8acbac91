"""Asks an engine for needles in a long text, and tells by how much each answer was right or wrong.

The needles are those of the evaluation of quality: five numbers in one text, one asked for. Each
question is asked by itself, one after another, so that batching changes no answer.

*Margin*: along a greedy answer, at each digit of the number, the log-probability of the right digit
minus that of the likeliest other token; the least of these, up to the first wrong digit. It is
above 0 where the number is written as it stands in the text, and below 0 where it is not. An answer
turns from right to wrong only where the margin crosses 0, so the margin moves before accuracy does:
the distance of the right answer from the best wrong one is what rounding has to overcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from labs.harness.analysis.evaluation import (
    DEPTHS,
    TOP,
    EvaluationClient,
    needle_lead,
    needle_question,
    needles_text,
    says_number,
)
from labs.harness.analysis.quality import ratio_of_sums
from labs.harness.analysis.verdicts import CONFIDENCE, Interval

ANSWER_TOKENS = 8
Changes = Mapping[tuple[int, int], Sequence[float]]
"""Maps a text, (its length, its number), to the changes of its needles' margins, in nats."""
Position = Mapping[str, Any]  # a token of an answer with its logprob and the likeliest others'


class Needle(BaseModel, frozen=True, extra="forbid"):
    """A needle that was asked for, and what became of it."""

    text: int  # its number; the needles of a text are asked one after another
    length_tokens: int  # of the text, approximately
    depth: float  # 0 at the beginning of the text, 1 at its end
    distance_tokens: int  # from the needle's first token to the end of the prompt
    expected: str
    answer: str
    correct: bool
    margin_nats: float | None  # None where the answer has no digit, or the engine no logprobs

    @property
    def place(self) -> tuple[int, float]:
        """Where it lies: (length of the text in tokens, depth)."""
        return self.length_tokens, self.depth


def text_lengths(max_model_len: int) -> list[int]:
    """Choose the lengths of the texts: the two longest powers of two that fit.

    A text of N tokens is approximately that long: with its question it may have 1.2 N.
    """
    return [n for n in (2**power for power in range(7, 18)) if 1.2 * n < max_model_len][-2:]


def ask(
    client: EvaluationClient,
    lengths_tokens: Sequence[int],
    texts: int,
    count_tokens: Callable[[str], int],
) -> list[Needle]:
    """Ask for each needle of so many texts of each length; raises `requests.HTTPError`.

    `count_tokens` counts the tokens of a text for the served model.
    """
    needles = []
    for number in range(texts):
        for length in lengths_tokens:
            text, numbers = needles_text(length, number)
            for depth, (key, expected) in zip(DEPTHS, numbers.items(), strict=True):
                body, rest = _question(text, key)
                choice = client.complete("chat/completions", body)
                answer = choice["message"]["content"] or ""
                positions = (choice.get("logprobs") or {}).get("content") or []
                needles.append(
                    Needle(
                        text=number,
                        length_tokens=length,
                        depth=depth,
                        distance_tokens=count_tokens(rest),
                        expected=expected,
                        answer=answer,
                        correct=says_number(answer, expected),
                        margin_nats=margin(expected, positions),
                    )
                )
    return needles


def _question(text: str, key: str) -> tuple[dict[str, Any], str]:
    """Return the request's body, and all that the model reads from the needle's first word on."""
    question, lead = needle_question(key), needle_lead(key)
    body = {
        "messages": [
            {"role": "user", "content": f"{text}\n\n{question}"},
            {"role": "assistant", "content": lead},
        ],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "max_tokens": ANSWER_TOKENS,
        "stop": ["."],
        "logprobs": True,
        "top_logprobs": TOP,
    }
    return body, f"{text[text.index(lead) :]}\n\n{question} {lead}"


def margin(expected: str, positions: Sequence[Position]) -> float | None:
    """Compute the margin of an answer, in nats, from the logprobs at its positions.

    Tokens before the first with a digit are passed over. A right token that is not among the
    likeliest ones is taken to be as likely as the last of them: the true margin is lower.
    """
    margins: list[float] = []
    written = ""
    for position in positions:
        token = str(position["token"])
        if not written and not any(c.isdigit() for c in token):
            continue
        known = {str(t["token"]): float(t["logprob"]) for t in position["top_logprobs"]}
        known.setdefault(token, float(position["logprob"]))
        right = [v for t, v in known.items() if _goes_on(expected, written + t)]
        wrong = [v for t, v in known.items() if not _goes_on(expected, written + t)]
        if not wrong:
            continue
        margins.append((max(right) if right else min(known.values())) - max(wrong))
        written += token.strip()
        if not expected.startswith(written) or written == expected:
            break
    return min(margins) if margins else None


def _goes_on(expected: str, written: str) -> bool:
    return bool(written.strip()) and expected.startswith(written.strip())


# ------------------------------------------------------------------------------------ statistics


def margin_change(before: Sequence[Needle], after: Sequence[Needle]) -> Interval | None:
    """Average the change of the margin over needles that both sides have one of, in nats.

    The interval treats texts as independent and the needles of one text not: Student's t with the
    standard error of a ratio of cluster totals (Cochran 1977, 9.1). None without any margin.
    """
    changes = by_text(before, after)
    if not changes:
        return None
    totals, sizes = ([f(v) for v in changes.values()] for f in (math.fsum, len))
    return ratio_of_sums(totals, sizes)


def adds_up(
    both: Changes,
    parts: Sequence[Changes],
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Divide the change of the margin under two treatments at once by the sum of each alone.

    Over the texts that all have; the interval is that of a ratio of cluster totals. None where
    the sum of the parts is not a loss, so that there is nothing to divide by.
    """
    texts = [t for t in both if all(t in part for part in parts)]
    above = [float(np.mean(both[t])) for t in texts]
    below = [sum(float(np.mean(part[t])) for part in parts) for t in texts]
    if not texts or sum(below) >= 0:
        return None
    return ratio_of_sums(above, below, confidence)


def by_text(before: Sequence[Needle], after: Sequence[Needle]) -> Changes:
    """Map each text, (its length, its number), to the changes of its needles' margins, in nats.

    Raises ValueError where the two sides were not asked for the same needles.
    """
    if [(n.place, n.text, n.expected) for n in before] != [
        (n.place, n.text, n.expected) for n in after
    ]:
        raise ValueError("the two sides were not asked for the same needles")
    changes: dict[tuple[int, int], list[float]] = {}
    for b, a in zip(before, after, strict=True):
        if b.margin_nats is not None and a.margin_nats is not None:
            changes.setdefault((b.length_tokens, b.text), []).append(a.margin_nats - b.margin_nats)
    return changes
