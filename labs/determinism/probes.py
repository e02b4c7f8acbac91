"""Ask for the same greedy answers one at a time and several in flight."""

from __future__ import annotations

from functools import partial
from typing import Any

from labs.harness.analysis.evaluation import read_passages, thread_pool
from labs.harness.analysis.probes import Probe, ProbedEngine, post

GREEDY_TOKENS, GREEDY_WORDS = 64, 90  # of an answer, and of the text that it goes on from


def greedy(served: ProbedEngine, texts: int = 24) -> dict[str, Any]:
    """Ask for greedy answers to the same plain texts, one at a time and several in flight.

    A position of an answer is its token, the token's logprob (nats), the best other token, and the
    logprob of that. The first variant is asked one at a time twice, then with 4 and 16 in flight;
    the others one at a time. Each text is prefilled once beforehand, so that an engine with a
    prefix cache finds it there.
    """
    bodies = [
        {"model": served.engine.model, "prompt": " ".join(text.split()[:GREEDY_WORDS]),
         "temperature": 0, "ignore_eos": True, "logprobs": 2, "return_tokens_as_token_ids": True}
        for name in ("held_out.txt", "calibration.txt")
        for text in read_passages(name)
    ][:texts]  # fmt: skip

    def answer(tokens: int, body: dict[str, Any]) -> list[tuple[int, float, int, float]]:
        reply = post(served, "completions", {**body, "max_tokens": tokens})
        reply.raise_for_status()
        known = reply.json()["choices"][0]["logprobs"]
        positions = []
        for token, logprob, top in zip(
            known["tokens"], known["token_logprobs"], known["top_logprobs"], strict=True
        ):
            other = max((each for each in top if each != token), key=top.__getitem__)
            ids = (int(each.rpartition(":")[2]) for each in (token, other))
            positions.append((next(ids), round(logprob, 5), next(ids), round(top[other], 5)))
        return positions

    def answers(at_once: int, tokens: int = GREEDY_TOKENS) -> list[Any]:
        with thread_pool(at_once) as pool:
            return list(pool.map(partial(answer, tokens), bodies))

    answers(1, tokens=1)
    first = served.variant.name == served.lab.variants[0].name
    ways = {"alone": 1, "again": 1, "4": 4, "16": 16} if first else {"alone": 1}
    return {"answers": {way: answers(at_once) for way, at_once in ways.items()}}


PROBES = {
    "greedy": Probe(greedy),
    "greedy-quick": Probe(partial(greedy, texts=12)),
}
