"""Ask for whole answers of each form, and for structures that are new to an engine."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

from labs.harness.analysis.evaluation import thread_pool
from labs.harness.analysis.probes import Probe, ProbedEngine, post
from loadtests.structures import FORMS, Form, Spec, instruction, spec

ASKED_TOKENS, MOST_TOKENS, ASKED_AT_ONCE = 320, 96, 8
"""The tokens of a prompt, with room for any structure; the limit of an answer, beyond any whole
one; and how many answers are asked for at once."""


def structures(served: ProbedEngine, each: int = 6, timed: int = 3) -> dict[str, Any]:
    """Ask for whole answers of each form, and time the first token of forms unseen and seen.

    Answers end as the model or the structure ends them. The engine imposes the structure; the first
    variant also has it asked for in the prompt alone (`asked`), and one not at all (`free`). Each
    timed structure is new to the engine, and is then asked for again.
    """
    rng = random.Random(f"{served.lab.seed}/structures")
    first = served.variant.name == served.lab.variants[0].name

    def body(structure: Spec, how: str, tokens: int) -> dict[str, Any]:
        lead = "" if how == "free" else instruction(structure)
        imposed = {"structured_outputs": structure} if how == "imposed" else {}
        return {"model": served.engine.model, "max_tokens": tokens, "temperature": 0,
                "messages": served.writer.chat(ASKED_TOKENS, rng, lead), **imposed}  # fmt: skip

    def choice(asked: dict[str, Any]) -> tuple[dict[str, Any], int]:
        answer = post(served, "chat/completions", asked)
        answer.raise_for_status()
        fields = answer.json()
        return fields["choices"][0], fields["usage"]["completion_tokens"]

    def took_s(form: Form, mark: str) -> float:
        asked = body(spec(form, mark), "imposed", 1)
        began = time.monotonic()
        choice(asked)
        return time.monotonic() - began

    took = [
        {"form": form, "unseen_s": took_s(form, mark), "seen_s": took_s(form, mark)}
        for form in FORMS
        for mark in (f"p{i:02}" for i in range(timed))
    ]
    asking = [
        (form, how, body(spec(form), how, MOST_TOKENS))
        for form in FORMS
        for how in ("free", "asked", "imposed")
        if how == "imposed" or (first and (how == "asked" or form == FORMS[0]))
        for _ in range(each)
    ]
    with thread_pool(ASKED_AT_ONCE) as pool:
        answered = list(pool.map(lambda asked: choice(asked[2]), asking))
    answers = [
        {"form": form, "how": how, "structure": dict(spec(form)), "tokens": tokens,
         "text": reply["message"]["content"] or "", "finish": reply["finish_reason"]}
        for (form, how, _), (reply, tokens) in zip(asking, answered, strict=True)
    ]  # fmt: skip
    return {"took": took, "answers": answers}


PROBES = {
    "structures": Probe(structures),
    "structures-quick": Probe(partial(structures, each=3, timed=2)),
}
