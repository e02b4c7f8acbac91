"""What one engine answers, asked through its HTTP API: logprobs, needles and small tasks.

So the kernels and the KV cache that serve are what is measured. Everything is greedy and seeded.

Does scoring a prompt read the quantized KV cache? vLLM's CPU attention is handed nothing but the
cache, so yes: `prompt_logprobs` under an FP8 cache differ from BF16's even in a prompt's first and
only chunk. An engine whose prefill attends to the unquantized keys would show a KL divergence of
zero; needle retrieval goes through the cache even there, since the questions about one text
follow each other and find it in the prefix cache (on by default). Requests for `prompt_logprobs`
never read the prefix cache, so asking twice scores twice.

Kernels round differently for another batch or another share of cached tokens, which alone moves
perplexity by 0.1 to 0.3 % and turns a needle's last digit. So passages are scored one at a time,
and every round of questions brings its own cache salt, lest a second one find the first one's
blocks. What noise is left shows when an engine is asked twice; `at_once=1` leaves next to none.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import requests
from pydantic import BaseModel

TEXTS = Path(__file__).parent / "texts"
TOP = 20  # the most that vLLM's --max-logprobs allows by default
LENGTHS_TOKENS = (256, 512, 1024)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS = ("Lisbon", "Vienna", "Nairobi", "Lima", "Oslo", "Cairo", "Delhi", "Tokyo", "Boston")
SHOTS = 3  # the first lines of each block of tasks.txt are examples
TIMEOUT_S = 120


class Passage(BaseModel, frozen=True, extra="forbid"):
    """A scored text: its tokens from the second on, and at each position the logprobs known."""

    token_ids: tuple[int, ...]
    known: tuple[dict[int, float], ...]  # of the top-K ids and the actual one

    @property
    def logprobs(self) -> list[float]:
        return [known[token] for token, known in zip(self.token_ids, self.known, strict=True)]


class ScoredCompletion(BaseModel, frozen=True, extra="forbid"):
    question: str
    expected: str
    answer: str
    correct: bool
    length_tokens: int | None = None  # of needles: of the filler text, about
    depth: float | None = None


class Evaluation(BaseModel, frozen=True, extra="forbid"):
    """All that one engine said; under a megabyte as JSON."""

    model: str
    passages: tuple[Passage, ...]
    needles: tuple[ScoredCompletion, ...]
    tasks: tuple[ScoredCompletion, ...]
    took_s: float


@dataclass(frozen=True)
class EvaluationClient:
    """A served model, and a salt under which the prefix cache is cold once, then warm."""

    url: str
    model: str
    salt: str = field(default_factory=lambda: uuid4().hex)

    def choice(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of a greedy answer; an HTTP error is raised."""
        greedy = {"model": self.model, "temperature": 0, "seed": 0, "cache_salt": self.salt}
        url = f"{self.url.rstrip('/')}/v1/{path}"
        response = requests.post(url, json={**greedy, **body}, timeout=TIMEOUT_S)
        response.raise_for_status()
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice


@contextlib.contextmanager
def thread_pool(at_once: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what it has not begun when its block fails or is interrupted."""
    with ThreadPoolExecutor(at_once) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def evaluate(
    url: str,
    model: str,
    *,
    lengths_tokens: Sequence[int] = LENGTHS_TOKENS,
    seeds: int = 4,
    quick: bool = False,
    at_once: int = 4,
) -> Evaluation:
    """Ask the engine at `url` everything, greedily; `quick` asks a third and decides little.

    `at_once` requests are in flight with needles and tasks. Fewer than four seeds of needles decide
    nothing: not one difference in 45 answers still leaves ± 6 points.
    """
    start_s = time.monotonic()
    third = slice(None, None, 3 if quick else 1)
    engine = EvaluationClient(url, model)
    texts = [
        (length, seed)
        for length in (lengths_tokens[:2] if quick else lengths_tokens)
        for seed in range(1 if quick else seeds)
    ]
    passages = tuple(score_passage(engine, text) for text in _passages("held_out.txt")[third])
    with thread_pool(at_once) as pool:
        found = pool.map(lambda text: ask_needles(engine, *text), texts)
        tasks = pool.map(lambda task: ask_task(engine, *task), tasks_with_shots()[third])
        return Evaluation(
            model=model,
            passages=passages,
            needles=tuple(chain.from_iterable(found)),
            tasks=tuple(tasks),
            took_s=round(time.monotonic() - start_s, 3),
        )


def score_passage(engine: EvaluationClient, text: str, top: int = TOP) -> Passage:
    """The logprobs of every token but the first, which nothing precedes."""
    body = {"prompt": text, "max_tokens": 1, "prompt_logprobs": top, "return_token_ids": True}
    choice = engine.choice("completions", body)
    return Passage(
        token_ids=choice["prompt_token_ids"][1:],
        known=tuple(
            {int(token): round(found["logprob"], 5) for token, found in position.items()}
            for position in choice["prompt_logprobs"][1:]
        ),
    )


def ask_needles(engine: EvaluationClient, length_tokens: int, seed: int) -> list[ScoredCompletion]:
    """One text with a number at every depth, each asked for in turn: the prefix cache is warm."""
    text, numbers = needles_text(length_tokens, seed)
    replies = []
    for depth, (key, number) in zip(DEPTHS, numbers.items(), strict=True):
        question = f"What is the magic number of {key}?"
        body = {
            "messages": [
                {"role": "user", "content": f"{text}\n\n{question}"},
                {"role": "assistant", "content": f"The magic number of {key} is"},
            ],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "max_tokens": 8,
        }
        answer = engine.choice("chat/completions", body)["message"]["content"] or ""
        replies.append(
            ScoredCompletion(
                question=f"{question} (text {seed})",
                expected=number,
                answer=answer,
                correct=re.search(rf"(?<!\d){number}(?!\d)", answer) is not None,
                length_tokens=length_tokens,
                depth=depth,
            )
        )
    return replies


def needles_text(length_tokens: int, seed: int) -> tuple[str, dict[str, str]]:
    """Held-out sentences with a needle at each depth, and the keys' numbers in that order.

    The length is approximate: held-out prose has 1.13 tokens a word, needles and question have 105.
    """
    rng = random.Random(f"{length_tokens}/{seed}")
    numbers = {key: str(rng.randrange(1000, 10000)) for key in rng.sample(KEYS, len(DEPTHS))}
    every = [s for p in _passages("held_out.txt") for s in re.split(r"(?<=\.) ", p)]
    first, words, sentences = rng.randrange(len(every)), 0, list[str]()
    while words < (length_tokens - 105) / 1.13:
        sentences.append(every[(first + len(sentences)) % len(every)])
        words += len(sentences[-1].split())
    places = [round(depth * len(sentences)) for depth in DEPTHS]
    for place, (key, number) in reversed(list(zip(places, numbers.items(), strict=True))):
        sentences.insert(place, f"The magic number of {key} is {number}.")
    return " ".join(sentences), numbers


def tasks_with_shots() -> list[tuple[str, str, str]]:
    """Of every task: the examples before it, the question, the exact answer."""
    tasks = []
    for block in _passages("tasks.txt"):
        rows = [line.split(" | ") for line in block.splitlines()]
        shots = "".join(f"{question} {answer}\n" for question, answer in rows[:SHOTS])
        tasks += [(shots, question, answer) for question, answer in rows[SHOTS:]]
    return tasks


def ask_task(
    engine: EvaluationClient, shots: str, question: str, expected: str
) -> ScoredCompletion:
    body = {"prompt": shots + question, "max_tokens": 8, "stop": ["\n"]}
    answer = engine.choice("completions", body)["text"].strip()
    return ScoredCompletion(
        question=question, expected=expected, answer=answer, correct=answer == expected
    )


def _passages(name: str) -> list[str]:
    return (TEXTS / name).read_text(encoding="utf-8").strip().split("\n\n")
