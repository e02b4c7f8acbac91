"""Prompts of an exact number of tokens, made of English sentences. Pure and seeded.

The sentences come from a small grammar written for this project (no corpus, no licence to carry).
They read as text, so that a model's tokenizer and embedding see ordinary input, but they mean
little: a lab whose answer depends on content must bring its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Messages = list[dict[str, str]]
CountTokens = Callable[[Messages], int]

SYSTEM = "Continue."
_SUBJECTS = (
    "the keeper", "a young clerk", "the old bridge", "our neighbour", "the harbour", "a letter",
    "the engineer", "every traveller", "the river", "a quiet student", "the market", "the captain",
)  # fmt: skip
_VERBS = (
    "followed", "remembered", "carried", "described", "watched", "repaired", "found", "measured",
    "left", "answered", "crossed", "kept",
)  # fmt: skip
_OBJECTS = (
    "the narrow road", "a box of tools", "the first report", "an open window", "the evening train",
    "a long list of names", "the northern field", "a small lamp", "the last page", "two clocks",
    "the empty house", "a map of the coast",
)  # fmt: skip
_ENDINGS = (
    "before the rain came", "in spite of the cold", "without a word", "as everyone had hoped",
    "near the end of the week", "with great care", "for the third time", "while others slept",
    "and nobody was surprised", "because the water was low", "until the bell rang", "at noon",
)  # fmt: skip
_FILLERS = ("and", "so", "then", "now", "there", "again", "still", "too")


class Writer:
    """Writes chat messages that the served model's tokenizer counts as exactly n tokens.

    `count` maps messages to tokens with the chat template and the generation prompt included.
    """

    def __init__(self, count: CountTokens) -> None:
        self._count = count
        self.least_tokens = count(_messages("")) + 1

    def chat(self, tokens: int, rng: random.Random) -> Messages:
        """Raises ValueError when the chat template alone is longer, or no text fits exactly."""
        if tokens < self.least_tokens:
            raise ValueError(
                f"prompt_tokens={tokens} is below the {self.least_tokens} tokens that the chat"
                " template itself takes: give more"
            )
        words: list[str] = []
        while self._count(_messages(" ".join(words))) < tokens:
            words += _sentence(rng).split()
        while self._count(_messages(" ".join(words))) > tokens:
            words.pop()
        fillers = [f for f in sorted(_FILLERS, key=lambda _: rng.random())]
        for filler in fillers * tokens:  # a word lost may have been two tokens: add single ones
            messages = _messages(" ".join(words))
            if self._count(messages) == tokens:
                return messages
            if self._count(_messages(" ".join([*words, filler]))) <= tokens:
                words.append(filler)
        raise ValueError(f"no text of exactly {tokens} tokens was found with this tokenizer")


def _messages(text: str) -> Messages:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def _sentence(rng: random.Random) -> str:
    def pick(choices: Sequence[str]) -> str:
        return choices[int(rng.random() * len(choices))]

    text = f"{pick(_SUBJECTS)} {pick(_VERBS)} {pick(_OBJECTS)} {pick(_ENDINGS)}"
    return f"{text[0].upper()}{text[1:]}."


def counter(model_path: str) -> CountTokens:
    """The token count of chat messages under a model folder's tokenizer and chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def count(messages: Messages) -> int:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count
