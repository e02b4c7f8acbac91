"""What is sent: how long prompts and answers are, and what the prompts say. Pure and seeded."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, PositiveInt, model_validator

from loadtests.arrivals import Arrival
from loadtests.prompts import Messages, Writer

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

    Requests take the groups in turn. The chat template's own first tokens are shared by all, and
    are not counted here.
    """

    tokens: PositiveInt
    groups: PositiveInt = 1


@dataclass(frozen=True)
class Request:
    """One request: chat messages of exactly `prompt_tokens`, and how many tokens to answer."""

    index: int
    messages: Messages
    prompt_tokens: int
    output_tokens: int


class Workload(BaseModel, frozen=True, extra="forbid"):
    """A named mix of requests and the arrivals it is sent with.

    Outputs have exactly the drawn length: the engine is told to ignore its end-of-sequence token,
    because here the lengths are the point, not what is said.
    """

    name: str
    prompt_tokens: Lengths
    output_tokens: Lengths
    prefix: Prefix | None = None
    loads: Annotated[tuple[Arrival, ...], Field(min_length=1)]

    def lengths(self, n: int, seed: int) -> list[tuple[int, int]]:
        """(prompt, output) tokens of the first n requests; needs no tokenizer."""
        prompt_rng, output_rng = (random.Random(f"{seed}/{self.name}/{part}") for part in "po")
        prompts = self.prompt_tokens.draw(n, prompt_rng)
        return list(zip(prompts, self.output_tokens.draw(n, output_rng), strict=True))

    def requests(self, n: int, seed: int, writer: Writer) -> list[Request]:
        """The first n requests, the same for the same seed and tokenizer on any machine."""
        rng = random.Random(f"{seed}/{self.name}/text")
        leads = [""]
        if self.prefix:
            groups = range(min(n, self.prefix.groups))
            leads = [writer.lead(self.prefix.tokens, rng) for _ in groups]
        return [
            Request(i, writer.chat(prompt, rng, leads[i % len(leads)]), prompt, output)
            for i, (prompt, output) in enumerate(self.lengths(n, seed))
        ]

    @property
    def longest_tokens(self) -> int:
        """The longest context a request can reach."""
        return sum(
            part.tokens if isinstance(part, Fixed) else part.max_tokens
            for part in (self.prompt_tokens, self.output_tokens)
        )
