"""What a lookup of n-grams would copy, read from the model's own answers before any engine starts.

How often a copied guess is right depends on the text that the model writes: a small model repeats
its prompt and itself, and a span that is copied is right or wrong as a whole. No probability for
each guess describes that. So the model answers the first requests that will be sent, greedily and
without an engine, and the lookup is made after each token of the answers, as the engine's proposer
would make it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

from pydantic import BaseModel

from serving.models import making
from serving.models.ngram_lookup import looked_up

BATCH = 8  # answers written at once
MOST_S = 180.0  # that all answers of a plan may take

Copied = tuple[tuple[int, int], ...]
"""After each token of an answer: how many tokens are guessed there, and how many are accepted."""


class Lookup(BaseModel, frozen=True, extra="forbid"):
    """How a proposer looks n-grams up: at most so many guesses, after so many equal tokens."""

    guesses: int
    least: int  # tokens of the n-gram
    most: int


class CopyingPlan(BaseModel, frozen=True, extra="forbid"):
    """Whose answers to read, to which requests, and how a lookup is made in them."""

    model: Path  # its folder
    requests: tuple[Path, ...]  # a file for each repeat, as `PlannedTrial` has it
    answers: int  # to the first requests of each file
    lookup: Lookup


class Copying(BaseModel, frozen=True, extra="forbid"):
    """What is copied in the answers to each file's first requests; empty where none was written."""

    answers: tuple[tuple[Copied, ...], ...]


def copying(plan: CopyingPlan) -> Copying:
    """Let the model answer, and look up after each token.

    A model that does not load here, does not fit, or would write for longer than MOST_S, gives no
    answers.
    """
    sent = [_first(plan, path) for path in plan.requests]
    try:
        tokenizer, model = making.load(plan.model)
        written = _answers(plan, [r for requests in sent for r in requests], tokenizer, model)
        return Copying(answers=tuple(tuple(islice(written, len(s))) for s in sent))
    except (making.MakerError, RuntimeError, ValueError):  # the second: out of memory
        return Copying(answers=())


def _first(plan: CopyingPlan, path: Path) -> list[dict[str, Any]]:
    with path.open() as lines:
        own = (request for request in map(json.loads, lines) if not request.get("intruder"))
        return list(islice(own, plan.answers))


def _answers(
    plan: CopyingPlan, requests: Sequence[dict[str, Any]], tokenizer: Any, model: Any
) -> Iterator[Copied]:
    """Answer the requests, and yield what is copied in each answer.

    An answer goes on after its last token, because the engine counts what is accepted beyond it.
    """
    batches = [requests[start : start + BATCH] for start in range(0, len(requests), BATCH)]
    for number, batch in enumerate(batches):
        began_s = monotonic()
        prompts = [making.tokens_of(tokenizer, json.loads(r["body"])["messages"]) for r in batch]
        most = max(r["output_tokens"] for r in batch) + plan.lookup.guesses
        answers = making.answer(model, prompts, most, eos_token_id=-1).tolist()
        if number == 0 and len(batches) * (monotonic() - began_s) > MOST_S:
            raise making.MakerError(f"the answers would take longer than {MOST_S:.0f} s")
        for prompt, answer, request in zip(prompts, answers, batch, strict=True):
            yield copied_in(prompt, answer, request["output_tokens"], plan.lookup)


def copied_in(
    prompt: Sequence[int], answer: Sequence[int], output_tokens: int, lookup: Lookup
) -> Copied:
    """Look up after each of the first `output_tokens` of an answer, and compare with the rest."""
    after = []
    for written in range(1, output_tokens + 1):
        guesses = looked_up([*prompt, *answer[:written]], lookup.guesses, lookup.least, lookup.most)
        agreed = [g == t for g, t in zip(guesses, answer[written:], strict=False)]
        after.append((len(guesses), agreed.index(False) if False in agreed else len(agreed)))
    return tuple(after)


def decoded(copied: Copied) -> tuple[int, int]:
    """Decode an answer with what is copied; return (tokens drafted, tokens accepted)."""
    written, drafted, right = 1, 0, 0
    while written < len(copied):
        guesses, accepted = copied[written - 1]
        drafted, right, written = drafted + guesses, right + accepted, written + accepted + 1
    return drafted, right
