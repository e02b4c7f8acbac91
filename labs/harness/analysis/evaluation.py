"""Evaluates the quality of one engine through its HTTP API: logprobs, needles and small tasks.

So what is measured are the kernels and the KV cache that serve. All decoding is greedy and seeded.

Does scoring a prompt read the quantized KV cache? Yes: vLLM's CPU attention is given nothing but
the cache, so that `prompt_logprobs` under an FP8 cache differ from BF16's even in a prompt's first
and only chunk. An engine whose prefill attends to the unquantized keys would show a KL divergence
of zero. Needle retrieval reads the cache even there, since the questions about one text follow
each other and find it in the prefix cache (on by default). Requests for `prompt_logprobs` never
read the prefix cache, so that a second evaluation scores anew.

Kernels round differently for another batch or another share of cached tokens. This alone moves
perplexity by 0.1 to 0.3% and changes the last digit of a needle's number. So passages are scored
one at a time, and every evaluation has its own cache salt, so that a second one does not find the
blocks of the first. The noise that remains shows when an engine is evaluated twice; with
one request at a time there is next to none.
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

from serving.plugins import guard

TEXTS = Path(__file__).parent / "texts"
TOP = 20  # the most that vLLM's --max-logprobs allows by default
LENGTHS_TOKENS = (256, 512, 1024)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS = ("Lisbon", "Vienna", "Nairobi", "Lima", "Oslo", "Cairo", "Delhi", "Tokyo", "Boston")
SHOTS = 3  # the first lines of each block of tasks.txt are examples
TIMEOUT_S = 120
AT_ONCE = 4  # needles and tasks


class Passage(BaseModel, frozen=True, extra="forbid"):
    """A passage is a scored text: its tokens from the second on, with logprobs at each position."""

    token_ids: tuple[int, ...]
    known: tuple[dict[int, float], ...]  # logprobs of the top-K ids and of the actual one

    @property
    def logprobs(self) -> list[float]:
        """The logprob of each actual token, in nats."""
        return [by_id[token] for token, by_id in zip(self.token_ids, self.known, strict=True)]


class ScoredCompletion(BaseModel, frozen=True, extra="forbid"):
    """A question with what the engine completed it with, and whether that is correct."""

    question: str
    expected: str
    answer: str
    correct: bool
    length_tokens: int | None = None  # of a needle's filler text, approximately
    depth: float | None = None  # of a needle: 0 at the beginning of the text, 1 at its end


class Evaluation(BaseModel, frozen=True, extra="forbid"):
    """All that one engine was scored on; as JSON it takes less than a megabyte."""

    model: str
    passages: tuple[Passage, ...]
    needles: tuple[ScoredCompletion, ...]
    tasks: tuple[ScoredCompletion, ...]
    took_s: float


@dataclass(frozen=True)
class EvaluationClient:
    """Sends requests to a served model, under a cache salt of its own.

    The salt makes the prefix cache cold for the first request of a text and warm for the next.
    """

    url: str
    model: str
    salt: str = field(default_factory=lambda: uuid4().hex)

    def complete(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the first choice of a greedy completion; raises `requests.HTTPError`."""
        greedy = {"model": self.model, "temperature": 0, "seed": 0, "cache_salt": self.salt}
        url = f"{self.url.rstrip('/')}/v1/{path}"
        response = requests.post(
            url, json={**greedy, **body}, headers=guard.headers(), timeout=TIMEOUT_S
        )
        response.raise_for_status()
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice


@contextlib.contextmanager
def thread_pool(at_once: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool that drops its queued work when the block fails or is interrupted.

    Interrupted, it does not wait for what is under way, which an engine may never answer.
    """
    pool = ThreadPoolExecutor(at_once)
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    pool.shutdown()


def evaluate(
    url: str,
    model: str,
    *,
    lengths_tokens: Sequence[int] = LENGTHS_TOKENS,
    seeds: int = 4,
    quick: bool = False,
) -> Evaluation:
    """Evaluate the engine at `url` on passages, needles and tasks.

    `quick` takes a third of it, which decides little. Needles and tasks have AT_ONCE requests in
    flight. Fewer than four seeds of needles decide nothing: even where none of 45 completions
    differs, the interval is ± 6 points.
    """
    start_s = time.monotonic()
    third = slice(None, None, 3 if quick else 1)
    client = EvaluationClient(url, model)
    texts = [
        (length, seed)
        for length in (lengths_tokens[:2] if quick else lengths_tokens)
        for seed in range(1 if quick else seeds)
    ]
    passages = tuple(score_passage(client, text) for text in read_passages("held_out.txt")[third])
    with thread_pool(AT_ONCE) as pool:
        needles = pool.map(lambda text: ask_needles(client, *text), texts)
        tasks = pool.map(lambda task: ask_task(client, *task), tasks_with_shots()[third])
        return Evaluation(
            model=model,
            passages=passages,
            needles=tuple(chain.from_iterable(needles)),
            tasks=tuple(tasks),
            took_s=round(time.monotonic() - start_s, 3),
        )


def score_passage(client: EvaluationClient, text: str) -> Passage:
    """Score every token of a text but the first, which nothing precedes."""
    body = {"prompt": text, "max_tokens": 1, "prompt_logprobs": TOP, "return_token_ids": True}
    choice = client.complete("completions", body)
    return Passage(
        token_ids=choice["prompt_token_ids"][1:],
        known=tuple(
            {int(token): round(entry["logprob"], 5) for token, entry in position.items()}
            for position in choice["prompt_logprobs"][1:]
        ),
    )


def ask_needles(client: EvaluationClient, length_tokens: int, seed: int) -> list[ScoredCompletion]:
    """Ask for the number at each depth of one text; the first question warms the prefix cache."""
    text, numbers = needles_text(length_tokens, seed)
    completions = []
    for depth, (key, number) in zip(DEPTHS, numbers.items(), strict=True):
        question = needle_question(key)
        body = {
            "messages": [
                {"role": "user", "content": f"{text}\n\n{question}"},
                {"role": "assistant", "content": needle_lead(key)},
            ],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "max_tokens": 8,
        }
        completion = client.complete("chat/completions", body)["message"]["content"] or ""
        completions.append(
            ScoredCompletion(
                question=f"{question} (text {seed})",
                expected=number,
                answer=completion,
                correct=says_number(completion, number),
                length_tokens=length_tokens,
                depth=depth,
            )
        )
    return completions


def needle_question(key: str) -> str:
    return f"What is the magic number of {key}?"


def needle_lead(key: str) -> str:
    """Begin the sentence that is hidden in a text, and the answer that the model goes on with."""
    return f"The magic number of {key} is"


def says_number(answer: str, number: str) -> bool:
    """Whether the answer has this number, not as a part of a longer one."""
    return re.search(rf"(?<!\d){number}(?!\d)", answer) is not None


def needles_text(length_tokens: int, seed: int) -> tuple[str, dict[str, str]]:
    """Compose held-out sentences with a needle at each depth; return them and key -> number.

    The keys are in the order of the depths. The length is approximate: held-out prose has 1.13
    tokens a word, and the needles with the question have 105 tokens.
    """
    rng = random.Random(f"{length_tokens}/{seed}")
    numbers = {key: str(rng.randrange(1000, 10000)) for key in rng.sample(KEYS, len(DEPTHS))}
    prose = [s for p in read_passages("held_out.txt") for s in re.split(r"(?<=\.) ", p)]
    first, words, sentences = rng.randrange(len(prose)), 0, list[str]()
    while words < (length_tokens - 105) / 1.13:
        sentences.append(prose[(first + len(sentences)) % len(prose)])
        words += len(sentences[-1].split())
    places = [round(depth * len(sentences)) for depth in DEPTHS]
    for place, (key, number) in reversed(list(zip(places, numbers.items(), strict=True))):
        sentences.insert(place, f"{needle_lead(key)} {number}.")
    return " ".join(sentences), numbers


def tasks_with_shots() -> list[tuple[str, str, str]]:
    """List each task as (the examples before it, its question, the exact answer)."""
    tasks = []
    for rows in task_blocks():
        shots = "".join(f"{question} {answer}\n" for question, answer in rows[:SHOTS])
        tasks += [(shots, question, answer) for question, answer in rows[SHOTS:]]
    return tasks


def task_blocks() -> list[list[tuple[str, str]]]:
    """List the blocks of tasks, each (question, answer); the first `SHOTS` of one are examples."""
    blocks = []
    for block in read_passages("tasks.txt"):
        rows = [line.split(" | ") for line in block.splitlines()]
        blocks.append([(question, answer) for question, answer in rows])
    return blocks


def ask_task(
    client: EvaluationClient, shots: str, question: str, expected: str
) -> ScoredCompletion:
    """Ask one task after its examples; it is correct when the line matches exactly."""
    body = {"prompt": shots + question, "max_tokens": 8, "stop": ["\n"]}
    line = client.complete("completions", body)["text"].strip()
    return ScoredCompletion(
        question=question, expected=expected, answer=line, correct=line == expected
    )


def read_passages(name: str) -> list[str]:
    """Read the passages, or blocks, of a file in `TEXTS`."""
    return (TEXTS / name).read_text(encoding="utf-8").strip().split("\n\n")
