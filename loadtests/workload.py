"""What is sent: how long prompts and answers are, and what the prompts say. Pure and seeded."""

from __future__ import annotations

import bisect
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from loadtests.arrivals import Arrival, Contended, Replay
from loadtests.prompts import TASKS, Messages, Task, Writer
from loadtests.trace import TraceRow, read_trace

BLOCK = 64  # every block of this many drawn lengths holds the same lengths, in another order


class Fixed(BaseModel, frozen=True, extra="forbid"):
    """Every length the same."""

    kind: Literal["fixed"] = "fixed"
    tokens: PositiveInt

    def draw(self, n: int, rng: random.Random) -> list[int]:
        return [self.tokens] * n


class Exponential(BaseModel, frozen=True, extra="forbid"):
    """Exponential lengths, at least 1 and cut at `max_tokens`.

    Drawn stratified: each block of 64 holds the same 64 quantiles shuffled, so that two trials
    differ in order, not in how much work they hold.
    """

    kind: Literal["exponential"] = "exponential"
    mean_tokens: PositiveInt
    max_tokens: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_tokens < self.mean_tokens:
            raise ValueError(f"max_tokens={self.max_tokens} is below mean_tokens")
        return self

    def draw(self, n: int, rng: random.Random) -> list[int]:
        quantiles = [-self.mean_tokens * math.log1p(-(i + 0.5) / BLOCK) for i in range(BLOCK)]
        lengths = [min(self.max_tokens, max(1, round(q))) for q in quantiles]
        drawn: list[int] = []
        while len(drawn) < n:
            # sorting by random() keeps the order the same on every Python version
            drawn += sorted(lengths, key=lambda _: rng.random())
        return drawn[:n]


Lengths = Annotated[Fixed | Exponential, Field(discriminator="kind")]


class Prefix(BaseModel, frozen=True, extra="forbid"):
    """The first `tokens` of every prompt's text are shared by the requests of a group.

    Requests take the groups in turn. With several `documents` the shared text is that many pieces
    of equal length, as a retrieval system would paste them; `shuffled` pastes the same pieces in
    another order for every request. The chat template's own first tokens are shared by all, and
    are not counted here.
    """

    tokens: PositiveInt
    groups: PositiveInt = 1
    documents: PositiveInt = 1
    shuffled: bool = False


class Chat(BaseModel, frozen=True, extra="forbid"):
    """Conversations: each request carries all earlier turns of its own, and adds to them.

    The first turn's prompt has the workload's prompt length, every later one is `grows_tokens`
    longer: the assistant's scripted reply and the user's next message. After `turns` a new
    conversation begins.
    """

    turns: PositiveInt
    grows_tokens: PositiveInt


class Intruder(BaseModel, frozen=True, extra="forbid"):
    """Every fourth request is another's: with its own lengths, sent on its own schedule."""

    prompt_tokens: PositiveInt
    output_tokens: PositiveInt = 1


class Adapters(BaseModel, frozen=True, extra="forbid"):
    """Each request asks for one of `count` LoRA adapters, `tenant-0` and so on.

    `uniform` takes them in turn; `zipf` gives the adapter of rank k a share of 1 / k (exponent 1),
    drawn. `suffix` names another set of the same adapters.
    """

    count: PositiveInt
    mix: Literal["uniform", "zipf"] = "uniform"
    suffix: str = ""

    def draw(self, n: int, rng: random.Random) -> list[int]:
        """The tenant of each of n requests."""
        if self.mix == "uniform":
            return [i % self.count for i in range(n)]
        weights = [1 / (k + 1) for k in range(self.count)]
        marks = [sum(weights[: k + 1]) / sum(weights) for k in range(self.count)]
        # bisecting random() keeps the draw the same on every Python version
        return [min(bisect.bisect(marks, rng.random()), self.count - 1) for _ in range(n)]


def _trace(value: Any) -> Any:
    """A path is read; what was read passes on."""
    return read_trace(Path(value)) if isinstance(value, str | Path) else value


INTRUDER_EVERY = 4


def intrudes(index: int) -> bool:
    """Whether this request is the intruder's, where there is one."""
    return index % INTRUDER_EVERY == INTRUDER_EVERY - 1


@dataclass(frozen=True)
class Request:
    """One request: chat messages of exactly `prompt_tokens`, and how many tokens to answer."""

    index: int
    messages: Messages
    prompt_tokens: int
    output_tokens: int
    intruder: bool = False
    tenant: int | None = None
    adapter: str | None = None  # its name; None asks for the base model
    due_s: float | None = None  # in its trace


class Workload(BaseModel, frozen=True, extra="forbid"):
    """A named mix of requests and the arrivals it is sent with.

    Outputs have exactly the drawn length: the engine is told to ignore its end-of-sequence token,
    because here the lengths are the point, not what is said. `task` is what prompts ask for;
    `keep_text` keeps the answers' text in the records; `only` names the variants it is for;
    `warmup_s` replaces the lab's where that is too short. `primed` sends one request of each prefix
    group before a trial begins, so that all that is shared is in the cache. A `trace` (a file, by
    its path) gives the lengths of prompts and answers in place of those drawn, and the times of
    `replay` loads; where it ends before the requests do, its lengths begin again.
    """

    name: str
    prompt_tokens: Lengths
    output_tokens: Lengths
    task: Task = "continue"
    prefix: Prefix | None = None
    primed: bool = False
    trace: Annotated[tuple[TraceRow, ...], BeforeValidator(_trace)] = ()
    chat: Chat | None = None
    intruder: Intruder | None = None
    adapters: Adapters | None = None
    keep_text: bool = False
    only: tuple[str, ...] = ()
    warmup_s: PositiveFloat | None = None
    loads: Annotated[tuple[Arrival, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if sum(map(bool, (self.prefix, self.chat, self.task != "continue"))) > 1:
            raise ValueError(f"{self.name}: prefix, chat and task each say how prompts begin")
        if self.primed and self.prefix is None:
            raise ValueError(f"{self.name}: without a prefix there is nothing to prime")
        if not self.trace and any(isinstance(a, Replay) for a in self.loads):
            raise ValueError(
                f"{self.name}: a replay needs a trace: workloads.{self.name}.trace=FILE"
            )
        if self.trace and (self.chat or self.intruder):
            raise ValueError(f"{self.name}: a trace knows no chats and no intruders")
        contended = [a for a in self.loads if isinstance(a, Contended)]
        if bool(self.intruder) != bool(contended) or len(contended) not in (0, len(self.loads)):
            raise ValueError(f"{self.name}: contended loads and an intruder belong together")
        return self

    def is_intruder(self, index: int) -> bool:
        return self.intruder is not None and intrudes(index)

    def tenants(self, n: int, seed: int) -> list[int | None]:
        """The tenant of each of the first n requests; None where there are no adapters."""
        if self.adapters is None:
            return [None] * n
        return [*self.adapters.draw(n, random.Random(f"{seed}/{self.name}/tenants"))]

    def lengths(self, n: int, seed: int) -> list[tuple[int, int]]:
        """(prompt, output) tokens of the first n requests; needs no tokenizer."""
        if rows := self.trace:
            return [rows[i % len(rows)][1:] for i in range(n)]
        prompt_rng, output_rng = (random.Random(f"{seed}/{self.name}/{part}") for part in "po")
        prompts = self.prompt_tokens.draw(n, prompt_rng)
        if self.chat:
            grows, turns = self.chat.grows_tokens, self.chat.turns
            prompts = [p + i % turns * grows for i, p in enumerate(prompts)]
        drawn = list(zip(prompts, self.output_tokens.draw(n, output_rng), strict=True))
        if self.intruder:
            other = (self.intruder.prompt_tokens, self.intruder.output_tokens)
            drawn = [other if self.is_intruder(i) else own for i, own in enumerate(drawn)]
        return drawn

    def requests(self, n: int, seed: int, writer: Writer) -> list[Request]:
        """The first n requests, the same for the same seed and tokenizer on any machine."""
        rng = random.Random(f"{seed}/{self.name}/text")
        lengths, tenants = self.lengths(n, seed), self.tenants(n, seed)
        messages = self._messages(lengths, rng, writer)
        return [
            Request(
                i, text, prompt, output, self.is_intruder(i), tenant,
                None if tenant is None or self.adapters is None
                else f"tenant-{tenant}{self.adapters.suffix}",
                self.trace[i][0] if i < len(self.trace) else None,
            )
            for i, (text, (prompt, output), tenant) in enumerate(
                zip(messages, lengths, tenants, strict=True)
            )
        ]  # fmt: skip

    def _messages(
        self, lengths: list[tuple[int, int]], rng: random.Random, writer: Writer
    ) -> list[Messages]:
        if self.chat:
            return self._conversations(lengths, rng, writer)
        instruction = TASKS[self.task]
        leads: list[list[str]] = [[instruction] if instruction else []]
        if self.prefix:
            each, documents = self.prefix.tokens // self.prefix.documents, self.prefix.documents
            leads = [
                [writer.lead(each, rng) for _ in range(documents)]
                for _ in range(min(len(lengths), self.prefix.groups))
            ]
        found = []
        for i, (prompt, _) in enumerate(lengths):
            pieces = leads[i % len(leads)]
            if self.prefix and self.prefix.shuffled:
                pieces = sorted(pieces, key=lambda _: rng.random())
            found.append(writer.chat(prompt, rng, " ".join(pieces)))
        return found

    def _conversations(
        self, lengths: list[tuple[int, int]], rng: random.Random, writer: Writer
    ) -> list[Messages]:
        assert self.chat
        found: list[Messages] = []
        for i, (prompt, _) in enumerate(lengths):
            history: Messages = []
            if i % self.chat.turns:
                reply = writer.lead(self.chat.grows_tokens // 2, rng)
                history = [*found[-1], {"role": "assistant", "content": reply}]
            found.append(writer.chat(prompt, rng, history=history))
        return found

    @property
    def longest_tokens(self) -> int:
        """The longest context a request can reach."""
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
