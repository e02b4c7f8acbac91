"""Prompts of an exact number of tokens, made of English sentences. Pure and seeded.

The sentences come from a small grammar written for this project (no corpus, no licence to carry).
They read as text, so that a model's tokenizer and embedding see ordinary input, but they mean
little. What the model is asked to do with them is the task: go on, tell a story, or repeat them
word for word (where what is copied can be guessed).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

Message = dict[str, str]
Messages = list[Message]
CountTokens = Callable[[Messages], int]

Task = Literal["continue", "story", "quote"]

SYSTEM = "Continue."
TASKS: dict[Task, str] = {
    "continue": "",
    "story": "Write a story that goes on from here:",
    "quote": "Repeat this text word for word:",
}
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
_LONGEST_SENTENCE_TOKENS, _LONGEST_WORD_TOKENS = 24, 6  # only to take larger steps at first
_FILLERS = ("and", "so", "then", "now", "there", "again", "still", "too")


class Writer:
    """Writes chat messages that the served model's tokenizer counts as exactly n tokens.

    `count` maps messages to tokens with the chat template and the generation prompt included.
    """

    def __init__(self, count: CountTokens) -> None:
        self._count = count
        self.least_tokens = count(_messages("")) + 1

    def chat(
        self, tokens: int, rng: random.Random, lead: str = "", history: Sequence[Message] = ()
    ) -> Messages:
        """Messages of exactly `tokens`: `history`, and the user's text beginning with `lead`.

        Raises ValueError when the chat template and what is given are longer, or no text fits.
        """
        least = self._count(_messages(lead, history)) + 1
        if tokens < least:
            given = " and earlier turns" if history else " and its shared prefix" if lead else ""
            what = f"chat template{given} take" if given else "chat template itself takes"
            raise ValueError(f"prompt_tokens={tokens} is below the {least} tokens that the {what}")
        return _messages(self._text(tokens, rng, lead, history), history)

    def lead(self, tokens: int, rng: random.Random) -> str:
        """A text of exactly `tokens`, the template's not counted: to begin several prompts with."""
        return self._text(self._count(_messages("")) + tokens, rng, "")

    def _text(
        self, total: int, rng: random.Random, lead: str, history: Sequence[Message] = ()
    ) -> str:
        """`lead` and sentences after it, so that the whole message counts `total` tokens."""
        words: list[str] = []

        def text(*more: str) -> str:
            return " ".join(filter(None, (lead, *words, *more)))

        def count(*more: str) -> int:
            return self._count(_messages(text(*more), history))

        while (missing := total - count()) > 0:
            for _ in range(max(1, missing // _LONGEST_SENTENCE_TOKENS)):
                words += _sentence(rng).split()
        while (excess := count() - total) > 0:
            del words[-max(1, excess // _LONGEST_WORD_TOKENS) :]
        fillers = sorted(_FILLERS, key=lambda _: rng.random())
        for filler in fillers * total:  # a word lost may have been two tokens: add single ones
            if count() == total:
                return text()
            if count(filler) <= total:
                words.append(filler)
        raise ValueError(f"no text of exactly {total} tokens was found with this tokenizer")


def _messages(text: str, history: Sequence[Message] = ()) -> Messages:
    before = history or [{"role": "system", "content": SYSTEM}]
    return [*before, {"role": "user", "content": text}]


def _sentence(rng: random.Random) -> str:
    def pick(choices: Sequence[str]) -> str:
        return choices[int(rng.random() * len(choices))]

    text = f"{pick(_SUBJECTS)} {pick(_VERBS)} {pick(_OBJECTS)} {pick(_ENDINGS)}"
    return f"{text[0].upper()}{text[1:]}."


def counter(model_path: str) -> CountTokens:
    """The token count of chat messages under a model folder's tokenizer and chat template."""
    # the fast class by name: AutoTokenizer imports torch, which takes seconds
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    fast = (Path(model_path) / "tokenizer.json").exists()
    kind = PreTrainedTokenizerFast if fast else AutoTokenizer
    tokenizer = kind.from_pretrained(model_path)

    def count(messages: Messages) -> int:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count
