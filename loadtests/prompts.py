"""Writes prompts of an exact number of tokens from English sentences. Pure and seeded.

The sentences come from a small grammar written for this project (no corpus, no licence to carry).
They read as text, so that a model's tokenizer and embedding see ordinary input, but they mean
little. The task is what the model is asked to do with them: continue, tell a story, repeat them
word for word (so that speculative decoding can guess the copy), or change a word that comes again
and again. One task has statements of a program in place of sentences, and a name to change there.
"""

from __future__ import annotations

import contextlib
import random
import re
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, repeat
from pathlib import Path
from typing import Any, Literal, Self

from jinja2 import TemplateError

from loadtests.pieces import by_piece, cuts_before_spaces

Message = dict[str, str]
Messages = list[Message]
CountTokens = Callable[[Messages], int]
Tokenize = Callable[[Messages], Sequence[int | str]]

Task = Literal["continue", "story", "quote", "edit", "code"]

SYSTEM = "Continue."
TASKS: dict[Task, str] = {
    "continue": "",
    "story": "Write a story that goes on from here:",
    "quote": "Repeat this text word for word:",
    "edit": 'Rewrite this text. Use "our" in place of "the":',
    "code": "Rewrite this code with the variable count renamed to total:",
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
_LONGEST_SENTENCE_TOKENS, _LONGEST_WORD_TOKENS = 24, 6  # only to search in larger steps at first
MOST_BEGINNINGS = 256
MOST_ADDED_CHARACTERS = 2**20  # by a chat template to messages; those that are published add 10,000
MOST_RENDERING_BYTES = 2**30  # of memory that a chat template takes
_LEAD = "so"  # in the place of a lead, where only what follows it is of interest
_AFTER_CHARACTERS = 32  # of a text beyond where two differ: enough to split the words there alike
_FILLERS = ("and", "so", "then", "now", "there", "again", "still", "too")
_STATEMENTS = (
    "count = count + {n};", "if (count > {n}) {{ {call}(count); }}", "{name} = count * {n};",
    "while (count < {name}) {{ count += {n}; }}", "{call}(count, {name});",
    "count = {call}({name});",
)  # fmt: skip
_NAMES = ("limit", "width", "price", "offset", "weight", "length", "start", "level")
_CALLS = ("print", "send", "store", "check", "draw", "log", "update", "read")


@dataclass(frozen=True)
class Text:
    """A kind of text: how a sentence of it is drawn, and words that it can be filled up with."""

    sentence: Callable[[random.Random], str]
    fillers: tuple[str, ...]


class _WordTokens(dict[str, int]):
    """Maps a word to its number of tokens after another word; counts it when it is first asked."""

    def __init__(self, count: Callable[[str], int]) -> None:
        super().__init__()
        self._count = count

    def __missing__(self, word: str) -> int:
        without, with_word = (self._count(text) for text in ("so", f"so {word}"))
        self[word] = with_word - without
        return self[word]


class Writer:
    """Writes chat messages that the served model's tokenizer counts as exactly n tokens.

    `count` maps messages to tokens with the chat template and the generation prompt included, and
    `tokenize` to the tokens themselves, where it is to be known what prompts share. A chat begins
    with a system message, unless the template refuses one, as Gemma 2's does.

    Raises jinja2.TemplateError where the template refuses a user's message, too.
    """

    def __init__(self, count: CountTokens, tokenize: Tokenize | None = None) -> None:
        self._count_messages = count
        self._tokenize = tokenize
        self._opening = [{"role": "system", "content": SYSTEM}]
        self._word_tokens = _WordTokens(self._count)
        self._beginnings: dict[str, int] = {}  # beginning of a first message -> tokens in all
        try:
            self.least_tokens = self._count("") + 1
        except TemplateError:
            self._opening = []
            self.least_tokens = self._count("") + 1

    @classmethod
    def of(cls, model_path: str) -> Self:
        """Return the writer for a model folder's tokenizer."""
        tokenize = tokenizer(model_path)
        return cls(lambda messages: len(tokenize(messages)), tokenize)

    def tokens(self, messages: Messages) -> Sequence[int | str]:
        """Return the tokens of messages, with the chat template and the generation prompt."""
        assert self._tokenize, "a writer of a model folder"
        return self._tokenize(messages)

    @property
    def head_tokens(self) -> int:
        """The tokens that all messages begin with, whatever their text; what follows it is not."""
        return self._head_tokens("") if self._tokenize else self.least_tokens - 1

    def _head_tokens(self, lead: str) -> int:
        return self._shared(*(" ".join(filter(None, (lead, text))) for text in ("a", "1")))

    def _shared(self, text: str, other: str) -> int:
        assert self._tokenize
        a, b = (self._tokenize(self._messages(each)) for each in (text, other))
        return _agreeing(a, b)

    def alike(self, texts: Sequence[tuple[str, str]]) -> list[int | None]:
        """Count the tokens with which each text begins as another one does, most at once.

        A text is a lead that was planned, whose tokens do not count, and what follows it; texts
        after other leads are not compared. None where the tokens are not known.
        """
        found: list[int | None] = [0 if self._tokenize else None] * len(texts)
        if not self._tokenize:
            return found
        heads = {led: self._head_tokens(_LEAD if led else "") for led in (False, True)}
        # the text that shares most with another stands beside it
        for one, two in pairwise(sorted(range(len(texts)), key=lambda i: texts[i])):
            (lead, text), (other_lead, other) = texts[one], texts[two]
            if lead != other_lead:
                continue
            end = _agreeing(text, other) + _AFTER_CHARACTERS
            begun = [f"{_LEAD} {t[:end]}" if lead else t[:end] for t in (text, other)]
            tokens = max(0, self._shared(*begun) - heads[bool(lead)])
            found[one], found[two] = (max(found[i] or 0, tokens) for i in (one, two))
        return found

    def chat(
        self,
        tokens: int,
        rng: random.Random,
        lead: str = "",
        history: Sequence[Message] = (),
        task: Task = "continue",
    ) -> Messages:
        """Write messages of exactly `tokens`: `history`, and a user's text that begins with `lead`.

        After the lead follow sentences, or the statements of a program where the task is on code.

        Raises ValueError where the chat template, `history` and `lead` alone are longer, or where
        no text fits.
        """
        least = self._begun(lead, history) + 1
        if tokens < least:
            rest = " and earlier turns" if history else " and its shared prefix" if lead else ""
            cause = f"chat template{rest} take" if rest else "chat template itself takes"
            raise ValueError(f"prompt_tokens={tokens} is below the {least} tokens that the {cause}")
        written = CODE if task == "code" else PROSE
        return self._messages(self._text(tokens, rng, lead, history, written), history)

    def _messages(self, text: str, history: Sequence[Message] = ()) -> Messages:
        return [*(history or self._opening), {"role": "user", "content": text}]

    def _count(self, text: str, history: Sequence[Message] = ()) -> int:
        return self._count_messages(self._messages(text, history))

    def tokens_of(self, text: str) -> int:
        """Count the tokens of a text; those of the chat template are not counted."""
        return self._count(text) - self._count("")

    def lead(self, tokens: int, rng: random.Random) -> str:
        """Write a text of exactly `tokens` that several prompts can begin with.

        The tokens of the chat template are not counted.
        """
        return self._text(self._count("") + tokens, rng, "")

    def _text(
        self,
        total: int,
        rng: random.Random,
        lead: str,
        history: Sequence[Message] = (),
        written: Text | None = None,
    ) -> str:
        """Write `lead` and sentences after it, so that the whole message has `total` tokens.

        The search takes the tokens of a word to be those it has after another word, which is true
        of tokenizers that split at spaces. Where that fails, each attempt is counted as a whole.
        """
        state, written = rng.getstate(), written or PROSE
        by_word = _DraftByWord(lead, lambda first: self._begun(first, history), self._word_tokens)
        text = _search(total, rng, written, by_word)
        if text is not None and self._count(text, history) == total:
            return text
        rng.setstate(state)
        whole = _Draft(lead, lambda attempt: self._count(attempt, history))
        if (text := _search(total, rng, written, whole)) is None:
            raise ValueError(f"no text of exactly {total} tokens was found with this tokenizer")
        return text

    def _begun(self, text: str, history: Sequence[Message]) -> int:
        """Count the tokens of a message that is this text; leads are used often and remembered."""
        if history:
            return self._count(text, history)
        if text not in self._beginnings:
            if len(self._beginnings) >= MOST_BEGINNINGS:
                self._beginnings.clear()
            self._beginnings[text] = self._count(text)
        return self._beginnings[text]


class _Draft:
    """A text that is being written: a lead, and words after it. Each attempt is counted whole."""

    def __init__(self, lead: str, count: Callable[[str], int]) -> None:
        self._lead, self._count = lead, count
        self._words: list[str] = []

    @property
    def text(self) -> str:
        return " ".join(filter(None, (self._lead, *self._words)))

    @property
    def tokens(self) -> int:
        """The tokens of the message that is this text."""
        return self._count(self.text)

    def add(self, *words: str) -> None:
        self._words += words

    def drop(self, count: int) -> None:
        """Take the last words away, all where there are fewer."""
        del self._words[-count:]


class _DraftByWord(_Draft):
    """Such a text, whose tokens are the sum of its beginning's, which are counted, and its words'.

    It begins with the lead, or without one with its first word.
    """

    def __init__(
        self, lead: str, count: Callable[[str], int], word_tokens: Mapping[str, int]
    ) -> None:
        super().__init__(lead, count)
        self._word_tokens = word_tokens
        self._totals = [self._count(lead)]  # with so many words

    @property
    def tokens(self) -> int:
        return self._totals[-1]

    def add(self, *words: str) -> None:
        if not self._lead and not self._words and words:
            self._totals.append(self._count(words[0]))
            self._words.append(words[0])
            words = words[1:]
        each = map(self._word_tokens.__getitem__, words)
        self._totals[-1:] = accumulate(each, initial=self._totals[-1])
        super().add(*words)

    def drop(self, count: int) -> None:
        super().drop(count)
        del self._totals[len(self._words) + 1 :]


def _search(total: int, rng: random.Random, written: Text, draft: _Draft) -> str | None:
    """Add sentences until there are `total` tokens or more; then take words away and add others."""
    while (missing := total - draft.tokens) > 0:
        sentences = range(max(1, missing // _LONGEST_SENTENCE_TOKENS))
        draft.add(*" ".join([written.sentence(rng) for _ in sentences]).split(" "))
    while (excess := draft.tokens - total) > 0:
        draft.drop(max(1, excess // _LONGEST_WORD_TOKENS))
    fillers = sorted(written.fillers, key=lambda _: rng.random())
    for filler in chain.from_iterable(repeat(fillers, total)):
        # a word that was taken away may have had two tokens: single ones are added
        if draft.tokens == total:
            return draft.text
        draft.add(filler)
        if draft.tokens > total:
            draft.drop(1)
    return None


def _agreeing(one: Sequence[object], other: Sequence[object]) -> int:
    """Count the items with which both begin."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _pick(choices: Sequence[str], rng: random.Random) -> str:
    return choices[int(rng.random() * len(choices))]


def _sentence(rng: random.Random) -> str:
    text = " ".join([_pick(part, rng) for part in (_SUBJECTS, _VERBS, _OBJECTS, _ENDINGS)])
    return f"{text[0].upper()}{text[1:]}."


def _statement(rng: random.Random) -> str:
    """Draw a statement in which the variable `count` occurs at least once."""
    form, name, call = (_pick(part, rng) for part in (_STATEMENTS, _NAMES, _CALLS))
    return form.format(name=name, call=call, n=1 + int(rng.random() * 9))


PROSE = Text(_sentence, _FILLERS)
CODE = Text(_statement, (";", "x", "y", "0", "1"))


def counter(model_path: str) -> CountTokens:
    """Return a function that counts chat messages' tokens with a model folder's tokenizer."""
    tokenize = tokenizer(model_path)
    return lambda messages: len(tokenize(messages))


def tokenizer(model_path: str) -> Tokenize:
    """Return a function that turns chat messages into tokens with a model folder's tokenizer.

    The folder's chat template is applied, with the generation prompt. The function raises
    ValueError where the template, which is a program, writes far more than the messages hold.
    """
    if (Path(model_path) / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast as Tokenizer
    else:
        from transformers import AutoTokenizer as Tokenizer  # imports torch, which takes seconds
    loaded = Tokenizer.from_pretrained(model_path)

    def whole(text: str) -> Sequence[int]:
        tokens: Sequence[int] = loaded(text, add_special_tokens=False)["input_ids"]
        return tokens

    backend = getattr(loaded, "backend_tokenizer", None)  # one in plain Python has none
    cuts = backend is not None and cuts_before_spaces(backend)
    encode = by_piece(whole) if cuts else whole

    render = _Frames(lambda messages: _rendered(loaded, messages))

    def tokenize(messages: Messages) -> Sequence[int]:
        return encode(render(messages))

    return tokenize


class _Frames:
    """Renders messages; a chat template is run once for all that differ in plain text alone.

    What it writes about the texts depends on who speaks, for which it is tried with several texts:
    one that changes a text, or looks into it, is run each time.
    """

    PLAIN = re.compile(r"""\w[\w .,;'"(){}=*+]*(?:[<>] [\w .,;'"(){}=*+]*)*(?<! )""")
    TRIED = ("a", 'The keeper\'s "box", at noon. x = (7 * 2);')

    def __init__(self, render: Callable[[Messages], str]) -> None:
        self._render = render
        self._frames: dict[tuple[str, ...], list[str] | None] = {}  # pieces about the texts

    def __call__(self, messages: Messages) -> str:
        texts = [message["content"] for message in messages]
        if not all(map(self.PLAIN.fullmatch, texts)):
            return self._render(messages)
        roles = tuple(message["role"] for message in messages)
        if roles not in self._frames:
            self._frames[roles] = self._frame(roles)
        if (frame := self._frames[roles]) is None:
            return self._render(messages)
        return _joined(frame, texts)

    def _frame(self, roles: Sequence[str]) -> list[str] | None:
        def rendered(texts: Sequence[str]) -> str:
            pairs = zip(roles, texts, strict=True)
            return self._render([{"role": role, "content": text} for role, text in pairs])

        marks = [f"text{place}of{len(roles)}" for place in range(len(roles))]
        frame = re.split("|".join(marks), rendered(marks))
        tried = [marks, *([f"{text} {mark}" for mark in marks] for text in self.TRIED)]
        right = len(frame) == len(marks) + 1 and all(
            _joined(frame, texts) == rendered(texts) for texts in tried
        )
        return frame if right else None


def _joined(frame: Sequence[str], texts: Sequence[str]) -> str:
    return "".join(chain.from_iterable(zip(frame, texts, strict=False))) + frame[-1]


def _rendered(loaded: Any, messages: Messages) -> str:
    most = MOST_ADDED_CHARACTERS + sum(len(message["content"]) for message in messages)
    with contextlib.suppress(MemoryError), _little_memory():
        text: str = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if len(text) <= most:
            return text
    raise ValueError(f"its chat template adds more than {MOST_ADDED_CHARACTERS} characters")


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Have this process take at most `MOST_RENDERING_BYTES` more while the block lasts."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_RENDERING_BYTES
    soft = min([most, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (soft, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
