"""Defines workloads: the lengths of prompts and outputs, and the prompts. Pure and seeded."""

from __future__ import annotations

import bisect
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    model_validator,
)

from loadtests.arrivals import Arrival, Contended, OfSessions, OfTrace
from loadtests.prompts import TASKS, Messages, Task, Writer
from loadtests.records import MOST_TOKENS
from loadtests.structures import LEAST_TOKENS, Spec, Structure, instruction
from loadtests.trace import MOST_ROWS, TraceRow, read_trace

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=100)]
"""What folders, lines of a command and labels of Prometheus are called by."""
Tokens = Annotated[int, Field(gt=0, le=MOST_TOKENS)]
Count = Annotated[int, Field(gt=0, le=10_000)]
MOST_SAMPLES = 1000  # of one prompt
Salted = Literal["conversation", "request"]  # what has a salt of its own
BLOCK = 64  # each block of this many drawn lengths holds the same ones in another order


class Fixed(BaseModel, frozen=True, extra="forbid"):
    """Every length is the same."""

    kind: Literal["fixed"] = "fixed"
    tokens: Tokens

    def draw(self, n: int, rng: random.Random) -> list[int]:
        """Return n lengths in tokens."""
        return [self.tokens] * n


class Exponential(BaseModel, frozen=True, extra="forbid"):
    """Lengths have an exponential distribution, cut at `min_tokens` and at `max_tokens`.

    They are drawn stratified: each block of 64 holds the same 64 quantiles in another order, so
    that two trials differ in the order of their work, not in its amount.
    """

    kind: Literal["exponential"] = "exponential"
    min_tokens: Annotated[Tokens, Field(exclude_if=lambda tokens: tokens == 1)] = 1
    mean_tokens: Tokens  # without the cuts
    max_tokens: Tokens

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min_tokens <= self.mean_tokens <= self.max_tokens:
            raise ValueError(
                f"mean_tokens={self.mean_tokens} must lie between min_tokens={self.min_tokens} and"
                f" max_tokens={self.max_tokens}"
            )
        return self

    def draw(self, n: int, rng: random.Random) -> list[int]:
        """Draw n lengths in tokens."""
        quantiles = [-self.mean_tokens * math.log1p(-(i + 0.5) / BLOCK) for i in range(BLOCK)]
        lengths = [min(self.max_tokens, max(self.min_tokens, round(q))) for q in quantiles]
        blocks: list[int] = []
        while len(blocks) < n:
            # sorting by random() gives the same order on every Python version
            blocks += sorted(lengths, key=lambda _: rng.random())
        return blocks[:n]


Lengths = Annotated[Fixed | Exponential, Field(discriminator="kind")]


class Prefix(BaseModel, frozen=True, extra="forbid"):
    """The first `tokens` of every prompt's text are shared by the requests of a group.

    Requests take the groups in turn, or in the `order` that is given, which begins again at its
    end. With `favourite` they draw them: that share of all takes the first group, and the rest is
    drawn evenly from the others. With several `documents` the shared
    text consists of that many pieces of equal length, as a retrieval system would insert them;
    `shuffled` puts the pieces in another order for every request. The first tokens of the chat
    template, which all requests share, are not counted here, unless `with_template` says so: the
    first `tokens` of a prompt are then all that is shared, or fewer where the shortest prompt would
    have no token of its own.
    """

    tokens: Tokens
    groups: Count = 1
    documents: Count = 1
    shuffled: bool = False
    favourite: Annotated[
        float | None, Field(ge=0, le=1, exclude_if=lambda favourite: favourite is None)
    ] = None
    order: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(max_length=MOST_ROWS, exclude_if=lambda order: not order),
    ] = ()
    with_template: Annotated[bool, Field(exclude_if=lambda with_template: not with_template)] = (
        False
    )

    @model_validator(mode="after")
    def _has_others(self) -> Self:
        if self.favourite is not None and self.groups == 1:
            raise ValueError("favourite is a share beside that of other groups: groups=2 or more")
        if self.order and (self.favourite is not None or max(self.order) >= self.groups):
            raise ValueError("order lists groups by their numbers from 0, and needs no favourite")
        return self

    def drawn(self, n: int, rng: random.Random) -> list[int]:
        """Return the group of each of n requests."""
        if self.favourite is None:
            order = self.order or range(self.groups)
            return [order[i % len(order)] for i in range(n)]
        others = self.groups - 1
        # the same draw on every Python version, as random() is
        return [
            0 if rng.random() < self.favourite else 1 + int(rng.random() * others) for _ in range(n)
        ]


class Chat(BaseModel, frozen=True, extra="forbid"):
    """Requests form conversations: each repeats all earlier turns of its own, and adds one.

    The first turn's prompt has the workload's prompt length, every later one is `grows_tokens`
    longer: the assistant's scripted reply and the user's next message. After `turns` a new
    conversation begins. Under `Sessions` one user sends a conversation's turns, each after the
    answer to the one before; under any other arrival they are sent by whoever is free. `salted`
    gives each conversation, or each request, a `cache_salt` of its own: cached blocks are found
    under the same salt only.
    """

    turns: Count
    grows_tokens: Tokens
    salted: Annotated[Salted | None, Field(exclude_if=lambda salted: salted is None)] = None

    def salt(self, index: int) -> str | None:
        """Return the salt of the request of this index; None where there are no salts."""
        if self.salted is None:
            return None
        return f"{self.salted}-{index if self.salted == 'request' else index // self.turns}"


class Intruder(BaseModel, frozen=True, extra="forbid"):
    """Every fourth request is an intruder's: it has its own lengths and its own schedule."""

    prompt_tokens: Tokens
    output_tokens: Tokens = 1


class Samples(BaseModel, frozen=True, extra="forbid"):
    """Each prompt is answered `count` times, at a temperature.

    Apart, so many requests in a row have the same prompt. With `together` one request asks for all
    answers by `n`; the record of each answer is one of its own, as it is a sequence of its own to
    the engine.
    """

    count: Annotated[int, Field(gt=0, le=MOST_SAMPLES)]
    together: bool = False
    temperature: Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)] = 1.0


class Adapters(BaseModel, frozen=True, extra="forbid"):
    """Each request asks for one of `count` LoRA adapters, `tenant-0` and so on.

    `uniform` takes them in turn; `zipf` draws them, with a probability proportional to 1 / k for
    the adapter of rank k. `suffix` names another set of the same adapters.
    """

    count: Count
    mix: Literal["uniform", "zipf"] = "uniform"
    suffix: str = ""

    def draw(self, n: int, rng: random.Random) -> list[int]:
        """Draw the tenant of each of n requests."""
        if self.mix == "uniform":
            return [i % self.count for i in range(n)]
        weights = [1 / (k + 1) for k in range(self.count)]
        cumulative = [sum(weights[: k + 1]) / sum(weights) for k in range(self.count)]
        # bisecting random() gives the same draw on every Python version
        return [min(bisect.bisect(cumulative, rng.random()), self.count - 1) for _ in range(n)]


def _trace(value: Any) -> Any:
    """Read the trace at a path; leave a trace that was read as it is."""
    return read_trace(Path(value)) if isinstance(value, str | Path) else value


INTRUDER_EVERY = 4


def intrudes(index: int) -> bool:
    """Whether the request of this index is the intruder's, in a workload that has one."""
    return index % INTRUDER_EVERY == INTRUDER_EVERY - 1


@dataclass(frozen=True)
class Asked:
    """What is asked for with a request: its lengths, and the adapter that is to answer."""

    prompt_tokens: int
    output_tokens: int
    adapter: str | None = None  # None for the base model
    structure: Spec | None = None  # that the prompt asks for, whether it is imposed or not


@dataclass(frozen=True)
class Request:
    """One request: chat messages of exactly `prompt_tokens`, and the number of output tokens."""

    index: int
    messages: Messages
    prompt_tokens: int
    output_tokens: int
    intruder: bool = False
    tenant: int | None = None
    adapter: str | None = None  # the adapter's name; None for the base model
    due_s: float | None = None  # its time in the trace
    priority: int = 0  # lower is served first, by an engine that schedules by priority
    salt: str | None = None  # under which its blocks are cached
    imposed: Spec | None = None  # the structure that the engine is to impose
    choices: int = 1  # answers that it asks for
    temperature: float = 0  # at which they are sampled
    # of its text, beyond what is planned: how many another prompt begins with; None: not known
    alike_tokens: int | None = None


@lru_cache(maxsize=64)  # each variant and load of a workload asks for the same
def _drawn(
    prompt_tokens: Lengths, output_tokens: Lengths, chat: Chat | None, name: str, n: int, seed: int
) -> tuple[tuple[int, int], ...]:
    """Draw the (prompt, output) tokens of the first n prompts of the workload of this name."""
    prompt_rng, output_rng = (random.Random(f"{seed}/{name}/{part}") for part in "po")
    turns = chat.turns if chat else 1
    first = prompt_tokens.draw(math.ceil(n / turns), prompt_rng)  # of each conversation
    grows = chat.grows_tokens if chat else 0
    prompts = [first[i // turns] + i % turns * grows for i in range(n)]
    return tuple(zip(prompts, output_tokens.draw(n, output_rng), strict=True))


class Workload(BaseModel, frozen=True, extra="forbid"):
    """A workload is a named mix of requests, and the arrivals with which it is sent.

    Outputs have exactly the drawn length: the engine is told to ignore its end-of-sequence token,
    because the lengths matter here, not the text. `task` is what the prompts ask for, `structure`
    the form that an answer is to have (it is cut off at its length before it could be whole);
    `keep_text` keeps the completions' text in the records; `only` names the variants that it is
    for; `warmup_s` replaces the lab's where that does not suit, and no more than `most_requests`
    are prepared of the lab's, where few can be sent and long prompts take long to write. `primed`
    sends one request of each prefix group before a trial begins, so that everything shared is in
    the cache. A `trace` (the path of a file) gives the lengths of prompts and outputs instead of
    drawn ones, and the times of
    `replay` loads; where the trace is shorter than the requests, its lengths begin again.
    `priorities` are taken by the requests in turn: lower ones are served first, by an engine that
    schedules by priority. With `samples` each prompt is answered several times.
    """

    name: Name
    prompt_tokens: Lengths
    output_tokens: Lengths
    task: Task = "continue"
    prefix: Prefix | None = None
    primed: bool = False
    trace: Annotated[
        tuple[TraceRow, ...], BeforeValidator(_trace), Field(max_length=MOST_ROWS)
    ] = ()
    chat: Chat | None = None
    intruder: Intruder | None = None
    adapters: Adapters | None = None
    priorities: Annotated[
        tuple[int, ...], Field(max_length=100, exclude_if=lambda priorities: not priorities)
    ] = ()
    structure: Annotated[Structure | None, Field(exclude_if=lambda s: s is None)] = None
    samples: Annotated[Samples | None, Field(exclude_if=lambda s: s is None)] = None
    keep_text: bool = False
    only: tuple[str, ...] = ()
    warmup_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    most_requests: Annotated[
        int | None, Field(gt=0, exclude_if=lambda most_requests: most_requests is None)
    ] = None
    loads: Annotated[tuple[Arrival, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        begins = (self.prefix, self.chat, self.task != "continue", self.structure)
        if sum(map(bool, begins)) > 1:
            raise ValueError(
                f"{self.name}: prefix, chat, task and structure each say how prompts begin"
            )
        self._require_cut_off()
        excluded = (
            self.prefix, self.chat, self.structure, self.intruder, self.adapters, self.trace
        )  # fmt: skip
        if self.samples and any(excluded):
            raise ValueError(
                f"{self.name}: samples of a prompt go with no prefix, chat, structure, intruder,"
                " adapters or trace"
            )
        if self.primed and self.prefix is None:
            raise ValueError(f"{self.name}: without a prefix there is nothing to prime")
        if self.primed and self.prefix and (self.prefix.favourite is not None or self.prefix.order):
            raise ValueError(f"{self.name}: only groups that are taken in turn can be primed")
        if not self.trace and any(isinstance(a, OfTrace) for a in self.loads):
            raise ValueError(
                f"{self.name}: a replay needs a trace: workloads.{self.name}.trace=FILE"
            )
        if self.trace and (self.chat or self.intruder):
            raise ValueError(
                f"{self.name}: a trace cannot be combined with chat or intruder: leave one out"
            )
        if not self.chat and any(isinstance(a, OfSessions) for a in self.loads):
            raise ValueError(
                f"{self.name}: sessions need a chat, whose turns they send:"
                f' workloads.{self.name}.chat={{"turns":4,"grows_tokens":64}}'
            )
        contended = [a for a in self.loads if isinstance(a, Contended)]
        if bool(self.intruder) != bool(contended) or len(contended) not in (0, len(self.loads)):
            raise ValueError(
                f"{self.name}: give an intruder and every load as contended:USERS/SECONDS, or"
                " neither"
            )
        return self

    def _require_cut_off(self) -> None:
        """Check that an imposed structure is proved, and cannot be whole before the length is."""
        if not self.structure or not self.structure.imposed:
            return
        if not self.keep_text:
            raise ValueError(f"{self.name}: without keep_text nothing proves an imposed structure")
        lengths = [t.tokens if isinstance(t, Fixed) else t.max_tokens for t in [self.output_tokens]]
        if (longest := max([*lengths, *(row[2] for row in self.trace)])) >= LEAST_TOKENS:
            raise ValueError(
                f"{self.name}: output_tokens={longest} may be more than a structured answer has,"
                f" which ends by itself: fewer than {LEAST_TOKENS} are always cut off"
            )

    @property
    def choices(self) -> int:
        """The answers that one request asks for."""
        return self.samples.count if self.samples and self.samples.together else 1

    @property
    def copies(self) -> int:
        """The requests in a row that have the same prompt."""
        return self.samples.count if self.samples and not self.samples.together else 1

    def is_intruder(self, index: int) -> bool:
        """Whether the request of this index is the intruder's."""
        return self.intruder is not None and intrudes(index)

    def priority(self, index: int) -> int:
        """The priority of the request of this index; 0 where the workload has none."""
        return self.priorities[index % len(self.priorities)] if self.priorities else 0

    def tenants(self, n: int, seed: int) -> list[int | None]:
        """Draw the tenant of each of the first n requests; None where there are no adapters."""
        if self.adapters is None:
            return [None] * n
        return [*self.adapters.draw(n, random.Random(f"{seed}/{self.name}/tenants"))]

    def lengths(self, n: int, seed: int) -> list[tuple[int, int]]:
        """Draw the (prompt, output) tokens of the first n requests, without a tokenizer."""
        copies = self.copies
        prompts = self._lengths(math.ceil(n / copies), seed)
        return prompts if copies == 1 else [prompts[i // copies] for i in range(n)]

    def _lengths(self, n: int, seed: int) -> list[tuple[int, int]]:
        """Draw the (prompt, output) tokens of the first n prompts."""
        if rows := self.trace:
            return [rows[i % len(rows)][1:] for i in range(n)]
        lengths = [*_drawn(self.prompt_tokens, self.output_tokens, self.chat, self.name, n, seed)]
        if self.intruder:
            intruder = (self.intruder.prompt_tokens, self.intruder.output_tokens)
            lengths = [intruder if self.is_intruder(i) else own for i, own in enumerate(lengths)]
        return lengths

    def requests(self, n: int, seed: int, writer: Writer) -> list[Request]:
        """Write the first n requests; one seed and tokenizer give the same ones on any machine."""
        rng = random.Random(f"{seed}/{self.name}/text")
        asked, tenants = self.asked(n, seed), self.tenants(n, seed)
        messages, alike = self._messages(asked[:: self.copies], rng, writer)
        imposed = self.structure is not None and self.structure.imposed
        temperature = self.samples.temperature if self.samples else 0
        return [
            Request(
                i, messages[i // self.copies], own.prompt_tokens, own.output_tokens,
                self.is_intruder(i), tenant, own.adapter,
                self.trace[i][0] if i < len(self.trace) else None, self.priority(i),
                self.chat.salt(i) if self.chat else None,
                own.structure if imposed else None, self.choices, temperature,
                alike[i // self.copies],
            )
            for i, (own, tenant) in enumerate(zip(asked, tenants, strict=True))
        ]  # fmt: skip

    def asked(self, n: int, seed: int) -> list[Asked]:
        """Draw what is asked for with each of the first n requests, without a tokenizer."""
        suffix = self.adapters.suffix if self.adapters else ""
        return [
            Asked(
                prompt,
                output,
                None if tenant is None else f"tenant-{tenant}{suffix}",
                self.structure.spec(f"{seed}x{i}") if self.structure else None,
            )
            for i, ((prompt, output), tenant) in enumerate(
                zip(self.lengths(n, seed), self.tenants(n, seed), strict=True)
            )
        ]

    def _messages(
        self, asked: list[Asked], rng: random.Random, writer: Writer
    ) -> tuple[list[Messages], list[int | None]]:
        """Write the prompts, and count the tokens that each shares with another by chance."""
        if self.chat:
            prompts, turns = self._conversations(asked, rng, writer), self.chat.turns
            # a later turn begins with the turn before it, which is more
            first = writer.alike([("", _text(prompt)) for prompt in prompts[::turns]])
            return prompts, [None if i % turns else first[i // turns] for i in range(len(prompts))]
        if self.structure:
            prompts = [
                writer.chat(own.prompt_tokens, rng, instruction(own.structure))
                for own in asked
                if own.structure
            ]
            return prompts, writer.alike([("", _text(prompt)) for prompt in prompts])
        leads: list[list[str]] = [[task] if (task := TASKS[self.task]) else []]
        group_of = [0] * len(asked)
        if self.prefix:
            documents = self.prefix.documents
            tokens, groups = self.prefix.tokens, self.prefix.groups
            if self.prefix.with_template:
                shortest = min(own.prompt_tokens for own in asked)
                tokens = min(tokens - writer.head_tokens, shortest - writer.least_tokens)
                tokens = max(0, tokens)
            leads = [
                [writer.lead(tokens // documents, rng) for _ in range(documents)]
                for _ in range(groups if self.prefix.order else min(len(asked), groups))
            ]
            group_of = [group % len(leads) for group in self.prefix.drawn(len(asked), rng)]
        prompts, texts = [], []
        for i, own in enumerate(asked):
            pieces = leads[group_of[i]]
            if self.prefix and self.prefix.shuffled:
                pieces = sorted(pieces, key=lambda _: rng.random())
            lead = " ".join(pieces)
            prompts.append(writer.chat(own.prompt_tokens, rng, lead, task=self.task))
            planned = lead if self.prefix else ""  # a task's instruction is not
            texts.append((planned, _text(prompts[-1]).removeprefix(planned).lstrip()))
        alike = writer.alike(texts)
        if self.prefix and len(leads) > 1 and not self.prefix.shuffled:
            # prefixes, too, begin alike by chance, which tells where a cache loses them all
            of_leads = writer.alike([("", " ".join(pieces)) for pieces in leads])
            alike = [
                None if own is None else max(own, of_leads[group_of[i]] or 0)
                for i, own in enumerate(alike)
            ]
        return prompts, alike

    def _conversations(
        self, asked: list[Asked], rng: random.Random, writer: Writer
    ) -> list[Messages]:
        assert self.chat
        prompts: list[Messages] = []
        for i, own in enumerate(asked):
            history: Messages = []
            if i % self.chat.turns:
                reply = writer.lead(self.chat.grows_tokens // 2, rng)
                history = [*prompts[-1], {"role": "assistant", "content": reply}]
            prompts.append(writer.chat(own.prompt_tokens, rng, history=history))
        return prompts

    @property
    def longest_tokens(self) -> int:
        """The longest context that a request can reach, in tokens."""
        if self.trace:
            return max(prompt + output for _, prompt, output in self.trace)
        longest = sum(
            part.tokens if isinstance(part, Fixed) else part.max_tokens
            for part in (self.prompt_tokens, self.output_tokens)
        )
        if self.chat:
            longest += (self.chat.turns - 1) * self.chat.grows_tokens
        if self.intruder:
            longest = max(longest, self.intruder.prompt_tokens + self.intruder.output_tokens)
        return longest


def _text(messages: Messages) -> str:
    """Return the text of the first message that is written for a prompt."""
    return next(message["content"] for message in messages if message["role"] == "user")
