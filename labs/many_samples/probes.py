"""Ask for many answers to tasks with exact solutions, whole and step by step."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from labs.harness.analysis.probes import Probe, ProbedEngine, post
from labs.many_samples.reasoning_steps import BREAK, Chain, chains, is_step
from labs.many_samples.sampled_tasks import tasks

ROUNDS = (1, 4, 16)  # samples that one request asks for
REVISED = 4  # answers one after another; as many as a round has, which revisions stand beside
TASK_TOKENS, TASK_TEMPERATURE = 28, 0.7
"""Of an answer to a task, beyond the longest right one; Wang et al. sample at 0.5 to 0.7."""


def votes(served: ProbedEngine, each: int = 5) -> dict[str, Any]:
    """Ask tasks with exact solutions: one greedy answer, and rounds of samples, one after another.

    Each request asks for all samples of its round by `n`, with nothing else in flight, so that its
    seconds are those of the samples. All samples of a task are drawn alike, whatever their round.
    """
    asked = partial(_completed, served, most_tokens=TASK_TOKENS)
    drawn = tasks(each, served.lab.seed)
    asked(drawn[0].prompt, max(ROUNDS))  # what is first is slow
    return {
        "temperature": TASK_TEMPERATURE,
        "tasks": [
            {
                "kind": task.kind,
                "prompt": task.prompt,
                "expected": task.expected,
                "greedy": asked(task.prompt, 1, temperature=0),
                "rounds": [asked(task.prompt, n) for n in ROUNDS],
            }
            for task in drawn
        ],
    }


def steps(
    served: ProbedEngine, each: int = 10, lengths: tuple[int, ...] = (2, 6)
) -> dict[str, Any]:
    """Ask for sums step by step: whole solutions, searches by a check of steps, and revisions.

    All are asked with nothing else in flight. A round is of n whole solutions at once. A search
    draws n candidates for each step in turn, and goes on from one that is right, else from any. Of
    revisions each is shown the one before it, and the first is that of the round of one.
    """

    tokens_of = served.writer.tokens_of

    def searched(chain: Chain, n: int) -> dict[str, Any]:
        prompt, drawn = chain.prompt, list[dict[str, Any]]()
        for step in chain.steps:
            most_tokens = tokens_of(f" {step}{BREAK}")
            drawn.append(_completed(served, prompt, n, most_tokens, ends=BREAK))
            texts = drawn[-1]["texts"]
            kept = next((text for text in texts if is_step(text, step)), texts[0])
            prompt += f"{kept.rstrip()}{BREAK}"
        return {"n": n, "steps": drawn}

    def asked(chain: Chain) -> dict[str, Any]:
        most_tokens = tokens_of(chain.solution)
        rounds = [_completed(served, chain.prompt, n, most_tokens) for n in ROUNDS]
        revised = rounds[:1]
        while len(revised) < REVISED:
            again = chain.revising(revised[-1]["texts"][0])
            revised.append(_completed(served, again, 1, most_tokens))
        return {
            "prompt": chain.prompt,
            "steps": chain.steps,
            "rounds": rounds,
            "searches": [searched(chain, n) for n in ROUNDS[1:]],
            "revisions": revised,
        }

    drawn = chains(each, lengths, served.lab.seed)
    _completed(served, drawn[0].prompt, max(ROUNDS), TASK_TOKENS)  # what is first is slow
    return {"temperature": TASK_TEMPERATURE, "tasks": [asked(chain) for chain in drawn]}


def _completed(
    served: ProbedEngine,
    prompt: str,
    n: int,
    most_tokens: int,
    temperature: float = TASK_TEMPERATURE,
    ends: str = "",
) -> dict[str, Any]:
    """Ask for n completions of a line, or of what ends before it, and time them together."""
    body = {"model": served.engine.model, "prompt": prompt, "max_tokens": most_tokens, "n": n,
            "temperature": temperature, "stop": ["\n", *ends]}  # fmt: skip
    began = time.monotonic()
    answer = post(served, "completions", body)
    took_s = time.monotonic() - began
    answer.raise_for_status()
    fields = answer.json()
    return {
        "n": n,
        "took_s": took_s,
        "tokens": fields["usage"]["completion_tokens"],
        "texts": [choice["text"] for choice in fields["choices"]],
    }


PROBES = {
    "votes": Probe(votes),
    "votes-quick": Probe(partial(votes, each=1)),
    "steps": Probe(steps),
    "steps-quick": Probe(partial(steps, each=2)),
}
